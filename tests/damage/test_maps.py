"""Rows with right checksums and tallies that no sound map has."""

from collections.abc import Callable

import pytest

from fusecache.core.geometry import REGION_BLOCKS
from fusecache.store.records import ImageRow
from fusecache.store.tables import Tables
from tests.damage.place import Place
from tests.damage.suffering import suffer

Entry = tuple[int, int, int]
"""(slot, valid, dirty)"""


def rewrite(place: Place, image: int, block: int, change: Callable[[Entry], Entry]) -> None:
    """One block of the map, as a program with a bug would."""
    with place.sql() as connection:
        tables = Tables(connection)
        tables.now = tables.meta()
        region, at = divmod(block, REGION_BLOCKS)
        columns = tables.columns(image, region)
        old = (int(columns.slots[at]), int(columns.valid[at]), int(columns.dirty[at]))
        columns.slots[at], columns.valid[at], columns.dirty[at] = change(old)
        tables.put_columns(image, region, columns)
        tables.put_meta()


CHANGES: dict[str, Callable[[Entry], Entry]] = {
    "a slot twice": lambda was: (3, was[1], was[2]),
    "a slot far outside": lambda was: (1 << 31, was[1], was[2]),
    "the first slot outside": lambda was: (48, was[1], was[2]),
    "no page": lambda was: (was[0], 0, 0),
    "pages beyond the block": lambda was: (was[0], was[1] | 0x10, was[2]),
    "dirty pages beyond the block": lambda was: (was[0], was[1] | 0x8000, was[2] | 0x8000),
}


@pytest.mark.parametrize("kind", ["clean", "kept", "killed", "moved"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_impossible_row_is_refused_and_its_dirty_pages_are_named(
    place_of: Callable[[str], Place], kind: str, change: str
) -> None:
    dropped = (kind, change) == ("moved", "pages beyond the block")  # clean, in a written region
    started, made = suffer(
        place_of(kind), lambda place: rewrite(place, 1, 0, CHANGES[change]), hint=dropped
    )
    assert dropped or started.refusal is not None
    assert kind == "clean" or made.losses


@pytest.mark.parametrize("kind", ["kept", "killed", "moved"])
def test_dirty_blocks_of_an_unknown_image_are_refused_and_named(
    place_of: Callable[[str], Place], kind: str
) -> None:
    started, made = suffer(place_of(kind), lambda place: rewrite(place, 9, 7, lambda _: (40, 1, 1)))
    assert started.refusal is not None and "image 9" in started.refusal
    (loss,) = made.losses
    assert (loss.image, loss.path, loss.ranges) == (9, None, [(7 * 16384, 7 * 16384 + 4096)])


@pytest.mark.parametrize("kind", ["clean", "kept", "killed", "moved"])
def test_clean_blocks_of_a_forgotten_image_are_dropped_by_a_start(
    place_of: Callable[[str], Place], kind: str
) -> None:
    started, _ = suffer(
        place_of(kind), lambda place: rewrite(place, 9, 7, lambda _: (40, 1, 0)), hint=True
    )
    assert started.refusal is None


@pytest.mark.parametrize("kind", ["kept", "killed", "moved"])
def test_lost_pages_are_found_and_named_to_the_byte(
    place_of: Callable[[str], Place], kind: str
) -> None:
    place = place_of(kind)

    def change(was: Entry) -> Entry:
        return was[0], was[1] & ~0x6, was[2]

    _, made = suffer(place, lambda place: rewrite(place, 1, 0, change))
    (loss,) = made.losses
    assert (loss.image, loss.path) == (1, b"dir/vm1.img")
    assert loss.ranges == [(4096, 3 * 4096)]


@pytest.mark.parametrize("kind", ["kept", "killed", "moved"])
def test_an_image_of_another_identity_takes_nothing_of_the_old_one(
    place_of: Callable[[str], Place], kind: str
) -> None:
    def damage(place: Place) -> None:
        with place.sql() as connection:
            connection.execute("UPDATE image SET identity = x'ffff' || identity WHERE id = 1")

    _, made = suffer(place_of(kind), damage)
    assert {loss.image for loss in made.losses} == {1}
    assert made.rows is not None and set(made.rows.image.tolist()) <= {2, 3}
    assert ImageRow(1, b"identity 1", b"dir/vm1.img") not in made.images
