"""DirtyPages through CacheIndex: against a plain dict, step by step; then sentence by sentence."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusecache.core.dirty import PERIOD, Writeback
from fusecache.core.geometry import Geometry, Run
from fusecache.core.index import CacheIndex
from fusecache.core.rows import U16, U32, Rows
from fusecache.core.slots import NO_SLOT
from fusecache.errors import IllegalStep

GEOMETRY = Geometry.of(16384)
PAGE = GEOMETRY.page_size
SLOTS = 6
FULL = 0b1111
Tag = tuple[int, int]
IMAGES = st.integers(1, 2)
TAGS = st.tuples(IMAGES, st.integers(0, 2))
MASKS = st.integers(1, FULL)


@dataclass
class Block:
    """What a slot holds, as a model of it."""

    slot: int
    valid: int = 0
    dirty: int = 0
    taken: int = 0
    """By a writeback, and not written again since; after ``cleaned`` they are settling."""
    pins: int = 0
    reserved: bool = True
    writeback: bool = False
    cleaned: bool = False

    @property
    def held(self) -> int:
        return self.dirty | self.taken

    @property
    def plain(self) -> bool:
        """Clean and complete: it may go."""
        return not (self.reserved or self.dirty or self.writeback)


def rows_of(entries: list[tuple[int, int, int, int, int]]) -> Rows:
    """Rows of (image, block, slot, valid, dirty)."""
    columns = [list(column) for column in zip(*entries, strict=True)] or [[]] * 5
    image, block, slot = (np.array(column, np.uint32) for column in columns[:3])
    valid, dirty = (np.array(column, np.uint16) for column in columns[3:])
    return Rows(image, block, slot, valid, dirty)


def replay(rows: Rows, into: dict[Tag, tuple[int, int, int]]) -> None:
    """What the database makes of rows: a later one wins."""
    for image, block, slot, valid, dirty in zip(*(c.tolist() for c in rows), strict=True):
        if slot == NO_SLOT:
            into.pop((image, block), None)
        else:
            assert valid | dirty
            into[image, block] = (slot, valid, dirty)


def loaded(database: dict[Tag, tuple[int, int, int]], slots: int = SLOTS) -> CacheIndex:
    """What the next start makes of the database."""
    index = CacheIndex(GEOMETRY, slots)
    index.load(rows_of([(*tag, *row) for tag, row in database.items()]))
    index.finish_load(iter([]))
    return index


class DirtyPagesAgainstADict(RuleBasedStateMachine):
    """What is dirty, held, lost and owed is always what a dict of masks says."""

    @initialize()
    def begin(self) -> None:
        self.index = CacheIndex(GEOMETRY, SLOTS)
        self.blocks: dict[Tag, Block] = {}
        self.noted: dict[Tag, Writeback] = {}
        self.unsynced: dict[int, int] = {}
        self.syncing: tuple[tuple[U32, U16], dict[int, int]] | None = None
        self.retired: set[int] = set()
        self.leaving: set[int] = set()
        self.taken: Rows | None = None
        self.database: dict[Tag, tuple[int, int, int]] = {}

    # -- the model's own steps ---------------------------------------------------------------------

    def gone(self, tag: Tag) -> None:
        self.leaving.add(self.blocks.pop(tag).slot)
        self.noted.pop(tag, None)

    def cleared(self, tag: Tag, pages: int) -> None:
        block = self.blocks[tag]
        block.valid &= ~(pages & ~block.held)
        self.perhaps_gone(tag)

    def perhaps_gone(self, tag: Tag) -> None:
        block = self.blocks[tag]
        if block.plain and not block.valid and not block.pins:
            self.gone(tag)

    def wrote(self, block: Block, pages: int) -> None:
        self.unsynced[block.slot] = self.unsynced.get(block.slot, 0) | pages

    def lost(self, slot: int, pages: int) -> int:
        for block in self.blocks.values():
            if block.slot == slot:
                pages &= block.dirty & block.valid
                block.valid &= ~pages
                block.taken &= ~pages
                return pages.bit_count()
        return 0

    def draw(self, data: st.DataObject, **wanted: bool) -> Tag | None:
        """A tag whose block is so."""
        found = [
            tag
            for tag, block in sorted(self.blocks.items())
            if all(bool(getattr(block, name)) is so for name, so in wanted.items())
        ]
        return data.draw(st.sampled_from(found)) if found else None

    # -- becoming dirty ----------------------------------------------------------------------------

    @rule(tag=TAGS)
    def pin(self, tag: Tag) -> None:
        if tag in self.blocks and self.blocks[tag].pins > 1:
            return
        slot = self.index.begin_store(*tag)
        if tag not in self.blocks:
            if slot is None:
                assert not self.index.free
                return
            assert slot not in self.leaving | self.retired
            assert slot not in {block.slot for block in self.blocks.values()}
            self.blocks[tag] = Block(slot)
        block = self.blocks[tag]
        assert slot == block.slot
        block.pins += 1

    @rule(data=st.data(), pages=MASKS)
    def write(self, data: st.DataObject, pages: int) -> None:
        """As a write does: what is valid is soiled ahead of its data, the rest stored after."""
        tag = self.draw(data, pins=True)
        if tag is None:
            return
        block = self.blocks[tag]
        before, after = pages & block.valid, pages & ~block.valid
        if before:
            self.index.dirty.soil(block.slot, before)
        if after:
            self.index.stored_dirty(block.slot, after)
        block.valid |= pages
        block.dirty |= pages
        block.taken &= ~pages
        block.reserved = False
        self.wrote(block, pages)

    @rule(data=st.data(), pages=MASKS)
    def write_whole(self, data: st.DataObject, pages: int) -> None:
        """A write with its pin, so that blocks often are dirty and not pinned."""
        self.pin((1 + pages % 2, pages % 3))
        self.write(data, pages)
        self.unpin(data)

    @rule(data=st.data(), pages=MASKS)
    def stored(self, data: st.DataObject, pages: int) -> None:
        """A fill, which never stores over what is held."""
        tag = self.draw(data, pins=True)
        if tag is None or not pages & ~self.blocks[tag].held:
            return
        block = self.blocks[tag]
        pages &= ~block.held
        self.index.stored(block.slot, pages)
        block.pins -= 1
        if block.slot not in self.retired:
            block.valid |= pages
            block.reserved = False
        self.perhaps_gone(tag)

    @rule(data=st.data(), tag=TAGS, pages=MASKS)
    def fill(self, data: st.DataObject, tag: Tag, pages: int) -> None:
        self.pin(tag)
        self.stored(data, pages)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        tag = self.draw(data, pins=True)
        if tag is not None:
            self.index.unpin(self.blocks[tag].slot)
            self.unpinned(tag, 0)

    @rule(data=st.data(), spoiled=st.integers(0, FULL))
    def not_stored(self, data: st.DataObject, spoiled: int) -> None:
        tag = self.draw(data, pins=True)
        if tag is not None:
            self.index.not_stored(self.blocks[tag].slot, spoiled)
            self.unpinned(tag, spoiled)

    def unpinned(self, tag: Tag, spoiled: int) -> None:
        block = self.blocks[tag]
        block.pins -= 1
        if block.reserved:
            if not block.pins:
                del self.blocks[tag]  # never had a row: free at once
        else:
            self.cleared(tag, spoiled)

    @rule(
        image=IMAGES,
        page=st.integers(0, 11),
        start=st.sampled_from([0, 0, 512]),
        length=st.sampled_from([512, 512, PAGE, PAGE, 2 * PAGE, 5 * PAGE]),
    )
    def overwrite(self, image: int, page: int, start: int, length: int) -> None:
        offset = page * PAGE + start
        spans = list(GEOMETRY.split(offset, length))
        touched = {(image, n): GEOMETRY.touched(first, last) for n, first, last in spans}
        allowed = all(
            tag in self.blocks
            and not self.blocks[tag].pins
            and not pages & ~(self.blocks[tag].dirty & self.blocks[tag].valid)
            for tag, pages in touched.items()
        )
        runs = self.index.dirty.overwrite(image, offset, length)
        assert (runs is not None) == allowed
        if runs is None:
            return
        shift = GEOMETRY.block_shift
        assert runs == [
            Run((self.blocks[image, n].slot << shift) + first, last - first)
            for n, first, last in spans
        ]
        for tag, pages in touched.items():
            self.blocks[tag].taken &= ~pages
            self.wrote(self.blocks[tag], pages)

    # -- going back --------------------------------------------------------------------------------

    @rule(image=IMAGES)
    def snapshot(self, image: int) -> None:
        dirty = self.index.dirty
        for noted in dirty.snapshot(image, dirty.due(image, SLOTS)):
            tag = (image, noted.block)
            block = self.blocks[tag]
            assert block.dirty and not block.writeback and noted.slot == block.slot
            assert noted.pages == block.dirty & block.valid
            self.noted[tag] = noted

    @precondition(lambda self: self.noted)
    @rule(data=st.data(), before=st.sampled_from(["", "", "pin", "lose", "write"]), pages=MASKS)
    def begin_writeback(self, data: st.DataObject, before: str, pages: int) -> None:
        """Much may happen between the snapshot and the time it is stable."""
        if before == "pin":
            self.pin(data.draw(st.sampled_from(sorted(self.noted))))
        elif before == "lose":
            self.lose(data, pages)
        elif before == "write":
            self.write_whole(data, pages)
        tag = data.draw(st.sampled_from(sorted(self.noted)))
        noted, block = self.noted.pop(tag), self.blocks[tag]
        expected = noted.pages & block.dirty & block.valid
        if block.pins or block.writeback:
            expected = 0
        assert self.index.dirty.begin_writeback(noted) == expected
        if expected:
            block.writeback, block.cleaned, block.taken = True, False, expected

    @rule(data=st.data(), pages=MASKS)
    def keep_pages(self, data: st.DataObject, pages: int) -> None:
        tag = self.draw(data, writeback=True, cleaned=False)
        if tag is not None:
            self.index.dirty.keep_pages(self.blocks[tag].slot, pages)
            self.blocks[tag].taken &= ~pages

    @rule(data=st.data())
    def cleaned(self, data: st.DataObject) -> None:
        tag = self.draw(data, writeback=True, cleaned=False)
        if tag is not None:
            block = self.blocks[tag]
            assert self.index.dirty.cleaned(block.slot) == block.taken & block.dirty
            block.dirty &= ~block.taken
            block.cleaned = True

    @rule(data=st.data())
    def settled(self, data: st.DataObject) -> None:
        tag = self.draw(data, writeback=True, cleaned=True)
        if tag is not None:
            self.index.dirty.settled(self.blocks[tag].slot)
            self.ended(self.blocks[tag])

    @rule(data=st.data())
    def kept(self, data: st.DataObject) -> None:
        tag = self.draw(data, writeback=True, cleaned=False)
        if tag is not None:
            self.index.dirty.kept(self.blocks[tag].slot)
            self.ended(self.blocks[tag])

    def ended(self, block: Block) -> None:
        block.taken, block.writeback, block.cleaned = 0, False, False

    # -- being lost --------------------------------------------------------------------------------

    @rule(data=st.data(), pages=MASKS)
    def lose(self, data: st.DataObject, pages: int) -> None:
        tag = self.draw(data, dirty=True)
        if tag is not None:
            slot = self.blocks[tag].slot
            assert self.index.dirty.lose(slot, pages) == self.lost(slot, pages)

    @rule(data=st.data(), pages=MASKS)
    def rewritten(self, data: st.DataObject, pages: int) -> None:
        tag = self.draw(data, dirty=True)
        if tag is not None:
            self.index.rewritten(self.blocks[tag].slot, pages)
            self.blocks[tag].valid |= pages & self.blocks[tag].dirty

    @precondition(lambda self: self.syncing is None)
    @rule()
    def sync_begins(self) -> None:
        began = self.index.dirty.sync_begins()
        self.syncing, self.unsynced = (began, self.unsynced), self.on_their_way()
        assert dict(zip(began.slots.tolist(), began.pages.tolist(), strict=True)) == self.syncing[1]

    @precondition(lambda self: self.syncing is not None)
    @rule()
    def sync_worked(self) -> None:
        self.syncing = None

    @precondition(lambda self: self.syncing is not None)
    @rule()
    def sync_failed(self) -> None:
        assert self.syncing is not None
        began, before = self.syncing
        expected = sum(
            self.lost(slot, pages)
            for masks in (before, self.unsynced)
            for slot, pages in masks.items()
        )
        assert self.index.dirty.sync_failed(began) == expected
        self.syncing, self.unsynced = None, self.on_their_way()

    def on_their_way(self) -> dict[int, int]:
        """What stays unsynced when a sync begins: somebody may be writing there."""
        pinned = {block.slot for block in self.blocks.values() if block.pins}
        return {slot: pages for slot, pages in self.unsynced.items() if slot in pinned}

    # -- leaving -----------------------------------------------------------------------------------

    @rule(tag=TAGS, pages=MASKS)
    def clear(self, tag: Tag, pages: int) -> None:
        self.index.clear(*tag, pages)
        if tag in self.blocks and not self.blocks[tag].reserved:
            self.cleared(tag, pages)

    @rule(tag=TAGS, pages=MASKS)
    def supersede(self, tag: Tag, pages: int) -> None:
        """For a caller who sees to it that there is no writeback."""
        if tag not in self.blocks or self.blocks[tag].writeback or self.blocks[tag].reserved:
            return
        self.index.supersede(*tag, pages)
        self.noted.pop(tag, None)
        self.blocks[tag].dirty &= ~pages
        self.cleared(tag, pages)

    @rule(count=st.integers(0, 3))
    def reclaim(self, count: int) -> None:
        able = [tag for tag, block in self.blocks.items() if block.plain and not block.pins]
        assert self.index.reclaim(count) == min(count, len(able))
        left = [tag for tag in able if self.index.locate(*tag) is not None]
        assert len(left) == max(0, len(able) - count)
        for tag in set(able) - set(left):
            self.gone(tag)

    @precondition(lambda self: len(self.blocks) > 2)
    @rule(image=IMAGES, first=st.integers(0, 2), dirty=st.booleans())
    def drop(self, image: int, first: int, dirty: bool) -> None:
        mine = [tag for tag in self.blocks if tag[0] == image and tag[1] >= first]
        if dirty and any(self.blocks[tag].pins for tag in mine):
            return  # the caller excludes other work on the image
        self.index.drop(image, self.index.slots_of(image, first), dirty=dirty)
        for tag in mine:
            if dirty:
                self.gone(tag)
            elif not self.blocks[tag].reserved:
                self.cleared(tag, FULL)

    @precondition(lambda self: len(self.retired) < 2)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        tag = self.draw(data, reserved=False)
        if tag is not None:
            slot = self.blocks[tag].slot
            self.index.retire(slot)
            self.retired.add(slot)
            self.cleared(tag, FULL)

    # -- rows and slots ----------------------------------------------------------------------------

    @precondition(lambda self: self.taken is None)
    @rule()
    def take_owed(self) -> None:
        self.taken = self.index.take_owed()
        assert not self.index.owes

    @precondition(lambda self: self.taken is not None)
    @rule(failed=st.booleans())
    def commit(self, failed: bool) -> None:
        assert self.taken is not None
        if failed:
            self.index.give_back_owed(self.taken)
        else:
            replay(self.taken, self.database)
        self.taken = None

    @precondition(lambda self: self.taken is None)
    @rule()
    def release(self) -> None:
        leaving = self.index.take_leaving()
        assert sorted(leaving) == sorted(self.leaving)
        replay(self.index.take_owed(), self.database)
        assert not {row[0] for row in self.database.values()} & self.leaving
        self.index.release(leaving)
        self.leaving.clear()

    @precondition(lambda self: self.taken is None and len(self.blocks) > 3)
    @rule()
    def restart(self) -> None:
        """A killed daemon's successor has what the rows say: nothing is pinned or taken."""
        replay(self.index.take_owed(), self.database)
        self.index = loaded(self.database)
        for tag, block in list(self.blocks.items()):
            if block.valid | block.dirty:
                self.blocks[tag] = Block(block.slot, block.valid, block.dirty, reserved=False)
            else:
                del self.blocks[tag]
        self.noted, self.unsynced, self.syncing = {}, {}, None
        self.retired, self.leaving = set(), set()

    # -- looking -----------------------------------------------------------------------------------

    @invariant()
    def index_and_dict_are_the_same(self) -> None:
        index, dirty, none = self.index, self.index.dirty, Block(-1)
        index.check()
        for tag in [(image, block) for image in (1, 2, 3) for block in range(4)]:
            block = self.blocks.get(tag, none)
            assert index.valid_pages(*tag) == block.valid
            assert dirty.mask(*tag) == block.dirty
            assert dirty.held(*tag) == block.held
            assert dirty.lost(*tag) == block.dirty & ~block.valid
        blocks = self.blocks.values()
        assert index.used == len(blocks)
        away = (self.leaving | self.retired) - {block.slot for block in blocks}
        assert index.free == SLOTS - len(blocks) - len(away)
        assert dirty.blocks == sum(bool(block.dirty) for block in blocks)
        assert dirty.in_writeback == sum(block.writeback for block in blocks)
        assert dirty.any_held == any(block.dirty or block.writeback for block in blocks)
        assert dirty.all_pages == sum(block.dirty.bit_count() for block in blocks)

    @invariant()
    def images_and_their_ranges_are_the_same(self) -> None:
        dirty = self.index.dirty
        soiled = {tag[0] for tag, block in self.blocks.items() if block.dirty}
        assert sorted(dirty.images()) == sorted(soiled)
        for image in (1, 2, 3):
            mine = sorted((tag[1], block) for tag, block in self.blocks.items() if tag[0] == image)
            pages = [
                number * 4 + page
                for number, block in mine
                for page in range(4)
                if block.dirty & ~block.valid & 1 << page
            ]
            ranges = self.index.lost_ranges(image)
            assert (image in self.index.dirty.losers()) is bool(ranges)
            assert self.index.dirty.ages().get(image) == self.index.dirty.oldest(image)
            listed = [p for at, size in ranges for p in range(at // PAGE, (at + size) // PAGE)]
            assert listed == pages
            ends = {at + size for at, size in ranges}
            assert not ends & {at for at, _ in ranges}, "neighbours are merged"
            held = [block.slot for _, block in mine if block.dirty or block.writeback]
            assert dirty.slots(image).tolist() == held
            due = [b.slot for _, b in mine if b.dirty & b.valid and not b.writeback]
            assert dirty.due(image, SLOTS).tolist() == due

    @invariant()
    def rows_say_what_is_in_memory_once_nothing_is_owed(self) -> None:
        if self.taken is None and not self.index.owes:
            here = {
                tag: (block.slot, block.valid, block.dirty)
                for tag, block in self.blocks.items()
                if block.valid | block.dirty
            }
            assert self.database == here

    def teardown(self) -> None:
        if hasattr(self, "index"):
            if self.taken is not None:
                self.commit(failed=False)
            self.restart()
            self.index_and_dict_are_the_same()
            self.images_and_their_ranges_are_the_same()


TestDirtyPagesAgainstADict = DirtyPagesAgainstADict.TestCase
TestDirtyPagesAgainstADict.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None
)


# -- sentences -------------------------------------------------------------------------------------


def soiled(index: CacheIndex, image: int, block: int, pages: int) -> int:
    """A write of pages that are not valid; returns the slot."""
    slot = index.begin_store(image, block)
    assert slot is not None
    index.stored_dirty(slot, pages)
    index.unpin(slot)
    return slot


def filled(index: CacheIndex, image: int, block: int, pages: int) -> int:
    """A fill; returns the slot."""
    slot = index.begin_store(image, block)
    assert slot is not None
    index.stored(slot, pages)
    return slot


def written_back(index: CacheIndex, slot: int) -> int:
    """Takes everything dirty of a slot."""
    (noted,) = index.dirty.snapshot(1, np.array([slot], np.uint32))
    return index.dirty.begin_writeback(noted)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_page_written_again_during_a_writeback_stays_dirty(in_place: bool) -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0111)
    assert written_back(index, slot) == 0b0111
    if in_place:
        assert index.dirty.overwrite(1, PAGE, PAGE)
    else:
        assert index.begin_store(1, 0) == slot
        index.dirty.soil(slot, 0b0010)
        index.unpin(slot)
    assert index.dirty.cleaned(slot) == 0b0101
    assert index.dirty.mask(1, 0) == 0b0010
    assert index.dirty.held(1, 0) == 0b0111, "settling pages are held as well"
    index.dirty.settled(slot)
    assert index.dirty.held(1, 0) == 0b0010
    index.check()


