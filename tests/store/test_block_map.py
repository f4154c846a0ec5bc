"""The block map on disk: commits, barriers, drops, recovery, and damage."""

import contextlib
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.core.rows import Rows
from fusecache.core.slots import NO_SLOT
from fusecache.errors import DatabaseError
from fusecache.store.block_map import WHOLE_IMAGE, Batch, BlockMap, ImageRow
from fusecache.store.superblock import Superblock

SUPERBLOCK = Superblock(65536, 100_000, uuid.UUID(int=77))
Row = tuple[int, int, int, int, int]
"""(image, block, slot, valid, dirty)"""
Shown = dict[tuple[int, int], tuple[int, int, int]]


def rows(*entries: Row) -> Rows:
    image, block, slot, valid, dirty = zip(*entries, strict=True)
    return Rows(
        np.array(image, np.uint32),
        np.array(block, np.uint32),
        np.array(slot, np.uint32),
        np.array(valid, np.uint16),
        np.array(dirty, np.uint16),
    )


def put(image: int, block: int, slot: int, valid: int = 0xFFFF, dirty: int = 0) -> Row:
    return (image, block, slot, valid, dirty)


def gone(image: int, block: int) -> Row:
    return (image, block, NO_SLOT, 0, 0)


def loaded(block_map: BlockMap) -> Shown:
    """What ``load`` gives, each block once."""
    found: Shown = {}
    for part in block_map.load():
        for image, block, slot, valid, dirty in zip(*(c.tolist() for c in part), strict=True):
            assert (image, block) not in found
            found[image, block] = (slot, valid, dirty)
    return found


def viewed(block_map: BlockMap) -> Shown:
    """What the view ``blocks`` shows to anybody with SQL."""
    statement = "SELECT image, block, slot, valid, dirty FROM blocks"
    return {(i, b): (s, v, d) for i, b, s, v, d in block_map._conn.execute(statement)}


def sql(where: BlockMap | Path, statement: str) -> list[tuple[object, ...]]:
    """One statement, as a person or a failing disk would; through the map while that is open."""
    if isinstance(where, BlockMap):
        return where._conn.execute(statement).fetchall()
    with contextlib.closing(sqlite3.connect(where)) as connection, connection:
        return connection.execute(statement).fetchall()


def attach(block_map: BlockMap, boot: str = "boot 1") -> None:
    block_map.attach(boot, 42, b"/mnt/cached", b"/srv/images")


def own(block_map: BlockMap) -> None:
    """Rows for the images of the tests: blocks of an image without one do not outlive a start."""
    numbers = (1, 2, 3, 2**32 - 1)
    images = [ImageRow(number, b"id %d" % number, b"%d.img" % number) for number in numbers]
    block_map.commit(Batch(images=images), stable=True)


def barrier(block_map: BlockMap, *entries: Row) -> None:
    """Rows that are in ``block`` when it returns."""
    block_map.merge(block_map.commit(Batch(rows=rows(*entries)), stable=False))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture
def block_map(path: Path) -> Iterator[BlockMap]:
    """A new database, attached in boot 1."""
    made = BlockMap.create(path, SUPERBLOCK)
    attach(made)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def reopen(block_map: BlockMap, path: Path) -> Iterator[Callable[[], BlockMap]]:
    """Opens it as the next daemon does: what the last one left in the kernel is there."""
    opened: list[BlockMap] = []

    def again() -> BlockMap:
        block_map.close()
        opened.append(BlockMap.open(path, SUPERBLOCK))
        return opened[-1]

    try:
        yield again
    finally:
        for other in opened:
            other.close()


# -- opening --------------------------------------------------------------------------------------


