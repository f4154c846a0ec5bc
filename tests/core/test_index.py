"""CacheIndex against a plain dict, step by step, and what loading accepts."""

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex, Located
from fusecache.core.rows import Rows
from fusecache.core.slots import NO_SLOT
from fusecache.errors import IllegalStep

GEOMETRY = Geometry.of(16384)
SLOTS = 7
Tag = tuple[int, int]
IMAGES = st.integers(1, 2)
BLOCKS = st.one_of(st.integers(0, 2), st.sampled_from([64, 0xFFFFFFFF]))
TAGS = st.tuples(IMAGES, BLOCKS)
MASKS = st.integers(1, 15)


def columns(rows: list[tuple[int, int, int, int]]) -> Rows:
    """Rows of (image, block, slot, valid)."""
    image, block, slot, valid = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Rows(
        np.array(image, np.uint32),
        np.array(block, np.uint32),
        np.array(slot, np.uint32),
        np.array(valid, np.uint16),
        np.zeros(len(rows), np.uint16),
    )


def replay(rows: Rows, into: dict[Tag, tuple[int, int]]) -> None:
    """What the database makes of rows: a later one wins."""
    assert len({column.size for column in rows}) == 1
    for image, block, slot, valid, dirty in zip(*(c.tolist() for c in rows), strict=True):
        assert dirty == 0
        if slot == NO_SLOT:
            into.pop((image, block), None)
        else:
            assert valid
            into[image, block] = (slot, valid)


