"""The cache device: what may be used, what is refused, and who has it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusecache.errors import (
    CacheDeviceError,
    CacheInUseError,
    EmptyCacheError,
    NotACacheError,
    SuperblockError,
)
from fusecache.store import cache_device
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import DATA_OFFSET, MAGIC, Fence, Superblock
from tests.support.stamps import stamped

MIB = 1 << 20
BLOCK = 65536


def make(path: Path, size: int = 4 * MIB) -> CacheDevice:
    """A formatted, open cache."""
    if not path.exists():
        cache_device.create_file(path, size)
    fd = cache_device.open_locked(path)
    superblock = cache_device.plan(fd, path, BLOCK, None)
    cache_device.write_superblock(fd, path, superblock)
    return CacheDevice(path, fd, superblock)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A locked descriptor for as long as the block lasts."""
    fd = cache_device.open_locked(path)
    try:
        yield fd
    finally:
        os.close(fd)


def superblock_of(path: Path) -> Superblock:
    with opened(path) as fd:
        return cache_device.read_superblock(fd, path)


# -- data -----------------------------------------------------------------------------------------


def test_slots_hold_what_was_written_and_begin_at_1_mib(tmp_path: Path) -> None:
    device = make(tmp_path / "cache")
    try:
        slots = device.superblock.slot_count
        assert slots == (4 * MIB - DATA_OFFSET) // BLOCK
        for slot in range(slots):
            device.write(slot * BLOCK, stamped(1, slot * BLOCK, BLOCK, 7))
        device.write(BLOCK + 512, memoryview(stamped(1, BLOCK + 512, 512, 8)))
        device.sync()
        for slot in (0, 2, slots - 1):
            assert device.read(slot * BLOCK, BLOCK) == stamped(1, slot * BLOCK, BLOCK, 7)
        assert device.read(BLOCK + 512, 512) == stamped(1, BLOCK + 512, 512, 8)
        assert device.read(BLOCK + 1024, 512) == stamped(1, BLOCK + 1024, 512, 7)
        raw = (tmp_path / "cache").read_bytes()
        assert raw.startswith(MAGIC)
        assert raw[DATA_OFFSET : DATA_OFFSET + 512] == stamped(1, 0, 512, 7)
        buffer = bytearray(BLOCK)
        if device.try_read(3 * BLOCK, memoryview(buffer)):
            assert buffer == stamped(1, 3 * BLOCK, BLOCK, 7)
    finally:
        device.close()
        device.close()


def test_a_sync_that_the_lane_owes_fails_once(tmp_path: Path) -> None:
    """The kernel may have dropped what it could not write, and says that all is well."""
    device = make(tmp_path / "cache")
    try:
        device.owe(5)
        with pytest.raises(CacheDeviceError, match="Input/output error"):
            device.sync()
        device.sync()
    finally:
        device.close()


def test_reading_past_the_end_is_an_error_and_not_short_data(tmp_path: Path) -> None:
    device = make(tmp_path / "cache")
    with contextlib.closing(device):
        with pytest.raises(CacheDeviceError, match="shorter"):
            device.read(3 * MIB - 512, 1024)
        assert not device.try_read(3 * MIB - 512, memoryview(bytearray(1024)))


def test_a_closed_or_broken_device_raises_its_own_error(tmp_path: Path) -> None:
    device = make(tmp_path / "cache")
    device.close()
    for call in (lambda: device.read(0, 1), lambda: device.write(0, b"x")):
        with pytest.raises(CacheDeviceError, match=str(tmp_path)):
            call()
    full = CacheDevice(Path("/dev/full"), os.open("/dev/full", os.O_RDWR), device.superblock)
    with contextlib.closing(full), pytest.raises(CacheDeviceError, match="No space left"):
        full.write(0, b"x")


def test_the_fence_is_written_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    device = make(path)
    device.write(0, b"data")
    for fence in (Fence.ALL, Fence.CLEAN, Fence.NONE):
        device.set_fence(fence)
        assert device.fence is fence
        assert Superblock.unpack(path.read_bytes()[:4096]).fence is fence
    assert device.read(0, 4) == b"data"
    device.close()
    assert superblock_of(path).uuid == device.superblock.uuid