def test_a_new_database_is_private_clean_empty_and_the_caches_own(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "cache.sqlite"
    block_map = BlockMap.create(path, SUPERBLOCK)
    with contextlib.closing(block_map):
        meta = block_map.meta()
        assert (meta.uuid, meta.block_size, meta.slot_count) == (str(SUPERBLOCK.uuid), 65536, 10**5)
        assert (meta.clean, meta.boot_id, meta.pid) == (1, "", 0)
        assert path.stat().st_mode & 0o777 == 0o600
        assert loaded(block_map) == {}
        assert not block_map.images()
        assert not block_map.intents()
        assert not list(block_map.load_order())
    with contextlib.closing(BlockMap.open(path, SUPERBLOCK)) as again:
        assert again.meta() == meta


def test_creating_replaces_what_an_older_cache_left(block_map: BlockMap, path: Path) -> None:
    barrier(block_map, put(1, 1, 1))
    block_map.close()
    other = replace(SUPERBLOCK, uuid=uuid.uuid4())
    with contextlib.closing(BlockMap.create(path, other)) as new:
        assert loaded(new) == {}
        assert new.meta().uuid == str(other.uuid)


def test_a_missing_database_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"is missing\. .*check CACHE.*fusecache repair CACHE"):
        BlockMap.open(tmp_path / "none.sqlite", SUPERBLOCK)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_version_is_refused_by_its_number(block_map: BlockMap, path: Path) -> None:
    block_map.close()
    sql(path, "UPDATE meta SET schema_version = 9")
    with pytest.raises(DatabaseError, match="version 9, this fusecache knows version 3"):
        BlockMap.open(path, SUPERBLOCK)


@pytest.mark.parametrize(
    "other",
    [
        replace(SUPERBLOCK, uuid=uuid.UUID(int=78)),
        replace(SUPERBLOCK, block_size=4096),
        replace(SUPERBLOCK, slot_count=99),
    ],
)
def test_the_database_of_another_cache_is_refused(
    block_map: BlockMap, path: Path, other: Superblock
) -> None:
    block_map.close()
    with pytest.raises(DatabaseError, match=r"belongs to another cache.*--db"):
        BlockMap.open(path, other)


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all" * 400, b"SQLite format 3\0" + b"\xff" * 8000]
)
def test_a_garbage_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"is damaged.*fusecache repair"):
        BlockMap.open(path, SUPERBLOCK)


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE meta", "DELETE FROM meta", "UPDATE meta SET uuid = 'x'", "UPDATE meta SET id = 2"],
)
def test_a_damaged_meta_table_is_refused(block_map: BlockMap, path: Path, statement: str) -> None:
    block_map.close()
    sql(path, statement)
    with pytest.raises(DatabaseError, match="fusecache repair"):
        BlockMap.open(path, SUPERBLOCK)


def test_a_directory_in_the_databases_place_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(DatabaseError, match="unable to open"):
        BlockMap.open(path, SUPERBLOCK)
    with pytest.raises(DatabaseError, match=r"Cannot create the database .* directory"):
        BlockMap.create(path, SUPERBLOCK)
    (path / "file").touch()
    with pytest.raises(DatabaseError, match="Cannot create the database"):
        BlockMap.create(path / "file" / "below", SUPERBLOCK)


def test_a_file_is_known_as_a_block_map_by_its_content(block_map: BlockMap, path: Path) -> None:
    block_map.detach()
    block_map.close()
    assert BlockMap.is_block_map(path)
    other = path.with_name("other")
    for content in (b"", b"text" * 2000):
        other.write_bytes(content)
        assert not BlockMap.is_block_map(other)
        assert other.read_bytes() == content
    sql(path, "DROP TABLE meta")
    assert not BlockMap.is_block_map(path)


# -- commit and merge -----------------------------------------------------------------------------


def test_committed_rows_are_pending_until_a_merge(block_map: BlockMap, path: Path) -> None:
    mark = block_map.commit(Batch(rows=rows(put(1, 5, 9, 0x0F))), stable=False)
    assert loaded(block_map) == {}
    block_map.merge(mark)
    assert loaded(block_map) == viewed(block_map) == {(1, 5): (9, 0x0F, 0)}
    assert sql(block_map, "SELECT * FROM pending") == []


def test_the_last_row_of_a_tag_wins_within_and_across_commits(block_map: BlockMap) -> None:
    block_map.commit(Batch(rows=rows(put(1, 1, 1), put(1, 2, 2), gone(1, 1))), stable=False)
    mark = block_map.commit(
        Batch(rows=rows(gone(1, 2), put(1, 2, 7, 3), put(2, 1, 8), put(2, 1, 8, 5))), stable=True
    )
    block_map.merge(mark)
    assert loaded(block_map) == {(1, 2): (7, 3, 0), (2, 1): (8, 5, 0)}
    barrier(block_map, gone(1, 2))
    assert loaded(block_map) == {(2, 1): (8, 5, 0)}


