"""Names through a real mount: lookups, creation, links, renames, removal and listings."""

import ctypes
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.mount.modes import both_modes
from tests.support.daemon import BLOCK, old
from tests.support.direct import opened, read_direct, write_direct
from tests.support.others import as_user
from tests.support.place import Place
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2


def _renameat2(old: Path, new: Path, flags: int) -> None:
    names = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new))
    if _LIBC.renameat2(*names, ctypes.c_uint(flags)) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def _image(place: Place, name: str, number: int, blocks: int = 2) -> bytes:
    """A stamped image, written behind the mount."""
    data = stamped(number, 0, blocks * BLOCK, 1)
    (place.origin / name).write_bytes(data)
    return data


def _known(place: Place) -> list[dict[str, Any]]:
    """Every image of this directory that the cache knows."""
    images = place.mount.status()["images"]
    return [image for image in images if image["path"].startswith(f"{place.name}/")]


def test_lookup_finds_what_is_there_and_nothing_else(place: Place) -> None:
    (place.origin / "there").write_bytes(b"x")
    assert (place.cached / "there").exists()
    with pytest.raises(FileNotFoundError):
        (place.cached / "missing").stat()
    with pytest.raises(NotADirectoryError):
        (place.cached / "there" / "below").stat()
    with pytest.raises(OSError) as caught:
        (place.cached / ("n" * 300)).stat()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_name_that_was_missing_is_seen_as_soon_as_it_is_there(place: Place) -> None:
    assert not (place.cached / "late").exists()
    (place.origin / "late").write_bytes(b"x")
    assert (place.cached / "late").read_bytes() == b"x"


def test_a_new_file_has_its_creators_owner_and_mode(place: Place) -> None:
    place.origin.chmod(0o777)
    code = "os.close(os.open('new', os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666))"
    as_user(code, place.cached, uid=1234, gid=2345, umask=0o027)
    for side in (place.cached, place.origin):
        st = (side / "new").stat()
        assert (st.st_uid, st.st_gid) == (1234, 2345)
        assert stat.S_IMODE(st.st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o200, 0o755])
def test_a_file_is_created_with_any_mode_and_still_written(place: Place, mode: int) -> None:
    place.origin.chmod(0o777)
    code = (
        f"f = os.open('new', os.O_CREAT | os.O_RDWR, {mode}); os.write(f, b'data'); "
        "print(os.pread(f, 10, 0))"
    )
    assert as_user(code, place.cached, uid=1234, gid=2345, umask=0) == "b'data'"
    assert stat.S_IMODE((place.origin / "new").stat().st_mode) == mode
    assert (place.origin / "new").read_bytes() == b"data"


def test_what_is_made_in_a_setgid_directory_has_its_group(place: Place) -> None:
    place.origin.chmod(0o2777)
    os.chown(place.origin, 0, 777)
    place.origin.chmod(0o2777)
    code = "os.close(os.open('file', os.O_CREAT | os.O_WRONLY, 0o644)); os.mkdir('dir', 0o755)"
    as_user(code, place.cached, uid=1234, gid=2345)
    file, directory = (place.origin / "file").stat(), (place.origin / "dir").stat()
    assert (file.st_uid, file.st_gid) == (1234, 777)
    assert (directory.st_uid, directory.st_gid) == (1234, 777)
    assert directory.st_mode & stat.S_ISGID
    assert not file.st_mode & stat.S_ISGID


def test_permissions_are_checked_for_the_caller(place: Place) -> None:
    _image(place, "private", 1)
    (place.origin / "private").chmod(0o600)
    place.origin.chmod(0o755)
    code = """
for act in (lambda: open('private'), lambda: open('new', 'w'), lambda: os.unlink('private'),
            lambda: os.chmod('private', 0o777), lambda: os.rename('private', 'other')):
    try:
        act()
    except PermissionError:
        print('refused', end=' ')
"""
    said = as_user(code, place.cached, uid=1234, gid=2345)
    assert said.split() == ["refused"] * 5


