"""Under a service manager and mount(8): what systemd is told, the unit, the helper of mount(8)."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.cli import manual
from fusecache.cli.main import cli
from tests.e2e.helpers import (
    COMMAND,
    environment,
    is_mounted,
    nothing_left,
    process,
    refused,
    umount,
    wait_for,
)
from tests.support.daemon import BLOCK, Mount
from tests.support.injected import InjectedMount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

HELPER = Path("/sbin/mount.fusecache")
UNITS = Path(__file__).parents[2] / "systemd"


class Manager:
    """The service manager's end of the notify socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.said: list[str] = []
        """Every line, in order."""

    def wait(self, line: str, seconds: float = 15) -> None:
        """Until a line that begins so has come."""
        deadline = time.monotonic() + seconds
        while not any(said.startswith(line) for said in self.said):
            self.listen(max(0.01, deadline - time.monotonic()))
            assert time.monotonic() < deadline, (line, self.said)

    def listen(self, seconds: float) -> list[str]:
        """The next datagram's lines; none if none comes in time."""
        self.socket.settimeout(seconds)
        try:
            lines = self.socket.recv(65536).decode().splitlines()
        except TimeoutError:
            return []
        self.said += lines
        return lines

    def quiet(self) -> bool:
        """Whether for twice the pings' distance nothing comes; what had come before is dropped."""
        while self.listen(0.01):
            pass
        return not self.listen(1.0)


@contextlib.contextmanager
def manager(address: Path | str) -> Iterator[Manager]:
    """Listens as long as the body runs."""
    made = Manager(str(address))
    try:
        yield made
    finally:
        made.socket.close()


