"""The cache device: an SSD file or block device, divided into slots.

Positions are in slot space (slot number x block size + offset in the block); this file alone
knows that slots begin at 1 MiB. Reads and writes are buffered, so what was read or filled lately
is in the page cache and a hit needs no disk.
"""

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from dataclasses import replace
from pathlib import Path

from fusecache.config import format_size
from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    EmptyCacheError,
    NotACacheError,
    SuperblockError,
)
from fusecache.store import mountinfo
from fusecache.store.superblock import (
    DATA_OFFSET,
    WITNESS_OFFSET,
    WITNESS_SIZE,
    Fence,
    Superblock,
    Witness,
    named,
    remedy,
)
from fusecache.store.telling import Tell, silent

MIN_SLOTS = 16
_PIECE = 32 << 10
"""Bytes written by one call. Since Linux 6.16 ext4 keeps what came by one as one folio, and every
later small write to it looks at all of its 4 KiB parts: 7 to 26 us for 1 MiB, 3.7 for 64 KiB, 2.5
for 32 KiB, where whole reads are as fast (measured)."""
_EDGE = 1 << 20
_SPACE_PART = 1 << 30


class CacheDevice:
    """An open, locked cache device. All calls block; all raise CacheDeviceError."""

    def __init__(self, path: Path, fd: int, superblock: Superblock) -> None:
        self.path = path
        self.superblock = superblock
        self._fd = fd
        self._can_nowait = True
        self._told = 0
        self._owed: int | None = None
        self.synced_commit = 0
        """The last commit of the database whose note here is surely stable."""

    @property
    def fd(self) -> int:
        """For the lane, which reads and writes slots by itself; they begin at ``DATA_OFFSET``."""
        return self._fd

    def try_read(self, position: int, buffer: memoryview) -> bool:
        """Fills ``buffer`` if every byte is in the page cache; False if it is not. Never waits.

        Raises:
            OSError: the device failed.
        """
        if not self._can_nowait:
            return False
        try:
            got = os.preadv(self._fd, (buffer,), position + DATA_OFFSET, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            # A filesystem without RWF_NOWAIT (kernel 6.1's tmpfs, overlayfs): use threads.
            self._can_nowait = False
            return False
        return got == len(buffer)

    def read(self, position: int, length: int) -> bytes:
        """``length`` bytes at ``position``."""
        try:
            data = os.pread(self._fd, length, position + DATA_OFFSET)
        except OSError as exc:
            raise CacheDeviceError(f"reading {self.path} at {position}: {exc.strerror}") from exc
        if len(data) != length:
            raise CacheDeviceError(f"reading {self.path} at {position}: the device is shorter")
        return data

    def write(self, position: int, data: bytes | memoryview) -> None:
        """All of ``data`` to ``position``; after an error any part may have been written."""
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._fd, view[:_PIECE], position + DATA_OFFSET)
                position += done
                view = view[done:]
        except OSError as exc:
            raise CacheDeviceError(f"writing {self.path} at {position}: {exc.strerror}") from exc

    def sync(self) -> None:
        """Everything written so far is on stable storage."""
        told, owed, self._owed = self._told, self._owed, None
        try:
            os.fdatasync(self._fd)
            if owed is not None:
                raise OSError(owed, os.strerror(owed))
        except OSError as exc:
            raise CacheDeviceError(f"syncing {self.path}: {exc.strerror}") from exc
        self.synced_commit = max(self.synced_commit, told)

    def owe(self, error: int) -> None:
        """The next sync fails with this errno, whatever the kernel says: it told the lane, and may
        have dropped what it could not write."""
        self._owed = error

    @property
    def fence(self) -> Fence:
        """What of the database must not be believed."""
        return self.superblock.fence

    def set_fence(self, fence: Fence) -> None:
        """Writes the superblock anew, stably, in place: this needs no space and no database."""
        superblock = replace(self.superblock, fence=fence)
        write_superblock(self._fd, self.path, superblock)
        self.superblock = superblock

    def read_witness(self) -> Witness:
        """What the database has told this device. Raises SuperblockError if it is damaged."""
        return Witness.unpack(os.pread(self._fd, WITNESS_SIZE, WITNESS_OFFSET))

    def write_witness(self, witness: Witness, *, stable: bool = False) -> None:
        """Notes how far the database has come; unless ``stable`` with the next sync."""
        try:
            os.pwrite(self._fd, witness.pack(), WITNESS_OFFSET)
        except OSError as exc:
            raise CacheDeviceError(f"writing {self.path}: {exc.strerror}") from exc
        self._told = witness.commits
        if stable:
            self.sync()

    def close(self) -> None:
        """Closes and unlocks; twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_locked(path: Path) -> int:
    """A read-write descriptor of a cache that nobody else has open.

    Raises:
        CacheInUseError: another process has it (its pid is named where the kernel tells).
        NotACacheError: a directory or special file.
        CacheDeviceError: missing, or not permitted.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotACacheError(f"{path} is a directory: name a file or block device in it.")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise NotACacheError(f"{path} is neither a file nor a block device.")
        # O_EXCL on a block device: nobody else may have it mounted or open exclusively.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise CacheInUseError(in_use(path)) from exc
        if isinstance(exc, PermissionError):
            raise CacheDeviceError(
                f"The cache {path} may not be opened by user {os.geteuid()}: ask for permission to "
                "read and write it."
            ) from exc
        raise CacheDeviceError(f"Cannot open the cache {path}: {exc.strerror}.") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        raise CacheInUseError(f"{path} is in use by another fusecache{_holder(path)}.") from exc
    return fd


