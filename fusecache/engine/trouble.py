"""TroubleWatch: what is worth waking somebody for, said once with a count and when it is over.

Once a second it looks at what the images have counted; nothing is done for a request. There are
three kinds of trouble: the origin *fails* calls, the origin *hangs* (calls for an image are under
way and none has returned for a while, or one for a name has not), and the cache device cannot
*store*. Each is one matter for the whole mount, however many images and requests meet it. Of one
that lasts it is said again after a minute, then after ten, then every hour.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from fusecache.engine.image import Image
from fusecache.engine.state import CacheState
from fusecache.observe.logs import fields

log = logging.getLogger(__name__)

_TICK = 1.0
_HANGS = 10.0
"""Seconds without any answer."""
_QUIET = 5.0
"""Seconds without a failure, and with a success, until a failing origin counts as working ..."""
_QUIET_MOST = 600.0
"""... twice as many each time it fails again soon, and at most so many."""
_SOON = 1800.0
_AGAIN = (60.0, 600.0, 3600.0)


@dataclass(slots=True)
class _Seen:
    """Of one image, as of the last look."""

    errors: int = 0
    succeeded: int = 0
    moved: float = 0.0
    """When one of its calls last returned, or none was under way."""


@dataclass(slots=True)
class _Trouble:
    """One kind of trouble while it lasts."""

    begun: float
    images: set[int]
    errors: int = 0
    names: int = 0
    """Calls for names that hang now."""
    last: float = 0.0
    """When it was last met."""
    success: bool = False
    """Something has worked since."""
    told: int = 0
    next: float = _AGAIN[0]
    """Seconds from ``begun`` to when it is said again."""

    def due(self, now: float) -> bool:
        """Whether it is time to say it again."""
        if now - self.begun < self.next:
            return False
        self.told += 1
        self.next = _AGAIN[self.told] if self.told < len(_AGAIN) else self.next + _AGAIN[-1]
        return True


class TroubleWatch:
    """Watches the images of one mount."""

    def __init__(
        self,
        images: Callable[[], Iterable[Image]],
        state: CacheState,
        now: Callable[[], float],
        names: Callable[[], Iterable[int]] = lambda: (),
        also: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            now: seconds.
            names: the lookups, listings and attribute calls under way, each by a number.
            also: what else is to be done once a second.
        """
        self._images = images
        self._state = state
        self._now = now
        self._names = names
        self._also = also
        self._seen: dict[int, _Seen] = {}
        self._names_since: dict[int, float] = {}
        """When each call for a name that is under way was first seen."""
        self._failing: _Trouble | None = None
        self._hanging: _Trouble | None = None
        self._quiet = _QUIET
        self._worked_at = float("-inf")
        self._storing_failed = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                self.look()
                self._also()
            except Exception as exc:
                self._state.unexpected(exc, "watching for trouble")
            await trio.sleep(_TICK)

    @property
    def words(self) -> list[str]:
        """What is wrong with the origin now, for people."""
        words = []
        if self._failing is not None:
            words.append(f"the origin fails ({self._failing.errors} errors)")
        if self._hanging is not None:
            waiting = [f"{len(self._hanging.images)} images"] if self._hanging.images else []
            waiting += [f"{names} calls for names"] if (names := self._hanging.names) else []
            words.append(f"the origin does not answer ({' and '.join(waiting)} wait)")
        return words

    def look(self) -> None:
        """One tick."""
        now = self._now()
        before, self._seen = self._seen, {}
        failed: list[tuple[Image, int]] = []
        hanging: list[Image] = []
        worked = False
        for image in self._images():
            seen = before.get(image.id) or _Seen(moved=now)
            errors, succeeded = image.counters.errors, _succeeded(image)
            under_way = image.limiter.borrowed_tokens + image.cleaner_limiter.borrowed_tokens
            if errors > seen.errors:
                failed.append((image, errors - seen.errors))
            elif succeeded != seen.succeeded:
                worked = True
            if not under_way or (errors, succeeded) != (seen.errors, seen.succeeded):
                seen.moved = now
            elif now - seen.moved >= _HANGS:
                hanging.append(image)
            seen.errors, seen.succeeded = errors, succeeded
            self._seen[image.id] = seen
        self._note_failing(now, failed, worked)
        self._names_since = {call: self._names_since.get(call, now) for call in self._names()}
        names = sum(now - since >= _HANGS for since in self._names_since.values())
        self._note_hanging(now, hanging, names)
        self._note_storing(now)

    def _note_failing(self, now: float, failed: list[tuple[Image, int]], worked: bool) -> None:
        trouble = self._failing
        if failed:
            first = trouble is None
            if trouble is None:
                soon = now - self._worked_at < _SOON
                self._quiet = min(_QUIET_MOST, 2 * self._quiet) if soon else _QUIET
                trouble = self._failing = _Trouble(now, set())
            trouble.images |= {image.id for image, _ in failed}
            trouble.errors += sum(errors for _, errors in failed)
            trouble.last, trouble.success = now, False
            if first or trouble.due(now):
                image = failed[0][0]
                log.error(
                    "the origin %s",
                    "fails calls" if first else f"has failed calls for {now - trouble.begun:.0f} s",
                    extra=fields(
                        "origin-failing",
                        images=len(trouble.images),
                        errors=trouble.errors,
                        image=image.name,
                        error=image.counters.last_error,
                    ),
                )
        elif trouble is not None:
            trouble.success = trouble.success or worked
            if trouble.success and now - trouble.last >= self._quiet:
                self._failing, self._worked_at = None, now
                log.warning(
                    "the origin works again",
                    extra=fields(
                        "origin-recovered",
                        images=len(trouble.images),
                        errors=trouble.errors,
                        seconds=trouble.last - trouble.begun,
                    ),
                )

    def _note_hanging(self, now: float, hanging: list[Image], names: int) -> None:
        trouble = self._hanging
        if hanging or names:
            first = trouble is None
            if trouble is None:
                trouble = self._hanging = _Trouble(now - _HANGS, set())
                trouble.next += _HANGS
            trouble.images |= {image.id for image in hanging}
            trouble.names = names
            if first or trouble.due(now):
                what = fields(
                    "origin-hangs",
                    images=len(trouble.images),
                    waiting=sum(image.waiting for image in hanging),
                    names=names,
                    **({"image": hanging[0].name} if hanging else {}),
                )
                log.error("the origin has not answered for %.0f s", now - trouble.begun, extra=what)
        elif trouble is not None:
            self._hanging = None
            log.warning(
                "the origin answers again",
                extra=fields(
                    "origin-answers", images=len(trouble.images), seconds=now - trouble.begun
                ),
            )

    def _note_storing(self, now: float) -> None:
        """The state has said that it began."""
        state = self._state
        if not state.store_failures or now < state.stores_again + state.tuning.store_pause:
            return
        failures, state.store_failures = state.store_failures, 0
        log.warning(
            "storing on the cache goes on",
            extra=fields("cache-stores", failures=failures),
        )


def _succeeded(image: Image) -> int:
    """Calls of the origin that returned, and did not fail; more of it means that it works."""
    counters = image.counters
    calls = counters.origin_reads + counters.origin_writes + counters.origin_others
    return calls + image.synced
