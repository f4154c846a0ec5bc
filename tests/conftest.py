"""Fixtures every level of tests shares."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import daemon
from tests.support.daemon import Mount, cleaned_up

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started this in the background. Commands that are started here and interrupted
    # would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--lane off`` runs everything that mounts without the lane."""
    parser.addoption("--lane", choices=("on", "off"), default="on", help="serve hits by the lane")


def pytest_configure(config: pytest.Config) -> None:
    """See ``pytest_addoption``."""
    daemon.lane = config.getoption("--lane")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount that is not started yet; cleaned up whatever the test does.

    A test must leave no unexpected error in the daemon's log.
    """
    with cleaned_up(Mount(tmp_path / "fc")) as made:
        yield made
