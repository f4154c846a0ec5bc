"""The origin has no room for what is dirty; what is said to be done then works as printed."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeMount
from tests.e2e.dirty import back, write
from tests.e2e.helpers import COMMAND, environment, refused, tmpfs
from tests.support.daemon import BLOCK, Mount

pytestmark = pytest.mark.mount

NAME = "a b's.img"


@pytest.fixture
def full(make_mount: MakeMount) -> Iterator[Mount]:
    """A mount with a dirty image that its origin has no room for."""
    mount = make_mount("fc")
    with tmpfs(mount.origin, "size=512K"):
        (mount.origin / NAME).touch()
        os.truncate(mount.origin / NAME, 16 * BLOCK)
        back(mount).start()
        write(mount, NAME, 1, 2)
        filler = mount.origin / "filler"
        with filler.open("wb", 0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        yield mount
        mount.cleanup()


def _does(mount: Mount, said: str, cwd: Path) -> str:
    """What the command that a message ends with does, typed into a shell."""
    (line,) = re.findall("(fusecache evict .*)$", said)
    (mount.base / "bin").mkdir(exist_ok=True)
    program = mount.base / "bin" / "fusecache"
    program.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    env = environment(mount)
    env["PATH"] = f"{program.parent}:{env['PATH']}"
    done = subprocess.run(
        ["sh", "-c", line],
        capture_output=True, text=True, timeout=60, env=env, cwd=cwd, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def test_evict_says_that_the_origin_is_full_and_how_to_give_up(
    full: Mount, make_mount: MakeMount
) -> None:
    (make_mount("two").origin / NAME).touch()
    two = make_mount("two").start()
    (two.mountpoint / NAME).read_bytes()
    done = full.run("evict", NAME, "-m", full.mountpoint)
    said = refused(done, f"'{NAME}' was not evicted", "the origin is full", "256.0 KiB")
    assert _does(full, said, full.base) == "evicted 1 image, 4 blocks\n"
    assert [image["path"] for image in two.status()["images"]] == [NAME]
    full.stop()


def test_flush_and_status_say_it_too(full: Mount) -> None:
    refused(full.run("flush"), "the origin is full")
    assert "the origin is full" in full.run("status").stdout
    said = refused(full.run("umount", full.mountpoint), "the origin is full")
    assert "No space left" in said
    full.stop("--keep-dirty")


@pytest.mark.parametrize("verb", ["evict", "flush"])
def test_without_a_daemon_the_command_that_is_named_has_the_cache(full: Mount, verb: str) -> None:
    full.options["db"] = str(full.base / "my map")
    full.stop("--keep-dirty")
    cache = full.cache.rename(full.base / "my cache")
    Path(f"{full.cache}.sqlite").rename(full.options["db"])
    (full.base / "sub").mkdir()
    done = full.run(verb, "--all" if verb == "evict" else NAME, "--cache", "my cache", "--db",
                    "my map", cwd=full.base)  # fmt: skip
    said = refused(done, f"'{NAME}' was not", "the origin is full", "--cache", "--db", str(cache))
    assert _does(full, said, full.base / "sub") == "evicted 1 image, 4 blocks\n"


def test_an_image_that_another_mount_of_this_host_has_is_said_to_be_had_by_one(
    make_mount: MakeMount,
) -> None:
    one, two = make_mount("one"), make_mount("two")
    two.origin = one.origin
    (one.origin / "vm.img").write_bytes(bytes(BLOCK))
    one.start()
    two.start()
    with open(one.mountpoint / "vm.img", "r+b"), pytest.raises(OSError, match="busy"):
        os.open(two.mountpoint / "vm.img", os.O_RDWR)
    assert Path("/dev/log").exists() or "another mount of this host" in two.log()
