"""The lane: compiled threads between the kernel and Python, which answer what is simply a hit.

Optional. Everything works without it, only slower; see docs/architecture.md.
"""

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

LOOKUP, GETATTR, OPEN, READ, WRITE, RELEASE = 1, 3, 14, 15, 16, 18
FSYNC, FLUSH, FALLOCATE, LSEEK = 20, 25, 43, 46
"""The requests that Python gets from it: opcodes of ``<linux/fuse.h>``."""


def why_not() -> str:
    """Why there is no lane; empty if there is one."""
    if platform.machine() != "x86_64":
        return f"it relies on the order in which x86-64 stores, and this is {platform.machine()}"
    try:
        import fusecache.lane._lane  # noqa: F401  # whether it can be
    except ImportError as exc:
        return f"it was not built when fusecache was installed ({exc})"
    return ""


def lane_type() -> "type[Lane]":
    """The class. Raises ImportError where ``why_not`` says something."""
    from fusecache.lane._lane import Lane

    return Lane
