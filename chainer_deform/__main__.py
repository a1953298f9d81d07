"""Runs an unmodified Chainer program with Chainer repaired and the drop-in in place."""

from __future__ import annotations

import builtins
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import io
import marshal
import multiprocessing.spawn
import os
import pkgutil
import sys
import types
from collections.abc import Callable
from runpy import _run_module_as_main  # type: ignore[attr-defined]
from typing import NoReturn

import chainer
import numpy

import chainer_deform
from chainer_deform import _enable
from chainer_deform._startup import chainer_deform_startup

_USAGE = """\
usage: python -m chainer_deform SCRIPT [ARGS...]
       python -m chainer_deform -m MODULE [ARGS...]
       python -m chainer_deform - [ARGS...]
       python -m chainer_deform --version
       python -m chainer_deform --enable | --disable | --status

Runs an unmodified Chainer program as `python SCRIPT`, `python -m MODULE` or `python -`
would, with Chainer repaired for the NumPy and the Python that are installed, and its
deformable convolution replaced by that of chainer_deform. So it is in the Python
processes that the program starts. SCRIPT is a file of Python or of its bytecode (.pyc),
or a folder or zip file with a file __main__.py; - is standard input. All of ARGS goes
to the program.

--enable writes a file into this environment after which `import chainer` alone gives a
repaired Chainer in every process, whatever is imported first. --disable removes it,
--status says whether it is there.
"""


def main() -> None:
    """Runs the program that the command line names, as the main module."""
    args = sys.argv[1:]
    if args and args[0] in ('-h', '--help'):
        print(_USAGE, end='')
        return
    if args and args[0] == '--version':
        print(
            f'chainer_deform {chainer_deform.__version__}, '
            f'Chainer {chainer.__version__}, NumPy {numpy.__version__}'
        )
        return
    if len(args) == 1 and args[0] in ('--enable', '--disable', '--status'):
        _change_environment(args[0])
        return
    run: Callable[[], object]
    if args and args[0] == '-m' and len(args) > 1:
        # While Python looks for the module, sys.argv[0] is '-m'.
        run = functools.partial(_run_module_as_main, args.pop(1))
    elif args and args[0] == '-':
        run = _run_standard_input
    elif args and not args[0].startswith('-'):
        run = functools.partial(_run_file, args[0])
    else:
        _fail(_USAGE)
    prepare()
    _run_as_main(run, args)


def _change_environment(order: str) -> None:
    """Does what ``--enable``, ``--disable`` or ``--status`` says."""
    try:
        if order == '--enable':
            print(f'enabled: {_enable.enable()}')
        elif order == '--disable':
            print(
                '\n'.join(f'removed: {path}' for path in _enable.disable())
                or 'disabled'
            )
        else:
            for path in _enable.enabled():
                known = 'enabled' if _enable.is_current(path) else 'of another version'
                print(f'{known}: {path}')
            if not _enable.enabled():
                print('disabled')
    except OSError as e:
        print(f'python -m chainer_deform {order}: {e}', file=sys.stderr)
        sys.exit(1)


def prepare() -> None:
    """Puts the drop-in in place, here and in the processes that this one starts."""
    chainer_deform.patch_chainer()
    _prepare_multiprocessing()
    _prepare_environment()


@functools.cache  # it is done once
def _prepare_multiprocessing() -> None:
    """Has the processes that multiprocessing starts call :func:`prepare`.

    A forked process has it already. One that is spawned or comes from a fork server
    imports the program as ``__mp_main__``, and by then Chainer has to be repaired. The
    one thing that it reads earlier is the pickle of what
    ``multiprocessing.spawn.get_preparation_data`` returns, so the order to call this
    very function travels in there. (coverage.py gets into children the same way.)
    """
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


def _prepare_environment() -> None:
    """Has other Python processes patch Chainer when they import it.

    They inherit the environment, and run the sitecustomize that is first in PYTHONPATH.
    """
    folder = os.path.dirname(os.path.abspath(chainer_deform_startup.__file__))
    path = os.environ.get('PYTHONPATH', '')
    if folder not in path.split(os.pathsep):
        os.environ['PYTHONPATH'] = folder + os.pathsep + path if path else folder
    os.environ[chainer_deform_startup.PYTHON] = chainer_deform_startup.identity()


