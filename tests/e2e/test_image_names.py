"""What an IMAGE argument means: resolved as text, by the client, against the running mounts."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeMount
from tests.e2e.helpers import refused
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def _warm(mount: Mount, *names: str) -> None:
    for number, name in enumerate(names):
        path = mount.origin / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(stamped(number, 0, BLOCK, 1))
    if mount.pid is None:
        mount.start()
    for number, name in enumerate(names):
        check_stamps((mount.mountpoint / name).read_bytes(), number, 0)


def _evicted(mount: Mount, name: object, cwd: Path | None = None) -> None:
    _warm(mount, "vm.img", "sub/vm.img")
    done = mount.run("evict", name, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "evicted 1 image, 1 blocks\n"


def test_names_mean_the_same_image_from_everywhere(mount: Mount) -> None:
    _warm(mount, "vm.img", "sub/vm.img")
    link = mount.base / "link"
    link.symlink_to(mount.mountpoint)
    for name, cwd in (
        (mount.mountpoint / "sub/vm.img", None),
        (mount.origin / "sub/vm.img", None),
        (f"{mount.mountpoint}//sub/./../sub/vm.img", None),
        (link / "sub/vm.img", None),
        ("vm.img", mount.mountpoint / "sub"),
        ("vm.img", mount.origin / "sub"),
        ("../sub/vm.img", mount.mountpoint / "sub"),
        ("sub/vm.img", mount.mountpoint),
        ("sub/vm.img", mount.base),
    ):
        _evicted(mount, name, cwd)
        (left,) = mount.status()["images"]
        assert left["path"] == "vm.img", (name, cwd)


def test_a_path_below_no_mount_is_refused(mount: Mount) -> None:
    mount.start()
    refused(mount.run("evict", "/etc/passwd"), "'/etc/passwd'", str(mount.mountpoint))


def test_an_unknown_image_is_refused_and_the_others_stay(mount: Mount) -> None:
    _warm(mount, "vm.img")
    refused(mount.run("evict", "vm.img", "typo.img"), "'typo.img'", "fusecache status")
    assert mount.image("vm.img")["cached_blocks"] == 1
    refused(mount.run("status", "typo.img"), "'typo.img'")
    refused(mount.run("flush", "typo.img"), "'typo.img'")
    refused(mount.run("evict", "../../etc/passwd"), "passwd")
    (mount.origin / "never-opened.img").touch()
    done = mount.run("evict", "never-opened.img")
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 0 blocks\n")


def test_an_image_deleted_behind_the_mount_is_found_while_it_is_cached(mount: Mount) -> None:
    _warm(mount, "vm.img", "other.img")
    (mount.origin / "vm.img").unlink()
    assert mount.run("status", "vm.img").returncode == 0
    done = mount.run("evict", "vm.img")
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 1 blocks\n")
    refused(mount.run("evict", "vm.img"), "'vm.img'")
    assert mount.image("other.img")["cached_blocks"] == 1


def test_several_images_are_evicted_at_once_and_all_of_them(mount: Mount) -> None:
    _warm(mount, "a.img", "b.img", "c.img")
    done = mount.run("evict", "a.img", "b.img", "a.img")
    assert done.returncode == 0, done.stderr
    assert [image["path"] for image in mount.status()["images"]] == ["c.img"]
    _warm(mount, "a.img", "b.img", "c.img")
    done = mount.run("evict", "--all")
    assert (done.returncode, done.stdout) == (0, "evicted 3 images, 3 blocks\n")
    assert mount.status()["cache"]["slots_used"] == 0
    assert mount.run("evict", "--all").returncode == 0


def test_an_open_image_is_detached_and_reads_on(mount: Mount) -> None:
    _warm(mount, "vm.img", "other.img")
    with open(mount.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        done = mount.run("evict", "vm.img")
        assert done.returncode == 0, done.stderr
        check_stamps(guest.read(BLOCK), 0, 0)
        os.pwrite(guest.fileno(), stamped(0, 0, 512, 2), 0)
        assert mount.image("vm.img")["detached"] is True
        assert mount.image("vm.img")["cached_blocks"] == 0
    assert check_stamps((mount.origin / "vm.img").read_bytes(), 0, 0)[0] == 2
    check_stamps((mount.mountpoint / "vm.img").read_bytes(), 0, 0)
    assert mount.image("vm.img")["cached_blocks"] == 1


def test_flush_brings_images_or_all_to_the_origin(mount: Mount) -> None:
    _warm(mount, "a.img", "b.img")
    with open(mount.mountpoint / "a.img", "r+b", buffering=0) as guest:
        guest.write(stamped(0, 0, BLOCK, 2))
        assert mount.run("flush", "a.img").stdout == "flushed 1 image\n"
        assert mount.run("flush").stdout == "flushed 2 images\n"
    assert mount.image("a.img")["cached_blocks"] == 1


def test_a_name_in_several_mounts_is_an_error_that_lists_them(make_mount: MakeMount) -> None:
    one, two = make_mount("one"), make_mount("two")
    _warm(one, "vm.img", "only1.img")
    _warm(two, "vm.img", "only2.img")
    sentence = refused(one.run("evict", "vm.img"), "several mounts", "-m")
    assert str(one.mountpoint) in sentence and str(two.mountpoint) in sentence
    refused(one.run("evict", "none.img"), "'none.img'", str(two.mountpoint))
    refused(one.run("evict", "--all"), "several mounts", "-m", str(one.mountpoint))
    refused(one.run("flush"), "several mounts", "-m")
    assert one.run("evict", "only2.img").returncode == 0
    assert [image["path"] for image in two.status()["images"]] == ["vm.img"]
    assert one.run("evict", "vm.img", "-m", two.mountpoint).returncode == 0
    assert two.status()["images"] == []
    assert len(one.status()["images"]) == 2
    assert one.run("evict", one.mountpoint / "vm.img").returncode == 0
    assert one.run("evict", "only1.img", cwd=one.mountpoint).returncode == 0
    assert one.status()["images"] == []
    refused(one.run("evict", "vm.img", "-m", one.base), "No fusecache is mounted at")


def test_two_mounts_of_one_origin_are_told_apart(make_mount: MakeMount) -> None:
    one, two = make_mount("one"), make_mount("two")
    two.origin = one.origin
    _warm(one, "vm.img")
    _warm(two, "vm.img")
    refused(one.run("evict", one.origin / "vm.img"), "several mounts", "-m")
    refused(one.run("evict", "vm.img", cwd=one.origin), "several mounts", "-m")
    assert one.run("evict", one.mountpoint / "vm.img").returncode == 0
    assert two.image("vm.img")["cached_blocks"] == 1


def test_without_a_daemon_evict_and_flush_say_so(mount: Mount) -> None:
    for verb in (("evict", "vm.img"), ("evict", "--all"), ("flush",), ("status", "vm.img")):
        refused(mount.run(*verb), "No fusecache daemon is running", "fusecache mount")
    refused(mount.run("status", "-m", mount.mountpoint), "No fusecache is mounted at")


def test_a_name_that_is_not_utf8_works_in_every_verb(mount: Mount) -> None:
    name = os.fsdecode(b"vm\xff%.img")
    _warm(mount, name)
    (image,) = mount.status()["images"]
    assert (image["path"], image["path_escaped"]) == ("vm%FF%25.img", True)
    done = mount.run("status", "-m", mount.mountpoint)
    assert done.returncode == 0 and "vm%FF%25.img" in done.stdout
    assert mount.run("flush", name).returncode == 0
    assert mount.run("evict", mount.mountpoint / name).returncode == 0
    refused(mount.run("evict", os.fsdecode(b"none\xff")), "none")


def test_a_path_from_the_current_directory_that_leads_below_a_mount(mount: Mount) -> None:
    _warm(mount, "vm.img", "sub/vm.img")
    (mount.base / "sub").mkdir()
    (mount.base / "sub" / "cached").symlink_to(mount.mountpoint)
    for name, cwd in (
        ("mnt/sub/vm.img", mount.base),
        ("./origin/sub/vm.img", mount.base),
        ("../mnt/sub/vm.img", mount.base / "sub"),
        ("cached/sub/vm.img", mount.base / "sub"),
        ("sub/vm.img", mount.base / "sub"),
        ("sub/vm.img", mount.base),
    ):
        _evicted(mount, name, cwd)
        (left,) = mount.status()["images"]
        assert left["path"] == "vm.img", (name, cwd)
    refused(mount.run("evict", "mnt/none.img", cwd=mount.base), "no image 'none.img'")
    refused(mount.run("evict", "mnt", cwd=mount.base), "the whole mount")


def test_a_name_that_is_an_image_from_here_and_another_from_the_root_is_refused(
    mount: Mount,
) -> None:
    _warm(mount, "vm.img", "mnt/vm.img", "mnt/other.img")
    for verb in ("evict", "flush", "status"):
        done = mount.run(verb, "mnt/vm.img", cwd=mount.base)
        refused(
            done, "'mnt/vm.img'", f"{mount.mountpoint}/vm.img", f"{mount.mountpoint}/mnt/vm.img"
        )
    done = mount.run("evict", "mnt/other.img", cwd=mount.base)
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 1 blocks\n"), done.stderr
    (mount.base / "twice.img").symlink_to(mount.mountpoint / "vm.img")
    (mount.origin / "twice.img").symlink_to("vm.img")
    done = mount.run("evict", "twice.img", cwd=mount.base)
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 1 blocks\n"), done.stderr
    assert [image["path"] for image in mount.status()["images"]] == ["mnt/vm.img"]
    mount.stop()


def test_several_mounts_and_a_path_from_the_current_directory(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    one, two = make_mount("one"), make_mount("two")
    _warm(one, "vm.img")
    _warm(two, "vm.img")
    assert one.run("evict", "two/mnt/vm.img", cwd=tmp_path).returncode == 0
    assert one.run("evict", "mnt/vm.img", cwd=one.base).returncode == 0
    assert one.status()["images"] == two.status()["images"] == []
