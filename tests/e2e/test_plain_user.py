"""A plain user with directories of their own, fusermount3 for the mount, and no privileges."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusecache
from tests.e2e.helpers import NO_OTHERS, processes_of
from tests.support.daemon import BLOCK, end
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

USER = 65534  # nobody: fusermount3 wants a user with a name
_SOURCE = Path(fusecache.__file__).parents[1]


class User:
    """Runs scripts as a plain user in a private mount namespace.

    There, /dev/fuse may be opened by everybody, as udev makes it, and the interpreter can be
    reached even if it lies below a home directory that is closed to others.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.log = ""
        for name in ("origin", "mnt", "run", "home"):
            (base / name).mkdir()
        os.mknod(base / "fuse", 0o020666, os.makedev(10, 229))
        os.chmod(base / "fuse", 0o666)
        (base / "origin" / "vm.img").write_bytes(stamped(1, 0, 4 * BLOCK, 1))
        for path in base.iterdir():
            if path.name != "fuse":
                shutil.chown(path, USER, USER)
        shutil.chown(base / "origin" / "vm.img", USER, USER)
        os.chmod(base, 0o755)

    def script(self, *commands: str) -> subprocess.CompletedProcess[str]:
        """Shell commands in which ``fc`` is fusecache; ends at the first that fails."""
        python = shlex.join([sys.executable, "-m", "fusecache"])
        theirs = "\n".join(["set -e", f'fc() {{ {python} "$@"; }}', *commands])
        ours = [
            "set -e",
            NO_OTHERS,
            f"mount --bind {self.base}/fuse /dev/fuse",
            *_opened_up(self.base),
            f"exec setpriv --reuid={USER} --regid={USER} --clear-groups --inh-caps=-all "
            f"sh -c {shlex.quote(theirs)}",
        ]
        environment = {
            name: value for name, value in os.environ.items() if name != "FUSECACHE_RUNTIME_DIR"
        }
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", "\n".join(ours)],
            capture_output=True, text=True, timeout=90, check=False, cwd=self.base,
            env={**environment, "HOME": f"{self.base}/home", "PYTHONPATH": str(_SOURCE),
                 "PYTHONDONTWRITEBYTECODE": "1", "XDG_RUNTIME_DIR": f"{self.base}/run"},
        )  # fmt: skip


def _opened_up(base: Path) -> list[str]:
    """Commands that cover every closed directory above the interpreter and the source by one
    that holds only the way down."""
    commands = []
    for number, wanted in enumerate({Path(sys.base_prefix), Path(sys.prefix), _SOURCE}):
        closed = [p for p in reversed(wanted.parents) if not p.stat().st_mode & 0o001]
        if closed:
            held = base / f"held{number}"
            commands += [
                f"mkdir -p {held}", f"mount --bind {wanted} {held}",
                f"mount -t tmpfs -o mode=755 none {closed[0]}",
                f"mkdir -p {wanted}", f"mount --move {held} {wanted}",
            ]  # fmt: skip
    return commands


@pytest.fixture
def user() -> Iterator[User]:
    """A user's directories; outside pytest's own, which are closed to others."""
    base = Path(tempfile.mkdtemp(prefix="fusecache-user-"))
    try:
        yield User(base)
    finally:
        for pid in processes_of(base):
            end(pid)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(base)


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
        "pid=$(basename run/fusecache/*.sock .sock)",
        "kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done",
        "fc mount origin mnt --cache home/c",
        "cmp mnt/vm.img origin/vm.img",
        "pid=$(basename run/fusecache/*.sock .sock)",
        "kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done",
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