def expected_bytes(
    valid: dict[Tag, int], slot_of: dict[Tag, int], image: int, offset: int, length: int
) -> list[int] | None:
    """The place in slot space of every byte, or None if a page is missing."""
    places = []
    size, page = GEOMETRY.block_size, GEOMETRY.page_size
    for at in range(offset, offset + length):
        tag = image, at // size
        if not valid.get(tag, 0) >> (at % size // page) & 1:
            return None
        places.append(slot_of[tag] * size + at % size)
    return places


class IndexAgainstADict(RuleBasedStateMachine):
    """The index is always the same as a dict of valid masks, and the rows it owes say so."""

    @initialize()
    def begin(self) -> None:
        self.index = CacheIndex(GEOMETRY, SLOTS)
        self.valid: dict[Tag, int] = {}
        self.slot_of: dict[Tag, int] = {}
        self.lru: OrderedDict[Tag, None] = OrderedDict()
        self.open: dict[Tag, tuple[int, int]] = {}
        """Being stored: slot and how many pieces."""
        self.hollow: set[Tag] = set()
        self.retired: set[int] = set()
        self.dropped: set[int] = set()
        """Not to be handed out before their release (R3)."""
        self.taken: Rows | None = None
        self.leaving: list[int] | None = None
        self.database: dict[Tag, tuple[int, int]] = {}
        self.generation = 0
        self.located: list[tuple[Located, Tag, int]] = []
        self.lived: dict[Tag, int] = {}
        """Which life of the tag in the cache this is."""
        self.picked: tuple[int, list[int]] | None = None

    # -- the model's own steps --------------------------------------------------------------------

    def used(self, tag: Tag) -> None:
        self.lru[tag] = None
        self.lru.move_to_end(tag)

    def gone(self, tag: Tag) -> None:
        """A block that somebody stores to keeps its slot, hollow, until they are done."""
        del self.valid[tag], self.lru[tag]
        if tag in self.open:
            self.hollow.add(tag)
        else:
            self.dropped.add(self.slot_of.pop(tag))
            del self.lived[tag]

    def done(self, tag: Tag) -> None:
        """The last store to the block ended."""
        if tag in self.hollow:
            self.hollow.remove(tag)
            if tag not in self.valid:
                self.dropped.add(self.slot_of.pop(tag))
                del self.lived[tag]

    def cleared(self, tag: Tag, pages: int) -> None:
        if tag in self.valid:
            if self.valid[tag] & ~pages:
                self.valid[tag] &= ~pages
            else:
                self.gone(tag)

    # -- storing ----------------------------------------------------------------------------------

    @rule(tag=TAGS, pieces=st.integers(1, 2))
    def begin_store(self, tag: Tag, pieces: int) -> None:
        if tag in self.open:
            return
        for _ in range(pieces):
            slot = self.index.begin_store(*tag)
            if tag in self.slot_of:
                assert slot == self.slot_of[tag]
            elif slot is None:
                assert self.index.free == 0
                return
            else:
                assert slot not in self.dropped, "handed out before its release (R3)"
                assert slot not in self.retired
                assert slot not in self.slot_of.values()
                self.slot_of[tag] = slot
                self.generation += 1
                self.lived[tag] = self.generation
        assert slot is not None
        self.open[tag] = (slot, pieces)

    @rule(image=IMAGES, blocks=st.integers(1, 3))
    def fill(self, image: int, blocks: int) -> None:
        for tag in [(image, block) for block in range(blocks)]:
            if tag not in self.open:
                self.begin_store(tag, 1)
            if tag in self.open:
                slot, pieces = self.open[tag]
                for _ in range(pieces):
                    self.index.stored(slot, 15)
                if slot not in self.retired:
                    self.valid[tag] = 15
                    self.used(tag)
                del self.open[tag]
                self.done(tag)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def stored(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.open)))
        slot, pieces = self.open[tag]
        for _ in range(pieces):
            pages = data.draw(MASKS)
            self.index.stored(slot, pages)
            if slot not in self.retired:
                self.valid[tag] = self.valid.get(tag, 0) | pages
                self.used(tag)
        del self.open[tag]
        self.done(tag)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), clear_first=st.booleans())
    def not_stored(self, data: st.DataObject, clear_first: bool) -> None:
        tag = data.draw(st.sampled_from(sorted(self.open)))
        slot, pieces = self.open[tag]
        if clear_first:
            pages = data.draw(MASKS)
            self.index.clear(*tag, pages)
            self.cleared(tag, pages)
        for left in range(pieces - 1, -1, -1):
            spoiled = data.draw(st.sampled_from([0, 0, 1, 8, 15]))
            self.index.not_stored(slot, spoiled)
            if not left:
                del self.open[tag]
            if tag in self.valid:
                self.used(tag)
                self.cleared(tag, spoiled)
        self.done(tag)
        if tag in self.slot_of and tag not in self.valid:  # was only reserved: free at once
            del self.slot_of[tag], self.lived[tag]

    # -- leaving ----------------------------------------------------------------------------------

    @rule(tag=TAGS, pages=MASKS)
    def clear(self, tag: Tag, pages: int) -> None:
        if tag not in self.open:
            self.index.clear(*tag, pages)
            self.cleared(tag, pages)

    @rule(count=st.integers(0, SLOTS))
    def reclaim(self, count: int) -> None:
        expected = [tag for tag in self.lru if tag not in self.open][:count]
        assert self.index.reclaim(count) == len(expected)
        for tag in expected:
            self.gone(tag)

    @precondition(lambda self: self.picked is None)
    @rule(image=IMAGES, from_block=BLOCKS)
    def slots_of(self, image: int, from_block: int) -> None:
        found = self.index.slots_of(image, from_block)
        assert found.dtype == np.uint32
        full = self.valid.keys() | self.hollow
        mine = {self.slot_of[tag] for tag in full if tag[0] == image and tag[1] >= from_block}
        assert sorted(mine) == found.tolist()
        self.picked = image, found.tolist()

    @precondition(lambda self: self.picked is not None)
    @rule()
    def drop(self) -> None:
        assert self.picked is not None
        image, slots = self.picked
        if any(tag[0] == image for tag in self.open):
            return  # the caller excludes other work on the image
        self.picked = None
        self.index.drop(image, np.array(slots, np.uint32), dirty=True)
        for tag in [tag for tag in self.valid if tag[0] == image and self.slot_of[tag] in slots]:
            self.gone(tag)

    @precondition(lambda self: self.valid and len(self.retired) < 3)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.valid)))  # stores in flight or not
        slot = self.slot_of[tag]
        self.index.retire(slot)
        self.gone(tag)
        self.retired.add(slot)

    # -- rows, slots and the barrier ---------------------------------------------------------------

    @precondition(lambda self: self.taken is None)
    @rule()
    def take_owed(self) -> None:
        self.taken = self.index.take_owed()
        assert not self.index.owes
        assert self.index.take_owed().slot.size == 0

    @precondition(lambda self: self.taken is not None)
    @rule()
    def commit_taken(self) -> None:
        assert self.taken is not None
        replay(self.taken, self.database)
        self.taken = None

    @precondition(lambda self: self.taken is not None)
    @rule()
    def give_back_owed(self) -> None:
        assert self.taken is not None
        self.index.give_back_owed(self.taken)
        self.taken = None

    @precondition(lambda self: self.taken is None and self.leaving is None)
    @rule()
    def take_leaving(self) -> None:
        self.leaving = self.index.take_leaving()
        assert self.index.leaving == 0
        replay(self.index.take_owed(), self.database)
        named = {slot for slot, _ in self.database.values()}
        assert not named & set(self.leaving), "a row still names a slot that is to be reused (R3)"

    @precondition(lambda self: self.leaving is not None)
    @rule()
    def give_back_leaving(self) -> None:
        assert self.leaving is not None
        self.index.give_back_leaving(self.leaving)
        self.leaving = None

    @precondition(lambda self: self.leaving is not None)
    @rule()
    def release(self) -> None:
        assert self.leaving is not None
        self.index.release(self.leaving)
        self.dropped -= set(self.leaving)
        self.leaving = None

    # -- looking ----------------------------------------------------------------------------------

    @rule(image=IMAGES)
    def hit_three_blocks(self, image: int) -> None:
        self.look(image, 4095, 2 * GEOMETRY.block_size)

    @rule(
        image=IMAGES,
        page=st.integers(0, 11),
        start=st.sampled_from([0, 0, 1, 4095]),
        length=st.one_of(st.integers(1, 5), st.sampled_from([4096, 4097, 16384, 40_000])),
    )
    def hit(self, image: int, page: int, start: int, length: int) -> None:
        self.look(image, page * GEOMETRY.page_size + start, length)

    def look(self, image: int, offset: int, length: int) -> None:
        runs = self.index.hit(image, offset, length)
        places = expected_bytes(self.valid, self.slot_of, image, offset, length)
        if runs is None or places is None:
            assert runs is None
            assert places is None
            return
        got = [at for run in runs for at in range(run.position, run.position + run.length)]
        assert got == places
        for before, after in itertools.pairwise(runs):
            assert before.position + before.length != after.position, "neighbours are merged"
        for block in GEOMETRY.blocks(offset, length):
            self.used((image, block))

    @rule(tag=TAGS)
    def locate(self, tag: Tag) -> None:
        located = self.index.locate(*tag)
        assert (located is None) == (tag not in self.slot_of)
        if located is not None:
            assert located.slot == self.slot_of[tag]
            assert located.valid == self.valid.get(tag, 0)
            self.located.append((located, tag, self.lived[tag]))
            if tag in self.valid:
                self.used(tag)

    @invariant()
    def unmoved_tells_whether_the_slot_still_holds_the_block(self) -> None:
        for located, tag, life in self.located:
            assert self.index.unmoved(located) == (self.lived.get(tag) == life)

    @invariant()
    def index_and_dict_are_the_same(self) -> None:
        index = self.index
        index.check()
        for tag in itertools.product((1, 2, 3), (0, 1, 2, 3, 64, 0xFFFFFFFF)):
            assert index.valid_pages(*tag) == self.valid.get(tag, 0)
        assert index.used == len(self.slot_of)
        assert index.retired == len(self.retired)
        away = (self.dropped | self.retired) - set(self.slot_of.values())
        assert index.free == SLOTS - len(self.slot_of) - len(away)
        assert index.leaving == len(self.dropped) - len(self.leaving or ())
        for image in (1, 2, 3):
            usage = index.usage(image)
            assert usage.blocks == sum(tag[0] == image for tag in self.slot_of)
            assert usage.pages == sum(
                mask.bit_count() for tag, mask in self.valid.items() if tag[0] == image
            )

    @invariant()
    def rows_say_what_is_in_memory_once_nothing_is_owed(self) -> None:
        if self.taken is None and not self.index.owes:
            here = {tag: (self.slot_of[tag], mask) for tag, mask in self.valid.items()}
            assert self.database == here

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        if self.taken is not None:
            self.commit_taken()
        replay(self.index.take_owed(), self.database)
        self.rows_say_what_is_in_memory_once_nothing_is_owed()
        again = CacheIndex(GEOMETRY, SLOTS)
        again.load(columns([(*tag, *row) for tag, row in self.database.items()]))
        again.finish_load(self.index.order(3))
        again.check()
        assert not again.owes
        assert again.free == SLOTS - len(self.valid)
        for tag in self.valid:
            assert again.valid_pages(*tag) == self.valid[tag]
            assert again.usage(tag[0]).pages == self.index.usage(tag[0]).pages
        for tag in self.lru:
            assert again.reclaim(1) == 1
            assert again.valid_pages(*tag) == 0, "the order of use survives"