def test_a_page_written_while_it_settles_is_dirty_and_owes_a_row() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0001)
    written_back(index, slot)
    index.dirty.cleaned(slot)
    index.take_owed()
    assert index.dirty.overwrite(1, 0, PAGE) is None, "its row comes first"
    assert index.begin_store(1, 0) == slot
    index.dirty.soil(slot, 0b0001)
    index.unpin(slot)
    assert index.take_owed().dirty.tolist() == [0b0001]
    index.dirty.settled(slot)
    assert index.dirty.mask(1, 0) == 0b0001
    index.check()


def test_a_pinned_slot_is_neither_taken_by_a_writeback_nor_overwritten_in_place() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, FULL)
    (noted,) = index.dirty.snapshot(1, np.array([slot], np.uint32))
    index.begin_store(1, 0)
    assert index.dirty.begin_writeback(noted) == 0
    assert index.dirty.overwrite(1, 0, PAGE) is None
    index.unpin(slot)
    assert index.dirty.overwrite(1, 0, PAGE) == [Run(slot << GEOMETRY.block_shift, PAGE)]
    assert index.dirty.begin_writeback(noted) == FULL
    assert index.dirty.begin_writeback(noted) == 0, "it is on its way already"


def test_pages_dirtied_after_the_snapshot_are_not_taken() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0001)
    (noted,) = index.dirty.snapshot(1, np.array([slot], np.uint32))
    soiled(index, 1, 0, 0b0010)
    assert index.dirty.begin_writeback(noted) == 0b0001


