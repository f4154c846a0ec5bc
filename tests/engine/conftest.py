"""A world for every engine test, on a clock that runs as fast as it can."""

from pathlib import Path

import pytest
import trio.testing

from fusecache.config import WriteMode
from fusecache.engine.degraded import Degraded
from fusecache.engine.image import Image
from tests.support.stamps import stamped
from tests.support.world import World

BLOCK = 4 * 4096
BLOCKS = 12


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """No threads here, so trio may skip every wait."""
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two stamped images, old enough to be trusted, and a cache larger than both."""
    made = World(tmp_path, slots=64, block_size=BLOCK)
    for number in (1, 2):
        made.make_file(number, stamped(number, 0, BLOCKS * BLOCK, 1))
    return made


@pytest.fixture
def back(tmp_path: Path) -> World:
    """The same, written back."""
    made = World(tmp_path, slots=64, block_size=BLOCK, write_mode=WriteMode.BACK)
    for number in (1, 2):
        made.make_file(number, stamped(number, 0, BLOCKS * BLOCK, 1))
    return made


@pytest.fixture
def few_rescues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whoever is rescued without end; a test would hang instead."""
    rescue, asked = Degraded.rescue, 0

    async def counted(self: Degraded, image: Image) -> None:
        nonlocal asked
        asked += 1
        assert asked < 100, "again and again, and nothing else runs"
        await rescue(self, image)

    monkeypatch.setattr(Degraded, "rescue", counted)
