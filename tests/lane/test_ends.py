"""How a lane begins and ends, in trouble too."""

import contextlib
import gc
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lane import build
from tests.lane.rig import (
    BLOCK,
    FSYNC,
    NODE,
    PAGE,
    READ,
    READLINK,
    WRITE,
    Rig,
    in_thread,
    read_body,
    request,
    settle,
    until,
    write_body,
)
from tests.support.stamps import stamped

WRONG: list[dict[str, Any]] = [
    {"slot_count": 0},
    {"slot_count": 9},
    {"slot_count": 2**32 - 1},
    {"gate_count": 0},
    {"gate_count": 0xFFFF},
    {"block_shift": 11},
    {"block_shift": 21},
    {"block_shift": 64},
    {"page_shift": 11},
    {"page_shift": 17},
    {"tag_bits": 0},
    {"tag_bits": 33},
    {"tag_shift": 0},
    {"soiled_room": 2**32 - 1},
    {"readers": 0},
    {"readers": 65},
    {"spares": 257},
    {"max_background": 0x10000},
]


def threads() -> int:
    """How many threads of lanes there are, by their name: others come and go as they like."""
    names = list[str]()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return names.count("lane")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


Make = Any


@pytest.fixture
def make(rig: Rig, module: Path) -> Iterator[Make]:
    """Makes lanes over the core of the rig, each with sockets of its own; at the end of the test
    no thread and no descriptor may be left of them."""
    gc.collect()
    before = threads(), descriptors()
    with contextlib.ExitStack() as peers:

        def new(**changed: Any) -> Any:
            fuse, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            passed, pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peers.callback(kernel.close)
            peers.callback(pyfuse3.close)
            with fuse, passed:  # it has descriptors of its own
                numbers = rig.numbers(8, 2, 4, False, True) | {"arrays": rig.core.arrays()}
                mine = {"fuse": fuse.fileno(), "passed": passed.fileno()}
                return build.load(module).Lane(**(numbers | mine | changed))

        new.leaked = 0  # type: ignore[attr-defined]  # a test may set it
        yield new
    gc.collect()
    until(lambda: threads() == before[0], "threads to end")
    leaked = new.leaked  # type: ignore[attr-defined]  # see above
    assert descriptors() <= before[1] + leaked


# -- beginnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_numbers_that_do_not_fit_are_refused(make: Make, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make(**wrong)


def test_arrays_that_do_not_fit_are_refused(rig: Rig, make: Make) -> None:
    arrays = rig.core.arrays()
    for name, array in arrays.items():
        with pytest.raises(KeyError):
            make(arrays={k: v for k, v in arrays.items() if k != name})
        with pytest.raises(ValueError, match=name):
            make(arrays=arrays | {name: array[:-1].copy()})
        with pytest.raises((ValueError, BufferError)):
            make(arrays=arrays | {name: bytes(array)})
        with pytest.raises(TypeError):
            make(arrays=arrays | {name: None})


@pytest.mark.parametrize("name", ["fuse", "passed", "device"])
def test_a_descriptor_that_is_none_is_refused(make: Make, name: str) -> None:
    for number in (-1, 1 << 20):
        with pytest.raises(OSError):
            make(**{name: number})


@pytest.mark.skipif("FUSECACHE_LANE_FLAGS" in os.environ, reason="sanitizers need the room")
def test_without_room_for_threads_it_does_not_start(make: Make) -> None:
    """Some begin, and end again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        failed = 0
        for more in range(4 << 20, 60 << 20, 3 << 20):
            resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
            try:
                make(spares=64, ring=bool(more >> 20 & 1)).stop(20)
            except (OSError, MemoryError):
                failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert failed > 5


def test_an_unmounted_kernel_is_noticed_at_once(make: Make) -> None:
    """Threads may end before the last one is made: none of them is waited for in vain."""
    for _ in range(30):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        with ours:
            lane = make(fuse=ours.fileno(), passed=ours.fileno(), spares=0)
            ready, _, _ = select.select([lane.queue], [], [], 20)
            assert ready
            until(lambda lane=lane: lane.ended, "the end")
            began = time.monotonic()
            assert lane.stop(20)
            assert time.monotonic() - began < 10
            assert lane.take() == []


# -- ends ------------------------------------------------------------------------------------------


def test_the_end_of_the_kernel_ends_all(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    rig.kernel.close()
    ready, _, _ = select.select([rig.lane.queue], [], [], 20)
    assert ready
    until(lambda: rig.lane.ended, "the end")
    assert rig.lane.stop(20)


def test_an_idle_lane_stops(rig: Rig) -> None:
    before = threads()
    assert not rig.lane.ended
    assert rig.lane.stop(20)
    assert rig.lane.ended
    until(lambda: threads() == before - 8, "its threads to be gone")
    assert rig.lane.stop(0)
    assert select.select([rig.lane.queue], [], [], 0)[0]


def test_a_lane_that_nobody_holds_stops(make: Make) -> None:
    before = threads()
    lane = make()
    assert threads() == before + 8
    del lane
    gc.collect()
    until(lambda: threads() == before, "its threads to be gone")


def test_many_lanes_come_and_go(make: Make) -> None:
    """Signals that end a read, at any moment of a thread's life."""
    for number in range(60):
        lane = make(spares=number % 5, ring=bool(number % 2))
        if number % 3:
            assert lane.stop(20)
        del lane


