"""What others do to the origin behind a real mount's back (P3), and what the kernel keeps."""

import itertools
import mmap
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.e2e.helpers import wait_for
from tests.support.daemon import BLOCK, Mount, old
from tests.support.direct import opened, read_direct
from tests.support.place import Place
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

_BLOCKS = 4
_SIZE = _BLOCKS * BLOCK
_TOLD_FOR = 1.2
"""Seconds after which the kernel asks for attributes again."""


def _image(place: Place, name: str, number: int) -> bytes:
    data = stamped(number, 0, _SIZE, 1)
    (place.origin / name).write_bytes(data)
    return data


def _change(path: Path, how: str, number: int, version: int) -> bytes:
    """Writes a new version behind the mount; returns what the file now holds."""
    before = path.stat()
    size = _SIZE + BLOCK if how == "longer" else _SIZE - BLOCK if how == "shorter" else _SIZE
    data = stamped(number, 0, size, version)
    with opened(path, os.O_WRONLY) as fd:
        os.ftruncate(fd, size)
        os.pwrite(fd, data, 0)
    if how == "same size and times":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return data


# -- P3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True], ids=["young", "trusted"])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_migrations_destination_sees_what_the_source_wrote(
    place: Place, direct: int, trusted: bool
) -> None:
    """Opened read-only, read, changed on the origin, opened read-write, read through both."""
    changes = ("same size", "same size and times", "longer", "shorter")
    contents = {how: _image(place, how, number) for number, how in enumerate(changes)}
    if trusted:
        old(place.origin / changes[-1])  # then the others are old enough, too
    for number, how in enumerate(changes):
        path, behind = place.cached / how, place.origin / how
        with opened(path, os.O_RDONLY | direct) as first:
            for _ in range(2):
                assert read_direct(first, 0, _SIZE) == contents[how]
            newer = _change(behind, how, number, 2)
            with opened(path, os.O_RDWR | direct) as second:
                assert read_direct(second, 0, 2 * _SIZE) == newer, how
                assert read_direct(first, 0, 2 * _SIZE) == newer, how
                assert os.fstat(first).st_size == os.fstat(second).st_size == len(newer)
                with mmap.mmap(first, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
                    assert mapped[:] == newer


@contextmanager
def _mounted(path: Path, *what: object) -> Iterator[None]:
    """A filesystem inside the origin; gone at the end, as soon as nobody holds it."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", *map(str, what), path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("start", ["young", "trusted"])
def test_two_changes_with_one_change_time_are_both_seen(
    place: Place, direct: int, start: str
) -> None:
    """An open falls between two changes of one tick. ramfs: its change times are the ticks'."""
    together = 0
    with _mounted(place.origin / "coarse", "-t", "ramfs", "ramfs"):
        path, behind = place.cached / "coarse" / "image", place.origin / "coarse" / "image"
        behind.write_bytes(stamped(1, 0, BLOCK, 1))
        if start == "trusted":
            old(behind)
            assert path.read_bytes() == stamped(1, 0, BLOCK, 1)
        with opened(behind, os.O_RDWR) as fd:
            # 4 KiB only: open, read and both changes have to fit into one tick.
            for version in range(2, 200):
                before = os.fstat(fd).st_ctime_ns
                os.pwrite(fd, stamped(1, 0, 4096, version), 0)
                together += os.fstat(fd).st_ctime_ns == before
                with opened(path, os.O_RDONLY | direct) as reader:
                    assert set(check_stamps(read_direct(reader, 0, 4096), 1, 0)) == {version}
    if together == 0:
        pytest.skip("every change had a change time of its own here")


def test_a_file_replaced_behind_the_mount_is_another_image(place: Place) -> None:
    data = _image(place, "image", 1)
    with opened(place.cached / "image", os.O_RDONLY) as fd:
        assert os.pread(fd, _SIZE, 0) == data
        newer = stamped(2, 0, _SIZE, 1)
        (place.origin / "new").write_bytes(newer)
        (place.origin / "new").rename(place.origin / "image")
        time.sleep(1.1)
        assert (place.cached / "image").read_bytes() == newer
        assert os.pread(fd, _SIZE, 0) == data  # the old one, for whoever has it open


# -- the kernel's pages ------------------------------------------------------------------------


def test_after_an_evict_a_reader_with_an_open_file_sees_the_truth(place: Place) -> None:
    data = _image(place, "image", 1)
    with (
        opened(place.cached / "image", os.O_RDWR) as fd,
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
    ):
        assert os.pread(fd, _SIZE, 0) == data == mapped[:]
        place.evict("image")
        assert place.image("image")["cached_bytes"] == 0
        newer = _change(place.origin / "image", "same size and times", 1, 2)
        place.evict("image")
        assert os.pread(fd, _SIZE, 0) == newer
        assert mapped[:] == newer
        assert os.pwrite(fd, stamped(1, 0, BLOCK, 3), 0) == BLOCK
        assert (place.origin / "image").read_bytes()[:BLOCK] == stamped(1, 0, BLOCK, 3)
        assert place.image("image")["cached_bytes"] == 0


def test_a_buffered_reader_sees_a_truncate_through_another_handle(place: Place) -> None:
    data = _image(place, "image", 1)
    with opened(place.cached / "image", os.O_RDONLY) as reader:
        assert os.pread(reader, _SIZE, 0) == data
        os.truncate(place.cached / "image", BLOCK + 100)
        os.truncate(place.cached / "image", _SIZE)
        assert os.pread(reader, _SIZE, 0) == data[: BLOCK + 100] + bytes(_SIZE - BLOCK - 100)


def test_a_reader_with_an_open_file_sees_a_change_behind_the_mount_at_the_next_open(
    place: Place,
) -> None:
    data = _image(place, "image", 1)
    with (
        opened(place.cached / "image", os.O_RDONLY) as fd,
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
    ):
        assert os.pread(fd, _SIZE, 0) == data == mapped[:]
        newer = _change(place.origin / "image", "same size and times", 1, 2)
        with opened(place.cached / "image", os.O_RDONLY):
            pass
        assert os.pread(fd, _SIZE, 0) == newer
        assert mapped[:] == newer


def test_a_reader_is_told_of_a_change_beside_a_writer_who_wrote_nothing(place: Place) -> None:
    """While the writer has it open nobody looks; what the kernel was told then must not be told
    for ever."""
    data = _image(place, "image", 1)
    old(place.origin / "image")
    with opened(place.cached / "image", os.O_RDONLY | os.O_DIRECT) as reader:
        assert read_direct(reader, 0, _SIZE) == data
        with opened(place.cached / "image", os.O_RDWR | os.O_DIRECT):
            newer = _change(place.origin / "image", "same size", 1, 2)
            time.sleep(_TOLD_FOR)
            assert os.fstat(reader).st_mtime_ns == (place.origin / "image").stat().st_mtime_ns
        time.sleep(_TOLD_FOR)

        def seen() -> bool:
            os.fstat(reader)
            return read_direct(reader, 0, _SIZE) == newer

        wait_for(seen, "the change to be seen", 10)


# -- eviction ----------------------------------------------------------------------------------


def test_evicting_one_image_leaves_the_blocks_of_the_others(place: Place) -> None:
    contents = {name: _image(place, name, number) for number, name in enumerate("abc", 1)}
    old(place.origin / "c")  # then the others are old enough, too
    hits = {}
    for name, data in contents.items():
        assert (place.cached / name).read_bytes() == data
        hits[name] = place.image(name)["read_hit_bytes"]  # what was read ahead
    place.evict("b")
    for name, data in contents.items():
        with opened(place.cached / name, os.O_RDONLY | os.O_DIRECT) as fd:
            assert read_direct(fd, 0, _SIZE) == data
        image = place.image(name)
        # The counters of an evicted image begin anew.
        assert image["origin_read_bytes"] == _SIZE
        if name != "b":
            assert image["read_hit_bytes"] == hits[name] + _SIZE


# -- what must never be opened -----------------------------------------------------------------


def test_a_link_swapped_in_for_an_image_never_leads_out_of_the_origin(
    place: Place, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"SECRET" * 1000)
    good = b"GOOD" * 1500
    # Many names: the kernel remembers for a second what each of them was.
    names = [f"image-{number:03}" for number in range(200)]
    for name in names:
        (place.origin / name).write_bytes(good)
    stop = threading.Event()

    def swap() -> None:
        new = place.origin / "new"
        for name in itertools.cycle(names):
            if stop.is_set():
                return
            new.symlink_to(secret)
            new.rename(place.origin / name)
            new.write_bytes(good)
            new.rename(place.origin / name)

    swapper = threading.Thread(target=swap)
    swapper.start()
    read = 0
    try:
        deadline = time.monotonic() + 4
        for name in itertools.cycle(names):
            if time.monotonic() > deadline:
                break
            try:
                with opened(place.cached / name, os.O_RDONLY | os.O_NOFOLLOW) as fd:
                    got = os.pread(fd, 6000, 0)
            except OSError:
                continue  # it was a link just now
            assert got in (good, b""), got[:20]
            read += 1
    finally:
        stop.set()
        swapper.join()
    assert read > 100
    pid = place.mount.pid
    assert str(secret) not in {_target(link) for link in Path(f"/proc/{pid}/fd").iterdir()}


def _target(link: Path) -> str:
    """What a descriptor of another process leads to; empty if it is closed by now."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def test_fifos_sockets_and_devices_of_the_origin_are_never_opened_by_the_daemon(
    place: Place,
) -> None:
    os.mkfifo(place.origin / "fifo")
    os.mknod(place.origin / "device", stat.S_IFBLK | 0o600, os.makedev(240, 99))
    os.mknod(place.origin / "char", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    directory = os.open(place.origin, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{directory}/socket")
    finally:
        os.close(directory)
    names = ("fifo", "device", "char", "socket")
    for name in names:
        assert (place.cached / name).lstat().st_mode == (place.origin / name).lstat().st_mode
        assert (place.cached / name).lstat().st_rdev == (place.origin / name).lstat().st_rdev
    for name in ("device", "char", "socket"):
        with pytest.raises(OSError):
            os.open(place.cached / name, os.O_RDONLY)
    # A FIFO is the kernel's affair: a reader that does not wait gets one of the mount's own,
    # and nobody is behind it on the origin.
    with opened(place.cached / "fifo", os.O_RDONLY | os.O_NONBLOCK), pytest.raises(OSError):
        os.open(place.origin / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    assert sorted(os.listdir(place.cached)) == sorted(names)
    for name in names:
        os.unlink(place.cached / name)
    assert os.listdir(place.origin) == []


def test_a_regular_file_swapped_for_a_fifo_is_not_opened(place: Place) -> None:
    data = _image(place, "image", 1)
    path = place.cached / "image"
    assert path.read_bytes() == data
    (place.origin / "image").unlink()
    os.mkfifo(place.origin / "image")
    # The kernel may still believe in the old file for a second; that one is pinned.
    try:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                assert os.pread(fd, _SIZE, 0) in (data, b"")
    except FileNotFoundError:
        pass
    time.sleep(1.1)
    assert stat.S_ISFIFO(path.lstat().st_mode)


# -- other filesystems -------------------------------------------------------------------------


def _tmpfs(path: Path) -> AbstractContextManager[None]:
    return _mounted(path, "-t", "tmpfs", "tmpfs")


def test_a_filesystem_mounted_inside_the_origin_keeps_its_identity(place: Place) -> None:
    with _tmpfs(place.origin / "one"), _tmpfs(place.origin / "two"):
        numbers = {}
        for number, name in enumerate(("one", "two"), 1):
            file = place.origin / name / "image"
            file.write_bytes(stamped(number, 0, _SIZE, 1))
            numbers[name] = file.stat().st_ino
        assert numbers["one"] == numbers["two"], "the test wants equal inode numbers"
        for _ in range(2):
            for number, name in enumerate(("one", "two"), 1):
                data = (place.cached / name / "image").read_bytes()
                assert set(check_stamps(data, number, 0)) == {1}
        for number, name in enumerate(("one", "two"), 1):
            with opened(place.cached / name / "image", os.O_RDWR | os.O_DIRECT) as fd:
                assert os.pwrite(fd, mmap_of(stamped(number, BLOCK, BLOCK, 2)), BLOCK) == BLOCK
                check_stamps(read_direct(fd, 0, _SIZE), number, 0)
        inside = (place.cached / "one" / "image").stat()
        other = (place.cached / "two" / "image").stat()
        assert inside.st_ino != other.st_ino
        with pytest.raises(OSError):
            os.link(place.cached / "one" / "image", place.cached / "image")


def mmap_of(data: bytes) -> mmap.mmap:
    """The bytes in an aligned buffer."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


def _until_seen(path: Path, version: int) -> None:
    """Waits for an image of the filesystem mounted last; before it, the last one's is seen."""
    deadline = time.monotonic() + 5
    while True:
        data = path.read_bytes() if path.exists() else b""
        if data and set(check_stamps(data, 1, 0)) == {version}:
            return
        assert time.monotonic() < deadline, "what was mounted before is still seen"
        time.sleep(0.05)


def test_a_filesystem_mounted_after_another_inside_the_origin_is_not_taken_for_it(
    place: Place,
) -> None:
    """Its device number may be that of the one before."""
    for version in range(1, 4):
        with _tmpfs(place.origin / "inner"):
            (place.origin / "inner" / "image").write_bytes(stamped(1, 0, _SIZE, version))
            _until_seen(place.cached / "inner" / "image", version)


def test_a_filesystem_mounted_again_by_another_device_number_is_served_again(
    place: Place, tmp_path: Path
) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    for file in (disk, other):
        with open(file, "wb") as made:
            made.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", file], check=True)
    inner, outer = place.origin / "inner", tmp_path / "elsewhere"
    with _mounted(inner, "-o", "loop", disk):
        device = inner.stat().st_dev
        (inner / "image").write_bytes(stamped(1, 0, _SIZE, 1))
        _until_seen(place.cached / "inner" / "image", 1)
    time.sleep(1.1)
    (place.cached / "inner").stat()  # the kernel looks again and lets go of what was there
    deadline = time.monotonic() + 5
    while f"{os.major(device)}:{os.minor(device)} " in _losetup() and time.monotonic() < deadline:
        time.sleep(0.05)
    with _mounted(outer, "-o", "loop", other), _mounted(inner, "-o", "loop", disk):
        assert inner.stat().st_dev != device or outer.stat().st_dev != device
        if inner.stat().st_dev == device:
            pytest.skip("the loop device was given the same number again")
        time.sleep(1.1)
        _until_seen(place.cached / "inner" / "image", 1)


def _losetup() -> str:
    done = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "MAJ:MIN,NAME"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def read_only_origin(mount: Mount) -> Iterator[Mount]:
    """A mount whose origin is a read-only bind mount."""
    (mount.origin / "image").write_bytes(stamped(1, 0, _SIZE, 1))
    subprocess.run(["mount", "--bind", mount.origin, mount.origin], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mount.origin], check=True)
        yield mount
    finally:
        mount.cleanup()
        subprocess.run(["umount", "-l", mount.origin], check=True)


def test_a_read_only_origin_mounts_read_only(read_only_origin: Mount) -> None:
    mount = read_only_origin.start()
    image = mount.mountpoint / "image"
    for _ in range(2):
        with opened(image, os.O_RDONLY | os.O_DIRECT) as fd:
            assert set(check_stamps(read_direct(fd, 0, _SIZE), 1, 0)) == {1}
    assert os.statvfs(mount.mountpoint).f_flag & os.ST_RDONLY
    for act in (
        lambda: os.open(image, os.O_RDWR),
        lambda: os.truncate(image, 0),
        lambda: image.chmod(0o600),
        lambda: image.unlink(),
        lambda: (mount.mountpoint / "new").touch(),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == 30
    assert mount.run("evict", "image").returncode == 0
    mount.stop()
