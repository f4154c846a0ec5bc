"""Attributes: the origin's in pyfuse3's form and the kernel's, and what pyfuse3 asks for on the
origin."""

import os
import struct

from pyfuse3 import EntryAttributes, FileInfo, SetattrFields, StatvfsData

from fusecache.store.tree import Tree

_GENERATION = int.from_bytes(os.urandom(4), "little")
"""Node ids begin at 1 in every mount; with this no id is taken for one of an earlier mount."""


def entry_of(node_id: int, st: os.stat_result, timeout: float) -> EntryAttributes:
    """The attributes of a node. ``timeout``: seconds the kernel may keep name and attributes."""
    entry = EntryAttributes()
    entry.st_ino = node_id
    entry.generation = _GENERATION
    entry.entry_timeout = entry.attr_timeout = timeout
    entry.st_mode = st.st_mode
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry


_TIMEOUTS = struct.Struct("<QQQQII")
"""``struct fuse_entry_out`` up to the attributes: node, generation, seconds that the kernel may
keep name and attributes, and their nanoseconds."""
_TIMEOUT = struct.Struct("<QII")
"""``struct fuse_attr_out`` up to the attributes: seconds, nanoseconds, padding."""
_ATTRIBUTES = struct.Struct("<QQQqqqIIIIIIIIII")
"""``struct fuse_attr``."""
_BILLION = 1_000_000_000


def packed_entry(entry: EntryAttributes) -> bytes:
    """The kernel's answer to a look-up, ``struct fuse_entry_out``."""
    name, attributes = divmod(int(entry.entry_timeout * _BILLION), _BILLION), _timeout(entry)
    head = (entry.st_ino, entry.generation, name[0], attributes[0], name[1], attributes[1])
    return _TIMEOUTS.pack(*head) + _packed(entry)


def packed_attributes(entry: EntryAttributes) -> bytes:
    """The kernel's answer to a question for attributes, ``struct fuse_attr_out``."""
    return _TIMEOUT.pack(*_timeout(entry), 0) + _packed(entry)


_OPENED = struct.Struct("<QII")
"""``struct fuse_open_out``: handle, flags, padding."""
_KEEP_CACHE = 1 << 1
"""``FOPEN_KEEP_CACHE``."""


def packed_open(info: FileInfo) -> bytes:
    """The kernel's answer to an open."""
    return _OPENED.pack(info.fh, _KEEP_CACHE if info.keep_cache else 0, 0)


def _timeout(entry: EntryAttributes) -> tuple[int, int]:
    return divmod(int(entry.attr_timeout * _BILLION), _BILLION)


def _packed(entry: EntryAttributes) -> bytes:
    read, written, changed = entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns
    return _ATTRIBUTES.pack(
        entry.st_ino,
        entry.st_size,
        entry.st_blocks,
        read // _BILLION,
        written // _BILLION,
        changed // _BILLION,
        read % _BILLION,
        written % _BILLION,
        changed % _BILLION,
        entry.st_mode,
        entry.st_nlink,
        entry.st_uid,
        entry.st_gid,
        entry.st_rdev & 0xFFFFFFFF,
        entry.st_blksize,
        0,
    )


def statvfs_of(st: os.statvfs_result) -> StatvfsData:
    """Space and files of the origin."""
    data = StatvfsData()
    data.f_bsize = st.f_bsize
    data.f_frsize = st.f_frsize
    data.f_blocks = st.f_blocks
    data.f_bfree = st.f_bfree
    data.f_bavail = st.f_bavail
    data.f_files = st.f_files
    data.f_ffree = st.f_ffree
    data.f_favail = st.f_favail
    data.f_namemax = st.f_namemax
    return data


def set_attributes(
    tree: Tree, fd: int, attr: EntryAttributes, fields: SetattrFields, mode: int
) -> None:
    """Owner, mode and times, each only if asked for; ``mode`` in place of the one in ``attr``."""
    if fields.update_uid or fields.update_gid:
        uid = attr.st_uid if fields.update_uid else -1
        tree.chown(fd, uid, attr.st_gid if fields.update_gid else -1)
    if fields.update_mode:
        tree.chmod(fd, mode)
    if fields.update_atime or fields.update_mtime:
        now = os.fstat(fd)
        atime = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
        mtime = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
        tree.set_times(fd, atime, mtime)
