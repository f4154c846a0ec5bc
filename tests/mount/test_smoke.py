"""The three commands of the mission, on a raw file."""

import pytest

from tests.support.daemon import BLOCK, Mount, old
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def test_second_read_is_served_from_the_cache(mount: Mount) -> None:
    path = mount.origin / "vm2.img"
    path.write_bytes(stamped(2, 0, 16 * BLOCK, 1))
    old(path)
    mount.start()
    for _ in range(2):
        data = (mount.mountpoint / "vm2.img").read_bytes()
        assert set(check_stamps(data, 2, 0)) == {1}
    mount.stop()
    mount.start()
    data = (mount.mountpoint / "vm2.img").read_bytes()
    assert set(check_stamps(data, 2, 0)) == {1}
    image = mount.image("vm2.img")
    assert image["read_hit_bytes"] == 16 * BLOCK
    assert image["origin_reads"] == 0
    done = mount.run("evict", "vm2.img")
    assert done.returncode == 0, done.stderr
    assert mount.status()["cache"]["slots_used"] == 0
