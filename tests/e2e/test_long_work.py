"""Long work shows how far it is, how fast it goes and how long it takes; Ctrl-C leaves things safe
and says how they are."""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.cli.progress import Meter
from tests.e2e.conftest import MakeFaulty
from tests.e2e.dirty import dirty_mount, on_origin, served
from tests.e2e.faulty import COMMAND, FaultyMount
from tests.e2e.helpers import checksum, process, wait_for
from tests.support.stamps import stamped

MIB = 1 << 20

# -- the line --------------------------------------------------------------------------------------


def test_a_meter_tells_share_rate_and_time_left() -> None:
    meter = Meter()
    assert meter.text("copied", 0, 100 * MIB, 0.0) == ("[----------] 0% of 100.0 MiB copied")
    assert meter.text("copied", 10 * MIB, 100 * MIB, 2.0) == (
        "[#---------] 10% of 100.0 MiB copied, 5.0 MiB/s, 18 s left"
    )
    assert Meter().text("read", 99, 100, 0.0, "regions").endswith("] 99% of 100 regions read")


def test_the_rate_is_that_of_late_and_a_stall_has_none() -> None:
    meter = Meter()
    for second in range(30):
        meter.text("copied", second * MIB, 1000 * MIB, float(second))
    for second in range(30, 45):
        said = meter.text("copied", (29 + 5 * (second - 29)) * MIB, 1000 * MIB, float(second))
    assert "5.0 MiB/s" in said
    for second in range(45, 60):
        said = meter.text("copied", 104 * MIB, 1000 * MIB, float(second))
    assert said.endswith("copied")


def test_work_that_grows_meanwhile_never_goes_beyond_its_end() -> None:
    meter = Meter()
    for of, done in ((10, 5), (20, 5), (8, 8)):
        share = re.match(r"\[#*-*\] (\d+)% of", meter.text("copied", done, of, 0.0))
        assert share is not None and 0 <= int(share[1]) <= 100
    assert meter.text("copied", 8, 8, 1.0).startswith("[" + "#" * 10 + "] 100%")


# -- on a terminal ---------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo terminal: ours, theirs."""
    ours, theirs = os.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def on_terminal(mount: FaultyMount, *words: object) -> tuple[str, int]:
    """What a command wrote to a terminal as its standard error, and its exit code."""
    with terminal() as (ours, theirs):
        command = [*COMMAND, *words]
        with process(
            *command, env=mount.environment, stderr=theirs, stdout=subprocess.DEVNULL
        ) as run:
            said = b""
            deadline = time.monotonic() + 60
            while run.poll() is None or select.select([ours], [], [], 0)[0]:
                assert time.monotonic() < deadline
                if select.select([ours], [], [], 0.05)[0]:
                    said += os.read(ours, 1 << 16)
        return said.decode(), run.returncode


@pytest.mark.mount
def test_flush_evict_and_umount_show_rate_and_time_left(tmp_path: Path) -> None:
    """The cleaner's batches are 32 MiB: after the first of two there is a rate."""
    mount = FaultyMount(tmp_path / "fc", "300M")
    image = mount.mountpoint / "vm.img"
    (mount.origin / "vm.img").touch()
    data = stamped(1, 0, 64 * MIB, 1)
    try:
        mount.start()
        for words, more in (
            (("flush", image), r" \(0 of 1 image\)"),
            (("evict", image), r" \(0 of 1 image\)"),
            (("umount", mount.mountpoint), ""),
        ):
            image.write_bytes(data)
            with mount.fault("slow-write", "0.15"):
                said, code = on_terminal(mount, *words)
            assert code == 0
            line = r": \[[#-]{10}\] \d+% of 64.0 MiB, [\d.]+ .iB/s, [\d.]+ m?s left"
            assert re.search(line + more, said), said
            assert said.endswith("\r\x1b[K"), "the line is gone in the end"
            assert (mount.origin / "vm.img").read_bytes() == data
    finally:
        mount.cleanup()


