"""A real mount whose parts fail or hang: nothing ends it, nothing holds up the others (P6)."""

import ctypes
import errno
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.helpers import wait_for
from tests.support import daemon
from tests.support.aio import AsyncReads
from tests.support.daemon import BLOCK, old
from tests.support.direct import opened, read_direct
from tests.support.injected import InjectedMount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

_SOON = 5.0
"""Seconds; what does not wait for the stalled origin takes milliseconds, on a busy machine too."""


def _image(mount: InjectedMount, name: str, number: int, blocks: int) -> bytes:
    data = stamped(number, 0, blocks * BLOCK, 1)
    (mount.origin / name).write_bytes(data)
    return data


# -- every handler -----------------------------------------------------------------------------


def _opens(path: Path, flags: int) -> Callable[[Path], object]:
    def act(_: Path) -> None:
        os.close(os.open(path, flags))

    return act


def _with_handle(act: Callable[[int], object]) -> Callable[[Path], object]:
    """Opens the image before the fault begins."""

    def run(path: Path) -> None:
        with opened(path / "image", os.O_RDWR) as fd:
            os.pread(fd, 10, 0)
            os.write(fd, b"")
            _arm(path)
            act(fd)

    return run


_armed: list[Callable[[], None]] = []


def _arm(_: Path) -> None:
    """Begins the fault; for actions that have to prepare something first."""
    for begin in _armed:
        begin()


def _direct_read(path: Path) -> None:
    with opened(path / "image", os.O_RDWR | os.O_DIRECT) as fd:
        _arm(path)
        read_direct(fd, 0, 4096)


def _second_direct_read(path: Path) -> None:
    with opened(path / "image", os.O_RDWR | os.O_DIRECT) as fd:
        read_direct(fd, 0, 4096)
        _arm(path)
        read_direct(fd, 0, 4096)


def _close_fails(path: Path) -> None:
    fd = os.open(path / "image", os.O_RDWR)
    _arm(path)
    os.close(fd)


def _listed(path: Path) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        _arm(path)
        os.listdir(fd)


def _synced_directory(path: Path) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        _arm(path)
        os.fsync(fd)


def _written_then_asked(fd: int) -> None:
    os.pwrite(fd, b"x", 0)
    os.fstat(fd)


def _at_once(act: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        _arm(path)
        act(path)

    return run


_CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lookup": ("Tree.find", _at_once(lambda at: (at / "missing").stat())),
    "mkdir": ("Tree.mkdir", _at_once(lambda at: (at / "new").mkdir())),
    "mknod": ("Tree.mknod", _at_once(lambda at: os.mkfifo(at / "new"))),
    "symlink": ("Tree.symlink", _at_once(lambda at: (at / "new").symlink_to("x"))),
    "readlink": ("Tree.readlink", _at_once(lambda at: os.readlink(at / "link"))),
    "link": ("Tree.link", _at_once(lambda at: os.link(at / "image", at / "new"))),
    "unlink": ("Tree.unlink", _at_once(lambda at: (at / "other").unlink())),
    "rmdir": ("Tree.rmdir", _at_once(lambda at: (at / "dir").rmdir())),
    "rename": ("Tree.rename", _at_once(lambda at: (at / "image").rename(at / "new"))),
    "opendir": ("Directories.open", _at_once(os.listdir)),
    "readdir": ("Tree.names", _listed),
    "fsyncdir": ("Tree.sync_directory", _synced_directory),
    "getattr": ("Truth.notices", _with_handle(_written_then_asked)),
    "setattr": ("Tree.chmod", _at_once(lambda at: (at / "image").chmod(0o600))),
    "setattr (size)": ("BlockCache.truncate", _at_once(lambda at: os.truncate(at / "image", 9))),
    "statfs": ("Tree.statvfs", _at_once(lambda at: os.statvfs(at / "dir"))),
    "getxattr": ("Tree.getxattr", _at_once(lambda at: os.getxattr(at / "image", "user.x"))),
    "setxattr": ("Tree.setxattr", _at_once(lambda at: os.setxattr(at / "image", "user.x", b""))),
    "listxattr": ("Tree.listxattr", _at_once(lambda at: os.listxattr(at / "image"))),
    "removexattr": ("Tree.removexattr", _at_once(lambda at: os.removexattr(at / "dir", "user.x"))),
    "open": ("BlockCache.open", _at_once(lambda at: (at / "image").read_bytes())),
    "open (truncating)": (
        "BlockCache.truncate",
        _at_once(lambda at: os.open(at / "image", os.O_RDWR | os.O_TRUNC)),
    ),
    "create": ("Tree.create", _at_once(lambda at: (at / "new").touch())),
    "read": ("BlockCache.read_slowly", _direct_read),
    "read (hit)": ("HitPath.try_read", _second_direct_read),
    "write": ("BlockCache.write_slowly", _with_handle(lambda fd: os.pwrite(fd, b"x", 0))),
    "write (hit)": ("HitPath.try_write", _with_handle(lambda fd: os.pwrite(fd, b"x", 0))),
    "fsync": ("BlockCache.fsync", _with_handle(os.fsync)),
    "flush": ("Closing.before_close", _close_fails),
}  # fmt: skip


