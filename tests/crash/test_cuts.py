"""P1, P2, P4 and P6's data side in write-through and write-around: cut at every step."""

from pathlib import Path

import pytest

from tests.crash.simulator import Simulation


@pytest.mark.parametrize("part", range(10))
def test_no_cut_at_any_step_shows_a_guest_a_wrong_byte(tmp_path: Path, part: int) -> None:
    """Some 600 lives over all parts; the seed of a failure is in its message."""
    for seed in range(part * 20, part * 20 + 20):
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            Simulation(directory, seed).run(3)
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_twenty_thousand_cuts_show_no_wrong_byte(tmp_path: Path, part: int) -> None:
    """The same with other seeds, for as long as it takes."""
    for seed in range(10_000 + part * 670, 10_000 + part * 670 + 670):
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            Simulation(directory, seed).run(3)
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
