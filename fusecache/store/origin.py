"""One image on the origin: a regular file, read and written by descriptor, never by path.

A descriptor comes from an O_PATH descriptor that a lookup pinned, so renames and swapped
symbolic links cannot lead to another file, and FIFOs and devices are never opened.
"""

import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fusecache.errors import LockedElsewhereError, LocksUnsupportedError, OriginError
from fusecache.store import syscalls

LOCKED_BYTE = 1 << 30
"""Where the lock of one host lies (P8): QEMU uses bytes 100 to 203."""
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid
_READAHEAD = 128 << 10
"""Bytes, the kernel's default."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_FULL = {errno.ENOSPC: "the origin is full", errno.EDQUOT: "the origin's quota is used up"}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What P3 compares. Times in nanoseconds by the origin's clock, size in bytes."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: os.stat_result) -> "Attributes":
        """The part of a stat result that tells one content from another."""
        return cls(st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class OriginImage:
    """The descriptors of one image: one to read by, one to write by, each opened when needed.

    All calls block and raise OriginError. Tests put doubles here: this is the seam where origins
    fail and stall.
    """

    def __init__(self) -> None:
        self._read_fd = -1
        self._write_fd = -1
        self._lock_fd = -1
        self._at_once = _READAHEAD
        """Bytes the kernel reads at a time."""
        self._mutex = threading.Lock()
        """Over the numbers: of what was closed, one may be another file's. Never held during a call
        that could block, since the event loop takes it, too."""
        self._replacing: list[int] = []
        """Numbers whose file another thread is about to replace: it will also close them, if they
        are to be closed meanwhile."""
        self._era = 0
        """Closed so often: what began before a close takes no effect after it."""

    def open(self, path_fd: int, *, write: bool) -> Attributes:
        """Opens anew from a pinned descriptor and returns the attributes as of that open.

        A new open and an fstat, not a stat of a path, is what makes NFS ask the server (close to
        open consistency); the new one takes the old one's place.

        Raises:
            OriginError: ``path_fd`` is not a regular file, or the origin refused.
        """
        return self._open(path_fd, write=write, era=self._era)

    def _open(self, path_fd: int, *, write: bool, era: int) -> Attributes:
        try:
            if not stat.S_ISREG(os.fstat(path_fd).st_mode):
                raise OriginError(22, "only regular files are opened")
            flags = (os.O_WRONLY if write else os.O_RDONLY) | os.O_CLOEXEC
            fd = os.open(f"/proc/self/fd/{path_fd}", flags)
            if not write:
                # What to read ahead is known here better: the kernel would guess, and bring up to
                # 128 KiB more with every block.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                self._at_once = _readahead_of(fd)
            seen = Attributes.of(os.fstat(fd))
            self._take(fd, write=write, era=era)
            return seen
        except OSError as exc:
            raise _translated(exc, "opening the image") from exc

    def _take(self, fd: int, *, write: bool, era: int) -> None:
        with self._mutex:
            old = self._write_fd if write else self._read_fd
            valid = era == self._era
            if valid and old < 0:
                if write:
                    self._write_fd = fd
                else:
                    self._read_fd = fd
                return
            if valid:
                self._replacing.append(old)
        if valid:
            self._replace(fd, old, era)
        os.close(fd)

    def _replace(self, fd: int, old: int, era: int) -> None:
        """In place, so that a read under way in another thread never meets a closed descriptor or,
        worse, its number given to another file. Closes the old file, which asks the server."""
        try:
            os.dup2(fd, old, inheritable=False)
        finally:
            with self._mutex:
                self._replacing.remove(old)
                ours = era != self._era and old not in self._replacing
            if ours:
                os.close(old)

    def opener(self, path_fd: int, *, write: bool) -> Callable[[], Attributes]:
        """``open`` for a thread that may be left behind: it has a descriptor of its own, since
        the caller may close ``path_fd`` and its number be another file's by then; and it takes
        no effect if the image was closed meanwhile."""
        own, era = os.dup(path_fd), self._era

        def run() -> Attributes:
            try:
                return self._open(own, write=write, era=era)
            finally:
                os.close(own)

        return run

    def locker(self, path_fd: int) -> Callable[[], None]:
        """``lock`` for a thread that may be left behind, see ``opener``."""
        own, era = os.dup(path_fd), self._era

        def run() -> None:
            try:
                self._lock(own, era)
            finally:
                os.close(own)

        return run

    def attributes(self) -> Attributes:
        """The attributes as the open descriptor sees them now."""
        try:
            return Attributes.of(os.fstat(self._any()))
        except OSError as exc:
            raise _translated(exc, "reading the attributes") from exc

    def nameless(self) -> bool:
        """Whether the file was removed: what is written to it goes with its last descriptor."""
        try:
            return os.fstat(self._any()).st_nlink == 0
        except OSError as exc:
            raise _translated(exc, "looking for its names") from exc

    @property
    def readable(self) -> bool:
        """Whether it is open for reading."""
        return self._read_fd >= 0

    @property
    def writable(self) -> bool:
        """Whether it is open for writing."""
        return self._write_fd >= 0

    def _any(self) -> int:
        return self._write_fd if self._write_fd >= 0 else self._read_fd

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        parts = []
        try:
            if length > self._at_once:
                # The kernel would ask for so much, wait for it, and only then for the next.
                for at in range(offset, offset + length, self._at_once):
                    os.posix_fadvise(self._read_fd, at, self._at_once, os.POSIX_FADV_WILLNEED)
            while length:
                part = os.pread(self._read_fd, length, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as exc:
            raise _translated(exc, f"reading at {offset}") from exc
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of ``data``; after an error any part may have been written."""
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._write_fd, view, offset)
                offset += done
                view = view[done:]
        except OSError as exc:
            raise _translated(exc, f"writing at {offset}") from exc

    def truncate(self, size: int) -> None:
        """Sets the file's size."""
        try:
            os.ftruncate(self._write_fd, size)
        except OSError as exc:
            raise _translated(exc, "truncating") from exc

    def extend(self, size: int) -> int:
        """Makes the file at least ``size`` long, and never shorter; returns how long it is."""
        try:
            now = os.fstat(self._write_fd).st_size
            if now < size:
                os.ftruncate(self._write_fd, size)
            return max(now, size)
        except OSError as exc:
            raise _translated(exc, "making the image longer") from exc

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). With EOPNOTSUPP nothing was changed; after any other error any part may
        have been."""
        try:
            syscalls.fallocate(self._write_fd, mode, offset, length)
        except OSError as exc:
            raise _translated(exc, f"allocating or freeing space at {offset}") from exc

    def seek(self, offset: int, whence: int) -> int | None:
        """Where data (SEEK_DATA) or a hole (SEEK_HOLE) begins at or after ``offset``, see lseek(2).

        None if there is none: only a hole up to the end follows, or ``offset`` is past it. Where
        the origin knows of no holes, all of the file is data. The descriptor's own position, which
        this moves, is used by nobody.
        """
        try:
            return os.lseek(self._any(), offset, whence)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise _translated(exc, f"looking for data or a hole at {offset}") from exc

    def sync(self, *, metadata: bool = True) -> None:
        """Everything written is on the origin's stable storage. Needs either descriptor."""
        try:
            if metadata:
                os.fsync(self._any())
            else:
                os.fdatasync(self._any())
        except OSError as exc:
            raise _translated(exc, "syncing") from exc

    @property
    def locked(self) -> bool:
        """Whether the lock is held here."""
        return self._lock_fd >= 0

    def lock(self, path_fd: int) -> None:
        """Takes the lock that keeps other hosts from writing the image (P8); twice does nothing.

        It belongs to a descriptor of its own (an open file description lock), so nothing that
        this process opens and closes can lose it, and the kernel gives it up with the process.

        Raises:
            LockedElsewhereError: another host, or another fusecache of this one, holds it.
            LocksUnsupportedError: the origin has no locks.
            OriginError: the origin refused to open the file.
        """
        self._lock(path_fd, self._era)

    def _lock(self, path_fd: int, era: int) -> None:
        if self._lock_fd >= 0:
            return
        try:
            fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise _translated(exc, "opening the image to lock it") from exc
        try:
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, LOCKED_BYTE, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
        except OSError as exc:
            os.close(fd)
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                raise LockedElsewhereError(
                    errno.EBUSY,
                    "another host, or another mount of this host, has the image open for writing, "
                    "or dirty",
                ) from exc
            if exc.errno in _NO_LOCKS:
                raise LocksUnsupportedError(exc.errno, f"locking: {exc.strerror}") from exc
            raise _translated(exc, "locking the image") from exc
        with self._mutex:
            if era == self._era:
                self._lock_fd = fd
                return
        os.close(fd)

    def unlock(self) -> None:
        """Gives the lock up; twice does nothing. Raises OriginError."""
        self.unlocker()()

    def unlocker(self) -> Callable[[], None]:
        """``unlock`` for a thread that may be left behind: from this call on it is not locked, and
        the number of the descriptor that is closed is nobody else's."""
        with self._mutex:
            mine, self._lock_fd = self._lock_fd, -1
        return partial(_close, [mine])

    def close(self) -> None:
        """Closes both descriptors and gives up the lock; twice does nothing. Raises OriginError."""
        self.closer()()

    def closer(self) -> Callable[[], None]:
        """``close`` for a thread that may be left behind, see ``unlocker``."""
        with self._mutex:
            self._era += 1
            numbers = (self._lock_fd, self._read_fd, self._write_fd)
            mine = [fd for fd in numbers if fd not in self._replacing]
            self._lock_fd = self._read_fd = self._write_fd = -1
        return partial(_close, mine)


