"""Attributes: the origin's stat results in pyfuse3's form."""

import os
import stat

from pyfuse3 import EntryAttributes, StatvfsData

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


def without_privileges(mode: int) -> int:
    """A mode as a write by somebody else leaves it: without set-user-ID, and without set-group-ID
    where that has an effect (inode(7))."""
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode & ~stat.S_ISUID
