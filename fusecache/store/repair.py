"""What ``repair`` does: decide first, say what is lost, then act.

Clean and doubtful is dropped: the origin has it. Dirty is kept where its row is sound, agrees with
every other row, and is surely the one that was written last; anything else that may be dirty is a
loss, named before anything is done. A database that was rolled back proves nothing: the slots its
dirty rows name may hold other blocks by now, and writing those back would destroy the origin.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from fusecache.config import DEFAULT_BLOCK_SIZE, MIN_BLOCK_SIZE, format_size, size_argument
from fusecache.core.geometry import REGION_BLOCKS, Geometry
from fusecache.core.rows import U64, Rows, pages_in
from fusecache.errors import CacheDeviceError, DatabaseError, NotACacheError
from fusecache.store import cache_device
from fusecache.store.block_map import BlockMap
from fusecache.store.inspection import Inspection, byte_ranges, present, wrong_rows
from fusecache.store.packing import PackedRegion, region_crc
from fusecache.store.records import PART_REGIONS, ImageRow, Meta, block_hash
from fusecache.store.salvage import TABLES, Salvaged, salvage
from fusecache.store.superblock import DATA_OFFSET, Fence, Superblock, Witness, named
from fusecache.store.tables import latest
from fusecache.store.tallies import Tally
from fusecache.store.telling import Tell, silent

Ranges = list[tuple[int, int]]


@dataclass(slots=True)
class Loss:
    """Dirty data of one image that cannot be saved: (first byte, byte after the last)."""

    image: int
    path: bytes | None
    """None: nobody knows any more."""
    ranges: Ranges
    why: str


@dataclass(slots=True)
class Plan:
    """What repair would do. ``needed`` is False if there is nothing to mend."""

    superblock: Superblock
    meta: Meta
    needed: bool = True
    images: list[ImageRow] = field(default_factory=list)
    rows: Rows | None = None
    order: list[tuple[int, U64]] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    """Losses of which nobody can say where they are."""
    steps: list[str] = field(default_factory=list)
    """What will be done, in words."""
    finish: bool = False
    """An earlier repair was cut when the new database was ready."""


def ready(database: Path) -> Path:
    """Where the new database is made."""
    return Path(f"{database}.repaired")


def aside(database: Path) -> Path:
    """Where the damaged database stays."""
    return Path(f"{database}.damaged")


# -- deciding --------------------------------------------------------------------------------------


def plan(found: Inspection, fd: int) -> Plan:
    """Decides, and changes nothing.

    Raises:
        NotACacheError: nothing there was ever a cache.
        DatabaseError: the database is of a newer version.
        CacheDeviceError: the device is too small for any cache.
    """
    _refuse(found)
    if (made := _unfinished(found)) is not None:
        return made
    _refuse_too_short(found)
    superblock = _superblock(found, fd)
    made = Plan(superblock, _meta(found, superblock))
    read = found.read
    if not found.findings:
        made.needed = False
    elif read is None or found.foreign:
        made.unnamed.append(
            "the block map is not there: which data the cache had and the origin has not, "
            "nobody can say"
        )
        made.steps.append("make a new, empty database")
    else:
        _keep(made, found, read)
        made.steps.append("make a new database of what can be kept")
    if found.database.is_file() and made.needed:
        made.steps.append(f"keep the damaged one as {aside(found.database)}")
    if found.superblock is None and (read is None or read.meta is None):
        made.steps.append("format the cache device anew")
    elif found.kinds & {"superblock", "cut short", "fence", "witness"}:
        made.steps.append("write the superblock anew")
    return made


def _refuse(found: Inspection) -> None:
    """What is not ours to mend."""
    if "version" in found.kinds:
        raise DatabaseError(
            f"The database {found.database} is of another version than this fusecache makes: mount "
            "it with the fusecache that made it, or a newer one."
        )
    refuse_foreign(found)


def refuse_foreign(found: Inspection) -> None:
    """Raises NotACacheError if nothing there was ever a cache."""
    # Anything that once said that this is a cache; a mistyped name must not cost a filesystem.
    known = found.has_magic or (found.witness is not None and not found.witness.blank)
    if known or found.superblock is not None or "superblock" not in found.kinds:
        return
    if found.read is None or found.read.meta is None:
        force = "" if found.empty else " --force"
        small = found.device_size < _least(DEFAULT_BLOCK_SIZE)
        raise NotACacheError(
            f"Nothing says that {found.path} was ever a fusecache cache. If nothing on it is "
            f"needed and it shall be one: fusecache format {named(found.path)}{force}"
            + (" --size 20G" if small else "")
        )


def _refuse_too_short(found: Inspection) -> None:
    geometry = found.geometry
    block_size = MIN_BLOCK_SIZE if geometry is None else geometry.block_size
    if found.device_size >= _least(block_size):
        return
    rows, gone = found.rows(), ""
    if geometry is not None and rows.dirty.any():
        size = pages_in(rows.dirty) * geometry.page_size
        gone = f" with {format_size(size)} that the origin does not have"
    database = found.database if found.database.is_file() else None
    wanted = size_argument(found.needed or _least(DEFAULT_BLOCK_SIZE))
    raise CacheDeviceError(
        f"{found.path} was cut short: {format_size(found.device_size)} are left of it, too little "
        f"for any cache, and the rest is gone{gone}. If there is a copy of the whole, put it back; "
        f"else begin anew: fusecache format {named(found.path, database)} --force "
        f"--discard-dirty --size {wanted}"
    )


def _least(block_size: int) -> int:
    """Bytes of the smallest cache."""
    return DATA_OFFSET + cache_device.MIN_SLOTS * block_size


def _unfinished(found: Inspection) -> Plan | None:
    """An earlier repair that was cut between its two renames."""
    if found.read is not None or not ready(found.database).exists():
        return None
    read = salvage(ready(found.database))
    meta = read.meta
    if meta is None or read.complaints or not all(read.proven(table) for table in TABLES):
        return None
    if found.superblock is not None and str(found.superblock.uuid) != meta.uuid:
        return None
    if (known := found.witness) and known.contradiction(meta.commits, meta.synced, same_boot=True):
        return None  # of a repair long ago
    superblock = Superblock(meta.block_size, meta.slot_count, UUID(meta.uuid))
    steps = ["finish the repair that was cut"]
    return Plan(superblock, meta, images=read.images, rows=read.merged(), steps=steps, finish=True)


def _superblock(found: Inspection, fd: int) -> Superblock:
    """The one that will stand on the device."""
    meta = None if found.read is None else found.read.meta
    if found.superblock is not None:
        size, count, uuid = (
            found.superblock.block_size,
            found.superblock.slot_count,
            found.superblock.uuid,
        )
    elif meta is not None:
        size, count, uuid = meta.block_size, meta.slot_count, UUID(meta.uuid)
    else:
        small = found.device_size < _least(DEFAULT_BLOCK_SIZE)
        block_size = MIN_BLOCK_SIZE if small else DEFAULT_BLOCK_SIZE
        return cache_device.plan(fd, found.path, block_size, None)
    fits = cache_device.plan(fd, found.path, size, None).slot_count
    return Superblock(size, min(count, fits), uuid)


def _meta(found: Inspection, superblock: Superblock) -> Meta:
    """The new database's row: as it was left, if that is known; else as after a power cut."""
    old = None if found.read is None or found.foreign else found.read.meta
    sizes = (superblock.block_size, superblock.slot_count)
    meta = Meta(2, str(superblock.uuid), *sizes, clean=0)
    if old is not None:
        meta.clean, meta.boot_id, meta.heartbeat_ns = old.clean, old.boot_id, old.heartbeat_ns
        meta.mountpoint, meta.origin = old.mountpoint, old.origin
    known = found.witness or Witness()
    # Later than anything the device has heard of.
    meta.commits = max(0 if old is None else old.commits, known.commits) + 1
    return meta


