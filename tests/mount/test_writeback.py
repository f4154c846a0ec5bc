"""Write-back on real mounts: what guests see, and what the origin has when."""

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusecache.store import syscalls
from tests.mount.modes import home, stop_and_compare
from tests.mount.tracing import syncs, traced
from tests.support.daemon import BLOCK, Mount, cleaned_up
from tests.support.direct import opened, read_direct, write_direct
from tests.support.injected import InjectedMount
from tests.support.place import Place
from tests.support.qemu import held, refused_to_write
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

_SOON = 5.0
"""Seconds; what does not wait for the stalled origin takes milliseconds, on a busy machine too."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """In write-back; nothing is written back by the clock."""
    made = Mount(tmp_path_factory.mktemp("shared") / "fc", write_mode="back", dirty_age="3600")
    with cleaned_up(made):
        yield made.start()
        stop_and_compare(made)


@pytest.fixture
def alone(mount: Mount) -> Mount:
    """A mount like the shared one that a test may end; not started."""
    mount.options |= {"write_mode": "back", "dirty_age": "3600"}
    return mount


def _image(directory: Path, number: int = 1, blocks: int = 4, name: str = "image") -> bytearray:
    data = stamped(number, 0, blocks * BLOCK, 1)
    (directory / name).write_bytes(data)
    return bytearray(data)


def _write(path: Path, number: int, version: int, blocks: int = 4) -> bytes:
    """Makes the first blocks dirty."""
    data = stamped(number, 0, blocks * BLOCK, version)
    with opened(path, os.O_RDWR) as fd:
        assert os.pwrite(fd, data, 0) == len(data)
    return data


@contextlib.contextmanager
def _doomed(path: Path, flags: int) -> Iterator[int]:
    """A descriptor whose daemon will be gone when it is closed."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def _dirty(mount: Mount) -> int:
    return int(mount.status()["cache"]["dirty_bytes"])


