"""The origin as a tree: nothing leads out of it, and what is made is the caller's."""

import contextlib
import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusecache.errors import LinkOutsideError, OriginError
from fusecache.store import tree
from fusecache.store.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from fusecache.store.tree import Found, Tree
from tests.support.descriptors import count_descriptors

UID, GID = 12345, 23456


class Place:
    """An origin beside a directory nobody may get at, and descriptors that get closed."""

    def __init__(self, base: Path) -> None:
        self.origin = base / "origin"
        self.outside = base / "outside"
        for directory in (self.origin, self.outside):
            directory.mkdir()
        (self.outside / "secret").write_bytes(b"secret")
        self.tree = Tree(self.origin)
        self.root = self.tree.find_root().fd
        self.fds = [self.root]

    def keep(self, found: Found) -> Found:
        self.fds.append(found.fd)
        return found

    def find(self, *names: bytes | str) -> Found:
        """Looks up one name after the other, as the kernel does."""
        fd, found = self.root, None
        for name in names:
            found = self.keep(self.tree.find(fd, os.fsencode(name)))
            fd = found.fd
        assert found is not None
        return found

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.tree.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    before = count_descriptors()
    made = Place(tmp_path)
    try:
        yield made
    finally:
        made.close()
    assert count_descriptors() == before, "a descriptor leaks"


# -- nothing leads out ----------------------------------------------------------------------------


def test_symbolic_links_are_found_and_never_followed(place: Place) -> None:
    (place.origin / "link").symlink_to(place.outside)
    (place.origin / "file").symlink_to(place.outside / "secret")
    for name, target in (("link", place.outside), ("file", place.outside / "secret")):
        found = place.find(name)
        assert stat.S_ISLNK(found.st.st_mode)
        assert place.tree.readlink(found.fd) == os.fsencode(target)
    with pytest.raises(NotADirectoryError):
        place.find("link", "secret")
    with pytest.raises(OSError):
        place.tree.names(place.find("link").fd)
    for path in (b"link/secret", b"link/../outside/secret", b"./link//secret"):
        with pytest.raises(OSError) as caught:
            place.keep(place.tree.resolve(path))
        assert caught.value.errno in (errno.ENOTDIR, errno.ENOENT)


def test_dots_and_slashes_do_not_leave_the_origin(place: Place) -> None:
    (place.origin / "sub").mkdir()
    sub = place.find("sub").fd
    for parent in (place.root, sub):
        for name in (b"..", b"../outside", b"/etc", b"sub/..", b"a/b"):
            with pytest.raises(FileNotFoundError):
                place.keep(place.tree.find(parent, name))
    for path in (b"..", b"sub/../../outside/secret", b"../outside/secret", b"sub/.."):
        with pytest.raises(FileNotFoundError, match="leaves the origin"):
            place.keep(place.tree.resolve(path))
    assert place.keep(place.tree.resolve(b"/sub/./")).st.st_ino == os.fstat(sub).st_ino
    assert place.keep(place.tree.resolve(b"")).st.st_ino == place.origin.stat().st_ino


