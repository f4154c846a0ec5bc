"""TroubleWatch: each trouble is said once with a count, and once when it is over."""

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from fusecache.engine.trouble import TroubleWatch
from fusecache.observe.counters import ImageCounters


@dataclass
class _Limiter:
    borrowed_tokens: int = 0


@dataclass
class _Image:
    """What is looked at of an image."""

    id: int
    counters: ImageCounters = field(default_factory=ImageCounters)
    limiter: _Limiter = field(default_factory=_Limiter)
    cleaner_limiter: _Limiter = field(default_factory=_Limiter)
    synced: int = 0
    waiting: int = 0

    @property
    def name(self) -> str:
        return f"vm{self.id}.img"


@dataclass
class _Tuning:
    store_pause: float = 10.0


@dataclass
class _State:
    """What is looked at of the cache's state."""

    store_failures: int = 0
    stores_again: float = 0.0
    tuning: _Tuning = field(default_factory=_Tuning)


class Play:
    """Some images, a clock, and what was logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 1000.0
        self.images = [_Image(number) for number in range(1, 6)]
        self.state = _State()
        self.names: set[int] = set()
        self.log = caplog
        watched: Any = self.images
        state: Any = self.state
        self.watch = TroubleWatch(lambda: watched, state, lambda: self.now, lambda: self.names)
        caplog.set_level(logging.INFO, "fusecache")

    def go(self, seconds: int, *, fails: int = 0, works: int = 0) -> list[dict[str, Any]]:
        """Ticks, in each of which every image has so many failures and successes; gives what was
        logged meanwhile."""
        self.log.clear()
        for _ in range(seconds):
            self.now += 1
            for image in self.images:
                for _ in range(fails):
                    image.counters.failed("Input/output error")
                image.counters.origin_reads += works
            self.watch.look()
        return [getattr(record, "fields", {}) for record in self.log.records]


@pytest.fixture
def play(caplog: pytest.LogCaptureFixture) -> Play:
    """Nothing has happened yet."""
    made = Play(caplog)
    made.watch.look()
    return made


def events(said: list[dict[str, Any]]) -> list[str]:
    """Their names."""
    return [str(line["event"]) for line in said]


def test_a_failing_origin_is_said_once_with_a_count_and_when_it_works_again(play: Play) -> None:
    assert play.go(10, works=3) == []
    (line,) = play.go(30, fails=100, works=1)
    assert line["event"] == "origin-failing"
    assert (line["images"], line["errors"], line["error"]) == (5, 500, "Input/output error")
    assert play.watch.words == ["the origin fails (15000 errors)"]
    assert play.go(30) == [], "silence is no recovery"
    (line,) = play.go(10, works=1)
    assert line["event"] == "origin-recovered" and line["errors"] == 15000
    assert play.watch.words == []


def test_one_that_goes_on_failing_is_said_again_after_a_minute_ten_and_each_hour(
    play: Play,
) -> None:
    said = play.go(3 * 3600 + 100, fails=1)
    assert events(said) == ["origin-failing"] * 6
    assert [line["errors"] // 5 for line in said] == [1, 61, 601, 3601, 7201, 10801]


def test_one_that_fails_now_and_then_is_said_ever_less_often(play: Play) -> None:
    counts = []
    for _ in range(4):
        said = []
        for _ in range(900):
            said += play.go(1, fails=1) + play.go(3, works=1)
        counts.append(len(said))
    assert counts[0] <= 6 and counts[-1] <= 2
    said = []
    for _ in range(60):
        said += play.go(1, fails=1) + play.go(59, works=1)
    assert len(said) < 20


def test_a_hanging_origin_is_said_once_and_when_it_answers(play: Play) -> None:
    for image in play.images[:3]:
        image.limiter.borrowed_tokens = image.waiting = 4
    play.go(1)
    assert play.go(8) == []
    (line,) = play.go(30)
    assert (line["event"], line["images"], line["waiting"]) == ("origin-hangs", 3, 12)
    assert play.watch.words == ["the origin does not answer (3 images wait)"]
    assert play.go(20) == []
    (line,) = play.go(60)
    assert line["event"] == "origin-hangs"
    for image in play.images[:3]:
        image.limiter.borrowed_tokens = 0
    (line,) = play.go(5)
    assert line["event"] == "origin-answers"


def test_lookups_that_hang_are_said_once_and_when_they_come_back(play: Play) -> None:
    play.names = {1, 2, 3}
    assert play.go(10, works=1) == [], "images are answered all the time"
    (line,) = play.go(30, works=1)
    assert (line["event"], line["images"], line["names"]) == ("origin-hangs", 0, 3)
    assert "image" not in line
    assert play.watch.words == ["the origin does not answer (3 calls for names wait)"]
    play.images[0].limiter.borrowed_tokens = 1
    assert play.go(15) == []
    assert play.watch.words == ["the origin does not answer (1 images and 3 calls for names wait)"]
    play.names = {4}
    assert play.go(5) == [], "the image still waits"
    play.images[0].limiter.borrowed_tokens = 0
    (line,) = play.go(4)
    assert (line["event"], line["images"]) == ("origin-answers", 1)


def test_lookups_that_are_slow_do_not_hang(play: Play) -> None:
    for number in range(20):
        play.names = {number, number + 1}
        assert play.go(4) == []


def test_a_slow_origin_that_answers_now_and_then_does_not_hang(play: Play) -> None:
    for image in play.images:
        image.cleaner_limiter.borrowed_tokens = 4
    for _ in range(20):
        assert play.go(8) + play.go(1, works=1) == []


def test_a_cache_that_stores_again_says_so(play: Play) -> None:
    play.state.store_failures, play.state.stores_again = 7, play.now + 10
    assert play.go(19) == []
    (line,) = play.go(2)
    assert (line["event"], line["failures"]) == ("cache-stores", 7)
    assert play.state.store_failures == 0 and play.go(60) == []