def test_rows_after_the_mark_wait_for_the_next_merge(block_map: BlockMap) -> None:
    first = block_map.commit(Batch(rows=rows(put(1, 1, 1), put(1, 2, 2))), stable=False)
    second = block_map.commit(Batch(rows=rows(gone(1, 1), put(1, 3, 3))), stable=True)
    assert second > first
    block_map.merge(first)
    assert set(loaded(block_map)) == {(1, 1), (1, 2)}
    block_map.merge(first)
    assert set(loaded(block_map)) == {(1, 1), (1, 2)}
    block_map.merge(second)
    assert set(loaded(block_map)) == {(1, 2), (1, 3)}


def test_an_emptied_region_leaves_no_row(block_map: BlockMap, path: Path) -> None:
    barrier(block_map, put(1, 64, 1), put(1, 127, 2))
    assert sql(block_map, "SELECT image, region FROM block") == [(1, 1)]
    barrier(block_map, gone(1, 64), gone(1, 127), gone(1, 1000))
    assert sql(block_map, "SELECT * FROM block") == []


NUMBERS = st.one_of(st.integers(0, 200), st.sampled_from([2**31, 2**32 - 1, 2**32 - 64]))
ROWS = st.builds(
    lambda image, block, slot, valid, dirty: (
        gone(image, block) if slot is None else (image, block, slot, valid, dirty & valid)
    ),
    st.integers(1, 3) | st.just(2**32 - 1),
    NUMBERS,
    st.none() | st.integers(0, 2**32 - 2),
    st.integers(1, 0xFFFF),
    st.integers(0, 0xFFFF),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(ROWS, min_size=1, max_size=12)),
        st.tuples(st.just("merge"), st.integers(0, 3)),
        st.tuples(st.just("drop"), st.tuples(st.integers(1, 3), NUMBERS)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.booleans())
def test_any_commits_merges_and_drops_give_what_a_dict_gives(
    steps: list[tuple[str, object]], killed: bool
) -> None:
    model: Shown = {}
    pending: list[tuple[int, list[Row]]] = []

    def apply(entries: list[Row]) -> None:
        for image, block, slot, valid, dirty in entries:
            model.pop((image, block), None)
            if slot != NO_SLOT:
                model[image, block] = (slot, valid, dirty)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "db"
        block_map = BlockMap.create(path, SUPERBLOCK)
        with contextlib.closing(block_map):
            attach(block_map)
            own(block_map)
            for what, detail in steps:
                if what == "commit":
                    assert isinstance(detail, list)
                    mark = block_map.commit(Batch(rows=rows(*detail)), stable=False)
                    pending.append((mark, detail))
                elif what == "merge" and pending:
                    assert isinstance(detail, int)
                    mark = pending[min(detail, len(pending) - 1)][0]
                    block_map.merge(mark)
                    while pending and pending[0][0] <= mark:
                        apply(pending.pop(0)[1])
                elif what == "drop":
                    assert isinstance(detail, tuple)
                    image, first = detail
                    block_map.commit(Batch(drops=[(image, first)]), stable=True)
                    for tag in [t for t in model if t[0] == image and t[1] >= first]:
                        del model[tag]
                    pending = [
                        (mark, [row for row in part if row[0] != image or row[1] < first])
                        for mark, part in pending
                    ]
                assert loaded(block_map) == model
            assert viewed(block_map) == model
        with contextlib.closing(BlockMap.open(path, SUPERBLOCK)) as again:
            attach(again, "boot 1" if killed else "boot 2")
            if killed:
                for _, part in pending:
                    apply(part)
            assert loaded(again) == model


# -- drops, images, intents, the order ------------------------------------------------------------


def test_a_drop_takes_blocks_from_block_and_pending_and_from_its_own_batch(
    block_map: BlockMap, path: Path
) -> None:
    barrier(block_map, put(1, 9, 1), put(1, 10, 2), put(1, 64, 3), put(1, 300, 4), put(2, 10, 5))
    block_map.commit(Batch(rows=rows(put(1, 3, 6), put(1, 77, 7), put(2, 77, 8))), stable=False)
    block_map.commit(Batch(rows=rows(put(1, 78, 9))), stable=False)
    batch = Batch(rows=rows(put(1, 79, 10), put(1, 4, 11)), drops=[(1, 10)])
    mark = block_map.commit(batch, stable=True)
    assert set(loaded(block_map)) == {(1, 9), (2, 10)}
    assert sql(block_map, "SELECT count(*) FROM pending") == [(2,)], "an emptied batch goes"
    block_map.merge(mark)
    assert set(loaded(block_map)) == {(1, 9), (2, 10), (1, 3), (2, 77), (1, 4)}
    block_map.commit(Batch(drops=[(1, 0)]), stable=True)
    assert set(loaded(block_map)) == {(2, 10), (2, 77)}


