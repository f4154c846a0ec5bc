"""The command line's end of the control socket. Never stats below a mount: it may hang."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecache.control import image_names, protocol
from fusecache.errors import ControlError

_CONNECT_TIMEOUT = 3.0
_PATIENCE = 10.0
"""Seconds for a daemon that lives and is meant: on a busy host it may just be slow."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon."""

    socket_path: Path
    pid: int
    mountpoint: Path
    origin: Path
    cache: Path
    state: str
    dirty_bytes: int
    """Not on the origin yet."""

    @property
    def mounted(self) -> bool:
        """Whether it still serves; else it brings the last data to the origin."""
        return self.state != "flushing"


def ask(
    path: Path,
    request: dict[str, Any],
    *,
    timeout: float | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """One request to one daemon.

    Args:
        timeout: seconds; None waits as long as it takes.

    Raises:
        ControlError: the daemon is gone, does not answer, or says why not.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
            sock.sendall(protocol.encode(request))
            with sock.makefile("rb") as answers:
                for line in answers:
                    message = protocol.decode(line)
                    if "ok" in message:
                        return dict(message["ok"])
                    if "error" in message:
                        raise ControlError(str(message["error"]))
                    if progress is not None:
                        progress(dict(message.get("progress", {})))
        except TimeoutError as exc:
            raise ControlError(f"The daemon behind {path} does not answer.") from exc
        except OSError as exc:
            raise ControlError(f"The daemon behind {path} is gone: {exc.strerror}.") from exc
    raise ControlError("The daemon ended before it had answered; see its log.")


def daemons(timeout: float = _CONNECT_TIMEOUT) -> list[Daemon]:
    """Every daemon that answers in time; sockets of dead ones are removed."""
    found = []
    for directory in protocol.runtime_directories():
        for path in sorted(directory.glob("*.sock")):
            if not _alive(path):
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.with_suffix(".mount").unlink()
                continue
            with contextlib.suppress(ControlError):
                who = ask(path, {"verb": "who"}, timeout=timeout)
                found.append(
                    Daemon(
                        path,
                        int(who["pid"]),
                        Path(who["mountpoint"]),
                        Path(who["origin"]),
                        Path(who["cache"]),
                        str(who["state"]),
                        int(who.get("dirty_bytes", 0)),
                    )
                )
    return found


def _alive(path: Path) -> bool:
    """Whether the process of a socket lives; one that was killed but is held by the kernel, in
    a call that cannot be interrupted, does not."""
    try:
        status = Path(f"/proc/{int(path.stem)}/status").read_text()
    except ValueError:
        return False
    except OSError:
        return _listens(path)  # it is gone, or we are in another PID namespace
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    killed = int(fields["ShdPnd"], 16) >> (signal.SIGKILL - 1) & 1
    return fields["State"][0] not in "ZX" and not killed


def _listens(path: Path) -> bool:
    """Whether somebody has the socket open; that of a dead process refuses."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_CONNECT_TIMEOUT)
        try:
            sock.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass  # nobody can tell
    return True


def silent_holder(mountpoint: Path, answered: list[Daemon]) -> int | None:
    """The pid of a living daemon that has this mount but is not among those that answered."""
    known = {daemon.socket_path for daemon in answered}
    for directory in protocol.runtime_directories():
        for path in directory.glob("*.sock"):
            if path in known:
                continue
            with contextlib.suppress(OSError):
                note = path.with_suffix(".mount").read_bytes()
                if note == os.fsencode(mountpoint) and _alive(path):
                    return int(path.stem)
    return None


def around(mountpoint: Path) -> tuple[list[Daemon], int | None]:
    """Every daemon that answers, and the pid of a living one that has this mount and does not, with
    more time than the others get."""
    running = daemons()
    if silent_holder(mountpoint, running) is not None:
        running = daemons(_PATIENCE)
    return running, silent_holder(mountpoint, running)


def choose(mountpoint: Path | None) -> list[Daemon]:
    """The daemons a command is meant for: the one of ``mountpoint``, or all.

    One that still flushes counts only while no other is meant.

    Raises:
        ControlError: there is none.
    """
    if mountpoint is None:
        running = daemons()
    else:
        running, silent = around(mountpoint)
        running = [daemon for daemon in running if daemon.mountpoint == mountpoint]
        if not running and silent is not None:
            raise ControlError(
                f"The fusecache at {mountpoint}, process {silent}, does not answer: it hangs, or "
                "this host is very busy. Nothing was done; try again."
            )
        if not running:
            raise ControlError(
                f"No fusecache is mounted at {mountpoint}. Mounted ones: fusecache status"
            )
    if not running:
        raise ControlError("No fusecache daemon is running. Start one with: fusecache mount")
    return [daemon for daemon in running if daemon.mounted] or running


def locate(name: str, running: list[Daemon]) -> tuple[Daemon, str]:
    """The daemon an IMAGE argument means and the image's path relative to its origin.

    Raises:
        UsageError: the name is empty.
        ControlError: no mount has it, or several do.
    """
    found = image_names.readings(name, running, _noted_mounts())
    if not found.path and not found.root:
        places = ", ".join(str(daemon.mountpoint) for daemon in running)
        raise ControlError(
            f"'{name}' lies below no mount or origin of fusecache: give a path below one of "
            f"them ({places})."
        )
    if not found.path or not found.root:
        return _among(name, found.path or found.root)
    by_path, by_root = _having(found.path), _having(found.root)
    if by_path.images and by_root.images and by_path.images != by_root.images:
        raise image_names.ambiguous(name, by_path.images | by_root.images)
    return _among(name, found.root if by_root.images and not by_path.images else found.path)


def _noted_mounts() -> set[str]:
    """Where daemons serve, also such that do not answer."""
    found = set()
    for directory in protocol.runtime_directories():
        for path in directory.glob("*.mount"):
            with contextlib.suppress(OSError):
                found.add(os.fsdecode(path.read_bytes()))
    return found


def _among(name: str, candidates: list[tuple[Daemon, str]]) -> tuple[Daemon, str]:
    if len(candidates) == 1:
        return candidates[0]
    answers = _having(candidates)
    having = answers.candidates
    if len(having) == 1:
        return having[0]
    places = ", ".join(str(daemon.mountpoint) for daemon, _ in having or candidates)
    if not having and answers.refused:
        raise ControlError(answers.refused)
    if not having:
        raise ControlError(f"None of the mounts has an image '{name}' ({places}).")
    raise ControlError(f"'{name}' exists in several mounts ({places}): choose one with -m.")


@dataclass(slots=True)
class _Having:
    """Which of some candidates are images, as their daemons say."""

    candidates: list[tuple[Daemon, str]] = field(default_factory=list)
    images: set[tuple[Daemon, str]] = field(default_factory=set)
    """The same with the paths to which links on the way lead."""
    refused: str = ""
    """Why one is none, if something else is there."""


def _having(candidates: list[tuple[Daemon, str]]) -> _Having:
    having = _Having()
    for daemon, path in candidates:
        answer = ask(daemon.socket_path, {"verb": "resolve", "path": path}, timeout=10)
        having.refused = having.refused or answer.get("refused", "")
        if answer["known"] or answer["exists"]:
            having.candidates.append((daemon, path))
            having.images.add((daemon, answer.get("path", path)))
    return having
