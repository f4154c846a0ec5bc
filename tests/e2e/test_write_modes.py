"""``mount --write-mode`` and ``set``: the modes of a mount and of single images."""

import errno
import os
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeFaulty, MakeMount
from tests.e2e.dirty import back, dirty_mount, images, on_origin, served, write
from tests.e2e.helpers import refused, refused_mount, wait_for
from tests.support.daemon import BLOCK, Mount

pytestmark = pytest.mark.mount


def _dirty(mount: Mount, name: str) -> int:
    return int(mount.image(name)["dirty_bytes"])


def test_write_back_acknowledges_before_the_origin_has_it_and_flush_brings_it_there(
    mount: Mount,
) -> None:
    dirty_mount(mount, "vm.img")
    status = mount.status()
    assert status["write_mode"] == "back" and status["flushing"] is None
    image = mount.image("vm.img")
    assert (image["dirty_bytes"], image["write_mode"]) == (4 * BLOCK, "back")
    assert 0 <= image["dirty_age"] < 60
    assert (image["lost"], image["unreadable"], image["clean_error"]) == ([], [], "")
    assert served(mount, "vm.img", 1) == 2
    assert "256.0 KiB dirty" in mount.run("status").stdout
    assert mount.run("flush", "vm.img").stdout == "flushed 1 image\n"
    assert on_origin(mount, "vm.img", 1) == 2
    image = mount.image("vm.img")
    assert (image["dirty_bytes"], image["dirty_age"]) == (0, None)
    mount.stop()


def test_dirty_data_goes_to_the_origin_by_age(mount: Mount) -> None:
    images(mount, "vm.img")
    mount.options |= {"write_mode": "back", "dirty_age": "1"}
    mount.start()
    write(mount, "vm.img", 1, 2)
    wait_for(lambda: _dirty(mount, "vm.img") == 0, "clean data")
    assert on_origin(mount, "vm.img", 1) == 2


def test_a_mode_set_while_mounted_holds_at_once_and_over_remounts(mount: Mount) -> None:
    images(mount, "vm1.img", "vm2.img")
    mount.options["dirty_age"] = "3600"
    mount.start()
    write(mount, "vm1.img", 1, 2)
    done = mount.run("set", "vm1.img", "--write-mode", "back")
    assert (done.returncode, done.stdout) == (0, "1 image: write-back\n"), done.stderr
    for number, name in enumerate(("vm1.img", "vm2.img"), 1):
        write(mount, name, number, 3)
    assert (on_origin(mount, "vm1.img", 1), on_origin(mount, "vm2.img", 2)) == (2, 3)
    assert mount.image("vm1.img")["write_mode"] == "back"
    assert mount.run("status").stdout.count("write-back") == 1
    mount.stop()
    assert on_origin(mount, "vm1.img", 1) == 3
    mount.start()
    write(mount, "vm1.img", 1, 4)
    assert on_origin(mount, "vm1.img", 1) == 3
    mount.kill()
    mount.start()
    assert served(mount, "vm1.img", 1) == 4
    write(mount, "vm1.img", 1, 5)
    assert _dirty(mount, "vm1.img") == 4 * BLOCK
    done = mount.run("set", "vm1.img", "--write-mode", "default")
    assert (done.returncode, done.stdout) == (0, "1 image: the mount's write mode\n")
    assert on_origin(mount, "vm1.img", 1) == 5
    assert mount.image("vm1.img")["write_mode"] == "through"
    mount.stop()


def test_an_image_that_was_never_opened_gets_a_mode_that_stays(mount: Mount) -> None:
    images(mount, "vm1.img", "vm2.img")
    mount.options["dirty_age"] = "3600"
    mount.start()
    done = mount.run("set", "vm1.img", mount.origin / "vm2.img", "--write-mode", "back")
    assert (done.returncode, done.stdout) == (0, "2 images: write-back\n"), done.stderr
    mount.stop()
    mount.start()
    write(mount, "vm2.img", 2, 2)
    assert _dirty(mount, "vm2.img") == 4 * BLOCK
    mount.stop()


@pytest.mark.parametrize("mode", ["through", "around"])
def test_leaving_write_back_flushes(mount: Mount, mode: str) -> None:
    dirty_mount(mount, "vm.img")
    assert mount.run("set", "vm.img", "--write-mode", mode).returncode == 0
    assert on_origin(mount, "vm.img", 1) == 2 and _dirty(mount, "vm.img") == 0
    write(mount, "vm.img", 1, 3)
    assert on_origin(mount, "vm.img", 1) == 3
    mount.stop()


