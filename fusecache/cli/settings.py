"""What ``mount`` is told, on the command line and in a file, checked and put together."""

import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fusecache.cli.paths import absolute, mount_path
from fusecache.config import (
    LOG_LEVELS,
    LaneUse,
    MountConfig,
    Rule,
    Tuning,
    WriteMode,
    check_block_size,
    parse_size,
)
from fusecache.errors import UsageError

_MOST_DIRTY = 90
"""Percent of the slots: some must be left that can be reclaimed without waiting for the origin."""
_MOST_AHEAD = 64 << 20
_LONGEST_AGE = 30 * 24 * 3600.0


def plan_of(
    given: Mapping[str, Any],
    *,
    foreground: bool = False,
    config: Path | None = None,
    file: Mapping[str, Any] | None = None,
    rules: tuple[Rule, ...] = (),
) -> MountConfig:
    """The mount that options and configuration file ask for; options win.

    Args:
        given: the command line, by the settings' names; None and () stand for what was not said.
        config: the file's path; ``file`` and ``rules`` are what it says, checked.

    Raises:
        UsageError: something cannot be meant, or is missing.
    """
    chosen = dict(file or {})
    for name, value in given.items():
        if value not in (None, ()):
            chosen[name] = checked(name, value, f"--{name}")
    _refuse_missing(chosen)
    return MountConfig(
        origin=chosen["origin"],
        mountpoint=chosen["mountpoint"],
        cache=chosen["cache"],
        size=chosen.get("size"),
        block_size=chosen.get("block-size"),
        write_mode=chosen.get("write-mode", WriteMode.THROUGH),
        database=chosen.get("db"),
        options=chosen.get("options", ()),
        foreground=foreground,
        tuning=_tuning(chosen),
        rules=rules,
        metrics=chosen.get("metrics"),
        log_level=chosen.get("log-level", "info"),
        lane=chosen.get("lane", LaneUse.AUTO),
        config=config,
    )


def _refuse_missing(chosen: Mapping[str, Any]) -> None:
    if "origin" not in chosen or "mountpoint" not in chosen:
        raise UsageError(
            "Say what to show and where: fusecache mount ORIGIN MOUNTPOINT --cache PATH, or a "
            "--config FILE with origin, mountpoint and cache."
        )
    if "cache" not in chosen:
        raise UsageError("Say where the cache is: --cache PATH (a file or block device).")


def _tuning(chosen: Mapping[str, Any]) -> Tuning:
    """Limits; in write-back younger data goes to the origin from half the limit on."""
    plain = Tuning()
    limit = chosen.get("dirty-limit", plain.dirty_limit)
    return Tuning(
        dirty_age=chosen.get("dirty-age", plain.dirty_age),
        dirty_limit=limit,
        dirty_low=limit / 2,
        clean_rate=chosen.get("clean-rate", plain.clean_rate),
        readahead=chosen.get("readahead", plain.readahead),
    )


# -- one setting -----------------------------------------------------------------------------------


