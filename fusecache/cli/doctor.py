"""``doctor``: looks at the machine and says in order what is wrong or unwise for fusecache.

Reads what the kernel and the configuration files say; changes nothing unless told to ``--fix``.
Whatever may lie on a file server is asked by a process of its own (``store/probe.py``): a doctor
that hangs with the patient helps nobody.
"""

import ctypes
import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion, standing
from fusecache.cli.standing import State
from fusecache.control import client
from fusecache.control.protocol import state_directory
from fusecache.store import cache_device, mountinfo, probe, processes

_KERNEL = (6, 1)
"""The oldest that fusecache is tested on."""
_DESCRIPTORS = 65536
_ROOM = 256 << 20
"""Bytes the filesystem of the database should have left."""
_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronized."""
_ATTRIBUTES = 60
"""Seconds: the most for which NFS trusts attributes unless told otherwise (nfs(5))."""
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
    ask: Callable[[str, Path], dict[str, Any]] = field(default_factory=lambda: _ask)
    """A question about a path of the real machine; raises ``probe.NoAnswer``."""

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


def _ask(question: str, path: Path) -> dict[str, Any]:
    return probe.ask(question, str(path))


def _clock_state() -> int:
    return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))


# -- the machine -----------------------------------------------------------------------------------


def fuse(machine: Machine) -> Iterator[Finding]:
    """The kernel's side and the helper of plain users."""
    if not machine.there("dev/fuse"):
        yield Finding(WRONG, "/dev/fuse is missing: load the kernel module with modprobe fuse.")
    elif not os.access(machine.root / "dev/fuse", os.R_OK | os.W_OK):
        yield Finding(WRONG, "/dev/fuse may not be opened: ask for read and write access to it.")
    release = machine.text("proc/sys/kernel/osrelease").strip()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version and version < _KERNEL:
        yield Finding(UNWISE, f"The kernel is {release}: fusecache is tested from 6.1 on.")
    disabled = machine.text("proc/sys/kernel/io_uring_disabled").strip()
    if disabled == "2" or (disabled == "1" and machine.user != 0):
        yield Finding(
            UNWISE,
            "io_uring is forbidden (kernel.io_uring_disabled): hits on the SSD that are not in "
            "memory take a slower way. If nothing speaks against it: sysctl "
            "kernel.io_uring_disabled=0.",
        )
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
    mounted, options = machine.mounted(path)
    if mounted == mountinfo.FSTYPE:
        yield Finding(WRONG, f"The origin {path} is a fusecache mount itself.")
    if mounted.startswith("nfs"):
        yield from _nfs(path, options)
    if mounted in _NETWORK and "ro" in options:
        yield Finding(UNWISE, f"The origin {path} is mounted read-only: so is the cache then.")
    try:
        found = machine.ask("file", path)
        if found.get("kind") != "directory":
            why = f" ({found['error']})" if "error" in found else ""
            yield Finding(WRONG, f"The origin {path} is no directory{why}: is its storage mounted?")
            return
        yield from _images(path, machine)
    except probe.NoAnswer:
        yield _silent("origin", path)


def _silent(what: str, path: Path) -> Finding:
    return Finding(
        WRONG,
        f"The {what} {path} does not answer within {probe.SECONDS:.0f} s: whoever touches it waits "
        "until its storage is back.",
    )


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
    yield from _attribute_times(path, options)


def _attribute_times(path: Path, options: set[str]) -> Iterator[Finding]:
    """``actimeo`` and its parts, which mountinfo shows if they are not the usual ones."""
    pairs = (option.partition("=") for option in options)
    times = {name: int(value) for name, _, value in pairs if name[:2] == "ac" and value.isdigit()}
    if "noac" in options or times.get("acregmax") == 0:
        how = "noac" if "noac" in options else "actimeo=0"
        yield Finding(
            UNWISE, f"The origin {path} is mounted '{how}': each question asks the server. Slow."
        )
    elif (longest := max(times.values(), default=0)) > _ATTRIBUTES:
        yield Finding(
            UNWISE,
            f"The origin {path} is mounted with 'actimeo' or a part of it at {longest} s: new "
            "images and sizes that other hosts make are seen that late. Leave it out.",
        )


def _images(path: Path, machine: Machine) -> Iterator[Finding]:
    """Root is not root on a server that squashes it."""
    found = machine.ask("images", path)
    if "error" in found:
        yield Finding(WRONG, f"The origin {path} cannot be listed: {found['error']}.")
    elif found.get("unreadable"):
        number, reason = found["unreadable"]
        if number == errno.EACCES:
            reason = (
                f"user {machine.user} may not. If that is root, the server squashes it "
                "(root_squash): export with no_root_squash, or run fusecache as the images' owner"
            )
        yield Finding(WRONG, f"{found['image']} cannot be read: {reason}.")


def cache(machine: Machine) -> Iterator[Finding]:
    """The SSD, if it was named."""
    path = machine.cache
    if path is None:
        return
    try:
        yield from _cache(machine, path)
    except probe.NoAnswer:
        yield _silent("cache", path)


