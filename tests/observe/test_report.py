"""Numbers as people read them."""

import pytest

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
