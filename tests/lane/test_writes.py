"""Overwrites of dirty pages by the lane, in its turns."""

import struct
import threading
import time
from collections.abc import Callable

import pytest

from tests.lane.rig import BLOCK, FULL, PAGE, WRITE, Rig, in_thread, until, write_body
from tests.support.stamps import stamped

IN_PLACE = 128 << 10


def data_of(length: int, version: int = 2) -> bytes:
    return stamped(5, 0, length, version)


def write_is_pythons(rig: Rig, offset: int, data: bytes, handle: int = 1) -> None:
    """Such a write is Python's, whoever has the turn, and nothing was changed for it."""
    before = [rig.get(slot) for slot in range(rig.core.slot_count)]
    masks = {name: array.copy() for name, array in rig.core.arrays().items()}
    with rig.waiting():
        taken = rig.left_to_python(WRITE, write_body(handle, offset, data))
    assert taken[2:] == (handle, offset, len(data), 0, data)
    assert [rig.get(slot) for slot in range(rig.core.slot_count)] == before
    for name in ("valid", "dirty", "cleaning", "unsynced", "last_used", "soiled_count"):
        assert (rig.core.arrays()[name] == masks[name]).all(), name


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 512),
        (PAGE - 512, 1024),
        (0, BLOCK),
        (BLOCK - 512, 1024),
        (512, IN_PLACE - 512),
        (PAGE, IN_PLACE),
    ],
)
def test_dirty_pages_are_written_over(rig: Rig, offset: int, length: int) -> None:
    slots = [rig.soil(5, 0), rig.soil(6, 0), rig.soil(5, 1), rig.soil(5, 2)]
    gate = rig.open(5, 3)
    rig.core.dirty.sync_begins()
    ticks = rig.core.arrays()["last_used"].copy()
    data = data_of(length)
    rig.write(offset, data)
    expected = bytearray(stamped(5, 0, 3 * BLOCK, 1))
    expected[offset : offset + length] = data
    assert rig.get(slots[0]) + rig.get(slots[2]) + rig.get(slots[3]) == expected
    assert rig.get(slots[1]) == stamped(6, 0, BLOCK, 1)
    assert rig.read(0, 3 * BLOCK) == expected
    assert gate.changes == 1
    assert gate.take() == [1, 3 * BLOCK, 0, 0, 1, length]
    blocks = range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
    mine = [[slots[0], slots[2], slots[3]][block] for block in blocks]
    assert all(rig.core.arrays()["last_used"][slot] > ticks.max() for slot in mine)


def test_what_was_written_is_unsynced_until_the_next_sync(rig: Rig) -> None:
    """Else a sync that fails would not tell that it is lost (R1)."""
    first, second = rig.soil(5, 0), rig.soil(5, 1)
    rig.open(5, 2)
    rig.core.dirty.sync_begins()
    rig.write(BLOCK + 3 * PAGE, data_of(2 * PAGE))
    rig.write(BLOCK + 4 * PAGE, data_of(2 * PAGE))
    rig.write(2 * PAGE, data_of(PAGE))
    began = rig.core.dirty.sync_begins()
    unsynced = dict(zip(began.slots.tolist(), began.pages.tolist(), strict=True))
    assert unsynced == {second: 0x38, first: 0x4}
    assert rig.core.dirty.sync_begins()[0].size == 0
    rig.write(0, data_of(PAGE))
    assert rig.core.dirty.sync_failed(began) == 5
    assert rig.core.dirty.lost_ranges(5) == [
        (0, PAGE),
        (2 * PAGE, PAGE),
        (BLOCK + 3 * PAGE, 3 * PAGE),
    ]


def test_a_page_written_over_during_its_writeback_stays_dirty(rig: Rig) -> None:
    """The origin got what it was before (R5)."""
    slot = rig.soil(5, 0, pages=0xFF)
    rig.open(5, 1)
    (wanted,) = rig.core.dirty.snapshot(5, rig.core.dirty.slots(5))
    assert rig.core.dirty.begin_writeback(wanted) == 0xFF
    rig.write(PAGE - 512, data_of(1024))
    assert rig.core.dirty.cleaned(slot) == 0xFC
    rig.core.dirty.settled(slot)
    assert rig.core.dirty.mask(5, 0) == 0x3
    rig.core.check()


def test_a_page_that_is_settling_is_for_python(rig: Rig) -> None:
    """The row that says clean is not stable yet (R2, R5)."""
    slot = rig.soil(5, 0)
    rig.open(5, 1)
    (wanted,) = rig.core.dirty.snapshot(5, rig.core.dirty.slots(5))
    rig.core.dirty.begin_writeback(wanted)
    rig.core.dirty.cleaned(slot)
    write_is_pythons(rig, 0, data_of(PAGE))


