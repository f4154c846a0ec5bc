"""What the name of an image means: in one place for the command line, the daemon, and ``--cache``.

A name is first taken as text (``readings``), by who was given it; what that means is then looked
up on the origin (``look_up``), by who has it open.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from fusecache.control.protocol import readable
from fusecache.errors import ControlError, LinkOutsideError, NotAnImageError, UsageError
from fusecache.store.links import followed
from fusecache.store.tree import Tree


class Place(Protocol):
    """A mount, running or not."""

    @property
    def mountpoint(self) -> Path:
        """Where it is, or was last, mounted."""

    @property
    def origin(self) -> Path:
        """What it shows."""


P = TypeVar("P", bound=Place)


# -- as text ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Readings(Generic[P]):
    """Which places a name may mean, each with the image's path relative to its origin."""

    place: str
    """The path, absolute, with links followed as far as that touches no mount."""
    path: list[tuple[P, str]]
    """As a path, absolute or from the current directory: below a mount, else below an origin."""
    root: list[tuple[P, str]]
    """As a path from the mount's root; none if it is absolute, or the current directory lies below
    a mount or an origin. If both are an image, and not the same, nobody can tell which is meant."""


def readings(name: str, places: Sequence[P], stops: Collection[str]) -> Readings[P]:
    """What the name of an image may mean.

    Args:
        stops: mounts that must not be touched, see ``followed``; those of ``places`` never are.

    Raises:
        UsageError: there is no name.
    """
    if not name:
        raise UsageError("An empty name is no image's. Is a variable of the shell not set?")
    try:
        here = os.getcwd()
    except OSError:
        here = "/"  # it was removed
    path = os.path.normpath(os.path.join(here, name))
    roots = {str(root) for place in places for root in (place.mountpoint, place.origin)}
    found = _below(path, places)
    if not found:
        path = followed(path, roots | {*stops})
        found = _below(path, places)
    if os.path.isabs(name) or _below(here, places):
        return Readings(path, found, [])
    return Readings(path, found, [(place, os.path.normpath(name)) for place in places])


def ambiguous(name: str, images: Iterable[tuple[Place, str]]) -> ControlError:
    """The refusal of a name both of whose readings are images."""
    paths = sorted({os.path.join(place.mountpoint, path) for place, path in images})
    return ControlError(
        f"'{readable(name)[0]}' may mean {' or '.join(readable(path)[0] for path in paths)}: name "
        "the image by its whole path."
    )


def _below(path: str, places: Sequence[P]) -> list[tuple[P, str]]:
    """Which places have the path, and where; mounts come before origins."""
    for roots in ([p.mountpoint for p in places], [p.origin for p in places]):
        found = [
            (place, os.path.relpath(path, root))
            for place, root in zip(places, roots, strict=True)
            if Path(path).is_relative_to(root)
        ]
        if found:
            return found
    return []


# -- on the origin ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meant:
    """What lies at a path relative to the origin."""

    path: bytes
    """Where it is once links were followed."""
    identity: bytes | None
    """Of the regular file there; None if nothing is there."""


def look_up(tree: Tree, name: str, mountpoint: Path) -> Meant:
    """What a path relative to the origin leads to. Blocks as long as the origin does.

    Args:
        mountpoint: links to it, or below it, lead to the origin.

    Raises:
        NotAnImageError: something that is no regular file, or a link to what is outside.
        OSError, OriginError: the origin failed.
    """
    shown, _ = readable(name)
    path = os.fsencode(name)
    if path.split(b"/")[0] == b"..":  # elsewhere ``readings`` leaves none
        return Meant(path, None)
    try:
        path = tree.follow(path, mountpoint)
        found = tree.resolve(path)
    except LinkOutsideError as exc:
        raise NotAnImageError(
            f"'{shown}' is, or lies behind, a link that leads outside the origin {tree.root}, to "
            f"{readable(exc.target)[0]}: name an image below the origin."
        ) from exc
    except (FileNotFoundError, NotADirectoryError):
        return Meant(path, None)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise NotAnImageError(f"'{shown}' leads through too many links.") from exc
        raise
    os.close(found.fd)
    if stat.S_ISREG(found.st.st_mode):
        return Meant(path, found.identity)
    if path == b"":
        raise NotAnImageError(
            f"That is the whole mount {mountpoint}: name an image. For all of them: fusecache "
            "evict --all, or fusecache flush"
        )
    kind = "a directory" if stat.S_ISDIR(found.st.st_mode) else "not a regular file"
    raise NotAnImageError(f"'{shown}' is {kind}: name an image, or several.")
