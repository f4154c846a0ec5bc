"""``doctor``: looks at the machine and says in order what is wrong or unwise for fusecache.

Reads what the kernel and the configuration files say; changes nothing unless told to ``--fix``.
"""

import ctypes
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from fusecache.cli.paths import absolute
from fusecache.control import client
from fusecache.errors import MountError
from fusecache.fuse import mounts

_KERNEL = (6, 1)
"""The oldest that fusecache is tested on."""
_DESCRIPTORS = 65536
_ROOM = 256 << 20
"""Bytes the filesystem of the database should have left."""
_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronized."""
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.glusterfs", "fuse.sshfs")

WRONG, UNWISE = "wrong", "unwise"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence, and how bad it is."""

    level: str
    text: str


@dataclass(slots=True)
class Machine:
    """Where to look. ``root`` is another directory than ``/`` in tests alone."""

    root: Path = Path("/")
    origin: Path | None = None
    cache: Path | None = None
    database: Path | None = None
    clock_state: Callable[[], int] = field(default_factory=lambda: _clock_state)
    user: int = field(default_factory=os.geteuid)

    def text(self, path: str) -> str:
        """A file's text; empty if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""

    def there(self, path: str) -> bool:
        """Whether it exists."""
        return (self.root / path).exists()

    def mounted(self, path: Path) -> tuple[str, set[str]]:
        """Type and options, the filesystem's own among them, of what a path lies on."""
        found, length = ("", set[str]()), -1
        for line in self.text("proc/self/mountinfo").splitlines():
            fields = line.split(" ")
            top = Path(fields[4].encode().decode("unicode_escape"))
            if len(top.parts) >= length and (top == path or top in path.parents):
                dash = fields.index("-")
                options = {*fields[5].split(","), *fields[dash + 3].split(",")}
                found, length = (fields[dash + 1], options), len(top.parts)
        return found


def _clock_state() -> int:
    return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))


# -- the machine -----------------------------------------------------------------------------------


def fuse(machine: Machine) -> Iterator[Finding]:
    """The kernel's side and the helper of plain users."""
    if not machine.there("dev/fuse"):
        yield Finding(WRONG, "/dev/fuse is missing: load the kernel module with modprobe fuse.")
    release = machine.text("proc/sys/kernel/osrelease").strip()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version and version < _KERNEL:
        yield Finding(UNWISE, f"The kernel is {release}: fusecache is tested from 6.1 on.")
    if machine.user != 0:
        if shutil.which("fusermount3") is None:
            yield Finding(WRONG, "fusermount3 is missing: install the package fuse3.")
        lines = [line.strip() for line in machine.text("etc/fuse.conf").splitlines()]
        if "user_allow_other" not in lines:
            yield Finding(
                UNWISE,
                "/etc/fuse.conf has no line user_allow_other: nobody else, QEMU neither, can use "
                "what a plain user mounts.",
            )
    elif not machine.there("sys/fs/fuse/connections"):
        yield Finding(
            UNWISE,
            "fusectl is not there (/sys/fs/fuse/connections): the limit of 12 waiting requests "
            "stays, so that one hanging image holds up the others.",
        )


def limits(machine: Machine) -> Iterator[Finding]:
    """Of this process, which a daemon inherits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < _DESCRIPTORS:
        yield Finding(
            UNWISE,
            f"The hard limit of open files is {hard}: the daemon needs one for each file the "
            f"kernel remembers. Raise it to {_DESCRIPTORS} (LimitNOFILE, limits.conf).",
        )


def clock(machine: Machine) -> Iterator[Finding]:
    """Change times are compared with the origin's."""
    if machine.clock_state() == _TIME_ERROR:
        yield Finding(
            UNWISE,
            "The clock is not synchronized: run chrony or systemd-timesyncd, on the storage, too. "
            "fusecache allows for an offset, but not for one that changes.",
        )


def guests(machine: Machine) -> Iterator[Finding]:
    """What keeps libvirt's guests from opening images below a FUSE mount."""
    if not machine.there("etc/libvirt"):
        return
    lines = (line.split("#")[0] for line in machine.text("etc/libvirt/qemu.conf").splitlines())
    drivers = "".join(line for line in lines if line.strip().startswith("security_driver"))
    if "none" in drivers:
        return
    if machine.text("sys/fs/selinux/enforce").strip() == "1":
        yield Finding(
            UNWISE,
            "SELinux is enforcing: guests may open images on FUSE only after "
            "setsebool -P virt_use_fusefs on.",
        )
    if machine.text("sys/module/apparmor/parameters/enabled").startswith("Y"):
        local = machine.text("etc/apparmor.d/local/abstractions/libvirt-qemu")
        if not local.strip():
            yield Finding(
                UNWISE,
                "AppArmor is on: if guests are denied their disks, add the mount point to "
                "/etc/apparmor.d/local/abstractions/libvirt-qemu, like '/mnt/cached/** rwk,'.",
            )


# -- origin and cache ------------------------------------------------------------------------------


def origin(machine: Machine) -> Iterator[Finding]:
    """The directory of the images, if it was named."""
    path = machine.origin
    if path is None:
        return
    if not path.is_dir():
        yield Finding(WRONG, f"The origin {path} is no directory: is its storage mounted?")
        return
    kind, options = machine.mounted(path)
    if kind.startswith("nfs"):
        yield from _nfs(path, options)
    elif kind == "fuse.fusecache":
        yield Finding(WRONG, f"The origin {path} is a fusecache mount itself.")
    if kind in _NETWORK and "ro" in options:
        yield Finding(UNWISE, f"The origin {path} is mounted read-only: so is the cache then.")
    yield from _readable(path)


