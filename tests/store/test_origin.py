"""One image on the origin: read and written by descriptor, known by identity."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.errors import LockedElsewhereError, OriginError
from fusecache.store import syscalls
from fusecache.store.origin import Attributes, OriginImage, attributes_of, identity_of
from tests.support.descriptors import count_descriptors
from tests.support.stamps import stamped

PUNCH = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE


@contextlib.contextmanager
def pinned(path: Path) -> Iterator[int]:
    """An O_PATH descriptor, as a look-up makes it."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def image() -> Iterator[OriginImage]:
    made = OriginImage()
    try:
        yield made
    finally:
        made.close()
        made.close()


def open_image(image: OriginImage, path: Path, *, write: bool = False) -> Attributes:
    with pinned(path) as fd:
        return image.open(fd, write=write)


def identity(path: Path) -> bytes:
    with pinned(path) as fd:
        return identity_of(fd, 7)


# -- identity -------------------------------------------------------------------------------------


def test_identity_survives_renames_links_writes_and_other_owners(tmp_path: Path) -> None:
    path, new = tmp_path / "a.img", tmp_path / "b.img"
    path.write_bytes(b"one")
    before = identity(path)
    path.rename(new)
    os.link(new, path)
    new.write_bytes(b"other content, other size")
    new.chmod(0o400)
    assert identity(path) == identity(new) == before


def test_identity_differs_between_images_filesystems_and_lives_of_an_inode(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    seen = set()
    inodes = set()
    for _ in range(20):
        path.write_bytes(b"")
        seen.add(identity(path))
        inodes.add(path.stat().st_ino)
        path.unlink()
    assert len(seen) == 20, f"the same identity again; {len(inodes)} inode numbers were used"
    path.write_bytes(b"")
    with pinned(path) as fd:
        assert identity_of(fd, 7) != identity_of(fd, 8)
        assert attributes_of(fd) == Attributes.of(path.stat())


# -- opening --------------------------------------------------------------------------------------


def test_an_image_opens_from_a_pinned_descriptor_whatever_its_name_is_now(
    tmp_path: Path, image: OriginImage
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"the right one")
    with pinned(path) as fd:
        path.rename(tmp_path / "moved")
        path.write_bytes(b"a wrong one, put in its place")
        assert image.open(fd, write=False).size == len(b"the right one")
        assert image.read(0, 100) == b"the right one"
        (tmp_path / "moved").unlink()
        assert image.open(fd, write=True).size == len(b"the right one")
        image.write(4, b"R")
        assert image.read(0, 100) == b"the Right one"


def test_fifos_directories_and_links_are_refused_without_blocking(
    tmp_path: Path, image: OriginImage
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for path in (tmp_path / "fifo", tmp_path / "link", tmp_path, Path("/dev/null")):
        for write in (False, True):
            with pytest.raises(OriginError, match="only regular files") as caught:
                open_image(image, path, write=write)
            assert caught.value.errno == 22
    assert not image.readable
    assert not image.writable


def test_opening_again_takes_the_old_ones_place_and_leaks_nothing(
    tmp_path: Path, image: OriginImage
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"1234")
    open_image(image, path)
    open_image(image, path, write=True)
    numbers = (image._read_fd, image._write_fd)
    before = count_descriptors()
    path.write_bytes(b"123456")
    for write in (False, True):
        assert open_image(image, path, write=write).size == 6
    assert (image._read_fd, image._write_fd) == numbers
    assert count_descriptors() == before
    assert not any(os.get_inheritable(fd) for fd in numbers)
    image.close()
    assert count_descriptors() == before - 2


def test_reads_go_on_while_the_descriptor_is_replaced(tmp_path: Path, image: OriginImage) -> None:
    path = tmp_path / "a.img"
    data = stamped(1, 0, 1 << 20, 1)
    path.write_bytes(data)
    open_image(image, path)
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                if image.read(4096, 65536) != data[4096 : 4096 + 65536]:
                    wrong.append("other bytes")
            except OriginError as exc:
                wrong.append(exc)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        open_image(image, path)
        os.close(os.open("/dev/null", os.O_RDONLY))  # would take a number that was let go
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- data -----------------------------------------------------------------------------------------


def test_reads_are_short_only_at_the_end(tmp_path: Path, image: OriginImage) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"0123456789")
    open_image(image, path)
    assert image.read(0, 10) == image.read(0, 4096) == b"0123456789"
    assert image.read(8, 4) == b"89"
    assert image.read(10, 4) == image.read(1 << 40, 4) == image.read(3, 0) == b""
    with path.open("ab") as file:
        file.write(b"ab")
    assert image.read(8, 10) == b"89ab"


def test_a_read_that_the_kernel_cuts_short_is_continued(
    tmp_path: Path, image: OriginImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(range(100)))
    open_image(image, path, write=True)
    open_image(image, path)
    pread, pwrite = os.pread, os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 7), at))
        patched.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
        assert image.read(5, 50) == bytes(range(5, 55))
        assert image.read(90, 50) == bytes(range(90, 100))
        image.write(50, b"eleven byte")
    assert path.read_bytes()[48:63] == bytes([48, 49]) + b"eleven byte" + bytes([61, 62])