def test_every_handler_survives_an_error_nobody_foresaw(faulty: InjectedMount) -> None:
    mount = faulty
    data = _image(mount, "image", 1, 4)
    _image(mount, "other", 2, 1)
    (mount.origin / "dir").mkdir()
    (mount.origin / "link").symlink_to("image")
    mount.start()
    counted = 0
    for name, (point, act) in _CASES.items():
        if daemon.lane == "on" and name.endswith("(hit)"):
            continue  # these never come to Python
        _armed[:] = [partial(mount.fail, point)]
        try:
            with pytest.raises(OSError) as caught:
                act(mount.mountpoint)
            assert caught.value.errno == errno.EIO, name
        except BaseException as exc:
            exc.add_note(f"in the handler {name}")
            raise
        finally:
            mount.fail(None)
        assert f"unexpected error while answering {name.split()[0]}" in mount.log(), name
        with opened(mount.mountpoint / "image", os.O_RDONLY | os.O_DIRECT) as fd:
            check_stamps(read_direct(fd, BLOCK, BLOCK), 1, BLOCK)
        now = mount.status()["cache"]["unexpected_errors"]
        assert now > counted, name
        counted = now
    assert sorted(os.listdir(mount.mountpoint)) == ["dir", "image", "link", "other"]
    assert len(data) == (mount.mountpoint / "image").stat().st_size
    mount.stop()


@pytest.mark.parametrize(
    ("handler", "point"),
    [
        ("release", "BlockCache.close"),
        ("releasedir", "Directories.close"),
        ("forget", "Inodes.forget"),
    ],
)
def test_handlers_without_an_answer_survive_an_error_nobody_foresaw(
    faulty: InjectedMount, handler: str, point: str
) -> None:
    mount = faulty
    data = _image(mount, "image", 1, 4)
    mount.start()
    mount.fail(point)
    with opened(mount.mountpoint / "image", os.O_RDONLY) as fd:
        assert os.pread(fd, len(data), 0) == data
    (mount.mountpoint / "new").touch()
    os.listdir(mount.mountpoint)
    (mount.mountpoint / "new").unlink()
    deadline = time.monotonic() + _SOON
    while f"while answering {handler}" not in mount.log():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mount.fail(None)
    assert mount.status()["cache"]["unexpected_errors"] >= 1
    assert (mount.mountpoint / "image").read_bytes() == data


def test_a_create_that_fails_after_its_open_leaves_nothing_open(faulty: InjectedMount) -> None:
    """The kernel sends no release for what it was told has failed."""
    mount = faulty.start()
    faulty.fail("Tree.chmod")
    with pytest.raises(OSError):
        os.open(mount.mountpoint / "new", os.O_RDWR | os.O_CREAT, 0o400)
    faulty.fail(None)
    assert mount.image("new")["open_handles"] == 0
    mount.stop()


# -- a stalled origin --------------------------------------------------------------------------


def test_200_hanging_reads_of_one_image_hold_up_nothing_else(faulty: InjectedMount) -> None:
    mount, count = faulty, 200
    _image(mount, "stalled", 1, count + 1)
    _image(mount, "well", 2, 40)
    mount.start()
    flags = os.O_RDWR | os.O_DIRECT
    with opened(mount.mountpoint / "stalled", flags) as fd:
        check_stamps(read_direct(fd, 0, BLOCK), 1, 0)
        hang = mount.fault("hang", mount.origin / "stalled")
        try:
            offsets = [number * BLOCK for number in range(1, count + 1)]
            with AsyncReads(fd, offsets, 4096) as reads:
                try:
                    assert reads.reap(0.5) == 0
                    began = time.monotonic()
                    for _ in range(50):
                        check_stamps(read_direct(fd, 0, BLOCK), 1, 0)  # hits on the stalled image
                    _use_everything_else(mount)
                    status = mount.status()
                    assert time.monotonic() - began < _SOON
                    (stalled,) = [i for i in status["images"] if i["path"] == "stalled"]
                    assert stalled["waiting"] == count
                    assert reads.reap(0.1) == 0
                finally:
                    hang.unlink()
                assert reads.reap(30) == count
                for offset in offsets:
                    assert len(reads.data[offset]) == 4096
                    check_stamps(reads.data[offset], 1, offset)
        finally:
            hang.unlink(missing_ok=True)
        assert mount.image("stalled")["waiting"] == 0
        assert mount.image("stalled")["errors"] == 0


