"""Blocking calls of a running engine as a test sees them: recorded in order, and held up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from fusecache.engine.block_cache import BlockCache


class Calls:
    """Stands between the engine and its worlds' doubles.

    Names are ``OriginDouble.write``, ``DeviceDouble.sync`` and so on; what the cleaner copies in
    a thread is ``Cleaner._copy``.
    """

    def __init__(self, cache: BlockCache) -> None:
        self.names: list[str] = []
        self.stalled: set[str] = set()
        """Calls that do not return for now: they wait, before they do what they do."""
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}
        """By name: how many ran at a time, at most."""
        self.slow: dict[str, float] = {}
        """By name: seconds it takes."""
        self.times: dict[str, list[float]] = {}
        """By name: when each call was made."""
        run: Any = self._run
        cache.threads.run = run

    async def _run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> Any:
        name = (fn.func if isinstance(fn, partial) else fn).__qualname__
        async with limiter:
            self.names.append(name)
            self.times.setdefault(name, []).append(trio.current_time())
            self.running[name] = self.running.get(name, 0) + 1
            self.most[name] = max(self.most.get(name, 0), self.running[name])
            try:
                while name in self.stalled:
                    await trio.sleep(0.01)
                result = fn(*args)
                await trio.sleep(self.slow.get(name, 0))
            finally:
                self.running[name] -= 1
            return result

    def count(self, name: str) -> int:
        """How often it was called since the last ``forget``."""
        return self.names.count(name)

    def order(self, *names: str) -> list[str]:
        """Those of these names, in order."""
        return [name for name in self.names if name in names]

    def forget(self) -> None:
        """Begins the record anew."""
        self.names.clear()
        self.times.clear()

    async def begun(self, name: str) -> None:
        """Returns once such a call is under way."""
        while not self.running.get(name):
            await trio.sleep(0.01)
