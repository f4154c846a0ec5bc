"""Configuration files: what is refused, rules for images, and what a reload does to a mount."""

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.cli import config_file
from tests.e2e.conftest import MakeFaulty
from tests.e2e.helpers import refused, wait_for
from tests.support.daemon import BLOCK, Mount, cleaned_up
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


class Configured(Mount):
    """A mount by a file alone."""

    @property
    def file(self) -> Path:
        """The configuration file."""
        return self.base / "mount.toml"

    def configure(self, *lines: str) -> "Configured":
        """Writes the file: what every mount needs, and these lines."""
        always = [f'origin = "{self.origin}"', f'mountpoint = "{self.mountpoint}"']
        always += [f'cache = "{self.cache}"', f'size = "{self.size}"']
        self.file.write_text("\n".join([*always, *lines]) + "\n")
        return self

    def arguments(self) -> list[object]:
        """Of ``fusecache mount``."""
        return ["--config", self.file]

    def reload(self) -> str:
        """``fusecache reload``, which must work; gives what it said."""
        done = self.run("reload", self.mountpoint)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def version(self, name: str, blocks: int = 8) -> set[int]:
        """Which version of image 1 lies on the origin, all of whose stamps must be right."""
        return versions((self.origin / name).read_bytes()[: blocks * BLOCK])


def versions(data: bytes) -> set[int]:
    """Of all stamps in ``data``, which must be of image 1 from its beginning."""
    return set(check_stamps(data, 1, 0))


def rule(pattern: str, **says: str) -> str:
    """A ``[[image]]`` table."""
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in says.items()]
    return "\n".join(["[[image]]", f'pattern = "{pattern}"', *lines])


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Configured]:
    """Not started; cleaned up in the end."""
    with cleaned_up(Configured(tmp_path / "fc")) as made:
        yield made


def write(path: Path, version: int, blocks: int = 8) -> None:
    """All of image 1, in this version, without making the file anew."""
    with open(path, "r+b") as file:
        file.write(stamped(1, 0, blocks * BLOCK, version))


# -- the file --------------------------------------------------------------------------------------


def test_check_says_everything_that_is_wrong_and_mount_refuses_the_same(
    configured: Configured,
) -> None:
    configured.configure(
        'wirte-mode = "back"',
        "dirty_age = 30",
        "dirty-limit = 95",
        'readahead = "much"',
        'db = "cache.sqlite"',
        rule("*.iso", bypas="true"),
        rule("a", write_mode='"back"', bypass="true"),
        rule("b"),
        "[[image]]",
    )
    done = configured.run("config", "check", configured.file)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert all(line.startswith(f"fusecache: {configured.file}: ") for line in said)
    words = (
        "is it 'write-mode'?", "is it 'dirty-age'?", "'dirty-limit' 95", "'readahead' much", "'db'",
        "number 1: 'bypas': there is no such setting; is it 'bypass'?", "number 2: bypass and",
        "number 3: it says nothing", "number 4: it needs a pattern",
    )  # fmt: skip
    for word in words:
        assert sum(word in line for line in said) == 1, (word, said)
    refused(configured.run("mount", "--config", configured.file), *words, code=2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"\xff\xfe", "is not TOML"),
        (b"cache = ", "is not TOML"),
        (b"x" * (1 << 20) + b"yy", "larger than 1 MiB"),
        (None, "cannot be read: No such file"),
        (b"image = 7", "[[image]]"),
        (b"cache = 7", "'cache' must be a string"),
        (b'cache = "sdb"', "not a whole path"),
        (b'write-mode = ["back"]', "'write-mode' must be one of"),
        (b"dirty-age = true", "not a number"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, text: bytes | None, word: str
) -> None:
    file = tmp_path / "mount.toml"
    if text is not None:
        file.write_bytes(text)
    (sentence,) = config_file.read(file).wrong
    assert word in sentence


def test_a_file_names_everything_and_options_win(configured: Configured) -> None:
    configured.configure('write-mode = "around"', 'log-level = "warning"')
    assert "in order" in configured.run("config", "check", configured.file).stdout
    done = configured.run("mount", "--config", configured.file, "--write-mode", "back")
    assert done.returncode == 0, done.stderr
    assert configured.status()["write_mode"] == "back"
    assert "serving" not in configured.log(), "log-level is warning"
    configured.stop()
    refused(configured.run("mount", "--cache", configured.cache), "what to show", code=2)


