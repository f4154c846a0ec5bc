"""The root filesystem of the guests: Debian 12 with its kernel, an NFS server, and this checkout.

Built with mmdebstrap from the apt sources that this machine has, once for a session of tests. The
libraries are copied from the environment the tests run in, fusecache comes as a wheel: the guests
need no network but their own.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).parents[2]
_SUITE = "bookworm"
_PYTHON = (3, 11)
_PACKAGES = (
    "systemd-sysv", "systemd-timesyncd", "dbus", "udev", "kmod", "linux-image-cloud-amd64",
    "initramfs-tools", "iproute2", "nftables", "nfs-kernel-server", "nfs-common", "fuse3",
    "python3-venv", "qemu-guest-agent", "qemu-utils", "fio", "e2fsprogs", "psmisc", "strace",
    "procps",
)  # fmt: skip
_LEFT_OUT = (
    "*fusecache*", "__pycache__", "pip", "pip-*", "setuptools*", "pkg_resources", "_distutils_hack",
    "distutils-precedence.pth", "mypy*", "*__mypyc*", "ruff*", "matplotlib*", "mpl_toolkits",
    "pylab.py", "pillow*", "PIL", "fontTools", "fonttools*", "contourpy*", "kiwisolver*",
)  # fmt: skip
_SIZE = "4G"
VENV = "/opt/fusecache"
CHECKOUT = "/opt/checkout"
"""Where the tests lie in the guest."""

_NETWORK = """\
[Match]
MACAddress=52:54:00:77:00:{number:02x}
[Network]
Address=10.77.0.{number}/24
LinkLocalAddressing=no
"""


@dataclass(frozen=True)
class RootFilesystem:
    """A disk that is never written to, and what boots from it."""

    disk: Path
    kernel: Path
    initrd: Path


def skip_if_impossible() -> None:
    """Skips the test where the guests cannot be built, and says why."""
    for program, package in (
        ("mmdebstrap", "mmdebstrap"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
        ("mkfs.ext4", "e2fsprogs"),
    ):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: install {package}")
    if os.geteuid() != 0:
        pytest.skip("only root can build the guest's root filesystem")
    if sys.version_info[:2] != _PYTHON or not _sources():
        pytest.skip("the libraries of these tests fit Debian 12 alone")


def build(where: Path) -> RootFilesystem:
    """Takes one to three minutes and 2.5 GiB, 1.5 of which stay in ``where``."""
    tree = where / "tree"
    try:
        _debian(tree)
        for number in (1, 2):
            network = tree / f"etc/systemd/network/10-{number}.network"
            network.write_text(_NETWORK.format(number=number))
        (tree / "etc/fstab").write_text("LABEL=root / ext4 defaults 0 1\n")
        _install_checkout(tree, where)
        for name in ("vmlinuz", "initrd.img"):
            shutil.copy((tree / name).resolve(), where / name)
        disk = where / "root.img"
        with open(disk, "wb") as file:
            file.truncate(4 << 30)
        _run("mkfs.ext4", "-q", "-F", "-L", "root", "-d", tree, disk)
    finally:
        if tree.exists():
            shutil.rmtree(tree)
    return RootFilesystem(disk, where / "vmlinuz", where / "initrd.img")


def _run(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=900,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _sources() -> list[str]:
    """Debian 12 as this machine's apt knows it, as lines of a sources.list."""
    form = "$(ORIGIN)|$(CODENAME)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)"
    wanted = ("Identifier: Packages",)
    lines = []
    for line in _run("apt-get", "indextargets", "--format", form, *wanted).splitlines():
        origin, codename, release, component, uri = line.split("|")
        if origin == "Debian" and codename.split("-")[0] == _SUITE:
            lines.append(f"deb {uri} {release} {component}")
    return sorted(set(lines))


def _debian(tree: Path) -> None:
    _run(
        "mmdebstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--customize-hook=chroot \"$1\" systemctl enable systemd-networkd",
        "--customize-hook=chroot \"$1\" systemctl disable nfs-server",
        f"--customize-hook=chroot \"$1\" python3 -m venv {VENV}",
        _SUITE, tree, *_sources(),
    )  # fmt: skip


def _install_checkout(tree: Path, where: Path) -> None:
    """As the README says, and the tests beside it."""
    source = where / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_CHECKOUT / name, source)
    for name in ("fusecache", "systemd", "docs"):
        shutil.copytree(
            _CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", where, source)
    (wheel,) = where.glob("fusecache-*.whl")
    shutil.rmtree(source)

    libraries = tree / VENV[1:] / "lib/python3.11/site-packages"
    ours = Path(sysconfig.get_path("purelib"))
    shutil.copytree(ours, libraries, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)
    shutil.copy(wheel, tree / "opt")
    _run(
        "chroot", tree, f"{VENV}/bin/pip", "install", "--quiet", "--no-index",
        f"/opt/{wheel.name}",
    )  # fmt: skip
    (tree / "usr/local/bin/fusecache").symlink_to(f"{VENV}/bin/fusecache")
    checkout = tree / CHECKOUT[1:]
    checkout.mkdir()
    shutil.copy(_CHECKOUT / "pyproject.toml", checkout)
    shutil.copytree(
        _CHECKOUT / "tests",
        checkout / "tests",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    # Once here, or every fresh guest does it at a fraction of the speed.
    _run("chroot", tree, f"{VENV}/bin/python", "-m", "compileall", "-q", f"{VENV}/lib", CHECKOUT)
