"""The log: one line an event, ``key=value``, for the journal, syslog, a file or a terminal.

A message that comes again and again from one place in the code, however its words vary, is one
*cause*. Of one cause only the first ``_BURST`` lines a minute are written; how many were not is
told with the next one that is, or at the end of the minute.
"""

import logging
import logging.handlers
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_ROOT = "fusecache"
_SYSLOG = Path("/dev/log")
_BURST = 10
_WINDOW = 60.0
_FIELDS = "fields"
DOING = "doing"
"""The field by which one place in the code tells its causes apart."""
_QUOTED = frozenset(' "=\\')
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
"""Of syslog(3), by level; see sd-daemon(3)."""


def fields(event: str, **values: Any) -> dict[str, Any]:
    """What to give as ``extra`` with a log line: the event's name and its data."""
    return {_FIELDS: {"event": event, **values}}


def set_level(name: str) -> None:
    """From now on nothing less urgent than ``name`` is logged."""
    logging.getLogger(_ROOT).setLevel(name.upper())


def level() -> str:
    """The least that is logged."""
    return logging.getLevelName(logging.getLogger(_ROOT).getEffectiveLevel()).lower()


# -- where it goes ---------------------------------------------------------------------------------


def to_front(name: str) -> None:
    """Logs to standard error: with priorities if that is the journal.

    Args:
        name: the least that is logged.
    """
    prefix = "" if is_journal(sys.stderr) else f"{_ROOT}: "
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(prefix, journal=not prefix))
    _use(handler, name)


def to_system(name: str, directory: Path) -> None:
    """Logs to the system's log, or, on a host without one, to a file in ``directory``."""
    handler: logging.Handler
    if _SYSLOG.exists():
        handler = logging.handlers.SysLogHandler(str(_SYSLOG))
        handler.setFormatter(Formatter(f"{_ROOT}[{os.getpid()}]: "))
    else:
        handler = logging.FileHandler(directory / f"{_ROOT}.log")
        handler.setFormatter(Formatter(f"[{os.getpid()}] ", dated=True))
    _use(handler, name)


def system_log() -> str | None:
    """What the system's log is called, if there is one."""
    return "the system log" if _SYSLOG.exists() else None


def _use(handler: logging.Handler, name: str) -> None:
    handler.addFilter(limit)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    set_level(name)


def is_journal(stream: TextIO) -> bool:
    """Whether a stream is a connection to systemd's journal, see systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        st = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(st.st_dev), str(st.st_ino))


# -- what a line looks like ------------------------------------------------------------------------


class Formatter(logging.Formatter):
    """``level=error event=origin-failing image=vm1.img message="..."``, always one line.

    Args:
        prefix: what comes before.
        journal: with the priority in front, which the journal takes off again.
        dated: with the time in front.
    """

    def __init__(self, prefix: str, *, journal: bool = False, dated: bool = False) -> None:
        super().__init__()
        self._prefix = prefix
        self._journal = journal
        self._dated = dated

    def format(self, record: logging.LogRecord) -> str:
        values = {"level": record.levelname.lower()}
        values |= getattr(record, _FIELDS, {})
        values["message"] = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            values |= _exception(record.exc_info[1])
        text = self._prefix + line(values)
        if self._dated:
            text = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z', time.localtime(record.created))} {text}"
        return f"<{_PRIORITIES.get(record.levelno, 2)}>{text}" if self._journal else text


def line(values: Mapping[str, Any]) -> str:
    """``key=value`` in one line; a value with spaces or the like is quoted as in JSON."""
    return " ".join(f"{key}={_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    text = str(value).encode("utf-8", "backslashreplace").decode()
    if text and text.isprintable() and not _QUOTED & set(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or character.encode("unicode_escape").decode()


def _exception(error: BaseException) -> dict[str, str]:
    """Where an error came from: the innermost frame first."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in frames]
    return {"exception": repr(error), "at": " < ".join(reversed(places))}


# -- how often -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Cause:
    begun: float
    lines: int = 0
    suppressed: int = 0


class RateLimit(logging.Filter):
    """Lets ``_BURST`` lines of one cause through in ``_WINDOW`` seconds, but all for debugging.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._causes: dict[tuple[str, int, str], _Cause] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; notes in it how many before it were not."""
        if record.levelno <= logging.DEBUG:
            return True
        now = self._now()
        doing = getattr(record, _FIELDS, {}).get(DOING, "")
        key = (record.name, record.lineno, f"{record.msg} {doing}".rstrip())
        cause = self._causes.get(key)
        if cause is None or now - cause.begun >= _WINDOW:
            if cause is not None and cause.suppressed:
                told = getattr(record, _FIELDS, {})
                setattr(record, _FIELDS, {**told, "suppressed": cause.suppressed})
            cause = self._causes[key] = _Cause(now)
        cause.lines += 1
        if cause.lines <= _BURST:
            return True
        cause.suppressed += 1
        return False

    def sweep(self) -> None:
        """Tells of causes whose minute is over how much was not written, and forgets them."""
        now = self._now()
        for key, cause in list(self._causes.items()):
            if now - cause.begun < _WINDOW:
                continue
            del self._causes[key]
            if cause.suppressed:
                logging.getLogger(_ROOT).warning(
                    "%d more in the last minute: %s",
                    cause.suppressed,
                    key[2],
                    extra=fields("suppressed", count=cause.suppressed),
                )


limit = RateLimit()
"""Of this process."""
