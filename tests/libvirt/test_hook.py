"""The hook for libvirt, run as libvirt runs it: a guest's XML on standard input."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.helpers import COMMAND, environment, wait_for
from tests.libvirt.guest import PATIENCE
from tests.support.daemon import BLOCK, Mount, old
from tests.support.stamps import check_stamps, stamped

pytestmark = [pytest.mark.mount, pytest.mark.timeout(600)]

HOOK = Path(__file__).parents[2] / "docs/libvirt/hook"
_ASKED = "<metadata><f:evict xmlns:f='urn:fusecache'/></metadata>"


def domain(*disks: str, metadata: str = _ASKED) -> str:
    """The XML of a guest."""
    return (
        f"<domain type='qemu' id='3'><name>vm</name>{metadata}"
        f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{''.join(disks)}</devices>"
        "</domain>"
    )


def disk(path: object, more: str = "") -> str:
    """One disk that is a file."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{path}' index='1'/><target dev='vda' bus='virtio'/>{more}</disk>"
    )


class Hook:
    """The installed hook."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        root = mount.base / "root"
        done = mount.run("install-units", "--libvirt-hook", "--root", root)
        assert done.returncode == 0, done.stderr
        self.path = root / "etc/libvirt/hooks/qemu.d/fusecache"
        # As long as fusecache is not on the path of the machine that tests it.
        (mount.base / "bin").mkdir()
        program = mount.base / "bin/fusecache"
        program.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
        program.chmod(0o755)

    def __call__(self, operation: str, xml: str) -> None:
        """Runs it as libvirt does; it must succeed and say nothing."""
        env = environment(self._mount)
        env["PATH"] = f"{self._mount.base / 'bin'}:{env['PATH']}"
        done = subprocess.run(
            [self.path, "vm", operation, "end", "-"],
            input=xml,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=env,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def hook(mount: Mount) -> Hook:
    """With a write-back mount of three images that are cached, the first one dirty."""
    mount.options |= {"write_mode": "back", "dirty_age": "3600"}
    for number in (1, 2, 3):
        (mount.origin / f"{number}.img").write_bytes(stamped(number, 0, 4 * BLOCK, 1))
    mount.start()
    old(mount.origin / "3.img")
    for number in (1, 2, 3):
        check_stamps((mount.mountpoint / f"{number}.img").read_bytes(), number, 0)
    with open(mount.mountpoint / "1.img", "r+b") as image:
        image.write(stamped(1, 0, BLOCK, 2))
    return Hook(mount)


def cached(mount: Mount) -> dict[str, int]:
    """Bytes by image; an image that is not known has none."""
    return {image["path"]: image["cached_bytes"] for image in mount.status()["images"]}


def logged(mount: Mount, *words: str) -> bool:
    """Whether a line of the log has all these words."""
    return any(all(word in line for word in words) for line in mount.log().splitlines())


def test_a_guests_disks_are_flushed_and_evicted_when_it_has_stopped(
    mount: Mount, hook: Hook
) -> None:
    path = mount.mountpoint / "1.img"
    hook("release", domain(disk(path)))
    wait_for(lambda: not cached(mount).get("1.img"), "the eviction", PATIENCE)
    assert (mount.origin / "1.img").read_bytes()[:BLOCK] == stamped(1, 0, BLOCK, 2)
    assert cached(mount)["2.img"] == cached(mount)["3.img"] == 4 * BLOCK
    if not Path("/dev/log").exists():
        wait_for(lambda: logged(mount, "guest-stopped", "guest=vm"), "the log line", PATIENCE)
        assert logged(mount, "is evicted, 4 blocks"), mount.log()


def test_a_disk_that_is_named_by_a_link_is_the_image_it_leads_to(mount: Mount, hook: Hook) -> None:
    (mount.origin / "link.img").symlink_to("1.img")
    hook("release", domain(disk(mount.mountpoint / "link.img")))
    wait_for(lambda: not cached(mount).get("1.img"), "the eviction", PATIENCE)
    assert (mount.origin / "1.img").read_bytes()[:BLOCK] == stamped(1, 0, BLOCK, 2)


def test_nothing_is_evicted_of_guests_that_did_not_ask_or_have_not_stopped(
    mount: Mount, hook: Hook
) -> None:
    for operation in ("prepare", "start", "started", "stopped", "migrate"):
        hook(operation, domain(disk(mount.mountpoint / "1.img")))
    for metadata in ("", "<metadata><f:other xmlns:f='urn:fusecache'/></metadata>"):
        hook("release", domain(disk(mount.mountpoint / "1.img"), metadata=metadata))
    hook("release", domain(disk(mount.mountpoint / "2.img")))
    wait_for(lambda: not cached(mount).get("2.img"), "the eviction that was asked for", PATIENCE)
    assert cached(mount)["1.img"] == 4 * BLOCK


def test_what_other_guests_may_read_stays_and_what_is_elsewhere_is_left_alone(
    mount: Mount, hook: Hook, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.img"
    elsewhere.write_bytes(b"x")
    overlay = (
        f"<backingStore type='file'><source file='{mount.mountpoint / '3.img'}'/></backingStore>"
    )
    disks = (
        disk(elsewhere),
        "<disk type='file' device='cdrom'><target dev='sda'/></disk>",
        "<disk type='block' device='disk'><source dev='/dev/null'/><target dev='vdz'/></disk>",
        disk(mount.mountpoint / "2.img", "<readonly/>"),
        disk(mount.mountpoint / "3.img", "<shareable/>"),
        disk(mount.mountpoint / "1.img", overlay),
    )
    hook("release", domain(*disks))
    wait_for(lambda: not cached(mount).get("1.img"), "the eviction", PATIENCE)
    assert cached(mount)["2.img"] == cached(mount)["3.img"] == 4 * BLOCK


def test_a_disk_that_is_open_again_stays_cached(mount: Mount, hook: Hook) -> None:
    with open(mount.mountpoint / "1.img", "rb") as image:
        hook("release", domain(disk(mount.mountpoint / "1.img"), disk(mount.mountpoint / "2.img")))
        assert not logged(mount, "open again"), "libvirt did not wait for what is tried for 5 s"
        wait_for(lambda: not cached(mount).get("2.img"), "the eviction of the other one", PATIENCE)
        assert Path("/dev/log").exists() or logged(mount, "open again")
        assert cached(mount)["1.img"] == 4 * BLOCK
        os.pread(image.fileno(), BLOCK, 0)
    assert mount.image("1.img")["dirty_bytes"] == BLOCK, "nor is it flushed then"


def test_libvirt_never_notices_trouble(mount: Mount, hook: Hook) -> None:
    mount.kill()
    for xml in ("", "<domain urn:fusecache", "<network>urn:fusecache</network>"):
        hook("release", xml)
    hook("release", domain(disk(mount.mountpoint / "1.img")))
    if not Path("/dev/log").exists():
        wait_for(
            lambda: logged(mount, "guest-stopped", "No fusecache daemon"), "the log line", PATIENCE
        )
