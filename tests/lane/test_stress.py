"""Many readers at full speed while slots are reused, images cut, written, evicted and changed on
the origin: no wrong byte."""

from pathlib import Path

import pytest

from tests.lane.stressing import Stress, small_mount, the_origin_has_everything, told
from tests.support.daemon import Mount

pytestmark = pytest.mark.mount


def _run(mount: Mount, seconds: float, pages: int) -> None:
    stress = Stress(mount, seed=1)
    try:
        done = stress.run(seconds, pages)
        print(told(done))
        assert not done.words, done.words
        mount.stop()
        the_origin_has_everything(mount, mount.base / "shared")
    finally:
        mount.cleanup()
    assert "unexpected error" not in mount.log(), mount.log()
    assert done.evictions >= 3
    assert done.written > 100
    reads = sum(done.lane["reads"]["buckets"])
    assert reads > done.pages / 10, "hardly anything was read through the lane"


def test_no_wrong_byte_in_many_reads(tmp_path: Path) -> None:
    _run(small_mount(tmp_path / "fc"), 20, 2_000_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_wrong_byte_in_ten_million_reads(tmp_path: Path) -> None:
    _run(small_mount(tmp_path / "fc"), 1500, 20_000_000)
