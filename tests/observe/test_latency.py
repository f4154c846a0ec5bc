"""Latencies: fixed buckets, quantiles to a factor of two, calls timed where they are made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.observe.latency import BOUNDS, Call, Histogram, OriginLatency, quantile, timed

SECONDS = st.floats(1e-6, 50.0)


@given(st.lists(SECONDS, min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_off_by_less_than_a_factor_of_two(spans: list[float], share: float) -> None:
    histogram = Histogram()
    for span in spans:
        histogram.add(span)
    assert histogram.count == len(spans)
    assert histogram.seconds == pytest.approx(sum(spans))
    found = quantile(histogram.counts, share)
    place = max(0, -int(-share * len(spans) // 1) - 1)  # the k-th smallest, k rounded up
    exact = max(sorted(spans)[place], BOUNDS[0] / 2)
    assert found is not None and exact / 2 <= found <= exact * 2 * (1 + 1e-9)


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_the_total_is_as_one_that_saw_all(first: list[float], second: list[float]) -> None:
    one, two, both, plain = (OriginLatency() for _ in range(4))
    one.total = two.total = both
    one.add(Call.READ, first)
    two.add(Call.READ, second)
    two.add(Call.SYNC, second)
    plain.add(Call.READ, first + second)
    plain.add(Call.SYNC, second)
    for call in Call:
        assert both.calls[call].counts == plain.calls[call].counts
        assert both.calls[call].seconds == pytest.approx(plain.calls[call].seconds)
    assert one.calls[Call.SYNC].count == 0


def test_nothing_has_no_quantile_and_what_is_beyond_all_bounds_counts_as_the_last() -> None:
    histogram = Histogram()
    assert quantile(histogram.counts, 0.5) is None
    histogram.add(1e6)
    assert quantile(histogram.counts, 0.5) == BOUNDS[-1]
    histogram.add(BOUNDS[0])
    assert histogram.counts[0] == 1  # a bound belongs to its bucket, as Prometheus has it


def test_a_call_that_fails_is_timed_too() -> None:
    ticks = iter([1.0, 1.5, 2.0, 5.0])
    spans: list[float] = []

    def call(fail: bool) -> int:
        if fail:
            raise OSError
        return 7

    watched = timed(call, spans, lambda: next(ticks))
    assert watched(False) == 7
    with pytest.raises(OSError):
        watched(True)
    assert spans == [0.5, 3.0]
    assert watched.__name__ == "call"
