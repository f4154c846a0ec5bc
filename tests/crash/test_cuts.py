"""P1, P2, P4 and P6's data side in every write mode: cut at every step, judged by the model."""

from pathlib import Path

import pytest

from tests.crash import plays, stories, stories_holes, stories_lane, stories_more
from tests.crash.plays import STORIES
from tests.crash.simulator import Simulation

assert stories and stories_holes and stories_lane and stories_more

EACH = 24
"""Cases of each story in every run: with the walks, more than 1,000 cuts."""


def _walk(directory: Path, seeds: range) -> int:
    """Random lives; the seed of a failure is in its message."""
    cuts = 0
    for seed in seeds:
        place = directory / str(seed)
        place.mkdir()
        try:
            cuts += Simulation(place, seed, lane=bool(seed % 2)).run(3)
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
    return cuts


@pytest.mark.parametrize("part", range(8))
def test_no_cut_at_any_step_shows_a_guest_a_wrong_byte(tmp_path: Path, part: int) -> None:
    assert _walk(tmp_path, range(part * 12, part * 12 + 12)) > 16


@pytest.mark.parametrize("name", sorted(STORIES))
def test_a_story_can_be_cut_anywhere(tmp_path: Path, name: str) -> None:
    """The case of a failure is in its message."""
    _tell(tmp_path, name, EACH)


def _tell(directory: Path, name: str, count: int | None) -> int:
    steps = plays.play(directory / "whole", (name, None, "kill"))
    told = 0
    for told, case in enumerate(plays.cases(name, steps, count), 1):
        plays.play(directory / str(told), case)
    return told


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_random_cuts_show_no_wrong_byte(tmp_path: Path, part: int) -> None:
    """The same with other seeds, for as long as it takes."""
    seeds = range(10_000 + part * 380, 10_000 + part * 380 + 380)
    assert _walk(tmp_path, seeds) > 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(STORIES))
def test_a_story_can_be_cut_everywhere(tmp_path: Path, name: str) -> None:
    """Every step, or 400 cuts of a long story: some 10,000 over all of them."""
    _tell(tmp_path, name, 400)