def _cache(machine: Machine, path: Path) -> Iterator[Finding]:
    found, there = machine.ask("file", path), path
    if found.get("kind") is None:
        found, there = machine.ask("file", path.parent), path.parent
    if found.get("kind") is None:
        yield Finding(WRONG, f"{there} does not exist: is the SSD mounted there?")
        return
    block = found["kind"] == "block"
    if not found["may_write"]:
        yield Finding(
            WRONG,
            f"{there} may not be written to by user {machine.user}: "
            + ("ask for write permission to the device." if block else "choose another place."),
        )
    claimed = block and machine.ask("claimed", path).get("claimed")
    if claimed and not processes.is_fusecache(cache_device.holder_of(path)):
        yield Finding(WRONG, cache_device.in_use(path))  # else a mount uses it, as it should be
    if not block and found["dev"] == _filesystem(machine, machine.origin):
        yield Finding(
            WRONG,
            f"The cache {path} lies on the same filesystem as the origin: nothing can be faster "
            "there. Choose a local SSD.",
        )
    kind, _ = ("", set[str]()) if block else machine.mounted(there)
    if kind in _NETWORK:
        yield Finding(WRONG, f"The cache {path} lies on {kind}: choose a local SSD.")
    device = found["rdev"] if block else found["dev"]
    name = f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    rotational = machine.text(f"{name}/queue/rotational") or machine.text(
        f"{name}/../queue/rotational"
    )
    if rotational.strip() == "1":
        yield Finding(UNWISE, f"The cache {path} is on a rotating disk: choose an SSD.")


def _filesystem(machine: Machine, directory: Path | None) -> int | None:
    """The number of a directory's filesystem; None if nobody can tell."""
    if directory is None:
        return None
    try:
        found = machine.ask("file", directory)
    except probe.NoAnswer:
        return None  # the origin's own check says so
    return found["dev"] if found.get("kind") == "directory" else None


def room(machine: Machine) -> Iterator[Finding]:
    """Space for the database beside its cache."""
    path = machine.database or state_directory()
    try:
        found = machine.ask("space", path)
    except probe.NoAnswer:
        yield _silent("place of the database", path)
        return
    if "error" in found:
        yield Finding(WRONG, f"{path} cannot be used for the database: {found['error']}.")
    elif found["free"] < _ROOM:
        yield Finding(
            WRONG if found["free"] < _ROOM // 16 else UNWISE,
            f"{found['there']} has {found['free'] >> 20} MiB left, and the database grows there: "
            "make room or name another place with --db.",
        )


CHECKS = (fuse, limits, clock, origin, cache, room, guests)


def dead_mounts(*, fix: bool) -> Iterator[Finding]:
    """Fusecache mounts that are not served; with ``fix`` those are detached whose daemon is gone.

    One whose daemon lives, or of which nobody can tell, is left alone: it has guests' disks.
    """
    running, silent = client.survey()
    answering = {daemon.mountpoint for daemon in running}
    hung = {daemon.mountpoint: daemon for daemon in silent}
    theirs = client.others_mounts()
    for mounted in mountinfo.ours():
        path = mounted.path
        if path in answering or path in theirs:
            continue
        if path in hung:
            yield _hung(path, hung[path].pid)
            continue
        found = standing.judge(mounted)
        if found.state is State.HANGS and found.pid is not None:
            yield _hung(path, found.pid)
        elif found.state is State.UNKNOWN:
            yield Finding(
                WRONG,
                f"{found.plight}: it is left alone. If surely nobody uses it: umount -l {path}",
            )
        elif found.state is State.DEAD and not fix:
            yield Finding(
                WRONG,
                f"{path} is a mount whose daemon is gone: fusecache doctor --fix detaches it, "
                "and so does the next mount there.",
            )
        elif found.state is State.DEAD:
            standing.clear(found)
            click.echo(f"fixed: the dead mount at {path} is detached")


def _hung(path: Path, pid: int) -> Finding:
    return Finding(
        WRONG,
        f"{path} hangs: process {pid} serves it and {client.does_not_answer(pid)}. It is left "
        "alone, since guests may have their disks there; if it stays so, end it with kill -9 "
        f"{pid} and mount again.",
    )


def _resolved(path: Path | None) -> Path | None:
    """Absolute and without links, as far as the filesystems on the way answer."""
    if path is None:
        return None
    try:
        return Path(_ask("resolve", path)["path"])
    except (probe.NoAnswer, KeyError):
        return Path(os.path.abspath(path))


def _database(chosen: Path | None, cache_path: Path | None) -> Path | None:
    """Where the database will lie: beside a cache file, unless it was said."""
    if chosen is None and cache_path is not None and Path("/dev") not in cache_path.parents:
        return Path(f"{cache_path}.sqlite")
    return chosen


@click.command(epilog="Example: fusecache doctor /srv/images --cache /dev/sdb")
@click.argument(
    "origin_path",
    metavar="[ORIGIN]",
    type=Path,
    required=False,
    shell_complete=completion.directories,
)
@click.option(
    "--cache",
    "cache_path",
    type=Path,
    shell_complete=completion.files,
    help="The SSD: a file or block device.",
)
@click.option("--db", type=Path, help="Where the cache's database lies.")
@click.option("--fix", is_flag=True, help="Detach mounts whose daemon is gone.")
def doctor(origin_path: Path | None, cache_path: Path | None, db: Path | None, fix: bool) -> None:
    """Look at this machine and say what is wrong or unwise for fusecache.

    Exits with 1 if anything is wrong.
    """
    machine = Machine(
        origin=_resolved(origin_path),
        cache=_resolved(cache_path),
        database=_database(_resolved(db), _resolved(cache_path)),
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