def _eventually(holds: Callable[[], bool], seconds: float = _SOON) -> bool:
    """Whether it holds within this time: the kernel tells the daemon of a close after the fact."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "Pattern verification failed" not in done.stdout, (command, done.stdout)
    return done.stdout


# -- writes and syncs --------------------------------------------------------------------------


def test_a_write_stays_on_the_ssd_until_it_is_flushed(place: Place) -> None:
    data = _image(place.origin)
    newer = stamped(1, BLOCK, BLOCK, 2)
    with opened(place.cached / "image", os.O_RDWR | os.O_DIRECT) as fd:
        assert write_direct(fd, BLOCK, newer) == BLOCK
        os.fsync(fd)
        assert read_direct(fd, BLOCK, BLOCK) == newer
        assert (place.origin / "image").read_bytes() == data
        assert place.image("image")["dirty_bytes"] == BLOCK
        data[BLOCK : 2 * BLOCK] = newer
        assert home(place, "image") == data
    assert place.image("image")["dirty_bytes"] == 0


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_a_synchronous_write_is_synced_on_the_ssd_before_its_answer(
    place: Place, tmp_path: Path, flag: int, direct: int
) -> None:
    """Every one, also where it only overwrites a page that was dirty before (R1)."""
    data = _image(place.origin)
    pid = place.mount.pid
    assert pid is not None
    trace = tmp_path / "trace"
    with opened(place.cached / "image", os.O_RDWR | flag | direct) as fd, traced(pid, trace):
        for version in range(2, 6):
            assert write_direct(fd, 0, stamped(1, 0, 4096, version)) == 4096
            assert syncs(trace, "cache.img") >= version - 1
    assert (place.origin / "image").read_bytes() == data
    data[:4096] = stamped(1, 0, 4096, 5)
    assert home(place, "image") == data


def test_what_was_written_in_a_mapping_survives_a_kill_after_msync(alone: Mount) -> None:
    data = _image(alone.origin)
    alone.start()
    path = alone.mountpoint / "image"
    newer = stamped(1, BLOCK, BLOCK, 2)
    with (
        _doomed(path, os.O_RDWR) as fd,
        _doomed(path, os.O_RDONLY | os.O_DIRECT) as direct,
        mmap.mmap(fd, 0, mmap.MAP_SHARED) as mapped,
    ):
        mapped[BLOCK : 2 * BLOCK] = newer
        mapped.flush()
        assert read_direct(direct, BLOCK, BLOCK) == newer
        assert os.pread(fd, BLOCK, BLOCK) == newer
        assert (alone.origin / "image").read_bytes() == data
        alone.kill()
    alone.start()
    data[BLOCK : 2 * BLOCK] = newer
    assert path.read_bytes() == data
    stop_and_compare(alone)
    assert (alone.origin / "image").read_bytes() == data


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_the_origin_has_the_size_at_once_and_the_data_later(place: Place, direct: int) -> None:
    data = _image(place.origin)
    at = 6 * BLOCK
    newer = stamped(1, at, 4096, 2)
    with opened(place.cached / "image", os.O_RDWR | direct) as fd:
        assert write_direct(fd, at, newer) == 4096
        for st in (os.fstat(fd), (place.origin / "image").stat()):
            assert st.st_size == at + 4096
        assert read_direct(fd, at, 4096) == newer
        assert read_direct(fd, len(data), 2 * BLOCK) == bytes(2 * BLOCK)
        assert (place.origin / "image").read_bytes() == data + bytes(2 * BLOCK + 4096)
    assert home(place, "image") == data + bytes(2 * BLOCK) + newer


def test_a_new_image_grows_by_appending(place: Place) -> None:
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    with opened(place.cached / "image", flags) as fd:
        for number in range(40):
            assert os.write(fd, b"%05d" % number * 1000) == 5000
            assert (place.origin / "image").stat().st_size == (number + 1) * 5000
    expected = b"".join(b"%05d" % number * 1000 for number in range(40))
    assert (place.cached / "image").read_bytes() == expected
    assert home(place, "image") == expected


# -- truncating, removing, renaming ------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("size", [0, 100, BLOCK - 1, BLOCK + 5000])
def test_a_shrunken_image_with_dirty_data_grows_back_with_zeros(
    place: Place, by: str, size: int
) -> None:
    _image(place.origin)
    path = place.cached / "image"
    data = _write(path, 1, 2)
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDONLY | os.O_DIRECT) as direct:
        target: int | Path = fd if by == "handle" else path
        os.truncate(target, size)
        assert os.fstat(fd).st_size == (place.origin / "image").stat().st_size == size
        assert os.pread(fd, len(data), 0) == data[:size]
        os.truncate(target, len(data))
        assert (place.origin / "image").stat().st_size == len(data)
        expected = data[:size] + bytes(len(data) - size)
        assert os.pread(fd, len(data), 0) == expected
        assert read_direct(direct, 0, len(data)) == expected
        newer = stamped(1, 2 * BLOCK, 4096, 3)
        assert os.pwrite(fd, newer, 2 * BLOCK) == 4096
    expected = expected[: 2 * BLOCK] + newer + expected[2 * BLOCK + 4096 :]
    assert path.read_bytes() == expected
    assert home(place, "image") == expected


def test_an_open_image_that_is_unlinked_keeps_its_dirty_data(place: Place) -> None:
    _image(place.origin)
    before = _dirty(place.mount)
    data = _write(place.cached / "image", 1, 2)
    with opened(place.cached / "image", os.O_RDWR) as fd:
        (place.cached / "image").unlink()
        assert not (place.origin / "image").exists()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(data), 0) == data
        newer = stamped(1, BLOCK, BLOCK, 3)
        assert os.pwrite(fd, newer, BLOCK) == BLOCK
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(data), 0) == data[:BLOCK] + newer + data[2 * BLOCK :]
    assert _eventually(lambda: _dirty(place.mount) == before)


def test_dirty_data_of_a_closed_image_goes_with_its_name(place: Place) -> None:
    _image(place.origin)
    before = _dirty(place.mount)
    data = _write(place.cached / "image", 1, 2)
    assert _dirty(place.mount) == before + len(data)
    (place.cached / "image").unlink()
    assert os.listdir(place.origin) == []
    assert _eventually(lambda: _dirty(place.mount) == before)
    (place.cached / "image").touch()
    os.truncate(place.cached / "image", len(data))
    assert (place.cached / "image").read_bytes() == bytes(len(data)) == home(place, "image")


def test_dirty_data_stays_as_long_as_one_name_is_left(place: Place) -> None:
    _image(place.origin)
    os.link(place.origin / "image", place.origin / "other")
    data = _write(place.cached / "image", 1, 2)
    (place.cached / "image").unlink()
    assert (place.cached / "other").read_bytes() == data == home(place, "other")


def test_dirty_data_goes_with_the_last_two_names_removed_at_once(place: Place) -> None:
    """The kernel has one removal of an image wait for the other: the second is of its last name."""
    before = _dirty(place.mount)
    (place.origin / "below").mkdir()
    names = (place.cached / "image", place.cached / "below" / "other")
    for _ in range(5):
        _image(place.origin)
        os.link(place.origin / "image", place.origin / "below" / "other")
        _write(names[0], 1, 2)
        together = threading.Barrier(len(names))

        def remove(path: Path, together: threading.Barrier = together) -> None:
            together.wait()
            path.unlink()

        threads = [threading.Thread(target=remove, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert _dirty(place.mount) == before
    (place.cached / "below").rmdir()


@pytest.mark.parametrize("held", [False, True], ids=["closed", "open"])
def test_an_image_renamed_over_a_dirty_one_takes_its_place(place: Place, held: bool) -> None:
    before = _dirty(place.mount)
    for number, name in enumerate(("first", "second"), 1):
        _image(place.origin, number, name=name)
    first = _write(place.cached / "first", 1, 2)
    second = _write(place.cached / "second", 2, 2)
    fd = os.open(place.cached / "second", os.O_RDWR) if held else -1
    try:
        (place.cached / "first").rename(place.cached / "second")
        assert (place.cached / "second").read_bytes() == first
        if held:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, len(second), 0) == second
    finally:
        if held:
            os.close(fd)
    assert _eventually(lambda: _dirty(place.mount) == before + len(first))
    assert os.listdir(place.origin) == ["second"]
    assert home(place, "second") == first


def test_a_renamed_image_takes_its_dirty_data_along(alone: Mount) -> None:
    """Also over a kill, and with nobody having opened it under its new name."""
    (alone.origin / "below").mkdir()
    _image(alone.origin)
    alone.start()
    data = _write(alone.mountpoint / "image", 1, 2)
    (alone.mountpoint / "image").rename(alone.mountpoint / "below" / "new")
    alone.kill()
    alone.start()
    done = alone.run("flush", "below/new")
    assert done.returncode == 0, done.stderr
    assert (alone.origin / "below" / "new").read_bytes() == data
    stop_and_compare(alone)


@pytest.mark.parametrize("exchanged", [False, True], ids=["moved", "exchanged"])
def test_images_in_a_renamed_directory_take_their_dirty_data_along(
    alone: Mount, exchanged: bool
) -> None:
    """The same, with a directory that gets a new name, or changes names with another one."""
    for number, name in enumerate(("one", "other"), 1):
        (alone.origin / name / "below").mkdir(parents=True)
        _image(alone.origin / name / "below", number)
    alone.start()
    data = [
        _write(alone.mountpoint / name / "below" / "image", number, 2)
        for number, name in enumerate(("one", "other"), 1)
    ]
    if exchanged:
        with opened(alone.mountpoint, os.O_RDONLY) as root:
            syscalls.renameat2(root, b"one", root, b"other", syscalls.RENAME_EXCHANGE)
    else:
        (alone.mountpoint / "one").rename(alone.mountpoint / "other" / "new")
    alone.kill()
    alone.start()
    first, second = ("other", "one") if exchanged else ("other/new", "other")
    for name, written in zip((first, second), data, strict=True):
        done = alone.run("flush", f"{name}/below/image")
        assert done.returncode == 0, done.stderr
        assert (alone.origin / name / "below" / "image").read_bytes() == written
    stop_and_compare(alone)


# -- qemu --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_after_umount_the_origin_has_what_qemu_wrote(alone: Mount, form: str, cache: str) -> None:
    alone.start()
    path, reference = alone.mountpoint / "disk", alone.base / "reference"
    writes = (
        "write -P 0x11 0 2M",
        "write -P 0x22 65536 512",
        "write -P 0x33 3M 130k",
        "write -z 1M 64k",
        "aio_write -P 0x44 8M 1M",
        "aio_write -P 0x55 9M 1M",
        "aio_flush",
        "write -P 0x66 8519680 4k",
        "discard 9M 64k",
        "write -P 0x77 9M 64k",
    )
    parts = [part for command in writes for part in ("-c", command)]
    for where in (path, reference):
        _run("qemu-img", "create", "-q", "-f", form, where, "16M")
        _run("qemu-io", "-f", form, "-t", cache, *parts, where)
    _run("qemu-img", "compare", "-f", form, "-F", form, path, reference)
    assert _dirty(alone) > 0
    stop_and_compare(alone)
    if form == "qcow2":
        assert "No errors were found" in _run("qemu-img", "check", alone.origin / "disk")
    _run("qemu-img", "compare", "-f", form, "-F", form, alone.origin / "disk", reference)


def test_what_qemu_wrote_survives_a_kill(alone: Mount) -> None:
    alone.start()
    path = alone.mountpoint / "disk"
    _run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    command = ["qemu-io", "-f", "qcow2", "-t", "directsync", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        try:
            for at in range(8):
                # one at a time: qemu-io sleeps over a second line that came with the first
                guest.stdin.write(b"write -P %d %dM 640k\n" % (at + 1, at))
                guest.stdin.flush()
                while b"wrote" not in guest.stdout.readline():
                    assert guest.poll() is None
            alone.kill()
        finally:
            guest.kill()
    alone.start()
    checks = [part for at in range(8) for part in ("-c", f"read -P {at + 1} {at}M 640k")]
    _run("qemu-io", "-f", "qcow2", *checks, path)
    stop_and_compare(alone)
    _run("qemu-img", "check", alone.origin / "disk")
    _run("qemu-io", "-f", "qcow2", *checks, alone.origin / "disk")


# -- a stalled origin --------------------------------------------------------------------------


@pytest.fixture
def stalling(faulty: InjectedMount) -> InjectedMount:
    """Two images; the cleaner is at work, so that it meets the stall."""
    faulty.options |= {"write_mode": "back", "dirty_age": "1"}
    _image(faulty.origin, 1, 16, "well")
    _image(faulty.origin, 2, 16, "stalled")
    faulty.start()
    return faulty


def _write_and_read(fd: int, number: int, version: int) -> None:
    for at in range(0, 16 * BLOCK, BLOCK):
        assert write_direct(fd, at, stamped(number, at, 4096, version)) == 4096
        assert set(check_stamps(read_direct(fd, at, 4096), number, at)) == {version}
    os.fsync(fd)


def test_writes_go_on_while_an_origin_is_stalled(stalling: InjectedMount) -> None:
    """Those of the stalled image itself, too, and other images reach their origin (P6)."""
    mount = stalling
    flags = os.O_RDWR | os.O_DIRECT
    with (
        opened(mount.mountpoint / "well", flags) as well,
        opened(mount.mountpoint / "stalled", flags) as stalled,
    ):
        for number, fd in ((1, well), (2, stalled)):
            assert read_direct(fd, 0, 16 * BLOCK)
            _write_and_read(fd, number, 2)
        stall = mount.fault("stall", mount.origin / "stalled")
        try:
            end = time.monotonic() + 4  # long enough for the cleaner to meet the stall
            version = 2
            while time.monotonic() < end:
                version += 1
                began = time.monotonic()
                _write_and_read(stalled, 2, version)
                _write_and_read(well, 1, version)
                assert time.monotonic() - began < _SOON
                time.sleep(0.2)
            began = time.monotonic()
            done = mount.run("flush", "well")
            assert done.returncode == 0, done.stderr
            assert mount.image("well")["dirty_bytes"] == 0
            assert mount.image("stalled")["dirty_bytes"] > 0
            assert time.monotonic() - began < 2 * _SOON
            data = (mount.origin / "well").read_bytes()
            for at in range(0, 16 * BLOCK, BLOCK):
                assert set(check_stamps(data[at : at + 4096], 1, at)) == {version}
        finally:
            stall.unlink()
    done = mount.run("flush", "stalled")
    assert done.returncode == 0, done.stderr
    data = (mount.origin / "stalled").read_bytes()
    for at in range(0, 16 * BLOCK, BLOCK):
        assert set(check_stamps(data[at : at + 4096], 2, at)) == {version}
    stop_and_compare(mount)


_EXTEND = """
import os, sys
from tests.support.stamps import stamped
fd = os.open(sys.argv[1], os.O_RDWR)
print(os.pwrite(fd, stamped(2, int(sys.argv[2]), 4096, 3), int(sys.argv[2])))
"""


def test_a_write_that_extends_a_stalled_image_holds_up_nothing_else(
    stalling: InjectedMount,
) -> None:
    mount, at = stalling, 20 * BLOCK
    # This process has only the other image open: the kernel lets no close of the stalled one
    # overtake the write, and a command that is started closes what its parent has open.
    with opened(mount.mountpoint / "well", os.O_RDWR | os.O_DIRECT) as well:
        assert read_direct(well, 0, 16 * BLOCK)
        stall = mount.fault("stall", mount.origin / "stalled")
        command = [sys.executable, "-c", _EXTEND, str(mount.mountpoint / "stalled"), str(at)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as extending:
            try:
                time.sleep(1)
                assert extending.poll() is None
                began = time.monotonic()
                _write_and_read(well, 1, 3)
                assert mount.status()["cache"]["dirty_bytes"] > 0
                assert time.monotonic() - began < _SOON
            finally:
                stall.unlink()
            assert extending.communicate(timeout=30)[0].strip() == "4096"
    with opened(mount.mountpoint / "stalled", os.O_RDONLY | os.O_DIRECT) as fd:
        assert set(check_stamps(read_direct(fd, at, 4096), 2, at)) == {3}
    stop_and_compare(mount)


def test_what_was_written_during_a_stall_survives_a_kill(stalling: InjectedMount) -> None:
    mount = stalling
    with _doomed(mount.mountpoint / "stalled", os.O_RDWR | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, 16 * BLOCK)
        _write_and_read(fd, 2, 2)
        stall = mount.fault("stall", mount.origin / "stalled")
        try:
            time.sleep(1.5)
            _write_and_read(fd, 2, 3)
            mount.kill()
        finally:
            stall.unlink()
    mount.start()
    data = (mount.mountpoint / "stalled").read_bytes()
    for at in range(0, 16 * BLOCK, BLOCK):
        assert set(check_stamps(data[at : at + 4096], 2, at)) == {3}
    stop_and_compare(mount)


# -- one host at a time (P8) -------------------------------------------------------------------

_BYTE = 1 << 30
_ASK = f"""
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, {_BYTE}, 1, 0)
try:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
except BlockingIOError:
    print("refused")
