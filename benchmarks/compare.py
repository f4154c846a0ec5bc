"""fusecache beside what people would use instead: the same fio jobs on each, in turn, in one run.

Everything is cached before it is measured. The contenders and how each runs are in ``peers.py``:
the bare file, a bare pyfuse3 filesystem, qemu-storage-daemon's FUSE export, nbdkit's cache filter
through nbdfuse, rclone with a full VFS cache, and fusecache: its reads once, its writes in every
mode, and in write-back without extended attributes, too. The kernel asks for one before every
write unless a filesystem has said that it has none, as the bare one has.

All are mounted all the time and take turns, job by job and round by round, starting with another
one each round, so that a machine that is slower for a minute is slower for all. After each job of
writes the host's dirty pages are written to the disk, unmeasured. Compared are medians.

Goals, by ratio: 4 KiB random reads at depth 32 at least 0.9 times bare pyfuse3 and 1.3 times
nbdfuse; 64 KiB at least 0.9 times bare pyfuse3; 1 MiB in order at least 2 times
qemu-storage-daemon, and 0.85 times bare pyfuse3 where blocks were filled in order, 0.65 in a cache
that was churned; every figure above rclone's.

Checked: all are mounted, by the kernel's table, before and after; all images show the right data,
to the last byte; no read of what is cached goes to an origin, and ``peers.py`` says how that is
known of whom; what was written last is read again, and after a flush fusecache's origins have all
that its mounts show.
"""

import argparse
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import peers
import picture
from harness import MIB, BenchmarkError
from peers import (
    IMAGE,
    READ_1M,
    READ_16,
    READ_32,
    READ_64K,
    BarePyfuse3,
    Contender,
    NbdCache,
    Rclone,
    StorageDaemon,
    read_jobs,
)

WRITE_32 = "4K random write, depth 32"
WRITE_1M = "1M write in order, depth 4"
JOBS: dict[str, dict[str, object]] = {
    **read_jobs(1),
    WRITE_32: {"rw": "randwrite", "bs": "4k", "iodepth": 32},
    WRITE_1M: {"rw": "write", "bs": "1m", "iodepth": 4},
}
WRITES = (WRITE_32, WRITE_1M)
OURS, CHURNED = "fusecache, through", "fusecache, churned"

Samples = dict[str, dict[str, list[dict[str, float]]]]


@dataclass(frozen=True)
class Goal:
    """At least ``least`` times what ``peer`` reaches in the same job."""

    job: str
    ours: str
    peer: str
    least: float


GOALS = [
    Goal(READ_32, OURS, BarePyfuse3.name, 0.9),
    Goal(READ_32, OURS, NbdCache.name, 1.3),
    Goal(READ_64K, OURS, BarePyfuse3.name, 0.9),
    Goal(READ_1M, OURS, StorageDaemon.name, 2.0),
    Goal(READ_1M, OURS, BarePyfuse3.name, 0.85),
    Goal(READ_1M, CHURNED, BarePyfuse3.name, 0.65),
]


def goals(job: str, ours: str) -> Iterator[Goal]:
    """Those of one of our rows: the list's, and to be above rclone everywhere."""
    yield from (goal for goal in GOALS if (goal.job, goal.ours) == (job, ours))
    yield Goal(job, ours, Rclone.name, 1.0)


# -- preparing -------------------------------------------------------------------------------------


def chosen_peers(present: bool) -> list[type[Contender]]:
    """Those to measure; says which are left out.

    Raises:
        BenchmarkError: programs are missing, and only those there were not asked for.
    """
    lacking = {peer: programs for peer in peers.PEERS if (programs := peers.missing(peer))}
    for peer, programs in lacking.items():
        words = f"{peer.name} needs {', '.join(programs)}"
        if not present:
            raise BenchmarkError(f"{words}: run benchmarks/install-packages, or use --present")
        print(f"left out: {words}, not installed")
    return [peer for peer in peers.PEERS if peer not in lacking]


