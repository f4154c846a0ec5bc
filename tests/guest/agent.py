"""Commands in a guest, through QEMU's guest agent on a virtio-serial port: no network, no login."""

import base64
import contextlib
import json
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ANSWER = 60.0
"""Seconds the agent has for an answer; no command that is used here waits for anything."""


class NoAnswer(Exception):
    """The guest's agent does not run, or hangs."""


@dataclass(frozen=True)
class Done:
    """What a command in the guest came to."""

    code: int
    out: str
    err: str


class Agent:
    """The agent of one guest, over all its boots."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._received = b""

    def close(self) -> None:
        """Forgets the connection; the next call makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def greet(self, seconds: float) -> None:
        """Until an agent answers, by a new connection: nothing of an earlier boot is believed.

        Raises:
            NoAnswer: none did in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.close()
            try:
                self._sync(min(2.0, max(0.1, deadline - time.monotonic())))
                return
            except (OSError, NoAnswer) as exc:
                self.close()
                if time.monotonic() > deadline:
                    raise NoAnswer(f"no agent answers at {self._path}: {exc}") from exc
                time.sleep(0.2)

    def _sync(self, seconds: float) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket, self._received = made, b""
        made.settimeout(seconds)
        made.connect(str(self._path))
        mark = random.getrandbits(31)
        # The byte 0xff makes the agent drop what it has half read.
        made.sendall(b"\xff" + _request("guest-sync", {"id": mark}))
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ValueError):
                if json.loads(self._line(deadline)).get("return") == mark:
                    return

    def _line(self, deadline: float) -> bytes:
        assert self._socket is not None
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoAnswer("the agent did not answer in time")
            self._socket.settimeout(left)
            try:
                some = self._socket.recv(1 << 20)
            except TimeoutError:
                continue
            if not some:
                raise NoAnswer("the agent's port was closed")
            self._received += some
        line, _, self._received = self._received.partition(b"\n")
        return line

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command of the agent's own."""
        if self._socket is None:
            self._sync(_ANSWER)
        assert self._socket is not None
        self._socket.sendall(_request(command, arguments))
        answer = json.loads(self._line(time.monotonic() + _ANSWER))
        assert "return" in answer, (command, answer)
        return answer["return"]

    def begin(self, script: str, given: str = "") -> int:
        """Starts a shell script; its number in the guest."""
        asked: dict[str, Any] = {
            "path": "/bin/sh", "arg": ["-c", script], "env": [f"PATH={_PATH}"],
            "capture-output": True,
        }  # fmt: skip
        if given:
            asked["input-data"] = base64.b64encode(given.encode()).decode()
        return int(self.ask("guest-exec", **asked)["pid"])

    def ended(self, pid: int) -> Done | None:
        """How a script ended, or None while it runs. To be asked no more after it has ended."""
        status = self.ask("guest-exec-status", pid=pid)
        if not status["exited"]:
            return None
        out, err = (
            base64.b64decode(status.get(name, "")).decode(errors="replace")
            for name in ("out-data", "err-data")
        )
        return Done(int(status.get("exitcode", 128 + status.get("signal", 0))), out, err)


def _request(command: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
