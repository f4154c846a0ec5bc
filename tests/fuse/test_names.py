"""Changes of names."""

import errno

import pytest
from pyfuse3 import ROOT_INODE, FUSEError

from fusecache.store.tree import Found, Tree
from tests.fuse.conftest import NOBODY, Served
from tests.support.descriptors import count_descriptors


async def test_a_rename_that_fails_half_way_leaves_no_descriptor(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.img", "b.img"):
        (served.origin / name).touch()
    before = count_descriptors()
    find = Tree.find

    def failing(tree: Tree, parent: int, name: bytes) -> Found:
        if name == b"b.img":
            raise OSError(errno.EIO, "injected")
        return find(tree, parent, name)

    monkeypatch.setattr(Tree, "find", failing)
    rename = served.operations.rename
    with pytest.raises(FUSEError) as failed:
        await rename(ROOT_INODE, b"a.img", ROOT_INODE, b"b.img", 0, NOBODY)
    assert failed.value.errno == errno.EIO
    assert count_descriptors() == before
