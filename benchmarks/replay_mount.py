"""The first requests of a trace through a real mount, beside the same through the pure core.

After every request that moves anything the daemon's own counters, those of ``status``, have to be
the replay's, to the byte; the next request waits until the daemon has done what goes on beside
(storing a fill, reclaiming), so that one can compare. Every read is compared with a copy of the
images, and so is every block that was touched, at the end.

One counter has some play: of a read that found some blocks and fetched others, the daemon counts
those it fetched as hits if they were stored before the read came to them. How many bytes that
was is said at the end.

Write-around is left out: a slot that a write has emptied is free after the next barrier in the
daemon and at once in the replay. In write-back the daemon is told to write nothing back by
itself, and a trace that soils more than the cleaner leaves alone is refused.
"""

import argparse
import mmap
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import block_trace
import harness
import numpy as np
from block_trace import Trace
from harness import KIB, MIB, BenchmarkError, Fusecache
from replay import Counts, Replay

from fusecache.control import client
from fusecache.store.superblock import DATA_OFFSET

MODES = ("through", "back")
_LONGEST = 1 * MIB
"""The kernel cuts longer requests."""
_PAGE = 4 * KIB
_PATIENCE = 10.0
_EVERY = 100
_DIRTY_LIMIT = 90


class Mounted:
    """Images, a copy of each, and a mount of them."""

    def __init__(self, base: Path, trace: Trace, block: int, slots: int, mode: str) -> None:
        self.base = base
        self.sizes = trace.sizes(block)
        origin = base / "origin"
        origin.mkdir()
        self._copies = {}
        for volume, size in self.sizes.items():
            self._stamp(origin / _name(volume), trace, volume, size)
            harness.command("cp", "--sparse=always", origin / _name(volume), base / _name(volume))
            self._copies[volume] = os.open(base / _name(volume), os.O_RDWR)
        time.sleep(harness.SETTLED)
        words = ["--write-mode", mode, "--block-size", str(block)]
        if mode == "back":
            words += ["--dirty-age", "3600", "--dirty-limit", str(_DIRTY_LIMIT)]
        self.mount = Fusecache(base, origin, *words)
        if "--readahead" in self.mount.run("mount", "--help"):  # the replay fetches nothing ahead
            self.mount.arguments += ("--readahead", "0")
        with self.mount.cache.open("wb") as file:
            file.truncate(DATA_OFFSET + slots * block)
        self._buffer = mmap.mmap(-1, _LONGEST)
        self._fds: dict[int, int] = {}

    @staticmethod
    def _stamp(path: Path, trace: Trace, volume: int, size: int) -> None:
        """Every page that the trace touches says which it is; the rest is a hole."""
        with path.open("wb") as file:
            file.truncate(size)
            for _, of, offset, length, _ in trace.rows():
                if of == volume:
                    first, last = offset // _PAGE, (offset + length - 1) // _PAGE
                    pages = np.arange(first, last + 1, dtype="<u8") << np.uint64(16)
                    file.seek(first * _PAGE)
                    file.write(np.repeat(pages | np.uint64(volume), _PAGE // 8).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def open(self) -> None:
        """The images, as a guest does. Only what is written to must be open for writing."""
        for volume in self.sizes:
            path = self.mount.mountpoint / _name(volume)
            self._fds[volume] = os.open(path, os.O_RDWR | os.O_DIRECT)

    def read(self, volume: int, offset: int, length: int) -> None:
        """Raises BenchmarkError if the data is not the copy's."""
        view = memoryview(self._buffer)[:length]
        got = os.preadv(self._fds[volume], [view], offset)
        if got != length or view != os.pread(self._copies[volume], length, offset):
            raise BenchmarkError(f"wrong data at {offset}, {length} bytes of volume {volume}")

    def write(self, volume: int, offset: int, data: bytes) -> None:
        """To the mount and to the copy."""
        self._buffer[: len(data)] = data
        view = memoryview(self._buffer)[: len(data)]
        if os.pwritev(self._fds[volume], [view], offset) != len(data):
            raise BenchmarkError(f"a write of {len(data)} bytes at {offset} was cut short")
        os.pwrite(self._copies[volume], data, offset)

    def status(self) -> dict[str, Any]:
        """Straight from the control socket: 1 ms, where a command takes 300."""
        (socket,) = self.mount.runtime.glob("*.sock")
        return client.ask(socket, {"verb": "status", "images": []}, timeout=30)

    def compare_all(self, trace: Trace, block: int) -> None:
        """Every block that the trace touches, whole, through the mount."""
        touched: set[tuple[int, int]] = set()
        for _, volume, offset, length, _ in trace.rows():
            blocks = range(offset // block, (offset + length - 1) // block + 1)
            touched.update((volume, number) for number in blocks)
        for volume, number in sorted(touched):
            self.read(volume, number * block, block)

    def close(self) -> None:
        """Ends the mount; twice does nothing."""
        for fd in (*self._fds.values(), *self._copies.values()):
            os.close(fd)
        self._fds, self._copies = {}, {}
        self.mount.close()


def _name(volume: int) -> str:
    return f"volume{volume}.raw"


def pieces(trace: Trace) -> Iterator[tuple[int, int, int, bool]]:
    """(volume, offset, length, whether it is a write), none longer than the kernel passes on."""
    for _, volume, offset, length, operation in trace.rows():
        for at in range(offset, offset + length, _LONGEST):
            size = min(_LONGEST, offset + length - at)
            yield volume, at, size, operation == block_trace.WRITE


def seen(status: dict[str, Any]) -> dict[str, int]:
    """What ``status`` says, under the names of ``expected``."""
    names = ["read_hit_bytes", "read_miss_bytes", "write_bytes", "origin_reads"]
    names += ["origin_read_bytes", "origin_writes", "origin_write_bytes"]
    found = {name: sum(image[name] for image in status["images"]) for name in names}
    cache = status["cache"]
    found["stored_bytes"] = cache["stored_bytes"]
    found["reclaimed"], found["free"] = cache["blocks_reclaimed"], cache["slots_free"]
    return found


def expected(made: Replay, mode: str) -> dict[str, int]:
    """What the replay has counted."""
    counts: Counts = made.counts
    stored = counts.fill_bytes + (counts.ssd_write_bytes if mode == "through" else 0)
    return {
        "read_hit_bytes": counts.read_hit_bytes,
        "read_miss_bytes": counts.read_bytes - counts.read_hit_bytes,
        "write_bytes": counts.write_bytes,
        "origin_reads": counts.origin_reads,
        "origin_read_bytes": counts.origin_read_bytes,
        "origin_writes": counts.origin_writes,
        "origin_write_bytes": counts.origin_write_bytes,
        "stored_bytes": stored,
        "reclaimed": counts.reclaimed,
        "free": made.core.free,
    }


def _agree(mounted: Mounted, made: Replay, mode: str, play: int, doing: str) -> int:
    """Waits until the daemon's counters are the replay's, but for ``play`` bytes of misses that
    may count as hits; returns how many did.

    Raises:
        BenchmarkError: they do not become so.
    """
    wanted = expected(made, mode)
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = seen(mounted.status())
        early = found["read_hit_bytes"] - wanted["read_hit_bytes"]
        if 0 < early <= play:
            found["read_hit_bytes"] -= early
            found["read_miss_bytes"] += early
        if found == wanted:
            return early
        if time.monotonic() > deadline:
            unlike = [
                f"{name} {found[name]}, not {wanted[name]}"
                for name in wanted
                if found[name] != wanted[name]
            ]
            raise BenchmarkError(f"the mount differs from the replay {doing}: {'; '.join(unlike)}")


def go(mounted: Mounted, made: Replay, trace: Trace, mode: str) -> int:
    """All requests, one after the other; returns the bytes that counted as hits too early."""
    source = random.Random(1)
    play = 0
    before = replace(made.counts)
    for number, (volume, offset, length, write) in enumerate(pieces(trace)):
        doing = f"after request {number} ({'write' if write else 'read'} of {length} at {offset})"
        made.request(volume, offset, length, write=write)
        if write:
            mounted.write(volume, offset, source.randbytes(length))
        else:
            mounted.read(volume, offset, length)
        hit = made.counts.read_hit_bytes - before.read_hit_bytes
        if not write and 0 < hit < length:
            play += length - hit
        moved = write or made.counts.fill_bytes != before.fill_bytes
        before = replace(made.counts)
        if moved or not number % _EVERY:
            _agree(mounted, made, mode, play, doing)
        # The cleaner begins at half of the limit.
        if made.core.dirty.blocks * 200 > made.core.slot_count * _DIRTY_LIMIT:
            raise BenchmarkError(f"too much is dirty {doing}: take a larger --size")
    return _agree(mounted, made, mode, play, "at the end")


def run(trace: Trace, chosen: argparse.Namespace, size: int) -> None:
    """A trace through a mount of each write mode that can be compared.

    Raises:
        BenchmarkError: data or a counter is not what it has to be.
    """
    slots = size // chosen.block
    writes = bool((trace.operation == block_trace.WRITE).any())
    for mode in [mode for mode in MODES if mode in chosen.modes][: None if writes else 1]:
        with harness.workspace(chosen.directory) as base:
            mounted = Mounted(base, trace, chosen.block, slots, mode)
            made = Replay(chosen.block, slots, mode, mounted.sizes)
            made.most_dirty = max(1, slots * _DIRTY_LIMIT // 100)
            try:
                mounted.mount.start()
                mounted.open()
                begin = time.perf_counter()
                early = go(mounted, made, trace, mode)
                seconds = time.perf_counter() - begin
                mounted.compare_all(trace, chosen.block)
            finally:
                mounted.close()
        counts = made.counts
        print(
            f"through a mount: {trace.name}, {len(trace)} requests, {size // MIB} MiB, "
            f"write-{mode}, {seconds:.0f} s: data right, and equal to the byte: "
            f"{counts.read_hit_bytes} of {counts.read_bytes} bytes read hit (the daemon says "
            f"{early} more), "
            f"{counts.origin_reads} origin reads, {counts.origin_writes} origin writes, "
            f"{counts.reclaimed} victims",
            flush=True,
        )