@pytest.mark.parametrize(("image", "block"), [(2, 0), (1, 1), (1, 0)])
def test_a_slot_that_went_to_another_block_is_not_written_back_for_the_first(
    image: int, block: int
) -> None:
    """Who chose slots, or noted what is in them, and then waited; also if the block came back."""
    index = CacheIndex(GEOMETRY, 1)
    slot = soiled(index, 1, 0, 0b0011)
    chosen = index.dirty.due(1, SLOTS)
    (noted,) = index.dirty.snapshot(1, chosen)
    index.drop(1, chosen, dirty=True)
    index.release(index.take_leaving())
    assert soiled(index, image, block, 0b0001) == slot
    assert index.dirty.begin_writeback(noted) == 0
    later = index.dirty.snapshot(1, chosen)
    assert [(item.block, item.pages) for item in later] == ([(block, 1)] if image == 1 else [])
    index.check()


def test_pages_lost_after_the_snapshot_are_not_taken() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0011)
    (noted,) = index.dirty.snapshot(1, np.array([slot], np.uint32))
    index.dirty.lose(slot, 0b0001)
    assert index.dirty.begin_writeback(noted) == 0b0010


def test_pages_that_did_not_get_to_the_origin_stay_dirty() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0111)
    assert written_back(index, slot) == 0b0111
    index.dirty.keep_pages(slot, 0b1010)
    assert index.dirty.cleaned(slot) == 0b0101
    index.dirty.settled(slot)
    assert index.dirty.held(1, 0) == 0b0010
    index.check()


