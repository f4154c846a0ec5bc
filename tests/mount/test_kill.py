"""kill -9 of the real daemon under a stamped workload of several processes (P1, P3, P4).

Workers write stamped data through the mount with direct I/O and tell, over a pipe, what was
acknowledged. After every kill the image is read through a new mount and from the origin: all
that was acknowledged is there, whether it was fsynced or not.
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
                text=True,
            )
            for image in (1, 2)
            for share in (0, 1)
        ]

    def finish(self, allowed: dict[tuple[int, int], set[int]]) -> int:
        """Takes their reports into ``allowed`` versions by (image, piece); counts the writes."""
        writes = 0
        for number, child in enumerate(self._children):
            image = number // 2 + 1
            out, err = child.communicate(timeout=30)
            assert child.returncode == 0, err
            for line in out.splitlines():
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
def busy(mount: Mount) -> Iterator[Mount]:
    """A mount of two images that its cache holds not quite."""
    mount.size = "7M"
    for image in (1, 2):
        path = mount.origin / f"{image}.img"
        path.write_bytes(stamped(image, 0, BLOCKS * BLOCK, 1))
        old(path)
    yield mount


def _kill_again_and_again(mount: Mount, times: int, seed: int, mode: str) -> None:
    chance = random.Random(seed)
    allowed = {(image, piece): {1} for image in (1, 2) for piece in range(BLOCKS * BLOCK // PIECE)}
    mount.options["write_mode"] = mode
    writes = 0
    for life in range(times):
        mount.start()
        workers = Workers(mount, seed + life, 1000 * (life + 1))
        try:
            time.sleep(0.3 + chance.random() * 1.2)
            mount.kill()
            writes += workers.finish(allowed)
        finally:
            workers.stop()
        mount.start()
        _compare(mount.mountpoint, allowed, settle=True)
        if chance.random() < 0.5:
            mount.kill()
        else:
            mount.stop()
        _compare(mount.origin, allowed, settle=False)
    assert writes > 20 * times, "the workers hardly wrote anything"


def _compare(directory: Path, allowed: dict[tuple[int, int], set[int]], *, settle: bool) -> None:
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


@pytest.mark.parametrize("mode", ["through", "around"])
def test_what_was_acknowledged_survives_a_killed_daemon(busy: Mount, mode: str) -> None:
    _kill_again_and_again(busy, 5, 1, mode)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", ["through", "around"])
def test_it_survives_fifty_killed_daemons(busy: Mount, mode: str) -> None:
    _kill_again_and_again(busy, 50, 100, mode)


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
