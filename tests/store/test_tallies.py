"""Count and sum of a table: any row missing, doubled or of another time is seen, in any order."""

import random
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusecache.store.tallies import Tally, row_hash, row_hashes, tally_of, values_crc

Key = tuple[int, int, int]
KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


@given(st.lists(KEYS, max_size=20), st.randoms())
def test_one_by_one_and_all_at_once_are_the_same_in_any_order(
    rows: list[Key], chance: random.Random
) -> None:
    one = Tally()
    for row in rows:
        one = one.plus(row_hash(*row))
    chance.shuffle(rows)
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    assert tally_of(row_hashes(*columns)) == one
    assert 0 <= one.sum < 1 << 63


@given(st.lists(KEYS, min_size=1, max_size=20), st.data())
def test_any_change_is_seen_and_any_row_can_be_taken_away_again(
    rows: list[Key], data: st.DataObject
) -> None:
    whole = Tally()
    for row in rows:
        whole = whole.plus(row_hash(*row))
    taken = data.draw(st.sampled_from(rows))
    without = whole.minus(row_hash(*taken))
    assert without.plus(row_hash(*taken)) == whole
    assert without.join(Tally().plus(row_hash(*taken))) == whole
    bit = data.draw(st.integers(0, 95))
    changed = list(taken)
    changed[bit // 32] ^= 1 << bit % 32
    assert without.plus(row_hash(*changed)) != whole


def test_every_bit_of_a_row_moves_about_half_of_its_hash() -> None:
    moved = []
    for bit in range(96):
        row = [17, 4, 99]
        row[bit // 32] ^= 1 << bit % 32
        moved.append((row_hash(*row) ^ row_hash(17, 4, 99)).bit_count())
    assert 27 < sum(moved) / len(moved) < 36
    assert min(moved) > 12


def test_a_terabyte_is_summed_in_a_fraction_of_a_second() -> None:
    """16.8 million blocks of 64 KiB are 262,144 regions."""
    numbers = np.arange(262_144).tolist()
    began = time.perf_counter()
    tally_of(row_hashes(numbers, numbers, numbers))
    assert time.perf_counter() - began < 2


def test_a_value_of_another_type_is_another_value() -> None:
    assert len({values_crc((v,)) for v in (1, 1.0, "1", b"1", None, True)}) == 6
