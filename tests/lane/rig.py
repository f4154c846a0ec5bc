"""A lane without a mount: a socket pair for ``/dev/fuse``, a plain file for the cache device, and
the real core."""

import contextlib
import ctypes
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fusecache.core.gates import GATES, Gate
from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from tests.lane import build
from tests.support.stamps import stamped

BLOCK = 64 * 1024
PAGE = 4096
FULL = 0xFFFF
DATA_OFFSET = 1 << 20
LOOKUP, GETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 1, 3, 14, 15, 16, 17, 18, 20
KILLPRIV_V2 = 1 << 28
FORGET, READLINK, GETXATTR, FLUSH, INIT, INTERRUPT = 2, 5, 22, 25, 26, 36
BATCH_FORGET, FALLOCATE, LSEEK = 42, 43, 46
HEADER = struct.Struct("<IIQQIIIHH")
ANSWER = struct.Struct("<IiQ")
_READ = struct.Struct("<QQIIQII")
_MORE = 1 << 22
PATIENCE = 20.0
NODE = 7
"""The node of handle 1."""
PID = 4711
"""Of who asks."""


class Device:
    """Says how the device behaves; see held_device.c."""

    def __init__(self, module: Path) -> None:
        self._library = ctypes.CDLL(str(module))
        self._library.device_calls.restype = ctypes.c_long

    def set(
        self,
        *,
        cold: bool = False,
        before: bool = False,
        after: bool = False,
        broken: bool = False,
        busy: bool = False,
        pieces: bool = False,
        forbidden: bool = False,
        sick: bool = False,
        syncing: bool = False,
    ) -> None:
        """Nothing in memory; calls wait before or after what they do; calls fail; writes compute
        for a while; reads by io_uring come in pieces, or there is no io_uring, or those that begin
        wait until ``heal``; syncs wait."""
        self._library.device_set(
            cold, before, after, broken, busy, pieces, forbidden, sick, syncing
        )

    def heal(self, data: bytes) -> None:
        """What the one read finds that waits in the sick place."""
        self._library.device_heal(data, ctypes.c_size_t(len(data)))

    @property
    def inside(self) -> int:
        """Calls that wait."""
        return int(self._library.device_inside())

    @property
    def reads(self) -> int:
        """Calls for data, ever."""
        return int(self._library.device_calls(0))

    @property
    def writes(self) -> int:
        """Calls with data, ever."""
        return int(self._library.device_calls(1))

    @property
    def syncs(self) -> int:
        """Syncs, ever."""
        return int(self._library.device_calls(2))


def request(
    opcode: int, body: bytes = b"", *, unique: int, node: int = NODE, length: int | None = None
) -> bytes:
    """A request as the kernel sends it; ``length`` for one that lies about its own."""
    size = HEADER.size + len(body) if length is None else length
    return HEADER.pack(size, opcode, unique, node, 0, 0, PID, 0, 0) + body


def read_body(handle: int, offset: int, length: int) -> bytes:
    """``struct fuse_read_in``."""
    return _READ.pack(handle, offset, length, 0, 0, 0, 0)


def write_body(handle: int, offset: int, data: bytes, length: int | None = None) -> bytes:
    """``struct fuse_write_in`` and the data."""
    size = len(data) if length is None else length
    return _READ.pack(handle, offset, size, 0, 0, 0, 0) + data


