"""``fusecache doctor``: machines made up of a few files, and a real dead mount."""

import errno
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusecache.cli import doctor
from fusecache.cli.doctor import UNWISE, WRONG, Finding, Machine
from fusecache.store import probe
from tests.e2e.helpers import (
    COMMAND,
    NO_OTHERS,
    environment,
    mounted,
    processes_of,
    refused,
    run,
    wait_for,
)
from tests.support.daemon import Mount
from tests.support.injected import InjectedMount

ROOTFS = "22 1 259:1 / / rw,relatime - ext4 /dev/root rw"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Nothing to say about it."""
    made = Machine(root=tmp_path / "root", clock_state=lambda: 0, user=0)
    put(made, "dev/fuse")
    put(made, "proc/sys/kernel/osrelease", "6.1.0-13-amd64\n")
    put(made, "proc/self/mountinfo", ROOTFS + "\n")
    put(made, "sys/fs/fuse/connections/waiting")
    return made


def put(machine: Machine, path: str, text: str = "") -> None:
    """A file of the machine."""
    place = machine.root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def judged(
    check: Callable[[Machine], Iterator[Finding]], machine: Machine, *said: tuple[str, str]
) -> None:
    """The check finds exactly these: level, and some words of the sentence."""
    found = list(check(machine))
    assert [finding.level for finding in found] == [level for level, _ in said], found
    for finding, (_, words) in zip(found, said, strict=True):
        assert words in finding.text and finding.text[-1] in ".?"


def test_a_machine_as_it_should_be_is_not_blamed(machine: Machine, tmp_path: Path) -> None:
    machine.database = tmp_path
    for check in (doctor.fuse, doctor.clock, doctor.guests, doctor.origin, doctor.cache):
        judged(check, machine)


@pytest.mark.parametrize(
    ("disabled", "user", "blamed"),
    [("0", 1000, False), ("1", 0, False), ("1", 1000, True), ("2", 0, True), ("", 0, False)],
)
def test_io_uring_that_is_forbidden(
    machine: Machine, disabled: str, user: int, blamed: bool
) -> None:
    put(machine, "proc/sys/kernel/io_uring_disabled", disabled + "\n")
    put(machine, "etc/fuse.conf", "user_allow_other\n")
    machine.user = user
    judged(doctor.fuse, machine, *[(UNWISE, "io_uring")] * blamed)


def test_what_fuse_lacks(machine: Machine) -> None:
    (machine.root / "dev/fuse").unlink()
    put(machine, "proc/sys/kernel/osrelease", "5.10.0-8-amd64\n")
    (machine.root / "sys/fs/fuse/connections/waiting").unlink()
    (machine.root / "sys/fs/fuse/connections").rmdir()
    judged(doctor.fuse, machine, (WRONG, "modprobe fuse"), (UNWISE, "5.10.0"), (UNWISE, "fusectl"))


def test_a_plain_user_needs_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.user = 1000
    monkeypatch.setenv("PATH", "/nowhere")
    judged(doctor.fuse, machine, (WRONG, "package fuse3"), (UNWISE, "user_allow_other"))
    put(machine, "etc/fuse.conf", "# user_allow_other\nuser_allow_other\n")
    judged(doctor.fuse, machine, (WRONG, "package fuse3"))


def test_a_clock_that_nobody_sets(machine: Machine) -> None:
    machine.clock_state = lambda: 5
    judged(doctor.clock, machine, (UNWISE, "chrony"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("rw,vers=4.2,hard", []),
        ("rw,vers=4.2,soft", [(WRONG, "'hard'")]),
        ("rw,hard,nocto,noac", [(WRONG, "nocto"), (UNWISE, "noac")]),
        ("rw,hard,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0", [(UNWISE, "asks the server")]),
        ("rw,hard,acregmin=600,acregmax=600,acdirmin=600,acdirmax=600", [(UNWISE, "at 600 s")]),
        ("rw,hard,acdirmin=30", []),
        ("rw,hard,nolock", [(UNWISE, "two hosts")]),
        ("ro,hard", [(UNWISE, "read-only")]),
    ],
)
def test_how_an_nfs_origin_is_mounted(
    machine: Machine, tmp_path: Path, options: str, said: list[tuple[str, str]]
) -> None:
    machine.origin = tmp_path / "images of vms"
    machine.origin.mkdir()
    name = str(machine.origin).replace(" ", "\\040")
    line = f"30 22 0:44 / {name} rw - nfs4 server:/images {options}"
    put(machine, "proc/self/mountinfo", f"{ROOTFS}\n{line}\n")
    judged(doctor.origin, machine, *said)


def test_an_origin_that_is_not_there_or_not_readable(machine: Machine, tmp_path: Path) -> None:
    machine.origin = tmp_path / "images"
    judged(doctor.origin, machine, (WRONG, "is its storage mounted?"))
    machine.origin.mkdir()
    (machine.origin / "vm.img").write_bytes(b"")
    judged(doctor.origin, machine)

    image = str(machine.origin / "vm.img")
    said = {"file": probe.answer("file", str(machine.origin))}
    machine.ask = lambda question, _: said[question]
    said["images"] = {"image": image, "unreadable": [errno.EACCES, "Permission denied"]}
    judged(doctor.origin, machine, (WRONG, "root_squash"))
    said["images"] = {"image": image, "unreadable": [errno.EIO, "Input/output error"]}
    judged(doctor.origin, machine, (WRONG, "Input/output error"))
    said["images"] = {"error": "Stale file handle"}
    judged(doctor.origin, machine, (WRONG, "cannot be listed: Stale"))


def test_what_does_not_answer_is_said_and_not_waited_for(machine: Machine, tmp_path: Path) -> None:
    def silent(question: str, path: Path) -> dict[str, Any]:
        raise probe.NoAnswer

    machine.ask = silent
    machine.origin = machine.cache = machine.database = tmp_path
    for check in (doctor.origin, doctor.cache, doctor.room):
        judged(check, machine, (WRONG, "does not answer"))


def test_a_cache_where_it_helps_nobody(machine: Machine, tmp_path: Path) -> None:
    machine.origin = tmp_path
    machine.cache = tmp_path / "cache"
    judged(doctor.cache, machine, (WRONG, "same filesystem"))
    machine.origin = None
    device = tmp_path.stat().st_dev
    put(machine, f"sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/rotational", "1\n")
    judged(doctor.cache, machine, (UNWISE, "rotating"))
    machine.cache = tmp_path / "none" / "cache"
    judged(doctor.cache, machine, (WRONG, "is the SSD mounted"))
    machine.cache = tmp_path / "cache"
    line = f"30 22 0:44 / {tmp_path} rw - nfs4 server:/images rw,hard"
    put(machine, "proc/self/mountinfo", f"{ROOTFS}\n{line}\n")
    judged(doctor.cache, machine, (WRONG, "nfs4"), (UNWISE, "rotating"))


def test_a_device_that_may_not_be_written_to_is_named(machine: Machine) -> None:
    machine.cache, machine.user = Path("/dev/sdb"), 1000
    machine.ask = lambda _, path: {"kind": "block", "dev": 5, "rdev": 2064, "may_write": False}
    judged(doctor.cache, machine, (WRONG, "/dev/sdb may not be written to by user 1000"))


def _opened_alone(device: Path) -> int:
    """Another test's mount namespace may have a copy of the mount that was there, for a while."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return os.open(device, os.O_RDWR | os.O_EXCL)
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@pytest.mark.mount
def test_a_device_that_is_mounted_or_open_elsewhere_is_named_and_ones_own_mount_is_not(
    mount: Mount,
) -> None:
    backing = mount.base / "backing"
    backing.touch()
    os.truncate(backing, 32 << 20)
    run("mkfs.ext4", "-q", backing)
    device = Path(run("losetup", "--find", "--show", backing).strip())
    try:
        with mounted(device, mount.base / "other"):
            said = mount.run("doctor", "--cache", device)
            words = f"wrong: {device} is in use: mounted at {mount.base}/other. Choose another"
            assert said.returncode == 1 and words in said.stdout, said.stdout
            sentence = refused(
                mount.run("mount", mount.origin, mount.mountpoint, "--cache", device), "in use"
            )
            assert f"umount {mount.base}/other" in sentence
        fd = _opened_alone(device)
        try:
            said = mount.run("doctor", "--cache", device)
            assert "open elsewhere. Choose another device" in said.stdout
            assert f"lsblk {device}" in said.stdout
        finally:
            os.close(fd)
        mount.run("format", device, "--force")
        done = mount.run("mount", mount.origin, mount.mountpoint, "--cache", device)
        assert done.returncode == 0, done.stderr
        assert "in use" not in mount.run("doctor", "--cache", device).stdout
        mount.stop()
    finally:
        mount.cleanup()
        run("losetup", "--detach", device)


