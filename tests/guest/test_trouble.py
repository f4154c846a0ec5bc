"""The storage server is away at boot, hangs, squashes root, or changes images itself."""

import json
import time

import pytest

from tests.guest.host import CACHED, EXPORT, MIB, ORIGIN, SQUASHED, UNIT, Host, Server
from tests.guest.machine import Machine

SIZE = 4 * MIB
_BOOT_GOES_ON = 180.0
"""Seconds: far below what a server that is away would cost if a boot waited for it."""


# -- away at boot ----------------------------------------------------------------------------------


def test_a_boot_does_not_wait_for_a_missing_origin_and_the_unit_does(
    server: Server, host: Host
) -> None:
    """And what is dirty is still there when the origin is back."""
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.fstab(host.nfs_line("x-systemd.mount-timeout=20"))
    host.install(write_mode="back", dirty_age=3600)
    machine.sh(f"systemctl start {UNIT}")
    machine.stamp(f"{CACHED}/vm.img", 1, MIB, 2)
    machine.sh(f"sync {CACHED}/vm.img")
    machine.close()  # the power fails, and with it the storage
    server.reachable(False)

    machine.boot()
    machine.wait_for("systemctl is-active multi-user.target", "booted host", _BOOT_GOES_ON)
    for _ in range(10):  # never an empty directory in place of the images
        assert host.property("ActiveState") != "active"
        assert machine.run(f"mountpoint -q {CACHED}").code != 0
        time.sleep(3)
    assert int(host.property("NRestarts")) > 0
    words = machine.sh(f"journalctl -b -u {UNIT} --no-pager")
    assert f"The origin {ORIGIN} is not mounted" in words, words

    server.reachable(True)
    host.wait_active()
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1, 2}
    machine.sh("fusecache flush")
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1, 2}


_NEEDS = f"""
[Unit]
RequiresMountsFor={ORIGIN}
StartLimitIntervalSec=0
[Service]
ExecStart=sleep infinity
Restart=on-failure
RestartSec=5
"""


def test_a_line_of_fstab_mounts_at_boot_and_costs_no_boot_without_its_origin(
    server: Server, host: Host
) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    machine.sh("fusecache install-units")
    host.fstab(
        host.nfs_line("x-systemd.mount-timeout=45"),
        f"{ORIGIN} {CACHED} fusecache cache=/dev/vdb,write-mode=back,dirty-age=3600,nofail,_netdev,"
        f"x-systemd.requires-mounts-for={ORIGIN} 0 0",
    )
    machine.reboot()
    machine.wait_for(f"mountpoint {CACHED}", "mount")
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1}
    machine.stamp(f"{CACHED}/vm.img", 1, MIB, 2)
    machine.power_off()
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1, 2}, "home before the network goes"

    server.reachable(False)
    machine.boot()
    machine.wait_for("systemctl is-active multi-user.target", "booted host", _BOOT_GOES_ON)
    assert machine.run("systemctl is-system-running --wait").out.strip() == "degraded"
    # systemd tries none of these again, which is why the unit's README says Wants=.
    machine.write("/etc/systemd/system/needs.service", _NEEDS)
    assert machine.run("systemctl daemon-reload; systemctl start needs").code != 0
    server.reachable(True)
    time.sleep(20)
    assert machine.run("systemctl is-active needs").code != 0
    assert machine.run(f"mountpoint -q {CACHED}").code != 0
    machine.sh(f"mount {ORIGIN} && mount {CACHED}")
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1, 2}


# -- a stall ---------------------------------------------------------------------------------------

