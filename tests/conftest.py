"""Fixtures every level of tests shares."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Mount


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount that is not started yet; cleaned up whatever the test does.

    A test must leave no unexpected error in the daemon's log.
    """
    made = Mount(tmp_path / "fc")
    try:
        yield made
    finally:
        made.cleanup()
    assert "unexpected error" not in made.log(), made.log()
