"""A session in front of which the lane answers hits.

kernel - /dev/fuse - lane -+- a hit, an fsync of nothing but data, a missing name, attributes that
                           |  were told before, free space, a close of who only reads: answered
                           |  there
                           +- other data, fsyncs, names and attributes, opens, closes, fallocate,
                           |  lseek: ``Requests``
                           +- all else: a socket pair, of which pyfuse3 has the other end
"""

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING

import pyfuse3
import trio

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse import queues
from fusecache.fuse.operations import Operations
from fusecache.fuse.requests import Requests
from fusecache.lane import lane_type
from fusecache.observe.logs import fields
from fusecache.store.superblock import DATA_OFFSET

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

log = logging.getLogger(__name__)

_LEAST_READERS = 2
"""Also on one processor: a read that lets a question overtake it must not hold up all others."""
_SPARES = 32
"""Threads that may wait for the SSD at a time, as deep as an SSD is fast; without io_uring."""
_PAIR_BYTES = 4 << 20
"""What may wait in the pair; without privilege the kernel's limit, some 200 KiB, has to do."""
_MOST_BACKGROUND = 0xFFFF
_PATIENCE = 5.0
"""Seconds that threads have to end, one of which may wait for the SSD."""


class Laned:
    """The lane of one mount, and what of its requests Python answers."""

    def __init__(self, operations: Operations, cache: BlockCache, fd: int) -> None:
        """Takes over ``fd``, the kernel's descriptor of the mount."""
        core, tuning = cache.core, cache.tuning
        self._fd = fd
        self._ours, self._theirs = _pair()
        core.gates.used = True
        arrays = core.arrays()
        # It has descriptors of its own, so that ours may be closed while a thread hangs.
        self.lane = lane_type()(
            arrays=arrays,
            slot_count=core.slot_count,
            gate_count=arrays["gates"].size // 16,
            block_shift=core.geometry.block_shift,
            page_shift=core.geometry.page_shift,
            tag_shift=32 - core.tag_bits,
            tag_bits=core.tag_bits,
            soiled_room=arrays["soiled"].size,
            fuse=fd,
            passed=self._ours.fileno(),
            device=cache.device.fd,
            data_offset=DATA_OFFSET,
            readers=min(tuning.lane_threads, max(_LEAST_READERS, os.cpu_count() or 1)),
            spares=_SPARES,
            ring=True,
            capability=operations.xattrs,
            max_background=min(tuning.max_background, _MOST_BACKGROUND),
            queues=queues.count() if queues.offered() and not queues.why_not() else 0,
            queue_threads=queues.threads(),
        )
        if queues.offered() and not self.lane.takes_queues:
            why = queues.why_not() or "io_uring is forbidden, or does not take FUSE's commands"
            log.info("requests will not come by io_uring: %s", why, extra=fields("no-queues"))
        self._requests = Requests(self.lane, operations, cache)
        operations.tell(self.lane)
        cache.lane_counters = self.lane.counters

    @property
    def path(self) -> str:
        """Where pyfuse3 may mount: libfuse takes this for a session that is mounted already."""
        return f"/dev/fd/{self._theirs.fileno()}"

    async def serve(self) -> None:
        """Until the kernel has no more requests, or cancelled; then pyfuse3 ends as well."""
        turns, answers = _Turns(self.lane), Answers(self.lane)
        trio.lowlevel.add_instrument(answers)
        turns.begin()
        try:
            await self._requests.serve()
        finally:
            turns.end()
            pyfuse3.terminate()  # before its end of the pair is closed to it
            with trio.CancelScope(shield=True):
                # A thread of its own, however many calls hang in the others.
                alone = trio.CapacityLimiter(1)
                await trio.to_thread.run_sync(self.lane.stop, _PATIENCE, limiter=alone)
            # Not before the pair is shut: until then pyfuse3 could wait for room in it.
            trio.lowlevel.remove_instrument(answers)

    def close(self) -> None:
        """After pyfuse3 has closed its end of the pair."""
        self._theirs.detach()  # libfuse has closed it
        self.abort()

    def abort(self) -> None:
        """Ends it all, also if pyfuse3 never had its end."""
        self.lane.stop(_PATIENCE)
        self._theirs.close()
        self._ours.close()
        os.close(self._fd)


def _pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    forced = getattr(socket, "SO_SNDBUFFORCE", 32)
    for end in pair:
        for option in (forced, socket.SO_SNDBUF):
            with contextlib.suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, option, _PAIR_BYTES)
                break
    return pair


# What an instrument does in each round of the loop, up to twenty for one request, is compiled, and
# has no Python around it: that was a fifth of what opening an image takes.


class Answers(trio.abc.Instrument):
    """Brings pyfuse3's answers to the kernel whenever the event loop is about to wait. Nobody else
    does. So that no task of pyfuse3 waits for room in the pair, in which others have answered in
    the same round, ``guarded`` sees to that before each answer."""

    def __init__(self, lane: "Lane") -> None:
        self.before_io_wait = lane.bring_answers  # type: ignore[assignment,method-assign]


class _Turns(trio.abc.Instrument):
    """Lets the lane change the core while the event loop has nothing to do."""

    def __init__(self, lane: "Lane") -> None:
        self.before_io_wait = lane.leave  # type: ignore[assignment,method-assign]
        self.after_io_wait = lane.enter  # type: ignore[assignment,method-assign]

    def begin(self) -> None:
        """For a caller in the event loop."""
        self.after_io_wait(0)
        trio.lowlevel.add_instrument(self)

    def end(self) -> None:
        """See ``begin``. The lane has no more turns."""
        with contextlib.suppress(KeyError):  # one that has failed is removed by trio
            trio.lowlevel.remove_instrument(self)
