"""Fsyncs that need no more than a sync of the cache device, by the lane (R1)."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusecache.core.gates import Gate
from tests.lane.rig import BLOCK, FSYNC, PAGE, WRITE, Rig, until, write_body
from tests.support.stamps import stamped

BODY = (1).to_bytes(8, "little") + bytes(8)
"""``struct fuse_fsync_in``, of handle 1."""


def opened(rig: Rig, *, blocks: int = 1) -> Gate:
    """An image that is dirty, and of which nothing but data has changed since its last fsync."""
    gate = rig.open(5, blocks)
    gate.let(reads=True, writes=True, syncs=True)
    return gate


def fsync_is_pythons(rig: Rig, error: int = 0) -> None:
    """Such an fsync is not answered by the lane, which tells of this error."""
    with rig.waiting():
        taken = rig.left_to_python(FSYNC, BODY)
    assert taken[2:] == (1, 0, error, 0, None)


def words(rig: Rig) -> list[int]:
    """Syncs begun, the last good one, entries of what is being synced."""
    found: list[int] = rig.core.arrays()["syncs"].tolist()
    return found


def test_an_fsync_is_answered_after_a_sync(rig: Rig) -> None:
    rig.soil(5, 0)
    opened(rig)
    rig.write(0, stamped(5, 0, PAGE, 2))
    rig.device.set(after=True)
    before = rig.device.syncs
    with rig.waiting():
        unique = rig.send(FSYNC, BODY)
        until(lambda: rig.device.inside, "the sync")
        time.sleep(0.1)
        assert not rig.nothing_came()
        rig.device.set()
        assert rig.answer_to(unique) == (0, b"")
    assert rig.device.syncs == before + 1
    counters = rig.lane.counters()
    assert (counters["fsyncs"], counters["syncs"], counters["queued"]) == (1, 1, 0)


def test_whose_gate_does_not_let_it_it_is_pythons(rig: Rig) -> None:
    rig.soil(5, 0)
    gate = opened(rig)
    before = rig.device.syncs
    for flags in ({"reads": True, "writes": True}, {"reads": False, "writes": False}):
        gate.let(**flags, syncs=not flags["reads"])
        fsync_is_pythons(rig)
    gate.let(reads=True, writes=False, syncs=True)
    rig.lane.close(1)
    fsync_is_pythons(rig)
    assert rig.device.syncs == before


def test_who_comes_during_a_sync_shares_the_next(rig: Rig) -> None:
    """It may have written after that one began."""
    rig.soil(5, 0)
    opened(rig)
    rig.device.set(before=True)
    with rig.waiting():
        first = rig.send(FSYNC, BODY)
        until(lambda: rig.device.inside, "the first sync")
        others = {rig.send(FSYNC, BODY) for _ in range(20)}
        time.sleep(0.1)
        assert rig.device.inside == 1
        rig.device.set()
        answers = [rig.answer() for _ in range(21)]
    assert {unique for unique, _, _ in answers} == {first, *others}
    assert {(error, data) for _, error, data in answers} == {(0, b"")}
    assert rig.lane.counters()["syncs"] in (2, 3)  # a reader may have been slow
    assert rig.lane.counters()["fsyncs"] == 21


def test_hits_and_overwrites_do_not_wait_for_a_sync(rig: Rig) -> None:
    rig.soil(5, 0)
    opened(rig)
    rig.device.set(syncing=True)
    with rig.waiting():
        unique = rig.send(FSYNC, BODY)
        until(lambda: rig.device.inside, "the sync")
        rig.writes([(0, stamped(5, 0, PAGE, 2))])
        assert rig.read(0, PAGE) == stamped(5, 0, PAGE, 2)
        assert not rig.nothing_came()
        rig.device.set()
        assert rig.answer_to(unique) == (0, b"")


def test_a_sync_waits_for_its_turn_and_then_it_is_pythons(rig: Rig) -> None:
    """What it is about is noted while nobody changes it."""
    rig.soil(5, 0)
    opened(rig)
    before = rig.device.syncs
    taken = rig.left_to_python(FSYNC, BODY)
    assert taken[4] == 0
    assert rig.device.syncs == before
    assert words(rig) == [0, 0, 0]


def test_all_that_wait_for_a_turn_in_vain_are_pythons(rig: Rig) -> None:
    """Others come meanwhile, with whom a thread goes on, and leaves these to another one."""
    rig.soil(5, 0)
    opened(rig)
    before = rig.device.syncs
    sent = {rig.send(FSYNC, BODY) for _ in range(40)}
    taken: list[Any] = []
    while len(taken) < len(sent):
        taken += rig.take()
    assert {(one[0], one[4]) for one in taken} == {(unique, 0) for unique in sent}
    assert not rig.nothing_came()
    assert rig.device.syncs == before


# -- what is unsynced ------------------------------------------------------------------------------


def unsynced(rig: Rig) -> dict[int, int]:
    began = rig.core.dirty.sync_begins()
    return dict(zip(began.slots.tolist(), began.pages.tolist(), strict=True))


def fsync(rig: Rig) -> None:
    """One that the lane must answer."""
    with rig.waiting():
        assert rig.answer_to(rig.send(FSYNC, BODY)) == (0, b"")


def test_what_is_synced_is_not_lost_later(rig: Rig) -> None:
    rig.soil(5, 0)
    rig.soil(5, 1)
    opened(rig, blocks=2)
    rig.core.dirty.sync_begins()
    rig.write(0, stamped(5, 0, PAGE, 2))
    fsync(rig)
    assert words(rig) == [1, 1, 0]
    rig.write(BLOCK, stamped(5, BLOCK, PAGE, 2))
    assert rig.core.dirty.sync_failed(rig.core.dirty.sync_begins()) == 1
    assert rig.core.dirty.lost_ranges(5) == [(BLOCK, PAGE)]


def test_what_is_written_during_a_sync_is_unsynced(rig: Rig) -> None:
    slot = rig.soil(5, 0)
    opened(rig)
    rig.core.dirty.sync_begins()
    rig.write(0, stamped(5, 0, PAGE, 2))
    rig.device.set(after=True)
    with rig.waiting():
        first = rig.send(FSYNC, BODY)
        until(lambda: rig.device.inside, "the end of the sync")
        second = rig.send(WRITE, write_body(1, PAGE, stamped(5, PAGE, PAGE, 2)))
        until(lambda: rig.device.inside == 2, "the end of the write")
        rig.device.set()
        assert {rig.answer()[0] for _ in range(2)} == {first, second}
    assert unsynced(rig) == {slot: 0b10}


def held(rig: Rig) -> tuple[int, int]:
    """A sync of the lane that is under way, about page 0; its number, and the slot."""
    slot = rig.soil(5, 0)
    opened(rig)
    rig.core.dirty.sync_begins()
    rig.write(0, stamped(5, 0, PAGE, 2))
    rig.device.set(before=True)
    rig.give_turn()
    unique = rig.send(FSYNC, BODY)
    until(lambda: rig.device.inside, "the sync")
    rig.take_turn()
    assert words(rig) == [1, 0, 1]
    return unique, slot


def let_go(rig: Rig, unique: int) -> None:
    rig.device.set()
    assert rig.answer_to(unique) == (0, b"")


def test_if_python_fails_meanwhile_all_is_lost_that_nobody_has_synced(rig: Rig) -> None:
    """Then the fsync is Python's, which shuts the gates first."""
    unique, _ = held(rig)
    began = rig.core.dirty.sync_begins()
    rig.core.gates.shut()
    assert rig.core.dirty.sync_failed(began) == 1
    assert rig.core.dirty.lost(5, 0) == 0b1
    rig.device.set()
    (taken,) = rig.take()
    assert (taken[0], taken[4]) == (unique, 0)
    assert not rig.nothing_came()


