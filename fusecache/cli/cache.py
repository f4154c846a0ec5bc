"""What every verb needs to open a cache or to make one."""

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import click

from fusecache.cli.progress import Progress, count_text
from fusecache.config import DEFAULT_BLOCK_SIZE, format_size
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.control.protocol import readable, state_directory
from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    DatabaseError,
    EmptyCacheError,
    UsageError,
)
from fusecache.store import cache_device
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.dirty_data import DirtyData, dirty_data
from fusecache.store.superblock import DATA_OFFSET, Superblock
from fusecache.store.telling import Tell, silent

_ENDING = 5.0
"""Seconds that a daemon whose socket is gone may still have its cache open."""
_POLL = 0.2
_SHOWN = 3


def default_database(path: Path, superblock: Superblock) -> Path:
    """Beside a cache file; for a block device in the state directory, by the cache's uuid."""
    if stat.S_ISBLK(path.stat().st_mode):
        return state_directory() / f"{superblock.uuid}.sqlite"
    return Path(f"{path}.sqlite")


def open_cache_device(
    path: Path, database: Path | None, size: int | None, block_size: int | None
) -> tuple[CacheDevice, BlockMap]:
    """Opens a cache for serving, and formats it first if it is empty.

    Raises:
        FusecacheError: it cannot be used; the sentence says why and what to do.
    """
    with made_if_missing(path, size):
        fd = open_locked(path)
        try:
            try:
                superblock = cache_device.read_superblock(fd, path)
            except EmptyCacheError:
                return make(fd, path, database, size, block_size)
            _compare(path, superblock, size, block_size)
            block_map = BlockMap.open(database or default_database(path, superblock), superblock)
            return CacheDevice(path, fd, superblock), block_map
        except BaseException:
            os.close(fd)
            raise


@contextlib.contextmanager
def made_if_missing(path: Path, size: int | None, tell: Tell = silent) -> Iterator[None]:
    """A cache file that was made here does not outlive an error here."""
    if os.path.lexists(path):
        yield
        return
    if size is None:
        raise UsageError(
            f"The cache {path} does not exist: give --size to create it as a file, like --size 20G."
        )
    if not path.parent.is_dir():
        raise CacheDeviceError(f"Cannot create the cache {path}: there is no {path.parent}.")
    cache_device.create_file(path, size, tell)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_locked(path: Path) -> int:
    """A locked descriptor of a cache. Waits for a daemon that is ending; if the cache is in use
    otherwise, says by which mount."""
    deadline = time.monotonic() + _ENDING
    with _Waiting(path) as waiting:
        while True:
            try:
                return cache_device.open_locked(path)
            except CacheInUseError as exc:
                pid = cache_device.holder_of(path)
                daemon = _daemon_of(path, pid)
                if daemon is not None and daemon.mounted:
                    raise CacheInUseError(
                        f"{exc} It serves {daemon.mountpoint} (pid {daemon.pid}). To end it: "
                        f"fusecache umount {daemon.mountpoint}"
                    ) from exc
                # One that flushes takes its time; one without a socket has just a moment left.
                if daemon is not None:
                    waiting.tell(daemon)
                elif not _is_fusecache(pid) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)


def wait_until_free(path: Path) -> None:
    """Waits for a daemon that has unmounted this cache and still brings its data to the origin."""
    with _Waiting(path) as waiting:
        while (daemon := _daemon_of(path)) is not None and not daemon.mounted:
            waiting.tell(daemon)
            time.sleep(_POLL)


def _daemon_of(path: Path, pid: int | None = None) -> Daemon | None:
    return next((d for d in client.daemons() if d.cache == path or d.pid == pid), None)


