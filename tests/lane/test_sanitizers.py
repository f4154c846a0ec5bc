"""The lane under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: the tests of
this directory, requests near the border between good and bad, and a mount with much to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lane import build
from tests.lane.stressing import Stress, small_mount, told

ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
THREAD = "-fsanitize=thread"
# Python's own memory is not looked at, so that what it leaks cannot be told from ours.
_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "TSAN_OPTIONS": "exitcode=66"}
_LIBRARIES = {ADDRESS: "libasan.so", THREAD: "libtsan.so"}


def environment(flags: str, reports: Path) -> dict[str, str]:
    """What Python needs to load a module compiled with these flags."""
    name = _LIBRARIES[flags]
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    options = {key: f"{value}:log_path={reports}/report" for key, value in _OPTIONS.items()}
    options["TSAN_OPTIONS"] += f":suppressions={build.HERE}/tsan.supp"
    return {**options, "LD_PRELOAD": found.stdout.strip()}


def told_by_sanitizer(reports: Path) -> str:
    """All it has found."""
    return "\n".join(path.read_text(errors="replace") for path in reports.glob("report*"))


def test_the_parser_reads_nothing_beyond_a_request(tmp_path: Path) -> None:
    _fuzz(tmp_path, 500_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_parser_reads_nothing_beyond_many_requests(tmp_path: Path) -> None:
    _fuzz(tmp_path, 50_000_000)


def _fuzz(into: Path, count: int) -> None:
    program = into / "fuzz_request"
    command = [*build.compiler(), *ADDRESS.split(), f"-I{build.SOURCES}", "-o", str(program)]
    names = [str(build.HERE / "fuzz_request.c"), str(build.SOURCES / "request.c")]
    subprocess.run([*command, *names], check=True)
    done = subprocess.run(
        [program, "1", str(count)], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Hardly a kind of request that was not made often, good and bad.
    assert min(map(int, done.stdout.split())) > count / 5000, done.stdout


# setarch: gcc 12's ThreadSanitizer does not start where addresses are too random.
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", [ADDRESS, THREAD])
def test_these_tests_under_a_sanitizer(tmp_path: Path, flags: str) -> None:
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [
        f"tests/lane/test_{name}.py" for name in ("reads", "writes", "fsyncs", "requests", "ends")
    ]
    env = {**os.environ, **environment(flags, tmp_path), "FUSECACHE_LANE_FLAGS": flags}
    done = subprocess.run(
        [*command, *files], cwd=build.ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert not told_by_sanitizer(tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", [ADDRESS, THREAD])
def test_a_busy_mount_under_a_sanitizer(
    tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build.build(tmp_path, *flags.split())
    mount = small_mount(tmp_path / "fc")
    stress = Stress(mount, seed=2)
    changed = {**build.instead(tmp_path, module), **environment(flags, tmp_path)}
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    try:
        done = stress.run(60, 1 << 60)
        print(told(done))
        assert not done.words, done.words
        mount.stop()
    finally:
        mount.cleanup()
    assert not told_by_sanitizer(tmp_path)
    assert "unexpected error" not in mount.log(), mount.log()
    assert done.lane["reads"]["calls"] > 1000
