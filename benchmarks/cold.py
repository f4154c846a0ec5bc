"""Cold hits: blocks that are on the SSD and not in memory, beside fio on the cache file itself.

4 KiB random reads, each of another page, at depth 1 and 32: through the mount (O_DIRECT, so that
the kernel of the mount keeps nothing), from the cache file where its slots lie, buffered and with
O_DIRECT, and from there through the least that a server in C can be, a pread(2) in each of 32
threads. Before each turn the cache file is synced and taken out of the page cache, and mincore(2)
has to say that it is; afterwards it says how much was brought in for each read. The same through
the mount with everything in memory shows what the SSD costs.

All take turns, round by round; compared are medians. A page that was read in a turn is not read
again in it, and the origin must not be asked. On a virtual machine the host may keep in memory
what the guest has dropped, for all of them alike.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import harness
from harness import KIB, MIB, BenchmarkError, Fusecache
from peers import Ceiling

from fusecache.store.superblock import DATA_OFFSET

IMAGE = "image.raw"
PAGE = 4 * KIB
DEPTHS = (1, 32)
READS = {1: 4000, 32: 16000}
"""In each turn."""
OURS, WARM = "fusecache, cold", "fusecache, in memory"
BUFFERED, DIRECT = "cache file, buffered, cold", "cache file, O_DIRECT"
COMPILED = "cache file through a C server, cold"
MOST_RESIDENT = 0.001
"""Share of the slots that may still be in memory for them to count as cold."""

Samples = dict[str, list[dict[str, float]]]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def resident(path: Path, offset: int, size: int) -> int:
    """Bytes of ``size`` at ``offset`` that are in the page cache, by mincore(2)."""
    states = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    fd = os.open(path, os.O_RDONLY)
    try:
        at = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if at in (None, ctypes.c_void_p(-1).value):
            raise BenchmarkError(f"{path} cannot be mapped")
        try:
            if _LIBC.mincore(at, size, states) != 0:
                raise BenchmarkError(f"mincore of {path} failed")
        finally:
            _LIBC.munmap(at, size)
    finally:
        os.close(fd)
    return sum(state & 1 for state in states.raw) * mmap.PAGESIZE


def make_cold(cache: Path, size: int) -> None:
    """The slots are on the device and not in memory.

    Raises:
        BenchmarkError: the kernel kept them.
    """
    fd = os.open(cache, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    left = resident(cache, DATA_OFFSET, size)
    if left > size * MOST_RESIDENT:
        raise BenchmarkError(f"{left} bytes of {cache} are in memory still")


def turn(
    way: str, ours: Fusecache, server: Ceiling, size: int, depth: int, reads: int
) -> dict[str, float]:
    """One job of one contender, from cold unless it is the one in memory."""
    options: dict[str, object] = {"rw": "randread", "bs": "4k", "randseed": time.time_ns()}
    path = ours.mountpoint / IMAGE
    if way in (BUFFERED, DIRECT, COMPILED):
        path = server.path(ours.cache.name) if way == COMPILED else ours.cache
        options |= {"offset": DATA_OFFSET, "size": size}
    if way == BUFFERED:  # a buffered read waits in its call: as many threads as reads
        options |= {"ioengine": "psync", "numjobs": depth, "direct": 0}
        options |= {"number_ios": reads // depth}
        # A part of it for each, or some pages would be read twice.
        options |= {"size": size // depth, "offset_increment": size // depth}
    else:
        options |= {"ioengine": "libaio", "iodepth": depth, "direct": 1, "number_ios": reads}
    if way != WARM:
        make_cold(ours.cache, size)
    before = ours.image(IMAGE)
    found = harness.fio(path, seconds=None, **options)
    after = ours.image(IMAGE)
    if after["origin_reads"] != before["origin_reads"]:
        raise BenchmarkError(f"{way}: the origin was asked")
    if way in (OURS, WARM):
        hits = (after["read_hit_bytes"] - before["read_hit_bytes"]) // PAGE
        if hits != reads:
            raise BenchmarkError(f"{way}: {hits} hits in {reads} reads")
    brought = resident(ours.cache, DATA_OFFSET, size)
    return {**found, "kib_a_read": 0.0 if way == WARM else brought / reads / KIB}


def measure(
    ours: Fusecache, server: Ceiling, size: int, chosen: argparse.Namespace
) -> dict[int, Samples]:
    """samples[depth][contender]: one entry a round. The order turns from round to round."""
    ways = [OURS, BUFFERED, DIRECT, COMPILED]
    found: dict[int, Samples] = {depth: {way: [] for way in [*ways, WARM]} for depth in DEPTHS}
    for number in range(chosen.rounds):
        for depth in DEPTHS:
            reads = min(READS[depth] // (4 if chosen.quick else 1), size // PAGE // 8)
            for place in range(len(ways)):
                way = ways[(place + number) % len(ways)]
                found[depth][way].append(turn(way, ours, server, size, depth, reads))
        harness.command("dd", f"if={ours.mountpoint / IMAGE}", "of=/dev/null", "bs=1M", *QUIET)
        for depth in DEPTHS:
            reads = min(READS[depth], size // PAGE // 8)
            found[depth][WARM].append(turn(WARM, ours, server, size, depth, reads))
        print(f"round {number + 1} of {chosen.rounds} done", flush=True)
    return found


QUIET = ("iflag=direct", "status=none")


def report(found: dict[int, Samples]) -> dict[str, Any]:
    """Prints the table; returns medians and what fusecache reaches of each."""
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for depth, samples in found.items():
        medians = {
            way: {key: harness.median([entry[key] for entry in entries]) for key in entries[0]}
            for way, entries in samples.items()
        }
        ours = medians[OURS]["kiops"]
        for way, values in medians.items():
            rates = sorted(entry["kiops"] for entry in samples[way])
            ratio = ours / values["kiops"]
            rows.append(
                [
                    f"depth {depth}: {way}",
                    f"{values['kiops']:.2f}",
                    f"{rates[0]:.2f}-{rates[-1]:.2f}",
                    f"{values['mean_us']:.0f}",
                    f"{values['kib_a_read']:.1f}" if way != WARM else "",
                    "" if way == OURS else f"{ratio:.2f}",
                ]
            )
            result[f"depth {depth}: {way}"] = {
                **values,
                "ours_by_this": ratio,
                "rounds": samples[way],
            }
    columns = ["4K random reads", "kIOPS", "range", "mean us", "KiB read a read", "cold/this"]
    harness.table("Blocks on the SSD and not in memory, medians", columns, rows)
    return result


def main() -> None:
    """Fills the cache, makes it cold again and again, checks the data at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--quick", action="store_true", help="one round of a quarter the reads")
    parser.add_argument("--queues", action="store_true", help="by the kernel's queues")
    parser.add_argument("--directory", help="where to work, on the SSD; default: temporary")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.size = 1, min(chosen.size, 256)
    size = chosen.size * MIB
    with harness.workspace(chosen.directory) as base, contextlib.ExitStack() as stack:
        origin = base / "origin"
        origin.mkdir()
        harness.random_file(origin / IMAGE, size)
        time.sleep(harness.SETTLED)
        words = ("--size", f"{chosen.size + 64}M")
        mount = Fusecache(base, origin, *words)
        mount.queues = chosen.queues
        ours = stack.enter_context(mount)
        ours.read_all(IMAGE)
        server = Ceiling(base / "ceiling", [ours.cache], threads=max(DEPTHS))
        found = measure(ours, stack.enter_context(server), size, chosen)
        make_cold(ours.cache, size)
        harness.same_data(ours.mountpoint / IMAGE, origin / IMAGE)
        result = report(found)
        print("checked: cold before each turn, no origin reads, right data at the end")
        harness.save("cold", {"rounds": chosen.rounds, "size_mib": chosen.size, "jobs": result})


if __name__ == "__main__":
    harness.run(main)
