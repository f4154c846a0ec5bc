"""``format``, and what every verb needs to open a cache or to make one."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import click

from fusecache.cli.paths import absolute
from fusecache.config import (
    DEFAULT_BLOCK_SIZE,
    check_block_size,
    format_size,
    parse_size,
)
from fusecache.control import client
from fusecache.control.protocol import state_directory
from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    DatabaseError,
    EmptyCacheError,
    NotACacheError,
    UsageError,
)
from fusecache.store import cache_device
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import DATA_OFFSET, Superblock

_ENDING = 5.0
"""Seconds that a daemon whose socket is gone may still have its cache open."""
_POLL = 0.1


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
    with _made_if_missing(path, size):
        fd = open_locked(path)
        try:
            try:
                superblock = cache_device.read_superblock(fd, path)
            except EmptyCacheError:
                return _format(fd, path, database, size, block_size)
            _compare(path, superblock, size, block_size)
            block_map = BlockMap.open(database or default_database(path, superblock), superblock)
            return CacheDevice(path, fd, superblock), block_map
        except BaseException:
            os.close(fd)
            raise


@contextlib.contextmanager
def _made_if_missing(path: Path, size: int | None) -> Iterator[None]:
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
    cache_device.create_file(path, size)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_locked(path: Path) -> int:
    """A locked descriptor of a cache. Waits for a daemon that is ending; if the cache is in use
    otherwise, says by which mount."""
    deadline = time.monotonic() + _ENDING
    waiting = False
    while True:
        try:
            return cache_device.open_locked(path)
        except CacheInUseError as exc:
            pid = cache_device.holder_of(path)
            daemon = next((d for d in client.daemons() if d.cache == path or d.pid == pid), None)
            if daemon is not None and daemon.state != "flushing":
                raise CacheInUseError(
                    f"{exc} It serves {daemon.mountpoint} (pid {daemon.pid}). To end it: "
                    f"fusecache umount {daemon.mountpoint}"
                ) from exc
            # One that is flushing takes its time; one without a socket has just a moment left.
            if daemon is None and (not _is_fusecache(pid) or time.monotonic() > deadline):
                raise
            if not waiting and daemon is not None:
                waiting = True
                click.echo(f"fusecache: waiting for pid {pid} to finish with {path}", err=True)
            time.sleep(_POLL)


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


def _format(
    fd: int,
    path: Path,
    database: Path | None,
    size: int | None,
    block_size: int | None,
    *,
    force: bool = False,
) -> tuple[CacheDevice, BlockMap]:
    """Makes an empty cache. Ordered so that a cut at any moment leaves none at all:
    the old superblock goes first, the new one comes last, the database in between."""
    block_size = block_size or DEFAULT_BLOCK_SIZE
    had = cache_device.size_of(fd)
    superblock = cache_device.plan(fd, path, block_size, size)
    place = database or default_database(path, superblock)
    _check_database_place(place, path, leftover=database is None, force=force)
    if size is not None:
        _fit(fd, path, size)
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
    if force or place.stat().st_size == 0 or (leftover and BlockMap.is_block_map(place)):
        return
    what = "the map of another cache" if BlockMap.is_block_map(place) else "something else"
    raise DatabaseError(
        f"{place} holds {what}: choose another --db, or remove the file if nobody needs it."
    )


def _fit(fd: int, path: Path, size: int) -> None:
    """Makes a file as large as asked; a device has to be large enough."""
    had = cache_device.size_of(fd)
    if had >= size:
        return
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        raise CacheDeviceError(f"{path} has only {format_size(had)}: choose a smaller --size.")
    try:
        os.posix_fallocate(fd, had, size - had)
    except OSError as exc:
        _cut_back(fd, had)
        hint = " Choose a smaller --size." if exc.errno in (errno.ENOSPC, errno.EFBIG) else ""
        raise CacheDeviceError(
            f"Cannot take {format_size(size)} for the cache {path}: {exc.strerror}.{hint}"
        ) from exc


def _cut_back(fd: int, size: int) -> None:
    """A file that was made larger gets its old size."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, size)


@click.command("format", epilog="Example: fusecache format /dev/sdb")
@click.argument("path", type=Path)
@click.option("--size", help="Size of the cache, like 20G; needed to create a file.")
@click.option("--block-size", help="Size of a block, a power of two from 4K to 1M. [64K]")
@click.option("--db", "database", type=Path, help="Where its database goes.")
@click.option("--force", is_flag=True, help="Overwrite whatever PATH and its database hold.")
def format_cache(
    path: Path, size: str | None, block_size: str | None, database: Path | None, force: bool
) -> None:
    """Make PATH, a file or a block device, an empty cache."""
    path = absolute(path)
    database = None if database is None else absolute(database)
    wanted = None if size is None else parse_size(size)
    blocks = None if block_size is None else check_block_size(parse_size(block_size))
    with _made_if_missing(path, wanted):
        fd = open_locked(path)
        try:
            if not force:
                _refuse_unless_empty(fd, path)
            device, block_map = _format(fd, path, database, wanted, blocks, force=force)
            block_map.close()
        finally:
            os.close(fd)
    superblock = device.superblock
    click.echo(
        f"{path}: {superblock.slot_count} blocks of {format_size(superblock.block_size)}, "
        f"database {block_map.path}"
    )


def _refuse_unless_empty(fd: int, path: Path) -> None:
    with contextlib.suppress(EmptyCacheError):
        cache_device.read_superblock(fd, path)
        raise NotACacheError(
            f"{path} is a fusecache cache already: to make it an empty one, add --force."
        )
