"""The benchmarks beside peers and over a far origin work, in their shortest form; no figure is
judged. What is not installed is left out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.helpers import process, processes_of, wait_for

pytestmark = pytest.mark.mount
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHORT = ("--rounds", "1", "--seconds", "0.1", "--present")


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a name short enough for the sockets below it."""
    made = Path(tempfile.mkdtemp(prefix="fcb-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def words(script: str, directory: Path, *options: str) -> list[str]:
    """The command of a benchmark that works and writes below ``directory``."""
    places = ("--directory", str(directory), "--results", str(directory / "results"))
    return [sys.executable, str(BENCHMARKS / script), *SHORT, *places, *options]


def measured(script: str, directory: Path, *options: str) -> dict[str, Any]:
    """Runs a benchmark to its end and gives its JSON file."""
    command = words(script, directory, *options)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (directory / "results").glob("*.json")
    return dict(json.loads(found.read_text()))


def nothing_left(directory: Path) -> None:
    """Asserts that nothing is mounted or running below it, and only results lie there."""
    assert f" {directory}/" not in Path("/proc/self/mounts").read_text()
    assert processes_of(directory) == []
    assert [path.name for path in directory.iterdir() if path.name != "results"] == []


def test_peers_are_measured_side_by_side(directory: Path) -> None:
    options = ("--size", "8", "--passes", "1", "--only", "read, depth 32", "--only", "1M read")
    found = measured("compare.py", directory, *options)
    jobs = found["jobs"]
    assert set(jobs) == {"4K random read, depth 32", "1M read in order, depth 4"}
    for by_name in jobs.values():
        assert {"bare file", "bare pyfuse3", "nbdkit, nbdfuse", "fusecache, through"} <= set(
            by_name
        )
        assert all(values["kiops"] > 0 for values in by_name.values())
    nothing_left(directory)


def test_a_far_origin_is_measured_bare_and_through_the_cache(directory: Path) -> None:
    options = ("--size", "4", "--only", "random", "--only", "boot")
    found = measured("far.py", directory, *options)
    for job, ways in found["jobs"].items():
        assert set(ways) in ({"bare", "cold", "warm"}, {"bare", "through", "back"}), job
        assert all(way["rounds"][0]["kiops"] > 0 for way in ways.values())
    assert [note for note in found["notes"] if "warm" in note] == []
    nothing_left(directory)


def test_an_ended_benchmark_cleans_up(directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = words("compare.py", directory, "--size", "8", "--only", "read, depth 32")
        with process(*command, stdout=output, stderr=output, env=environment) as running:
            wait_for(lambda: b"warm: " in log.read_bytes(), "all contenders are mounted")
            assert str(directory) in Path("/proc/self/mounts").read_text()
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 130, log.read_text()
    nothing_left(directory)
