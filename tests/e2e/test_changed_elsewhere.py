"""An image that was changed elsewhere while its cache was away with dirty data of it."""

import errno
import os
import shlex
import time

import pytest

from tests.e2e.dirty import dirty_mount, on_origin, served
from tests.e2e.helpers import refused
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount


@pytest.fixture
def away(mount: Mount) -> Mount:
    """Two images are dirty in a cache that no daemon has open; one was changed since."""
    dirty_mount(mount, "vm1.img", "vm2.img")
    mount.stop("--keep-dirty")
    time.sleep(2.5)  # up to 2 s later a change may be the daemon's own
    with open(mount.origin / "vm1.img", "r+b") as image:
        image.write(stamped(1, 0, 4 * BLOCK, 3))
    return mount


def _refused_opens(mount: Mount) -> None:
    for flags in (os.O_RDONLY, os.O_RDWR):
        with pytest.raises(OSError) as caught:
            os.close(os.open(mount.mountpoint / "vm1.img", flags))
        assert caught.value.errno == errno.EBUSY


def test_it_waits_for_the_operator_who_keeps_what_is_here(away: Mount) -> None:
    away.start()
    _refused_opens(away)
    path = away.mountpoint / "vm1.img"
    ours, theirs = f"fusecache flush {path} --overwrite", f"fusecache evict {path} --discard-dirty"
    for verb in ("flush", "evict"):
        sentence = refused(
            away.run(verb, "vm1.img"), "changed elsewhere", "256.0 KiB", ours, theirs
        )
        assert "when the origin works" not in sentence
    sentence = refused(away.run("umount", away.mountpoint), "'vm1.img'", "--keep-dirty", "status")
    assert "when the origin works" not in sentence
    status = away.run("status").stdout
    assert "vm1.img was changed elsewhere" in status and "tried again" not in status
    assert "--overwrite" in status and "--discard-dirty" in status
    assert [image["changed_elsewhere"] for image in away.status()["images"]] == [True, False]
    assert "event=image-conflict image=vm1.img" in away.log()
    assert (on_origin(away, "vm1.img", 1), served(away, "vm2.img", 2)) == (3, 2)
    refused(away.run("flush", "--overwrite"), "Name the images", code=2)
    done = away.run(*shlex.split(ours)[1:])
    assert (done.returncode, done.stdout) == (0, "flushed 1 image\n"), done.stderr
    assert (on_origin(away, "vm1.img", 1), served(away, "vm1.img", 1)) == (2, 2)
    away.stop()
    assert on_origin(away, "vm2.img", 2) == 2


def test_it_waits_for_the_operator_who_keeps_the_change(away: Mount) -> None:
    away.start()
    _refused_opens(away)
    assert away.run("evict", "vm1.img", "--discard-dirty").returncode == 0
    assert (on_origin(away, "vm1.img", 1), served(away, "vm1.img", 1)) == (3, 3)
    assert "changed elsewhere" not in away.run("status").stdout
    away.stop()
    assert (on_origin(away, "vm1.img", 1), on_origin(away, "vm2.img", 2)) == (3, 2)


@pytest.mark.parametrize("keep", ["ours", "theirs"])
def test_without_a_daemon_as_well(away: Mount, keep: str) -> None:
    place = ["--cache", away.cache]
    done = away.run("flush", *place)
    assert (done.returncode, done.stdout) == (1, "flushed 1 image\n")
    (sentence,) = done.stderr.splitlines()
    ours = f"flush {away.origin}/vm1.img --cache {away.cache} --overwrite"
    theirs = f"evict {away.origin}/vm1.img --cache {away.cache} --discard-dirty"
    assert f"fusecache {ours}." in sentence and sentence.endswith(f"fusecache {theirs}")
    assert (on_origin(away, "vm1.img", 1), on_origin(away, "vm2.img", 2)) == (3, 2)
    done = away.run(*shlex.split(ours if keep == "ours" else theirs))
    assert done.returncode == 0, done.stderr
    assert on_origin(away, "vm1.img", 1) == (2 if keep == "ours" else 3)
    away.start()
    assert served(away, "vm1.img", 1) == (2 if keep == "ours" else 3)
    away.stop()
