"""One image on the origin: read and written by descriptor, known by identity."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.errors import OriginError
from fusecache.store import syscalls
from fusecache.store.origin import Attributes, OriginImage, attributes_of, identity_of
from tests.support.stamps import stamped


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


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


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
