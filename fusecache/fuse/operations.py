"""Operations: translates pyfuse3's calls to the cache and the tree, and nothing else."""

import errno
import logging
import os
import stat
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.discards import Removal
from fusecache.engine.image import Image
from fusecache.fuse.attributes import entry_of, statvfs_of, without_privileges
from fusecache.fuse.guard import answer, guarded
from fusecache.fuse.inodes import Inodes, Node
from fusecache.fuse.shared import SharedStat
from fusecache.store.origin import Attributes
from fusecache.store.syscalls import RENAME_EXCHANGE
from fusecache.store.tree import Found, Tree

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

log = logging.getLogger(__name__)

_LISTING_PART = 64
_LISTING_ANSWER = 4 * _LISTING_PART
"""Entries after which an answer is long enough; the kernel asks on. It may have room for 1 MiB, and
the way through the lane takes some 200 KiB without privilege (see laned.py)."""
_OVERTAKING = 0.0002
_CAPABILITY = b"security.capability"
_NO_DATA = FUSEError(errno.ENODATA)


@dataclass(slots=True)
class Handle:
    """An open file."""

    image: Image
    node: Node
    write: bool
    pid: int


@dataclass(slots=True)
class Listing:
    """An open directory: its names as of the first read."""

    node: Node
    names: list[bytes] = field(default_factory=list)


