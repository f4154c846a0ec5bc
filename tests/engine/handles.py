"""A guest's few words, for tests of one behaviour at a time."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from tests.support.stamps import STAMP, check_stamps, stamped
from tests.support.world import World


def fail(world: World, *kinds: str) -> None:
    """From now on these calls fail, and no others."""
    world.faults.fail = lambda kind, number: kind in kinds


def tune(world: World, **changes: Any) -> None:
    """For the engine that is opened next."""
    world.tuning = replace(world.tuning, **changes)


async def opened(cache: BlockCache, number: int = 1, *, write: bool = True) -> Image:
    """One more handle of an image."""
    return await cache.open(b"id%d" % number, b"%d.img" % number, number, write=write)


async def write(
    cache: BlockCache, image: Image, offset: int, length: int, version: int, number: int = 1
) -> None:
    """Stamped data."""
    await cache.write(image, offset, stamped(number, offset, length, version))


async def remove(
    cache: BlockCache, number: int = 1, during: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Removes the last name of a known image."""
    async with cache.removing(b"id%d" % number) as removal:
        assert removal is not None
        removal.happened = True
        if during is not None:
            await during()


async def versions(
    cache: BlockCache, image: Image, offset: int, length: int, number: int = 1
) -> list[int]:
    """What a guest reads; every sector is of this image and place. Zeros are version 0."""
    return seen(await cache.read(image, offset, length), offset, number)


def on_origin(world: World, offset: int, length: int, number: int = 1) -> list[int]:
    """What the origin's file holds."""
    return seen(bytes(world.files[number].pages.data[offset : offset + length]), offset, number)


def seen(data: bytes, offset: int, number: int = 1) -> list[int]:
    """The version of each sector."""
    found = []
    for at in range(0, len(data), STAMP):
        sector = data[at : at + STAMP]
        found += check_stamps(sector, number, offset + at) if any(sector) else [0]
    return found
