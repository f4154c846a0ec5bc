"""A cache of every kind, made once; every case damages its own copy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage.place import Place, make

KINDS = ("clean", "kept", "killed", "moved")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    """One of each kind, never started."""
    base = tmp_path_factory.mktemp("models")
    return {kind: make(base / kind, kind) for kind in KINDS}


@pytest.fixture
def place_of(models: dict[str, Place], tmp_path: Path) -> Callable[[str], Place]:
    """A copy of the cache of that kind."""
    return lambda kind: models[kind].copy(tmp_path / kind)