# -- what may be formatted, and what is refused ---------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, MIB, 3 * MIB])
def test_nothing_but_zeros_is_empty(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cache"
    path.write_bytes(bytes(size))
    with pytest.raises(EmptyCacheError):
        superblock_of(path)


@pytest.mark.parametrize("at", [0, 511, 1024, 65536, MIB - 1, 7 * MIB, 8 * MIB - 512, 8 * MIB - 1])
def test_one_byte_in_the_first_or_last_mib_is_foreign_content(tmp_path: Path, at: int) -> None:
    path = tmp_path / "cache"
    data = bytearray(8 * MIB)
    data[at] = 1
    path.write_bytes(data)
    with pytest.raises(NotACacheError, match=r"format .*cache --force") as caught:
        superblock_of(path)
    assert not isinstance(caught.value, EmptyCacheError)


def filesystem(path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, capture_output=True)


def partition_table(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(446)
        file.write(bytes([0x80, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + b"\1")
        file.seek(510)
        file.write(b"\x55\xaa")


def backup_gpt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(b"EFI PART")


FOREIGN = [filesystem, partition_table, backup_gpt]


@pytest.mark.parametrize("write", FOREIGN)
@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_filesystem_or_a_partition_table_is_refused(
    tmp_path: Path, loop_device: Callable[[int], Path], write: Callable[[Path], None], kind: str
) -> None:
    if kind == "device":
        path = loop_device(16 * MIB)
    else:
        path = tmp_path / "disk"
        path.write_bytes(b"")
        os.truncate(path, 16 * MIB)
    with pytest.raises(EmptyCacheError):
        superblock_of(path)
    write(path)
    with pytest.raises(NotACacheError, match="filesystem, a partition table") as caught:
        superblock_of(path)
    assert not isinstance(caught.value, EmptyCacheError)


def test_erasing_and_writing_the_superblock_makes_and_unmakes_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"something else".ljust(4 * MIB, b"\0"))
    with opened(path) as fd:
        superblock = cache_device.plan(fd, path, BLOCK, None)
        cache_device.erase_superblock(fd, path)
        with pytest.raises(EmptyCacheError):
            cache_device.read_superblock(fd, path)
        cache_device.write_superblock(fd, path, superblock)
        assert cache_device.read_superblock(fd, path) == superblock
        cache_device.erase_superblock(fd, path)
        with pytest.raises(EmptyCacheError):
            cache_device.read_superblock(fd, path)
    assert path.stat().st_size == 4 * MIB


def test_a_truncated_cache_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make(path, 4 * MIB).close()
    os.truncate(path, 3 * MIB)
    with pytest.raises(SuperblockError, match=r"3\.0 MiB but .* 4\.0 MiB: it was cut short"):
        superblock_of(path)
    os.truncate(path, 4096)
    with pytest.raises(SuperblockError, match="cut short"):
        superblock_of(path)


def test_a_damaged_superblock_is_refused_and_not_taken_for_empty(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make(path).close()
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    with pytest.raises(SuperblockError, match=r"checksum.*fusecache repair"):
        superblock_of(path)


@pytest.mark.parametrize("size", [0, MIB, DATA_OFFSET + 15 * BLOCK, DATA_OFFSET + 16 * BLOCK - 1])
def test_too_small_a_cache_is_refused_with_the_least_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cache"
    path.write_bytes(bytes(size))
    with opened(path) as fd, pytest.raises(CacheDeviceError, match=r"at least 2\.0 MiB"):
        cache_device.plan(fd, path, BLOCK, None)


def test_a_plan_uses_the_whole_device_or_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(bytes(5 * MIB + 100))
    with opened(path) as fd:
        assert cache_device.plan(fd, path, BLOCK, None).slot_count == 64
        assert cache_device.plan(fd, path, BLOCK, 3 * MIB).slot_count == 32
        one, other = (cache_device.plan(fd, path, 4096, None) for _ in range(2))
        assert one.slot_count == 1024
        assert one.uuid != other.uuid


def test_directories_fifos_and_missing_paths_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NotACacheError, match="is a directory"):
        cache_device.open_locked(tmp_path)
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(NotACacheError, match="neither a file nor a block device"):
            cache_device.open_locked(path)
    with pytest.raises(CacheDeviceError, match="No such file"):
        cache_device.open_locked(tmp_path / "missing")


def test_a_new_file_is_private_and_has_its_space(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache_device.create_file(path, 2 * MIB)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 2 * MIB
    assert path.stat().st_blocks * 512 >= 2 * MIB


def test_a_file_that_finds_no_space_is_not_left_behind(
    tmp_path: Path, tmpfs: Callable[[Path], None]
) -> None:
    tmpfs(tmp_path / "small")
    path = tmp_path / "small" / "cache"
    with pytest.raises(CacheDeviceError, match=r"No space left.*smaller --size"):
        cache_device.create_file(path, 64 * MIB)
    assert not path.exists()
    with pytest.raises(CacheDeviceError, match="Cannot create the cache"):
        cache_device.create_file(tmp_path / "nowhere" / "cache", MIB)


# -- one user at a time ---------------------------------------------------------------------------

HOLD = """
import sys, pathlib
from fusecache.store import cache_device
fd = cache_device.open_locked(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_second_user_is_refused_and_the_first_ones_pid_named(
    tmp_path: Path, loop_device: Callable[[int], Path], kind: str
) -> None:
    path = loop_device(4 * MIB) if kind == "device" else tmp_path / "cache"
    if kind == "file":
        cache_device.create_file(path, 4 * MIB)
    root = Path(cache_device.__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(CacheInUseError, match=rf"in use.*\(pid {holder.pid}\)\."):
            cache_device.open_locked(path)
        holder.stdin.close()
    with opened(path):
        pass


def test_a_block_device_that_is_mounted_is_refused(
    tmp_path: Path, loop_device: Callable[[int], Path]
) -> None:
    device = loop_device(16 * MIB)
    filesystem(device)
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    subprocess.run(["mount", device, mountpoint], check=True)
    try:
        with pytest.raises(CacheInUseError, match="in use: mounted"):
            cache_device.open_locked(device)
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def test_a_block_device_is_opened_exclusively(loop_device: Callable[[int], Path]) -> None:
    device = loop_device(4 * MIB)
    other = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)  # takes no flock
    try:
        with pytest.raises(CacheInUseError, match="open elsewhere"):
            cache_device.open_locked(device)
    finally:
        os.close(other)


def test_a_block_device_serves_as_a_cache(loop_device: Callable[[int], Path]) -> None:
    path = loop_device(4 * MIB)
    device = make(path)
    device.write(5 * BLOCK, stamped(3, 0, BLOCK, 1))
    device.sync()
    device.close()
    superblock = superblock_of(path)
    assert superblock == device.superblock
    with contextlib.closing(CacheDevice(path, cache_device.open_locked(path), superblock)) as again:
        assert again.read(5 * BLOCK, BLOCK) == stamped(3, 0, BLOCK, 1)


def test_the_descriptor_is_not_inherited_by_children(tmp_path: Path) -> None:
    device = make(tmp_path / "cache")
    with contextlib.closing(device):
        assert not os.get_inheritable(device._fd)
