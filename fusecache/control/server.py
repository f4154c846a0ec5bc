"""The daemon's end of the control socket."""

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fusecache.control import protocol
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.snapshot import cache_snapshot, image_snapshot
from fusecache.errors import ControlError, FusecacheError
from fusecache.store.tree import Found, Tree

log = logging.getLogger(__name__)

_REQUEST_TIMEOUT = 10.0
_RESOLVE_TIMEOUT = 2.0
_PEER = struct.Struct("3i")

Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class Mounted:
    """The mount as the control socket sees it."""

    mountpoint: Path
    origin: Path
    state: str
    unmount: Callable[[bool], Awaitable[None]]
    """Flushes, then unmounts; True: even while files are open. Raises FusecacheError."""


class ControlServer:
    """Answers requests about one mount.

    Args:
        directory: where the socket is made, as ``PID.sock``.
    """

    def __init__(self, cache: BlockCache, tree: Tree, mounted: Mounted, directory: Path) -> None:
        self._cache = cache
        self._tree = tree
        self._mounted = mounted
        self.path = directory / f"{os.getpid()}.sock"
        self._verbs: dict[str, Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]]] = {
            "who": self._who,
            "resolve": self._resolve_verb,
            "status": self._status,
            "evict": self._evict,
            "flush": self._flush,
            "umount": self._umount,
        }

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listens until cancelled; removes the socket then."""
        protocol.make_runtime_directory()
        self.path.unlink(missing_ok=True)
        # For a client that finds this daemon silent: which mount it has.
        note = self.path.with_suffix(".mount")
        note.write_bytes(os.fsencode(self._mounted.mountpoint))
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(before)
        listener.listen(64)
        try:
            streams = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            task_status.started()
            await trio.serve_listeners(self._client, [streams])
        finally:
            self.path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)

    async def _client(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            log.debug("a control client went away")
        except Exception as exc:
            self._cache.state.unexpected(exc, "answering a control request")

    async def _converse(self, stream: trio.SocketStream) -> None:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, uid, _ = _PEER.unpack(raw)
        if uid not in (0, os.geteuid()):
            return

        async def send(message: dict[str, Any]) -> None:
            await stream.send_all(protocol.encode(message))

        try:
            with trio.fail_after(_REQUEST_TIMEOUT):
                request = protocol.decode(await _line(stream))
            _check_names(request)
            verb = self._verbs.get(str(request.get("verb")))
            if verb is None:
                raise ControlError(f"This daemon knows no verb '{request.get('verb')}'.")
            answer: dict[str, Any] = {"ok": await self._watched(stream, verb, request, send)}
        except (ValueError, trio.TooSlowError):
            answer = {"error": "The request was not understood."}
        except FusecacheError as exc:
            answer = {"error": str(exc)}
        except trio.BrokenResourceError:
            raise
        except OSError as exc:
            answer = {"error": f"The origin says: {exc.strerror}."}
        except Exception as exc:
            self._cache.state.unexpected(exc, "answering a control request")
            answer = {"error": "An unexpected error in the daemon; its log has more."}
        await send(answer)

    async def _watched(
        self,
        stream: trio.SocketStream,
        verb: Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]],
        request: dict[str, Any],
        send: Send,
    ) -> dict[str, Any]:
        """Runs a verb, and gives it up when the client hangs up (Ctrl-C)."""
        answer: dict[str, Any] | None = None
        refused: Exception | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some(1024):
                        pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                answer = await verb(request, send)
            except Exception as exc:
                refused = exc
            nursery.cancel_scope.cancel()
        if refused is not None:
            raise refused
        if answer is None:
            raise trio.BrokenResourceError
        return answer

    # -- verbs -------------------------------------------------------------------------------------

    async def _who(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "mountpoint": str(self._mounted.mountpoint),
            "origin": str(self._mounted.origin),
            "cache": str(self._cache.device.path),
            "state": self._mounted.state,
        }

    async def _resolve_verb(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        image, exists = await self._resolve(str(request.get("path", "")))
        return {"known": image is not None, "exists": exists}

    async def _status(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        wanted = request.get("images")
        if wanted:
            images = [await self._known(str(path)) for path in wanted]
        else:
            images = self._cache.images.all()
        shown = [image_snapshot(self._cache, image) for image in images]
        for image in shown:
            image["path"] = os.fsdecode(image["path"])
        return {
            **await self._who(request, send),
            "write_mode": self._cache.write_mode.value,
            "block_size": self._cache.core.geometry.block_size,
            "cache": cache_snapshot(self._cache),
            "images": sorted(shown, key=lambda image: str(image["path"])),
        }

    async def _evict(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        return await self._each(request, send, self._cache.evict)

    async def _flush(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        async def flush(image: Image, path_fd: int | None) -> int:
            await self._cache.flush(image, path_fd)
            return 0

        return await self._each(request, send, flush)

    async def _each(
        self,
        request: dict[str, Any],
        send: Send,
        work: Callable[[Image, int | None], Awaitable[int]],
    ) -> dict[str, Any]:
        """Does ``work`` for the images a request names, or for all; counts blocks.

        An image that nobody has open may still have to be synced: ``work`` gets a descriptor.
        """
        names = request.get("images")
        if names:
            images = [await self._known_or_none(str(path)) for path in names]
        else:
            images = list(self._cache.images.all())
        blocks = 0
        for done, image in enumerate(images, 1):
            if image is not None:
                path_fd = None if image.origin_open else await self._pin(image)
                try:
                    blocks += await work(image, path_fd)
                finally:
                    if path_fd is not None:
                        os.close(path_fd)
            await send({"progress": {"done": done, "of": len(images)}})
        return {"images": len(images), "blocks": blocks}

    async def _umount(self, request: dict[str, Any], send: Send) -> dict[str, Any]:
        await self._mounted.unmount(bool(request.get("force")))
        return {"unmounted": True}

    # -- names -------------------------------------------------------------------------------------

    async def _known(self, path: str) -> Image:
        image = await self._known_or_none(path)
        if image is None:
            raise ControlError(
                f"Nothing of '{protocol.readable(path)[0]}' is cached: it was not opened yet."
            )
        return image

    async def _known_or_none(self, path: str) -> Image | None:
        """The image at a path relative to the origin; None if the file is there but unknown."""
        image, exists = await self._resolve(path)
        if image is None and not exists:
            shown, _ = protocol.readable(path)
            raise ControlError(
                f"There is no image '{shown}' below {self._mounted.origin}, and none of that name "
                "is cached. See: fusecache status"
            )
        return image

    async def _pin(self, image: Image) -> int | None:
        """A descriptor of the image's file, if it is still where it was last seen."""
        found = await self._find(image.row.path)
        if found is not None and found.identity != image.row.identity:
            os.close(found.fd)
            return None
        return None if found is None else found.fd

    async def _find(self, path: bytes) -> Found | None:
        """What lies at a path; asked for a short while only, since the origin may be stalled."""
        with trio.move_on_after(_RESOLVE_TIMEOUT), contextlib.suppress(OSError, FusecacheError):
            return await trio.to_thread.run_sync(self._tree.resolve, path, abandon_on_cancel=True)
        return None

    async def _resolve(self, path: str) -> tuple[Image | None, bool]:
        """By what lies at the path on the origin now, else by where it was last seen."""
        raw = os.fsencode(path)
        found = await self._find(raw)
        if found is not None:
            os.close(found.fd)
            return self._cache.images.find(found.identity), True
        for image in self._cache.images.all():
            if image.row.path == raw:
                return image, False
        return None, False


def _check_names(request: dict[str, Any]) -> None:
    """Raises ValueError unless what stands for paths is text."""
    names = request.get("images", [])
    if not isinstance(names, list):
        raise ValueError("not a list of names")
    for name in [*names, request.get("path", "")]:
        if not isinstance(name, str) or "\0" in name:
            raise ValueError("not a name")


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data:
        part = await stream.receive_some(4096)
        data += part
        if not part or len(data) > protocol.MAX_REQUEST:
            raise ValueError("no whole line")
    return data.partition(b"\n")[0]
