"""What every verb needs to open a cache or to make one."""

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import click

from fusecache.cli.progress import Progress, count_text
from fusecache.config import DEFAULT_BLOCK_SIZE, format_size, size_argument
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.control.protocol import readable, state_directory
from fusecache.engine.recovery import boot_id
from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    DatabaseError,
    EmptyCacheError,
    NotACacheError,
    SuperblockError,
    UsageError,
)
from fusecache.store import cache_device, processes
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.candidates import Candidate, candidates
from fusecache.store.dirty_data import DirtyData
from fusecache.store.superblock import DATA_OFFSET, Superblock, named, remedy
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


def hinted(path: Path, database: Path, superblock: Superblock) -> str:
    """A cache as a command line names it; its database alone if it is not where it usually is."""
    usual = (state_directory() / f"{superblock.uuid}.sqlite", Path(f"{path}.sqlite"))
    return named(path, None if database in usual else database)


def read_superblock(fd: int, path: Path, database: Path | None) -> Superblock:
    """The superblock of an open cache; where it is none, the refusal names the databases that may
    be this cache's.

    Args:
        database: where the operator says that it lies.

    Raises:
        EmptyCacheError, NotACacheError, SuperblockError: see ``cache_device.read_superblock``.
    """
    try:
        return cache_device.read_superblock(fd, path, database)
    except EmptyCacheError:
        raise
    except NotACacheError as exc:
        if found := possible_databases(fd, path, database):
            raise NotACacheError(_without_superblock(path, database, found)) from exc
        raise
    except SuperblockError as exc:
        if found := possible_databases(fd, path, database):
            why = str(exc).partition(f". {remedy(path, database)}")[0]
            raise SuperblockError(f"{why}. {remedy(path, found[0].path)}") from exc
        raise


def possible_databases(fd: int, path: Path, database: Path | None) -> list[Candidate]:
    """Those of a cache whose superblock does not say which is its own, the most likely first."""
    chosen = True
    if database is not None:
        places = [database]
    elif stat.S_ISBLK(os.fstat(fd).st_mode):
        chosen, places = False, sorted(state_directory().glob("*.sqlite"))
    else:
        places = [Path(f"{path}.sqlite")]
    found = candidates(fd, path, places, boot_id(), chosen=chosen)
    return [one for one in found if one.dirty is not None or BlockMap.is_block_map(one.path)]


def _without_superblock(path: Path, database: Path | None, found: list[Candidate]) -> str:
    """What to do about a device without a superblock that may have been a cache all the same."""
    first, help_ = found[0], remedy(path, found[0].path)
    if first.certain:
        return f"The superblock of {path} is damaged; its database is {contents(first)}. {help_}"
    force = "--force" if is_clean(found) else "--force --discard-dirty"
    return (
        f"{path} has no fusecache superblock, but its database may be {one_of(found)}. {help_}; "
        f"if nothing of it is needed: fusecache format {named(path, database)} {force}"
    )


def is_clean(found: list[Candidate]) -> bool:
    """Whether nothing would be lost with the cache of any of these databases."""
    return all(one.dirty is not None and not one.dirty.images for one in found)


def one_of(found: list[Candidate]) -> str:
    """``A (nothing dirty) or B (dirty: ...)``, for people."""
    more = [f"one of {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return " or ".join([*map(contents, found[:_SHOWN]), *more])


def contents(one: Candidate) -> str:
    """A database with what would be lost with its cache."""
    if one.dirty is None:
        return f"{one.path} (damaged: what is dirty there nobody can say)"
    if not one.dirty.images:
        return f"{one.path} (nothing is dirty there)"
    return f"{one.path} (dirty, and not on the origin: {describe(one.dirty)})"


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
                superblock = read_superblock(fd, path, database)
            except EmptyCacheError:
                return make(fd, path, database, size, block_size)
            _compare(path, database, superblock, size, block_size)
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
                elif not processes.is_fusecache(pid) or time.monotonic() > deadline:
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


def _compare(
    path: Path,
    database: Path | None,
    superblock: Superblock,
    size: int | None,
    block_size: int | None,
) -> None:
    """The sizes asked for are those the cache was formatted with."""
    anew = f"fusecache format {named(path, database)} --force"
    if block_size is not None and block_size != superblock.block_size:
        raise CacheDeviceError(
            f"{path} was formatted with blocks of {format_size(superblock.block_size)}, not "
            f"{format_size(block_size)}: leave --block-size out, or format it anew with "
            f"{anew} --block-size {size_argument(block_size)}"
        )
    if size is not None and _slots(size, superblock.block_size) != superblock.slot_count:
        had = DATA_OFFSET + superblock.slot_count * superblock.block_size
        raise CacheDeviceError(
            f"{path} was formatted with a size of {format_size(had)}, not {format_size(size)}: "
            f"leave --size out, or format it anew with {anew} --size {size_argument(size)}"
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
    if not force:
        _refuse_if_emptied(fd, path, database, size)
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
        return  # with nothing dirty, see _refuse_if_emptied
    what = "the map of another cache" if BlockMap.is_block_map(place) else "something else"
    raise DatabaseError(
        f"{place} holds {what}: choose another --db, or remove the file if nobody needs it."
    )


def _refuse_if_emptied(fd: int, path: Path, database: Path | None, size: int | None) -> None:
    """No new cache where an emptied one was, whose database has data that the origin has not."""
    found = possible_databases(fd, path, database)
    if is_clean(found):
        return
    command = f"fusecache format {named(path, database)} --force --discard-dirty"
    if size is not None:
        command += f" --size {size_argument(size)}"
    elif cache_device.size_of(fd) < found[0].size:
        command += f" --size {size_argument(found[0].size)}"
    other = " or choose another --db;" if database is not None else ""
    raise DatabaseError(
        f"{path} is empty, but was perhaps the cache of {one_of(found)}: {saving(path, found)};"
        f"{other} to give that up: {command}"
    )


def saving(path: Path, found: list[Candidate]) -> str:
    """How to come by what only a cache without a superblock has."""
    for one in found:
        if one.holds:
            return f"to mend it, fusecache repair {named(path, one.path)}"
    return "its data is not on it any more, so bring that cache or a copy of it back"


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
