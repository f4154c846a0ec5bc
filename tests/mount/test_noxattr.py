"""A mount without extended attributes: the kernel stops asking for one before every write."""

import errno
import os

import pytest

from tests.support.daemon import Mount


def test_without_extended_attributes_all_else_works(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(bytes(4096))
    done = mount.run("mount", *mount.arguments(), "-o", "noxattr")
    assert done.returncode == 0, done.stderr
    path = mount.mountpoint / "vm.img"
    with path.open("r+b") as image:
        for version in (b"1", b"2"):
            image.seek(0)
            image.write(version)
            image.flush()
    for call in (os.listxattr, lambda name: os.getxattr(name, "user.x")):
        with pytest.raises(OSError) as refused:
            call(path)
        assert refused.value.errno == errno.EOPNOTSUPP
    mount.stop()
    assert (mount.origin / "vm.img").read_bytes()[:1] == b"2"
