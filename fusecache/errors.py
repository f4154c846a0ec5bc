"""Every error of the project, and the one table from errors to errno.

Inside, code raises these; only ``fuse/`` turns them into an errno for the kernel, and only
``cli/`` into a sentence and an exit code. Messages are whole sentences for an operator and
say what to do.
"""

import errno


class FusecacheError(Exception):
    """Base of all domain errors. ``str(exc)`` is a sentence for the operator."""


class UsageError(FusecacheError):
    """The command was given something it cannot mean (exit code 2)."""


class NotACacheError(FusecacheError):
    """The cache path holds no fusecache superblock."""


class EmptyCacheError(NotACacheError):
    """The cache path holds nothing at all, so it may be formatted."""


class SuperblockError(FusecacheError):
    """A fusecache superblock is there but damaged or of an unknown version."""


class CacheInUseError(FusecacheError):
    """Another process has the cache open."""


class CacheDeviceError(FusecacheError):
    """The cache device failed a read, a write or a sync."""


class RetiredSlotError(CacheDeviceError):
    """A slot that failed before holds dirty data, and takes no more."""


class DatabaseError(FusecacheError):
    """The block map's database is missing, damaged, foreign or cannot be written."""


class OriginError(FusecacheError):
    """The origin failed a call; ``errno`` is what it said."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


class LinkOutsideError(FusecacheError):
    """A symbolic link leads out of the origin; ``target`` is where to."""

    def __init__(self, target: str) -> None:
        super().__init__(f"a link leads outside the origin, to {target}")
        self.target = target


class LockedElsewhereError(OriginError):
    """Another host, or another mount of this one, holds the lock of an image (P8)."""


class ChangedElsewhereError(OriginError):
    """Others changed an image while an earlier life's dirty data of it waited here."""


class LocksUnsupportedError(OriginError):
    """The origin has no locks."""


class LostDataError(FusecacheError):
    """The cache device lost what a guest had written and the origin does not have (EIO)."""


class GivenUpError(FusecacheError):
    """The user interrupted the work; the sentence says how things are now."""


class ImageOpenError(FusecacheError):
    """The image is open, and what was asked for is done to closed ones only."""


class MountError(FusecacheError):
    """The filesystem cannot be mounted or unmounted."""


class ControlError(FusecacheError):
    """The daemon cannot be reached or refused a request."""


class NotAnImageError(ControlError):
    """Where a name leads to is no regular file of the origin."""


class IllegalStep(FusecacheError):
    """A slot was asked to make a step that its state does not allow: always a bug."""


OF_THE_KERNEL = (errno.ENOTCONN, errno.ECONNABORTED)
"""What it answers for a mount whose connection it has ended. Nobody else does, or a mount that is
served would be taken for a dead one, if its origin is a dead FUSE mount."""


def errno_of(exc: BaseException) -> int:
    """The errno a guest gets for ``exc``; EIO for anything nobody foresaw."""
    if isinstance(exc, OriginError | OSError) and exc.errno and exc.errno not in OF_THE_KERNEL:
        return int(exc.errno)
    return errno.EIO
