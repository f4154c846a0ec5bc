"""The five slot states and the one table of legal steps."""

import enum

from fusecache.errors import IllegalStep


class State(enum.IntEnum):
    """What a slot is. The values are stored in one byte a slot; from VALID on it has a row."""

    INVALID = 0
    RESERVED = 1
    VALID = 2
    DIRTY = 3
    WRITEBACK = 4


class Event(enum.IntEnum):
    """What can happen to a slot."""

    RESERVE = 0
    """Given a tag, to be filled."""
    STORE = 1
    """Pages were written to the slot and hold the origin's data."""
    ABORT = 2
    """The fill did not happen."""
    DROP = 3
    """The last valid page of a clean block went, or the block was reclaimed."""
    SOIL = 4
    """A page holds, or is about to hold, what the origin has not."""
    WRITE_BACK = 5
    """The cleaner takes dirty pages to the origin."""
    SETTLE = 6
    """The writeback is over: the origin has all of it, synced, and the row is stable (R5)."""
    KEEP = 7
    """The writeback is over and dirty pages are left."""
    DISCARD = 8
    """Dirty data goes on purpose: truncate, removal, eviction (R6)."""


TABLE: dict[tuple[State, Event], State] = {
    (State.INVALID, Event.RESERVE): State.RESERVED,
    (State.RESERVED, Event.STORE): State.VALID,
    (State.RESERVED, Event.SOIL): State.DIRTY,
    (State.RESERVED, Event.ABORT): State.INVALID,
    (State.VALID, Event.STORE): State.VALID,
    (State.VALID, Event.SOIL): State.DIRTY,
    (State.VALID, Event.DROP): State.INVALID,
    (State.VALID, Event.DISCARD): State.INVALID,
    (State.DIRTY, Event.STORE): State.DIRTY,
    (State.DIRTY, Event.SOIL): State.DIRTY,
    (State.DIRTY, Event.WRITE_BACK): State.WRITEBACK,
    (State.DIRTY, Event.SETTLE): State.VALID,
    (State.DIRTY, Event.DISCARD): State.INVALID,
    (State.WRITEBACK, Event.STORE): State.WRITEBACK,
    (State.WRITEBACK, Event.SOIL): State.WRITEBACK,
    (State.WRITEBACK, Event.SETTLE): State.VALID,
    (State.WRITEBACK, Event.KEEP): State.DIRTY,
    (State.WRITEBACK, Event.DISCARD): State.INVALID,
}


def step(state: State | int, event: Event) -> State:
    """The state after ``event``.

    Raises:
        IllegalStep: the table has no such step. Nothing was changed.
    """
    try:
        return TABLE[State(state), event]
    except KeyError:
        raise IllegalStep(f"a slot that is {State(state).name} cannot {event.name}") from None
