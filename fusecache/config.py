"""What an operator may set, checked once, in one place.

Imports nothing of the project but ``errors``; every other package may import this one.
"""

import enum
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import fsdecode
from pathlib import Path

from fusecache.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

DEFAULT_BLOCK_SIZE = 64 * KIB
MIN_BLOCK_SIZE = 4 * KIB
MAX_BLOCK_SIZE = 1 * MIB

LOG_LEVELS = ("debug", "info", "warning", "error")

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class LaneUse(enum.StrEnum):
    """Whether hits are served by compiled code."""

    AUTO = "auto"
    """Where that is possible."""
    ON = "on"
    """Or the mount fails."""
    OFF = "off"


class WriteMode(enum.StrEnum):
    """Where a guest's write goes before it is acknowledged."""

    THROUGH = "through"
    """To the origin, then to the cache."""
    AROUND = "around"
    """To the origin; what the cache had of it is forgotten."""
    BACK = "back"
    """To the cache; the cleaner brings it to the origin later."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Limits and periods of a running mount. Times in seconds, sizes in bytes."""

    threads_per_image: int = 8
    """Blocking origin calls of one image at a time; the rest wait (P6)."""
    metadata_threads: int = 16
    """Lookups, listings and attribute calls at a time, all images together."""
    device_threads: int = 8
    """Reads and writes on the cache device at a time that need a thread."""
    max_waiting_per_image: int = 4096
    """Requests of one image that may wait for its origin; more get EIO (P6).
    A virtio disk has at most 1024 requests in flight for each of its queues."""
    max_background: int = 32768
    """What the kernel may have in flight; far above ``max_waiting_per_image`` (P6)."""
    staging_bytes: int = 64 * MIB
    """Fetched data that may wait for its SSD write; beyond it a fetch is not stored."""
    commit_interval: float = 0.5
    """Owed rows reach a light commit after at most this long."""
    barrier_interval: float = 5.0
    """A barrier runs at least this often while anything changed."""
    order_interval: float = 600.0
    """The LRU order is saved this often, and at every clean stop."""
    intent_idle: float = 1.0
    """``active`` of a region is cleared this long after its last write (R4)."""
    intent_removal: float = 10.0
    """The row of an inactive region goes this long after its last write (R4)."""
    whole_image_after: int = 32
    """With more region rows than this, one stable row stands for the whole image (R4)."""
    store_pause: float = 10.0
    """After a failed SSD write nothing is stored for this long."""
    settle_age: float = 2.0
    """A change time younger than this, when recorded, is not trusted (P3)."""
    settle_worth: int = 256
    """An open waits for that if the image has so many blocks cached, which it would lose."""
    tick: float = 0.02
    """Longest timestamp granularity of an origin: two ticks of a 100 Hz server."""
    dirty_age: float = 30.0
    """Dirty data is written back once it is this old."""
    dirty_low: float = 0.25
    """Share of the slots that may be dirty before younger data is written back, too."""
    dirty_limit: float = 0.5
    """Share of the slots that may be dirty; beyond it new writes go through."""
    clean_rate: int = 0
    """Most bytes a second the cleaner writes to the origin by itself; 0 means no limit."""
    clean_writes: int = 4
    """Writebacks of one image to the origin at a time."""
    clean_pause: float = 1.0
    """After a failed writeback the image is left alone for this long, then twice as long ..."""
    clean_pause_most: float = 60.0
    """... and at most this long."""
    readahead: int = 2 * MIB
    """Most bytes fetched ahead of a guest that reads an image in order; 0: none."""
    commits_in_place: bool = True
    """Commits and syncs of the cache are made in the event loop, as long as they are quick."""
    lane_threads: int = 2
    """Threads of the lane that read requests; never more than processors, but for the first two."""
    attribute_timeout: float = 1.0
    """How long the kernel may keep names and attributes."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How images are treated whose path matches; an image's own setting comes before it."""

    pattern: str
    """As a shell's: ``*`` (also over ``/``), ``?``, ``[...]``. With a ``/`` it is for the path
    below the origin, without one for the name alone."""
    write_mode: WriteMode | None = None
    """None: as the mount."""
    bypass: bool = False
    """Not cached at all: reads and writes go straight to the origin."""

    def matches(self, path: bytes) -> bool:
        """Whether the rule is for the image at ``path``, relative to the origin."""
        text = fsdecode(path)
        return fnmatchcase(text if "/" in self.pattern else text.rpartition("/")[2], self.pattern)


@dataclass(frozen=True, slots=True)
class Policy:
    """How images are treated that have no setting of their own."""

    write_mode: WriteMode = WriteMode.THROUGH
    rules: tuple[Rule, ...] = ()

    def mode_of(self, path: bytes) -> WriteMode:
        """The write mode of the image at ``path``: that of the first rule that matches."""
        rule = self._rule_of(path)
        return self.write_mode if rule is None else rule.write_mode or self.write_mode

    def bypasses(self, path: bytes) -> bool:
        """Whether the image at ``path`` is not cached at all."""
        rule = self._rule_of(path)
        return rule is not None and rule.bypass

    def _rule_of(self, path: bytes) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(path)), None)


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One ``fusecache mount``, all paths absolute.

    ``database`` None means the default place for the cache; ``size`` and ``block_size`` None
    mean what the cache was formatted with.
    """

    origin: Path
    mountpoint: Path
    cache: Path
    size: int | None = None
    block_size: int | None = None
    write_mode: WriteMode = WriteMode.THROUGH
    database: Path | None = None
    options: tuple[str, ...] = ()
    foreground: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    rules: tuple[Rule, ...] = ()
    metrics: tuple[str, int] | None = None
    """Address and port where Prometheus may ask."""
    log_level: str = "info"
    """One of ``LOG_LEVELS``."""
    lane: LaneUse = LaneUse.AUTO
    config: Path | None = None
    """The file that some of this comes from."""

    @property
    def policy(self) -> Policy:
        """Write mode and rules in one."""
        return Policy(self.write_mode, self.rules)


def parse_size(text: str) -> int:
    """``20G`` -> bytes. Takes K, M, G, T (powers of 1024), upper or lower case.

    Raises:
        UsageError: not a positive whole number with one of those letters.
    """
    match = re.fullmatch(r"([0-9]+)([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"'{text}' is not a size: write a number and K, M, G or T, like 20G.")
    return int(match[1]) * _SUFFIXES[match[2].upper()]


def check_block_size(size: int) -> int:
    """The size itself if it is a power of two from 4 KiB to 1 MiB.

    Raises:
        UsageError: otherwise.
    """
    if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise UsageError(
            f"Block size {size} is not a power of two from 4K to 1M: choose one, like 64K."
        )
    return size


def size_argument(size: int) -> str:
    """Bytes as ``parse_size`` takes them: ``64M``."""
    for letter in "TGMK":
        if size % _SUFFIXES[letter] == 0:
            return f"{size // _SUFFIXES[letter]}{letter}"
    return str(size)


def format_size(size: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
