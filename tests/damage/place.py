"""Caches to be damaged: real files, stamped slots, and the truth about every page of them.

A cache is made by a short history in which slots change their owners, so that old rows are not
only old but wrong: a slot that held dirty data of one image holds another's now.
"""

import contextlib
import hashlib
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fusecache.core.rows import Rows
from fusecache.core.slots import NO_SLOT
from fusecache.engine.recovery import recover
from fusecache.errors import FusecacheError
from fusecache.store import cache_device
from fusecache.store.block_map import WHOLE_IMAGE, Batch, BlockMap, ImageRow
from fusecache.store.cache_device import CacheDevice
from fusecache.store.inspection import Inspection, inspect
from fusecache.store.repair import Plan, carry_out, plan
from fusecache.store.superblock import DATA_OFFSET, Superblock
from tests.support.stamps import check_stamps, stamped

PAGE = 4096
BLOCK = 4 * PAGE
SLOTS = 48
FULL = 0xF
SUPERBLOCK = Superblock(BLOCK, SLOTS, uuid.UUID(int=0x77))
Tag = tuple[int, int]
"""(image, page number)"""


@dataclass
class Truth:
    """What is on the origin, and what only the cache has: versions by page."""

    origin: dict[Tag, int] = field(default_factory=dict)
    dirty: dict[Tag, int] = field(default_factory=dict)
    stable: set[Tag] = field(default_factory=set)
    """Of the dirty pages those that a barrier has seen."""


