"""The five slot states and the one table of legal steps.

``DIRTY`` and ``WRITEBACK`` are part of the vocabulary and of the format on disk; the steps into
and out of them come with write-back.
"""

import enum

from fusecache.errors import IllegalStep


class State(enum.IntEnum):
    """What a slot is. The values are stored in one byte a slot."""

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
    """The last valid page went, or the block was reclaimed."""


TABLE: dict[tuple[State, Event], State] = {
    (State.INVALID, Event.RESERVE): State.RESERVED,
    (State.RESERVED, Event.STORE): State.VALID,
    (State.RESERVED, Event.ABORT): State.INVALID,
    (State.VALID, Event.STORE): State.VALID,
    (State.VALID, Event.DROP): State.INVALID,
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
