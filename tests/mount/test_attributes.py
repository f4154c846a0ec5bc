"""Attributes through a real mount: sizes, times, blocks, owners, modes, xattrs and space."""

import errno
import os
import stat
import time
from contextlib import ExitStack

import pytest

from tests.e2e.helpers import wait_for
from tests.mount.modes import both_modes, home
from tests.support.daemon import BLOCK, old
from tests.support.direct import opened, read_direct, write_direct
from tests.support.others import as_user
from tests.support.place import Place
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

_TOLD = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize",
         "st_atime_ns", "st_mtime_ns", "st_ctime_ns")  # fmt: skip


def _told(st: os.stat_result) -> dict[str, int]:
    return {name: getattr(st, name) for name in _TOLD}


def _image(place: Place, name: str, number: int, blocks: int = 2) -> bytes:
    data = stamped(number, 0, blocks * BLOCK, 1)
    (place.origin / name).write_bytes(data)
    return data


def test_stat_and_fstat_tell_the_origins_truth(place: Place) -> None:
    _image(place, "image", 1)
    os.truncate(place.origin / "image", 5 * BLOCK + 17)  # a hole: blocks differ from size
    (place.origin / "dir").mkdir()
    (place.origin / "link").symlink_to("image")
    for name in ("image", "dir", "link"):
        assert _told((place.cached / name).lstat()) == _told((place.origin / name).lstat())
    with opened(place.cached / "image", os.O_RDONLY) as fd:
        assert _told(os.fstat(fd)) == _told((place.origin / "image").stat())


@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_size_times_and_blocks_are_true_after_every_write(place: Place, direct: int) -> None:
    """But for the time of modification while somebody writes through the kernel's pages."""
    (place.cached / "image").touch()
    opening = (place.cached / "image").stat().st_mtime_ns
    with opened(place.cached / "image", os.O_RDWR | direct) as fd:
        for blocks in range(1, 5):
            before = time.time_ns() - 50_000_000
            assert write_direct(fd, (2 * blocks - 1) * BLOCK, bytes(BLOCK)) == BLOCK
            os.fsync(fd)
            st, true = _told(os.fstat(fd)), _told((place.origin / "image").stat())
            assert st["st_size"] == 2 * blocks * BLOCK
            assert true["st_mtime_ns"] >= before
            assert st == true | ({} if direct else {"st_mtime_ns": opening})
    wait_for(
        lambda: (place.cached / "image").stat().st_mtime_ns == true["st_mtime_ns"],
        "the time to be told",
    )


def test_times_are_set_to_the_nanosecond(place: Place) -> None:
    data = _image(place, "image", 1)
    times = (1_234_567_890_123_456_789, 1_345_678_901_234_567_891)
    os.utime(place.cached / "image", ns=times)
    for side in (place.cached, place.origin):
        st = (side / "image").stat()
        assert (st.st_atime_ns, st.st_mtime_ns) == times
    with opened(place.cached / "image", os.O_RDWR) as fd:
        os.utime(fd, ns=(1, 2))
        assert os.fstat(fd).st_mtime_ns == 2
        os.utime(fd)
        assert abs(os.fstat(fd).st_mtime - time.time()) < 5
    assert (place.cached / "image").read_bytes() == data


def test_modes_and_owners_are_changed(place: Place) -> None:
    _image(place, "image", 1)
    path = place.cached / "image"
    path.chmod(0o4751)
    assert stat.S_IMODE((place.origin / "image").stat().st_mode) == 0o4751
    os.chown(path, 1234, 2345)
    st = (place.origin / "image").stat()
    assert (st.st_uid, st.st_gid) == (1234, 2345)
    assert not st.st_mode & stat.S_ISUID
    os.chown(path, -1, 3456)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 3456)
    os.chown(path, 4321, -1)
    assert (path.stat().st_uid, path.stat().st_gid) == (4321, 3456)
    assert _told(path.stat()) == _told((place.origin / "image").stat())


def test_a_write_by_another_user_takes_the_setuid_bit_away(place: Place) -> None:
    _image(place, "image", 1)
    (place.origin / "image").chmod(0o4777)
    as_user(
        "f = os.open('image', os.O_WRONLY); os.write(f, b'x')", place.cached, uid=1234, gid=1234
    )
    assert not (place.origin / "image").stat().st_mode & stat.S_ISUID