def in_use(path: Path) -> str:
    """A sentence about a block device that somebody has for itself: by whom, and what to do."""
    if holder_of(path) is not None:
        return f"{path} is in use: mounted, part of an array, or open elsewhere{_holder(path)}."
    with contextlib.suppress(OSError):
        for entry in mountinfo.of_device(path.stat().st_rdev):
            return (
                f"{path} is in use: mounted at {entry.path}. Choose another device, or if nothing "
                f"on it is needed: umount {entry.path}"
            )
    return (
        f"{path} is in use: mounted, part of an array, or open elsewhere. Choose another device, "
        f"or free it: lsblk {path} and fuser -v {path} say what uses it."
    )


def _holder(path: Path) -> str:
    """`` (pid 123)`` of the process that holds the lock on ``path``, if it is known."""
    pid = holder_of(path)
    return "" if pid is None else f" (pid {pid})"


def holder_of(path: Path) -> int | None:
    """The process that holds the lock on ``path``, as far as /proc tells."""
    with contextlib.suppress(OSError):
        at = path.stat()
        name = f"{os.major(at.st_dev):02x}:{os.minor(at.st_dev):02x}:{at.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and name in fields:
                return int(fields[fields.index(name) - 1])
    return None


def size_of(fd: int) -> int:
    """Bytes of a file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def is_empty(fd: int) -> bool:
    """Whether there are no bytes, or zeros in the first and last MiB."""
    last = max(0, size_of(fd) - _EDGE)
    return not any(os.pread(fd, _EDGE, 0)) and not any(os.pread(fd, _EDGE, last))


def read_superblock(fd: int, path: Path, database: Path | None = None) -> Superblock:
    """The superblock of an open cache.

    Args:
        database: where the operator says that its database lies.

    Raises:
        EmptyCacheError: nothing is there: no bytes, or zeros in the first and last MiB.
        NotACacheError: something else is there.
        SuperblockError: the superblock is damaged, or the device is shorter than it says.
    """
    size = size_of(fd)
    if is_empty(fd):
        raise EmptyCacheError(f"{path} is empty.")
    first = os.pread(fd, WITNESS_OFFSET + WITNESS_SIZE, 0)
    try:
        superblock = Superblock.unpack(first)
        witness = Witness.unpack(first[WITNESS_OFFSET : WITNESS_OFFSET + WITNESS_SIZE])
    except NotACacheError:
        raise NotACacheError(
            f"{path} holds something that is not a fusecache cache (a filesystem, a partition "
            f"table, other data). If nothing on it is needed: fusecache format "
            f"{named(path, database)} --force"
        ) from None
    except SuperblockError as exc:
        raise SuperblockError(f"{path} cannot be used: {exc}. {remedy(path, database)}") from None
    needed = DATA_OFFSET + superblock.slot_count * superblock.block_size
    if size < needed:
        raise SuperblockError(
            f"{path} has {format_size(size)} but was formatted with {format_size(needed)}: "
            f"it was cut short. {remedy(path, database)}"
        )
    return replace(superblock, witness=witness, path=path)


def plan(fd: int, path: Path, block_size: int, size: int | None) -> Superblock:
    """The superblock of a new cache over ``path``, or over its first ``size`` bytes.

    Raises:
        CacheDeviceError: too small.
    """
    room = size_of(fd) if size is None else size
    slots = (room - DATA_OFFSET) // block_size
    if slots < MIN_SLOTS:
        raise CacheDeviceError(
            f"{path} is too small: with blocks of {format_size(block_size)} a cache needs at "
            f"least {format_size(DATA_OFFSET + MIN_SLOTS * block_size)}. Choose a larger --size "
            "or a smaller --block-size."
        )
    return Superblock(block_size, slots, uuid.uuid4())


def erase_superblock(fd: int, path: Path) -> None:
    """After this there is no cache at ``path``, stably. Raises CacheDeviceError."""
    _put(fd, path, bytes(_EDGE))


def write_superblock(fd: int, path: Path, superblock: Superblock) -> None:
    """After this there is one, stably. Raises CacheDeviceError."""
    _put(fd, path, superblock.pack())


def write_witness(fd: int, path: Path, witness: Witness) -> None:
    """How far the database has come, stably. Raises CacheDeviceError."""
    _put(fd, path, witness.pack(), WITNESS_OFFSET)


def _put(fd: int, path: Path, data: bytes, offset: int = 0) -> None:
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    except OSError as exc:
        raise CacheDeviceError(f"Cannot write to {path}: {exc.strerror}.") from exc


def create_file(path: Path, size: int, tell: Tell = silent) -> None:
    """A new cache file, readable by its owner alone, with its space taken from the filesystem. If
    it cannot be made, or the work is interrupted, there is none.

    Raises:
        CacheDeviceError: no space, no such directory, not permitted.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise CacheDeviceError(f"Cannot create the cache {path}: {exc.strerror}.") from exc
    try:
        take_space(fd, path, size, tell)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def take_space(fd: int, path: Path, size: int, tell: Tell = silent) -> None:
    """Makes a file ``size`` bytes long, all of them on the filesystem. Not every one can do that
    at once, so it is done in parts that can be interrupted.

    Raises:
        CacheDeviceError: there is not that much.
    """
    try:
        for done in range(size_of(fd), size, _SPACE_PART):
            tell("taken", done, size)
            os.posix_fallocate(fd, done, min(_SPACE_PART, size - done))
    except OSError as exc:
        hint = " Choose a smaller --size." if exc.errno in (errno.ENOSPC, errno.EFBIG) else ""
        raise CacheDeviceError(
            f"Cannot take {format_size(size)} for the cache {path}: {exc.strerror}.{hint}"
        ) from exc
