"""A real fusecache on real directories, started and ended by the tests.

Everything lies below one temporary directory, the control socket too, so that tests never see
each other's mounts or those of the machine. Processes are ended by their own id.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

BLOCK = 64 * 1024
_LIBC = ctypes.CDLL(None, use_errno=True)


def fusecache(
    *args: object, runtime: Path, timeout: float = 60, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line and returns what it did; never raises for its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "fusecache", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "FUSECACHE_RUNTIME_DIR": str(runtime)},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def old(path: Path, seconds: float = 100) -> None:
    """Waits until the file's change time is old enough to be trusted at once (P3).

    A change time cannot be set, so there is only waiting. ``seconds`` sets the other times back.
    """
    past = time.time() - seconds
    os.utime(path, (past, past))
    settle(path)


def settle(path: Path) -> None:
    """The same for a file that was changed a moment ago; its other times stay."""
    age = time.time() - path.stat().st_ctime
    time.sleep(max(0.0, 2.05 - age))


lane = "on"
"""Whether mounts of tests that do not say so have a lane."""


class Mount:
    """One mount with its own origin, cache and runtime directory below ``base``.

    ``start`` mounts through the real command line; ``stop`` unmounts; ``kill`` is kill -9.
    """

    def __init__(self, base: Path, size: str = "64M", **options: str) -> None:
        self.base = base
        self.origin = base / "origin"
        self.mountpoint = base / "mnt"
        self.cache = base / "cache.img"
        self.runtime = base / "run"
        self.size = size
        self.options = options
        self.pid: int | None = None
        for directory in (self.origin, self.mountpoint, self.runtime):
            directory.mkdir(parents=True, exist_ok=True)

    def run(self, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """The command line in this mount's surroundings."""
        return fusecache(*args, runtime=self.runtime, **kwargs)

    def arguments(self) -> list[object]:
        """The arguments of ``fusecache mount``."""
        flags: list[object] = []
        for name, value in {"lane": lane, **self.options}.items():
            flags += [f"--{name.replace('_', '-')}", value]
        return [self.origin, self.mountpoint, "--cache", self.cache, "--size", self.size, *flags]

    def start(self) -> "Mount":
        """Mounts; fails the test with the command's own words if it does not."""
        done = self.run("mount", *self.arguments())
        assert done.returncode == 0, done.stderr
        self.pid = self.status()["pid"]
        return self

    def status(self) -> dict[str, Any]:
        """``status --json`` of this one mount."""
        done = self.run("status", "--json", "-m", self.mountpoint)
        assert done.returncode == 0, done.stderr
        (mount,) = json.loads(done.stdout)["mounts"]
        return dict(mount)

    def image(self, name: str) -> dict[str, Any]:
        """The status of one image."""
        (found,) = [image for image in self.status()["images"] if image["path"] == name]
        return dict(found)

    def stop(self, *flags: str) -> None:
        """Unmounts cleanly."""
        done = self.run("umount", self.mountpoint, *flags)
        assert done.returncode == 0, done.stderr
        self.pid = None

    def kill(self) -> None:
        """kill -9 of the daemon, and waits until it is gone. The dead mount stays."""
        assert self.pid is not None
        end(self.pid)
        self.pid = None

    def log(self) -> str:
        """What the daemon logged."""
        file = self.runtime / "fusecache.log"
        return file.read_text() if file.exists() else ""

    def cleanup(self) -> None:
        """Ends the daemon and detaches the mount, whatever state they are in."""
        for path in self.runtime.glob("*.sock"):
            with contextlib.suppress(ValueError):
                end(int(path.stem))
        while str(self.mountpoint) in Path("/proc/self/mounts").read_text():
            if _LIBC.umount2(os.fsencode(self.mountpoint), 2) != 0:
                break


M = TypeVar("M", bound=Mount)


@contextlib.contextmanager
def cleaned_up(mount: M) -> Iterator[M]:
    """The mount, cleaned up whatever is done with it, which must leave no unexpected error in the
    daemon's log."""
    try:
        yield mount
    finally:
        mount.cleanup()
    assert "unexpected error" not in mount.log(), mount.log()


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Ends a process by its id and waits until it is gone."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(watched, number)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                return
            time.sleep(0.01)
    except (ProcessLookupError, FileNotFoundError):
        return
    finally:
        os.close(watched)


def drop_caches_of(path: Path) -> None:
    """Takes a file out of this host's page cache, as far as the kernel lets go."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
