"""Chooses Numba or SciPy, and keeps what Numba compiled on disk.

Numba is imported when the CPU path is first called. Whatever it cannot do, SciPy does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pathlib
import pickle
import signal
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def loops() -> ModuleType:
    """Returns ``cpu_numba``, or ``cpu_scipy`` where Numba cannot be used.

    ``CHAINER_DEFORM_NUMBA=0`` keeps Numba out. If Numba is there and fails, one warning
    says why. A signal handler that interrupts Numba's work gets ``cpu_scipy``: Numba
    cannot begin anew in the middle.
    """
    if _state.loops is None:
        with _state.lock:
            if _state.loops is None:
                if _state.loading:  # by this very thread, as it has the lock
                    return _import('cpu_scipy')
                _state.loading = True
                try:
                    _choose()
                finally:
                    _state.loading = False
    if _state.compiles_here():
        return _import('cpu_scipy')
    return _state.loops


class _State:
    """The loops that this process has chosen, and the locks around the choice."""

    def __init__(self) -> None:
        self.loops: Any = None  # a module
        self.loading = False
        #: Whether this thread is inside of Numba's compiler.
        self.compiles_here: Callable = lambda: False
        # A signal handler may take it again.
        self.lock = threading.RLock()
        #: Locks that are free in a child process, as the forking thread takes them.
        self.fork_locks = [self.lock]
        self.taken: list = []

    def before_fork(self) -> None:
        for lock in self.fork_locks:
            lock.acquire()
            self.taken.append(lock)

    def after_fork(self) -> None:
        while self.taken:
            self.taken.pop().release()


_state = _State()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(
        before=_state.before_fork,
        after_in_parent=_state.after_fork,
        after_in_child=_state.after_fork,
    )


def _choose() -> None:
    failure = None
    try:
        if os.environ.get('CHAINER_DEFORM_NUMBA') != '0' and _start_numba():
            chosen = _import('cpu_numba')
            chosen.check()
            _state.loops = chosen
            return
    except Exception as error:
        installed = not (
            isinstance(error, ModuleNotFoundError) and error.name == 'numba'
        )
        failure = error if installed else None
    _state.loops = _import('cpu_scipy')
    if failure is not None:
        warnings.warn(
            'Numba cannot be used, so SciPy computes deformable convolutions on the '
            f'CPU, more slowly: {type(failure).__name__}: {failure}',
            RuntimeWarning,
            stacklevel=4,
        )


def _start_numba() -> bool:
    """Imports Numba; returns False where it is told to compile nothing.

    Numba registers what it can compile, bit by bit, when it first compiles. If that is
    interrupted, it can never compile: so it is done here, with the signals deferred.
    """
    with _deferred_signals(), _removed_if_interrupted('numba', 'llvmlite'):
        numba = importlib.import_module('numba')
        if numba.config.DISABLE_JIT:
            return False
        lock = importlib.import_module('numba.core.compiler_lock').global_compiler_lock
        with lock:
            target = importlib.import_module('numba.core.registry').cpu_target
            target.typing_context.refresh()
            target.target_context.refresh()
        _state.compiles_here = lock.is_locked
        if lock not in _state.fork_locks:
            _state.fork_locks.append(lock)
    return True


def _import(name: str) -> ModuleType:
    """Imports a module of this folder, with the signals deferred."""
    name = f'{__package__}.{name}'
    if name in sys.modules:
        return importlib.import_module(name)
    with _deferred_signals():
        return importlib.import_module(name)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Lets Python's signal handlers run after the block.

    A handler that raises an exception, as that of Ctrl-C does, may otherwise leave
    a half imported package behind. In other threads than the main one none can run.
    """
    pending: list[int] = []

    def send() -> None:
        if pending:
            try:
                signal.raise_signal(pending.pop(0))
            finally:
                send()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(send)
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, frame: pending.append(number))
        yield