def test_pages_that_are_not_all_dirty_are_for_python(rig: Rig) -> None:
    rig.soil(5, 0, pages=0xF)
    slot = rig.fill(5, 1)
    rig.open(5, 3)
    rig.write(0, data_of(4 * PAGE))
    write_is_pythons(rig, 0, data_of(5 * PAGE))
    write_is_pythons(rig, 3 * PAGE + 512, data_of(PAGE))
    write_is_pythons(rig, BLOCK, data_of(512))
    write_is_pythons(rig, 2 * BLOCK, data_of(512))
    rig.core.dirty.lose(rig.soil(5, 0), 0x1)
    write_is_pythons(rig, 0, data_of(PAGE))
    assert rig.core.arrays()["dirty"][slot] == 0


def test_a_slot_that_somebody_stores_to_is_for_python(rig: Rig) -> None:
    """Its row may not be committed yet (R2)."""
    slot = rig.soil(5, 0)
    rig.soil(5, 1)
    rig.open(5, 2)
    assert rig.core.begin_store(5, 0) == slot
    write_is_pythons(rig, 0, data_of(512))
    write_is_pythons(rig, BLOCK - 512, data_of(1024))
    rig.core.unpin(slot)
    rig.write(0, data_of(512))


def test_a_write_past_the_end_is_for_python(rig: Rig) -> None:
    rig.soil(5, 0)
    gate = rig.open(5, 0, tail=PAGE)
    rig.write(0, data_of(PAGE))
    write_is_pythons(rig, 0, data_of(PAGE + 512))
    write_is_pythons(rig, PAGE, data_of(512))
    write_is_pythons(rig, 2**64 - 512, data_of(1024))
    write_is_pythons(rig, 2**63, data_of(512))
    write_is_pythons(rig, 0, b"")
    gate.resize(PAGE + 512)
    rig.write(PAGE, data_of(512))


def test_a_gate_shut_for_writes_is_not_passed(rig: Rig) -> None:
    rig.soil(5, 0)
    gate = rig.open(5, 1)
    gate.let(reads=True, writes=False)
    write_is_pythons(rig, 0, data_of(512))
    assert len(rig.read(0, PAGE)) == PAGE
    gate.let(reads=False, writes=False)
    write_is_pythons(rig, 0, data_of(512))
    gate.let(reads=True, writes=True)
    rig.write(0, data_of(512))
    write_is_pythons(rig, 0, data_of(512), handle=2)


def test_a_large_write_is_for_python(rig: Rig) -> None:
    for block in range(4):
        rig.soil(5, block)
    rig.open(5, 4)
    rig.write(0, data_of(IN_PLACE))
    write_is_pythons(rig, 0, data_of(IN_PLACE + 512))


def test_a_full_list_of_unsynced_slots_makes_it_pythons(rig: Rig) -> None:
    slots = [rig.soil(5, block) for block in range(3)]
    rig.open(5, 3)
    rig.core.dirty.sync_begins()
    rig.core.arrays()["soiled_count"][0] = rig.core.arrays()["soiled"].size - 1
    write_is_pythons(rig, 0, data_of(BLOCK + 512))
    rig.write(0, data_of(512))
    write_is_pythons(rig, BLOCK, data_of(512))
    assert rig.core.arrays()["soiled"][-1] == slots[0]


# -- turns -----------------------------------------------------------------------------------------


def test_nothing_is_changed_in_pythons_turn(rig: Rig) -> None:
    slot = rig.soil(5, 0)
    rig.open(5, 1)
    before = {name: array.copy() for name, array in rig.core.arrays().items()}
    for _ in range(3):
        taken = rig.left_to_python(WRITE, write_body(1, 0, data_of(PAGE)))
        assert taken[-1] == data_of(PAGE)
    assert rig.get(slot) == stamped(5, 0, BLOCK, 1)
    for name, array in rig.core.arrays().items():
        assert (array == before[name]).all(), name
    rig.write(0, data_of(PAGE))
    assert rig.get(slot, 0, PAGE) == data_of(PAGE)


def test_python_has_the_first_turn(rig: Rig) -> None:
    """The lane's threads run before the event loop does."""
    rig.soil(5, 0)
    rig.open(5, 1)
    rig.left_to_python(WRITE, write_body(1, 0, data_of(PAGE)))


def test_python_waits_for_a_write_that_has_begun(rig: Rig) -> None:
    slot = rig.soil(5, 0)
    rig.open(5, 1)
    rig.core.dirty.sync_begins()
    rig.device.set(before=True)
    rig.give_turn()
    unique = rig.send(WRITE, write_body(1, 0, data_of(PAGE)))
    until(lambda: rig.device.inside, "the writer in the device")
    entered = threading.Event()
    thread = in_thread(lambda: (rig.take_turn(), entered.set()))
    assert not entered.wait(0.3)
    assert not rig.nothing_came()
    rig.device.set()
    assert entered.wait(20)
    thread.join()
    assert rig.get(slot, 0, PAGE) == data_of(PAGE)
    assert rig.core.dirty.sync_begins()[0].tolist() == [slot]
    assert rig.answer_to(unique)[0] == 0


