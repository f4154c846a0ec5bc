"""What a real mount logs: an origin that fails or hangs, in front, and under the journal."""

import contextlib
import mmap
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.helpers import COMMAND, environment, process, wait_for
from tests.support.daemon import BLOCK, Mount
from tests.support.injected import InjectedMount
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount


def events(log: str, name: str) -> list[dict[str, str]]:
    """The lines of one event, taken apart."""
    found = []
    for line in log.splitlines():
        pairs = re.findall(r'([a-z_]+)=("(?:\\.|[^"\\])*"|\S+)', line)
        values = {key: value.strip('"') for key, value in pairs}
        if values.get("event") == name:
            found.append(values)
    return found


def test_a_failing_origin_is_one_line_with_a_count_and_one_when_it_works(tmp_path: Path) -> None:
    mount = InjectedMount(tmp_path / "fc")
    behind, image = mount.origin / "vm.img", mount.mountpoint / "vm.img"
    behind.write_bytes(stamped(1, 0, 16 * BLOCK, 1))
    try:
        mount.start()
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
        try:
            fault = mount.fault("unreadable", behind)
            failures = sum(not _reads(fd, block % 16) for block in range(300))
            assert failures == 300
            wait_for(lambda: bool(events(mount.log(), "origin-failing")), "the line")
            fault.unlink()
            for block in range(15, 0, -1):  # each a miss: only what the origin answers counts
                assert _reads(fd, block)
                time.sleep(0.2)
                if events(mount.log(), "origin-recovered"):
                    break
        finally:
            os.close(fd)
        (begun,), (ended,) = (
            events(mount.log(), name) for name in ("origin-failing", "origin-recovered")
        )
        assert begun["image"] == "vm.img" and begun["level"] == "error"
        assert begun["error"] == "injected"
        assert int(ended["errors"]) >= 300 and int(begun["errors"]) > 0
        assert mount.log().count("injected") == 1
    finally:
        mount.cleanup()


def _reads(fd: int, block: int) -> bool:
    with contextlib.suppress(OSError), mmap.mmap(-1, BLOCK) as buffer:
        return os.preadv(fd, [buffer], block * BLOCK) == BLOCK
    return False


def test_a_hanging_origin_is_one_line_and_one_when_it_answers(tmp_path: Path) -> None:
    mount = InjectedMount(tmp_path / "fc")
    behind = mount.origin / "vm.img"
    behind.write_bytes(stamped(1, 0, 16 * BLOCK, 1))
    try:
        mount.start()
        stall = mount.fault("stall", behind)
        readers = [
            threading.Thread(target=(mount.mountpoint / "vm.img").read_bytes) for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        wait_for(lambda: bool(events(mount.log(), "origin-hangs")), "the line", 25)
        stall.unlink()
        for reader in readers:
            reader.join(20)
        wait_for(lambda: bool(events(mount.log(), "origin-answers")), "the end of it")
        assert len(events(mount.log(), "origin-hangs")) == 1
    finally:
        mount.cleanup()


def test_a_hung_lookup_or_listing_is_one_line_and_one_when_it_answers(tmp_path: Path) -> None:
    mount = InjectedMount(tmp_path / "fc")
    block = mount.faults / "block"
    calls: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("Tree.find", Path.exists),
        ("Tree.names", os.listdir),
    )
    try:
        mount.start()
        for method, call in calls:
            lines = len(events(mount.log(), "origin-hangs"))
            # Of a name that the kernel has heard of before nobody need be asked.
            path = mount.mountpoint / ("new-name" if call is Path.exists else ".")
            block.write_text(method)
            asking = [threading.Thread(target=call, args=(path,)) for _ in range(3)]
            for thread in asking:
                thread.start()
            hung = partial(_more, mount, "origin-hangs", lines)
            wait_for(hung, f"the line of {method}", 25)
            line = events(mount.log(), "origin-hangs")[-1]
            assert line["images"] == "0" and int(line["names"]) >= 1 and "image" not in line
            assert mount.status()["names_waiting"] >= 1
            block.unlink()
            for thread in asking:
                thread.join(20)
            wait_for(partial(_more, mount, "origin-answers", lines), "the end of it")
            assert mount.status()["names_waiting"] == 0
        assert len(events(mount.log(), "origin-hangs")) == 2
    finally:
        block.unlink(missing_ok=True)
        mount.cleanup()


def _more(mount: Mount, event: str, lines: int) -> bool:
    return len(events(mount.log(), event)) > lines


def test_in_front_it_is_standard_error_and_with_priorities_where_that_is_the_journal(
    mount: Mount,
) -> None:
    for under_systemd in (False, True):
        reader, writer = os.pipe()
        st = os.fstat(writer)
        journal = {"JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"} if under_systemd else {}
        with process(
            *COMMAND, "mount", "-f", *mount.arguments(), stderr=writer,
            env=environment(mount) | journal,
        ) as daemon:  # fmt: skip
            os.close(writer)
            with os.fdopen(reader) as lines:
                first = lines.readline()
                wait_for(lambda: mount.status()["state"] == "serving", "the mount serves")
                daemon.send_signal(signal.SIGTERM)
                rest = lines.read().splitlines()
            assert daemon.wait(20) == 0
        start = "<6>level=info " if under_systemd else "fusecache: level=info "
        assert all(line.startswith(start) for line in [first, *rest]), (first, rest)
        assert f"event=serving mount={mount.mountpoint} write_mode=through" in first
        assert events("\n".join(rest), "stopping")


def test_a_start_that_fails_under_the_journal_has_a_priority(mount: Mount) -> None:
    mount.origin.rmdir()
    reader, writer = os.pipe()
    st = os.fstat(writer)
    env = environment(mount) | {"JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"}
    with process(*COMMAND, "mount", "-f", *mount.arguments(), stderr=writer, env=env) as daemon:
        os.close(writer)
        with os.fdopen(reader) as lines:
            said = lines.read()
        assert daemon.wait(20) == 1
    assert said.startswith("<3>The origin ") and said.count("\n") == 1
