"""Service: one mount while it serves, and every way in which it ends."""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fusecache.cli import sd_notify
from fusecache.cli.flushing import HOPELESS, Failures, Flushing, kept_by, unflushed
from fusecache.cli.progress import amount_text, kept_text
from fusecache.cli.reloading import Reloading
from fusecache.config import MountConfig, format_size
from fusecache.control.metrics import MetricsServer
from fusecache.control.protocol import runtime_directory
from fusecache.control.server import ControlServer
from fusecache.control.verbs import Mounted, Send
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.trouble import TroubleWatch
from fusecache.errors import ChangedElsewhereError, FusecacheError, MountError
from fusecache.fuse import mounts
from fusecache.fuse.operations import Operations
from fusecache.fuse.session import Session
from fusecache.observe import logs
from fusecache.observe.logs import fields
from fusecache.store.tree import Tree

log = logging.getLogger("fusecache")

_FORCED_FLUSH = 10.0
"""Seconds without progress after which a signal or ``--force`` no longer waits for the origin."""
_FORCED_END = 20.0
"""Seconds that a stalled origin has after the mount is gone."""
_COPIES = 2.0
"""Seconds after an unmount in which the kernel lets go of the mount, if nobody else has it."""
_NOTE_INTERVAL = 0.2
_LOOK_INTERVAL = 1.0
"""Seconds between looks whether the database is where it was."""
_SHOWN = 3


