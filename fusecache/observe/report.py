"""Status for people: one table a mount, from the same data as ``status --json``."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(size: float) -> str:
    """Bytes for people."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def show(status: dict[str, Any], console: Console) -> None:
    """Prints the whole answer of ``status --json`` as tables."""
    for mount in status["mounts"]:
        for line in _mount(mount):
            console.print(line, soft_wrap=True)
        console.print(_images(mount))
        for image in mount["images"]:
            for line in _troubles(image, mount["cache"]["path"]):
                console.print(f"[red]{escape(line)}[/]", soft_wrap=True)


def _mount(mount: dict[str, Any]) -> Iterator[str]:
    """What is said of a mount as a whole."""
    cache = mount["cache"]
    yield (
        f"[bold]{escape(mount['mountpoint'])}[/] from {escape(mount['origin'])}"
        f"  (pid {mount['pid']}, {mount['state']}, write-{mount['write_mode']})"
    )
    used = 100 * cache["slots_used"] / max(1, cache["slots_total"])
    dirty = f", {size_text(cache['dirty_bytes'])} dirty" if cache["dirty_bytes"] else ""
    yield (
        f"cache {escape(cache['path'])}: {cache['slots_used']} of {cache['slots_total']} "
        f"blocks of {size_text(mount['block_size'])} used ({used:.0f}%){dirty}, {cache['state']}"
    )
    if (flushing := mount["flushing"]) is not None:
        error = f"; the last error: {escape(flushing['error'])}" if flushing["error"] else ""
        yield f"flushing: {size_text(flushing['left'])} left of {size_text(flushing['of'])}{error}"
    if cache["trouble"]:
        yield f"[red]last cache error: {escape(cache['trouble'])}[/]"
    if cache["state"] == "degraded":
        yield f"[red]degraded: {escape(_remedy(mount))}[/]"


def _remedy(mount: dict[str, Any]) -> str:
    """What to do about a cache that cannot be used any more."""
    again = f"unmount it (fusecache umount {mount['mountpoint']}), see to the SSD and mount again"
    if not mount["cache"]["dirty_bytes"]:
        return f"all goes to the origin, and nothing is lost. To mend it, {again}."
    return (
        f"all new data goes to the origin, and {size_text(mount['cache']['dirty_bytes'])} that "
        f"only the cache has are brought there. Then {again}; do not format it before."
    )


def _images(mount: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("image", overflow="fold")
    titles = ("size", "cached", "dirty", "read: hit", "miss", "hit %", "written", "origin read", "")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=bool(title))
    for image in mount["images"]:
        hit, miss = image["read_hit_bytes"], image["read_miss_bytes"]
        ratio = f"{100 * hit / (hit + miss):.0f}" if hit + miss else "-"
        table.add_row(
            escape(image["path"]),
            size_text(image["size"]),
            size_text(image["cached_bytes"]),
            _dirty(image),
            size_text(hit),
            size_text(miss),
            ratio,
            size_text(image["write_bytes"]),
            size_text(image["origin_read_bytes"]),
            _remarks(image, mount["write_mode"]),
        )
    return table


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
    if image["clean_error"]:
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