def test_pages_of_a_write_that_is_under_way_stay_in_the_kernel(faulty: InjectedMount) -> None:
    """Were they dropped, what is read ahead for somebody else would bring them back as they were
    before. The time of modification changes meanwhile, as by all our own writes."""
    mount = faulty
    _image(mount, "stalled", 1, 4)
    origin, page = mount.origin / "stalled", 4096
    old(origin)
    mount.start()
    with opened(mount.mountpoint / "stalled", os.O_RDWR) as fd:
        check_stamps(os.pread(fd, BLOCK, 0), 1, 0)
        stall = mount.fault("stall", origin)
        try:
            data = stamped(1, page, page, 2)
            writer = threading.Thread(target=os.pwrite, args=(fd, data, page), daemon=True)
            writer.start()
            wait_for(lambda: mount.image("stalled")["waiting"] == 1, "the write to be under way")
            told = os.fstat(fd).st_mtime_ns
            os.utime(origin)
            time.sleep(1.2)  # until the kernel asks anew
            assert os.fstat(fd).st_mtime_ns == told != origin.stat().st_mtime_ns
            assert set(check_stamps(os.pread(fd, page, page), 1, page)) == {2}
        finally:
            stall.unlink()
        writer.join(20)
        assert set(check_stamps(os.pread(fd, page, page), 1, page)) == {2}
        os.utime(mount.mountpoint / "stalled", ns=(5, 7))  # what is said of it is heard
        assert os.fstat(fd).st_mtime_ns == 7
    wait_for(
        lambda: (mount.mountpoint / "stalled").stat().st_mtime_ns == origin.stat().st_mtime_ns,
        "the time to be told",
    )


def _use_everything_else(mount: InjectedMount) -> None:
    """Hits, misses, writes, syncs and names of other images, and attributes of the stalled one."""
    with opened(mount.mountpoint / "well", os.O_RDWR | os.O_DIRECT) as fd:
        for number in range(40):
            check_stamps(read_direct(fd, number * BLOCK, 4096), 2, number * BLOCK)
        offsets = [number * BLOCK for number in range(40)]
        with AsyncReads(fd, offsets, BLOCK) as reads:
            assert reads.reap(_SOON) == 40
        for offset in offsets:
            check_stamps(reads.data[offset], 2, offset)
        with mmap.mmap(-1, 4096) as buffer:
            buffer[:] = stamped(2, 0, 4096, 2)
            assert os.pwrite(fd, buffer, 0) == 4096
        os.fsync(fd)
    (mount.mountpoint / "new").write_bytes(b"x")
    (mount.mountpoint / "new").rename(mount.mountpoint / "newer")
    (mount.mountpoint / "newer").unlink()
    assert sorted(os.listdir(mount.mountpoint)) == ["stalled", "well"]
    assert (mount.mountpoint / "stalled").stat().st_size == 201 * BLOCK


_TRUNCATE = "import os, sys; os.truncate(sys.argv[1], int(sys.argv[2])); print('truncated')"
_READ = (
    "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT); "
    "print(os.preadv(f, [mmap.mmap(-1, 4096)], int(sys.argv[2])))"
)


# -- directories -------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)


def _entries(fd: int, room: int) -> list[bytes]:
    """One getdents64 with so much room."""
    into = ctypes.create_string_buffer(room)
    length = _LIBC.getdents64(fd, into, room)
    assert length >= 0, os.strerror(ctypes.get_errno())
    found, at = [], 0
    while at < length:
        (size,) = struct.unpack_from("<H", into, at + 16)
        found.append(into.raw[at + 19 : at + size].split(b"\0", 1)[0])
        at += size
    return found


def _names(mount: InjectedMount, count: int) -> list[bytes]:
    names = [b"%04d-" % number + b"n" * 250 for number in range(count)]
    for name in names:
        (mount.origin / os.fsdecode(name)).touch()
    return names


