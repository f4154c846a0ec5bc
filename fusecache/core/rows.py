"""Rows: what the database is told of blocks, and which rows are owed to it."""

from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusecache.core.slots import NO_SLOT, SlotTable
from fusecache.core.states import State

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


def pages_in(masks: U16) -> int:
    """How many pages the masks have, together."""
    return int(np.unpackbits(masks.astype("<u2").view(np.uint8)).sum())


class Rows(NamedTuple):
    """Block map rows as equally long columns. ``slot`` is NO_SLOT where the block is gone."""

    image: U32
    block: U32
    slot: U32
    valid: U16
    dirty: U16

    def where(self, keep: npt.NDArray[Any] | slice) -> "Rows":
        """The rows that an index, a mask or a slice picks."""
        return Rows(
            self.image[keep], self.block[keep], self.slot[keep], self.valid[keep], self.dirty[keep]
        )


class OwedRows:
    """Slots whose row changed and tags that went, since the last time somebody took them."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._changed = array("I")
        self._gone_image = array("I")
        self._gone_block = array("I")

    def changed(self, slot: int) -> None:
        """The row of the slot's block is not what the database was told last."""
        self._changed.append(slot)

    def gone(self, image: int, block: int) -> None:
        """The block is no longer cached."""
        self._gone_image.append(image)
        self._gone_block.append(block)

    def __bool__(self) -> bool:
        return bool(self._changed or self._gone_image)

    def take(self) -> Rows:
        """All of them, deletions first, then what is there now.

        A block that went and came back is in both parts; the later one counts.
        """
        slots = self._slots
        if not self._gone_image and len(self._changed) == 1:
            return self._take_one(self._changed.pop())
        changed = np.unique(np.array(self._changed, np.uint32))
        here = changed[slots.state_of[changed] >= State.VALID]
        gone = len(self._gone_image)
        rows = Rows(
            image=np.concatenate([np.array(self._gone_image, np.uint32), slots.image_of[here]]),
            block=np.concatenate([np.array(self._gone_block, np.uint32), slots.block_of[here]]),
            slot=np.concatenate([np.full(gone, NO_SLOT, np.uint32), self._named(here)]),
            valid=np.concatenate([np.zeros(gone, np.uint16), slots.valid_of[here]]),
            dirty=np.concatenate([np.zeros(gone, np.uint16), slots.dirty_of[here]]),
        )
        self._changed = array("I")
        self._gone_image = array("I")
        self._gone_block = array("I")
        return rows

    def _take_one(self, slot: int) -> Rows:
        """As most commits of a write are: bulk work on one row costs several times as much."""
        slots = self._slots
        here = int(slots.state[slot] >= State.VALID)
        at = slice(slot, slot + here)
        named = slot if slots.valid[slot] | slots.dirty[slot] else NO_SLOT
        return Rows(
            image=slots.image_of[at].copy(),
            block=slots.block_of[at].copy(),
            slot=np.array([named][:here], np.uint32),
            valid=slots.valid_of[at].copy(),
            dirty=slots.dirty_of[at].copy(),
        )

    def _named(self, here: U32) -> U32:
        """The slots, but none where no page is left: such a block only waits for its last pin."""
        pages = self._slots.valid_of[here] | self._slots.dirty_of[here]
        return np.where(pages != 0, here, np.uint32(NO_SLOT))

    def give_back(self, rows: Rows) -> None:
        """Rows that could not be committed are owed again, before whatever came since."""
        gone = rows.slot == NO_SLOT
        self._gone_image = array("I", rows.image[gone].tolist()) + self._gone_image
        self._gone_block = array("I", rows.block[gone].tolist()) + self._gone_block
        self._changed.extend(rows.slot[~gone].tolist())