def test_a_good_sync_of_python_makes_that_of_the_lane_stable(rig: Rig) -> None:
    """If it began later; then the one of the lane may fail."""
    unique, _ = held(rig)
    began = rig.core.dirty.sync_begins()
    rig.core.dirty.sync_worked(began)
    assert rig.core.dirty.sync_failed(rig.core.dirty.sync_begins()) == 0
    let_go(rig, unique)


def test_a_good_sync_of_python_that_began_before_does_not(rig: Rig) -> None:
    began = rig.core.dirty.sync_begins()
    unique, _ = held(rig)
    rig.core.dirty.sync_worked(began)
    assert rig.core.dirty.sync_failed(rig.core.dirty.sync_begins()) == 1
    let_go(rig, unique)


def test_a_good_sync_of_the_lane_makes_that_of_python_stable(rig: Rig) -> None:
    """The same the other way round."""
    rig.soil(5, 0)
    opened(rig)
    rig.core.dirty.sync_begins()
    rig.write(0, stamped(5, 0, PAGE, 2))
    before = rig.core.dirty.sync_begins()
    fsync(rig)
    assert rig.core.dirty.sync_failed(before) == 0
    rig.write(0, stamped(5, 0, PAGE, 3))
    after = rig.core.dirty.sync_begins()
    assert rig.core.dirty.sync_failed(after) == 1


