"""What the end-to-end tests share: refusals, leftovers, processes, filesystems in files."""

import contextlib
import ctypes
import hashlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.daemon import Mount, end

_LIBC = ctypes.CDLL(None, use_errno=True)
NO_OTHERS = "for other in $(findmnt -rn -t fuse.fusecache -o TARGET); do umount -l $other; done"
"""Shell, first in a mount namespace of its own: which must not keep the mounts of other tests."""
COMMAND = [sys.executable, "-m", "fusecache"]


def others_but(mount: Path) -> str:
    """As ``NO_OTHERS``, but for one mount."""
    return NO_OTHERS.replace("TARGET)", f"TARGET | grep -vx {mount})")


def alone(mount: Mount, *args: object) -> subprocess.CompletedProcess[str]:
    """The command line where only this mount can be seen: other tests leave dead ones."""
    words = shlex.join([*COMMAND, *map(str, args)])
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{others_but(mount.mountpoint)}; exec {words}"],
        capture_output=True, text=True, timeout=60, env=environment(mount), check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> str:
    """Asserts one sentence on standard error with all ``words``, and the exit code."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fusecache: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def answer_of(client: socket.socket, request: bytes) -> bytes:
    """Everything that comes back for a request."""
    client.sendall(request)
    answer = b""
    while part := client.recv(65536):
        answer += part
    return answer


def nothing_left(mount: Mount) -> None:
    """Asserts that no mount, no socket and no process is left of what ``mount`` names."""
    assert not is_mounted(mount.mountpoint)
    assert list(mount.runtime.glob("*.sock")) == []
    assert list(mount.runtime.glob("*.mount")) == []
    # On a busy machine whoever has ended, or waits for that, may be seen a moment longer.
    wait_for(lambda: processes_of(mount.base) == [], "the end of all processes", 5)


def refused_mount(
    mount: Mount, *words: str, args: list[object] | None = None, code: int = 1
) -> str:
    """``fusecache mount`` must be refused and leave nothing behind."""
    done = mount.run("mount", *(mount.arguments() if args is None else args))
    sentence = refused(done, *words, code=code)
    nothing_left(mount)
    return sentence


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly there."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return any(line.split()[1] == str(path) for line in lines)


def processes_of(base: Path) -> list[int]:
    """Processes whose command line names something below ``base``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if os.fsencode(base) + b"/" in line and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def checksum(path: Path) -> str:
    """Of a file's whole contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Polls until the condition holds; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)


def umount(path: Path, flags: int = 0) -> int:
    """umount2(2); gives the errno, 0 if it worked."""
    ctypes.set_errno(0)
    return 0 if _LIBC.umount2(os.fsencode(path), flags) == 0 else ctypes.get_errno()


def run(*command: object) -> str:
    """A system tool that must work; gives what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@contextlib.contextmanager
def tmpfs(path: Path, options: str = "size=1M") -> Iterator[Path]:
    """A tmpfs mounted at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    try:
        yield path
    finally:
        umount(path, 2)


@contextlib.contextmanager
def bind(source: Path, target: Path) -> Iterator[Path]:
    """A bind mount of ``source`` at ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", source, target)
    try:
        yield target
    finally:
        umount(target, 2)


@contextlib.contextmanager
def mounted(device: Path, path: Path) -> Iterator[Path]:
    """A device with a filesystem, mounted at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    run("mount", device, path)
    try:
        yield path
    finally:
        wait_for(lambda: umount(path) in (0, 22), f"{path} is not in use any more")


@contextlib.contextmanager
def ext4(image: Path, path: Path, size: int) -> Iterator[Path]:
    """An ext4 in a file on a loop device, mounted at ``path``."""
    image.touch()
    os.truncate(image, size)
    run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal", image)
    path.mkdir(parents=True, exist_ok=True)
    loop = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount", loop, path)
        try:
            yield path
        finally:
            wait_for(lambda: umount(path) in (0, 22), f"{path} is not in use any more")
    finally:
        run("losetup", "--detach", loop)


@contextlib.contextmanager
def process(*command: object, ends: int = 9, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does not outlive the test."""
    made = subprocess.Popen([*map(str, command)], **options)
    try:
        yield made
    finally:
        if made.poll() is None:
            end(made.pid, ends)
        made.wait(20)
        for stream in (made.stdin, made.stdout, made.stderr):
            if stream is not None:
                stream.close()


def environment(mount: Mount) -> dict[str, str]:
    """For processes that are started past ``Mount.run``."""
    return {**os.environ, "FUSECACHE_RUNTIME_DIR": str(mount.runtime)}
