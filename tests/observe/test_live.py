"""The picture of ``fusecache top``, without a terminal."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fusecache.observe.live import SORTS, Look, View, frame, sparkline

ANSWER = {"calls": 5, "p50": 0.0004, "p99": 0.0123}


def image(path: str, **changed: Any) -> dict[str, Any]:
    return {
        "path": path, "cached_bytes": 1 << 30, "dirty_bytes": 0, "waiting": 0, "last_error": "",
        "clean_error": "", "lost": [], "hit_ratio": {"minute": 0.5, "hour": None, "start": 1.0},
        "rates": {"reads": 12345.6, "writes": 0.0}, "origin_latency": {"read": ANSWER},
    } | changed  # fmt: skip


def mount(*images: dict[str, Any]) -> dict[str, Any]:
    work = {"left": 1 << 30, "of": 1 << 31, "seconds_left": 42.0}
    return {
        "mountpoint": "/mnt/cached", "state": "serving", "write_mode": "back", "seconds": 4000.0,
        "cache": {"state": "paused", "dirty_bytes": 4096, "dirty_age": 75.0, "cached_bytes": 9},
        "rates": {"reads": 1.0, "read_bytes": 1e9, "writes": 2.0, "write_bytes": 0.0},
        "hit_ratio": {"minute": 0.975, "hour": 0.5, "start": None},
        "origin_latency_minute": {"read": ANSWER}, "cleaner": {"doing": "writing"},
        "reclaimer": {"doing": "idle"}, "running": [work | {"verb": "flush"}], "flushing": None,
        "history": dict.fromkeys(("read_hit_bytes", "read_miss_bytes", "write_bytes"), [1] * 60),
        "images": list(images),
    }  # fmt: skip


def shown(look: Look, view: View, width: int = 80, height: int | None = 24) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    console.print(frame(look, view, width, height, "12:00:00"))
    return file.getvalue().splitlines()


def test_everything_fits_eighty_columns_and_the_lines_there_are() -> None:
    images = [image(f"a/long/path/to/some/virtual-machine-number-{n}.qcow2") for n in range(50)]
    lines = shown(Look([mount(*images)]), View())
    assert max(map(len, lines)) <= 80 and len(lines) <= 24
    text = "\n".join(lines)
    for words in (
        "/mnt/cached  serving, write-back, up 1 h 7 min  cache paused", "hits 98% 1 min, 50% 1 h",
        "p50 0.4 ms, p99 12 ms", "dirty 4.0 KiB for 75 s", "cleaner writing",
        "flush: 1.0 GiB left of 2.0 GiB, about 42 s", "12,346", "hit ratio", "50%",
    ):  # fmt: skip
        assert words in text, (words, text)


@pytest.mark.parametrize("sort", SORTS)
def test_it_sorts_by_everything_and_scrolls_to_the_end(sort: str) -> None:
    images = [
        image(f"{n:02}.img", dirty_bytes=n, cached_bytes=n, waiting=n,
              rates={"reads": n, "writes": n}, hit_ratio={"minute": (30 - n) / 30},
              origin_latency={"read": {"p99": n / 10}})
        for n in range(30)
    ]  # fmt: skip
    view = View(sort)
    first = "00.img" if sort == "name" else "29.img"
    assert any(first in line for line in shown(Look([mount(*images)]), view))
    for _ in range(100):
        assert view.key("j")
    last = "29.img" if sort == "name" else "00.img"
    assert any(last in line for line in shown(Look([mount(*images)]), view))
    assert view.skip < 30
    assert view.key("r") and not view.key("q")


def test_names_cannot_command_the_terminal() -> None:
    text = "\n".join(shown(Look([mount(image("\x1b[2J[bold]x\r\n"))]), View(), height=None))
    assert "\x1b" not in text and "[bold]x" in text


def test_a_daemon_that_is_gone_is_said_first() -> None:
    lines = shown(Look([mount()], ["The daemon of /mnt/x is gone."]), View())
    assert lines[1].strip() == "The daemon of /mnt/x is gone."
    assert "No fusecache daemon" in shown(Look(), View())[1]


@given(st.lists(st.floats(0, 1e12), max_size=100), st.integers(1, 60))
def test_a_sparkline_is_as_wide_as_it_is_told(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == width


def test_a_sparkline_shows_little_as_more_than_nothing() -> None:
    assert sparkline([0, 1e-9, 0.5, 1], 4, 1.0) == "▁▂▅█"
    assert sparkline([], 3) == "   "