# -- rules -----------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_holds_and_an_images_own_mode_wins(
    configured: Configured,
) -> None:
    configured.configure(
        rule("a*.img", write_mode='"back"'),
        rule("*.img", write_mode='"around"'),
        rule("sub/*", bypass="true"),
    )
    (configured.origin / "sub").mkdir()
    names = ["a1.img", "b.img", "c.raw", "sub/d.raw", "sub/own.raw"]
    for name in names:
        (configured.origin / name).write_bytes(stamped(1, 0, BLOCK, 1))
    configured.start()
    assert configured.run("set", "sub/own.raw", "--write-mode", "through").returncode == 0
    with contextlib.ExitStack() as opened:
        for name in names:
            file = opened.enter_context(open(configured.mountpoint / name, "rb"))
            assert versions(file.read()) == {1}
        seen = {image["path"]: image for image in configured.status()["images"]}
        modes = {name: image["write_mode"] for name, image in seen.items()}
        assert [modes[name] for name in names] == ["back", "around"] + ["through"] * 3
        assert [name for name in names if seen[name]["bypassed"]] == ["sub/d.raw"]
        assert [name for name in names if not seen[name]["cached_bytes"]] == ["sub/d.raw"]
    assert configured.run("set", "sub/own.raw", "--write-mode", "default").returncode == 0
    wait_for(
        lambda: "sub/own.raw" not in {i["path"] for i in configured.status()["images"]},
        "what the rule says is done",
    )


def test_a_bypassed_image_is_read_and_written_on_the_origin_alone(configured: Configured) -> None:
    configured.configure('write-mode = "back"', rule("*.iso", bypass="true"))
    image, behind = configured.mountpoint / "vm.iso", configured.origin / "vm.iso"
    behind.write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    configured.start()
    fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    try:
        assert versions(_direct(fd)) == {1}
        write(behind, 2)
        assert versions(_direct(fd)) == {2}, "another host's change is seen at once"
        write(image, 3)
        assert configured.version("vm.iso") == {3}
        status = configured.image("vm.iso")
        assert status["bypassed"] and status["cached_bytes"] == status["dirty_bytes"] == 0
        os.truncate(image, 4 * BLOCK)
        assert behind.stat().st_size == 4 * BLOCK
    finally:
        os.close(fd)
    assert versions(image.read_bytes()) == {3}
    assert configured.status()["cache"]["slots_used"] == 0
    image.unlink()
    assert not behind.exists()


def _direct(fd: int) -> bytes:
    with mmap.mmap(-1, 8 * BLOCK) as buffer:
        count = os.preadv(fd, [buffer], 0)
        return buffer[:count]


def test_a_rule_that_comes_to_bypass_brings_dirty_data_home_first(configured: Configured) -> None:
    before = ('write-mode = "back"', "dirty-age = 3600")
    configured.configure(*before)
    image = configured.mountpoint / "vm.img"
    (configured.origin / "vm.img").write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    configured.start()
    with open(image, "r+b", buffering=0) as guest:
        guest.write(stamped(1, 0, 8 * BLOCK, 2))
        assert configured.version("vm.img") == {1}
        assert "bypass" in configured.configure(*before, rule("vm.*", bypass="true")).reload()
        wait_for(lambda: configured.image("vm.img")["bypassed"], "the image is bypassed")
        assert configured.version("vm.img") == {2}
        assert configured.status()["cache"]["slots_used"] == 0
        guest.seek(0)
        guest.write(stamped(1, 0, 8 * BLOCK, 3))
        assert configured.version("vm.img") == {3}
        guest.seek(0)
        assert versions(guest.read(8 * BLOCK)) == {3}
    # And back: cached and dirty again, from the next open on.
    assert "none" in configured.configure(*before).reload()
    write(image, 4)
    assert configured.version("vm.img") == {3}
    assert versions(image.read_bytes()) == {4}
    configured.stop()
    assert configured.version("vm.img") == {4}


def test_dirty_data_of_an_earlier_life_goes_home_before_a_rule_bypasses_it(
    configured: Configured,
) -> None:
    configured.configure('write-mode = "back"', "dirty-age = 3600")
    (configured.origin / "vm.img").write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    configured.start()
    write(configured.mountpoint / "vm.img", 2)
    configured.kill()
    configured.configure('write-mode = "back"', rule("*.img", bypass="true")).start()
    wait_for(lambda: configured.version("vm.img") == {2}, "the data is on the origin")
    wait_for(lambda: configured.status()["cache"]["slots_used"] == 0, "nothing is cached")
    assert versions((configured.mountpoint / "vm.img").read_bytes()) == {2}


def test_while_the_origin_fails_an_image_stays_cached_whatever_a_rule_says(
    make_faulty: MakeFaulty,
) -> None:
    faulty = make_faulty("fc")
    file = faulty.base / "rules.toml"
    file.write_text("")
    faulty.options["config"] = str(file)
    (faulty.origin / "vm.img").write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    faulty.start()
    write(faulty.mountpoint / "vm.img", 2)
    with faulty.fault("fail-write"):
        file.write_text(rule("*", bypass="true"))
        assert faulty.run("reload").returncode == 0
        wait_for(lambda: "event=rule-waits" in faulty.log(), "it is logged")
        assert faulty.image("vm.img")["dirty_bytes"] == 8 * BLOCK
        assert versions((faulty.mountpoint / "vm.img").read_bytes()) == {2}
        assert versions((faulty.origin / "vm.img").read_bytes()) == {1}
    wait_for(lambda: faulty.status()["cache"]["slots_used"] == 0, "nothing is cached", 30)
    assert versions((faulty.origin / "vm.img").read_bytes()) == {2}


# -- reload ----------------------------------------------------------------------------------------


