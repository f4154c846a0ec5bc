"""The FUSE session: mounts and serves."""

import logging
import os
from pathlib import Path

import pyfuse3
import trio

from fusecache import lane
from fusecache.config import LaneUse
from fusecache.engine.block_cache import BlockCache
from fusecache.errors import MountError
from fusecache.fuse import mounting, mounts
from fusecache.fuse.laned import Laned
from fusecache.fuse.mounts import CONNECTIONS, check_device
from fusecache.fuse.operations import Operations
from fusecache.observe.logs import fields
from fusecache.store import syscalls
from fusecache.store.mountinfo import SUBTYPE, mount_at

log = logging.getLogger(__name__)

_EXTRA_TASKS = 1024
_IDLE_TASKS = 1
_BUFFERED_AHEAD_KIB = 1024
"""What the kernel reads ahead for buffered readers, in requests as large as it sends: with its
128 KiB each one waits for the last."""


class Session:
    """One mount of one set of operations; pyfuse3 allows one in a process."""

    def __init__(
        self, operations: Operations, cache: BlockCache, mountpoint: Path, lane_use: LaneUse
    ) -> None:
        self._operations = operations
        self._cache = cache
        self._mountpoint = mountpoint
        self._lane_use = lane_use
        self._tuning = cache.tuning
        self._laned: Laned | None = None
        self._mounted = False
        self._detached = False

    def mount(self, origin: Path, options: tuple[str, ...], *, read_only: bool) -> None:
        """Mounts. libfuse writes its own words on failure to standard error.

        Raises:
            MountError: it cannot be mounted.
        """
        chosen = {
            f"fsname={str(origin).replace(',', '_')}",
            f"subtype={SUBTYPE}",
            "default_permissions",
            *options,
        }
        if os.geteuid() == 0:
            chosen.add("allow_other")
        if read_only:
            chosen.add("ro")
        check_device()
        if self._use_lane(chosen):
            self._mount_laned(chosen)
            return
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), chosen)
        except RuntimeError as exc:
            hint = ""
            if "allow_other" in chosen and os.geteuid() != 0:
                hint = " For allow_other, /etc/fuse.conf needs the line user_allow_other."
            raise MountError(
                f"Mounting at {self._mountpoint} failed; see the line of fusermount3 or libfuse "
                f"above for the reason.{hint}"
            ) from exc
        self._mounted = True

    def _mount_laned(self, options: set[str]) -> None:
        fd = mounting.mount(self._mountpoint, options)
        laned: Laned | None = None
        try:
            laned = Laned(self._operations, self._cache, fd)
            pyfuse3.init(self._operations, laned.path, {f"subtype={SUBTYPE}"})
        except (OSError, RuntimeError) as exc:
            mounts.unmount(self._mountpoint, detach=True)
            if laned is None:
                os.close(fd)
            else:
                laned.abort()
            raise MountError(f"The lane cannot be started ({exc}). Mount with --lane off.") from exc
        self._laned = laned
        self._mounted = True

    def _use_lane(self, options: set[str]) -> bool:
        if self._lane_use is LaneUse.OFF:
            return False
        why_not = lane.why_not()
        if not why_not and (unknown := mounting.unknown(options)):
            why_not = f"only libfuse knows the mount option {unknown[0]}"
        if why_not and self._lane_use is LaneUse.ON:
            raise MountError(f"There is no lane: {why_not}. Mount with --lane auto or off.")
        if why_not:
            log.info("no lane: %s", why_not, extra=fields("no-lane"))
        return not why_not

    async def run(self, ready: trio.Event) -> None:
        """Serves until unmounted. Sets ``ready`` once the kernel has been answered."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, ready)
            if self._laned is not None:
                nursery.start_soon(self._laned.serve)
            most = self._tuning.max_background + _EXTRA_TASKS
            await pyfuse3.main(min_tasks=_IDLE_TASKS, max_tasks=most)
            nursery.cancel_scope.cancel()

    async def _announce(self, ready: trio.Event) -> None:
        await self._operations.serving.wait()
        await trio.to_thread.run_sync(self._raise_limits)
        ready.set()

    def _raise_limits(self) -> None:
        """By default the kernel lets 12 requests wait and then holds up all images (P6)."""
        mounted = mount_at(self._mountpoint)
        if mounted is None:
            return
        connection = CONNECTIONS / mounted.device.split(":")[1]
        try:
            if not connection.exists() and os.geteuid() == 0:
                syscalls.mount_fusectl()
            limit = self._tuning.max_background
            (connection / "max_background").write_text(str(limit))
            (connection / "congestion_threshold").write_text(str(limit * 3 // 4))
            ahead = Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb")
            if ahead.exists():
                ahead.write_text(str(_BUFFERED_AHEAD_KIB))
        except OSError as exc:
            log.warning(
                "the kernel's limit of 12 background requests stays (%s): "
                "an image whose origin stalls can hold up the others",
                exc.strerror,
            )

    def abandon(self) -> None:
        """Ends ``run`` although files are open; the mount is out of the tree already.

        A mount that was detached lives on until its last file is closed, and so would we.
        """
        self._detached = True
        pyfuse3.terminate()

    def close(self) -> None:
        """Ends the session; unmounts, lazily, if that has not happened."""
        if self._mounted:
            self._mounted = False
            if self._laned is None:
                pyfuse3.close(unmount=not self._detached)
            else:
                if not self._detached:
                    mounts.unmount(self._mountpoint, detach=True)
                pyfuse3.close(unmount=False)
                self._laned.close()
        self._operations.inodes.close()
