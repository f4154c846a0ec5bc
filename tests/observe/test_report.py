"""Status as people read it."""

import io
from typing import Any

import pytest
from rich.console import Console

from fusecache.observe import report
from fusecache.observe.report import percent_text
from fusecache.observe.times import time_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.000025, "0.025 ms"), (0.00042, "0.42 ms"), (0.0123, "12 ms"),
        (0.25, "250 ms"), (1.25, "1.2 s"), (75.4, "75 s"), (600, "10 min"), (3600, "1 h 0 min"),
        (90061, "25 h 1 min"), (864000, "10 d 0 h"),
    ],
)  # fmt: skip
def test_times_have_two_digits_that_count(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0.0, "0%"), (1.0, "100%"), (0.9999, "99.9%"), (0.00001, "0.1%"), (0.5, "50%")],
)
def test_nearly_all_is_not_all(share: float | None, text: str) -> None:
    assert percent_text(share) == text


def _image(path: str) -> dict[str, Any]:
    places = {place: {"bytes": 123 << 30, "requests": 9} for place in ("memory", "ssd", "origin")}
    return {
        "path": path, "size": 800 << 30, "cached_bytes": 123 << 30, "dirty_bytes": 512 << 20,
        "dirty_age": 3599.0, "hit_ratio": {"minute": 0.999, "hour": 0.5, "start": None},
        "reads": places, "write_bytes": 999 << 20, "write_mode": "back", "open_handles": 12,
        "detached": False, "waiting": 3, "last_error": "", "clean_error": "", "lost": [],
        "origin_latency": {"read": {"p50": 0.25, "p99": 1.25}}, "unreadable": [], "not_cached": {},
    }  # fmt: skip


def _shown(paths: list[str], width: int, *, terminal: bool) -> list[str]:
    """The table of these images."""
    cache = {
        "path": "/dev/sdb", "slots_total": 9, "slots_used": 3, "dirty_bytes": 0, "state": "ok",
        "trouble": "",
    }  # fmt: skip
    mount = {
        "mountpoint": "/mnt/c", "origin": "/srv", "pid": 7, "state": "serving", "cache": cache,
        "write_mode": "through", "block_size": 65536, "images": [_image(path) for path in paths],
        "flushing": None,
    }  # fmt: skip
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    report.show({"mounts": [mount]}, console)
    lines = file.getvalue().splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.split()[:1] == ["image"]]
    return [line.rstrip() for line in lines[head:]]


PATHS = ["vm2.img", "pool-1/a-guest-with-a-long-name/system-disk-0.qcow2"]


@pytest.mark.parametrize("width", [20, 80, 100, 120, 250])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_image_has_one_line_with_all_of_its_name(width: int, terminal: bool) -> None:
    head, *lines = _shown(PATHS, width, terminal=terminal)
    assert [line.split()[0] for line in lines] == PATHS
    for line in lines:
        assert line.endswith("write-back, open x12, 3 waiting for the origin"), line
        assert "800.0 GiB" in line and "512.0 MiB 3599 s" in line
    assert ("p99" in head) == (width == 250 or not terminal)
    assert ("hit: min" in head) != ("hits" in head)


def test_what_fits_a_narrow_terminal_is_shown() -> None:
    head, line = _shown(PATHS[:1], 130, terminal=True)
    assert "hit: min" in head and "memory" not in head and len(line) <= 130
