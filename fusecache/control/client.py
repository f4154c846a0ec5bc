"""The command line's end of the control socket. Never stats below a mount: it may hang."""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecache.control import image_names, protocol
from fusecache.errors import ControlError
from fusecache.store import mountinfo, processes

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


@dataclass(frozen=True, slots=True)
class Silent:
    """A daemon that lives and does not answer."""

    pid: int
    mountpoint: Path

    @property
    def plight(self) -> str:
        """What is wrong with it; a clause without its full stop."""
        return f"The daemon of {self.mountpoint} (process {self.pid}) {does_not_answer(self.pid)}"


def does_not_answer(pid: int) -> str:
    """The end of a sentence about a process."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        if "\nState:\tT" in status or "\nState:\tt" in status:
            return f"does not answer: it is stopped, and kill -CONT {pid} lets it go on"
    return "does not answer: it hangs, or this host is very busy"


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
    return survey(timeout)[0]


def survey(timeout: float = _CONNECT_TIMEOUT) -> tuple[list[Daemon], list[Silent]]:
    """Every daemon that answers in time, and those that live and do not; sockets of dead ones are
    removed."""
    found, silent = [], []
    for directory in protocol.runtime_directories():
        for path in sorted(directory.glob("*.sock")):
            if not _alive(path):
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.with_suffix(".mount").unlink()
                continue
            try:
                who = ask(path, {"verb": "who"}, timeout=timeout)
            except ControlError:
                with contextlib.suppress(OSError):
                    note = _note(directory, int(path.stem))
                    # One that has just ended has taken both with it.
                    if note is not None and path.exists() and _alive(path):
                        silent.append(Silent(int(path.stem), note))
                continue
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
    return found, silent


def patient_survey() -> tuple[list[Daemon], list[Silent]]:
    """As ``survey``, with more time if it is needed: on a busy host a daemon may just be slow."""
    running, silent = survey()
    return survey(_PATIENCE) if silent else (running, silent)


def noted_mount(pid: int) -> Path | None:
    """The mount point that a daemon has noted beside its socket, wherever that is."""
    directories = protocol.runtime_directories()
    with contextlib.suppress(OSError):
        lines = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environment = {key: value for key, _, value in (line.partition("=") for line in lines)}
        user = os.stat(f"/proc/{pid}").st_uid
        directories.append(protocol.runtime_directory_of(environment, user))
    for directory in directories:
        with contextlib.suppress(OSError):
            if (note := _note(directory, pid)) is not None:
                return note
    return None


def _note(directory: Path, pid: int) -> Path | None:
    """What a daemon has written there about its mount; None if it has not."""
    try:
        return Path(os.fsdecode((directory / f"{pid}.mount").read_bytes()))
    except FileNotFoundError:
        return None


def _alive(path: Path) -> bool:
    """Whether the process of a socket lives; one that was killed but is held by the kernel, in
    a call that cannot be interrupted, does not."""
    if not path.stem.isdecimal():
        return False
    if not Path(f"/proc/{path.stem}").exists():
        return _listens(path)  # it is gone, or we are in another PID namespace
    return not processes.killed(int(path.stem))


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


def around(mountpoint: Path) -> tuple[list[Daemon], Silent | None]:
    """Every daemon that answers, and the living one that has this mount and does not, with more
    time than the others get."""
    running, silent = survey()
    if any(daemon.mountpoint == mountpoint for daemon in silent):
        running, silent = survey(_PATIENCE)
    return running, next((daemon for daemon in silent if daemon.mountpoint == mountpoint), None)


def choose(mountpoint: Path | None) -> tuple[list[Daemon], list[Silent]]:
    """The daemons a command is meant for, the one of ``mountpoint``, or all; and those that may be
    meant and do not answer.

    One that still flushes counts only while no other is meant.

    Raises:
        ControlError: there is none that answers.
    """
    if mountpoint is None:
        running, silent = patient_survey()
    else:
        running, hung = around(mountpoint)
        running = [daemon for daemon in running if daemon.mountpoint == mountpoint]
        silent = [] if running or hung is None else [hung]
    if not running:
        refuse(silent)
        raise ControlError(_none_at(mountpoint) if mountpoint is not None else none_running())
    return [daemon for daemon in running if daemon.mounted] or running, silent


def refuse(silent: list[Silent], *, name: str | None = None, path: str | None = None) -> None:
    """Raises ControlError about a daemon that does not answer, if there is one.

    Args:
        name: an image that it may have, as it was given.
        path: where that is, if it is one path: a daemon that has it comes first.
    """
    if not silent:
        return
    here = [daemon for daemon in silent if path and Path(path).is_relative_to(daemon.mountpoint)]
    daemon = (here or silent)[0]
    other = ""
    if name is not None and not here:
        other = f", or if '{name}' is an image of another mount, say which with -m"
    raise ControlError(f"{daemon.plight}. Nothing was done; try again{other}.")


def none_running() -> str:
    """A sentence for who finds no daemon."""
    if others := others_mounts():
        places = ", ".join(map(str, others))
        return (
            f"No fusecache daemon of this user is running. There are mounts of other users "
            f"({places}): run this as root to reach them."
        )
    return "No fusecache daemon is running. Start one with: fusecache mount"


def others_mounts() -> list[Path]:
    """Mounts of users whose daemons do not talk to this one."""
    me = os.geteuid()
    return [] if me == 0 else [entry.path for entry in mountinfo.ours() if entry.user != me]


def _none_at(mountpoint: Path) -> str:
    if mountpoint in others_mounts():
        return f"The mount at {mountpoint} is of another user: run this as root."
    mounted = mountinfo.mount_at(mountpoint)
    if mounted is not None and mounted.fstype == mountinfo.FSTYPE:
        return (
            f"The mount at {mountpoint} has no daemon that can be asked: fusecache doctor says "
            "why. If it is gone, the same fusecache mount command as before brings the mount back."
        )
    return f"No fusecache is mounted at {mountpoint}. Mounted ones: fusecache status"


def locate(
    name: str, running: list[Daemon], silent: list[Silent] | None = None
) -> tuple[Daemon, str]:
    """The daemon an IMAGE argument means and the image's path relative to its origin.

    Args:
        silent: daemons that do not answer, so that their origins are not known.

    Raises:
        UsageError: the name is empty.
        ControlError: no mount has it, or several do, or one that does not answer may.
    """
    stops = {str(entry.path) for entry in mountinfo.ours()}  # one of them may hang
    found = image_names.readings(name, running, stops)
    if silent and not _surely_below(found.place, running):
        refuse(silent, name=name, path=found.place)
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


def _surely_below(path: str, running: list[Daemon]) -> bool:
    """Whether it lies below the mount point, which nobody else can have, of a daemon."""
    return any(Path(path).is_relative_to(daemon.mountpoint) for daemon in running)


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
