"""Pace: a rate holds from the moment it is set."""

import trio
import trio.testing

from fusecache.engine.pace import Pace


async def test_a_changed_rate_holds_from_the_next_wait_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace(trio.current_time, list)

    async def seconds(count: int) -> float:
        began = trio.current_time()
        for _ in range(count):
            await pace.wait(1 << 20, yielding=True)
        return trio.current_time() - began

    assert await seconds(100) == 0
    pace.rate = 1 << 20
    assert await seconds(11) >= 10
    pace.rate = 10 << 20
    assert 0 < await seconds(11) <= 2.1
    pace.rate = 0
    assert await seconds(100) == 0