def test_exclusive_creation_of_a_name_that_exists_fails(place: Place) -> None:
    (place.origin / "there").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        os.open(place.cached / "there", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert (place.cached / "there").read_bytes() == b"old"


def test_rename_keeps_the_blocks_of_an_image(place: Place) -> None:
    data = _image(place, "old", 1)
    old(place.origin / "old")
    with opened(place.cached / "old", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
    (place.cached / "old").rename(place.cached / "new")
    assert not (place.cached / "old").exists()
    with opened(place.cached / "new", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == data
    assert (place.origin / "new").read_bytes() == data
    assert place.image("new")["origin_read_bytes"] == len(data)


@both_modes
def test_rename_over_an_existing_image_shows_the_new_one_only(place: Place) -> None:
    first, second = _image(place, "first", 1), _image(place, "second", 2)
    with opened(place.cached / "second", os.O_RDONLY) as held:
        assert os.pread(held, len(second), 0) == second
        assert (place.cached / "first").read_bytes() == first
        (place.cached / "first").rename(place.cached / "second")
        assert (place.cached / "second").read_bytes() == first
        # The replaced image lives on for whoever has it open.
        assert os.pread(held, len(second), 0) == second
    assert sorted(os.listdir(place.cached)) == ["second"]
    assert (place.origin / "second").read_bytes() == first


def test_rename_without_replacing_refuses_and_changes_nothing(place: Place) -> None:
    first, second = _image(place, "first", 1), _image(place, "second", 2)
    with pytest.raises(OSError) as caught:
        _renameat2(place.cached / "first", place.cached / "second", _NOREPLACE)
    assert caught.value.errno == errno.EEXIST
    assert (place.cached / "first").read_bytes() == first
    assert (place.cached / "second").read_bytes() == second
    _renameat2(place.cached / "first", place.cached / "third", _NOREPLACE)
    assert (place.cached / "third").read_bytes() == first
    assert sorted(os.listdir(place.origin)) == ["second", "third"]


@both_modes
def test_exchange_swaps_two_images_and_their_blocks_follow(place: Place) -> None:
    first, second = _image(place, "first", 1), _image(place, "second", 2)
    with (
        opened(place.cached / "first", os.O_RDWR) as one,
        opened(place.cached / "second", os.O_RDWR) as two,
    ):
        assert os.pread(one, len(first), 0) == first
        assert os.pread(two, len(second), 0) == second
        _renameat2(place.cached / "first", place.cached / "second", _EXCHANGE)
        assert (place.cached / "first").read_bytes() == second
        assert (place.cached / "second").read_bytes() == first
        assert os.pread(one, len(first), 0) == first
    assert (place.origin / "first").read_bytes() == second


@both_modes
def test_directories_are_renamed_with_what_they_hold(place: Place) -> None:
    (place.cached / "a" / "b").mkdir(parents=True)
    (place.cached / "a" / "b" / "image").write_bytes(stamped(1, 0, BLOCK, 1))
    (place.cached / "a").rename(place.cached / "c")
    data = (place.cached / "c" / "b" / "image").read_bytes()
    assert set(check_stamps(data, 1, 0)) == {1}
    with pytest.raises(OSError) as caught:
        (place.cached / "c").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    with pytest.raises(OSError) as caught:
        (place.cached / "c").rename(place.cached / "c" / "b" / "inside")
    assert caught.value.errno == errno.EINVAL


@both_modes
def test_hard_links_share_their_blocks(place: Place) -> None:
    data = _image(place, "one", 1)
    os.link(place.cached / "one", place.cached / "two")
    st = (place.cached / "one").stat()
    assert st.st_nlink == 2
    assert st.st_ino == (place.cached / "two").stat().st_ino
    with (
        opened(place.cached / "one", os.O_RDWR | os.O_DIRECT) as one,
        opened(place.cached / "two", os.O_RDWR | os.O_DIRECT) as two,
    ):
        assert read_direct(one, 0, len(data)) == data
        (before,) = _known(place)
        assert before["origin_reads"] >= 1
        assert read_direct(two, 0, len(data)) == data
        (after,) = _known(place)
        assert after["origin_reads"] == before["origin_reads"]
        newer = stamped(1, BLOCK, BLOCK, 2)
        assert write_direct(two, BLOCK, newer) == BLOCK
        assert read_direct(one, BLOCK, BLOCK) == newer
    data = data[:BLOCK] + newer
    (place.cached / "one").unlink()
    assert (place.cached / "two").stat().st_nlink == 1
    assert (place.cached / "two").read_bytes() == data


def test_symbolic_links_are_made_read_and_followed(place: Place) -> None:
    data = _image(place, "image", 1)
    (place.cached / "link").symlink_to("image")
    assert os.readlink(place.cached / "link") == "image"
    assert (place.cached / "link").is_symlink()
    assert (place.cached / "link").read_bytes() == data
    assert os.readlink(place.origin / "link") == "image"
    assert (place.cached / "link").lstat().st_size == len("image")
    (place.cached / "dangling").symlink_to("\udcff/nowhere")
    assert os.readlink(os.fsencode(place.cached / "dangling")) == b"\xff/nowhere"
    with pytest.raises(FileNotFoundError):
        (place.cached / "dangling").read_bytes()
    os.chown(place.cached / "link", 12, 34, follow_symlinks=False)
    st = (place.origin / "link").lstat()
    assert (st.st_uid, st.st_gid) == (12, 34)


@both_modes
def test_an_unlinked_image_that_is_open_keeps_working(place: Place) -> None:
    data = _image(place, "image", 1, blocks=4)
    with opened(place.cached / "image", os.O_RDWR) as fd:
        assert os.pread(fd, len(data), 0) == data
        (place.cached / "image").unlink()
        assert not (place.cached / "image").exists()
        assert not (place.origin / "image").exists()
        assert os.pread(fd, len(data), 0) == data
        newer = stamped(1, BLOCK, BLOCK, 2)
        assert os.pwrite(fd, newer, BLOCK) == BLOCK
        os.fsync(fd)
        assert os.pread(fd, BLOCK, BLOCK) == newer
        os.ftruncate(fd, BLOCK)
        os.ftruncate(fd, 2 * BLOCK)
        assert os.pread(fd, BLOCK, BLOCK) == bytes(BLOCK)
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_size) == (0, 2 * BLOCK)
        os.fchmod(fd, 0o640)
        assert os.fstat(fd).st_mode & 0o777 == 0o640


@both_modes
def test_an_unlinked_image_gives_its_blocks_back(place: Place) -> None:
    data = _image(place, "image", 1, blocks=4)
    used = place.mount.status()["cache"]["slots_used"]
    assert (place.cached / "image").read_bytes() == data
    assert place.mount.status()["cache"]["slots_used"] == used + 4
    with opened(place.cached / "image", os.O_RDONLY) as fd:
        (place.cached / "image").unlink()
        assert place.mount.status()["cache"]["slots_used"] == used
        assert os.pread(fd, len(data), 0) == data
        assert place.mount.status()["cache"]["slots_used"] == used


@both_modes
def test_a_file_made_again_under_an_old_name_shows_nothing_of_the_old_one(place: Place) -> None:
    for version in range(1, 6):
        data = stamped(1, 0, 2 * BLOCK, version)
        (place.cached / "image").write_bytes(data)
        assert (place.cached / "image").read_bytes() == data
        (place.cached / "image").unlink()
    (place.cached / "image").touch()
    os.truncate(place.cached / "image", BLOCK)
    assert (place.cached / "image").read_bytes() == bytes(BLOCK)


def test_directories_are_made_listed_and_removed(place: Place) -> None:
    (place.cached / "dir").mkdir(0o750)
    assert stat.S_IMODE((place.origin / "dir").stat().st_mode) == 0o750
    (place.cached / "dir" / "file").touch()
    with pytest.raises(OSError) as caught:
        (place.cached / "dir").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    (place.cached / "dir" / "file").unlink()
    (place.cached / "dir").rmdir()
    assert os.listdir(place.cached) == []
    with pytest.raises(IsADirectoryError):
        (place.cached / "dir2").mkdir()
        (place.cached / "dir2").unlink()
    with opened(place.cached, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_LIBC.opendir.restype = ctypes.c_void_p
_LIBC.opendir.argtypes = [ctypes.c_char_p]
_LIBC.readdir.restype = ctypes.POINTER(_Dirent)
_LIBC.readdir.argtypes = [ctypes.c_void_p]
_LIBC.telldir.restype = ctypes.c_long
_LIBC.telldir.argtypes = [ctypes.c_void_p]
_LIBC.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_LIBC.seekdir.restype = None
_LIBC.rewinddir.argtypes = [ctypes.c_void_p]
_LIBC.rewinddir.restype = None
_LIBC.closedir.argtypes = [ctypes.c_void_p]


def _rest(directory: int) -> list[tuple[int, bytes, int]]:
    """(place before it, name, type) of every entry from here on."""
    entries: list[tuple[int, bytes, int]] = []
    while True:
        at = _LIBC.telldir(directory)
        entry = _LIBC.readdir(directory)
        if not entry:
            return entries
        entries.append((at, bytes(entry.contents.d_name), int(entry.contents.d_type)))


def test_a_listing_of_1000_entries_is_whole_and_can_be_entered_anywhere(place: Place) -> None:
    names = {f"image-{number:04}".encode() for number in range(1000)}
    for name in names:
        (place.origin / os.fsdecode(name)).touch()
    directory = _LIBC.opendir(os.fsencode(place.cached))
    assert directory
    try:
        entries = _rest(directory)
        found = [name for _, name, _ in entries]
        assert sorted(found) == sorted([b".", b"..", *names])
        assert {kind for _, name, kind in entries if name in names} == {8}
        assert {kind for _, name, kind in entries if name not in names} == {4}
        for start in (0, 1, 2, 3, 63, 64, 65, 66, 500, 999, 1001):
            _LIBC.seekdir(directory, entries[start][0])
            assert [name for _, name, _ in _rest(directory)] == found[start:]
        (place.origin / "image-0500").unlink()
        _LIBC.rewinddir(directory)
        assert b"image-0500" not in [name for _, name, _ in _rest(directory)]
    finally:
        _LIBC.closedir(directory)
    assert len(os.listdir(place.cached)) == 999
    with os.scandir(place.cached) as scanned:
        assert all(entry.is_file() for entry in scanned)


def test_a_listing_survives_removal_while_it_is_read(place: Place) -> None:
    for number in range(300):
        (place.origin / f"f{number:03}").touch()
    with os.scandir(place.cached) as scanned:
        for entry in scanned:
            os.unlink(entry.path)
    assert os.listdir(place.origin) == []


def test_dot_dot_leads_back_and_never_out_of_the_mount(place: Place) -> None:
    (place.cached / "sub").mkdir()
    inside = os.stat(f"{place.cached}/sub/..")
    assert inside.st_ino == place.cached.stat().st_ino
    assert os.stat(f"{place.cached}/.").st_ino == place.cached.stat().st_ino
    top = os.stat(place.mount.mountpoint)
    assert stat.S_ISDIR(top.st_mode)
    names = {entry.name for entry in os.scandir(place.mount.mountpoint)}
    assert place.name in names


def test_names_that_are_not_utf8_work(place: Place) -> None:
    name = b"caf\xe9-\xff\xfe-\n-image"
    path = os.fsencode(place.cached) + b"/" + name
    data = stamped(1, 0, BLOCK, 1)
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        assert os.write(fd, data) == BLOCK
    assert os.listdir(os.fsencode(place.cached)) == [name]
    assert os.listdir(os.fsencode(place.origin)) == [name]
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, BLOCK, 0) == data
    os.rename(path, path + b"\x80")
    assert os.listdir(os.fsencode(place.origin)) == [name + b"\x80"]
    assert len(_known(place)) == 1
    os.unlink(path + b"\x80")


def test_fifos_and_sockets_can_be_made_but_devices_cannot(place: Place) -> None:
    os.mkfifo(place.cached / "fifo", 0o640)
    assert stat.S_ISFIFO((place.origin / "fifo").stat().st_mode)
    with opened(place.cached, os.O_RDONLY | os.O_DIRECTORY) as fd:
        with socket.socket(socket.AF_UNIX) as listener:  # by descriptor: the path is too long
            listener.bind(f"/proc/self/fd/{fd}/socket")
        assert stat.S_ISSOCK((place.origin / "socket").stat().st_mode)
    with pytest.raises(PermissionError):
        os.mknod(place.cached / "device", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    assert sorted(os.listdir(place.origin)) == ["fifo", "socket"]
