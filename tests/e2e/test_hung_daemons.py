"""A daemon that lives and does not answer: every verb says so, and none hangs or harms it."""

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusecache.cli import standing
from fusecache.cli.standing import State
from fusecache.fuse import mounts
from fusecache.fuse.mounts import Answer
from fusecache.store import mountinfo, processes, syscalls
from tests.e2e.conftest import MakeMount
from tests.e2e.helpers import COMMAND, NO_OTHERS, alone, environment, is_mounted, process, refused
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


@contextlib.contextmanager
def stopped(mount: Mount) -> Iterator[int]:
    """SIGSTOP, for a daemon that hangs."""
    assert mount.pid is not None
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        yield mount.pid
    finally:
        os.kill(mount.pid, signal.SIGCONT)


def _image(mount: Mount, *names: str) -> None:
    for name in names or ("vm.img",):
        (mount.origin / name).write_bytes(stamped(1, 0, 4 * BLOCK, 1))


def _nested(make_mount: MakeMount) -> tuple[Mount, Mount]:
    """Two mounts, the origin of the second below that of the first, both with vm3.img."""
    one, two = make_mount("one"), make_mount("two")
    two.origin = one.origin / "d1"
    two.origin.mkdir()
    for mount in (one, two):
        _image(mount, "vm3.img")
        mount.start()
        (mount.mountpoint / "vm3.img").read_bytes()
    return one, two