@dataclass
class Place:
    """A cache in a directory."""

    base: Path
    truth: Truth
    boot: str

    @property
    def cache(self) -> Path:
        return self.base / "cache.img"

    @property
    def database(self) -> Path:
        return self.base / "cache.img.sqlite"

    @property
    def log(self) -> Path:
        return self.base / "cache.img.sqlite-wal"

    @property
    def older(self) -> Path:
        """The database as it was a while ago."""
        return self.base / "older.sqlite"

    def copy(self, base: Path) -> "Place":
        """The same, to be damaged."""
        shutil.copytree(self.base, base)
        return Place(base, self.truth, self.boot)

    def hashes(self) -> dict[str, str]:
        """Of every file's bytes."""
        files = sorted(self.base.iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    @contextlib.contextmanager
    def sql(self) -> Iterator[sqlite3.Connection]:
        """The database, as a person with sqlite3 has it."""
        connection = sqlite3.connect(self.database, isolation_level=None)
        try:
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """A descriptor of the cache device."""
        fd = cache_device.open_locked(self.cache)
        try:
            yield fd
        finally:
            os.close(fd)

    def inspect(self) -> Inspection:
        """As ``fusecache check``."""
        with self.locked() as fd:
            return inspect(fd, self.cache, self.database, self.boot)

    def repair(self) -> Plan:
        """As ``fusecache repair --yes``."""
        with self.locked() as fd:
            found = inspect(fd, self.cache, self.database, self.boot)
            made = plan(found, fd)
            if made.needed:
                carry_out(made, found, fd)
            return made

    def start(self) -> "Started":
        """As ``fusecache mount``: refused, or what is served, checked."""
        try:
            with self.locked() as fd:
                superblock = cache_device.read_superblock(fd, self.cache)
                device = CacheDevice(self.cache, fd, superblock)
                with contextlib.closing(BlockMap.open(self.database, superblock)) as block_map:
                    recover(
                        device, block_map, boot_id=self.boot, pid=1, mountpoint=b"/m", origin=b"/o"
                    )
                    names = {image.id: image.identity for image in block_map.images()}
                    return self._check(device, list(block_map.load()), names)
        except FusecacheError as exc:
            assert "fusecache" in str(exc) and str(exc).endswith(
                tuple("abcdefghijklmnopqrstuvwxyz")
            )
            return Started(refusal=str(exc))

    def _check(self, device: CacheDevice, parts: list[Rows], names: dict[int, bytes]) -> "Started":
        started = Started()
        for part in parts:
            for image, block, slot, valid, dirty in zip(*(c.tolist() for c in part), strict=True):
                for page in range(16):
                    tag = (image, block * 4 + page)
                    if valid >> page & 1:
                        assert names[image] == b"identity %d" % image, "dirty data of another file"
                        data = device.read(slot * BLOCK + page * PAGE, PAGE)
                        self._check_page(tag, data, dirty=bool(dirty >> page & 1))
                        started.clean += not dirty >> page & 1
                    if dirty >> page & 1:
                        started.dirty.add(tag)
        return started

    def _check_page(self, tag: Tag, data: bytes, *, dirty: bool) -> None:
        """Clean: what the origin has. Dirty: what was written last, or else what is there."""
        (version,) = set(check_stamps(data, tag[0], tag[1] * PAGE))
        allowed = {self.truth.origin[tag]}
        if dirty:
            allowed.add(self.truth.dirty.get(tag, self.truth.origin[tag]))
            if tag in self.truth.dirty:
                allowed = {self.truth.dirty[tag]}
        assert version in allowed, f"page {tag} (dirty: {dirty}) has version {version}: {allowed}"

    def must_stay(self) -> set[Tag]:
        """Dirty pages that a start has to keep."""
        return self.truth.stable if self.boot == "boot 2" else set(self.truth.dirty)


@dataclass
class Started:
    """How a start ended."""

    refusal: str | None = None
    dirty: set[Tag] = field(default_factory=set)
    clean: int = 0


def named(made: Plan, tag: Tag) -> bool:
    """Whether repair said that this page cannot be saved."""
    if made.unnamed:
        return True
    at = tag[1] * PAGE
    return any(
        loss.image == tag[0] and any(first <= at < end for first, end in loss.ranges)
        for loss in made.losses
    )


# -- making ----------------------------------------------------------------------------------------


class Maker:
    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True)
        self.place = Place(base, Truth(), "boot 1")
        cache_device.create_file(self.place.cache, DATA_OFFSET + SLOTS * BLOCK)
        self.fd = cache_device.open_locked(self.place.cache)
        cache_device.write_superblock(self.fd, self.place.cache, SUPERBLOCK)
        self.device = CacheDevice(self.place.cache, self.fd, SUPERBLOCK)
        self.map = BlockMap.create(self.place.database, SUPERBLOCK)
        recover(self.device, self.map, boot_id="boot 1", pid=1, mountpoint=b"/m", origin=b"/o")
        images = [
            ImageRow(n, b"identity %d" % n, b"dir/vm%d.img" % n, 1 << 30, n, n, n, 1, n % 2)
            for n in (1, 2, 3)
        ]
        self.map.commit(Batch(images=images, heartbeat_ns=5), stable=True)
        self.rows: list[tuple[int, int, int, int, int]] = []

    def put(
        self, image: int, block: int, slot: int, version: int, valid: int = FULL, dirty: int = 0
    ) -> None:
        """The slot holds these pages of the block; the origin has older ones where dirty."""
        truth = self.place.truth
        for page in range(4):
            tag = (image, block * 4 + page)
            truth.origin.setdefault(tag, version)
            if not valid >> page & 1:
                continue
            data = stamped(image, tag[1] * PAGE, PAGE, version)
            self.device.write(slot * BLOCK + page * PAGE, data)
            if dirty >> page & 1:
                truth.dirty[tag] = version
                if truth.origin[tag] == version:
                    truth.origin[tag] = version - 1
            else:
                truth.origin[tag] = version
                truth.dirty.pop(tag, None)
                truth.stable.discard(tag)
        self.rows.append((image, block, slot, valid, dirty))

    def gone(self, image: int, block: int) -> None:
        """The block left the cache."""
        self.rows.append((image, block, NO_SLOT, 0, 0))

    def commit(self) -> int:
        """The rows so far, lightly."""
        columns = list(zip(*self.rows, strict=True))
        kinds = (np.uint32, np.uint32, np.uint32, np.uint16, np.uint16)
        rows = Rows(*(np.array(c, k) for c, k in zip(columns, kinds, strict=True)))
        self.rows = []
        return self.map.commit(Batch(rows=rows), stable=False)

    def barrier(self) -> None:
        """R1."""
        mark = self.commit()
        self.device.sync()
        self.map.merge(mark)
        self.place.truth.stable = set(self.place.truth.dirty)

    def keep_copy(self, to: Path) -> None:
        """What a killed daemon leaves at this moment."""
        shutil.copyfile(self.place.database, to)
        if self.place.log.exists():
            shutil.copyfile(self.place.log, f"{to}-wal")

    def close(self) -> None:
        """No more."""
        self.map.close()
        os.close(self.fd)


