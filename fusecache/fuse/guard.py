"""guarded: every handler answers, whatever happens; and one that failed half-way leaves nothing.

An error of the origin becomes its errno; anything nobody foresaw becomes EIO, logged and counted.
An exception that reached pyfuse3 would end the mount.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import trio
from pyfuse3 import FUSEError

from fusecache.engine.state import CacheState
from fusecache.errors import FusecacheError, errno_of

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

P = ParamSpec("P")
T = TypeVar("T")


class Handlers(Protocol):
    """What ``guarded`` needs of the class whose handlers it guards."""

    state: CacheState
    lane: "Lane | None"


S = TypeVar("S", bound=Handlers)


def answer(state: CacheState, exc: Exception, handler: str) -> FUSEError:
    """The answer to a handler's exception; an unforeseen one is logged and counted."""
    if isinstance(exc, FUSEError):
        return exc
    if not isinstance(exc, OSError | FusecacheError):
        state.unexpected(exc, f"answering {handler}")
    return FUSEError(errno_of(exc))


def guarded(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Makes every exception of a handler an errno, and room for its answer."""

    @functools.wraps(handler)
    async def guard(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as exc:
            raise answer(self.state, exc, handler.__name__.lstrip("_")) from None
        finally:
            if self.lane is not None:
                self.lane.make_room()

    return guard


@asynccontextmanager
async def undone_on_failure(
    undo: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs
) -> AsyncIterator[None]:
    """Around what follows an open: if it fails or is cancelled, ``undo`` is called and finished."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await undo(*args, **kwargs)
        raise
