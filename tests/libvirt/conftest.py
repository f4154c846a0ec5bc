"""What guests are made from, once for all tests, and short paths: those of sockets are limited."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.libvirt.guest import Parts, build


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Kernel, initramfs and root filesystem of the guests."""
    return build(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="fc-", dir="/var/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
