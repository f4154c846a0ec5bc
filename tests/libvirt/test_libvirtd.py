"""Guests of a real libvirt on a mount, with the XML of docs/libvirt.md."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.e2e.helpers import COMMAND, wait_for
from tests.libvirt.guest import KERNEL_WORDS, PATIENCE, Parts, check_versions, make_disk
from tests.libvirt.libvirtd import QEMU_ID, Libvirt
from tests.libvirt.qemu import ACCEL, EMULATED, qemu
from tests.support.daemon import Mount
from tests.support.stamps import stamped

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(1200)]

_DOCUMENT = Path(__file__).parents[2] / "docs/libvirt.md"


def printed(tag: str) -> ElementTree.Element:
    """The XML of that kind in the documentation."""
    for text in re.findall(r"```xml\n(.*?)```", _DOCUMENT.read_text(), re.DOTALL):
        found = ElementTree.fromstring(text)
        if found.tag == tag:
            return found
    raise AssertionError(f"{_DOCUMENT} shows no <{tag}>")


def define(host: Libvirt, element: ElementTree.Element, verb: str) -> None:
    """Gives libvirt some XML."""
    file = host.base / f"{verb}.xml"
    ElementTree.ElementTree(element).write(file)
    host.virsh(verb, file)


def guest(
    host: Libvirt, parts: Parts, name: str, path: Path, words: str, *, evict: bool = True,
    **driver: str,
) -> ElementTree.Element:  # fmt: skip
    """The documented domain, made small, with the tests' kernel and its console in a file."""
    domain = printed("domain")
    domain.set("type", "qemu" if ACCEL == "tcg" else "kvm")

    def at(where: str) -> ElementTree.Element:
        found = domain.find(where)
        assert found is not None, where
        return found

    at("name").text = name
    at("memory").text, at("vcpu").text = "128", "1"
    at("memory").set("unit", "MiB")
    for tag, text in (
        ("kernel", str(parts.kernel)),
        ("initrd", str(parts.initrd)),
        ("cmdline", f"{KERNEL_WORDS} {words}"),
    ):
        ElementTree.SubElement(at("os"), tag).text = text
    at("devices/disk/driver").attrib.update(driver)
    at("devices/disk/source").set("file", str(path))
    log = ElementTree.SubElement(at("devices/serial"), "log")
    log.set("file", f"/var/log/{name}.console")
    if not evict:
        domain.remove(at("metadata"))
    return domain


@pytest.fixture
def kernel(parts: Parts, short: Path) -> Parts:
    """Where QEMU may read it as another user."""
    copies = {}
    for name in ("kernel", "initrd"):
        copies[name] = short / name
        copies[name].write_bytes(getattr(parts, name).read_bytes())
    return Parts(copies["kernel"], copies["initrd"], parts.root)


@pytest.fixture
def host(short: Path) -> Iterator[Libvirt]:
    """A mount in write-back, started, and a libvirt, not started, with the hook installed."""
    mount = Mount(short / "fc", write_mode="back", dirty_age="3600", size="256M")
    made = Libvirt(short / "lv", "here", mount)
    program = made.base / "bin/fusecache"
    program.write_text(
        f'#!/bin/sh\nFUSECACHE_RUNTIME_DIR={mount.runtime} exec {" ".join(COMMAND)} "$@"\n'
    )
    program.chmod(0o755)
    done = mount.run("install-units", "--libvirt-hook", "--root", short / "root")
    assert done.returncode == 0, done.stderr
    (short / "root/etc/libvirt/hooks").rename(made.base / "etc/hooks")
    try:
        mount.start()
        yield made
    finally:
        mount.cleanup()
    assert "unexpected error" not in mount.log(), mount.log()