class Service:
    """The requests, the control socket, the signals and the end of one mount."""

    def __init__(
        self,
        plan: MountConfig,
        again: Callable[[], MountConfig],
        cache: BlockCache,
        tree: Tree,
        operations: Operations,
        session: Session,
        metrics: socket.socket | None = None,
    ) -> None:
        self._plan = plan
        self._cache = cache
        self._operations = operations
        self._session = session
        self._reloading = Reloading(plan, again, cache)
        self._mounted = Mounted(
            plan.mountpoint, plan.origin, "starting", self.unmount, self._progress, self._reload
        )
        self._trouble = TroubleWatch(
            cache.images.all,
            cache.state,
            time.monotonic,
            names=cache.threads.asking,
            also=logs.limit.sweep,
        )
        self._control = ControlServer(cache, tree, self._mounted, runtime_directory())
        self._metrics: MetricsServer | None = None
        if metrics is not None:
            describe = self._control.verbs.describe_busiest
            self._metrics = MetricsServer(describe, cache.state, metrics)
        self._nursery: trio.Nursery
        self._flushing: Flushing | None = None
        self._keep = False
        """What is dirty stays on the cache at the end."""
        self._forced = False
        """The mount was taken away with files open."""

    async def run(self, ready: Callable[[], None]) -> None:
        """Until unmounted, by whomever, and until what is dirty is on the origin or kept."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._control.serve)
            nursery.start_soon(self._obey_signals)
            nursery.start_soon(self._cache.sampler.run)
            nursery.start_soon(self._trouble.run)
            nursery.start_soon(self._watch_database)
            if self._metrics is not None:
                nursery.start_soon(self._metrics.serve)
            serving = trio.Event()
            nursery.start_soon(self._announce, serving, ready)
            await self._session.run(serving)
            self._mounted.state = "flushing"
            sd_notify.notify("STOPPING=1", sd_notify.status(self._words()))
            if not self._keep:
                # The mount is gone. Unless somebody waits for this end, there is no hurry.
                patience = _FORCED_FLUSH if self._forced else math.inf
                await self._flush(patience, persistent=True)
            await self._tell_kept()
            nursery.cancel_scope.cancel()

    async def _tell_kept(self) -> None:
        """The last word on what the origin does not have."""
        if (kept := kept_by(self._cache)) is None:
            return
        if gone := await self._cache.look_for_database():
            log.error(
                "%s that only the cache has are lost, because %s",
                amount_text(kept),
                gone,
                extra=fields("dirty-lost", dirty_bytes=kept["bytes"]),
            )
            return
        log.warning("%s", kept_text(kept), extra=fields("kept-dirty", dirty_bytes=kept["bytes"]))

    async def _watch_database(self) -> None:
        while self._cache.state.usable:
            try:
                await self._cache.look_for_database()
            except Exception as exc:
                self._cache.state.unexpected(exc, "looking for the database")
            await trio.sleep(_LOOK_INTERVAL)

    async def _announce(self, serving: trio.Event, ready: Callable[[], None]) -> None:
        await serving.wait()
        self._mounted.state = "serving"
        plan = self._plan
        log.info(
            "serving %s at %s from %s",
            plan.origin,
            plan.mountpoint,
            plan.cache,
            extra=fields("serving", mount=plan.mountpoint, write_mode=plan.write_mode),
        )
        ready()
        sd_notify.notify("READY=1", sd_notify.status(self._words()))
        await sd_notify.keep_told(self._words)

    def _words(self) -> str:
        """How it goes, for ``systemctl status``."""
        mounted, cache = self._mounted, self._cache
        words = [f"{mounted.state}: {mounted.origin} at {mounted.mountpoint}"]
        if dirty := cache.dirty_bytes:
            words.append(f"{format_size(dirty)} not on the origin yet")
        words += self._trouble.words
        if cache.state.name != "ok":
            words.append(f"cache {cache.state.name}: {cache.state.trouble}")
        return ", ".join(words)

    def _progress(self) -> dict[str, Any] | None:
        return None if self._flushing is None else self._flushing.progress

    async def _flush(
        self, patience: float, *, persistent: bool = False, note: Send | None = None
    ) -> Flushing:
        """Flushes until it is done or given up, and tells ``note`` how it goes."""
        flushing = Flushing(self._cache, patience=patience, persistent=persistent)
        self._flushing = flushing
        self._nursery.start_soon(flushing.run)
        try:
            while not flushing.ended.is_set():
                with trio.move_on_after(_NOTE_INTERVAL if note is not None else math.inf):
                    await flushing.ended.wait()
                if note is not None:
                    await note(flushing.progress)
        finally:
            flushing.give_up()  # no more than a word if it has ended
            if self._flushing is flushing:
                self._flushing = None
        return flushing

    # -- signals -----------------------------------------------------------------------------------

    async def _obey_signals(self) -> None:
        """SIGHUP reloads. Of all others the first flushes and unmounts; one more, or one after
        the unmount, says keep."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                name = signal.Signals(number).name
                if number == signal.SIGHUP and not self._terminal_ended():
                    self._nursery.start_soon(self._reload_by_signal)
                elif self._mounted.state in ("stopping", "flushing"):
                    log.warning("%s: what is not on the origin yet stays on the cache", name)
                    self._keep_the_rest()
                else:
                    self._nursery.start_soon(self._stop, name)

    def _terminal_ended(self) -> bool:
        """Whether a SIGHUP means that: in front, with nothing to reload."""
        return self._plan.foreground and self._plan.config is None

    async def _reload_by_signal(self) -> None:
        try:
            await self._reload()
        except FusecacheError:
            pass  # it is logged
        except Exception as exc:
            self._cache.state.unexpected(exc, "reloading")

    async def _reload(self) -> dict[str, Any]:
        """Applies what can be applied of the changed configuration, and logs what came of it."""
        try:
            outcome = await self._reloading.reload()
        except FusecacheError as exc:
            log.error("%s", exc, extra=fields("reload-failed"))
            raise
        for change in outcome.applied:
            log.info("%s", change, extra=fields("reloaded"))
        for sentence in outcome.refused:
            log.warning("%s", sentence, extra=fields("not-reloaded"))
        if not outcome.applied and not outcome.refused:
            log.info("the configuration is as it was", extra=fields("reloaded"))
        return {"applied": outcome.applied, "refused": outcome.refused}

    def _keep_the_rest(self) -> None:
        self._keep = True
        if self._flushing is not None:
            self._flushing.give_up()
        if self._mounted.state == "flushing":
            _end_soon()

    async def _stop(self, name: str) -> None:
        """Flushes while still serving, then takes the mount away, open files or not."""
        log.info(
            "%s: flushing, then unmounting; once more keeps the rest on the cache",
            name,
            extra=fields("stopping", dirty_bytes=self._cache.dirty_bytes),
        )
        self._mounted.state = "stopping"
        if self._flushing is not None:
            self._flushing.give_up()  # of a client, which is told
        try:
            self._cache.drain()
            flushing = await self._flush(_FORCED_FLUSH, persistent=True)
            self._keep = self._keep or flushing.kept
            await self._detach(force=True)
        except Exception as exc:
            if isinstance(exc, FusecacheError):
                log.error("%s", exc)
            else:
                self._cache.state.unexpected(exc, "ending the mount")
            self._serve_on()

    # -- the verb ----------------------------------------------------------------------------------

    async def unmount(self, force: bool, keep_dirty: bool, note: Send) -> None:
        """Flushes while still serving, then unmounts, which ends the session.

        Args:
            force: also while files are open.
            keep_dirty: nothing is written back.

        Raises:
            MountError: files are open, the mount is busy, or not everything is on the origin.
        """
        if self._mounted.state == "flushing":
            await self._join(keep_dirty, note)
            return
        if self._mounted.state != "serving":
            raise MountError(f"{self._plan.mountpoint} is being unmounted already.")
        self._refuse_open_files(force)
        self._mounted.state = "unmounting"
        try:
            if keep_dirty:
                await self._refuse_keeping()
            else:
                self._cache.drain()
                flushing = await self._flush(_FORCED_FLUSH if force else math.inf, note=note)
                await self._refuse_unflushed(flushing)
            self._refuse_open_files(force)  # they may have come meanwhile
            if kept := kept_by(self._cache):
                await note({"kept": kept})
            self._keep = keep_dirty
            await self._detach(force)
        except BaseException:
            if self._mounted.state == "unmounting":
                self._serve_on()
            raise

    def _serve_on(self) -> None:
        self._keep = False
        self._cache.undrain()
        self._mounted.state = "serving"

    async def _join(self, keep_dirty: bool, note: Send) -> None:
        """The mount is gone already and only its data is on its way."""
        if keep_dirty:
            await self._refuse_keeping()
            self._keep_the_rest()
        if kept := kept_by(self._cache) if keep_dirty else None:
            await note({"kept": kept})
        while (flushing := self._flushing) is not None and not flushing.ended.is_set():
            await note(flushing.progress)
            with trio.move_on_after(_NOTE_INTERVAL):
                await flushing.ended.wait()

    def _refuse_open_files(self, force: bool) -> None:
        if self._operations.handles and not force:
            raise MountError(
                f"{self._plan.mountpoint} is in use: {self._open_files()}. "
                "Close these first, or use --force."
            )

    async def _refuse_keeping(self) -> None:
        """Nothing is kept in a database that the next start will not find."""
        gone = await self._cache.look_for_database()
        if gone and (kept := kept_by(self._cache)):
            raise MountError(
                f"{amount_text(kept)} cannot stay on the cache, because {gone}: umount without "
                "--keep-dirty brings everything to the origin."
            )

    async def _refuse_unflushed(self, flushing: Flushing) -> None:
        """A flush that did not bring everything home leaves the mount as it is."""
        if self._mounted.state == "stopping":
            raise MountError(f"{self._plan.mountpoint} is being ended by a signal.")
        failures = unflushed(self._cache, flushing.failures)
        for _, exc in flushing.failures:
            log.error("not flushed: %s", exc)
        gone = await self._cache.look_for_database()
        leave = f"it cannot stay on the cache, because {gone}" if gone else ""
        if failures:
            raise MountError(self._why_not(failures, leave))
        if flushing.kept and (kept := kept_by(self._cache)):
            why = "the origin does not answer" if flushing.stalled else "of an unexpected error"
            raise MountError(
                f"{self._plan.mountpoint} stays mounted, because {why} and {amount_text(kept)} "
                "are not on the origin yet. Try again"
                + (f"; {leave}." if gone else ", or leave them on the cache with --keep-dirty.")
            )

    def _why_not(self, failures: Failures, leave: str) -> str:
        reasons = [_reason(image, exc) for image, exc in failures[:_SHOWN]]
        if len(failures) > _SHOWN:
            reasons.append(f"and {len(failures) - _SHOWN} more images")
        hopeless = all(isinstance(exc, HOPELESS) for _, exc in failures)
        text = (
            f"{self._plan.mountpoint} stays mounted: not everything could be written back "
            f"({'; '.join(reasons)}). "
        )
        again = "" if hopeless else "Try again when the origin works"
        if any(isinstance(exc, ChangedElsewhereError) for _, exc in failures):
            text += "What to do about what was changed elsewhere: fusecache status. "
        if leave:
            return f"{text}{again + '; ' if again else ''}{leave}."
        return (
            f"{text}{again + ', or leave' if again else 'Leave'} it on the cache with --keep-dirty."
        )

    def _open_files(self) -> str:
        files = [
            f"{handle.image.name} ({_process(handle.pid)})"
            for handle in self._operations.handles.values()
        ]
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        return ", ".join(sorted(set(files))[:5]) + more

    async def _detach(self, force: bool) -> None:
        """Takes the mount out of the tree; with ``force`` its open files fail from then on."""
        unmount = partial(mounts.unmount, self._plan.mountpoint, detach=force)
        await self._cache.threads.kernel(unmount)
        if not force:
            self._nursery.start_soon(self._end_copies)
        if force or self._keep:
            _end_soon()
        if force:
            self._forced = True
            self._session.abandon()

    async def _end_copies(self) -> None:
        """A mount namespace that was made while we were mounted (``unshare --mount``, a container)
        may have a copy of the mount, which nobody knows of and which would keep us for good."""
        while True:
            await trio.sleep(_COPIES)
            if self._mounted.state == "flushing":
                return
            if not self._operations.handles:
                log.warning(
                    "unmounted, but another mount namespace has a copy of the mount: ended there",
                    extra=fields("ended-elsewhere", mount=self._plan.mountpoint),
                )
                self._session.abandon()
                return


def _reason(image: Image, exc: FusecacheError) -> str:
    reason, name = str(exc).rstrip("."), f"'{image.name}'"
    return reason if reason.startswith(name) else f"{name}: {reason}"


def _end_soon() -> None:
    """A call that hangs on a stalled origin cannot be left behind by trio. By then the mount is
    gone and the cache is as after a kill: the next mount recovers it."""
    threading.Thread(target=_end_anyway, daemon=True).start()


def _end_anyway() -> None:
    time.sleep(_FORCED_END)
    log.error("the origin still does not answer: ending as if killed")
    os._exit(1)


def _process(pid: int) -> str:
    """``pid 123 qemu``. The kernel tells of the thread that opened a file, which may have a name
    of its own."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.partition("Tgid:")[2].split()[0])
        return f"pid {pid} {Path(f'/proc/{pid}/comm').read_text().strip()}"
    except (OSError, IndexError, ValueError):
        return f"pid {pid}"
