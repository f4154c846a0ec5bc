"""Who may do what: files and sockets of daemons, block devices, guests' files, guests' data."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeFaulty
from tests.e2e.helpers import refused, run, wait_for
from tests.e2e.test_metrics import free_port, text_at
from tests.e2e.users import USER, User
from tests.support.daemon import BLOCK, Mount

pytestmark = pytest.mark.mount

OTHER = 12345

_ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(20)
    client.connect(sys.argv[1])
    try:
        client.sendall(b'{"verb": "who"}\\n')
        print(client.recv(65536).decode(), end="")
    except (BrokenPipeError, ConnectionResetError):
        pass
"""


@pytest.fixture
def open_mount() -> Iterator[Mount]:
    """A mount below a directory that everybody may enter; not started."""
    base = Path(tempfile.mkdtemp(prefix="fusecache-open-"))
    base.chmod(0o755)
    made = Mount(base)
    try:
        yield made
    finally:
        made.cleanup()
        shutil.rmtree(base)


def as_user(number: int, *command: object) -> subprocess.CompletedProcess[str]:
    """A system tool, run by another user."""
    return subprocess.run(
        ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups",
         *map(str, command)],
        capture_output=True, text=True, timeout=30, check=False, cwd="/",
    )  # fmt: skip


def asked_by(number: int, path: Path) -> str:
    """What the daemon behind a socket answers to a user."""
    done = as_user(number, "/usr/bin/env", "python3", "-I", "-S", "-c", _ASK, path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_daemon_makes_for_itself_is_its_users_alone(mount: Mount) -> None:
    mount.runtime.rmdir()
    mount.runtime = mount.base / "made" / "run"
    mount.options |= {"db": str(mount.base / "state" / "map.sqlite"), "write_mode": "back"}
    (mount.origin / "vm.img").write_bytes(bytes(BLOCK))
    before = os.umask(0)
    try:
        mount.start()
        (mount.mountpoint / "made.img").write_bytes(bytes(BLOCK))
    finally:
        os.umask(before)
    theirs = {mount.origin, mount.mountpoint, mount.base / "made"}
    modes = {
        path: stat.S_IMODE(path.lstat().st_mode)
        for top in mount.base.iterdir()
        if top not in (mount.origin, mount.mountpoint)
        for path in (top, *top.rglob("*"))
        if path not in theirs
    }
    assert {"map.sqlite", "map.sqlite-wal", "cache.img", f"{mount.pid}.sock"} <= {
        path.name for path in modes
    }
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))
    # A guest's file has the mode that was asked for.
    assert stat.S_IMODE((mount.origin / "made.img").stat().st_mode) == 0o666


def test_the_socket_of_root_answers_nobody_else_even_if_it_can_be_reached(
    open_mount: Mount,
) -> None:
    open_mount.start()
    path = open_mount.runtime / f"{open_mount.pid}.sock"
    for opened, mode in ((open_mount.runtime, 0o755), (path, 0o666)):
        opened.chmod(mode)
    assert asked_by(USER, path) == ""
    assert json.loads(asked_by(0, path))["ok"]["pid"] == open_mount.pid
    assert open_mount.status()["cache"]["unexpected_errors"] == 0


@contextlib.contextmanager
def while_mounted(user: User, cache: str, *commands: str) -> Iterator[None]:
    """A plain user mounts, runs these, and unmounts when the body has ended."""
    outcome: list[subprocess.CompletedProcess[str]] = []
    script = (
        f"fc mount origin mnt --cache {cache}",
        *commands,
        "touch home/ready; while ! test -e home/go; do sleep 0.1; done",
        "fc umount mnt",
    )
    thread = threading.Thread(target=lambda: outcome.append(user.script(*script)))
    thread.start()
    try:
        wait_for(lambda: (user.base / "home/ready").exists() or bool(outcome), "the mount", 40)
        assert not outcome, outcome[0].stderr
        yield
    finally:
        (user.base / "home/go").touch()
        thread.join(60)
    assert outcome[0].returncode == 0, outcome[0].stderr


def test_the_socket_of_a_plain_user_answers_this_one_and_root(user: User) -> None:
    with while_mounted(user, "home/c --size 8M"):
        (path,) = (user.base / "run" / "fusecache").glob("*.sock")
        for opened, mode in ((user.base / "run", 0o755), (path.parent, 0o755), (path, 0o666)):
            opened.chmod(mode)
        assert asked_by(OTHER, path) == ""
        for number in (0, USER):
            assert json.loads(asked_by(number, path))["ok"]["mountpoint"] == f"{user.base}/mnt"


