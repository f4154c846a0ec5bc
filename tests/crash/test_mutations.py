"""Break one clause of the rules at a time: the shortest trace that is known has to notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash import (
    mutations,
    mutations_back,
    mutations_cleaning,
    mutations_holes,
    mutations_recovery,
    plays,
    stories,
    stories_holes,
    stories_lane,
    stories_more,
)
from tests.crash.caught import CAUGHT
from tests.crash.mutation import MUTATIONS
from tests.crash.noticing import notices
from tests.crash.simulator import Simulation
from tests.crash.traces import TRACES

assert (
    mutations
    and mutations_back
    and mutations_cleaning
    and mutations_holes
    and mutations_recovery
    and stories
    and stories_holes
    and stories_lane
    and stories_more
)

NAMED = {trace.__name__: trace for trace in TRACES}
NEAR = 300
"""Cases of the same story that are tried when the known one is no more what it was."""
WALKS = 60


def test_every_clause_is_broken_by_a_mutation_with_a_known_end() -> None:
    assert set(CAUGHT) == set(MUTATIONS)
    assert len(MUTATIONS) >= 75


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.__name__)
def test_the_directed_traces_hold(tmp_path: Path, trace: Callable[[Path], None]) -> None:
    trace(tmp_path)


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_clause_is_noticed(tmp_path: Path, name: str) -> None:
    """By the trace or the case that is known; if the code has moved on, by one near it."""
    known = CAUGHT[name]
    with MUTATIONS[name]():
        if isinstance(known, str):
            noticed = notices(lambda: NAMED[known](tmp_path))
        else:
            noticed = notices(lambda: plays.play(tmp_path / "known", known)) or _near(
                tmp_path, known
            )
    assert noticed, f"{known} does not notice that {name.replace('_', ' ')}"


def _near(directory: Path, known: plays.Case) -> bool:
    name, step, stop = known
    likely = [(name, near, stop) for near in range((step or 0) - 30, (step or 0) + 30) if near > 0]
    others = plays.cases(name, 200, NEAR)
    return any(
        notices(lambda number=number, case=case: plays.play(directory / str(number), case))
        for number, case in enumerate([*likely, *others])
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_random_walks_are_told_of_every_clause(tmp_path: Path, name: str) -> None:
    """How many clauses random lives notice by themselves. Some need a directed trace."""
    with MUTATIONS[name]():
        for seed in range(WALKS):
            directory = tmp_path / str(seed)
            directory.mkdir()
            if notices(lambda at=directory, seed=seed: Simulation(at, seed).run(3)):
                return
    pytest.skip("random walks need more luck for this one")