def test_writes_extend_truncates_cut_and_syncs_take_either_descriptor(
    tmp_path: Path, image: OriginImage
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"")
    open_image(image, path, write=True)
    image.sync()
    image.write(5, memoryview(b"hello"))
    assert path.read_bytes() == b"\0" * 5 + b"hello"
    image.truncate(7)
    assert image.attributes() == Attributes.of(path.stat())
    assert image.attributes().size == 7
    image.close()
    open_image(image, path)
    image.sync(metadata=False)
    assert (image.readable, image.writable) == (True, False)
    assert image.attributes().size == 7


def test_the_origins_error_number_is_kept(tmp_path: Path, image: OriginImage) -> None:
    for call in (lambda: image.read(0, 1), lambda: image.write(0, b"x"), image.attributes):
        with pytest.raises(OriginError) as caught:
            call()
        assert caught.value.errno == 9
    with pytest.raises(OriginError) as caught:
        image.open(-1, write=False)
    assert caught.value.errno == 9
    path = tmp_path / "a.img"
    path.write_bytes(b"x")
    open_image(image, path, write=True)
    with pytest.raises(OriginError, match="truncating") as caught:
        image.truncate(1 << 62)
    assert caught.value.errno == 27


def test_the_birth_time_tells_files_apart_where_there_are_no_handles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "file_handle", lambda fd: b"")
    path = tmp_path / "image"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_PATH)
    try:
        born = syscalls.birth_time(fd)
        assert abs(int.from_bytes(born[:8], "little") - path.stat().st_mtime) < 60
        assert identity_of(fd, 7) == identity_of(fd, 7)
        assert identity_of(fd, 7).endswith(born)
    finally:
        os.close(fd)


# -- holes -----------------------------------------------------------------------------------------


def test_space_is_freed_reserved_and_looked_for(tmp_path: Path, image: OriginImage) -> None:
    path, unit = tmp_path / "a.img", 1 << 20
    path.write_bytes(b"x" * (4 * unit))
    open_image(image, path, write=True)
    assert image.seek(0, os.SEEK_HOLE) == 4 * unit  # by the only descriptor there is
    open_image(image, path)
    used = path.stat().st_blocks
    image.allocate(PUNCH, unit, unit)
    assert path.stat().st_blocks == used - unit // 512 and path.stat().st_size == 4 * unit
    assert path.read_bytes() == b"x" * unit + bytes(unit) + b"x" * (2 * unit)
    assert image.seek(0, os.SEEK_DATA) == 0
    assert image.seek(0, os.SEEK_HOLE) == unit
    assert image.seek(unit + 5, os.SEEK_HOLE) == unit + 5
    assert image.seek(unit + 5, os.SEEK_DATA) == 2 * unit
    assert image.seek(4 * unit, os.SEEK_DATA) is image.seek(4 * unit, os.SEEK_HOLE) is None
    image.allocate(PUNCH, 3 * unit, 2 * unit)
    assert image.seek(3 * unit, os.SEEK_DATA) is None
    assert image.read(2 * unit, 2 * unit) == b"x" * unit + bytes(unit)  # wherever one looked last
    image.allocate(syscalls.FALLOC_KEEP_SIZE, 4 * unit, unit)
    assert path.stat().st_size == 4 * unit
    image.allocate(0, 4 * unit, unit)
    assert path.stat().st_size == 5 * unit and path.stat().st_blocks >= used - unit // 512


