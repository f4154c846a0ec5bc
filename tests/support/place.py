"""A directory of a mount, seen from both sides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.daemon import Mount


@dataclass(frozen=True)
class Place:
    """``cached / name`` is what guests see, ``origin / name`` what lies there."""

    mount: Mount
    name: str

    @property
    def cached(self) -> Path:
        """Through the mount."""
        return self.mount.mountpoint / self.name

    @property
    def origin(self) -> Path:
        """Behind it."""
        return self.mount.origin / self.name

    def image(self, name: str) -> dict[str, Any]:
        """The status of an image in this directory."""
        return self.mount.image(f"{self.name}/{name}")

    def evict(self, name: str) -> None:
        """Evicts an image in this directory."""
        done = self.mount.run("evict", f"{self.name}/{name}", "-m", self.mount.mountpoint)
        assert done.returncode == 0, done.stderr