def test_a_full_filesystem_under_the_database(machine: Machine, tmp_path: Path) -> None:
    machine.database = tmp_path / "none" / "map.sqlite"
    judged(doctor.room, machine)
    for free, level in ((10 << 20, WRONG), (100 << 20, UNWISE)):
        machine.ask = lambda _, path, free=free: {"there": str(path), "free": free}
        judged(doctor.room, machine, (level, "--db"))


def test_what_keeps_guests_from_their_disks(machine: Machine) -> None:
    put(machine, "sys/fs/selinux/enforce", "1")
    put(machine, "sys/module/apparmor/parameters/enabled", "Y\n")
    judged(doctor.guests, machine)  # there is no libvirt
    put(machine, "etc/libvirt/qemu.conf", '#security_driver = "none"\n')
    judged(doctor.guests, machine, (UNWISE, "virt_use_fusefs"), (UNWISE, "AppArmor"))
    put(machine, "etc/apparmor.d/local/abstractions/libvirt-qemu", "/mnt/cached/** rwk,\n")
    judged(doctor.guests, machine, (UNWISE, "virt_use_fusefs"))
    put(machine, "etc/libvirt/qemu.conf", 'security_driver = "none"\n')
    judged(doctor.guests, machine)


@pytest.mark.mount
def test_a_dead_mount_is_found_and_fixed_and_a_living_one_left_alone(mount: Mount) -> None:
    """In a mount namespace of its own with no other fusecache: dead mounts of other tests are not
    to be fixed by this one."""
    (mount.origin / "vm.img").write_bytes(bytes(65536))
    words = shlex.join(map(str, mount.arguments()))
    script = [
        "set -e",
        f'fc() {{ {shlex.join(COMMAND)} "$@"; }}',
        NO_OTHERS,
        f"fc mount {words}",
        f"fc doctor {mount.origin}; echo living: $?",
        f"pid=$(basename {mount.runtime}/*.sock .sock)",
        "kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done",
        "fc doctor || echo dead: $?",
        "fc doctor --fix",
        f"! grep -q {mount.mountpoint} /proc/self/mounts",
        "fc doctor",
    ]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(script)],
        capture_output=True, text=True, timeout=90, check=False, env=environment(mount),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    living, _, rest = done.stdout.partition("living: 0\n")
    dead, _, fixed = rest.partition("dead: 1\n")
    assert rest and fixed and str(mount.mountpoint) not in living
    assert f"wrong: {mount.mountpoint} is a mount whose daemon is gone" in dead
    said, _, after = fixed.partition("\n")
    assert said == f"fixed: the dead mount at {mount.mountpoint} is detached"
    assert str(mount.mountpoint) not in after


