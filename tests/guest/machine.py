"""One guest: a QEMU process, its disks, and what is asked of it. Ended by its own process id."""

import contextlib
import functools
import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.guest.agent import Agent, Done, NoAnswer
from tests.guest.rootfs import CHECKOUT, VENV, RootFilesystem
from tests.support.daemon import end

_BOOT = 300.0
"""Seconds from power on to an agent that answers: under emulation a minute or two."""
_RUN = 300.0
"""Seconds: emulated on a busy machine, what takes a second elsewhere can take a minute."""


@functools.cache
def accelerator() -> tuple[str, str]:
    """What QEMU's -accel and -cpu are given: hardware where guests can have it, else emulation.

    A ``/dev/kvm`` without the processor's extensions interprets a guest's kernel, slower than QEMU
    does; and a nested one may not know all that the processor has.
    """
    flags = Path("/proc/cpuinfo").read_text()
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and re.search(r"^flags.* (vmx|svm)\b", flags, re.M):
        for model in ("host", "host,-arch-capabilities"):
            if _starts("kvm", model):
                return "kvm", model
    return "tcg,thread=multi", "max"


def _starts(accel: str, model: str) -> bool:
    command = ["qemu-system-x86_64", "-accel", accel, "-cpu", model, "-nodefaults", "-m", "64"]
    tried = subprocess.run(
        [*command, "-display", "none", "-monitor", "stdio"],
        input=b"quit\n", capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    return tried.returncode == 0


class Machine:
    """A guest with systemd as PID 1. Number 1 has the address 10.77.0.1, and so on."""

    def __init__(self, rootfs: RootFilesystem, base: Path, name: str, number: int) -> None:
        self.name = name
        self.base = base
        self.address = f"10.77.0.{number}"
        self._rootfs = rootfs
        self._number = number
        self._process: subprocess.Popen[bytes] | None = None
        self._agent = Agent(base / "agent")
        self.disks = [base / "root.qcow2"]
        base.mkdir()
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", rootfs.disk,
             self.disks[0]],
            check=True,
        )  # fmt: skip

    def add_disk(self, name: str, size: int, *mkfs: str) -> None:
        """One more disk, empty or formatted: ``/dev/vdb`` and so on."""
        disk = self.base / name
        with open(disk, "wb") as file:
            file.truncate(size)
        if mkfs:
            subprocess.run([*mkfs, disk], check=True)
        self.disks.append(disk)

    # -- power -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Power on; does not wait for the boot."""
        for name in ("agent", "qmp", f"../lan{self._number}"):
            (self.base / name).unlink(missing_ok=True)
        self._agent.close()
        with open(self.base / "qemu.log", "ab") as log:
            self._process = subprocess.Popen(
                # With this process ends the guest, however it ends.
                ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *self._arguments()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _arguments(self) -> list[str]:
        base, number = self.base, self._number
        accel, model = accelerator()
        peer = base.parent / f"lan{3 - number}"
        append = (
            "root=LABEL=root rw console=ttyS0 quiet panic=-1 "
            f"systemd.hostname={self.name} systemd.log_target=journal"
        )
        arguments = [
            "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35", "-accel", accel, "-cpu", model, "-m", "1024", "-smp", "2",
            "-kernel", str(self._rootfs.kernel), "-initrd", str(self._rootfs.initrd),
            "-append", append,
            "-serial", f"file:{base}/console",
            "-qmp", f"unix:{base}/qmp,server=on,wait=off",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={base}/agent,server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-device", "virtio-rng-pci",
            # Each sends to the other's socket; neither cares whether the other is there.
            "-netdev", f"dgram,id=lan,local.type=unix,local.path={base.parent}/lan{number},"
            f"remote.type=unix,remote.path={peer}",
            "-device", f"virtio-net-pci,netdev=lan,mac=52:54:00:77:00:{number:02x}",
        ]  # fmt: skip
        for disk in self.disks:
            form = "qcow2" if disk.suffix == ".qcow2" else "raw"
            arguments += ["-drive", f"if=virtio,format={form},file={disk},cache=unsafe"]
        return arguments

    @property
    def runs(self) -> bool:
        """Whether QEMU does."""
        return self._process is not None and self._process.poll() is None

    def boot(self, seconds: float = _BOOT) -> "Machine":
        """Power on, and waits for the agent."""
        self.start()
        self.wait_agent(seconds)
        return self

    def wait_agent(self, seconds: float = _BOOT) -> None:
        """Until the guest's agent answers; fails with the console's last words."""
        try:
            self._agent.greet(seconds)
        except NoAnswer as exc:
            raise AssertionError(f"{self.name}: {exc}\n{self.console()[-3000:]}") from exc

    def console(self) -> str:
        """What the kernel and the boot said."""
        with contextlib.suppress(OSError):
            return (self.base / "console").read_text(errors="replace")
        return ""

    def power_off(self, seconds: float = 300) -> None:
        """As the power button's menu does: systemd stops everything; until QEMU has ended."""
        with contextlib.suppress(NoAnswer, OSError):
            self.begin("systemctl poweroff")
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} does not shut down\n{self.console()[-3000:]}"
            ) from None

    def reboot(self, seconds: float = _BOOT) -> None:
        """An orderly one."""
        self.power_off()
        self.boot(seconds)

    def reset(self) -> None:
        """The reset button: what the guest's kernel had not written is gone. Waits for the boot."""
        before = self.sh("cat /proc/sys/kernel/random/boot_id")
        self.qmp("system_reset")
        time.sleep(1)
        self.wait_agent()
        assert self.sh("cat /proc/sys/kernel/random/boot_id") != before

    def close(self) -> None:
        """Ends QEMU, whatever the guest is doing."""
        self._agent.close()
        if self._process is not None and self._process.poll() is None:
            end(self._process.pid)
            self._process.wait(20)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command to QEMU itself: ``stop``, ``cont``, ``system_reset``."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
            made.settimeout(60)
            made.connect(str(self.base / "qmp"))
            with made.makefile("rw") as lines:
                lines.readline()  # its greeting
                answer: dict[str, Any] = {}
                for name, given in (("qmp_capabilities", {}), (command, arguments)):
                    lines.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                    lines.flush()
                    answer = {}
                    while "return" not in answer:
                        answer = json.loads(lines.readline())
                        assert "error" not in answer, answer
                return answer["return"]

    # -- commands ----------------------------------------------------------------------------------

    def begin(self, script: str, given: str = "") -> "Script":
        """Starts a shell script in the guest."""
        return Script(self, script, self._agent, self._agent.begin(script, given))

    def run(self, script: str, given: str = "", seconds: float = _RUN) -> Done:
        """A shell script in the guest, whatever it comes to."""
        return self.begin(script, given).wait(seconds)

    def sh(self, script: str, given: str = "", seconds: float = _RUN) -> str:
        """What a shell script prints that must succeed."""
        done = self.run(script, given, seconds)
        assert done.code == 0, f"{self.name}: {script}\n{done}"
        return done.out.strip()

    def python(self, code: str, *arguments: object, seconds: float = _RUN) -> str:
        """What Python code prints in the guest; it can import the tests' support."""
        return self.sh(python_command(*arguments), code, seconds)

    def begin_python(self, code: str, *arguments: object) -> "Script":
        """The same, while the test goes on."""
        return self.begin(python_command(*arguments), code)

    def write(self, path: str, text: str) -> None:
        """A file in the guest."""
        self.sh(f"mkdir -p $(dirname {path}) && cat > {path}", text)

    def stamp(self, path: str, image: int, size: int, version: int, offset: int = 0) -> None:
        """Writes stamps over a range of a file, which may be new; closes it, without fsync."""
        self.python(_STAMP, path, image, offset, size, version)

    def versions(self, path: str, image: int) -> set[int]:
        """The versions of all stamps of a file, which must all be the image's and in place."""
        return set(json.loads(self.python(_VERSIONS, path, image)))

    def wait_for(self, script: str, what: str, seconds: float = 180) -> str:
        """Until a script succeeds; what it prints then."""
        deadline = time.monotonic() + seconds
        while (done := self.run(script)).code != 0:
            assert time.monotonic() < deadline, (
                f"{self.name}: no {what} in {seconds} s: {done}\n{self.complaints()}"
            )
            time.sleep(0.3)
        return done.out.strip()

    def complaints(self) -> str:
        """What failed since the boot, and the journal's last warnings."""
        return self.run("systemctl --failed; systemctl list-jobs; journalctl -b -p 5 -n 40").out

    def wait_until(self, wanted: Callable[[], bool], what: str, seconds: float = 180) -> None:
        """Until it holds."""
        deadline = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < deadline, f"{self.name}: no {what} in {seconds} s"
            time.sleep(0.3)


