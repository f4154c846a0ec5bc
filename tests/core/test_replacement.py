"""Lru is exact: whoever leaves was used longer ago than everybody who stays."""

from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.core.replacement import Lru
from fusecache.core.slots import SlotTable
from fusecache.core.states import State


class Table:
    """A slot table beside an OrderedDict that knows the order of use."""

    def __init__(self, count: int) -> None:
        self.slots = SlotTable(count)
        self.lru = Lru(self.slots)
        self.model: OrderedDict[int, None] = OrderedDict()
        self.pinned: set[int] = set()
        self.tick = 1

    def touch(self, slot: int) -> None:
        """A use; it makes an unused slot VALID."""
        if slot not in self.pinned:
            self.slots.state[slot] = State.VALID
        self.slots.last_used[slot] = self.tick
        self.tick += 1
        self.model[slot] = None
        self.model.move_to_end(slot)

    def pin(self, slot: int) -> None:
        self.slots.pins[slot] = 1
        self.pinned.add(slot)

    def unpin(self, slot: int) -> None:
        """What ends a pin is a use."""
        self.slots.pins[slot] = 0
        self.pinned.discard(slot)
        self.touch(slot)

    def soil(self, slot: int) -> None:
        """Dirty without a use, as by a write that found its pages valid."""
        self.slots.state[slot] = State.DIRTY
        self.pinned.add(slot)

    def give_back(self, slot: int) -> None:
        """Clean or unpinned again, and not used since: it is as old as it was."""
        self.slots.state[slot] = State.VALID
        self.slots.pins[slot] = 0
        self.pinned.discard(slot)
        self.lru.returned(slot)

    def reclaim(self, count: int) -> None:
        """Exactly the oldest unpinned slots leave, the oldest first."""
        expected = [slot for slot in self.model if slot not in self.pinned][:count]
        assert self.lru.victims(count) == expected
        for slot in expected:
            self.slots.state[slot] = State.INVALID
            del self.model[slot]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["touch", "touch", "pin", "unpin", "soil", "give_back", "reclaim"]),
        st.integers(0, 11),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS)
def test_victims_are_exactly_the_least_recently_used(
    operations: list[tuple[str, int]],
) -> None:
    table = Table(12)
    for what, number in operations:
        if what == "touch":
            table.touch(number)
        elif what == "pin" and number in table.model:
            table.pin(number)
        elif what == "soil" and number in table.model and number not in table.pinned:
            table.soil(number)
        elif what == "unpin" and number in table.pinned:
            table.unpin(number)
        elif what == "give_back" and number in table.pinned:
            table.give_back(number)
        elif what == "reclaim":
            table.reclaim(number)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([300, 5000, 70_000]))
def test_victims_stay_exact_over_many_batches(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    table = Table(count)
    for slot in random.permutation(count).tolist():
        table.touch(slot)
    for _ in range(25):
        chosen = random.integers(0, count, 200).tolist()
        oldest = list(table.model)[:400:7]
        for slot in [*chosen[:100], *oldest]:
            if slot in table.model and slot not in table.pinned:
                table.touch(slot)
        for slot in [*chosen[100:120], *list(table.model)[:3]]:
            if slot in table.model:
                table.pin(slot)
        table.reclaim(int(random.integers(1, max(2, count // 20))))
        for place, slot in enumerate(sorted(table.pinned)):
            (table.unpin if place % 2 else table.give_back)(slot)
        for slot in chosen[120:]:
            table.touch(slot)
    table.reclaim(count)
    assert not table.model


def test_a_batch_is_whole_when_it_begins_with_the_candidates_of_an_earlier_sweep() -> None:
    table = Table(2000)
    for slot in range(2000):
        table.touch(slot)
    table.reclaim(6)
    table.reclaim(900)
    assert len(table.model) == 1094


def test_more_slots_that_return_than_are_remembered_leave_in_order_all_the_same() -> None:
    table = Table(20_000)
    for slot in range(20_000):
        table.touch(slot)
    for slot in range(6000):
        table.soil(slot)
    table.reclaim(10)
    for slot in range(6000):
        table.give_back(slot)
    table.reclaim(7000)
    assert next(iter(table.model)) == 7010


def test_slots_that_were_never_used_since_loading_leave_by_number() -> None:
    slots = SlotTable(100_000)
    slots.state_of[:] = State.VALID
    lru = Lru(slots)
    assert lru.victims(10) == list(range(10))
    # A sweep keeps no more candidates than it needs, even when all are equally old.
    assert lru._candidates.nbytes + lru._ticks.nbytes <= 1 * slots.slot_count


def test_nobody_leaves_an_empty_or_pinned_table() -> None:
    table = Table(8)
    table.reclaim(4)
    for slot in range(8):
        table.touch(slot)
        table.pin(slot)
    assert table.lru.victims(4) == []
