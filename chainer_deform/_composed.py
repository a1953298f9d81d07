"""Calls of functions that are made of Chainer's own functions, seen as a whole.

An export to ONNX makes one node of such a call, and link hooks record it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call, once its arguments are checked.

    Attributes:
        name: The function's name.
        arrays: The arguments that are arrays or variables, or None, by name.
        options: All others, by name.
        compute: What the function does, of these.

    """

    name: str
    arrays: dict[str, Any]
    options: dict[str, Any]
    compute: Callable


class _Local(threading.local):
    def __init__(self) -> None:
        self.watchers: weakref.WeakSet = weakref.WeakSet()
        self.replacement: Callable[[Call], Any] | None = None


_local = _Local()


def composed(compute: Callable) -> Callable:
    """Decorator of the part of a function that computes, after the checks.

    Positional arguments are the arrays, keywords the options.
    """
    name = compute.__module__.rpartition('.')[2]
    names = [*inspect.signature(compute).parameters]

    @functools.wraps(compute)
    def wrapper(*arrays, **options):
        if not _local.watchers and _local.replacement is None:
            return compute(*arrays, **options)
        call = Call(name, dict(zip(names, arrays)), options, compute)
        for watcher in tuple(_local.watchers):
            watcher.watch(call)
        if _local.replacement is not None:
            return _local.replacement(call)
        return compute(*arrays, **options)

    return wrapper


def add_watcher(watcher) -> None:
    """Has ``watcher.watch`` called with each :class:`Call` in this thread.

    The watcher is not kept alive.
    """
    _local.watchers.add(watcher)


def remove_watcher(watcher) -> None:
    _local.watchers.discard(watcher)


@contextlib.contextmanager
def replaced(replacement: Callable[[Call], Any]) -> Iterator[None]:
    """Has ``replacement`` make the results of calls in this thread."""
    before, _local.replacement = _local.replacement, replacement
    try:
        yield
    finally:
        _local.replacement = before