else:
    print("locked")
"""


def _locked(path: Path) -> bool:
    """Whether another process is refused the lock that another host would take."""
    said = _run(sys.executable, "-c", _ASK, path).strip()
    assert said in ("refused", "locked")
    return said == "refused"


def test_an_image_is_locked_while_it_is_open_for_writing_or_dirty(place: Place) -> None:
    _image(place.origin)
    image = place.origin / "image"
    with opened(place.cached / "image", os.O_RDONLY):
        assert not _locked(image)
    with opened(place.cached / "image", os.O_RDWR) as fd:
        assert _locked(image)
        data = stamped(1, 0, BLOCK, 2)
        assert os.pwrite(fd, data, 0) == BLOCK
        with opened(place.cached / "image", os.O_RDONLY) as other:
            assert os.pread(other, BLOCK, 0) == data
        assert set(check_stamps(image.read_bytes(), 1, 0)) == {1}  # reading there is free
    time.sleep(0.5)
    assert _locked(image), "it is closed, but dirty"
    assert home(place, "image")[:BLOCK] == data
    assert _eventually(lambda: not _locked(image))
    with opened(place.cached / "image", os.O_RDWR):
        assert _locked(image)
    assert _eventually(lambda: not _locked(image)), "it was closed, and nothing is dirty"


@pytest.mark.parametrize("held", [False, True], ids=["closed", "open"])
def test_an_evicted_image_is_not_locked(place: Place, held: bool) -> None:
    """At once, and while it is open: its VM may be started elsewhere."""
    _image(place.origin)
    path = place.cached / "image"
    data = _write(path, 1, 2)
    assert _locked(place.origin / "image")
    fd = os.open(path, os.O_RDWR) if held else -1
    try:
        place.evict("image")
        assert not _locked(place.origin / "image")
        assert (place.origin / "image").read_bytes() == data
        if held:
            newer = stamped(1, 0, BLOCK, 3)
            assert os.pwrite(fd, newer, 0) == BLOCK
            os.fsync(fd)
            assert (place.origin / "image").read_bytes() == newer + data[BLOCK:]
            assert not _locked(place.origin / "image")
    finally:
        if held:
            os.close(fd)


def test_an_image_that_another_host_has_is_read_but_not_written(place: Place) -> None:
    data = _image(place.origin)
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, _BYTE, 1, 0)
    with opened(place.origin / "image", os.O_RDWR) as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, wanted)
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
            with pytest.raises(OSError) as caught:
                os.close(os.open(place.cached / "image", flags))
            assert caught.value.errno == errno.EBUSY
        assert (
            (place.cached / "image").read_bytes() == data == (place.origin / "image").read_bytes()
        )
        assert "image cannot be opened for writing: another host" in place.mount.log()
    _write(place.cached / "image", 1, 2)


@pytest.mark.parametrize("handle", ["open", "closed"])
def test_a_killed_daemon_gives_its_locks_up(alone: Mount, handle: str) -> None:
    _image(alone.origin)
    alone.start()
    data = _write(alone.mountpoint / "image", 1, 2)
    fd = os.open(alone.mountpoint / "image", os.O_RDWR) if handle == "open" else -1
    assert _locked(alone.origin / "image")
    alone.kill()
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert not _locked(alone.origin / "image")
    alone.start()
    assert (alone.mountpoint / "image").read_bytes() == data
    stop_and_compare(alone)
    assert not _locked(alone.origin / "image")


def test_the_next_daemon_takes_the_lock_of_an_image_that_is_dirty(alone: Mount) -> None:
    """Whether or not anybody opens it."""
    _image(alone.origin)
    alone.start()
    _write(alone.mountpoint / "image", 1, 2)
    alone.kill()
    alone.start()
    assert _eventually(lambda: _locked(alone.origin / "image"))


def test_the_lock_leaves_qemus_own_locks_alone(place: Place) -> None:
    """On the mount they work among QEMUs, and on the origin nothing of theirs is taken."""
    path = place.cached / "disk"
    _run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with opened(path, os.O_RDWR):
        assert _locked(place.origin / "disk")
        with held(path):
            assert refused_to_write(path)
            _run("qemu-img", "info", "-U", path)
        _run("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 512", path)
        home(place, "disk")
        _run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 512", place.origin / "disk")
