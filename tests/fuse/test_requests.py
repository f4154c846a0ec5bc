"""What the lane hands to Python, answered."""

import errno
import os
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from pyfuse3 import ROOT_INODE

from fusecache import lane as lanes
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.closing import Closing
from fusecache.errors import DatabaseError
from fusecache.fuse.files import Files
from fusecache.fuse.operations import Operations
from fusecache.fuse.requests import Request, Requests
from fusecache.store import origin
from fusecache.store.block_map import BlockMap
from fusecache.store.tree import Found, Tree
from tests.fuse.conftest import BLOCK, NOBODY, Served

PAGE = 4096
UNKNOWN = 77


def write(unique: int, handle: int, offset: int, data: bytes) -> Request:
    """As ``Lane.take`` gives it."""
    return unique, lanes.WRITE, handle, offset, len(data), 0, data


def read(unique: int, handle: int, offset: int, length: int) -> Request:
    """The same."""
    return unique, lanes.READ, handle, offset, length, 0, None


def lookup(unique: int, parent: int, name: bytes) -> Request:
    """The same."""
    return unique, lanes.LOOKUP, parent, 0, len(name), 0, name


def getattr_(unique: int, node: int) -> Request:
    """The same."""
    return unique, lanes.GETATTR, node, 0, 0, 0, None


def _fails(*_: object, **__: object) -> Any:
    raise DatabaseError("injected")


async def answers(
    served: Served, *requests: Request, unwanted: bool = False, late: tuple[Request, ...] = ()
) -> dict[int, tuple[int, bytes]]:
    """Errno and data by request, of requests that come together; ``unwanted``: the kernel has given
    up waiting for them; ``late``: what is handed over just before the end."""
    found: dict[int, tuple[int, bytes]] = {}
    queue = os.eventfd(1)
    left = [list(late), list(requests)]

    def reply(unique: int, error: int, data: bytes) -> int:
        assert unique not in found
        found[unique] = (error, bytes(data))
        return errno.ENOENT if unwanted else 0

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


# -- questions -------------------------------------------------------------------------------------

_ENTRY = struct.Struct("<QQQQII")
_ATTRIBUTES = struct.Struct("<QQQqqqIIIIIIIIII")


def _told(data: bytes) -> dict[str, int]:
    """``struct fuse_attr``."""
    names = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec"
    names += " mode nlink uid gid rdev blksize flags"
    return dict(zip(names.split(), _ATTRIBUTES.unpack(data), strict=True))


