"""Where an image is dirty, against a set of bytes."""

import random

import numpy as np
import pytest

from fusecache.core.extents import DirtyExtents
from fusecache.core.geometry import Geometry


def _model(geometry: Geometry, pages: set[int]) -> DirtyExtents:
    per_block = geometry.pages_per_block
    masks: dict[int, int] = {}
    for page in sorted(pages):
        block, bit = divmod(page, per_block)
        masks[block] = masks.get(block, 0) | 1 << bit
    return DirtyExtents(
        geometry,
        np.array(list(masks), np.uint32),
        np.array(list(masks.values()), np.uint16),
    )


@pytest.mark.parametrize("block_size", [4096, 16384, 65536, 1 << 20])
def test_dirty_extents_begin_and_end_where_a_set_of_pages_says(block_size: int) -> None:
    geometry = Geometry.of(block_size)
    chance = random.Random(block_size)
    for _ in range(60):
        share = chance.choice([0.0, 0.05, 0.5, 0.95, 1.0])
        count = 5 * geometry.pages_per_block
        pages = {page for page in range(count) if chance.random() < share}
        extents = _model(geometry, pages)
        for _ in range(40):
            offset = chance.randrange((count + 2) * geometry.page_size)
            page = offset // geometry.page_size
            after = [other for other in pages if other >= page]
            begin = max(offset, min(after) * geometry.page_size) if after else None
            assert extents.begin(offset) == begin
            while page in pages:
                page += 1
            assert extents.end(offset) == max(offset, page * geometry.page_size)
