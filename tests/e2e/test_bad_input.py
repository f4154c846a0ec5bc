"""Whatever is refused is refused with a sentence, harms nothing and leaves nothing behind (P7)."""

import contextlib
import fcntl
import os
import shlex
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeMount
from tests.e2e.dirty import dirty_mount
from tests.e2e.helpers import (
    COMMAND,
    NO_OTHERS,
    bind,
    checksum,
    environment,
    is_mounted,
    nothing_left,
    refused,
    refused_mount,
    run,
    tmpfs,
)
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps

pytestmark = pytest.mark.mount


@contextlib.contextmanager
def unharmed(*paths: Path) -> Iterator[None]:
    """Asserts that files stay byte for byte what they are."""
    before = [checksum(path) for path in paths]
    yield
    assert [checksum(path) for path in paths] == before


# -- origin and mount point ------------------------------------------------------------------------


def test_a_missing_origin(mount: Mount) -> None:
    mount.origin.rmdir()
    refused_mount(mount, str(mount.origin), "does not exist")
    assert not mount.cache.exists()


def test_an_origin_that_is_a_file(mount: Mount) -> None:
    mount.origin.rmdir()
    mount.origin.write_bytes(b"x")
    refused_mount(mount, str(mount.origin), "not a directory")
    assert not mount.cache.exists()


def test_a_missing_mount_point(mount: Mount) -> None:
    mount.mountpoint.rmdir()
    refused_mount(mount, str(mount.mountpoint), "mkdir -p")


def test_a_mount_point_that_is_a_file(mount: Mount) -> None:
    mount.mountpoint.rmdir()
    mount.mountpoint.touch()
    refused_mount(mount, str(mount.mountpoint), "not a directory")


def test_a_mount_point_that_is_not_empty(mount: Mount) -> None:
    (mount.mountpoint / "file").touch()
    refused_mount(mount, str(mount.mountpoint), "not empty")
    assert (mount.mountpoint / "file").exists()


def test_a_mount_point_where_another_filesystem_is(mount: Mount) -> None:
    with tmpfs(mount.mountpoint):
        refused(mount.run("mount", *mount.arguments()), "busy", "tmpfs")
        assert is_mounted(mount.mountpoint)
    nothing_left(mount)


def test_a_mount_point_where_another_fusecache_serves(make_mount: MakeMount) -> None:
    one, two = make_mount("one").start(), make_mount("two")
    two.mountpoint = one.mountpoint
    refused(two.run("mount", *two.arguments()), "busy", f"pid {one.pid}", "umount")
    assert not two.cache.exists()
    assert one.status()["state"] == "serving"


# -- nesting ---------------------------------------------------------------------------------------


def test_a_mount_point_inside_the_origin_by_any_way(mount: Mount) -> None:
    inside = mount.origin / "mnt"
    inside.mkdir()
    (mount.base / "link").symlink_to(mount.origin)
    for path in (inside, mount.origin, mount.base / "link" / "mnt"):
        args = [mount.origin, path, "--cache", mount.cache, "--size", "8M"]
        refused_mount(mount, "one inside the other", args=args)
    with bind(mount.origin, mount.base / "bound"):
        args = [mount.origin, mount.base / "bound" / "mnt", "--cache", mount.cache, "--size", "8M"]
        refused_mount(mount, "one inside the other", args=args)
    assert not mount.cache.exists()


def test_an_origin_inside_the_mount_point(mount: Mount) -> None:
    args = [mount.origin, mount.base, "--cache", "/nowhere/c", "--size", "8M"]
    refused_mount(mount, "one inside the other", args=args)


def test_a_cache_or_database_inside_the_origin_by_any_way(mount: Mount) -> None:
    (mount.base / "link").symlink_to(mount.origin)
    bound = mount.base / "bound"
    with bind(mount.origin, bound):
        for path in (mount.origin / "c", mount.base / "link" / "c", bound / "c"):
            for args in (
                ["--cache", path, "--size", "8M"],
                ["--cache", mount.cache, "--size", "8M", "--db", path],
            ):
                refused_mount(mount, "inside the origin", args=[*mount.arguments()[:2], *args])
    assert list(mount.origin.iterdir()) == [] and not mount.cache.exists()


def test_a_cache_below_the_mount_point(mount: Mount) -> None:
    args = [*mount.arguments()[:2], "--cache", mount.mountpoint / "c", "--size", "8M"]
    refused_mount(mount, "below the mount point", args=args)


# -- the cache -------------------------------------------------------------------------------------


def test_a_cache_that_is_a_directory_or_a_fifo(mount: Mount) -> None:
    mount.cache.mkdir()
    refused_mount(mount, "is a directory")
    refused(mount.run("format", mount.cache), "is a directory")
    mount.cache.rmdir()
    os.mkfifo(mount.cache)
    refused_mount(mount, "neither a file nor a block device")


