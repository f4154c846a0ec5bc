"""The reclaimer: keeps slots free ahead of need (R3).

A slot can be used again only after the deletion of its old row is stable, and a barrier costs an
fsync. So slots are reclaimed in batches, one barrier for hundreds, and fills never wait: if no
slot is free, a fetch is answered and not stored.
"""

import trio

from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, DatabaseError

_SHARE = 64
_FEW = 128
"""Enough for eight reads of 1 MiB at 64 KiB while a barrier runs; a quarter of a tiny cache."""
_MOST = 4096
_PART = 256
_PAUSE = 0.5


class Reclaimer:
    """Reclaims from below ``low`` free slots up to ``high``."""

    def __init__(self, core: CacheIndex, committer: Committer, state: CacheState) -> None:
        self._core = core
        self._committer = committer
        self._state = state
        few = min(_FEW, core.slot_count // 4)
        self.low = max(1, few, min(_MOST, core.slot_count // _SHARE))
        self.high = 2 * self.low
        self.doing = "idle"
        """``idle``, ``reclaiming``, or ``stuck``: everything is in use, and fills go unstored."""
        self._needed = trio.Event()

    def wake(self) -> None:
        """Reclaims soon, if there is need. Cheap; called at every fill."""
        if self._core.free < self.low:
            self._needed.set()

    async def run(self) -> None:
        """Reclaims whenever woken, until cancelled or the cache is unusable."""
        while self._state.usable:
            await self._needed.wait()
            self._needed = trio.Event()
            self.doing = "reclaiming"
            try:
                if await self._reclaim():
                    self.doing = "idle"
                    self.wake()
                else:
                    self.doing = "stuck"
                    await trio.sleep(_PAUSE)
            except (CacheDeviceError, DatabaseError):
                return  # the state is unusable now
            except Exception as exc:
                self._state.unexpected(exc, "reclaiming")

    async def _reclaim(self) -> bool:
        """One batch and its barrier; False if nothing could be reclaimed."""
        missing = self.high - self._core.free - self._core.leaving
        while missing > 0 and (got := self._core.reclaim(min(missing, _PART))):
            self._state.counters.reclaimed += got
            missing -= got
            await trio.lowlevel.checkpoint()
        if not self._core.leaving:
            return False
        await self._committer.barrier()
        return True
