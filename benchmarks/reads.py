"""Cached reads: fusecache against a bare pyfuse3 filesystem, side by side in one run.

Goals, everything cached: 4 KiB random O_DIRECT reads at depth 32 at least 0.85 times, 1 MiB
sequential reads over blocks filled in order at least 0.8 times what the bare filesystem reaches.

All filesystems are mounted all the time and take turns, job by job and round by round, so that
a machine that is slower for a minute is slower for all. Compared are medians over the rounds.
"""

import argparse
import time
from contextlib import ExitStack
from typing import Any

import harness
from harness import MIB, Bare, BenchmarkError, Fusecache

IMAGE = "image.raw"
JOBS: dict[str, dict[str, object]] = {
    "4K random, depth 32": {"rw": "randread", "bs": "4k", "iodepth": 32},
    "4K random, depth 1": {"rw": "randread", "bs": "4k", "iodepth": 1},
    "64K random, depth 8": {"rw": "randread", "bs": "64k", "iodepth": 8},
    "1M sequential, depth 4": {"rw": "read", "bs": "1m", "iodepth": 4},
}
GOALS = {"4K random, depth 32": 0.85, "1M sequential, depth 4": 0.8}
OURS = Fusecache.name

Samples = dict[str, dict[str, list[dict[str, float]]]]


def measure(mounts: list[Fusecache | Bare], rounds: int, seconds: float) -> Samples:
    """samples[job][filesystem]: one entry a round. The order turns from round to round."""
    samples: Samples = {job: {mount.name: [] for mount in mounts} for job in JOBS}
    for turn in range(rounds):
        for job, options in JOBS.items():
            for place in range(len(mounts)):
                mount = mounts[(place + turn) % len(mounts)]
                path = mount.mountpoint / IMAGE
                found = harness.fio(
                    path, seconds=seconds, ioengine="libaio", direct=1, ramp_time="500ms", **options
                )
                samples[job][mount.name].append(found)
        print(f"round {turn + 1} of {rounds} done", flush=True)
    return samples


def report(samples: Samples, yardstick: str) -> dict[str, Any]:
    """Prints the table; returns medians and ratios to ``yardstick``."""
    rows: list[list[str]] = []
    found: dict[str, dict[str, Any]] = {}
    for job, by_name in samples.items():
        found[job] = {}
        base = harness.median([s["kiops"] for s in by_name[yardstick]])
        for name, entries in by_name.items():
            values = {key: harness.median([s[key] for s in entries]) for key in entries[0]}
            kiops = sorted(s["kiops"] for s in entries)
            ratio = values["kiops"] / base
            goal = GOALS.get(job) if name == OURS else None
            judged = "" if goal is None else harness.verdict(ratio, goal, least=True)
            found[job][name] = {**values, "ratio": ratio, "goal": goal, "rounds": entries}
            rows.append(
                [
                    f"{job}: {name}",
                    f"{values['kiops']:.1f}",
                    f"{kiops[0]:.1f}-{kiops[-1]:.1f}",
                    f"{values['mb_s']:.0f}",
                    f"{values['mean_us']:.0f}",
                    f"{ratio:.2f}",
                    "" if goal is None else f">= {goal}",
                    judged,
                ]
            )
    columns = ["job", "kIOPS", "range", "MB/s", "mean us", "ratio", "goal", ""]
    harness.table("Cached reads, medians; ratio to the first row of each job", columns, rows)
    return found


def main() -> None:
    """Builds the image, fills the cache, checks, measures, checks again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each job in each round")
    parser.add_argument("--size", type=int, default=512, help="of the image, in MiB")
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    chosen = parser.parse_args()
    with harness.workspace(chosen.directory) as base, ExitStack() as stack:
        origin = base / "origin"
        origin.mkdir()
        harness.random_file(origin / IMAGE, chosen.size * MIB)
        time.sleep(harness.SETTLED)
        ours = stack.enter_context(
            Fusecache(base, origin, "--size", f"{chosen.size + chosen.size // 4 + 64}M")
        )
        bare = [stack.enter_context(Bare(base, origin, timeout)) for timeout in (1.0, 300.0)]
        ours.read_all(IMAGE)
        mounts: list[Fusecache | Bare] = [*bare, ours]
        for mount in mounts:
            harness.same_data(mount.mountpoint / IMAGE, origin / IMAGE)
        before = ours.image(IMAGE)["origin_reads"]
        found = report(measure(mounts, chosen.rounds, chosen.seconds), bare[0].name)
        for mount in mounts:
            harness.same_data(mount.mountpoint / IMAGE, origin / IMAGE)
        if asked := ours.image(IMAGE)["origin_reads"] - before:
            raise BenchmarkError(f"cached reads asked the origin {asked} times")
        print("checked: really mounted, right data before and after, no origin reads between")
        settings = {"rounds": chosen.rounds, "seconds": chosen.seconds, "size_mib": chosen.size}
        harness.save("reads", {"settings": settings, "jobs": found})


if __name__ == "__main__":
    harness.run(main)
