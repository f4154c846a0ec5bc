"""Names that are no image's: links lead to one, and whatever else is there is refused."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeMount
from tests.e2e.dirty import dirty_mount, on_origin
from tests.e2e.helpers import refused
from tests.support.daemon import BLOCK, Mount

pytestmark = pytest.mark.mount

VERBS = (("evict",), ("evict", "--discard-dirty"), ("flush",), ("status",))
EVICTED = "evicted 1 image, 4 blocks\n"


@pytest.fixture
def dirty(mount: Mount) -> Mount:
    """Two images with dirty data, ``d1/a.img`` and ``vm2.img``, in write-back."""
    (mount.origin / "d1").mkdir()
    return dirty_mount(mount, "d1/a.img", "vm2.img")


def _dirty_bytes(mount: Mount) -> int:
    return int(mount.status()["cache"]["dirty_bytes"])


def test_a_directory_is_refused_and_what_is_in_it_stays(dirty: Mount) -> None:
    for verb in VERBS:
        for name in ("d1", "d1/", dirty.mountpoint / "d1", dirty.origin / "d1"):
            refused(dirty.run(*verb, name), "'d1' is a directory: name an image")
    for name in (".", "d1/..", dirty.mountpoint, dirty.origin, f"{dirty.origin}/"):
        refused(dirty.run("evict", name), "the whole mount", "evict --all")
    refused(dirty.run("evict", ".", cwd=dirty.mountpoint / "d1"), "'d1' is a directory")
    refused(dirty.run("set", "d1", "--write-mode", "back"), "'d1' is a directory")
    assert _dirty_bytes(dirty) == 8 * BLOCK
    dirty.stop()


def test_an_empty_name_is_wrong_usage(dirty: Mount) -> None:
    for verb in VERBS:
        refused(dirty.run(*verb, ""), "empty name", code=2)
    refused(dirty.run("set", "", "--write-mode", "back"), "empty name", code=2)
    refused(dirty.run("evict", "vm2.img", ""), "empty name", code=2)
    assert _dirty_bytes(dirty) == 8 * BLOCK
    dirty.stop()
    for verb in ("evict", "flush"):
        refused(dirty.run(verb, "", "--cache", dirty.cache), "empty name", code=2)


def test_what_is_neither_a_file_nor_a_directory_is_refused(dirty: Mount) -> None:
    os.mkfifo(dirty.origin / "pipe")
    for verb in ("evict", "flush", "status"):
        refused(dirty.run(verb, "pipe"), "'pipe' is not a regular file: name an image")
    dirty.stop()


@pytest.mark.parametrize(
    "target", ["a.img", "../d1/./a.img", "{origin}/d1/a.img", "{mnt}/d1/a.img"]
)
def test_a_link_to_an_image_is_that_image(dirty: Mount, target: str) -> None:
    link = dirty.origin / "d1" / "link.img"
    link.symlink_to(target.format(origin=dirty.origin, mnt=dirty.mountpoint))
    (dirty.origin / "other.img").symlink_to("d1/link.img")
    (dirty.origin / "d2").symlink_to("d1")
    for name in ("d1/link.img", "other.img", "d2/a.img", "d2/link.img"):
        assert "d1/a.img" in dirty.run("status", name).stdout
    done = dirty.run("evict", dirty.mountpoint / "other.img")
    assert (done.returncode, done.stdout) == (0, EVICTED), done.stderr
    assert on_origin(dirty, "d1/a.img", 1) == 2
    assert _dirty_bytes(dirty) == 4 * BLOCK
    dirty.stop()


def test_a_link_to_an_image_is_that_image_without_a_daemon(dirty: Mount) -> None:
    (dirty.origin / "link.img").symlink_to("d1/a.img")
    (dirty.origin / "out.img").symlink_to("/etc/passwd")
    dirty.stop("--keep-dirty")
    cache = ("--cache", dirty.cache)
    for verb in ("evict", "flush"):
        refused(dirty.run(verb, "d1", *cache), "'d1' is a directory: name an image")
        refused(dirty.run(verb, "out.img", *cache), "'out.img'", "/etc/passwd", "outside")
        refused(dirty.run(verb, dirty.mountpoint, *cache), "the whole mount")
    done = dirty.run("evict", dirty.origin / "link.img", *cache)
    assert (done.returncode, done.stdout) == (0, EVICTED), done.stderr
    assert on_origin(dirty, "d1/a.img", 1) == 2 and on_origin(dirty, "vm2.img", 2) == 1


def test_set_by_a_link_is_of_the_image_also_if_nobody_has_opened_it(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(bytes(BLOCK))
    (mount.origin / "link.img").symlink_to("vm.img")
    mount.start()
    done = mount.run("set", "link.img", "--write-mode", "around")
    assert done.returncode == 0, done.stderr
    (image,) = mount.status()["images"]
    assert (image["path"], image["write_mode"]) == ("vm.img", "around")
    mount.stop()


def test_a_link_that_leads_out_of_the_origin_is_refused(dirty: Mount) -> None:
    outside = dirty.base / "outside.img"
    outside.write_bytes(b"x")
    for name, target in (("abs", outside), ("rel", "../outside.img"), ("dir", dirty.base)):
        (dirty.origin / name).symlink_to(target)
    for verb in VERBS:
        for name in ("abs", "rel", dirty.mountpoint / "dir" / "outside.img"):
            refused(dirty.run(*verb, name), "a link that leads outside", str(outside))
    assert _dirty_bytes(dirty) == 8 * BLOCK
    dirty.stop()


def test_links_in_a_circle_or_to_nothing_are_refused(dirty: Mount) -> None:
    (dirty.origin / "one").symlink_to("two")
    (dirty.origin / "two").symlink_to("one")
    (dirty.origin / "dangling").symlink_to("none.img")
    refused(dirty.run("evict", "one"), "'one'", "too many links")
    refused(dirty.run("evict", ".."), "no image '..'")
    refused(dirty.run("evict", "dangling"), "no image 'dangling'")
    dirty.stop()


def test_a_link_to_an_image_that_is_gone_is_that_image_while_it_is_cached(dirty: Mount) -> None:
    (dirty.origin / "link.img").symlink_to("vm2.img")
    (dirty.origin / "vm2.img").unlink()
    done = dirty.run("evict", "link.img", "--discard-dirty")
    assert (done.returncode, done.stdout) == (0, EVICTED), done.stderr
    assert [image["path"] for image in dirty.status()["images"]] == ["d1/a.img"]
    dirty.stop()


def test_an_image_whose_place_something_else_has_taken_can_still_be_evicted(dirty: Mount) -> None:
    (dirty.origin / "vm2.img").unlink()
    (dirty.origin / "vm2.img").mkdir()
    done = dirty.run("evict", "vm2.img", "--discard-dirty")
    assert (done.returncode, done.stdout) == (0, EVICTED), done.stderr
    refused(dirty.run("evict", "vm2.img"), "'vm2.img' is a directory")
    dirty.stop()


def test_a_link_from_elsewhere_and_one_by_another_name_of_the_origin(dirty: Mount) -> None:
    alias, link = dirty.base / "alias", dirty.base / "link.img"
    alias.symlink_to(dirty.origin)
    (dirty.origin / "via.img").symlink_to(alias / "d1" / "a.img")
    link.symlink_to(dirty.mountpoint / "via.img")
    done = dirty.run("evict", link)
    assert (done.returncode, done.stdout) == (0, EVICTED), done.stderr
    assert on_origin(dirty, "d1/a.img", 1) == 2
    dirty.stop()


def test_a_directory_in_one_mount_is_no_image_of_that_name_in_another(
    make_mount: MakeMount,
) -> None:
    one, two = make_mount("one"), make_mount("two")
    (one.origin / "vm.img").mkdir()
    (one.origin / "d1").mkdir()
    (two.origin / "vm.img").write_bytes(bytes(BLOCK))
    one.start()
    two.start()
    Path(two.mountpoint / "vm.img").read_bytes()
    done = one.run("evict", "vm.img")
    assert (done.returncode, done.stdout) == (0, "evicted 1 image, 1 blocks\n"), done.stderr
    refused(one.run("evict", "d1"), "'d1' is a directory")


def test_control_characters_of_names_do_not_reach_the_terminal(mount: Mount) -> None:
    mount.start()
    name = "no\x1b[31mpe\r\nx"
    (mount.origin / name).mkdir()
    for verb in (("evict",), ("status",), ("set", "--write-mode", "back"), ("flush",)):
        for wrong in (name, f"{name}/none", f"/{name}"):
            assert "no�[31mpe��x" in refused(mount.run(*verb, wrong))
    refused(mount.run("umount", f"/{name}"), "no�[31mpe��x")
    assert "\x1b" not in refused(mount.run(f"--{name}"), code=2)
    mount.stop()
    refused(mount.run("evict", name, "--cache", mount.cache), "no�[31mpe��x")


def test_control_characters_of_an_image_that_was_not_evicted(mount: Mount) -> None:
    name = "vm\x1b[31m\n.img"
    dirty_mount(mount, name).stop("--keep-dirty")
    (mount.origin / name).rename(mount.base / "away")
    done = mount.run("evict", "--all", "--cache", mount.cache)
    refused(done, "'vm�[31m�.img' was not evicted")


def test_a_name_that_begins_with_a_dash(mount: Mount) -> None:
    (mount.origin / "-dash.img").write_bytes(bytes(BLOCK))
    mount.start()
    for verb in ("evict", "flush", "status"):
        refused(mount.run(verb, "-dash.img"), "./-dash.img", f"fusecache {verb} --help", code=2)
        for words in (("./-dash.img",), ("--", "-dash.img")):
            (mount.mountpoint / "-dash.img").read_bytes()
            assert mount.run(verb, *words).returncode == 0
    assert "./" not in refused(mount.run("evict", "--al"), "--al", code=2)
    mount.stop()


def test_a_missing_word_of_several_is_said_in_one_line(mount: Mount) -> None:
    refused(mount.run("log-level"), "debug", code=2)
