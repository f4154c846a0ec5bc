"""The ends of a mount: the verb, the system's tool, signals, and kill -9."""

import contextlib
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.helpers import (
    bind,
    is_mounted,
    nothing_left,
    process,
    processes_of,
    refused,
    run,
    umount,
    wait_for,
)
from tests.support.daemon import BLOCK, Mount, end
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def _image(mount: Mount) -> Path:
    image = mount.origin / "vm.img"
    image.write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    return mount.mountpoint / "vm.img"


@contextlib.contextmanager
def _open_until_the_end(path: Path) -> Iterator[int]:
    """A guest's descriptor; closing it fails when the mount is gone by then."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def _starts_clean(mount: Mount) -> None:
    """The next start trusts everything, without recovery."""
    before = mount.log().count("recovering")
    mount.start()
    assert mount.log().count("recovering") == before


def test_umount_ends_the_daemon_and_the_next_start_is_clean(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    path.read_bytes()
    mount.stop()
    nothing_left(mount)
    _starts_clean(mount)
    assert mount.image("vm.img")["cached_blocks"] == 4


def test_umount_refuses_while_files_are_open_and_names_image_and_pid(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    with open(path, "r+b", buffering=0) as guest:
        guest.write(stamped(1, 0, 512, 2))
        refused(mount.run("umount", mount.mountpoint), "vm.img", f"pid {os.getpid()}", "--force")
        assert is_mounted(mount.mountpoint)
        check_stamps(os.pread(guest.fileno(), BLOCK, 0), 1, 0)
    mount.stop()
    nothing_left(mount)


def test_umount_names_a_process_and_not_its_thread(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    ready, done = threading.Event(), threading.Event()

    def guest() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("a thread")
        with open(path, "rb"):
            ready.set()
            done.wait(30)

    thread = threading.Thread(target=guest)
    thread.start()
    assert ready.wait(30)
    said = refused(mount.run("umount", mount.mountpoint), f"pid {os.getpid()} ")
    assert "a thread" not in said
    done.set()
    thread.join()
    mount.stop()


def test_umount_with_force_detaches_and_open_files_fail_from_then_on(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    with _open_until_the_end(path) as guest:
        os.write(guest, stamped(1, 0, 512, 2))
        mount.stop("--force")
        nothing_left(mount)
        with pytest.raises(OSError) as caught:
            os.pread(guest, 512, 0)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    assert check_stamps((mount.origin / "vm.img").read_bytes(), 1, 0)[0] == 2
    _starts_clean(mount)


def test_umount_ends_copies_of_the_mount_in_other_mount_namespaces(mount: Mount) -> None:
    _image(mount)
    mount.start()
    with process("unshare", "--mount", "sleep", "100") as other:
        copies = Path(f"/proc/{other.pid}/mountinfo")
        wait_for(lambda: (
            os.readlink(copies.parent / "ns/mnt") != os.readlink("/proc/self/ns/mnt")
        ), "the namespace")  # fmt: skip
        assert str(mount.mountpoint) in copies.read_text()
        inside = copies.parent / "root" / str(mount.mountpoint)[1:] / "vm.img"
        assert len(inside.read_bytes()) == (mount.origin / "vm.img").stat().st_size
        mount.stop()
        nothing_left(mount)
        assert "event=ended-elsewhere" in mount.log()
        with pytest.raises(OSError) as caught:
            inside.read_bytes()
        assert caught.value.errno == errno.ENOTCONN
    _starts_clean(mount)


def test_umount_refuses_while_somebody_stands_in_the_mount(mount: Mount) -> None:
    (mount.origin / "sub").mkdir()
    mount.start()
    fd = os.open(mount.mountpoint / "sub", os.O_PATH)
    try:
        refused(mount.run("umount", mount.mountpoint), "in use")
        assert mount.status()["state"] == "serving"
    finally:
        os.close(fd)
    mount.stop()


def test_umount_through_a_link_and_a_relative_path(mount: Mount) -> None:
    link = mount.base / "link"
    link.symlink_to(mount.mountpoint)
    mount.start()
    assert mount.run("umount", link).returncode == 0
    nothing_left(mount)
    mount.start()
    assert mount.run("umount", "mnt/", cwd=mount.base).returncode == 0
    nothing_left(mount)


def test_the_systems_umount_lets_the_daemon_flush_and_end(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    assert mount.pid is not None
    with open(path, "r+b", buffering=0) as guest:
        guest.write(stamped(1, 0, 512, 2))
    run("umount", mount.mountpoint)
    wait_for(lambda: processes_of(mount.base) == [], "the daemon's end")
    nothing_left(mount)
    _starts_clean(mount)
    assert set(check_stamps(path.read_bytes(), 1, 0)) == {1, 2}


def test_a_mount_right_after_the_systems_umount_waits_for_the_cache(mount: Mount) -> None:
    path = _image(mount)
    for _ in range(3):
        mount.start()
        check_stamps(path.read_bytes(), 1, 0)
        run("umount", mount.mountpoint)
    mount.start()
    assert "recovering" not in mount.log()


def test_a_mount_while_the_last_daemon_still_flushes_says_that_it_waits(mount: Mount) -> None:
    _image(mount)
    mount.start()
    first = mount.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    try:
        assert umount(mount.mountpoint, 2) == 0
        # A stopped daemon does not answer either: it is refused or waited for, never stolen from.
        done = mount.run("mount", *mount.arguments(), timeout=40)
        refused(done, f"pid {first}", "in use")
    finally:
        os.kill(first, signal.SIGCONT)
    wait_for(lambda: processes_of(mount.base) == [], "the daemon's end")
    _starts_clean(mount)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_flushes_and_unmounts_even_with_open_files(
    mount: Mount, number: signal.Signals
) -> None:
    path = _image(mount)
    mount.start()
    assert mount.pid is not None
    with _open_until_the_end(path) as guest:
        os.write(guest, stamped(1, 0, 512, 2))
        end(mount.pid, number)
        nothing_left(mount)
    _starts_clean(mount)
    assert check_stamps(path.read_bytes(), 1, 0)[0] == 2


def test_a_dead_mount_is_replaced_by_the_next(mount: Mount) -> None:
    path = _image(mount)
    mount.start()
    path.read_bytes()
    mount.kill()
    assert is_mounted(mount.mountpoint)
    with pytest.raises(OSError) as caught:
        path.stat()
    # ECONNABORTED while the kernel still takes the connection down.
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    done = mount.run("mount", *mount.arguments())
    assert done.returncode == 0, done.stderr
    assert "detached the dead mount" in done.stderr
    check_stamps(path.read_bytes(), 1, 0)
    lines = Path("/proc/self/mounts").read_text().splitlines()
    assert sum(line.split()[1] == str(mount.mountpoint) for line in lines) == 1


def test_a_dead_mount_stays_while_something_else_is_wrong(mount: Mount) -> None:
    mount.start()
    mount.kill()
    done = mount.run("mount", mount.base / "none", mount.mountpoint, "--cache", mount.cache)
    refused(done, "does not exist")
    assert is_mounted(mount.mountpoint)


def test_umount_detaches_a_dead_mount(mount: Mount) -> None:
    mount.start()
    mount.kill()
    done = mount.run("umount", mount.mountpoint)
    assert done.returncode == 0 and "dead" in done.stderr
    nothing_left(mount)


def test_commands_name_no_dead_daemon(mount: Mount) -> None:
    mount.start()
    mount.kill()
    assert json.loads(mount.run("status", "--json").stdout)["mounts"] == []
    assert list(mount.runtime.glob("*.sock")) == []


def test_umount_of_what_is_no_fusecache_is_refused(mount: Mount) -> None:
    refused(mount.run("umount", mount.mountpoint), "Nothing is mounted")
    refused(mount.run("umount", mount.base / "none"), "Nothing is mounted")
    with bind(mount.origin, mount.mountpoint):
        refused(mount.run("umount", mount.mountpoint), "busy")
        assert is_mounted(mount.mountpoint)


def test_a_daemon_that_is_slow_to_answer_is_waited_for(mount: Mount) -> None:
    """On a busy host; to say that nothing is mounted there would be wrong."""
    mount.start()
    pid = mount.pid
    assert pid is not None
    for verb in (["evict", "--all", "-m"], ["umount"]):
        os.kill(pid, signal.SIGSTOP)
        later = threading.Timer(5, os.kill, (pid, signal.SIGCONT))
        later.start()
        try:
            done = mount.run(*verb, mount.mountpoint)
            assert done.returncode == 0, done.stderr
        finally:
            later.join()
    nothing_left(mount)


def test_a_daemon_that_does_not_answer_is_named_and_left_alone(mount: Mount) -> None:
    mount.start()
    pid = mount.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        refused(mount.run("umount", mount.mountpoint), str(pid), "does not answer")
        refused(mount.run("mount", *mount.arguments()), str(pid), "does not answer")
        evict = mount.run("evict", "--all", "-m", mount.mountpoint)
        refused(evict, str(pid), "does not answer", "try again")
        assert time.monotonic() - began < 60
        assert is_mounted(mount.mountpoint) and pid in processes_of(mount.base)
    finally:
        os.kill(pid, signal.SIGCONT)
    mount.stop()