def test_a_pinned_block_that_loses_its_last_page_keeps_its_slot_for_what_is_written() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = filled(index, 1, 0, FULL)
    index.begin_store(1, 0)
    index.clear(1, 0, FULL)
    index.stored_dirty(slot, 0b0001)
    index.unpin(slot)
    index.check()
    assert index.valid_pages(1, 0) == index.dirty.mask(1, 0) == 0b0001


def test_a_write_to_a_pinned_slot_is_a_use_of_it() -> None:
    """As it comes to several blocks at once: who was written to last leaves last."""
    index = CacheIndex(GEOMETRY, SLOTS)
    first, second = filled(index, 1, 0, FULL), filled(index, 1, 1, FULL)
    index.begin_store(1, 0)
    index.dirty.soil(first, FULL)
    index.unpin(first)
    assert index._slots.last_used[first] > index._slots.last_used[second]


def test_an_overwrite_of_several_blocks_is_all_or_nothing() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    first, second = soiled(index, 1, 0, FULL), soiled(index, 1, 1, 0b0111)
    assert written_back(index, first) == FULL
    assert index.dirty.overwrite(1, 3 * PAGE, 5 * PAGE) is None
    assert index.dirty.cleaned(first) == FULL, "nothing was taken for written"
    index.dirty.settled(first)
    assert index.dirty.overwrite(1, 4 * PAGE + 512, 512) == [
        Run((second << GEOMETRY.block_shift) + 512, 512)
    ]


