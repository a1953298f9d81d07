"""Runs an unmodified Chainer program with Chainer repaired and the drop-in in place."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import multiprocessing.spawn
import os
import sys
import types
from typing import Any, NoReturn

import chainer_deform

_USAGE = """\
usage: python -m chainer_deform SCRIPT [ARGS...]
       python -m chainer_deform -m MODULE [ARGS...]

Runs an unmodified Chainer program as `python SCRIPT` or `python -m MODULE` would, with
Chainer repaired for the NumPy and the Python that are installed, and its deformable
convolution replaced by that of chainer_deform. All of ARGS goes to the program.
"""


def main() -> None:
    """Runs the program that the command line names, as the main module."""
    args = sys.argv[1:]
    if args and args[0] in ('-h', '--help'):
        print(_USAGE, end='')
        return
    find = _find_script
    if args and args[0] == '-m':
        find = _find_module
        del args[0]
    if not args or args[0].startswith('-'):
        _fail(_USAGE)
    sys.argv[:] = args
    sys.excepthook = _excepthook
    prepare()
    _run(*find(args[0]))


def prepare() -> None:
    """Puts the drop-in in place, here and in the processes that this one starts.

    A forked process has it already. One that is spawned or comes from a fork server
    imports the program as ``__mp_main__``, and by then Chainer has to be repaired. The
    one thing that it reads earlier is the pickle of what
    ``multiprocessing.spawn.get_preparation_data`` returns, so the order to call this
    very function travels in there. (coverage.py gets into children the same way.)
    """
    chainer_deform.patch_chainer()
    get_preparation_data = multiprocessing.spawn.get_preparation_data

    def with_order(name):
        return {**get_preparation_data(name), 'chainer_deform': _Order()}

    multiprocessing.spawn.get_preparation_data = with_order
    if 'forkserver' in multiprocessing.get_all_start_methods():
        # Otherwise newer Pythons import the program into the fork server, which
        # unpickles nothing, and so dies of it.
        multiprocessing.set_forkserver_preload([])


class _Order:
    """Something that calls :func:`prepare` where it is unpickled."""

    def __reduce__(self):
        return prepare, ()


def _find_script(name: str) -> tuple[types.CodeType, dict[str, Any]]:
    """The code of a script, and what ``python SCRIPT`` puts into its namespace."""
    path = os.path.abspath(name)
    try:
        with io.open_code(path) as f:
            source = f.read()
    except OSError as e:
        _fail(f'python -m chainer_deform: cannot open {name!r}: {e.strerror}\n')
    if not (sys.flags.isolated or getattr(sys.flags, 'safe_path', False)):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    return compile(source, path, 'exec', dont_inherit=True), {
        '__file__': path,
        '__cached__': None,
        '__package__': None,
        '__spec__': None,
        '__loader__': importlib.machinery.SourceFileLoader('__main__', path),
    }


def _find_module(name: str) -> tuple[types.CodeType, dict[str, Any]]:
    """The code of a module, and what ``python -m MODULE`` puts into its namespace."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(name + '.__main__')
    if spec is None:
        _fail(f'python -m chainer_deform: no module {name!r} to run\n')
    sys.argv[0] = spec.origin
    return spec.loader.get_code(spec.name), {
        '__file__': spec.origin,
        '__cached__': spec.cached,
        '__package__': spec.parent,
        '__spec__': spec,
        '__loader__': spec.loader,
    }


def _run(code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Runs code in the emptied main module, where pickle looks for its names."""
    main_module = vars(sys.modules['__main__'])
    main_module.clear()
    main_module.update(
        namespace, __name__='__main__', __doc__=None, __builtins__=builtins
    )
    exec(code, main_module)


def _excepthook(kind, error, traceback):
    """The ordinary report of an uncaught exception, from the program's frames on."""
    entry = traceback
    while entry is not None and entry.tb_frame.f_globals is not globals():
        entry = entry.tb_next  # how Python came to run this file
    while entry is not None and entry.tb_frame.f_globals is globals():
        entry = error.__traceback__ = entry.tb_next
    sys.__excepthook__(kind, error, error.__traceback__)


def _fail(message: str) -> NoReturn:
    """Says what is wrong with the command line, and exits with the status for it."""
    sys.stderr.write(message)
    sys.exit(2)


if __name__ == '__main__':
    # This namespace becomes the program's: go on in the importable copy of this module.
    from chainer_deform.__main__ import main

    main()