def make(base: Path, how: str) -> Place:
    """A cache that was left clean, kept (clean stop with dirty data), killed or moved."""
    maker = Maker(base)
    dirt = 0 if how == "clean" else FULL
    # What will be history: slots 0-5 hold data that moves away.
    maker.put(1, 0, 0, 2, dirty=dirt)
    maker.put(1, 70, 1, 2, dirty=dirt & 3)
    for n in range(4):
        maker.put(2, 10 + n, 2 + n, 2, dirty=dirt)
    maker.put(3, 5, 6, 2, valid=0x3, dirty=dirt & 1)
    maker.barrier()
    maker.map.checkpoint()
    maker.keep_copy(maker.place.older)
    Path(f"{maker.place.older}-wal").unlink(missing_ok=True)
    # Written back and gone; the slots get other owners.
    for n in range(4):
        maker.put(2, 10 + n, 2 + n, 2)
        maker.gone(2, 10 + n)
    maker.barrier()
    for n in range(4):
        maker.put(1, 128 + n, 2 + n, 5, dirty=dirt if n < 2 else 0)
        maker.put(2, 200 + n, 10 + n, 4)
    maker.put(1, 1, 14, 4)
    maker.put(2, 400, 24, 4)
    maker.barrier()
    if how in ("killed", "moved"):
        _go_on(maker)
    else:
        maker.map.detach()
        maker.close()
        return maker.place
    kill(maker)
    if how == "moved":
        maker.place.boot = "boot 2"
    return maker.place


def kill(maker: Maker) -> Place:
    """The daemon is killed: database and log stay as they are."""
    maker.keep_copy(maker.place.base / "kept")
    maker.close()
    for suffix in ("", "-wal"):
        os.replace(f"{maker.place.base}/kept{suffix}", f"{maker.place.database}{suffix}")
    return maker.place


def make_large(base: Path) -> Place:
    """A killed cache whose map has several database pages, and a log that has only some of them.

    Under this log the older database is a mixture of two times.
    """
    maker = Maker(base)
    slots = range(0, SLOTS, 2)
    for n in slots:
        maker.put(2, 64 * n, n, 2, dirty=FULL)
    maker.barrier()
    maker.map.checkpoint()
    maker.keep_copy(maker.place.older)
    Path(f"{maker.place.older}-wal").unlink(missing_ok=True)
    for n in slots[:-2]:  # written back and gone, but for the last two
        maker.put(2, 64 * n, n, 2)
        maker.gone(2, 64 * n)
    maker.barrier()
    for n in slots[:-2]:
        maker.put(1, 64 * n, n, 5, dirty=FULL)
    maker.barrier()
    maker.map.checkpoint()
    maker.put(3, 1, 1, 4, dirty=1)
    maker.barrier()
    return kill(maker)


def _go_on(maker: Maker) -> None:
    """Intents and changes after the last barrier; the origin has a write that the cache has not."""
    intents = [(2, 3, 1), (3, 0, 0), (1, WHOLE_IMAGE, 1)]
    maker.map.commit(Batch(intents=intents), stable=True)
    for page in range(4):  # a write past the cache: region 3 of image 2 is active
        maker.place.truth.origin[2, 200 * 4 + page] = 9
    maker.put(1, 130, 4, 6, dirty=0x6)
    maker.commit()
    maker.put(3, 300, 20, 3, dirty=FULL)
    maker.gone(1, 1)
    maker.commit()
    maker.map.commit(Batch(heartbeat_ns=7), stable=False)


Damage = Callable[[Place], None]