@pytest.mark.parametrize("mode", [0o2771, 0o6777, 0o2767])
def test_what_can_be_written_to_has_nobodys_privileges(place: Place, mode: int) -> None:
    """Before each write the kernel would ask for them otherwise. Set-group-ID without execution is
    another thing, and stays."""
    _image(place, "image", 1)
    left = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))

    def now() -> tuple[int, int]:
        sides = (place.origin / "image", place.cached / "image")
        first, second = (stat.S_IMODE(side.stat().st_mode) for side in sides)
        return first, second

    (place.origin / "image").chmod(mode)
    with opened(place.cached / "image", os.O_RDONLY):
        assert now()[0] == mode
    with opened(place.cached / "image", os.O_RDWR) as fd:
        time.sleep(1.1)  # what the kernel remembers
        assert now() == (left, left)
        os.fchmod(fd, mode)
        assert now() == (left, left)

    def set_again() -> bool:
        (place.cached / "image").chmod(mode)
        return now() == (mode, mode)

    wait_for(set_again, "the kernel to tell that nobody has it open for writing")
    os.truncate(place.cached / "image", 10)
    assert now()[0] == left
    with opened(place.cached / "new", os.O_RDWR | os.O_CREAT, mode):
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((place.origin / "new").stat().st_mode) == left & ~umask


@pytest.mark.parametrize("change", ["chown", "chmod", "xattr", "link", "rename"])
def test_our_own_changes_of_an_image_keep_its_cache_warm(place: Place, change: str) -> None:
    """As libvirt does: the image changes its owner just before a guest opens it."""
    data = _image(place, "image", 1)
    old(place.origin / "image")
    path = place.cached / "image"
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
    before = (place.origin / "image").stat().st_ctime_ns
    if change == "chown":
        os.chown(path, 64055, 64055)
    elif change == "chmod":
        path.chmod(0o660)
    elif change == "xattr":
        os.setxattr(path, "user.test", b"x")
    elif change == "link":
        os.link(path, place.cached / "second")
    else:
        path.rename(place.cached / "renamed")
        path = place.cached / "renamed"
    assert (place.origin / path.name).stat().st_ctime_ns != before
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
        (image,) = [
            image
            for image in place.mount.status()["images"]
            if image["path"].startswith(f"{place.name}/")
        ]
        assert image["origin_read_bytes"] == len(data)


@both_modes
@pytest.mark.parametrize("written", [False, True])
def test_a_guest_of_libvirt_finds_its_cache_warm_after_every_start_and_stop(
    place: Place, written: bool
) -> None:
    """libvirt changes attributes and owner while it has the image open for writing, to lock it;
    at a guest's end that is just after QEMU's close, which the kernel tells of later."""
    data = _image(place, "image", 1)
    old(place.origin / "image")
    path = place.cached / "image"
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
    for owner in (64055, 0):
        with opened(path, os.O_RDWR):
            os.setxattr(path, "user.libvirt.security.ref", b"%d" % owner)
            os.chown(path, owner, owner)
            os.removexattr(path, "user.libvirt.security.ref")
        qemu = os.open(path, os.O_RDWR | os.O_DIRECT)
        later = os.dup(qemu)
        try:
            assert read_direct(qemu, 0, len(data)) == data
            if written and owner:
                write_direct(qemu, 4096, data[4096:8192])
                os.fsync(qemu)
        finally:
            os.close(qemu)  # a close(2), and no end of the handle: that is still to come
            if owner:
                os.chown(path, 1, 1)
            os.close(later)
        if written and owner:
            home(place, "image")  # else the cleaner writes to the origin at some moment
            time.sleep(2.2)  # what was written less than 2 s ago is not trusted at an open
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
    image = place.image("image")
    assert image["origin_read_bytes"] == len(data)
    name = f"{place.name}/image"
    assert not [line for line in place.mount.log().splitlines() if "chang" in line and name in line]


