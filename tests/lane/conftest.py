"""A lane to play with, compiled for these tests."""

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lane import build
from tests.lane.rig import Rig

if platform.machine() != "x86_64":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module."""
    return build.build_held(tmp_path_factory.mktemp("lane"))


@pytest.fixture
def new_rig(tmp_path: Path, module: Path) -> Iterator[Callable[..., Rig]]:
    """Makes a rig, with what ``Rig`` takes, and ends it."""
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(tmp_path, module, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture(params=["threads", "ring"])
def cold_rig(new_rig: Callable[..., Rig], request: pytest.FixtureRequest) -> Rig:
    """A lane in which what is not in memory is awaited by whoever has it, or all by io_uring."""
    return new_rig(ring=True, readers=1) if request.param == "ring" else new_rig()


@pytest.fixture
def rig(new_rig: Callable[..., Rig]) -> Rig:
    """A lane with eight slots."""
    return new_rig()
