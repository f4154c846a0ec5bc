"""A Linux guest boots from an image on the mount, in every write mode."""

from pathlib import Path

import pytest

from tests.libvirt.guest import Parts, make_disk
from tests.libvirt.qemu import qemu
from tests.support.daemon import Mount

pytestmark = [pytest.mark.mount, pytest.mark.timeout(600)]


@pytest.mark.parametrize("mode", ["through", "around", "back"])
def test_what_a_guest_has_synced_outlives_qemu_and_the_daemon(
    mount: Mount, parts: Parts, tmp_path: Path, mode: str
) -> None:
    mount.options |= {"write_mode": mode, "dirty_age": "3600"}
    make_disk(parts, mount.origin / "vm.img")
    mount.start()
    cache = "writeback" if mode == "around" else "none"
    with qemu(parts, tmp_path, mount.mountpoint / "vm.img", "want=5", cache=cache) as first:
        first.wait_for("guest: all right")
        first.ended()
    with qemu(
        parts, tmp_path, mount.mountpoint / "vm.img", "have=5 want=1000000", cache=cache
    ) as second:
        second.wait_for("guest: synced 25")
        second.kill()
    synced = second.console().count("guest: synced")
    dirty = mount.image("vm.img")["dirty_bytes"]
    assert (dirty > 0) == (mode == "back"), "only write-back has what the origin has not"
    mount.kill()
    mount.start()
    done = mount.run("evict", "vm.img")
    assert done.returncode == 0, done.stderr
    mount.stop()
    have = 5 + synced
    with qemu(parts, tmp_path, mount.origin / "vm.img", f"have={have} want={have}") as third:
        third.wait_for("guest: all right")
        third.ended()
    assert f"guest: found {have}" in third.console()