@contextlib.contextmanager
def _removed_if_interrupted(*packages: str) -> Iterator[None]:
    """Removes packages that the block imported in part, so that they can be again."""
    before = set(sys.modules)
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if before.isdisjoint(packages):
            for name in set(sys.modules) - before:
                if name.partition('.')[0] in packages:
                    del sys.modules[name]
        raise


def jit(*fastmath: str) -> Callable:
    """Compiles a function with Numba, without the GIL; ``fastmath`` are flags of LLVM.

    The result is kept on disk, if a folder can be had. What is kept holds for the
    sources in the function's folder, as a function may contain others of them.
    """

    def decorate(function: Callable) -> Callable:
        import numba

        compiled = numba.njit(nogil=True, fastmath=set(fastmath))(function)
        try:
            compiled.enable_caching()
            compiled._cache = _Cache(compiled._cache, function)
        except (OSError, RuntimeError):  # there is no folder
            pass
        except Exception as error:
            _warn_of_cache(str(error))
            compiled = numba.njit(nogil=True, fastmath=set(fastmath))(function)
        # An exception in a callback of LLVM is lost, and Ctrl-C with it.
        compiled.compile = _undisturbed(compiled.compile)
        return compiled

    return decorate


def _undisturbed(function: Callable) -> Callable:
    def with_deferred_signals(*args):
        with _deferred_signals():
            return function(*args)

    return with_deferred_signals


@functools.cache
def _warn_of_cache(error: str) -> None:
    warnings.warn(
        'this version of Numba keeps compiled functions in another way than is known, '
        f'so they are compiled in each process: {error}',
        RuntimeWarning,
        stacklevel=4,
    )


class _Cache:
    """Has the interface of Numba's cache of a function, and never fails.

    A file has one compiled function, after the digest of what follows. So a damaged
    file is noticed before anything of it is run; then the function is compiled again.
    """

    def __init__(self, cache, function: Callable) -> None:
        dumps = importlib.import_module('numba.core.serialize').dumps
        source = pathlib.Path(function.__code__.co_filename)
        self._cache, self._dumps = cache, dumps
        self._index_key = cache._index_key
        self._impl = cache._impl
        self._make_folder = self._impl.locator.ensure_cache_path
        self._folder = pathlib.Path(cache.cache_path)
        self._name = self._impl.filename_base
        self._version = _version(source.parent)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def load_overload(self, signature, target_context):
        """Returns a compiled function, or None if no good file has it."""
        try:
            target_context.refresh()
            key = self._index_key(signature, target_context.codegen())
            content = self._path(key).read_bytes()
            digest, content = content[:32], content[32:]
            if hashlib.sha256(content).digest() != digest:
                return None
            version, kept_key, data = pickle.loads(content)
            if (version, kept_key) != (self._version, key):
                return None
            return self._impl.rebuild(target_context, data)
        except Exception:
            return None

    def save_overload(self, signature, compiled) -> None:
        """Writes a file, if that is possible."""
        with contextlib.suppress(Exception):
            if not self._impl.check_cachable(compiled):
                return
            self._make_folder()
            key = self._index_key(signature, compiled.codegen)
            content = self._dumps((self._version, key, self._impl.reduce(compiled)))
            self._write(self._path(key), hashlib.sha256(content).digest() + content)

    def _path(self, key) -> pathlib.Path:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self._folder / f'{self._name}-{digest}.nbc'

    @staticmethod
    def _write(path: pathlib.Path, content: bytes) -> None:
        """Puts a whole file in place, or none."""
        part = path.with_name(f'{path.name}.{uuid.uuid4().hex[:16]}')
        try:
            part.write_bytes(content)
            if path.is_dir():
                path.rmdir()
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


@functools.cache
def _version(folder: pathlib.Path) -> tuple[str, str, str]:
    """Versions of Numba and llvmlite, and a digest of the sources of a folder."""
    import llvmlite
    import numba

    sources = hashlib.sha256()
    for path in sorted(folder.glob('*.py')):
        sources.update(path.read_bytes())
    return numba.__version__, llvmlite.__version__, sources.hexdigest()
