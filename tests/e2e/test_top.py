"""``fusecache top``: in a terminal of 80 columns, and in a pipe."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

from tests.e2e.helpers import COMMAND, environment, refused
from tests.support.daemon import BLOCK, Mount, end
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

NAME = "a-virtual-machine-with-a-long-name.qcow2"


class Terminal:
    """``fusecache top`` on a pseudo terminal."""

    def __init__(self, mount: Mount, columns: int = 80, lines: int = 24) -> None:
        self.fd, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        self.before = termios.tcgetattr(other)
        self.other = other
        self.text = ""
        self.top = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.2"],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**environment(mount), "TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def read_until(self, words: str, seconds: float = 20) -> str:
        """Everything that was shown, up to the words."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, (words, self.text[-4000:])
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 65536).decode()
        shown, self.text = self.text, ""
        return shown

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def ended(self) -> int:
        """The exit code; the terminal must be as it was before."""
        deadline = time.monotonic() + 20
        while self.top.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.fd], [], [], 0.05)[0]:
                self.text += os.read(self.fd, 65536).decode()
        while select.select([self.fd], [], [], 0.05)[0]:
            self.text += os.read(self.fd, 65536).decode()
        assert termios.tcgetattr(self.other) == self.before
        assert "\x1b[?1049l" in self.text and "\x1b[?25h" in self.text  # screen and cursor back
        assert "Traceback" not in self.text
        return self.top.returncode

    def close(self) -> None:
        if self.top.poll() is None:
            end(self.top.pid)
        self.top.wait(20)
        os.close(self.fd)
        os.close(self.other)


@pytest.fixture
def busy(mount: Mount) -> Mount:
    """A mount with one image that was read."""
    (mount.origin / NAME).write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    mount.start()
    (mount.mountpoint / NAME).read_bytes()
    return mount


def lines_of(screen: str) -> list[str]:
    """The last whole picture, as lines of text."""
    picture = screen[: screen.rindex("waiting") + 400].split("\x1b[H")[-1]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", picture).replace("\r", "").split("\n")


def test_it_lives_in_eighty_columns_and_obeys_keys(busy: Mount) -> None:
    terminal = Terminal(busy)
    try:
        shown = terminal.read_until("a-virtual-machine")
        assert "sorted by reads" in shown and "hit ratio" in shown and "\x1b[?1049h" in shown
        lines = lines_of(shown)
        assert max(map(len, lines)) <= 80, lines
        terminal.press(b"s")
        terminal.read_until("sorted by writes")
        terminal.press(b"r\x1b[B\x1b[A?")
        terminal.press(b"q")
        assert terminal.ended() == 0
    finally:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_terminal_as_it_was(busy: Mount, number: int) -> None:
    terminal = Terminal(busy)
    try:
        terminal.read_until("a-virtual-machine")
        if number == signal.SIGINT:
            terminal.press(b"\x03")
        else:
            terminal.top.send_signal(number)
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_it_says_that_the_daemon_is_gone_and_goes_on_when_it_is_back(busy: Mount) -> None:
    terminal = Terminal(busy)
    try:
        terminal.read_until("a-virtual-machine")
        busy.stop()
        terminal.read_until("does not answer since")
        busy.start()
        terminal.read_until("a-virtual-machine")
        terminal.press(b"q")
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_a_small_terminal_is_no_error(busy: Mount) -> None:
    terminal = Terminal(busy, columns=20, lines=4)
    try:
        terminal.read_until("fusecache")
        terminal.press(b"q")
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_in_a_pipe_it_prints_and_ends(busy: Mount) -> None:
    done = busy.run("top")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NAME) == 1 and "\x1b" not in done.stdout
    done = busy.run("top", "--count", "2", "--interval", "0.1", "--sort", "dirty")
    assert (done.returncode, done.stdout.count(NAME)) == (0, 2)
    busy.stop()
    refused(busy.run("top", "--once"), "No fusecache daemon is running")
