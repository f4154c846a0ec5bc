"""What ``mount`` is told, on the command line and in a file, checked and put together."""

import math
import tomllib
from pathlib import Path
from typing import Any

from fusecache.cli.paths import absolute, mount_path
from fusecache.config import MountConfig, Tuning, WriteMode, check_block_size, parse_size
from fusecache.errors import UsageError

_TEXTS = {"size", "block-size", "write-mode", "db", "cache", "clean-rate", "readahead"}
_NUMBERS = {"dirty-age", "dirty-limit"}
_KEYS = _TEXTS | _NUMBERS | {"options"}

_MOST_DIRTY = 90
"""Percent of the slots: some must be left that can be reclaimed without waiting for the origin."""
_MOST_AHEAD = 64 << 20
_LONGEST_AGE = 30 * 24 * 3600.0


def plan_of(
    origin: Path, mountpoint: Path, config: Path | None, foreground: bool, given: dict[str, Any]
) -> MountConfig:
    """The mount that options and configuration file ask for; options win.

    Raises:
        UsageError: something in them cannot be meant.
    """
    chosen = _chosen(given, config)
    size, block_size = chosen.get("size"), chosen.get("block-size")
    return MountConfig(
        origin=absolute(origin),
        mountpoint=mount_path(mountpoint),
        cache=absolute(chosen["cache"]),
        size=None if size is None else parse_size(size),
        block_size=None if block_size is None else check_block_size(parse_size(block_size)),
        write_mode=WriteMode(chosen.get("write-mode") or WriteMode.THROUGH),
        database=None if chosen.get("db") is None else absolute(chosen["db"]),
        options=tuple(opt for group in chosen["options"] for opt in group.split(",") if opt),
        foreground=foreground,
        tuning=_tuning(chosen),
    )


def _tuning(chosen: dict[str, Any]) -> Tuning:
    """Limits; in write-back younger data goes to the origin from half the limit on."""
    plain = Tuning()
    age = _number(chosen, "dirty-age", plain.dirty_age)
    if not 0 < age <= _LONGEST_AGE:
        raise UsageError(
            f"--dirty-age {chosen['dirty-age']} is not from more than 0 to {_LONGEST_AGE:.0f} "
            "seconds: choose one, like 30."
        )
    limit = _number(chosen, "dirty-limit", 100 * plain.dirty_limit)
    if not 1 <= limit <= _MOST_DIRTY:
        raise UsageError(
            f"--dirty-limit {chosen['dirty-limit']} is not from 1 to {_MOST_DIRTY} percent of the "
            "cache: choose one, like 50."
        )
    rate, ahead = chosen.get("clean-rate"), chosen.get("readahead")
    return Tuning(
        dirty_age=age,
        dirty_limit=limit / 100,
        dirty_low=limit / 200,
        clean_rate=plain.clean_rate if rate is None else _rate(rate),
        readahead=plain.readahead if ahead is None else _readahead(ahead),
    )


def _number(chosen: dict[str, Any], name: str, otherwise: float) -> float:
    """A number that is written plainly, or with a percent sign where it is a share."""
    value = chosen.get(name)
    if value is None:
        return otherwise
    text = str(value).strip()
    if name == "dirty-limit":
        text = text.removesuffix("%")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--{name} {value} is not a number: write one, like {otherwise:.0f}.")
    return number


def _rate(text: str) -> int:
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except UsageError as exc:
        raise UsageError(
            f"--clean-rate {text} is not a size: write the bytes a second, like 50M, or leave it "
            "out for no limit."
        ) from exc


def _readahead(text: str) -> int:
    try:
        size = 0 if text.strip() == "0" else parse_size(text)
    except UsageError as exc:
        raise UsageError(
            f"--readahead {text} is not a size: write one, like 2M, or 0 for nothing."
        ) from exc
    if size > _MOST_AHEAD:
        raise UsageError(
            f"--readahead {text} is too much: every guest that reads in order would fetch so much "
            "ahead. Choose up to 64M, like 2M, or 0 for nothing."
        )
    return size


def _chosen(given: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """Command line over configuration file."""
    chosen = {name.replace("_", "-"): value for name, value in given.items()}
    read = {} if config is None else _read(config)
    for name, value in read.items():
        if chosen.get(name) in (None, ()):
            chosen[name] = value
    if chosen["cache"] is None:
        raise UsageError("Say where the cache is: --cache PATH (a file or block device).")
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        read = tomllib.loads(path.read_text())
    except OSError as exc:
        raise UsageError(f"Cannot read {path}: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}.") from exc
    return {name: _checked(path, name, value) for name, value in read.items()}


def _checked(path: Path, name: str, value: Any) -> Any:
    """A setting of the file, in the form it would have on the command line."""
    if name not in _KEYS:
        raise UsageError(
            f"{path}: there is no setting '{name}'; there are: {', '.join(sorted(_KEYS))}."
        )
    if name == "options":
        options = [value] if isinstance(value, str) else value
        if not isinstance(options, list) or not all(isinstance(opt, str) for opt in options):
            raise UsageError(f"{path}: 'options' must be a list of strings.")
        return options
    if name in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UsageError(f"{path}: '{name}' must be a number, like 30.")
    elif not isinstance(value, str):
        raise UsageError(f"{path}: '{name}' must be a string, like \"64K\".")
    if name == "write-mode" and value not in set(WriteMode):
        raise UsageError(f"{path}: 'write-mode' must be one of: {', '.join(WriteMode)}.")
    return value
