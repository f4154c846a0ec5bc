"""Builds the lane for tests: with a device that can be held up, with sanitizers, or broken on
purpose. ``FUSECACHE_LANE_FLAGS`` adds flags, ``FUSECACHE_LANE_SOURCES`` names other sources."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "fusecache" / "lane"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
HELD_DEVICE = (
    "-Dpreadv2=held_preadv2",
    "-Dpwrite=held_pwrite",
    "-Dfdatasync=held_fdatasync",
    "-Wl,--wrap=ring_make,--wrap=ring_enter,--wrap=ring_wait",
    f"-I{SOURCES}",
    str(HERE / "held_device.c"),
)


def source_names() -> list[str]:
    """The C files of the extension, as the package names them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    return [Path(name).name for name in module["sources"]]


def compiler() -> list[str]:
    """What every build begins with."""
    return ["gcc", "-std=gnu11", "-O2", "-g", "-fstack-protector-strong", *WARNINGS, "-pthread"]


def build(into: Path, *flags: str, sources: Path = SOURCES) -> Path:
    """Compiles the extension module to ``into``, a directory; returns the module."""
    module = into / f"_lane{sysconfig.get_config_var('EXT_SUFFIX')}"
    names = [str(sources / name) for name in source_names()]
    include = f"-I{sysconfig.get_path('include')}"
    command = [*compiler(), "-shared", "-fPIC", include, *flags, "-o", str(module), *names]
    subprocess.run(command, check=True)
    return module


def build_held(into: Path) -> Path:
    """As the tests of this directory want it: see held_device.c."""
    flags = os.environ.get("FUSECACHE_LANE_FLAGS", "").split()
    sources = Path(os.environ.get("FUSECACHE_LANE_SOURCES", SOURCES))
    return build(into, *HELD_DEVICE, *flags, sources=sources)


def load(module: Path) -> Any:
    """The module at this path, beside whatever the package has."""
    spec = importlib.util.spec_from_file_location("fusecache.lane._lane", module)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def broken_sources(into: Path, file: str, old: str, new: str) -> Path:
    """Copies of the sources, in one of which ``old`` became ``new``, as it is found once."""
    for path in SOURCES.glob("*.[ch]"):
        shutil.copy(path, into)
    text = (into / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    (into / file).write_text(text.replace(old, new))
    return into


def instead(into: Path, module: Path) -> dict[str, str]:
    """The environment in which every Python loads this module for the package's own one."""
    (into / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'fusecache.lane._lane':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(module)!r})\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    paths = [str(into), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
