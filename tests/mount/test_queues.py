"""The kernel's queues (FUSE over io_uring): run with ``--queues``, as ``make test`` does where the
kernel can."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.fuse import queues
from fusecache.fuse.mounts import CONNECTIONS
from fusecache.store.mountinfo import mount_at
from tests.support.daemon import BLOCK
from tests.support.direct import opened, read_direct, write_direct
from tests.support.injected import InjectedMount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

STUCK = 150
"""Requests that wait for a stalled origin: many times what a queue begins with."""
SOON = 5.0


@pytest.fixture(autouse=True)
def _needs_queues(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--queues"):
        pytest.skip("--queues was not given")


@contextlib.contextmanager
def _on(processor: int) -> Iterator[None]:
    """Whatever this thread asks for goes to the queue of that processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _image(path: Path, number: int, blocks: int) -> None:
    path.write_bytes(stamped(number, 0, blocks * BLOCK, 1))
    os.utime(path, ns=(10**18, 10**18))


def test_the_mount_says_so(faulty: InjectedMount) -> None:
    assert queues.offered() and queues.count() >= len(os.sched_getaffinity(0))
    _image(faulty.origin / "vm.img", 1, 4)
    assert faulty.start().status()["lane"]["fuse_over_io_uring"]
    with opened(faulty.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT) as fd:
        for _ in range(3):
            assert read_direct(fd, 0, 4 * BLOCK) == stamped(1, 0, 4 * BLOCK, 1)
    assert "requests come by io_uring" in faulty.run("status").stdout


