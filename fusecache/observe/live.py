"""What ``fusecache top`` shows: one screen, made from the answers of ``status``.

Nothing here reads a clock or a terminal. Fits 80 columns; what does not fit is cut, never wrapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusecache.observe.report import count_text, percent_text, size_text
from fusecache.observe.sentences import printable
from fusecache.observe.times import time_text

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 30
_HELP = "q quit  s sort  r reverse  up/down scroll"


def _rate(name: str) -> Any:
    return lambda image: image["rates"][name]


SORTS: dict[str, tuple[Any, bool]] = {
    "reads": (_rate("reads"), True),
    "writes": (_rate("writes"), True),
    "hit": (lambda image: -1.0 if (hit := image["hit_ratio"]["minute"]) is None else hit, False),
    "cached": (lambda image: image["cached_bytes"], True),
    "dirty": (lambda image: image["dirty_bytes"], True),
    "p99": (lambda image: image["origin_latency"]["read"]["p99"] or 0.0, True),
    "waiting": (lambda image: image["waiting"], True),
    "name": (lambda image: image["path"], False),
}
"""By name: what of an image is compared, and whether the most comes first."""


@dataclass(slots=True)
class Look:
    """What was seen of all mounts at one moment."""

    mounts: list[dict[str, Any]] = field(default_factory=list)
    """Answers of ``status``."""
    gone: list[str] = field(default_factory=list)
    """A sentence for each daemon that does not answer any more."""


@dataclass(slots=True)
class View:
    """How it is looked at."""

    sort: str = "reads"
    reverse: bool = False
    skip: int = 0
    """Images scrolled past."""

    def key(self, key: str) -> bool:
        """Obeys one key; False for "enough"."""
        names = list(SORTS)
        if key in ("q", "Q", "\x03", "\x04"):
            return False
        if key == "s":
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == "S":
            self.sort = names[names.index(self.sort) - 1]
        elif key == "r":
            self.reverse = not self.reverse
        elif key in ("\x1b[A", "\x1bOA", "k"):
            self.skip = max(0, self.skip - 1)
        elif key in ("\x1b[B", "\x1bOB", "j"):
            self.skip += 1
        return True


def sparkline(values: Sequence[float], width: int, top: float | None = None) -> str:
    """One character for each stretch of values, the last one on the right.

    Args:
        top: the value of a full bar; None takes the largest.
    """
    if not values:
        return " " * width
    step = max(1, -(-len(values) // width))
    first = len(values) % step
    parts = [values[:first]] * bool(first)
    parts += [values[at : at + step] for at in range(first, len(values), step)]
    means = [sum(part) / len(part) for part in parts]
    most = top or max(means)
    bars = [_bar(mean / most if most else 0.0) for mean in means]
    return "".join(bars[-width:]).rjust(width)


def _bar(share: float) -> str:
    """The lowest bar is for nothing alone."""
    if share <= 0:
        return _BARS[0]
    return _BARS[min(len(_BARS) - 1, 1 + int(share * (len(_BARS) - 1)))]


def frame(look: Look, view: View, width: int, height: int | None, clock: str) -> RenderableType:
    """All mounts, one after the other.

    Args:
        height: lines there are; None for all that is needed.
        clock: the time of day, shown in the first line.
    """
    first = Text(f"fusecache top  {clock}  sorted by {view.sort}", "bold", no_wrap=True)
    if height is not None:
        first.append(f"  {_HELP}", "dim")
    parts: list[RenderableType] = [first]
    parts += [Text(printable(sentence), "bold red") for sentence in look.gone]
    if not look.mounts and not look.gone:
        parts.append(Text("No fusecache daemon is running.", "bold red"))
    heads = [_head(mount, width) for mount in look.mounts]
    used = sum(len(sentence) // width + 1 for sentence in look.gone) + 1
    used += sum(len(head) + 2 for head in heads)
    rows = None if height is None else max(0, (height - used) // max(1, len(heads)))
    for mount, head in zip(look.mounts, heads, strict=True):
        parts += [*head, _images(mount, view, width, rows)]
    return Group(*parts)


def _head(mount: dict[str, Any], width: int) -> list[Text]:
    """What a mount does as a whole."""
    cache, rates = mount["cache"], mount["rates"]
    good = mount["state"] == "serving" and cache["state"] == "ok"
    lines = [
        Text.assemble(
            (printable(mount["mountpoint"]), "bold"),
            f"  {mount['state']}, write-{mount['write_mode']}, up {time_text(mount['seconds'])}",
            ("" if good else f"  cache {cache['state']}", "bold red"),
        )
    ]
    hit = mount["hit_ratio"]
    read = mount["origin_latency_minute"]["read"]
    dirty = size_text(cache["dirty_bytes"]) if cache["dirty_bytes"] else "nothing"
    if cache["dirty_age"]:
        dirty += f" for {time_text(cache['dirty_age'])}"
    lines += [
        Text(
            f"hits {percent_text(hit['minute'])} 1 min, {percent_text(hit['hour'])} 1 h, "
            f"{percent_text(hit['start'])} all   origin reads p50 {time_text(read['p50'])}, "
            f"p99 {time_text(read['p99'])}"
        ),
        Text(
            f"cached {size_text(cache['cached_bytes'])}   dirty {dirty}   "
            f"cleaner {mount['cleaner']['doing']}   reclaimer {mount['reclaimer']['doing']}"
        ),
    ]
    history = mount.get("history")
    if history is not None:
        lines += _sparks(history, rates, min(_SPARKS, width - 40))
    for work in (*mount["running"], mount["flushing"]):
        if work is not None:
            verb = work.get("verb", "flushing")
            left = f"{verb}: {size_text(work['left'])} left of {size_text(work['of'])}"
            if work["seconds_left"] is not None:
                left += f", about {time_text(work['seconds_left'])}"
            lines.append(Text(left, "yellow"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines


def _sparks(history: dict[str, list[int]], rates: dict[str, float], width: int) -> list[Text]:
    """The last minute, a bar for two seconds."""
    hits, misses = history["read_hit_bytes"], history["read_miss_bytes"]
    reads = [hit + miss for hit, miss in zip(hits, misses, strict=True)]
    ratios = [hit / both if both else 0.0 for hit, both in zip(hits, reads, strict=True)]
    now = percent_text(sum(hits[-5:]) / both if (both := sum(reads[-5:])) else None)
    return [
        Text(f"hit ratio  {sparkline(ratios, width, 1.0)} {now}"),
        Text(
            f"reads      {sparkline(reads, width)} {count_text(round(rates['reads']))}/s, "
            f"{size_text(rates['read_bytes'])}/s"
        ),
        Text(
            f"writes     {sparkline(history['write_bytes'], width)} "
            f"{count_text(round(rates['writes']))}/s, {size_text(rates['write_bytes'])}/s"
        ),
    ]


def _images(mount: dict[str, Any], view: View, width: int, rows: int | None) -> Table:
    """A line an image; ``rows`` lines at most."""
    table = Table(box=None, pad_edge=False, header_style="dim", width=width)
    table.add_column("image", no_wrap=True, overflow="ellipsis", ratio=1)
    for title in ("cached", "dirty", "hit", "reads/s", "writes/s", "p99", "waiting"):
        table.add_column(title, justify="right", no_wrap=True)
    value, most_first = SORTS[view.sort]
    images = sorted(mount["images"], key=lambda image: str(image["path"]))
    images.sort(key=value, reverse=most_first is not view.reverse)
    if rows is not None:
        view.skip = max(0, min(view.skip, len(images) - rows))
        images = images[view.skip : view.skip + rows]
    for image in images:
        rates = image["rates"]
        table.add_row(
            Text(printable(image["path"])),
            size_text(image["cached_bytes"]),
            size_text(image["dirty_bytes"]) if image["dirty_bytes"] else "-",
            percent_text(image["hit_ratio"]["minute"]),
            count_text(round(rates["reads"])),
            count_text(round(rates["writes"])),
            time_text(image["origin_latency"]["read"]["p99"]),
            str(image["waiting"]) if image["waiting"] else "-",
            style="red" if image["last_error"] or image["clean_error"] or image["lost"] else "",
        )
    return table
