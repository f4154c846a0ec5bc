"""Closes, and who hears of them."""

import os

import pytest

from tests.support.direct import opened
from tests.support.place import Place
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

_TIMES = 30


@pytest.mark.skipif("config.getoption('--lane') == 'off'", reason="the lane answers")
def test_closes_of_who_only_reads_do_not_reach_python_and_all_others_do(place: Place) -> None:
    """What others change after a writer's close must be seen as a change of its own (P3): also if
    that writer is a guest, which writes directly."""
    (place.origin / "image").write_bytes(stamped(1, 0, 4096, 1))

    def passed() -> int:
        return int(place.mount.status()["lane"]["passed_to_engine"])

    readers = (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT)
    writers = (os.O_RDWR, os.O_RDWR | os.O_DIRECT, os.O_WRONLY)
    for flags in readers + writers:
        with opened(place.cached / "image", flags) as fd:
            before = passed()
            for _ in range(_TIMES):
                os.close(os.dup(fd))
            found = passed() - before
        # What else is asked now and then does not count.
        assert round(found / _TIMES) == (flags in writers), (flags, found)