def test_images_are_remembered_replaced_and_forgotten_with_their_intents(
    block_map: BlockMap,
) -> None:
    one = ImageRow(1, b"id one", b"a\xff.img", 10, 20, 30, 40, 1, 1, 50)
    two = ImageRow(2, b"id two", b"b.img")
    intents = [(1, 0, 1), (1, WHOLE_IMAGE, 1), (2, 3, 1), (2, 4, 1)]
    block_map.commit(Batch(images=[one, two], intents=intents), stable=True)
    assert block_map.images() == [one, two]
    assert sorted(block_map.intents()) == sorted(intents)
    newer = one.copy()
    newer.size = 11
    assert (one.size, newer.size) == (10, 11)
    block_map.commit(Batch(images=[newer], intents=[(2, 3, 0)], settled=[(2, 4)]), stable=False)
    assert block_map.images() == [newer, two]
    assert (2, 3, 0) in block_map.intents()
    block_map.commit(Batch(forgotten=[1], drops=[(1, 0)]), stable=True)
    assert block_map.images() == [two]
    assert block_map.intents() == [(2, 3, 0)]


def test_the_order_and_the_heartbeat_are_kept(
    block_map: BlockMap, reopen: Callable[[], BlockMap]
) -> None:
    ticks = np.array([5, 0, 1 << 40], np.uint64)
    batch = Batch(order=[(0, ticks), (3, ticks + np.uint64(1))], heartbeat_ns=123)
    block_map.commit(batch, stable=False)
    again = reopen()
    assert [(f, t.tolist()) for f, t in again.load_order()] == [
        (0, [5, 0, 1 << 40]),
        (3, [6, 1, (1 << 40) + 1]),
    ]
    assert again.meta().heartbeat_ns == 123


def test_a_failed_commit_leaves_nothing_of_its_batch(block_map: BlockMap, path: Path) -> None:
    bad = ImageRow(1, None, b"no identity")  # type: ignore[arg-type]  # refused by the database
    with pytest.raises(DatabaseError, match="Writing"):
        block_map.commit(Batch(rows=rows(put(1, 1, 1)), images=[bad]), stable=False)
    assert sql(block_map, "SELECT * FROM pending") == []
    mark = block_map.commit(Batch(rows=rows(put(1, 2, 2))), stable=False)
    block_map.merge(mark)
    assert set(loaded(block_map)) == {(1, 2)}


def test_a_stable_commit_is_full_and_a_light_one_normal(block_map: BlockMap) -> None:
    for stable, level in ((True, 2), (False, 1), (True, 2)):
        block_map.commit(Batch(heartbeat_ns=1), stable=stable)
        assert block_map._conn.execute("PRAGMA synchronous").fetchone() == (level,)
    block_map.merge(block_map.commit(Batch(rows=rows(put(1, 1, 1))), stable=False))
    assert block_map._conn.execute("PRAGMA synchronous").fetchone() == (2,)
    assert block_map._conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# -- recovery -------------------------------------------------------------------------------------


def test_a_clean_stop_is_trusted_whatever_the_boot(
    block_map: BlockMap, path: Path, reopen: Callable[[], BlockMap]
) -> None:
    own(block_map)
    barrier(block_map, put(1, 1, 1), put(1, 70, 2))
    block_map.commit(Batch(intents=[(1, 0, 1)]), stable=True)
    block_map.detach()
    again = reopen()
    assert (again.meta().clean, again.meta().pid) == (1, 0)
    attach(again, "boot 2")
    assert set(loaded(again)) == {(1, 1), (1, 70)}
    meta = again.meta()
    assert (meta.clean, meta.boot_id, meta.pid) == (0, "boot 2", 42)
    assert (meta.mountpoint, meta.origin) == (b"/mnt/cached", b"/srv/images")


def test_detaching_empties_the_write_ahead_log(block_map: BlockMap, path: Path) -> None:
    barrier(block_map, put(1, 1, 1))
    log = Path(f"{path}-wal")
    assert log.stat().st_size > 0
    block_map.detach()
    assert log.stat().st_size == 0


