"""The contenders of ``compare.py``: what shows images through FUSE, each as a context manager.

Every one shows the same names below one directory, ``IMAGE`` and ``VMS``, and is asked with
O_DIRECT: the kernel takes O_DIRECT for every FUSE file, also where the filesystem knows nothing of
it, so no contender can answer from the kernel's cache of its mount. Only the bare file is asked
without it, since with it the disk would be measured: all others find their data in the host's page
cache, and so does the bare file then.

Three are no caches but ways to the same files below one directory, the *plain* one: the bare file,
the bare pyfuse3 filesystem and qemu-storage-daemon. The caches have origins of their own.
"""

import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

import harness
from harness import MIB, Bare, BenchmarkError, Fusecache

IMAGE = "image.raw"
VMS = [f"vm-{number}.raw" for number in range(16)]
ALL = [IMAGE, *VMS]

READ_1 = "4K random read, depth 1"
READ_32 = "4K random read, depth 32"
READ_64K = "64K random read, depth 8"
READ_1M = "1M read in order, depth 4"
READ_16 = "4K random read, 16 images"


def read_jobs(depth: int) -> dict[str, dict[str, object]]:
    """What fio is told for the reads; ``depth``: of each job of those over 16 images."""
    return {
        READ_1: {"rw": "randread", "bs": "4k", "iodepth": 1},
        READ_32: {"rw": "randread", "bs": "4k", "iodepth": 32},
        READ_64K: {"rw": "randread", "bs": "64k", "iodepth": 8},
        READ_1M: {"rw": "read", "bs": "1m", "iodepth": 4},
        READ_16: {
            "rw": "randread",
            "bs": "4k",
            "iodepth": depth,
            "numjobs": len(VMS),
            "filename_format": "vm-$jobnum.raw",
        },
    }


def room(size: int, factor: float) -> str:
    """``--size`` of a cache for so many bytes of images."""
    return f"{int(size * factor) // MIB + 64}M"


class Contender:
    """What is measured. Entering starts it, leaving ends it in any state.

    Args:
        base: where it may put what it needs; must be its own and not exist yet.
        origin: the directory of the images.
    """

    name = ""
    programs: tuple[str, ...] = ()
    """It cannot be measured without these."""
    note = ""
    """How it runs, for the reader of the table."""
    images: Sequence[str] = ALL
    direct = True

    def __init__(self, base: Path, origin: Path) -> None:
        self.base = base
        self.origin = origin
        self.directory = base / "mnt"
        self.base.mkdir()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.start(stack)
            self.check_mounted()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, stack: ExitStack) -> None:
        """Starts it; what ends it goes on the stack."""
        raise NotImplementedError

    def path(self, image: str) -> Path:
        """Where the image is seen."""
        return self.directory / image

    def mountpoints(self) -> list[Path]:
        """What the kernel's table has to show while it runs."""
        return [self.directory]

    def check_mounted(self) -> None:
        """Raises BenchmarkError if anything is not mounted, by the kernel's table."""
        for path in self.mountpoints():
            if not harness.is_mounted(path):
                raise BenchmarkError(f"{self.name}: nothing is mounted at {path}")

    def warm(self) -> None:
        """Reads all images once."""
        for image in self.images:
            harness.read(self.path(image), direct=self.direct)

    def isolate(self) -> None:
        """From here on a read of the origin is noticed, if this is a cache."""

    def check_isolated(self, plain: Path) -> str:
        """Says how it is known that no read since ``isolate`` went to the origin; empty if it is no
        cache.

        Args:
            plain: the directory with the images everything is a copy of.

        Raises:
            BenchmarkError: one did.
        """
        return ""

    def truth(self, image: str) -> Path | None:
        """Where the data of all writes until now has to be; None: here alone."""
        return self.origin / image


def serving(
    name: str, words: list[object], log: Path, mountpoints: list[Path], stack: ExitStack
) -> None:
    """Starts a program that mounts; it is unmounted before it is ended, as all of these want it."""

    def mounted() -> bool:
        return all(map(harness.is_mounted, mountpoints))

    for path in mountpoints:
        stack.callback(harness.detach, path)  # also if it mounted some and failed
    stack.enter_context(harness.running(name, words, log, mounted))
    for path in mountpoints:
        stack.callback(harness.detach, path)


