"""The time of modification that the kernel is told, and with which it drops an image's pages."""

import os

import pytest
from pyfuse3 import ROOT_INODE

from tests.fuse.conftest import BLOCK, NOBODY, Served

BEFORE, AFTER = 10**18, 10**18 + 5


@pytest.fixture
async def image(served: Served) -> int:
    """The node of one that was last changed at ``BEFORE``, as the kernel knows."""
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    os.utime(served.origin / "vm.img", ns=(BEFORE, BEFORE))
    return await served.inode("vm.img")


async def _told(served: Served, node: int) -> int:
    """By an answer to a question for attributes, and to a look-up."""
    entry = await served.operations.getattr(node, NOBODY)
    again = await served.operations.lookup(ROOT_INODE, b"vm.img", NOBODY)
    assert again.st_mtime_ns == entry.st_mtime_ns
    return entry.st_mtime_ns


def _change(served: Served) -> None:
    os.utime(served.origin / "vm.img", ns=(AFTER, AFTER))


async def test_it_stays_while_somebody_writes_through_the_kernels_pages(
    served: Served, image: int
) -> None:
    handles = [await served.open(image), await served.open(image, os.O_WRONLY)]
    _change(served)
    for handle in handles:
        assert await _told(served, image) == BEFORE
        await served.operations.release(handle)
    assert await _told(served, image) == AFTER


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_DIRECT])
async def test_it_is_the_origins_for_all_others(served: Served, image: int, flags: int) -> None:
    handle = await served.open(image, flags)
    _change(served)
    assert await _told(served, image) == AFTER
    await served.operations.release(handle)


async def test_it_is_the_origins_once_the_image_is_evicted(served: Served, image: int) -> None:
    """Another host may write it."""
    handle = await served.open(image)
    await served.cache.evict(served.operations.handles[handle].image)
    _change(served)
    assert await _told(served, image) == AFTER
    await served.operations.release(handle)
