"""How pyfuse3's answers get to the kernel: by the event loop, in which pyfuse3 runs."""

import contextlib
import random
import socket
import struct
from collections.abc import Callable
from types import SimpleNamespace

import pyfuse3
import pytest
import trio
import trio.testing

from fusecache.engine.state import CacheState
from fusecache.fuse.guard import guarded
from fusecache.fuse.laned import Answers, Laned
from tests.lane.rig import ANSWER, BATCH_FORGET, FORGET, READLINK, Rig

NewRig = Callable[..., Rig]
LARGEST = 1 << 20
ONE = ANSWER.size + 100_000
"""The length of a large answer."""


def test_they_are_brought_once_they_are_there_and_none_is_waited_for(new_rig: NewRig) -> None:
    """Also beside requests that have no answer."""
    rig = new_rig()
    rig.lane.bring_answers()
    uniques = [rig.send(READLINK)]
    rig.send(FORGET, bytes(8))
    rig.send(BATCH_FORGET, struct.pack("<IIQQ", 1, 0, 9, 1))
    uniques.append(rig.send(READLINK))
    for _ in range(4):
        assert rig.pyfuse3.recv(LARGEST)
    rig.lane.bring_answers()
    answers = [ANSWER.pack(ANSWER.size, -2, unique) for unique in reversed(uniques)]
    for answer in answers:
        rig.pyfuse3.send(answer)
    assert not rig.nothing_came()
    rig.lane.bring_answers()
    assert [rig.kernel.recv(LARGEST) for _ in answers] == answers
    rig.lane.bring_answers()


def test_room_is_made_by_bringing_those_of_others(new_rig: NewRig) -> None:
    rig = new_rig()
    uniques = [rig.send(READLINK) for _ in range(2)]
    for unique in uniques:
        assert rig.pyfuse3.recv(LARGEST)
        rig.pyfuse3.send(ANSWER.pack(ANSWER.size, -2, unique))
    rig.lane.make_room()
    assert [rig.kernel.recv(LARGEST) for _ in uniques] == [
        ANSWER.pack(ANSWER.size, -2, unique) for unique in uniques
    ]


def test_those_that_were_announced_are_brought_though_the_loop_goes_on(new_rig: NewRig) -> None:
    """Others, what libfuse answers without us, when it waits or a few rounds later."""
    rig = new_rig()
    for announced, waits in ((True, False), (False, True), (False, False), (True, False)):
        unique = rig.send(READLINK)
        assert rig.pyfuse3.recv(LARGEST)
        if announced:
            rig.lane.make_room()
        answer = ANSWER.pack(ANSWER.size, -2, unique)
        rig.pyfuse3.send(answer)
        rig.lane.bring_answers(0)
        if not announced:
            assert not rig.nothing_came()
            for _ in range(1 if waits else 15):
                rig.lane.bring_answers(0.1 if waits else 0)
        assert rig.kernel.recv(LARGEST) == answer


@pytest.fixture
def small(new_rig: NewRig) -> Rig:
    """Its pair takes one large answer, and not two."""
    rig = new_rig()
    rig.pyfuse3.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    return rig


class Tasks:
    """Tasks of pyfuse3 that all answer in one round of the loop."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.lane = rig.lane
        self.state: CacheState  # nothing fails that would need one
        self.given = []
        for number in range(20):
            head = ANSWER.pack(ONE, 0, rig.send(READLINK))
            self.given.append(head + random.Random(number).randbytes(ONE - len(head)))
            assert rig.pyfuse3.recv(LARGEST)
        rig.pyfuse3.settimeout(0)
        self._go = trio.Event()

    async def start(self, nursery: trio.Nursery) -> None:
        """Returns when all of them wait for ``go``."""
        for answer in self.given:
            nursery.start_soon(self._give, answer)
        await trio.testing.wait_all_tasks_blocked()

    def go(self) -> None:
        """They answer in the next round."""
        self._go.set()

    @guarded
    async def _handler(self) -> None:
        await self._go.wait()

    async def _give(self, answer: bytes) -> None:
        await self._handler()
        with contextlib.suppress(BrokenPipeError):  # at the end of a mount
            self._rig.pyfuse3.send(answer)  # an error instead of the wait, in which all would hang


def test_tasks_that_answer_in_one_round_of_the_loop_find_room(small: Rig) -> None:
    """Nobody else would make any: the first answer that did not fit would stop the loop."""
    tasks = Tasks(small)

    async def serve() -> None:
        answers = Answers(small.lane)
        trio.lowlevel.add_instrument(answers)
        async with trio.open_nursery() as nursery:
            await tasks.start(nursery)
            tasks.go()
        trio.lowlevel.remove_instrument(answers)

    trio.run(serve)
    assert sorted(small.kernel.recv(LARGEST) for _ in tasks.given) == sorted(tasks.given)


def test_they_find_room_until_the_pair_is_shut(small: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a mount: who shuts it needs the GIL, with which pyfuse3 would wait."""
    tasks = Tasks(small)
    monkeypatch.setattr(pyfuse3, "terminate", lambda: None)

    async def requests() -> None:
        tasks.go()

    async def serve() -> None:
        laned = object.__new__(Laned)
        laned.lane = small.lane
        laned._requests = SimpleNamespace(serve=requests)  # type: ignore[assignment]  # a part
        async with trio.open_nursery() as nursery:
            await tasks.start(nursery)
            nursery.start_soon(laned.serve)

    small.give_turn()
    trio.run(serve)
    assert small.lane.ended