def _run_as_main(run, argv: list[str]) -> None:
    """Calls a function that runs a program in a main module of its own.

    That module, ``sys.argv`` and ``sys.path`` stay if the process was started for the
    program: threads and exit handlers may need them after its last line. If a profiler,
    say, runs this package in its process, they are put back.
    """
    host = sys.modules['__main__']
    hosted = getattr(host.__spec__, 'name', None) != __name__
    before = sys.argv[:], sys.path[:]
    program = types.ModuleType('__main__')
    vars(program)['__builtins__'] = builtins
    program.__annotations__ = {}
    sys.modules['__main__'] = program  # where pickle looks for the program's names
    sys.argv[:] = argv
    try:
        run()
    except BaseException:
        if not hosted:
            sys.excepthook = functools.partial(_report, sys.excepthook)
        raise
    finally:
        if hosted:
            sys.modules['__main__'] = host
            sys.argv[:], sys.path[:] = before


def _run_file(name: str) -> None:
    """Runs a file, folder or zip file as ``python NAME`` does."""
    path = os.path.join(os.getcwd(), name)
    if name in ('', '.') and sys.version_info >= (3, 11):
        path = os.getcwd()
    if pkgutil.get_importer(path) is not None:
        _set_first_path(path)
        _run_module_as_main('__main__', alter_argv=False)
        return
    try:
        with io.open_code(path) as f:
            content = f.read()
    except OSError as e:
        _fail(
            f"{sys.executable}: can't open file {path!r}: "
            f'[Errno {e.errno}] {e.strerror}\n'
        )
    if not _is_isolated():
        _set_first_path(os.path.dirname(os.path.realpath(path)))
    loader: importlib.abc.Loader
    magic = importlib.util.MAGIC_NUMBER
    if path.endswith('.pyc') or content[:2] == magic[:2]:
        if content[:4] != magic:
            raise RuntimeError('Bad magic number in .pyc file')
        code = marshal.loads(content[16:])
        loader = importlib.machinery.SourcelessFileLoader('__main__', path)
    else:
        code = compile(content, path, 'exec', dont_inherit=True)
        loader = importlib.machinery.SourceFileLoader('__main__', path)
    _execute(code, path, loader)


def _run_standard_input() -> None:
    """Runs the program on standard input as ``python -`` does."""
    if not _is_isolated():
        _set_first_path('')
    source = sys.stdin.buffer.read()
    code = compile(source, '<stdin>', 'exec', dont_inherit=True)
    _execute(code, '<stdin>', importlib.machinery.BuiltinImporter)


def _execute(code: types.CodeType, path: str, loader) -> None:
    """Executes code in the main module, with the names that Python gives to a file."""
    program = vars(sys.modules['__main__'])
    program.update(__file__=path, __cached__=None, __loader__=loader)
    exec(code, program)


def _is_isolated() -> bool:
    """Whether Python puts no folder of the program into ``sys.path``."""
    return bool(sys.flags.isolated or getattr(sys.flags, 'safe_path', False))


def _set_first_path(path: str) -> None:
    """Puts an entry where Python has one for the program: by now for this package."""
    if _is_isolated():
        sys.path.insert(0, path)
    else:
        sys.path[0] = path


def _report(excepthook, kind, error, traceback) -> None:
    """Reports an uncaught exception without the frames up to those of this file."""
    sys.excepthook = excepthook
    entry = traceback
    while entry is not None and entry.tb_frame.f_globals is not globals():
        entry = entry.tb_next  # how Python came to run this file
    if entry is not None:
        while entry is not None and entry.tb_frame.f_globals is globals():
            entry = entry.tb_next
        error.__traceback__ = traceback = entry
    excepthook(kind, error, traceback)


def _fail(message: str) -> NoReturn:
    """Says what is wrong with the command line, and exits with the status for it."""
    sys.stderr.write(message)
    sys.exit(2)


if __name__ == '__main__':
    # The program gets a main module of its own, and children import this module by its
    # name: go on in the importable copy.
    from chainer_deform.__main__ import main

    main()
