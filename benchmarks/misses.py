"""What a miss costs: fusecache against the origin's own file, nothing cached anywhere.

Goals: a miss costs the origin one read of the missing block, and adds less than 0.5 ms to it.
Cold reads through the mount and reads of the same kind from the bare origin file take turns, one
each, on blocks that were never read before. Sequential reads of a cold image follow.
"""

import argparse
import mmap
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import BLOCK, KIB, MIB, BenchmarkError, Fusecache

IMAGE = "image.raw"
LATENCY_GOAL_MS = 0.5
PAGE = 4 * KIB


def timed(work: Callable[[], int]) -> float:
    """Milliseconds."""
    begin = time.perf_counter_ns()
    if work() <= 0:
        raise BenchmarkError("a read brought nothing")
    return (time.perf_counter_ns() - begin) / 1e6


def random_reads(ours: Fusecache, origin: Path, count: int, seed: int) -> dict[str, Any]:
    """4 KiB at a time through the mount, whole blocks from the bare origin, in turn."""
    size = origin.stat().st_size
    # Every eighth block, so that the kernel's readahead for one read brings no other.
    blocks = random.Random(seed).sample(range(0, size // BLOCK, 8), count * 2)
    buffer = mmap.mmap(-1, BLOCK)  # aligned, as O_DIRECT wants it
    page = memoryview(buffer)[:PAGE]
    whole = memoryview(buffer)[:BLOCK]
    before = ours.image(IMAGE)
    through, bare = [], []
    mounted = os.open(ours.mountpoint / IMAGE, os.O_RDONLY | os.O_DIRECT)
    direct = os.open(origin, os.O_RDONLY)
    try:
        for first, second in zip(blocks[::2], blocks[1::2], strict=True):
            harness.forget_pages(origin)
            through.append(timed(partial(os.preadv, mounted, [page], first * BLOCK)))
            harness.forget_pages(origin)
            bare.append(timed(partial(os.preadv, direct, [whole], second * BLOCK)))
    finally:
        os.close(mounted)
        os.close(direct)
    after = ours.image(IMAGE)
    page.release()
    whole.release()
    reads = after["origin_reads"] - before["origin_reads"]
    fetched = after["origin_read_bytes"] - before["origin_read_bytes"]
    return {
        "count": count,
        "through_ms": harness.median(through),
        "bare_ms": harness.median(bare),
        "added_ms": harness.median(through) - harness.median(bare),
        "origin_reads": reads,
        "origin_bytes": fetched,
        "through_p99_ms": sorted(through)[count * 99 // 100],
        "bare_p99_ms": sorted(bare)[count * 99 // 100],
    }


def sequential(ours: Fusecache, origin: Path, rounds: int) -> dict[str, list[float]]:
    """MB/s of reading the whole cold image once: bare and mounted, buffered and direct."""
    ways: dict[str, tuple[Path, dict[str, object]]] = {}
    for name, path in (("bare origin", origin), ("fusecache", ours.mountpoint / IMAGE)):
        ways[f"{name}, buffered 1M"] = path, {"ioengine": "psync", "bs": "1m", "direct": 0}
        ways[f"{name}, direct 1M depth 4"] = (
            path,
            {"ioengine": "libaio", "bs": "1m", "iodepth": 4, "direct": 1},
        )
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (path, options) in ways.items():
            ours.run("evict", "-m", ours.mountpoint, IMAGE)
            harness.forget_pages(origin)
            found[name].append(harness.fio(path, seconds=None, rw="read", **options)["mb_s"])
    return found


def report(misses: dict[str, Any], throughput: dict[str, list[float]]) -> None:
    """Prints both tables with the goals."""
    added = misses["added_ms"]
    per_read = misses["origin_reads"] / misses["count"]
    per_bytes = misses["origin_bytes"] / misses["count"]
    through, bare = misses["through_ms"], misses["bare_ms"]
    rows = [
        ["4K cold read through the mount, ms", f"{through:.3f}", "", ""],
        ["64K cold read of the bare origin, ms", f"{bare:.3f}", "", ""],
        [
            "added by fusecache, ms",
            f"{added:.3f}",
            f"< {LATENCY_GOAL_MS}",
            harness.verdict(added, LATENCY_GOAL_MS, least=False),
        ],
        [
            "origin reads a miss",
            f"{per_read:.3f}",
            "1",
            harness.verdict(per_read, 1, least=False),
        ],
        [
            "KiB read from the origin a miss",
            f"{per_bytes / KIB:.1f}",
            f"{BLOCK // KIB}",
            harness.verdict(per_bytes, BLOCK, least=False),
        ],
    ]
    title = f"{misses['count']} random misses at depth 1, medians"
    harness.table(title, ["", "measured", "goal", ""], rows)
    base = harness.median(throughput["bare origin, buffered 1M"])
    shown = [
        [name, f"{harness.median(values):.0f}", f"{harness.median(values) / base:.2f}"]
        for name, values in throughput.items()
    ]
    harness.table("Cold image, read once in order, medians", ["", "MB/s", "ratio"], shown)


def main() -> None:
    """Random misses, then sequential ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="of misses")
    parser.add_argument("--rounds", type=int, default=3, help="of the sequential reads")
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    chosen = parser.parse_args()
    count = min(chosen.count, chosen.size * MIB // BLOCK // 16)
    with harness.workspace(chosen.directory) as base:
        origin = base / "origin"
        origin.mkdir()
        image = origin / IMAGE
        harness.random_file(image, chosen.size * MIB)
        time.sleep(harness.SETTLED)
        with Fusecache(base, origin, "--size", f"{chosen.size * 5 // 4 + 64}M") as ours:
            # Opened and closed once: opening is not what is measured.
            with (ours.mountpoint / IMAGE).open("rb"):
                pass
            misses = random_reads(ours, image, count, chosen.seed)
            throughput = sequential(ours, image, chosen.rounds)
            harness.same_data(ours.mountpoint / IMAGE, image)
        report(misses, throughput)
        settings = {"count": count, "rounds": chosen.rounds, "size_mib": chosen.size}
        harness.save("misses", {"settings": settings, "misses": misses, "mb_s": throughput})


if __name__ == "__main__":
    harness.run(main)
