"""Mutations: ways to break the durability rules, each one clause. Something has to notice."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

Patch = Callable[[], contextlib.AbstractContextManager[Any]]

MUTATIONS: dict[str, Patch] = {}


def mutation(make: Patch) -> Patch:
    """Registers one way to break a rule, under its function's name."""
    MUTATIONS[make.__name__] = make
    return make


def patch(owner: object, name: str, new: object) -> Any:
    """A patch that keeps nothing of the original."""
    return mock.patch.object(owner, name, new)


@contextlib.contextmanager
def together(*patches: Any) -> Any:
    """Several patches that break one clause."""
    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


async def nothing(*args: object, **kwargs: object) -> None:
    """Stands for what is left out."""