TestIndexAgainstADict = IndexAgainstADict.TestCase
TestIndexAgainstADict.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


# -- loading --------------------------------------------------------------------------------------


def test_a_loaded_index_knows_its_blocks_and_fills_the_lowest_free_slots_first() -> None:
    index = CacheIndex(GEOMETRY, 6)
    index.load(columns([(1, 5, 3, 0b1111)]))
    index.load(columns([]))
    index.load(columns([(2, 5, 0, 0b0001), (1, 6, 4, 0b0110)]))
    index.finish_load(iter([]))
    index.check()
    assert [index.begin_store(3, block) for block in range(4)] == [1, 2, 5, None]
    assert index.usage(1) == (2, 6)
    assert index.hit(1, 5 * 16384 + 100, 16384 + 4096) is None
    assert index.hit(1, 5 * 16384, 16384) == [(3 * 16384, 16384)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(1, 1, 2, 1), (1, 2, 2, 1)], "same slot"),
        ([(1, 1, SLOTS, 1)], "beyond the end"),
        ([(1, 1, NO_SLOT, 1)], "beyond the end"),
        ([(1, 1, 2, 0)], "no page"),
        ([(1, 1, 2, 0b10000)], "beyond its block"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_load_refuses_what_cannot_be_and_changes_nothing(
    rows: list[tuple[int, int, int, int]], says: str, first: bool
) -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    if not first:
        index.load(columns([(9, 9, 1, 0b1111)]))
    before = index.used
    with pytest.raises(ValueError, match=says):
        index.load(columns(rows))
    assert index.used == before
    index.finish_load(iter([]))
    index.check()


def test_load_refuses_a_slot_that_an_earlier_part_named() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    index.load(columns([(1, 1, 2, 1)]))
    with pytest.raises(ValueError, match="same slot"):
        index.load(columns([(1, 2, 2, 1)]))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1 << 40)), max_size=4))