def test_a_daemon_that_may_not_run_everywhere_does_without(faulty: InjectedMount) -> None:
    _image(faulty.origin / "vm.img", 1, 4)
    with _on(min(os.sched_getaffinity(0))):
        faulty.start()
    assert not faulty.status()["lane"]["fuse_over_io_uring"]
    with opened(faulty.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_direct(fd, 0, 4 * BLOCK) == stamped(1, 0, 4 * BLOCK, 1)
    expected = "requests will not come by io_uring: this process may not run on every processor"
    assert expected in faulty.log()


def test_cold_hits(faulty: InjectedMount) -> None:
    """Of several slots, and not in memory."""
    _image(faulty.origin / "vm.img", 1, 64)
    faulty.start()
    with opened(faulty.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT) as fd:
        for block in reversed(range(64)):
            read_direct(fd, block * BLOCK, BLOCK)
        for _ in range(3):
            with opened(faulty.cache, os.O_RDONLY) as cache:
                os.fsync(cache)
                os.posix_fadvise(cache, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, 64 * BLOCK, 3 * BLOCK):
                assert read_direct(fd, at, BLOCK) == stamped(1, at, BLOCK, 1)
            data = b"".join(read_direct(fd, at << 20, 1 << 20) for at in range(4))
            assert data == stamped(1, 0, 64 * BLOCK, 1)
    assert faulty.status()["lane"]["cold_reads_by_io_uring"] > 50


def test_a_stalled_origin_holds_up_no_queue(faulty: InjectedMount) -> None:
    """Each stuck request keeps an entry of its queue: others take their place (P6)."""
    _image(faulty.origin / "well", 1, 4)
    _image(faulty.origin / "stuck", 2, STUCK)
    faulty.start()
    processors = sorted(os.sched_getaffinity(0))
    found: dict[int, bytes] = {}

    def read(fd: int, block: int) -> None:
        with _on(processors[block % len(processors)]):
            found[block] = read_direct(fd, block * BLOCK, 4096)

    flags = os.O_RDWR | os.O_DIRECT
    with (
        opened(faulty.mountpoint / "well", flags) as well,
        opened(faulty.mountpoint / "stuck", flags) as stuck,
    ):
        assert read_direct(well, 0, 4 * BLOCK) == stamped(1, 0, 4 * BLOCK, 1)
        stall = faulty.fault("stall", faulty.origin / "stuck")
        readers = [threading.Thread(target=read, args=(stuck, block)) for block in range(STUCK)]
        try:
            for reader in readers:
                reader.start()
            time.sleep(0.5)
            assert not found
            for processor in processors * 3:
                began = time.monotonic()
                with _on(processor):
                    assert read_direct(well, 0, BLOCK) == stamped(1, 0, BLOCK, 1)
                    assert write_direct(well, BLOCK, stamped(1, BLOCK, 4096, 2)) == 4096
                    assert read_direct(well, BLOCK, 4096) == stamped(1, BLOCK, 4096, 2)
                    assert not (faulty.mountpoint / "nothing").exists()
                    write_direct(well, BLOCK, stamped(1, BLOCK, 4096, 1))
                assert time.monotonic() - began < SOON
        finally:
            stall.unlink()
            for reader in readers:
                reader.join()
    for block, data in found.items():
        assert set(check_stamps(data, 2, block * BLOCK)) == {1}
    assert len(found) == STUCK


@pytest.mark.parametrize("read_there", [True, False])
def test_other_requests_that_stall_hold_up_no_queue(
    faulty: InjectedMount, read_there: bool
) -> None:
    """Nor if the image that was read last on that processor is gone, or none ever was."""
    _image(faulty.origin / "well", 1, 4)
    _image(faulty.origin / "gone", 2, 4)
    faulty.start()
    processors = sorted(os.sched_getaffinity(0))
    flags = os.O_RDWR | os.O_DIRECT
    with opened(faulty.mountpoint / "well", flags) as well:
        with _on(processors[0]):
            assert read_direct(well, 0, 4 * BLOCK) == stamped(1, 0, 4 * BLOCK, 1)
        if read_there:
            with _on(processors[-1]), opened(faulty.mountpoint / "gone", flags) as gone:
                for _ in range(40):
                    read_direct(gone, 0, 4096)
        (faulty.mountpoint / "gone").unlink()
        found: list[bytes] = []

        def ask() -> None:
            with _on(processors[-1]):
                os.fstatvfs(well)  # that of the root the lane tells

        def read() -> None:
            with _on(processors[-1]):
                found.append(read_direct(well, 0, 4096))

        block = faulty.faults / "block"
        block.write_text("Tree.statvfs")
        burst = [threading.Thread(target=ask) for _ in range(STUCK)]
        burst.append(threading.Thread(target=read))
        assert faulty.pid is not None
        os.kill(faulty.pid, signal.SIGSTOP)  # so that all of them are there before any is served
        try:
            for each in burst:
                each.start()
            time.sleep(0.5)
            os.kill(faulty.pid, signal.SIGCONT)
            burst[-1].join(SOON)
            assert found == [stamped(1, 0, 4096, 1)]
        finally:
            os.kill(faulty.pid, signal.SIGCONT)
            block.unlink()
            for each in burst:
                each.join()


def test_an_aborted_connection_ends_it(faulty: InjectedMount) -> None:
    """Everybody who waits gets an error, and the daemon goes."""
    _image(faulty.origin / "vm.img", 1, 4)
    faulty.start()
    pid = faulty.pid
    found = mount_at(faulty.mountpoint)
    assert found is not None and pid is not None
    fd = os.open(faulty.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT)
    try:
        assert read_direct(fd, 0, BLOCK)
        (CONNECTIONS / found.device.split(":")[1] / "abort").write_text("1")
        with pytest.raises(OSError):
            read_direct(fd, 0, BLOCK)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)  # tells that nobody is there any more
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the daemon does not end"
        time.sleep(0.05)


def test_requests_of_all_processors_at_once(faulty: InjectedMount) -> None:
    """Large and small, hits and misses, from every processor; passed on between threads or not:
    each one gets its own answer."""
    _image(faulty.origin / "vm.img", 1, 256)
    faulty.start()
    wrong: list[object] = []
    until = time.monotonic() + 5

    def work(number: int) -> None:
        step = 0
        with (
            _on(sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]),
            opened(faulty.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT) as fd,
        ):
            while time.monotonic() < until:
                step += 1
                size = (4096, 65536, 1 << 20)[step % 3]
                at = (number * 7919 + step * 4099) * 4096 % (256 * BLOCK - size)
                data = read_direct(fd, at, size)
                if len(data) != size or set(check_stamps(data, 1, at)) != {1}:
                    wrong.append((number, at, size))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    faulty.stop()