class _Waiting(Progress):
    """Says whom we wait for, and on a terminal also how much is left."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._said = False

    def tell(self, daemon: Daemon) -> None:
        """Once in a pipe, always anew on a terminal."""
        left = format_size(daemon.dirty_bytes)
        text = f"fusecache: waiting for pid {daemon.pid} to finish with {self._path}"
        text += f", {left} left to write back" if daemon.dirty_bytes else ""
        if self.live:
            self.show(text)
        elif not self._said:
            click.echo(text, err=True)
        self._said = True


def _is_fusecache(pid: int | None) -> bool:
    """Whether a process runs this program, as far as /proc tells."""
    try:
        return b"fusecache" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _compare(path: Path, superblock: Superblock, size: int | None, block_size: int | None) -> None:
    """The sizes asked for are those the cache was formatted with."""
    if block_size is not None and block_size != superblock.block_size:
        raise CacheDeviceError(
            f"{path} was formatted with blocks of {format_size(superblock.block_size)}, not "
            f"{format_size(block_size)}: leave --block-size out, or format it anew with "
            f"fusecache format {path} --force --block-size ..."
        )
    if size is not None and _slots(size, superblock.block_size) != superblock.slot_count:
        had = DATA_OFFSET + superblock.slot_count * superblock.block_size
        raise CacheDeviceError(
            f"{path} was formatted with a size of {format_size(had)}, not {format_size(size)}: "
            f"leave --size out, or format it anew with fusecache format {path} --force --size ..."
        )


def _slots(size: int, block_size: int) -> int:
    return (size - DATA_OFFSET) // block_size


def make(
    fd: int,
    path: Path,
    database: Path | None,
    size: int | None,
    block_size: int | None,
    *,
    force: bool = False,
    tell: Tell = silent,
) -> tuple[CacheDevice, BlockMap]:
    """Makes an empty cache. Ordered so that a cut at any moment leaves none at all:
    the old superblock goes first, the new one comes last, the database in between."""
    block_size = block_size or DEFAULT_BLOCK_SIZE
    had = cache_device.size_of(fd)
    superblock = cache_device.plan(fd, path, block_size, size)
    place = database or default_database(path, superblock)
    _check_database_place(place, path, leftover=database is None, force=force)
    if size is not None:
        _fit(fd, path, size, tell)
    try:
        cache_device.erase_superblock(fd, path)
        block_map = BlockMap.create(place, superblock)
        try:
            cache_device.write_superblock(fd, path, superblock)
        except BaseException:
            block_map.close()
            raise
    except BaseException:
        _cut_back(fd, had)
        raise
    return CacheDevice(path, fd, superblock), block_map


def _check_database_place(place: Path, path: Path, *, leftover: bool, force: bool) -> None:
    """A new database replaces an empty file, or one that an earlier cache at this very path
    left behind; with ``force`` any file."""
    if place == path:
        raise UsageError(f"{place} cannot be both cache and database: choose another --db.")
    if not os.path.lexists(place):
        return
    if not place.is_file():
        raise DatabaseError(f"The database {place} is not a file: choose another --db.")
    if force or place.stat().st_size == 0:
        return
    if leftover and BlockMap.is_block_map(place):
        _check_leftover(place, path)
        return
    what = "the map of another cache" if BlockMap.is_block_map(place) else "something else"
    raise DatabaseError(
        f"{place} holds {what}: choose another --db, or remove the file if nobody needs it."
    )


def _check_leftover(place: Path, path: Path) -> None:
    """The map of a cache that is no longer at its path goes, unless data was lost with it."""
    found = dirty_data(place)
    if found.images:
        raise DatabaseError(
            f"{path} is empty, but {place} says that a cache was there with {describe(found)} "
            "that the origin does not have: bring that cache back. To give the data up: "
            f"fusecache format {path} --force --discard-dirty"
        )


def describe(found: DirtyData) -> str:
    """``1.2 GiB of 3 images (vm1.img: 1.0 GiB, ...)``, the largest first."""
    largest = sorted(found.images.items(), key=lambda item: item[1], reverse=True)
    names = [
        f"{readable(os.fsdecode(name))[0]}: {format_size(size)}" for name, size in largest[:_SHOWN]
    ]
    more = ["..."] if len(largest) > _SHOWN else []
    return f"{format_size(found.bytes)} of {count_text(len(largest))} ({', '.join(names + more)})"


def _fit(fd: int, path: Path, size: int, tell: Tell) -> None:
    """Makes a file as large as asked; a device has to be large enough."""
    had = cache_device.size_of(fd)
    if had >= size:
        return
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        raise CacheDeviceError(f"{path} has only {format_size(had)}: choose a smaller --size.")
    try:
        cache_device.take_space(fd, path, size, tell)
    except BaseException:
        _cut_back(fd, had)
        raise


def _cut_back(fd: int, size: int) -> None:
    """A file that was made larger gets its old size."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, size)
