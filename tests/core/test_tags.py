"""TagIndex against a dict, at any density and with tags that collide."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusecache.core.slots import SlotTable
from fusecache.core.tags import TagIndex

SLOTS = 24


def home(index: TagIndex, image: int, block: int) -> int:
    """Where the index would like to put a tag."""
    return index._home(image, block)


def colliding(count: int) -> list[tuple[int, int]]:
    """Tags whose homes are the last two places of the table, so that they wrap around."""
    index = TagIndex(SlotTable(SLOTS))
    last = index.table_of.size - 1
    tags = ((image, block) for block in range(100_000) for image in (1, 2))
    found = []
    for tag in tags:
        if home(index, *tag) >= last - 1:
            found.append(tag)
            if len(found) == count:
                break
    return found


COLLIDING = colliding(40)
TAGS = st.one_of(
    st.sampled_from(COLLIDING),
    st.tuples(st.integers(1, 3), st.integers(0, 40)),
    st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)),
)


class TagIndexAgainstADict(RuleBasedStateMachine):
    """Any mixture of insert and remove leaves exactly the tags of a dict to be found."""

    @initialize()
    def begin(self) -> None:
        self.slots = SlotTable(SLOTS)
        self.index = TagIndex(self.slots)
        self.model: dict[tuple[int, int], int] = {}
        self.ever: set[tuple[int, int]] = {(0, 0)}

    def spare(self) -> list[int]:
        return sorted(set(range(SLOTS)) - set(self.model.values()))

    def set_tag(self, slot: int, tag: tuple[int, int]) -> None:
        self.slots.image[slot], self.slots.block[slot] = tag
        self.model[tag] = slot
        self.ever.add(tag)

    @precondition(lambda self: len(self.model) < SLOTS)
    @rule(tag=TAGS, data=st.data())
    def insert(self, tag: tuple[int, int], data: st.DataObject) -> None:
        if tag not in self.model:
            slot = data.draw(st.sampled_from(self.spare()))
            self.set_tag(slot, tag)
            self.index.insert(slot)

    @precondition(lambda self: len(self.model) < SLOTS)
    @rule(tags=st.lists(TAGS, unique=True, max_size=SLOTS))
    def insert_many(self, tags: list[tuple[int, int]]) -> None:
        new = [tag for tag in tags if tag not in self.model]
        slots = self.spare()[: len(new)]
        for slot, tag in zip(slots, new, strict=False):
            self.set_tag(slot, tag)
        self.index.insert_many(np.array(slots, np.uint32))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.model)))
        self.index.remove(self.model.pop(tag))

    @invariant()
    def finds_what_the_dict_has(self) -> None:
        for tag in self.ever:
            assert self.index.find(*tag) == self.model.get(tag)
        assert int(np.count_nonzero(self.index.table_of)) == len(self.model)


TestTagIndexAgainstADict = TagIndexAgainstADict.TestCase
TestTagIndexAgainstADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["dense", "sparse", "images", "strided"]), st.integers(1, 5000), st.booleans()
)
def test_a_full_table_finds_every_tag_and_no_other(kind: str, count: int, many: bool) -> None:
    slots = SlotTable(count)
    index = TagIndex(slots)
    numbers = np.arange(count, dtype=np.uint32)
    blocks = {"sparse": numbers * np.uint32(40_503), "strided": numbers * np.uint32(64)}
    slots.block_of[:] = blocks.get(kind, numbers)
    slots.image_of[:] = numbers % 50 if kind == "images" else 7
    if many:
        index.insert_many(numbers)
    else:
        for slot in range(count):
            index.insert(slot)
    for slot in range(count):
        tag = slots.image[slot], slots.block[slot]
        assert index.find(*tag) == slot
        assert index.find(tag[0] + 1000, tag[1]) is None
    for slot in range(0, count, 2):
        index.remove(slot)
    for slot in range(count):
        expected = None if slot % 2 == 0 else slot
        assert index.find(slots.image[slot], slots.block[slot]) == expected


def test_look_ups_stay_short_when_the_table_is_full() -> None:
    count = 98_303  # the highest load: 3/4 of 2^17 less one
    for strides in (1, 16, 4096):
        slots = SlotTable(count)
        index = TagIndex(slots)
        numbers = np.arange(count, dtype=np.uint32)
        slots.image_of[:] = 1 + numbers % 50
        slots.block_of[:] = numbers // 50 * np.uint32(strides)
        index.insert_many(numbers)
        place = np.empty(count, np.int64)
        used = np.flatnonzero(index.table_of)
        place[index.table_of[used] - 1] = used
        homes = [home(index, slots.image[slot], slots.block[slot]) for slot in range(count)]
        distance = (place - np.array(homes)) % index.table_of.size
        assert distance.mean() < 16, f"stride {strides}: {distance.mean()}"