def test_links_in_names_of_images_are_followed_within_the_origin(
    place: Place, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    (tmp_path / "alias").symlink_to(place.origin)
    (place.origin / "sub").mkdir()
    (place.origin / "sub" / "a").touch()
    targets: dict[str, str | Path] = {
        "rel": "sub/a", "sub/up": "../sub/./a", "dir": "sub", "abs": place.origin / "sub" / "a",
        "out-and-in": "../origin/sub/a", "by-alias": "../alias/sub/a", "chain": "mounted",
        "mounted": mountpoint / "dir" / "a",
    }  # fmt: skip
    for name, target in targets.items():
        (place.origin / name).symlink_to(target)
    for name in (*targets, "dir/up", "dir/../rel"):
        if name != "dir":
            assert place.tree.follow(os.fsencode(name), mountpoint) == b"sub/a", name
    for name in (b"none", b"none/a", b"dir/none/../a"):
        followed = place.tree.follow(name, mountpoint)
        assert followed == name.replace(b"dir", b"sub")
        with pytest.raises(FileNotFoundError):
            place.keep(place.tree.resolve(followed))
    for name, target in (("file", place.outside / "secret"), ("way", "../outside")):
        (place.origin / name).symlink_to(target)
        with pytest.raises(LinkOutsideError) as caught:
            place.tree.follow(os.fsencode(name), mountpoint)
        assert caught.value.target.startswith(str(place.outside))
    (place.origin / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many"):
        place.tree.follow(b"circle", mountpoint)


def test_a_directory_swapped_for_a_link_changes_nothing_for_those_who_found_it(
    place: Place,
) -> None:
    (place.origin / "sub").mkdir()
    (place.origin / "sub" / "secret").write_bytes(b"public")
    sub = place.find("sub").fd
    (place.origin / "sub").rename(place.origin / "old")
    (place.origin / "sub").symlink_to(place.outside)
    found = place.keep(place.tree.find(sub, b"secret"))
    assert found.st.st_ino == (place.origin / "old" / "secret").stat().st_ino
    made = place.keep(place.tree.create(sub, b"new", 0o644, UID, GID))
    assert (place.origin / "old" / "new").stat().st_ino == made.st.st_ino
    assert place.tree.path_of(made.fd) == b"old/new"
    assert os.listdir(place.outside) == ["secret"]


def test_a_name_swapped_for_a_link_after_its_creation_gives_nobody_the_target(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = place.outside / "secret"
    before = victim.stat()
    really_open = os.open

    def open_and_swap(path: Any, flags: int, *args: int, dir_fd: int | None = None) -> int:
        fd = really_open(path, flags, *args, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            os.unlink("new", dir_fd=place.root)
            os.link(victim, "new", dst_dir_fd=place.root)
        return fd

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_and_swap)
        found = place.keep(place.tree.create(place.root, b"new", 0o4777, UID, GID))
    after = victim.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
    )
    assert found.st.st_ino != after.st_ino


def test_creating_over_a_link_is_refused(place: Place) -> None:
    (place.origin / "taken").symlink_to(place.outside / "made")
    for make in (place.tree.create, place.tree.mkdir):
        with pytest.raises(FileExistsError):
            place.keep(make(place.root, b"taken", 0o644, UID, GID))
    assert not (place.outside / "made").exists()


def test_a_fifo_is_found_without_blocking(place: Place) -> None:
    os.mkfifo(place.origin / "fifo")
    found = place.find("fifo")
    assert stat.S_ISFIFO(found.st.st_mode)
    place.tree.chmod(found.fd, 0o600)
    assert (place.origin / "fifo").stat().st_mode & 0o777 == 0o600


def test_looking_up_what_is_not_there_leaks_nothing(place: Place) -> None:
    (place.origin / "file").touch()
    (place.origin / "deep").mkdir()
    with pytest.raises(FileNotFoundError):
        place.find("missing")
    for path in (b"deep/missing/more", b"file/more", b"deep/.."):
        with pytest.raises(OSError):
            place.keep(place.tree.resolve(path))


# -- names ----------------------------------------------------------------------------------------


def test_names_are_bytes_and_need_not_be_utf_8(place: Place) -> None:
    names = [b"\xff\xfe.img", b"with\nnewline", b"caf\xc3\xa9", b"caf\xe9", b" ", b"x" * 255]
    for name in names:
        place.keep(place.tree.create(place.root, name, 0o600, 0, 0))
    assert place.tree.names(place.root) == sorted(names)
    for name in names:
        found = place.keep(place.tree.find(place.root, name))
        assert place.tree.path_of(found.fd) == name
        assert place.keep(place.tree.resolve(name)).identity == found.identity
    wanted = [names[0], b"gone", b"..", names[3]]
    found_all = place.tree.find_all(place.root, wanted)
    for _, found in found_all:
        place.keep(found)
    assert [name for name, _ in found_all] == [names[0], names[3]]
    with pytest.raises(OSError) as caught:
        place.keep(place.tree.create(place.root, b"x" * 256, 0o600, 0, 0))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_rename_flags_are_those_of_renameat2(place: Place) -> None:
    tree, root = place.tree, place.root
    a, b = place.origin / "a", place.origin / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    identity = place.find("a").identity
    with pytest.raises(FileExistsError):
        tree.rename(root, b"a", root, b"b", RENAME_NOREPLACE)
    tree.rename(root, b"a", root, b"b", RENAME_EXCHANGE)
    assert (a.read_bytes(), b.read_bytes()) == (b"b", b"a")
    assert place.find("b").identity == identity
    tree.rename(root, b"b", root, b"c", RENAME_NOREPLACE)
    tree.rename(root, b"c", root, b"a", 0)
    assert place.tree.names(root) == [b"a"]
    assert a.read_bytes() == b"a"
    with pytest.raises(FileNotFoundError):
        tree.rename(root, b"nothing", root, b"a", RENAME_EXCHANGE)
    (place.origin / "sub").mkdir()
    tree.rename(root, b"a", place.find("sub").fd, b"\xff", 0)
    assert place.find("sub", b"\xff").identity == identity
    with pytest.raises(OSError) as caught:
        tree.rename(root, b"sub", root, b"new", 1 << 20)
    assert caught.value.errno == errno.EINVAL


def test_links_and_removals(place: Place) -> None:
    made = place.keep(place.tree.create(place.root, b"a", 0o600, 0, 0))
    place.tree.link(made.fd, place.root, b"b")
    assert place.find("b").identity == made.identity
    place.tree.unlink(place.root, b"a")
    with pytest.raises(IsADirectoryError):
        place.keep(place.tree.mkdir(place.root, b"d", 0o700, 0, 0))
        place.tree.unlink(place.root, b"d")
    place.tree.rmdir(place.root, b"d")
    place.tree.sync_directory(place.root)
    assert place.tree.names(place.root) == [b"b"]


# -- owners and modes -----------------------------------------------------------------------------


def owner(found: Found) -> tuple[int, int, int]:
    return found.st.st_uid, found.st.st_gid, stat.S_IMODE(found.st.st_mode)


def test_what_is_made_belongs_to_the_caller(place: Place) -> None:
    old_mask = os.umask(0o077)
    try:
        tree, root = place.tree, place.root
        made = place.keep(tree.create(root, b"file", 0o664, UID, GID))
        assert owner(made) == (UID, GID, 0o664)
        assert stat.S_ISREG(made.st.st_mode)
        assert owner(place.keep(tree.mkdir(root, b"dir", 0o1777, UID, GID))) == (UID, GID, 0o1777)
        fifo = place.keep(tree.mknod(root, b"fifo", stat.S_IFIFO | 0o622, UID, GID))
        assert stat.S_ISFIFO(fifo.st.st_mode)
        assert owner(fifo) == (UID, GID, 0o622)
        link = place.keep(tree.symlink(root, b"link", b"/nowhere\xff", UID, GID))
        assert owner(link)[:2] == (UID, GID)
        assert tree.readlink(link.fd) == b"/nowhere\xff"
    finally:
        os.umask(old_mask)


def test_devices_are_refused(place: Place) -> None:
    for kind in (stat.S_IFBLK, stat.S_IFCHR):
        with pytest.raises(PermissionError):
            place.keep(place.tree.mknod(place.root, b"sda", kind | 0o666, 0, 0))
    assert place.tree.names(place.root) == []


def test_in_a_setgid_directory_the_group_is_the_directorys(place: Place) -> None:
    shared = place.origin / "shared"
    shared.mkdir()
    os.chown(shared, 0, 777)
    shared.chmod(0o2775)
    tree, fd = place.tree, place.find("shared").fd
    assert owner(place.keep(tree.create(fd, b"file", 0o664, UID, GID))) == (UID, 777, 0o664)
    assert owner(place.keep(tree.mkdir(fd, b"dir", 0o755, UID, GID))) == (UID, 777, 0o2755)
    assert owner(place.keep(tree.symlink(fd, b"link", b"x", UID, GID)))[:2] == (UID, 777)


def test_attributes_are_changed_by_descriptor(place: Place) -> None:
    tree = place.tree
    found = place.keep(tree.create(place.root, b"file", 0o600, 0, 0))
    (place.origin / "file").rename(place.origin / "renamed")
    (place.origin / "file").touch()
    path = place.origin / "renamed"
    tree.chmod(found.fd, 0o640)
    tree.chown(found.fd, UID, -1)
    tree.chown(found.fd, -1, GID)
    tree.set_times(found.fd, 111, 222)
    tree.setxattr(found.fd, b"user.note", b"\0\xff")
    assert tree.getxattr(found.fd, b"user.note") == os.getxattr(path, "user.note") == b"\0\xff"
    assert b"user.note" in tree.listxattr(found.fd)
    tree.removexattr(found.fd, b"user.note")
    with pytest.raises(OSError) as caught:
        tree.getxattr(found.fd, b"user.note")
    assert caught.value.errno == errno.ENODATA
    st = path.stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (UID, GID, 0o640)
    assert (st.st_atime_ns, st.st_mtime_ns) == (111, 222)
    assert tree.statvfs().f_bsize > 0


def test_a_links_own_owner_changes_and_not_its_targets(place: Place) -> None:
    (place.origin / "link").symlink_to(place.outside / "secret")
    place.tree.chown(place.find("link").fd, UID, GID)
    assert (place.origin / "link").lstat().st_uid == UID
    assert (place.outside / "secret").stat().st_uid == 0


# -- filesystems inside the origin ----------------------------------------------------------------


def test_a_tmpfs_inside_the_origin_has_identities_of_its_own(
    place: Place, tmpfs: Callable[[Path], None]
) -> None:
    for name in ("one", "two"):
        tmpfs(place.origin / name)
        (place.origin / name / "image").write_bytes(b"")
    inner = [place.find(name, "image") for name in ("one", "two")]
    (place.origin / "image").write_bytes(b"")
    outer = place.find("image")
    assert inner[0].st.st_ino == inner[1].st.st_ino, "else this test shows nothing"
    assert len({found.identity for found in (*inner, outer)}) == 3
    assert len({found.identity[:8] for found in (*inner, outer)}) == 3
    assert all(found.local for found in inner)


def test_two_filesystems_with_one_id_inside_the_origin_are_refused(
    place: Place, loop_device: Callable[[int], Path], tmp_path: Path
) -> None:
    first, second = loop_device(1 << 24), loop_device(1 << 24)
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    mounted: list[Path] = []
    try:
        for device, name in ((first, "one"), (second, "two")):
            subprocess.run(["mkfs.ext4", "-q", "-F", "-U", uuid, device], check=True)
            (place.origin / name).mkdir()
            subprocess.run(["mount", device, place.origin / name], check=True)
            mounted.append(place.origin / name)
        place.find("one")
        with pytest.raises(OriginError, match="the same id") as caught:
            place.find("two")
        assert caught.value.errno == errno.EXDEV
        assert place.tree.find_all(place.root, [b"two"]) == []
    finally:
        while place.fds:
            os.close(place.fds.pop())
        for path in mounted:
            subprocess.run(["umount", "-l", path], check=True)


def test_identities_are_the_same_for_the_next_daemon(place: Place) -> None:
    (place.origin / "image").write_bytes(b"")
    found = place.find("image")
    with contextlib.closing(Tree(place.origin)) as other:
        again = place.keep(other.resolve(b"image"))
    assert again.identity == found.identity


def test_a_local_origin_has_this_hosts_clock_and_can_be_written(place: Place) -> None:
    place.tree.measure_clock()
    assert abs(place.tree.now_ns() - time.time_ns()) < 1e9
    assert not place.tree.read_only


def test_a_file_servers_clock_is_known_although_ours_is_set(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host was an hour ahead when it booted, and mounted before it asked for the time."""
    monkeypatch.setattr(tree, "_filesystem_type", lambda device: "nfs4")
    right, ahead = time.time_ns, [3600 * 10**9]
    monkeypatch.setattr(tree.time, "time_ns", lambda: right() + ahead[0])
    place.tree.measure_clock()
    assert abs(place.tree.now_ns() - right()) < 1e9
    ahead[0] = 0
    assert abs(place.tree.now_ns() - right()) < 1e9
