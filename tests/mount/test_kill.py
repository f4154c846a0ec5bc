"""kill -9 of the real daemon under a stamped workload of several processes and under fio
(P1 to P4).

Workers write stamped data through the mount with direct I/O and tell, over a pipe, what was
acknowledged. After every kill the image is read through a new mount and, once all is evicted,
from the origin: all that was acknowledged is there, whether it was fsynced or not.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import BLOCK, Mount, old
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

BLOCKS = 64
PIECE = 4096

_WORKER = f"""
import json, mmap, os, random, sys
from tests.support.stamps import check_stamps, stamped
path, image, share, shares, seed, version = sys.argv[1], *map(int, sys.argv[2:])
chance = random.Random(seed)
fd = os.open(path, os.O_RDWR | os.O_DIRECT)
pieces = [p for p in range({BLOCKS * BLOCK // PIECE}) if p % shares == share]
print("open", flush=True)
mine = {{}}
buffer = mmap.mmap(-1, {PIECE})
try:
    while True:
        piece = chance.choice(pieces)
        if chance.random() < 0.5:
            version += 1
            print(json.dumps(["begin", piece, version]), flush=True)
            buffer[:] = stamped(image, piece * {PIECE}, {PIECE}, version)
            assert os.pwrite(fd, buffer, piece * {PIECE}) == {PIECE}
            print(json.dumps(["end", piece, version]), flush=True)
            mine[piece] = version
        else:
            assert os.preadv(fd, [buffer], piece * {PIECE}) == {PIECE}
            found = set(check_stamps(bytes(buffer), image, piece * {PIECE}))
            assert len(found) == 1, found
            assert piece not in mine or found == {{mine[piece]}}, (piece, found, mine[piece])
        if chance.random() < 0.05:
            os.fsync(fd)
except OSError:
    pass  # the daemon is gone
"""


Allowed = dict[tuple[int, int], set[int]]
"""By (image, piece): the versions it may have."""


class Workers:
    """Processes at work on one mount, and what they were told."""

    def __init__(self, mount: Mount, seed: int, version: int) -> None:
        self._children = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", _WORKER, str(mount.mountpoint / f"{image}.img")),
                    *map(str, (image, share, 2, seed * 8 + image * 2 + share, version)),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,  # or communicate would miss what came along with the first line
            )
            for image in (1, 2)
            for share in (0, 1)
        ]
        for child in self._children:  # on a busy machine they take their time to begin
            assert child.stdout is not None and child.stdout.readline() == b"open\n"

    def finish(self, allowed: Allowed) -> int:
        """Takes their reports into ``allowed`` versions by (image, piece); counts the writes."""
        writes = 0
        for number, child in enumerate(self._children):
            image = number // 2 + 1
            out, err = child.communicate(timeout=30)
            assert child.returncode == 0, err.decode()
            for line in out.decode().splitlines():
                kind, piece, version = json.loads(line)
                if kind == "begin":
                    allowed[image, piece].add(version)
                else:
                    allowed[image, piece] = {version}
                    writes += 1
        return writes

    def stop(self) -> None:
        """Ends whoever still runs."""
        for child in self._children:
            child.kill()
            child.wait()


@pytest.fixture
def busy(mount: Mount) -> Mount:
    """A mount of two images that its cache holds not quite."""
    mount.size = "7M"
    for image in (1, 2):
        path = mount.origin / f"{image}.img"
        path.write_bytes(stamped(image, 0, BLOCKS * BLOCK, 1))
    for image in (1, 2):
        old(mount.origin / f"{image}.img")
    return mount


class Lives:
    """One life of the daemon after the other; every one but the last is ended by kill -9.

    After each kill everything is read through the next mount. What was read then is what there
    is: it must be there after further kills, and on the origin once all is evicted (P2: no page
    goes back in time).
    """

    def __init__(self, mount: Mount, mode: str, seed: int) -> None:
        self._mount, self._seed = mount, seed
        self._chance = random.Random(seed)
        self._allowed: Allowed = {
            (image, piece): {1} for image in (1, 2) for piece in range(BLOCKS * BLOCK // PIECE)
        }
        self.kills = 0
        self.writes = 0
        mount.options["write_mode"] = mode
        if mode == "back":
            mount.options["dirty_age"] = "1"

    def _kill(self) -> None:
        self._mount.kill()
        self.kills += 1

    def _look(self, *, origin: bool = False) -> None:
        directory = self._mount.origin if origin else self._mount.mountpoint
        _compare(directory, self._allowed, settle=not origin)

    def one(self) -> None:
        """Work, a kill in the middle of it, and everything compared."""
        mount, chance = self._mount, self._chance
        mount.start()
        self._look()
        workers = Workers(mount, self._seed + self.kills, 1000 * (self.kills + 1))
        try:
            time.sleep(0.5 + chance.random() * 2)
            if chance.random() < 0.3:
                with _beside(mount, *chance.choice((["flush"], ["evict", "--all"]))):
                    time.sleep(0.2 + chance.random() * 0.8)
                    self._kill()
            else:
                self._kill()
            self.writes += workers.finish(self._allowed)
        finally:
            workers.stop()
        mount.start()
        self._look()
        if chance.random() < 0.3:
            time.sleep(chance.random())  # the cleaner may be at what an earlier life left
            self._kill()
            mount.start()
            self._look()
        if chance.random() < 0.7:
            done = mount.run("evict", "--all")
            assert done.returncode == 0, done.stderr
            self._look(origin=True)
            self._look()
        if chance.random() < 0.5:
            self._kill()
        else:
            mount.stop()
            self._look(origin=True)

    def until(self, kills: int) -> None:
        """As many lives as have that many kills; then all is on the origin."""
        lives = 0
        while self.kills < kills:
            self.one()
            lives += 1
        self._mount.start()
        self._look()
        self._mount.stop()
        self._look(origin=True)
        assert self.writes > 20 * lives, "the workers hardly wrote anything"


@contextlib.contextmanager
def _beside(mount: Mount, *args: str) -> Iterator[None]:
    """A command under way, which need not come to its end."""
    command = subprocess.Popen(
        [sys.executable, "-m", "fusecache", *args, "-m", str(mount.mountpoint)],
        env={**os.environ, "FUSECACHE_RUNTIME_DIR": str(mount.runtime)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        command.kill()
        command.wait()


def _compare(directory: Path, allowed: Allowed, *, settle: bool) -> None:
    for image in (1, 2):
        data = (directory / f"{image}.img").read_bytes()
        assert len(data) == BLOCKS * BLOCK
        for piece in range(BLOCKS * BLOCK // PIECE):
            at = piece * PIECE
            found = set(check_stamps(data[at : at + PIECE], image, at))
            assert len(found) == 1 and found <= allowed[image, piece], (
                f"image {image} piece {piece}: {found}, allowed {allowed[image, piece]}"
            )
            if settle:
                allowed[image, piece] = found


@pytest.mark.parametrize(("mode", "kills"), [("through", 1), ("around", 1), ("back", 6)])
def test_what_was_acknowledged_survives_a_killed_daemon(busy: Mount, mode: str, kills: int) -> None:
    Lives(busy, mode, 1).until(kills)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("mode", "kills"), [("through", 20), ("around", 10), ("back", 90)])
def test_it_survives_a_hundred_killed_daemons(busy: Mount, mode: str, kills: int) -> None:
    Lives(busy, mode, 100).until(kills)


def test_losing_cache_and_database_loses_nothing_written_through(busy: Mount) -> None:
    """P4."""
    allowed = {(image, piece): {1} for image in (1, 2) for piece in range(BLOCKS * BLOCK // PIECE)}
    busy.start()
    workers = Workers(busy, 7, 1000)
    try:
        time.sleep(1)
        busy.kill()
        workers.finish(allowed)
    finally:
        workers.stop()
    for path in busy.base.glob("cache.img*"):
        path.unlink()
    busy.start()
    _compare(busy.mountpoint, allowed, settle=True)
    busy.stop()
    _compare(busy.origin, allowed, settle=False)


def test_the_cache_is_warm_after_a_kill(busy: Mount) -> None:
    """Clean blocks that nobody was writing are kept, those of images open for writing too."""
    busy.size = "64M"
    busy.start()
    fd = os.open(busy.mountpoint / "1.img", os.O_RDWR)
    try:
        assert os.pread(fd, BLOCKS * BLOCK, 0)
        os.pwrite(fd, stamped(1, 0, PIECE, 2), 0)
        os.fsync(fd)
        time.sleep(2.5)
        busy.kill()
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    busy.start()
    data = (busy.mountpoint / "1.img").read_bytes()
    assert check_stamps(data, 1, 0)[: PIECE // 512 + 1] == [2] * (PIECE // 512) + [1]
    image = busy.image("1.img")
    assert image["origin_read_bytes"] <= BLOCK, image
    busy.stop()


# -- fio ---------------------------------------------------------------------------------------

_FIO_SIZE = 8 << 20


def _fio(path: Path, *args: str, seed: int, bs: str) -> list[str]:
    """fio's command; the same seed and size write, and expect, the same."""
    return [
        *("fio", "--name=kill", f"--filename={path}", "--thread", "--direct=1", f"--bs={bs}"),
        *("--rw=randwrite", "--ioengine=libaio", "--iodepth=16", f"--randseed={seed}"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", *args),
    ]


def _fio_passes(path: Path, *args: str, seed: int, bs: str) -> None:
    done = subprocess.run(
        _fio(path, *args, seed=seed, bs=bs),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path.parents[1],
        check=False,
    )
    assert done.returncode == 0, (args, done.stdout, done.stderr)


@pytest.fixture
def scratch(mount: Mount) -> Mount:
    """A mount in write-back whose cleaner is at work, with an empty image for fio."""
    mount.options |= {"write_mode": "back", "dirty_age": "1"}
    (mount.origin / "fio.img").touch()
    os.truncate(mount.origin / "fio.img", _FIO_SIZE)
    return mount


def _evict_and_stop(mount: Mount, size: str, *, seed: int, bs: str) -> None:
    """And the origin has what fio wrote."""
    done = mount.run("evict", "--all")
    assert done.returncode == 0, done.stderr
    _fio_passes(mount.origin / "fio.img", size, "--verify_only", seed=seed, bs=bs)
    mount.stop()


def _finished_fio(mount: Mount, times: int, seed: int) -> None:
    """Kills the daemon directly after fio's last write, which nobody synced."""
    path = mount.mountpoint / "fio.img"
    size = f"--size={_FIO_SIZE}"
    for seed_now in range(seed, seed + times):
        bs = ("4k", "16k", "64k", "12k")[seed_now % 4]
        mount.start()
        _fio_passes(path, size, "--do_verify=0", "--end_fsync=0", seed=seed_now, bs=bs)
        mount.kill()
        mount.start()
        _fio_passes(path, size, "--verify_only", seed=seed_now, bs=bs)
        if seed_now % 2:
            time.sleep(0.7)
            mount.kill()
            mount.start()
            _fio_passes(path, size, "--verify_only", seed=seed_now, bs=bs)
        _evict_and_stop(mount, size, seed=seed_now, bs=bs)


def _interrupted_fio(mount: Mount, times: int, seed: int) -> None:
    """Kills the daemon while a fio writes; what an earlier one had written stays."""
    chance = random.Random(seed)
    path = mount.mountpoint / "fio.img"
    half = f"--size={_FIO_SIZE // 2}"
    for seed_now in range(seed, seed + times):
        bs = ("4k", "16k", "64k", "8k")[seed_now % 4]
        mount.start()
        _fio_passes(path, half, "--do_verify=0", "--end_fsync=0", seed=seed_now, bs=bs)
        other = ("--offset=50%", half, "--do_verify=0", "--loops=10000")
        with subprocess.Popen(
            _fio(path, *other, seed=seed_now, bs="4k"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=mount.base,
        ) as writer:
            try:
                time.sleep(0.7 + chance.random() * 1.5)
                assert writer.poll() is None, writer.communicate()
                mount.kill()
                writer.communicate(timeout=30)
                assert writer.returncode != 0
            finally:
                writer.kill()
        mount.start()
        _fio_passes(path, half, "--verify_only", seed=seed_now, bs=bs)
        _evict_and_stop(mount, half, seed=seed_now, bs=bs)


def test_what_a_finished_fio_wrote_survives_a_kill(scratch: Mount) -> None:
    _finished_fio(scratch, 1, 1)


def test_what_a_finished_fio_wrote_survives_a_kill_during_the_next_one(scratch: Mount) -> None:
    _interrupted_fio(scratch, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_what_a_finished_fio_wrote_survives_twenty_kills(scratch: Mount) -> None:
    _finished_fio(scratch, 20, 100)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_what_a_finished_fio_wrote_survives_twenty_kills_during_the_next_one(
    scratch: Mount,
) -> None:
    _interrupted_fio(scratch, 20, 100)