def test_changed_ages_rates_and_readahead_take_effect_on_the_running_mount(
    configured: Configured,
) -> None:
    configured.configure('write-mode = "back"', "dirty-age = 3600", 'readahead = "0"')
    for name in ("vm.img", "cold1.img", "cold2.img"):
        (configured.origin / name).write_bytes(stamped(1, 0, 32 * BLOCK, 1))
    configured.start()
    write(configured.mountpoint / "vm.img", 2)
    _read_in_order(configured.mountpoint / "cold1.img")
    assert configured.image("cold1.img")["read_ahead_bytes"] == 0
    said = configured.configure('write-mode = "back"', "dirty-age = 1").reload()
    assert "dirty-age: 3600 s -> 1 s" in said and "readahead: nothing -> 2.0 MiB" in said
    wait_for(lambda: configured.version("vm.img") == {2}, "the data is written back")
    _read_in_order(configured.mountpoint / "cold2.img")
    assert configured.image("cold2.img")["read_ahead_bytes"] > 0


def _read_in_order(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            for block in range(16):
                assert os.preadv(fd, [buffer], block * BLOCK) == BLOCK
    finally:
        os.close(fd)


def test_a_changed_dirty_limit_and_clean_rate_hold_at_once(configured: Configured) -> None:
    """Of 64 blocks 1 percent is 1 block: what is more goes through."""
    configured.size = "5M"
    before = ('write-mode = "back"', "dirty-age = 3600", 'block-size = "64K"')
    configured.configure(*before, 'dirty-limit = "80%"')
    (configured.origin / "vm.img").write_bytes(stamped(1, 0, 32 * BLOCK, 1))
    configured.start()
    write(configured.mountpoint / "vm.img", 2, 4)
    assert configured.image("vm.img")["dirty_bytes"] == 4 * BLOCK
    said = configured.configure(*before, "dirty-limit = 1", 'clean-rate = "1M"').reload()
    assert "dirty-limit: 80 % -> 1 %" in said and "clean-rate: no limit -> 1.0 MiB/s" in said
    with open(configured.mountpoint / "vm.img", "r+b") as file:
        file.seek(8 * BLOCK)
        file.write(stamped(1, 8 * BLOCK, 8 * BLOCK, 2))
    assert configured.image("vm.img")["dirty_bytes"] <= 4 * BLOCK
    behind = (configured.origin / "vm.img").read_bytes()[8 * BLOCK : 16 * BLOCK]
    assert set(check_stamps(behind, 1, 8 * BLOCK)) == {2}


def test_a_reload_says_what_needs_a_restart(configured: Configured) -> None:
    configured.configure().start()
    text = configured.file.read_text().replace('"64M"', '"32M"')
    configured.file.write_text(f'{text}options = ["ro"]\nblock-size = "4K"\ndirty-age = 7\n')
    done = configured.run("reload", "--pid", configured.pid)
    assert done.returncode == 0 and done.stdout == "dirty-age: 30 s -> 7 s\n"
    for name in ("size", "options", "block-size"):
        assert f"fusecache: {name} needs a restart" in done.stderr
    again = configured.run("reload")
    assert again.stdout == "" and again.stderr == done.stderr, "until then it is said each time"


def test_a_broken_file_changes_nothing_and_sighup_does_the_same(configured: Configured) -> None:
    configured.configure("dirty-age = 20").start()
    configured.file.write_text("dirty-age = 1\nchace = 2\n")
    refused(configured.run("reload"), "Nothing was changed", "is it 'cache'?")
    assert configured.pid is not None
    os.kill(configured.pid, signal.SIGHUP)
    wait_for(lambda: configured.log().count("event=reload-failed") == 2, "the log says so")
    configured.file.unlink()
    refused(configured.run("reload"), "Nothing was changed", "No such file")
    configured.configure("dirty-age = 5")
    os.kill(configured.pid, signal.SIGHUP)
    wait_for(lambda: "dirty-age: 20 s -> 5 s" in configured.log(), "it is applied")
    assert configured.reload() == "nothing has changed\n"


def test_without_a_file_there_is_nothing_to_reload(mount: Mount) -> None:
    mount.start()
    refused(mount.run("reload", mount.mountpoint), "without --config")
    refused(mount.run("reload", "--pid", 1), "No fusecache daemon has the pid 1")
    assert mount.pid is not None
    os.kill(mount.pid, signal.SIGHUP)
    wait_for(lambda: mount.log().count("event=reload-failed") == 2, "the log says so")
    assert mount.status()["state"] == "serving"


def test_the_log_level_changes_while_the_mount_runs(configured: Configured) -> None:
    configured.configure().start()
    assert configured.run("log-level", "error").stdout == "log level: info -> error\n"
    configured.configure("dirty-age = 5").reload()
    assert "dirty-age" not in configured.log()
    assert configured.run("log-level", "debug", configured.mountpoint).returncode == 0
    configured.configure("dirty-age = 6", 'log-level = "info"').reload()
    assert "dirty-age: 5 s -> 6 s" in configured.log()
    refused(configured.run("log-level", "loud"), "loud", code=2)
