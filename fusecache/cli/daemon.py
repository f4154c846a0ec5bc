"""The daemon: detaches, opens everything in the process that serves, and composes the layers."""

import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from fusecache.cli.cache import hinted, open_cache_device, wait_until_free
from fusecache.cli.progress import count_text
from fusecache.cli.service import Service
from fusecache.config import MountConfig
from fusecache.control.metrics import listen
from fusecache.control.protocol import make_runtime_directory, runtime_directory
from fusecache.engine.block_cache import open_cache
from fusecache.engine.ports import Clock
from fusecache.errors import FusecacheError, MountError, UsageError
from fusecache.fuse.operations import Operations
from fusecache.fuse.session import Session
from fusecache.observe import logs, sentences
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import Superblock
from fusecache.store.tree import Tree

log = logging.getLogger("fusecache")

NO_XATTRS = "noxattr"
"""As a mount option: no extended attributes. Without the lane the kernel asks for one before every
write."""


def start(plan: MountConfig, again: Callable[[], MountConfig]) -> None:
    """Serves in front, or in the background and returns once it serves.

    Args:
        again: the plan as the configuration file says it now; raises UsageError.

    Raises:
        FusecacheError: it does not serve (in front only; else exits with 1).
    """
    # What a daemon makes for itself is nobody else's; what guests make has the modes they ask for.
    os.umask(0o077)
    if plan.foreground:
        logs.to_front(plan.log_level)
        serve(plan, again, lambda: None)
        return
    wait_until_free(plan.cache)  # here, where an interrupt still reaches us
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        os.close(reader)
        _background(plan, again, writer)
    os.close(writer)
    _await_readiness(reader, pid)


def _await_readiness(reader: int, pid: int) -> None:
    """Relays what the daemon, libfuse and fusermount3 say until it serves or fails."""
    with open(reader, "rb") as stream:
        try:
            while part := stream.read1(4096):
                sys.stderr.buffer.write(part.rstrip(b"\0"))
                sys.stderr.flush()
                if part.endswith(b"\0"):
                    return
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGTERM)  # it has a session of its own and saw no interrupt
            raise
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        name = signal.Signals(-status).name
        raise MountError(f"The daemon was ended by {name} before it served; see {log_place()}.")
    sys.exit(status or 1)


def _background(plan: MountConfig, again: Callable[[], MountConfig], writer: int) -> NoReturn:
    """The child: its own session, none of the caller's descriptors, errors through the pipe."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(writer, 2)  # libfuse and fusermount3 write there, too
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    logs.to_system(plan.log_level, make_runtime_directory())

    def ready() -> None:
        os.write(2, b"\0")
        silent = os.open(os.devnull, os.O_RDWR)
        os.dup2(silent, 2)
        os.close(silent)

    status = 1
    try:
        serve(plan, again, ready)
        status = 0
    except FusecacheError as exc:
        log.error("%s", exc)
        os.write(2, sentences.line(f"fusecache: {exc}"))
        status = 2 if isinstance(exc, UsageError) else 1
    except BaseException:
        log.exception("the daemon ends by an unexpected error")
        os.write(2, f"fusecache: An unexpected error; please report {log_place()}.\n".encode())
    finally:
        logging.shutdown()
    os._exit(status)


def log_place() -> str:
    """Where the daemon in the background logs, for people."""
    return logs.system_log() or str(runtime_directory() / "fusecache.log")


def serve(plan: MountConfig, again: Callable[[], MountConfig], ready: Callable[[], None]) -> None:
    """Opens the cache, mounts, and serves until unmounted. See ``start`` for ``again``.

    Raises:
        FusecacheError: it cannot, or could not be closed.
    """
    _raise_descriptor_limit()
    with ExitStack() as stack:
        listener = None
        if plan.metrics is not None:  # first, so that nothing has begun if it cannot be had
            listener = stack.enter_context(listen(*plan.metrics))
        _open_and_serve(plan, again, ready, listener)


def _open_and_serve(
    plan: MountConfig,
    again: Callable[[], MountConfig],
    ready: Callable[[], None],
    listener: socket.socket | None,
) -> None:
    device, block_map = open_cache_device(plan.cache, plan.database, plan.size, plan.block_size)
    try:
        _refuse_another_origin(plan, device.superblock, block_map)
        tree = _open_origin(plan.origin)
        trio.run(
            partial(_serve, plan, again, device, block_map, tree, ready, listener),
            strict_exception_groups=True,
        )
    except BaseExceptionGroup as group:
        raise _first(group) from group
    finally:
        block_map.close()
        device.close()


def _refuse_another_origin(plan: MountConfig, superblock: Superblock, block_map: BlockMap) -> None:
    """Data that waits for one origin must not be looked for on another."""
    before = Path(os.fsdecode(block_map.meta().origin))
    if before == plan.origin:
        return
    dirty = [image for image in block_map.images() if block_map.has_dirty(image.id)]
    if dirty:
        raise MountError(
            f"The cache {plan.cache} has data of {count_text(len(dirty))} that waits for the "
            f"origin {before}: mount that origin, or bring it there with fusecache flush --cache "
            f"{hinted(plan.cache, block_map.path, superblock)}"
        )


def _open_origin(origin: Path) -> Tree:
    try:
        tree = Tree(origin)
        tree.measure_clock()
    except OSError as exc:
        raise MountError(f"The origin {origin} cannot be used: {exc.strerror}.") from exc
    return tree


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that counts of a group: the first domain error, else the first of all."""
    flat: list[BaseException] = []
    queue: list[BaseException] = [group]
    while queue:
        item = queue.pop(0)
        if isinstance(item, BaseExceptionGroup):
            queue.extend(item.exceptions)
        else:
            flat.append(item)
    return next((exc for exc in flat if isinstance(exc, FusecacheError)), flat[0])


def _raise_descriptor_limit() -> None:
    """Every inode the kernel knows costs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    plan: MountConfig,
    again: Callable[[], MountConfig],
    device: CacheDevice,
    block_map: BlockMap,
    tree: Tree,
    ready: Callable[[], None],
    listener: socket.socket | None,
) -> None:
    operations: Operations | None = None

    def invalidate(identity: bytes) -> None:
        if operations is not None:
            operations.invalidate(identity)

    async with open_cache(
        device,
        block_map,
        pid=os.getpid(),
        mountpoint=os.fsencode(plan.mountpoint),
        origin=os.fsencode(plan.origin),
        write_mode=plan.write_mode,
        rules=plan.rules,
        tuning=plan.tuning,
        clock=Clock(origin_ns=tree.now_ns),
        invalidate=invalidate,
        pin=tree.pin,
    ) as cache:
        gc.collect()
        gc.freeze()  # what lives as long as the mount need not be looked at again
        operations = Operations(cache, tree, xattrs=NO_XATTRS not in plan.options)
        session = Session(operations, cache, plan.mountpoint, plan.lane)
        options = tuple(option for option in plan.options if option != NO_XATTRS)
        session.mount(plan.origin, options, read_only=tree.read_only)
        try:
            service = Service(plan, again, cache, tree, operations, session, listener)
            await service.run(ready)
        finally:
            session.close()