@pytest.mark.mount
def test_check_repair_and_format_show_how_far_they_are(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img")
    mount.stop()
    said, code = on_terminal(mount, "check", mount.cache)
    assert code == 0 and "check: [" in said and "of the database copied" in said
    assert said.endswith("\r\x1b[K")
    _damage(mount.cache)
    said, code = on_terminal(mount, "repair", mount.cache, "--yes")
    assert code == 0 and "repair: [" in said and "regions of the block map written" in said
    said, code = on_terminal(mount, "format", mount.base / "other", "--size", "16M")
    assert code == 0 and "format: [----------] 0% of 16.0 MiB taken" in said
    environment = mount.environment | {"TERM": "dumb"}
    with terminal() as (ours, theirs):
        command = [*COMMAND, "check", mount.base / "other"]
        with process(*command, env=environment, stderr=theirs, stdout=theirs) as run:
            assert run.wait(30) == 0
        assert b"\x1b" not in os.read(ours, 1 << 16)


def _damage(cache: Path) -> None:
    """The superblock's checksum is wrong."""
    with open(cache, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")


@pytest.mark.mount
def test_colours_are_for_terminals_and_for_who_wants_them(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img")
    plain = {k: v for k, v in mount.environment.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with mount.fault("fail-write"):
        assert mount.run("flush", "vm1.img").returncode == 1  # what is wrong is red
        assert "\x1b" not in mount.run("status").stdout
        shown = {}
        for name, environment in (("wanted", plain), ("not", plain | {"NO_COLOR": "1"})):
            with terminal() as (ours, theirs):
                command = [*COMMAND, "status", "-m", str(mount.mountpoint)]
                environment |= {"TERM": "xterm"}
                with process(*command, env=environment, stdout=theirs) as run:
                    assert run.wait(30) == 0
                shown[name] = os.read(ours, 1 << 16).decode()
    assert "\x1b[31m" in shown["wanted"], shown
    assert not re.search(r"\x1b\[[349]\d", shown["not"]), shown


# -- Ctrl-C ----------------------------------------------------------------------------------------


def interrupted(mount: FaultyMount, fault: str, *words: object) -> str:
    """Interrupts a command in the middle of its work; gives what it said after that."""
    reached = mount.faults / "reached"
    reached.unlink(missing_ok=True)
    with (
        mount.fault(fault),
        process(
            *COMMAND, *words, env=mount.environment, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as run,
    ):  # fmt: skip
        if fault == "hang-write":
            wait_for(lambda: bool(mount.status()["running"]), "the work has begun")
        else:
            wait_for(reached.exists, f"{words[0]} is where it waits")
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=30)[1].decode()
    assert run.returncode == 1, (run.returncode, said)
    assert said.startswith("fusecache: interrupted: ") and said.count("\n") == 1, said
    return said


@pytest.mark.mount
@pytest.mark.parametrize("verb", ["flush", "evict"])
def test_an_interrupted_flush_or_evict_of_a_mount_loses_nothing(
    make_faulty: MakeFaulty, verb: str
) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img")
    said = interrupted(mount, "hang-write", verb, mount.mountpoint / "vm1.img")
    assert ("nothing is lost" in said) and (verb == "flush" or "Evict again" in said)
    assert served(mount, "vm1.img", 1) == 2
    wait_for(lambda: not mount.status()["running"], "the daemon has given it up")
    assert mount.run(verb, "vm1.img").returncode == 0
    assert on_origin(mount, "vm1.img", 1) == 2
    mount.stop()


@pytest.mark.mount
def test_an_interrupted_check_or_repair_has_changed_nothing(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img")
    mount.stop("--keep-dirty")
    _damage(mount.cache)
    files = [mount.cache, Path(f"{mount.cache}.sqlite")]
    before = [checksum(file) for file in files]
    for words in (("check",), ("repair",)):
        assert "nothing was changed." in interrupted(mount, "hang-copy", *words, mount.cache)
        assert [checksum(file) for file in files] == before
    said = interrupted(mount, "hang-restore", "repair", mount.cache, "--yes")
    assert f"go on with fusecache repair {mount.cache} --yes" in said
    assert [checksum(file) for file in files] == before
    assert mount.run("repair", mount.cache, "--yes").returncode == 0
    mount.start()
    assert served(mount, "vm1.img", 1) == 2
    mount.stop()
    assert on_origin(mount, "vm1.img", 1) == 2


def test_an_interrupted_format_leaves_no_half_made_cache(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    words = ("format", mount.cache, "--size", "16M")
    for fault in ("hang-space", "hang-create"):
        assert "nothing was made." in interrupted(mount, fault, *words)
        assert not mount.cache.exists()
    assert mount.run(*words).returncode == 0
    said = interrupted(mount, "hang-create", "format", mount.cache, "--force")
    assert f"fusecache check {mount.cache}" in said
    assert mount.run("check", mount.cache).returncode == 1, "it is no cache now, and says so"
    assert mount.run("format", mount.cache).returncode == 0