def _nameless(found: Found) -> bool:
    """Whether a file whose last name was just removed has none that somebody gave it meanwhile. A
    network's filesystem may keep the number of names as it was while the file is open."""
    try:
        return not found.local or os.fstat(found.fd).st_nlink == 0
    except OSError:
        return True


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
        self._timeout = cache.tuning.attribute_timeout
        self.inodes = Inodes(tree.find_root())
        self.handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._next_handle = 1
        self.serving = trio.Event()
        """Set when the kernel has said INIT."""

    async def _fstat(self, fd: int) -> os.stat_result:
        return await self._metadata(os.fstat, fd)

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
        return entry_of(self.inodes.add(found).id, found.st, self._timeout)

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Finds a name."""
        parent = self.inodes[parent_inode]
        return self._entry(await self._metadata(self._tree.find, parent.fd, name))

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
        async with self._cache.truth.own_change(node.identity, node.fd):
            await self._metadata(self._tree.link, node.fd, parent.fd, new_name)
        return self._entry(await self._metadata(self._tree.find, parent.fd, new_name))

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Origin first, origin sync, then the rows, then the answer (R6)."""
        parent = self.inodes[parent_inode]
        found = await self._metadata(self._tree.find, parent.fd, name)
        try:
            async with AsyncExitStack() as stack:
                removal = await self._losing_a_name(stack, found)
                await self._metadata(self._tree.unlink, parent.fd, name)
                if removal is not None:
                    removal.happened = _nameless(found)
                    await self._metadata(self._tree.sync_directory, parent.fd)
        finally:
            os.close(found.fd)

    async def _losing_a_name(self, stack: AsyncExitStack, found: Found) -> Removal | None:
        """Enters what goes around the removal of a name; gives that of a known image's last one."""
        if not stat.S_ISREG(found.st.st_mode):
            return None
        if found.st.st_nlink == 1:
            return await stack.enter_async_context(self._cache.removing(found.identity))
        await stack.enter_async_context(self._cache.truth.own_change(found.identity, found.fd))
        return None

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
        moved = await self._metadata(self._tree.find, old.fd, name_old)
        replaced = await self._find_or_none(new, name_new)
        try:
            async with AsyncExitStack() as stack:
                removal: Removal | None = None
                # In one order for all: two renames must not wait for each other.
                for found in sorted(filter(None, (moved, replaced)), key=lambda f: f.identity):
                    if found is replaced and replaced.identity == moved.identity:
                        continue
                    if found is moved or flags & RENAME_EXCHANGE:
                        change = self._cache.truth.own_change(found.identity, found.fd)
                        await stack.enter_async_context(change)
                    elif not flags:
                        removal = await self._losing_a_name(stack, found)
                both = [moved, replaced] if replaced and flags & RENAME_EXCHANGE else [moved]
                before = [self._tree.path_of(found.fd) for found in both]
                names = (old.fd, name_old, new.fd, name_new, flags)
                await self._metadata(self._tree.rename, *names)
                if removal is not None and replaced is not None:
                    removal.happened = _nameless(replaced)
                await self._moved(both, before)
                if removal is not None:
                    await self._metadata(self._tree.sync_directory, new.fd)
        finally:
            os.close(moved.fd)
            if replaced is not None:
                os.close(replaced.fd)

    async def _moved(self, moved: list[Found], before: list[bytes]) -> None:
        after = [self._tree.path_of(found.fd) for found in moved]
        for found, path in zip(moved, after, strict=True):
            if stat.S_ISREG(found.st.st_mode):
                await self._cache.names.moved(found.identity, path)
        if any(stat.S_ISDIR(found.st.st_mode) for found in moved):
            await self._cache.names.moved_below(dict(zip(before, after, strict=True)))

    async def _find_or_none(self, parent: Node, name: bytes) -> Found | None:
        try:
            return await self._metadata(self._tree.find, parent.fd, name)
        except FileNotFoundError:
            return None

    # -- directories -------------------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Names are read at the first ``readdir``."""
        return self._new_listing(self.inodes[inode])

    def _new_listing(self, node: Node) -> int:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self._listings[number] = Listing(node)
        return number

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries in a fixed order; the id of an entry is its place in it. None at all would mean
        the end, however many names are gone by now."""
        listing = self._listings[fh]
        directory = listing.node.fd
        if start_id == 0:
            names = await self._metadata(self._tree.names, directory)
            listing.names = [b".", b"..", *names]
        replied = 0
        while start_id < len(listing.names) and replied < _LISTING_ANSWER:
            part = listing.names[start_id : start_id + _LISTING_PART]
            if start_id < 2:
                if not await self._reply_dot(listing, start_id, token):
                    return
                start_id += 1
                continue
            places = {name: start_id + at + 1 for at, name in enumerate(part)}
            found = await self._metadata(self._tree.find_all, directory, part)
            if not self._reply_part(found, places, token):
                return
            replied += len(found)
            start_id += len(part)

    async def _reply_dot(self, listing: Listing, place: int, token: pyfuse3.ReaddirToken) -> bool:
        """``.`` and ``..``, which the kernel does not count as look-ups."""
        st = await self._metadata(os.fstat, listing.node.fd)
        entry = entry_of(listing.node.id, st, self._timeout)
        return pyfuse3.readdir_reply(token, listing.names[place], entry, place + 1)

    def _reply_part(
        self,
        found: list[tuple[bytes, Found]],
        places: dict[bytes, int],
        token: pyfuse3.ReaddirToken,
    ) -> bool:
        """Replies entries until the buffer is full; whatever was not replied is let go."""
        full = False
        for name, entry in found:
            if full:
                os.close(entry.fd)
                continue
            attributes = self._entry(entry)
            if not pyfuse3.readdir_reply(token, name, attributes, places[name]):
                self.inodes.forget(attributes.st_ino, 1)
                full = True
        return not full

    @guarded
    async def releasedir(self, fh: int) -> None:
        """The listing ends."""
        del self._listings[fh]

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Names are on the origin's stable storage."""
        await self._metadata(self._tree.sync_directory, self._listings[fh].node.fd)

    # -- attributes --------------------------------------------------------------------------------

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The origin's, from memory at once where that is certain; what they tell of changes by
        others is looked into first."""
        node = self.inodes[inode]
        node.asked = True
        st = os.fstat(node.fd) if node.local else await self._stat(inode, node.fd)
        if node.regular:
            await self._cache.truth.noticed(node.identity, Attributes.of(st), node.fd)
        return entry_of(inode, st, self._timeout)

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
            await self._truncate(node, attr.st_size, fh)
        if fields.update_atime or fields.update_mtime:
            # Not taken for ours: it sets the very times that tell a change by others (P3).
            with self._cache.truth.setting_attributes(node.identity):
                await self._metadata(self._set, node, attr, fields, self._mode(node, attr))
        elif fields.update_mode or fields.update_uid or fields.update_gid:
            async with self._cache.truth.own_change(node.identity, node.fd):
                await self._metadata(self._set, node, attr, fields, self._mode(node, attr))
        if fields.update_mode and self._written(node):
            await self._drop_privileges(node)  # of an image that was opened meanwhile
        return entry_of(inode, await self._metadata(os.fstat, node.fd), self._timeout)

    def _written(self, node: Node) -> bool:
        """Whether it is open for writing, or is about to be."""
        image = self._cache.images.find(node.identity)
        return image is not None and image.writers > 0

    def _mode(self, node: Node, attr: EntryAttributes) -> int:
        """What a mode that was asked for becomes; see ``_drop_privileges``."""
        return without_privileges(attr.st_mode) if self._written(node) else attr.st_mode

    def _set(
        self, node: Node, attr: EntryAttributes, fields: pyfuse3.SetattrFields, mode: int
    ) -> None:
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            self._tree.chown(node.fd, uid, attr.st_gid if fields.update_gid else -1)
        if fields.update_mode:
            self._tree.chmod(node.fd, mode)
        if fields.update_atime or fields.update_mtime:
            now = os.fstat(node.fd)
            atime = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
            self._tree.set_times(node.fd, atime, mtime)

    async def _truncate(self, node: Node, size: int, fh: int | None) -> None:
        handle = None if fh is None else self.handles.get(fh)
        if handle is not None and handle.write:
            await self._cache.truncate(handle.image, size)
            return
        image = await self._open_image(node, write=True)
        try:
            await self._cache.truncate(image, size)
        finally:
            await self._cache.close(image, write=True)

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

    async def _open_image(self, node: Node, *, write: bool) -> Image:
        path = self._tree.path_of(node.fd)  # from memory: never asks the origin
        image = await self._cache.open(node.identity, path, node.fd, write=write)
        if write:
            try:
                await self._drop_privileges(node)  # only now: from here on nobody sets them
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._cache.close(image, write=True)
                raise
        return image

    async def _drop_privileges(self, node: Node) -> None:
        """A program that can be written to runs with nobody's privileges. Other filesystems drop
        them with each write; but then the kernel would ask before each write whether there are any
        (the lane answers INIT so that it does not)."""
        st = os.fstat(node.fd) if node.local else await self._stat(node.id, node.fd)
        mode = without_privileges(st.st_mode)
        if mode != st.st_mode:
            async with self._cache.truth.own_change(node.identity, node.fd):
                await self._metadata(self._tree.chmod, node.fd, mode)

    def _new_handle(self, image: Image, node: Node, write: bool, pid: int) -> FileInfo:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[number] = Handle(image, node, write, pid)
        if self.lane is not None and image.gate is not None:
            self.lane.open(number, node.id, image.gate.number)
        return FileInfo(fh=number, keep_cache=image.kernel_true and not image.detached)

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Regular files only. O_TRUNC is a truncate like any other (R6)."""
        node = self.inodes[inode]
        if not node.regular:
            raise FUSEError(errno.EPERM)
        return await self._open(node, flags, ctx)

    async def _open(self, node: Node, flags: int, ctx: RequestContext) -> FileInfo:
        truncates = bool(flags & os.O_TRUNC)
        write = truncates or flags & os.O_ACCMODE != os.O_RDONLY
        image = await self._open_image(node, write=write)
        try:
            if truncates:
                await self._cache.truncate(image, 0)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._cache.close(image, write=write)
            raise
        return self._new_handle(image, node, write, ctx.pid)

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
        info: FileInfo | None = None
        try:
            info = await self._open(node, flags, ctx)
            if private != mode:
                with self._cache.truth.setting_attributes(node.identity):
                    await self._metadata(self._tree.chmod, node.fd, mode)
                st = await self._metadata(os.fstat, node.fd)
                entry = entry_of(node.id, st, self._timeout)
        except BaseException:
            try:
                if info is not None:  # the kernel, told of an error, sends no release
                    with trio.CancelScope(shield=True):
                        await self._end_handle(info.fh)
            finally:
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
        """A close(2): what others do after it must be seen as a change of its own (P3)."""
        handle = self.handles[fh]
        if handle.write:
            await self._cache.closing.before_close(handle.image)

    @guarded
    async def release(self, fh: int) -> None:
        """The last close of a handle."""
        await self._end_handle(fh)

    async def _end_handle(self, fh: int) -> None:
        handle = self.handles.pop(fh)
        if self.lane is not None:
            self.lane.close(fh)
        await self._cache.close(handle.image, write=handle.write)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Stable when answered; O_SYNC and O_DSYNC writes arrive here, too."""
        await self._cache.fsync(self.handles[fh].image, metadata=not datasync)
