"""``evict`` and ``flush`` with ``--cache``: on a cache that no daemon has open."""

from pathlib import Path

import pytest

from tests.e2e.helpers import nothing_left, refused
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def _paths(mount: Mount) -> list[str]:
    mount.start()
    paths = [image["path"] for image in mount.status()["images"]]
    mount.stop()
    return paths


def test_one_image_is_evicted_and_the_other_keeps_its_blocks(served: Mount) -> None:
    done = served.run("evict", "vm1.img", "--cache", served.cache)
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 8 blocks\n"), done.stderr
    nothing_left(served)
    served.start()
    (left,) = served.status()["images"]
    assert (left["path"], left["cached_blocks"]) == ("vm2.img", 8)
    for number in (1, 2):
        check_stamps((served.mountpoint / f"vm{number}.img").read_bytes(), number, 0)
    served.stop()


def test_all_images_are_evicted(served: Mount) -> None:
    done = served.run("evict", "--all", "--cache", served.cache)
    assert (done.returncode, done.stdout) == (0, "evicted 2 images, 16 blocks\n"), done.stderr
    assert _paths(served) == []
    done = served.run("evict", "--all", "--cache", served.cache)
    assert (done.returncode, done.stdout) == (0, "evicted 0 images, 0 blocks\n")


def test_names_are_resolved_as_for_a_running_mount(served: Mount) -> None:
    for name, cwd in (
        (served.origin / "vm1.img", None),
        (served.mountpoint / "vm1.img", None),
        ("vm1.img", served.origin),
        ("./vm1.img", served.base),
    ):
        done = served.run("flush", name, "--cache", served.cache, cwd=cwd)
        assert (done.returncode, done.stdout) == (0, "flushed 1 image\n"), done.stderr


def test_an_unknown_name_lists_what_is_there_and_harms_nothing(served: Mount) -> None:
    for verb in ("evict", "flush"):
        for name in ("none.img", served.base / "vm1.img"):
            done = served.run(verb, "vm1.img", name, "--cache", served.cache)
            refused(done, str(name), "vm1.img, vm2.img")
    assert _paths(served) == ["vm1.img", "vm2.img"]


def test_an_image_that_was_deleted_is_found(served: Mount) -> None:
    (served.origin / "vm1.img").unlink()
    assert served.run("evict", "vm1.img", "--cache", served.cache).returncode == 0
    assert _paths(served) == ["vm2.img"]


def test_after_a_killed_daemon_the_origin_is_synced_and_recovery_still_right(mount: Mount) -> None:
    for number in (1, 2):
        (mount.origin / f"vm{number}.img").write_bytes(stamped(number, 0, 4 * BLOCK, 1))
    mount.start()
    for number in (1, 2):
        with open(mount.mountpoint / f"vm{number}.img", "r+b", buffering=0) as guest:
            guest.read(4 * BLOCK)
            guest.seek(0)
            guest.write(stamped(number, 0, BLOCK, 2))
    mount.kill()
    assert mount.run("umount", mount.mountpoint).returncode == 0
    origin = mount.base / "elsewhere"
    mount.origin.rename(origin)
    refused(mount.run("evict", "vm1.img", "--cache", mount.cache), "not there", "try again")
    origin.rename(mount.origin)
    assert mount.run("flush", "--cache", mount.cache).stdout == "flushed 2 images\n"
    assert mount.run("evict", "vm1.img", "--cache", mount.cache).returncode == 0
    mount.start()
    assert [image["path"] for image in mount.status()["images"]] == ["vm2.img"]
    for number in (1, 2):
        data = (mount.mountpoint / f"vm{number}.img").read_bytes()
        assert check_stamps(data, number, 0)[:128] == [2] * 128


def test_a_database_elsewhere_is_named_with_db(mount: Mount) -> None:
    mount.options["db"] = str(mount.base / "map.sqlite")
    mount.start()
    mount.stop()
    refused(mount.run("flush", "--cache", mount.cache), "missing")
    done = mount.run("flush", "--cache", mount.cache, "--db", mount.base / "map.sqlite")
    assert done.returncode == 0, done.stderr


def test_wrong_combinations_are_wrong_usage(served: Mount) -> None:
    cache = ("--cache", served.cache)
    refused(served.run("evict", "x", *cache, "-m", served.mountpoint), "-m", code=2)
    refused(served.run("evict", "x", "--db", "y"), "--cache", code=2)
    refused(served.run("evict", *cache), "--all", code=2)
    refused(served.run("flush", "--cache", served.base / "none"), "does not exist")
    assert not Path(served.base / "none").exists()


def test_a_path_from_the_current_directory_that_leads_below_the_last_mount(served: Mount) -> None:
    cache = ("--cache", served.cache)
    for name in ("mnt/vm1.img", "origin/vm1.img", "vm1.img"):
        done = served.run("flush", name, *cache, cwd=served.base)
        assert (done.returncode, done.stdout) == (0, "flushed 1 image\n"), done.stderr
    (served.origin / "mnt").mkdir()
    (served.origin / "mnt" / "vm1.img").write_bytes(stamped(3, 0, BLOCK, 1))
    served.start()
    (served.mountpoint / "mnt" / "vm1.img").read_bytes()
    served.stop()
    done = served.run("evict", "mnt/vm1.img", *cache, cwd=served.base)
    refused(done, "'mnt/vm1.img'", f"{served.mountpoint}/vm1.img", "whole path")
    assert _paths(served) == ["mnt/vm1.img", "vm1.img", "vm2.img"]