def interrupted(block_map: BlockMap) -> None:
    """A life cut short: regions 0 active, 1 inactive, 2 without a row; pending rows in all."""
    barrier(
        block_map,
        put(1, 0, 10),
        put(1, 1, 11, 0xFF, 0x0F),
        put(1, 64, 12),
        put(1, 65, 13, 0xF0, 0x80),
        put(1, 128, 14),
        put(2, 0, 15),
    )
    image = ImageRow(1, b"one", b"one.img", writing=1)
    batch = Batch(
        rows=rows(put(1, 2, 16), put(1, 66, 17), gone(1, 128), put(1, 129, 18), put(2, 1, 19)),
        images=[image, ImageRow(2, b"two", b"two.img")],
        intents=[(1, 0, 1), (1, 1, 0)],
        heartbeat_ns=5_000_000_000,
    )
    block_map.commit(batch, stable=True)


AFTER_KILL = {
    (1, 1): (11, 0x0F, 0x0F),  # only the dirty pages of an active region
    (1, 64): (12, 0xFFFF, 0),
    (1, 65): (13, 0xF0, 0x80),
    (1, 66): (17, 0xFFFF, 0),
    (1, 129): (18, 0xFFFF, 0),
    (2, 0): (15, 0xFFFF, 0),
    (2, 1): (19, 0xFFFF, 0),
}
AFTER_CUT = {
    (1, 1): (11, 0x0F, 0x0F),
    (1, 65): (13, 0x80, 0x80),
    (1, 128): (14, 0xFFFF, 0),
    (2, 0): (15, 0xFFFF, 0),
}


def test_after_a_kill_pending_counts_and_active_regions_lose_their_clean_pages(
    block_map: BlockMap, reopen: Callable[[], BlockMap], path: Path
) -> None:
    interrupted(block_map)
    again = reopen()
    for _ in range(2):  # recovery can be cut and run again
        attach(again)
        assert loaded(again) == viewed(again) == AFTER_KILL
        assert sorted(again.intents()) == [(1, 0, 0), (1, 1, 0)], "rows stay for a power cut"
        assert [(row.writing, row.ours_until_ns) for row in again.images()] == [
            (0, 7_000_000_000),
            (0, 0),
        ]
        assert sql(again, "SELECT * FROM pending") == []
    assert again.meta().clean == 0
    barrier(again, put(1, 500, 20))
    assert loaded(again) == {**AFTER_KILL, (1, 500): (20, 0xFFFF, 0)}


def test_after_a_power_cut_only_merged_rows_count_and_no_region_with_a_row(
    block_map: BlockMap, reopen: Callable[[], BlockMap], path: Path
) -> None:
    interrupted(block_map)
    again = reopen()
    for _ in range(2):
        attach(again, "boot 2")
        assert loaded(again) == viewed(again) == AFTER_CUT
        assert again.intents() == []
        assert [(row.writing, row.ours_until_ns) for row in again.images()] == [
            (0, -65_000_000_000),
            (0, 0),
        ]
        assert sql(again, "SELECT * FROM pending") == []
    assert again.meta().boot_id == "boot 2"


@pytest.mark.parametrize("clean", [False, True])
def test_without_a_sign_of_life_nobody_knows_whose_a_change_is(
    block_map: BlockMap, reopen: Callable[[], BlockMap], clean: bool
) -> None:
    """Repair has lost the row that had it."""
    attach(block_map)
    batch = Batch(rows=rows(put(1, 0, 10)), images=[ImageRow(1, b"one", b"one.img", writing=1)])
    block_map.merge(block_map.commit(batch, stable=True))
    if clean:
        block_map.detach()
    again = reopen()
    attach(again, "boot 2")
    assert [(row.writing, row.ours_until_ns) for row in again.images()] == [(0, 0)]


def test_a_power_cut_after_a_recovered_kill_still_drops_the_written_regions(
    block_map: BlockMap, reopen: Callable[[], BlockMap]
) -> None:
    interrupted(block_map)
    again = reopen()
    attach(again)
    attach(again, "boot 2")
    assert loaded(again) == {
        (1, 1): (11, 0x0F, 0x0F),
        (1, 65): (13, 0x80, 0x80),
        (1, 129): (18, 0xFFFF, 0),
        (2, 0): (15, 0xFFFF, 0),
        (2, 1): (19, 0xFFFF, 0),
    }


