"""Counters of one image and of one cache: plain integers, added to where things happen.

All of them only ever grow. Adding is all that is done for a request; ratios, rates and sums are
made once a tick or when somebody asks.
"""

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from fusecache.observe.latency import OriginLatency


class Reason(enum.IntEnum):
    """Why a guest's request was not served by the cache, or a fetched block not kept in it."""

    COLD = 0
    """A read found pages that were not in the cache yet, and fetched them."""
    AROUND = 1
    """A write in write-around."""
    DIRTY_LIMIT = 2
    """A write in write-back went through: as much as may be is dirty."""
    DRAINING = 3
    """A write in write-back went through: the image is being flushed for evict or an unmount."""
    DETACHED = 4
    """The image was evicted or removed while it is open."""
    BYPASS = 5
    """A rule says that the image is not cached."""
    WAITING_LIMIT = 6
    """Refused: too many requests of the image wait for its origin."""
    ORIGIN_ERROR = 7
    """The origin failed it."""
    CACHE_ERROR = 8
    """The cache device failed, or storing pauses because it did."""
    DEGRADED = 9
    """The cache is broken until the next mount."""
    NO_SLOT = 10
    """No slot was free: a fetched block was not kept, or a write in write-back went through."""
    STAGING_LIMIT = 11
    """A fetched block was not kept: too much waited for its write to the SSD."""

    @property
    def text(self) -> str:
        """For people and for labels: ``dirty limit``."""
        return self.name.lower().replace("_", " ")


NOT_KEPT = (Reason.CACHE_ERROR, Reason.NO_SLOT, Reason.STAGING_LIMIT)
"""What a fetched block may not be kept for."""
NOT_CACHED = tuple(reason for reason in Reason if reason is not Reason.STAGING_LIMIT)
"""What a request may not be served for."""


class Served(enum.Enum):
    """Where a write went before it was acknowledged."""

    BACK = "back"
    """To the cache alone."""
    THROUGH = "through"
    """To the origin and, where there was room, to the cache."""
    AROUND = "around"
    """To the origin alone."""


def _per_reason() -> "array[int]":
    return array("Q", bytes(8 * len(Reason)))


@dataclass(slots=True)
class ImageCounters:
    """Bytes and calls of one image since the mount."""

    read_hits: int = 0
    """Reads by guests, all of which the cache had."""
    read_hit_bytes: int = 0
    """Read by guests and served from the cache."""
    ssd_reads: int = 0
    """Of ``read_hits``, those whose data was on the SSD and not in memory."""
    ssd_read_bytes: int = 0
    """Of ``read_hit_bytes``, what was on the SSD and not in memory."""
    read_misses: int = 0
    """Reads by guests that needed the origin for some of it, or failed."""
    read_miss_bytes: int = 0
    """Read by guests and served from the origin, through the cache or past it."""
    past_read_bytes: int = 0
    """Of ``read_miss_bytes``, what went past the cache."""
    writes: int = 0
    """Writes by guests that were acknowledged."""
    write_bytes: int = 0
    """Written by guests."""
    through_writes: int = 0
    """Of ``writes``, those that went to the origin and the cache. What went neither through nor
    around went to the cache alone."""
    through_write_bytes: int = 0
    around_writes: int = 0
    """Of ``writes``, those that went to the origin alone."""
    around_write_bytes: int = 0
    origin_reads: int = 0
    origin_read_bytes: int = 0
    read_ahead_bytes: int = 0
    """Asked of the origin ahead of a guest that reads in order; part of the above."""
    origin_writes: int = 0
    origin_write_bytes: int = 0
    written_back_bytes: int = 0
    """Of ``origin_write_bytes``, what was dirty in the cache before."""
    discards: int = 0
    """Ranges that guests have freed or set to zeros (fallocate)."""
    discard_bytes: int = 0
    """How much that was, as far as it lay within the image."""
    origin_others: int = 0
    """Calls of the origin for ranges and holes, and not for data, that it answered."""
    errors: int = 0
    """Calls the origin failed."""
    last_error: str = ""
    not_cached: "array[int]" = field(default_factory=_per_reason)
    """By ``Reason``: requests of guests that the cache could not serve alone; one reason each."""
    not_kept: "array[int]" = field(default_factory=_per_reason)
    """By ``Reason``: blocks that were fetched and not kept."""
    latency: OriginLatency = field(default_factory=OriginLatency)

    def failed(self, error: object) -> None:
        """One more error."""
        self.errors += 1
        self.last_error = str(error)

    def wrote(self, served: Served, length: int) -> None:
        """One more write, of ``length`` bytes, that was not simply a hit."""
        self.writes += 1
        self.write_bytes += length
        if served is Served.THROUGH:
            self.through_writes += 1
            self.through_write_bytes += length
        elif served is Served.AROUND:
            self.around_writes += 1
            self.around_write_bytes += length

    def add_lane(self, counted: Sequence[int]) -> None:
        """Hits and overwrites that the lane served by itself, in the order of a gate's numbers."""
        reads, read_bytes, ssd_reads, ssd_read_bytes, writes, write_bytes = counted
        self.read_hits += reads
        self.read_hit_bytes += read_bytes
        self.ssd_reads += ssd_reads
        self.ssd_read_bytes += ssd_read_bytes
        self.writes += writes
        self.write_bytes += write_bytes

    @property
    def untouched(self) -> bool:
        """Nothing was read, written or failed."""
        return not (
            self.read_hits or self.read_misses or self.writes or self.origin_reads
            or self.origin_writes or self.origin_others or self.errors
        )  # fmt: skip

    def add(self, other: "ImageCounters") -> None:
        """Adds ``other``, for sums over images. Latencies are not added: ``CacheCounters`` has
        their sum."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason in Reason:
            self.not_cached[reason] += other.not_cached[reason]
            self.not_kept[reason] += other.not_kept[reason]


_NUMBERS = [part.name for part in fields(ImageCounters) if part.type in (int, "int")]


@dataclass(slots=True)
class CacheCounters:
    """Events of one mount since it began."""

    stored_bytes: int = 0
    """Written to the SSD."""
    not_stored: int = 0
    """Fetched blocks that were not stored: no free slot, staging full, or a failing SSD."""
    reclaimed: int = 0
    barriers: int = 0
    light_commits: int = 0
    stable_commits: int = 0
    device_errors: int = 0
    unexpected: int = 0
    """Exceptions nobody foresaw; each one was answered with EIO and logged."""
    latency: OriginLatency = field(default_factory=OriginLatency)
    """Of all images together."""
    forgotten: ImageCounters = field(default_factory=ImageCounters)
    """Sums over images that are not known any more: what a mount did never gets less."""
