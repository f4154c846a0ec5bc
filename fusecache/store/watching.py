"""The database and the cache device watch each other, so that neither can go back in time alone.

Every commit leaves its number on the device, unsynced; a barrier's sync makes it stable; the
database notes which number was synced. ``Witness.contradiction`` says what cannot be.
"""

from pathlib import Path
from typing import Protocol

from fusecache.errors import CacheDeviceError, DatabaseError
from fusecache.store.records import Meta
from fusecache.store.superblock import Witness


class WitnessKeeper(Protocol):
    """What keeps the witness: the cache device."""

    synced_commit: int
    """The last commit whose note is surely stable."""

    def read_witness(self) -> Witness:
        """As it stands there now."""

    def write_witness(self, witness: Witness, *, stable: bool = False) -> None:
        """Unsynced, unless ``stable``."""


class Watch:
    """One database's side.

    Args:
        path: of the database.
        log_missing: whether there was no write-ahead log before it was opened.
    """

    def __init__(self, path: Path, *, log_missing: bool) -> None:
        self._path = path
        self._log_missing = log_missing
        self._keeper: WitnessKeeper | None = None
        self._told = Witness()

    @property
    def synced(self) -> int:
        """The last commit that the device stably knows of, as far as this life can tell."""
        return 0 if self._keeper is None else self._keeper.synced_commit

    def believe(self, meta: Meta, witness: Witness, *, same_boot: bool) -> None:
        """Raises DatabaseError if database and device are not of the same time."""
        if witness.blank:
            if lost_record(meta, witness):
                raise DatabaseError(
                    f"The cache device has lost its record of the commits of {self._path}"
                )
            return
        wrong = witness.contradiction(meta.commits, meta.synced, same_boot=same_boot)
        if wrong is None:
            return
        log = f"; there was no write-ahead log {self._path.name}-wal" if self._log_missing else ""
        raise DatabaseError(
            f"The database {self._path} {wrong} (commit {meta.commits}, the device knows of "
            f"{witness.commits}){log}: its rows may name slots that hold other data by now"
        )

    def begin(self, meta: Meta, keeper: WitnessKeeper, boot_id: str, *, believed: bool) -> None:
        """See ``BlockMap.watch``; changes ``meta.commits``."""
        witness = keeper.read_witness()
        if believed:
            self.believe(meta, witness, same_boot=meta.boot_id == boot_id)
        if witness.blank:
            # Stable before the first commit says that there is one.
            witness = Witness(meta.commits, meta.commits)
            keeper.write_witness(witness, stable=True)
        # A power cut may have taken back commits that the device knows of.
        meta.commits = max(meta.commits, witness.commits)
        self._told = witness
        self._keeper = keeper

    def note(self, commits: int, *, stable: bool) -> None:
        """Tells the device of a commit. If that fails, ``synced`` stays behind."""
        if self._keeper is not None:
            witness = Witness(commits, commits if stable else self._told.stable)
            try:
                self._keeper.write_witness(witness)
            except CacheDeviceError:
                return
            self._told = witness


class Place:
    """Where a database and its log were when they were opened. A file that is removed stays open,
    and takes every commit; but no start will find it."""

    def __init__(self, path: Path) -> None:
        files = (path, Path(f"{path}-wal"))
        self._files = {file: there for file in files if (there := _identity(file)) is not None}

    def gone(self) -> str | None:
        """What became of them, if they are not there any more; a part of a sentence."""
        for file, there in self._files.items():
            try:
                found = _identity(file)
            except OSError:
                continue  # nobody can tell
            if found is None:
                return f"{file} was removed"
            if found != there:
                return f"{file} was replaced by another file"
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def lost_record(meta: Meta, witness: Witness) -> bool:
    """Whether the device had a record of this database's commits and has it no more.

    None is there before the first start, nor after a start of version 1.
    """
    return witness.blank and bool(meta.boot_id) and meta.commits > 0