def test_a_place_that_is_not_there_is_named_and_other_mounts_go_on(make_mount: MakeMount) -> None:
    one, two = make_mount("one").start(), make_mount("two")
    gone = two.base / "pool" / "images"
    for args in (
        [gone, two.mountpoint, "--cache", two.cache, "--size", "8M"],
        [two.origin, two.mountpoint, "--cache", gone / "c", "--size", "8M"],
        [two.origin, two.mountpoint, "--cache", gone / "c"],
    ):
        said = two.run("mount", *args)
        refused(said, str(gone), code=2 if args[-1] == gone / "c" else 1)
        assert not is_mounted(two.mountpoint) and not two.cache.exists()
    assert one.status()["state"] == "serving"


def test_a_missing_cache_without_a_size(mount: Mount) -> None:
    refused_mount(mount, "--size", args=[*mount.arguments()[:2], "--cache", mount.cache], code=2)
    refused_mount(mount, "--cache", args=mount.arguments()[:2], code=2)
    refused(mount.run("format", mount.cache), "--size", code=2)


def test_a_cache_that_is_too_small_leaves_no_file(mount: Mount) -> None:
    mount.size = "1M"
    refused_mount(mount, "too small", "--size")
    assert not mount.cache.exists()
    refused(mount.run("format", mount.cache, "--size", "1500K"), "too small")
    assert not mount.cache.exists()
    mount.cache.write_bytes(bytes(100))
    with unharmed(mount.cache):
        refused(mount.run("format", mount.cache), "too small")


def test_a_cache_that_holds_a_filesystem_a_partition_table_or_data(mount: Mount) -> None:
    contents: dict[str, Callable[[], object]] = {
        "ext4": lambda: run("mkfs.ext4", "-q", mount.cache),
        "partitions": lambda: mount.cache.write_bytes(bytes(510) + b"\x55\xaa" + bytes(8 << 20)),
        "backup": lambda: mount.cache.write_bytes(bytes(8 << 20) + b"EFI PART" + bytes(504)),
        "random": lambda: mount.cache.write_bytes(os.urandom(8 << 20)),
        "a byte": lambda: mount.cache.write_bytes(b"x" + bytes(8 << 20)),
    }
    for make in contents.values():
        mount.cache.write_bytes(bytes(8 << 20))
        make()
        with unharmed(mount.cache):
            args = [*mount.arguments()[:2], "--cache", mount.cache]
            refused_mount(mount, "not a fusecache cache", "format", "--force", args=args)
            refused(mount.run("format", mount.cache), "--force")
            refused(mount.run("evict", "--all", "--cache", mount.cache), "not a fusecache cache")
        assert not Path(f"{mount.cache}.sqlite").exists()
    assert mount.run("format", mount.cache, "--force").returncode == 0
    refused(mount.run("format", mount.cache), "already", "--force")


def test_a_cache_in_use_names_pid_and_mount(make_mount: MakeMount) -> None:
    one, two = make_mount("one").start(), make_mount("two")
    args = [two.origin, two.mountpoint, "--cache", one.cache]
    words = ("in use", str(one.pid), str(one.mountpoint), "umount")
    refused(two.run("mount", *args), *words)
    assert not is_mounted(two.mountpoint)
    refused(one.run("format", one.cache, "--force"), *words)
    refused(one.run("evict", "--all", "--cache", one.cache), *words)
    assert one.status()["state"] == "serving"


