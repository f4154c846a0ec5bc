"""What the benchmarks share: real mounts, fio, tables and results. Cleans up whatever happens."""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from rich.console import Console
from rich.table import Table

from fusecache.fuse import queues

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 64 * KIB
_PASSES = 5
SETTLED = 2.1
"""Seconds after which a change is trusted (P3)."""

_HERE = Path(__file__).resolve().parent
_LIBC = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


class BenchmarkError(Exception):
    """Something was not as it has to be for the numbers to mean anything."""


def interruptible() -> None:
    """SIGTERM and SIGHUP clean up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What comparisons with peers can be told, all of them."""
    parser.add_argument(
        "--present", action="store_true", help="leave out what is not installed, and say so"
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="jobs with this in their names; may repeat"
    )
    parser.add_argument("--directory", help="where to work; default: the system's temporary one")
    parser.add_argument("--results", type=Path, help="where to write; default: benchmarks/results")


@contextlib.contextmanager
def workspace(directory: str | None) -> Iterator[Path]:
    """A temporary directory, removed at the end unless something is still mounted below it."""
    base = Path(tempfile.mkdtemp(prefix="fusecache-bench-", dir=directory)).resolve()
    try:
        yield base
    finally:
        if f" {base}/" in Path("/proc/self/mounts").read_text():
            print(f"{base} stays: something is mounted below it", file=sys.stderr)
        else:
            shutil.rmtree(base, ignore_errors=True)


def command(*words: object) -> str:
    """Runs a program to its end and returns what it printed."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchmarkError(f"'{' '.join(map(str, words))}' failed: {done.stderr.strip()}")
    return done.stdout


def is_mounted(path: Path) -> bool:
    """By the kernel's table; the mount itself is not touched."""
    return f" {path} fuse" in Path("/proc/self/mounts").read_text()


def detach(path: Path) -> None:
    """Takes whatever is mounted at ``path`` out of the tree."""
    while is_mounted(path) and _LIBC.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        pass


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Ends a process by its id and waits until it is gone, at most 20 s."""
    try:
        os.kill(pid, number)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not _gone(pid):
            time.sleep(0.005)
    except ProcessLookupError:
        return


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@contextlib.contextmanager
def running(
    name: str, words: Sequence[object], log: Path, ready: Callable[[], bool], **variables: str
) -> Iterator[int]:
    """A program in the background, from the moment it is ready until it is ended; gives its pid.

    Args:
        log: gets what it prints.
        variables: of its environment, besides ours.

    Raises:
        BenchmarkError: it ended early, or was not ready within 20 s.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us, who end it
            env={**os.environ, **variables},
        )
    try:
        deadline = time.monotonic() + 20
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()
                raise BenchmarkError(f"{name} did not start: {said[-1] if said else 'no word'}")
            time.sleep(0.02)
        yield process.pid
    finally:
        end(process.pid, signal.SIGTERM)
        end(process.pid)
        process.wait()


@contextlib.contextmanager
def kernel_queues(wanted: bool) -> Iterator[None]:
    """Whether FUSE offers its queues (io_uring) to mounts that are made meanwhile."""
    before = queues.ALLOWED.read_text() if queues.ALLOWED.exists() else ""
    if before:
        queues.ALLOWED.write_text("Y" if wanted else "N")
    try:
        yield
    finally:
        if before:
            queues.ALLOWED.write_text(before)


