"""evict, flush and format where there is dirty data, with and without a daemon."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeFaulty
from tests.e2e.dirty import BLOCKS, dirty_mount, images, on_origin, served, write
from tests.e2e.faulty import COMMAND
from tests.e2e.helpers import nothing_left, process, refused, refused_mount, run, wait_for
from tests.support.daemon import BLOCK, Mount
from tests.support.direct import opened, read_direct
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount


@pytest.fixture
def kept(mount: Mount) -> Mount:
    """A cache that no daemon has open, with dirty data of two images."""
    dirty_mount(mount, "vm1.img", "vm2.img", aged=True)
    mount.stop("--keep-dirty")
    return mount


def _origin(mount: Mount) -> tuple[int, int]:
    return on_origin(mount, "vm1.img", 1), on_origin(mount, "vm2.img", 2)


def _open_handles(mount: Mount) -> int:
    return sum(image["open_handles"] for image in mount.status()["images"])


# -- while mounted ---------------------------------------------------------------------------------


def test_evict_leaves_nothing_dirty_and_keeps_the_other_image(mount: Mount) -> None:
    dirty_mount(mount, "vm1.img", "vm2.img")
    done = mount.run("evict", "vm1.img")
    assert done.returncode == 0 and done.stdout.startswith("evicted 1 image, "), done.stderr
    assert _origin(mount) == (2, 1)
    (left,) = mount.status()["images"]
    assert (left["path"], left["dirty_bytes"]) == ("vm2.img", 4 * BLOCK)
    assert served(mount, "vm1.img", 1) == 2
    mount.stop()


def test_evict_while_open_leaves_nothing_dirty_and_later_writes_go_through(mount: Mount) -> None:
    dirty_mount(mount, "vm1.img")
    with open(mount.mountpoint / "vm1.img", "r+b", buffering=0):
        assert mount.run("evict", "vm1.img").returncode == 0
        assert on_origin(mount, "vm1.img", 1) == 2
        write(mount, "vm1.img", 1, 3)
        assert on_origin(mount, "vm1.img", 1) == 3
        assert mount.status()["cache"]["dirty_bytes"] == 0
    # The kernel tells of a close after close(2) has returned.
    wait_for(lambda: _open_handles(mount) == 0, "the image to be closed")
    write(mount, "vm1.img", 1, 4)
    assert on_origin(mount, "vm1.img", 1) == 3
    mount.stop()


@pytest.mark.parametrize("verb", ["evict", "flush"])
def test_what_was_removed_on_the_origin_by_others_is_not_said_to_be_there(
    mount: Mount, verb: str
) -> None:
    """While it is open as well: it would go with the last descriptor."""
    dirty_mount(mount, "vm1.img", "vm2.img")
    fd = os.open(mount.mountpoint / "vm1.img", os.O_RDWR)
    try:
        (mount.origin / "vm1.img").unlink()
        done = mount.run(verb, "vm1.img")
        assert done.returncode == 1 and "was removed on the origin" in done.stderr
        assert mount.image("vm1.img")["dirty_bytes"] == 4 * BLOCK
        assert read_direct(fd, 0, BLOCK) == stamped(1, 0, BLOCK, 2)
    finally:
        os.close(fd)
    done = mount.run("umount", mount.mountpoint)
    assert done.returncode == 1 and "was removed on the origin" in done.stderr
    assert on_origin(mount, "vm2.img", 2) == 2
    done = mount.run("evict", "vm1.img", "--discard-dirty")
    assert done.returncode == 0, done.stderr
    mount.stop()


def test_what_was_replaced_on_the_origin_by_others_is_not_said_to_be_there(mount: Mount) -> None:
    """By whoever asks for the name: another image has it now."""
    dirty_mount(mount, "vm1.img")
    new = mount.origin / "new.img"
    new.write_bytes(stamped(2, 0, BLOCK, 7))
    new.rename(mount.origin / "vm1.img")
    for verb in ("evict", "flush"):
        done = mount.run(verb, "vm1.img")
        assert done.returncode == 1 and "another file put in its place" in done.stderr, done
    path = mount.mountpoint / "vm1.img"
    wait_for(lambda: path.stat().st_size == BLOCK, "the kernel to look the name up once more")
    assert path.read_bytes() == stamped(2, 0, BLOCK, 7)
    done = mount.run("evict", "vm1.img", "--discard-dirty")
    assert done.returncode == 0, done.stderr
    assert mount.status()["cache"]["dirty_bytes"] == 0
    mount.stop()


def test_evict_with_discard_dirty_goes_back_to_what_the_origin_has(mount: Mount) -> None:
    dirty_mount(mount, "vm1.img", "vm2.img")
    assert mount.run("evict", "vm1.img", "--discard-dirty").returncode == 0
    assert _origin(mount) == (1, 1)
    assert (served(mount, "vm1.img", 1), served(mount, "vm2.img", 2)) == (1, 2)
    mount.stop()
    assert _origin(mount) == (1, 2)


def test_evict_of_several_does_all_it_can_and_tells_which_failed(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img", "vm2.img")
    images(mount, "vm1.img", "vm2.img", "vm3.img")
    (mount.mountpoint / "vm3.img").read_bytes()
    with mount.fault("fail-write"):
        done = mount.run("evict", "vm1.img", "vm2.img", "vm3.img")
        assert done.returncode == 1
        assert done.stdout == f"evicted 1 image, {BLOCKS} blocks\n"
        lines = done.stderr.splitlines()
        assert len(lines) == 2
        for name, line in zip(("vm1.img", "vm2.img"), lines, strict=True):
            assert line.startswith(f"fusecache: '{name}' was not evicted: ")
            assert "injected" in line and "256.0 KiB" in line and "--discard-dirty" in line
        refused(mount.run("flush", "vm1.img"), "'vm1.img' was not flushed", "injected")
        assert served(mount, "vm1.img", 1) == 2
    assert mount.run("evict", "--all").returncode == 0
    assert mount.status()["cache"]["slots_used"] == 0
    mount.stop()


def test_dirty_data_that_the_cache_device_does_not_give_back_is_named(
    make_faulty: MakeFaulty,
) -> None:
    mount = make_faulty("fc")
    mount.options["lane"] = "off"  # the fault is in Python's way to the device
    dirty_mount(mount, "vm1.img", "vm2.img")
    with mount.fault("fail-read"):
        # Past the kernel's pages, which may be kept at an open.
        image = mount.mountpoint / "vm1.img"
        with opened(image, os.O_RDONLY | os.O_DIRECT) as fd, pytest.raises(OSError):
            read_direct(fd, 0, 4 * BLOCK)
        done = mount.run("flush", "vm1.img")
        refused(done, "'vm1.img' was not flushed", "fusecache status", "--discard-dirty")
        refused(mount.run("umount", mount.mountpoint), "'vm1.img'", "'vm2.img'", "--keep-dirty")
        status = mount.image("vm1.img")
        assert (status["unreadable"], status["lost"]) == ([[0, 4 * BLOCK]], [])
        assert f"vm1.img: bytes 0-{4 * BLOCK - 1} cannot be read" in mount.run("status").stdout
    assert served(mount, "vm1.img", 1) == 2
    mount.stop()
    assert _origin(mount) == (2, 2)


# -- without a daemon ------------------------------------------------------------------------------


def test_flush_brings_it_home(kept: Mount) -> None:
    done = kept.run("flush", "vm2.img", "--cache", kept.cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, "flushed 1 image\n", "")
    assert _origin(kept) == (1, 2)
    done = kept.run("flush", "--cache", kept.cache)
    assert (done.returncode, done.stdout) == (0, "flushed 2 images\n"), done.stderr
    assert _origin(kept) == (2, 2)
    nothing_left(kept)
    kept.start()
    assert "recovering" not in kept.log()
    assert kept.status()["cache"]["dirty_bytes"] == 0
    assert kept.status()["cache"]["slots_used"] > 0
    kept.stop()


def test_evict_brings_it_home_and_drops_the_image_alone(kept: Mount) -> None:
    done = kept.run("evict", "vm1.img", "--cache", kept.cache)
    assert done.returncode == 0 and done.stdout.startswith("evicted 1 image, "), done.stderr
    assert _origin(kept) == (2, 1)
    kept.start()
    assert [image["path"] for image in kept.status()["images"]] == ["vm2.img"]
    assert served(kept, "vm2.img", 2) == 2
    kept.stop()


def test_flush_after_a_killed_daemon(mount: Mount) -> None:
    dirty_mount(mount, "vm1.img", "vm2.img")
    mount.kill()
    assert mount.run("umount", mount.mountpoint).returncode == 0
    done = mount.run("flush", "--cache", mount.cache)
    assert (done.returncode, done.stdout) == (0, "flushed 2 images\n"), done.stderr
    assert _origin(mount) == (2, 2)


def test_discard_dirty_needs_no_origin(kept: Mount) -> None:
    away = kept.base / "away"
    kept.origin.rename(away)
    for verb in ("evict", "flush"):
        done = kept.run(verb, "vm1.img", "--cache", kept.cache)
        refused(done, str(kept.origin), "not there", "mount")
    done = kept.run("evict", "vm1.img", "--cache", kept.cache, "--discard-dirty")
    assert done.returncode == 0, done.stderr
    away.rename(kept.origin)
    kept.start()
    assert (served(kept, "vm1.img", 1), served(kept, "vm2.img", 2)) == (1, 2)
    kept.stop()
    assert _origin(kept) == (1, 2)


def test_an_origin_whose_storage_is_not_mounted_harms_nothing(kept: Mount) -> None:
    away = kept.base / "away"
    kept.origin.rename(away)
    kept.origin.mkdir()
    for verb in ("flush", "evict"):
        done = kept.run(verb, "vm1.img", "--cache", kept.cache)
        refused(done, "'vm1.img'", str(kept.origin), "--discard-dirty")
    kept.origin.rmdir()
    away.rename(kept.origin)
    assert kept.run("flush", "--cache", kept.cache).returncode == 0
    assert _origin(kept) == (2, 2)


def test_a_cache_with_dirty_data_is_not_mounted_over_another_origin(kept: Mount) -> None:
    other = kept.base / "other"
    other.mkdir()
    args = [other, kept.mountpoint, "--cache", kept.cache]
    refused_mount(kept, str(kept.origin), "2 images", "flush --cache", args=args)
    assert kept.run("flush", "--cache", kept.cache).returncode == 0
    done = kept.run("mount", *args)
    assert done.returncode == 0, done.stderr
    kept.stop()


def test_an_interrupted_flush_keeps_what_is_left(make_faulty: MakeFaulty) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm1.img", "vm2.img", aged=True)
    mount.stop("--keep-dirty")
    command = [*COMMAND, "flush", "--cache", str(mount.cache)]
    with (
        mount.fault("hang-write"),
        process(*command, env=mount.environment, stderr=subprocess.PIPE) as flush,
    ):
        wait_for((mount.faults / "reached").exists, "the flush hangs")
        flush.send_signal(signal.SIGINT)
        said = flush.communicate(timeout=30)[1].decode()
        assert flush.returncode == 1, said
        assert said.strip().startswith("fusecache: interrupted"), said
    mount.start()
    assert (served(mount, "vm1.img", 1), served(mount, "vm2.img", 2)) == (2, 2)
    mount.stop()
    assert _origin(mount) == (2, 2)


# -- format ----------------------------------------------------------------------------------------


def test_format_refuses_to_throw_away_what_the_origin_does_not_have(kept: Mount) -> None:
    done = kept.run("format", kept.cache, "--force")
    refused(done, "512.0 KiB of 2 images", "vm1.img: 256.0 KiB", "flush --cache", "--discard-dirty")
    refused(kept.run("format", kept.cache), "already", "--force")
    assert kept.run("flush", "vm1.img", "--cache", kept.cache).returncode == 0
    refused(kept.run("format", kept.cache, "--force"), "256.0 KiB of 1 image (vm2.img: 256.0 KiB)")
    done = kept.run("format", kept.cache, "--force", "--discard-dirty")
    assert done.returncode == 0, done.stderr
    kept.start()
    assert served(kept, "vm2.img", 2) == 1
    kept.stop()


def test_format_knows_dirty_data_of_a_killed_daemon(mount: Mount) -> None:
    dirty_mount(mount, "vm1.img")
    mount.kill()
    assert mount.run("umount", mount.mountpoint).returncode == 0
    refused(mount.run("format", mount.cache, "--force"), "256.0 KiB of 1 image", "--discard-dirty")
    mount.start()
    assert served(mount, "vm1.img", 1) == 2
    mount.stop()


@pytest.mark.parametrize("damage", ["superblock", "database", "no database"])
def test_format_refuses_while_nobody_can_tell(kept: Mount, damage: str) -> None:
    place = Path(f"{kept.cache}.sqlite")
    if damage == "superblock":
        with open(kept.cache, "r+b") as cache:
            cache.seek(20)
            cache.write(b"\xff")
    elif damage == "database":
        place.write_bytes(os.urandom(place.stat().st_size))
    else:
        place.unlink()
    refused(
        kept.run("format", kept.cache, "--force"),
        "Nobody can tell",
        "fusecache check",
        "--discard-dirty",
    )
    assert kept.run("format", kept.cache, "--force", "--discard-dirty").returncode == 0


def test_a_cache_whose_first_blocks_were_wiped_is_not_taken_for_an_empty_one(kept: Mount) -> None:
    with open(kept.cache, "r+b") as cache:
        cache.write(bytes(1 << 20))
    words = ("512.0 KiB of 2 images", "--discard-dirty")
    refused_mount(kept, *words)
    refused(kept.run("format", kept.cache), *words)
    refused(kept.run("format", kept.cache, "--force"), *words)
    assert kept.run("format", kept.cache, "--force", "--discard-dirty").returncode == 0


def test_a_device_that_is_formatted_anew_leaves_no_database_behind(mount: Mount) -> None:
    backing = mount.base / "ssd"
    backing.touch()
    os.truncate(backing, 16 << 20)
    device = Path(run("losetup", "--find", "--show", backing).strip())
    made: list[Path] = []
    try:
        for flags in ([], ["--force"]):
            done = mount.run("format", device, *flags)
            assert done.returncode == 0, done.stderr
            made.append(Path(done.stdout.strip().rpartition(" ")[2]))
            assert made[-1].exists()
        assert made[0] != made[1] and not made[0].exists()
    finally:
        for path in made:
            path.unlink(missing_ok=True)
        run("losetup", "--detach", device)
