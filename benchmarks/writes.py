"""Writes in write-back mode, each against its yardstick, side by side in one run.

1. 4 KiB random O_DIRECT writes at depth 32 over cached blocks, against the bare pyfuse3
   filesystem with ``os.pwrite`` in its handler. First pass: clean pages become dirty, each once.
   Steady: all pages are dirty already. The kernel asks for an extended attribute before every
   write, unless a filesystem has said that it has none at all: so there are two yardsticks.
2. The same at depth 1 in write-back and in write-through, over an origin 1 ms away.
3. A 4 KiB write and its fsync through the mount, over pages that are dirty already, against pwrite
   and fdatasync of a plain file beside the cache; then 16 processes at once. The kernel lets one
   fsync of a file through at a time, so it is writers of different images that can share one.
   The same over clean pages, each once: then the map has to be made stable, too. And on an SSD
   whose sync takes 1 ms longer (``slow_sync.c``): what is shared is worth more there.
4. Cached reads of one image while another is written, with the cleaner idle, at work, and held
   back by --clean-rate; against the same reads alone.
5. Stable commits a write, for random writes over a large image, cold and cached.

All that is compared takes turns, round by round, and what counts are medians. Data is compared
with the origin's at the end.
"""

import argparse
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import scale
from harness import GIB, KIB, MIB, Bare, BenchmarkError, Fusecache, Served

IMAGE = "image.raw"
RANDOM: dict[str, object] = {"rw": "randwrite", "bs": "4k", "ioengine": "libaio", "direct": 1}
BACK = ("--write-mode", "back")
IDLE = ("--dirty-age", "3600", "--dirty-limit", "90")
"""The cleaner does nothing by itself."""
OLD_ENOUGH = 4.5
"""Seconds after which dirty data of the smallest age is on its way: ages are counted in periods of
2 s, and rounded up."""
WRITERS = 16
SLOW_SYNC_MS = "1"

Samples = dict[str, list[float]]
Row = list[str]


def made(base: Path, name: str, images: dict[str, int]) -> Path:
    """A new origin with images of random bytes, old enough to be trusted (P3)."""
    origin = base / name
    origin.mkdir(parents=True)
    for image, size in images.items():
        harness.random_file(origin / image, size)
    time.sleep(harness.SETTLED)
    return origin


def judged(name: str, value: float, goal: float, *, least: bool, digits: int = 2) -> Row:
    """A row of the table: measured, goal, met or not."""
    shown = f"{'>=' if least else '<='} {goal:g}"
    return [name, f"{value:.{digits}f}", shown, harness.verdict(value, goal, least=least)]


def plain(name: str, value: float, digits: int = 2) -> Row:
    """A row without a goal."""
    return [name, f"{value:.{digits}f}", "", ""]


def told(rounds: int, turn: int, part: str) -> None:
    """One line a round."""
    print(f"{part}: round {turn + 1} of {rounds} done", flush=True)


# -- 1 ---------------------------------------------------------------------------------------------


