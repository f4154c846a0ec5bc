"""The rows of the database as Python knows them, and what goes into one transaction."""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from fusecache.core.rows import U64, Rows
from fusecache.store.tallies import Tally, row_hash, values_crc

PART_REGIONS = 64
"""Regions that share a row of ``part``."""
WHOLE_IMAGE = -1
"""As a region number: the row stands for every region of the image."""


CHANGED_ELSEWHERE = -1
"""As ``ours_until_ns``: others have changed it while it was dirty here, that is certain."""


@dataclass(slots=True)
class ImageRow:
    """What the database remembers of an image; see ``schema`` for the columns."""

    id: int
    identity: bytes
    path: bytes
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    recorded_ns: int = 0
    trusted: int = 0
    writing: int = 0
    ours_until_ns: int = 0
    write_mode: str = ""

    def copy(self) -> "ImageRow":
        """The row as it is now, for a commit in another thread."""
        return ImageRow(*self.values())

    def values(self) -> tuple[Any, ...]:
        """In the order of ``IMAGE_COLUMNS``."""
        return _image_values(self)

    def lived_on(self) -> None:
        """A broken cache went on without the database: nobody can tell until when a change of this
        image may have been its own. What was found to be others' it has left alone."""
        self.writing = 0
        if self.ours_until_ns != CHANGED_ELSEWHERE:
            self.ours_until_ns = 0


IMAGE_COLUMNS = tuple(ImageRow.__dataclass_fields__)
_image_values: Callable[[ImageRow], tuple[Any, ...]] = attrgetter(*IMAGE_COLUMNS)


@dataclass(slots=True)
class Meta:
    """The row of ``meta``; see ``schema`` for the columns."""

    schema_version: int
    uuid: str
    block_size: int
    slot_count: int
    boot_id: str = ""
    clean: int = 1
    heartbeat_ns: int = 0
    pid: int = 0
    mountpoint: bytes = b""
    origin: bytes = b""
    commits: int = 0
    synced: int = 0
    block_rows: int = 0
    block_sum: int = 0
    pending_rows: int = 0
    pending_sum: int = 0
    region_rows: int = 0
    region_sum: int = 0
    image_rows: int = 0
    image_sum: int = 0
    part_rows: int = 0
    part_sum: int = 0

    def copy(self) -> "Meta":
        """The row as it is now."""
        return Meta(*self.values())

    def values(self) -> tuple[Any, ...]:
        """In the order of ``META_COLUMNS``."""
        return _meta_values(self)

    def tally(self, table: str) -> Tally:
        """Of ``block``, ``pending``, ``region``, ``image`` or ``part``."""
        return Tally(getattr(self, f"{table}_rows"), getattr(self, f"{table}_sum"))

    def set_tally(self, table: str, tally: Tally) -> None:
        """See ``tally``."""
        setattr(self, f"{table}_rows", tally.rows)
        setattr(self, f"{table}_sum", tally.sum)

    def add_pending(self, hashed: int) -> None:
        """A row of ``pending`` came."""
        was = Tally(self.pending_rows, self.pending_sum)
        self.pending_rows, self.pending_sum = was.plus(hashed)

    def appended(self, hashed: int) -> None:
        """A row of ``pending`` was one more commit."""
        self.commits += 1
        self.add_pending(hashed)

    def crc(self) -> int:
        """The row's checksum."""
        return values_crc(self.values())


META_COLUMNS = tuple(Meta.__dataclass_fields__)
_meta_values: Callable[[Meta], tuple[Any, ...]] = attrgetter(*META_COLUMNS)


def image_crc(values: tuple[object, ...]) -> int:
    """The checksum of a row of ``image``, given its values in the order of ``IMAGE_COLUMNS``."""
    return values_crc(values)


def image_hash(number: int, crc: int) -> int:
    """For the tally of ``image``."""
    return row_hash(number, 0, crc)


def region_hash(image: int, region: int, active: int) -> int:
    """For the tally of ``region``."""
    return row_hash(image, region + 1, active)


def pending_hash(seq: int, crc: int) -> int:
    """For the tally of ``pending``."""
    return row_hash(seq, 0, crc)


def part_hash(image: int, part: int, tally: Tally) -> int:
    """For the tally of ``part``."""
    return row_hash(image, part << 32 | tally.rows, tally.sum)


def block_hash(image: int, region: int, crc: int) -> int:
    """For the tally of ``block``."""
    return row_hash(image, region, crc)


@dataclass(slots=True)
class Batch:
    """What goes into one transaction, in this order."""

    rows: Rows | None = None
    drops: list[tuple[int, int]] = field(default_factory=list)
    """(image, first block): these blocks and all after them leave the database too (R6)."""
    images: list[ImageRow] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    intents: list[tuple[int, int, int]] = field(default_factory=list)
    """(image, region, active)"""
    settled: list[tuple[int, int]] = field(default_factory=list)
    """(image, region): rows to remove"""
    order: list[tuple[int, U64]] = field(default_factory=list)
    heartbeat_ns: int | None = None

    @property
    def rows_alone(self) -> bool:
        """Whether there are rows, and nothing else."""
        return (
            self.rows is not None
            and self.rows.slot.size > 0
            and self.heartbeat_ns is None
            and not (self.drops or self.images or self.forgotten)
            and not (self.intents or self.settled or self.order)
        )
