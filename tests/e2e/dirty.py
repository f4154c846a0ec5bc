"""What the tests of write-back share: dirty images, and where their data is."""

import os
from pathlib import Path

from tests.support.daemon import BLOCK, Mount, settle
from tests.support.stamps import check_stamps, stamped

BLOCKS = 16


def back(mount: Mount) -> Mount:
    """The same mount in write-back; nothing is written back by the clock."""
    mount.options |= {"write_mode": "back", "dirty_age": "3600"}
    return mount


def images(mount: Mount, *names: str) -> None:
    """Makes images of version 1 on the origin, numbered from 1."""
    for number, name in enumerate(names, 1):
        (mount.origin / name).write_bytes(stamped(number, 0, BLOCKS * BLOCK, 1))


def write(mount: Mount, name: str, number: int, version: int, blocks: int = 4) -> None:
    """Writes the first blocks of an image through the mount."""
    with open(mount.mountpoint / name, "r+b", buffering=0) as guest:
        for block in range(blocks):
            data = stamped(number, block * BLOCK, BLOCK, version)
            assert os.pwrite(guest.fileno(), data, block * BLOCK) == BLOCK


def version(path: Path, number: int, blocks: int = 4) -> int:
    """The one version that the first blocks of a file have."""
    with open(path, "rb", buffering=0) as file:
        (found,) = set(check_stamps(file.read(blocks * BLOCK), number, 0))
    return found


def on_origin(mount: Mount, name: str, number: int) -> int:
    """As ``version``, of what the origin has."""
    return version(mount.origin / name, number)


def served(mount: Mount, name: str, number: int) -> int:
    """As ``version``, of what the mount gives."""
    return version(mount.mountpoint / name, number)


def dirty_mount(mount: Mount, *names: str, blocks: int = 4, aged: bool = False) -> Mount:
    """Mounted in write-back, with ``blocks`` dirty blocks of version 2 in each image.

    ``aged``: the images' change times are old enough to be trusted.
    """
    images(mount, *names)
    back(mount).start()
    if aged:
        settle(mount.origin / names[-1])
    for number, name in enumerate(names, 1):
        write(mount, name, number, 2, blocks)
        assert on_origin(mount, name, number) == 1
    assert mount.status()["cache"]["dirty_bytes"] == len(names) * blocks * BLOCK
    return mount