_HITS = """
import json, os, sys, time
from tests.support.direct import opened, read_direct
from tests.support.stamps import check_stamps
path, stop, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
reads, slowest, versions = 0, 0.0, set()
with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
    open(stop + ".ready", "w").close()
    while not os.path.exists(stop):
        place = reads * 65536 % size
        began = time.monotonic()
        versions |= set(check_stamps(read_direct(fd, place, 65536), 1, place))
        slowest = max(slowest, time.monotonic() - began)
        reads += 1
        time.sleep(0.2)
print(json.dumps([reads, slowest, sorted(versions)]))
"""
_READ_PLACE = """
import os, sys, time
from tests.support.direct import opened, read_direct
from tests.support.stamps import check_stamps
with opened(sys.argv[1], os.O_RDONLY | os.O_DIRECT) as fd:
    open(f"/run/opened{sys.argv[2]}", "w").close()
    while not os.path.exists("/run/go"):
        time.sleep(0.1)
    place = int(sys.argv[2]) * 65536
    print(set(check_stamps(read_direct(fd, place, 65536), 2, place)))
"""


_STALL = 25.0
"""Seconds; what waits for the server takes longer."""
_MEANWHILE = (
    "fusecache status --json",
    f"fusecache status {CACHED}/vm1.img",
    "fusecache log-level info",
    f"systemctl status {UNIT}",
    "fusecache mount /var/other /mnt/other --cache /var/other.cache --size 16M",
    "cat /mnt/other/vm3.img",
    "fusecache umount /mnt/other",
)


def _seconds(machine: Machine, script: str) -> float:
    """How long a command takes in the host, which must succeed."""
    timed = f"read began _ < /proc/uptime; {script} >/dev/null || exit 1"
    timed += "; read ended _ < /proc/uptime; echo $began $ended"
    began, ended = map(float, machine.sh(timed, seconds=300).split())
    return ended - began


@pytest.mark.parametrize("how", ["frozen", "unreachable"])
def test_a_stalled_server_holds_up_nothing_but_its_own_misses(
    server: Server, host: Host, how: str
) -> None:
    for number in (1, 2):
        server.machine.stamp(f"{EXPORT}/vm{number}.img", number, SIZE, 1)
    machine = host.machine
    host.mount_nfs()
    host.install(write_mode="back", dirty_age=3600, readahead="0")
    machine.sh(f"systemctl start {UNIT}")
    machine.versions(f"{CACHED}/vm1.img", 1)
    machine.sh("mkdir -p /var/other /mnt/other")
    machine.stamp("/var/other/vm3.img", 3, MIB, 1)
    before = {script: _seconds(machine, script) for script in _MEANWHILE}
    hits = machine.begin_python(_HITS, f"{CACHED}/vm1.img", "/run/stop", SIZE)
    writer = machine.begin(
        f"exec 3<>{CACHED}/vm1.img; touch /run/writer; while [ ! -e /run/go ]; do sleep 0.1; done; "
        f"sync -d /proc/self/fd/3 && dd if={CACHED}/vm1.img of=/proc/self/fd/3 bs=64K count=1 "
        "conv=notrunc 2>&1"
    )
    cold = [machine.begin_python(_READ_PLACE, f"{CACHED}/vm2.img", n) for n in range(4)]
    machine.wait_for(
        "ls /run/stop.ready /run/writer /run/opened0 /run/opened1 /run/opened2 /run/opened3",
        "programs in the host",
    )

    if how == "frozen":
        server.machine.qmp("stop")
    else:
        server.reachable(False)
    machine.sh("touch /run/go")
    time.sleep(_STALL)
    assert [script.done for script in cold] == [None] * 4, "misses wait"

    # The control socket, the log, and a mount of another origin, about as fast as before.
    took = {script: _seconds(machine, script) for script in _MEANWHILE}
    for command, seconds in took.items():
        assert seconds < 3 * before[command] + 20, (before, took)
    events = [str(entry["MESSAGE"]) for entry in host.journal()]
    assert any("event=origin-hangs" in event for event in events), events
    assert "does not answer" in machine.sh(f"systemctl status {UNIT}")

    machine.sh("touch /run/stop")
    reads, slowest, versions = json.loads(hits.wait(30).out)
    assert reads > 50 and versions == [1]
    assert slowest < 12, f"a hit took {slowest} s"

    if how == "frozen":
        server.machine.qmp("cont")
    else:
        server.reachable(True)
    for script in cold:
        done = script.wait(180)
        assert (done.code, done.out.strip()) == (0, "{1}"), done
    assert writer.wait(120).code == 0
    machine.sh("fusecache flush")
    for number in (1, 2):
        assert server.machine.versions(f"{EXPORT}/vm{number}.img", number) == {1}
    machine.wait_until(
        lambda: any("event=origin-answers" in str(entry["MESSAGE"]) for entry in host.journal()),
        "word that it is over",
    )
    machine.sh(f"systemctl stop {UNIT}")


