"""Gates: what the lane is told, and what it tells."""

import numpy as np

from fusecache.core.gates import COUNTED, GATES, MARKS, NO_BLOCK, Gates
from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex

READS, WRITES = 1, 2


def flags(gates: Gates, number: int) -> int:
    return gates.words32[number * 32]


def opened(gates: Gates, image: int = 7, size: int = 1000) -> int:
    gates.used = True
    gate = gates.open(image, size)
    assert gate is not None
    gate.let(reads=True, writes=True)
    return gate.number


def test_nobody_has_a_gate_without_a_lane() -> None:
    assert Gates(64).open(1, 0) is None


def test_a_gate_says_what_may_pass() -> None:
    gates = Gates(64)
    gates.used = True
    gate = gates.open(7, 1 << 40)
    assert gate is not None and flags(gates, gate.number) == 0
    assert gates.words32[gate.number * 32 + 1] == 7
    assert gates.words64[gate.number * 16 + 1] == 1 << 40
    for reads, writes, wanted in (
        (True, True, READS | WRITES),
        (True, False, READS),
        (False, True, 0),
    ):
        gate.let(reads=reads, writes=writes)
        assert flags(gates, gate.number) == wanted
    gate.resize(5)
    assert gates.words64[gate.number * 16 + 1] == 5


def test_shut_gates_stay_shut() -> None:
    gates = Gates(64)
    first = opened(gates)
    gates.shut()
    assert flags(gates, first) == 0
    second = opened(gates)
    assert flags(gates, second) == 0


def test_the_next_image_finds_nothing_of_the_last_one() -> None:
    gates = Gates(64)
    gates.used = True
    gate = gates.open(7, 1000)
    assert gate is not None
    gate.let(reads=True, writes=True)
    gate.mark([3])
    gates.words_of[gate.number * 16 + 7 : gate.number * 16 + 14] = 9
    assert gate.changes == 9 and gate.take() == [9] * COUNTED and gate.take() == [0] * COUNTED
    gates.close(gate)
    assert flags(gates, gate.number) == 0
    again = gates.open(8, 5)
    assert again is not None and again.number == gate.number
    assert again.changes == 0 and again.take() == [0] * COUNTED
    assert gates.words32[again.number * 32 + 4] == NO_BLOCK


def test_marks_are_few_and_all_are_told() -> None:
    gates = Gates(64)
    gates.used = True
    gate = gates.open(7, 1000)
    assert gate is not None
    gate.mark(range(5, 5 + MARKS + 3))
    at = gate.number * 32 + 4
    assert gates.words32[at : at + MARKS].tolist() == list(range(5, 5 + MARKS))
    gate.mark([1])
    assert gates.words32[at : at + MARKS].tolist() == [1] + [NO_BLOCK] * (MARKS - 1)


def test_blocks_that_cannot_be_cached_have_no_marks() -> None:
    gates = Gates(64)
    gates.used = True
    gate = gates.open(7, 1 << 50)
    assert gate is not None
    gate.mark([*range(NO_BLOCK, NO_BLOCK + MARKS), 1 << 40, NO_BLOCK - 1])
    at = gate.number * 32 + 4
    assert gates.words32[at : at + MARKS].tolist() == [NO_BLOCK - 1] + [NO_BLOCK] * (MARKS - 1)


def test_there_are_only_so_many() -> None:
    gates = Gates(64)
    gates.used = True
    taken = [gates.open(number, 0) for number in range(GATES + 1)]
    assert None not in taken[:-1] and taken[-1] is None


def test_ticks_never_go_back() -> None:
    core = CacheIndex(Geometry.of(65536), 64)
    clock = core.gates.clock_of
    first = int(clock[0])
    clock[0] += 100  # the lane's
    slot = core.begin_store(1, 0)
    assert slot is not None
    core.stored(slot, 1)
    assert int(core.arrays()["last_used"][slot]) >= first + 100
    assert int(clock[0]) > first + 100


def test_a_failed_sync_loses_what_the_lane_wrote_since_the_last_one() -> None:
    core = CacheIndex(Geometry.of(65536), 64)
    slot = core.begin_store(1, 0)
    assert slot is not None
    core.stored_dirty(slot, 0b11)
    core.unpin(slot)
    core.dirty.sync_begins()
    arrays = core.arrays()
    arrays["unsynced"][slot] |= np.uint16(0b01)  # as core_overwrite does
    arrays["soiled"][0] = slot
    arrays["soiled_count"][0] = 1
    began = core.dirty.sync_begins()
    assert core.dirty.sync_failed(began) == 1
    assert core.dirty.lost(1, 0) == 0b01
    assert int(arrays["soiled_count"][0]) == 0
