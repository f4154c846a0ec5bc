"""Symbolic links on the way of a path."""

import os
from collections.abc import Collection

MOST_LINKS = 40
"""As the kernel has it, see path_resolution(7)."""


def followed(path: str, stops: Collection[str]) -> str:
    """The absolute path with the links on its way resolved.

    Args:
        stops: absolute paths; nothing at or below them is touched, it may hang.
    """
    done = "/"
    todo = path.split("/")[::-1]
    links = MOST_LINKS
    while todo:
        part = todo.pop()
        done = os.path.normpath(os.path.join(done, part))
        if done in stops:
            break
        if links and os.path.islink(done):
            links -= 1
            target = os.readlink(done)
            todo += target.split("/")[::-1]
            done = "/" if os.path.isabs(target) else os.path.dirname(done)
    return os.path.normpath(os.path.join(done, *todo[::-1]))
