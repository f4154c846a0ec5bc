"""Bytes through a real mount: every way to open, read, write, sync and map a file."""

import fcntl
import mmap
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.modes import both_modes, home
from tests.mount.tracing import syncs, traced
from tests.support.daemon import BLOCK, Mount
from tests.support.direct import opened, read_direct, write_direct
from tests.support.place import Place
from tests.support.stamps import STAMP, check_stamps, read_stamp, stamped

pytestmark = pytest.mark.mount


def _image(place: Place, name: str, number: int, blocks: int) -> bytes:
    data = stamped(number, 0, blocks * BLOCK, 1)
    (place.origin / name).write_bytes(data)
    return data


# -- direct ------------------------------------------------------------------------------------


@both_modes
def test_direct_reads_and_writes_are_true_on_both_sides(place: Place) -> None:
    data = bytearray(_image(place, "image", 1, 8))
    with opened(place.cached / "image", os.O_RDWR | os.O_DIRECT) as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        for offset, length in ((0, 4096), (512, 512), (BLOCK - 4096, 8192), (3 * BLOCK, BLOCK)):
            assert read_direct(fd, offset, length) == data[offset : offset + length]
        for version, (offset, length) in enumerate(
            ((0, 512), (BLOCK - 512, 1024), (2 * BLOCK, 3 * BLOCK), (4096, 4096)), 2
        ):
            piece = stamped(1, offset, length, version)
            assert write_direct(fd, offset, piece) == length
            data[offset : offset + length] = piece
            assert home(place, "image") == data
            assert read_direct(fd, 0, len(data)) == data
        assert read_direct(fd, len(data), 4096) == b""
        assert read_direct(fd, len(data) - 4096, 8192) == data[-4096:]


def test_a_direct_read_never_costs_the_origin_more_than_once(place: Place) -> None:
    data = _image(place, "image", 1, 8)
    with opened(place.cached / "image", os.O_RDONLY | os.O_DIRECT) as fd:
        for _ in range(3):
            assert read_direct(fd, 0, len(data)) == data
        image = place.image("image")
        assert image["origin_read_bytes"] == len(data)
        # A read that comes before the SSD write is answered from the fetch, and no hit.
        assert image["read_hit_bytes"] + image["read_miss_bytes"] == 3 * len(data)


# -- appending, truncating ---------------------------------------------------------------------


@both_modes
def test_two_appending_handles_never_overwrite_each_other(place: Place) -> None:
    flags = os.O_CREAT | os.O_APPEND | os.O_RDWR
    with (
        opened(place.cached / "log", flags) as one,
        opened(place.cached / "log", flags) as two,
    ):
        for number in range(40):
            piece = stamped(1, number * STAMP, STAMP, 1)
            assert os.write(one if number % 2 else two, piece) == STAMP
        os.lseek(one, 0, os.SEEK_SET)
        assert os.write(one, stamped(1, 40 * STAMP, STAMP, 1)) == STAMP
        data = os.pread(two, 100 * STAMP, 0)
    assert len(data) == 41 * STAMP
    check_stamps(data, 1, 0)
    assert home(place, "log") == data


@both_modes
def test_two_appending_processes_lose_nothing(place: Place) -> None:
    code = (
        "import os, sys; f = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)\n"
        "for n in range(200): os.write(f, b'%s%07d' % (sys.argv[2].encode(), n))"
    )
    path = str(place.cached / "log")
    writers = [subprocess.Popen([sys.executable, "-c", code, path, who]) for who in "AB"]
    try:
        assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    data = (place.cached / "log").read_bytes()
    assert data == home(place, "log")
    found = [data[at : at + 8] for at in range(0, len(data), 8)]
    for who in (b"A", b"B"):
        mine = [piece for piece in found if piece.startswith(who)]
        assert mine == [b"%s%07d" % (who, n) for n in range(200)]
    assert len(found) == 400