def _keep(made: Plan, found: Inspection, read: Salvaged) -> None:
    base, certain = _believed(made, found, read)
    rows, pending_only = _overlaid(made, found, read, base)
    losing = _Losses(made, found)
    if pending_only is not None:
        losing.add(pending_only, pending_only.dirty, "it is not known how the last daemon ended")
    known = np.array([image.id for image in read.images], np.uint32)
    wrong = {"orphan": ("", ~np.isin(rows.image, known))} | wrong_rows(found, rows)
    reasons = {
        "orphan": "its row in the table image is missing or damaged",
        "slot outside": "its slot is beyond the end of the cache device",
        "slot twice": "another block claims its slot",
        "no page": "its row is impossible",
        "page outside": "its row is impossible",
    }
    good = np.ones(rows.slot.size, np.bool_)
    for kind, (_, which) in wrong.items():
        bad = which & good
        masks = rows.dirty[bad]
        if kind == "no page":  # any of them may have been dirty
            masks = np.full(masks.size, 0xFFFF, np.uint16)
        losing.add(rows.where(bad), masks, reasons[kind])
        good &= ~which
    rows = rows.where(good)
    gone = rows.dirty & ~rows.valid
    losing.add(rows, gone, "the cache device lost it")
    sound = rows.valid & rows.dirty
    if not certain:
        losing.add(rows, sound, "its slot may hold other data by now")
        return
    keep_clean = (
        found.left == "clean"
        and all(read.proven(table) for table in TABLES if table != "part")
        and (found.superblock is None or found.superblock.fence is Fence.NONE)
    )
    valid = rows.valid if keep_clean else sound
    kept = Rows(rows.image, rows.block, rows.slot, valid, sound)
    made.rows = kept.where(kept.valid != 0)
    made.images = read.images
    if found.superblock is not None and found.superblock.fence is not Fence.NONE:
        for image in made.images:  # the new superblock has no fence that would say so
            image.lived_on()
    made.order = read.order
    if not keep_clean:
        made.steps.append("drop all clean data: the origin has it")


