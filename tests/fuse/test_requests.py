"""What the lane hands to Python, answered."""

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from fusecache import lane as lanes
from fusecache.fuse.requests import Request, Requests
from tests.fuse.conftest import BLOCK, Served

PAGE = 4096
UNKNOWN = 77


def write(unique: int, handle: int, offset: int, data: bytes) -> Request:
    """As ``Lane.take`` gives it."""
    return unique, lanes.WRITE, handle, offset, len(data), 0, data


def read(unique: int, handle: int, offset: int, length: int) -> Request:
    """The same."""
    return unique, lanes.READ, handle, offset, length, 0, None


async def answers(served: Served, *requests: Request) -> dict[int, tuple[int, bytes]]:
    """Errno and data by request, of requests that come together."""
    found: dict[int, tuple[int, bytes]] = {}
    queue = os.eventfd(1)
    left = [list(requests)]

    def reply(unique: int, error: int, data: bytes) -> int:
        assert unique not in found
        found[unique] = (error, bytes(data))
        return 0

    lane: Any = SimpleNamespace(queue=queue, ended=False, reply=reply)

    def take() -> list[Request]:
        lane.ended = True  # after this round
        return left.pop()

    lane.take = take
    try:
        with trio.fail_after(10):
            await Requests(lane, served.operations, served.cache).serve()
    finally:
        os.close(queue)
    return found


async def ready(served: Served, name: str) -> int:
    """A handle of an image whose first block may be written to at once: it is cached, and somebody
    has written to it, to its last page."""
    (served.origin / name).write_bytes(bytes(4 * BLOCK))
    number = await served.open(await served.inode(name))
    image = served.operations.handles[number].image
    await served.cache.read(image, 0, BLOCK)
    with trio.fail_after(10):
        while served.cache.core.valid_pages(image.id, 0) != 0xFFFF:
            await trio.sleep(0.001)
    await served.cache.write(image, BLOCK - PAGE, b"z" * PAGE)
    return number


@pytest.fixture
async def handle(served: Served) -> int:
    """One that is ready."""
    return await ready(served, "vm.img")


async def test_handles_that_nobody_has_fail_and_nothing_else(served: Served, handle: int) -> None:
    found = await answers(
        served,
        write(2, UNKNOWN, 0, bytes(PAGE)),
        write(4, handle, PAGE, b"x" * PAGE),
        read(6, UNKNOWN, 0, PAGE),
        read(8, handle, 0, PAGE),
        (10, lanes.FSYNC, UNKNOWN, 0, 0, 0, None),
        write(12, handle, 2 * BLOCK, b"y" * PAGE),
    )
    assert {unique: error for unique, (error, _) in found.items()} == {
        2: errno.EIO, 4: 0, 6: errno.EIO, 8: 0, 10: errno.EIO, 12: 0
    }  # fmt: skip
    assert found[8][1] == bytes(PAGE)
    image = served.operations.handles[handle].image
    assert await served.cache.read(image, PAGE, PAGE) == b"x" * PAGE
    assert await served.cache.read(image, 2 * BLOCK, PAGE) == b"y" * PAGE


async def test_writes_together_that_fail_are_all_answered(
    served: Served, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> list[bool]:
        raise KeyError("injected")

    monkeypatch.setattr(served.cache, "write_at_once", fails)
    found = await answers(served, *(write(n, handle, n * PAGE, b"x" * PAGE) for n in (2, 4, 6)))
    assert found == dict.fromkeys((2, 4, 6), (errno.EIO, b""))


async def test_each_write_goes_to_the_image_of_its_handle(served: Served, handle: int) -> None:
    second = await ready(served, "second.img")
    found = await answers(
        served, write(2, handle, 0, b"1" * PAGE), write(4, second, 0, b"2" * PAGE)
    )
    assert {error for error, _ in found.values()} == {0}
    for number, content in ((handle, b"1"), (second, b"2")):
        image = served.operations.handles[number].image
        assert await served.cache.read(image, 0, PAGE) == content * PAGE
