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
        return int(place.mount.status()["lane"]["passed_to_pyfuse3"])

    for flags, requests in (
        (os.O_RDONLY, 2),
        (os.O_RDONLY | os.O_DIRECT, 2),
        (os.O_RDWR, 3),
        (os.O_RDWR | os.O_DIRECT, 3),
        (os.O_WRONLY, 3),
    ):
        before = passed()
        for _ in range(_TIMES):
            with opened(place.cached / "image", flags):
                pass
        # The last RELEASE may come late, and what else is asked now and then does not count.
        assert (requests - 0.5) * _TIMES <= passed() - before <= (requests + 0.5) * _TIMES, flags
