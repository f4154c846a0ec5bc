"""The manual pages and what shells complete."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from fusecache.cli import completion, manual
from fusecache.cli.main import cli
from tests.e2e.helpers import environment
from tests.support.daemon import BLOCK, Mount

# -- pages -----------------------------------------------------------------------------------------


def _verbs(group: click.Group, name: str = "fusecache") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        assert command is not None and command.name == verb
        if not command.hidden:
            found[f"{name}-{verb}"] = command
            if isinstance(command, click.Group):
                found |= _verbs(command, f"{name}-{verb}")
    return found


def _shown(page: str) -> str:
    """As a terminal shows it, without bold and underlined."""
    done = subprocess.run(
        ["mandoc", "-T", "utf8"], input=page, capture_output=True, text=True, check=True
    )
    return re.sub(r".\x08", "", done.stdout)


def test_every_verb_has_a_page_with_all_that_its_help_says() -> None:
    pages, verbs = manual.pages(cli), _verbs(cli)
    assert set(pages) == {f"{name}.8" for name in verbs} | {"fusecache.8"}
    assert {"fusecache-mount.8", "fusecache-config-check.8"} < set(pages)
    for name, command in verbs.items():
        shown = _shown(pages[f"{name}.8"])
        words = " ".join(re.sub(r"\u2010\n\s*|-\n\s*", "-", shown).split())
        for param in command.params:
            if isinstance(param, click.Option):
                assert all(option in shown for option in param.opts), (name, param.opts)
                assert param.help is not None
        assert name.replace("-", " ", 1).split("-")[0] in shown
        assert command.epilog is not None, f"{name} has no example"
        assert " ".join(command.epilog.removeprefix("Example: ").split()) in words, name
        assert name in _shown(pages["fusecache.8"]), f"{name} is among SEE ALSO"


@pytest.mark.parametrize(
    "tool",
    [["groff", "-man", "-ww", "-z", "-K", "utf8"], ["mandoc", "-T", "lint", "-W", "warning"]],
)
def test_the_formatters_have_nothing_to_say(tmp_path: Path, tool: list[str]) -> None:
    for name, page in manual.pages(cli).items():
        file = tmp_path / name
        file.write_text(page)
        done = subprocess.run([*tool, file], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).splitlines()
        assert [line for line in said if "missing date" not in line] == [], name


def test_what_means_something_to_the_formatter_is_shown_as_it_is() -> None:
    @click.command(epilog="Example: fusecache odd")
    @click.option("--a-b", help=r"It's `this` and C:\new\file - .so on")
    def odd(a_b: str) -> None:
        """.Begins with a dot. Then more.

        'Begins with a quote.
        """

    group = click.Group("fusecache", commands={"odd": odd}, help="Odd.")
    shown = _shown(manual.pages(group)["fusecache-odd.8"])
    for words in (".Begins with a dot.", "'Begins with", r"It's `this` and C:\new\file - .so on"):
        assert words in " ".join(shown.split()), shown


# -- completion ------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with ``fusecache``, for the search path."""
    program = tmp_path / "bin" / "fusecache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fusecache "$@"\n')
    program.chmod(0o755)
    return program.parent


def completed(
    mount: Mount, programs: Path, *words: str, cwd: Path | None = None, tracer: str = ""
) -> list[str]:
    """What bash offers for the last of ``words``."""
    script = programs / "completion.bash"
    script.write_text(completion.script(cli, "bash"))
    line = " ".join(f"'{word}'" for word in ("fusecache", *words))
    done = subprocess.run(
        [*tracer.split(), "bash", "-c", f". {script}; COMP_WORDS=({line}); "
         f"COMP_CWORD={len(words)}; _fusecache_completion fusecache; "
         "printf '%s\\n' \"${COMPREPLY[@]}\""],
        capture_output=True, text=True, check=False, timeout=60, cwd=cwd or programs,
        env=environment(mount) | {"PATH": f"{programs}:{os.environ['PATH']}",
                                  "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


@pytest.mark.mount
def test_bash_completes_verbs_options_mounts_and_images(mount: Mount, programs: Path) -> None:
    for name in ("vm1.img", "vm2.img", "other.img"):
        (mount.origin / name).write_bytes(bytes(BLOCK))
    mount.start()
    for name in ("vm1.img", "vm2.img", "other.img"):
        (mount.mountpoint / name).read_bytes()
    assert completed(mount, programs, "ev") == ["evict"]
    assert "--discard-dirty" in completed(mount, programs, "evict", "--")
    assert completed(mount, programs, "evict", "vm") == ["vm1.img", "vm2.img"]
    assert completed(mount, programs, "evict", "vm1.img", "vm") == ["vm2.img"]
    below = str(mount.mountpoint / "vm1")
    assert completed(mount, programs, "flush", below) == [f"{mount.mountpoint}/vm1.img"]
    below = str(mount.origin / "o")
    assert completed(mount, programs, "status", below) == [f"{mount.origin}/other.img"]
    assert completed(mount, programs, "set", "oth", cwd=mount.origin) == ["other.img"]
    assert completed(mount, programs, "umount", str(mount.base)) == [str(mount.mountpoint)]
    assert completed(mount, programs, "top", "-m", "") == [str(mount.mountpoint)]
    assert completed(mount, programs, "log-level", "de") == ["debug"]
    assert completed(mount, programs, "evict", "-m", "/none", "vm") == []


@pytest.mark.mount
def test_completion_touches_nothing_below_a_mount_and_waits_for_no_daemon(
    mount: Mount, programs: Path
) -> None:
    (mount.origin / "vm1.img").write_bytes(bytes(BLOCK))
    mount.start()
    (mount.mountpoint / "vm1.img").read_bytes()
    trace = programs / "trace"
    tracer = f"strace -f -qq -e trace=%file -o {trace}"
    assert completed(mount, programs, "evict", "vm", tracer=tracer) == ["vm1.img"]
    calls = trace.read_text()
    assert "fusecache" in calls
    assert f'"{mount.mountpoint}' not in calls, "a hung mount would hang the shell"
    assert mount.pid is not None
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert completed(mount, programs, "evict", "vm") == []
        assert completed(mount, programs, "umount", str(mount.base)) == [str(mount.mountpoint)]
        assert time.monotonic() - began < 20
    finally:
        os.kill(mount.pid, signal.SIGCONT)


def test_scripts_for_all_shells_name_the_program() -> None:
    for shell in completion.SHELLS:
        script = completion.script(cli, shell)
        assert f"_FUSECACHE_COMPLETE={shell}_complete" in script
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-n"], input=completion.script(cli, "bash"), text=True, check=False
    )
    assert done.returncode == 0
