"""The one table of legal steps."""

import itertools

import pytest

from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from fusecache.core.states import TABLE, Event, State, step
from fusecache.errors import IllegalStep

LEGAL = {
    ("INVALID", "RESERVE"): "RESERVED",
    ("RESERVED", "STORE"): "VALID",
    ("RESERVED", "ABORT"): "INVALID",
    ("VALID", "STORE"): "VALID",
    ("VALID", "DROP"): "INVALID",
    ("RESERVED", "SOIL"): "DIRTY",
    ("VALID", "SOIL"): "DIRTY",
    ("VALID", "DISCARD"): "INVALID",
    ("DIRTY", "STORE"): "DIRTY",
    ("DIRTY", "SOIL"): "DIRTY",
    ("DIRTY", "WRITE_BACK"): "WRITEBACK",
    ("DIRTY", "SETTLE"): "VALID",
    ("DIRTY", "DISCARD"): "INVALID",
    ("WRITEBACK", "STORE"): "WRITEBACK",
    ("WRITEBACK", "SOIL"): "WRITEBACK",
    ("WRITEBACK", "SETTLE"): "VALID",
    ("WRITEBACK", "KEEP"): "DIRTY",
    ("WRITEBACK", "DISCARD"): "INVALID",
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_step_is_in_the_table_or_raises(state: State, event: Event) -> None:
    expected = LEGAL.get((state.name, event.name))
    if expected is None:
        with pytest.raises(IllegalStep, match=f"{state.name} cannot {event.name}"):
            step(int(state), event)
    else:
        assert step(int(state), event) is State[expected]


def test_states_keep_their_numbers_because_they_fit_one_byte() -> None:
    assert [int(state) for state in State] == [0, 1, 2, 3, 4]
    assert len(TABLE) == len(LEGAL)


def test_an_illegal_step_raises_and_changes_nothing() -> None:
    index = CacheIndex(Geometry.of(16384), 4)
    slot = index.begin_store(1, 0)
    assert slot is not None
    index.stored(slot, 0b0011)
    index.drop(1, index.slots_of(1), dirty=True)
    before = _everything(index)
    for idle in range(4):
        with pytest.raises(IllegalStep):
            index.stored(idle, 0b1111)
        assert _everything(index) == before
    index.check()


def _everything(index: CacheIndex) -> list[bytes]:
    slots = index._slots
    arrays = [getattr(slots, name) for name in slots.__slots__ if name.endswith("_of")]
    arrays += [index._tags.table_of, index.gates.clock_of]
    counts = (index.free, index.leaving, index.used, index.owes, index.usage(1))
    return [array.tobytes() for array in arrays] + [repr(counts).encode()]
