"""The metrics endpoint: a small HTTP server for Prometheus, in the daemon's own event loop.

prometheus_client's own server takes a thread for each client, as many as come; here a client is a
task, there are at most ``_MOST_CLIENTS``, each has ten seconds in all, and one too many ends the
one that is there for longest. The text is made at most once a second, whoever asks, in small parts
between which guests' requests get their turn.
"""

import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio

from fusecache import __version__
from fusecache.control import protocol
from fusecache.engine.state import CacheState
from fusecache.errors import MountError

log = logging.getLogger(__name__)

PATH = "/metrics"
_MOST_CLIENTS = 256
_PATIENCE = 10.0
"""Seconds that a client has for its request and for taking the answer."""
_KEPT = 1.0
"""Seconds that the text is given again to others."""
_MOST_OF_A_REQUEST = 8192
_BACKLOG = 512
_REQUEST = re.compile(rb"(GET|HEAD) (\S+) HTTP/1\.[01]\r\n")

Describe = Callable[[], Awaitable[dict[str, Any]]]
Render = Callable[[dict[str, Any], str], Iterable[bytes]]


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        MountError: the port is in use or the address is not one of this host.
    """
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((where[0], port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).split(" (while")[0]
        raise MountError(
            f"The metrics cannot be served at {shown}: {reason}. Choose another address or port "
            "with --metrics, or leave it out."
        ) from exc


class MetricsServer:
    """Answers GET and HEAD of ``/metrics``.

    Args:
        describe: the mount as in ``status --json``; called in the event loop.
        listener: closed at the end.
    """

    def __init__(self, describe: Describe, state: CacheState, listener: socket.socket) -> None:
        self._describe = describe
        self._state = state
        self._listener = listener
        self._clients: dict[trio.CancelScope, None] = {}
        """In the order in which they came."""
        self._making = trio.Lock()
        self._text = b""
        self._made = float("-inf")

    async def serve(self) -> None:
        """Until cancelled."""
        self._listener.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        await trio.serve_listeners(self._client, [listener])

    async def _client(self, stream: trio.SocketStream) -> None:
        scope = trio.CancelScope(deadline=trio.current_time() + _PATIENCE)
        if len(self._clients) >= _MOST_CLIENTS:
            next(iter(self._clients)).cancel()
        self._clients[scope] = None
        try:
            with scope:
                async with stream:
                    await stream.send_all(await self._answer(await _request(stream)))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            log.debug("a metrics client went away")
        except Exception as exc:
            self._state.unexpected(exc, "answering a metrics request")
        finally:
            del self._clients[scope]

    async def _answer(self, request: bytes) -> bytes:
        match = _REQUEST.match(request)
        if match is None:
            return _response("400 Bad Request", b"Ask: GET /metrics\n")
        if match[2].partition(b"?")[0] != PATH.encode():
            return _response("404 Not Found", b"The metrics are at /metrics\n")
        from fusecache.observe import prometheus

        answer = _response("200 OK", await self._fresh(prometheus.render), prometheus.CONTENT_TYPE)
        return answer if match[1] == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    async def _fresh(self, render: Render) -> bytes:
        """The text, at most a second old."""
        async with self._making:
            if trio.current_time() - self._made >= _KEPT:
                status = _readable(await self._describe())
                parts = []
                for part in render(status, __version__):
                    parts.append(part)
                    await trio.lowlevel.checkpoint()
                self._text = b"".join(parts)
                self._made = trio.current_time()
        return self._text


async def _request(stream: trio.SocketStream) -> bytes:
    """What came up to the end of the headers, or of the client, or of what is bearable."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) <= _MOST_OF_A_REQUEST:
        part = await stream.receive_some(4096)
        if not part:
            break
        data += part
    return data if b"\r\n\r\n" in data and len(data) <= _MOST_OF_A_REQUEST else b""


def _response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def _readable(status: dict[str, Any]) -> dict[str, Any]:
    """Names that are not UTF-8 percent-escaped: labels have no other way to say them."""
    for part in (status, status["cache"], *status["images"]):
        for key in ("mountpoint", "origin", "path"):
            if key in part:
                part[key] = protocol.readable(str(part[key]))[0]
    return status
