"""Migration between two QEMUs on two mounts of one origin, as docs/libvirt.md orders it.

The guest writes and checks its disk at random until it moves, and goes on there. What it wrote is
in its memory, which moves with it, so that it notices a wrong byte on either side; and in the end
every byte of the origin is compared with what it says.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.helpers import wait_for
from tests.libvirt.guest import PATIENCE, Parts, check_versions
from tests.libvirt.qemu import Qemu, qemu
from tests.support.daemon import BLOCK, Mount
from tests.support.direct import opened, read_direct
from tests.support.stamps import stamped

pytestmark = [pytest.mark.mount, pytest.mark.timeout(600)]

_SIZE = 8 << 20
_CHURN = "disk=churn"


class Hosts:
    """Two caches over one origin, each as on a host of its own."""

    def __init__(self, base: Path, mode: str) -> None:
        options = {"write_mode": mode, "dirty_age": "1"}
        self.a = Mount(base / "a", **options)
        self.b = Mount(base / "b", **options)
        self.b.origin = self.a.origin
        self.image = self.a.origin / "vm.img"
        self.image.write_bytes(stamped(1, 0, _SIZE, 1))

    def evict(self, mount: Mount) -> None:
        """The step before a migration."""
        done = mount.run("evict", "vm.img")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def mode() -> str:
    """Unless a test says otherwise."""
    return "back"


@pytest.fixture
def hosts(short: Path, mode: str) -> Iterator[Hosts]:
    """Both mounts, started."""
    made = Hosts(short, mode)
    try:
        made.a.start()
        made.b.start()
        yield made
    finally:
        made.a.cleanup()
        made.b.cleanup()
    for mount in (made.a, made.b):
        assert "unexpected error" not in mount.log(), mount.log()


def finish(guest: Qemu) -> None:
    """The guest checks its whole disk, says what is on it and powers off."""
    guest.say("stop")
    guest.wait_for("guest: all right")
    guest.ended()


@pytest.mark.parametrize(
    ("mode", "cache"),
    [
        ("through", "none"),
        ("back", "none"),
        # libvirt refuses this unless it is told that it is safe.
        pytest.param("through", "writeback", marks=pytest.mark.slow),
        pytest.param("back", "writeback", marks=pytest.mark.slow),
    ],
)
def test_a_guest_that_writes_moves_there_and_back_without_a_wrong_byte(
    hosts: Hosts, parts: Parts, short: Path, mode: str, cache: str
) -> None:
    here, there = hosts.a.mountpoint / "vm.img", hosts.b.mountpoint / "vm.img"
    with qemu(parts, short, here, _CHURN, cache=cache) as first:
        first.wait_for_turns()
        hosts.evict(hosts.a)
        first.wait_for_turns()  # detached: past the cache from now on
        assert hosts.a.image("vm.img")["dirty_bytes"] == 0
        with qemu(parts, short, there, _CHURN, cache=cache, incoming=True) as second:
            first.migrate_to(second)
            first.ask("quit")
            first.ended()
            second.take_over()
            second.wait_for_turns()
            assert hosts.b.image("vm.img")["cached_bytes"] > 0, "it is cached at its new place"
            hosts.evict(hosts.b)
            # The cache of the first host, which has served this image before, again.
            with qemu(parts, short, here, _CHURN, cache=cache, incoming=True) as third:
                second.migrate_to(third)
                second.ask("quit")
                second.ended()
                third.take_over()
                third.wait_for_turns()
                finish(third)
    hosts.evict(hosts.a)
    data = hosts.image.read_bytes()
    check_versions(third.console(), data)
    assert there.read_bytes() == data == here.read_bytes()


def test_a_migration_without_evict_is_refused_and_the_guest_goes_on_where_it_was(
    hosts: Hosts, parts: Parts, short: Path
) -> None:
    here, there = hosts.a.mountpoint / "vm.img", hosts.b.mountpoint / "vm.img"
    with qemu(parts, short, here, _CHURN) as first:
        first.wait_for_turns()
        with qemu(parts, short, there, _CHURN, incoming=True) as second:
            first.migrate_to(second)
            second.wait_for_error("Device or resource busy")
            assert second.ask("query-status")["running"] is False
        assert "another host" in hosts.b.log() and "vm.img" in hosts.b.log()
        first.ask("cont")
        first.wait_for_turns()
        # What was forgotten, done now.
        hosts.evict(hosts.a)
        with qemu(parts, short, there, _CHURN, incoming=True) as third:
            first.migrate_to(third)
            first.ask("quit")
            first.ended()
            third.take_over()
            third.wait_for_turns()
            finish(third)
    hosts.evict(hosts.b)
    check_versions(third.console(), hosts.image.read_bytes())


def test_after_a_migration_that_failed_the_guest_goes_on_past_the_cache(
    hosts: Hosts, parts: Parts, short: Path
) -> None:
    here, there = hosts.a.mountpoint / "vm.img", hosts.b.mountpoint / "vm.img"
    with qemu(parts, short, here, _CHURN) as first:
        first.wait_for_turns()
        hosts.evict(hosts.a)
        with qemu(parts, short, there, _CHURN, incoming=True) as second:
            second.ask("query-status")
            first.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
            first.ask("migrate", uri=f"unix:{second.migration}")
            wait_for(
                lambda: first.ask("query-migrate")["status"] == "active", "the migration", PATIENCE
            )
            first.wait_for_turns()
            second.kill()
        wait_for(lambda: first.ask("query-migrate")["status"] == "failed", "its failure", PATIENCE)
        first.wait_for_turns()
        assert hosts.a.image("vm.img")["cached_bytes"] == 0
        finish(first)
    check_versions(first.console(), hosts.image.read_bytes())
    with opened(here, os.O_RDONLY | os.O_DIRECT) as fd:
        read_direct(fd, 0, BLOCK)
    assert hosts.a.image("vm.img")["cached_bytes"] > 0, "closed and opened again, it is cached"
