"""The compiled part; see lane.h and module.c."""

from collections.abc import Mapping
from typing import Any

class Lane:
    """Threads that serve one mount. Started when made."""

    def __init__(
        self,
        *,
        arrays: Mapping[str, Any],
        slot_count: int,
        gate_count: int,
        block_shift: int,
        page_shift: int,
        tag_shift: int,
        tag_bits: int,
        soiled_room: int,
        fuse: int,
        passed: int,
        device: int,
        data_offset: int,
        readers: int,
        spares: int,
        ring: bool,
        capability: bool,
        max_background: int,
        queues: int = 0,
        queue_threads: int = 0,
    ) -> None:
        """Makes descriptors of its own of those given, as long as it is not stopped.

        Args:
            arrays: ``CacheIndex.arrays()``.
            fuse: ``/dev/fuse``, mounted.
            passed: our end of a SOCK_SEQPACKET pair; pyfuse3 has the other one.
            device: the cache device, whose slots begin at ``data_offset``.
            readers: threads that read requests; ``spares`` take over while these wait for the
                device.
            ring: instead of spares let one thread wait for the device by io_uring, where that is
                allowed. A reader waits by itself while another one reads and nobody waits.
            queues: of the kernel, which uses them instead of ``fuse`` if it can and io_uring is not
                forbidden; ``queue_threads`` serve them. 0: it shall not.
            capability: answer the question for ``security.capability`` of images.

        Raises:
            OSError: no memory or no threads for it.
            ValueError, KeyError: the arrays do not fit the numbers.
        """
    @property
    def queue(self) -> int:
        """A descriptor that is readable while something waits for ``take``."""
    @property
    def ended(self) -> bool:
        """Whether the kernel has no more requests: unmounted, or aborted."""
    @property
    def takes_queues(self) -> bool:
        """Whether requests come by the kernel's queues, if it still offers them at INIT."""
    def take(self) -> list[tuple[int, int, int, int, int, int, bytes | None]]:
        """Requests that Python must answer, each with ``reply``: unique number, opcode, handle (of
        a LOOKUP, GETATTR or OPEN: node), offset, length (of an OPEN: whose it is, a process id),
        detail (flags of an FSYNC or OPEN, mode of a FALLOCATE, whence of an LSEEK; of a LOOKUP: 0,
        or one more than an O_PATH descriptor of what it asks for, which is the caller's), and the
        data of a WRITE or name of a LOOKUP."""
    def reply(self, unique: int, error: int, data: bytes | memoryview, /) -> int:
        """Answers a request; returns the errno of that. ENOENT: nobody waits for it any more."""
    def open(self, handle: int, node: int, gate: int, writes: bool, /) -> None:
        """From now on requests with this handle pass this gate. If nothing is written by it, there
        is nothing to do when it is closed, before its last close."""
    def close(self, handle: int, /) -> None:
        """The handle is no more."""
    def open_directory(self, node: int, fd: int, /) -> None:
        """From now on names in this directory may be looked up by its descriptor."""
    def close_directory(self, node: int, /) -> None:
        """The kernel has forgotten it, and the descriptor may be closed."""
    def keep_attributes(self, node: int, fd: int, answer: bytes, /) -> None:
        """This ``struct fuse_attr_out`` was told of a node, or would be. It may be told until
        ``drop_attributes``, as long as ``fstat`` of the descriptor says the same.

        Raises:
            ValueError: it is of another length.
        """
    def drop_attributes(self, node: int, /) -> None:
        """Questions for its attributes are Python's, as they are of a node nothing was told of."""
    def invalidate(self, node: int, /) -> None:
        """Makes the kernel forget pages and attributes. Blocks, without the GIL.

        Raises:
            OSError: ENOENT: the kernel does not know the node.
        """
    def enter(self, timeout: float = ..., /) -> None:
        """From here to ``leave`` the lane changes nothing in the arrays but ticks and counters.
        ``timeout``: of the event loop's wait; here and in ``leave`` nothing depends on it."""
    def leave(self, timeout: float = ..., /) -> None:
        """See ``enter``."""
    def bring_answers(self, timeout: float = ..., /) -> None:
        """Gives what pyfuse3 has answered to the kernel, waiting for no more. If the event loop
        will not wait, it looks only now and then for answers that were not announced by
        ``make_room``. For one thread at a time."""
    def make_room(self) -> None:
        """For who is about to answer a request by pyfuse3: brings the answers of others."""
    def stop(self, seconds: float, /) -> bool:
        """Ends all threads; False if one still hangs in the device after so many seconds."""
    def counters(self) -> dict[str, Any]:
        """Numbers since the start; ``read_ns`` and ``write_ns`` by powers of two; ``ring``: whether
        there is io_uring; ``queues``: whether the kernel uses its queues."""
