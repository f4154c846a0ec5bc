"""Clauses that ranges which guests free live by, each broken alone."""

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

from fusecache.engine.holes import Holes
from fusecache.engine.locks import END
from tests.crash.mutation import mutation, nothing, patch


class _Without:
    """Another one, but for some of its methods."""

    def __init__(self, other: Any, **methods: Any) -> None:
        self._other = other
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def _built(name: str, methods: Callable[[Any], dict[str, Any]]) -> Any:
    """A patch of what ``Holes`` has by a name, made anew for each one: a patch that came and went
    with a call would stay for ever if two of them overlapped."""
    original = Holes.__init__

    def init(self: Holes, *args: Any) -> None:
        original(self, *args)
        other = getattr(self, name)
        setattr(self, name, _Without(other, **methods(other)))

    return patch(Holes, "__init__", init)


@mutation
def r4_a_hole_has_no_intent() -> Any:
    @asynccontextmanager
    async def writing(image: Any, regions: Any) -> Any:
        yield

    return _built("_intents", lambda intents: {"writing": writing})


@mutation
def r5_the_rows_of_a_hole_are_not_stable() -> Any:
    return _built("_committer", lambda committer: {"barrier": committer.commit_owed})


@mutation
def r5_a_hole_is_not_synced_before_its_rows() -> Any:
    return _built("_lasting", lambda lasting: {"sync": nothing})


@mutation
def r5_a_hole_does_not_wait_for_a_writeback() -> Any:
    async def in_turn(self: Holes, piece: Any) -> Any:
        await self._free_held(piece.image, [piece])
        if piece.error is not None:
            raise piece.error
        return piece.hole

    return patch(Holes, "_in_turn", in_turn)


@mutation
def r5_a_hole_leaves_what_is_dirty() -> Any:
    def look(self: Holes, image: Any, hole: Any, stop: int) -> None:
        for block, start, end in self._geometry.split(hole.begin, stop - hole.begin):
            hole.cached.append((block, self._geometry.touched(start, end)))

    return patch(Holes, "_look_at_pages", look)


@mutation
def r5_a_hole_takes_the_rest_of_a_dirty_page_along() -> Any:
    return patch(Holes, "_held_at", lambda self, image, offset: 0)


@mutation
def a_hole_leaves_the_pages_valid() -> Any:
    original = Holes._look

    def look(self: Holes, piece: Any) -> Any:
        hole = original(self, piece)
        hole.cached.clear()
        return hole

    return patch(Holes, "_look", look)


@mutation
def a_hole_excludes_nobody() -> Any:
    original = Holes._piece

    def piece(self: Holes, *args: Any) -> Any:
        made = original(self, *args)
        made.first = made.last = END
        return made

    return patch(Holes, "_piece", piece)


@mutation
def a_hole_past_a_broken_cache_leaves_out_the_slot() -> Any:
    return _built("_degraded", lambda degraded: {"write": nothing})


@mutation
def r5_a_failed_sync_before_that_of_a_hole_is_ignored() -> Any:
    async def sync(self: Holes, image: Any, failed_syncs: int) -> None:
        await self._lasting.sync(image)

    return patch(Holes, "_sync", sync)