def test_a_listing_with_room_for_a_megabyte_is_answered(faulty: InjectedMount) -> None:
    """Newer kernels ask for as much at once; the way to pyfuse3 takes less in one message."""
    names = _names(faulty, 3000)
    faulty.start()
    found: list[bytes] = []

    def listing() -> None:
        with opened(faulty.mountpoint, os.O_RDONLY | os.O_DIRECTORY) as fd:
            while part := _entries(fd, 1 << 20):
                found.extend(part)

    lister = threading.Thread(target=listing, daemon=True)  # if it hangs, no signal ends it
    lister.start()
    lister.join(20)
    assert not lister.is_alive(), f"hangs after {len(found)} entries"
    assert sorted(found) == sorted([b".", b"..", *names])
    faulty.stop()


def test_names_that_are_gone_do_not_end_a_listing(faulty: InjectedMount) -> None:
    """However many follow each other: an answer without any entry would be the end."""
    names = _names(faulty, 1000)
    faulty.start()
    with opened(faulty.mountpoint, os.O_RDONLY | os.O_DIRECTORY) as fd:
        found = _entries(fd, 4096)
        *others, last = names  # they are listed in this order
        for name in set(others) - set(found):
            (faulty.origin / os.fsdecode(name)).unlink()
        while part := _entries(fd, 1 << 20):
            found += part
    assert 2 < len(found) < 100
    assert found[-1] == last
    faulty.stop()


def test_a_truncate_during_an_evict_does_not_wait_for_it_forever(faulty: InjectedMount) -> None:
    """The kernel holds back a mapping's pages while it truncates, and an evict waits for them."""
    mount = faulty
    _image(mount, "image", 1, 48)  # the mapping's first page brings up to 1 MiB along
    mount.start()
    path = mount.mountpoint / "image"
    children: list[subprocess.Popen[str]] = []
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, BLOCK, mmap.MAP_SHARED) as mapped:
        assert mapped[:4096] == stamped(1, 0, 4096, 1)
        hang = mount.fault("hang", mount.origin / "image")
        try:
            for code, *args in ((_READ, path, 46 * BLOCK), (_TRUNCATE, path, 47 * BLOCK)):
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *map(str, args)],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
                time.sleep(0.7)
                if len(children) == 1:  # the evict begins between the two and waits for the read
                    evict = subprocess.Popen(
                        [sys.executable, "-m", "fusecache", "evict", "image"],
                        env={**os.environ, "FUSECACHE_RUNTIME_DIR": str(mount.runtime)},
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    children.append(evict)
                    time.sleep(1.2)
            assert [child.poll() for child in children] == [None] * 3
            mapped[:4096] = stamped(1, 0, 4096, 2)
            hang.unlink()
            deadline = time.monotonic() + 15
            while any(child.poll() is None for child in children):
                assert time.monotonic() < deadline, "the evict and the truncate wait for each other"
                time.sleep(0.05)
            assert [child.returncode for child in children] == [0, 0, 0]
            assert (mount.origin / "image").read_bytes()[:4096] == stamped(1, 0, 4096, 2)
            assert path.stat().st_size == 47 * BLOCK
        finally:
            hang.unlink(missing_ok=True)
            for child in children:
                child.kill()
            if any(child.poll() is None for child in children):
                time.sleep(0.2)
            if any(child.poll() is None for child in children):
                mount.cleanup()  # whoever waits in the kernel is released
            for child in children:
                child.wait()
                if child.stdout is not None:
                    child.stdout.close()
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert set(check_stamps(read_direct(fd, BLOCK, 6 * BLOCK), 1, BLOCK)) == {1}


# -- a restart ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_warm_restart_serves_hits_while_the_origin_cannot_be_read(
    faulty: InjectedMount, end: str
) -> None:
    mount = faulty
    data = _image(mount, "image", 1, 8)
    old(mount.origin / "image")
    mount.start()
    with opened(mount.mountpoint / "image", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, 6 * BLOCK) == data[: 6 * BLOCK]
    if end == "stop":
        mount.stop()
    else:
        time.sleep(1.5)  # the rows are committed twice a second
        mount.kill()
    mount.fault("unreadable", mount.origin / "image")
    mount.start()
    with opened(mount.mountpoint / "image", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, 6 * BLOCK) == data[: 6 * BLOCK]
        with pytest.raises(OSError) as caught:
            read_direct(fd, 6 * BLOCK, BLOCK)
        assert caught.value.errno == errno.EIO
        assert read_direct(fd, 0, 6 * BLOCK) == data[: 6 * BLOCK]
    image = mount.image("image")
    assert (image["origin_reads"], image["read_hit_bytes"]) == (0, 12 * BLOCK)
    assert image["errors"] >= 1
    assert "injected" in image["last_error"]
