"""``format``, and what every verb needs to open a cache or to make one."""

import errno
import os
import stat
from pathlib import Path

import click

from fusecache.config import (
    DEFAULT_BLOCK_SIZE,
    check_block_size,
    format_size,
    parse_size,
)
from fusecache.control.protocol import state_directory
from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    EmptyCacheError,
    FusecacheError,
    NotACacheError,
    SuperblockError,
    UsageError,
)
from fusecache.store import cache_device
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import DATA_OFFSET, Superblock


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
    if not path.exists():
        _create(path, size)
    fd = _locked(path, database)
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


def _create(path: Path, size: int | None) -> None:
    if size is None:
        raise UsageError(
            f"The cache {path} does not exist: give --size to create it as a file, like --size 20G."
        )
    if not path.parent.is_dir():
        raise CacheDeviceError(f"Cannot create the cache {path}: there is no {path.parent}.")
    cache_device.create_file(path, size)


def _locked(path: Path, database: Path | None) -> int:
    """A locked descriptor; if the cache is in use, says by which mount."""
    try:
        return cache_device.open_locked(path)
    except CacheInUseError as exc:
        raise CacheInUseError(f"{exc}{_holder_mount(path, database)}") from exc


def _holder_mount(path: Path, database: Path | None) -> str:
    """`` It serves /mnt/cached.``, as far as the running daemons tell."""
    from fusecache.control import client

    for daemon in client.daemons():
        if daemon.cache == path:
            return (
                f" It is pid {daemon.pid}, serving {daemon.mountpoint}: "
                f"to end it, fusecache umount {daemon.mountpoint}"
            )
    return ""


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
    fd: int, path: Path, database: Path | None, size: int | None, block_size: int | None
) -> tuple[CacheDevice, BlockMap]:
    """Makes an empty cache. Ordered so that a cut at any moment leaves none at all:
    the old superblock goes first, the new one comes last, the database in between."""
    block_size = block_size or DEFAULT_BLOCK_SIZE
    if size is not None:
        _fit(fd, path, size)
    superblock = cache_device.plan(fd, path, block_size, size)
    cache_device.erase_superblock(fd, path)
    block_map = BlockMap.create(database or default_database(path, superblock), superblock)
    try:
        cache_device.write_superblock(fd, path, superblock)
    except BaseException:
        block_map.close()
        raise
    return CacheDevice(path, fd, superblock), block_map


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
        os.ftruncate(fd, had)
        hint = " Choose a smaller --size." if exc.errno == errno.ENOSPC else ""
        raise CacheDeviceError(
            f"Cannot take {format_size(size)} for the cache {path}: {exc.strerror}.{hint}"
        ) from exc


@click.command("format", epilog="Example: fusecache format /dev/sdb")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", help="Size of the cache, like 20G; needed to create a file.")
@click.option("--block-size", help="Size of a block, a power of two from 4K to 1M. [64K]")
@click.option("--db", "database", type=click.Path(path_type=Path), help="Where its database goes.")
@click.option("--force", is_flag=True, help="Overwrite whatever PATH holds.")
def format_cache(
    path: Path, size: str | None, block_size: str | None, database: Path | None, force: bool
) -> None:
    """Make PATH, a file or a block device, an empty cache."""
    path = absolute(path)
    database = None if database is None else absolute(database)
    wanted = None if size is None else parse_size(size)
    blocks = None if block_size is None else check_block_size(parse_size(block_size))
    created = not path.exists()
    if created:
        _create(path, wanted)
    fd = _locked(path, database)
    try:
        if not force:
            _refuse_unless_empty(fd, path)
        device, block_map = _format(fd, path, database, wanted, blocks)
        block_map.close()
    except FusecacheError:
        if created:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    superblock = device.superblock
    click.echo(
        f"{path}: {superblock.slot_count} blocks of {format_size(superblock.block_size)}, "
        f"database {block_map.path}"
    )


def _refuse_unless_empty(fd: int, path: Path) -> None:
    try:
        cache_device.read_superblock(fd, path)
    except EmptyCacheError:
        return
    except SuperblockError:
        raise
    except NotACacheError as exc:
        raise NotACacheError(str(exc)) from exc
    raise NotACacheError(f"{path} is a fusecache cache already: --force makes it an empty one.")


def absolute(path: Path) -> Path:
    """The path without symbolic links or dots, whether it exists or not."""
    return Path(os.path.realpath(path))
