"""The guests of a session: one server for all tests, a fresh host for each."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import rootfs
from tests.guest.host import MIB, Host, Server, fresh_host
from tests.guest.machine import Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here boot guests: minutes each, and more under emulation."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the root filesystem in it; both are removed at the end."""
    rootfs.skip_if_impossible()
    made = tmp_path_factory.mktemp("rig")
    try:
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture(scope="session")
def filesystem(rig: Path) -> rootfs.RootFilesystem:
    """What both guests boot."""
    return rootfs.build(rig)


@pytest.fixture(scope="session")
def _server(rig: Path, filesystem: rootfs.RootFilesystem) -> Iterator[Server]:
    machine = Machine(filesystem, rig / "server", "server", 1)
    machine.add_disk("export.img", 1024 * MIB, "mkfs.ext4", "-q", "-F")
    with contextlib.closing(machine):
        yield Server(machine.boot()).set_up()


@pytest.fixture
def server(_server: Server) -> Server:
    """Reachable and empty."""
    return _server.fresh()


@pytest.fixture
def host(rig: Path, filesystem: rootfs.RootFilesystem) -> Iterator[Host]:
    """Fresh and booted, with an empty SSD; nothing of fusecache is set up."""
    with fresh_host(rig, filesystem) as made:
        yield made
