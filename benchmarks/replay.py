"""A block trace through the pure core: hit ratios, what the SSD and the origin get, time.

The core is the real one, ``CacheIndex`` with its LRU; there is no device, no origin and no mount.
What the engine would do with each request is counted: origin reads, one for each run of blocks
that lack pages; fills; writes in each mode. Slots are reclaimed by the engine's own rule: below
``low`` free ones up to ``high``, the least recently used first, at once and not beside; with
``--reserve none`` one at a time, when a slot is needed, as in the LRU of the books. In write-back
the cleaner looks around every 0.5 s of the trace's own time and needs no time for its work; what
is dirty at the end is written back at the end. A slot is free again as soon as its block has left.

``--check`` compares every count of hits with ``plain_lru.py``, request by request, and stops at
the first that differs. Of write-back it checks a cleaner that writes back all it finds at each
look: which blocks of one age the real one takes first follows from slot numbers.

``--through-mount N`` sends the first N requests of each trace through a real mount and compares
its counters with the replay's after every request, and all data; see ``replay_mount.py``.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import block_trace
import harness
from block_trace import Trace
from harness import GIB, KIB, MIB, BenchmarkError
from plain_lru import PlainLru

from fusecache.config import Tuning, check_block_size, parse_size
from fusecache.core.geometry import Geometry, merged
from fusecache.core.index import CacheIndex
from fusecache.engine.reclaimer import Reclaimer
from fusecache.errors import UsageError

MODES = ("through", "around", "back")
DEFAULT_SIZES = "10%,25%,50%,100%"
LOOK = 0.5
"""Seconds between two looks of the cleaner."""
LONGEST_WRITEBACK = 1 * MIB
CLEANER_BATCH = 8 * MIB
"""Bytes; after each batch the cleaner asks anew whether younger data has to go, too."""
_BARRIER_REQUESTS = 4096


@dataclass
class Counts:
    """What came of a trace. Requests are whole ones; pages and bytes are those they touch."""

    reads: int = 0
    read_hits: int = 0
    read_pages: int = 0
    read_page_hits: int = 0
    read_hit_bytes: int = 0
    """Asked for in blocks all of whose asked pages were cached, as ``status`` counts it."""
    read_bytes: int = 0
    writes: int = 0
    write_hits: int = 0
    write_pages: int = 0
    write_page_hits: int = 0
    write_bytes: int = 0
    fill_bytes: int = 0
    """Origin -> SSD."""
    ssd_write_bytes: int = 0
    """Guest -> SSD, with what completes pages that are written in part."""
    origin_reads: int = 0
    origin_read_bytes: int = 0
    origin_writes: int = 0
    origin_write_bytes: int = 0
    writeback_pages: int = 0
    blocks: int = 0
    """Blocks of all requests: how often the core is asked for one."""
    not_stored: int = 0
    reclaimed: int = 0


class Replay:
    """A cache of ``slots`` slots that is given requests.

    Args:
        mode: one of ``MODES``.
        reserve: slots are kept free as the engine does; else one leaves when one is needed.
        dirty_age: seconds; None for the daemon's own. 0 writes back all there is at each look.
    """

    def __init__(
        self,
        block_size: int,
        slots: int,
        mode: str,
        sizes: dict[int, int],
        *,
        reserve: bool = True,
        dirty_age: float | None = None,
    ) -> None:
        self.geometry = Geometry.of(block_size)
        self.core = CacheIndex(self.geometry, slots)
        self.counts = Counts()
        self.mode = mode
        self._sizes = sizes
        # Only to ask it for its limits: it has nothing to do anything with.
        limits = Reclaimer(self.core, cast(Any, None), cast(Any, None))
        self.low, self.high = (limits.low, limits.high) if reserve else (0, 0)
        tuning = Tuning()
        self.most_dirty = max(1, int(slots * tuning.dirty_limit))
        self._crowd = max(1, int(slots * tuning.dirty_low))
        self._age = tuning.dirty_age if dirty_age is None else dirty_age
        self._next_look = LOOK
        self._batch = max(1, CLEANER_BATCH >> self.geometry.block_shift)
        self._longest = max(1, LONGEST_WRITEBACK >> self.geometry.block_shift)

    def request(self, volume: int, offset: int, length: int, *, write: bool) -> None:
        """One read or write of ``length`` > 0 bytes."""
        if write:
            self._write(volume + 1, offset, length)
        else:
            self._read(volume + 1, offset, length)

    # -- reads ---------------------------------------------------------------------------------

    def _read(self, image: int, offset: int, length: int) -> None:
        counts, geometry, core = self.counts, self.geometry, self.core
        counts.reads += 1
        counts.read_bytes += length
        pages = ((offset + length - 1) >> geometry.page_shift) - (offset >> geometry.page_shift) + 1
        counts.read_pages += pages
        counts.blocks += len(geometry.blocks(offset, length))
        if core.hit(image, offset, length) is not None:
            counts.read_hits += 1
            counts.read_page_hits += pages
            counts.read_hit_bytes += length
            return
        missing: dict[int, int] = {}
        for block, start, stop in geometry.split(offset, length):
            need = geometry.touched(start, stop)
            have = core.valid_pages(image, block)
            counts.read_page_hits += (need & have).bit_count()
            if need & ~have:
                missing[block] = self._pages_of_image(image, block) & ~have
            else:
                core.locate(image, block)  # a use
                counts.read_hit_bytes += stop - start
        for run in merged(list(missing)):
            self._origin_read(run, missing)
        for block, lacking in missing.items():
            self._fill(image, block, lacking)
        self._make_reserve()

    def _pages_of_image(self, image: int, block: int) -> int:
        left = self._sizes[image - 1] - (block << self.geometry.block_shift)
        return self.geometry.touched(0, min(self.geometry.block_size, left))

    def _origin_read(self, run: range, missing: dict[int, int]) -> None:
        """One, from the first page that is lacking to the last."""
        shift = self.geometry.page_shift
        first, last = missing[run.start], missing[run.stop - 1]
        begin = ((first & -first).bit_length() - 1) << shift
        end = ((len(run) - 1) << self.geometry.block_shift) + (last.bit_length() << shift)
        self.counts.origin_reads += 1
        self.counts.origin_read_bytes += end - begin

    def _fill(self, image: int, block: int, pages: int) -> None:
        slot = self._begin_store(image, block)
        if slot is None:
            self.counts.not_stored += 1
            return
        self.core.stored(slot, pages)
        self.counts.fill_bytes += pages.bit_count() << self.geometry.page_shift

    # -- room ----------------------------------------------------------------------------------

    def _begin_store(self, image: int, block: int) -> int | None:
        slot = self.core.begin_store(image, block)
        if slot is None and not self.low and self._reclaim(1):
            slot = self.core.begin_store(image, block)
        return slot

    def _reclaim(self, count: int) -> int:
        got = self.core.reclaim(count)
        self.counts.reclaimed += got
        self._barrier()
        return got

    def _barrier(self) -> None:
        """What is owed would be in the database now, and what left can be used again."""
        self.core.take_owed()
        self.core.release(self.core.take_leaving())

    def _make_reserve(self) -> None:
        if self.core.free < self.low:
            self._reclaim(self.high - self.core.free)

    # -- writes --------------------------------------------------------------------------------

    def _write(self, image: int, offset: int, length: int) -> None:
        counts, geometry, core = self.counts, self.geometry, self.core
        counts.writes += 1
        counts.write_bytes += length
        hits = pages = 0
        parts = list(geometry.split(offset, length))
        for block, start, stop in parts:
            need = geometry.touched(start, stop)
            pages += need.bit_count()
            hits += (need & core.valid_pages(image, block)).bit_count()
        counts.write_pages += pages
        counts.write_page_hits += hits
        counts.write_hits += hits == pages
        counts.blocks += len(parts)
        if self.mode == "around":
            for block, start, stop in parts:
                core.clear(image, block, geometry.touched(start, stop))
            self._origin_write(length)
            if core.leaving:
                self._barrier()
            return
        if self.mode == "back":
            self._write_back(image, parts)
        else:
            for block, start, stop in parts:
                self._through(image, block, start, stop, 0)
            self._origin_write(length)
        self._make_reserve()

    def _origin_write(self, length: int) -> None:
        self.counts.origin_writes += 1
        self.counts.origin_write_bytes += length

    def _through(self, image: int, block: int, start: int, stop: int, held: int) -> None:
        """What of one block goes to its slot beside the origin: pages that are written whole, and
        pieces of valid ones, but none that are ``held`` (a mask)."""
        geometry = self.geometry
        pages = geometry.covered(start, stop)
        pages |= geometry.touched(start, stop) & self.core.valid_pages(image, block)
        pages &= ~held
        if not pages:
            return
        slot = self._begin_store(image, block)
        if slot is None:
            return
        self.core.stored(slot, pages)
        self.counts.ssd_write_bytes += self._bytes_in(pages, start, stop)

    def _bytes_in(self, pages: int, start: int, stop: int) -> int:
        """How many bytes of ``start:stop`` in a block lie in these pages (a mask)."""
        runs = self.geometry.page_runs(pages)
        return sum(min(at + size, stop) - max(at, start) for at, size in runs)

    def _write_back(self, image: int, parts: list[tuple[int, int, int]]) -> None:
        """All to slots while pages may become dirty; else what is dirty alone. The rest goes
        through, neighbouring bytes in one origin write."""
        geometry, core = self.geometry, self.core
        soils = core.dirty.blocks < self.most_dirty
        past = [0]
        for block, start, stop in parts:
            touched = geometry.touched(start, stop)
            held = touched if soils else touched & core.dirty.held(image, block)
            if held and not self._soil(image, block, start, stop, held):
                held = 0
            for page in range(geometry.pages_per_block):
                if touched >> page & 1:
                    size = self._bytes_in(1 << page, start, stop)
                    past += [0] if held >> page & 1 else []
                    past[-1] += 0 if held >> page & 1 else size
            self._through(image, block, start, stop, held)
        for length in past:
            if length:
                self._origin_write(length)

    def _soil(self, image: int, block: int, start: int, stop: int, pages: int) -> bool:
        """These pages (a mask) of a write become dirty; False: there is no slot."""
        counts, geometry, core = self.counts, self.geometry, self.core
        slot = self._begin_store(image, block)
        if slot is None:
            return False
        partly = pages & ~geometry.covered(start, stop) & ~core.valid_pages(image, block)
        for _, size in geometry.page_runs(partly):  # the rest of these pages is fetched
            counts.origin_reads += 1
            counts.origin_read_bytes += size
        counts.ssd_write_bytes += self._bytes_in(pages & ~partly, start, stop)
        counts.ssd_write_bytes += partly.bit_count() << geometry.page_shift
        core.stored_dirty(slot, pages)
        core.unpin(slot)
        return True

    # -- the cleaner ---------------------------------------------------------------------------

    def tick(self, now: float) -> bool:
        """It is ``now``, in seconds; True if the cleaner was due for a look and had it."""
        if now < self._next_look:
            return False
        self._next_look = now - now % LOOK + LOOK
        self.core.dirty.advance(now)
        while True:
            crowded = self.core.dirty.blocks > self._crowd
            age = 0 if crowded else self._age
            due = self.core.dirty.due_images(age)
            if not sum(self._clean(image, age) for image in due):
                return True

    def finish(self) -> None:
        """The end: all that is dirty goes back."""
        while images := self.core.dirty.images():
            for image in images:
                self._clean(image, 0)

    def _clean(self, image: int, age: float) -> int:
        """One batch of the image; returns how many blocks."""
        dirty, geometry = self.core.dirty, self.geometry
        slots = dirty.due(image, self._batch, older_than=age)
        written: list[tuple[int, int]] = []
        for item in dirty.snapshot(image, slots):
            written.append((item.block, dirty.begin_writeback(item)))
            dirty.cleaned(item.slot)
            dirty.settled(item.slot)
        end = first = -1
        for block, pages in written:
            if block - first >= self._longest or not first <= block:
                first, end = block, -1
            self.counts.writeback_pages += pages.bit_count()
            for start, size in geometry.page_runs(pages):
                at = (block << geometry.block_shift) + start
                self.counts.origin_writes += at != end
                self.counts.origin_write_bytes += size
                end = at + size
        dirty.sync_begins()  # else it would remember every slot that was ever written to
        return len(written)


def clock(trace: Trace, rate: float) -> Callable[[int, int], float]:
    """Seconds of a request from (its number, its time): its time if the trace has any, else as if
    ``rate`` came in a second."""
    if len(trace) and int(trace.time.max()) > 0:
        return lambda number, microseconds: microseconds / 1e6
    return lambda number, microseconds: number / rate


def replay(trace: Trace, made: Replay, rate: float) -> float:
    """All requests as fast as they go; returns seconds."""
    rows, seconds = trace.rows(), clock(trace, rate)
    back = made.mode == "back"
    request, core = made.request, made.core
    begin = time.perf_counter()
    for number, (at, volume, offset, length, operation) in enumerate(rows):
        if back:
            made.tick(seconds(number, at))
        request(volume, offset, length, write=operation == block_trace.WRITE)
        if not number % _BARRIER_REQUESTS:
            core.take_owed()
    made.finish()
    return time.perf_counter() - begin


def check(
    trace: Trace, block_size: int, slots: int, mode: str, rate: float, *, reserve: bool
) -> Counts:
    """The replay beside ``PlainLru``, compared after every request.

    Raises:
        BenchmarkError: they differ; it says where.
    """
    sizes = trace.sizes(block_size)
    made = Replay(block_size, slots, mode, sizes, reserve=reserve, dirty_age=0)
    page = max(4 * KIB, block_size // 16)
    plain = PlainLru(block_size, page, slots, mode, made.low, made.high, made.most_dirty)
    counts, seconds = made.counts, clock(trace, rate)
    for number, (at, volume, offset, length, operation) in enumerate(trace.rows()):
        if mode == "back" and made.tick(seconds(number, at)):
            plain.clean()
        write = operation == block_trace.WRITE
        made.request(volume, offset, length, write=write)
        plain.request(volume, offset, length, write=write)
        ours = (counts.read_hits, counts.read_page_hits, counts.fill_bytes // page)
        ours += (counts.write_hits, counts.write_page_hits)
        theirs = (plain.hits["read"], plain.page_hits["read"], plain.filled_pages)
        theirs += (plain.hits["write"], plain.page_hits["write"])
        if ours != theirs:
            raise BenchmarkError(
                f"{trace.name}, write-{mode}, {slots} slots: after request {number} (offset "
                f"{offset}, {length} bytes) the core has {ours}, a plain LRU {theirs}: read hits, "
                "read page hits, filled pages, write hits, write page hits"
            )
    made.finish()
    plain.clean()
    if counts.writeback_pages != plain.cleaned_pages:
        raise BenchmarkError(
            f"{trace.name}: {counts.writeback_pages} pages written back, not {plain.cleaned_pages}"
        )
    made.core.check()
    return counts


# -- what is printed ---------------------------------------------------------------------------


def percent(part: int, whole: int) -> str:
    """``41.37``, or a dash of nothing."""
    return f"{100 * part / whole:.2f}" if whole else "-"


def row(size: int, mode: str, counts: Counts, seconds: float) -> list[str]:
    """One line of the table."""
    requests = counts.reads + counts.writes
    return [
        f"{size / MIB:.0f} MiB, {mode}",
        percent(counts.read_hits, counts.reads),
        percent(counts.read_page_hits, counts.read_pages),
        percent(counts.write_hits, counts.writes),
        percent(counts.write_page_hits, counts.write_pages),
        f"{counts.fill_bytes / GIB:.2f}",
        f"{counts.ssd_write_bytes / GIB:.2f}",
        f"{counts.origin_reads / 1e3:.1f}",
        f"{counts.origin_read_bytes / GIB:.2f}",
        f"{counts.origin_writes / 1e3:.1f}",
        f"{counts.origin_write_bytes / GIB:.2f}",
        f"{seconds * 1e6 / max(1, requests):.1f}",
        f"{seconds * 1e6 / max(1, counts.blocks):.1f}",
    ]


COLUMNS = ["cache, write mode", "read hit %", "of pages", "write hit %", "of pages"]
COLUMNS += ["fills, GiB", "writes, GiB", "origin reads, k", "GiB", "writes, k", "GiB"]
COLUMNS += ["us/request", "us/block"]


def without(trace: Trace) -> list[str]:
    """The line of no cache at all."""
    write = trace.operation == block_trace.WRITE
    reads, writes = int((~write).sum()), int(write.sum())
    read_gib = int(trace.length[~write].sum()) / GIB
    write_gib = int(trace.length[write].sum()) / GIB
    found = ["no cache", "-", "-", "-", "-", "-", "-", f"{reads / 1e3:.1f}", f"{read_gib:.2f}"]
    return [*found, f"{writes / 1e3:.1f}", f"{write_gib:.2f}", "", ""]


def sizes_of(text: str, trace: Trace, block_size: int) -> list[int]:
    """Cache sizes in bytes: ``256M``, or ``10%`` of the bytes that the trace touches, in 4 KiB
    pages; at least 16 blocks."""
    unique = trace.unique_bytes(4 * KIB)
    found = []
    for word in text.split(","):
        if word.strip().endswith("%"):
            size = int(unique * float(word.strip()[:-1]) / 100)
        else:
            size = parse_size(word)
        found.append(max(16, size // block_size) * block_size)
    return found


def measure(trace: Trace, chosen: argparse.Namespace, sizes: list[int]) -> list[dict[str, Any]]:
    """Every size in every mode: prints the table and returns the numbers."""
    found, rows = [], [without(trace)]
    reserve = chosen.reserve == "engine"
    writes = bool((trace.operation == block_trace.WRITE).any())
    for size in sizes:
        for mode in chosen.modes if writes else chosen.modes[:1]:
            ends = trace.sizes(chosen.block)
            made = Replay(chosen.block, size // chosen.block, mode, ends, reserve=reserve)
            seconds = replay(trace, made, chosen.rate)
            rows.append(row(size, mode, made.counts, seconds))
            settings = {"size": size, "mode": mode, "low": made.low, "high": made.high}
            found.append({**settings, "seconds": seconds, **asdict(made.counts)})
    unique = trace.unique_bytes(4 * KIB) / MIB
    title = f"{trace.name}: {len(trace)} requests, {unique:.0f} MiB touched in 4 KiB pages, "
    title += f"blocks of {chosen.block // KIB} KiB, reserve: {chosen.reserve}"
    harness.table(title, COLUMNS, rows)
    return found


def checked(trace: Trace, chosen: argparse.Namespace, sizes: list[int]) -> None:
    """``check`` of every size and mode, with the engine's reserve and one at a time."""
    writes = bool((trace.operation == block_trace.WRITE).any())
    for size in sizes:
        for mode in chosen.modes if writes else chosen.modes[:1]:
            for reserve in (True, False):
                counts = check(
                    trace, chosen.block, size // chosen.block, mode, chosen.rate, reserve=reserve
                )
                rule = "engine's reserve" if reserve else "one at a time"
                hits = counts.read_hits + counts.write_hits
                print(
                    f"equal: {trace.name}, {size // MIB} MiB, write-{mode}, {rule}: {hits} request "
                    f"hits, {counts.read_page_hits + counts.write_page_hits} page hits, "
                    f"{counts.reclaimed} victims",
                    flush=True,
                )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help=".fct.xz or .csv")
    parser.add_argument(
        "--size",
        default=DEFAULT_SIZES,
        help="of the cache, several with commas: 256M, or 10%% of the bytes the trace touches",
    )
    parser.add_argument("--block", default="64K", help="block size")
    parser.add_argument("--modes", default=",".join(MODES), help="write modes")
    parser.add_argument("--reserve", choices=("engine", "none"), default="engine")
    parser.add_argument("--unknown", choices=("read", "write"), default="read")
    parser.add_argument("--skip", type=int, default=0, help="so many requests at the beginning")
    parser.add_argument("--requests", type=int, help="no more than so many")
    parser.add_argument(
        "--rate", type=float, default=1000.0, help="requests a second where there are no times"
    )
    parser.add_argument("--check", action="store_true", help="compare with a plain LRU")
    parser.add_argument("--through-mount", type=int, metavar="N", default=0)
    parser.add_argument("--directory", help="where to mount; default: the system's temporary one")
    chosen = parser.parse_args()
    chosen.modes = chosen.modes.split(",")
    if unknown := set(chosen.modes) - set(MODES):
        parser.error(f"no such write mode: {', '.join(sorted(unknown))}")
    try:
        chosen.block = check_block_size(parse_size(chosen.block))
    except UsageError as exc:
        parser.error(str(exc))
    return chosen


def main() -> None:
    """Every trace: measured, and checked if that was asked for."""
    chosen = options()
    found: dict[str, Any] = {}
    for path in chosen.traces:
        trace = block_trace.read_trace(path)
        trace = trace.usable(block_trace.READ if chosen.unknown == "read" else block_trace.WRITE)
        trace = trace.part(chosen.skip, chosen.requests)
        if not len(trace):
            raise BenchmarkError(f"{path} has no requests")
        try:
            sizes = sizes_of(chosen.size, trace, chosen.block)
        except (UsageError, ValueError) as exc:
            raise BenchmarkError(str(exc)) from exc
        found[trace.name] = measure(trace, chosen, sizes)
        if chosen.check:
            checked(trace, chosen, sizes)
        if chosen.through_mount:
            import replay_mount

            replay_mount.run(trace.part(0, chosen.through_mount), chosen, sizes[0])
    harness.save("replay", {"block": chosen.block, "reserve": chosen.reserve, "traces": found})


if __name__ == "__main__":
    harness.run(main)
