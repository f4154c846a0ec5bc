"""What the cache is for: an origin behind latency and a rate limit, bare and through fusecache.

The origin is ``delayed.py``: 1 ms for every request and one link of 1250 MB/s (10 Gbit/s), if not
told otherwise, over files in the page cache. nbdkit's delay and rate filters through nbdfuse were
tried for it and measure less truly:

- the rate filter lets two seconds' worth of data pass at once before it limits, which is longer
  than most jobs here: at 125 MB/s, 1 MiB reads went on at 397 MB/s;
- with 8 reads at once it came to 3600 a second, ``delayed.py`` to 4800, of 8000 that 1 ms allows;
- it is one mount for each image, and fusecache's origin is one directory.

At depth 1 a 4 KiB read takes 1.25 ms here and 1.17 ms there: the rest over 1 ms is the way through
the layer. That is part of the bare far origin, so ratios to it are a little kinder to fusecache
than 1.00 ms would be.

Everything takes turns, round by round; cold means evicted, and out of the kernel's caches of both
mounts. The blocks of a random cold read were never read before. Goals, by ratio of medians: warm
reads at depth 1 at least 10 times the bare far origin; cold random reads at most 15% slower (0.87
times); cold reads in order at depth 1 not slower; write-through at most 15% slower.

The boot-like mix: 8 images at once, each with reads of 4 to 32 KiB at random places, of which 70%
are repeated ones. What is saved is told from fusecache's own counters.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import picture
from harness import BLOCK, KIB, MIB, BenchmarkError, Fusecache, Served

RANDOM, ORDER = "random.raw", "order.raw"
THROUGH, BACK, BARE_WRITES = "through.raw", "back.raw", "bare.raw"
BOOTS = [f"vm-{number}.raw" for number in range(8)]
REPEATED = 0.7
IDLE = ("--dirty-age", "3600", "--dirty-limit", "90")
"""The cleaner does nothing by itself."""
COUNTERS = ("origin_reads", "origin_read_bytes", "origin_writes", "origin_write_bytes")
WARM_GOAL, COLD_GOAL, ORDER_GOAL, THROUGH_GOAL = 10.0, 0.87, 1.0, 0.87
IN_ORDER: dict[str, dict[str, object]] = {
    "128K in order, direct": {"bs": "128k", "direct": 1},
    "1M in order, direct": {"bs": "1m", "direct": 1},
    "128K in order, buffered": {"bs": "128k", "direct": 0},
    "1M in order, buffered": {"bs": "1m", "direct": 0},
}
RANDOM_READS, BOOT, WRITES = "4K random reads", "boot of 8 images", "4K random writes"
JOBS = (RANDOM_READS, *IN_ORDER, BOOT, WRITES)

Reads = list[tuple[int, int]]


@dataclass
class Way:
    """One job in one of the ways to run it: bare, cold, warm, through or back.

    Attributes:
        figures: of fio, one entry a round.
        origin: by counter, what fusecache asked of the origin in all rounds; empty for bare.
    """

    figures: list[dict[str, float]] = field(default_factory=list)
    origin: dict[str, int] = field(default_factory=dict)

    def median(self, key: str) -> float:
        """Over the rounds."""
        return harness.median([entry[key] for entry in self.figures])

    def total(self, key: str) -> float:
        """Over the rounds."""
        return sum(entry[key] for entry in self.figures)


Found = dict[str, dict[str, Way]]


class Place:
    """The far origin, fusecache over it, and what is known of both.

    Args:
        near: the files of the origin, without the delay.
        far: the same through the delaying layer.
    """

    def __init__(self, base: Path, near: Path, far: Path, ours: Fusecache) -> None:
        self.base = base
        self.near = near
        self.far = far
        self.ours = ours
        self.found: Found = {}

    def counters(self) -> dict[str, int]:
        """Of all images together."""
        images = self.ours.status()["images"]
        return {name: sum(image[name] for image in images) for name in COUNTERS}

    def evict(self, *images: str) -> None:
        """Out of the cache and of both mounts' pages."""
        self.ours.run("evict", "-m", self.ours.mountpoint, *images)
        self.forget(*images)

    def forget(self, *images: str) -> None:
        """Out of the kernel's caches of both mounts."""
        for image in images:
            harness.forget_pages(self.far / image)
            harness.forget_pages(self.ours.mountpoint / image)

    def bare(self, job: str, work: Callable[[Path], dict[str, float]]) -> None:
        """Measures ``work`` on the far origin."""
        self._way(job, "bare").figures.append(work(self.far))

    def through(self, job: str, name: str, work: Callable[[Path], dict[str, float]]) -> None:
        """Measures ``work`` on the mount, and what it asks of the origin."""
        way = self._way(job, name)
        before = self.counters()
        way.figures.append(work(self.ours.mountpoint))
        self.add(way, before)

    def add(self, way: Way, before: dict[str, int]) -> None:
        """Counts what was asked of the origin since ``before``."""
        for key, value in self.counters().items():
            way.origin[key] = way.origin.get(key, 0) + value - before[key]

    def _way(self, job: str, name: str) -> Way:
        return self.found.setdefault(job, {}).setdefault(name, Way())


