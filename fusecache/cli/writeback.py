"""Writing back without a mount: the engine over a cache that no daemon has open."""

import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from fusecache.cli.progress import Progress
from fusecache.engine.block_cache import BlockCache, open_cache
from fusecache.engine.image import Image
from fusecache.engine.ports import Clock
from fusecache.errors import ChangedElsewhereError, FusecacheError, LostDataError, OriginError
from fusecache.store.block_map import BlockMap, ImageRow, Meta
from fusecache.store.cache_device import CacheDevice
from fusecache.store.tree import Tree

_LOOK = 0.2
_GRACE = 5.0
"""Seconds that a stalled origin has after an interrupt."""


def write_back(
    device: CacheDevice,
    block_map: BlockMap,
    meta: Meta,
    rows: list[ImageRow],
    *,
    evict: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Flushes or evicts these images as a mount would, over the origin of the last mount.

    Args:
        overwrite: a flush also over what others changed meanwhile.

    Returns:
        What a daemon answers: how many images and blocks, and which images failed and why.

    Raises:
        OriginError: the origin is not there.
        FusecacheError: the cache cannot be recovered.
    """
    # What fails is answered in one sentence each; the engine's log has no reader here.
    logging.getLogger("fusecache").addHandler(logging.NullHandler())
    origin = Path(os.fsdecode(meta.origin))
    try:
        tree = Tree(origin)
        tree.measure_clock()
    except OSError as exc:
        raise OriginError(
            exc.errno or 0,
            f"The cache has data that the origin has not, and that origin, {origin}, is not "
            "there: mount its storage, then try again.",
        ) from exc
    try:
        work = _Work(device, block_map, meta, tree, rows, evict, overwrite)
        try:
            return trio.run(work.run, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            for error in group.exceptions:
                if isinstance(error, FusecacheError):
                    raise error from group
            raise
    finally:
        tree.close()


class _Work:
    """One run of the engine; see ``write_back``."""

    def __init__(
        self,
        device: CacheDevice,
        block_map: BlockMap,
        meta: Meta,
        tree: Tree,
        rows: list[ImageRow],
        evict: bool,
        overwrite: bool,
    ) -> None:
        self._open = partial(
            open_cache,
            device,
            block_map,
            pid=os.getpid(),
            mountpoint=meta.mountpoint,
            origin=meta.origin,
            clock=Clock(origin_ns=tree.now_ns),
            pin=tree.pin,
        )
        self._tree = tree
        self._identities = [row.identity for row in rows]
        self._evict, self._overwrite = evict, overwrite
        self._left: dict[int, Image] = {}
        self._blocks = 0
        self._failed: list[dict[str, Any]] = []
        self._interrupted = False

    async def run(self) -> dict[str, Any]:
        """All images side by side; ends with a clean stop, also when it is interrupted."""
        async with self._open() as cache:
            found = [cache.images.find(identity) for identity in self._identities]
            images = [image for image in found if image is not None]
            self._left = {image.id: image for image in images}
            with Progress() as line:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._obey_signals, nursery.cancel_scope)
                    nursery.start_soon(self._show, cache, line)
                    async with trio.open_nursery() as workers:
                        for image in images:
                            workers.start_soon(self._one, cache, image)
                    nursery.cancel_scope.cancel()
                line.show("closing the cache")
        if self._interrupted:
            raise click.Abort
        done = len(images) - len(self._failed)
        return {"images": done, "blocks": self._blocks, "failed": self._failed}

    async def _one(self, cache: BlockCache, image: Image) -> None:
        try:
            await self._written_back(cache, image)
        except (OSError, FusecacheError) as exc:
            self._failed.append(
                {
                    "image": os.fsdecode(image.row.path),
                    "error": exc.strerror if isinstance(exc, OSError) else str(exc),
                    "dirty_bytes": cache.dirty_bytes_of(image),
                    "lost": isinstance(exc, LostDataError),
                    "changed": isinstance(exc, ChangedElsewhereError),
                }
            )
        del self._left[image.id]

    async def _written_back(self, cache: BlockCache, image: Image) -> None:
        row = image.row
        path_fd = await trio.to_thread.run_sync(self._tree.pin, row.path, row.identity)
        if path_fd is None and cache.core.dirty_bytes(image.id):
            raise OriginError(
                2, f"it is not below the origin {self._tree.root} (is its storage mounted?)"
            )
        try:
            if self._evict:
                blocks = await cache.evict(image, path_fd)
                self._blocks += blocks
            else:
                await cache.flush(image, path_fd, overwrite=self._overwrite)
        finally:
            if path_fd is not None:
                os.close(path_fd)

    async def _show(self, cache: BlockCache, line: Progress) -> None:
        of = sum(map(cache.dirty_bytes_of, self._left.values()))
        verb = "evict" if self._evict else "flush"
        while True:
            line.write_back(verb, sum(map(cache.dirty_bytes_of, self._left.values())), of)
            await trio.sleep(_LOOK)

    async def _obey_signals(self, scope: trio.CancelScope) -> None:
        """A signal ends the work; what is left stays on the cache."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self._interrupted = True
                threading.Thread(target=_end_anyway, daemon=True).start()
                scope.cancel()


def _end_anyway() -> None:
    """A call that hangs on a stalled origin cannot be left behind otherwise. The cache is then as
    after a kill: the next start recovers it."""
    time.sleep(_GRACE)
    os.write(
        2,
        b"fusecache: interrupted: the origin does not answer; what is not there yet stays on the "
        b"cache.\n",
    )
    os._exit(1)