def _at_once(mount: Mount, *verbs: tuple[object, ...]) -> list[subprocess.CompletedProcess[str]]:
    """Each waits for the daemon, so that one after the other would take minutes."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda words: mount.run(*words), verbs))


@pytest.mark.parametrize("runtime", ["the same", "another"])
def test_doctor_names_it_and_fix_leaves_it_alone(mount: Mount, runtime: str) -> None:
    """In a mount namespace of its own with no other fusecache, since it says ``--fix``."""
    _image(mount)
    elsewhere = mount.base / "elsewhere"
    elsewhere.mkdir()
    theirs = mount.runtime if runtime == "the same" else elsewhere
    script = [
        "set -e",
        f'fc() {{ {shlex.join(COMMAND)} "$@"; }}',
        NO_OTHERS,
        f"fc mount {shlex.join(map(str, mount.arguments()))}",
        f"pid=$(basename {mount.runtime}/*.sock .sock)",
        "trap 'kill -CONT $pid' EXIT",
        "kill -STOP $pid",
        f"export FUSECACHE_RUNTIME_DIR={theirs}",
        "fc doctor || echo found: $?",
        "fc doctor --fix || echo not fixed: $?",
        f"fc umount {mount.mountpoint} || echo stays",
        f"fc mount {shlex.join(map(str, mount.arguments()))} || echo refused",
        "kill -CONT $pid",
        f"echo pid $pid; cmp {mount.mountpoint}/vm.img {mount.origin}/vm.img && echo read",
        f"export FUSECACHE_RUNTIME_DIR={mount.runtime}",
        f"fc umount {mount.mountpoint}",
    ]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(script)],
        capture_output=True, text=True, timeout=180, check=False, env=environment(mount),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    (pid,) = [line.removeprefix("pid ") for line in lines if line.startswith("pid ")]
    assert "found: 1" in lines and "not fixed: 1" in lines and "read" in lines
    assert "stays" in lines and "refused" in lines
    hung = [line for line in lines if line.startswith(f"wrong: {mount.mountpoint} ")]
    assert len(hung) == 2, lines
    for line in (*hung, *done.stderr.splitlines()):
        assert f"process {pid}" in line and "does not answer" in line, line
        assert f"kill -CONT {pid}" in line and f"kill -9 {pid}" in line, line
    assert len(done.stderr.splitlines()) == 2 and "gone" not in hung[0], done.stderr


def test_the_only_one_is_named_by_every_verb(mount: Mount) -> None:
    _image(mount)
    mount.start()
    with stopped(mount) as pid:
        words = (f"daemon of {mount.mountpoint} (process {pid}) does not answer",)
        asked = ("evict", "vm2.img"), ("flush",), ("top", "--once"), ("log-level", "debug")
        for done in _at_once(mount, *asked):
            refused(done, *words)
        status = alone(mount, "status")
        assert f"{mount.mountpoint}  (pid {pid}, not answering)" in status.stdout
        refused(status, *words)
        status = alone(mount, "status", "--json")
        refused(status, *words)
        assert json.loads(status.stdout) == {
            "mounts": [],
            "not_answering": [{"mountpoint": str(mount.mountpoint), "pid": pid}],
        }
    mount.stop()


def test_a_name_that_it_may_have_is_not_taken_for_that_of_another_mount(
    make_mount: MakeMount,
) -> None:
    one, two = _nested(make_mount)
    with stopped(one) as pid:
        words = (f"daemon of {one.mountpoint} (process {pid}) does not answer", "Nothing was done")
        evict, flush, by_path, status = _at_once(
            two, ("evict", "vm3.img"), ("flush",), ("evict", two.origin / "vm3.img"), ("status",)
        )
        refused(evict, *words, "-m")
        refused(flush, *words)
        refused(by_path, *words)
        assert status.returncode == 1 and "(process" in status.stderr
        assert str(two.mountpoint) in status.stdout and "not answering" in status.stdout
        assert two.image("vm3.img")["cached_blocks"] == 4
        done = two.run("evict", two.mountpoint / "vm3.img")
        assert (done.returncode, done.stdout) == (0, "evicted 1 image, 4 blocks\n")
        assert two.run("flush", "-m", two.mountpoint).returncode == 0
        assert two.run("evict", "vm3.img", "-m", two.mountpoint).returncode == 0
        top = two.run("top", "--once")
        assert top.returncode == 1 and str(two.mountpoint) in top.stdout
        assert f"process {pid}" in top.stderr
    assert one.image("vm3.img")["cached_blocks"] == 4


def test_a_path_below_it_hangs_nobody(make_mount: MakeMount) -> None:
    one, two = _nested(make_mount)
    (one.origin / "sub").mkdir()
    link = one.base / "link"
    link.symlink_to(one.mountpoint)
    place = (one.mountpoint / "sub").stat() and one.mountpoint
    with stopped(one) as pid:
        names = (place / "vm3.img", link / "vm3.img", link / "sub" / ".." / "vm3.img")
        for done in _at_once(two, *(("evict", name) for name in names)):
            refused(done, f"process {pid}", "does not answer")
        other = ("-m", two.mountpoint)
        refused(two.run("evict", place / "vm3.img", *other), "below no mount")
        refused(two.run("evict", link / "vm3.img", *other), "below no mount")
        refused(two.run("umount", place / "sub"), str(one.mountpoint), "does not answer")
        refused(two.run("status", "-m", link / "sub"), str(one.mountpoint), "does not answer")
        for done in _at_once(
            two,
            ("evict", "vm3.img", "--cache", place / "c"),
            ("check", link / "c"),
            ("format", place / "c", "--size", "8M"),
            ("mount", place, one.base / "m", "--cache", one.base / "c", "--size", "8M"),
            ("mount", one.origin, place / "m", "--cache", one.base / "c", "--size", "8M"),
            ("mount", one.origin, two.base, "--cache", place / "c", "--size", "8M"),
            ("config", "check", place / "c.toml"),
        ):
            refused(done, str(one.mountpoint), "does not answer")
    check_stamps((one.mountpoint / "vm3.img").read_bytes(), 1, 0)


def test_a_link_below_a_mount_that_answers_is_followed_as_ever(make_mount: MakeMount) -> None:
    one = make_mount("one").start()
    file = one.mountpoint / "some.toml"
    (one.origin / "some.toml").write_text("")
    (one.base / "link").symlink_to(file)
    for name in (file, one.base / "link", one.base / "run" / ".." / "link"):
        done = one.run("config", "check", name)
        assert done.returncode == 0, done.stderr
    assert one.run("check", one.mountpoint / "none").returncode == 1


def test_who_has_a_connection_is_told_without_the_kernels_help(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's kernel does not number the connection of a descriptor."""
    mount.start()
    mounted = mountinfo.mount_at(mount.mountpoint)
    assert mounted is not None
    fields = processes._fields
    monkeypatch.setattr(
        processes,
        "_fields",
        lambda path: {} if path.parent.name == "fdinfo" else fields(path),
    )
    with stopped(mount) as pid:
        found = standing.judge(mounted)
        assert (found.state, found.pid) == (State.HANGS, pid)
        note = mount.runtime / f"{pid}.mount"
        text = note.read_bytes()
        note.unlink()
        assert standing.judge(mounted).state is State.UNKNOWN
        note.write_bytes(text)
    assert standing.judge(mounted).state is State.WORKS
    mount.kill()
    assert standing.judge(mounted).state is State.DEAD


