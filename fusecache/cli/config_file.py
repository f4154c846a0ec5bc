"""A configuration file: TOML with the options' names, and rules for images by pattern."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecache.cli import settings
from fusecache.cli.settings import nearest
from fusecache.config import Rule
from fusecache.errors import UsageError

_RULE_KEYS = {"pattern": str, "write-mode": str, "bypass": bool}
_LARGEST = 1 << 20


@dataclass(slots=True)
class ConfigFile:
    """What a file says, and what is wrong with it."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    """By the settings' names, checked."""
    rules: tuple[Rule, ...] = ()
    wrong: list[str] = field(default_factory=list)
    """A sentence for everything that cannot be used."""

    def check(self) -> None:
        """Raises UsageError, with everything that is wrong in one line, if anything is."""
        if self.wrong:
            raise UsageError(" ".join(f"{self.path}: {sentence}" for sentence in self.wrong))


def read(path: Path) -> ConfigFile:
    """The file, with all that is wrong with it; never raises."""
    found = ConfigFile(path)
    table = _table(found)
    images = table.pop("image", [])
    for name, value in table.items():
        try:
            _refuse_relative(name, value)
            found.values[name] = settings.checked(name, value, f"'{name}'")
        except UsageError as exc:
            found.wrong.append(str(exc))
    found.rules = _rules(found, images)
    return found


def _refuse_relative(name: str, value: Any) -> None:
    """A file is read again by a daemon, which lives in another directory than its operator."""
    if name in settings.PATHS and isinstance(value, str) and not value.startswith("/"):
        raise UsageError(f"'{name}' is not a whole path: begin '{value}' with /.")


def _table(found: ConfigFile) -> dict[str, Any]:
    try:
        with open(found.path, "rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            found.wrong.append("it is larger than 1 MiB: this is no configuration file.")
            return {}
        return tomllib.loads(data.decode())
    except OSError as exc:
        found.wrong.append(f"cannot be read: {exc.strerror}.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        found.wrong.append(f"is not TOML: {exc}.")
    return {}


def _rules(found: ConfigFile, images: Any) -> tuple[Rule, ...]:
    if not isinstance(images, list) or not all(isinstance(entry, dict) for entry in images):
        found.wrong.append("rules for images are written as [[image]] tables, each with a pattern.")
        return ()
    rules = []
    for number, entry in enumerate(images, start=1):
        wrong = list(_wrong_rule(entry))
        found.wrong += [f"[[image]] number {number}: {sentence}" for sentence in wrong]
        if not wrong:
            mode = entry.get("write-mode")
            rules.append(
                Rule(
                    entry["pattern"],
                    None if mode is None else settings.write_mode("'write-mode'", mode),
                    entry.get("bypass", False),
                )
            )
    return tuple(rules)


def _wrong_rule(entry: dict[str, Any]) -> list[str]:
    wrong = [
        f"'{key}': there is no such setting{nearest(key, _RULE_KEYS)}"
        for key in entry
        if key not in _RULE_KEYS
    ]
    if not isinstance(entry.get("pattern"), str) or not entry["pattern"]:
        wrong.append('it needs a pattern, like "*.iso".')
    elif entry["pattern"].startswith("/"):
        wrong.append("its pattern begins with /: paths are relative to the origin.")
    if not isinstance(entry.get("bypass", False), bool):
        wrong.append("bypass must be true or false.")
    if "write-mode" in entry:
        try:
            settings.write_mode("'write-mode'", entry["write-mode"])
        except UsageError as exc:
            wrong.append(str(exc))
        if entry.get("bypass") is True:
            wrong.append("bypass and write-mode exclude each other: leave one out.")
    elif "bypass" not in entry and not wrong:
        wrong.append("it says nothing: add write-mode or bypass.")
    return wrong


def missing(found: ConfigFile) -> list[str]:
    """What a mount by this file alone would lack."""
    return [
        f"{name} is not set."
        for name in ("origin", "mountpoint", "cache")
        if name not in found.values and not any(w.startswith(f"'{name}'") for w in found.wrong)
    ]
