"""What the daemon does for each verb that comes through the control socket."""

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fusecache.config import LOG_LEVELS, WriteMode
from fusecache.control import protocol
from fusecache.control.image_names import Meant, look_up
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.snapshot import (
    cache_snapshot,
    history_snapshot,
    image_snapshots,
    mount_snapshot,
)
from fusecache.errors import (
    ChangedElsewhereError,
    ControlError,
    FusecacheError,
    ImageOpenError,
    LostDataError,
    NotAnImageError,
    OriginError,
)
from fusecache.observe import logs
from fusecache.observe.windows import seconds_left
from fusecache.store.tree import Tree

_RESOLVE_TIMEOUT = 2.0
_PROGRESS_INTERVAL = 0.2
_AT_ONCE = 32
_MOST_SHOWN = 500
"""Images in the metrics, which are made again and again."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
Work = Callable[[Image], Awaitable[int]]
PinnedWork = Callable[[Image, int | None], Awaitable[int]]


@dataclass(slots=True)
class Mounted:
    """The mount as the control socket sees it."""

    mountpoint: Path
    origin: Path
    state: str
    """``starting``, ``serving``; ``unmounting`` and ``stopping``, which serve while they flush;
    ``flushing``: unmounted, and what is dirty still goes to the origin"""
    unmount: Callable[[bool, bool, Send], Awaitable[None]]
    """(force, keep_dirty, where progress goes): flushes, then unmounts. Raises FusecacheError."""
    flushing: Callable[[], dict[str, Any] | None]
    """The progress of a flush before the end, for ``status``; None while there is none."""
    reload: Callable[[], Awaitable[dict[str, Any]]]
    """Applies the changed configuration; ``applied`` and ``refused``. Raises FusecacheError."""


class Verbs:
    """Answers requests about one mount. An answer is the JSON object of ``ok``."""

    def __init__(self, cache: BlockCache, tree: Tree, mounted: Mounted) -> None:
        self._cache = cache
        self._tree = tree
        self._mounted = mounted
        self._running: dict[object, Callable[[], dict[str, Any]]] = {}
        """Of each flush or eviction under way, what ``status`` tells of it."""
        self._verbs: dict[str, Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]]] = {
            "who": self._who,
            "resolve": self._resolve_verb,
            "status": self._status,
            "evict": self._evict,
            "flush": self._flush,
            "set": self._set,
            "umount": self._umount,
            "reload": self._reload,
            "log-level": self._log_level,
        }

    def find(
        self, request: dict[str, Any]
    ) -> Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]]:
        """What a request asks for.

        Raises:
            ValueError: its names are not text.
            ControlError: there is no such verb.
        """
        _check_names(request)
        verb = self._verbs.get(str(request.get("verb")))
        if verb is None:
            raise ControlError(f"This daemon knows no verb '{request.get('verb')}'.")
        return verb

    async def _who(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        return self._identity()

    def _identity(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "mountpoint": str(self._mounted.mountpoint),
            "origin": str(self._mounted.origin),
            "cache": str(self._cache.device.path),
            "state": self._mounted.state,
            "dirty_bytes": self._cache.dirty_bytes,
        }

    async def _resolve_verb(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        try:
            image, meant = await self._resolve(str(request.get("path", "")))
        except NotAnImageError as exc:
            return {"known": False, "exists": False, "refused": str(exc)}
        return {
            "known": image is not None,
            "exists": meant.identity is not None,
            "path": os.fsdecode(meant.path),
        }

    async def _status(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        wanted = request.get("images")
        if wanted:
            images = [await self._known(str(path)) for path in wanted]
        else:
            images = self._busiest(request.get("most", 0))
        status = await self._describe(images)
        if request.get("history"):
            status["history"] = history_snapshot(self._cache)
        return status

    async def _describe(self, images: list[Image]) -> dict[str, Any]:
        """One entry of ``mounts`` in ``status --json``, with these images. Guests' requests get
        their turn between parts of it: 60 us an image are 30 ms for 500 (measured)."""
        shown: list[dict[str, Any]] = []
        for image in image_snapshots(self._cache, images):
            image["path"] = os.fsdecode(image["path"])
            shown.append(image)
            if len(shown) % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return {
            **self._identity(),
            "write_mode": self._cache.write_mode.value,
            "block_size": self._cache.core.geometry.block_size,
            "flushing": self._mounted.flushing(),
            "running": [running() for running in self._running.values()],
            "cache": cache_snapshot(self._cache),
            **mount_snapshot(self._cache),
            "images": sorted(shown, key=lambda image: str(image["path"])),
        }

    async def describe_busiest(self) -> dict[str, Any]:
        """The same for the metrics, with a bounded number of images."""
        return await self._describe(self._busiest(_MOST_SHOWN))

    def _busiest(self, most: int) -> list[Image]:
        """So many images at most, 0 for all: open ones first, then dirty ones, then those of which
        most is cached."""
        core = self._cache.core

        def weight(image: Image) -> tuple[bool, int, int]:
            return bool(image.handles), core.dirty_bytes(image.id), core.usage(image.id).pages

        images = self._cache.images.all()
        if 0 < most < len(images):
            images = sorted(images, key=weight, reverse=True)[:most]
        return images

    async def _evict(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        discard, closed = bool(request.get("discard_dirty")), bool(request.get("only_closed"))

        async def evict(image: Image, path_fd: int | None) -> int:
            if closed:
                return await self._cache.evict_closed(image, path_fd)
            return await self._cache.evict(image, path_fd, discard_dirty=discard)

        wanted = await self._wanted(request)
        return await self._each("evict", wanted, send, partial(self._pinned, evict, not discard))

    async def _flush(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        overwrite = bool(request.get("overwrite"))

        async def flush(image: Image, path_fd: int | None) -> int:
            await self._cache.flush(image, path_fd, overwrite=overwrite)
            return 0

        return await self._each(
            "flush", await self._wanted(request), send, partial(self._pinned, flush, True)
        )

    async def _set(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        wanted = str(request.get("write_mode"))
        mode = None if wanted == "default" else WriteMode(wanted)
        images = [await self._made_known(str(path)) for path in request.get("images", [])]

        async def choose(image: Image, path_fd: int | None) -> int:
            await self._cache.set_write_mode(image, mode)
            if image.write_mode is not WriteMode.BACK and self._cache.core.dirty_bytes(image.id):
                await self._cache.flush(image, path_fd)  # it left write-back, but failed then
            return 0

        return await self._each("set", images, send, partial(self._pinned, choose, True))

    async def _umount(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        async def note(progress: dict[str, Any]) -> None:
            await send({"progress": progress})

        force, keep = bool(request.get("force")), bool(request.get("keep_dirty"))
        await self._mounted.unmount(force, keep, note)
        return {"unmounted": True}

    async def _reload(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        return await self._mounted.reload()

    async def _log_level(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        """Another level for the log; ``level`` and ``before``."""
        wanted, before = request.get("level"), logs.level()
        if wanted not in LOG_LEVELS:
            raise ControlError(f"The log's level is one of: {', '.join(LOG_LEVELS)}.")
        logs.set_level(wanted)
        return {"level": wanted, "before": before}

    # -- images ------------------------------------------------------------------------------------

    async def _wanted(self, request: dict[str, Any]) -> list[Image | None]:
        """The images a request names, or all; None stands for a file that is not known."""
        names = request.get("images")
        if not names:
            return list(self._cache.images.all())
        wanted: list[Image | None] = []
        for path in map(str, names):
            image, meant = await self._here(path)
            wanted += [image, *self._dirty_before(image, meant.path)]
        return wanted

    def _dirty_before(self, image: Image | None, path: bytes) -> list[Image]:
        """Images that were seen at this path before others put another file there, and are dirty:
        whoever names that path asks for all that is here of it."""
        dirty = self._cache.core.dirty
        return [
            other
            for other in self._cache.images.all()
            if other is not image and other.row.path == path and dirty.pages(other.id)
        ]

    async def _each(
        self, verb: str, images: Iterable[Image | None], send: Send, work: Work
    ) -> dict[str, Any]:
        """Does ``work`` for every image, side by side: one that fails or stalls holds up no
        other. Counts blocks, and tells which images failed."""
        todo = list(images)
        began = trio.current_time()
        left = {image.id: image for image in todo if image is not None}
        failed: list[dict[str, Any]] = []
        blocks = 0

        async def one(image: Image) -> None:
            nonlocal blocks
            try:
                done = await work(image)
                blocks += done
            except Exception as exc:
                failed.append(self._failure(image, exc))
            del left[image.id]

        def progress() -> dict[str, Any]:
            dirty = sum(map(self._cache.dirty_bytes_of, left.values()))
            return {"done": len(todo) - len(left), "of": len(todo), "left": dirty}

        of = progress()["left"]

        def running() -> dict[str, Any]:
            now, seconds = progress(), round(trio.current_time() - began, 1)
            return {
                "verb": verb,
                "images": now["of"] - now["done"],
                "left": now["left"],
                "of": of,
                "seconds": seconds,
                "seconds_left": seconds_left(now["left"], of, seconds),
            }

        job = object()
        self._running[job] = running
        try:
            async with _reporting(send, progress), trio.open_nursery() as nursery:
                for image in list(left.values()):
                    nursery.start_soon(one, image)
        finally:
            del self._running[job]
        failed.sort(key=lambda entry: str(entry["image"]))
        return {"images": len(todo) - len(failed), "blocks": blocks, "failed": failed}

    async def _pinned(self, work: PinnedWork, synced: bool, image: Image) -> int:
        """Gives ``work`` a descriptor of an image that nobody has open.

        Args:
            synced: the image must be, if the file is there.
        """
        path_fd: int | None = None
        if not image.origin_open:
            try:
                path_fd = await self._pin(image)
            except (OSError, OriginError):
                if synced and image.synced < image.written:
                    raise
        try:
            return await work(image, path_fd)
        finally:
            if path_fd is not None:
                os.close(path_fd)

    def _failure(self, image: Image, exc: Exception) -> dict[str, Any]:
        """What the client tells of an image with which something went wrong."""
        if isinstance(exc, OSError):
            reason = f"the origin says: {exc.strerror}"
        elif isinstance(exc, FusecacheError):
            reason = str(exc)
        else:
            self._cache.state.unexpected(exc, "answering a control request")
            reason = "an unexpected error in the daemon; its log has more"
        return {
            "image": os.fsdecode(image.row.path),
            "error": reason,
            "dirty_bytes": self._cache.dirty_bytes_of(image),
            "lost": isinstance(exc, LostDataError),
            "open": isinstance(exc, ImageOpenError),
            "changed": isinstance(exc, ChangedElsewhereError),
        }

    # -- names -------------------------------------------------------------------------------------

    async def _known(self, path: str) -> Image:
        image, _ = await self._here(path)
        if image is None:
            raise ControlError(
                f"Nothing of '{protocol.readable(path)[0]}' is cached: it was not opened yet."
            )
        return image

    async def _here(self, path: str) -> tuple[Image | None, Meant]:
        """As ``_resolve``: the image is None if the file is there but unknown."""
        image, meant = await self._resolve(path)
        if image is None and meant.identity is None:
            shown, _ = protocol.readable(path)
            raise ControlError(
                f"There is no image '{shown}' below {self._mounted.origin}, and none of that name "
                "is cached. See: fusecache status"
            )
        return image, meant

    async def _made_known(self, path: str) -> Image:
        """The image at a path, also one that nobody has opened yet."""
        image, meant = await self._here(path)
        if meant.identity is not None:
            return self._cache.images.known(meant.identity, meant.path)
        assert image is not None
        return image

    async def _pin(self, image: Image) -> int | None:
        """A descriptor of the image's file, if it is still where it was last seen. The origin is
        asked for a short while only, since it may be stalled.

        Raises:
            OSError, OriginError: nobody knows.
        """
        where = (image.row.path, image.row.identity)
        with trio.move_on_after(_RESOLVE_TIMEOUT):
            return await trio.to_thread.run_sync(self._tree.pin, *where, abandon_on_cancel=True)
        raise OriginError(errno.ETIMEDOUT, "the origin does not answer")

    async def _resolve(self, path: str) -> tuple[Image | None, Meant]:
        """By what lies at the path on the origin now, else by where it was last seen.

        Raises:
            NotAnImageError: no image was seen there, and what is there now is none.
        """
        meant = Meant(os.fsencode(path), None)
        refused: NotAnImageError | None = None
        try:
            with trio.move_on_after(_RESOLVE_TIMEOUT), contextlib.suppress(OSError, OriginError):
                meant = await trio.to_thread.run_sync(
                    look_up, self._tree, path, self._mounted.mountpoint, abandon_on_cancel=True
                )
        except NotAnImageError as exc:
            refused = exc
        if meant.identity is not None:
            return self._cache.images.find(meant.identity), meant
        for image in self._cache.images.all():
            if image.row.path == meant.path:
                return image, meant
        if refused is not None:
            raise refused
        return None, meant


@asynccontextmanager
async def _reporting(send: Send, progress: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Sends the progress of the body now and then, if it changed."""

    async def report() -> None:
        said: dict[str, Any] | None = None
        # Whoever watches the client sees that it went away.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await trio.sleep(_PROGRESS_INTERVAL)
                if (now := progress()) != said:
                    said = now
                    await send({"progress": now})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        yield
        nursery.cancel_scope.cancel()


def _check_names(request: dict[str, Any]) -> None:
    """Raises ValueError unless what stands for paths is text."""
    if not isinstance(request.get("most", 0), int):
        raise ValueError("not a number")
    names = request.get("images", [])
    if not isinstance(names, list):
        raise ValueError("not a list of names")
    for name in [*names, request.get("path", "")]:
        if not isinstance(name, str) or "\0" in name:
            raise ValueError("not a name")
