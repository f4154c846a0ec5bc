"""Reads that the lane answers, and those that it must not."""

from collections.abc import Callable

import pytest

from tests.lane.rig import BLOCK, FULL, PAGE, READ, Rig, read_body, settle, until
from tests.support.stamps import check_stamps, stamped

COLD_READS = 64
"""At a time, see cold.h."""
SPANS = [
    (0, 512),
    (0, BLOCK),
    (BLOCK - 512, 512),
    (BLOCK - 512, 1024),
    (PAGE, 2 * BLOCK),
    (512, 3 * BLOCK - 1024),
    (0, 3 * BLOCK),
]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(("offset", "length"), SPANS)
def test_a_hit_is_answered_with_its_bytes(
    cold_rig: Rig, offset: int, length: int, cold: bool
) -> None:
    rig = cold_rig
    for block in (1, 0, 2):  # neither in order nor side by side
        rig.fill(5, block)
        rig.fill(6, block)
    gate = rig.open(5, 3)
    rig.device.set(cold=cold)
    for times in (1, 2, 3):
        data = rig.read(offset, length)
        assert data == stamped(5, 0, 3 * BLOCK, 1)[offset : offset + length]
        assert gate.take() == [1, length, int(cold), length * cold, 0, 0]
        assert rig.lane.counters()["queued"] == 0
        assert sum(rig.lane.counters()["read_ns"]) <= times


def test_neighbours_on_the_device_are_read_at_once(rig: Rig) -> None:
    for block in range(3):
        rig.fill(5, block)
    rig.open(5, 3)
    before = rig.device.reads
    rig.read(0, 3 * BLOCK)
    assert rig.device.reads == before + 1


