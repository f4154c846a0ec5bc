"""Status for people: one table a mount, from the same data as ``status --json``."""

from collections.abc import Iterator
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from fusecache.observe.sentences import printable
from fusecache.observe.times import time_text

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COLUMNS = (
    "image", "size", "cached", "dirty", "hit: min", "hour", "all", "memory", "SSD", "origin",
    "written", "p50", "p99", "",
)  # fmt: skip
"""Of the images; the last one is for remarks."""
_LEFT_OUT = (("p50", "p99"), ("memory", "SSD", "origin"), ("hit: min", "hour"), ("written",))
"""What goes first where there is no room."""
_WIDEST = 10_000


def escape(text: str) -> str:
    """A name as rich's markup has it."""
    return markup.escape(printable(text))


def size_text(size: float) -> str:
    """Bytes for people."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def count_text(count: int) -> str:
    """``12,345``."""
    return f"{count:,}"


def percent_text(share: float | None) -> str:
    """``98%``; below and above never rounded to all or nothing; ``-`` for None."""
    if share is None:
        return "-"
    percent = 100 * share
    if 99 < percent < 100 or 0 < percent < 1:
        return f"{min(99.9, max(0.1, percent)):.1f}%"
    return f"{percent:.0f}%"


def show(status: dict[str, Any], console: Console, *, details: bool = False) -> None:
    """Prints the answer of ``status --json`` as text and tables.

    Args:
        details: of every image all that is known, not only a line.
    """
    for number, mount in enumerate(status["mounts"]):
        if number:
            console.print()
        for line in _mount(mount):
            console.print(line, soft_wrap=True)
        _show_images(mount, console)
        for image in mount["images"]:
            for line in _details(image) if details else _unusual(image):
                console.print(f"{escape(image['path'])}: {line}", soft_wrap=True)
            for line in _troubles(image, mount["cache"]["path"]):
                console.print(f"[red]{escape(line)}[/]", soft_wrap=True)


def _mount(mount: dict[str, Any]) -> Iterator[str]:
    """What is said of a mount as a whole. A daemon of an older version does not tell all of it."""
    cache = mount["cache"]
    up = f", up {time_text(mount['seconds'])}" if "seconds" in mount else ""
    yield (
        f"[bold]{escape(mount['mountpoint'])}[/] from {escape(mount['origin'])}"
        f"  (pid {mount['pid']}, {mount['state']}, write-{mount['write_mode']}{up})"
    )
    used = 100 * cache["slots_used"] / max(1, cache["slots_total"])
    dirty = f", {size_text(cache['dirty_bytes'])} dirty" if cache["dirty_bytes"] else ""
    if dirty and cache.get("dirty_age") is not None:
        dirty += f" for up to {time_text(cache['dirty_age'])}"
    yield (
        f"cache      {escape(cache['path'])}: {cache['slots_used']} of {cache['slots_total']} "
        f"blocks of {size_text(mount['block_size'])} used ({used:.0f}%){dirty}, {cache['state']}"
    )
    if "reads" in mount:
        yield from _served(mount)
        if mount.get("lane"):
            yield f"lane       {_lane(mount['lane'])}"
        names = mount.get("names_waiting", 0)
        waiting = f"; {count_text(names)} calls for names under way" if names else ""
        yield f"origin     {_latencies(mount)}{waiting}"
        yield from _workers(mount)
    yield from _under_way(mount)
    if cache["trouble"]:
        yield f"[red]last cache error: {escape(cache['trouble'])}[/]"
    if cache["state"] == "degraded":
        yield f"[red]degraded: {escape(_remedy(mount))}[/]"


def _served(part: dict[str, Any]) -> Iterator[str]:
    """Where reads and writes of a mount or an image were served, and why not by the cache."""
    ratios = part["hit_ratio"]
    yield (
        f"hits       {percent_text(ratios['minute'])} of the bytes read in the last minute, "
        f"{percent_text(ratios['hour'])} in the last hour, "
        f"{percent_text(ratios['start'])} since the start"
    )
    past = part["read_past_bytes"]
    reads = _places(part["reads"], {"ssd": "SSD"})
    yield f"reads      {reads}" + (f" ({size_text(past)} past the cache)" if past else "")
    yield f"writes     {_places(part['writes'], {})}"
    if part["not_cached"]:
        yield f"not cached {_reasons(part['not_cached'])}"
    if part["not_kept"]:
        yield f"not kept   {_reasons(part['not_kept'])} (blocks)"


def _places(places: dict[str, dict[str, int]], names: dict[str, str]) -> str:
    """Bytes and requests by place, where there were any. A request that a place served in part is
    counted where the rest of it came from."""
    texts = []
    for place, served in places.items():
        if served["bytes"]:
            times = f" in {count_text(served['requests'])}" if served["requests"] else ""
            texts.append(f"{names.get(place, place)} {size_text(served['bytes'])}{times}")
    return ", ".join(texts) or "none yet"


def _reasons(reasons: dict[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    return ", ".join(f"{count_text(count)} {reason}" for reason, count in ordered)


def _latencies(part: dict[str, Any]) -> str:
    """Median and 99th percentile by kind of call, since the start and of the last minute."""
    texts = []
    for call, since in part["origin_latency"].items():
        if not since["calls"]:
            continue
        text = f"{call}s p50 {time_text(since['p50'])}, p99 {time_text(since['p99'])}"
        lately = part.get("origin_latency_minute", {}).get(call)
        if lately is not None and lately["calls"]:
            text += f" (last minute {time_text(lately['p50'])}, {time_text(lately['p99'])})"
        texts.append(text)
    return "; ".join(texts) or "not asked yet"


def _lane(lane: dict[str, Any]) -> str:
    """What compiled code served by itself, and how fast, since the start."""
    texts = []
    for kind in ("reads", "overwrites"):
        served = lane[kind]
        if served["calls"]:
            texts.append(
                f"{count_text(served['calls'])} {kind} p50 {time_text(served['p50'])}, "
                f"p99 {time_text(served['p99'])}"
            )
    if lane["fsyncs"]:
        texts.append(f"{count_text(lane['fsyncs'])} fsyncs by {count_text(lane['syncs'])} syncs")
    if not texts:
        texts.append("nothing served yet")
    if lane["fuse_over_io_uring"]:
        texts.append("requests come by io_uring")
    return "; ".join(texts)


def _workers(mount: dict[str, Any]) -> Iterator[str]:
    """What the cleaner and the reclaimer are doing."""
    cleaner, reclaimer = mount["cleaner"], mount["reclaimer"]
    names = ", ".join(map(escape, cleaner["images"][:3]))
    if len(cleaner["images"]) > 3:
        names += f" and {len(cleaner['images']) - 3} more"
    says = {
        "idle": "idle, nothing is dirty",
        "waiting": f"waiting, the oldest data is due in {time_text(cleaner['next_seconds'])}",
        "writing": f"writing back {names}",
        "retrying": f"retrying {names} in {time_text(cleaner['next_seconds'])}",
        "rescuing": "bringing what is dirty to the origin, because the cache is broken",
    }
    rate = cleaner["bytes_per_second"]
    lately = f"; {size_text(rate)}/s in the last minute" if rate else ""
    yield f"cleaner    {says.get(cleaner['doing'], cleaner['doing'])}{lately}"
    says = {"stuck": "stuck, all blocks are in use: what is read is not kept"}
    yield (
        f"reclaimer  {says.get(reclaimer['doing'], reclaimer['doing'])}; "
        f"{count_text(reclaimer['slots_free'])} blocks free, begins below "
        f"{count_text(reclaimer['slots_low'])}"
    )


def _under_way(mount: dict[str, Any]) -> Iterator[str]:
    """Flushes and evictions that run, with the time they still take."""
    if (flushing := mount["flushing"]) is not None:
        error = f"; the last error: {escape(flushing['error'])}" if flushing["error"] else ""
        yield f"flushing: {_left(flushing)}{error}"
    for running in mount.get("running", []):
        images = f"{count_text(running['images'])} image{'s' * (running['images'] != 1)}"
        yield f"{running['verb']}: {images}, {_left(running)}"


def _left(work: dict[str, Any]) -> str:
    text = f"{size_text(work['left'])} left of {size_text(work['of'])}"
    seconds = work.get("seconds_left")
    return text if seconds is None else f"{text}, about {time_text(seconds)}"


def _details(image: dict[str, Any]) -> Iterator[str]:
    """All that is told of one image that was asked for by name."""
    if "reads" in image:
        yield from _served(image)
        yield f"origin     {_latencies(image)}"


def _unusual(image: dict[str, Any]) -> Iterator[str]:
    """Why requests were not cached, unless that is simply how it begins or was chosen."""
    reasons = image.get("not_cached", {})
    if set(reasons) - {"cold", "around", "bypass"}:
        yield f"not cached {_reasons(reasons)}"


def _remedy(mount: dict[str, Any]) -> str:
    """What to do about a cache that cannot be used any more."""
    again = f"unmount it (fusecache umount {mount['mountpoint']}), see to the SSD and mount again"
    if not mount["cache"]["dirty_bytes"]:
        return f"all goes to the origin, and nothing is lost. To mend it, {again}."
    return (
        f"all new data goes to the origin, and {size_text(mount['cache']['dirty_bytes'])} that "
        f"only the cache has are brought there. Then {again}; do not format it before."
    )


def _show_images(mount: dict[str, Any], console: Console) -> None:
    """A line for each image, never wrapped or cut: on a terminal that is too narrow some columns
    are left out, in a pipe none."""
    room, left_out = console.width, set[str]()
    for columns in ((), *_LEFT_OUT):
        left_out |= set(columns)
        table = _images(mount, left_out)
        width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
        if width <= room or not console.is_terminal:
            break
    console.width = max(room, width)  # rich would cut names to make the table fit
    console.print(table, crop=False)
    console.width = room


def _images(mount: dict[str, Any], left_out: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    shown = [title for title in _COLUMNS if title not in left_out]
    for title in shown:
        name = "hits" if title == "all" and "hour" in left_out else title
        table.add_column(name, justify="left" if title == "image" else "right", no_wrap=True)
    for image in mount["images"]:
        cells = (
            escape(image["path"]),
            size_text(image["size"]),
            size_text(image["cached_bytes"]),
            _dirty(image),
            *_numbers(image),
            _remarks(image, mount["write_mode"]),
        )
        row = dict(zip(_COLUMNS, cells, strict=True))
        table.add_row(*(row[title] for title in shown))
    return table


def _numbers(image: dict[str, Any]) -> Iterator[str]:
    """Hit ratios, where bytes were served, and the latency of the origin's reads."""
    if "reads" not in image:
        yield from ["-"] * 9
        return
    for window in ("minute", "hour", "start"):
        yield percent_text(image["hit_ratio"][window])
    for place in ("memory", "ssd", "origin"):
        yield size_text(image["reads"][place]["bytes"])
    yield size_text(image["write_bytes"])
    for share in ("p50", "p99"):
        yield time_text(image["origin_latency"]["read"][share])