@pytest.mark.parametrize("condition", ["dirty", "taken", "settling"])
@pytest.mark.parametrize(
    "leave", ["clear", "reclaim", "drop", "not_stored", "retire", "retire pinned"]
)
def test_held_pages_survive_what_takes_clean_ones(condition: str, leave: str) -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = filled(index, 1, 0, 0b1100)
    soiled(index, 1, 0, 0b0011)
    if condition != "dirty":
        assert written_back(index, slot) == 0b0011
    if condition == "settling":
        assert index.dirty.cleaned(slot) == 0b0011
    if leave == "clear":
        index.clear(1, 0, FULL)
    elif leave == "reclaim":
        assert index.reclaim(SLOTS) == 0
        index.clear(1, 0, 0b1100)
    elif leave == "drop":
        index.drop(1, index.slots_of(1), dirty=False)
    elif leave == "not_stored":
        index.begin_store(1, 0)
        index.not_stored(slot, FULL)
    else:
        if pinned := leave == "retire pinned":
            index.begin_store(1, 0)
        index.retire(slot)
        if pinned:
            index.unpin(slot)
    index.check()
    assert index.valid_pages(1, 0) == index.dirty.held(1, 0) == 0b0011
    assert index.hit(1, 0, 2 * PAGE) is not None
    if condition == "taken":
        index.dirty.kept(slot)
    elif condition == "settling":
        index.dirty.settled(slot)
    index.check()
    assert index.valid_pages(1, 0) == 0b0011