_STAMP = """
import os, sys
from tests.support.stamps import stamped
path, (image, offset, size, version) = sys.argv[1], map(int, sys.argv[2:])
fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
step = 1 << 20
for place in range(offset, offset + size, step):
    length = min(step, offset + size - place)
    assert os.pwrite(fd, stamped(image, place, length, version), place) == length
os.close(fd)
"""
_VERSIONS = """
import json, sys
from tests.support.stamps import check_stamps
print(json.dumps(sorted(set(check_stamps(open(sys.argv[1], "rb").read(), int(sys.argv[2]), 0)))))
"""


class Script:
    """A script that runs in the guest."""

    def __init__(self, machine: Machine, text: str, agent: Agent, pid: int) -> None:
        self.pid = pid
        self._machine = machine
        self._text = text
        self._agent = agent
        self._done: Done | None = None

    @property
    def done(self) -> Done | None:
        """How it ended, or None while it runs."""
        if self._done is None:
            self._done = self._agent.ended(self.pid)
        return self._done

    def wait(self, seconds: float = _RUN) -> Done:
        """Until it ends."""
        deadline = time.monotonic() + seconds
        pause = 0.01
        while (done := self.done) is None:
            assert time.monotonic() < deadline, (
                f"{self._machine.name}: still running after {seconds} s: {self._text}"
            )
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)
        return done


def python_command(*arguments: object) -> str:
    """The shell's words for code on standard input."""
    words = shlex.join(map(str, arguments))
    return f"cd {CHECKOUT} && PYTHONPATH={CHECKOUT} {VENV}/bin/python - {words}"
