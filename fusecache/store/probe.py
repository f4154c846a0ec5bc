"""Questions about paths whose filesystem may hang: asked by a process that may be left behind.

A call to a hung filesystem cannot be given up by the process that makes it, and while the kernel
holds it not even a kill ends it. So a process of its own makes it, and nobody waits for that one
longer than ``seconds``. This file is that process's program, too: it imports nothing of fusecache.
"""

import contextlib
import errno
import json
import os
import select
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 3.0
"""What a healthy file server needs at most, also after a pause of its disks."""
_START = 60.0
_LAST_WISH = 0.2

_left_behind: list["subprocess.Popen[bytes]"] = []
"""Killed, but held by the kernel. Kept, since a process that is dropped unreaped is a warning."""


class NoAnswer(Exception):
    """The filesystem did not answer in time."""


def ask(question: str, path: str, seconds: float = SECONDS) -> dict[str, Any]:
    """The answer to one of ``QUESTIONS`` about a path; ``{"error": ..., "errno": ...}`` if the call
    failed.

    Raises:
        NoAnswer: there was none in time.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), question, os.path.abspath(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_start(process)
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NoAnswer from None
    finally:
        _let_go(process)
    return dict(json.loads(said)) if said else {"error": "the question could not be asked"}


def _wait_for_start(process: "subprocess.Popen[bytes]") -> None:
    """Until it is about to ask: a busy machine takes its time for that, which is not the storage's.
    If it does not start, that is left to be seen by its end."""
    assert process.stdout is not None
    if select.select([process.stdout], [], [], _START)[0]:
        os.read(process.stdout.fileno(), 1)


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """Ends it, but does not wait for what cannot be ended."""
    if process.returncode is not None:
        return
    process.kill()
    try:
        process.wait(_LAST_WISH)
    except subprocess.TimeoutExpired:
        _left_behind.append(process)
    if process.stdout is not None:
        process.stdout.close()


# -- in the process of its own ---------------------------------------------------------------------


def _alive(path: str) -> dict[str, Any]:
    """Whether the filesystem says anything of itself."""
    os.statvfs(path)
    return {}


def _resolve(path: str) -> dict[str, Any]:
    """``path`` without links or dots, whether it exists or not."""
    return {"path": os.path.realpath(path)}


def _space(path: str) -> dict[str, Any]:
    """Bytes ``free`` on the filesystem of a path, or of the nearest directory ``there``."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    space = os.statvfs(path)
    return {"there": path, "free": space.f_bavail * space.f_frsize}


def _file(path: str) -> dict[str, Any]:
    """What a path is: ``kind``, the number of its filesystem, that of a device itself, and
    whether we may write to it. ``kind`` is None if nothing is there."""
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return {"kind": None}
    kinds = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFBLK: "block"}
    kind = kinds.get(stat.S_IFMT(st.st_mode), "other")
    may_write = os.access(path, os.W_OK)
    return {"kind": kind, "dev": st.st_dev, "rdev": st.st_rdev, "may_write": may_write}


def _images(path: str) -> dict[str, Any]:
    """Whether a directory can be listed, and the first ``image`` in it be read (``unreadable``:
    the errno and its words)."""
    with os.scandir(path) as entries:
        image = next((e.path for e in entries if e.is_file(follow_symlinks=False)), None)
    if image is None:
        return {"image": None}
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        return {"image": image, "unreadable": [exc.errno, exc.strerror]}
    try:
        os.pread(fd, 1, 0)
    except OSError as exc:
        return {"image": image, "unreadable": [exc.errno, exc.strerror]}
    finally:
        os.close(fd)
    return {"image": image, "unreadable": None}


def _claimed(path: str) -> dict[str, Any]:
    """Whether somebody has a block device for itself: a mount, an array, an exclusive open."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        return {"claimed": exc.errno == errno.EBUSY}
    return {"claimed": False}


QUESTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "alive": _alive,
    "resolve": _resolve,
    "space": _space,
    "file": _file,
    "images": _images,
    "claimed": _claimed,
}


def answer(question: str, path: str) -> dict[str, Any]:
    """Asked here and now: it may hang."""
    try:
        return QUESTIONS[question](path)
    except OSError as exc:
        return {"error": exc.strerror, "errno": exc.errno}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(flush=True)  # the time begins
        print(json.dumps(answer(sys.argv[1], sys.argv[2])), flush=True)
