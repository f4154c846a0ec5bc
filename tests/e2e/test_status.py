"""``fusecache status``: the table and the JSON."""

import contextlib
import io
import json
import mmap
import os
from pathlib import Path

import pytest
from rich.console import Console

from fusecache.observe import report
from tests.e2e.conftest import MakeFaulty, MakeMount
from tests.e2e.faulty import COMMAND as FAULTY
from tests.e2e.helpers import alone, process, wait_for
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

MOUNT_KEYS = {
    "mountpoint", "origin", "pid", "state", "write_mode", "block_size", "cache", "images",
    "flushing",
}  # fmt: skip
CACHE_KEYS = {"path", "uuid", "slots_total", "slots_used", "dirty_bytes", "state"}
IMAGE_KEYS = {
    "path", "size", "cached_bytes", "dirty_bytes", "read_hit_bytes", "read_miss_bytes",
    "write_bytes", "origin_read_bytes", "origin_write_bytes", "errors", "last_error",
    "dirty_age", "write_mode", "lost", "unreadable", "clean_error",
}  # fmt: skip
NUMBERS = {"cached_blocks", "open_handles", "detached", "waiting"}


def test_json_has_every_key_of_the_contract_and_true_numbers(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    mount.start()
    with open(mount.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        guest.read(BLOCK)
        guest.seek(2 * BLOCK)
        guest.write(stamped(1, 2 * BLOCK, BLOCK, 2))
        status = mount.status()
    assert status.keys() >= MOUNT_KEYS
    assert status["cache"].keys() >= CACHE_KEYS
    (image,) = status["images"]
    assert image.keys() >= IMAGE_KEYS
    assert status["mountpoint"] == str(mount.mountpoint)
    assert status["origin"] == str(mount.origin)
    assert (status["state"], status["write_mode"]) == ("serving", "through")
    assert (image["path"], image["size"]) == ("vm.img", 4 * BLOCK)
    assert image["write_bytes"] == image["origin_write_bytes"] == BLOCK
    assert image["read_miss_bytes"] >= BLOCK
    assert image["dirty_bytes"] == status["cache"]["dirty_bytes"] == 0
    assert (image["errors"], image["last_error"]) == (0, "")
    assert "path_escaped" not in image


def test_where_requests_were_served_and_why_not_by_the_cache(mount: Mount) -> None:
    mount.options |= {"write_mode": "back", "dirty_age": "3600", "readahead": "0"}
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    mount.start()
    fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as page:
            for block in (0, 1, 2):
                assert os.preadv(fd, [page], block * BLOCK) == BLOCK
            wait_for(lambda: mount.image("vm.img")["cached_blocks"] == 3, "three blocks")
            for block in (0, 1, 2, 0, 1):
                assert os.preadv(fd, [page], block * BLOCK) == BLOCK
            page.write(stamped(1, 3 * BLOCK, BLOCK, 2))
            assert os.pwritev(fd, [page], 3 * BLOCK) == BLOCK
            status = mount.status()
            assert mount.run("evict", mount.mountpoint / "vm.img").returncode == 0
            os.preadv(fd, [page], 0)
            os.pwritev(fd, [page], 3 * BLOCK)
            detached = mount.image("vm.img")
    finally:
        os.close(fd)
    (image,) = status["images"]
    for shown in (image, status):
        assert shown["reads"]["origin"] == {"requests": 3, "bytes": 3 * BLOCK}
        hits = [shown["reads"][place] for place in ("memory", "ssd")]
        assert sum(place["requests"] for place in hits) == 5
        assert sum(place["bytes"] for place in hits) == 5 * BLOCK
        assert shown["writes"]["back"] == {"requests": 1, "bytes": BLOCK}
        assert shown["hit_ratio"] == dict.fromkeys(("minute", "hour", "start"), 0.625)
        assert shown["not_cached"] == {"cold": 3}
        assert shown["not_kept"] == {}
        assert shown["origin_latency"]["read"]["calls"] == 3
        assert 0 < shown["origin_latency"]["read"]["p50"] <= shown["origin_latency"]["read"]["p99"]
    assert status["origin_latency_minute"]["read"]["calls"] == 3
    assert status["cleaner"]["doing"] == "waiting"
    assert 3500 < status["cleaner"]["next_seconds"] <= 3600
    assert status["reclaimer"]["doing"] == "idle"
    assert status["seconds"] > 0 and status["cache"]["dirty_age"] is not None
    assert detached["not_cached"] == {"cold": 3, "detached": 2}
    assert detached["read_past_bytes"] == BLOCK
    assert detached["writes"]["around"] == {"requests": 1, "bytes": BLOCK}
    assert detached["written_back_bytes"] == BLOCK  # the eviction's doing


def test_what_a_mount_did_never_gets_less_when_an_image_is_forgotten(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, 2 * BLOCK, 1))
    mount.start()
    (mount.mountpoint / "vm.img").read_bytes()
    before = mount.status()
    assert mount.run("evict", "--all").returncode == 0
    after = mount.status()
    assert (len(before["images"]), after["images"]) == (1, [])
    for name in ("reads", "writes", "not_cached"):
        assert after[name] == before[name]
    assert after["origin_latency"]["read"] == before["origin_latency"]["read"]


def test_reasons_of_write_around_and_of_an_origin_that_fails(make_faulty: MakeFaulty) -> None:
    faulty = make_faulty("faulty")
    faulty.options |= {"write_mode": "around"}
    (faulty.origin / "vm.img").write_bytes(stamped(1, 0, 2 * BLOCK, 1))
    faulty.start()
    with open(faulty.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        guest.write(stamped(1, 0, 4096, 2))
        with faulty.fault("fail-write"), pytest.raises(OSError, match="Input/output"):
            guest.write(stamped(1, 4096, 4096, 2))
    image = faulty.image("vm.img")
    assert image["not_cached"] == {"around": 1, "origin error": 1}
    assert image["writes"]["around"] == {"requests": 1, "bytes": 4096}
    assert image["origin_latency"]["write"]["calls"] == 2
    done = faulty.run("status", "vm.img")
    assert "vm.img: not cached 1 around, 1 origin error" in done.stdout


def test_a_flush_that_runs_is_shown_with_the_time_it_still_takes(make_faulty: MakeFaulty) -> None:
    faulty = make_faulty("slow")
    (faulty.origin / "vm.img").write_bytes(stamped(1, 0, 128 * BLOCK, 1))
    faulty.start()
    with open(faulty.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        for block in range(0, 128, 2):
            os.pwrite(guest.fileno(), stamped(1, block * BLOCK, BLOCK, 2), block * BLOCK)
    command, root = [*FAULTY, "flush"], Path(__file__).parents[2]
    with contextlib.ExitStack() as hang:
        hang.enter_context(faulty.fault("hang-write"))
        with process(*command, env=faulty.environment, cwd=root) as flush:
            wait_for(lambda: bool(faulty.status()["running"]), "a flush")
            status = faulty.status()
            (running,) = status["running"]
            assert (running["verb"], running["images"]) == ("flush", 1)
            assert 0 < running["left"] <= running["of"] == 64 * BLOCK
            assert status["cleaner"]["doing"] == "writing"
            assert status["cleaner"]["images"] == ["vm.img"]
            assert "flush: 1 image, " in faulty.run("status").stdout
            hang.close()
            assert flush.wait(60) == 0
    assert faulty.status()["running"] == []


def test_the_table_names_mount_cache_and_images(mount: Mount) -> None:
    (mount.origin / "vm [1].img").write_bytes(stamped(1, 0, BLOCK, 1))
    mount.start()
    with open(mount.mountpoint / "vm [1].img", "rb") as guest:
        guest.read()
        done = mount.run("status", "-m", mount.mountpoint)
    assert done.returncode == 0, done.stderr
    for word in (str(mount.mountpoint), "serving", "vm [1].img", "64.0 KiB", "open x1"):
        assert word in done.stdout, word


def test_several_mounts_are_all_shown_and_m_chooses(make_mount: MakeMount) -> None:
    one, two = make_mount("one").start(), make_mount("two").start()
    shown = json.loads(one.run("status", "--json").stdout)["mounts"]
    assert {entry["pid"] for entry in shown} == {one.pid, two.pid}
    assert two.status()["pid"] == two.pid


def test_without_a_daemon_json_is_an_empty_list(mount: Mount) -> None:
    done = alone(mount, "status", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"mounts": []})
    done = alone(mount, "status")
    assert done.returncode == 0 and "fusecache mount" in done.stdout


def test_status_of_one_image_shows_it_alone(mount: Mount) -> None:
    for name in ("a.img", "b.img"):
        (mount.origin / name).write_bytes(stamped(1, 0, BLOCK, 1))
    mount.start()
    for name in ("a.img", "b.img"):
        (mount.mountpoint / name).read_bytes()
    (entry,) = json.loads(mount.run("status", "--json", "b.img").stdout)["mounts"]
    assert [image["path"] for image in entry["images"]] == ["b.img"]


def test_the_text_names_what_is_wrong_and_what_to_do() -> None:
    shown = io.StringIO()
    image = dict.fromkeys(IMAGE_KEYS | NUMBERS, 0) | {
        "path": "vm [1].img", "dirty_bytes": 8192, "dirty_age": 75.4, "write_mode": "back",
        "lost": [[65536, 4096]], "unreadable": [[0, 4096]], "clean_error": "the origin is full",
        "last_error": "",
    }  # fmt: skip
    cache = {
        "path": "/dev/sdb", "slots_total": 9, "slots_used": 3, "dirty_bytes": 8192,
        "state": "degraded", "trouble": "it broke",
    }  # fmt: skip
    mount = {
        "mountpoint": "/mnt/c", "origin": "/srv", "pid": 7, "state": "flushing", "cache": cache,
        "write_mode": "through", "block_size": 65536, "images": [image],
        "flushing": {"left": 8192, "of": 1 << 20, "seconds": 3.0, "error": "no room"},
    }  # fmt: skip
    report.show({"mounts": [mount]}, Console(file=shown, width=150, highlight=False))
    text = shown.getvalue()
    for words in (
        "vm [1].img: bytes 65536-69631 were lost by the cache device; ",
        "vm [1].img: bytes 0-4095 cannot be read from /dev/sdb and are not on the origin",
        "vm [1].img: 8.0 KiB could not be written back and are tried again: the origin is full",
        "8.0 KiB 75 s", "write-back", "flushing: 8.0 KiB left of 1.0 MiB; the last error: no room",
        "degraded: all new data goes to the origin, and 8.0 KiB", "fusecache umount /mnt/c",
        "last cache error: it broke",
    ):  # fmt: skip
        assert words in text, (words, text)


def test_a_reader_that_goes_away_is_no_error(mount: Mount) -> None:
    mount.start()
    import subprocess

    from tests.e2e.helpers import COMMAND, environment

    with subprocess.Popen(
        [*COMMAND, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(mount),
    ) as status:  # fmt: skip
        assert status.stdout is not None and status.stderr is not None
        status.stdout.close()
        assert b"Traceback" not in status.stderr.read()
