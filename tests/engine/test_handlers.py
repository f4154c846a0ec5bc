"""The kernel's calls over a real tree and the world's engine: parts of one fail, or it waits."""

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError
from trio.testing import MockClock

from fusecache.engine import truth
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.fuse.inodes import ROOT_ID
from fusecache.fuse.operations import Operations
from fusecache.store.origin import Attributes
from fusecache.store.tree import Tree
from tests.engine.handles import tune
from tests.support.stamps import stamped
from tests.support.world import PAGE, World

_CALLER: Any = SimpleNamespace(uid=0, gid=0, pid=1)


class Mounted:
    """Handlers to call, with one image: ``image``, the world's first file.

    Names are below ``root``, data is the world's.
    """

    def __init__(self, world: World, root: Path) -> None:
        self.world = world
        self.root = root
        self.numbers: dict[int, int] = {}
        self.cache: BlockCache
        self.operations: Operations
        self.make("image", 1)

    def make(self, name: str, number: int) -> None:
        """The name of one of the world's files."""
        (self.root / name).touch()
        self.numbers[(self.root / name).stat().st_ino] = number

    def file(self, path_fd: int) -> Any:
        """See ``World.file``."""
        return self.world.files[self.numbers[os.fstat(path_fd).st_ino]]

    def attributes_of(self, path_fd: int) -> Attributes:
        """See ``truth.attributes_of``."""
        file = self.file(path_fd)
        return Attributes(file.size, file.mtime_ns, file.ctime_ns)

    async def open(self, name: bytes) -> int:
        """A handle for writing."""
        entry = await self.operations.lookup(ROOT_ID, name, _CALLER)
        return int((await self.operations.open(entry.st_ino, os.O_RDWR, _CALLER)).fh)

    async def dirty(self, name: bytes, number: int) -> Image:
        """The image, with a dirty page, closed."""
        handle = await self.open(name)
        await self.operations.write(handle, 0, stamped(number, 0, PAGE, 2))
        image = self.operations.handles[handle].image
        await self.operations.flush(handle)
        await self.operations.release(handle)
        assert self.cache.core.dirty_bytes(image.id) == PAGE
        return image


@pytest.fixture
async def mounted(
    back: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Mounted]:
    """In write-back; the cleaner leaves what is dirty alone."""
    tune(back, dirty_age=600.0)
    root = tmp_path / "origin"
    root.mkdir()
    made = Mounted(back, root)
    monkeypatch.setattr(back, "file", made.file)
    monkeypatch.setattr(truth, "attributes_of", made.attributes_of)
    tree = Tree(root)
    async with back.open() as cache:
        made.cache = cache
        made.operations = Operations(cache, tree)
        yield made
        made.operations.inodes.close()
    tree.close()


def _gone(cache: BlockCache, image: Image) -> bool:
    assert not cache.core.dirty_bytes(image.id) and not cache.core.usage(image.id).blocks
    assert cache.block_map.cached(image.id) == (0, False)
    return cache.images.find(image.row.identity) is None


def _fails(*args: object) -> Any:
    raise OSError(5, "injected")


# -- removal ---------------------------------------------------------------------------------------


async def test_an_unlink_whose_sync_fails_leaves_nothing_that_could_never_be_written_back(
    mounted: Mounted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await mounted.dirty(b"image", 1)
    monkeypatch.setattr(Tree, "sync_directory", _fails)
    with pytest.raises(FUSEError):
        await mounted.operations.unlink(ROOT_ID, b"image", _CALLER)
    assert not (mounted.root / "image").exists()
    assert _gone(mounted.cache, image)


async def test_an_unlink_that_fails_leaves_the_image_as_it_was(
    mounted: Mounted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await mounted.dirty(b"image", 1)
    monkeypatch.setattr(Tree, "unlink", _fails)
    with pytest.raises(FUSEError):
        await mounted.operations.unlink(ROOT_ID, b"image", _CALLER)
    assert mounted.cache.images.find(image.row.identity) is image
    assert mounted.cache.core.dirty_bytes(image.id) == PAGE and not image.detached


def _directory(mounted: Mounted, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tree, "sync_directory", _fails)


def _new_path(mounted: Mounted, patch: pytest.MonkeyPatch) -> None:
    path_of = Tree.path_of

    def fails_afterwards(self: Tree, fd: int) -> bytes:
        if not (mounted.root / "image").exists():
            _fails()
        return path_of(self, fd)

    patch.setattr(Tree, "path_of", fails_afterwards)


def _attributes(mounted: Mounted, patch: pytest.MonkeyPatch) -> None:
    """At the end of ``own_change``."""

    def fails_afterwards(path_fd: int) -> Attributes:
        if not (mounted.root / "image").exists():
            _fails()
        return mounted.attributes_of(path_fd)

    patch.setattr(truth, "attributes_of", fails_afterwards)


@pytest.mark.parametrize("fault", [_directory, _new_path, _attributes])
@pytest.mark.parametrize("first", [False, True], ids=["image first", "other first"])
async def test_a_rename_that_fails_after_it_has_happened_leaves_nothing_of_what_it_replaced(
    mounted: Mounted,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Mounted, pytest.MonkeyPatch], None],
    first: bool,
) -> None:
    """The two are held in the order of their identities, whichever replaces the other."""
    mounted.make("other", 2)
    moved = await mounted.dirty(b"image", 1)
    replaced = await mounted.dirty(b"other", 2)
    if first != (moved.row.identity < replaced.row.identity):
        (mounted.root / "image").rename(mounted.root / "third")
        (mounted.root / "other").rename(mounted.root / "image")
        (mounted.root / "third").rename(mounted.root / "other")
        moved, replaced = replaced, moved
    assert first == (moved.row.identity < replaced.row.identity)
    fault(mounted, monkeypatch)
    with pytest.raises(FUSEError):
        await mounted.operations.rename(ROOT_ID, b"image", ROOT_ID, b"other", 0, _CALLER)
    assert os.listdir(mounted.root) == ["other"]
    assert _gone(mounted.cache, replaced)
    assert mounted.cache.core.dirty_bytes(moved.id) == PAGE and not moved.detached