def test_a_row_for_the_whole_image_drops_nothing_after_a_kill_and_all_after_a_cut(
    block_map: BlockMap, reopen: Callable[[], BlockMap]
) -> None:
    own(block_map)
    barrier(block_map, put(1, 0, 1), put(1, 9999, 2), put(1, 64, 3, 3, 2), put(2, 0, 4))
    block_map.commit(Batch(intents=[(1, WHOLE_IMAGE, 1)]), stable=True)
    before = loaded(block_map)
    again = reopen()
    attach(again)
    assert loaded(again) == before
    assert [(i, r) for i, r, _ in again.intents()] == [(1, WHOLE_IMAGE)]
    attach(again, "boot 2")
    assert loaded(again) == {(1, 64): (3, 2, 2), (2, 0): (4, 0xFFFF, 0)}


def test_recovery_that_is_cut_leaves_everything_to_the_next(
    block_map: BlockMap, reopen: Callable[[], BlockMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(block_map)
    again = reopen()
    with monkeypatch.context() as patched:
        calls = iter([None, None, sqlite3.OperationalError("disk I/O error")])
        real = again._put_region

        def failing(*args: Any) -> None:
            error = next(calls)
            if error is not None:
                raise error
            real(*args)

        patched.setattr(again, "_put_region", failing)
        with pytest.raises(DatabaseError, match="Recovering"):
            attach(again)
    attach(again)
    assert loaded(again) == AFTER_KILL


def test_wiping_forgets_all_but_the_cache_itself(block_map: BlockMap, path: Path) -> None:
    interrupted(block_map)
    block_map.commit(Batch(order=[(0, np.ones(3, np.uint64))]), stable=False)
    block_map.wipe()
    assert loaded(block_map) == viewed(block_map) == {}
    assert not block_map.images()
    assert not block_map.intents()
    assert not list(block_map.load_order())
    assert block_map.meta().uuid == str(SUPERBLOCK.uuid)
    barrier(block_map, put(1, 1, 1))
    assert set(loaded(block_map)) == {(1, 1)}


def test_a_stop_with_rows_after_the_last_barrier_is_not_called_clean(
    block_map: BlockMap, reopen: Callable[[], BlockMap]
) -> None:
    own(block_map)
    mark = block_map.commit(Batch(rows=rows(put(1, 1, 1))), stable=False)
    with pytest.raises(DatabaseError, match="after the last barrier"):
        block_map.detach()
    assert block_map.meta().clean == 0
    block_map.merge(mark)
    block_map.detach()
    again = reopen()
    attach(again)
    assert set(loaded(again)) == {(1, 1)}


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE block SET slots = CAST(x'07' || substr(slots, 2) AS BLOB)",
        "UPDATE block SET valid = CAST(substr(valid, 1, 127) || x'01' AS BLOB)",
        "UPDATE block SET dirty = CAST(x'01' || substr(dirty, 2) AS BLOB)",
        "UPDATE block SET slots = CAST(substr(slots, 5) AS BLOB)",
        "UPDATE block SET crc = crc + 1",
        "UPDATE block SET crc = 'none'",
        "UPDATE block SET image = 3",
        "UPDATE block SET region = region + 1",
        "UPDATE block SET region = -5",
        "UPDATE block SET image = 'one'",
        "UPDATE block SET image = 1 << 40",
        "UPDATE block SET slots = 17",
    ],
)
def test_a_damaged_row_of_the_block_map_is_refused(
    block_map: BlockMap, path: Path, damage: str
) -> None:
    barrier(block_map, put(1, 1, 1))
    sql(block_map, damage)
    with pytest.raises(DatabaseError, match="damaged"):
        loaded(block_map)


DAMAGE = "UPDATE block SET slots = CAST(x'07' || substr(slots, 2) AS BLOB)"


@pytest.mark.parametrize(
    "change",
    [
        lambda block_map: barrier(block_map, put(1, 2, 9)),
        lambda block_map: block_map.commit(Batch(drops=[(1, 2)]), stable=True),
    ],
)
def test_a_change_to_a_damaged_row_does_not_give_it_a_right_checksum(
    block_map: BlockMap, path: Path, change: Callable[[BlockMap], None]
) -> None:
    barrier(block_map, put(1, 0, 1), put(1, 3, 2))
    sql(block_map, DAMAGE)
    with pytest.raises(DatabaseError, match="wrong checksum"):
        change(block_map)
    with pytest.raises(DatabaseError, match="wrong checksum"):
        loaded(block_map)


