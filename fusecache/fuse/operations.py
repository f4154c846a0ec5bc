"""Operations: translates pyfuse3's calls to the cache and the tree, and nothing else."""

import errno
import os
import stat
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.attributes import set_attributes, statvfs_of
from fusecache.fuse.directories import Directories
from fusecache.fuse.files import Files
from fusecache.fuse.guard import answer, guarded, undone_on_failure
from fusecache.fuse.inodes import Inodes, Node
from fusecache.fuse.names import Names
from fusecache.fuse.privileges import Privileges, without_privileges
from fusecache.fuse.shared import SharedStat
from fusecache.fuse.told import Told
from fusecache.store.origin import Attributes
from fusecache.store.tree import Found, Tree

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

_OVERTAKING = 0.0002
_CAPABILITY = b"security.capability"
_NO_DATA = FUSEError(errno.ENODATA)


class Operations(pyfuse3.Operations):
    """See ``pyfuse3.Operations`` for what each handler is asked; docstrings here say what is
    particular. The kernel's write-back cache stays off: every write reaches us at once."""

    def __init__(self, cache: BlockCache, tree: Tree, *, xattrs: bool = True) -> None:
        super().__init__()
        self.xattrs = xattrs
        self.lane: Lane | None = None
        """What answers hits in front of us, if anything does."""
        self.state = cache.state
        self._cache = cache
        self._tree = tree
        self._try_read = cache.try_read
        self._try_write = cache.try_write
        self._metadata = cache.threads.metadata
        self._stat = SharedStat(self._fstat)
        self.told = Told(cache)
        self.inodes = Inodes(tree.find_root())
        numbers = count(1)
        self._privileges = Privileges(cache, tree, self._stat)
        self.files = Files(cache, tree, self.told, self._privileges, self.invalidate, numbers)
        self.handles = self.files.handles
        self._names = Names(cache, tree)
        self._directories = Directories(cache, tree, self.inodes, self.told, numbers)
        self.serving = trio.Event()
        """Set when the kernel has said INIT."""

    async def _fstat(self, fd: int) -> os.stat_result:
        return await self._metadata(os.fstat, fd)

    def tell(self, lane: "Lane") -> None:
        """The lane is in front of us, and hears of what is opened and told."""
        self.lane = self.told.lane = self.files.lane = lane
        self.inodes.tell(lane)

    def init(self) -> None:
        """The kernel is there."""
        self.serving.set()

    def invalidate(self, identity: bytes) -> None:
        """Makes the kernel forget pages and attributes of an inode. Blocks; runs in a thread."""
        node = self.inodes.find(identity)
        if node is None:
            return
        try:
            if self.lane is None:
                pyfuse3.invalidate_inode(node.id, attr_only=False)
            else:  # pyfuse3 would not wait for the kernel's answer, which takes another way
                self.lane.invalidate(node.id)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
                raise

    # -- names -------------------------------------------------------------------------------------

    def _entry(self, found: Found) -> EntryAttributes:
        """Counts a look-up and takes over the descriptor."""
        return self.told.entry(self.inodes.add(found), found.st)

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """See ``look_up``."""
        return await self.look_up(parent_inode, name)

    async def look_up(
        self, parent_inode: int, name: bytes, fd: int | None = None
    ) -> EntryAttributes:
        """Finds a name, or takes over what the lane has found by it (an O_PATH descriptor)."""
        parent = self.inodes[parent_inode]
        if fd is None:
            return self._entry(await self._metadata(self._tree.find, parent.fd, name))
        return self._entry(await self._metadata(self._tree.found, fd))

    def look_up_at_once(self, parent_inode: int, fd: int) -> EntryAttributes | None:
        """``look_up`` of what the lane has found, from memory alone; None if that is not certain:
        then the descriptor is the caller's still."""
        if not self.inodes[parent_inode].local:
            return None
        return self._entry(self._tree.found(fd))

    async def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:
        """Has no answer, so it must not fail either."""
        for node_id, lookups in inode_list:
            try:
                self.inodes.forget(node_id, lookups)
            except Exception as exc:
                answer(self.state, exc, "forget")

    @guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A directory that is the caller's."""
        parent = self.inodes[parent_inode]
        make = self._tree.mkdir
        return self._entry(await self._metadata(make, parent.fd, name, mode, ctx.uid, ctx.gid))

    @guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A file, FIFO or socket; never a device."""
        parent = self.inodes[parent_inode]
        make = self._tree.mknod
        return self._entry(await self._metadata(make, parent.fd, name, mode, ctx.uid, ctx.gid))

    @guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """A symbolic link that is the caller's."""
        parent = self.inodes[parent_inode]
        make = self._tree.symlink
        return self._entry(await self._metadata(make, parent.fd, name, target, ctx.uid, ctx.gid))

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """The target of a symbolic link."""
        return await self._metadata(self._tree.readlink, self.inodes[inode].fd)

    @guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """One more name; the image stays the same."""
        node, parent = self.inodes[inode], self.inodes[new_parent_inode]
        return self._entry(await self._names.link(node, parent, new_name))

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """What loses its last name loses its blocks (R6)."""
        await self._names.unlink(self.inodes[parent_inode], name)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """An empty directory goes."""
        await self._metadata(self._tree.rmdir, self.inodes[parent_inode].fd, name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """What is renamed keeps its blocks; what loses its last name loses them (R6)."""
        old, new = self.inodes[parent_inode_old], self.inodes[parent_inode_new]
        await self._names.rename(old, name_old, new, name_new, flags)

    # -- directories -------------------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Names are read at the first ``readdir``."""
        return self._directories.open(self.inodes[inode])

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """See ``Directories.read``."""
        await self._directories.read(fh, start_id, token)

    @guarded
    async def releasedir(self, fh: int) -> None:
        """The listing ends."""
        self._directories.close(fh)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Names are on the origin's stable storage."""
        await self._directories.sync(fh)

    # -- attributes --------------------------------------------------------------------------------

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """See ``attributes``."""
        return await self.attributes(inode)

    async def attributes(self, inode: int) -> EntryAttributes:
        """The origin's; what they tell of changes by others is looked into first."""
        entry = self.attributes_at_once(inode)
        if entry is not None:
            return entry
        node = self.inodes[inode]
        st = os.fstat(node.fd) if node.local else await self._stat(inode, node.fd)
        if node.regular:
            await self._cache.truth.noticed(node.identity, Attributes.of(st), node.fd)
        return self.told.entry(node, st)

    def attributes_at_once(self, inode: int) -> EntryAttributes | None:
        """``attributes`` from memory alone; None if that is not certain, or they tell of something
        that has to be looked into."""
        node = self.inodes[inode]
        node.asked = True
        st = self.told.now(node)
        return None if st is None else self.told.entry(node, st)

    @guarded
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Size first (R6), then owner, mode and times, each only if asked for."""
        node = self.inodes[inode]
        if fields.update_size:
            await self.files.truncate(node, attr.st_size, fh)
        if fields.update_atime or fields.update_mtime:
            # Not taken for ours: it sets the very times that tell a change by others (P3).
            with self._cache.truth.setting_attributes(node.identity):
                await self._set(node, attr, fields)
        elif fields.update_mode or fields.update_uid or fields.update_gid:
            async with self._cache.truth.own_change(node.identity, node.fd):
                await self._set(node, attr, fields)
        if fields.update_mode and self._privileges.written(node):
            await self._privileges.drop(node)  # of an image that was opened meanwhile
        st = await self._metadata(os.fstat, node.fd)
        if fields.update_mtime:
            self.told.time(node, st.st_mtime_ns)
        return self.told.entry(node, st)

    async def _set(self, node: Node, attr: EntryAttributes, fields: pyfuse3.SetattrFields) -> None:
        mode = self._privileges.allowed(node, attr.st_mode)
        await self._metadata(set_attributes, self._tree, node.fd, attr, fields, mode)

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The origin's space."""
        return statvfs_of(await self._metadata(self._tree.statvfs))

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Images have no file capabilities. Without the lane the kernel asks before every write, so
        answer fast."""
        if not self.xattrs:
            raise FUSEError(errno.ENOSYS)  # said once, and the kernel never asks again
        if name == _CAPABILITY and (node := self.inodes.get(inode)) is not None and node.regular:
            raise _NO_DATA.with_traceback(None)
        return await self._getxattr(inode, name)

    @guarded
    async def _getxattr(self, inode: int, name: bytes) -> bytes:
        node = self.inodes[inode]
        self._with_xattrs(node)
        return await self._metadata(self._tree.getxattr, node.fd, name)

    def _with_xattrs(self, node: Node) -> None:
        if not self.xattrs:
            raise FUSEError(errno.ENOSYS)
        if node.fmt == stat.S_IFLNK:
            raise FUSEError(errno.EOPNOTSUPP)  # their descriptors cannot be followed

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """As on the origin."""
        node = self.inodes[inode]
        self._with_xattrs(node)
        if name == _CAPABILITY and node.regular:
            raise FUSEError(errno.EOPNOTSUPP)
        async with self._cache.truth.own_change(node.identity, node.fd):
            await self._metadata(self._tree.setxattr, node.fd, name, value)

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        """As on the origin; symbolic links have none."""
        node = self.inodes[inode]
        if node.fmt == stat.S_IFLNK and self.xattrs:
            return []
        self._with_xattrs(node)
        return await self._metadata(self._tree.listxattr, node.fd)

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """As on the origin."""
        node = self.inodes[inode]
        self._with_xattrs(node)
        async with self._cache.truth.own_change(node.identity, node.fd):
            await self._metadata(self._tree.removexattr, node.fd, name)

    # -- files -------------------------------------------------------------------------------------

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """See ``Files.open``."""
        return await self.files.open(self.inodes[inode], flags, ctx.pid)

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """A new file that is the caller's; one that somebody else made meanwhile is opened."""
        parent = self.inodes[parent_inode]
        mode = without_privileges(mode)
        # Opened by us before it gets a mode that would forbid us to.
        private = mode | 0o600
        try:
            create = self._tree.create
            found = await self._metadata(create, parent.fd, name, private, ctx.uid, ctx.gid)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            found = await self._metadata(self._tree.find, parent.fd, name)
            private = mode
        entry = self._entry(found)
        node = self.inodes[entry.st_ino]
        try:
            info = await self.files.open(node, flags, ctx.pid)
            if private != mode:
                # The kernel, told of an error, sends no release.
                async with undone_on_failure(self.files.close, info.fh):
                    with self._cache.truth.setting_attributes(node.identity):
                        await self._metadata(self._tree.chmod, node.fd, mode)
                    st = await self._metadata(os.fstat, node.fd)
                    entry = self.told.entry(node, st)
        except BaseException:
            self.inodes.forget(node.id, 1)
            raise
        return info, entry

    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer
        self, fh: int, off: int, size: int
    ) -> bytes | memoryview:
        """A hit is answered from a buffer that the next hit overwrites: pyfuse3 copies it to the
        kernel before anything else can run. Guarded by hand: this is the hot path.

        The first read after a question for attributes waits a moment. The kernel throws their
        answer away if any asynchronous read was completed since it asked, and asks again before
        the next one: a deep queue of direct reads ran at half its speed for a quarter of every
        second (measured). This moment lets the next question overtake, which ends that.
        """
        try:
            handle = self.handles[fh]
            if handle.node.asked:
                handle.node.asked = False
                await trio.sleep(_OVERTAKING)
            image = handle.image
            hit = self._try_read(image, off, size)
            if hit is not None:
                return hit
            return await self._cache.read_slowly(image, off, size)
        except Exception as exc:
            raise answer(self.state, exc, "read") from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """All of it, or an error. Guarded by hand, as ``read`` is."""
        try:
            image = self.handles[fh].image
            if self._try_write(image, off, buf):
                return len(buf)
            return await self._cache.write_slowly(image, off, buf)
        except Exception as exc:
            raise answer(self.state, exc, "write") from None

    @guarded
    async def flush(self, fh: int) -> None:
        """See ``Files.before_close``."""
        await self.files.before_close(fh)

    @guarded
    async def release(self, fh: int) -> None:
        """The last close of a handle."""
        await self.files.close(fh)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Stable when answered; O_SYNC and O_DSYNC writes arrive here, too."""
        await self._cache.fsync(self.handles[fh].image, metadata=not datasync)
