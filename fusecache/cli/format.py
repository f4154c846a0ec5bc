"""``format``: makes an empty cache, and refuses to throw away what only the old one has."""

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from fusecache.cli import completion
from fusecache.cli.cache import (
    default_database,
    describe,
    is_clean,
    made_if_missing,
    make,
    one_of,
    open_locked,
    possible_databases,
    read_superblock,
    saving,
)
from fusecache.cli.checks import check_place
from fusecache.cli.paths import absolute
from fusecache.cli.progress import Progress, interruptible
from fusecache.config import check_block_size, format_size, parse_size
from fusecache.control.protocol import readable
from fusecache.errors import DatabaseError, EmptyCacheError, NotACacheError, SuperblockError
from fusecache.store import cache_device
from fusecache.store.dirty_data import dirty_data
from fusecache.store.superblock import named, remedy
from fusecache.store.telling import Tell


@click.command("format", epilog="Example: fusecache format /dev/sdb")
@click.argument("path", type=Path, shell_complete=completion.files)
@click.option("--size", help="Size of the cache, like 20G; needed to create a file.")
@click.option("--block-size", help="Size of a block, a power of two from 4K to 1M. [64K]")
@click.option("--db", "database", type=Path, help="Where its database goes.")
@click.option("--force", is_flag=True, help="Overwrite whatever PATH and its database hold.")
@click.option(
    "--discard-dirty", is_flag=True, help="Also data of images that the origin does not have."
)
def format_cache(
    path: Path,
    size: str | None,
    block_size: str | None,
    database: Path | None,
    force: bool,
    discard_dirty: bool,
) -> None:
    """Make PATH, a file or a block device, an empty cache."""
    path = absolute(path)
    database = None if database is None else absolute(database)
    check_place("cache", path)
    check_place("database", database)
    wanted = None if size is None else parse_size(size)
    blocks = None if block_size is None else check_block_size(parse_size(block_size))
    new = not os.path.lexists(path)
    check = f"fusecache check {named(path, database)}"
    made = "nothing was made." if new else f"what {path} is now says: {check}"
    with interruptible(made), Progress() as line:
        tell = partial(line.follow, "format")
        _format(path, wanted, blocks, database, force, discard_dirty, tell)


def _format(
    path: Path,
    size: int | None,
    block_size: int | None,
    database: Path | None,
    force: bool,
    discard_dirty: bool,
    tell: Tell,
) -> None:
    with made_if_missing(path, size, tell):
        fd = open_locked(path)
        try:
            if not force:
                _refuse_unless_empty(fd, path, database)
            elif not discard_dirty:
                _refuse_if_dirty(fd, path, database)
            old = _old_database(fd, path)
            device, block_map = make(fd, path, database, size, block_size, force=force, tell=tell)
            block_map.close()
            if old is not None and old != block_map.path:
                _remove_database(old)
        finally:
            os.close(fd)
    superblock = device.superblock
    click.echo(
        f"{path}: {superblock.slot_count} blocks of {format_size(superblock.block_size)}, "
        f"database {block_map.path}"
    )


def _refuse_unless_empty(fd: int, path: Path, database: Path | None) -> None:
    with contextlib.suppress(EmptyCacheError):
        read_superblock(fd, path, database)
        raise NotACacheError(
            f"{path} is a fusecache cache already: to make it an empty one, add --force."
        )


def _refuse_if_dirty(fd: int, path: Path, database: Path | None) -> None:
    """``--force`` alone throws away nothing that the origin does not have.

    Raises:
        DatabaseError: the cache has such data, or nobody can tell.
    """
    try:
        superblock = cache_device.read_superblock(fd, path, database)
    except NotACacheError:
        _refuse_if_lost(fd, path, database)
        return
    except SuperblockError as exc:
        _nobody_can_tell(fd, path, database, str(exc).removeprefix(f"{path} "))
    place = database or default_database(path, superblock)
    try:
        found = dirty_data(place)
        if found.uuid != str(superblock.uuid):
            raise DatabaseError(f"The database {place} belongs to another cache.")
    except DatabaseError as exc:
        _nobody_can_tell(fd, path, database, str(exc))
    if found.images:
        origin = readable(os.fsdecode(found.origin))[0]
        raise DatabaseError(
            f"{path} has {describe(found)} that the origin {origin} does not have. Bring it there: "
            f"fusecache flush --cache {named(path, database)}. To give it up, add --discard-dirty."
        )


def _nobody_can_tell(fd: int, path: Path, database: Path | None, why: str) -> NoReturn:
    help_ = remedy(path, database)
    why = why.partition(f". {help_}")[0].rstrip(".")
    if found := possible_databases(fd, path, database):
        help_ = remedy(path, found[0].path)
    raise DatabaseError(
        f"Nobody can tell whether the cache {path} has data that the origin does not have ({why}). "
        f"{help_}. To give up whatever it has, add --discard-dirty."
    )


def _refuse_if_lost(fd: int, path: Path, database: Path | None) -> None:
    """A cache whose first blocks were overwritten still has its map."""
    found = possible_databases(fd, path, database)
    if not is_clean(found):
        raise DatabaseError(
            f"{path} has no fusecache superblock, but its database may be {one_of(found)}: "
            f"{saving(path, found)}. To give up whatever it has, add --discard-dirty."
        )


def _old_database(fd: int, path: Path) -> Path | None:
    """Where the map of the cache lies that is about to go, if it is known to be its own."""
    try:
        superblock = cache_device.read_superblock(fd, path)
        place = default_database(path, superblock)
        return place if dirty_data(place).uuid == str(superblock.uuid) else None
    except (NotACacheError, SuperblockError):
        found = [one for one in possible_databases(fd, path, None) if one.certain]
        return found[0].path if len(found) == 1 else None
    except DatabaseError:
        return None


def _remove_database(place: Path) -> None:
    """The map of a cache that is no more; a block device's has a name nobody would find."""
    for name in (place, Path(f"{place}-wal"), Path(f"{place}-shm")):
        with contextlib.suppress(OSError):
            name.unlink()
