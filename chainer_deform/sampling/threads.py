"""The threads of the CPU path: how many there are, and how they share work.

Helper threads sleep until a call of :func:`each` asks them. They are only ever a help:
the calling thread does whatever no helper has begun. So a call needs no helper to be
started, to be free, to wake up or to live.

No lock is shared between calls. The list of helpers and the items to be done are
changed by single operations that no other thread and no signal handler can divide.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy


def thread_count(root: str = '/') -> int:
    """Returns how many threads a call may use.

    ``OMP_NUM_THREADS`` says it, as for NumPy's products; of a list such as ``2,3`` the
    first number counts. Otherwise it is one thread for each CPU that the process may
    run on, and no more than the quota of its control group. ``root`` is the folder
    that has ``proc`` and ``sys``.
    """
    numbers = os.environ.get('OMP_NUM_THREADS', '').split(',')
    if all(re.fullmatch(r'\s*\+?0*[1-9]\d{0,8}\s*', number) for number in numbers):
        return int(numbers[0])
    if hasattr(os, 'sched_getaffinity'):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return int(max(1, min(count, _quota(root))))


@functools.cache
def _quota(root: str) -> float:
    """Returns the number of CPUs that the control groups grant, rounded up."""
    quotas = [math.inf]
    for folder in _control_groups(pathlib.Path(root)):
        # Version 2 has one file with 'quota period', version 1 has two files.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / 'cpu.max').read_text().split()
            quotas.append(math.ceil(int(quota) / int(period)))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            share = int((folder / 'cpu.cfs_quota_us').read_text())
            whole = int((folder / 'cpu.cfs_period_us').read_text())
            quotas.append(math.ceil(share / whole))
    return min(quota for quota in quotas if quota > 0)


def _control_groups(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the folders of the process's control groups and of their ancestors."""
    try:
        lines = (root / 'proc/self/cgroup').read_text().splitlines()
    except (OSError, ValueError):
        return
    mounts = root / 'sys/fs/cgroup'
    for line in lines:
        _, controllers, path = (line + '::').split(':')[:3]
        if controllers and 'cpu' not in controllers.split(','):
            continue
        # A container may see its own group as the root, whatever the path says.
        parts = [part for part in path.split('/') if part not in ('', '.', '..')]
        for mount in (controllers, 'cpu') if controllers else ('', 'unified'):
            for count in range(len(parts) + 1):
                yield mounts.joinpath(mount, *parts[:count])


def quietly(function: Callable) -> Callable:
    """Has NaN and infinity pass silently, as on a GPU."""

    @functools.wraps(function)
    def quiet(*args, **kwargs):
        with numpy.errstate(all='ignore'):
            return function(*args, **kwargs)

    return quiet


def each(work: Callable, items: Iterable, threads: int) -> list:
    """Returns ``[work(item) for item in items]``, computed by up to so many threads.

    The calling thread is one of them. Items are begun in their order. NumPy's
    floating-point warnings are off in all threads.

    An exception of ``work`` is raised when no thread works any more; items that were
    not begun are left out. So it is with an exception of a signal handler, such as
    KeyboardInterrupt.
    """
    items = list(items)
    threads = min(threads, len(items))
    with numpy.errstate(all='ignore'):
        if threads < 2:
            return [work(item) for item in items]
        call = _Call(work, items)
        try:
            try:
                call.ask(threads - 1)
                call.run()
            finally:
                call.end()
        finally:
            # An interrupt may have kept the first one from beginning.
            call.end()
    return call.results()


#: The helpers of this process. A child process begins with a new list.
_helpers: list[_Helper] = []


class _Call:
    """The state of one call of :func:`each`.

    A helper works for the call only while it holds the lock that it was offered. The
    call ends by taking all these locks: it waits for the helpers that work, and keeps
    out those that come late. A thread can take an RLock again, so ``end`` can be
    repeated wherever it was interrupted.
    """

    def __init__(self, work: Callable, items: list) -> None:
        self.work = work
        self.todo = collections.deque(enumerate(items))
        self.done: dict = {}
        self.count = len(items)
        self.errors: list[BaseException] = []
        self.helpers = _helpers
        self.offers: list[tuple[_Helper, tuple]] = []

    def ask(self, count: int) -> None:
        """Offers the call to ``count`` helpers, or as many as can be had."""
        free = [helper for helper in list(self.helpers) if helper.is_free()]
        for helper in free[:count]:
            self._offer(helper)
            helper.wake_up()
        while len(self.offers) < count and len(self.helpers) < count:
            helper = _Helper(self.helpers)
            self._offer(helper)
            try:
                threading.Thread(
                    target=helper.live, name='chainer_deform', daemon=True
                ).start()
            except (RuntimeError, MemoryError):
                break
            self.helpers.append(helper)

    def _offer(self, helper: _Helper) -> None:
        offer = self, threading.RLock()
        self.offers.append((helper, offer))
        helper.offer = offer

    def run(self) -> None:
        """Does items until none is left that nobody has begun."""
        while True:
            try:
                index, item = self.todo.popleft()
            except IndexError:
                break
            self.done[index] = self.work(item)

    def end(self) -> None:
        """Lets no thread begin another item; returns when no helper works."""
        try:
            self.todo.clear()
            for helper, offer in self.offers:
                if helper.offer is offer:
                    helper.offer = None
                # In a child process the helper is gone, and its lock stays locked.
                while self.helpers is _helpers and not offer[1].acquire(timeout=1):
                    pass
            self.offers.clear()  # they refer to the call
        except BaseException:
            self.end()
            raise

    def results(self) -> list:
        if self.errors:
            raise self.errors.pop(0)
        if len(self.done) < self.count:
            raise RuntimeError('the process was forked inside of this call')
        return [self.done[index] for index in range(self.count)]


class _Helper:
    """A thread that sleeps until a call is offered to it."""

    def __init__(self, helpers: list) -> None:
        self.helpers = helpers
        self.offer: tuple | None = None
        self.busy = False
        self.bell = threading.Lock()

    def is_free(self) -> bool:
        return self.offer is None and not self.busy

    def wake_up(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake
            self.bell.release()

    def live(self) -> None:
        with numpy.errstate(all='ignore'):
            while self.helpers is _helpers:
                self.bell.acquire()
                self._accept()

    def _accept(self) -> None:
        offer, self.offer = self.offer, None
        if offer is None:  # the call has ended
            return
        call, lock = offer
        if lock.acquire(blocking=False):
            self.busy = True
            try:
                call.run()
            except BaseException as error:
                call.errors.append(error)
                call.todo.clear()
            finally:
                # Whoever waits for the lock may need this helper at once.
                self.busy = False
                lock.release()


def _forget_helpers() -> None:
    global _helpers
    _helpers = []


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_helpers)