def _expected(path: Path, node: int) -> dict[str, int]:
    st = path.lstat()
    times = {"a": st.st_atime_ns, "m": st.st_mtime_ns, "c": st.st_ctime_ns}
    found = {f"{which}time": ns // 10**9 for which, ns in times.items()}
    found |= {f"{which}timensec": ns % 10**9 for which, ns in times.items()}
    for name in ("size", "blocks", "mode", "nlink", "uid", "gid", "rdev", "blksize"):
        found[name] = getattr(st, f"st_{name}")
    return found | {"ino": node, "flags": 0}


@pytest.mark.parametrize("times", [(1, 2), (1_700_000_000_987_654_321, -1), (-(10**9) - 5, 2**40)])
async def test_names_and_attributes_are_told_as_the_kernel_wants_them(
    served: Served, times: tuple[int, int]
) -> None:
    path = served.origin / "vm.img"
    path.write_bytes(bytes(12345))
    path.chmod(0o640)
    os.chown(path, 12, 2**31)
    os.link(path, served.origin / "again")
    os.utime(path, ns=times)
    found = await answers(served, lookup(2, ROOT_INODE, b"vm.img"), lookup(4, ROOT_INODE, b"again"))
    error, data = found[2]
    assert error == 0
    node, generation, name, attributes, *nanoseconds = _ENTRY.unpack_from(data)
    assert (name, attributes, nanoseconds) == (1, 1, [0, 0])  # Tuning.attribute_timeout
    assert generation == (await served.operations.lookup(ROOT_INODE, b"vm.img", NOBODY)).generation
    assert _told(data[_ENTRY.size :]) == _expected(path, node)
    assert _ENTRY.unpack_from(found[4][1])[0] == node
    assert served.operations.inodes[node].lookups == 3
    error, data = (await answers(served, getattr_(6, node)))[6]
    assert (error, struct.unpack_from("<QII", data)) == (0, (1, 0, 0))
    assert _told(data[16:]) == _expected(path, node)


@pytest.fixture(params=[True, False], ids=["local", "remote"])
def local(served: Served, request: pytest.FixtureRequest) -> bool:
    """Whether the origin answers from memory."""
    served.operations.inodes[ROOT_INODE].local = request.param
    return bool(request.param)


async def test_what_the_lane_has_found_is_told_as_what_we_find(
    served: Served, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody looks for it once more; where the origin may hang it is asked in a thread."""
    path = served.origin / "vm.img"
    path.write_bytes(bytes(12345))
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    taken = Tree.found
    threads: list[bool] = []

    def noted(tree: Tree, fd: int) -> Found:
        threads.append(threading.current_thread() is not threading.main_thread())
        return taken(tree, fd)

    monkeypatch.setattr(Tree, "find", _fails)
    monkeypatch.setattr(Tree, "found", noted)
    asked = (2, lanes.LOOKUP, ROOT_INODE, 0, 6, found + 1, b"vm.img")
    error, data = (await answers(served, asked))[2]
    assert (error, threads) == (0, [not local])
    (node,) = struct.unpack_from("<Q", data)
    assert _told(data[_ENTRY.size :]) == _expected(path, node)
    assert served.operations.inodes[node].fd == found
    assert served.operations.inodes[node].lookups == 1


async def test_what_the_lane_has_found_and_fails_is_closed(
    served: Served, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served.origin / "vm.img").touch()
    found = os.open(served.origin / "vm.img", os.O_PATH | os.O_CLOEXEC)

    def no_identity(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "injected")

    monkeypatch.setattr(origin, "identity_of", no_identity)
    asked = (2, lanes.LOOKUP, ROOT_INODE, 0, 6, found + 1, b"vm.img")
    assert await answers(served, asked) == {2: (errno.ESTALE, b"")}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(found)


async def test_what_the_lane_has_found_and_nobody_waits_for_is_not_kept(
    served: Served, local: bool
) -> None:
    (served.origin / "vm.img").touch()
    found = os.open(served.origin / "vm.img", os.O_PATH | os.O_CLOEXEC)
    asked = (2, lanes.LOOKUP, ROOT_INODE, 0, 6, found + 1, b"vm.img")
    error, data = (await answers(served, asked, unwanted=True))[2]
    (node,) = struct.unpack_from("<Q", data)
    assert error == 0 and served.operations.inodes.get(node) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(found)


async def test_attributes_that_tell_of_a_change_by_others_are_looked_into(
    served: Served,
) -> None:
    """Before they are told: the blocks go, and the size is the new one (P3)."""
    path = served.origin / "vm.img"
    path.write_bytes(b"1" * BLOCK)
    os.utime(path, ns=(10**18, 10**18))
    node = await served.inode("vm.img")
    number = await served.open(node, os.O_RDONLY)
    image = served.operations.handles[number].image
    assert await served.cache.read(image, 0, 1) == b"1"
    assert (await answers(served, getattr_(2, node)))[2][0] == 0
    assert image.size == BLOCK
    path.write_bytes(b"2" * (BLOCK + 512))
    error, data = (await answers(served, getattr_(4, node)))[4]
    assert (error, _told(data[16:])["size"]) == (0, BLOCK + 512)
    assert image.size == BLOCK + 512
    assert await served.cache.read(image, 0, 1) == b"2"


async def test_questions_that_have_no_answer_fail(served: Served) -> None:
    found = await answers(
        served,
        lookup(2, ROOT_INODE, b"missing"),
        lookup(4, UNKNOWN, b"vm.img"),
        lookup(6, ROOT_INODE, b"x" * 300),
        lookup(8, ROOT_INODE, b""),
        getattr_(10, UNKNOWN),
    )
    assert found == {
        2: (errno.ENOENT, b""),
        4: (errno.EIO, b""),
        6: (errno.ENAMETOOLONG, b""),
        8: (errno.ENOENT, b""),
        10: (errno.EIO, b""),
    }


async def test_a_name_that_nobody_waits_for_is_not_counted(served: Served) -> None:
    """The kernel would never forget it."""
    (served.origin / "vm.img").touch()
    asked = [lookup(2, ROOT_INODE, b"vm.img"), lookup(4, ROOT_INODE, b"missing")]
    found = await answers(served, *asked, getattr_(6, ROOT_INODE), unwanted=True)
    (node,) = struct.unpack_from("<Q", found[2][1])
    assert served.operations.inodes.get(node) is None
    assert served.operations.inodes.get(ROOT_INODE) is not None


async def test_a_sync_of_the_lane_that_failed_is_a_failed_sync(
    served: Served, handle: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the kernel says of the next one: what was dirty and not synced is lost."""
    found = await answers(served, write(2, handle, 0, b"x" * PAGE))
    assert found[2][0] == 0
    failed = [(n, lanes.FSYNC, handle, 0, errno.EIO, 0, None) for n in (4, 6)]
    assert await answers(served, *failed) == dict.fromkeys((4, 6), (errno.EIO, b""))
    assert not served.cache.state.usable
    image = served.operations.handles[handle].image
    assert served.cache.core.lost_ranges(image.id) == [(0, PAGE), (BLOCK - PAGE, PAGE)]
    assert "lost 2 pages" in caplog.text


async def test_a_failed_sync_of_the_lane_ends_the_cache_for_all(
    served: Served, handle: int
) -> None:
    """Also if the image of the fsync that tells of it has nothing to sync; and it counts once."""
    other = await ready(served, "other.img")
    image = served.operations.handles[other].image
    fsync = (2, lanes.FSYNC, handle, 0, 0, 0, None)
    assert (await answers(served, fsync))[2][0] == 0
    assert (await answers(served, write(4, other, 0, b"x" * PAGE)))[4][0] == 0
    failed = (6, lanes.FSYNC, handle, 0, errno.EIO, 0, None)
    await answers(served, failed)
    assert not served.cache.state.usable
    assert served.cache.core.lost_ranges(image.id)
    straggler = (8, lanes.FSYNC, handle, 0, errno.EIO, 0, None)
    assert await answers(served, straggler) == {8: (0, b"")}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_failed_sync_of_the_lane_loses_although_the_database_fails_with_it(
    served: Served,
    handle: int,
    when: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No barrier reaches the device then and finds out; what is lost must not count as rescued."""
    cache, image = served.cache, served.operations.handles[handle].image
    located = cache.core.locate(image.id, 0)
    assert located is not None
    await cache.fsync(image, metadata=True)
    arrays = cache.core.arrays()  # a sync of the lane is under way, about the dirty page
    arrays["syncing"][0], arrays["syncing_pages"][0] = located.slot, 1 << 15
    arrays["syncs"][:] = 1, 0, 1
    if when == "before":
        cache.state.unusable(DatabaseError("injected"))
    else:
        monkeypatch.setattr(BlockMap, "commit", _fails)
        image.row_owed = True
    await answers(served, (2, lanes.FSYNC, handle, 0, errno.EIO, 0, None))
    assert not cache.state.usable
    assert cache.core.lost_ranges(image.id) == [(BLOCK - PAGE, PAGE)]
    assert "lost 1 pages" in caplog.text


# -- opens and closes ------------------------------------------------------------------------------

PID = 4711


def opens(unique: int, node: int, flags: int = os.O_RDWR) -> Request:
    """As ``Lane.take`` gives it."""
    return unique, lanes.OPEN, node, 0, PID, flags, None


def closes(unique: int, opcode: int, handle: int) -> Request:
    """The same: a FLUSH or a RELEASE."""
    return unique, opcode, handle, 0, 0, 0, None


@pytest.fixture
async def node(served: Served) -> int:
    """Of an image."""
    (served.origin / "vm.img").write_bytes(b"1" * BLOCK)
    return await served.inode("vm.img")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC])
async def test_an_open_gives_a_handle_that_ends_with_its_release(
    served: Served, node: int, flags: int
) -> None:
    error, data = (await answers(served, opens(2, node, flags)))[2]
    number, kept, _ = struct.unpack("<QII", data)
    handle = served.operations.handles[number]
    assert (error, kept, handle.pid) == (0, 0, PID)
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    image = handle.image
    assert (handle.write, image.writers, image.readers) == (writes, writes, not writes)
    assert image.size == (0 if flags & os.O_TRUNC else BLOCK)
    for opcode in (lanes.FLUSH, lanes.FLUSH, lanes.RELEASE):
        assert await answers(served, closes(4, opcode, number)) == {4: (0, b"")}
    assert not served.operations.handles and not image.handles


async def test_the_kernel_keeps_its_pages_unless_others_have_changed_the_image(
    served: Served, node: int
) -> None:
    keeps = []
    for content in (b"1", b"1", b"2", b"2"):
        if content != (served.origin / "vm.img").read_bytes()[:1]:
            (served.origin / "vm.img").write_bytes(content * BLOCK)
        await trio.sleep(0.15)  # longer than Tuning.settle_age: its change time is to be trusted
        _, data = (await answers(served, opens(2, node, os.O_RDONLY)))[2]
        number, flags, _ = struct.unpack("<QII", data)
        keeps.append(flags)
        image = served.operations.handles[number].image
        assert await served.cache.read(image, 0, 1) == content
        await answers(served, closes(4, lanes.RELEASE, number))
    assert keeps == [0, 2, 0, 2]  # FOPEN_KEEP_CACHE


async def test_a_close_notes_what_the_image_is_then(served: Served, node: int) -> None:
    """What others do after it, and before the kernel tells of the last close, is theirs (P3)."""
    number = await served.open(node)
    image = served.operations.handles[number].image
    assert (await answers(served, write(2, number, 0, b"x" * PAGE)))[2][0] == 0
    await served.cache.flush(image)
    image.wrote = True
    await answers(served, closes(4, lanes.FLUSH, number))
    assert image.closing is not None


async def test_opens_and_closes_that_cannot_be_fail(served: Served, node: int) -> None:
    (served.origin / "directory").mkdir()
    directory = await served.inode("directory")
    found = await answers(
        served,
        opens(2, UNKNOWN),
        opens(4, directory),
        closes(6, lanes.FLUSH, UNKNOWN),
        closes(8, lanes.RELEASE, UNKNOWN),
    )
    assert {unique: error for unique, (error, _) in found.items()} == {
        2: errno.EIO, 4: errno.EPERM, 6: errno.EIO, 8: errno.EIO
    }  # fmt: skip


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
async def test_an_open_that_nobody_waits_for_is_closed_again(
    served: Served, node: int, flags: int
) -> None:
    """The kernel would send no release."""
    assert (await answers(served, opens(2, node, flags), unwanted=True))[2][0] == 0
    assert not served.operations.handles
    image = served.cache.images.find(served.operations.inodes[node].identity)
    assert image is not None and not image.handles


async def test_the_last_closes_are_not_lost_in_the_end(served: Served, node: int) -> None:
    numbers = [await served.open(node, flags) for flags in (os.O_RDONLY, os.O_RDWR)]
    late = tuple(closes(2 * n, lanes.RELEASE, n) for n in numbers)
    found = await answers(served, getattr_(1, node), late=late)
    assert [found[2 * n] for n in numbers] == [(0, b"")] * 2
    assert not served.operations.handles


async def test_who_only_reads_waits_for_nothing_when_he_closes(
    served: Served, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = [await served.open(node, os.O_RDONLY) for _ in range(3)]
    writer = await served.open(node)
    slowly: list[int] = []
    close = Files.close

    async def noted(files: Files, number: int) -> None:
        slowly.append(number)
        await close(files, number)

    monkeypatch.setattr(Files, "close", noted)
    image = served.operations.handles[writer].image
    await answers(served, closes(2, lanes.RELEASE, readers[0]))
    assert (slowly, image.readers) == ([], 2)
    async with trio.open_nursery() as nursery, image.opening:  # somebody opens or closes it
        nursery.start_soon(answers, served, closes(2, lanes.RELEASE, readers[1]))
        await trio.testing.wait_all_tasks_blocked()
        assert image.readers == 2
    assert (slowly, image.readers) == ([readers[1]], 1)
    await answers(served, closes(2, lanes.RELEASE, writer))
    assert (slowly, image.writers) == ([readers[1], writer], 0)
    await served.cache.evict(image)
    await answers(served, closes(2, lanes.RELEASE, readers[2]))  # and now it is forgotten
    assert slowly == [readers[1], writer, readers[2]]
    assert served.cache.images.find(served.operations.inodes[node].identity) is None


async def test_an_open_that_comes_with_a_close_comes_after_it(served: Served, node: int) -> None:
    """Or else an image that was evicted while it was open would stay so as long as somebody who
    opens it at once has it open. Ten times: tasks begin in any order."""
    for _ in range(10):
        number = await served.open(node)
        evicted = served.operations.handles[number].image
        await served.cache.evict(evicted)
        assert evicted.detached
        both = closes(2, lanes.RELEASE, number), opens(4, node)
        (again,) = struct.unpack_from("<Q", (await answers(served, *both))[4][1])
        image = served.operations.handles[again].image
        assert image is not evicted and not image.detached
        await answers(served, closes(6, lanes.RELEASE, again))


@pytest.mark.parametrize(
    ("opcode", "owner", "name", "whole"),
    [
        (lanes.OPEN, BlockCache, "truncate", True),
        (lanes.FLUSH, Closing, "before_close", True),
        (lanes.RELEASE, Closing, "close", True),
        (lanes.FSYNC, BlockCache, "fsync", True),
        (lanes.LOOKUP, Operations, "look_up", False),
    ],
)
async def test_what_changes_something_is_done_whole_at_a_forced_end(
    served: Served, node: int, opcode: int, owner: type, name: str, whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    handle = await served.open(node)
    request = {
        lanes.OPEN: opens(2, node, os.O_RDWR | os.O_TRUNC),
        lanes.LOOKUP: lookup(2, ROOT_INODE, b"vm.img"),
    }.get(opcode, closes(2, opcode, handle))
    began, ended = trio.Event(), []
    really = getattr(owner, name)

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        began.set()
        await trio.sleep(0.05)
        ended.append(await really(*args, **kwargs))
        return ended[-1]

    monkeypatch.setattr(owner, name, slowly)
    queue = os.eventfd(1)
    waiting = [request]

    def take() -> list[Request]:
        os.eventfd_read(queue)
        return [waiting.pop()]

    lane: Any = SimpleNamespace(queue=queue, ended=False, take=take, reply=lambda *_: 0)
    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Requests(lane, served.operations, served.cache).serve)
                await began.wait()
                nursery.cancel_scope.cancel()
    finally:
        os.close(queue)
    assert bool(ended) == whole