def test_a_cache_in_use_by_another_program_names_its_pid(served: Mount) -> None:
    with open(served.cache, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused_mount(served, "in use", f"pid {os.getpid()}")


def test_sizes_that_differ_from_the_formatted_ones(served: Mount) -> None:
    with unharmed(served.cache, Path(f"{served.cache}.sqlite")):
        args = [*served.arguments(), "--block-size", "128K"]
        refused_mount(served, "64.0 KiB", "128.0 KiB", "--block-size", args=args)
        served.size = "32M"
        refused_mount(served, "32.0 MiB", "--size")


@pytest.mark.parametrize("size", ["3K", "48K", "2K", "2M", "0", "-4K", "64X", ""])
def test_a_block_size_that_is_none(mount: Mount, size: str) -> None:
    refused_mount(mount, args=[*mount.arguments(), f"--block-size={size}"], code=2)
    refused(mount.run("format", mount.cache, "--size", "8M", f"--block-size={size}"), code=2)
    assert not mount.cache.exists()


def test_a_damaged_superblock(served: Mount) -> None:
    with open(served.cache, "r+b") as cache:
        cache.seek(20)
        cache.write(b"\xff")
    with unharmed(served.cache, Path(f"{served.cache}.sqlite")):
        refused_mount(served, "superblock is damaged", "fusecache check", "fusecache repair")
        refused(served.run("format", served.cache), "damaged", "fusecache repair")


def test_a_cache_that_was_cut_short(served: Mount) -> None:
    os.truncate(served.cache, 32 << 20)
    args = [*served.arguments()[:2], "--cache", served.cache]
    with unharmed(served.cache):
        refused_mount(served, "cut short", "fusecache check", args=args)


# -- the database ----------------------------------------------------------------------------------


def _database(mount: Mount) -> Path:
    return Path(f"{mount.cache}.sqlite")


def _works_after_a_new_format(mount: Mount) -> None:
    refused(mount.run("format", mount.cache, "--force"), "Nobody can tell", "--discard-dirty")
    assert mount.run("format", mount.cache, "--force", "--discard-dirty").returncode == 0
    mount.start()
    for number in (1, 2):
        check_stamps((mount.mountpoint / f"vm{number}.img").read_bytes(), number, 0)
    mount.stop()


def test_a_missing_database(served: Mount) -> None:
    _database(served).unlink()
    with unharmed(served.cache):
        refused_mount(served, "missing", "fusecache repair")
        assert not _database(served).exists()
    _works_after_a_new_format(served)


def test_a_database_of_another_cache(served: Mount) -> None:
    other = served.base / "other"
    assert served.run("format", other, "--size", "64M").returncode == 0
    with unharmed(served.cache, Path(f"{other}.sqlite")):
        args = [*served.arguments(), "--db", f"{other}.sqlite"]
        refused_mount(served, "another cache", "--db", args=args)


def test_a_database_of_a_newer_version(served: Mount) -> None:
    with contextlib.closing(sqlite3.connect(_database(served))) as connection, connection:
        connection.execute("UPDATE meta SET schema_version = 99")
    with unharmed(served.cache, _database(served)):
        refused_mount(served, "version 99", "newer fusecache")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "flipped", "text"])
def test_a_damaged_database(served: Mount, damage: str) -> None:
    place = _database(served)
    if damage == "truncated":
        os.truncate(place, place.stat().st_size // 2)
    elif damage == "garbage":
        place.write_bytes(os.urandom(place.stat().st_size))
    elif damage == "empty":
        place.write_bytes(b"")
    elif damage == "text":
        place.write_text("This is a letter.\n" * 1000)
    else:
        with contextlib.closing(sqlite3.connect(place)) as connection, connection:
            (slots,) = connection.execute("SELECT slots FROM block WHERE image = 1").fetchone()
            flipped = bytes([slots[0] ^ 1]) + slots[1:]
            connection.execute("UPDATE block SET slots = ? WHERE image = 1", (flipped,))
    with open(served.cache, "rb") as cache:
        before = cache.read(4096), cache.seek(8192), cache.read()
        refused_mount(served, "damaged", "fusecache check", "fusecache repair")
        cache.seek(0)
        # All but the record of commits, which may tell of the attempt.
        assert (cache.read(4096), cache.seek(8192), cache.read()) == before
    _works_after_a_new_format(served)


def test_a_new_cache_never_replaces_a_foreign_file_by_its_database(mount: Mount) -> None:
    letter, cache = mount.base / "letter", mount.base / "other"
    letter.write_text("dear operator")
    assert mount.run("format", cache, "--size", "8M").returncode == 0
    foreign = Path(f"{cache}.sqlite")
    with unharmed(letter, foreign):
        for path, word in ((letter, "something else"), (foreign, "another cache")):
            refused_mount(mount, word, "--db", args=[*mount.arguments(), "--db", path])
        refused_mount(mount, "both", args=[*mount.arguments(), "--db", mount.cache], code=2)
        refused_mount(mount, "not a file", args=[*mount.arguments(), "--db", mount.origin.parent])
    assert not mount.cache.exists()


def test_a_leftover_database_of_a_removed_cache_is_replaced(served: Mount) -> None:
    served.cache.unlink()
    served.start()
    assert served.status()["cache"]["slots_used"] == 0
    served.stop()


# -- /dev/fuse -------------------------------------------------------------------------------------


def _in_a_namespace(mount: Mount, before: str) -> subprocess.CompletedProcess[str]:
    """``fusecache mount`` in a private mount namespace, after a shell command there."""
    words = shlex.join([*COMMAND, "mount", *map(str, mount.arguments())])
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{NO_OTHERS}; {before} && {words}"],
        capture_output=True, text=True, timeout=60, env=environment(mount), check=False,
    )  # fmt: skip


def test_dev_fuse_missing(mount: Mount) -> None:
    empty = mount.base / "dev"
    empty.mkdir()
    done = _in_a_namespace(mount, f"mount -t tmpfs -o size=1M none {empty} && "
                           f"cp -a /dev/null {empty}/ && mount --move {empty} /dev")  # fmt: skip
    refused(done, "/dev/fuse is missing", "modprobe fuse")
    nothing_left(mount)
    assert not mount.cache.exists()