def test_a_guest_that_reads_in_order_is_read_ahead_of_and_every_byte_once(place: Place) -> None:
    blocks = 100
    data = _image(place, "image", 1, blocks)
    with opened(place.cached / "image", os.O_RDONLY | os.O_DIRECT) as fd:
        read = b"".join(read_direct(fd, at, BLOCK // 2) for at in range(0, len(data), BLOCK // 2))
    assert read == data
    image = place.image("image")
    assert image["origin_read_bytes"] == len(data), "nothing twice"
    assert image["read_ahead_bytes"] >= (blocks - 10) * BLOCK
    assert image["origin_reads"] < blocks / 2


@both_modes
def test_what_was_truncated_at_open_never_returns(place: Place) -> None:
    data = _image(place, "image", 1, 8)
    with opened(place.cached / "image", os.O_RDWR) as held:
        assert os.pread(held, len(data), 0) == data
        with opened(place.cached / "image", os.O_WRONLY | os.O_TRUNC) as fd:
            assert os.fstat(fd).st_size == 0
            assert (place.origin / "image").stat().st_size == 0
            assert place.image("image")["cached_bytes"] == 0
            os.ftruncate(fd, len(data))
        assert os.pread(held, len(data), 0) == bytes(len(data))
    assert (place.cached / "image").read_bytes() == bytes(len(data))
    with opened(place.cached / "image", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, len(data)) == bytes(len(data))


@both_modes
def test_creating_with_truncation_replaces_what_was_there(place: Place) -> None:
    _image(place, "image", 1, 2)
    flags = os.O_CREAT | os.O_TRUNC | os.O_RDWR
    with opened(place.cached / "image", flags) as fd:
        assert os.read(fd, 10) == b""
        os.pwrite(fd, b"end", 2 * BLOCK - 3)
        assert os.pread(fd, 2 * BLOCK, 0) == bytes(2 * BLOCK - 3) + b"end"


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 5000, 3 * BLOCK])
def test_a_shrunken_image_grows_back_with_zeros(place: Place, by: str, size: int) -> None:
    data = _image(place, "image", 1, 4)
    path = place.cached / "image"
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDONLY | os.O_DIRECT) as direct:
        assert os.pread(fd, len(data), 0) == data
        target: Path | int = fd if by == "handle" else path
        os.truncate(target, size)
        assert os.fstat(fd).st_size == path.stat().st_size == size
        assert os.pread(fd, len(data), 0) == data[:size]
        assert (place.origin / "image").read_bytes() == data[:size]
        os.truncate(target, len(data))
        expected = data[:size] + bytes(len(data) - size)
        assert os.pread(fd, len(data), 0) == expected
        assert read_direct(direct, 0, len(data)) == expected
    assert path.read_bytes() == expected == (place.origin / "image").read_bytes()


def test_a_file_that_nobody_has_open_is_truncated_by_path(place: Place) -> None:
    data = _image(place, "image", 1, 2)
    path = place.cached / "image"
    assert path.read_bytes() == data
    os.truncate(path, 100)
    assert path.stat().st_size == 100
    os.truncate(path, 300)
    assert path.read_bytes() == data[:100] + bytes(200)


# -- a model -----------------------------------------------------------------------------------


class _Model:
    """A few files, each with a bytearray that says what it must hold."""

    limit = 5 * BLOCK

    def __init__(self, place: Place, seed: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.contents: dict[str, bytearray] = {}
        self.handles: dict[str, list[int]] = {}
        for name in ("a", "b", "c"):
            data = self.random.randbytes(self.random.randrange(self.limit))
            (place.origin / name).write_bytes(data)
            self.contents[name] = bytearray(data)
            self.handles[name] = [os.open(place.cached / name, os.O_RDWR) for _ in range(2)]

    def close(self) -> None:
        for fds in self.handles.values():
            for fd in fds:
                os.close(fd)

    def _span(self) -> tuple[int, int]:
        draw = self.random
        offset = draw.choice(
            (draw.randrange(self.limit), draw.randrange(5) * BLOCK, draw.randrange(80) * 4096)
        )
        length = draw.choice((1, 511, 512, 4096, 4097, BLOCK, draw.randrange(1, 2 * BLOCK)))
        return offset, min(length, self.limit - offset)

    def step(self) -> None:
        """One operation, and its result compared."""
        name = self.random.choice("abc")
        actions = (self.read, self.read, self.read, self.write, self.write, self.rarely)
        self.random.choice(actions)(name)

    def read(self, name: str) -> None:
        offset, length = self._span()
        fd = self.random.choice(self.handles[name])
        expected = self.contents[name][offset : offset + length]
        assert os.pread(fd, length, offset) == expected, (name, offset, length)

    def write(self, name: str) -> None:
        offset, length = self._span()
        if not length:
            return
        data = self.random.randbytes(length)
        fd = self.random.choice(self.handles[name])
        assert os.pwrite(fd, data, offset) == length
        content = self.contents[name]
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + length] = data

    def rarely(self, name: str) -> None:
        actions = (self.truncate, self.truncate, self.reopen, self.sync, self.forget, self.size)
        self.random.choice(actions)(name)

    def truncate(self, name: str) -> None:
        size = self._span()[0]
        by: int | Path = self.place.cached / name
        if self.random.random() < 0.5:
            by = self.random.choice(self.handles[name])
        os.truncate(by, size)
        content = self.contents[name]
        del content[size:]
        content.extend(bytes(size - len(content)))

    def reopen(self, name: str) -> None:
        fds = self.handles[name]
        which = self.random.randrange(len(fds))
        os.close(fds[which])
        fds[which] = os.open(self.place.cached / name, os.O_RDWR)

    def sync(self, name: str) -> None:
        self.random.choice((os.fsync, os.fdatasync))(self.handles[name][0])

    def forget(self, name: str) -> None:
        """The kernel lets its pages go, so that the next reads reach the cache."""
        os.posix_fadvise(self.handles[name][0], 0, 0, os.POSIX_FADV_DONTNEED)

    def size(self, name: str) -> None:
        size = len(self.contents[name])
        assert os.fstat(self.handles[name][0]).st_size == size
        assert (self.place.origin / name).stat().st_size == size


