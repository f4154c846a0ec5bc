"""Whether a broken clause is noticed: the one judgement that tests and searches share."""

from collections.abc import Callable
from unittest import mock

from fusecache.engine.state import CacheState
from fusecache.errors import DatabaseError, FusecacheError

_STALE = (TypeError, AttributeError, NameError)
"""What a mutation leads to that does not fit the code any more."""


def notices(run: Callable[[], object]) -> bool:
    """Whether ``run`` fails as it does when a rule is broken: an assertion of the model or of the
    core, an illegal step, a call that fails for no reason, or a cache that is refused.

    Raises:
        TypeError, AttributeError, NameError: the mutation itself is broken.
    """
    stale: list[BaseException] = []
    original = CacheState.unexpected

    def unexpected(self: CacheState, error: BaseException, doing: str) -> None:
        stale.extend(leaf for leaf in _leaves(error) if isinstance(leaf, _STALE))
        original(self, error, doing)

    noticed = False
    with mock.patch.object(CacheState, "unexpected", unexpected):
        try:
            run()
        except Exception as exc:
            leaves = _leaves(exc)
            stale.extend(leaf for leaf in leaves if isinstance(leaf, _STALE))
            noticed = True
            if not any(isinstance(leaf, AssertionError | FusecacheError) for leaf in leaves):
                raise
    if stale:
        raise stale[0]
    return noticed


def _leaves(error: BaseException) -> list[BaseException]:
    """An error, or what a group of them holds; with what each was caused by."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    cause = error.__cause__
    if isinstance(error, DatabaseError) and cause is not None and cause is not error:
        return [error, *_leaves(cause)]
    return [error]
