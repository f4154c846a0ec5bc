"""Large caches: up to 1 TiB cached, 16.8 million blocks of 64 KiB, beside one of 1 GiB.

Goals at 1 TiB: after a clean start at most 15 s from the start of ``fusecache mount`` to the first
hit (at 100 GiB 3 s); at most 48 bytes of memory a slot (growth of RSS over a tiny cache); while
loading at most twice that growth; 4 KiB random hits at depth 32 within 10% of those of the 1 GiB
cache, over as many blocks, in memory for all. After kill -9 the start is measured again; 2.4 s is
what a published design took for 100 GiB.

Cache and origin are sparse files and the rows are written without a daemon, every block in a slot
of its own chosen at random: the least favourable order. For the hits all caches are mounted at
once and take turns.
"""

import argparse
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import numpy as np
import picture
import scale_picture
from harness import BLOCK, GIB, KIB, MIB, BenchmarkError, Fusecache

from fusecache.cli.cache import default_database
from fusecache.config import parse_size
from fusecache.core.geometry import REGION_BLOCKS
from fusecache.store import cache_device
from fusecache.store.block_map import Batch, BlockMap, ImageRow
from fusecache.store.origin import Attributes
from fusecache.store.packing import PackedRegion, RegionColumns
from fusecache.store.superblock import DATA_OFFSET, Superblock
from fusecache.store.tree import Tree

IMAGE = "image.raw"
SIZES = "1G,100G,1T"
FIRST_HIT_GOALS_S = {"100G": 3.0, "1T": 15.0}
KILLED_GOALS_S = {"100G": 2.4}
SLOT_GOAL_BYTES = 48
PEAK_GOAL = 2.0
RATE_GOAL = 0.9
LARGE = 1_000_000
"""Slots from which on memory a slot is more than noise."""
WINDOW = 1 * GIB
"""Of each image is read for the rates."""
JOBS: dict[str, dict[str, object]] = {
    "kiops": {"rw": "randread", "bs": "4k", "iodepth": 32},
    "depth 1": {"rw": "randread", "bs": "4k", "iodepth": 1},
}
STAMP = b"this came from the slot".ljust(4 * KIB, b".")
_ORDER_PART = 1 << 16


def build(mount: Fusecache, slots: int, cached: int) -> int:
    """Formats the cache and writes a database with ``cached`` blocks; returns a cached block."""
    with mount.cache.open("wb") as file:
        file.truncate(DATA_OFFSET + slots * BLOCK)
    mount.run("format", mount.cache)
    fd = os.open(mount.cache, os.O_RDWR)
    try:
        superblock = cache_device.read_superblock(fd, mount.cache)
        rng = np.random.default_rng(1)
        slot_of = rng.permutation(slots)[:cached].astype(np.uint32)
        probe = cached // 3
        os.pwrite(fd, STAMP, DATA_OFFSET + int(slot_of[probe]) * BLOCK)
    finally:
        os.close(fd)
    ticks = rng.permutation(slots).astype(np.uint64) + np.uint64(1)
    _write_database(mount, superblock, slot_of, ticks)
    return probe


def _write_database(
    mount: Fusecache,
    superblock: Superblock,
    slot_of: np.ndarray[Any, np.dtype[np.uint32]],
    ticks: np.ndarray[Any, np.dtype[np.uint64]],
) -> None:
    path = default_database(mount.cache, superblock)
    block_map = BlockMap.open(path, superblock)
    parts = range(0, ticks.size, _ORDER_PART)
    order = [(first, ticks[first : first + _ORDER_PART]) for first in parts]
    block_map.commit(Batch(images=[_image_row(mount.origin)], order=order), stable=True)
    block_map.add_regions(_regions(slot_of))
    block_map.detach()
    block_map.close()