@both_modes
@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_reads_and_writes_agree_with_a_model(place: Place, seed: int) -> None:
    model = _Model(place, seed)
    try:
        for _ in range(2500):
            model.step()
        for name, content in model.contents.items():
            assert (place.cached / name).read_bytes() == content
            assert home(place, name) == content
    finally:
        model.close()


def test_holes_read_as_zeros_and_stay_holes(place: Place) -> None:
    with opened(place.cached / "sparse", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, 1 << 30)
        assert os.pwrite(fd, b"x", (1 << 29) + 1) == 1
        assert os.pread(fd, 3, 1 << 29) == b"\0x\0"
        assert os.pread(fd, 4096, (1 << 30) - 4096) == bytes(4096)
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
    assert (place.origin / "sparse").stat().st_blocks * 512 < 1 << 20


# -- syncing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_a_write_through_a_synchronous_descriptor_is_synced_before_its_answer(
    place: Place, tmp_path: Path, flag: int, direct: int
) -> None:
    _image(place, "image", 1, 2)
    pid = place.mount.pid
    assert pid is not None
    trace = tmp_path / "trace"
    with opened(place.cached / "image", os.O_RDWR | flag | direct) as fd, traced(pid, trace):
        for number in range(1, 4):
            assert write_direct(fd, 0, stamped(1, 0, 4096, number)) == 4096
            # strace writes a call's line before the call's caller goes on
            assert syncs(trace, "image") >= number


def test_a_plain_write_is_synced_by_fsync_and_fdatasync_only(place: Place, tmp_path: Path) -> None:
    _image(place, "image", 1, 2)
    pid = place.mount.pid
    assert pid is not None
    trace = tmp_path / "trace"
    with opened(place.cached / "image", os.O_RDWR) as fd, traced(pid, trace):
        assert os.pwrite(fd, stamped(1, 0, 4096, 2), 0) == 4096
        assert syncs(trace, "image") == 0
        os.fdatasync(fd)
        assert syncs(trace, "image") == 1
        assert os.pwrite(fd, stamped(1, 0, 4096, 3), 0) == 4096
        os.fsync(fd)
        assert syncs(trace, "image") == 2


# -- mappings ----------------------------------------------------------------------------------