def test_a_block_device_needs_permission_and_is_held_exclusively(user: User) -> None:
    backing = user.base / "backing"
    backing.touch()
    os.truncate(backing, 16 << 20)
    device = Path(run("losetup", "--find", "--show", backing).strip())
    try:
        denied = user.script(f"fc mount origin mnt --cache {device}")
        refused(denied, f"{device} may not be opened by user {USER}", "read and write")
        refused(user.script(f"fc format {device}"), f"{device} may not be opened by user {USER}")
        os.chown(device, USER, -1)
        with while_mounted(
            user,
            str(device),
            "cmp mnt/vm.img origin/vm.img",
            f"! fc format {device} --force 2> home/said",
            "find home/.local/state/fusecache -printf '%m %p\\n' > home/modes",
        ):
            with pytest.raises(OSError) as caught:
                os.open(device, os.O_RDWR | os.O_EXCL)
            assert caught.value.errno == errno.EBUSY
        assert "in use" in (user.base / "home" / "said").read_text()
        lines = (user.base / "home" / "modes").read_text().splitlines()
        modes = [line.split()[0] for line in lines]
        assert modes[0] == "700" and set(modes[1:]) == {"600"} and len(modes) > 1
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))  # free again
    finally:
        with contextlib.suppress(OSError):
            os.chown(device, 0, -1)
        run("losetup", "--detach", device)


def test_what_other_users_may_do_with_an_image_the_kernel_decides(open_mount: Mount) -> None:
    for name, mode in (("closed.img", 0o600), ("open.img", 0o644)):
        (open_mount.origin / name).write_bytes(b"x" * 4096)
        (open_mount.origin / name).chmod(mode)
    open_mount.start()
    for name in ("closed.img", "open.img"):
        assert len((open_mount.mountpoint / name).read_bytes()) == 4096  # and cached now
    denied = as_user(USER, "cat", open_mount.mountpoint / "closed.img")
    assert denied.returncode == 1 and "Permission denied" in denied.stderr
    assert as_user(USER, "cat", open_mount.mountpoint / "open.img").stdout == "x" * 4096
    for command in (("truncate", "-s", "1"), ("chmod", "666"), ("rm", "-f")):
        denied = as_user(USER, *command, open_mount.mountpoint / "open.img")
        assert denied.returncode == 1
        assert "Permission denied" in denied.stderr or "not permitted" in denied.stderr
    assert (open_mount.origin / "open.img").stat().st_size == 4096


def test_nothing_that_is_logged_counted_or_dumped_shows_guest_data(
    make_faulty: MakeFaulty,
) -> None:
    mount = make_faulty("fc")
    port = free_port()
    # Without the lane, because a fault is in Python's way to the device.
    mount.options |= {"log_level": "debug", "metrics": str(port), "lane": "off"}
    secret = b"OnlyTheGuestKnowsThis"
    data = (secret * (4 * BLOCK // len(secret) + 1))[: 4 * BLOCK]
    (mount.origin / "vm.img").write_bytes(data)
    mount.start()
    image = mount.mountpoint / "vm.img"
    with open(image, "r+b", buffering=0) as guest:
        guest.write(data)
        with mount.fault("fail-write"):
            assert mount.run("flush").returncode == 1
        with mount.fault("fail-read"), contextlib.suppress(OSError):
            os.pread(guest.fileno(), BLOCK, 0)
    said = [text_at(port)]
    verbs = (("status",), ("status", "vm.img"), ("status", "--json"), ("top", "--once"))
    said += [mount.run(*words).stdout for words in verbs]
    assert "vm.img" in said[0] and "vm.img" in said[1]
    mount.stop("--keep-dirty")
    said += [mount.run(*words, mount.cache).stdout for words in (("check",), ("dump", "--json"))]
    said.append(mount.log())
    files = (Path(f"{mount.cache}.sqlite"), mount.runtime / "fusecache.log")
    said += [file.read_bytes().decode("latin-1") for file in files if file.exists()]
    assert secret in mount.cache.read_bytes(), "the cache has it"
    for text in said:
        for shape in (secret.decode(), secret.hex(), repr(list(secret))):
            assert shape not in text