def test_a_dirty_block_that_goes_on_purpose_leaves_no_row_and_frees_its_slot() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slots = [soiled(index, 1, block, FULL) for block in range(3)]
    written_back(index, slots[1])
    written_back(index, slots[2])
    index.dirty.cleaned(slots[2])
    database: dict[Tag, tuple[int, int, int]] = {}
    replay(index.take_owed(), database)
    assert len(database) == 3
    index.drop(1, index.slots_of(1), dirty=True)
    index.check()
    assert not index.dirty.any_held and not index.dirty.images()
    replay(index.take_owed(), database)
    assert not database
    index.release(index.take_leaving())
    assert index.free == SLOTS


def test_what_the_origin_has_newer_goes_page_by_page() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    filled(index, 1, 0, 0b1000)
    soiled(index, 1, 0, 0b0111)
    index.supersede(1, 0, 0b0011)
    index.check()
    assert (index.valid_pages(1, 0), index.dirty.mask(1, 0)) == (0b1100, 0b0100)
    index.supersede(1, 0, 0b1100)
    index.check()
    assert index.used == 0 and index.leaving == 1


# -- lost pages ------------------------------------------------------------------------------------


def test_a_lost_page_keeps_its_slot_and_is_listed_exactly() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    first, second = soiled(index, 1, 0, 0b1100), soiled(index, 1, 1, 0b0011)
    assert index.dirty.lose(first, 0b1001) == 1, "only what is dirty can be lost"
    assert index.dirty.lose(second, 0b0001) == 1
    assert index.lost_ranges(1) == [(3 * PAGE, 2 * PAGE)]
    index.clear(1, 0, FULL)
    assert index.reclaim(SLOTS) == 0
    assert index.hit(1, 3 * PAGE, 512) is None
    assert index.dirty.overwrite(1, 3 * PAGE, PAGE) is None
    assert index.dirty.lose(first, 0b1100) == 1
    assert index.valid_pages(1, 0) == 0 and index.dirty.mask(1, 0) == 0b1100
    assert index.dirty.due(1, SLOTS).tolist() == [second], "nothing of the other can be read"
    index.check()
    database: dict[Tag, tuple[int, int, int]] = {}
    replay(index.take_owed(), database)
    assert database == {(1, 0): (first, 0, 0b1100), (1, 1): (second, 0b0010, 0b0011)}
    again = loaded(database)
    again.check()
    assert again.lost_ranges(1) == [(2 * PAGE, 3 * PAGE)]


