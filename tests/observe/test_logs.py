"""The log's lines: one each, ``key=value``, with priorities for the journal, limited per cause."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest

from fusecache.observe import logs


def record(message: str, *args: object, event: str = "", **values: object) -> logging.LogRecord:
    """One that was logged as an error at one place in the code."""
    made = logging.LogRecord("fusecache.x", logging.ERROR, "x.py", 1, message, args, None)
    if event:
        made.__dict__.update(logs.fields(event, **values))
    return made


def test_a_line_has_level_event_fields_and_message() -> None:
    shown = logs.Formatter("fusecache: ").format(
        record("%s is bad", "vm 1", event="origin-failing", image="vm 1.img", errors=17, share=0.25)
    )
    assert shown == (
        'fusecache: level=error event=origin-failing image="vm 1.img" errors=17 share=0.25 '
        'message="vm 1 is bad"'
    )


def test_whatever_a_name_holds_it_stays_one_line_that_can_be_taken_apart() -> None:
    name = 'a"b\\c\nd\te=\x1b[31m\udcff\u2028'
    shown = logs.Formatter("").format(record("changed", event="x", image=name))
    assert shown.isprintable() and "\n" not in shown
    assert shown.startswith('level=error event=x image="a\\"b\\\\c\\nd\\te=\\x1b[31m')
    assert shown.endswith(" message=changed")
    shown.encode("utf-8")


def test_an_exception_is_one_line_with_its_frames() -> None:
    def inner() -> None:
        raise KeyError("gone")

    try:
        inner()
    except KeyError:
        made = record("unexpected")
        made.exc_info = sys.exc_info()
    shown = logs.Formatter("").format(made)
    assert "exception=KeyError('gone')" in shown.replace('"', "")
    assert ":inner < test_logs.py:" in shown and "\n" not in shown


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)],
)
def test_the_journal_gets_priorities(level: int, priority: int) -> None:
    made = record("x")
    made.levelno = level
    assert logs.Formatter("", journal=True).format(made).startswith(f"<{priority}>level=")


def test_a_stream_is_the_journal_only_if_systemd_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        st = os.fstat(writer)
        for value, expected in ((f"{st.st_dev}:{st.st_ino}", True), ("1:2", False), ("x", False)):
            monkeypatch.setenv("JOURNAL_STREAM", value)
            assert logs.is_journal(stream) is expected


class Limited:
    """A rate limit, its clock, and what it does to records of one place."""

    def __init__(self) -> None:
        self.now = 0.0
        self.limit = logs.RateLimit(lambda: self.now)

    def passed(self, count: int, message: str = "%s fails") -> int:
        """How many of so many records, each with words of its own, are written."""
        return sum(self.limit.filter(record(message, str(number))) for number in range(count))


def test_of_one_cause_ten_lines_a_minute_are_written_and_the_rest_counted() -> None:
    limited = Limited()
    assert limited.passed(1000) == 10
    assert limited.passed(5, "%s is another matter") == 5
    apart = record("%s fails", "x", event="unexpected-error", doing="answering read")
    assert limited.limit.filter(apart)
    limited.now = 61
    next_one = record("%s fails", "vm")
    assert limited.limit.filter(next_one)
    assert "suppressed=990" in logs.Formatter("").format(next_one)
    assert limited.passed(100) == 9


def test_what_is_logged_for_debugging_is_all_there() -> None:
    limited = Limited()
    made = record("x")
    made.levelno = logging.DEBUG
    assert all(limited.limit.filter(made) for _ in range(100))


def test_what_was_not_written_is_told_when_nothing_more_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limited = Limited()
    limited.passed(1000)
    limited.limit.sweep()
    assert not caplog.records
    limited.now = 61
    limited.limit.sweep()
    limited.limit.sweep()
    assert [r.getMessage() for r in caplog.records] == ["990 more in the last minute: %s fails"]


@pytest.fixture
def level() -> Iterator[None]:
    """The level as it was, afterwards."""
    logger = logging.getLogger("fusecache")
    before = logger.level
    yield
    logger.setLevel(before)


def test_the_level_changes_at_any_time(level: None) -> None:
    for name in ("debug", "warning", "error", "info"):
        logs.set_level(name)
        assert logs.level() == name
