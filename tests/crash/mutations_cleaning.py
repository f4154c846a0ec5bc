"""Clauses of R5, by which dirty pages become clean, each broken alone. See ``mutation``."""

from typing import Any

import trio

from fusecache.core.dirty import DirtyPages, Writeback
from fusecache.core.rows import U32
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.committer import Committer
from fusecache.engine.dirty_writes import Part
from fusecache.engine.lasting import Lasting
from fusecache.engine.ownership import Ownership
from fusecache.engine.writes import Writes
from fusecache.errors import OriginError
from tests.crash.mutation import mutation, patch, together


def _without_next_barrier(owner: Any, name: str) -> Any:
    """What is called right before a barrier makes that one do nothing."""
    original, barrier = getattr(owner, name), Committer.barrier
    skip: list[None] = []

    def call(self: Any, *args: Any) -> Any:
        skip[:] = [None]
        return original(self, *args)

    async def maybe(self: Committer) -> None:
        if skip:
            skip.clear()
        else:
            await barrier(self)

    return together(patch(owner, name, call), patch(Committer, "barrier", maybe))


@mutation
def r5_settled_before_the_rows_are_stable() -> Any:
    return _without_next_barrier(DirtyPages, "cleaned")


@mutation
def r5_clean_without_a_sync_of_the_origin() -> Any:
    write_runs, sync_origin = Cleaner._write_runs, Lasting.sync
    skip: list[None] = []

    async def runs(self: Cleaner, *args: Any, **kwargs: Any) -> None:
        await write_runs(self, *args, **kwargs)
        skip[:] = [None]

    async def sync(self: Lasting, image: Any, **kwargs: Any) -> None:
        if skip:
            skip.clear()
        else:
            await sync_origin(self, image, **kwargs)

    return together(patch(Cleaner, "_write_runs", runs), patch(Lasting, "sync", sync))


def _keeps_cleaning(name: str) -> Any:
    original = getattr(DirtyPages, name)

    def call(self: DirtyPages, *args: Any) -> Any:
        cleaning = self._slots.cleaning_of.copy()
        result = original(self, *args)
        self._slots.cleaning_of[:] = cleaning
        return result

    return patch(DirtyPages, name, call)


@mutation
def r5_clean_although_overwritten_meanwhile() -> Any:
    return _keeps_cleaning("overwrite")


@mutation
def r5_clean_although_written_slowly_meanwhile() -> Any:
    return _keeps_cleaning("soil")


@mutation
def r5_a_slot_is_taken_while_it_is_written_to() -> Any:
    original = DirtyPages.begin_writeback

    def begin(self: DirtyPages, wanted: Any) -> int:
        pins = self._slots.pins[wanted.slot]
        self._slots.pins[wanted.slot] = 0
        pages = original(self, wanted)
        self._slots.pins[wanted.slot] = pins
        return pages

    return patch(DirtyPages, "begin_writeback", begin)


@mutation
def r5_a_slot_is_overwritten_whose_rows_are_not_committed() -> Any:
    original = DirtyPages.overwrite

    def overwrite(self: DirtyPages, image: int, offset: int, length: int) -> Any:
        pins = self._slots.pins_of.copy()
        self._slots.pins_of[:] = 0
        runs = original(self, image, offset, length)
        self._slots.pins_of[:] = pins
        return runs

    return patch(DirtyPages, "overwrite", overwrite)


@mutation
def r5_a_slot_that_went_to_another_image_is_written_back_for_the_first() -> Any:
    original = DirtyPages.snapshot

    def snapshot(self: DirtyPages, image: int, slots: U32) -> list[Writeback]:
        holders = {self._slots.image[slot] for slot in slots.tolist()}
        noted = [item for holder in holders for item in original(self, holder, slots)]
        return sorted(noted, key=lambda item: item.block)

    return patch(DirtyPages, "snapshot", snapshot)


@mutation
def r5_the_row_of_a_cleaned_page_is_not_owed() -> Any:
    original = DirtyPages.cleaned

    def cleaned(self: DirtyPages, slot: int) -> int:
        owe, self._owe = self._owe, lambda slot: None
        pages = original(self, slot)
        self._owe = owe
        return pages

    return patch(DirtyPages, "cleaned", cleaned)


@mutation
def r5_settling_pages_are_written_through() -> Any:
    def held(self: DirtyPages, image: int, block: int) -> int:
        return self.mask(image, block)

    return patch(DirtyPages, "held", held)


@mutation
def r5_held_pages_go_past_the_cache_after_a_change_of_mode() -> Any:
    original = Writes._kept_parts

    def kept(self: Writes, image: Any, parts: list[Part]) -> list[Part]:
        return original(self, image, parts) if image.write_mode.value == "back" else []

    return patch(Writes, "_kept_parts", kept)


@mutation
def r5_held_pages_go_past_the_cache_at_the_limit() -> Any:
    original = Writes._kept_parts

    def kept(self: Writes, image: Any, parts: list[Part]) -> list[Part]:
        full = self._core.dirty.blocks >= self._most_dirty
        return [] if full else original(self, image, parts)

    return patch(Writes, "_kept_parts", kept)


@mutation
def r5_a_failed_sync_in_between_is_ignored() -> Any:
    original = Lasting.sync

    async def sync(self: Lasting, image: Any, **kwargs: Any) -> None:
        try:
            await original(self, image, **kwargs)
        except OriginError:
            image.failed_syncs -= 1
            raise

    return patch(Lasting, "sync", sync)


@mutation
def r5_a_failed_writeback_leaves_its_pages_taken() -> Any:
    return patch(DirtyPages, "kept", lambda self, slot: None)


@mutation
def r5_a_failed_writeback_makes_clean() -> Any:
    def kept(self: DirtyPages, slot: int) -> None:
        self.cleaned(slot)
        self.settled(slot)

    return patch(DirtyPages, "kept", kept)


@mutation
def r5_an_origin_sync_covers_what_came_during_it() -> Any:
    original = Lasting.sync

    async def sync(self: Lasting, image: Any, **kwargs: Any) -> None:
        await original(self, image, **kwargs)
        image.synced = image.written

    return patch(Lasting, "sync", sync)


@mutation
def p8_the_lock_is_given_up_while_pages_settle() -> Any:
    return patch(DirtyPages, "holds", lambda self, image: self.pages(image) > 0)


@mutation
def p8_the_lock_is_given_up_before_the_record_says_so() -> Any:
    original = Ownership.release

    async def release(self: Ownership, image: Any) -> None:
        if not image.writers and not self._core.dirty.holds(image.id):
            await self.unlock(image)
        await trio.sleep(0.1)
        await original(self, image)

    return patch(Ownership, "release", release)
