"""What systemd is told: the protocol of sd_notify(3), a datagram to ``$NOTIFY_SOCKET``."""

import logging
import os
import socket
from collections.abc import Callable

import trio

log = logging.getLogger(__name__)

_STATUS_INTERVAL = 5.0


def notify(*lines: str) -> bool:
    """Sends ``KEY=value`` lines to the service manager; returns whether there is one.

    Never blocks and never raises: whoever listens there may have gone.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode("utf-8", "backslashreplace"), address)
    except OSError as exc:
        log.debug("the service manager was not told: %s", exc)
    return True


def status(text: str) -> str:
    """The line that shows ``text`` in ``systemctl status``."""
    return "STATUS=" + " ".join(text.split())


def watchdog_interval() -> float | None:
    """Seconds from ping to ping, half of what the service manager waits for; None: it does not."""
    pid = os.environ.get("WATCHDOG_PID", "")
    if pid not in ("", str(os.getpid())):
        return None
    try:
        period = int(os.environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
    return period / 2 if period > 0 else None


async def keep_told(text: Callable[[], str]) -> None:
    """Pings the watchdog and keeps the status text up to date, until cancelled.

    From a task of the event loop that serves: if the loop hangs, so do the pings.
    """
    ping = watchdog_interval()
    interval = min(_STATUS_INTERVAL, ping or _STATUS_INTERVAL)
    said = ""
    while True:
        lines = [] if ping is None else ["WATCHDOG=1"]
        if (now := text()) != said:
            said = now
            lines.append(status(now))
        if lines and not notify(*lines):
            return
        await trio.sleep(interval)
