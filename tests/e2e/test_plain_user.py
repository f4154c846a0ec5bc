"""What a plain user can do, and what not."""

import json
import os

import pytest

from tests.e2e.helpers import processes_of, run
from tests.e2e.users import USER, User
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps

pytestmark = pytest.mark.mount

KILL = """\
pid=$(basename run/fusecache/*.sock .sock)
kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"""


def test_a_plain_user_mounts_reads_writes_evicts_and_unmounts(user: User) -> None:
    done = user.script(
        "fc mount origin mnt --cache home/c --size 8M",
        "cat mnt/vm.img mnt/vm.img > home/read",
        "dd if=mnt/vm.img of=mnt/new.img bs=64K status=none conv=fsync",
        "fc status --json > home/status",
        "stat -c '%a %u' run/fusecache run/fusecache/*.sock > home/modes",
        "fc evict vm.img",
        "fc umount mnt",
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    data = (user.base / "home" / "read").read_bytes()
    check_stamps(data[: 4 * BLOCK], 1, 0)
    assert data[: 4 * BLOCK] == data[4 * BLOCK :]
    new = user.base / "origin" / "new.img"
    assert new.read_bytes() == data[: 4 * BLOCK] and new.stat().st_uid == USER
    (mounted,) = json.loads((user.base / "home" / "status").read_text())["mounts"]
    assert mounted["mountpoint"] == str(user.base / "mnt")
    modes = (user.base / "home" / "modes").read_text().split()
    assert modes == ["700", str(USER), "600", str(USER)]
    assert "evicted 1 image, 4 blocks" in done.stdout
    assert processes_of(user.base) == []


def test_a_dead_mount_of_a_plain_user_is_replaced_and_detached(user: User) -> None:
    done = user.script(
        "fc mount origin mnt --cache home/c --size 8M",
        KILL,
        "fc mount origin mnt --cache home/c",
        "cmp mnt/vm.img origin/vm.img",
        KILL,
        "fc umount mnt",
        "! grep -q $PWD/mnt /proc/mounts",
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "detached the dead mount" in done.stderr


def test_allow_other_is_refused_to_a_plain_user_in_a_sentence(user: User) -> None:
    done = user.script("fc mount origin mnt --cache home/c --size 8M -o allow_other")
    assert done.returncode == 1
    assert done.stderr.count("fusecache: ") == 1 and "user_allow_other" in done.stderr
    assert not (user.base / "home" / "c").exists() and processes_of(user.base) == []


def test_what_a_plain_user_may_not_touch_is_refused_in_a_sentence(user: User) -> None:
    closed = user.base / "closed"
    closed.mkdir(mode=0o700)
    (closed / "c").write_bytes(bytes(8 << 20))
    for words in (
        "closed mnt --cache home/c --size 8M",
        "origin closed --cache home/c --size 8M",
        "origin mnt --cache closed/c",
        "origin mnt --cache closed/new --size 8M",
        "origin mnt --cache home/c --size 8M --db closed/db",
        "origin mnt --cache home/c --size 8M --config closed/fc.toml",
    ):
        done = user.script(f"fc mount {words}")
        assert done.returncode in (1, 2), words
        assert done.stderr.startswith("fusecache: ") and done.stderr.count("\n") == 1, done.stderr
        assert processes_of(user.base) == []
        assert not (user.base / "home" / "c").exists()


def test_without_a_runtime_directory_it_says_which_to_set(user: User) -> None:
    done = user.script("XDG_RUNTIME_DIR=/proc/none fc mount origin mnt --cache home/c --size 8M")
    assert done.returncode == 1
    assert "XDG_RUNTIME_DIR" in done.stderr and "Traceback" not in done.stderr


def test_what_is_of_another_user_is_said_to_be(user: User, mount: Mount) -> None:
    """The private namespace of ``User`` has no other mounts but this one, which is root's."""
    mount.start()
    os.chmod(mount.base.parent, 0o755)
    theirs = user.base / "theirs"
    theirs.mkdir()
    run("mount", "--bind", mount.mountpoint, theirs)
    try:
        done = user.script(
            "fc status > home/status 2>&1 || echo failed: $? >> home/status",
            "fc evict vm.img > home/evict 2>&1 || echo failed: $? >> home/evict",
            f"fc umount {theirs} > home/umount 2>&1 || echo failed: $? >> home/umount",
            keep=theirs,
        )
    finally:
        run("umount", theirs)
    assert done.returncode == 0, done.stderr
    for verb in ("status", "evict", "umount"):
        said, failed = (user.base / "home" / verb).read_text().splitlines()
        assert failed == "failed: 1" and "root" in said, said
        assert str(theirs) in said and "choose another" not in said, said
        assert (verb == "umount") == ("mounts of other users" not in said), said
    assert mount.status()["state"] == "serving"