def test_leaving_write_back_while_the_origin_fails_says_so_and_writes_through(
    make_faulty: MakeFaulty,
) -> None:
    mount = make_faulty("fc")
    dirty_mount(mount, "vm.img")
    with mount.fault("fail-write"):
        done = mount.run("set", "vm.img", "--write-mode", "through")
        refused(done, "'vm.img'", "injected", "256.0 KiB", "--discard-dirty")
        assert mount.image("vm.img")["write_mode"] == "through"
        assert served(mount, "vm.img", 1) == 2
    assert mount.run("set", "vm.img", "--write-mode", "through").returncode == 0
    assert on_origin(mount, "vm.img", 1) == 2
    mount.stop()


def test_set_refuses_what_is_no_image_and_what_is_no_mode(mount: Mount) -> None:
    images(mount, "vm.img")
    (mount.origin / "sub").mkdir()
    refused(mount.run("set", "vm.img", "--write-mode", "back"), "No fusecache daemon")
    mount.start()
    refused(mount.run("set", "none.img", "--write-mode", "back"), "'none.img'")
    refused(mount.run("set", "sub", "--write-mode", "back"), "'sub' is a directory")
    refused(mount.run("set", "vm.img", "--write-mode", "sideways"), "sideways", code=2)
    refused(mount.run("set", "vm.img"), "--write-mode", code=2)
    refused(mount.run("set", "--write-mode", "back"), "IMAGE", code=2)
    assert mount.status()["images"] == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("write-mode", "sideways"), ("dirty-age", "0"), ("dirty-age", "-3"), ("dirty-age", "soon"),
        ("dirty-age", "inf"), ("dirty-age", "nan"), ("dirty-age", "1e12"), ("dirty-limit", "0"),
        ("dirty-limit", "100"), ("dirty-limit", "half"), ("dirty-limit", ""), ("clean-rate", "0"),
        ("clean-rate", "fast"), ("clean-rate", "-1M"), ("readahead", "fast"),
        ("readahead", "1G"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant(mount: Mount, flag: str, value: str) -> None:
    refused_mount(mount, flag, args=[*mount.arguments(), f"--{flag}={value}"], code=2)
    config = mount.base / "fc.toml"
    config.write_text(f'{flag} = "{value}"\n')
    refused_mount(mount, flag, args=[*mount.arguments(), "--config", config], code=2)
    assert not mount.cache.exists()


def test_a_configuration_file_says_how_to_write_back(mount: Mount) -> None:
    images(mount, "vm.img")
    config = mount.base / "fc.toml"
    config.write_text(
        'write-mode = "back"\ndirty-age = 0.5\ndirty-limit = "20%"\nclean-rate = "50M"\n'
        'readahead = "0"\n'
    )
    mount.options["config"] = str(config)
    mount.start()
    assert mount.status()["write_mode"] == "back"
    write(mount, "vm.img", 1, 2)
    wait_for(lambda: _dirty(mount, "vm.img") == 0, "clean data")
    assert on_origin(mount, "vm.img", 1) == 2
    for text in ("dirty-age = true\n", "dirty-limit = [1]\n", "clean-rate = 50\n"):
        config.write_text(text)
        refused(mount.run("mount", *mount.arguments()), text.split()[0], code=2)


def _open_for_writing(path: Path) -> int:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_an_image_that_another_mount_has_is_not_opened_for_writing_until_it_is_evicted_there(
    make_mount: MakeMount,
) -> None:
    one, two = back(make_mount("one")), make_mount("two")
    two.origin = one.origin
    images(one, "vm.img")
    one.start()
    two.start()
    write(one, "vm.img", 1, 2)
    assert _open_for_writing(two.mountpoint / "vm.img") == errno.EBUSY
    assert "vm.img cannot be opened for writing: another host" in two.log()
    assert one.run("evict", one.mountpoint / "vm.img").returncode == 0
    assert on_origin(one, "vm.img", 1) == 2
    assert _open_for_writing(two.mountpoint / "vm.img") == 0
    assert served(two, "vm.img", 1) == 2
    write(two, "vm.img", 1, 3)
    two.stop()
    assert served(one, "vm.img", 1) == 3
    one.stop()
