"""One QEMU process: its monitor, its serial console, its end."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tests.libvirt.guest import KERNEL_WORDS, PATIENCE, Parts
from tests.support.daemon import end

ACCEL = os.environ.get("FUSECACHE_TEST_ACCEL", "tcg")
"""What runs the guests. Emulation boots in seconds everywhere; on a host that is a guest itself
/dev/kvm may be there and the guest hang all the same (seen), so that kvm:tcg is no default."""

EMULATED = ACCEL != "kvm"
"""Whether a guest must not run while it migrates.

QEMU 7.2 can lose what an emulated guest writes to its memory while that is being sent. Measured
with plain files as disks and no fusecache anywhere: of 200 moves of running guests 3 ended in wrong
bytes or a kernel's panic, of 110 in a QEMU of one thread 2, of 1,400 of stopped guests none.
"""


class Qemu:
    """A guest with one disk.

    Args:
        base: an existing directory for its sockets and logs.
        disk: the image, raw.
        words: for the guest's kernel command line.
        cache: as libvirt has it: "none" (O_DIRECT) or "writeback".
        incoming: waits for a migration instead of booting.
    """

    def __init__(
        self,
        parts: Parts,
        base: Path,
        disk: Path,
        *,
        words: str,
        cache: str = "none",
        incoming: bool = False,
    ) -> None:
        self.base = base
        self.disk = disk
        direct = "on" if cache == "none" else "off"
        # As libvirt puts it, auto-read-only too: a migration's destination opens the image for
        # reading, and for writing when it takes over.
        file = f"file,node-name=file,filename={disk},cache.direct={direct},auto-read-only=on"
        self.command = [
            *("qemu-system-x86_64", "-machine", f"accel={ACCEL}", "-m", "128"),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", parts.kernel, "-initrd", parts.initrd),
            *("-append", f"{KERNEL_WORDS} {words}"),
            *("-blockdev", f"driver={file}"),
            *("-blockdev", f"driver=raw,node-name=disk,file=file,cache.direct={direct}"),
            *("-device", "virtio-blk-pci,drive=disk,write-cache=on"),
            *("-chardev", f"socket,id=c,path={base}/console.sock,server=on,wait=off"
                          f",logfile={base}/console,logappend=off"),
            *("-serial", "chardev:c"),
            *("-qmp", f"unix:{base}/qmp.sock,server=on,wait=off"),
        ]  # fmt: skip
        if incoming:
            self.command += ["-incoming", f"unix:{base}/migration.sock"]
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: socket.socket | None = None
        self._replies = b""

    def __enter__(self) -> Self:
        with open(self.base / "stderr", "wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in self.command],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self.kill()

    @property
    def migration(self) -> Path:
        """Where an incoming migration is waited for."""
        return self.base / "migration.sock"

    def kill(self) -> None:
        """kill -9 of the process, as when its host is in need of memory."""
        assert self._process is not None
        if self._process.poll() is None:
            end(self._process.pid)
        self._process.wait(20)

    def ended(self, seconds: float = PATIENCE) -> None:
        """Waits until it has ended by itself, without a word of complaint."""
        assert self._process is not None
        code = self._process.wait(seconds)
        assert code == 0, (code, self.errors())

    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def console(self) -> str:
        """What the guest has printed."""
        try:
            return (self.base / "console").read_text(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    def errors(self) -> str:
        """What QEMU has printed."""
        return (self.base / "stderr").read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = PATIENCE, *, after: int = 0) -> None:
        """Until the guest has printed ``text`` beyond its first ``after`` characters."""
        deadline = time.monotonic() + seconds
        while text not in self.console()[after:]:
            said = f"{self.console()[-2000:]}\n{self.errors()}"
            assert "WRONG" not in self.console() and "Kernel panic" not in self.console(), said
            assert self.running(), f"QEMU has ended: {said}"
            assert time.monotonic() < deadline, f"waited in vain for '{text}': {said}"
            time.sleep(0.02)

    def wait_for_error(self, text: str, seconds: float = PATIENCE) -> None:
        """Until QEMU itself has complained so."""
        deadline = time.monotonic() + seconds
        while text not in self.errors():
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)

    def wait_for_turns(self, count: int = 2, seconds: float = PATIENCE) -> None:
        """Until a guest that churns its disk has done some more of it."""
        for _ in range(count):
            self.wait_for("guest: turn", seconds, after=len(self.console()))

    def say(self, line: str) -> None:
        """Types a line at the guest's console."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
            console.connect(str(self.base / "console.sock"))
            console.sendall(line.encode() + b"\n")
            self.wait_for(line)  # the terminal's echo: it has arrived

    def ask(self, command: str, **arguments: object) -> Any:
        """One command to the monitor; its answer, or a failed assertion."""
        if self._monitor is None:
            self._monitor = self._connect()
            self._ask({"execute": "qmp_capabilities"})
        return self._ask({"execute": command, "arguments": arguments})

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.connect(str(self.base / "qmp.sock"))
            except OSError:
                made.close()
                assert self.running() and time.monotonic() < deadline, self.errors()
                time.sleep(0.02)
            else:
                made.settimeout(PATIENCE)
                return made

    def _ask(self, request: dict[str, object]) -> Any:
        assert self._monitor is not None
        self._monitor.sendall(json.dumps(request).encode() + b"\n")
        while True:
            while b"\n" not in self._replies:
                received = self._monitor.recv(65536)
                assert received, f"QEMU has ended: {self.errors()}"
                self._replies += received
            line, self._replies = self._replies.split(b"\n", 1)
            answer = json.loads(line)
            if "return" in answer or "error" in answer:
                assert "error" not in answer, (request, answer)
                return answer["return"]

    def migrate_to(self, target: "Qemu") -> None:
        """Moves the guest; waits until this side has given everything away."""
        target.ask("query-status")  # it listens
        if EMULATED:
            self.ask("stop")
        self.ask("migrate", uri=f"unix:{target.migration}")
        deadline = time.monotonic() + PATIENCE
        while (state := self.ask("query-migrate").get("status")) != "completed":
            assert state not in ("failed", "cancelled"), (self.errors(), target.errors())
            assert time.monotonic() < deadline, state
            time.sleep(0.05)

    def take_over(self) -> None:
        """Waits until everything has arrived here; goes on with the guest if it was stopped."""
        deadline = time.monotonic() + PATIENCE
        while (state := self.ask("query-status")["status"]) == "inmigrate":
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)
        if state == "paused":
            self.ask("cont")


@contextlib.contextmanager
def qemu(
    parts: Parts, base: Path, disk: Path, words: str = "", *, cache: str = "none",
    incoming: bool = False,
) -> Iterator[Qemu]:  # fmt: skip
    """A QEMU in a new directory below ``base`` that does not outlive the body."""
    number = len(list(base.glob("qemu*")))
    directory = base / f"qemu{number}"
    directory.mkdir()
    with Qemu(parts, directory, disk, words=words, cache=cache, incoming=incoming) as made:
        yield made
