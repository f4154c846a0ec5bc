"""A libvirt of its own for a test: libvirtd and virtlogd without systemd, nothing of the machine's.

Both run in namespaces of their own, where /etc/libvirt, /run, /var/lib, /var/cache and /var/log
are directories of the test, so that several can run beside each other and beside the machine's.
The shell that starts them is the first process there: it takes care of orphans, which libvirt
waits for, and with its end everything ends. A fusecache mount must be there before: whether later
ones are seen depends on how the machine's root is mounted.
"""

import subprocess
import time
from pathlib import Path
from typing import Self
from uuid import uuid4

from tests.libvirt.guest import PATIENCE
from tests.support.daemon import Mount, end

_DIRECTORIES = {
    "etc": "/etc/libvirt",
    "run": "/run",
    "lib": "/var/lib",
    "cache": "/var/cache",
    "log": "/var/log",
}
_START = """
set -eu
{binds}
mount --bind {base}/passwd /etc/passwd
mount --bind {base}/group /etc/group
mount --rbind {host} /mnt
hostname {name}
export PATH={base}/bin:$PATH
virtlogd --pid-file {base}/virtlogd.pid 2>{base}/virtlogd.err &
libvirtd --pid-file {base}/libvirtd.pid &
wait
"""
QEMU_ID = 64055
"""Debian's libvirt-qemu, which libvirtd insists on."""


class Libvirt:
    """One host: ``mount`` is its fusecache, started before; guests see it at ``/mnt/mnt``."""

    def __init__(self, base: Path, name: str, mount: Mount) -> None:
        self.base = base
        self.name = name
        self.mount = mount
        self._process: subprocess.Popen[bytes] | None = None
        for directory in ("sock", "bin", *_DIRECTORIES):
            (base / directory).mkdir(parents=True)
        (base / "etc/libvirtd.conf").write_text(
            f'unix_sock_dir = "{base}/sock"\n'
            'auth_unix_ro = "none"\nauth_unix_rw = "none"\n'
            f'log_outputs = "3:file:{base}/libvirtd.log"\n'
            f'host_uuid = "{uuid4()}"\n'
        )
        # Beyond this the packages' own defaults hold: another user, owners changed at start and
        # stop, a mount namespace for each guest.
        (base / "etc/qemu.conf").write_text("security_default_confined = 0\n")
        user = f"libvirt-qemu:x:{QEMU_ID}:{QEMU_ID}::/var/lib/libvirt:/usr/sbin/nologin"
        _copy_with(Path("/etc/passwd"), base / "passwd", user)
        _copy_with(Path("/etc/group"), base / "group", f"libvirt-qemu:x:{QEMU_ID}:", "kvm:x:64056:")

    def __enter__(self) -> Self:
        binds = "\n".join(
            f"mount --bind {self.base}/{name} {place}" for name, place in _DIRECTORIES.items()
        )
        script = _START.format(base=self.base, binds=binds, host=self.mount.base, name=self.name)
        with open(self.base / "libvirtd.err", "wb") as errors:
            self._process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"),
                    *("--propagation", "slave", "sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        deadline = time.monotonic() + PATIENCE
        while self._virsh("version").returncode != 0:
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        for child in children.read_text().split() if children.exists() else ():
            end(int(child))  # the namespace's first process, and all others with it
        self._process.wait(30)

    def log(self) -> str:
        """What the daemons had to say."""
        files = [self.base / name for name in ("libvirtd.err", "virtlogd.err", "libvirtd.log")]
        files += self.base.glob("log/libvirt/qemu/*.log")
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    @property
    def uri(self) -> str:
        """How virsh calls it."""
        return f"qemu+unix:///system?socket={self.base}/sock/libvirt-sock"

    def virsh(self, *args: object) -> str:
        """A command that must work; gives what it printed."""
        done = self._virsh(*args)
        assert done.returncode == 0, (args, done.stderr, self.log())
        return done.stdout

    def refused(self, *args: object) -> str:
        """A command that must fail; gives why."""
        done = self._virsh(*args)
        assert done.returncode != 0, (args, done.stdout)
        return done.stderr

    def _virsh(self, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "-q", "-c", self.uri, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def state(self, guest: str) -> str:
        """What libvirt says of a guest."""
        return self.virsh("domstate", guest).strip()

    def console(self, guest: str) -> str:
        """What the guest has printed: virtlogd writes it to /var/log/GUEST.console."""
        try:
            text = (self.base / f"log/{guest}.console").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return text.replace("\r", "")

    def wait_for(self, guest: str, text: str, seconds: float = PATIENCE, *, after: int = 0) -> None:
        """Until the guest has printed ``text`` beyond its first ``after`` characters."""
        deadline = time.monotonic() + seconds
        while text not in self.console(guest)[after:]:
            said = self.console(guest)[-2000:]
            assert "WRONG" not in said and "Kernel panic" not in said, said
            assert time.monotonic() < deadline, f"in vain for '{text}': {said}\n{self.log()}"
            time.sleep(0.05)

    def wait_until_off(self, guest: str, seconds: float = PATIENCE) -> None:
        """Until libvirt says that it has stopped."""
        deadline = time.monotonic() + seconds
        while self.state(guest) != "shut off":
            assert time.monotonic() < deadline, (self.state(guest), self.log())
            time.sleep(0.1)


def _copy_with(source: Path, copy: Path, *lines: str) -> None:
    """A copy of an account file that also has these lines, if their names are not there."""
    there = source.read_text().splitlines()
    names = {line.split(":")[0] for line in there}
    more = [line for line in lines if line.split(":")[0] not in names]
    copy.write_text("\n".join([*there, *more, ""]))
