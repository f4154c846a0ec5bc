"""A mount that the tests of one file share; each works in a directory of its own."""

from collections.abc import Iterator

import pytest

from tests.support.daemon import Mount
from tests.support.place import Place


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for a whole file of tests, started."""
    made = Mount(tmp_path_factory.mktemp("shared") / "fc")
    try:
        yield made.start()
    finally:
        made.cleanup()
    assert "unexpected error" not in made.log(), made.log()


@pytest.fixture
def place(served: Mount, request: pytest.FixtureRequest) -> Place:
    """An empty directory of the shared mount, seen from both sides."""
    name = str(request.node.name).replace("/", "_")[:100]
    (served.origin / name).mkdir()
    return Place(served, name)
