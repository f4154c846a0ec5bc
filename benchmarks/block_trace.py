"""Block traces: what a disk was asked for, in order. Read from two forms of file.

``.fct.xz``: an xz stream of the magic ``FCTRACE1``, a uint64 n, then five columns of n entries,
one column after the other, little endian: time (int64, microseconds since the first request, -1
where the source has none), volume (uint16), offset (uint64, bytes), length (uint32, bytes),
operation (uint8: 0 read, 1 write, 2 not known).

``.csv``: a line a request, with the same five in that order, the operation as ``r``, ``w`` or
``?``. Lines that do not begin with a number, like a heading, are left out.
"""

import csv
import lzma
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from harness import BenchmarkError

READ, WRITE, UNKNOWN = 0, 1, 2

_MAGIC = b"FCTRACE1"
_COLUMNS = ("<i8", "<u2", "<u8", "<u4", "u1")
_LETTERS = {"r": READ, "w": WRITE, "?": UNKNOWN}


@dataclass(frozen=True)
class Trace:
    """Requests as equally long columns: times in microseconds (negative: not known), volumes,
    offsets and lengths in bytes, operations."""

    name: str
    time: npt.NDArray[np.int64]
    volume: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    operation: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.offset.size)

    def part(self, first: int, count: int | None) -> "Trace":
        """Requests from ``first`` on, ``count`` of them or all."""
        return self._where(slice(first, None if count is None else first + count))

    def _where(self, keep: slice | npt.NDArray[np.bool_]) -> "Trace":
        names = ("time", "volume", "offset", "length", "operation")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    def usable(self, unknown: int) -> "Trace":
        """Without requests of no length; operations that are not known count as ``unknown``."""
        operation = np.where(self.operation == UNKNOWN, unknown, self.operation)
        return replace(self, operation=operation)._where(self.length > 0)

    def sizes(self, unit: int) -> dict[int, int]:
        """By volume: where its last request ends, up to a whole ``unit`` of bytes."""
        found = {}
        for volume in np.unique(self.volume).tolist():
            mine = self.volume == volume
            end = int((self.offset[mine] + self.length[mine]).max())
            found[volume] = -(-end // unit) * unit
        return found

    def unique_bytes(self, unit: int) -> int:
        """Bytes of all units, like pages or blocks, that any request touches."""
        total = 0
        for volume in np.unique(self.volume).tolist():
            mine = self.volume == volume
            first = self.offset[mine] // unit
            last = (self.offset[mine] + self.length[mine] - 1) // unit
            # +1 where a request begins, -1 after its end: touched is where the sum is not 0.
            edges = np.unique(np.concatenate([first, last + 1]))
            depth = np.zeros(edges.size, np.int64)
            np.add.at(depth, np.searchsorted(edges, first), 1)
            np.add.at(depth, np.searchsorted(edges, last + 1), -1)
            touched = np.cumsum(depth)[:-1] > 0
            total += int(np.diff(edges)[touched].sum()) * unit
        return total

    def rows(self) -> list[tuple[int, int, int, int, int]]:
        """(time, volume, offset, length, operation) of every request, as plain integers."""
        columns = (self.time, self.volume, self.offset, self.length, self.operation)
        return list(zip(*(column.tolist() for column in columns), strict=True))


def read_trace(path: Path) -> Trace:
    """The trace in a file.

    Raises:
        BenchmarkError: it is not there, of neither form, or damaged.
    """
    try:
        columns = _read_csv(path) if path.suffix == ".csv" else _read_fct(path)
    except (OSError, lzma.LZMAError, ValueError, KeyError, IndexError) as exc:
        raise BenchmarkError(f"{path} cannot be read as a trace: {exc}") from exc
    name = path.name.removesuffix(".xz").removesuffix(".fct").removesuffix(".csv")
    return Trace(name, *(column.astype(np.int64) for column in columns))


def _read_fct(path: Path) -> list[npt.NDArray[np.generic]]:
    data = lzma.decompress(path.read_bytes())
    if data[:8] != _MAGIC:
        raise ValueError("it does not begin with FCTRACE1")
    count = int.from_bytes(data[8:16], "little")
    widths = [np.dtype(column).itemsize for column in _COLUMNS]
    if len(data) != 16 + count * sum(widths):
        raise ValueError(f"{len(data)} bytes do not hold {count} requests")
    found, at = [], 16
    for column, width in zip(_COLUMNS, widths, strict=True):
        found.append(np.frombuffer(data, column, count, at))
        at += count * width
    return found


def _read_csv(path: Path) -> list[npt.NDArray[np.generic]]:
    with path.open(newline="") as file:
        lines = [line for line in csv.reader(file) if line and line[0].lstrip("-").isdigit()]
    rows = [(*map(int, line[:4]), _LETTERS[line[4].strip()]) for line in lines]
    return list(np.array(rows, np.int64).reshape(-1, 5).T)
