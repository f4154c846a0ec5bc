"""The kernel's queues: how many it has, if it hands requests over by io_uring.

Linux 6.14 can, where somebody has allowed it: ``echo Y > /sys/module/fuse/parameters/enable_uring``
(Documentation/filesystems/fuse/fuse-io-uring.rst). There is one for each processor that there could
ever be, and all of them have to be served.
"""

import os
from pathlib import Path

ALLOWED = Path("/sys/module/fuse/parameters/enable_uring")
_POSSIBLE = Path("/sys/devices/system/cpu/possible")


def offered() -> bool:
    """Whether the kernel would offer its queues to a mount that is made now."""
    try:
        return ALLOWED.read_text().strip() == "Y"
    except OSError:
        return False


def why_not() -> str:
    """What keeps us from serving them; empty if nothing does, as far as one can tell beforehand."""
    if len(os.sched_getaffinity(0)) != os.cpu_count():
        return "this process may not run on every processor"
    return ""


def count() -> int:
    """How many queues a mount has: processors, also those that are only possible; 0 if unknown."""
    try:
        last = _POSSIBLE.read_text().replace(",", "-").rsplit("-", 1)[-1]
        return int(last) + 1
    except (OSError, ValueError):
        return 0


def threads() -> int:
    """How many threads should serve them: one for each processor that we may use."""
    return max(2, min(64, len(os.sched_getaffinity(0))))