def test_a_daemon_without_its_mount_is_not_that_of_the_next(
    make_mount: MakeMount,
) -> None:
    """The kernel gives the next mount the number of the connection that the first has open."""
    first = make_mount("first").start()
    before = mountinfo.mount_at(first.mountpoint)
    with stopped(first):
        syscalls.umount(os.fsencode(first.mountpoint), detach=True)
        second = make_mount("second").start()
        after = mountinfo.mount_at(second.mountpoint)
        assert before is not None and after is not None
        second.kill()
        found = standing.judge(after)
        assert (found.state, found.pid) == (State.DEAD, None), before.device == after.device
        second.start()


def test_one_whose_origin_is_a_dead_mount_lives(make_mount: MakeMount) -> None:
    """The kernel's word for a dead mount is not passed on for the origin's."""
    below, above = make_mount("below"), make_mount("above")
    _image(below)
    below.start()
    above.origin = below.mountpoint
    above.start()
    (above.mountpoint / "vm.img").read_bytes()
    below.kill()
    with pytest.raises(OSError) as caught:
        os.listdir(above.mountpoint)
    assert caught.value.errno == errno.EIO
    for mount, state in ((above, State.WORKS), (below, State.DEAD)):
        mounted = mountinfo.mount_at(mount.mountpoint)
        assert mounted is not None and standing.judge(mounted).state is state
    above.kill()


def test_a_mount_below_a_dead_one_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says the same of both: nobody gets as far as the inner one."""
    monkeypatch.setattr(mounts, "ask", lambda path: Answer.DISCONNECTED)
    inner = mountinfo.MountPoint(tmp_path, "0:0", mountinfo.FSTYPE, Path("/"), 0)
    assert standing.judge(inner).state is State.UNKNOWN


def test_the_users_of_a_mount_are_named(mount: Mount) -> None:
    (mount.origin / "sub").mkdir()
    mount.start()
    with process("sleep", "100", cwd=mount.mountpoint / "sub") as stands:
        sentence = refused(mount.run("umount", mount.mountpoint), "in use")
        assert f"pid {stands.pid} sleep (its directory)" in sentence and "--force" in sentence
    fd = os.open(mount.mountpoint / "sub", os.O_PATH)
    try:
        refused(mount.run("umount", mount.mountpoint), f"pid {os.getpid()}", "an open file")
    finally:
        os.close(fd)
    assert is_mounted(mount.mountpoint)
    mount.stop()


def test_status_names_a_dead_mount_and_how_to_bring_it_back(mount: Mount) -> None:
    mount.start()
    mount.kill()
    for _ in range(2):  # the first removes its socket
        done = alone(mount, "status")
        refused(done, f"{mount.mountpoint} is dead", "fusecache mount")
        assert done.stdout == f"{mount.mountpoint}  (dead)\n"
    done = alone(mount, "status", "--json")
    refused(done, f"{mount.mountpoint} is dead")
    assert json.loads(done.stdout) == {
        "mounts": [],
        "dead": [{"mountpoint": str(mount.mountpoint)}],
    }
    refused(mount.run("status", "-m", mount.mountpoint), "fusecache mount command", "doctor")
    mount.start()
    done = alone(mount, "status")
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"{mount.mountpoint} ")]
    assert "serving" in line


def test_paths_are_resolved_as_the_system_does(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "a" / "round").symlink_to("round")
    (tmp_path / "whole").symlink_to(tmp_path / "link")
    for name in ("link/../x", "a/./b//c", "whole", "none/../a", "link", "whole/../../link/y"):
        path = f"{tmp_path}/{name}"
        assert mountinfo.follow(path) == (os.path.realpath(path), None), name
    assert mountinfo.follow(f"{tmp_path}/a/round")[1] is None
