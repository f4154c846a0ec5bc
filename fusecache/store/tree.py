"""The origin as a tree of names: lookups, listings, and everything that changes names.

Every inode is held by an O_PATH descriptor, found once from its parent's with O_NOFOLLOW. Calls
block and raise OSError; the caller runs them in a thread.
"""

import contextlib
import errno
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fusecache.errors import LinkOutsideError, OriginError
from fusecache.store import mountinfo, origin, syscalls
from fusecache.store.links import MOST_LINKS, followed

_NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "glusterfs", "afs", "lustre"}


@dataclass(frozen=True, slots=True)
class Found:
    """An inode: a pinned descriptor that the receiver must close, and what it was when found."""

    fd: int
    st: os.stat_result
    identity: bytes
    local: bool
    """Its filesystem answers an fstat from memory, never from a network."""


@dataclass(frozen=True, slots=True)
class _Filesystem:
    number: int
    kind: str

    @property
    def local(self) -> bool:
        return self.kind not in _NETWORK_FILESYSTEMS and not self.kind.startswith("fuse")


def _since_boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Tree:
    """The directory tree below the origin.

    Args:
        root: an absolute path to a directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._device = os.fstat(self._root_fd).st_dev
        self._filesystems: dict[int, _Filesystem] = {}
        self._server_ahead_ns: int | None = None
        """A file server's clock minus the time since this host's boot, which nobody sets: this
        host's clock may be, while we run. None: the files' times are by this host's clock."""

    def close(self) -> None:
        """Closes the root."""
        os.close(self._root_fd)

    @property
    def read_only(self) -> bool:
        """Whether the origin's filesystem is mounted read-only."""
        return bool(os.statvfs(self.root).f_flag & os.ST_RDONLY)

    def now_ns(self) -> int:
        """The time by the origin's clock."""
        if self._server_ahead_ns is None:
            return time.time_ns()
        return _since_boot_ns() + self._server_ahead_ns

    def measure_clock(self) -> None:
        """Finds out what a file server's clock says, with a file that has no name.

        Local filesystems use this host's clock. Where the server cannot make nameless files, one
        is made and removed at once; a read-only origin is taken to have our clock.
        """
        kind = _filesystem_type(self.root.stat().st_dev)
        if kind not in _NETWORK_FILESYSTEMS or self.read_only:
            return
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self.root) as file:
            before = _since_boot_ns()
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
            after = _since_boot_ns()
            self._server_ahead_ns = os.fstat(file.fileno()).st_mtime_ns - (before + after) // 2

    def find_root(self) -> Found:
        """The origin directory itself."""
        return self.found(os.dup(self._root_fd))

    def find(self, parent: int, name: bytes) -> Found:
        """The entry ``name`` of the directory ``parent`` (a descriptor). Links are not followed.

        Raises:
            OSError: there is none; EXDEV: its filesystem cannot be told from another's.
        """
        if name == b".." or b"/" in name:  # the kernel sends .. when an NFS server asks it to
            raise FileNotFoundError(2, "the name leaves its directory")
        return self.found(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent))

    def found(self, fd: int) -> Found:
        """What an O_PATH descriptor is of; takes it over. Asks no disk and no network, but for
        attributes, if it is on the filesystem of its parent directory, and that is ``local``.

        Raises:
            OSError: the attributes are not to be had; EXDEV: see ``find``.
        """
        try:
            st = os.fstat(fd)
            filesystem = self._filesystem(fd, st)
            identity = origin.identity_of(fd, filesystem.number)
            return Found(fd, st, identity, filesystem.local)
        except BaseException:
            os.close(fd)
            raise

    def _filesystem(self, fd: int, st: os.stat_result) -> _Filesystem:
        """The filesystem of ``fd``, by a number that outlives remounts.

        A filesystem mounted inside the origin has its own; if two cannot be told apart, the
        second one is refused, since equal inode numbers on both would be taken for one image.
        Device numbers are given again after an unmount, to the same filesystem or another.
        """
        known = self._filesystems.get(st.st_dev)
        if known is not None and st.st_dev == self._device:
            return known  # the origin's own cannot change while its root is held
        number = os.fstatvfs(fd).f_fsid & 0xFFFFFFFFFFFFFFFF
        if known is not None and known.number == number:
            return known
        kind = _filesystem_type(st.st_dev)
        for device, other in list(self._filesystems.items()):
            if other.number != number or device == st.st_dev:
                continue
            if device == self._device or not other.kind or self._mounted_inside(device):
                raise OriginError(
                    18,
                    f"a filesystem mounted inside {self.root} has the same id as another one "
                    "there: mount it elsewhere and give it a fusecache of its own",
                )
            del self._filesystems[device]  # unmounted, and this is it again
        self._filesystems[st.st_dev] = _Filesystem(number, kind)
        return self._filesystems[st.st_dev]

    def _mounted_inside(self, device: int) -> bool:
        """Whether a filesystem with this device number is mounted below the origin now."""
        root = os.readlink(f"/proc/self/fd/{self._root_fd}")
        return any(entry.path.is_relative_to(root) for entry in mountinfo.of_device(device))

    def resolve(self, path: bytes) -> Found:
        """The inode at a path relative to the origin, no symbolic link followed on the way."""
        return self.found(self._open(path))

    def _open(self, path: bytes) -> int:
        fd = os.dup(self._root_fd)
        for name in _parts(path):
            if name == b"..":
                os.close(fd)
                raise FileNotFoundError(2, "the path leaves the origin")
            try:
                below = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def follow(self, path: bytes, mountpoint: Path) -> bytes:
        """The path, relative to the origin, once the symbolic links on its way are followed; that
        of something missing goes on as it is. For what people name.

        A link may leave the origin and come back, as one to an absolute path does.

        Args:
            mountpoint: what lies below it is the origin's.

        Raises:
            LinkOutsideError: it leads out of the origin.
            OSError: the origin failed; ELOOP: there are too many links.
        """
        done: list[bytes] = []
        todo = _parts(path)[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name != b"..":
                try:
                    target = self._target(b"/".join([*done, name]))
                except (FileNotFoundError, NotADirectoryError):
                    return b"/".join([*done, name, *todo[::-1]])
                if target is None:
                    done.append(name)
                    continue
            elif done:
                done.pop()
                continue
            else:
                target = os.path.dirname(os.fsencode(self.root))
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if os.path.isabs(target):
                rest = os.fsdecode(os.path.join(target, *todo[::-1]))
                done, todo = [], self._inside(rest, mountpoint)[::-1]
            else:
                todo += _parts(target)[::-1]
        return b"/".join(done)

    def _target(self, path: bytes) -> bytes | None:
        """Where the link at a path leads to; None if that is no link."""
        fd = self._open(path)
        try:
            return self.readlink(fd) if stat.S_ISLNK(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)

    def _inside(self, path: str, mountpoint: Path) -> list[bytes]:
        """The parts, below the origin, of an absolute path."""
        target = followed(path, (str(self.root), str(mountpoint)))
        for root in (self.root, mountpoint):
            if Path(target).is_relative_to(root):
                return _parts(os.fsencode(os.path.relpath(target, root)))
        raise LinkOutsideError(target)

    def pin(self, path: bytes, identity: bytes) -> int | None:
        """A descriptor of the image at ``path``; None if it is not, or no longer, there.

        Raises:
            OSError: the origin failed.
        """
        try:
            found = self.resolve(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found.identity == identity and stat.S_ISREG(found.st.st_mode):
            return found.fd
        os.close(found.fd)
        return None

    def path_of(self, fd: int) -> bytes:
        """Where the inode is now, relative to the origin, for people."""
        path = os.readlink(f"/proc/self/fd/{fd}".encode())
        root = os.readlink(f"/proc/self/fd/{self._root_fd}".encode())
        return path[len(root) :].lstrip(b"/") if path.startswith(root) else path

    def names(self, directory: int) -> list[bytes]:
        """The names in a directory, sorted."""
        fd = os.open(f"/proc/self/fd/{directory}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return sorted(map(os.fsencode, os.listdir(fd)))
        finally:
            os.close(fd)

    def find_all(self, directory: int, names: list[bytes]) -> list[tuple[bytes, Found]]:
        """``find`` for several names; those that are gone, or refused, are left out."""
        found: list[tuple[bytes, Found]] = []
        for name in names:
            with contextlib.suppress(OSError, OriginError):
                found.append((name, self.find(directory, name)))
        return found

    # -- changing names ----------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Found:
        """A new, empty regular file with its owner and mode. EEXIST if the name is taken."""
        made = os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
            dir_fd=parent,
        )  # fmt: skip
        try:
            # By descriptor: the name may be another file's by now, which must not be chowned.
            fd = os.open(f"/proc/self/fd/{made}", os.O_PATH | os.O_CLOEXEC)
        finally:
            os.close(made)
        return self._given(fd, parent, mode, uid, gid)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Found:
        """A new directory."""
        os.mkdir(name, 0o700, dir_fd=parent)
        return self._new(parent, name, mode, uid, gid)

    def mknod(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Found:
        """A new file, FIFO or socket; devices are refused with EPERM."""
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise PermissionError(1, "devices cannot be made here")
        os.mknod(name, stat.S_IFMT(mode) | 0o600, dir_fd=parent)
        return self._new(parent, name, mode, uid, gid)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Found:
        """A new symbolic link."""
        os.symlink(target, name, dir_fd=parent)
        return self._new(parent, name, None, uid, gid)

    def _new(self, parent: int, name: bytes, mode: int | None, uid: int, gid: int) -> Found:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        return self._given(fd, parent, mode, uid, gid)

    def _given(self, fd: int, parent: int, mode: int | None, uid: int, gid: int) -> Found:
        """Gives what was just made its owner and mode, as if the caller had made it."""
        try:
            st, directory = os.fstat(fd), os.fstat(parent)
            if directory.st_mode & stat.S_ISGID:
                gid = st.st_gid
                if mode is not None and stat.S_ISDIR(st.st_mode):
                    mode |= stat.S_ISGID
            if (st.st_uid, st.st_gid) != (uid, gid):
                syscalls.chown_fd(fd, uid, gid)
            if mode is not None:
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode))
        except BaseException:
            os.close(fd)
            raise
        return self.found(fd)

    def link(self, fd: int, parent: int, name: bytes) -> None:
        """One more name for an inode."""
        syscalls.link_fd(fd, parent, name)

    def unlink(self, parent: int, name: bytes) -> None:
        """Removes a name that is not a directory's."""
        os.unlink(name, dir_fd=parent)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Removes an empty directory."""
        os.rmdir(name, dir_fd=parent)

    def rename(self, parent: int, name: bytes, new_parent: int, new: bytes, flags: int) -> None:
        """rename(2); ``flags`` as renameat2(2) has them."""
        if flags:
            syscalls.renameat2(parent, name, new_parent, new, flags)
        else:
            os.rename(name, new, src_dir_fd=parent, dst_dir_fd=new_parent)

    # -- attributes --------------------------------------------------------------------------------

    def chmod(self, fd: int, mode: int) -> None:
        """Permission bits of an inode."""
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode))

    def chown(self, fd: int, uid: int, gid: int) -> None:
        """Owner of an inode; -1 leaves an id as it is."""
        syscalls.chown_fd(fd, uid, gid)

    def set_times(self, fd: int, atime_ns: int, mtime_ns: int) -> None:
        """Access and modification time of an inode."""
        os.utime(f"/proc/self/fd/{fd}", ns=(atime_ns, mtime_ns))

    def readlink(self, fd: int) -> bytes:
        """The target of a symbolic link."""
        return os.readlink(b"", dir_fd=fd)

    def getxattr(self, fd: int, name: bytes) -> bytes:
        """An extended attribute; ENODATA if there is none. Symbolic links have none."""
        return os.getxattr(f"/proc/self/fd/{fd}", name)

    def setxattr(self, fd: int, name: bytes, value: bytes) -> None:
        """Sets an extended attribute."""
        os.setxattr(f"/proc/self/fd/{fd}", name, value)

    def listxattr(self, fd: int) -> list[bytes]:
        """Names of the extended attributes."""
        return [os.fsencode(name) for name in os.listxattr(f"/proc/self/fd/{fd}")]

    def removexattr(self, fd: int, name: bytes) -> None:
        """Removes an extended attribute."""
        os.removexattr(f"/proc/self/fd/{fd}", name)

    def statvfs(self) -> os.statvfs_result:
        """Space and files of the origin's filesystem."""
        return os.statvfs(self._root_fd)

    def sync_directory(self, fd: int) -> None:
        """Names in the directory are on stable storage."""
        opened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _filesystem_type(device: int) -> str:
    """The type of a mounted filesystem; empty if it is not in mountinfo."""
    return next((entry.fstype for entry in mountinfo.of_device(device)), "")
