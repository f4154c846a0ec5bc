"""Sampler: once a second it notes what the counters are; nothing of it is done for a request."""

from array import array
from collections.abc import Sequence

import trio

from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.ports import Clock
from fusecache.engine.state import CacheState
from fusecache.observe.counters import ImageCounters
from fusecache.observe.latency import Call
from fusecache.observe.windows import History

_TICK = 1.0
FLOW = 9
"""How many of a mount's sampled values are what ``flow`` gives; the latencies follow."""


def flow(counters: ImageCounters) -> tuple[int, ...]:
    """What is sampled of an image: see ``ImageCounters`` for each."""
    return (
        counters.read_hit_bytes,
        counters.read_miss_bytes,
        counters.read_hits,
        counters.read_misses,
        counters.write_bytes,
        counters.writes,
        counters.origin_read_bytes,
        counters.origin_write_bytes,
        counters.written_back_bytes,
    )


class Sampler:
    """The histories of a mount and of its images."""

    def __init__(self, images: Images, state: CacheState, clock: Clock) -> None:
        self._images = images
        self._state = state
        self._now = clock.monotonic
        self.began = self._now()
        """When the mount began, by the engine's clock, in seconds."""
        self._mount = History(self.began, self._totals(None))
        self._histories: dict[int, History] = {}
        """By image id, of those that did something."""

    async def run(self) -> None:
        """Until cancelled, also when the cache is unusable."""
        while True:
            self.sample()
            await trio.sleep(_TICK)

    def sample(self) -> None:
        """One tick: 2 us an image, and 20 us for the mount (measured)."""
        now = self._now()
        before, self._histories = self._histories, {}
        sums = array("q", flow(self._state.counters.forgotten))
        for image in self._images.counted():
            values = flow(image.counters)
            for at, value in enumerate(values):
                sums[at] += value
            history = before.get(image.id)
            if history is None:
                if not any(values):
                    continue
                # It is first seen when it has done something, within a tick from zero.
                history = History(now - _TICK, (0,) * FLOW)
            history.sample(now, values)
            self._histories[image.id] = history
        self._mount.sample(now, self._totals(sums))

    @property
    def age(self) -> float:
        """Seconds since the mount began."""
        return self._now() - self.began

    def totals(self) -> Sequence[int]:
        """What is sampled of the mount, as it is now; for the methods below."""
        return self._totals(None)

    def mount_over(
        self, seconds: float, totals: Sequence[int]
    ) -> tuple[list[int], list[list[int]], float]:
        """What the mount did in the last ``seconds``: as ``flow``, and by ``Call`` how many calls
        of the origin took how long; and of how many seconds that is."""
        grown, span = self._mount.over(self._now(), seconds, totals)
        width = (len(grown) - FLOW) // len(Call)
        calls = [grown[FLOW + width * call : FLOW + width * (call + 1)] for call in Call]
        return grown[:FLOW], calls, span

    def image_over(self, image: Image, seconds: float) -> tuple[list[int], float]:
        """What an image did in the last ``seconds``, as ``flow``; and of how many that is."""
        values = flow(image.counters)
        history = self._histories.get(image.id)
        if history is None:
            return list(values), min(seconds, self.age)
        grown, _ = history.over(self._now(), seconds, values)
        return grown, min(seconds, self.age)

    def mount_steps(self, count: int) -> list[list[int]]:
        """What the mount did in each of the last ``count`` seconds, as ``flow``."""
        steps = self._mount.steps(self._now(), count, self._totals(None))
        return [step[:FLOW] for step in steps]

    def _totals(self, sums: "array[int] | None") -> Sequence[int]:
        """What is sampled of the mount; ``sums`` if they are known already."""
        if sums is None:
            sums = array("q", flow(self._state.counters.forgotten))
            for image in self._images.counted():
                for at, value in enumerate(flow(image.counters)):
                    sums[at] += value
        totals = list(sums)
        for histogram in self._state.counters.latency.calls:
            totals.extend(histogram.counts)
        return totals