async def test_an_image_that_got_another_name_while_its_removal_waited_keeps_what_is_dirty(
    mounted: Mounted, autojump_clock: MockClock
) -> None:
    """By somebody beside the mount: here the two would wait for each other."""
    image = await mounted.dirty(b"image", 1)
    async with trio.open_nursery() as nursery, image.opening:
        nursery.start_soon(mounted.operations.unlink, ROOT_ID, b"image", _CALLER)
        await trio.sleep(1)
        os.link(mounted.root / "image", mounted.root / "second")
    assert os.listdir(mounted.root) == ["second"]
    assert mounted.cache.images.find(image.row.identity) is image
    assert mounted.cache.core.dirty_bytes(image.id) == PAGE and not image.detached
    await mounted.operations.unlink(ROOT_ID, b"second", _CALLER)
    assert _gone(mounted.cache, image)


# -- the others ------------------------------------------------------------------------------------


async def test_a_create_whose_mode_cannot_be_set_leaves_no_handle(
    mounted: Mounted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel was told that it failed, and sends no release: the lock would be held, and an
    unmount refused, for good."""
    created: list[Image] = []
    create, opened = Tree.create, mounted.cache.open

    def named(*args: Any) -> Any:
        found = create(*args)
        mounted.numbers[found.st.st_ino] = 2
        return found

    async def noted(*args: Any, **kwargs: Any) -> Image:
        created.append(await opened(*args, **kwargs))
        assert created[0].writers == 1 and created[0].origin.locked
        return created[0]

    monkeypatch.setattr(Tree, "create", named)
    monkeypatch.setattr(Tree, "chmod", _fails)
    monkeypatch.setattr(mounted.cache, "open", noted)
    with pytest.raises(FUSEError):
        await mounted.operations.create(ROOT_ID, b"new", 0o400, os.O_RDWR, _CALLER)
    (image,) = created
    assert not image.handles and not image.origin.locked
    assert not mounted.operations.handles
    assert mounted.operations.inodes.find(image.row.identity) is None


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_truncating_open_that_does_not_end_well_leaves_no_handle(
    mounted: Mounted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    opened: list[Image] = []

    async def truncate(image: Image, size: int) -> None:
        opened.append(image)
        assert image.writers == 1 and image.origin.locked
        if how == "fails":
            _fails()
        await trio.sleep_forever()

    monkeypatch.setattr(mounted.cache, "truncate", truncate)
    entry = await mounted.operations.lookup(ROOT_ID, b"image", _CALLER)
    with trio.move_on_after(1), pytest.raises(FUSEError):
        await mounted.operations.open(entry.st_ino, os.O_RDWR | os.O_TRUNC, _CALLER)
    (image,) = opened
    assert not image.handles and not image.origin.locked
    assert not mounted.operations.handles


async def test_an_fsync_covers_times_that_were_being_set_during_the_sync_before(
    mounted: Mounted, back: World, autojump_clock: MockClock
) -> None:
    """Not the guest's own, which the kernel holds back meanwhile, but one by the clock."""
    operations = mounted.operations
    handle = await mounted.open(b"image")
    node, image = operations.handles[handle].node, operations.handles[handle].image
    wanted = EntryAttributes()
    which: Any = SimpleNamespace(update_atime=True, update_mtime=True)
    for name in ("size", "mode", "uid", "gid"):
        setattr(which, f"update_{name}", False)
    back.before = {"_asked": 1.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.setattr, node.id, wanted, which, handle, _CALLER)
        await trio.sleep(0.5)
        await mounted.cache.fsync(image, metadata=True)
    back.before = {}
    syncs = back.faults.calls["origin.sync"]
    await operations.fsync(handle, False)
    assert back.faults.calls["origin.sync"] == syncs + 1
    await operations.release(handle)
