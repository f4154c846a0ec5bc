"""How a mount stands: served, dead, or neither for certain. Only a dead one is ever cleared."""

import enum
import time
from dataclasses import dataclass

from fusecache.control import client
from fusecache.fuse import mounts
from fusecache.fuse.mounts import Answer
from fusecache.store import mountinfo, processes
from fusecache.store.mountinfo import MountPoint

_LOOKS = 5
_PAUSE = 0.2
"""Seconds between two looks. One that is just mounting has ``/dev/fuse`` open before anybody can
tell for which mount; one that was killed may be about to end, and no sign of that is left."""


class State(enum.Enum):
    """Of a mount that no daemon answered for at its control socket."""

    WORKS = enum.auto()
    HANGS = enum.auto()
    """A living process has it and does not answer."""
    DEAD = enum.auto()
    UNKNOWN = enum.auto()


@dataclass(frozen=True, slots=True)
class Standing:
    """How one mount stands."""

    mounted: MountPoint
    state: State
    pid: int | None = None
    """The process that has it, where it hangs."""

    @property
    def plight(self) -> str:
        """What is wrong with it, where it hangs or nobody can tell; without a full stop."""
        if self.pid is not None:
            return (
                f"{self.mounted.path} is served by process {self.pid}"
                f"{processes.shown(self.pid)}, which {client.does_not_answer(self.pid)}"
            )
        return (
            f"{self.mounted.path} does not answer, and which process serves it cannot be told "
            "from here (it may be of another user or in a container)"
        )


def judge(mounted: MountPoint) -> Standing:
    """Asks the mount itself and, if it is silent, looks who has its connection open.

    It is dead only if the kernel has ended the connection, or if a killed process has it that hangs
    in the kernel, and no living process has it.
    """
    told = {
        Answer.WORKS: State.WORKS, Answer.UNKNOWN: State.UNKNOWN, Answer.DISCONNECTED: State.DEAD,
    }  # fmt: skip
    if (answer := mounts.ask(mounted.path)) in told:
        # A dead mount above it, which the way to it leads through, gives the same answer.
        if answer is Answer.DISCONNECTED and mounts.ask(mounted.path.parent) is answer:
            return Standing(mounted, State.UNKNOWN)
        return Standing(mounted, told[answer])
    living: tuple[int, ...] = ()
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        found = processes.holders(mounted.device, client.noted_mount)
        living = found.living
        if living or found.unsure:
            continue
        if found.killed:
            return Standing(mounted, State.DEAD)
        if (answer := mounts.ask(mounted.path)) in told:  # who had it has ended since
            return Standing(mounted, told[answer])
    if living:
        return Standing(mounted, State.HANGS, living[0])
    return Standing(mounted, State.UNKNOWN)


def clear(dead: Standing) -> None:
    """Detaches a dead mount. If its connection is wedged it is aborted first, so that whoever waits
    for it is released.

    Raises:
        MountError: it cannot be detached.
    """
    assert dead.state is State.DEAD, dead
    if mountinfo.mount_at(dead.mounted.path) != dead.mounted:
        return  # somebody else has; the connection's number may be another mount's by now
    mounts.abort(dead.mounted)
    mounts.unmount(dead.mounted.path, detach=True)
