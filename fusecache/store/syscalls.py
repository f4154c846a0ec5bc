"""The system calls Python has no words for, through the C library."""

import ctypes
import errno
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
MNT_DETACH = 2
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 16, 128, 1024, 2048
TMPFS_MAGIC = 0x01021994
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16
_MAX_HANDLE = 128
_STATX_BTIME = 0x800
_BTIME_OFFSET = 80


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE),
    )


def file_handle(fd: int) -> bytes:
    """The kernel's persistent handle of the open (or O_PATH) file, see name_to_handle_at(2).

    It stays the same over remounts and reboots, and differs when an inode number is used again.
    Empty where the filesystem has none.
    """
    handle = _FileHandle(handle_bytes=_MAX_HANDLE)
    mount_id = ctypes.c_int()
    result = _libc.name_to_handle_at(
        fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), AT_EMPTY_PATH
    )
    if result != 0:
        return b""
    kind = int(handle.handle_type).to_bytes(4, "little", signed=True)
    return kind + bytes(handle.f_handle[: handle.handle_bytes])


def birth_time(fd: int) -> bytes:
    """When the inode was made, see statx(2), as bytes; empty where the filesystem does not know."""
    buffer = ctypes.create_string_buffer(256)
    result = _libc.statx(fd, b"", AT_EMPTY_PATH, _STATX_BTIME, buffer)
    mask, _ = struct.unpack_from("<II", buffer.raw)
    if result != 0 or not mask & _STATX_BTIME:
        return b""
    return buffer.raw[_BTIME_OFFSET : _BTIME_OFFSET + 12]  # seconds (8 bytes), nanoseconds (4)


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """rename(2) with RENAME_NOREPLACE or RENAME_EXCHANGE. Raises OSError."""
    if _libc.renameat2(old_dir, old, new_dir, new, ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def umount(path: bytes, *, detach: bool) -> None:
    """umount2(2), root only; ``detach`` takes it out of the tree even while it is busy."""
    if _libc.umount2(path, MNT_DETACH if detach else 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))


def mount(source: bytes, target: bytes, fstype: bytes, flags: int, data: bytes) -> None:
    """mount(2). Raises OSError."""
    if _libc.mount(source, target, fstype, ctypes.c_ulong(flags), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(target))


def mount_fusectl() -> None:
    """Mounts fusectl where the kernel wants it, root only. Raises OSError."""
    mount(b"none", b"/sys/fs/fuse/connections", b"fusectl", 0, b"")


def chown_fd(fd: int, uid: int, gid: int) -> None:
    """chown of an O_PATH descriptor, symbolic links included; -1 leaves an id as it is."""
    flags = AT_EMPTY_PATH
    if (
        _libc.fchownat(
            fd, b"", ctypes.c_uint(uid & 0xFFFFFFFF), ctypes.c_uint(gid & 0xFFFFFFFF), flags
        )
        != 0
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def link_fd(fd: int, new_dir: int, name: bytes) -> None:
    """A new name for the inode of an O_PATH descriptor. Raises OSError."""
    source = f"/proc/self/fd/{fd}".encode()
    at_fdcwd, follow = -100, 0x400
    if _libc.linkat(at_fdcwd, source, new_dir, name, follow) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), all modes, and never the C library's emulation. Raises OSError."""
    where = ctypes.c_int64(offset), ctypes.c_int64(length)
    while _libc.fallocate(fd, ctypes.c_int(mode), *where) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
