"""Counters of one image and of one cache: plain integers, added to where things happen."""

from dataclasses import dataclass


@dataclass(slots=True)
class ImageCounters:
    """Bytes and calls of one image since the mount."""

    read_hit_bytes: int = 0
    """Read by guests and served from the cache."""
    read_miss_bytes: int = 0
    """Read by guests and served from the origin, through the cache or past it."""
    write_bytes: int = 0
    """Written by guests."""
    origin_reads: int = 0
    origin_read_bytes: int = 0
    read_ahead_bytes: int = 0
    """Asked of the origin ahead of a guest that reads in order; part of the above."""
    origin_writes: int = 0
    origin_write_bytes: int = 0
    errors: int = 0
    """Calls the origin failed."""
    last_error: str = ""

    def failed(self, error: object) -> None:
        """One more error."""
        self.errors += 1
        self.last_error = str(error)


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