class Fusecache:
    """One ``fusecache mount`` through the real command line.

    ``with Fusecache(base, origin) as mount`` starts it; leaving ends it in any state.
    """

    name = "fusecache"

    def __init__(self, base: Path, origin: Path, *arguments: str) -> None:
        self.environment: dict[str, str] = {}
        """What its processes find there besides."""
        self.origin = origin
        self.mountpoint = base / "mnt"
        self.cache = base / "cache"
        self.runtime = base / "run"
        self.arguments = arguments
        self.queues = False
        """Whether the kernel shall hand requests over by io_uring."""
        for directory in (self.mountpoint, self.runtime):
            directory.mkdir(parents=True, exist_ok=True)

    def run(self, *words: object) -> str:
        """A verb of the command line, in this mount's surroundings."""
        done = subprocess.run(
            [sys.executable, "-m", "fusecache", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "FUSECACHE_RUNTIME_DIR": str(self.runtime),
                **self.environment,
            },
        )
        if done.returncode != 0:
            raise BenchmarkError(f"fusecache {words[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def start(self) -> None:
        """Returns when it serves."""
        words = (self.origin, self.mountpoint, "--cache", self.cache, *self.arguments)
        with kernel_queues(self.queues):
            self.run("mount", *words)
        if not is_mounted(self.mountpoint):
            raise BenchmarkError(f"nothing is mounted at {self.mountpoint}")
        if self.queues and not self.status()["lane"]["fuse_over_io_uring"]:
            raise BenchmarkError("the kernel does not use its queues")

    def __enter__(self) -> "Fusecache":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stop(self) -> None:
        """A clean unmount."""
        self.run("umount", self.mountpoint)

    def close(self) -> None:
        """Cleanly if possible; else by force."""
        for socket in self.runtime.glob("*.sock"):
            end(int(socket.stem), signal.SIGTERM)  # flushes and unmounts
            end(int(socket.stem))
        detach(self.mountpoint)

    def status(self) -> dict[str, Any]:
        """``status --json`` of this mount."""
        mounts = json.loads(self.run("status", "--json", "-m", self.mountpoint))["mounts"]
        return dict(mounts[0])

    def image(self, name: str) -> dict[str, Any]:
        """What status says of one image."""
        return next(dict(i) for i in self.status()["images"] if i["path"] == name)

    @property
    def pid(self) -> int:
        """Of the daemon."""
        return int(self.status()["pid"])

    def read_all(self, *names: str) -> None:
        """Fills the cache with whole images in order, and waits until all of them are stored.

        An origin in the page cache is faster than an SSD: what could not wait for its write is
        read again.
        """
        sizes = {name: (self.origin / name).stat().st_size for name in names}
        blocks = {name: -(-size // BLOCK) for name, size in sizes.items()}
        lacking = list(names)
        for _ in range(_PASSES):
            for name in lacking:
                read(self.mountpoint / name, direct=True)
            time.sleep(0.2)
            lacking = self._lacking(blocks)
        self.stored(blocks)

    def _lacking(self, blocks: dict[str, int]) -> list[str]:
        cached = {image["path"]: image["cached_blocks"] for image in self.status()["images"]}
        return [name for name, count in blocks.items() if cached.get(name, 0) < count]

    def stored(self, blocks: dict[str, int]) -> None:
        """Waits until so many blocks of the images are cached: a read is answered before its
        blocks are stored.

        Raises:
            BenchmarkError: they were not after 60 s.
        """
        deadline = time.monotonic() + 60
        while lacking := self._lacking(blocks):
            if time.monotonic() > deadline:
                name = lacking[0]
                there = self.image(name)["cached_blocks"]
                raise BenchmarkError(f"only {there} of {blocks[name]} blocks of {name} were stored")
            time.sleep(0.1)


class Served:
    """A filesystem of a script in this directory, in a process of its own."""

    def __init__(self, name: str, mountpoint: Path, script: str, *words: object) -> None:
        self.name = name
        self.mountpoint = mountpoint
        self.mountpoint.mkdir()
        self._command = [sys.executable, str(_HERE / script), *map(str, words)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, start_new_session=True)
        try:
            deadline = time.monotonic() + 20
            while not is_mounted(self.mountpoint):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkError(f"{self.name} did not mount")
                time.sleep(0.02)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        detach(self.mountpoint)
        if self._process is not None:
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Bare(Served):
    """The bare pyfuse3 filesystem of ``bare.py``."""

    def __init__(self, base: Path, origin: Path, timeout: float, *options: str) -> None:
        name = ", ".join(["bare pyfuse3", f"attributes {timeout:.0f} s", *options])
        mountpoint = base / "-".join(["bare", f"{timeout:.0f}", *options])
        words = [origin, mountpoint, "--timeout", timeout, *(f"--{word}" for word in options)]
        super().__init__(name, mountpoint, "bare.py", *words)


def fio_command(path: Path, **options: object) -> list[str]:
    """The words of a fio job, with what all of them have."""
    words = ["fio", "--name=job", f"--{'directory' if path.is_dir() else 'filename'}={path}"]
    words += ["--randrepeat=0", "--invalidate=0", "--thread", "--group_reporting"]
    return words + [f"--{name}={value}" for name, value in options.items()]


def fio(path: Path, *, seconds: float | None, **options: object) -> dict[str, float]:
    """One fio job of reads, or of writes if ``rw`` says so: thousand IOPS, MB/s and mean latency
    in microseconds, of all its threads together.

    ``path`` may be a directory if ``filename_format`` says which files; ``seconds`` None: once
    over the file.
    """
    kind = "write" if "write" in str(options.get("rw")) else "read"
    words = [*fio_command(path, **options), "--output-format=json"]
    if kind == "read":
        words.append("--readonly")
    if seconds is not None:
        # Of fractions of a second fio takes only whole ones, of milliseconds all.
        words += ["--norandommap", "--time_based", f"--runtime={round(seconds * 1e3)}ms"]
    return _figures(command(*words), kind)


def replay(logs: Sequence[Path]) -> dict[str, float]:
    """Reads what logs of ``read_log`` say, each log in a process of its own, all at once; O_DIRECT
    at depth 1. Figures as of ``fio``."""
    words = ["fio", "--name=job", "--invalidate=0", "--group_reporting", "--readonly"]
    words += ["--direct=1", "--ioengine=psync", f"--numjobs={len(logs)}"]
    # Processes, since fio 3.33 crashes when threads read logs.
    words += [f"--read_iolog={':'.join(map(str, logs))}", "--output-format=json"]
    return _figures(command(*words), "read")


def read_log(log: Path, path: Path, reads: Sequence[tuple[int, int]]) -> Path:
    """A log of (offset, length) reads of ``path`` in bytes, in fio's format; returns ``log``."""
    lines = ["fio version 2 iolog", f"{path} add", f"{path} open"]
    lines += [f"{path} read {offset} {length}" for offset, length in reads]
    log.write_text("\n".join([*lines, f"{path} close", ""]))
    return log


def _figures(said: str, kind: str) -> dict[str, float]:
    job = json.loads(said[said.index("{") :])["jobs"][0][kind]
    return {
        "kiops": job["iops"] / 1e3,
        "mb_s": job["bw_bytes"] / 1e6,
        "mean_us": job["lat_ns"]["mean"] / 1e3,
        "operations": job["total_ios"],
        "bytes": job["io_bytes"],
    }


def random_file(path: Path, size: int) -> None:
    """A file of random bytes, on stable storage."""
    with path.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, *, direct: bool) -> None:
    """Reads a whole file once, 1 MiB at a time."""
    flags = ["iflag=direct"] if direct else []
    command("dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *flags)


def layout(mount: Fusecache, image: str) -> float:
    """The share of an image's cached blocks that lie in the slot after their predecessor's, 0 to
    1; the cache must not be mounted."""
    with contextlib.closing(sqlite3.connect(f"{mount.cache}.sqlite")) as database:
        slots = dict(
            database.execute(
                "SELECT block, slot FROM blocks JOIN image ON image.id = blocks.image"
                " WHERE path = ?",
                [os.fsencode(image)],
            )
        )
    pairs = [(slot, slots[block + 1]) for block, slot in slots.items() if block + 1 in slots]
    return sum(second == first + 1 for first, second in pairs) / max(len(pairs), 1)


def same_data(path: Path, origin: Path, *, direct: bool = True) -> None:
    """Compares all bytes, read past the kernel's cache of the mount if ``direct``.

    Raises:
        BenchmarkError: they differ.
    """
    words = ["dd", f"if={path}", "bs=1M", "status=none", *(["iflag=direct"] if direct else [])]
    reading = subprocess.Popen(words, stdout=subprocess.PIPE)
    compared = subprocess.run(["cmp", "-", str(origin)], stdin=reading.stdout, check=False)
    if reading.stdout is not None:
        reading.stdout.close()
    if reading.wait() != 0 or compared.returncode != 0:
        raise BenchmarkError(f"{path} does not show the data of {origin}")


def forget_pages(path: Path) -> None:
    """Takes a file's clean pages out of this host's page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def sync(directory: Path) -> None:
    """Brings everything written to the filesystem of ``directory`` to the disk, so that one job's
    dirty pages are not written during the next."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        if _LIBC.syncfs(fd) != 0:
            raise BenchmarkError(f"{directory} cannot be synced")
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(*paths: Path) -> Iterator[None]:
    """The images stay open for writing, as a running guest's do.

    Else each job would be an open of its own, and one less than 2 s after the last write to the
    origin drops the clean blocks (P3).
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(os.close, os.open(path, os.O_RDWR))
        yield


def memory(pid: int) -> dict[str, int]:
    """Bytes: resident now, and the most there ever was."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {key: int(fields[key].split()[0]) * KIB for key in ("VmRSS", "VmHWM")}


def chosen_jobs(jobs: Iterable[str], texts: Sequence[str] | None) -> list[str]:
    """The jobs with any of ``texts`` in their names; all without any.

    Raises:
        BenchmarkError: there is none.
    """
    names = list(jobs)
    if found := [job for job in names if any(text in job for text in texts or [""])]:
        return found
    raise BenchmarkError(f"no job has that in its name; there are: {'; '.join(names)}")


def median(values: Sequence[float]) -> float:
    """The median as a plain float."""
    return float(statistics.median(values))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column to the left, numbers to the right."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for place, column in enumerate(columns):
        shown.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(shown)
    console.print()


def verdict(value: float, goal: float, *, least: bool) -> str:
    """``met`` or ``MISSED``; ``least``: the goal is a lower bound."""
    return "met" if (value >= goal if least else value <= goal) else "MISSED"


def save(name: str, result: dict[str, Any], directory: Path | None = None) -> Path:
    """Writes the numbers and what they were measured on, to ``benchmarks/results/`` if not told
    otherwise; returns the file."""
    directory = _HERE / "results" if directory is None else directory
    directory.mkdir(parents=True, exist_ok=True)
    machine = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "fio": command("fio", "--version").strip(),
    }
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = directory / f"{name}-{stamp}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine, **result}, indent=2) + "\n")
    written(path)
    return path


def written(path: Path) -> None:
    """Says where a result lies."""
    inside = path.is_relative_to(_HERE.parent)
    print(f"written to {path.relative_to(_HERE.parent) if inside else path}")


def _first(path: str, key: str) -> str:
    """The value of the first ``key: value`` line of a file of the kernel's; empty without one."""
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a benchmark; one line instead of a traceback when it cannot go on."""
    interruptible()
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        main()
    except BenchmarkError as exc:
        sys.exit(f"benchmark failed: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
