"""A mount that the tests of one file share; each works in a directory of its own."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.modes import stop_and_compare
from tests.support.daemon import Mount, cleaned_up
from tests.support.injected import InjectedMount
from tests.support.place import Place


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shared mount is in write-through, unless a test says ``both_modes``."""
    modes = getattr(metafunc.function, "modes", ())
    if modes:
        metafunc.parametrize("served", modes, indirect=True, scope="module")


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    """One mount for a whole file of tests, started.

    In write-back the cleaner is at work all the time, and at the end the origin has everything.
    """
    made = Mount(tmp_path_factory.mktemp("shared") / "fc")
    mode = getattr(request, "param", "through")
    if mode != "through":
        made.options |= {"write_mode": mode, "dirty_age": "1"}
    with cleaned_up(made):
        yield made.start()
        if mode != "through":
            stop_and_compare(made)


@pytest.fixture
def place(served: Mount, request: pytest.FixtureRequest) -> Place:
    """An empty directory of the shared mount, seen from both sides."""
    name = str(request.node.name).replace("/", "_")[:100]
    (served.origin / name).mkdir()
    return Place(served, name)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[InjectedMount]:
    """A mount with faults, not started; its log may hold unexpected errors."""
    made = InjectedMount(tmp_path / "fc")
    # Whoever waits in the kernel, this process too, is released when the daemon is gone.
    watchdog = threading.Timer(60, made.cleanup)
    watchdog.start()
    try:
        yield made
    finally:
        watchdog.cancel()
        watchdog.join()
        made.cleanup()