# -- changes on the server, a squashed root --------------------------------------------------------


@pytest.mark.parametrize("options", ["", "actimeo=600", "lookupcache=all,actimeo=600"])
def test_a_change_on_the_server_is_seen_at_the_next_open(
    server: Server, host: Host, options: str
) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.mount_nfs(options)
    host.install()
    machine.sh(f"systemctl start {UNIT}; sleep 3")
    path = f"{CACHED}/vm.img"
    for version in (1, 2, 3, 4):
        if version > 1:
            mtime = server.machine.sh(f"stat -c %y {EXPORT}/vm.img")
            server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, version)
            if version == 3:  # by size and its own times it is the old one
                server.machine.sh(f"touch -d '{mtime}' {EXPORT}/vm.img")
        if version == 4:  # longer as well
            server.machine.stamp(f"{EXPORT}/vm.img", 1, MIB, version, SIZE)
        for _ in range(2):
            assert machine.versions(path, 1) == {version}
    assert machine.sh(f"stat -c %s {path}") == str(SIZE + MIB)
    server.machine.sh(f"truncate -s {MIB} {EXPORT}/vm.img")
    assert machine.versions(path, 1) == {4}
    assert machine.sh(f"wc -c < {path}") == str(MIB)


_SQUASHED = "may not. If that is root, the server squashes it"


def test_a_squashed_root_is_refused_in_words(server: Server, host: Host) -> None:
    image = f"{SQUASHED}/vm.img"
    server.machine.stamp(image, 1, SIZE, 1)
    server.machine.sh(f"chown -R 1000:1000 {SQUASHED}; chmod 0600 {image}; chmod 0755 {SQUASHED}")
    machine = host.machine
    host.mount_nfs(export=SQUASHED)
    host.install()

    machine.sh(f"systemctl start {UNIT}")
    for command in (f"cat {CACHED}/vm.img", f"sh -c 'echo > {CACHED}/vm.img'"):
        done = machine.run(command)
        assert done.code != 0 and "Permission denied" in done.err, done
    doctor = machine.run(f"fusecache doctor {ORIGIN} --cache /dev/vdb")
    assert doctor.code == 1 and _SQUASHED in doctor.out, doctor
    words = machine.sh(f"journalctl -u {UNIT} --no-pager")
    assert "unexpected" not in words and "root_squash" in words, words
    machine.sh(f"systemctl stop {UNIT}")

    server.machine.sh(f"chmod 0700 {SQUASHED}")
    done = machine.run(f"fusecache mount {ORIGIN} {CACHED} --cache /dev/vdb")
    assert done.code == 1 and "root_squash" in done.err and done.err.count("\n") == 1, done

    # As the images' owner it works.
    machine.sh("useradd -m -u 1000 owner; mkdir -p /home/owner/mnt; chown owner /home/owner/mnt")
    script = (
        "setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/home/owner "
        "XDG_RUNTIME_DIR=/home/owner/run sh -ec 'mkdir -p -m 0700 ~/run; cd; "
    )
    mount = "fusecache mount /srv/images ~/mnt --cache ~/cache.img --size 64M"
    machine.sh(f"{script} {mount}; cmp ~/mnt/vm.img {ORIGIN}/vm.img; fusecache umount ~/mnt'")