def test_it_stops_while_readers_wait_for_room(rig: Rig) -> None:
    """So many writes that Python did not take that no buffer is left."""
    for number in range(60):
        rig.send(WRITE, write_body(9, number * BLOCK, bytes(PAGE)))
    until(lambda: rig.lane.counters()["queued"] == 32, "the buffers to be used up")
    assert rig.lane.stop(20)
    assert len(rig.lane.take()) == 32


def test_it_stops_while_readers_wait_for_pyfuse3(new_rig: Callable[..., Rig]) -> None:
    """The pair is full, and nobody reads from it."""
    rig = new_rig()

    def send() -> None:
        try:
            while True:
                rig.send(READLINK, bytes(60000))
        except OSError:
            return

    rig.kernel.settimeout(0.5)
    thread = in_thread(send)
    thread.join(20)
    assert rig.lane.counters()["forwarded"] > 2
    assert rig.lane.stop(20)


def test_it_stops_while_a_writer_waits_for_its_turn(rig: Rig) -> None:
    rig.soil(5, 0)
    rig.open(5, 1)
    for _ in range(8):
        rig.send(WRITE, write_body(1, 0, bytes(PAGE)))
    assert rig.lane.stop(20)


def test_a_thread_in_the_device_is_not_waited_for_for_ever(cold_rig: Rig) -> None:
    """What it would answer when it comes back goes nowhere, although the descriptors' numbers may
    be those of other files by then."""
    cold_rig.fill(5, 0)
    cold_rig.open(5, 1)
    cold_rig.held_read(0, PAGE)
    began = time.monotonic()
    assert cold_rig.lane.stop(0.2) is False
    assert time.monotonic() - began < 10
    cold_rig.device.set()
    assert cold_rig.lane.stop(20) is True
    assert not cold_rig.nothing_came()


@pytest.mark.parametrize("ring", [False, True])
def test_a_lane_with_a_thread_in_the_device_can_be_dropped(
    rig: Rig, make: Make, ring: bool
) -> None:
    """Its memory stays, for when the thread comes back; of its descriptors only the numbers."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, fuse:
        rig.fill(5, 0)
        before = threads()
        lane = make(fuse=fuse.fileno(), readers=1, spares=1, ring=ring)
        settle()
        gate = rig.core.gates.open(5, BLOCK)
        assert gate is not None
        gate.let(reads=True, writes=True)
        lane.open(1, NODE, gate.number, True)
        rig.device.set(cold=True, after=True)
        kernel.send(request(READ, read_body(1, 0, PAGE), unique=2))
        until(lambda: rig.device.inside == 1, "a thread in the device")
        del lane
        gc.collect()
        until(lambda: threads() == before + 1, "the others to end")
        fuse.close()
        kernel.settimeout(20)
        assert kernel.recv(1 << 20) == b""  # the lane has let go of it
        rig.device.set()
        until(lambda: threads() == before, "the thread to end")
    # Numbers: those that lead nowhere, the ring, and what wakes its thread.
    make.leaked = 6 + 2 * ring


def test_after_the_end_nothing_is_written_anywhere(rig: Rig, tmp_path: Path) -> None:
    """A descriptor's number may be another file's by then."""
    rig.fill(5, 0)
    rig.open(5, 1)
    unique = rig.left_to_python(FSYNC, bytes(16))[0]
    assert rig.lane.stop(20)
    limit = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    files = [(tmp_path / f"precious{n}").open("wb", buffering=0) for n in range(8)]
    assert min(file.fileno() for file in files) < limit + 8
    rig.lane.reply(unique, 0, b"data")
    rig.lane.reply(unique, 0, bytes(1 << 20))
    rig.lane.invalidate(NODE)
    assert [path.stat().st_size for path in sorted(tmp_path.glob("precious*"))] == [0] * 8
    assert not rig.nothing_came()
    for file in files:
        file.close()


def test_what_is_asked_of_a_lane_that_has_ended(rig: Rig) -> None:
    rig.lane.stop(20)
    rig.lane.enter()
    rig.lane.leave()
    rig.lane.open(1, NODE, 0, True)
    rig.lane.close(1)
    assert rig.lane.take() == []
    assert rig.lane.counters()["forwarded"] == 0
    with pytest.raises(ValueError):
        rig.lane.open(1, NODE, 1024, True)
    for seconds in (-1, 1e9, float("nan")):
        with pytest.raises(ValueError):
            rig.lane.stop(seconds)


def test_a_process_that_just_exits_is_not_held_up(module: Path, tmp_path: Path) -> None:
    """Neither are children: they have no threads of the lane, and nothing to end."""
    import subprocess
    import sys

    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tests.lane.rig import Rig, PAGE\n"
        f"rig = Rig(Path({str(tmp_path)!r}), Path({str(module)!r}))\n"
        "rig.fill(5, 0); rig.open(5, 1); rig.read(0, PAGE)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "rig.read(0, PAGE)\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_data_is_as_it_was_after_all_of_this(rig: Rig) -> None:
    rig.fill(5, 0)
    rig.open(5, 1)
    assert rig.read(0, BLOCK) == stamped(5, 0, BLOCK, 1)