def test_a_range_is_set_to_zeros_where_the_filesystem_can(
    tmp_path: Path, image: OriginImage
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * 65536)
    open_image(image, path, write=True)
    try:
        image.allocate(syscalls.FALLOC_ZERO_RANGE, 4096, 65536)
    except OriginError as exc:
        assert exc.errno == errno.EOPNOTSUPP
        assert path.read_bytes() == b"x" * 65536
    else:
        assert path.read_bytes() == b"x" * 4096 + bytes(65536)


def test_offsets_beyond_four_gigabytes_reach_the_kernel_whole(
    tmp_path: Path, image: OriginImage
) -> None:
    path, far = tmp_path / "a.img", (5 << 30) + 4096
    path.touch()
    open_image(image, path, write=True)
    image.allocate(0, far, 4096)
    assert path.stat().st_size == far + 4096
    image.write(far, b"x" * 4096)
    assert image.seek(0, os.SEEK_DATA) == far
    image.allocate(PUNCH, 8192, far + 4096)
    assert image.seek(0, os.SEEK_DATA) is None and path.stat().st_blocks == 0


def test_what_the_kernel_refuses_is_said_with_its_number(
    tmp_path: Path, image: OriginImage
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * 4096)
    open_image(image, path)
    with pytest.raises(OriginError, match="allocating or freeing space at 0") as caught:
        image.allocate(0, 0, 4096)  # not open for writing
    assert caught.value.errno == errno.EBADF
    open_image(image, path, write=True)
    with pytest.raises(OriginError) as caught:
        image.allocate(PUNCH | 0x80, 0, 4096)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OriginError, match="looking for data or a hole at 0"):
        image.seek(0, 99)


def test_what_is_closed_later_is_nobody_elses_number(tmp_path: Path, image: OriginImage) -> None:
    """A close may be left behind while the origin stalls; the next open must not meet it."""
    path = tmp_path / "image"
    path.write_bytes(bytes(100))
    with pinned(path) as path_fd:
        image.open(path_fd, write=True)
        image.lock(path_fd)
        close = image.closer()
        assert not (image.readable or image.writable or image.locked)
        image.open(path_fd, write=False)
        unlock = image.unlocker()
        assert image.attributes().size == path.stat().st_size
        close()
        unlock()
        assert image.readable and image.attributes().size == path.stat().st_size
        image.lock(path_fd)
        unlock = image.unlocker()
        assert not image.locked
        with pytest.raises(LockedElsewhereError):
            image.lock(path_fd)  # it is on its way out
        unlock()
        image.lock(path_fd)
        assert image.locked
    image.close()


@pytest.mark.parametrize("openers", [1, 2])
def test_a_close_does_not_wait_for_an_open_that_the_server_holds_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: OriginImage, openers: int
) -> None:
    """The event loop asks for it, and would hang with all guests (P6). What the open has replaced
    by the end is closed by it."""
    (tmp_path / "image").touch()
    held, replaced, dup2 = threading.Event(), threading.Semaphore(0), os.dup2

    def stalling(fd: int, old: int, inheritable: bool) -> int:
        done = dup2(fd, old, inheritable)
        replaced.release()
        assert held.wait(20)
        return done

    before = count_descriptors()
    with pinned(tmp_path / "image") as path_fd, monkeypatch.context() as patch:
        image.open(path_fd, write=False)
        patch.setattr(os, "dup2", stalling)
        again = [image.opener(path_fd, write=False) for _ in range(openers)]
        threads = [threading.Thread(target=each) for each in again]
        for thread in threads:
            thread.start()
            assert replaced.acquire(timeout=20)
        closing = threading.Thread(target=lambda: image.closer()())
        closing.start()
        closing.join(5)
        hung = closing.is_alive()
        held.set()
        for thread in [closing, *threads]:
            thread.join(20)
        assert not hung and not image.readable
    assert count_descriptors() == before


def test_a_close_that_fails_has_closed_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: OriginImage
) -> None:
    closed = list[int]()

    def failing(fd: int) -> None:
        closed.append(fd)
        os_close(fd)
        raise OSError(errno.EIO, "input/output error")

    os_close = os.close
    (tmp_path / "image").touch()
    with pinned(tmp_path / "image") as path_fd:
        image.open(path_fd, write=False)
        image.open(path_fd, write=True)
        close = image.closer()
        with monkeypatch.context() as patched, pytest.raises(OriginError):
            patched.setattr(os, "close", failing)
            close()
    assert len(closed) == 2