@both_modes
def test_a_shared_mapping_shows_what_handles_write(place: Place) -> None:
    data = _image(place, "image", 1, 4)
    path = place.cached / "image"
    newer, newest = stamped(1, BLOCK, BLOCK, 2), stamped(1, 2 * BLOCK, 4096, 3)
    with (
        opened(path, os.O_RDWR) as fd,
        opened(path, os.O_RDWR | os.O_DIRECT) as direct,
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == data
        with opened(path, os.O_RDWR) as other:
            assert os.pwrite(other, newer, BLOCK) == BLOCK
        assert mapped[BLOCK : 2 * BLOCK] == newer
        assert write_direct(direct, 2 * BLOCK, newest) == 4096
        assert mapped[2 * BLOCK : 2 * BLOCK + 4096] == newest


@both_modes
def test_what_is_written_in_a_shared_mapping_is_seen_by_others_after_msync(place: Place) -> None:
    _image(place, "image", 1, 4)
    newer = stamped(1, BLOCK, 4096, 2)
    path = place.cached / "image"
    with (
        opened(path, os.O_RDWR) as fd,
        opened(path, os.O_RDONLY | os.O_DIRECT) as direct,
        mmap.mmap(fd, 0, mmap.MAP_SHARED) as mapped,
    ):
        mapped[BLOCK : BLOCK + 4096] = newer
        mapped.flush()
        assert home(place, "image")[BLOCK : BLOCK + 4096] == newer
        assert os.pread(fd, 4096, BLOCK) == newer
        assert read_direct(direct, BLOCK, 4096) == newer
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as other:
            assert other[BLOCK : BLOCK + 4096] == newer


@both_modes
def test_a_mapping_that_outlives_its_descriptor_is_written_back(place: Place) -> None:
    data = bytearray(_image(place, "image", 1, 2))
    with opened(place.cached / "image", os.O_RDWR) as fd:
        mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED)
    mapped[:4096] = stamped(1, 0, 4096, 2)
    mapped.close()
    data[:4096] = stamped(1, 0, 4096, 2)
    deadline = time.monotonic() + 10
    while (place.origin / "image").read_bytes() != data and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (place.origin / "image").read_bytes() == data
    assert (place.cached / "image").read_bytes() == data


@both_modes
def test_pages_written_in_a_mapping_reach_the_origin_when_the_image_is_evicted(
    place: Place,
) -> None:
    _image(place, "image", 1, 2)
    newer = stamped(1, 0, 4096, 2)
    with (
        opened(place.cached / "image", os.O_RDWR) as fd,
        mmap.mmap(fd, 0, mmap.MAP_SHARED) as mapped,
    ):
        mapped[:4096] = newer
        place.evict("image")
        assert (place.origin / "image").read_bytes()[:4096] == newer
        assert mapped[:4096] == newer


# -- several processes -------------------------------------------------------------------------

_WRITER = """
import os, random, sys, fcntl
sys.path.insert(0, sys.argv[1])
from tests.support.stamps import stamped, check_stamps
from tests.support.direct import read_direct, write_direct
path, me, rounds, direct = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
draw = random.Random(me)
fd = os.open(path, os.O_RDWR | direct)
last = {}
size = os.fstat(fd).st_size
for version in range(2, rounds):
    # every process writes pages of its own, 4 of them in a row: all share every block
    place = (draw.randrange(size // 4096) // 4 * 4 + me) * 4096
    if draw.random() < 0.5:
        assert write_direct(fd, place, stamped(7, place, 4096, version)) == 4096
        last[place] = version
    data = read_direct(fd, place, 4096)
    assert set(check_stamps(data, 7, place)) == {last.get(place, 1)}, (place, last.get(place, 1))
    around = place // 65536 * 65536
    for left in reversed(range(20)):
        try:
            check_stamps(read_direct(fd, around, 65536), 7, around)
            break
        except AssertionError as exc:
            # The others write there: what is read at that very moment may be of both versions.
            if "torn" not in str(exc) or not left:
                raise
print(" ".join(f"{place}:{version}" for place, version in last.items()))
"""


@both_modes
def test_several_processes_read_and_write_one_image_as_one_truth(place: Place) -> None:
    _image(place, "image", 7, 16)
    path, root = place.cached / "image", Path(__file__).parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, root, path, str(me), "600", str(direct)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, direct in enumerate((0, os.O_DIRECT, os.O_DIRECT, 0))
    ]
    expected: dict[int, int] = {}
    try:
        for writer in writers:
            out, err = writer.communicate(timeout=90)
            assert writer.returncode == 0, err
            expected.update({int(k): int(v) for k, v in (pair.split(":") for pair in out.split())})
    finally:
        for writer in writers:
            with suppress(ProcessLookupError):
                writer.kill()
            writer.wait()
            for stream in (writer.stdout, writer.stderr):
                if stream is not None:
                    stream.close()
    assert len(expected) > 100
    for data in (path.read_bytes(), home(place, "image")):
        for at in range(0, len(data), 4096):
            assert read_stamp(data[at : at + STAMP]) == (7, at, expected.get(at, 1))


def test_writes_around_the_cache_show_the_same_truth(mount: Mount) -> None:
    mount.options["write_mode"] = "around"
    mount.start()
    (mount.origin / "around").mkdir()
    model = _Model(Place(mount, "around"), 99)
    try:
        for _ in range(1500):
            model.step()
        for name, content in model.contents.items():
            assert (mount.origin / "around" / name).read_bytes() == content
    finally:
        model.close()
