"""Rules that change all the time while guests work: bypassed or not, in whatever mode, cut at any
step, no guest ever sees a wrong byte, and no fsync is broken."""

from pathlib import Path

import pytest
import trio

from fusecache.config import Policy, Rule, WriteMode
from fusecache.engine.block_cache import BlockCache
from tests.crash.simulator import IMAGES, Simulation


class Ruled(Simulation):
    """As the other lives, with an operator who edits the rules and reloads."""

    bypassed = 0
    """Images that were seen bypassed after such a change."""

    async def _work(self, cache: BlockCache) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ruler, cache)
            nursery.start_soon(super()._work, cache)

    async def _nothing(self, cache: BlockCache) -> None:
        self._reload(cache)
        await super()._nothing(cache)

    async def _look(self, cache: BlockCache, *, killed: bool) -> None:
        self._reload(cache)
        await super()._look(cache, killed=killed)

    async def _ruler(self, cache: BlockCache) -> None:
        for _ in range(8):
            self._reload(cache)
            await trio.sleep(self.chance.random() * self.chance.choice([0.3, 3]))
            self.bypassed += sum(image.bypassed for image in cache.images.all())

    def _reload(self, cache: BlockCache) -> None:
        rules = []
        for number in IMAGES:
            kind = self.chance.random()
            if kind < 0.4:
                rules.append(Rule(f"{number}.img", bypass=True))
            elif kind < 0.7:
                rules.append(Rule(f"{number}.*", self.chance.choice(list(WriteMode))))
        cache.apply(self.world.tuning, Policy(self.chance.choice(list(WriteMode)), tuple(rules)))


def _walk(directory: Path, seeds: range) -> int:
    cuts = bypassed = 0
    for seed in seeds:
        place = directory / str(seed)
        place.mkdir()
        lives = Ruled(place, seed)
        try:
            cuts += lives.run(3)
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
        bypassed += lives.bypassed
    assert bypassed > len(seeds), "it must have come to that"
    return cuts


def test_no_cut_shows_a_wrong_byte_while_the_rules_change(tmp_path: Path) -> None:
    assert _walk(tmp_path, range(500_000, 500_016)) > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_cuts_show_no_wrong_byte_while_the_rules_change(
    tmp_path: Path, part: int
) -> None:
    """The same with other seeds, for as long as it takes."""
    seeds = range(510_000 + part * 200, 510_000 + part * 200 + 200)
    assert _walk(tmp_path, seeds) > 400
