"""What the promises allow a guest to read: for every sector, the versions it may have.

A write adds a version when it begins; when it is acknowledged, older ones may no longer be read
by a running system (and none after a kill, P1). A completed fsync makes what was acknowledged
before it began the oldest that a power cut may leave (P2). What was read after a recovery is what
there is: nothing older and nothing else may be read later.
"""

from dataclasses import dataclass, field

from tests.support.stamps import STAMP, read_stamp, stamped

ABSENT = 0
"""The version of a sector of zeros, or beyond the end."""


@dataclass
class Sector:
    """The history of one sector: versions in order, and two places in it."""

    versions: list[int] = field(default_factory=lambda: [ABSENT])
    acknowledged: int = 0
    stable: int = 0
    before: set[int] = field(default_factory=set)
    """All versions of earlier lives."""


class ImageModel:
    """One image. Writers of overlapping sectors must not run at the same time."""

    def __init__(self, number: int, sectors: int, size: int, version: int) -> None:
        self.number = number
        self.sectors = [Sector() for _ in range(sectors)]
        self.size = size
        for sector in self.sectors[: size // STAMP]:
            sector.versions = [version]
        self.next_version = version + 1
        self.discarding = False
        self._under_way: list[list[int]] = []

    # -- changing ----------------------------------------------------------------------------------

    def begin_write(self, first: int, count: int) -> bytes:
        """A write of ``count`` sectors begins; returns its data."""
        version, self.next_version = self.next_version, self.next_version + 1
        for sector in self.sectors[first : first + count]:
            sector.versions.append(version)
        return stamped(self.number, first * STAMP, count * STAMP, version)

    def end_write(self, first: int, count: int) -> None:
        """It was acknowledged."""
        if self.discarding:
            return
        for sector in self.sectors[first : first + count]:
            sector.acknowledged = len(sector.versions) - 1

    def begin_hole(self, first: int, count: int) -> None:
        """``count`` sectors are to be zeros, which is a version like any other; ends with
        ``end_write``."""
        for sector in self.sectors[first : first + count]:
            sector.versions.append(ABSENT)

    def begin_truncate(self, size: int) -> None:
        """Sectors from ``size`` on go."""
        for sector in self.sectors[size // STAMP :]:
            sector.versions.append(ABSENT)

    def end_truncate(self, size: int) -> None:
        """Acknowledged and stable (R6)."""
        if self.discarding:
            return
        for sector in self.sectors[size // STAMP :]:
            sector.acknowledged = sector.stable = len(sector.versions) - 1

    def begin_discard(self) -> None:
        """Dirty data is about to go: any version may be what is left, also of what is
        acknowledged meanwhile."""
        self.discarding = True
        for sector in self.sectors:
            # What was dirty may have been so for several lives: the origin has what was before.
            sector.versions[:0] = sorted(sector.before - set(sector.versions))
            sector.acknowledged = sector.stable = 0
        for oldest in self._under_way:
            oldest[:] = [0] * len(oldest)

    def end_discard(self) -> None:
        """It has gone."""
        self.discarding = False

    def begin_fsync(self) -> list[int]:
        """What it will cover."""
        return self.begin_read()

    def end_fsync(self, covered: list[int]) -> None:
        """It returned."""
        self._ended(covered)
        if self.discarding:
            return
        for sector, place in zip(self.sectors, covered, strict=True):
            sector.stable = max(sector.stable, place)

    # -- reading -----------------------------------------------------------------------------------

    def begin_read(self) -> list[int]:
        """The oldest versions a read that begins now may see."""
        oldest = [sector.acknowledged for sector in self.sectors]
        self._under_way.append(oldest)
        return oldest

    def _ended(self, oldest: list[int]) -> None:
        self._under_way = [other for other in self._under_way if other is not oldest]

    def check_read(self, first: int, data: bytes, oldest: list[int]) -> None:
        """Every sector of ``data`` is of this image, this place, and of an allowed version."""
        self._ended(oldest)
        for at in range(0, len(data) - len(data) % STAMP, STAMP):
            number = first + at // STAMP
            sector = self.sectors[number]
            version = self._version(number, data[at : at + STAMP])
            allowed = sector.versions[oldest[number] :]
            assert version in allowed, (
                f"image {self.number} sector {number}: version {version}, allowed {allowed}"
            )

    def _version(self, number: int, data: bytes) -> int:
        if not any(data):
            return ABSENT
        image, offset, version = read_stamp(data)
        assert (image, offset) == (self.number, number * STAMP), (
            f"image {self.number} sector {number} holds sector {offset // STAMP} of image {image}"
        )
        return version

    def settle(self, data: bytes, *, killed: bool) -> None:
        """The whole image as read after a stop: allowed, and from now on all there is.

        After a kill the origin may not have everything on stable storage yet: a power cut later
        may still undo what was never synced.
        """
        padded = data.ljust(len(self.sectors) * STAMP, b"\0")
        self.discarding = False
        self._under_way = []
        oldest = [s.acknowledged if killed else s.stable for s in self.sectors]
        self.check_read(0, padded, oldest)
        for number, sector in enumerate(self.sectors):
            version = self._version(number, padded[number * STAMP : (number + 1) * STAMP])
            sector.before.update(sector.versions)
            older = sector.versions[sector.stable :] if killed else []
            while older and older[-1] != version:
                older.pop()  # to the last of its kind: there may be zeros more than once
            sector.versions = older or [version]
            sector.acknowledged = len(sector.versions) - 1
            sector.stable = 0

    def check_settled(self, data: bytes) -> None:
        """Read again: exactly what ``settle`` saw."""
        padded = data.ljust(len(self.sectors) * STAMP, b"\0")
        self.check_read(0, padded, self.begin_read())