def _close(fds: list[int]) -> None:
    failed: OSError | None = None
    for fd in fds:
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as exc:
            failed = exc  # closed all the same
    if failed is not None:
        raise _translated(failed, "closing the image") from failed


def _readahead_of(fd: int) -> int:
    """Bytes the kernel reads ahead on the file's filesystem."""
    device = os.fstat(fd).st_dev
    name = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(name) as file:
            return max(_READAHEAD, int(file.read()) << 10)
    except (OSError, ValueError):
        return _READAHEAD


def attributes_of(fd: int) -> Attributes:
    """The attributes of any descriptor, O_PATH ones too. Raises OSError."""
    return Attributes.of(os.fstat(fd))


def identity_of(fd: int, filesystem: int) -> bytes:
    """Which image this is, over remounts and renames: filesystem, inode and file handle.

    Where the filesystem has no handles, the birth time tells a number used again.
    """
    inode = os.fstat(fd).st_ino
    unique = syscalls.file_handle(fd) or syscalls.birth_time(fd)
    return filesystem.to_bytes(8, "little") + inode.to_bytes(8, "little") + unique


def _translated(exc: OSError, doing: str) -> OriginError:
    if exc.errno in _FULL:
        # What guests and the SSD have room for is another thing.
        return OriginError(exc.errno, f"{doing}: {_FULL[exc.errno]} ({exc.strerror})")
    hint = ""
    if exc.errno == errno.EACCES and os.geteuid() == 0:
        hint = " to root: its server squashes root (root_squash); export with no_root_squash"
    return OriginError(exc.errno or 5, f"{doing}: {exc.strerror}{hint}")