def test_extended_attributes_are_set_listed_read_and_removed(place: Place) -> None:
    _image(place, "image", 1)
    path = place.cached / "image"
    assert os.listxattr(path) == []
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.missing")
    assert caught.value.errno == errno.ENODATA
    os.setxattr(path, "user.one", b"1\0\xff")
    os.setxattr(path, "user.two", b"x" * 1000)
    assert sorted(os.listxattr(path)) == ["user.one", "user.two"]
    assert os.getxattr(path, "user.one") == b"1\0\xff"
    assert os.getxattr(place.origin / "image", "user.two") == b"x" * 1000
    os.removexattr(path, "user.one")
    assert os.listxattr(place.origin / "image") == ["user.two"]
    with pytest.raises(OSError) as caught:
        os.removexattr(path, "user.one")
    assert caught.value.errno == errno.ENODATA
    (place.cached / "link").symlink_to("image")
    assert os.listxattr(place.cached / "link", follow_symlinks=False) == []
    os.setxattr(place.cached, "user.directory", b"d")
    assert os.getxattr(place.origin, "user.directory") == b"d"


@pytest.mark.parametrize("name", ["..", ".", "directory", "image"])
def test_statfs_tells_the_origins_space(place: Place, name: str) -> None:
    (place.origin / "directory").mkdir()
    (place.origin / "image").touch()
    (place.cached / name).stat()  # what the lane knows of then
    ours, theirs = os.statvfs(place.cached / name), os.statvfs(place.origin)
    same = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
    assert [getattr(ours, each) for each in same] == [getattr(theirs, each) for each in same]
    assert abs(ours.f_bavail - theirs.f_bavail) * theirs.f_frsize < 1 << 30


@pytest.mark.skipif("config.getoption('--lane') == 'off'", reason="the lane answers")
def test_directories_and_space_need_no_python(place: Place) -> None:
    """Also while names come and go."""

    def passed() -> int:
        lane = place.mount.status()["lane"]
        return int(lane["passed_to_engine"] + lane["passed_to_pyfuse3"])

    root = place.mount.mountpoint
    for path in (root, place.cached):
        path.stat()
    before = passed()
    for number in range(40):
        (place.origin / f"new-{number}").touch()
        os.statvfs(root)
        if not number % 10:
            time.sleep(1.1)
            assert _told(place.cached.stat()) == _told(place.origin.stat())
    assert passed() - before < 10


def test_a_rename_behind_the_mount_is_seen_within_a_second(place: Place) -> None:
    first, second = _image(place, "a", 1), _image(place, "b", 2)
    assert (place.cached / "a").read_bytes() == first
    assert (place.cached / "b").read_bytes() == second
    (place.origin / "b").rename(place.origin / "a")
    time.sleep(1.2)
    assert not (place.cached / "b").exists()
    assert (place.cached / "a").read_bytes() == second
    assert (place.cached / "a").stat().st_ino != 0
    assert os.listdir(place.cached) == ["a"]


def test_a_change_of_attributes_behind_the_mount_is_seen_within_a_second(place: Place) -> None:
    _image(place, "image", 1)
    with opened(place.cached / "image", os.O_RDONLY) as fd:
        os.fstat(fd)
        os.truncate(place.origin / "image", 7 * BLOCK)
        (place.origin / "image").chmod(0o600)
        time.sleep(1.2)
        st = os.fstat(fd)
        assert (st.st_size, stat.S_IMODE(st.st_mode)) == (7 * BLOCK, 0o600)


@pytest.mark.skipif("config.getoption('--lane') == 'off'", reason="the lane answers")
def test_attributes_that_stay_need_no_python(place: Place) -> None:
    """The kernel asks once a second for every image in use."""
    names = [f"image-{number}" for number in range(40)]
    for name in names:
        (place.origin / name).write_bytes(bytes(100))

    def passed() -> int:
        return int(place.mount.status()["lane"]["passed_to_engine"])

    with ExitStack() as stack:
        fds = [stack.enter_context(opened(place.cached / name, os.O_RDWR)) for name in names]
        time.sleep(1.2)
        earlier, before = passed(), passed()
        own = before - earlier  # closes: a process is made to ask, which begins with all of these
        for name, fd in zip(names, fds, strict=True):
            assert _told(os.fstat(fd)) == _told((place.origin / name).stat())
        before, earlier = passed(), before
        assert before - earlier - own < len(names) / 2
        for name in names:
            (place.origin / name).chmod(0o640)
        time.sleep(1.2)
        for name, fd in zip(names, fds, strict=True):
            assert _told(os.fstat(fd)) == _told((place.origin / name).stat())
        assert passed() - before - own >= len(names)