# -- the jobs --------------------------------------------------------------------------------------


def random_reads(place: Place, seconds: float, seed: int) -> None:
    """Of 4 KiB at depth 1; bare and cold read the same pages, each in a block of its own."""
    rng = random.Random(seed)
    blocks = (place.near / RANDOM).stat().st_size // BLOCK
    count = min(int(seconds * 800), blocks * 3 // 4)
    reads = [
        (block * BLOCK + rng.randrange(BLOCK // (4 * KIB)) * 4 * KIB, 4 * KIB)
        for block in rng.sample(range(blocks), count)
    ]

    def work(root: Path) -> dict[str, float]:
        log = harness.read_log(place.base / "random.log", root / RANDOM, reads)
        return harness.replay([log])

    def whole(root: Path) -> dict[str, float]:
        options = {"rw": "randread", "bs": "4k", "iodepth": 1, "ioengine": "psync", "direct": 1}
        return harness.fio(root / RANDOM, seconds=seconds, **options)

    place.evict(RANDOM)
    place.bare(RANDOM_READS, work)
    place.forget(RANDOM)
    place.through(RANDOM_READS, "cold", work)
    place.ours.read_all(RANDOM)
    place.through(RANDOM_READS, "warm", whole)


def reads_in_order(place: Place, jobs: Sequence[str]) -> None:
    """Of the whole image once, at depth 1; those of ``jobs``."""
    for job, options in IN_ORDER.items():
        if job not in jobs:
            continue

        def work(root: Path, options: dict[str, object] = options) -> dict[str, float]:
            return harness.fio(
                root / ORDER, seconds=None, rw="read", iodepth=1, ioengine="psync", **options
            )

        place.evict(ORDER)
        place.bare(job, work)
        place.forget(ORDER)
        place.through(job, "cold", work)
        place.ours.read_all(ORDER)
        place.forget(ORDER)
        place.through(job, "warm", work)


def boot_reads(rng: random.Random, size: int, count: int) -> Reads:
    """What one guest reads while it boots: (offset, length) in bytes."""
    reads: Reads = []
    for _ in range(count):
        if reads and rng.random() < REPEATED:
            reads.append(rng.choice(reads))
        else:
            length = rng.choice([4, 4, 4, 8, 16, 32]) * KIB
            reads.append((rng.randrange((size - length) // (4 * KIB) + 1) * 4 * KIB, length))
    return reads


def boots(place: Place, seconds: float, seed: int) -> None:
    """8 images at once, each at depth 1; bare, cold and warm read the same."""
    rng = random.Random(seed)
    size = (place.near / BOOTS[0]).stat().st_size
    reads = {image: boot_reads(rng, size, int(seconds * 500)) for image in BOOTS}

    def work(root: Path) -> dict[str, float]:
        return harness.replay(
            [
                harness.read_log(place.base / f"{image}.log", root / image, reads[image])
                for image in BOOTS
            ]
        )

    place.evict(*BOOTS)
    place.bare(BOOT, work)
    place.forget(*BOOTS)
    place.through(BOOT, "cold", work)
    place.ours.stored({image: len(touched(reads[image])) for image in BOOTS})
    place.through(BOOT, "warm", work)


def touched(reads: Reads) -> set[int]:
    """The blocks that are read."""
    return {
        block
        for offset, length in reads
        for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
    }


def writes(place: Place, seconds: float) -> None:
    """Of 4 KiB at depth 1, over cached blocks; bare, in write-through and in write-back."""
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 1, "ioengine": "psync", "direct": 1}

    def work(image: str) -> Callable[[Path], dict[str, float]]:
        return lambda root: harness.fio(root / image, seconds=seconds, **options)

    place.bare(WRITES, work(BARE_WRITES))
    place.through(WRITES, "through", work(THROUGH))
    before = place.counters()
    place.through(WRITES, "back", work(BACK))
    way = place.found[WRITES]["back"]
    way.origin = {}  # what it costs is known when it is home
    place.ours.run("flush", "-m", place.ours.mountpoint)
    place.add(way, before)


# -- reporting -------------------------------------------------------------------------------------


def judged(ratio: float, goal: float | None) -> list[str]:
    """A ratio, its goal and the verdict, as two cells."""
    if goal is None:
        return [f"{ratio:.2f}", ""]
    return [f"{ratio:.2f}", f">= {goal:g} {harness.verdict(ratio, goal, least=True)}"]


def goal_of(job: str, name: str) -> float | None:
    """The least a way has to reach of the bare far origin's speed."""
    if name == "through":
        return THROUGH_GOAL
    if job in (BOOT, WRITES):
        return None
    if name == "warm":
        # In order, the kernel reads ahead from the bare one, or asks for several parts at once.
        return WARM_GOAL if job == RANDOM_READS else None
    return COLD_GOAL if job == RANDOM_READS else ORDER_GOAL


def report(found: Found) -> list[dict[str, Any]]:
    """Prints speeds and ratios; returns the ratios with goals."""
    rows: list[list[str]] = []
    goals: list[dict[str, Any]] = []
    for job, ways in found.items():
        bare = ways["bare"]
        for name, way in ways.items():
            shown = [f"{job}: {name}", f"{way.median('kiops'):.2f}", f"{way.median('mb_s'):.0f}"]
            shown.append(f"{way.median('mean_us') / 1e3:.3f}")
            if way is bare:
                rows.append([*shown, "", ""])
                continue
            ratio, goal = way.median("mb_s") / bare.median("mb_s"), goal_of(job, name)
            rows.append([*shown, *judged(ratio, goal)])
            if goal is not None:
                said = harness.verdict(ratio, goal, least=True)
                goals.append(
                    {"job": job, "way": name, "ratio": ratio, "least": goal, "verdict": said}
                )
    columns = ["job", "kIOPS", "MB/s", "mean ms", "to bare", "goal"]
    harness.table("A far origin, bare and through fusecache, medians", columns, rows)
    return goals


def savings(found: Found) -> list[dict[str, Any]]:
    """Prints what the guests asked for and what of it the origin saw; returns it."""
    rows: list[list[str]] = []
    saved: list[dict[str, Any]] = []
    for job, ways in found.items():
        kind = "write" if job == WRITES else "read"
        for name, way in ways.items():
            if name == "bare":
                continue
            asked, size = way.total("operations"), way.total("bytes")
            seen, seen_bytes = way.origin[f"origin_{kind}s"], way.origin[f"origin_{kind}_bytes"]
            less, less_bytes = 1 - seen / asked, 1 - seen_bytes / size
            saved.append(
                {
                    "job": job,
                    "way": name,
                    "guest_operations": asked,
                    "guest_bytes": size,
                    "origin_operations": seen,
                    "origin_bytes": seen_bytes,
                    "operations_saved": less,
                    "bytes_saved": less_bytes,
                }
            )
            rows.append(
                [
                    f"{job}: {name}",
                    f"{asked:.0f}",
                    f"{seen}",
                    f"{less:.0%}",
                    f"{size / MIB:.1f}",
                    f"{seen_bytes / MIB:.1f}",
                    f"{less_bytes:.0%}",
                ]
            )
    columns = ["job", "guest's", "origin's", "saved", "guest's MiB", "origin's MiB", "saved"]
    harness.table("Operations and bytes the origin was spared, all rounds", columns, rows)
    print("a cold 4K read fetches its 64K block: fewer operations later for more bytes now")
    return saved


def bars(found: Found) -> dict[str, dict[str, picture.Bar]]:
    """What the picture shows: a panel a job."""
    return {
        f"{job}, MB/s": {
            name if name == "bare" else f"fusecache, {name}": picture.Bar.of(
                [entry["mb_s"] for entry in way.figures]
            )
            for name, way in ways.items()
        }
        for job, ways in found.items()
    }


# -- the whole -------------------------------------------------------------------------------------


def served(base: Path, size: int, latency: float, rate: float, stack: ExitStack) -> Place:
    """Builds the images, and mounts the far origin and fusecache over it.

    Args:
        size: of an image, in bytes; those that boot have half of it.
        latency: of the origin, in seconds.
        rate: of its link, in bytes a second.
    """
    near, far = base / "near", base / "far"
    near.mkdir()
    singles = [RANDOM, ORDER, THROUGH, BACK, BARE_WRITES]
    sizes = {**dict.fromkeys(singles, size), **dict.fromkeys(BOOTS, size // 2)}
    for image, length in sizes.items():
        harness.random_file(near / image, length)
    time.sleep(harness.SETTLED)
    words = (near, far, "--delay", latency, "--rate", rate)
    stack.enter_context(Served("the far origin", far, "delayed.py", *words))
    room = f"{sum(sizes.values()) * 5 // 4 // MIB + 64}M"
    ours = stack.enter_context(Fusecache(base / "ours", far, "--size", room, *IDLE))
    ours.run("set", "-m", ours.mountpoint, BACK, "--write-mode", "back")
    return Place(base, near, far, ours)


def check(place: Place, images: Sequence[str]) -> None:
    """Raises BenchmarkError unless both are mounted and show the right data, to the last byte."""
    for path in (place.far, place.ours.mountpoint):
        if not harness.is_mounted(path):
            raise BenchmarkError(f"nothing is mounted at {path}")
    for image in images:
        harness.same_data(place.ours.mountpoint / image, place.near / image)


def misread(found: Found) -> Iterator[str]:
    """Sentences on figures that are not what their name says."""
    for job, ways in found.items():
        if "warm" in ways and (asked := ways["warm"].origin["origin_reads"]):
            yield f"{job}: warm reads asked the origin {asked} times"
    cold = found[RANDOM_READS]["cold"] if RANDOM_READS in found else None
    if cold is not None and cold.origin["origin_reads"] != cold.total("operations"):
        yield (
            f"{RANDOM_READS}: {cold.total('operations'):.0f} cold reads asked the origin"
            f" {cold.origin['origin_reads']} times"
        )


def main() -> None:
    """Builds, measures round by round, checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a job of random requests")
    parser.add_argument("--size", type=int, default=128, help="of an image, in MiB")
    parser.add_argument("--latency", type=float, default=1.0, help="of the origin, in ms")
    parser.add_argument("--rate", type=float, default=1250.0, help="of its link, in MB/s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one short round, small images")
    harness.add_options(parser)
    chosen = parser.parse_args()
    rounds, seconds, size = chosen.rounds, chosen.seconds, chosen.size
    if chosen.quick:
        rounds, seconds, size = 1, min(seconds, 0.5), min(size, 32)
    jobs = harness.chosen_jobs(JOBS, chosen.only)
    drawn = picture.available(chosen.present)
    with harness.workspace(chosen.directory) as base, ExitStack() as stack:
        latency, rate = chosen.latency / 1e3, chosen.rate * 1e6
        place = served(base, size * MIB, latency, rate, stack)
        place.ours.read_all(THROUGH, BACK)
        with harness.held(*(place.ours.mountpoint / image for image in (THROUGH, BACK))):
            for turn in range(rounds):
                if RANDOM_READS in jobs:
                    random_reads(place, seconds, chosen.seed + turn)
                reads_in_order(place, jobs)
                if BOOT in jobs:
                    boots(place, seconds, chosen.seed + turn)
                if WRITES in jobs:
                    writes(place, seconds)
                print(f"round {turn + 1} of {rounds} done", flush=True)
        check(place, [RANDOM, ORDER, THROUGH, BACK, BOOTS[0]])
    goals, saved = report(place.found), savings(place.found)
    wrong = list(misread(place.found))
    for sentence in wrong:
        print(f"NOTE: {sentence}")
    print("checked: both mounted, the right data through the mount in the end, all of it;")
    print("         by fusecache's counters, origin reads of warm reads and of cold random ones")
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "size_mib": size,
        "seed": chosen.seed,
        "latency_ms": chosen.latency,
        "rate_mb_s": chosen.rate,
    }
    measured = {
        job: {name: {"rounds": way.figures, "origin": way.origin} for name, way in ways.items()}
        for job, ways in place.found.items()
    }
    path = harness.save(
        "far",
        {"settings": settings, "goals": goals, "saved": saved, "notes": wrong, "jobs": measured},
        chosen.results,
    )
    if drawn:
        title = f"An origin {chosen.latency:g} ms away, bare and through fusecache"
        picture.draw(title, bars(place.found), path.with_suffix(".png"))


if __name__ == "__main__":
    harness.run(main)
