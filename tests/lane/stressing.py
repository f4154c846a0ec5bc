"""Everything at once, against a small cache: see stress.c."""

import json
import mmap
import os
import random
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lane.build import HERE, compiler
from tests.support.daemon import Mount, end
from tests.support.stamps import stamped

IMAGES, PAGES, PAGE = 8, 2048, 4096
READERS = ("direct", "direct", "direct", "direct", "buffered", "mapped")
WRITERS = ("write", "write-buffered", "cut")
_HEAD = struct.Struct("<IIIIIIQQ")
_STOP, _FAILED, _ROUND, _OPENED, _CLOSED = 0, 4, 8, 12, 16


@dataclass
class Done:
    """What came of it."""

    pages: int
    written: int
    evictions: int
    lane: dict[str, Any]
    words: str


def _compiled(into: Path) -> Path:
    program = into / "stress"
    subprocess.run([*compiler(), "-o", program, HERE / "stress.c"], check=True)
    return program


def _shared(path: Path) -> mmap.mmap:
    versions = struct.pack("<II", 2, 2) * ((IMAGES + 1) * PAGES)
    path.write_bytes(bytes(_HEAD.size) + versions)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _get(shared: mmap.mmap, at: int) -> int:
    return int(memoryview(shared).cast("I")[at // 4])


def _set(shared: mmap.mmap, at: int, value: int) -> None:
    """In one store: ``struct.pack_into`` writes zeros first, and a worker that saw a round 0 waited
    for its end."""
    memoryview(shared).cast("I")[at // 4] = value


class Stress:
    """A mount, started, and all who work on it."""

    def __init__(self, mount: Mount, seed: int) -> None:
        self._mount = mount
        self._rng = random.Random(seed)
        self._seed = seed
        self._evictions = 0
        for image in range(1, IMAGES + 1):
            path = mount.origin / f"{image}.img"
            path.write_bytes(stamped(image, 0, PAGES * PAGE, 2))
        self._program = _compiled(mount.base)
        self._place = mount.base / "shared"
        self._shared = _shared(self._place)
        self._workers: list[subprocess.Popen[str]] = []

    def run(self, seconds: float, pages: int) -> Done:
        """Until so many pages were read or so much time is over, whatever comes first."""
        self._mount.start()
        mountpoint, origin = self._mount.mountpoint, self._mount.origin
        roles = [(role, mountpoint) for role in (*READERS, *WRITERS)]
        try:
            for number, (role, directory) in enumerate([*roles, ("outside", origin)]):
                seed = str(self._seed * 100 + number)
                command = [self._program, role, directory, self._place, seed]
                worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                self._workers.append(worker)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._pages()[0] < pages and self._well():
                self._disturb()
        finally:
            words = self._end()
        return Done(*self._pages(), self._evictions, self._mount.status()["lane"], words)

    def _pages(self) -> tuple[int, int]:
        return _HEAD.unpack_from(self._shared)[6:8]

    def _well(self) -> bool:
        """None has found anything wrong, or been killed, as by a page that could not be read."""
        alive = all(worker.poll() is None for worker in self._workers)
        return alive and not _get(self._shared, _FAILED)

    def _disturb(self) -> None:
        """Flushes one image, evicts two, takes the cache out of memory, and has all files closed
        and opened again."""
        shared = self._shared
        self._verb("flush", self._rng.randrange(1, IMAGES + 1))
        self._make_cold()
        time.sleep(0.3)
        self._verb("evict", self._rng.randrange(1, IMAGES + 1))
        _set(shared, _CLOSED, 0)
        _set(shared, _ROUND, _get(shared, _ROUND) + 1)
        deadline = time.monotonic() + 60
        while _get(shared, _CLOSED) < len(self._workers) and self._well():
            assert time.monotonic() < deadline, "a worker hangs"
            time.sleep(0.001)
        self._verb("evict", self._rng.randrange(1, IMAGES + 1))
        _set(shared, _OPENED, _get(shared, _ROUND))
        time.sleep(0.7)

    def _make_cold(self) -> None:
        """What was written out, at least."""
        fd = os.open(self._mount.cache, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _verb(self, verb: str, image: int) -> None:
        done = self._mount.run(verb, f"{image}.img", "-m", self._mount.mountpoint)
        assert done.returncode == 0, done.stderr
        self._evictions += verb == "evict"

    def _end(self) -> str:
        _set(self._shared, _STOP, 1)
        words = []
        for worker in self._workers:
            try:
                out, _ = worker.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                end(worker.pid)
                out = f"{worker.args!r} hangs\n{worker.communicate()[0]}"
            if worker.returncode not in (0, 1):
                out += f"{worker.args!r} ended with {worker.returncode}"
            words.append(out)
        return "".join(words)


def small_mount(base: Path, **options: str) -> Mount:
    """Some 240 slots for 1024 blocks, in write-back with a cleaner at work all the time."""
    return Mount(base, size="16M", lane="on", write_mode="back", dirty_age="1", **options)


def the_origin_has_everything(mount: Mount, place: Path) -> None:
    """After a clean end: every page of every image as it was last written, by a check of the
    origin alone."""
    versions = place.read_bytes()[_HEAD.size :]
    for image in range(1, IMAGES + 1):
        data = (mount.origin / f"{image}.img").read_bytes()
        for page in range(PAGES):
            _, done = struct.unpack_from("<II", versions, ((image * PAGES) + page) * 8)
            found = data[page * PAGE : (page + 1) * PAGE]
            wanted = bytes(len(found)) if done & 1 else stamped(image, page * PAGE, PAGE, done)
            assert found == wanted, (image, page, done)


def told(done: Done) -> str:
    """For people."""
    return json.dumps({**done.__dict__, "cpus": os.cpu_count()}, default=str)