def _believed(made: Plan, found: Inspection, read: Salvaged) -> tuple[Rows, bool]:
    """The sound rows of ``block``, and whether they are surely those written last."""
    fenced = found.superblock is not None and found.superblock.fence is Fence.ALL
    certain = found.contradiction is None and not fenced
    if found.contradiction is not None:
        made.unnamed.append(
            "the database is not of the same time as the cache device: what was written since it "
            "was saved cannot be named"
        )
    if read.meta is not None and not read.proven("block"):
        if read.proven("part"):
            read.regions = _proven_parts(made, found, read)
        else:
            certain = False
            _unnamed_rows(made)
    elif read.meta is None and read.damaged["block"]:
        _unnamed_rows(made)
    if read.meta is None and any(not said.startswith("its table meta") for said in read.complaints):
        made.unnamed.append(
            "the database cannot be read whole: what else was dirty, nobody can say"
        )
    return found_rows(read), certain


def found_rows(read: Salvaged) -> Rows:
    """The blocks of the sound regions."""
    return present(read.merged()) if read.regions else present(None)


def _proven_parts(made: Plan, found: Inspection, read: Salvaged) -> list[PackedRegion]:
    """The regions of all parts that hold exactly what was written last; the others are losses."""
    regions: dict[tuple[int, int], list[PackedRegion]] = {}
    for row in read.regions:
        regions.setdefault((row.image, row.region // PART_REGIONS), []).append(row)
    damaged: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
    for bad in read.damaged["block"]:
        if isinstance(bad[0], int) and isinstance(bad[1], int):
            damaged.setdefault((bad[0], bad[1] // PART_REGIONS), []).append(bad)
    proven: list[PackedRegion] = []
    for part in sorted(set(regions) | set(read.parts)):
        rows = regions.get(part, [])
        kept = _proven_rows(made, found, read.parts.get(part, Tally()), rows, damaged.get(part, []))
        if kept is None:
            image, number = part
            why = "rows of the block map are missing or outdated: whatever was dirty there"
            _lose(made, found, image, number * PART_REGIONS, PART_REGIONS, why)
        proven += kept or []
    return proven


def _proven_rows(
    made: Plan,
    found: Inspection,
    expected: Tally,
    rows: list[PackedRegion],
    bad: list[tuple[Any, ...]],
) -> list[PackedRegion] | None:
    """The rows of one part to go by; None if nobody can tell.

    The tally tells more than that something is wrong: what is left of it when the sound rows are
    taken away is the sum of the damaged ones, so it tells which side of those is right.
    """
    rest = expected
    for row in rows:
        rest = rest.minus(block_hash(row.image, row.region, row.crc))
    if rest == Tally():
        return rows
    claimed, healed = Tally(), Tally()
    for damaged in bad:
        claimed = _plus(claimed, damaged, lambda region: region.crc)
        healed = _plus(healed, damaged, _crc_of)
    if bad and healed == rest:  # only the checksums were wrong
        return [*rows, *(_healed(damaged) for damaged in bad)]
    if bad and claimed == rest:  # keys and checksums are right: only these regions are gone
        for image, number, *_ in bad:
            why = "its row of the block map is damaged: whatever was dirty there"
            _lose(made, found, int(image), int(number), 1, why)
        return rows
    extra = [r for r in rows if rest.plus(block_hash(r.image, r.region, r.crc)) == Tally()]
    if len(extra) == 1:  # the one row too many
        return [row for row in rows if row is not extra[0]]
    return None


def _plus(tally: Tally, row: tuple[object, ...], crc_of: Callable[[PackedRegion], int]) -> Tally:
    try:
        region = PackedRegion(*row)  # type: ignore[arg-type]  # wrong kinds are caught below
        return tally.plus(block_hash(region.image, region.region, crc_of(region)))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return Tally(-1, -1)


def _crc_of(region: PackedRegion) -> int:
    return region_crc(*region[:5])


def _healed(row: tuple[object, ...]) -> PackedRegion:
    region = PackedRegion(*row)  # type: ignore[arg-type]  # of right kinds: its tally was found
    return region._replace(crc=_crc_of(region))


def _lose(made: Plan, found: Inspection, image: int, region: int, count: int, why: str) -> None:
    """Whole regions."""
    geometry = found.geometry or Geometry.of(DEFAULT_BLOCK_SIZE)
    span = REGION_BLOCKS * geometry.block_size
    name = found.image_names().get(image)
    made.losses.append(Loss(image, name, [(region * span, (region + count) * span)], why))


def _unnamed_rows(made: Plan) -> None:
    made.unnamed.append(
        "rows of the block map are missing or damaged: what was dirty there, nobody can say"
    )


def _overlaid(
    made: Plan, found: Inspection, read: Salvaged, base: Rows
) -> tuple[Rows, Rows | None]:
    """The blocks with the changes since the last barrier, and blocks that only those have and
    that cannot be believed."""
    left = found.left
    if left in ("clean", "cut"):
        # As recovery: after a power cut only what a barrier made stable counts.
        return base, None
    changed = latest([(0, base), *read.pending])
    with_changes = present(changed)
    if left == "killed":
        if not read.proven("pending"):
            made.unnamed.append(
                "changes since the last barrier are missing or damaged: what was written in the "
                "last seconds before the daemon was killed may be lost"
            )
        return with_changes, None
    if read.damaged["pending"] or read.pending:
        made.unnamed.append(
            "how the last daemon ended is not known: changes since its last barrier are dropped"
        )
    tags = base.image.astype(np.uint64) << np.uint64(32) | base.block
    new = with_changes.image.astype(np.uint64) << np.uint64(32) | with_changes.block
    merged = dict(zip(tags.tolist(), base.dirty.tolist(), strict=True))
    before = np.array([merged.get(tag, 0) for tag in new.tolist()], np.uint16)
    only = Rows(*with_changes[:4], with_changes.dirty & ~before)
    return base, only.where(only.dirty != 0)


class _Losses:
    """Collects losses by image and reason."""

    def __init__(self, made: Plan, found: Inspection) -> None:
        self._made = made
        self._names = found.image_names()
        self._geometry = found.geometry

    def add(
        self, rows: Rows, masks: "np.ndarray[tuple[int], np.dtype[np.uint16]]", why: str
    ) -> None:
        """These pages of these blocks."""
        if self._geometry is None:
            return
        masks = masks & np.uint16(self._geometry.full_mask)
        some = masks != 0
        for image in np.unique(rows.image[some]).tolist():
            mine = some & (rows.image == image)
            ranges = byte_ranges(rows.block[mine], masks[mine], self._geometry)
            self._made.losses.append(Loss(image, self._names.get(image), ranges, why))


# -- acting ----------------------------------------------------------------------------------------


def carry_out(made: Plan, found: Inspection, fd: int, tell: Tell = silent) -> None:
    """Does what the plan says. A cut at any moment leaves a cache that is refused or repaired:

    1. the device is synced: data before the rows that will name it (R1);
    2. the new database is made beside the old one, whole and synced;
    3. the old one and its log go aside, then the new one takes its place;
    4. the superblock comes last, where it was damaged.

    Between 3's two halves there is no database, and ``finish`` goes on from there.
    """
    os.fsync(fd)  # 1
    if not made.finish:
        _make(made, found, tell)  # 2
    _switch(found.database)  # 3
    witness = found.witness
    if witness is None or witness.blank or found.superblock is None:
        cache_device.write_witness(fd, found.path, Witness(made.meta.commits, 0))
    cache_device.write_superblock(fd, found.path, made.superblock)  # 4


def _make(made: Plan, found: Inspection, tell: Tell) -> None:
    # Only what is whole bears the name by which ``_unfinished`` knows it.
    path = Path(f"{found.database}.unfinished")
    block_map = BlockMap.create(path, made.superblock)
    try:
        block_map.restore(made.meta, made.images, made.rows, made.order, tell)
    finally:
        block_map.close()
    _sync(path)
    path.replace(ready(found.database))
    _sync(path.parent)


def _switch(database: Path) -> None:
    for suffix in ("", "-wal"):
        old = Path(f"{database}{suffix}")
        if old.exists():
            old.replace(f"{aside(database)}{suffix}")
            _sync(database.parent)
    Path(f"{database}-shm").unlink(missing_ok=True)
    ready(database).replace(database)
    _sync(database.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