def test_a_lost_page_that_is_written_whole_is_only_dirty_again() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0011)
    index.dirty.lose(slot, 0b0011)
    soiled(index, 1, 0, 0b0001)
    assert index.lost_ranges(1) == [(PAGE, PAGE)]
    index.rewritten(slot, FULL)
    assert index.lost_ranges(1) == []
    assert index.dirty.pages(1) == 2 and index.valid_pages(1, 0) == 0b0011
    index.check()


def test_a_page_lost_on_its_way_to_the_origin_is_not_made_clean() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0011)
    assert written_back(index, slot) == 0b0011
    index.dirty.lose(slot, 0b0001)
    assert index.dirty.cleaned(slot) == 0b0010
    index.dirty.settled(slot)
    assert index.lost_ranges(1) == [(0, PAGE)]
    index.check()


def test_a_page_lost_on_its_way_to_the_origin_is_listed_at_once() -> None:
    """After a barrier that failed during a writeback its slots stay where they are."""
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = soiled(index, 1, 0, 0b0011)
    written_back(index, slot)
    index.dirty.lose(slot, 0b0001)
    assert index.lost_ranges(1) == [(0, PAGE)]


def test_a_failed_sync_loses_the_dirty_pages_written_since_the_last_good_one() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty = index.dirty
    soiled(index, 1, 0, 0b0011)
    filled(index, 1, 1, FULL)
    dirty.sync_begins()  # a good one
    dirty.overwrite(1, PAGE, 512)
    soiled(index, 1, 2, 0b0001)
    began = dirty.sync_begins()
    soiled(index, 2, 0, 0b1000)  # during the sync
    assert dirty.sync_failed(began) == 3
    assert index.lost_ranges(1) == [(PAGE, PAGE), (2 * GEOMETRY.block_size, PAGE)]
    assert index.lost_ranges(2) == [(3 * PAGE, PAGE)]
    assert index.valid_pages(1, 0) == 0b0001 and index.valid_pages(1, 1) == FULL
    assert dirty.sync_failed(dirty.sync_begins()) == 0
    index.check()


def test_a_page_whose_write_is_under_way_stays_unsynced() -> None:
    """It may reach the device after the sync, and be lost before anybody says that it did."""
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = index.begin_store(1, 0)
    assert slot is not None
    index.stored_dirty(slot, 0b0001)
    soiled(index, 2, 0, 0b0001)
    index.dirty.sync_worked(index.dirty.sync_begins())
    assert index.dirty.sync_failed(index.dirty.sync_begins()) == 1
    assert index.lost_ranges(1) == [(0, PAGE)] and index.lost_ranges(2) == []
    index.unpin(slot)
    index.dirty.sync_worked(index.dirty.sync_begins())
    assert index.dirty.sync_failed(index.dirty.sync_begins()) == 0


# -- ages ------------------------------------------------------------------------------------------