def test_writers_take_turns_with_each_other(new_rig: Callable[..., Rig]) -> None:
    """Two at once in one page: one of them whole, then the other whole."""
    rig = new_rig(readers=4, spares=1)
    slot = rig.soil(5, 0)
    rig.open(5, 1)
    with rig.waiting():
        rig.device.set(before=True)
        for version in range(2, 6):
            rig.send(WRITE, write_body(1, 0, data_of(BLOCK, version)))
        until(lambda: rig.device.inside, "a writer in the device")
        time.sleep(0.3)
        inside = rig.device.inside
        rig.device.set()
        assert inside == 1
        left = 4
        while left:  # whoever waited too long for a turn went to Python
            for request in rig.lane.take():
                rig.lane.reply(request[0], 5, b"")
            left -= bool(rig.nothing_came())
    assert rig.get(slot) in {data_of(BLOCK, version) for version in range(2, 6)}


def test_turns_change_hands_many_times(new_rig: Callable[..., Rig]) -> None:
    """No wake-up is lost, and whoever has the turn has it alone."""
    rig = new_rig(readers=4, spares=1)
    slot = rig.soil(5, 0)
    rig.open(5, 1)
    unsynced = rig.core.arrays()["unsynced"]
    deadline, served, others = time.monotonic() + 1.0, 0, 0
    for _ in range(8):
        rig.send(WRITE, write_body(1, 0, data_of(PAGE)))
    while time.monotonic() < deadline:
        seen = int(unsynced[slot])
        time.sleep(0.0001)
        assert unsynced[slot] == seen
        rig.core.dirty.sync_begins()
        with rig.waiting():
            time.sleep(0.0002)
        for request in rig.lane.take():
            others += 1
            rig.lane.reply(request[0], 0, struct.pack("<II", PAGE, 0))
        while rig.nothing_came():
            served += 1
            rig.send(WRITE, write_body(1, 0, data_of(PAGE)))
    assert served + others > 8
    assert served > 0


# -- a device in trouble ---------------------------------------------------------------------------


def test_a_write_that_fails_is_pythons_again(rig: Rig) -> None:
    rig.soil(5, 0)
    gate = rig.open(5, 1)
    rig.device.set(broken=True)
    with rig.waiting():
        taken = rig.left_to_python(WRITE, write_body(1, 0, data_of(PAGE)))
    assert taken[-1] == data_of(PAGE)
    assert gate.changes == 0
    assert gate.take()[4] == 0
    rig.core.check()
    rig.device.set()
    rig.write(0, data_of(PAGE))
    assert gate.changes == 1


def test_a_slow_device_is_left_to_python_for_a_while(rig: Rig) -> None:
    """Whoever waits for it must not be who holds the turn."""
    rig.soil(5, 0)
    rig.open(5, 1)
    rig.device.set(before=True)
    with rig.waiting():
        unique = rig.send(WRITE, write_body(1, 0, data_of(PAGE)))
        until(lambda: rig.device.inside, "the writer in the device")
        time.sleep(0.05)
        rig.device.set()
        assert rig.answer_to(unique)[0] == 0
    write_is_pythons(rig, 0, data_of(PAGE))
    assert rig.lane.counters()["apart"] == 1
    time.sleep(0.6)
    rig.write(0, data_of(PAGE))


def test_a_busy_host_is_no_slow_device(rig: Rig) -> None:
    """A write that took long because others ran says nothing of the SSD."""
    rig.soil(5, 0)
    rig.open(5, 1)
    rig.device.set(busy=True)
    for _ in range(5):
        before = rig.lane.counters()["apart"]
        rig.write(0, data_of(PAGE))
        rig.write(0, data_of(PAGE))
        if rig.lane.counters()["apart"] == before:
            return
    raise AssertionError("five times out of five it was taken for one")


def test_what_is_written_is_what_is_read_by_many(new_rig: Callable[..., Rig]) -> None:
    """Every page of every slot is valid and dirty: all is the lane's, and nothing gets lost."""
    rig = new_rig(readers=3, slots=16)
    for block in range(16):
        rig.soil(5, block)
    rig.open(5, 16)
    rig.give_turn()
    try:
        for version in range(2, 30):
            places = [block * BLOCK for block in range(16)]
            rig.writes([(at, stamped(5, at, 4 * PAGE, version)) for at in places])
            assert rig.read(0, 16 * BLOCK)[: 4 * PAGE] == stamped(5, 0, 4 * PAGE, version)
    finally:
        rig.take_turn()
    slots, pages, _ = rig.core.dirty.sync_begins()
    assert len(set(slots.tolist())) == slots.size == 16
    assert set(pages.tolist()) == {FULL}
