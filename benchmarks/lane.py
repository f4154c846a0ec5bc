"""What the lane is worth: fusecache with and without it, beside qemu-storage-daemon's FUSE export,
a bare pyfuse3 filesystem, and two servers in C that do nothing but answer, in one run. And with it
over the kernel's queues (io_uring), where the kernel has them: only that mount is offered them.

Three parts. Reads of what is cached, all in memory: 4 KiB at depth 1 and 32, 64 KiB, 1 MiB in order
and 16 jobs over 16 images. 4 KiB random writes in write-back over pages that are dirty already. And
what is no hit: random reads of blocks that are not cached, writes in write-through, looking up
names, asking for attributes, and opening, with the lane and without it.

All take turns, job by job and round by round, starting with another one each round; compared are
medians. Processor time is that of the process that serves, from /proc, a read; fio's is not in it.

Checked: all images show the right data before and after, and no read of what is cached goes to an
origin.
"""

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import peers
from harness import MIB, BenchmarkError
from peers import (
    IMAGE,
    READ_1,
    READ_1M,
    READ_16,
    READ_32,
    READ_64K,
    BarePyfuse3,
    Ceiling,
    Contender,
    Ours,
    StorageDaemon,
    read_jobs,
)

from fusecache.fuse import queues

WRITE = "4K random write over dirty pages, depth 32"
MISS = "64K random read, not cached, depth 8"
THROUGH = "4K random write, write-through, depth 8"
MISSING = "a look-up of a missing name"
THERE = "a look-up of a name that is there"
ATTRIBUTES = "attributes of an open file"
OPENING = "opening and closing an image"
RARE = "free space, times, directories"
"""What pyfuse3 answers, and guests hardly ever ask."""
JOBS: dict[str, dict[str, object]] = {
    **read_jobs(2),
    WRITE: {"rw": "randwrite", "bs": "4k", "iodepth": 32},
}
ON, OFF, QUEUES = "fusecache, lane", "fusecache, no lane", "fusecache, queues"
WAYS = {ON: "on", OFF: "off", QUEUES: "on"}
"""How each is mounted; the last one by the kernel's queues, where it has them."""
GOALS = {READ_1: 1.3, READ_32: 4.0, READ_64K: 2.5, READ_1M: 4.0, READ_16: 4.0, WRITE: 1.5}
"""Times qemu-storage-daemon's figure."""
LEAST_OTHER = 0.9
"""Of the figure without the lane."""
MOST_TIME = 1 / 3
"""Of the processor time without the lane, a read at depth 32."""
LOOKUPS = 2000
OPENED = 500
PARTS = 6
SECOND = 1.2
"""After which the kernel asks again."""
RANDOM: dict[str, object] = {"ioengine": "libaio", "direct": 1, "iodepth": 8}

Samples = dict[str, dict[str, list[dict[str, float]]]]
Figures = dict[str, dict[str, dict[str, float]]]


class Unheld(Ours):
    """One whose images nobody has open, so that it can be unmounted in between."""

    def start(self, stack: ExitStack) -> None:
        self.directory = stack.enter_context(self.mount).mountpoint


def ways() -> list[str]:
    """In which ways this machine can mount ours."""
    return [way for way in WAYS if way != QUEUES or queues.ALLOWED.exists()]


def ours(base: Path, origin: Path, size: int, way: str, mode: str, made_by: type[Ours]) -> Ours:
    """A mount of ours in one of the ways that are compared."""
    made = made_by(base, origin, size, mode, "--lane", WAYS[way])
    made.mount.queues = way == QUEUES
    made.name = way
    return made


