"""Asynchronous direct reads through the kernel's own interface (io_submit), as QEMU does them."""

import ctypes
import mmap
import platform
import time
from types import TracebackType

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
# io_setup, io_destroy, io_submit, io_getevents
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_PREAD = 0


class _Iocb(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("reqprio", ctypes.c_int16),
        ("fildes", ctypes.c_uint32),
        ("buf", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved2", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("resfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("obj", ctypes.c_uint64),
        ("res", ctypes.c_int64),
        ("res2", ctypes.c_int64),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class AsyncReads:
    """Reads of one descriptor that are all under way at once.

    Args:
        fd: opened with O_DIRECT.
        offsets: where each read begins; each reads ``length`` bytes.
    """

    def __init__(self, fd: int, offsets: list[int], length: int) -> None:
        numbers = _NUMBERS[platform.machine()]
        self._setup, self._destroy, self._submit, self._getevents = numbers
        self._offsets, self._length = offsets, length
        self._buffer = mmap.mmap(-1, len(offsets) * length)
        self._pointer = ctypes.c_char.from_buffer(self._buffer)
        base = ctypes.addressof(self._pointer)
        self._requests = [
            _Iocb(number, 0, 0, _PREAD, 0, fd, base + number * length, length, offset, 0, 0, 0)
            for number, offset in enumerate(offsets)
        ]
        self._context = ctypes.c_ulong(0)
        self.data: dict[int, bytes] = {}
        """By offset: what came back so far."""

    def __enter__(self) -> "AsyncReads":
        self._call(self._setup, len(self._requests), ctypes.byref(self._context))
        pointers = [ctypes.pointer(request) for request in self._requests]
        array = (ctypes.POINTER(_Iocb) * len(pointers))(*pointers)
        submitted = self._call(self._submit, self._context, len(pointers), array)
        assert submitted == len(pointers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Waits for what is under way: a test that fails must have ended the hang by then.
        self._call(self._destroy, self._context)
        del self._pointer
        self._buffer.close()

    def _call(self, number: int, *args: object) -> int:
        result = int(_LIBC.syscall(ctypes.c_long(number), *args))
        if result < 0:
            raise OSError(ctypes.get_errno(), "asynchronous reads")
        return result

    def reap(self, seconds: float) -> int:
        """Collects what has come back, until all has or time is up; returns how many by now.

        Raises:
            OSError: a read failed.
        """
        events = (_Event * len(self._requests))()
        deadline = time.monotonic() + seconds
        while len(self.data) < len(self._requests) and time.monotonic() < deadline:
            wait = _Timespec(0, 50_000_000)
            most = ctypes.c_long(len(events))
            got = self._call(
                self._getevents, self._context, ctypes.c_long(1), most, events, ctypes.byref(wait)
            )
            for event in events[:got]:
                if event.res < 0:
                    raise OSError(-event.res, "an asynchronous read failed")
                at = int(event.data)
                begin = at * self._length
                self.data[self._offsets[at]] = self._buffer[begin : begin + event.res]
        return len(self.data)