@contextlib.contextmanager
def served(
    mount: Mount, address: str, command: list[str] = COMMAND, **more: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A daemon in front, as systemd starts it."""
    env = environment(mount) | {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"} | more
    with process(
        *command, "mount", "--foreground", *mount.arguments(), env=env, stderr=subprocess.PIPE
    ) as daemon:
        yield daemon


# -- sd_notify -------------------------------------------------------------------------------------


def test_systemd_is_told_of_the_start_the_state_and_the_end(mount: Mount) -> None:
    mount.options["write_mode"] = "back"
    mount.options["dirty_age"] = "3600"
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    address = mount.base / "notify"
    with manager(address) as systemd, served(mount, str(address)) as daemon:
        systemd.wait("READY=1")
        assert systemd.said[0] == "READY=1", "nothing comes before it"
        assert is_mounted(mount.mountpoint) and mount.status()["state"] == "serving"
        systemd.wait(f"STATUS=serving: {mount.origin} at {mount.mountpoint}")
        with open(mount.mountpoint / "vm.img", "r+b") as file:
            file.write(stamped(1, 0, 4 * BLOCK, 2))
        systemd.wait(f"STATUS=serving: {mount.origin} at {mount.mountpoint}, 256.0 KiB not on")
        daemon.send_signal(signal.SIGHUP)  # a terminal went away
        systemd.wait("STOPPING=1")
        assert daemon.wait(20) == 0
    assert set(check_stamps((mount.origin / "vm.img").read_bytes(), 1, 0)) == {2}
    nothing_left(mount)


def test_a_start_that_fails_is_never_called_ready(mount: Mount) -> None:
    mount.origin.rmdir()
    address = "\0fusecache-test-" + str(os.getpid())
    with manager(address) as systemd, served(mount, "@" + address[1:]) as daemon:
        assert daemon.wait(20) == 1
        assert systemd.quiet() and systemd.said == []


def test_the_watchdog_is_not_fed_while_the_event_loop_hangs(tmp_path: Path) -> None:
    mount = InjectedMount(tmp_path / "fc")
    address = mount.base / "notify"
    command = [sys.executable, "-m", "tests.support.injected"]
    faults = {"FUSECACHE_FAULTS": str(mount.faults)}
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    try:
        with (
            manager(address) as systemd,
            served(mount, str(address), command, **faults) as daemon,
        ):
            systemd.wait("WATCHDOG=1")
            assert not systemd.quiet(), "a ping every half second"
            (mount.faults / "block").write_text("HitPath.try_read")
            with process("cat", mount.mountpoint / "vm.img", stdout=subprocess.DEVNULL):
                wait_for(systemd.quiet, "no more pings")
                (mount.faults / "block").unlink()
                wait_for(lambda: not systemd.quiet(), "pings again")
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(20) == 0
    finally:
        mount.cleanup()


def test_nobody_is_told_where_nobody_listens(mount: Mount) -> None:
    with served(mount, str(mount.base / "nobody"), WATCHDOG_PID="1") as daemon:
        wait_for(lambda: is_mounted(mount.mountpoint), "the mount")
        time.sleep(0.5)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0


# -- the unit --------------------------------------------------------------------------------------


def test_systemd_analyze_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = shutil.copy(UNITS / "fusecache@.service", tmp_path / "fusecache@vms.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", unit],
        capture_output=True, text=True, check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_units_capabilities_are_enough(mount: Mount) -> None:
    """As systemd would start it, as far as that can be done without systemd."""
    lines = (UNITS / "fusecache@.service").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("CapabilityBoundingSet="))
    names = [f"+{name.lower().removeprefix('cap_')}" for name in line.partition("=")[2].split()]
    bounded = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{','.join(names)}", *COMMAND]
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    with served(mount, "", bounded) as daemon:
        wait_for(lambda: is_mounted(mount.mountpoint), "the mount")
        image = mount.mountpoint / "vm.img"
        with open(image, "r+b") as file:
            file.write(stamped(1, 0, BLOCK, 2))
            os.fsync(file.fileno())
        os.chown(image, 12345, 12345)
        image.chmod(0o400)
        check_stamps(image.read_bytes(), 1, 0)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        assert daemon.stderr is not None
        assert b"warning" not in daemon.stderr.read(), "the kernel's limits were raised as well"
    behind = mount.origin / "vm.img"
    assert set(check_stamps(behind.read_bytes(), 1, 0)) == {2} and behind.stat().st_uid == 12345


def test_install_units_puts_everything_below_a_root(mount: Mount) -> None:
    root = mount.base / "package"
    for _ in range(2):
        done = mount.run("install-units", "--root", root)
        assert done.returncode == 0, done.stderr
    modes = {
        str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }
    assert modes == {
        "etc/systemd/system/fusecache@.service": 0o644,
        "etc/tmpfiles.d/fusecache.conf": 0o644,
        "sbin/mount.fusecache": 0o755,
        "usr/share/bash-completion/completions/fusecache": 0o644,
        "usr/share/zsh/site-functions/_fusecache": 0o644,
        "usr/share/fish/vendor_completions.d/fusecache.fish": 0o644,
        **{f"usr/share/man/man8/{name}": 0o644 for name in manual.pages(cli)},
    }
    assert (root / "etc/fusecache").is_dir()
    (mount.base / "file").touch()
    refused(mount.run("install-units", "--root", mount.base / "file" / "x"), "Cannot write")


# -- mount(8) --------------------------------------------------------------------------------------


@pytest.fixture
def helper(mount: Mount) -> Iterator[Path]:
    """The helper as ``install-units`` installs it, for a fusecache on the path."""
    root, programs = mount.base / "root", mount.base / "bin"
    assert mount.run("install-units", "--root", root).returncode == 0
    programs.mkdir()
    program = programs / "fusecache"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fusecache "$@"\n')
    program.chmod(0o755)
    yield root / "sbin/mount.fusecache"


def call(mount: Mount, *command: object) -> subprocess.CompletedProcess[str]:
    """With the program on the path."""
    env = environment(mount)
    env["PATH"] = f"{mount.base / 'bin'}:{env['PATH']}"
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=env, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_helper_mounts_as_mount8_calls_it(mount: Mount, helper: Path) -> None:
    options = (
        f"rw,noatime,nofail,_netdev,x-systemd.requires=srv.mount,cache={mount.cache},size=64M,"
        "write_mode=back,dirty-age=3600"
    )
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    assert call(mount, helper, mount.origin, mount.mountpoint, "-f", "-o", options).returncode == 0
    assert not is_mounted(mount.mountpoint)
    done = call(mount, helper, mount.origin, mount.mountpoint, "-n", "-o", options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_stamps((mount.mountpoint / "vm.img").read_bytes(), 1, 0)
    assert mount.status()["write_mode"] == "back"
    mount.stop()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("cache=/dev/no-such-ssd", 32, "is the device there?"),
        ("cahce=/dev/sdb", 1, "no option cahce; is it 'cache'?"),
        ("cache", 1, "needs a value"),
        ("cache=c.img,dirty-limit=99", 1, "--dirty-limit 99"),
        ("cache=c.img,remount", 32, "fusecache reload"),
        ("nofail", 1, "Say where the cache is"),
    ],
)
def test_the_helper_refuses_with_the_exit_codes_of_mount8(
    mount: Mount, helper: Path, options: str, code: int, words: str
) -> None:
    done = call(mount, helper, mount.origin, mount.mountpoint, "-o", options)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    nothing_left(mount)


def test_mount8_and_a_line_of_fstab_find_the_helper(mount: Mount, helper: Path) -> None:
    if os.geteuid() != 0 or HELPER.exists():
        pytest.skip("needs root and no helper of the machine's own")
    fstab = mount.base / "fstab"
    fstab.write_text(
        f"{mount.origin} {mount.mountpoint} fusecache cache={mount.cache},size=64M,nofail,_netdev,"
        "x-systemd.mount-timeout=30 0 0\n"
    )
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    text = helper.read_text().replace("/usr/bin/env fusecache", f"{sys.executable} -m fusecache")
    HELPER.write_text(text)
    HELPER.chmod(0o755)
    try:
        done = call(mount, "mount", "-T", fstab, mount.mountpoint)
        assert done.returncode == 0, done.stderr
        check_stamps((mount.mountpoint / "vm.img").read_bytes(), 1, 0)
        mount.pid = mount.status()["pid"]
        mount.kill()
        done = call(mount, "mount", "-t", "fusecache", mount.origin, mount.mountpoint,
                    "-o", f"cache={mount.cache}")  # fmt: skip
        assert done.returncode == 0, done.stderr  # over the dead mount
        check_stamps((mount.mountpoint / "vm.img").read_bytes(), 1, 0)
        assert umount(mount.mountpoint) == 0
        wait_for(lambda: list(mount.runtime.glob("*.sock")) == [], "the daemon ends")
    finally:
        HELPER.unlink()


def test_an_origin_that_fstab_wants_mounted_is_not_served_without(mount: Mount) -> None:
    """An empty directory in place of the images would be worse than no mount."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    storage = mount.base / "the storage"
    mount.origin = storage / "images"
    mount.origin.mkdir(parents=True)
    fstab = mount.base / "fstab"
    words = str(storage).replace(" ", "\\040")
    # In a mount namespace of its own, where this is /etc/fstab.
    script = f'mount --bind "{fstab}" /etc/fstab && exec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", *COMMAND, "mount"]

    fstab.write_text(f"# nothing\nserver:/images {words} nfs nofail,_netdev 0 0\n\n/x \\ y\n")
    done = call(mount, *command, *mount.arguments())
    refused(done, f"{mount.origin} is not mounted", f"mount {storage}")
    nothing_left(mount)
    mount.cache.mkdir()  # refused next
    for line in (f"server:/images {words} nfs noauto", f"#x {words} nfs defaults"):
        fstab.write_text(f"{line}\n")
        refused(call(mount, *command, *mount.arguments()), "is a directory")
