"""The two guests' roles: a storage server, and a host that runs fusecache as its README says."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.guest.machine import Machine
from tests.guest.rootfs import RootFilesystem

MIB = 1 << 20
EXPORT = "/export/images"
SQUASHED = "/export/squashed"
ORIGIN = "/srv/images"
CACHED = "/mnt/cached"
UNIT = "fusecache@vms"
NFS_PORT = 2049

_EXPORTS = f"""\
{EXPORT} 10.77.0.0/24(rw,sync,no_subtree_check,no_root_squash)
{SQUASHED} 10.77.0.0/24(rw,sync,no_subtree_check,root_squash)
"""
_NFS_CONF = """\
[nfsd]
vers3=n
grace-time=10
lease-time=10
"""


class Server:
    """An NFSv4 server on an ext4 filesystem of its own, ``/dev/vdb``."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def set_up(self) -> "Server":
        """From a fresh guest to one that exports."""
        sh, write = self.machine.sh, self.machine.write
        sh("mkdir -p /export && mount /dev/vdb /export")
        sh(f"mkdir -p {EXPORT} {SQUASHED}")
        write("/etc/exports", _EXPORTS)
        write("/etc/nfs.conf.d/rig.conf", _NFS_CONF)
        sh("systemctl start nfs-server && exportfs -ra")
        return self

    def fresh(self) -> "Server":
        """Reachable, and with nothing in its exports, whatever the last test did."""
        self.machine.qmp("cont")
        self.reachable(True)
        self.machine.sh(f"systemctl start nfs-server; find {EXPORT} {SQUASHED} -mindepth 1 -delete")
        return self

    def reachable(self, wanted: bool) -> None:
        """Whether packets to and from the NFS port go through, or vanish without a word."""
        self.machine.sh("nft flush ruleset")
        if not wanted:
            self.machine.sh(
                "nft add table inet rig && "
                "nft 'add chain inet rig in { type filter hook input priority 0; }' && "
                f"nft add rule inet rig in tcp dport {NFS_PORT} drop"
            )


@dataclass
class Host:
    """A host with fusecache, the SSD at ``/dev/vdb``, and the export at ``/srv/images``."""

    machine: Machine
    server: str = "10.77.0.1"

    def fstab(self, *lines: str) -> None:
        """The root's line and these."""
        self.machine.write("/etc/fstab", "\n".join(["LABEL=root / ext4 defaults 0 1", *lines, ""]))
        self.machine.sh(f"mkdir -p {ORIGIN} {CACHED} && systemctl daemon-reload")

    def nfs_line(self, options: str = "", export: str = EXPORT) -> str:
        """The export, in fstab as the README has it."""
        more = f",{options}" if options else ""
        return f"{self.server}:{export} {ORIGIN} nfs vers=4.2,nofail,_netdev{more} 0 0"

    def mount_nfs(self, options: str = "", export: str = EXPORT) -> None:
        """The export, now."""
        more = f",{options}" if options else ""
        self.machine.sh(
            f"mkdir -p {ORIGIN} {CACHED}; umount {ORIGIN} 2>/dev/null; "
            f"mount -t nfs -o vers=4.2{more} {self.server}:{export} {ORIGIN}"
        )

    def configure(self, **more: object) -> None:
        """``/etc/fusecache/vms.toml``: TOML's and JSON's words are the same here."""
        values = {"origin": ORIGIN, "mountpoint": CACHED, "cache": "/dev/vdb", **more}
        lines = [
            f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in values.items()
        ]
        self.machine.write("/etc/fusecache/vms.toml", "\n".join(lines) + "\n")

    def install(self, **more: object) -> None:
        """The unit, its configuration, and what ties it to the export."""
        self.machine.sh("fusecache install-units")
        self.configure(**more)
        self.machine.sh("fusecache config check /etc/fusecache/vms.toml")
        self.machine.write(f"/etc/systemd/system/{UNIT}.service.d/origin.conf", TIED)
        self.machine.sh(f"systemctl daemon-reload && systemctl enable {UNIT}")

    def wait_active(self, seconds: float = 400) -> None:
        """Until the unit is."""
        self.machine.wait_for(f"systemctl is-active {UNIT}", "active unit", seconds)

    def status(self) -> dict[str, Any]:
        """``status --json`` of the one mount."""
        (mount,) = json.loads(self.machine.sh("fusecache status --json"))["mounts"]
        return dict(mount)

    def journal(self) -> list[dict[str, Any]]:
        """The unit's entries of this boot."""
        lines = self.machine.sh(f"journalctl --sync; journalctl -b -u {UNIT} -o json --no-pager")
        return [json.loads(line) for line in lines.splitlines()]

    def property(self, name: str) -> str:
        """One property of the unit."""
        return self.machine.sh(f"systemctl show -P {name} {UNIT}")


TIED = "[Unit]\nWants=srv-images.mount\nAfter=srv-images.mount\n"
"""What the README lets the operator add."""

_NUMBERS = itertools.count()


@contextlib.contextmanager
def fresh_host(rig: Path, filesystem: RootFilesystem) -> Iterator[Host]:
    """Booted, with an empty SSD; nothing of fusecache is set up. No other host may run."""
    base = rig / f"host{next(_NUMBERS)}"
    machine = Machine(filesystem, base, "host", 2)
    machine.add_disk("ssd.img", 256 * MIB)
    try:
        yield Host(machine.boot())
    finally:
        machine.close()
        shutil.rmtree(base)