def _nfs(path: Path, options: set[str]) -> Iterator[Finding]:
    if "soft" in options or "softerr" in options:
        yield Finding(
            WRONG,
            f"The origin {path} is mounted 'soft': when the server is slow, writes fail that were "
            "on their way. Mount it 'hard'.",
        )
    if "nocto" in options:
        yield Finding(
            WRONG,
            f"The origin {path} is mounted 'nocto': what other hosts change is not noticed when an "
            "image is opened. Mount it without.",
        )
    if "nolock" in options or "local_lock=all" in options or "local_lock=posix" in options:
        yield Finding(
            UNWISE,
            f"The origin {path} is mounted without locks ('nolock'): nothing keeps two hosts from "
            "writing one image.",
        )
    if "noac" in options:
        yield Finding(
            UNWISE, f"The origin {path} is mounted 'noac': each question asks the server. Slow."
        )


def _readable(path: Path) -> Iterator[Finding]:
    """Root is not root on a server that squashes it."""
    try:
        with os.scandir(path) as entries:
            images = [entry.path for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError as exc:
        yield Finding(WRONG, f"The origin {path} cannot be listed: {exc.strerror}.")
        return
    for image in images[:1]:
        try:
            os.close(os.open(image, os.O_RDONLY | os.O_CLOEXEC))
        except PermissionError:
            yield Finding(
                WRONG,
                f"{image} may not be read by user {os.geteuid()}: if that is root, the server "
                "squashes it (root_squash). Export with no_root_squash, or run fusecache as the "
                "images' owner.",
            )
        except OSError as exc:
            yield Finding(WRONG, f"{image} cannot be read: {exc.strerror}.")


def cache(machine: Machine) -> Iterator[Finding]:
    """The SSD, if it was named."""
    path = machine.cache
    if path is None:
        return
    there = path if path.exists() else path.parent
    if not there.exists():
        yield Finding(WRONG, f"{there} does not exist: is the SSD mounted there?")
        return
    st = there.stat()
    block = there.is_block_device()
    device = st.st_rdev if block else st.st_dev
    images = machine.origin if machine.origin is not None and machine.origin.is_dir() else None
    if not block and images is not None and images.stat().st_dev == st.st_dev:
        yield Finding(
            WRONG,
            f"The cache {path} lies on the same filesystem as the origin: nothing can be faster "
            "there. Choose a local SSD.",
        )
    kind, _ = ("", set[str]()) if block else machine.mounted(there)
    if kind in _NETWORK:
        yield Finding(WRONG, f"The cache {path} lies on {kind}: choose a local SSD.")
    name = f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    rotational = machine.text(f"{name}/queue/rotational") or machine.text(
        f"{name}/../queue/rotational"
    )
    if rotational.strip() == "1":
        yield Finding(UNWISE, f"The cache {path} is on a rotating disk: choose an SSD.")


def room(machine: Machine) -> Iterator[Finding]:
    """Space for the database beside its cache."""
    path = machine.database or Path("/var/lib/fusecache")
    while not path.exists():
        path = path.parent
    space = os.statvfs(path)
    left = space.f_bavail * space.f_frsize
    if left < _ROOM:
        yield Finding(
            WRONG if left < _ROOM // 16 else UNWISE,
            f"{path} has {left >> 20} MiB left, and the database grows there: make room or name "
            "another place with --db.",
        )


CHECKS = (fuse, limits, clock, origin, cache, room, guests)


def dead_mounts(*, fix: bool) -> Iterator[Finding]:
    """Fusecache mounts whose daemon is gone; with ``fix`` they are detached."""
    running = {daemon.mountpoint for daemon in client.daemons()}
    for path in mounts.points_of(f"fuse.{mounts.SUBTYPE}"):
        if path in running:
            continue
        if not fix:
            if not mounts.answers(path):
                yield Finding(
                    WRONG,
                    f"{path} is a mount whose daemon is gone: fusecache doctor --fix detaches it, "
                    "and so does the next mount there.",
                )
            continue
        try:
            mounts.clear_dead_mount(path)
        except MountError:
            continue  # it is alive
        click.echo(f"fixed: the dead mount at {path} is detached")


@click.command(epilog="Example: fusecache doctor /srv/images --cache /dev/sdb")
@click.argument("origin_path", metavar="[ORIGIN]", type=Path, required=False)
@click.option("--cache", "cache_path", type=Path, help="The SSD: a file or block device.")
@click.option("--db", type=Path, help="Where the cache's database lies.")
@click.option("--fix", is_flag=True, help="Detach mounts whose daemon is gone.")
def doctor(origin_path: Path | None, cache_path: Path | None, db: Path | None, fix: bool) -> None:
    """Look at this machine and say what is wrong or unwise for fusecache.

    Exits with 1 if anything is wrong.
    """
    machine = Machine(
        origin=None if origin_path is None else absolute(origin_path),
        cache=None if cache_path is None else absolute(cache_path),
        database=None if db is None else absolute(db),
    )
    found = [finding for check in CHECKS for finding in check(machine)]
    found += dead_mounts(fix=fix)
    for level in (WRONG, UNWISE):
        for finding in found:
            if finding.level == level:
                click.echo(f"{level}: {finding.text}")
    if not found:
        click.echo("Nothing is wrong here, as far as can be seen.")
    if any(finding.level == WRONG for finding in found):
        raise SystemExit(1)
