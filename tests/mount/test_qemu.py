"""qemu-img and qemu-io on qcow2 and raw images through a real mount."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.modes import both_modes, home
from tests.support.daemon import BLOCK, old
from tests.support.direct import opened, read_direct
from tests.support.place import Place
from tests.support.qemu import held, refused_to_write
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

_MIB = 1 << 20


def _run(*command: object, code: int = 0) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, (command, done.stdout, done.stderr)
    assert "Pattern verification failed" not in done.stdout, (command, done.stdout)
    return done.stdout


def _io(path: Path, *commands: str, form: str, cache: str) -> str:
    parts = [part for command in commands for part in ("-c", command)]
    return _run("qemu-io", "-f", form, "-t", cache, *parts, path)


@both_modes
@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "directsync"])
@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_an_images_whole_life_with_qemu(place: Place, form: str, cache: str) -> None:
    path = place.cached / f"disk.{form}"
    _run("qemu-img", "create", "-f", form, path, "32M")
    assert json.loads(_run("qemu-img", "info", "--output=json", path))["virtual-size"] == 32 * _MIB
    _io(
        path,
        "write -P 0x11 0 4M",
        "write -P 0x22 1M 64k",
        "write -P 0x33 1049088 512",  # one sector in the middle of a block
        "aio_write -P 0x44 8M 1M",
        "aio_write -P 0x55 9M 1M",
        "aio_flush",
        "flush",
        form=form,
        cache=cache,
    )
    checks = (
        "read -P 0x11 0 1M",
        "read -P 0x22 1M 512",
        "read -P 0x33 1049088 512",
        "read -P 0x22 1049600 64512",
        "read -P 0x11 1114112 2M",
        "read -P 0x44 8M 1M",
        "read -P 0x55 9M 1M",
        "read -P 0 16M 1M",
    )
    _io(path, *checks, form=form, cache=cache)
    home(place, path.name)
    _io(place.origin / path.name, *checks, form=form, cache="writeback")
    _run("qemu-img", "resize", "-f", form, path, "48M")
    _io(path, *checks, "read -P 0 40M 1M", "write -P 0x66 47M 1M", form=form, cache=cache)
    if form == "qcow2":
        assert "No errors were found" in _run("qemu-img", "check", path)
        _run("qemu-img", "snapshot", "-c", "before", path)
        _io(path, "write -P 0x77 0 1M", form=form, cache=cache)
        _run("qemu-img", "snapshot", "-a", "before", path)
        _run("qemu-img", "check", path)
    _io(path, *checks, "read -P 0x66 47M 1M", form=form, cache=cache)
    _run("qemu-img", "resize", "-f", form, "--shrink", path, "16M")
    home(place, path.name)
    _run("qemu-img", "compare", "-f", form, "-F", form, path, place.origin / path.name)
    if form == "raw":
        assert path.stat().st_size == (place.origin / path.name).stat().st_size == 16 * _MIB


@both_modes
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_images_are_converted_to_and_fro_without_losing_a_byte(place: Place, cache: str) -> None:
    data = b"".join(
        stamped(1, at, _MIB, 1) if at // _MIB % 3 else bytes(_MIB)
        for at in range(0, 12 * _MIB, _MIB)
    )
    (place.origin / "first.raw").write_bytes(data)
    steps = (
        ("first.raw", "raw", "second.qcow2", "qcow2"),
        ("second.qcow2", "qcow2", "third.raw", "raw"),
    )
    for source, source_form, target, form in steps:
        _run(
            *("qemu-img", "convert", "-T", cache, "-t", cache, "-f", source_form, "-O", form),
            *(place.cached / source, place.cached / target),
        )
    assert (place.cached / "third.raw").read_bytes() == data
    assert home(place, "third.raw") == data
    _run("qemu-img", "check", place.cached / "second.qcow2")
    _run("qemu-img", "compare", "-T", cache, place.cached / "first.raw",
         place.cached / "second.qcow2")  # fmt: skip
    with opened(place.cached / "third.raw", os.O_WRONLY) as fd:
        os.pwrite(fd, b"x", 5 * _MIB)
    _run("qemu-img", "compare", place.cached / "first.raw", place.cached / "third.raw", code=1)


@both_modes
def test_a_qemu_that_has_an_image_open_keeps_others_from_writing_it(place: Place) -> None:
    path = place.cached / "disk.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", path, "4M")
    with held(path):
        assert refused_to_write(path)
    _io(path, "read -P 1 0 512", form="qcow2", cache="none")


def test_overlays_share_the_cached_blocks_of_their_base(place: Place) -> None:
    size = 8 * _MIB
    data = stamped(9, 0, size, 1)
    # A cache that other tests have filled may be too slow in making room to store every block.
    done = place.mount.run("evict", "--all", "-m", place.mount.mountpoint)
    assert done.returncode == 0, done.stderr
    (place.origin / "base.raw").write_bytes(data)
    old(place.origin / "base.raw")
    base = place.cached / "base.raw"
    reads = []
    for number in range(4):
        overlay = place.cached / f"vm{number}.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
        out = place.mount.base / f"out{number}.raw"
        _run("qemu-img", "convert", "-T", "none", "-O", "raw", overlay, out)
        assert out.read_bytes() == data
        out.unlink()
        status = place.image("base.raw")
        reads.append((status["origin_reads"], status["origin_read_bytes"]))
        _io(overlay, f"write -P {number + 1} 1M 64k", form="qcow2", cache="none")
    assert reads[0][1] == size
    assert len(set(reads)) == 1, "an overlay read the base from the origin again"
    for number in range(4):
        overlay = place.cached / f"vm{number}.qcow2"
        _io(overlay, f"read -P {number + 1} 1M 64k", form="qcow2", cache="none")
        _run("qemu-img", "check", overlay)
    place.evict("vm0.qcow2")
    with opened(base, os.O_RDONLY | os.O_DIRECT) as fd:
        check_stamps(read_direct(fd, 0, BLOCK), 9, 0)
    status = place.image("base.raw")
    assert (status["origin_reads"], status["origin_read_bytes"]) == reads[0]
    assert status["cached_bytes"] == size


@both_modes
def test_an_overlay_is_committed_into_its_base(place: Place) -> None:
    base, overlay = place.cached / "base.raw", place.cached / "vm.qcow2"
    (place.origin / "base.raw").write_bytes(stamped(9, 0, 4 * _MIB, 1))
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    _io(overlay, "write -P 0x12 1M 1M", form="qcow2", cache="none")
    _run("qemu-img", "commit", "-q", "-t", "none", overlay)
    expected = bytearray(stamped(9, 0, 4 * _MIB, 1))
    expected[_MIB : 2 * _MIB] = b"\x12" * _MIB
    assert base.read_bytes() == expected == home(place, "base.raw")


@both_modes
def test_fio_verifies_what_it_wrote_with_a_deep_queue(place: Place) -> None:
    out = _run(
        *("fio", "--name=verify", f"--filename={place.cached / 'fio.raw'}", "--size=8M"),
        *("--rw=randrw", "--bsrange=512-128k", "--blockalign=512", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1"),
        *(
            "--randseed=7",
            "--output-format=json",
            "--do_verify=1",
            "--end_fsync=1",
            "--verify_state_save=0",
        ),
    )
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0
    assert (place.cached / "fio.raw").read_bytes() == home(place, "fio.raw")
