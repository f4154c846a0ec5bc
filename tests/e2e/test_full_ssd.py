"""The SSD is full while the cache runs: guests go on with right data, the next start is sane."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.helpers import ext4, run, wait_for
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

BLOCKS = 64


@pytest.fixture
def full(mount: Mount) -> Iterator[Mount]:
    """A sparse cache on a small filesystem that is about to be full."""
    mount.size = "32M"
    with contextlib.ExitStack() as stack:
        ssd = stack.enter_context(ext4(mount.base / "ssd.img", mount.base / "ssd", 32 << 20))
        mount.cache = ssd / "cache.img"
        mount.cache.touch()
        os.truncate(mount.cache, 32 << 20)
        for number in (1, 2):
            (mount.origin / f"vm{number}.img").write_bytes(stamped(number, 0, BLOCKS * BLOCK, 1))
        stack.callback(mount.cleanup)
        yield mount


def _fill_up(ssd: Path) -> Path:
    """Takes all space that is left, to the last byte."""
    filler = ssd / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        os.fsync(file.fileno())
    return filler


def _works_with_right_data(mount: Mount, version: int) -> None:
    for number in (1, 2):
        path = mount.mountpoint / f"vm{number}.img"
        with open(path, "r+b", buffering=0) as guest:
            for block in range(0, BLOCKS, 3):
                data = stamped(number, block * BLOCK, BLOCK, version)
                assert os.pwrite(guest.fileno(), data, block * BLOCK) == BLOCK
            os.fsync(guest.fileno())
            for block in range(BLOCKS):
                data = os.pread(guest.fileno(), BLOCK, block * BLOCK)
                (found,) = set(check_stamps(data, number, block * BLOCK))
                assert (found == version) == (block % 3 == 0)
        truth = (mount.origin / f"vm{number}.img").read_bytes()
        check_stamps(truth, number, 0)
        assert path.read_bytes() == truth


def test_a_full_ssd_with_the_database_elsewhere(full: Mount) -> None:
    full.options["db"] = str(full.base / "map.sqlite")
    full.start()
    filler = _fill_up(full.cache.parent)
    _works_with_right_data(full, 2)
    wait_for(lambda: full.status()["cache"]["state"] != "ok", "trouble in the status")
    status = full.status()
    assert status["cache"]["errors"] > 0
    assert "No space" in status["cache"]["trouble"]
    assert "No space" in full.run("status").stdout
    _works_with_right_data(full, 3)
    full.stop()
    filler.unlink()
    full.start()
    _works_with_right_data(full, 4)
    assert full.status()["cache"]["state"] == "ok"
    full.stop()


def test_a_full_ssd_with_the_database_on_it(full: Mount) -> None:
    full.start()
    filler = _fill_up(full.cache.parent)
    _works_with_right_data(full, 2)
    wait_for(lambda: full.status()["cache"]["state"] != "ok", "trouble in the status")
    _works_with_right_data(full, 3)
    full.stop()
    done = full.run("mount", *full.arguments())
    if done.returncode == 0:
        _works_with_right_data(full, 4)
        full.stop()
    else:
        assert done.stderr.count("fusecache: ") == 1, done.stderr
        assert "Make room" in done.stderr
    filler.unlink()
    full.start()
    _works_with_right_data(full, 5)
    full.stop()


def test_a_full_ssd_and_a_killed_daemon(full: Mount) -> None:
    full.start()
    _works_with_right_data(full, 2)
    filler = _fill_up(full.cache.parent)
    _works_with_right_data(full, 3)
    full.kill()
    run("umount", full.mountpoint)
    filler.unlink()
    full.start()
    _works_with_right_data(full, 4)
    full.stop()


def _write_all(mount: Mount, version: int) -> None:
    for number in (1, 2):
        with open(mount.mountpoint / f"vm{number}.img", "r+b", buffering=0) as guest:
            for block in range(BLOCKS):
                data = stamped(number, block * BLOCK, BLOCK, version)
                assert os.pwrite(guest.fileno(), data, block * BLOCK) == BLOCK
            os.fsync(guest.fileno())
        assert _versions(mount.mountpoint / f"vm{number}.img", number) == {version}


def _versions(path: Path, number: int) -> set[int]:
    return set(check_stamps(path.read_bytes(), number, 0))


@pytest.mark.parametrize("elsewhere", [True, False], ids=["database elsewhere", "database on it"])
def test_dirty_data_on_an_ssd_that_fills_up_comes_home(full: Mount, elsewhere: bool) -> None:
    full.options |= {"write_mode": "back", "dirty_age": "3600", "dirty_limit": "90"}
    if elsewhere:
        full.options["db"] = str(full.base / "map.sqlite")
    full.start()
    _write_all(full, 2)
    assert full.status()["cache"]["dirty_bytes"] > 0
    filler = _fill_up(full.cache.parent)
    for version in (3, 4):
        _write_all(full, version)
    done = full.run("umount", full.mountpoint)
    assert done.returncode == 0, done.stderr
    for number in (1, 2):
        assert _versions(full.origin / f"vm{number}.img", number) == {4}
    filler.unlink()
    full.start()
    for number in (1, 2):
        assert _versions(full.mountpoint / f"vm{number}.img", number) == {4}
    full.stop()
