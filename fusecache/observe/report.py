"""Status for people: one table a mount, from the same data as ``status --json``."""

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
        cache = mount["cache"]
        console.print(
            f"[bold]{escape(mount['mountpoint'])}[/] from {escape(mount['origin'])}"
            f"  (pid {mount['pid']}, {mount['state']}, write-{mount['write_mode']})"
        )
        used = 100 * cache["slots_used"] / max(1, cache["slots_total"])
        console.print(
            f"cache {escape(cache['path'])}: {cache['slots_used']} of {cache['slots_total']} "
            f"blocks of {size_text(mount['block_size'])} used ({used:.0f}%), {cache['state']}"
        )
        if cache["trouble"]:
            console.print(f"[red]last cache error: {escape(cache['trouble'])}[/]")
        console.print(_images(mount["images"]))
        for image in mount["images"]:
            if image["last_error"]:
                console.print(
                    f"[red]{escape(image['path'])}: {image['errors']} origin errors, "
                    f"the last: {escape(image['last_error'])}[/]"
                )


def _images(images: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("image", overflow="fold")
    for title in ("size", "cached", "read: hit", "miss", "hit %", "written", "origin read", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for image in images:
        hit, miss = image["read_hit_bytes"], image["read_miss_bytes"]
        ratio = f"{100 * hit / (hit + miss):.0f}" if hit + miss else "-"
        table.add_row(
            escape(image["path"]),
            size_text(image["size"]),
            size_text(image["cached_bytes"]),
            size_text(hit),
            size_text(miss),
            ratio,
            size_text(image["write_bytes"]),
            size_text(image["origin_read_bytes"]),
            _remarks(image),
        )
    return table


def _remarks(image: dict[str, Any]) -> str:
    words = []
    if image["open_handles"]:
        words.append(f"open x{image['open_handles']}")
    if image["detached"]:
        words.append("detached")
    if image["waiting"]:
        words.append(f"{image['waiting']} waiting for the origin")
    return ", ".join(words)
