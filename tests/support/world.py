"""A world with a power switch: origin, cache device and database that can be cut at every step.

The real engine and the real SQLite run over doubles of the two devices. A step is one call on a
device or one transaction. When the switch falls, everything that runs is torn down; what is left
is what a killed process leaves (all that was done), or what a power cut leaves: of every page
written since the last sync the old or the new version, page by page; of the database the last
stable commit or any light one after it.
"""

import errno
import fcntl
import os
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import trio

from fusecache.config import Tuning, WriteMode
from fusecache.engine.block_cache import BlockCache, open_cache
from fusecache.engine.ports import Clock, Threads
from fusecache.errors import CacheDeviceError, OriginError
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.origin import Attributes, OriginImage
from fusecache.store.superblock import Fence, Superblock, Witness
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE

PAGE = 4096
_PINNED_FROM = 100
TICK_NS = 4_000_000
"""Timestamps of the origin: one value for everything within a tick (Debian 6.1)."""


class Cut(BaseException):
    """The switch fell."""


def order_follows(seed: int) -> None:
    """The order in which trio runs its tasks follows from the seed, so that a failure can be run
    again."""
    scheduler = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # as trio's own tests do
    scheduler._r.seed(seed)


@dataclass
class Pages:
    """Bytes on a medium with a volatile cache in front of it."""

    data: bytearray = field(default_factory=bytearray)
    unsynced: dict[int, list[bytes]] = field(default_factory=dict)
    """By page: the versions since the last sync, the stable one first."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes; grows with zeros if need be."""
        if not data:
            return
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
        pages = range(offset // PAGE, (end - 1) // PAGE + 1)
        for page in pages:
            self.unsynced.setdefault(page, [self.page(page)])
        self.data[offset:end] = data
        for page in pages:
            self.unsynced[page].append(self.page(page))

    def page(self, page: int) -> bytes:
        """One page as it is now."""
        return bytes(self.data[page * PAGE : (page + 1) * PAGE])

    def sync(self) -> None:
        """All is stable."""
        self.unsynced.clear()

    def cut(self, chance: random.Random, version: int | None = None) -> None:
        """Every unsynced page becomes any one of its versions, or the same one of each (0: the
        stable one, -1: the last)."""
        for page, versions in sorted(self.unsynced.items()):
            chosen = chance.choice(versions) if version is None else versions[version]
            chosen = chosen.ljust(PAGE, b"\0")
            end = min(len(self.data), (page + 1) * PAGE)
            if end <= page * PAGE:
                continue
            self.data[page * PAGE : end] = chosen[: end - page * PAGE]
        self.unsynced.clear()


@dataclass
class OriginFile:
    """One file of the origin."""

    pages: Pages
    mtime_ns: int = 0
    ctime_ns: int = 0
    stable_size: int = 0
    stable_times: tuple[int, int] = (0, 0)
    uncut: bytes | None = None
    """All that was stable before the file was made shorter, if that is not stable yet."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.pages.data)

    def make_stable(self, *, metadata: bool = True) -> None:
        """Everything survives a power cut from now on: as fsync(2) does it, or fdatasync(2), which
        leaves the times out."""
        self.pages.sync()
        self.uncut = None
        self.stable_size = self.size
        if metadata:
            self.stable_times = (self.mtime_ns, self.ctime_ns)

    def shorten(self, size: int) -> None:
        """Cuts the file; until the next sync it may be found as it was before."""
        if self.uncut is None:
            stable = Pages(bytearray(self.pages.data), dict(self.pages.unsynced))
            stable.cut(random.Random(), 0)
            self.uncut = bytes(stable.data[: self.stable_size])
        pages = self.pages
        del pages.data[size:]
        for page in [page for page in pages.unsynced if page * PAGE >= size]:
            del pages.unsynced[page]
        if size % PAGE:
            pages.unsynced.pop(size // PAGE, None)
        self.stable_size = min(self.stable_size, size)

    def go_back(self) -> None:
        """Everything since the last sync never happened."""
        if self.uncut is not None:
            self.pages = Pages(bytearray(self.uncut))
        else:
            del self.pages.data[self.stable_size :]
            self.pages.cut(random.Random(), 0)
        self.mtime_ns, self.ctime_ns = self.stable_times
        self.make_stable()


class Faults:
    """Which calls fail. Kinds: ``origin.read``, ``device.write``, ``database`` and so on."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.fail: Callable[[str, int], bool] = lambda kind, number: False

    def check(self, kind: str) -> bool:
        """Counts a call; whether it fails."""
        number = self.calls.get(kind, 0)
        self.calls[kind] = number + 1
        return self.fail(kind, number)


class World:
    """Everything outside the engine.

    Args:
        directory: for the database.
        seed: of all chance.
    """

    def __init__(
        self,
        directory: Path,
        seed: int = 0,
        *,
        slots: int = 16,
        block_size: int = 4 * PAGE,
        write_mode: WriteMode = WriteMode.THROUGH,
    ) -> None:
        self.directory = directory
        self.chance = random.Random(seed)
        self.files: dict[int, OriginFile] = {}
        self.superblock = Superblock(block_size, slots, UUID(int=7))
        self.device = Pages(bytearray(slots * block_size))
        self.witness = Pages(bytearray(PAGE))
        self.faults = Faults()
        self.steps = 0
        self.cut_at: int | None = None
        self.boots = 1
        self.write_mode = write_mode
        self.slow = 0.0
        """Which share of the calls takes up to four seconds."""
        self.unsupported: set[int] = set()
        """Modes of fallocate that the origin has not."""
        self.cold = False
        """Nothing of the cache device is in memory."""
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        """Seconds that calls of a function take before and after they do what they do; that of a
        partial has a ``~`` before its name."""
        self.failed_syncs_lose = False
        """A failed sync of the origin drops all that was written since the last good one."""
        self.tuning = Tuning(
            commits_in_place=False, staging_bytes=1 << 20, intent_removal=3.0, barrier_interval=2.0
        )
        self.snapshots: list[bytes] = []
        self.clock_base = 1_700_000_000.0
        self.pinned: dict[int, int] = {}
        """Numbers of files by the descriptors ``pin`` gave out."""
        self._open_map: RecordedBlockMap | None = None
        self._database = directory / "map.sqlite"
        self.snapshots = [_new_database(self._database, self.superblock)]
        self._database.write_bytes(self.snapshots[0])

    # -- time and steps ----------------------------------------------------------------------------

    def now_ns(self) -> int:
        """By the origin's clock."""
        return int((self.clock_base + trio.current_time()) * 1e9)

    def tick_ns(self) -> int:
        """The timestamp a change made now gets."""
        return self.now_ns() // TICK_NS * TICK_NS

    def step(self) -> None:
        """One more step; the switch may fall here, and then nothing happens any more."""
        if self.cut_at is not None and self.steps >= self.cut_at:
            raise Cut
        self.steps += 1

    @property
    def is_cut(self) -> bool:
        """The switch has fallen."""
        return self.cut_at is not None and self.steps >= self.cut_at

    # -- files -------------------------------------------------------------------------------------

    def make_file(
        self, number: int, data: bytes, *, ctime_ns: int = 1_600_000_000_000_000_000
    ) -> None:
        """A file on the origin, stable and old."""
        self.files[number] = OriginFile(
            Pages(bytearray(data)), ctime_ns, ctime_ns, len(data), (ctime_ns, ctime_ns)
        )

    def change_outside(self, number: int, offset: int, data: bytes) -> None:
        """Somebody else writes to the origin, and syncs."""
        file = self.files[number]
        file.pages.write(offset, data)
        file.mtime_ns = file.ctime_ns = self.tick_ns()
        file.make_stable()

    def file(self, path_fd: int) -> OriginFile:
        """By number, or by a descriptor of ``pin``."""
        return self.files[path_fd if path_fd in self.files else self.pinned[path_fd]]

    # -- running -----------------------------------------------------------------------------------

    def open(self) -> AbstractAsyncContextManager[BlockCache]:
        """The engine over this world, recovering what is there."""
        self._open_map = RecordedBlockMap.opened(self, self._database)
        return open_cache(
            DeviceDouble(self),
            self._open_map,
            pid=1,
            mountpoint=b"/mnt",
            origin=b"/srv",
            write_mode=self.write_mode,
            tuning=self.tuning,
            clock=Clock(monotonic=trio.current_time, origin_ns=self.now_ns),
            threads=Threads(self.tuning, self._run_inline),
            new_origin=lambda: OriginDouble(self),
            pin=self.pin,
            boot_id=f"boot-{self.boots}",
        )

    def pin(self, path: bytes, identity: bytes) -> int | None:
        """A file's number is its descriptor; a real one, since it will be closed."""
        number = int(identity[2:] or b"1")
        if number not in self.files:
            return None
        low = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        # Far above the numbers of files, which stand for descriptors, too: see ``file``.
        fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _PINNED_FROM)
        os.close(low)
        self.pinned[fd] = number
        return fd

    async def _run_inline(
        self,
        fn: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> Any:
        """Runs a blocking call in place of a thread: in the limiter's order, and some take long."""
        async with limiter:
            name = getattr(fn, "__name__", "") or f"~{getattr(fn, 'func', fn).__name__}"
            await self._wait(self.before.get(name))
            result = fn(*args)
            await self._wait(self.after.get(name))
            return result

    async def _wait(self, seconds: float | None) -> None:
        if seconds is not None:
            await trio.sleep(seconds)
        elif self.slow and self.chance.random() < self.slow:
            await trio.sleep(self.chance.random() * 2)
        else:
            await trio.lowlevel.checkpoint()

    def kill(self) -> None:
        """The process is gone; all it did is there."""
        self.cut_at = None
        self._close()

    def _close(self) -> None:
        if self._open_map is not None:
            self._open_map.close()
            self._open_map = None

    def power_cut(self, *, worst: bool | None = None, newest: bool = False) -> None:
        """The host is gone with all that was not synced; so is the origin's cache."""
        self.cut_at = None
        self._close()
        self.boots += 1
        # The likeliest way to wrong bytes: all data on the origin, no time, no light commit.
        if worst is None:
            worst = self.chance.random() < 0.5
        self.device.cut(self.chance)
        self.witness.cut(self.chance)
        for _, file in sorted(self.files.items()):
            if file.uncut is not None and not worst and self.chance.random() < 0.5:
                file.go_back()
            grown = file.size - file.stable_size
            if grown > 0 and not worst and self.chance.random() < 0.5:
                del file.pages.data[file.stable_size :]
            if not worst:
                file.pages.cut(self.chance)
            if worst or self.chance.random() < 0.5:
                # Data can be stable before the inode is: the times go back, the bytes do not.
                file.mtime_ns, file.ctime_ns = file.stable_times
            file.make_stable()
        restored = self.snapshots[0] if worst else self.chance.choice(self.snapshots)
        if newest:
            restored = self.snapshots[-1]
        self._restore(restored)

    def cut_exactly(self, *, device: int, origin: int, database: int) -> None:
        """A power cut that leaves what was stable (0) or the last version (-1) everywhere, of the
        database any (-2: all but the last). The origin's times go back either way."""
        self.cut_at = None
        self._close()
        self.boots += 1
        self.device.cut(self.chance, device)
        self.witness.cut(self.chance, device)
        for file in self.files.values():
            if origin == 0:
                file.go_back()
            file.mtime_ns, file.ctime_ns = file.stable_times
            file.make_stable()
        self._restore(self.snapshots[max(database, -len(self.snapshots))])

    def _restore(self, restored: bytes) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._database}{suffix}").unlink(missing_ok=True)
        self._database.write_bytes(restored)
        self.snapshots = [restored]


