"""How pyfuse3's answers get to the kernel: by the event loop, in which pyfuse3 runs."""

import random
import socket
import struct
from collections.abc import Callable

import trio
import trio.testing

from fusecache.fuse.laned import LoopHooks
from tests.lane.rig import ANSWER, BATCH_FORGET, HEADER, Rig

NewRig = Callable[..., Rig]
FORGET, READLINK = 2, 5
LARGEST = 1 << 20
ONE = ANSWER.size + 100_000
"""An answer of which the pair below takes one, and not two."""


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


def test_tasks_that_answer_in_one_round_of_the_loop_do_not_wait_for_room(new_rig: NewRig) -> None:
    """Nobody else would make any: the first answer that did not fit would stop the loop."""
    rig = new_rig()
    rig.pyfuse3.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    rig.pyfuse3.settimeout(5)
    uniques = [rig.send(READLINK) for _ in range(20)]
    answers = [
        ANSWER.pack(ONE, 0, unique) + random.Random(unique).randbytes(ONE - ANSWER.size)
        for unique in uniques
    ]

    async def answer(number: int, event: trio.Event) -> None:
        assert HEADER.unpack_from(rig.pyfuse3.recv(LARGEST))[2] == uniques[number]
        await event.wait()
        rig.pyfuse3.send(answers[number])

    async def serve() -> None:
        hooks, event = LoopHooks(rig.lane, rig.core), trio.Event()
        hooks.begin()
        async with trio.open_nursery() as nursery:
            for number in range(len(answers)):
                await trio.lowlevel.checkpoint()
                nursery.start_soon(answer, number, event)
            await trio.testing.wait_all_tasks_blocked()
            event.set()
        hooks.end()

    trio.run(serve)
    assert sorted(rig.kernel.recv(LARGEST) for _ in answers) == sorted(answers)
