"""Guests free, zero and reserve ranges, and look for data and holes, which takes the lane."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.modes import both_modes, home
from tests.support import daemon
from tests.support.daemon import BLOCK
from tests.support.direct import opened, read_direct
from tests.support.place import Place
from tests.support.stamps import stamped

SIZE = 16 * BLOCK
needs_lane = pytest.mark.skipif(
    "config.getoption('--lane') == 'off'", reason="pyfuse3 has no words for fallocate or lseek"
)


def fallocate(path: Path, *arguments: object) -> None:
    """fallocate(1)."""
    command = ["fallocate", *map(str, arguments), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cached(place: Place, name: str) -> int:
    """Bytes of an image that are cached."""
    return int(place.image(name)["cached_bytes"])


@needs_lane
@both_modes
def test_a_guest_frees_a_range(place: Place) -> None:
    data = stamped(1, 0, SIZE, 1)
    (place.cached / "a").write_bytes(data)
    with opened(place.cached / "a", os.O_RDWR | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, SIZE) == data
        before = cached(place, "a")
        fallocate(place.cached / "a", "--punch-hole", "--offset", 2 * BLOCK, "--length", 8 * BLOCK)
        wanted = data[: 2 * BLOCK] + bytes(8 * BLOCK) + data[10 * BLOCK :]
        assert cached(place, "a") <= before - 8 * BLOCK
        assert read_direct(fd, 0, SIZE) == wanted
    assert (place.cached / "a").read_bytes() == wanted
    assert home(place, "a") == wanted
    assert (place.origin / "a").stat().st_blocks * 512 <= SIZE - 8 * BLOCK


@needs_lane
@both_modes
def test_parts_of_pages_are_zeroed_and_a_zeroed_range_may_make_the_file_longer(
    place: Place,
) -> None:
    data = stamped(1, 0, SIZE, 1)
    (place.cached / "a").write_bytes(data)
    fallocate(place.cached / "a", "--punch-hole", "--offset", 1000, "--length", 9000)
    wanted = data[:1000] + bytes(9000) + data[10000:]
    assert (place.cached / "a").read_bytes() == wanted
    fallocate(place.cached / "a", "--zero-range", "--offset", SIZE - 5000, "--length", 9096)
    wanted = wanted[: SIZE - 5000] + bytes(9096)
    assert (place.cached / "a").read_bytes() == wanted
    fallocate(place.cached / "a", "--length", SIZE + 3 * BLOCK)
    wanted += bytes(SIZE + 3 * BLOCK - len(wanted))
    assert (place.cached / "a").read_bytes() == wanted
    fallocate(place.cached / "a", "--keep-size", "--length", SIZE + 9 * BLOCK)
    assert (place.cached / "a").stat().st_size == len(wanted)
    assert home(place, "a") == wanted


@needs_lane
@both_modes
def test_data_and_holes_are_found_where_a_guest_would_read_them(place: Place) -> None:
    with (place.cached / "a").open("wb") as file:
        file.truncate(SIZE)
    with opened(place.cached / "a", os.O_RDWR) as fd:
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        with pytest.raises(OSError) as caught:
            os.lseek(fd, 0, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        os.pwrite(fd, stamped(1, 4 * BLOCK, BLOCK, 1), 4 * BLOCK)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 4 * BLOCK
        assert os.lseek(fd, 4 * BLOCK, os.SEEK_HOLE) == 5 * BLOCK
        assert os.lseek(fd, SIZE - 1, os.SEEK_HOLE) == SIZE - 1


@needs_lane
def test_a_handle_for_reading_changes_nothing(place: Place) -> None:
    (place.origin / "a").write_bytes(stamped(1, 0, BLOCK, 1))
    with opened(place.cached / "a", os.O_RDONLY) as fd, pytest.raises(OSError) as caught:
        os.posix_fallocate(fd, 0, 2 * BLOCK)
    assert caught.value.errno == errno.EBADF


@needs_lane
@both_modes
def test_qemu_discards_and_its_image_stays_right(place: Place) -> None:
    (place.cached / "a").write_bytes(stamped(1, 0, SIZE, 1))
    command = [
        "qemu-io", "-f", "raw", "-d", "unmap", "-t", "none",
        "-c", f"discard {BLOCK} {2 * BLOCK}", "-c", f"read -P 0 {BLOCK} {2 * BLOCK}",
        "-c", "flush", str(place.cached / "a"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "verification failed" not in done.stdout, done.stdout
    data = stamped(1, 0, SIZE, 1)
    assert home(place, "a") == data[:BLOCK] + bytes(2 * BLOCK) + data[3 * BLOCK :]


@pytest.mark.skipif("config.getoption('--lane') == 'on'", reason="the lane takes it")
def test_without_the_lane_nothing_is_freed(place: Place) -> None:
    assert daemon.lane == "off"
    data = stamped(1, 0, SIZE, 1)
    (place.cached / "a").write_bytes(data)
    command = ["fallocate", "--punch-hole", "--length", str(BLOCK), str(place.cached / "a")]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert (place.cached / "a").read_bytes() == data