@pytest.mark.parametrize("size", [1, 511, PAGE, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_read_ends_where_the_image_ends(rig: Rig, size: int) -> None:
    for block in range(3):
        rig.fill(5, block)
    gate = rig.open(5, 0, tail=size)
    assert rig.read(0, 2 * BLOCK) == stamped(5, 0, 3 * BLOCK, 1)[:size]
    rig.read_is_pythons(size, 1)
    rig.read_is_pythons(size + BLOCK, BLOCK)
    rig.read_is_pythons(2**64 - 1, BLOCK)
    rig.read_is_pythons(2**63, 1)
    gate.resize(size - 1)
    if size > 1:
        assert len(rig.read(0, 2 * BLOCK)) == size - 1


def test_a_missing_page_is_for_python(rig: Rig) -> None:
    rig.fill(5, 0, pages=FULL & ~0x10)
    rig.open(5, 2)
    assert len(rig.read(0, 4 * PAGE)) == 4 * PAGE
    assert len(rig.read(5 * PAGE, 11 * PAGE)) == 11 * PAGE
    rig.read_is_pythons(4 * PAGE, PAGE)
    rig.read_is_pythons(4 * PAGE - 1, 2)
    rig.read_is_pythons(5 * PAGE - 1, 1)
    rig.read_is_pythons(0, BLOCK)
    rig.read_is_pythons(BLOCK, PAGE)
    rig.read_is_pythons(15 * PAGE, 2 * PAGE)


def test_no_read_of_nothing(rig: Rig) -> None:
    rig.fill(5, 0)
    rig.open(5, 1)
    rig.read_is_pythons(0, 0)


def test_what_passes_no_gate_is_for_python(rig: Rig) -> None:
    rig.fill(5, 0)
    gate = rig.open(5, 1)
    rig.read_is_pythons(0, PAGE, handle=2)
    rig.read_is_pythons(0, PAGE, handle=1 + (1 << 16))
    rig.read_is_pythons(0, PAGE, handle=0)
    rig.read_is_pythons(0, PAGE, handle=2**64 - 1)
    gate.let(reads=False, writes=False)
    rig.read_is_pythons(0, PAGE)
    gate.let(reads=True, writes=False)
    assert len(rig.read(0, PAGE)) == PAGE
    rig.lane.close(1)
    rig.read_is_pythons(0, PAGE)


def test_nothing_passes_when_all_gates_are_shut(rig: Rig) -> None:
    rig.fill(5, 0)
    gate = rig.open(5, 1)
    rig.core.gates.shut()
    rig.read_is_pythons(0, PAGE)
    gate.let(reads=True, writes=True)
    rig.read_is_pythons(0, PAGE)


def test_a_gate_goes_from_one_image_to_the_next(rig: Rig) -> None:
    rig.fill(5, 0)
    rig.fill(6, 0)
    gate = rig.open(5, 1)
    rig.read(0, PAGE)
    rig.lane.close(1)
    rig.core.gates.close(gate)
    assert rig.open(6, 1, handle=2).number == gate.number
    check_stamps(rig.read(0, PAGE, handle=2), 6, 0)
    rig.read_is_pythons(0, PAGE, handle=1)


def test_two_handles_at_one_place_of_the_table_do_not_mix(rig: Rig) -> None:
    rig.fill(5, 0)
    rig.fill(6, 0)
    rig.open(5, 1, handle=1)
    rig.open(6, 1, handle=1 + (1 << 16), node=8)
    check_stamps(rig.read(0, PAGE, handle=1), 5, 0)
    rig.read_is_pythons(0, PAGE, handle=1 + (1 << 16))
    rig.lane.close(1 + (1 << 16))
    check_stamps(rig.read(0, PAGE, handle=1), 5, 0)


def test_a_hit_in_a_marked_block_is_for_python(rig: Rig) -> None:
    for block in range(3):
        rig.fill(5, block)
    gate = rig.open(5, 3)
    gate.mark([1])
    assert len(rig.read(0, BLOCK)) == BLOCK
    assert len(rig.read(2 * BLOCK, BLOCK)) == BLOCK
    rig.read_is_pythons(BLOCK, PAGE)
    rig.read_is_pythons(0, 3 * BLOCK)
    gate.mark([])
    assert len(rig.read(BLOCK, PAGE)) == PAGE


def test_a_hit_is_a_use(rig: Rig) -> None:
    slots = [rig.fill(5, block) for block in range(3)]
    rig.open(5, 3)
    ticks = rig.core.arrays()["last_used"]
    with rig.waiting():
        rig.read(0, PAGE)
    assert ticks[slots[0]] > max(ticks[slot] for slot in slots[1:])
    assert rig.core.reclaim(2) == 2
    assert [rig.core.usage(5).blocks, len(rig.read(0, BLOCK))] == [1, BLOCK]


# -- what happens while a reader hangs in the device -----------------------------------------------


def test_a_slot_given_away_meanwhile_is_not_answered(cold_rig: Rig) -> None:
    """All pages of the slot are valid again when the reader comes back: only the generation tells
    that they are another image's."""
    slot = cold_rig.fill(5, 0)
    cold_rig.open(5, 1)
    cold_rig.held_read(0, PAGE)
    cold_rig.drop(5)
    assert cold_rig.fill(6, 0) == slot
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()
    assert cold_rig.lane.counters()["repeated"] == 1


def test_a_slot_given_away_before_the_data_is_read_is_not_answered(cold_rig: Rig) -> None:
    slot = cold_rig.fill(5, 0)
    cold_rig.open(5, 1)
    cold_rig.device.set(cold=True, before=True)
    unique = cold_rig.send(READ, read_body(1, 0, PAGE))
    while cold_rig.device.inside == 0:
        pass
    cold_rig.drop(5)
    assert cold_rig.fill(6, 0) == slot
    cold_rig.device.set()
    assert cold_rig.take()[0][0] == unique
    assert not cold_rig.nothing_came()


def test_a_block_that_came_back_to_its_slot_is_not_answered(cold_rig: Rig) -> None:
    """The same tag and the same slot, but what was read may be from before or between."""
    slot = cold_rig.fill(5, 0)
    cold_rig.open(5, 1)
    cold_rig.held_read(0, PAGE)
    cold_rig.drop(5)
    assert cold_rig.fill(5, 0, version=2) == slot
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()
    assert set(check_stamps(cold_rig.read(0, PAGE), 5, 0)) == {2}


def test_pages_invalidated_meanwhile_are_not_answered(cold_rig: Rig) -> None:
    """The block stays in its slot, so that the generation is the same."""
    cold_rig.fill(5, 0)
    cold_rig.open(5, 1)
    cold_rig.held_read(2 * PAGE, 2 * PAGE)
    cold_rig.core.clear(5, 0, 0b1000)
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()
    cold_rig.read_is_pythons(3 * PAGE, PAGE)
    assert len(cold_rig.read(2 * PAGE, PAGE)) == PAGE


@pytest.mark.parametrize("last", [False, True])
def test_every_block_of_a_read_is_looked_at_again(cold_rig: Rig, last: bool) -> None:
    for block in range(3):
        cold_rig.fill(5, block)
    cold_rig.open(5, 3)
    cold_rig.held_read(0, 3 * BLOCK)
    cold_rig.core.clear(5, 2 if last else 0, FULL)
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()


@pytest.mark.parametrize("all_gates", [False, True])
def test_a_gate_shut_meanwhile_is_not_passed(cold_rig: Rig, all_gates: bool) -> None:
    """An evict detaches an open image; a broken cache shuts all gates: no page changes."""
    cold_rig.fill(5, 0)
    gate = cold_rig.open(5, 1)
    cold_rig.held_read(0, PAGE)
    if all_gates:
        cold_rig.core.gates.shut()
    else:
        gate.let(reads=False, writes=False)
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()


def test_a_gate_of_another_image_meanwhile_is_not_passed(cold_rig: Rig) -> None:
    cold_rig.fill(5, 0)
    gate = cold_rig.open(5, 1)
    cold_rig.held_read(0, PAGE)
    cold_rig.core.gates.close(gate)
    assert cold_rig.open(6, 1, handle=2).number == gate.number
    cold_rig.device.set()
    assert cold_rig.take()[0][1] == READ
    assert not cold_rig.nothing_came()


def test_other_pages_and_other_slots_do_not_matter(cold_rig: Rig) -> None:
    cold_rig.fill(5, 0)
    cold_rig.fill(5, 1)
    cold_rig.open(5, 2)
    unique = cold_rig.held_read(2 * PAGE, 2 * PAGE)
    cold_rig.core.clear(5, 0, 0b10011)
    cold_rig.core.clear(5, 1, FULL)
    cold_rig.fill(7, 7)
    cold_rig.device.set()
    error, data = cold_rig.answer_to(unique)
    assert error == 0
    check_stamps(data, 5, 2 * PAGE)


# -- threads ---------------------------------------------------------------------------------------


def _fill_pages(rig: Rig, blocks: int) -> None:
    for block in range(blocks):
        rig.fill(5, block)
    rig.open(5, blocks)


def test_a_crowd_that_is_not_in_memory_holds_up_nobody(new_rig: Callable[..., Rig]) -> None:
    """All go to one thread; what finds no room there is Python's; others are answered meanwhile."""
    rig = new_rig(ring=True, readers=1)
    _fill_pages(rig, 7)
    rig.device.set(cold=True, before=True)
    pages = [page * PAGE for page in range(COLD_READS)]
    held = {rig.send(READ, read_body(1, offset, PAGE)): offset for offset in pages}
    until(lambda: rig.device.inside == 1, "the thread in the device")
    settle()
    rig.read_is_pythons(COLD_READS * PAGE, PAGE)
    rig.read_is_pythons(7 * BLOCK, PAGE)  # a miss
    rig.device.set()
    for _ in pages:
        unique, error, data = rig.answer()
        assert error == 0
        assert data == stamped(5, held.pop(unique), PAGE, 1)
    assert rig.lane.counters()["queued"] == 2
    assert rig.lane.counters()["together"] == COLD_READS
    rig.device.set(cold=True)
    for offset in pages:  # there is room again
        assert rig.read(offset, PAGE) == stamped(5, offset, PAGE, 1)


def test_one_alone_that_is_not_in_memory_is_awaited_by_whoever_has_it(
    new_rig: Callable[..., Rig],
) -> None:
    """Without a hand-over. The next ones go to the thread for all."""
    rig = new_rig(ring=True)
    _fill_pages(rig, 4)
    rig.device.set(cold=True, before=True)
    held = []
    for inside, block in ((1, 0), (2, 1), (2, 2), (2, 3)):
        held.append(rig.send(READ, read_body(1, block * BLOCK, PAGE)))
        until(lambda inside=inside: rig.device.inside == inside, "threads in the device")
        settle()
    rig.read_is_pythons(4 * BLOCK, PAGE)
    rig.device.set()
    assert sorted(rig.answer()[0] for _ in held) == held


@pytest.mark.parametrize(("offset", "length"), SPANS)
def test_what_is_read_in_pieces_is_put_together(
    new_rig: Callable[..., Rig], offset: int, length: int
) -> None:
    rig = new_rig(ring=True, readers=1)
    for block in (1, 0, 2):
        rig.fill(5, block)
        rig.fill(6, block)
    rig.open(5, 3)
    rig.device.set(cold=True, pieces=True)
    wanted = [rig.send(READ, read_body(1, offset, length)) for _ in range(8)]
    for _ in wanted:
        unique, error, data = rig.answer()
        wanted.remove(unique)
        assert error == 0
        assert data == stamped(5, 0, 3 * BLOCK, 1)[offset : offset + length]


def test_where_there_is_no_io_uring_threads_wait(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ring=True, spares=3, forbidden=True)
    _fill_pages(rig, 5)
    rig.device.set(cold=True, before=True)
    held = {rig.send(READ, read_body(1, block * BLOCK, PAGE)) for block in range(3)}
    until(lambda: rig.device.inside == 3, "three threads in the device")
    rig.device.set()
    assert {rig.answer()[0] for _ in held} == held
    assert not rig.lane.counters()["ring"] and not rig.lane.counters()["together"]


def test_a_sick_place_of_the_device_holds_up_no_other(new_rig: Callable[..., Rig]) -> None:
    """A sector that is read again and again, say: reads that come later are begun all the same."""
    rig = new_rig(ring=True, readers=1)
    _fill_pages(rig, 2)
    rig.device.set(cold=True, sick=True)
    before = rig.device.reads
    unique = rig.send(READ, read_body(1, 0, PAGE))
    try:
        until(lambda: rig.device.reads == before + 1, "the read to begin")
        settle()
        rig.device.set(cold=True)
        for _ in range(5):
            assert rig.read(BLOCK, PAGE) == stamped(5, BLOCK, PAGE, 1)
    finally:
        rig.device.heal(stamped(5, 0, PAGE, 1))
    assert rig.answer_to(unique) == (0, stamped(5, 0, PAGE, 1))


def test_io_uring_that_fails_at_the_last_moment_hangs_nobody(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ring=True, readers=1, broken=True, before=True)
    _fill_pages(rig, 4)
    rig.device.set(cold=True, before=True)
    held = {rig.send(READ, read_body(1, block * BLOCK, PAGE)) for block in range(3)}
    until(lambda: rig.lane.counters()["together"] == 3, "reads to be handed over")
    rig.device.set(cold=True)
    came: set[int] = set()
    while came != held:
        came |= {taken[0] for taken in rig.take()}
    rig.read_is_pythons(3 * BLOCK, PAGE)
    rig.device.set()
    assert len(rig.read(3 * BLOCK, PAGE)) == PAGE


def test_readers_in_the_device_hold_up_nobody(new_rig: Callable[..., Rig]) -> None:
    """Three of five threads hang; two others always go on, and never wait for the device."""
    rig = new_rig(readers=2, spares=3)
    for block in range(4):
        rig.fill(5, block)
    rig.open(5, 5)
    rig.device.set(cold=True, before=True)
    held = {rig.send(READ, read_body(1, block * BLOCK, PAGE)) for block in range(3)}
    while rig.device.inside < 3:
        pass
    rig.read_is_pythons(4 * BLOCK, PAGE)  # a miss
    rig.read_is_pythons(0, PAGE)  # a hit that is not in memory: nobody is left to wait for it
    rig.device.set()
    answered = [rig.answer() for _ in held]
    assert {unique for unique, _, _ in answered} == held
    assert all(error == 0 and len(data) == PAGE for _, error, data in answered)
    for block in range(4):
        check_stamps(rig.read(block * BLOCK, PAGE), 5, block * BLOCK)


def test_a_device_that_fails_is_for_python(cold_rig: Rig) -> None:
    cold_rig.fill(5, 0)
    gate = cold_rig.open(5, 1)
    cold_rig.device.set(broken=True)
    cold_rig.read_is_pythons(0, PAGE)
    cold_rig.device.set(broken=True, cold=True)
    cold_rig.read_is_pythons(0, PAGE)
    assert gate.take()[0] == 0
    cold_rig.device.set()
    assert len(cold_rig.read(0, PAGE)) == PAGE
