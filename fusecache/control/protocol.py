"""One request, some answers: lines of JSON over a Unix socket.

A request is ``{"verb": ..., ...}``. Answers are any number of ``{"progress": ...}`` and then one
``{"ok": ...}`` or ``{"error": ...}``. Names that are not UTF-8 travel as JSON strings with
surrogates (``os.fsdecode``), and are percent-escaped only where people see them.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from fusecache.errors import ControlError

MAX_LINE = 1 << 20
MAX_REQUEST = 1 << 16
_MOST_OF_A_SOCKET_PATH = 107 - len("/4194304.sock")


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """One line's message.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        message = json.loads(line)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def runtime_directory() -> Path:
    """Where this user's daemons listen."""
    return runtime_directory_of(os.environ, os.geteuid())


def runtime_directory_of(environment: Mapping[str, str], user: int) -> Path:
    """Where a daemon listens that was started by a user in an environment."""
    if chosen := environment.get("FUSECACHE_RUNTIME_DIR"):
        return Path(chosen)
    if user == 0:
        return Path("/run/fusecache")
    return Path(environment.get("XDG_RUNTIME_DIR", f"/run/user/{user}")) / "fusecache"


def make_runtime_directory() -> Path:
    """``runtime_directory``, made if it was missing.

    Raises:
        ControlError: it cannot be made, or a socket's path in it would be too long.
    """
    directory = runtime_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as exc:
        raise ControlError(
            f"The control socket cannot be made in {directory}: {exc.strerror}. "
            "As a plain user, set XDG_RUNTIME_DIR to a directory of your own."
        ) from exc
    if len(os.fsencode(directory)) > _MOST_OF_A_SOCKET_PATH:
        raise ControlError(f"{directory} is too long for a socket's path: set a shorter one.")
    return directory


def runtime_directories() -> list[Path]:
    """Where daemons listen that this user may talk to; root's command line sees all."""
    found = [runtime_directory()]
    if os.geteuid() == 0 and "FUSECACHE_RUNTIME_DIR" not in os.environ:
        found += sorted(Path("/run/user").glob("*/fusecache"))
    return found


def state_directory() -> Path:
    """Where this user's databases of block devices lie."""
    if chosen := os.environ.get("FUSECACHE_STATE_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/fusecache")
    home = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"))
    return home / "fusecache"


def readable(name: str) -> tuple[str, bool]:
    """A name for JSON and people, and whether it had to be percent-escaped."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return quote_from_bytes(os.fsencode(name), safe="/ !#$&'()*+,:;=?@[]~"), True
    return name, False
