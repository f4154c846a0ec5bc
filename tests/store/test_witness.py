"""The witness: a database of another time is refused, and nothing that a stop can leave is."""

import contextlib
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.core.rows import Rows
from fusecache.errors import CacheDeviceError, DatabaseError, SuperblockError
from fusecache.store import cache_device
from fusecache.store.block_map import Batch, BlockMap, ImageRow
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import WITNESS_SIZE, Superblock, Witness

SUPERBLOCK = Superblock(65536, 100, uuid.UUID(int=77))


class Keeper:
    """A cache device whose witness is in memory."""

    def __init__(self) -> None:
        self.witness = Witness(blank=True)
        self.stable: list[Witness] = []
        self.fails = False
        self.synced_commit = 0

    def sync(self) -> None:
        self.synced_commit = self.witness.commits

    def read_witness(self) -> Witness:
        return self.witness

    def write_witness(self, witness: Witness, *, stable: bool = False) -> None:
        if self.fails:
            raise CacheDeviceError("injected")
        self.witness = witness
        if stable:
            self.stable.append(witness)


def row(slot: int) -> Rows:
    one = [np.array([value], np.uint32) for value in (1, slot, slot)]
    return Rows(*one, np.array([1], np.uint16), np.array([0], np.uint16))


def start(path: Path, keeper: Keeper, boot: str = "boot 1") -> BlockMap:
    block_map = BlockMap.open(path, SUPERBLOCK)
    try:
        block_map.watch(keeper, boot)
        block_map.attach(boot, 1, b"/m", b"/o")
    except DatabaseError:
        block_map.close()
        raise
    return block_map


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = BlockMap.create(tmp_path / "db", SUPERBLOCK)
    made.commit(Batch(images=[ImageRow(1, b"one", b"one.img")]), stable=True)
    made.close()
    return tmp_path / "db"


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_witness_survives_a_round_trip(commits: int, stable: int) -> None:
    packed = Witness(commits, stable).pack()
    assert len(packed) == WITNESS_SIZE
    assert Witness.unpack(packed + bytes(4096)) == Witness(commits, stable)


def test_every_flipped_bit_of_a_witness_is_seen_and_zeros_are_blank() -> None:
    packed = Witness(5, 3).pack()
    for bit in range(28 * 8):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SuperblockError, match="commits"):
            Witness.unpack(bytes(damaged))
    assert Witness.unpack(bytes(512)).blank
    assert not Witness.unpack(packed).blank


def test_every_commit_is_told_and_only_a_stable_one_as_stable(path: Path) -> None:
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        assert len(keeper.stable) == 1, "the first is stable before there is a first commit"
        begun = keeper.witness
        assert begun.commits == begun.stable == block_map.meta().commits
        mark = block_map.commit(Batch(rows=row(1)), stable=False)
        assert keeper.witness == Witness(mark, begun.stable) and mark == begun.commits + 1
        keeper.sync()
        block_map.commit(Batch(heartbeat_ns=1), stable=False)
        block_map.merge(mark)
        assert keeper.witness == Witness(mark + 2, mark + 2)
        assert block_map.meta().synced == mark
        block_map.merge(mark)
        assert keeper.witness.commits == mark + 2, "nothing to merge, no commit"
        block_map.merge(block_map.commit(Batch(rows=row(2)), stable=True))
        assert block_map.meta().synced == mark, "no sync of the device since"


def _appended(path: Path, keeper: Keeper, count: int = 3) -> int:
    """A killed life whose last commits were of rows alone; returns the number of the first."""
    block_map = start(path, keeper)
    marks = [block_map.commit(Batch(rows=row(slot)), stable=False) for slot in range(count)]
    block_map.close()
    return marks[0]


def test_a_light_commit_of_rows_alone_changes_no_other_table(path: Path) -> None:
    keeper = Keeper()
    first = _appended(path, keeper)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        written, rows = connection.execute("SELECT commits, pending_rows FROM meta").fetchone()
        assert (written, rows) == (first - 1, 0)
    assert keeper.witness.commits == first + 2
    with contextlib.closing(start(path, keeper)) as block_map:
        (rows,) = block_map.load()
        assert rows.slot.tolist() == [0, 1, 2]
        assert block_map.meta().commits == first + 3


@pytest.mark.parametrize(
    ("which", "said"), [(0, "missing"), (1, "missing"), (2, "older than the cache device")]
)
def test_a_missing_row_of_any_light_commit_is_noticed(path: Path, which: int, said: str) -> None:
    keeper = Keeper()
    first = _appended(path, keeper)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("DELETE FROM pending WHERE seq = ?", (first + which,))
    with pytest.raises(DatabaseError, match=said):
        start(path, keeper)


def test_an_outdated_row_of_a_light_commit_is_noticed(path: Path) -> None:
    """The row of another commit under this one's number."""
    keeper = Keeper()
    first = _appended(path, keeper)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute(
            "UPDATE pending SET (rows, crc) = (SELECT rows, crc FROM pending WHERE seq = ?)"
            "WHERE seq = ?",
            (first, first + 1),
        )
    with pytest.raises(DatabaseError, match="checksum"):
        start(path, keeper)


