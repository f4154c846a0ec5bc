"""Guests of a few megabytes, made by the tests: Debian's cloud kernel, busybox and a stamper.

The kernel is taken out of its package by ``.ci/guest-kernel`` and is not installed.
"""

import io
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.stamps import check_stamps

_HERE = Path(__file__).parent
_CI = _HERE.parents[1] / ".ci"
_BUSYBOX = Path("/bin/busybox")
PAGE = 4096
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 no_timer_check"
"""On every guest's kernel command line. An emulated timer on a busy machine does not pass the check
of it: "IO-APIC + timer doesn't work!"."""
PATIENCE = 200.0
"""Seconds for what takes a few on a machine that has nothing else to do."""

_INITRAMFS = """#!/bin/busybox sh
# The guest's first program. "disk=churn" on the kernel's command line: the disk is raw and written
# at random; otherwise the disk holds the guest's own root filesystem, and its /init goes on.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk
do
    /bin/busybox insmod /lib/$module.ko
done
if /bin/busybox grep -q disk=churn /proc/cmdline; then
    /bin/stamper churn /dev/vda 1
    /bin/busybox poweroff -f
fi
/bin/busybox mount -t ext4 /dev/vda /root || /bin/busybox poweroff -f
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /init
"""

_INIT = """#!/bin/busybox sh
# The root filesystem's own: checks the files 1 to "have", writes those up to "want", checks all of
# them anew from the disk, and powers off.
/bin/busybox mount -t proc proc /proc
have=0 want=0
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in have=*|want=*) eval "$word" ;; esac
done
work() {
    number=1
    while [ $number -le $have ]; do
        /bin/stamper check /data/$number $number || return 1
        number=$((number + 1))
    done
    echo "guest: found $have"
    while [ $number -le $want ]; do
        /bin/stamper write /data/$number $number || return 1
        echo "guest: synced $number"
        number=$((number + 1))
    done
    echo 3 > /proc/sys/vm/drop_caches
    number=1
    while [ $number -le $want ]; do
        /bin/stamper check /data/$number $number || return 1
        number=$((number + 1))
    done
    echo "guest: all right"
}
work
/bin/busybox mount -o remount,ro /
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Parts:
    """What guests are started from."""

    kernel: Path
    initrd: Path
    root: Path
    """A directory with what the root filesystem holds."""


def build(directory: Path) -> Parts:
    """Compiles the stamper and packs the initramfs, in about a second."""
    fetched = subprocess.run(
        ["sh", _CI / "guest-kernel"], capture_output=True, text=True, timeout=300, check=False
    )
    assert fetched.returncode == 0, fetched.stderr
    kernel = Path(fetched.stdout.strip())
    stamper = directory / "stamper"
    gcc = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o")
    subprocess.run([*gcc, stamper, _HERE / "stamper.c"], check=True, timeout=60)
    files = {
        "init": _INITRAMFS.encode(),
        "bin/busybox": _BUSYBOX.read_bytes(),
        "bin/stamper": stamper.read_bytes(),
    }
    files |= {f"lib/{module.name}": module.read_bytes() for module in kernel.glob("*.ko")}
    initrd = directory / "initrd"
    initrd.write_bytes(_cpio(("bin", "lib", "dev", "proc", "root"), files))
    root = directory / "root"
    for name in ("bin", "dev", "proc", "data"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    shutil.copy(stamper, root / "bin/stamper")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    return Parts(kernel / "vmlinuz", initrd, root)


def make_disk(parts: Parts, path: Path, size: str = "32M") -> None:
    """A raw image with the guest's root filesystem, made without mounting anything."""
    path.touch()
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", "-d", parts.root, path, size],
        check=True,
        timeout=60,
    )


def check_versions(console: str, data: bytes) -> None:
    """Compares every byte of a churned disk with the versions the guest printed in the end."""
    printed = [line for line in console.splitlines() if line.startswith("guest: versions ")]
    versions = [int(word, 16) for line in printed for word in line.split()[2:]]
    assert len(versions) == len(data) // PAGE, (len(versions), len(data))
    assert max(versions) > 1, "the guest has written nothing"
    stamps = PAGE // 512
    found = check_stamps(data, 1, 0)
    for page, version in enumerate(versions):
        assert found[page * stamps : (page + 1) * stamps] == [version] * stamps, (page, version)


def _cpio(directories: tuple[str, ...], files: dict[str, bytes]) -> bytes:
    """An archive as the kernel unpacks it: Documentation/driver-api/early-userspace, "newc"."""
    out = io.BytesIO()
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in directories]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in numbers))
        out.write(name.encode() + b"\0")
        out.write(bytes(-out.tell() % 4) + data)
        out.write(bytes(-out.tell() % 4))
    return out.getvalue()
