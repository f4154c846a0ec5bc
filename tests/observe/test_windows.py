"""Histories: what counters did lately, against a plain list of everything that happened."""

from hypothesis import given
from hypothesis import strategies as st

from fusecache.observe.windows import HOUR, MINUTE, History, ratio, seconds_left

STEPS = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=300)


@given(STEPS, st.sampled_from([5.0, MINUTE, HOUR]))
def test_a_window_is_true_to_the_tick_and_beyond_a_minute_to_the_minute(
    steps: list[tuple[int, int]], window: float
) -> None:
    history, now, value = History(0.0, [0]), 0.0, 0
    happened: list[tuple[float, int]] = []
    for wait, more in steps:
        now += wait
        value += more
        happened.append((now, more))
        history.sample(now, [value])
    (grown,), span = history.over(now, window, [value])
    assert span == min(window, now)
    exact = sum(more for at, more in happened if at > now - window)
    slack = MINUTE if window > MINUTE else 0.0
    most = sum(more for at, more in happened if at > now - window - slack)
    # 90 s between samples, so what is up to a minute older may lie in the sample before that.
    older = [more for at, more in happened if at <= now - window - slack]
    assert exact <= grown <= most + (sum(older[-60:]) if slack else 0)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=100))
def test_the_steps_of_the_last_seconds_are_what_happened_in_each(grown: list[int]) -> None:
    history, value = History(0.0, [0, 7]), 0
    for second, more in enumerate(grown, start=1):
        value += more
        history.sample(float(second), [value, 7])
    shown = history.steps(float(len(grown)), 60, [value, 7])
    assert shown == [[more, 0] for more in ([0] * 60 + grown)[-60:]]


def test_an_idle_hour_costs_no_sample_and_forgets_what_was_before() -> None:
    history = History(0.0, [0])
    history.sample(1.0, [10])
    for second in range(2, 4000):
        history.sample(float(second), [10])
    assert history.over(4000.0, HOUR, [10])[0] == [0]
    assert history.over(4000.0, HOUR, [14])[0] == [4]


def test_what_happened_since_the_last_tick_counts() -> None:
    history = History(100.0, [0])
    assert history.over(100.5, MINUTE, [3]) == ([3], 0.5)


def test_ratios_and_times_left_say_when_nothing_is_known() -> None:
    assert ratio(0, 0) is None
    assert ratio(3, 1) == 0.75
    assert seconds_left(0, 10, 5.0) == 0.0
    assert seconds_left(10, 10, 5.0) is None
    assert seconds_left(20, 10, 5.0) is None  # it became more
    assert seconds_left(25, 100, 3.0) == 1.0
