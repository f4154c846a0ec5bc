"""Image: what the engine holds of one image while the mount lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from fusecache.config import WriteMode
from fusecache.core.gates import Gate, Gates
from fusecache.engine.locks import SpanLock
from fusecache.errors import OriginError
from fusecache.observe.counters import ImageCounters, Reason
from fusecache.store.block_map import ImageRow
from fusecache.store.origin import Attributes, OriginImage

if TYPE_CHECKING:
    from fusecache.engine.fills import Fetch

EIO = 5


@dataclass(slots=True)
class Intent:
    """Write intent of one region (R4): the row in the database, and the writes under way."""

    in_flight: int = 0
    begun: int = 0
    """Writes ever begun; tells whether one began since some moment."""
    last: float = 0.0
    active: bool = False
    """The committed row says active."""
    stable: bool = False
    """The row is on stable storage."""


@dataclass(slots=True)
class OriginSync:
    """A sync of the origin and those who wait for it; see ``lasting``."""

    done: trio.Event = field(default_factory=trio.Event)
    metadata: bool = False
    error: OriginError | None = None


@dataclass(slots=True)
class Stream:
    """Somebody who reads an image in order, in block numbers; see ``readahead``."""

    begun: int
    next: int
    """The block after the last one read."""
    used: int
    """When it was last seen, in reads."""
    ahead: int = 0
    """The block after the last one fetched ahead; 0 as long as it is not followed."""
    window: int = 0
    """Blocks to be ahead."""
    mark: int = -1
    """A hit in this block fetches on."""


@dataclass(slots=True)
class Image:
    """One image that is known: open, cached, or both.

    ``row`` is what the database holds of it or soon will; ``row_owed`` says that it changed.
    """

    row: ImageRow
    origin: OriginImage
    limiter: trio.CapacityLimiter
    cleaner_limiter: trio.CapacityLimiter
    """Its own, so that writebacks never keep a guest's calls waiting."""
    write_mode: WriteMode
    max_waiting: int
    _size: int = 0
    lock: SpanLock = field(default_factory=SpanLock)
    opening: trio.Lock = field(default_factory=trio.Lock)
    """Held while the image is opened, closed, checked or evicted. Taken before ``cleaning``."""
    cleaning: trio.Lock = field(default_factory=trio.Lock)
    """Held while dirty pages are on their way to the origin. Taken before ``lock``."""
    extending: trio.Lock = field(default_factory=trio.Lock)
    """Held while the origin's file is made longer ahead of a write."""
    running_sync: OriginSync | None = None
    """Of the origin's file, and the one that begins after it."""
    next_sync: OriginSync | None = None
    giving_up: trio.Event | None = None
    """Set when the origin's descriptors or the lock, on their way out now, are closed."""
    fetches: dict[int, Fetch] = field(default_factory=dict)
    """By block: fetches under way or being stored."""
    streams: list[Stream] = field(default_factory=list)
    marks: dict[int, Stream] = field(default_factory=dict)
    """By block: streams to be advanced by a hit there."""
    counters: ImageCounters = field(default_factory=ImageCounters)
    readers: int = 0
    writers: int = 0
    waiting: int = 0
    _detached: bool = False
    bypassed: bool = False
    """Detached because a rule says so, and not because it was evicted."""
    gone: bool = False
    """Its last name was removed."""
    draining: int = 0
    """Somebody wants it clean: no page becomes dirty that was not."""
    adopted: bool = True
    """Dirty data of an earlier life was fitted to the origin as it is now."""
    changed_elsewhere: bool = False
    """Others changed it while that data waited: the operator has to decide whose is kept."""
    own_pending: bool = False
    """The cleaner changed the origin and the record does not say so yet (P3)."""
    rescued: bool = False
    """The cache is broken, and the origin has all that is dirty here."""
    unsupported: set[int] = field(default_factory=set)
    """Modes of fallocate that the origin has not."""
    unreadable: dict[int, int] = field(default_factory=dict)
    """By block: dirty pages the cache device failed to read when last asked."""
    clean_error: str = ""
    """Why the last writeback failed; empty if it did not."""
    clean_failures: int = 0
    """Writebacks failed in a row."""
    clean_after: float = float("-inf")
    """Nothing is written back by the clock before then."""
    failed_syncs: int = 0
    """Origin syncs failed, ever: what was written before one may be gone (R5)."""
    sync_error_owed: bool = False
    """One of them may have lost what guests wrote: the next fsync has to fail for it (P2)."""
    row_owed: bool = False
    settles: bool = False
    """The recorded change time is of our own making and may be trusted once it is old enough."""
    intents: dict[int, Intent] = field(default_factory=dict)
    whole_intent: bool = False
    """A stable row stands for every region."""
    removing_intents: bool = False
    begun: int = 0
    """Writes with an intent begun, ever."""
    in_flight: int = 0
    """Writes under way that only the whole-image row stands for."""
    last_intent: float = float("-inf")
    """When the last write with an intent ended."""
    _changes: int = 0
    """Those of ``changes`` that the engine made: rows may have changed with them."""
    _lane_changes: int = 0
    """Those that the lane made through gates that are closed by now."""
    covered: int = 0
    """``changes`` as of when the barrier that runs, or ran last, began."""
    stable: int = 0
    """``changes`` that a completed barrier has made stable."""
    _covered: int = 0
    """The same two of ``_changes``."""
    _stable: int = 0
    _only_data: bool = False
    """Since the last fsync nothing has changed but what the lane wrote over."""
    guest_written: int = 1
    """``written`` as of the last change a guest made there: what the guest's fsync must cover. What
    the cleaner wrote stays dirty here until it is synced."""
    guest_data: int = 0
    """``written`` as of the last data of a guest that went there."""
    written: int = 1
    """Origin writes ended, ever, and one for what an earlier life may have left unsynced."""
    synced: int = 0
    """``written`` as of before the last origin sync that succeeded began."""
    attributes_set: int = 0
    """How many of ``written`` set attributes, and touched no data."""
    attributes_synced: int = -1
    """``attributes_set`` as of before the last sync of attributes, too; -1: there was none, and an
    earlier life may have left some unsynced."""
    closing: tuple[int, Attributes] | None = None
    """``data_written`` and the attributes as of a guest's last close(2)."""
    kernel_true: bool = False
    """What the kernel has cached of the image is true, as of the last open."""
    wrote: bool = False
    """Written to or truncated since its first writer came."""
    last_write: float = float("-inf")
    gate: Gate | None = None
    """What the lane knows of the image; None without a lane, or while nobody has it open."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size
        if self.gate is not None:
            self.gate.resize(size)

    @property
    def detached(self) -> bool:
        """Evicted or unlinked while open: uncached until the last handle closes."""
        return self._detached

    @detached.setter
    def detached(self, detached: bool) -> None:
        self._detached = detached
        self._tell_gate()

    @property
    def changes(self) -> int:
        """Writes that changed the cache of this image and were acknowledged, ever."""
        changes = self._changes + self._lane_changes
        return changes if self.gate is None else changes + self.gate.changes

    @property
    def data_written(self) -> int:
        """As ``written``, of data and sizes alone."""
        return self.written - self.attributes_set

    def changed(self) -> None:
        """One more of these, by the engine."""
        self._changes += 1
        self._more_than_data()

    def wrote_origin(self, *, data: bool) -> None:
        """A guest's write to the origin has ended, or a change of size or attributes."""
        self.written += 1
        self.guest_written = self.written
        if data:
            self.guest_data = self.written
        self._more_than_data()

    def barrier_begins(self) -> None:
        """What was acknowledged up to now will be stable."""
        self.covered, self._covered = self.changes, self._changes

    def barrier_done(self) -> None:
        """It is."""
        self.stable, self._stable = self.covered, self._covered

    def barrier_failed(self) -> None:
        """It is not, and nobody shall wait for it."""
        self.covered, self._covered = self.stable, self._stable

    def fsynced(self) -> None:
        """The engine has done an fsync. If all rows are stable now, and the origin has nothing
        unsynced, the next one is the lane's: until something else changes it has to sync no more
        than the cache device (R1)."""
        self._only_data = self._stable == self._changes and self.synced >= self.guest_written
        self._tell_gate()

    def _more_than_data(self) -> None:
        if self._only_data:
            self._only_data = False
            self._tell_gate()

    def open_gate(self, gates: Gates) -> None:
        """Somebody has opened the image: the lane may serve it."""
        if self.gate is None and (gate := gates.open(self.row.id, self._size)) is not None:
            self.gate = gate
            self.lock.told = self._tell_gate
            if self.marks:
                gate.mark(self.marks)
            self._tell_gate()

    def close_gate(self, gates: Gates) -> None:
        """Nobody has it open any more."""
        if (gate := self.gate) is not None:
            self.lock.told = None
            self.count_lane()
            self._lane_changes += gate.changes
            self._only_data = False
            self.gate = None
            gates.close(gate)

    def _tell_gate(self) -> None:
        if self.gate is not None:
            self.gate.let(
                reads=not self._detached,
                writes=not self.lock.exclusive,
                syncs=self._only_data,
            )

    def count_lane(self) -> None:
        """Adds what the lane did to the counters."""
        if self.gate is not None:
            self.counters.add_lane(self.gate.take())

    @property
    def id(self) -> int:
        """The number in tags and rows."""
        return self.row.id

    @property
    def name(self) -> str:
        """Where it was last seen, for logs."""
        return self.row.path.decode("utf-8", "backslashreplace")

    @property
    def handles(self) -> int:
        """How many opens are not closed yet."""
        return self.readers + self.writers

    @property
    def origin_open(self) -> bool:
        """Whether there is a descriptor to sync or stat by."""
        return self.origin.readable or self.origin.writable

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request that may wait for the origin, and refuses one too many (P6).

        Raises:
            OriginError: EIO; ``max_waiting`` requests of this image are waiting already.
        """
        if self.waiting >= self.max_waiting:
            error = OriginError(EIO, f"{self.waiting} requests are waiting for the origin already")
            self.counters.failed(error)
            self.counters.not_cached[Reason.WAITING_LIMIT] += 1
            raise error
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def sync_failed(self) -> None:
        """An origin sync failed. The kernel tells of it once and may have dropped all that was
        written since the last good one, so that the next one works although it is gone."""
        self.failed_syncs += 1
        if self.synced < self.guest_data:
            self.sync_error_owed = True

    def record(self, seen: Attributes, now_ns: int, settle_age: float, *, own: bool) -> None:
        """Takes ``seen`` for what the cached blocks belong to (P3).

        Args:
            now_ns: by the origin's clock; a change time younger than ``settle_age`` seconds
                might be shared by another change, so it is not trusted.
            own: the last change was ours, so that the record may be trusted once it is older.
        """
        row = self.row
        row.size, row.mtime_ns, row.ctime_ns = seen.size, seen.mtime_ns, seen.ctime_ns
        row.recorded_ns = now_ns
        row.trusted = int(now_ns - seen.ctime_ns >= settle_age * 1e9)
        row.ours_until_ns = min(row.ours_until_ns, 0)  # below 0 until we write it ourselves
        self.settles = own and not row.trusted
        self.row_owed = True

    def matches(self, seen: Attributes) -> bool:
        """Whether ``seen`` is what was recorded."""
        row = self.row
        return (row.size, row.mtime_ns, row.ctime_ns) == (
            seen.size,
            seen.mtime_ns,
            seen.ctime_ns,
        )
