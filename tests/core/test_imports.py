"""Imports run one way: ``cli -> fuse, control -> engine -> store -> core``."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusecache

ROOT = Path(fusecache.__file__).parent
EVERYBODYS = {"observe", "errors", "config"}
ALLOWED = {
    "core": EVERYBODYS,
    "store": {"core"} | EVERYBODYS,
    "engine": {"store", "core"} | EVERYBODYS,
    "fuse": {"lane", "engine", "store", "core"} | EVERYBODYS,
    "lane": set(),
    "control": {"engine", "store", "core"} | EVERYBODYS,
    "cli": {"fuse", "lane", "control", "engine", "store", "core"} | EVERYBODYS,
    "observe": {"core"},
    "config": {"errors"},
    "errors": set(),
    "__main__": {"cli"},
    "__init__": set(),
}
ONLY_IN = {
    "pyfuse3": {"fuse"},
    "sqlite3": {"store"},
    "sqlite_utils": {"store"},
    "trio": {"engine", "fuse", "control", "cli", "observe"},
    "click": {"cli"},
    "prometheus_client": {"observe"},
    "rich": {"cli", "observe"},
    "logging": {"store", "engine", "fuse", "control", "cli", "observe"},
}


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that Python source names in an import, also inside functions.

    Args:
        package: the dotted package the source lies in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join(base) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(source: str, part: str) -> list[str]:
    """The imports that a file of this part of the house must not have."""
    package = "fusecache" if part in ("__init__", "__main__", "config", "errors") else (
        f"fusecache.{part}"
    )  # fmt: skip
    wrong = []
    for name in imports(source, package):
        top, _, rest = name.partition(".")
        if top == "fusecache":
            other = rest.partition(".")[0]
            if other in ALLOWED and other not in ALLOWED[part] | {part}:
                wrong.append(name)
        elif part not in ONLY_IN.get(top, {part}):
            wrong.append(name)
    return wrong


def files() -> list[Path]:
    """All of the package, without what was compiled."""
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    part = path.parts[0] if len(path.parts) > 1 else path.stem
    assert part in ALLOWED, f"{path} is in no known part of the house: name it in this test"
    assert wrong_imports((ROOT / path).read_text(), part) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "import trio"),
        ("core", "import logging"),
        ("core", "from fusecache.store import origin"),
        ("core", "from fusecache import store"),
        ("core", "from ..store import origin"),
        ("store", "def later():\n    from fusecache.engine.image import Image"),
        ("store", "import trio.abc"),
        ("engine", "import sqlite3"),
        ("engine", "import fusecache.fuse.session"),
        ("engine", "from sqlite_utils.db import Table"),
        ("fuse", "from fusecache.control import server"),
        ("control", "from .. import fuse"),
        ("control", "import click"),
        ("observe", "from fusecache.errors import OriginError"),
        ("observe", "from fusecache.store.schema import SCHEMA_VERSION"),
        ("config", "from .core import geometry"),
        ("errors", "from fusecache import config"),
        ("cli", "import pyfuse3"),
    ],
)
def test_a_wrong_arrow_is_seen(part: str, source: str) -> None:
    assert wrong_imports(source, part)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "from fusecache.core.slots import NO_SLOT\nfrom .tags import TagIndex"),
        ("cli", "import click, rich.table\nfrom fusecache.fuse import session"),
        ("engine", "import trio\nfrom fusecache.store.block_map import BlockMap"),
    ],
)
def test_a_right_arrow_passes(part: str, source: str) -> None:
    assert wrong_imports(source, part) == []


@pytest.mark.parametrize("verb", ["umount", "evict", "flush", "set", "status", "reload", "doctor"])
def test_verbs_that_only_ask_load_nothing_that_takes_long_to_load(verb: str) -> None:
    """They are called from scripts, hooks and completion, many times."""
    program = (
        "import sys, click; from fusecache.cli.main import cli; "
        f"assert cli.get_command(click.Context(cli), {verb!r}) is not None; "
        "print(*{'numpy', 'sqlite3', 'sqlite_utils', 'rich', 'trio', 'pyfuse3'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