def test_any_saved_order_is_only_a_hint(order: list[tuple[int, int]]) -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    index.load(columns([(1, block, block, 1) for block in range(SLOTS)]))
    index.finish_load((first, np.full(5, tick, np.uint64)) for first, tick in order)
    assert index.hit(1, 0, 1) == [(0, 1)]
    assert index.reclaim(SLOTS - 1) == SLOTS - 1
    assert index.valid_pages(1, 0) == 1


def test_a_tick_at_the_end_of_64_bits_does_not_stop_the_clock() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    index.load(columns([(1, 0, 0, 1)]))
    index.finish_load(iter([(0, np.full(SLOTS, 0xFFFFFFFFFFFFFFFF, np.uint64))]))
    assert index.hit(1, 0, 1) == [(0, 1)]
    assert index.hit(1, 0, 1) == [(0, 1)]


# -- corners --------------------------------------------------------------------------------------


def test_a_block_number_beyond_32_bits_is_not_cached_and_costs_no_slot() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    for block in (1 << 32, 1 << 40):
        assert index.begin_store(1, block) is None
        assert index.valid_pages(1, block) == 0
        assert index.hit(1, block * 16384, 100) is None
        assert index.slots_of(1, block).size == 0
    assert index.free == SLOTS
    index.check()


def test_a_slot_that_a_reader_retired_during_a_store_takes_the_store_without_error() -> None:
    index = CacheIndex(GEOMETRY, 2)
    slot = index.begin_store(1, 0)
    assert slot is not None
    index.stored(slot, 0b1111)
    assert index.begin_store(1, 0) == slot
    index.retire(slot)
    index.stored(slot, 0b1111)
    assert index.valid_pages(1, 0) == 0
    index.release(index.take_leaving())
    assert [index.begin_store(1, block) for block in range(2)] == [1 - slot, None]
    index.check()


def test_storing_into_a_slot_that_holds_nothing_is_illegal() -> None:
    index = CacheIndex(GEOMETRY, 2)
    with pytest.raises(IllegalStep):
        index.stored(0, 1)


def test_slots_are_released_in_an_order_that_fills_side_by_side() -> None:
    index = CacheIndex(GEOMETRY, SLOTS)
    for block in range(SLOTS):
        slot = index.begin_store(1, block)
        assert slot is not None
        index.stored(slot, 15)
    index.drop(1, index.slots_of(1), dirty=True)
    assert index.free == 0
    index.release(index.take_leaving())
    assert [index.begin_store(2, block) for block in range(SLOTS)] == list(range(SLOTS))


def test_a_store_that_failed_is_a_use_so_that_the_order_stays_exact() -> None:
    index = CacheIndex(GEOMETRY, 3)
    for block in range(3):
        slot = index.begin_store(1, block)
        assert slot is not None
        index.stored(slot, 15)
    pinned = index.begin_store(1, 0)
    assert pinned is not None
    index.not_stored(pinned, 0)
    for block in (1, 2, 0):
        assert index.reclaim(1) == 1
        assert index.valid_pages(1, block) == 0