def test_the_next_whole_commit_counts_what_was_appended(path: Path) -> None:
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        for slot in range(3):
            mark = block_map.commit(Batch(rows=row(slot)), stable=False)
        block_map.commit(Batch(heartbeat_ns=5), stable=False)
        block_map.commit(Batch(rows=row(7)), stable=False)
        keeper.sync()
        block_map.merge(mark)
        meta = block_map.meta()
        assert (meta.commits, meta.pending_rows) == (mark + 3, 1)
    with contextlib.closing(start(path, keeper)) as block_map:
        (rows,) = block_map.load()
        assert rows.slot.tolist() == [0, 1, 2, 7]


def test_an_append_that_fails_is_no_commit(path: Path) -> None:
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        mark = block_map.commit(Batch(rows=row(1)), stable=False)
        sql = "CREATE TRIGGER no BEFORE INSERT ON pending BEGIN SELECT RAISE(ABORT, 'no'); END"
        block_map._conn.execute(sql)
        with pytest.raises(DatabaseError, match="no"):
            block_map.commit(Batch(rows=row(2)), stable=False)
        assert block_map.mark == mark and keeper.witness.commits == mark
        block_map._conn.execute("DROP TRIGGER no")
        assert block_map.commit(Batch(rows=row(3)), stable=False) == mark + 1
    with contextlib.closing(start(path, keeper)) as block_map:
        (rows,) = block_map.load()
        assert rows.slot.tolist() == [1, 3]


def test_a_failed_transaction_is_told_nobody_and_leaves_the_count(path: Path) -> None:
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        before = keeper.witness
        bad = ImageRow(7, None, b"")  # type: ignore[arg-type]  # refused by the database
        with pytest.raises(DatabaseError):
            block_map.commit(Batch(rows=row(1), images=[bad]), stable=False)
        assert keeper.witness == before
        block_map.commit(Batch(rows=row(1)), stable=False)
        assert keeper.witness.commits == before.commits + 1
    start(path, keeper).close()


def test_a_device_that_cannot_be_told_does_not_fail_commits(path: Path) -> None:
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        told = keeper.witness.commits
        keeper.fails = True
        mark = block_map.commit(Batch(rows=row(1)), stable=False)
        keeper.sync()
        block_map.merge(mark)
        assert block_map.meta().synced == told, "what was not told is not called synced"
    keeper.fails = False
    start(path, keeper).close()


