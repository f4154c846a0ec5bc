"""Break one clause of the rules at a time: a trace or a random walk has to notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.mutations import MUTATIONS
from tests.crash.simulator import Simulation
from tests.crash.traces import TRACES

WALKS = 60


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.__name__)
def test_the_directed_traces_hold(tmp_path: Path, trace: Callable[[Path], None]) -> None:
    trace(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_clause_is_noticed(tmp_path: Path, name: str) -> None:
    with MUTATIONS[name]():
        for number, trace in enumerate(TRACES):
            directory = tmp_path / f"trace{number}"
            directory.mkdir()
            if _fails(lambda trace=trace, at=directory: trace(at)):
                return
        for seed in range(WALKS):
            directory = tmp_path / str(seed)
            directory.mkdir()
            if _fails(lambda at=directory, seed=seed: Simulation(at, seed).run(3)):
                return
    pytest.fail(f"nothing noticed that {name.replace('_', ' ')}")


def _fails(run: Callable[[], object]) -> bool:
    """Whether an assertion fails; anything else is an error of its own."""
    try:
        run()
    except AssertionError:
        return True
    except BaseExceptionGroup as group:
        return group.subgroup(AssertionError) is not None
    except Exception:
        return True  # refused or crashed: noticed as well
    return False
