"""Bits flipped anywhere, with no regard to what they mean."""

import random
from collections.abc import Callable

import pytest

from tests.damage.place import Place
from tests.damage.suffering import suffer

KINDS = ("clean", "kept", "killed", "moved")


def _flip(place: Place, name: str, chance: random.Random, within: int | None, count: int) -> None:
    path = getattr(place, name)
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[chance.randrange(within or len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(100))
def test_any_bit_of_the_database_is_noticed_or_does_no_harm(
    place_of: Callable[[str], Place], seed: int
) -> None:
    """Most of a small database is unused, so bits are flipped some at a time."""
    chance = random.Random(seed)
    place = place_of(KINDS[seed % 4])
    bits = chance.choice([1, 4])
    suffer(place, lambda place: _flip(place, "database", chance, None, bits), hint=True)


@pytest.mark.parametrize("seed", range(40))
def test_any_bit_of_the_log_is_noticed_or_does_no_harm(
    place_of: Callable[[str], Place], seed: int
) -> None:
    chance = random.Random(seed)
    place = place_of(("killed", "moved")[seed % 2])
    suffer(place, lambda place: _flip(place, "log", chance, None, 1), hint=True)


@pytest.mark.parametrize("seed", range(40))
def test_any_bit_of_superblock_and_witness_is_noticed_or_does_no_harm(
    place_of: Callable[[str], Place], seed: int
) -> None:
    chance = random.Random(seed)
    place = place_of(KINDS[seed % 4])
    offset = chance.choice([0, 4096])

    def damage(place: Place) -> None:
        with open(place.cache, "r+b") as file:
            at = offset + chance.randrange(48 if offset == 0 else 28)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))

    started, _ = suffer(place, damage)
    assert started.refusal is not None, f"seed {seed}"