class DeviceDouble(CacheDevice):
    """A cache device in memory."""

    def __init__(self, world: World) -> None:
        super().__init__(Path("/dev/double"), -1, world.superblock)
        self._world = world

    def _call(self, kind: str) -> None:
        self._world.step()
        if self._world.faults.check(f"device.{kind}"):
            raise CacheDeviceError(f"injected: device {kind}")

    def try_read(self, position: int, buffer: memoryview) -> bool:
        """Sometimes in memory, sometimes not."""
        if self._world.cold or self._world.chance.random() < 0.3:
            return False
        buffer[:] = self._world.device.data[position : position + len(buffer)]
        return True

    def read(self, position: int, length: int) -> bytes:
        self._call("read")
        return bytes(self._world.device.data[position : position + length])

    def write(self, position: int, data: bytes | memoryview) -> None:
        data = bytes(data)
        for at in range(0, len(data), PAGE):
            self._call("write")
            self._world.device.write(position + at, data[at : at + PAGE])

    def sync(self) -> None:
        owed, self._owed = self._owed, None
        self._call("sync")
        if owed is not None:
            raise CacheDeviceError("a sync failed that somebody else asked for")
        self._world.device.sync()
        self._world.witness.sync()
        self.synced_commit = self._told

    def read_witness(self) -> Witness:
        return Witness.unpack(bytes(self._world.witness.data))

    def write_witness(self, witness: Witness, *, stable: bool = False) -> None:
        """No step: a kill right before it is as good as one right before the commit."""
        self._world.witness.write(0, witness.pack())
        self._told = witness.commits
        if stable:
            self._world.witness.sync()

    def set_fence(self, fence: Fence) -> None:
        self._call("fence")
        self.superblock = self._world.superblock = replace(self.superblock, fence=fence)

    def close(self) -> None:
        """Nothing to close."""