@pytest.mark.mount
def test_a_hung_origin_does_not_hang_the_doctor(tmp_path: Path) -> None:
    """The storage is a FUSE filesystem that has the question and gives no answer: then not even
    a kill ends who asked."""
    hung = InjectedMount(tmp_path / "fc")
    images, block = hung.mountpoint / "images", hung.faults / "block"
    (hung.origin / "images").mkdir()
    try:
        hung.start()
        block.write_text("Tree.find")
        began = time.monotonic()
        said = hung.run("doctor", images, "--db", images / "map.sqlite")
        assert time.monotonic() - began < 40
        assert said.returncode == 1, said
        assert f"wrong: The origin {images} does not answer within 3 s" in said.stdout
        assert f"wrong: The place of the database {images}/map.sqlite does not" in said.stdout
        assert processes_of(images), "those that asked are held by the kernel"
        block.unlink()
        wait_for(lambda: not processes_of(images), "they end with the hang")
        lines = hung.run("doctor", images).stdout.splitlines()
        assert not [x for x in lines if str(tmp_path) in x and "does not answer" in x]
    finally:
        block.unlink(missing_ok=True)
        hung.cleanup()


def test_a_slow_start_is_not_taken_for_slow_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 4\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert probe.ask("file", str(tmp_path), 3)["kind"] == "directory"