@pytest.mark.parametrize("boot", ["boot 1", "boot 2"])
def test_recovery_refuses_a_damaged_row(
    block_map: BlockMap, path: Path, reopen: Callable[[], BlockMap], boot: str
) -> None:
    barrier(block_map, put(1, 0, 1))
    block_map.commit(Batch(intents=[(1, 0, 1)]), stable=True)
    sql(block_map, DAMAGE)
    again = reopen()
    with pytest.raises(DatabaseError, match="wrong checksum"):
        attach(again, boot)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE pending SET rows = CAST(x'07' || substr(rows, 2) AS BLOB)",
        "UPDATE pending SET rows = CAST(substr(rows, 2) AS BLOB)",
        "UPDATE pending SET crc = 0",
        "UPDATE pending SET rows = 'text'",
        "UPDATE pending SET rows = 5",
    ],
)
def test_a_damaged_pending_row_is_refused_by_merge_drop_and_recovery(
    block_map: BlockMap, path: Path, reopen: Callable[[], BlockMap], damage: str
) -> None:
    mark = block_map.commit(Batch(rows=rows(put(1, 1, 1), put(1, 80, 2))), stable=False)
    sql(block_map, damage)
    with pytest.raises(DatabaseError):
        block_map.merge(mark)
    with pytest.raises(DatabaseError):
        block_map.commit(Batch(drops=[(1, 64)]), stable=True)
    again = reopen()
    with pytest.raises(DatabaseError):
        attach(again)
    assert loaded(again) == {}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_no_flipped_byte_of_the_file_gives_a_wrong_row(at: int, bits: int) -> None:
    content, expected = _written()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "db"
        damaged = bytearray(content)
        damaged[at % len(content)] ^= bits
        path.write_bytes(damaged)
        try:
            block_map = BlockMap.open(path, SUPERBLOCK)
        except DatabaseError:
            return
        with contextlib.closing(block_map), contextlib.suppress(DatabaseError):
            attach(block_map, "boot 2")
            for tag, row in loaded(block_map).items():
                assert expected[tag] == row


_WRITTEN: list[tuple[bytes, Shown]] = []


def _written() -> tuple[bytes, Shown]:
    """The bytes of a database with a few hundred blocks, and what is in it."""
    if not _WRITTEN:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "db"
            block_map = BlockMap.create(path, SUPERBLOCK)
            attach(block_map)
            barrier(block_map, *(put(1 + n % 3, n * 7, n) for n in range(300)))
            block_map.commit(Batch(images=[ImageRow(1, b"one", b"one.img")]), stable=True)
            expected = loaded(block_map)
            block_map.detach()
            block_map.close()
            _WRITTEN.append((path.read_bytes(), expected))
    return _WRITTEN[0]


def test_a_full_disk_is_a_database_error_and_loses_nothing(
    tmp_path: Path, tmpfs: Callable[[Path], None]
) -> None:
    tmpfs(tmp_path / "small")
    path = tmp_path / "small" / "db"
    block_map = BlockMap.create(path, SUPERBLOCK)
    attach(block_map)
    own(block_map)
    barrier(block_map, put(1, 1, 1))
    (tmp_path / "small" / "ballast").write_bytes(bytes(os.statvfs(path).f_bavail * 4096))
    many = rows(*(put(1, n, n) for n in range(20_000)))
    with pytest.raises(DatabaseError, match="full"):
        block_map.commit(Batch(rows=many), stable=True)
    (tmp_path / "small" / "ballast").unlink()
    block_map.close()
    with contextlib.closing(BlockMap.open(path, SUPERBLOCK)) as again:
        attach(again, "boot 2")
        assert set(loaded(again)) == {(1, 1)}


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_it_knows_whether_its_files_are_still_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "map.sqlite"
    BlockMap.create(path, SUPERBLOCK).close()
    block_map = BlockMap.open(path, SUPERBLOCK)
    file, away = Path(f"{path}{suffix}"), tmp_path / "away"
    block_map.commit(Batch(rows=rows((1, 1, 1, 1, 0))), stable=True)
    block_map.checkpoint(truncate=True)
    assert block_map.gone() is None
    file.rename(away)
    assert block_map.gone() == f"{file} was removed"
    file.write_bytes(away.read_bytes())
    assert block_map.gone() == f"{file} was replaced by another file"
    away.rename(file)
    assert block_map.gone() is None
    block_map.close()
