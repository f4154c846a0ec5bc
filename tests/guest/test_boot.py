"""fusecache as a service of a host that boots, over a real NFSv4.2 export."""

from functools import partial

from tests.guest.host import CACHED, EXPORT, MIB, ORIGIN, UNIT, Host, Server

SIZE = 4 * MIB


def test_the_unit_serves_an_export_after_a_boot(server: Server, host: Host) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.fstab(host.nfs_line())
    host.install(write_mode="back", dirty_age=3600)
    verified = machine.run(f"systemd-analyze verify {UNIT}.service")
    assert (verified.code, verified.out, verified.err) == (0, "", "")
    machine.reboot()
    host.wait_active()
    assert machine.sh("systemctl is-system-running --wait") == "running"
    assert machine.sh("cat /proc/1/comm") == "systemd"
    assert machine.sh("uname -r").startswith("6.1.")
    assert machine.sh(f"findmnt -n -o FSTYPE -M {CACHED}") == "fuse.fusecache"
    origin = machine.sh(f"findmnt -n -o FSTYPE,OPTIONS -M {ORIGIN}")
    assert origin.startswith("nfs4 ") and "vers=4.2" in origin

    # It serves, and what it has served comes from the SSD.
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1}
    machine.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1}
    (image,) = host.status()["images"]
    assert image["cached_bytes"] == SIZE and image["read_hit_bytes"] >= SIZE / 2

    # Who looks is told.
    assert f"serving: {ORIGIN} at {CACHED}" in machine.sh(f"systemctl status {UNIT}")
    machine.stamp(f"{CACHED}/vm.img", 1, MIB, 2)
    machine.wait_for(
        f"systemctl status {UNIT} | grep 'serving: .*1.0 MiB not on the origin yet'", "dirty data"
    )

    # A reload takes what it can, and a file that cannot be used changes nothing.
    host.configure(write_mode="back", dirty_age=1, block_size="128K")
    machine.sh(f"systemctl reload {UNIT}")
    server.machine.wait_until(
        lambda: server.machine.versions(f"{EXPORT}/vm.img", 1) == {1, 2}, "data at the new age"
    )
    host.configure(write_mode="sideways")
    assert machine.run(f"systemctl reload {UNIT}").code != 0
    assert host.property("ActiveState") == "active"
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1, 2}
    host.configure(write_mode="back")

    # The journal has every line with its priority, and no complaint about the hardening.
    entries = {}
    for entry in host.journal():
        message = str(entry["MESSAGE"])
        assert not message.startswith("<"), entry
        if entry["_COMM"] != "systemd":
            entries[message] = int(entry["PRIORITY"])
    assert _priority(entries, "event=serving") == 6
    assert _priority(entries, "event=reload-failed") == 3
    warnings = [line for line, priority in entries.items() if priority <= 4]
    assert all("reload" in line or "Nothing was changed" in line for line in warnings), warnings


def _priority(entries: dict[str, int], part: str) -> int:
    (found,) = {priority for message, priority in entries.items() if part in message}
    return found


def _has_another_daemon(host: Host, before: str) -> bool:
    return host.property("MainPID") not in ("0", before)


def test_a_killed_daemon_is_started_again_and_has_forgotten_nothing(
    server: Server, host: Host
) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.mount_nfs()
    host.install(write_mode="back", dirty_age=3600)
    machine.sh(f"systemctl start {UNIT}")
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1}
    machine.stamp(f"{CACHED}/vm.img", 1, MIB, 2)
    for times in (1, 2):
        daemon = host.property("MainPID")
        # Somebody holds the dead mount.
        holder = machine.begin(f"exec sleep 3600 < {CACHED}/vm.img")
        machine.sh(f"sleep 1; kill -9 {daemon}")
        machine.wait_until(partial(_has_another_daemon, host, daemon), "new daemon")
        host.wait_active()
        assert host.property("NRestarts") == str(times)
        assert machine.sh(f"grep -c ' {CACHED} ' /proc/self/mounts") == "1"
        assert machine.versions(f"{CACHED}/vm.img", 1) == {1, 2}
        assert host.status()["cache"]["dirty_bytes"] == MIB
        machine.sh(f"kill {holder.pid}")
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1}, "nothing but the SSD had it"
    machine.sh("fusecache flush")
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1, 2}


def test_a_stop_and_a_shutdown_bring_dirty_data_home(server: Server, host: Host) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.fstab(host.nfs_line())
    host.install(write_mode="back", dirty_age=3600)
    machine.sh(f"systemctl start {UNIT}")
    assert machine.sh(f"findmnt -n -o FSTYPE -M {ORIGIN}") == "nfs4", "the unit needs it"
    machine.stamp(f"{CACHED}/vm.img", 1, SIZE, 2)
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1}
    machine.sh(f"systemctl stop {UNIT}")
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {2}

    for version, by in ((3, "a shutdown"), (4, "one with the image open")):
        machine.sh(f"systemctl start {UNIT}")
        machine.stamp(f"{CACHED}/vm.img", 1, SIZE, version)
        if version == 4:  # by one who does not let go for 20 s
            machine.sh(
                "systemd-run --unit guest -p KillSignal=SIGCONT -p TimeoutStopSec=20 "
                f"sh -c 'exec sleep 3600 3<>{CACHED}/vm.img'"
            )
        assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {version - 1}
        machine.power_off()
        assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {version}, by
        machine.boot()
        host.wait_active()
        assert host.status()["cache"]["dirty_bytes"] == 0
        words = machine.sh(f"journalctl -b -1 -u {UNIT} --no-pager")
        assert "kept-dirty" not in words and "Deactivated successfully" in words, words


def test_the_reset_button_costs_nothing_that_was_synced(server: Server, host: Host) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, SIZE, 1)
    machine = host.machine
    host.fstab(host.nfs_line())
    host.install(write_mode="back", dirty_age=3600)
    machine.sh(f"systemctl start {UNIT}")
    machine.stamp(f"{CACHED}/vm.img", 1, MIB, 2)
    machine.sh(f"sync {CACHED}/vm.img")
    assert host.status()["cache"]["dirty_bytes"] == MIB
    machine.sh("sync /etc/fusecache/vms.toml")  # the unit's files lie on this filesystem
    machine.reset()
    host.wait_active()
    assert machine.versions(f"{CACHED}/vm.img", 1) == {1, 2}
    assert host.status()["cache"]["dirty_bytes"] == MIB
    machine.sh("fusecache flush")
    assert server.machine.versions(f"{EXPORT}/vm.img", 1) == {1, 2}
