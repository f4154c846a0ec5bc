"""Many readers at full speed while slots are reused, images cut, written, evicted and changed on
the origin: no wrong byte."""

from pathlib import Path

import pytest

from tests.lane.stressing import Done, Stress, small_mount, the_origin_has_everything, told
from tests.support.daemon import Mount, cleaned_up

pytestmark = pytest.mark.mount


def _run(mount: Mount, seconds: float, pages: int) -> Done:
    stress = Stress(mount, seed=1)
    with cleaned_up(mount):
        done = stress.run(seconds, pages)
        print(told(done))
        assert not done.words, done.words
        mount.stop()
        the_origin_has_everything(mount, mount.base / "shared")
    assert done.written > 100
    assert done.lane["reads"]["calls"] > done.pages / 1000
    assert done.lane["overwrites"]["calls"] > 0
    assert done.lane["cold_reads_by_io_uring"] > 0 or not done.lane["io_uring"]
    assert done.lane["fsyncs"] > 10
    return done


def test_no_wrong_byte_in_many_reads(tmp_path: Path) -> None:
    """However many a busy machine can do in so many seconds."""
    assert _run(small_mount(tmp_path / "fc"), 20, 1_000_000).evictions >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_wrong_byte_in_ten_million_reads(tmp_path: Path) -> None:
    done = _run(small_mount(tmp_path / "fc"), 3000, 10_000_000)
    assert done.pages >= 10_000_000
    assert done.evictions > 50
