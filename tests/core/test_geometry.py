"""Geometry against models that look at every single byte."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.core.geometry import Geometry, merged, region_of

BLOCK_SIZES = [4096 << shift for shift in range(9)]
EDGE = 70_000


def near(value: int) -> st.SearchStrategy[int]:
    """Offsets around the multiples of a size, where the mistakes are."""
    return st.builds(
        lambda k, d: max(0, k * value + d), st.integers(0, 5), st.sampled_from([-1, 0, 1, 17])
    )


def spans(geometry: Geometry) -> st.SearchStrategy[tuple[int, int]]:
    """(start, stop) within one block, empty ones too."""
    inside = st.one_of(
        st.integers(0, geometry.block_size),
        near(geometry.page_size).map(lambda at: min(at, geometry.block_size)),
    )
    return st.tuples(inside, inside).map(lambda pair: (min(pair), max(pair)))


geometries = st.sampled_from(BLOCK_SIZES).map(Geometry.of)


@given(geometries)
def test_a_block_has_at_most_sixteen_pages_of_at_least_4_kib(geometry: Geometry) -> None:
    assert geometry.page_size >= 4096
    assert 1 <= geometry.pages_per_block <= 16
    assert geometry.pages_per_block * geometry.page_size == geometry.block_size
    assert 1 << geometry.block_shift == geometry.block_size
    assert 1 << geometry.page_shift == geometry.page_size
    assert geometry.full_mask == geometry.touched(0, geometry.block_size)


@settings(deadline=None)
@given(st.sampled_from([4096, 16384, 65536]), st.data())
def test_split_yields_every_byte_once_and_in_order(block_size: int, data: st.DataObject) -> None:
    geometry = Geometry.of(block_size)
    offset = data.draw(near(block_size)) + data.draw(st.sampled_from([0, block_size << 30]))
    length = data.draw(st.one_of(st.integers(1, EDGE), near(block_size).map(lambda n: n + 1)))
    expected = offset
    seen = []
    for block, start, stop in geometry.split(offset, length):
        assert 0 <= start < stop <= block_size
        assert block * block_size + start == expected
        expected += stop - start
        seen.append(block)
    assert expected == offset + length
    assert seen == list(geometry.blocks(offset, length))
    assert seen == sorted(
        {at // block_size for at in (*range(offset, expected, 512), expected - 1)}
    )


@given(geometries)
def test_an_empty_span_is_no_blocks_and_no_pages(geometry: Geometry) -> None:
    assert list(geometry.split(123_456, 0)) == []
    assert geometry.touched(5, 5) == geometry.covered(5, 5) == geometry.covered(0, 0) == 0


@settings(deadline=None)
@given(geometries, st.data())
def test_touched_and_covered_pages_are_those_with_any_and_all_bytes(
    geometry: Geometry, data: st.DataObject
) -> None:
    start, stop = data.draw(spans(geometry))
    touched = covered = 0
    for page in range(geometry.pages_per_block):
        first = page * geometry.page_size
        inside = len(range(max(start, first), min(stop, first + geometry.page_size)))
        touched |= (inside > 0) << page
        covered |= (inside == geometry.page_size) << page
    assert geometry.touched(start, stop) == touched
    assert geometry.covered(start, stop) == covered


@given(geometries, st.integers(0, 0xFFFF))
def test_page_runs_are_the_longest_runs_of_set_pages(geometry: Geometry, mask: int) -> None:
    mask &= geometry.full_mask
    rebuilt, last = 0, -1
    for position, length in geometry.page_runs(mask):
        assert position > last, "runs are in order and never adjacent"
        assert length > 0 and length % geometry.page_size == 0 == position % geometry.page_size
        rebuilt |= geometry.covered(position, position + length)
        last = position + length
    assert rebuilt == mask


@given(st.sets(st.integers(0, 300)))
def test_merged_joins_all_neighbours_and_nothing_else(blocks: set[int]) -> None:
    ranges = list(merged(sorted(blocks)))
    assert [block for part in ranges for block in part] == sorted(blocks)
    for before, after in itertools.pairwise(ranges):
        assert before.stop < after.start


@given(st.integers(0, 1 << 40))
def test_a_region_is_64_blocks(block: int) -> None:
    assert region_of(block) * 64 <= block < (region_of(block) + 1) * 64