def _dirty(image: dict[str, Any]) -> str:
    """How much the origin does not have, and for how long the oldest of it."""
    if not image["dirty_bytes"]:
        return "-"
    age = image["dirty_age"]
    return size_text(image["dirty_bytes"]) + ("" if age is None else f" {age:.0f} s")


def _remarks(image: dict[str, Any], write_mode: str) -> str:
    words = []
    if image["write_mode"] != write_mode:
        words.append(f"write-{image['write_mode']}")
    if image["open_handles"]:
        words.append(f"open x{image['open_handles']}")
    if image["detached"]:
        words.append("bypassed" if image.get("bypassed") else "detached")
    if image["waiting"]:
        words.append(f"{image['waiting']} waiting for the origin")
    return ", ".join(words)


def _troubles(image: dict[str, Any], cache: str) -> Iterator[str]:
    """A line for everything that is wrong with an image, with what to do where there is."""
    name = image["path"]
    if image["last_error"]:
        yield f"{name}: {image['errors']} origin errors, the last: {image['last_error']}"
    if image.get("changed_elsewhere"):
        yield (
            f"{name} was changed elsewhere after this cache had stopped, with "
            f"{size_text(image['dirty_bytes'])} of it that are not on the origin. Until you decide "
            f"it is neither served nor written back. To write them over the change: fusecache "
            f"flush {name} --overwrite. To keep the change: fusecache evict {name} --discard-dirty"
        )
    elif image["clean_error"]:
        yield (
            f"{name}: {size_text(image['dirty_bytes'])} could not be written back and are tried "
            f"again: {image['clean_error']}"
        )
    for start, length in image["lost"]:
        yield (
            f"{name}: bytes {start}-{start + length - 1} were lost by the cache device; the "
            "origin has older ones, and reads fail until they are written anew. To go on with "
            f"the older ones, and give up all the origin does not have: fusecache evict {name} "
            "--discard-dirty"
        )
    for start, length in image["unreadable"]:
        yield (
            f"{name}: bytes {start}-{start + length - 1} cannot be read from {cache} and are not "
            "on the origin; they are tried again. See to the SSD."
        )