def test_guests_of_a_pool_boot_write_stop_and_are_evicted_by_choice(
    host: Libvirt, parts: Parts, kernel: Parts, short: Path
) -> None:
    mount = host.mount
    for name in ("vm1", "vm2", "vm3"):
        make_disk(parts, mount.origin / f"{name}.img")
    with host:
        pool = printed("pool")
        target = pool.find("target/path")
        assert target is not None
        target.text = str(mount.mountpoint)
        define(host, pool, "pool-define")
        host.virsh("pool-start", "cached")
        host.virsh("vol-create-as", "cached", "new.img", "1M", "--format", "raw")
        assert (mount.origin / "new.img").stat().st_size == 1 << 20
        assert "vm1.img" in host.virsh("vol-list", "cached")
        host.virsh("vol-delete", "new.img", "--pool", "cached")
        assert not (mount.origin / "new.img").exists()

        drivers = {
            "vm1": {"cache": "none"},
            "vm2": {"cache": "writeback", "io": "threads"},
            "vm3": {"cache": "none", "io": "threads"},
        }
        for name, driver in drivers.items():
            path = mount.mountpoint / f"{name}.img"
            evict = name == "vm1"
            define(host, guest(host, kernel, name, path, "want=6", evict=evict, **driver), "define")
            if name == "vm3":
                said = ("--uri", "urn:fusecache", "--key", "fusecache", "--set", "<evict/>")
                host.virsh("metadata", name, "--config", *said)
            host.virsh("start", name)
            host.wait_for(name, "guest: synced 1")
            assert (mount.origin / f"{name}.img").stat().st_uid == QEMU_ID
            host.wait_for(name, "guest: all right")
            host.wait_until_off(name)
            assert (mount.origin / f"{name}.img").stat().st_uid == 0, "libvirt gave it back"

        def cached() -> set[str]:
            images = mount.status()["images"]
            return {image["path"] for image in images if image["cached_bytes"]}

        try:
            wait_for(lambda: cached() == {"vm2.img"}, "the evictions by the hook", PATIENCE)
        except AssertionError as exc:
            raise AssertionError(mount.log()) from exc
    assert "image-changed" not in mount.log(), "libvirt's own doings are not taken for others'"
    done = mount.run("flush")
    assert done.returncode == 0, done.stderr
    for name in drivers:
        with qemu(parts, short, mount.origin / f"{name}.img", "have=6 want=6") as again:
            again.wait_for("guest: all right")
            again.ended()


@pytest.mark.parametrize("mode", ["through", "back"])
def test_libvirt_migrates_a_guest_that_writes_after_its_disk_was_evicted(
    short: Path, kernel: Parts, mode: str
) -> None:
    options = {"write_mode": mode, "dirty_age": "1"}
    mounts = [Mount(short / name, **options) for name in ("a", "b")]
    mounts[1].origin = mounts[0].origin
    image = mounts[0].origin / "vm.img"
    image.write_bytes(stamped(1, 0, 8 << 20, 1))
    path = Path("/mnt/mnt/vm.img")
    try:
        for mount in mounts:
            mount.start()
        hosts = [
            Libvirt(short / f"lv-{mount.base.name}", mount.base.name, mount) for mount in mounts
        ]
        with hosts[0] as here, hosts[1] as there:
            domain = guest(here, kernel, "vm", path, "disk=churn")
            serial = domain.find("devices/serial")
            assert serial is not None
            serial.set("type", "unix")
            ElementTree.SubElement(serial, "source", mode="bind", path="/var/log/vm.sock")
            define(here, domain, "create")
            here.wait_for("vm", "guest: turn")
            migrate = ("migrate", "--live", "vm", there.uri, "--migrateuri", "tcp://127.0.0.1")
            assert "shared storage" in here.refused(*migrate)
            # Nobody has evicted it.
            assert "unable to open /mnt/mnt/vm.img" in here.refused(*migrate, "--unsafe")
            assert "image-locked" in mounts[1].log() and "another host" in mounts[1].log()
            assert here.state("vm") == "running"
            here.wait_for("vm", "guest: turn", after=len(here.console("vm")))
            done = mounts[0].run("evict", "vm.img")
            assert done.returncode == 0, done.stderr
            if EMULATED:
                here.virsh("suspend", "vm")
            here.virsh(*migrate, "--unsafe")
            if EMULATED:
                there.virsh("resume", "vm")
            assert there.state("vm") == "running"
            assert image.stat().st_uid == QEMU_ID
            for _ in range(2):
                there.wait_for("vm", "guest: turn", after=len(there.console("vm")))
            with socket.socket(socket.AF_UNIX) as console:
                console.connect(str(there.base / "log/vm.sock"))
                console.sendall(b"stop\n")
                there.wait_for("vm", "stop")  # the terminal's echo: it has arrived
            there.wait_for("vm", "guest: all right")
            wait_for(lambda: "vm" not in there.virsh("list", "--name"), "its end", PATIENCE)
            done = mounts[1].run("evict", "vm.img", "-m", mounts[1].mountpoint)
            assert done.returncode == 0, done.stderr
            check_versions(there.console("vm"), image.read_bytes())
            assert image.read_bytes() == (mounts[0].mountpoint / "vm.img").read_bytes()
    finally:
        for mount in mounts:
            mount.cleanup()
    for mount in mounts:
        assert "unexpected error" not in mount.log(), mount.log()
