"""Memory: at most 48 bytes a slot in all, and no Python object per block (DESIGN, section 4)."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from fusecache.core.rows import Rows

GEOMETRY = Geometry.of(65536)


def held(index: CacheIndex) -> int:
    """Bytes of every array the index and its parts own, each counted once."""
    found: dict[int, int] = {}
    lists = 0
    for part in (index, index._slots, index._tags, index._policy):
        names = list(getattr(part, "__dict__", ())) + list(getattr(type(part), "__slots__", ()))
        for name in names:
            value: Any = getattr(part, name)
            if isinstance(value, np.ndarray):
                found[value.__array_interface__["data"][0]] = value.nbytes
            elif hasattr(value, "buffer_info"):
                lists += value.buffer_info()[1] * value.itemsize
            elif isinstance(value, list | dict | set):
                lists += 100 * len(value)
    return sum(found.values()) + lists


def full(count: int, per_image: int) -> Rows:
    """Rows that use every slot, a new image after every ``per_image`` blocks."""
    numbers = np.arange(count, dtype=np.uint32)
    return Rows(
        numbers // np.uint32(per_image) + np.uint32(1),
        numbers % np.uint32(per_image),
        numbers,
        np.full(count, 0xFFFF, np.uint16),
        np.zeros(count, np.uint16),
    )


# The tag index doubles at 3/4 of a power of two: just below it is fullest, at it emptiest.
COUNTS = [100_000, 98_303, 98_304, 1_572_863, 1_572_864, 1_600_000]


@pytest.mark.parametrize("count", COUNTS)
def test_a_full_cache_costs_at_most_48_bytes_a_slot(count: int) -> None:
    index = CacheIndex(GEOMETRY, count)
    assert held(index) <= 48 * count
    index.load(full(count, 20_000))
    index.finish_load(iter([]))
    assert held(index) <= 48 * count
    # A batch of reclaim, with everything equally old, and its rows still owed.
    assert index.reclaim(4096) == 4096
    assert held(index) <= 48 * count


def test_a_cache_that_owes_every_row_costs_at_most_48_bytes_a_slot() -> None:
    count = 98_304
    index = CacheIndex(GEOMETRY, count)
    for block in range(count):
        slot = index.begin_store(1, block)
        assert slot is not None
        index.stored(slot, 0xFFFF)
    assert held(index) <= 48 * count


def test_loading_a_million_rows_makes_no_python_object_per_block() -> None:
    count = 1_000_000
    rows = full(count, 20_000)
    index = CacheIndex(GEOMETRY, count)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        index.load(rows)
        index.finish_load(iter([]))
        after, peak = tracemalloc.get_traced_memory()
        blocks = sum(stat.count for stat in tracemalloc.take_snapshot().statistics("filename"))
    finally:
        tracemalloc.stop()
    assert index.used == count
    assert after - before < count, "what stays is less than a byte a block"
    assert peak - before < 64 * count
    assert blocks < 10_000