class OriginDouble(OriginImage):
    """The origin's side of an image, in memory; ``path_fd`` is the file's number."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._file: OriginFile | None = None
        self._reads = self._writes = self._locked = False

    def _call(self, kind: str) -> OriginFile:
        self._world.step()
        assert self._file is not None, "used while closed"
        if self._world.faults.check(f"origin.{kind}"):
            raise OriginError(5, f"injected: origin {kind}")
        return self._file

    def open(self, path_fd: int, *, write: bool) -> Attributes:
        self._file = self._world.file(path_fd)
        self._reads |= not write
        self._writes |= write
        return self.attributes()

    def opener(self, path_fd: int, *, write: bool) -> Callable[[], Attributes]:
        return partial(self.open, path_fd, write=write)

    def locker(self, path_fd: int) -> Callable[[], None]:
        return partial(self.lock, path_fd)

    def extend(self, size: int) -> int:
        if self._call("stat").size < size:
            self.truncate(size)
        return self._call("stat").size

    def lock(self, path_fd: int) -> None:
        self._world.step()
        self._locked = True

    def unlock(self) -> None:
        """The end of the lock, in a thread."""

    def unlocker(self) -> Callable[[], None]:
        self._locked = False
        return self.unlock

    @property
    def locked(self) -> bool:
        return self._locked

    def attributes(self) -> Attributes:
        file = self._call("stat")
        return Attributes(file.size, file.mtime_ns, file.ctime_ns)

    def nameless(self) -> bool:
        return False

    @property
    def readable(self) -> bool:
        return self._reads

    @property
    def writable(self) -> bool:
        return self._writes

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._call("read").pages.data[offset : offset + length])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        data = bytes(data)
        for at in range(0, len(data), PAGE):
            file = self._call("write")
            file.pages.write(offset + at, data[at : at + PAGE])
            file.mtime_ns = file.ctime_ns = self._world.tick_ns()

    def truncate(self, size: int) -> None:
        file = self._call("truncate")
        if size < file.size:
            file.shorten(size)
        else:
            file.pages.data.extend(bytes(size - file.size))
        file.mtime_ns = file.ctime_ns = self._world.tick_ns()

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """One step; if it fails, half of it was done, in sectors."""
        if mode in self._world.unsupported:
            raise OriginError(errno.EOPNOTSUPP, "not supported")
        try:
            self._allocate(self._call("allocate"), mode, offset, length)
        except OriginError:
            assert self._file is not None
            self._allocate(self._file, mode, offset, length // 1024 * 512)
            raise

    def _allocate(self, file: OriginFile, mode: int, offset: int, length: int) -> None:
        grown = offset + length - file.size
        if grown > 0 and not mode & FALLOC_KEEP_SIZE:
            file.pages.data.extend(bytes(grown))
        if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
            file.pages.write(offset, bytes(max(0, min(length, file.size - offset))))
        file.mtime_ns = file.ctime_ns = self._world.tick_ns()

    def seek(self, offset: int, whence: int) -> int | None:
        """A hole is a page of zeros; so is the end."""
        file = self._call("seek")
        if offset >= file.size:
            return None
        for page in range(offset // PAGE, -(-file.size // PAGE)):
            if any(file.pages.page(page)) == (whence == os.SEEK_DATA):
                return max(offset, page * PAGE)
        return None if whence == os.SEEK_DATA else file.size

    def sync(self, *, metadata: bool = True) -> None:
        try:
            self._call("sync").make_stable(metadata=metadata)
        except OriginError:
            if self._world.failed_syncs_lose and self._file is not None:
                self._file.go_back()
            raise

    def close(self) -> None:
        """The end of the descriptors, in a thread."""

    def closer(self) -> Callable[[], None]:
        self._reads = self._writes = self._locked = False
        return self.close


class RecordedBlockMap(BlockMap):
    """The real block map; every commit leaves a snapshot of what a power cut may leave."""

    world: World

    @classmethod
    def opened(cls, world: World, path: Path) -> "RecordedBlockMap":
        """Opens it for the world's engine."""
        block_map = cls.open(path, world.superblock)
        assert isinstance(block_map, RecordedBlockMap)
        block_map.world = world
        # What is stable is kept here; the disk below need not sync for it.
        block_map._conn.execute("PRAGMA synchronous = OFF")
        return block_map

    def _transaction(self, *, stable: bool) -> Any:
        self._stable = stable  # so that the base class does not set ``synchronous``
        return _recorded(self, super()._transaction(stable=stable), stable)

    def _append(self, rows: Any) -> None:
        self._stable = False
        with _recorded(self, nullcontext(), stable=False):
            super()._append(rows)

    def snapshot(self) -> bytes:
        """The whole database as it is now."""
        return _serialized(self)

    def checkpoint(self, *, truncate: bool = False) -> None:
        """Harmless to what a cut may leave."""
        super().checkpoint(truncate=truncate)


class _recorded:
    def __init__(self, block_map: RecordedBlockMap, inner: Any, stable: bool) -> None:
        self._map, self._inner, self._stable = block_map, inner, stable

    def __enter__(self) -> None:
        world = self._map.world
        world.step()
        if world.faults.check("database"):
            raise ValueError("injected: database")
        self._inner.__enter__()

    def __exit__(self, *exc: Any) -> Any:
        result = self._inner.__exit__(*exc)
        if exc[0] is None:
            world = self._map.world
            snapshot = self._map.snapshot()
            if self._stable:
                world.snapshots = [snapshot]
            else:
                world.snapshots.append(snapshot)
        return result


_new: dict[Superblock, bytes] = {}
"""Databases of new caches: to make one takes longer than a short life."""


def _new_database(path: Path, superblock: Superblock) -> bytes:
    if superblock not in _new:
        block_map = BlockMap.create(path, superblock)
        _new[superblock] = _serialized(block_map)
        block_map.close()
    return _new[superblock]


def _serialized(block_map: BlockMap) -> bytes:
    """With journal mode WAL in its header and no log beside it: as after a checkpoint."""
    return bytes(block_map._conn.serialize())
