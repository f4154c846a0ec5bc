"""Reloading: what of a changed configuration can be applied to a running mount, and what cannot."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import trio

from fusecache.config import MountConfig, Rule, Tuning, format_size
from fusecache.engine.block_cache import BlockCache
from fusecache.errors import ControlError, UsageError
from fusecache.observe import logs

_PATIENCE = 10.0
"""Seconds that reading the file and resolving its paths may take."""

_TUNABLE = {
    "dirty_age": "dirty-age",
    "dirty_low": "dirty-limit",
    "dirty_limit": "dirty-limit",
    "clean_rate": "clean-rate",
    "readahead": "readahead",
}
"""What of ``Tuning`` can change, by the settings' names."""
_NAMES = {"database": "db"}
_NOT_COMPARED = {"config", "foreground", "tuning"}
_LIVE = {"write_mode", "rules", "log_level"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one reload, a sentence or a few words for each setting that changed."""

    applied: list[str]
    refused: list[str]


class Reloading:
    """Compares the configuration as it is now with what the mount runs by.

    Args:
        again: reads the file anew, with the command line of the start; blocks, and raises
            UsageError.
    """

    def __init__(
        self, plan: MountConfig, again: Callable[[], MountConfig], cache: BlockCache
    ) -> None:
        self._running = plan
        self._again = again
        self._cache = cache

    async def reload(self) -> Outcome:
        """Applies what can be applied; all or nothing of it.

        Raises:
            ControlError: there is no file, or it cannot be used; nothing changed.
        """
        if self._running.config is None:
            raise ControlError(
                "This mount was started without --config: there is nothing to reload."
            )
        try:
            with trio.fail_after(_PATIENCE):
                wanted = await trio.to_thread.run_sync(self._again, abandon_on_cancel=True)
        except UsageError as exc:
            raise ControlError(f"Nothing was changed: {exc}") from exc
        except trio.TooSlowError as exc:
            raise ControlError(
                f"Nothing was changed: {self._running.config} or the paths in it cannot be read "
                "in time. Try again when the storage answers."
            ) from exc
        return self._apply(wanted)

    def _apply(self, wanted: MountConfig) -> Outcome:
        before = self._running
        applied = _applied(before, wanted)
        tuning = replace(before.tuning, **{name: getattr(wanted.tuning, name) for name in _TUNABLE})
        self._running = replace(
            before, tuning=tuning, **{name: getattr(wanted, name) for name in _LIVE}
        )
        if (tuning, self._running.policy) != (before.tuning, before.policy):
            self._cache.apply(tuning, self._running.policy)
        if before.log_level != wanted.log_level:
            logs.set_level(wanted.log_level)
        return Outcome(applied, _refused(before, wanted))


def _applied(before: MountConfig, wanted: MountConfig) -> list[str]:
    said = {
        _TUNABLE[name]: f"{_TUNABLE[name]}: {_shown(name, was)} -> {_shown(name, now)}"
        for name, was, now in _differences(before.tuning, wanted.tuning)
        if name in _TUNABLE
    }
    for name, was, now in _differences(before, wanted):
        if name == "rules":
            said[name] = f"rules for images: {_rules(was)} -> {_rules(now)}"
        elif name in _LIVE:
            said[name] = f"{name.replace('_', '-')}: {was} -> {now}"
    return list(said.values())


def _refused(before: MountConfig, wanted: MountConfig) -> list[str]:
    """Sentences about what is as before until the next mount."""
    return [
        f"{_NAMES.get(name, name).replace('_', '-')} needs a restart of the mount"
        for name, _, _ in _differences(before, wanted)
        if name not in _LIVE | _NOT_COMPARED
    ]


def _differences(
    before: MountConfig | Tuning, wanted: MountConfig | Tuning
) -> list[tuple[str, Any, Any]]:
    pairs = [
        (item.name, getattr(before, item.name), getattr(wanted, item.name))
        for item in fields(before)
    ]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _shown(name: str, value: float) -> str:
    """A tuning value for people."""
    if name == "dirty_age":
        return f"{value:g} s"
    if name in ("dirty_limit", "dirty_low"):
        return f"{100 * value:g} %"
    if name == "clean_rate":
        return f"{format_size(value)}/s" if value else "no limit"
    return format_size(value) if value else "nothing"


def _rules(rules: tuple[Rule, ...]) -> str:
    if not rules:
        return "none"
    return ", ".join(f"{rule.pattern} {_treatment(rule)}" for rule in rules)


def _treatment(rule: Rule) -> str:
    if rule.bypass:
        return "bypass"
    return "as the mount" if rule.write_mode is None else f"write-{rule.write_mode}"