def cached_writes(base: Path, rounds: int, seconds: float, size: int) -> tuple[list[Row], Samples]:
    """Kilo-IOPS over cached blocks, with extended attributes, which the kernel then asks for
    before every write, and without: each time a bare filesystem and ours."""
    yard = made(base, "one/yard", {IMAGE: size})
    pairs: list[tuple[str, Bare, Fusecache]] = []
    with ExitStack() as stack:
        for words, bare_words, our_words in (
            ("without extended attributes", ("write",), ("-o", "noxattr")),
            ("with extended attributes", ("write", "xattrs"), ()),
        ):
            place = words.partition(" ")[0]
            origin = made(base, f"one/{place}-origin", {IMAGE: size})
            bare = stack.enter_context(Bare(base / "one", yard, 1.0, *bare_words))
            options = ("--size", _room(size), *BACK, *IDLE, *our_words)
            ours = stack.enter_context(Fusecache(base / f"one/{place}", origin, *options))
            ours.name = f"fusecache {words}"
            ours.read_all(IMAGE)
            stack.enter_context(harness.held(ours.mountpoint / IMAGE))
            pairs.append((words, bare, ours))
        mounts: list[Fusecache | Bare] = [mount for pair in pairs for mount in pair[1:]]
        samples: Samples = {f"{job}: {m.name}": [] for job in ("first", "steady") for m in mounts}
        for turn in range(rounds):
            for _, _, ours in pairs:
                ours.run("flush", "-m", ours.mountpoint)
            _turn(mounts, turn, samples, "first", None, io_size=size // 2)
            for _, _, ours in pairs:
                harness.fio(ours.mountpoint / IMAGE, seconds=None, **RANDOM | {"rw": "write"})
            _turn(mounts, turn, samples, "steady", seconds)
            told(rounds, turn, "writes over cached blocks")
        for _, _, ours in pairs:
            ours.run("flush", "-m", ours.mountpoint)
            harness.same_data(ours.mountpoint / IMAGE, ours.origin / IMAGE)
    median = {name: harness.median(values) for name, values in samples.items()}
    rows = []
    for job, said in (("steady", "pages dirty already"), ("first", "first pass, clean pages")):
        for words, bare, ours in pairs:
            mine = median[f"{job}: {ours.name}"]
            rows.append(plain(f"{said}, {words}: kIOPS", mine, 1))
            ratio = mine / median[f"{job}: {bare.name}"]
            rows.append(judged("  to bare pyfuse3", ratio, 0.6, least=True))
    return rows, samples


def _room(size: int) -> str:
    return f"{size * 2 // MIB + 64}M"


def _turn(
    mounts: list[Fusecache | Bare],
    turn: int,
    samples: Samples,
    job: str,
    seconds: float | None,
    **options: object,
) -> None:
    for place in range(len(mounts)):
        mount = mounts[(place + turn) % len(mounts)]
        path = mount.mountpoint / IMAGE
        found = harness.fio(path, seconds=seconds, iodepth=32, **RANDOM, **options)
        samples[f"{job}: {mount.name}"].append(found["kiops"])


# -- 2 ---------------------------------------------------------------------------------------------


def far_origin(base: Path, rounds: int, seconds: float, size: int) -> tuple[list[Row], Samples]:
    """Kilo-IOPS at depth 1 in both modes, 1 ms from the origin."""
    near = made(base, "two/near", {f"{mode}.raw": size for mode in ("back", "through", "itself")})
    far = base / "two/far"
    modes = ("through", "back")
    samples: Samples = {name: [] for name in ("itself", *modes)}
    with ExitStack() as stack:
        stack.enter_context(Served("the far origin", far, "delayed.py", near, far))
        paths = {"itself": far / "itself.raw"}
        mounts = {}
        for mode in modes:
            words = ("--size", _room(size), "--write-mode", mode, *IDLE)
            mount = stack.enter_context(Fusecache(base / "two" / mode, far, *words))
            mount.read_all(f"{mode}.raw")
            paths[mode] = mount.mountpoint / f"{mode}.raw"
            mounts[mode] = mount
            stack.enter_context(harness.held(paths[mode]))
        for turn in range(rounds):
            for name, path in paths.items():
                found = harness.fio(path, seconds=seconds, iodepth=1, **RANDOM)
                samples[name].append(found["kiops"])
            told(rounds, turn, "an origin 1 ms away")
        mounts["back"].run("flush", "-m", mounts["back"].mountpoint)
        for mode in modes:
            harness.same_data(paths[mode], near / f"{mode}.raw")
    median = {name: harness.median(values) for name, values in samples.items()}
    ratio = median["back"] / median["through"]
    rows = [
        plain("origin 1 ms away: a write there, ms", 1 / median["itself"]),
        plain("  through the mount, write-through, ms", 1 / median["through"]),
        plain("  write-back, ms", 1 / median["back"], 3),
        judged("  write-back to write-through", ratio, 8, least=True, digits=1),
    ]
    return rows, samples


# -- 3 ---------------------------------------------------------------------------------------------


def _late_syncs(base: Path, cache: Path) -> dict[str, str]:
    """Surroundings in which syncs of this cache take longer."""
    library = base / "slow_sync.so"
    source = Path(__file__).with_name("slow_sync.c")
    harness.command("gcc", "-shared", "-fPIC", "-O2", "-o", library, source)
    return {
        "LD_PRELOAD": str(library),
        "SLOW_SYNC_MS": SLOW_SYNC_MS,
        "SLOW_SYNC_OF": str(cache.resolve()),
    }


def syncs(base: Path, rounds: int, seconds: float) -> tuple[list[Row], Samples]:
    """Writes with an fsync each, a second."""
    part = 4 * MIB
    names = {f"image-{number}.raw": part for number in range(WRITERS)}
    origin = made(base, "three/origin", {IMAGE: WRITERS * part, **names})
    copies = {
        place: made(base, f"three/{place}", {IMAGE: WRITERS * part, **names})
        for place in ("disk", "bare", "slow-origin")
    }
    total = 2 * WRITERS * part
    job = {"rw": "randwrite", "bs": "4k", "ioengine": "psync", "size": part}
    whole = {"rw": "write", "bs": "1m", "ioengine": "psync", "direct": 1}
    many = {"numjobs": WRITERS, "thread": 0}  # processes, as VMs are
    one_file = {**many, "offset_increment": part}
    own_file = {**many, "filename_format": "image-$jobnum.raw"}
    disk = copies["disk"]
    with ExitStack() as stack:
        bare = stack.enter_context(Bare(base / "three", copies["bare"], 1.0, "write")).mountpoint
        ours = Fusecache(base / "three", origin, "--size", _room(3 * total), *BACK, *IDLE)
        slow = Fusecache(
            base / "three/slow", copies["slow-origin"], "--size", _room(3 * total), *BACK, *IDLE
        )
        slow.environment = _late_syncs(base / "three", slow.cache)
        for mount in (ours, slow):
            stack.enter_context(mount)
            mount.read_all(IMAGE, *names)
            for name in (IMAGE, *names):
                stack.enter_context(harness.held(mount.mountpoint / name))
        mnt, late = ours.mountpoint, slow.mountpoint
        synced, plainly = {"direct": 1, "fsync": 1}, {"fdatasync": 1}
        fresh: dict[str, tuple[Path, dict[str, Any]]] = {
            "one, clean pages": (mnt / IMAGE, synced),
            "16 images, clean pages": (mnt, {**synced, **own_file}),
        }
        ways: dict[str, tuple[Path, dict[str, Any]]] = {
            "disk": (disk / IMAGE, plainly),
            "one": (mnt / IMAGE, synced),
            "16 of one image": (mnt / IMAGE, {**synced, **one_file}),
            "16 images": (mnt, {**synced, **own_file}),
            "bare": (bare / IMAGE, synced),
            "bare, 16 images": (bare, {**synced, **own_file}),
            "slow": (late / IMAGE, synced),
            "slow, 16 images": (late, {**synced, **own_file}),
            "disk, 16 files": (disk, {**plainly, **own_file}),
        }
        samples: Samples = {name: [] for name in (*fresh, *ways)}
        for turn in range(rounds):
            ours.run("flush", "-m", mnt)
            for name, (path, options) in fresh.items():
                found = harness.fio(path, seconds=None, **{**job, **options})
                samples[name].append(found["kiops"] * 1e3)
            for mount in (ours, slow):
                for name in (IMAGE, *names):
                    harness.fio(mount.mountpoint / name, seconds=None, **whole)
            for name, (path, options) in ways.items():
                found = harness.fio(path, seconds=seconds, **{**job, **options})
                samples[name].append(found["kiops"] * 1e3)
            told(rounds, turn, "writes with fsync")
        for mount in (ours, slow):
            mount.run("flush", "-m", mount.mountpoint)
            for name in (IMAGE, *names):
                harness.same_data(mount.mountpoint / name, mount.origin / name)
    median = {name: harness.median(values) for name, values in samples.items()}
    rows = [
        plain("pwrite and fdatasync of a plain file, ms", 1e3 / median["disk"], 3),
        plain("write and fsync through the mount, ms", 1e3 / median["one"], 3),
        judged("  times the plain file", median["disk"] / median["one"], 4, least=False),
        judged(
            "16 writers of 16 images to one", median["16 images"] / median["one"], 4, least=True
        ),
        plain("  bare pyfuse3, 16 to one", median["bare, 16 images"] / median["bare"]),
        plain("  16 writers of one image to one", median["16 of one image"] / median["one"]),
        judged(
            f"an SSD with {SLOW_SYNC_MS} ms more a sync: 16 writers of 16 images to one",
            median["slow, 16 images"] / median["slow"],
            4,
            least=True,
        ),
        plain(
            "  over clean pages, 16 images to one",
            median["16 images, clean pages"] / median["one, clean pages"],
        ),
        plain("  over clean pages, one, ms", 1e3 / median["one, clean pages"], 3),
        plain("  16 plain files to one", median["disk, 16 files"] / median["disk"]),
    ]
    return rows, samples


# -- 4 ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dirtying(path: Path, rate: int) -> Iterator[None]:
    """A process that writes 4 KiB at random places, ``rate`` times a second."""
    words = harness.fio_command(path, **RANDOM, iodepth=1, rate_iops=rate, runtime=600)
    words += ["--norandommap", "--time_based"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise BenchmarkError("the second process stopped writing")
    finally:
        process.terminate()
        process.wait()


def beside_cleaner(
    base: Path, rounds: int, seconds: float, size: int, rate: int
) -> tuple[list[Row], Samples]:
    """Reads of image A in kilo-IOPS, alone and while image B is written."""
    ways: dict[str, tuple[str, ...]] = {
        "cleaner idle": IDLE,
        "cleaner at work": ("--dirty-age", "0.5"),
        "at work, --clean-rate 1M": ("--dirty-age", "0.5", "--clean-rate", "1M"),
    }
    reads = {"rw": "randread", "bs": "4k", "iodepth": 32, "ioengine": "libaio", "direct": 1}
    samples: Samples = {f"{way}: {when}": [] for way in ways for when in ("alone", "beside")}
    with ExitStack() as stack:
        mounts = {}
        for number, (way, words) in enumerate(ways.items()):
            place = base / f"four/{number}"
            origin = made(place, "origin", {"a.raw": size, "b.raw": size})
            words = ("--size", _room(2 * size), *BACK, *words)
            mounts[way] = stack.enter_context(Fusecache(place, origin, *words))
            for name in ("a.raw", "b.raw"):
                mounts[way].read_all(name)
                stack.enter_context(harness.held(mounts[way].mountpoint / name))
        before = {way: mount.image("b.raw")["origin_write_bytes"] for way, mount in mounts.items()}
        for turn in range(rounds):
            for way, words in ways.items():
                mount = mounts[way]
                a, b = mount.mountpoint / "a.raw", mount.mountpoint / "b.raw"
                alone = harness.fio(a, seconds=seconds, ramp_time="300ms", **reads)
                with dirtying(b, rate):
                    time.sleep(0.5 if words == IDLE else OLD_ENOUGH)
                    beside = harness.fio(a, seconds=seconds, ramp_time="300ms", **reads)
                samples[f"{way}: alone"].append(alone["kiops"])
                samples[f"{way}: beside"].append(beside["kiops"])
            told(rounds, turn, "reads beside the cleaner")
        for way, mount in mounts.items():
            cleaned = mount.image("b.raw")["origin_write_bytes"] - before[way]
            if bool(cleaned) == (way == "cleaner idle"):
                raise BenchmarkError(f"{way}: {cleaned} bytes were written back")
            mount.run("flush", "-m", mount.mountpoint)
            harness.same_data(mount.mountpoint / "b.raw", mount.origin / "b.raw")
    rows = []
    for way in ways:
        pairs = zip(samples[f"{way}: beside"], samples[f"{way}: alone"], strict=True)
        ratio = harness.median([beside / alone for beside, alone in pairs])
        name = f"reads beside {rate} writes a second, {way}"
        goal = way != "cleaner idle"
        rows.append(judged(name, ratio, 0.8, least=True) if goal else plain(name, ratio))
    return rows, samples


# -- 5 ---------------------------------------------------------------------------------------------


def commits(base: Path, count: int, size: int) -> tuple[list[Row], dict[str, Any]]:
    """What random writes over a large image cost in commits, and how fast they are."""
    rows, found = [], {}
    for way in ("cold", "cached"):
        place = base / f"five-{way}"
        origin = place / "origin"
        origin.mkdir(parents=True)
        with (origin / IMAGE).open("wb") as file:
            file.truncate(size)
        time.sleep(harness.SETTLED)
        ours = Fusecache(place, origin, *BACK, *IDLE)
        slots = size // harness.BLOCK
        scale.build(ours, slots + slots // 8, slots if way == "cached" else 1)
        with ours:
            path = ours.mountpoint / IMAGE
            harness.fio(path, seconds=None, iodepth=8, **RANDOM | {"rw": "randread"}, io_size=MIB)
            before = ours.status()["cache"]
            options = {**RANDOM, "iodepth": 8, "io_size": count * 4 * KIB}
            speed = harness.fio(path, seconds=None, **options)
            after = ours.status()["cache"]
            ours.run("umount", "--keep-dirty", ours.mountpoint)
        counters = ("stable_commits", "barriers", "light_commits")
        grown = {name: after[name] - before[name] for name in counters}
        found[way] = {**grown, "writes": count, **speed}
        stable = grown["stable_commits"] + grown["barriers"]
        words = f"{count} random writes over {size // GIB} GiB, {way}:"
        rows.append(
            judged(f"{words} stable commits a write", stable / count, 0.02, least=False, digits=4)
        )
        rows.append(plain("  of these barriers, a write", grown["barriers"] / count, 4))
        rows.append(plain("  light commits a write", grown["light_commits"] / count))
        rows.append(plain("  kIOPS at depth 8", speed["kiops"], 1))
    return rows, found


def main() -> None:
    """One part after another, and one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each job in each round")
    parser.add_argument("--size", type=int, default=64, help="of the images, in MiB")
    parser.add_argument("--rate", type=int, default=500, help="writes a second beside reads")
    parser.add_argument("--count", type=int, default=20_000, help="writes over the large image")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--only", type=int, choices=range(1, 6), action="append", help="parts")
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    chosen = parser.parse_args()
    rounds, seconds, count = chosen.rounds, chosen.seconds, chosen.count
    if chosen.quick:
        rounds, seconds, count = 1, 1.0, min(count, 5_000)
    size = chosen.size * MIB
    with harness.workspace(chosen.directory) as base:
        parts: dict[int, Callable[[], tuple[list[Row], dict[str, Any]]]] = {
            1: lambda: cached_writes(base, rounds, seconds, size),
            2: lambda: far_origin(base, rounds, seconds, size),
            3: lambda: syncs(base, rounds, seconds),
            4: lambda: beside_cleaner(base, rounds, seconds, size, chosen.rate),
            5: lambda: commits(base, count, 8 * GIB),
        }
        rows: list[Row] = []
        found: dict[str, Any] = {}
        for number in chosen.only or parts:
            more, samples = parts[number]()
            rows += more
            found[str(number)] = samples
    harness.table("Write-back, medians", ["", "measured", "goal", ""], rows)
    if {1, 2, 3, 4} & set(chosen.only or parts):
        print("checked: after a flush the origin has the data that the mounts show")
    settings = {"rounds": rounds, "seconds": seconds, "size_mib": chosen.size, "count": count}
    harness.save("writes", {"settings": settings, "rows": rows, "samples": found})


if __name__ == "__main__":
    harness.run(main)