def checked(name: str, value: Any, shown: str) -> Any:
    """A setting's value as ``MountConfig`` and ``Tuning`` have it.

    Args:
        value: as on the command line or as in TOML.
        shown: what a sentence about it begins with, like ``--dirty-age``.

    Raises:
        UsageError: it cannot be meant, or there is no such setting.
    """
    parse = SETTINGS.get(name)
    if parse is None:
        raise UsageError(f"{shown}: there is no such setting{nearest(name, SETTINGS)}")
    return parse(shown, value)


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of a sentence about an unknown name: the known one that is meant, or all."""
    close = get_close_matches(name.replace("_", "-"), known, n=1)
    return f"; is it '{close[0]}'?" if close else f"; there are: {', '.join(sorted(known))}."


def _text(shown: str, value: Any, example: str) -> str:
    if not isinstance(value, str | Path):
        raise UsageError(f'{shown} must be a string, like "{example}".')
    return str(value).strip()


def _path(shown: str, value: Any) -> Path:
    return absolute(_path_text(shown, value, "/dev/sdb"))


def _mountpoint(shown: str, value: Any) -> Path:
    return mount_path(_path_text(shown, value, "/mnt/cached"))


def _path_text(shown: str, value: Any, example: str) -> Path:
    text = _text(shown, value, example)
    if not text or "\0" in text:
        raise UsageError(f"{shown} must be a path, like {example}.")
    return Path(text)


def _size(shown: str, value: Any) -> int:
    try:
        return parse_size(_text(shown, value, "20G"))
    except UsageError as exc:
        raise UsageError(
            f"{shown} {value} is not a size: write a number and K, M, G or T, like 20G."
        ) from exc


def _block_size(shown: str, value: Any) -> int:
    size = _size(shown, value)
    try:
        return check_block_size(size)
    except UsageError as exc:
        raise UsageError(f"{shown}: {exc}") from exc


def write_mode(shown: str, value: Any) -> WriteMode:
    """A write mode by its name. Raises UsageError."""
    try:
        return WriteMode(value)
    except ValueError as exc:
        raise UsageError(f"{shown} must be one of: {', '.join(WriteMode)}.") from exc


def _lane(shown: str, value: Any) -> LaneUse:
    if isinstance(value, bool):  # TOML has true and false for it
        return LaneUse.ON if value else LaneUse.OFF
    try:
        return LaneUse(value)
    except ValueError as exc:
        raise UsageError(f"{shown} must be one of: {', '.join(LaneUse)}.") from exc


def _number(shown: str, value: Any, example: int) -> float:
    text = str(value).strip()
    try:
        number = math.nan if isinstance(value, bool | list | dict) else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{shown} {value} is not a number: write one, like {example}.")
    return number


def _age(shown: str, value: Any) -> float:
    age = _number(shown, value, 30)
    if not 0 < age <= _LONGEST_AGE:
        raise UsageError(
            f"{shown} {value} is not from more than 0 to {_LONGEST_AGE:.0f} seconds: choose one, "
            "like 30."
        )
    return age


def _limit(shown: str, value: Any) -> float:
    """A share of the cache."""
    # A number that is written plainly, or with a percent sign.
    percent = value.strip().removesuffix("%") if isinstance(value, str) else value
    limit = _number(shown, percent, 50)
    if not 1 <= limit <= _MOST_DIRTY:
        raise UsageError(
            f"{shown} {value} is not from 1 to {_MOST_DIRTY} percent of the cache: choose one, "
            "like 50."
        )
    return limit / 100


def _rate(shown: str, value: Any) -> int:
    try:
        return parse_size(_text(shown, value, "50M").removesuffix("/s"))
    except UsageError as exc:
        raise UsageError(
            f"{shown} {value} is not a size: write the bytes a second, like 50M, or leave it out "
            "for no limit."
        ) from exc


def _readahead(shown: str, value: Any) -> int:
    text = "0" if value == 0 else value
    try:
        size = 0 if text == "0" else parse_size(_text(shown, text, "2M"))
    except UsageError as exc:
        raise UsageError(
            f"{shown} {value} is not a size: write one, like 2M, or 0 for nothing."
        ) from exc
    if size > _MOST_AHEAD:
        raise UsageError(
            f"{shown} {value} is too much: every guest that reads in order would fetch so much "
            "ahead. Choose up to 64M, like 2M, or 0 for nothing."
        )
    return size


def _metrics(shown: str, value: Any) -> tuple[str, int]:
    """Address and port; with a port alone this host is the only one that can ask."""
    match = re.fullmatch(
        r"(?:(?:\[([0-9a-fA-F:]+)\]|([^:\[\]]+)):)?([0-9]{1,5})", str(value).strip()
    )
    if match is None or isinstance(value, bool) or not 0 < int(match[3]) < 65536:
        raise UsageError(
            f"{shown} {value} is not ADDRESS:PORT: write one, like 127.0.0.1:9469, or a port alone."
        )
    return match[1] or match[2] or "127.0.0.1", int(match[3])


def _level(shown: str, value: Any) -> str:
    if not isinstance(value, str) or value.lower() not in LOG_LEVELS:
        raise UsageError(f"{shown} must be one of: {', '.join(LOG_LEVELS)}.")
    return value.lower()


def _options(shown: str, value: Any) -> tuple[str, ...]:
    groups = [value] if isinstance(value, str) else value
    if not isinstance(groups, list | tuple) or not all(isinstance(opt, str) for opt in groups):
        raise UsageError(f"{shown} must be a list of strings.")
    return tuple(opt for group in groups for opt in group.split(",") if opt)


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "origin": _path,
    "mountpoint": _mountpoint,
    "cache": _path,
    "size": _size,
    "block-size": _block_size,
    "write-mode": write_mode,
    "db": _path,
    "options": _options,
    "dirty-age": _age,
    "dirty-limit": _limit,
    "clean-rate": _rate,
    "readahead": _readahead,
    "metrics": _metrics,
    "log-level": _level,
    "lane": _lane,
}
"""By name: what makes a value of it, from what a sentence about it begins with and the value."""

PATHS = {"origin", "mountpoint", "cache", "db"}