STOPS: dict[str, Callable[[BlockMap], object]] = {
    "killed at once": lambda block_map: None,
    "killed after a light commit": lambda m: m.commit(Batch(rows=row(1)), stable=False),
    "killed after a barrier": lambda m: m.merge(m.commit(Batch(rows=row(1)), stable=False)),
    "killed after a checkpoint": lambda m: (
        m.commit(Batch(rows=row(1)), stable=True),
        m.checkpoint(),
    ),
    "stopped": lambda m: m.detach(),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("boot", ["boot 1", "boot 2"])
def test_no_stop_is_taken_for_a_rollback(path: Path, stop: str, told: bool, boot: str) -> None:
    """Also if the process ended between a commit and its note."""
    keeper = Keeper()
    block_map = start(path, keeper)
    keeper.fails = not told
    STOPS[stop](block_map)
    block_map.close()
    keeper.fails = False
    start(path, keeper, boot).close()
    start(path, keeper, "boot 3").close()


@pytest.mark.parametrize("witness_survives", [True, False])
def test_a_power_cut_may_take_light_commits_and_the_witness(
    path: Path, tmp_path: Path, witness_survives: bool
) -> None:
    keeper = Keeper()
    block_map = start(path, keeper)
    mark = block_map.commit(Batch(rows=row(1)), stable=False)
    keeper.sync()
    at_sync = keeper.witness
    block_map.merge(mark)
    _copy(path, tmp_path / "stable")
    for slot in (2, 3, 4):
        block_map.commit(Batch(rows=row(slot)), stable=False)
    block_map.close()
    _copy(tmp_path / "stable", path)
    if not witness_survives:
        keeper.witness = at_sync
    start(path, keeper, "boot 2").close()
    # The count goes on above what the device had heard of, so the same boot starts again.
    start(path, keeper, "boot 2").close()


def _copy(source: Path, target: Path) -> None:
    for suffix in ("", "-wal"):
        Path(f"{target}{suffix}").unlink(missing_ok=True)
        if Path(f"{source}{suffix}").exists():
            shutil.copyfile(f"{source}{suffix}", f"{target}{suffix}")


def _without_last_commit(path: Path, older: Path, *, stable: bool) -> Keeper:
    """What the device knows of a database that is then put back by one commit."""
    keeper = Keeper()
    block_map = start(path, keeper)
    block_map.checkpoint()
    _copy(path, older)
    block_map.commit(Batch(rows=row(2)), stable=stable)
    block_map.close()
    _copy(older, path)
    return keeper


@pytest.mark.parametrize("boot", ["boot 1", "boot 2"])
def test_a_database_without_its_last_stable_commit_is_refused(
    path: Path, tmp_path: Path, boot: str
) -> None:
    keeper = _without_last_commit(path, tmp_path / "older", stable=True)
    with pytest.raises(DatabaseError, match="older than the cache device"):
        start(path, keeper, boot)


def test_after_a_kill_not_even_a_light_commit_may_be_missing(path: Path, tmp_path: Path) -> None:
    keeper = _without_last_commit(path, tmp_path / "older", stable=False)
    with pytest.raises(DatabaseError, match="older than the cache device"):
        start(path, keeper)
    start(path, keeper, "boot 2").close()


def test_a_device_of_an_older_time_is_refused(path: Path) -> None:
    keeper = Keeper()
    block_map = start(path, keeper)
    older = keeper.witness
    mark = block_map.commit(Batch(rows=row(1)), stable=False)
    keeper.sync()
    block_map.merge(mark)
    block_map.close()
    keeper.witness = older
    with pytest.raises(DatabaseError, match="newer than the cache device"):
        start(path, keeper, "boot 2")
    keeper.witness = Witness(blank=True)
    with pytest.raises(DatabaseError, match="lost its record"):
        start(path, keeper, "boot 2")


def test_a_wiped_map_goes_on_above_the_witness(path: Path) -> None:
    keeper = Keeper()
    block_map = start(path, keeper)
    block_map.detach()
    block_map.close()
    keeper.witness = Witness(500, 400)
    block_map = BlockMap.open(path, SUPERBLOCK)
    block_map.watch(keeper, "boot 2", believed=False)
    block_map.wipe()
    block_map.close()
    start(path, keeper, "boot 2").close()


def test_a_real_device_keeps_it_beside_the_superblock(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache_device.create_file(path, 8 << 20)
    fd = cache_device.open_locked(path)
    try:
        cache_device.write_superblock(fd, path, SUPERBLOCK)
        device = CacheDevice(path, fd, SUPERBLOCK)
        assert device.read_witness().blank
        device.write_witness(Witness(7, 5))
        device.write_witness(Witness(8, 5), stable=True)
        read = cache_device.read_superblock(fd, path)
        assert read == SUPERBLOCK and read.witness == Witness(8, 5) and read.path == path
        os.pwrite(fd, b"\xff", 4096 + 10)
        with pytest.raises(SuperblockError, match="fusecache repair"):
            cache_device.read_superblock(fd, path)
    finally:
        os.close(fd)


def test_a_database_of_version_1_gets_checksums_and_tallies(tmp_path: Path) -> None:
    path = tmp_path / "db"
    _version_1(path)
    with contextlib.closing(BlockMap.open(path, SUPERBLOCK)) as block_map:
        meta = block_map.meta()
        assert meta.schema_version == 3 and (meta.block_rows, meta.image_rows) == (1, 1)
        block_map.attach("boot 1", 1, b"/m", b"/o")
        (rows,) = block_map.load()
        assert (rows.image.tolist(), rows.slot.tolist()) == ([1], [4])
        assert block_map.images() == [ImageRow(1, b"one", b"one.img")]


def test_a_database_of_version_2_starts_with_what_was_pending(path: Path) -> None:
    """There every commit wrote ``meta``."""
    keeper = Keeper()
    with contextlib.closing(start(path, keeper)) as block_map:
        block_map.commit(Batch(rows=row(1), heartbeat_ns=5), stable=False)
        block_map._tables.now.schema_version = 2
        block_map.commit(Batch(heartbeat_ns=6), stable=False)
        block_map._conn.execute("DELETE FROM _sqlite_migrations WHERE name = 'm003_appended'")
    with contextlib.closing(start(path, keeper)) as block_map:
        (rows,) = block_map.load()
        assert rows.slot.tolist() == [1] and block_map.meta().schema_version == 3


def _version_1(path: Path) -> None:
    from sqlite_utils import Database

    from fusecache.store.packing import RegionColumns
    from fusecache.store.schema import migrations

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrations.apply(Database(connection), stop_before="m002_write_modes")
        connection.execute(
            "INSERT INTO meta VALUES (1, 1, ?, 65536, 100, '', 1, 0, 0, x'', x'')",
            (str(SUPERBLOCK.uuid),),
        )
        connection.execute(
            "INSERT INTO image VALUES (1, x'6f6e65', CAST('one.img' AS BLOB), 0, 0, 0, 0, 0, 0, 0)"
        )
        columns = RegionColumns(None)
        columns.slots[3], columns.valid[3] = 4, 1
        connection.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?)", columns.pack(1, 0))


def test_a_cache_of_version_1_has_no_witness_yet_and_starts(tmp_path: Path) -> None:
    path = tmp_path / "db"
    _version_1(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE meta SET boot_id = 'boot 1'")
    keeper = Keeper()
    start(path, keeper).close()
    start(path, keeper).close()
    keeper.witness = Witness(blank=True)
    with pytest.raises(DatabaseError, match="lost its record"):
        start(path, keeper)