def _regions(slot_of: np.ndarray[Any, np.dtype[np.uint32]]) -> Iterator[PackedRegion]:
    for first in range(0, slot_of.size, REGION_BLOCKS):
        part = slot_of[first : first + REGION_BLOCKS]
        columns = RegionColumns(None)
        columns.slots[: part.size] = part
        columns.valid[: part.size] = 0xFFFF
        yield columns.pack(1, first // REGION_BLOCKS)


def _image_row(origin: Path) -> ImageRow:
    """What fusecache would have recorded of the image had it filled the cache itself."""
    tree = Tree(origin)
    root = tree.find_root()
    found = tree.find(root.fd, os.fsencode(IMAGE))
    os.close(root.fd)
    os.close(found.fd)
    tree.close()
    seen = Attributes.of(found.st)
    return ImageRow(
        1,
        found.identity,
        os.fsencode(IMAGE),
        seen.size,
        seen.mtime_ns,
        seen.ctime_ns,
        time.time_ns(),
        trusted=1,
    )


def first_hit(mount: Fusecache, block: int) -> dict[str, float]:
    """Mounts and reads one cached block; seconds from the start of the command."""
    harness.forget_pages(Path(f"{mount.cache}.sqlite"))
    harness.forget_pages(mount.cache)
    begin = time.perf_counter()
    mount.start()
    mounted = time.perf_counter()
    fd = os.open(mount.mountpoint / IMAGE, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, len(STAMP)) as page:
        os.preadv(fd, [page], block * BLOCK)
        hit = time.perf_counter()
        os.close(fd)
        if page[:] != STAMP:
            raise BenchmarkError("the first read was not served from its slot")
    image = mount.image(IMAGE)
    if image["origin_reads"] or image["read_hit_bytes"] != len(STAMP):
        raise BenchmarkError("the first read was not a hit")
    return {"mount_s": mounted - begin, "read_s": hit - mounted, "first_hit_s": hit - begin}


def _script(name: str, cache: Path) -> str:
    """What a script of this directory prints, in a process of its own without a mount."""
    return harness.command(sys.executable, Path(__file__).with_name(name), cache)


def parts(mount: Fusecache) -> dict[str, float]:
    """Seconds of each part of a start."""
    lines = (line.rsplit(" ", 1) for line in _script("start_parts.py", mount.cache).splitlines())
    return {name: float(value) for name, value in lines}


def tiny_memory(base: Path, origin: Path) -> int:
    """Resident bytes of a daemon that serves an empty cache of 64 slots."""
    mount = Fusecache(base, origin)
    with mount.cache.open("wb") as file:
        file.truncate(DATA_OFFSET + 64 * BLOCK)
    with mount:
        with (mount.mountpoint / IMAGE).open("rb") as file:
            file.read(1)
        return harness.memory(mount.pid)["VmRSS"]


class Scaled:
    """A cache of one size, all of it cached.

    Args:
        size: bytes, a multiple of the block size.
    """

    def __init__(self, base: Path, name: str, size: int) -> None:
        self.name = name
        self.slots = size // BLOCK
        self.found: dict[str, Any] = {"slots": self.slots}
        self.origin = base / "origin"
        self.origin.mkdir(parents=True)
        with (self.origin / IMAGE).open("wb") as file:
            file.truncate(size)
        self.mount = Fusecache(base, self.origin)

    def build(self) -> int:
        """Makes the cache and its database; returns a cached block."""
        begin = time.perf_counter()
        probe = build(self.mount, self.slots, self.slots)
        self.found["build_s"] = time.perf_counter() - begin
        self.found["database_mib"] = Path(f"{self.mount.cache}.sqlite").stat().st_size / MIB
        return probe

    def starts(self, tiny: int) -> None:
        """Clean start, its parts, start after kill -9; memory against ``tiny`` bytes."""
        probe, mount, found = self.build(), self.mount, self.found
        try:
            found |= first_hit(mount, probe)
            memory = harness.memory(mount.pid)
            mount.stop()
            found["parts"] = parts(mount)
            mount.start()
            harness.end(mount.pid)
            found["killed_s"] = first_hit(mount, probe)["first_hit_s"]
            mount.stop()
        finally:
            mount.close()
        growth = memory["VmRSS"] - tiny
        found["rss_mib"] = memory["VmRSS"] / MIB
        found["peak_mib"] = memory["VmHWM"] / MIB
        found["slot_bytes"] = growth / self.slots
        found["peak_ratio"] = (memory["VmHWM"] - tiny) / growth

    def read(self, seconds: float, **options: object) -> dict[str, float]:
        """Hits in the first GiB of the image, for some seconds.

        Raises:
            BenchmarkError: the origin was asked.
        """
        before = self.mount.image(IMAGE)["origin_reads"]
        options |= {"ioengine": "libaio", "direct": 1, "ramp_time": "0.5s", "size": self.window}
        found = harness.fio(self.mount.mountpoint / IMAGE, seconds=seconds, **options)
        if asked := self.mount.image(IMAGE)["origin_reads"] - before:
            raise BenchmarkError(f"{self.name}: cached reads asked the origin {asked} times")
        return found

    @property
    def window(self) -> int:
        """Bytes."""
        return min(WINDOW, self.slots * BLOCK)

    def warm(self) -> None:
        """What ``read`` reads is in memory from here on."""
        words = [f"if={self.mount.mountpoint / IMAGE}", "of=/dev/null", "bs=1M", "iflag=direct"]
        harness.command("dd", *words, f"count={self.window // MIB}", "status=none")


def rates(caches: list[Scaled], rounds: int, seconds: float) -> None:
    """Hits of all caches in turn, and what became of their memory."""
    with ExitStack() as stack:
        for cache in caches:
            stack.enter_context(cache.mount)
            cache.warm()
        samples: dict[str, dict[str, list[dict[str, float]]]] = {
            job: {cache.name: [] for cache in caches} for job in JOBS
        }
        for turn in range(rounds):
            for job, options in JOBS.items():
                for place in range(len(caches)):
                    cache = caches[(place + turn) % len(caches)]
                    samples[job][cache.name].append(cache.read(seconds, **options))
        for cache in caches:
            cache.found["rss_after_hits_mib"] = harness.memory(cache.mount.pid)["VmRSS"] / MIB
    for cache in caches:
        for job, by_name in samples.items():
            kiops = [entry["kiops"] for entry in by_name[cache.name]]
            base = harness.median([entry["kiops"] for entry in by_name[caches[0].name]])
            cache.found[job] = harness.median(kiops)
            cache.found[f"{job} rounds"] = kiops
            cache.found[f"{job} ratio"] = harness.median(kiops) / base
        mean = [entry["mean_us"] for entry in samples["depth 1"][cache.name]]
        cache.found["mean_us"] = harness.median(mean)


def reclaim(cache: Scaled) -> None:
    """What a victim costs. The cache cannot be mounted any more."""
    found = json.loads(_script("reclaim_cost.py", cache.mount.cache))
    cache.found["reclaim"] = found
    cache.found["reclaim_us"] = found["core_us"] + found["database_us"]
    cache.found["array_bytes"] = sum(found["arrays"].values()) / cache.slots


def report(caches: list[Scaled]) -> None:
    """Prints the measurements, a line each, with the goals."""
    shown = {
        "making the database, s": ("build_s", "{:.1f}"),
        "mount to first hit, s": ("first_hit_s", "{:.2f}"),
        "  of these: first open and read": ("read_s", "{:.3f}"),
        "the same after kill -9": ("killed_s", "{:.2f}"),
        "memory of the daemon, MiB": ("rss_mib", "{:.0f}"),
        "  at most while loading": ("peak_mib", "{:.0f}"),
        "  after all these hits": ("rss_after_hits_mib", "{:.0f}"),
        "growth over a tiny cache, bytes a slot": ("slot_bytes", "{:.1f}"),
        "peak growth / steady growth": ("peak_ratio", "{:.2f}"),
        "all arrays of the index, bytes a slot": ("array_bytes", "{:.1f}"),
        "4K random hits, depth 32, kIOPS": ("kiops", "{:.1f}"),
        "  by the smallest": ("kiops ratio", "{:.2f}"),
        "4K random hits, depth 1, mean us": ("mean_us", "{:.1f}"),
        "reclaim, us a victim": ("reclaim_us", "{:.1f}"),
        "database, MiB": ("database_mib", "{:.1f}"),
    }
    noise = {"slot_bytes", "peak_ratio"}
    rows = []
    for title, (key, form) in shown.items():
        cells = [
            "" if key in noise and cache.slots < LARGE else form.format(cache.found[key])
            for cache in caches
        ]
        rows.append([title, *cells, *_judged(key, caches)])
    for name in caches[-1].found["parts"]:
        values = [f"{cache.found['parts'][name]:.3f}" for cache in caches]
        rows.append([f"part of a start: {name}, s", *values, ""])
    for name in ("core_us", "database_us", "longest_step_ms"):
        values = [f"{cache.found['reclaim'][name]:.1f}" for cache in caches]
        rows.append([f"part of reclaim: {name}", *values, ""])
    columns = ["cached", *(f"{cache.name}" for cache in caches), "goals"]
    harness.table("The cost of size, blocks of 64 KiB", columns, rows)


def _judged(key: str, caches: list[Scaled]) -> list[str]:
    """The goals of one line, each with how it went."""
    words = []
    for cache in caches:
        large = cache.slots >= LARGE
        goals = {
            "first_hit_s": FIRST_HIT_GOALS_S.get(cache.name),
            "killed_s": KILLED_GOALS_S.get(cache.name),
            "slot_bytes": SLOT_GOAL_BYTES if large else None,
            "array_bytes": SLOT_GOAL_BYTES if large else None,
            "peak_ratio": PEAK_GOAL if large else None,
            "kiops ratio": RATE_GOAL if cache is not caches[0] else None,
        }
        if (goal := goals.get(key)) is not None:
            least = key == "kiops ratio"
            met = harness.verdict(cache.found[key], goal, least=least)
            words.append(f"{'>=' if least else '<='} {goal:g} {met}")
    return [", ".join(words)]


def _room(base: Path, sizes: dict[str, int]) -> None:
    """Raises BenchmarkError if the databases would not fit."""
    needed = sum(sizes.values()) // BLOCK * 48 + GIB
    free = shutil.disk_usage(base).free
    if free < needed:
        raise BenchmarkError(f"{base} has {free // MIB} MiB free, {needed // MIB} are needed")


def main() -> None:
    """Every size by itself, then the hits of all, then what a victim costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES, help="of the caches, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="of hits")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each job in each round")
    parser.add_argument("--quick", action="store_true", help="1G and 10G, one round of a second")
    parser.add_argument("--picture", type=Path, help="where the PNG goes; default: the results")
    parser.add_argument("--present", action="store_true", help="no picture without matplotlib")
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.sizes, chosen.rounds, chosen.seconds = "1G,10G", 1, 1.0
    sizes = {name: parse_size(name) // BLOCK * BLOCK for name in chosen.sizes.split(",")}
    drawing = picture.available(chosen.present)
    with harness.workspace(chosen.directory) as base:
        _room(base, sizes)
        caches = [Scaled(base / name, name, size) for name, size in sizes.items()]
        time.sleep(harness.SETTLED)
        tiny = tiny_memory(base / "tiny", caches[0].origin)
        for cache in caches:
            cache.starts(tiny)
            print(f"{cache.name}: started, killed, started again", flush=True)
        rates(caches, chosen.rounds, chosen.seconds)
        for cache in caches:
            reclaim(cache)
    report(caches)
    found = {cache.name: cache.found for cache in caches}
    harness.save("scale", {"tiny_bytes": tiny, "sizes": found})
    if drawing:
        path = chosen.picture or Path(__file__).parent / "results" / "scale.png"
        scale_picture.draw(found, path)
        print(f"drawn to {path}")


if __name__ == "__main__":
    harness.run(main)
