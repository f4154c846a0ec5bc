"""The daemon's end of the control socket."""

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from fusecache.control import protocol
from fusecache.control.verbs import Mounted, Send, Verbs
from fusecache.engine.block_cache import BlockCache
from fusecache.errors import FusecacheError
from fusecache.store.tree import Tree

log = logging.getLogger(__name__)

_REQUEST_TIMEOUT = 10.0
_BACKLOG = 1024
"""Clients that may wait to be let in; one more is refused at once."""
_PEER = struct.Struct("3i")

Verb = Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers requests about one mount.

    Args:
        directory: where the socket is made, as ``PID.sock``.
    """

    def __init__(self, cache: BlockCache, tree: Tree, mounted: Mounted, directory: Path) -> None:
        self._cache = cache
        self._mounted = mounted
        self.verbs = Verbs(cache, tree, mounted)
        self.path = directory / f"{os.getpid()}.sock"

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
        listener.listen(_BACKLOG)
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
            verb = self.verbs.find(request)
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
        verb: Verb,
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


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data:
        part = await stream.receive_some(4096)
        data += part
        if not part or len(data) > protocol.MAX_REQUEST:
            raise ValueError("no whole line")
    return data.partition(b"\n")[0]