def test_dev_fuse_not_permitted(mount: Mount) -> None:
    other = mount.base / "fuse"
    os.mknod(other, 0o600 | 0o020000, os.makedev(10, 229))
    done = _in_a_namespace(
        mount, f"mount --bind {other} /dev/fuse && mount -o remount,bind,nodev /dev/fuse"
    )
    refused(done, "/dev/fuse may not be opened")
    nothing_left(mount)
    assert not mount.cache.exists()


def test_dev_fuse_that_is_something_else(mount: Mount) -> None:
    done = _in_a_namespace(mount, "mount --bind /dev/null /dev/fuse")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fusecache: Mounting at")
    assert done.stderr.count("fusecache: ") == 1
    nothing_left(mount)


def test_a_runtime_directory_that_cannot_be_made(mount: Mount) -> None:
    mount.runtime = mount.cache / "run"
    mount.cache.write_bytes(b"")
    refused(mount.run("mount", *mount.arguments()), "control socket", str(mount.runtime))
    assert mount.cache.stat().st_size == 0 and not is_mounted(mount.mountpoint)
    mount.runtime = mount.base / ("long" * 30)
    refused(mount.run("mount", *mount.arguments()), "too long")


def test_images_stay_what_they_are_through_all_refusals(served: Mount) -> None:
    images = [served.origin / "vm1.img", served.origin / "vm2.img"]
    with unharmed(*images):
        refused(served.run("format", images[0]), "not a fusecache cache")
        args = [*served.arguments()[:2], "--cache", images[0]]
        refused_mount(served, "inside the origin", args=args)
    assert images[0].stat().st_size == 8 * BLOCK


# -- what never was a cache, and what is left of one -----------------------------------------------


def _command(said: str, verb: str) -> list[str]:
    """The last command in a message, as a shell reads it."""
    return [verb, *shlex.split(said.rpartition(f"fusecache {verb} ")[2].rstrip(".\n"))]


@pytest.mark.parametrize(
    "content", [b"", bytes(4 << 20), b"dear operator", b"x" * (4 << 20)],
    ids=["no bytes", "zeros", "a letter", "data"],
)  # fmt: skip
def test_the_verbs_for_damage_say_that_something_never_was_a_cache(
    mount: Mount, content: bytes
) -> None:
    mount.cache.write_bytes(content)
    with unharmed(mount.cache):
        for verb in (["check"], ["dump"], ["dump", "--json"], ["repair"], ["repair", "--yes"]):
            done = mount.run(*verb, mount.cache)
            said = refused(done, "was ever a fusecache cache", "fusecache format")
            assert done.stdout == "" and "repair" not in said
    command = [word.replace("20G", "8M") for word in _command(said, "format")]
    done = mount.run(*command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [1 << 20, 0])
def test_a_cache_that_was_cut_to_nothing(mount: Mount, size: int) -> None:
    dirty_mount(mount, "vm1.img")
    mount.stop("--keep-dirty")
    os.truncate(mount.cache, size)
    arguments = [*mount.arguments()[:2], "--cache", mount.cache]
    with unharmed(mount.cache, _database(mount)):
        for args in (arguments, mount.arguments()):
            said = refused(mount.run("mount", *args))
            if size:
                assert "cut short" in said and "fusecache repair" in said
            else:
                assert "is empty" in said and "256.0 KiB of 1 image" in said
                assert "repair" not in said and "smaller" not in said
        assert "cut short" in mount.run("check", mount.cache).stdout
        for flags in ([], ["--yes"]):
            said = refused(mount.run("repair", mount.cache, *flags), "cut short", "256.0 KiB")
            assert "--block-size" not in said
        refused(mount.run("format", mount.cache, "--force", "--size", "64M"), "--discard-dirty")
    command = _command(said, "format")
    assert command[-2:] == ["--size", "64M"] and "--discard-dirty" in command
    done = mount.run(*command)
    assert done.returncode == 0, done.stderr
    mount.start()
    mount.stop()


def test_a_cache_or_database_on_another_fusecache(make_mount: MakeMount) -> None:
    one, two = make_mount("one").start(), make_mount("two")
    inside = one.mountpoint / "c.img"
    words = ("a fusecache mount", str(one.mountpoint))
    args = [two.origin, two.mountpoint, "--cache", inside, "--size", "8M"]
    refused(two.run("mount", *args), *words)
    refused(two.run("mount", *two.arguments(), "--db", inside), *words)
    refused(two.run("format", inside, "--size", "8M"), *words)
    refused(two.run("format", two.cache, "--size", "8M", "--db", inside), *words)
    assert list(one.origin.iterdir()) == [] and not two.cache.exists()
    one.stop()