def prepare(
    base: Path, kinds: Sequence[type[Contender]], size: int, passes: int
) -> tuple[list[Contender], Path]:
    """The contenders, not started yet, and the directory of the images all others are copies of."""
    plain = base / "plain"
    peers.build(plain, size)
    total = sum(path.stat().st_size for path in plain.iterdir())
    made: list[Contender] = []
    for kind in kinds:
        place = base / kind.__name__
        caches = kind in (NbdCache, Rclone)
        origin = peers.copy(plain, base / f"{kind.__name__}-origin") if caches else plain
        made.append(kind(place, origin))
    origin = peers.copy(plain, base / "through-origin")
    made.append(peers.Ours(base / "through", origin, total, "through"))
    for mode, *words in (("back",), ("back", "-o", "noxattr"), ("around",)):
        place = "-".join([mode, *words[1:]])
        origin = peers.copy(plain, base / f"{place}-origin", [IMAGE])
        made.append(peers.Ours(base / place, origin, size, mode, *words, images=[IMAGE]))
    origin = peers.copy(plain, base / "churned-origin", [IMAGE])
    made.append(peers.Churned(base / "churned", origin, size, passes))
    time.sleep(harness.SETTLED)
    return made, plain


def takes(contender: Contender, job: str) -> bool:
    """Whether the job is measured there: reads of fusecache once, churned only where the layout
    matters most."""
    if contender.name == CHURNED:
        return job == READ_1M
    return not contender.name.startswith("fusecache") or contender.name == OURS or job in WRITES


# -- measuring -------------------------------------------------------------------------------------


def measure(
    contenders: list[Contender], jobs: Sequence[str], base: Path, rounds: int, seconds: float
) -> Samples:
    """samples[job][contender]: one entry a round."""
    samples: Samples = {
        job: {each.name: [] for each in contenders if takes(each, job)} for job in jobs
    }
    for turn in range(rounds):
        for job in jobs:
            entered = [each for each in contenders if takes(each, job)]
            for place in range(len(entered)):
                each = entered[(place + turn) % len(entered)]
                path = each.directory if job == READ_16 else each.path(IMAGE)
                found = harness.fio(
                    path,
                    seconds=seconds,
                    ioengine="libaio",
                    direct=int(each.direct),
                    ramp_time=f"{int(seconds * 250)}ms",
                    **JOBS[job],
                )
                samples[job][each.name].append(found)
                if job in WRITES:
                    harness.sync(base)
        print(f"round {turn + 1} of {rounds} done", flush=True)
    return samples


def check_written(contender: Contender) -> None:
    """Writes and reads again, and compares with what has to be on the origin.

    Raises:
        BenchmarkError: the data is another.
    """
    path = contender.path(IMAGE)
    stamp = os.urandom(MIB)
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if contender.direct else 0))
    try:
        with mmap.mmap(-1, MIB) as buffer:  # aligned, as O_DIRECT wants it
            buffer[:] = stamp
            os.pwrite(fd, buffer, MIB)
            buffer[:] = bytes(MIB)
            os.preadv(fd, [buffer], MIB)
            if buffer[:] != stamp:
                raise BenchmarkError(f"{contender.name} does not show what was written")
    finally:
        os.close(fd)
    truth = contender.truth(IMAGE)
    if truth is not None and truth != path:
        harness.same_data(path, truth)


# -- reporting -------------------------------------------------------------------------------------


def medians(samples: Samples) -> dict[str, dict[str, dict[str, Any]]]:
    """[job][contender]: the medians of all figures, and the rounds they are of."""
    return {
        job: {
            name: {
                **{key: harness.median([entry[key] for entry in entries]) for key in entries[0]},
                "rounds": entries,
            }
            for name, entries in by_name.items()
        }
        for job, by_name in samples.items()
    }


def figure(job: str) -> tuple[str, str]:
    """What counts in a job: the figure's key and its unit."""
    return ("mb_s", "MB/s") if "1M" in job else ("kiops", "kIOPS")


