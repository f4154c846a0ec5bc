"""``fusecache mount``: when it returns, what it keeps, and what it takes."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.helpers import (
    COMMAND,
    environment,
    is_mounted,
    nothing_left,
    process,
    refused,
    refused_mount,
    wait_for,
)
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def test_mount_returns_when_it_serves_and_prints_nothing(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    done = mount.run("mount", *mount.arguments())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_stamps((mount.mountpoint / "vm.img").read_bytes(), 1, 0)
    assert mount.status()["state"] == "serving"


def test_mount_in_a_command_substitution_returns(mount: Mount) -> None:
    words = shlex.join([*COMMAND, "mount", *map(str, mount.arguments())])
    done = subprocess.run(
        ["sh", "-c", f"x=$({words} 2>&1); echo \"$?:$x\""],
        capture_output=True, text=True, timeout=30, env=environment(mount), check=False,
    )  # fmt: skip
    assert done.stdout == "0:\n"


def test_the_daemon_holds_none_of_the_callers_descriptors(mount: Mount) -> None:
    pipes = [os.pipe() for _ in range(4)]
    (stdin, _), (_, stdout), (_, stderr), (_, extra) = pipes
    try:
        done = subprocess.run(
            [*COMMAND, "mount", *map(str, mount.arguments())],
            stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=[extra],
            timeout=30, env=environment(mount), check=False,
        )  # fmt: skip
        assert done.returncode == 0
        os.close(stdin)
        for fd in (stdout, stderr, extra):
            os.close(fd)
        for reader, _ in pipes[1:]:
            os.set_blocking(reader, False)
            assert os.read(reader, 1) == b"", "somebody still has the other end"
        with pytest.raises(BrokenPipeError):
            os.write(pipes[0][1], b"x")
    finally:
        for fd in (pipes[0][1], *(reader for reader, _ in pipes[1:])):
            os.close(fd)
    pid = mount.status()["pid"]
    names = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert not [name for name in names if name.startswith("pipe:") and name in _pipes_of_us()]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid


def _pipes_of_us() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    return {name for name in found if name.startswith("pipe:")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_front_it_serves_until_a_signal_and_ends_cleanly(
    mount: Mount, number: signal.Signals
) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    command = [*COMMAND, "mount", "-f", *mount.arguments()]
    with process(*command, env=environment(mount), stderr=subprocess.PIPE) as daemon:
        wait_for(lambda: is_mounted(mount.mountpoint), "the mount")
        check_stamps((mount.mountpoint / "vm.img").read_bytes(), 1, 0)
        assert mount.status()["pid"] == daemon.pid
        daemon.send_signal(number)
        _, said = daemon.communicate(timeout=20)
        assert daemon.returncode == 0, said
        assert b"Traceback" not in said
    nothing_left(mount)
    mount.start()
    assert "recovering" not in mount.log()
    assert mount.image("vm.img")["cached_bytes"] == BLOCK


def test_in_front_a_refusal_is_said_once(mount: Mount) -> None:
    mount.origin.rmdir()
    refused(mount.run("mount", "-f", *mount.arguments()), "does not exist")
    mount.origin.mkdir()
    mount.cache.write_bytes(b"data" * (1 << 20))
    refused(mount.run("mount", "-f", *mount.arguments()), "format")
    nothing_left(mount)


def test_an_empty_file_is_formatted_and_any_other_refused(mount: Mount) -> None:
    mount.cache.write_bytes(bytes(8 << 20))
    done = mount.run("mount", mount.origin, mount.mountpoint, "--cache", mount.cache)
    assert done.returncode == 0, done.stderr
    status = mount.status()["cache"]
    assert status["slots_total"] == 7 * 16
    assert status["path"] == str(mount.cache)
    mount.stop()


@pytest.mark.parametrize("block_size", [4096, 1 << 20])
def test_the_smallest_and_the_largest_block_size_work(mount: Mount, block_size: int) -> None:
    mount.options["block_size"] = f"{block_size >> 10}K"
    image = mount.origin / "vm.img"
    image.write_bytes(stamped(1, 0, 3 << 20, 1))
    mount.start()
    assert mount.status()["block_size"] == block_size
    with open(mount.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        assert set(check_stamps(guest.read(3 << 20), 1, 0)) == {1}
        for offset, length in ((512, 1024), (4096, 4096), ((1 << 20) - 512, 1024)):
            assert os.pwrite(guest.fileno(), stamped(1, offset, length, 2), offset) == length
        os.fsync(guest.fileno())
    expected = image.read_bytes()
    mount.stop()
    mount.start()
    assert (mount.mountpoint / "vm.img").read_bytes() == expected
    assert set(check_stamps(expected, 1, 0)) == {1, 2}


def test_write_around_goes_past_the_cache(mount: Mount) -> None:
    mount.options["write_mode"] = "around"
    image = mount.origin / "vm.img"
    image.write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    mount.start()
    path = mount.mountpoint / "vm.img"
    with open(path, "r+b", buffering=0) as guest:
        check_stamps(guest.read(4 * BLOCK), 1, 0)
        os.pwrite(guest.fileno(), stamped(1, BLOCK, BLOCK, 2), BLOCK)
        assert image.read_bytes()[BLOCK : 2 * BLOCK] == stamped(1, BLOCK, BLOCK, 2)
        assert mount.status()["write_mode"] == "around"
        assert mount.image("vm.img")["cached_bytes"] == 3 * BLOCK
    check_stamps(path.read_bytes(), 1, 0)
    assert path.read_bytes() == image.read_bytes()


def test_read_only_refuses_writes_and_reads_through_the_cache(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    done = mount.run("mount", *mount.arguments(), "-o", "ro,noatime")
    assert done.returncode == 0, done.stderr
    path = mount.mountpoint / "vm.img"
    with pytest.raises(OSError, match="Read-only"):
        path.open("r+b")
    with pytest.raises(OSError, match="Read-only"):
        (mount.mountpoint / "new").touch()
    check_stamps(path.read_bytes(), 1, 0)


def test_an_unknown_fuse_option_is_refused_in_libfuses_words(mount: Mount) -> None:
    done = mount.run("mount", *mount.arguments(), "-o", "nonsense")
    assert done.returncode == 1
    assert "nonsense" in done.stderr and done.stderr.count("fusecache: ") == 1
    assert "Traceback" not in done.stderr
    nothing_left(mount)


def test_sizes_take_letters_of_either_case(mount: Mount) -> None:
    for text, size in (("2048K", 2 << 20), ("3M", 3 << 20), ("4m", 4 << 20), ("5MiB", 5 << 20)):
        path = mount.base / text
        done = mount.run("format", path, "--size", text, "--block-size", "4k")
        assert done.returncode == 0, done.stderr
        assert path.stat().st_size == size
        path.unlink()
    refused(mount.run("format", mount.base / "big", "--size", "4000T"), "smaller --size")
    assert not (mount.base / "big").exists()
    done = mount.run("format", mount.base / "g", "--size", "20X")
    refused(done, "'20X' is not a size", "like 20G", code=2)


def test_a_configuration_file_has_the_same_names(mount: Mount) -> None:
    config = mount.base / "fc.toml"
    database = mount.base / "elsewhere.sqlite"
    config.write_text(
        f'cache = "{mount.cache}"\nsize = "4M"\nblock-size = "16K"\nwrite-mode = "around"\n'
        f'db = "{database}"\noptions = ["ro"]\n'
    )
    done = mount.run("mount", mount.origin, mount.mountpoint, "--config", config)
    assert done.returncode == 0, done.stderr
    status = mount.status()
    assert (status["block_size"], status["write_mode"]) == (16384, "around")
    assert database.exists() and not Path(f"{mount.cache}.sqlite").exists()
    with pytest.raises(OSError, match="Read-only"):
        (mount.mountpoint / "new").touch()
    mount.stop()
    done = mount.run(
        "mount", mount.origin, mount.mountpoint, "--config", config, "--write-mode", "through"
    )
    assert done.returncode == 0, done.stderr
    assert mount.status()["write_mode"] == "through"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('blocksize = "64K"', "'blocksize'"),
        ('write-mode = "back-and-forth"', "'write-mode'"),
        ("size = 20", "'size'"),
        ("options = [1]", "'options'"),
        ("this is not", "not TOML"),
        ('block-size = "3K"', "power of two"),
    ],
)
def test_a_wrong_configuration_file_is_refused(mount: Mount, text: str, word: str) -> None:
    config = mount.base / "fc.toml"
    config.write_text(text)
    refused_mount(mount, word, args=[*mount.arguments(), "--config", config], code=2)
    assert not mount.cache.exists()


def test_a_missing_configuration_file_is_refused(mount: Mount) -> None:
    args = [*mount.arguments(), "--config", mount.base / "none"]
    refused_mount(mount, "none", "No such file", args=args, code=2)


@pytest.mark.parametrize("verb", ["", "mount", "umount", "evict", "flush", "status", "format"])
def test_help_has_a_sentence_and_an_example(mount: Mount, verb: str) -> None:
    done = mount.run(*([verb] if verb else []), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"Example: fusecache {verb}".strip() in done.stdout
    sentence = done.stdout.split("\n\n")[1].strip()
    assert sentence[0].isupper() and sentence.endswith(".")


@pytest.mark.parametrize(
    "args", [["nonsense"], ["mount"], ["mount", "a", "b"], ["evict"], ["evict", "x", "--all"],
             ["status", "--nonsense"], ["umount"], ["mount", "a", "b", "--write-mode", "up"]],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_exit_code_2(mount: Mount, args: list[str]) -> None:
    refused(mount.run(*args), code=2)