def test_pages_are_due_once_they_are_old_enough_and_not_a_period_later() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty = index.dirty
    dirty.advance(1000.0)
    dirty.advance(1001.9)
    slot = soiled(index, 1, 0, 0b0001)
    due_from = None
    for tenth in range(400):
        dirty.advance(1001.9 + tenth / 10)
        due = dirty.due(1, SLOTS, older_than=30.0).tolist()
        assert (dirty.due_images(30.0) == [1]) == (due == [slot])
        if due and due_from is None:
            due_from = tenth / 10
        assert bool(due) == (due_from is not None), "once due, always due"
    assert due_from is not None and 30.0 <= due_from <= 30.0 + 2 * PERIOD


def test_writing_a_dirty_block_again_makes_it_no_younger() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty = index.dirty
    dirty.advance(0.0)
    slot = soiled(index, 1, 0, 0b0001)
    dirty.advance(40.0)
    soiled(index, 1, 0, 0b0010)
    dirty.overwrite(1, 0, PAGE)
    assert dirty.oldest(1) == 40.0
    assert dirty.due(1, SLOTS, older_than=30.0).tolist() == [slot]
    written_back(index, slot)
    dirty.kept(slot)
    assert dirty.oldest(1) == 40.0, "a writeback that did not happen changes nothing"
    written_back(index, slot)
    dirty.overwrite(1, 0, PAGE)
    dirty.cleaned(slot)
    dirty.settled(slot)
    assert dirty.oldest(1) == 0.0, "what is left was written during the writeback"


def test_the_oldest_blocks_go_first_and_in_the_order_of_their_blocks() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty = index.dirty
    for age, block in enumerate((5, 1, 3, 0)):
        dirty.advance(10.0 * age)
        soiled(index, 1, block, 0b0001)
    soiled(index, 2, 9, 0b0001)
    places = [dirty.place(slot)[0] for slot in dirty.due(1, 3).tolist()]
    assert places == [1, 3, 5]
    assert dirty.due_images(0) == [1, 2]
    assert dirty.due_images(5.0) == [1]
    assert dirty.oldest(3) is None
    assert dirty.ages() == {1: dirty.oldest(1), 2: dirty.oldest(2)}


def test_what_was_loaded_dirty_is_old() -> None:
    index = loaded({(1, 0): (2, 0b0001, 0b0011)})
    index.dirty.advance(5000.0)
    assert index.dirty.lost_ranges(1) == [(PAGE, PAGE)]
    assert index.dirty.due(1, SLOTS).tolist() == [2]
    assert index.dirty.due_images(0) == [1]
    index.dirty.advance(5000.0 + 30.0 + 2 * PERIOD)
    assert index.dirty.due(1, SLOTS, older_than=30.0).tolist() == [2]


def test_ages_of_days_keep_their_order_over_the_end_of_16_bits() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty, now = index.dirty, 0.0
    dirty.advance(now)
    blocks = []
    for block in range(4):
        soiled(index, 1, block, 0b0001)
        blocks.append(block)
        for _ in range(9):
            now += 7200.0  # 18 hours for each block, 72 hours in all
            dirty.advance(now)
            oldest = dirty.oldest(1)
            assert oldest is not None and oldest <= now
            first = dirty.due(1, 1).tolist()
            assert [dirty.place(slot)[0] for slot in first] == [0]
            assert len(dirty.due(1, SLOTS, older_than=3600.0)) == len(blocks)
    young = soiled(index, 2, 0, 0b0001)
    assert dirty.due(2, SLOTS, older_than=30.0).size == 0
    dirty.advance(now + 40.0)
    assert dirty.due(2, SLOTS, older_than=30.0).tolist() == [young]


def test_a_clock_that_jumps_by_weeks_makes_everything_old_and_nothing_else() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    dirty = index.dirty
    dirty.advance(0.0)
    slot = soiled(index, 1, 0, 0b0001)
    dirty.advance(50 * 24 * 3600.0)
    assert dirty.due(1, SLOTS, older_than=3600.0).tolist() == [slot]
    young = soiled(index, 2, 0, 0b0001)
    assert dirty.due_images(30.0) == [1]
    assert dirty.oldest(2) == 0.0
    dirty.advance(50 * 24 * 3600.0 + 60.0)
    assert dirty.due(2, SLOTS, older_than=30.0).tolist() == [young]
    index.check()


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["settled", "kept"])
def test_the_end_of_a_writeback_that_never_began_raises_and_changes_nothing(event: str) -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    slot = filled(index, 1, 0, FULL)
    with pytest.raises(IllegalStep):
        getattr(index.dirty, event)(slot)
    index.check()
    assert index.dirty.in_writeback == 0 and not index.dirty.any_held


def test_a_slot_without_a_block_cannot_become_dirty() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    with pytest.raises(IllegalStep):
        index.dirty.soil(0, 1)
    assert not index.dirty.any_held and not index.owes
    assert index.dirty.sync_begins()[0].size == 0
