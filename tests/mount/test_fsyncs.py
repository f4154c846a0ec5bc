"""What a guest's fsync promises when the lane does it (P2)."""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import daemon
from tests.support.daemon import BLOCK
from tests.support.direct import opened, read_direct, write_direct
from tests.support.injected import InjectedMount
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

PAGE = 4096


class SickMount(InjectedMount):
    """Syncs of its cache wait or fail; see sick_syncs.c."""

    def run(self, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            if args[0] == "mount":
                patch.setenv("LD_PRELOAD", str(self.base / "sick_syncs.so"))
            return super().run(*args, **kwargs)


@pytest.fixture
def sick(tmp_path: Path) -> Iterator[SickMount]:
    """In write-back, with an image whose first block is dirty and was fsynced."""
    if daemon.lane == "off":
        pytest.skip("the lane does it")
    made = SickMount(tmp_path / "fc", write_mode="back", dirty_age="3600")
    source = Path(__file__).with_name("sick_syncs.c")
    build = ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]
    subprocess.run([*build, made.base / "sick_syncs.so", source], check=True)
    for number in (1, 2):
        (made.origin / f"vm{number}.img").write_bytes(stamped(number, 0, 4 * BLOCK, 1))
    watchdog = threading.Timer(60, made.cleanup)
    watchdog.start()
    try:
        yield made
    finally:
        (made.faults / "hold-sync").unlink(missing_ok=True)
        watchdog.cancel()
        watchdog.join()
        made.cleanup()


def write(fd: int, number: int, offset: int, version: int) -> None:
    write_direct(fd, offset, stamped(number, offset, PAGE, version))


def begin(fd: int) -> None:
    """Page 0 is dirty, and only its data has changed since the last fsync."""
    write(fd, 1, 0, 2)
    os.fsync(fd)
    write(fd, 1, 0, 3)


def done(mount: SickMount) -> int:
    """Fsyncs that the lane did."""
    return int(mount.status()["lane"]["fsyncs"])


def test_who_writes_over_dirty_pages_is_fsynced_by_the_lane(sick: SickMount) -> None:
    sick.start()
    with opened(sick.mountpoint / "vm1.img", os.O_RDWR | os.O_DIRECT) as fd:
        begin(fd)
        assert done(sick) == 0
        for version in range(4, 20):
            os.fsync(fd)
            write(fd, 1, 0, version)
            os.fdatasync(fd)
        assert done(sick) == 32
        write(fd, 1, PAGE, 2)  # a page that was clean: its row has to be stable, too
        os.fsync(fd)
        assert done(sick) == 32
        os.fsync(fd)
        assert done(sick) == 33
        os.fchmod(fd, 0o640)  # the origin has something to sync
        os.fsync(fd)
        os.ftruncate(fd, 4 * BLOCK + 512)
        os.fsync(fd)
        assert done(sick) == 33
        os.fsync(fd)
        assert done(sick) == 34
        assert read_direct(fd, 0, PAGE) == stamped(1, 0, PAGE, 19)
    sick.stop()
    assert (sick.origin / "vm1.img").read_bytes()[:PAGE] == stamped(1, 0, PAGE, 19)


def test_whom_a_hanging_sync_does_not_hold_up(sick: SickMount) -> None:
    sick.start()
    with (
        opened(sick.mountpoint / "vm1.img", os.O_RDWR | os.O_DIRECT) as fd,
        opened(sick.mountpoint / "vm2.img", os.O_RDWR | os.O_DIRECT) as other,
    ):
        write(other, 2, 0, 2)
        begin(fd)
        (sick.faults / "hold-sync").touch()
        returned = threading.Event()
        guest = threading.Thread(target=lambda: (os.fsync(fd), returned.set()), daemon=True)
        guest.start()
        assert not returned.wait(0.3)
        write(other, 2, 0, 3)  # to the same image the kernel would not let it through
        assert read_direct(other, 0, PAGE) == stamped(2, 0, PAGE, 3)
        assert read_direct(fd, 0, PAGE) == stamped(1, 0, PAGE, 3)
        assert done(sick) == 0
        (sick.faults / "hold-sync").unlink()
        assert returned.wait(20)
        guest.join()
        assert done(sick) == 1
    sick.stop()


def test_a_failed_sync_is_told_and_what_it_was_about_is_lost(sick: SickMount) -> None:
    """Who wrote and was not synced gets EIO, never old data; others go on."""
    sick.start()
    with (
        opened(sick.mountpoint / "vm1.img", os.O_RDWR | os.O_DIRECT) as fd,
        opened(sick.mountpoint / "vm2.img", os.O_RDWR | os.O_DIRECT) as other,
    ):
        write(fd, 1, PAGE, 2)
        begin(fd)
        (sick.faults / "fail-sync").touch()
        with pytest.raises(OSError) as caught:
            os.fsync(fd)
        assert caught.value.errno == errno.EIO
        # The lane's has failed; of the next ones the kernel would say that all is well.
        assert not (sick.faults / "fail-sync").exists()
        with pytest.raises(OSError):
            os.fsync(fd)
        with pytest.raises(OSError):
            read_direct(fd, 0, PAGE)
        assert read_direct(fd, PAGE, PAGE) == stamped(1, PAGE, PAGE, 2)
        assert done(sick) == 0
        write(other, 2, 0, 2)
        os.fsync(other)
        assert read_direct(other, 0, BLOCK)[:PAGE] == stamped(2, 0, PAGE, 2)
    assert sick.image("vm1.img")["lost"] == [[0, PAGE]]