def until(true: Callable[[], object], what: str) -> None:
    """Waits until something is so; fails if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.0005)


def _pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (getattr(socket, "SO_SNDBUFFORCE", 32), socket.SO_SNDBUF):
            with contextlib.suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, option, _MORE)
                break
    return pair


def settle() -> None:
    """Returns when all other threads sleep: one of a lane that has not come so far yet takes over
    from nobody."""

    def asleep() -> bool:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has ended
                state = (thread / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "S" and int(thread.name) != threading.get_native_id():
                    return False
        return True

    for _ in range(5):  # some may sleep for a moment because others hold a lock
        until(asleep, "threads of the lane to be ready")
        time.sleep(0.0002)


class Rig:
    """Everything around a lane, and the kernel's part played by the test."""

    def __init__(
        self,
        base: Path,
        module: Path,
        *,
        slots: int = 8,
        readers: int = 2,
        spares: int = 4,
        ring: bool = False,
        capability: bool = True,
        **device: bool,
    ) -> None:
        self.device = Device(module)
        self.device.set(**device)
        self.core = CacheIndex(Geometry.of(BLOCK), slots)
        self.core.gates.used = True
        self.path = base / "cache.img"
        self.path.write_bytes(b"")
        os.truncate(self.path, DATA_OFFSET + slots * BLOCK)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self.kernel, self.fuse = _pair()
        self.pyfuse3, self.passed = _pair()
        self.kernel.settimeout(PATIENCE)
        self.pyfuse3.settimeout(PATIENCE)
        self._uniques = itertools.count(2, 2)
        arrays = self.core.arrays()
        self.lane: Any = build.load(module).Lane(
            **self.numbers(slots, readers, spares, ring, capability), arrays=arrays
        )
        settle()
        self.turn_is_ours = True
        self._ended = False

    def numbers(
        self, slots: int, readers: int, spares: int, ring: bool, capability: bool
    ) -> dict[str, Any]:
        """The arguments of ``Lane`` but for the arrays."""
        return {
            "slot_count": slots,
            "gate_count": GATES,
            "block_shift": self.core.geometry.block_shift,
            "page_shift": self.core.geometry.page_shift,
            "tag_shift": 32 - self.core.tag_bits,
            "tag_bits": self.core.tag_bits,
            "soiled_room": self.core.arrays()["soiled"].size,
            "fuse": self.fuse.fileno(),
            "passed": self.passed.fileno(),
            "device": self.fd,
            "data_offset": DATA_OFFSET,
            "readers": readers,
            "spares": spares,
            "ring": ring,
            "capability": capability,
            "max_background": 64,
        }

    def close(self) -> None:
        """Ends everything; fails if a thread does not end."""
        if not self._ended:
            self._ended = True
            self.device.set()
            ended = self.lane.stop(PATIENCE)
            for end in (self.kernel, self.fuse, self.pyfuse3, self.passed):
                end.close()
            os.close(self.fd)
            self.lane = None
            assert ended, "threads of the lane are left"

    # -- the cache ---------------------------------------------------------------------------------

    def fill(self, image: int, block: int, *, pages: int = FULL, version: int = 1) -> int:
        """Puts stamped data in the cache, in the order in which the engine does; the slot."""
        slot = self.core.begin_store(image, block)
        assert slot is not None
        self.put(slot, stamped(image, block * BLOCK, BLOCK, version))
        self.core.stored(slot, pages)
        return slot

    def soil(self, image: int, block: int, *, pages: int = FULL) -> int:
        """As ``fill``, and the pages are dirty and committed."""
        slot = self.core.begin_store(image, block)
        assert slot is not None
        self.put(slot, stamped(image, block * BLOCK, BLOCK, 1))
        self.core.stored_dirty(slot, pages)
        self.core.unpin(slot)
        return slot

    def put(self, slot: int, data: bytes, offset: int = 0) -> None:
        """Writes to a slot."""
        os.pwrite(self.fd, data, DATA_OFFSET + slot * BLOCK + offset)

    def get(self, slot: int, offset: int = 0, length: int = BLOCK) -> bytes:
        """What is in a slot."""
        return os.pread(self.fd, length, DATA_OFFSET + slot * BLOCK + offset)

    def drop(self, image: int) -> None:
        """Every clean block of an image leaves, and its slot may be used at once."""
        self.core.drop(image, self.core.slots_of(image), dirty=False)
        self.core.release(self.core.take_leaving())

    def open(
        self,
        image: int,
        blocks: int,
        *,
        handle: int = 1,
        node: int = NODE,
        tail: int = 0,
        writes: bool = True,
    ) -> Gate:
        """A gate, open for reads and writes, and a handle that passes it."""
        gate = self.core.gates.open(image, blocks * BLOCK + tail)
        assert gate is not None
        gate.let(reads=True, writes=True)
        self.lane.open(handle, node, gate.number, writes)
        return gate

    def pyfuse3_answers(self, message: bytes) -> None:
        """What pyfuse3 does in its thread, and what follows there."""
        self.pyfuse3.send(message)
        self.lane.bring_answers()

    # -- turns -------------------------------------------------------------------------------------

    def give_turn(self) -> None:
        """From here on writes of the lane may change the core: as the event loop when it waits."""
        self.lane.leave()

    def take_turn(self) -> None:
        """The end of that."""
        self.lane.enter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The event loop waits meanwhile."""
        self.give_turn()
        try:
            yield
        finally:
            self.take_turn()

    # -- the kernel --------------------------------------------------------------------------------

    def send(self, opcode: int, body: bytes = b"", *, node: int = NODE) -> int:
        """Sends a request; returns its number."""
        unique = next(self._uniques)
        self.kernel.send(request(opcode, body, unique=unique, node=node))
        return unique

    def answer(self, timeout: float = PATIENCE) -> tuple[int, int, bytes]:
        """The next answer: its number, its errno, its data."""
        self.kernel.settimeout(timeout)
        message = self.kernel.recv(_MORE)
        length, error, unique = ANSWER.unpack_from(message)
        assert length == len(message), "the kernel would refuse this"
        return unique, -error, message[ANSWER.size :]

    def answer_to(self, unique: int) -> tuple[int, bytes]:
        """The next answer, which must be to this request: errno and data."""
        found, error, data = self.answer()
        assert found == unique
        return error, data

    def read(self, offset: int, length: int, handle: int = 1) -> bytes:
        """A read that the lane must answer."""
        error, data = self.answer_to(self.send(READ, read_body(handle, offset, length)))
        assert error == 0
        return data

    def write(self, offset: int, data: bytes, handle: int = 1) -> None:
        """A write that the lane must answer, in a turn of its own."""
        with self.waiting():
            self.writes([(offset, data)], handle)

    def writes(self, wanted: list[tuple[int, bytes]], handle: int = 1) -> None:
        """Writes that the lane must answer, for a caller that has given its turn. On a busy machine
        a writer may think that the device is slow, and leave the next ones to Python: these are
        sent once more."""
        deadline = time.monotonic() + PATIENCE
        left = {self.send(WRITE, write_body(handle, *one)): one for one in wanted}
        while left:
            assert time.monotonic() < deadline, "the lane leaves all writes to Python"
            select.select([self.kernel, self.lane.queue], [], [], PATIENCE)
            while message := self.nothing_came():
                _, error, unique = ANSWER.unpack_from(message)
                size = len(left.pop(unique)[1])
                assert (error, message[ANSWER.size :]) == (0, struct.pack("<II", size, 0))
            for taken in self.lane.take():
                time.sleep(0.05)
                again = left.pop(taken[0])
                left[self.send(WRITE, write_body(handle, *again))] = again

    # -- Python's part -----------------------------------------------------------------------------

    def take(self) -> list[tuple[Any, ...]]:
        """What the lane gives to Python, once there is something."""
        ready, _, _ = select.select([self.lane.queue], [], [], PATIENCE)
        assert ready, "nothing is for Python"
        return list(self.lane.take())

    def left_to_python(self, opcode: int, body: bytes) -> tuple[Any, ...]:
        """Sends a request that must not be answered by the lane; returns what Python gets."""
        unique = self.send(opcode, body)
        (taken,) = self.take()
        assert taken[:2] == (unique, opcode)
        assert not self.nothing_came()
        return taken

    def nothing_came(self) -> bytes:
        """Empty unless an answer lies there."""
        self.kernel.settimeout(0.0)
        try:
            return self.kernel.recv(_MORE)
        except BlockingIOError:
            return b""

    def read_is_pythons(self, offset: int, length: int, handle: int = 1) -> None:
        """Such a read is not answered by the lane."""
        taken = self.left_to_python(READ, read_body(handle, offset, length))
        assert taken[2:] == (handle, offset, length, 0, None)

    def held_read(self, offset: int, length: int, handle: int = 1) -> int:
        """Sends a read that is not in memory and waits until it hangs with what it has read."""
        self.device.set(cold=True, after=True)
        unique = self.send(READ, read_body(handle, offset, length))
        until(lambda: self.device.inside == 1, "a thread in the device")
        return unique


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Runs something beside the test."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
