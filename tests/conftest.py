"""Fixtures every level of tests shares."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.fuse import queues
from tests.support import daemon
from tests.support.daemon import Mount, cleaned_up

_QUEUES_BEFORE = pytest.StashKey[str]()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started this in the background. Commands that are started here and interrupted
    # would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--lane off`` runs everything that mounts without the lane; with ``--queues`` the kernel
    hands requests over by io_uring, for which a parameter of its own is set meanwhile."""
    parser.addoption("--lane", choices=("on", "off"), default="on", help="serve hits by the lane")
    parser.addoption("--queues", action="store_true", help="FUSE over io_uring: Linux 6.14, root")


def pytest_configure(config: pytest.Config) -> None:
    """See ``pytest_addoption``."""
    daemon.lane = config.getoption("--lane")
    if config.getoption("--queues") and not hasattr(config, "workerinput"):
        config.stash[_QUEUES_BEFORE] = queues.ALLOWED.read_text()
        queues.ALLOWED.write_text("Y")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The kernel is as it was."""
    before = config.stash.get(_QUEUES_BEFORE, None)
    if before is not None:
        queues.ALLOWED.write_text(before)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount that is not started yet; cleaned up whatever the test does.

    A test must leave no unexpected error in the daemon's log.
    """
    with cleaned_up(Mount(tmp_path / "fc")) as made:
        yield made