def processor_seconds(contender: Contender) -> float:
    """Of the process that serves, since it began; 0 for who is not one of ours."""
    if not isinstance(contender, Ours):
        return 0.0
    fields = Path(f"/proc/{contender.mount.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def turns(
    contenders: list[Contender], job: str, rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """By contender: one entry a round."""
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    for turn in range(rounds):
        for place in range(len(contenders)):
            each = contenders[(place + turn) % len(contenders)]
            path = each.directory if job == READ_16 else each.path(IMAGE)
            began = processor_seconds(each)
            options = {"ioengine": "libaio", "direct": int(each.direct), **JOBS[job]}
            figures = harness.fio(path, seconds=seconds, **options)
            spent = processor_seconds(each) - began
            figures["processor_us"] = spent * 1e6 / max(1.0, figures["operations"])
            found[each.name].append(figures)
    return found


def cached(
    base: Path, plain: Path, total: int, rounds: int, seconds: float, size: int
) -> tuple[Samples, Samples]:
    """The reads, and the writes over dirty pages."""
    reads: Samples = {}
    with ExitStack() as stack:
        contenders: list[Contender] = [
            StorageDaemon(base / "daemon", plain),
            BarePyfuse3(base / "bare", plain),
            Ceiling(base / "ceiling", sorted(plain.iterdir())),
        ]
        nothing = Ceiling(base / "zeros", sorted(plain.iterdir()), zeros=True)
        for number, way in enumerate(ways()):
            origin = peers.copy(plain, base / f"reads-{number}-origin")
            place = base / f"reads-{number}"
            contenders.append(ours(place, origin, total, way, "through", Ours))
        time.sleep(harness.SETTLED)
        for each in contenders:
            stack.enter_context(each)
            each.warm()
            harness.same_data(each.path(IMAGE), plain / IMAGE)
        contenders.append(stack.enter_context(nothing))
        for each in contenders:
            each.isolate()
        for job in (READ_1, READ_32, READ_64K, READ_1M, READ_16):
            reads[job] = turns(contenders, job, rounds, seconds)
            print(f"{job}: done", flush=True)
        for each in contenders:
            each.check_isolated(plain)
            each.check_mounted()
    with ExitStack() as stack:
        contenders = [
            StorageDaemon(base / "daemon-writes", peers.copy(plain, base / "daemon-origin"))
        ]
        for number, way in enumerate(ways()):
            origin = peers.copy(plain, base / f"back-{number}-origin", [IMAGE])
            made = ours(base / f"back-{number}", origin, size, way, "back", Ours)
            made.images = [IMAGE]
            contenders.append(made)
        time.sleep(harness.SETTLED)
        for each in contenders:
            stack.enter_context(each)
            each.warm()
            whole = {"rw": "write", "bs": "1m", "ioengine": "psync", "direct": 1}
            harness.fio(each.path(IMAGE), seconds=None, **whole)
        writes = {WRITE: turns(contenders, WRITE, rounds, seconds)}
        print(f"{WRITE}: done", flush=True)
        for each in contenders:
            if (truth := each.truth(IMAGE)) is not None:
                harness.same_data(each.path(IMAGE), truth)
    return reads, writes


def others(base: Path, plain: Path, rounds: int, seconds: float, size: int) -> Samples:
    """What is not simply a hit."""
    jobs = (MISS, THROUGH, MISSING, THERE, ATTRIBUTES, OPENING, RARE)
    found: Samples = {job: {way: [] for way in ways()} for job in jobs}
    with ExitStack() as stack:
        contenders: list[Ours] = []
        for number, way in enumerate(ways()):
            origin = peers.copy(plain, base / f"others-{number}-origin", [IMAGE])
            for name in range(LOOKUPS):
                (origin / f"there-{name}").touch()
            place = base / f"others-{number}"
            contenders.append(ours(place, origin, size, way, "through", Unheld))
        time.sleep(harness.SETTLED)
        for each in contenders:
            stack.enter_context(each)
            harness.read(each.path(IMAGE), direct=True)
        for turn in range(rounds):
            for place in range(len(contenders)):
                each = contenders[(place + turn) % len(contenders)]
                found[THROUGH][each.name].append(
                    harness.fio(
                        each.path(IMAGE),
                        seconds=seconds,
                        **{**RANDOM, "rw": "randwrite", "bs": "4k"},
                    )
                )
                found[MISS][each.name].append(missed(each, size))
                found[MISSING][each.name].append(looked_up(each.directory, "missing"))
                found[THERE][each.name].append(looked_up(each.directory, "there"))
                found[ATTRIBUTES][each.name].append(asked(each.directory))
                found[OPENING][each.name].append(reopened(each.directory))
                found[RARE][each.name].append(rarely(each.directory))
        for each in contenders:
            harness.same_data(each.path(IMAGE), each.origin / IMAGE)
    return found


def missed(each: Ours, size: int) -> dict[str, float]:
    """Random reads of blocks, each once; the origin has them in memory, the cache not."""
    each.mount.stop()
    harness.command("truncate", "-s", "0", each.mount.cache)
    Path(f"{each.mount.cache}.sqlite").unlink()
    each.mount.start()
    before = each.mount.status()["origin_read_bytes"]
    found = harness.fio(
        each.path(IMAGE),
        seconds=None,
        **{**RANDOM, "rw": "randread", "bs": "64k", "io_size": size // 2},
    )
    asked = each.mount.status()["origin_read_bytes"] - before
    if asked < size // 2:
        raise BenchmarkError(f"{each.name}: only {asked} bytes were asked of the origin")
    return found


def looked_up(directory: Path, kind: str) -> dict[str, float]:
    """Questions for names, one after another, that the origin's kernel has heard of before."""
    began = time.perf_counter()
    for number in range(LOOKUPS):
        (directory / f"{kind}-{number}").exists()
    return _each(time.perf_counter() - began, LOOKUPS)


def asked(directory: Path) -> dict[str, float]:
    """Questions for attributes, one after another."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(open(directory / f"there-{number}", "rb"))
            for number in range(OPENED)
        ]
        time.sleep(SECOND)
        began = time.perf_counter()
        for file in files:
            os.fstat(file.fileno())
        return _each(time.perf_counter() - began, OPENED)


def reopened(directory: Path) -> dict[str, float]:
    """Opens for reading, one after another, each with its close. Their names are known. In several
    parts: what is done by the clock after many closes takes as long as half of one."""
    paths = [directory / f"there-{number}" for number in range(OPENED)]
    spent = 0.0
    for _ in range(PARTS):
        for path in paths:
            path.stat()
        began = time.perf_counter()
        for path in paths:
            os.close(os.open(path, os.O_RDONLY))
        spent += time.perf_counter() - began
    return _each(spent, PARTS * OPENED)


def rarely(directory: Path) -> dict[str, float]:
    """Requests for all kinds of things, one after another."""
    new = directory / "new"
    began = time.perf_counter()
    for number in range(OPENED):
        os.statvfs(directory)
        os.utime(directory / "there-0", (number, number))
        new.mkdir()
        new.rmdir()
    return _each(time.perf_counter() - began, 4 * OPENED)


def _each(seconds: float, count: int) -> dict[str, float]:
    return {"kiops": count / seconds / 1e3, "mean_us": seconds / count * 1e6}


def medians(samples: Samples) -> Figures:
    """By job, contender and figure."""
    return {
        job: {
            name: {key: harness.median([entry[key] for entry in entries]) for key in entries[0]}
            for name, entries in by_name.items()
        }
        for job, by_name in samples.items()
    }


def report(measured: Samples, rest: Samples) -> dict[str, Any]:
    """The tables; returns the medians."""
    found = medians(measured)
    names = list(found[READ_16])
    harness.table(
        "Thousand requests a second, medians",
        ["job", *names],
        [
            [job, *(f"{by_name[name]['kiops']:.1f}" if name in by_name else "" for name in names)]
            for job, by_name in found.items()
        ],
    )
    other = medians(rest)
    for way in ways():
        if way != OFF:
            report_way(way, found, other)
    return {"served": found, "others": other}


def report_way(way: str, found: Figures, other: Figures) -> None:
    """Against the goals."""
    rows = []
    for job, by_name in found.items():
        ratio = by_name[way]["kiops"] / by_name[StorageDaemon.name]["kiops"]
        goal = GOALS[job]
        rows.append([job, f"{ratio:.2f}", f">= {goal:g}", harness.verdict(ratio, goal, least=True)])
    on, off = found[READ_32][way]["processor_us"], found[READ_32][OFF]["processor_us"]
    rows.append(
        [
            f"processor time of a 4K read, {on:.1f} us, by {off:.1f} without the lane",
            f"{on / off:.2f}",
            f"<= {MOST_TIME:.2f}",
            harness.verdict(on / off, MOST_TIME, least=False),
        ]
    )
    columns = ["job", "by qemu-storage-daemon", "goal", ""]
    harness.table(f"{way}: what the lane serves", columns, rows)
    rows = []
    for job, by_name in other.items():
        ratio = by_name[way]["kiops"] / by_name[OFF]["kiops"]
        rows.append(
            [
                job,
                f"{by_name[way]['kiops']:.2f}",
                f"{by_name[OFF]['kiops']:.2f}",
                f"{ratio:.2f}",
                f">= {LEAST_OTHER:g}",
                harness.verdict(ratio, LEAST_OTHER, least=True),
            ]
        )
    columns = ["job", "kIOPS", "no lane, kIOPS", "by no lane", "goal", ""]
    harness.table(f"{way}: what the lane does not serve, medians", columns, rows)


def main() -> None:
    """Measures, checks, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each job in each round")
    parser.add_argument("--size", type=int, default=256, help="of the large image, in MiB")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.seconds, chosen.size = 1, 1.0, min(chosen.size, 64)
    size = chosen.size * MIB
    with harness.workspace(chosen.directory) as base:
        plain = base / "plain"
        peers.build(plain, size)
        total = sum(path.stat().st_size for path in plain.iterdir())
        reads, writes = cached(base, plain, total, chosen.rounds, chosen.seconds, size)
        rest = others(base, plain, chosen.rounds, chosen.seconds, size)
    result = report(reads | writes, rest)
    print("checked: right data before and after, no origin read of what is cached")
    settings = {"rounds": chosen.rounds, "seconds": chosen.seconds, "size_mib": chosen.size}
    harness.save("lane", {"settings": settings, **result, "samples": {**reads, **writes, **rest}})


if __name__ == "__main__":
    harness.run(main)
