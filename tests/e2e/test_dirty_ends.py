"""The ends of a mount that has dirty data: where the data is then, and who is told."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MakeFaulty
from tests.e2e.dirty import back, dirty_mount, images, on_origin, served, write
from tests.e2e.faulty import COMMAND, FaultyMount
from tests.e2e.helpers import (
    is_mounted,
    nothing_left,
    process,
    processes_of,
    refused,
    run,
    wait_for,
)
from tests.support.daemon import BLOCK, Mount, end

pytestmark = pytest.mark.mount

KEPT = "512.0 KiB of 2 images stay on {cache}: mount it again, or: fusecache flush --cache {cache}"


@pytest.fixture
def two(mount: Mount) -> Mount:
    """Two images with dirty data."""
    return dirty_mount(mount, "vm1.img", "vm2.img")


@pytest.fixture
def faulty(make_faulty: MakeFaulty) -> FaultyMount:
    """The same, with an origin that can misbehave."""
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img", "vm2.img")
    return mount


def _origin(mount: Mount) -> tuple[int, int]:
    return on_origin(mount, "vm1.img", 1), on_origin(mount, "vm2.img", 2)


def _served(mount: Mount) -> tuple[int, int]:
    return served(mount, "vm1.img", 1), served(mount, "vm2.img", 2)


def _ended(mount: Mount) -> bool:
    return processes_of(mount.base) == []


def _has_it_all_again(mount: Mount) -> None:
    """A next mount serves what was kept, and brings it home at its end."""
    recovered = mount.log().count("recovering")
    mount.start()
    assert mount.log().count("recovering") == recovered, "the stop was not clean"
    assert _served(mount) == (2, 2)
    mount.stop()
    assert _origin(mount) == (2, 2)


# -- the verb --------------------------------------------------------------------------------------


def test_umount_brings_everything_to_the_origin(two: Mount) -> None:
    done = two.run("umount", two.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert _origin(two) == (2, 2)
    nothing_left(two)


def test_umount_keeps_dirty_data_if_told_to_and_the_next_mount_has_it(two: Mount) -> None:
    done = two.run("umount", two.mountpoint, "--keep-dirty")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == KEPT.format(cache=two.cache) + "\n"
    assert _origin(two) == (1, 1)
    nothing_left(two)
    _has_it_all_again(two)


def test_umount_that_cannot_write_back_refuses_and_serves_on(faulty: FaultyMount) -> None:
    with faulty.fault("fail-write"):
        done = faulty.run("umount", faulty.mountpoint)
        refused(done, "stays mounted", "'vm1.img'", "'vm2.img'", "injected", "--keep-dirty")
        done = faulty.run("umount", faulty.mountpoint, "--force")
        refused(done, "stays mounted", "--keep-dirty")
        assert faulty.status()["state"] == "serving" and is_mounted(faulty.mountpoint)
        write(faulty, "vm1.img", 1, 2, blocks=6)
        assert faulty.status()["cache"]["dirty_bytes"] == 10 * BLOCK
    faulty.stop()
    assert _origin(faulty) == (2, 2)


def test_umount_with_keep_dirty_works_while_the_origin_does_not(faulty: FaultyMount) -> None:
    with faulty.fault("fail-write"):
        done = faulty.run("umount", faulty.mountpoint, "--keep-dirty")
        assert (done.returncode, done.stdout) == (0, KEPT.format(cache=faulty.cache) + "\n")
    nothing_left(faulty)
    _has_it_all_again(faulty)


def test_umount_of_a_stalled_origin_can_be_interrupted_and_the_mount_serves_on(
    faulty: FaultyMount,
) -> None:
    with faulty.fault("hang-write"):
        with process(
            *COMMAND, "umount", faulty.mountpoint, env=faulty.environment, stderr=subprocess.PIPE
        ) as umount:
            wait_for(lambda: faulty.status()["state"] == "unmounting", "the flush")
            flushing = faulty.status()["flushing"]
            assert (flushing["left"], flushing["of"]) == (8 * BLOCK, 8 * BLOCK)
            refused(faulty.run("umount", faulty.mountpoint), "being unmounted already")
            umount.send_signal(signal.SIGINT)
            _, said = umount.communicate(timeout=30)
            assert umount.returncode == 1
            assert said.startswith(b"fusecache: interrupted: ") and b"stays mounted" in said
        wait_for(lambda: faulty.status()["state"] == "serving", "the mount serving on")
        assert _served(faulty) == (2, 2)
        refused(faulty.run("umount", faulty.mountpoint, "--force"), "does not answer", "512.0 KiB")
        assert faulty.status()["state"] == "serving"
    faulty.stop()
    assert _origin(faulty) == (2, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["verb", "signal"])
def test_an_origin_whose_syncs_hang_does_not_keep_the_daemon(faulty: FaultyMount, how: str) -> None:
    assert faulty.pid is not None
    with faulty.fault("hang-sync"):
        if how == "verb":
            done = faulty.run("umount", faulty.mountpoint, "--keep-dirty")
            assert (done.returncode, done.stdout) == (0, KEPT.format(cache=faulty.cache) + "\n")
        else:
            os.kill(faulty.pid, signal.SIGTERM)
            wait_for(lambda: _ended(faulty), "the daemon's end", 50)
        assert not is_mounted(faulty.mountpoint) and _ended(faulty)
    faulty.start()
    assert _served(faulty) == (2, 2)
    faulty.stop()
    assert _origin(faulty) == (2, 2)


def test_umount_refuses_open_files_also_with_keep_dirty(two: Mount) -> None:
    with open(two.mountpoint / "vm1.img", "rb"):
        done = two.run("umount", two.mountpoint, "--keep-dirty")
        refused(done, "vm1.img", f"pid {os.getpid()}", "--force")
    two.stop("--force", "--keep-dirty")
    assert _origin(two) == (1, 1)
    _has_it_all_again(two)


# -- signals ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(mount: Mount, name: str) -> Iterator[None]:
    """Somebody has the image open, until the mount is gone."""
    fd = os.open(mount.mountpoint / name, os.O_RDWR)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_signal_brings_everything_to_the_origin_even_with_open_files(two: Mount) -> None:
    assert two.pid is not None
    with _open(two, "vm1.img"):
        end(two.pid, signal.SIGTERM)
    assert _origin(two) == (2, 2)
    nothing_left(two)
    assert "flushing" in two.log() and "recovering" not in two.log()


def test_a_second_signal_keeps_the_rest(faulty: FaultyMount) -> None:
    assert faulty.pid is not None
    with faulty.fault("slow-write", "8"):
        os.kill(faulty.pid, signal.SIGTERM)
        wait_for(lambda: faulty.status()["state"] == "stopping", "the first signal")
        assert _served(faulty) == (2, 2)
        began = time.monotonic()
        end(faulty.pid, signal.SIGTERM)
        assert time.monotonic() - began < 25
    nothing_left(faulty)
    assert "stay on" in faulty.log()
    _has_it_all_again(faulty)


def test_a_signal_gives_up_an_origin_that_makes_no_progress(faulty: FaultyMount) -> None:
    assert faulty.pid is not None
    with faulty.fault("fail-write"):
        end(faulty.pid, signal.SIGTERM)
        nothing_left(faulty)
    assert "no progress" in faulty.log() and KEPT.format(cache=faulty.cache) in faulty.log()
    _has_it_all_again(faulty)


def test_a_signal_takes_over_from_an_umount_that_flushes(faulty: FaultyMount) -> None:
    assert faulty.pid is not None
    with faulty.fault("slow-write", "1"), _open(faulty, "vm1.img"):
        command = [*COMMAND, "umount", str(faulty.mountpoint), "--force"]
        with process(*command, env=faulty.environment, stderr=subprocess.PIPE) as umount:
            wait_for(lambda: faulty.status()["state"] == "unmounting", "the flush")
            end(faulty.pid, signal.SIGTERM)
            said = umount.communicate(timeout=30)[1].decode()
            assert umount.returncode == 0 or "ended by a signal" in said, said
            assert said.count("fusecache: ") <= 1 and "Traceback" not in said
    nothing_left(faulty)
    assert _origin(faulty) == (2, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hanging_origin_does_not_keep_the_daemon_and_nothing_is_lost(
    faulty: FaultyMount,
) -> None:
    assert faulty.pid is not None
    with faulty.fault("hang-write"):
        os.kill(faulty.pid, signal.SIGTERM)
        wait_for(lambda: not is_mounted(faulty.mountpoint), "the mount's end", 20)
        wait_for(lambda: _ended(faulty), "the daemon's end", 40)
    faulty.start()
    assert _served(faulty) == (2, 2)
    faulty.stop()
    assert _origin(faulty) == (2, 2)


def test_in_the_foreground_an_interrupt_flushes(mount: Mount) -> None:
    images(mount, "vm1.img", "vm2.img")
    back(mount)
    from tests.e2e.helpers import COMMAND as PLAIN
    from tests.e2e.helpers import environment

    with process(
        *PLAIN, "mount", "-f", *mount.arguments(), env=environment(mount), stderr=subprocess.PIPE
    ) as daemon:
        wait_for(lambda: is_mounted(mount.mountpoint), "the mount")
        for number, name in enumerate(("vm1.img", "vm2.img"), 1):
            write(mount, name, number, 2)
        daemon.send_signal(signal.SIGINT)
        _, said = daemon.communicate(timeout=30)
        assert daemon.returncode == 0, said
        assert b"flushing" in said and b"\r" not in said and b"Traceback" not in said
    assert _origin(mount) == (2, 2)


# -- a bare umount(8) ------------------------------------------------------------------------------


def test_a_bare_umount_flushes_on_and_status_shows_it_and_a_new_mount_waits(
    faulty: FaultyMount,
) -> None:
    with faulty.fault("fail-write"):
        run("umount", faulty.mountpoint)
        wait_for(lambda: faulty.status()["state"] == "flushing", "the flush")
        wait_for(lambda: "injected" in faulty.status()["flushing"]["error"], "the origin's error")
        status = faulty.status()
        assert status["flushing"]["left"] == status["cache"]["dirty_bytes"] == 8 * BLOCK
        assert "512.0 KiB left of 512.0 KiB" in faulty.run("status").stdout
        with process(
            *COMMAND, "mount", *faulty.arguments(), env=faulty.environment, stderr=subprocess.PIPE
        ) as waiting:
            assert waiting.stderr is not None
            line = waiting.stderr.readline().decode()
            assert f"waiting for pid {faulty.pid}" in line and "512.0 KiB" in line
            waiting.send_signal(signal.SIGINT)
            assert waiting.communicate(timeout=30)[1].strip() == b"fusecache: interrupted"
        assert faulty.status()["state"] == "flushing"
        with process(
            *COMMAND, "mount", *faulty.arguments(), env=faulty.environment, stderr=subprocess.PIPE
        ) as waiting:
            assert waiting.stderr is not None
            waiting.stderr.readline()
            assert waiting.poll() is None
            (faulty.faults / "fail-write").unlink()
            assert waiting.wait(60) == 0
    assert _origin(faulty) == (2, 2)
    assert _served(faulty) == (2, 2)
    assert "recovering" not in faulty.log()
    faulty.stop()


@pytest.mark.parametrize("how", ["signal", "verb"])
def test_after_a_bare_umount_it_can_be_told_to_keep_the_rest(faulty: FaultyMount, how: str) -> None:
    assert faulty.pid is not None
    with faulty.fault("fail-write"):
        run("umount", faulty.mountpoint)
        wait_for(lambda: faulty.status()["state"] == "flushing", "the flush")
        if how == "signal":
            end(faulty.pid, signal.SIGTERM)
        else:
            done = faulty.run("umount", faulty.mountpoint, "--keep-dirty")
            assert (done.returncode, done.stdout) == (0, KEPT.format(cache=faulty.cache) + "\n")
        nothing_left(faulty)
    _has_it_all_again(faulty)


# -- the database is removed -----------------------------------------------------------------------


def _remove_database(mount: Mount, *suffixes: str) -> str:
    for suffix in suffixes:
        os.unlink(f"{mount.cache}.sqlite{suffix}")
    return f"{mount.cache}.sqlite was removed"


@pytest.mark.parametrize("suffixes", [("", "-wal"), ("",), ("-wal",)])
def test_a_removed_database_is_noticed_and_what_is_dirty_goes_to_the_origin(
    two: Mount, suffixes: tuple[str, ...]
) -> None:
    _remove_database(two, *suffixes)
    wait_for(lambda: two.status()["cache"]["state"] == "degraded", "the daemon noticing it")
    assert f"{two.cache}.sqlite{suffixes[0]} was removed" in two.status()["cache"]["trouble"]
    assert "was removed" in two.run("status").stdout
    assert "event=cache-degraded" in two.log()
    wait_for(lambda: two.status()["cache"]["dirty_bytes"] == 0, "the rescue")
    assert _origin(two) == (2, 2) and _served(two) == (2, 2)
    done = two.run("umount", two.mountpoint, "--keep-dirty")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    nothing_left(two)


def test_a_database_that_was_replaced_is_noticed_too(two: Mount) -> None:
    database = f"{two.cache}.sqlite"
    with open(database, "rb") as old, open(f"{database}.new", "wb") as new:
        new.write(old.read())
    os.replace(f"{database}.new", database)
    wait_for(lambda: two.status()["cache"]["state"] == "degraded", "the daemon noticing it")
    two.stop()
    assert _origin(two) == (2, 2)


def test_umount_keeps_nothing_in_a_database_that_was_removed(faulty: FaultyMount) -> None:
    with faulty.fault("fail-write"):
        removed = _remove_database(faulty, "", "-wal")
        for flags in (["--keep-dirty"], ["--keep-dirty", "--force"]):
            said = refused(faulty.run("umount", faulty.mountpoint, *flags), removed, "512.0 KiB")
            assert "without --keep-dirty" in said
        done = faulty.run("umount", faulty.mountpoint)
        assert "--keep-dirty" not in refused(done, "stays mounted", "Try again", removed)
        assert faulty.status()["state"] == "serving"
    faulty.stop()
    assert _origin(faulty) == (2, 2)


def test_a_plain_umount_right_after_the_database_was_removed(two: Mount) -> None:
    _remove_database(two, "", "-wal")
    two.stop()
    assert _origin(two) == (2, 2)


def test_a_signal_says_what_is_lost_with_a_removed_database(faulty: FaultyMount) -> None:
    assert faulty.pid is not None
    with faulty.fault("fail-write"):
        removed = _remove_database(faulty, "", "-wal")
        end(faulty.pid, signal.SIGTERM)
        nothing_left(faulty)
    assert removed in faulty.log() and "event=dirty-lost" in faulty.log()
    assert "mount it again" not in faulty.log()