def report(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Prints the table: per job what the peers reach, then each of our rows and its ratio to each
    of them. Returns the goals as judged."""
    names = [peer.name for peer in peers.PEERS]
    rows: list[list[str]] = []
    judged: list[dict[str, Any]] = []
    for job, by_name in found.items():
        key, unit = figure(job)
        digits = 0 if key == "mb_s" else 1
        theirs = {name: by_name[name][key] for name in names if name in by_name}
        shown = [f"{theirs[name]:.{digits}f}" if name in theirs else "n/a" for name in names]
        rows.append([f"{job}, {unit}", "", *shown])
        for name in (name for name in by_name if name not in theirs):
            least = {goal.peer: goal.least for goal in goals(job, name)}
            cells = []
            for peer in names:
                if peer not in theirs:
                    cells.append("n/a")
                    continue
                ratio = by_name[name][key] / theirs[peer]
                said = ""
                if peer in least:
                    said = " " + harness.verdict(ratio, least[peer], least=True)
                    goal = Goal(job, name, peer, least[peer])
                    judged.append({**asdict(goal), "ratio": ratio, "verdict": said.strip()})
                cells.append(f"x {ratio:.2f}{said}")
            rows.append([f"  {name}", f"{by_name[name][key]:.{digits}f}", *cells])
    columns = ["medians; x: as many times the peer's", "fusecache", *names]
    harness.table("Everything cached, side by side", columns, rows)
    return judged


def report_goals(judged: list[dict[str, Any]]) -> None:
    """Prints the goals; those over rclone as one, by the lowest ratio."""
    over = [goal for goal in judged if goal["peer"] == Rclone.name]
    shown = [goal for goal in judged if goal not in over]
    shown += sorted(over, key=lambda goal: float(goal["ratio"]))[:1]
    rows = [
        [
            f"{goal['job']}: {goal['ours']} to {goal['peer']}",
            f"{goal['ratio']:.2f}",
            f">= {goal['least']}",
            goal["verdict"],
        ]
        for goal in shown
    ]
    if rows:
        title = "Goals; above rclone everywhere: the lowest"
        harness.table(title, ["", "ratio", "goal", ""], rows)


def bars(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, picture.Bar]]:
    """What the picture shows: a panel a job."""
    panels: dict[str, dict[str, picture.Bar]] = {}
    for job, by_name in found.items():
        key, unit = figure(job)
        panels[f"{job}, {unit}"] = {
            name: picture.Bar.of([entry[key] for entry in values["rounds"]])
            for name, values in by_name.items()
        }
    return panels


def main() -> None:
    """Builds, warms, checks, measures, checks again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each job in each round")
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--passes", type=int, default=3, help="of reads that churn a cache")
    parser.add_argument("--quick", action="store_true", help="one short round, a small image")
    harness.add_options(parser)
    chosen = parser.parse_args()
    rounds, seconds, size, passes = chosen.rounds, chosen.seconds, chosen.size, chosen.passes
    if chosen.quick:
        rounds, seconds, size, passes = 1, min(seconds, 0.4), min(size, 128), 1
    jobs = harness.chosen_jobs(JOBS, chosen.only)
    kinds = chosen_peers(chosen.present)
    drawn = picture.available(chosen.present)
    with harness.workspace(chosen.directory) as base, ExitStack() as stack:
        prepared, plain = prepare(base, kinds, size * MIB, passes)
        contenders = [each for each in prepared if any(takes(each, job) for job in jobs)]
        for each in contenders:
            stack.enter_context(each)
        for each in contenders:
            each.warm()
            each.isolate()  # and from here on the right data can only come from the cache
            for image in each.images:
                harness.same_data(each.path(image), plain / image, direct=each.direct)
            print(f"warm: {each.name} ({each.note})", flush=True)
        samples = measure(contenders, jobs, base, rounds, seconds)
        isolated = {each.name: each.check_isolated(plain) for each in contenders}
        for each in contenders:
            each.check_mounted()
            if takes(each, WRITE_32):
                check_written(each)
        layouts = {
            each.name: each.layout()
            for each in contenders
            if isinstance(each, peers.Ours) and each.name in (OURS, CHURNED)
        }
    found = medians(samples)
    judged = report(found)
    report_goals(judged)
    for name, share in layouts.items():
        print(f"layout of {name}: {share:.0%} of neighbouring blocks lie in neighbouring slots")
    print(
        "all with O_DIRECT but the bare file, which is read from and written to the page cache,"
        " where the others' data lies"
    )
    print("checked: mounted before and after; the right data, all of it, before; what was written")
    print("         is read again; fusecache's origins and mounts are the same after a flush")
    for name, why in isolated.items():
        if why:
            print(f"         no origin reads: {name}: {why}")
    settings = {"rounds": rounds, "seconds": seconds, "size_mib": size, "passes": passes}
    path = harness.save(
        "compare",
        {
            "settings": settings,
            "contenders": {each.name: each.note for each in contenders},
            "left_out": [peer.name for peer in peers.PEERS if peer not in kinds],
            "no_origin_reads": isolated,
            "neighbours_in_neighbouring_slots": layouts,
            "jobs": found,
            "goals": judged,
        },
        chosen.results,
    )
    if drawn:
        picture.draw("Everything cached, side by side", bars(found), path.with_suffix(".png"))


if __name__ == "__main__":
    harness.run(main)