def listens(path: Path) -> bool:
    """Whether a server answers at a Unix socket: its file is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            return client.connect_ex(str(path)) == 0
        except OSError as exc:  # the one error that is raised all the same
            raise BenchmarkError(f"{path}: {exc}: choose a shorter --directory") from exc


class BareFile(Contender):
    """The file itself."""

    name = "bare file"
    note = "without O_DIRECT: from the page cache, where all others find their data, too"
    direct = False

    def start(self, stack: ExitStack) -> None:
        self.directory = self.origin

    def mountpoints(self) -> list[Path]:
        return []


class BarePyfuse3(Contender):
    """The floor of the toolkit, see ``bare.py``."""

    name = "bare pyfuse3"
    note = "os.pread and os.pwrite in the handlers; no cache"

    def start(self, stack: ExitStack) -> None:
        bare = stack.enter_context(Bare(self.base, self.origin, 1.0, "write"))
        self.directory = bare.mountpoint


class Ceiling(Contender):
    """The floor of the kernel's protocol, see ``ceiling.c``; reads only.

    Args:
        files: what it shows.
        zeros: answers zeros from memory instead of reading anything.
        threads: that serve.
    """

    programs = ("gcc",)

    def __init__(
        self, base: Path, files: Sequence[Path], *, zeros: bool = False, threads: int = 2
    ) -> None:
        super().__init__(base, files[0].parent)
        self.name = "C server, zeros" if zeros else f"C server, {threads} threads"
        self.note = "answers zeros, reads nothing" if zeros else "one pread for each read; no cache"
        self._zeros = zeros
        self._threads = threads
        self._files = files

    def start(self, stack: ExitStack) -> None:
        program = self.base / "ceiling"
        source = Path(__file__).with_name("ceiling.c")
        harness.command("gcc", "-std=gnu11", "-O2", "-o", program, source, "-lpthread")
        self.directory.mkdir()
        words: list[object] = [program, "-t", self._threads, *(["-0"] if self._zeros else [])]
        words += [self.directory, *self._files]
        serving(self.name, words, self.base / "log", self.mountpoints(), stack)


class Ours(Contender):
    """fusecache in one write mode, its images held open as running guests hold theirs.

    Args:
        size: of all images, in bytes.
        images: those the origin has.
        words: more options of ``mount``.
    """

    def __init__(
        self,
        base: Path,
        origin: Path,
        size: int,
        mode: str,
        *words: str,
        images: Sequence[str] = ALL,
    ) -> None:
        super().__init__(base, origin)
        self.name = ", ".join(["fusecache", mode, *words[1:]])
        self.note = f"--write-mode {mode} {' '.join(words)}".strip() + ", the cleaner idle"
        self.images = images
        # Half of the dirty limit is where writing back begins: more room than that.
        words = (*words, "--dirty-age", "3600", "--dirty-limit", "90", "--write-mode", mode)
        self.mount = Fusecache(
            base, origin, "--size", room(size, 2.5 if mode == "back" else 1.25), *words
        )
        self._origin_reads = 0

    def start(self, stack: ExitStack) -> None:
        self.directory = stack.enter_context(self.mount).mountpoint
        stack.enter_context(harness.held(*map(self.path, self.images)))

    def warm(self) -> None:
        self.mount.read_all(*self.images)

    def _count(self) -> int:
        return sum(image["origin_reads"] for image in self.mount.status()["images"])

    def isolate(self) -> None:
        self._origin_reads = self._count()
        for path in self.origin.iterdir():
            harness.forget_pages(path)  # memory is for what is measured

    def check_isolated(self, plain: Path) -> str:
        if asked := self._count() - self._origin_reads:
            raise BenchmarkError(f"{self.name}: {asked} reads went to the origin")
        return "its own counters show no origin read"

    def truth(self, image: str) -> Path | None:
        self.mount.run("flush", "-m", self.mount.mountpoint)
        return super().truth(image)

    def layout(self) -> float:
        """Unmounts; gives the share of neighbouring blocks of ``IMAGE`` that lie in neighbouring
        slots, 0 to 1."""
        self._stack.close()
        return harness.layout(self.mount, IMAGE)


class Churned(Ours):
    """fusecache with an image whose blocks came in random order into a cache that was full.

    Another image, as large as the cache, and then this one are read at random, 64 KiB at a time
    and each block once, ``passes`` times.
    """

    OTHER = "other.raw"

    def __init__(self, base: Path, origin: Path, size: int, passes: int) -> None:
        super().__init__(base, origin, size, "through", images=[IMAGE])
        self.name = "fusecache, churned"
        self.note = f"filled by random 64K reads in a full cache, {passes} times over"
        self._passes = passes
        self._size = size

    def start(self, stack: ExitStack) -> None:
        with (self.origin / self.OTHER).open("wb") as file:
            file.truncate(self._size * 5 // 4 + 64 * MIB)
        super().start(stack)

    def warm(self) -> None:
        reads = {"rw": "randread", "bs": "64k", "iodepth": 8, "ioengine": "libaio", "direct": 1}
        for _ in range(self._passes):
            for image in (self.OTHER, IMAGE):
                harness.fio(self.path(image), seconds=None, **reads)
        self.mount.read_all(IMAGE)  # the few that were answered but had no room yet


class StorageDaemon(Contender):
    """qemu-storage-daemon: one daemon, each image an export, mounted on a file of its own."""

    name = "qemu-storage-daemon"
    programs = ("qemu-storage-daemon",)
    note = "one daemon, an export for each image; threads, host page cache on; no cache of its own"

    def start(self, stack: ExitStack) -> None:
        self.directory.mkdir()
        words: list[object] = ["qemu-storage-daemon"]
        for number, image in enumerate(ALL):
            path = self.path(image)
            path.touch()
            file = f"driver=file,node-name=f{number},filename={self.origin / image},aio=threads"
            words += ["--blockdev", f"{file},cache.direct=off"]
            export = f"type=fuse,id=e{number},node-name=f{number},mountpoint={path}"
            words += ["--export", f"{export},writable=on,growable=off"]
        serving(self.name, words, self.base / "log", self.mountpoints(), stack)

    def mountpoints(self) -> list[Path]:
        return [self.path(image) for image in ALL]


class NbdCache(Contender):
    """nbdkit's cache filter, seen through nbdfuse: a pair of processes for each image.

    Its origin is emptied once everything is cached: whoever reads it then gets an error.
    """

    name = "nbdkit, nbdfuse"
    programs = ("nbdkit", "nbdfuse")
    note = "nbdkit --filter=cache file, cache-on-read=true, and nbdfuse, a pair for each image"

    def start(self, stack: ExitStack) -> None:
        self.directory.mkdir()
        cache = self.base / "cache"
        cache.mkdir()
        for image in ALL:
            door, path = self.base / f"{image}.sock", self.path(image)
            path.touch()
            server = ["nbdkit", "--foreground", "--unix", door, "--filter=cache"]
            server += ["file", self.origin / image, "cache-on-read=true"]
            log = self.base / f"{image}.nbdkit"
            stack.enter_context(
                harness.running(self.name, server, log, partial(listens, door), TMPDIR=str(cache))
            )
            client = ["nbdfuse", path, "--unix", door]
            serving(self.name, client, self.base / f"{image}.nbdfuse", [path], stack)

    def mountpoints(self) -> list[Path]:
        return [self.path(image) for image in ALL]

    def isolate(self) -> None:
        for image in ALL:
            os.truncate(self.origin / image, 0)

    def check_isolated(self, plain: Path) -> str:
        return "its origin was emptied once all was cached: a read there would have failed"

    def truth(self, image: str) -> Path | None:
        return None


class Rclone(Contender):
    """rclone over a local directory, with everything in its VFS cache.

    Its origin gets zeros in place of its data once everything is cached, with the size and time it
    had, by which rclone tells one content from another: whoever reads it then shows zeros.
    """

    name = "rclone"
    programs = ("rclone",)
    note = "rclone mount --vfs-cache-mode full over a local directory; nothing is written back"

    def start(self, stack: ExitStack) -> None:
        self.directory.mkdir()
        words: list[object] = ["rclone", "mount", self.origin, self.directory]
        words += ["--vfs-cache-mode", "full", "--cache-dir", self.base / "cache"]
        # It must not look for its origin again, nor write to it beside other contenders.
        words += ["--dir-cache-time", "24h", "--poll-interval", "0", "--vfs-write-back", "24h"]
        words += ["--vfs-cache-max-age", "24h", "--config", os.devnull]
        serving(self.name, words, self.base / "log", self.mountpoints(), stack)

    def isolate(self) -> None:
        for image in ALL:
            path = self.origin / image
            had = path.stat()
            os.truncate(path, 0)
            os.truncate(path, had.st_size)
            os.utime(path, ns=(had.st_atime_ns, had.st_mtime_ns))

    def check_isolated(self, plain: Path) -> str:
        for image in VMS:  # nothing writes to these
            harness.same_data(self.path(image), plain / image)
        return "its origin was overwritten with zeros once all was cached, and it shows none"

    def truth(self, image: str) -> Path | None:
        return None


PEERS: tuple[type[Contender], ...] = (BareFile, BarePyfuse3, StorageDaemon, NbdCache, Rclone)


def missing(contender: type[Contender]) -> list[str]:
    """Its programs that are not installed."""
    return [program for program in contender.programs if shutil.which(program) is None]


def build(plain: Path, size: int) -> None:
    """The images, of random bytes: one of ``size`` bytes, 16 of a 32nd of it each."""
    plain.mkdir()
    for image in ALL:
        part = size if image == IMAGE else max(size // len(VMS) // 2, MIB)
        harness.random_file(plain / image, part)


def copy(plain: Path, origin: Path, images: Sequence[str] = ALL) -> Path:
    """An origin with the same images; gives it back."""
    origin.mkdir(parents=True)
    for image in images:
        shutil.copyfile(plain / image, origin / image)
    harness.sync(origin)
    return origin