# -- a device in trouble ---------------------------------------------------------------------------


def test_a_failed_sync_is_told_to_python_and_there_is_no_other(rig: Rig) -> None:
    """The kernel tells of it once, and says of the next one that it works."""
    rig.soil(5, 0)
    opened(rig)
    rig.core.dirty.sync_begins()
    rig.write(0, stamped(5, 0, PAGE, 2))
    rig.device.set(broken=True)
    fsync_is_pythons(rig, error=5)
    rig.device.set()
    before = rig.device.syncs
    fsync_is_pythons(rig)
    assert rig.device.syncs == before
    assert rig.core.dirty.sync_failed(rig.core.dirty.sync_begins()) == 1
    assert rig.core.dirty.lost_ranges(5) == [(0, PAGE)]
    assert rig.lane.counters()["fsyncs"] == 0


def test_who_waits_while_a_sync_fails_is_pythons(rig: Rig) -> None:
    rig.soil(5, 0)
    opened(rig)
    rig.device.set(before=True)
    with rig.waiting():
        first = rig.send(FSYNC, BODY)
        until(lambda: rig.device.inside, "the sync")
        second = rig.send(FSYNC, BODY)
        time.sleep(0.1)
        before = rig.device.syncs
        rig.device.set(broken=True)
        taken: list[Any] = []
        while len(taken) < 2:
            taken += rig.take()
        assert [(one[0], one[4]) for one in taken] == [(first, 5), (second, 0)]
        assert not rig.nothing_came()
    assert rig.device.syncs == before


def test_the_kernel_tells_each_of_us_of_a_failed_write(rig: Rig) -> None:
    """By an open file of its own: who shares one is told instead of the other."""
    descriptors = [
        path for path in Path("/proc/self/fd").iterdir() if _leads_to(path) == str(rig.path)
    ]
    flags = {
        next(
            int(line.split()[1], 8) & os.O_ACCMODE
            for line in Path(f"/proc/self/fdinfo/{path.name}").read_text().splitlines()
            if line.startswith("flags:")
        )
        for path in descriptors
    }
    assert flags == {os.O_RDONLY, os.O_RDWR}


def _leads_to(path: Path) -> str:
    try:
        return str(path.readlink())
    except FileNotFoundError:
        return ""


def test_a_lane_with_a_thread_in_a_sync_ends(rig: Rig) -> None:
    held(rig)
    assert not rig.lane.stop(0.2)
    rig.device.set()
    assert rig.lane.stop(20)
    assert not rig.nothing_came()


@pytest.mark.parametrize("readers", [1, 4])
def test_many(new_rig: Callable[..., Rig], readers: int) -> None:
    """Every one is answered once, whoever does it."""
    rig = new_rig(readers=readers)
    rig.soil(5, 0)
    opened(rig)
    waiting: set[int] = set()
    deadline = time.monotonic() + 1.0
    with rig.waiting():
        while time.monotonic() < deadline:
            while len(waiting) < 32:
                waiting.add(rig.send(FSYNC, BODY))
            unique, error, data = rig.answer()
            assert (error, data) == (0, b"")
            waiting.remove(unique)
        for _ in range(len(waiting)):
            waiting.remove(rig.answer()[0])
    counters = rig.lane.counters()
    assert counters["fsyncs"] > counters["syncs"] > 0
