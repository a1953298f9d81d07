"""Numba, which may be missing, broken, interrupted or forked: the package computes."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy
import pytest

from chainer_deform.sampling import compiler

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import importlib.abc, os, signal, sys, threading, time, warnings
import numpy
{before}
import chainer_deform
from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.sampling import compiler

def compute():
    y = deformable_convolution_2d_sampler(
        numpy.ones((1, 2, 5, 4), 'f'),
        numpy.zeros((1, 18, 3, 2), 'f'),
        numpy.ones((3, 2, 3, 3), 'f'),
    )
    assert (y.array == 18).all()
    return compiler.loops().__name__.rpartition('.')[2]

class Raise(importlib.abc.MetaPathFinder):
    def __init__(self, name, error, once=False):
        self.name, self.error, self.once = name, error, once
        sys.meta_path.insert(0, self)
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            if self.once:
                sys.meta_path.remove(self)
            raise self.error

{code}
"""


def run_program(code, before='', timeout=120, **environment):
    """Runs lines after the package is imported, and others before it is."""
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', PROGRAM.format(before=before, code=code)],
        env={**os.environ, 'CHAINER_DEFORM_NUMBA': '1', **environment},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (result.returncode, result.stderr) == (0, '')
    return result.stdout.strip()


@pytest.fixture(scope='module')
def numba():
    return pytest.importorskip('numba', exc_type=ImportError)


@pytest.fixture(scope='module')
def cache(numba, tmp_path_factory):
    """A folder with what Numba compiles for the program."""
    folder = tmp_path_factory.mktemp('cache')
    assert run_program('print(compute())', NUMBA_CACHE_DIR=str(folder)) == 'cpu_numba'
    return str(folder)


class TestChoice:
    def test_numba_is_imported_late(self, cache):
        """It takes a while, and not everybody needs it."""
        code = """
assert 'numba' not in sys.modules
print(compute())
"""
        assert run_program(code, NUMBA_CACHE_DIR=cache) == 'cpu_numba'

    @pytest.mark.parametrize(
        ('before', 'environment'),
        [
            ('', {'CHAINER_DEFORM_NUMBA': '0'}),
            ('', {'NUMBA_DISABLE_JIT': '1'}),
            ("sys.modules['numba'] = None", {}),
        ],
    )
    def test_scipy_without_a_word(self, before, environment):
        assert run_program('print(compute())', before, **environment) == 'cpu_scipy'

    @pytest.mark.parametrize(
        ('code', 'environment', 'message'),
        [
            ('', {'NUMBA_NUM_THREADS': '0'}, 'ValueError'),
            ("Raise('numba', ImportError('needs NumPy 1'))", {}, 'needs NumPy 1'),
            ("Raise('llvmlite', ModuleNotFoundError('none', name='llvmlite'))", {},
             'ModuleNotFoundError'),
            ("Raise('llvmlite.binding', OSError('no library'))", {}, 'no library'),
            ("Raise('chainer_deform.sampling.cpu_numba', AttributeError('cgutils'))",
             {}, 'cgutils'),
            ('import numba; del numba.njit', {}, 'njit'),
            ("""
def check():
    raise TypeError('cannot be compiled')
from chainer_deform.sampling import cpu_numba
cpu_numba.check = check
""", {}, 'cannot be compiled'),
        ],
    )  # fmt: skip
    def test_scipy_and_one_warning(self, code, environment, message, numba):
        code += """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    print(compute(), compute())
for warning in caught:
    print(warning.category.__name__, warning.message)
"""
        output = run_program(code, **environment).splitlines()
        assert output[0] == 'cpu_scipy cpu_scipy'
        assert len(output) == 2
        assert output[1].startswith('RuntimeWarning Numba cannot be used')
        assert 'SciPy' in output[1]
        assert message in output[1]

    def test_scipy_where_warnings_are_errors(self, numba):
        """Only the first call fails."""
        code = """
Raise('llvmlite', OSError('no library'))
try:
    compute()
except RuntimeWarning:
    print('warned')
print(compute())
"""
        assert run_program(code).split() == ['warned', 'cpu_scipy']


class TestInterrupts:
    @pytest.mark.parametrize(
        'name',
        [
            'numba',
            'llvmlite.binding',
            'numba.core.types',
            'numba.core.registry',
            'numba.cpython.builtins',  # imported when Numba first compiles
            'chainer_deform.sampling.cpu_numba',
        ],
    )
    def test_numba_is_imported_again(self, name, cache):
        code = f"""
Raise({name!r}, KeyboardInterrupt(), once=True)
try:
    compute()
except KeyboardInterrupt:
    print('interrupted')
print(compute(), compute())
import numba  # the user's own one
print(numba.njit(lambda a: a + 1)(1))
"""
        expected = ['interrupted', 'cpu_numba', 'cpu_numba', '2']
        assert run_program(code, NUMBA_CACHE_DIR=cache).split() == expected

    def test_of_numba_that_was_imported_before(self, cache):
        """It cannot be imported again: if it is broken then, SciPy computes."""
        code = """
import numba
from numba.core.registry import cpu_target
refresh = cpu_target.target_context.refresh
def interrupt():
    def broken():
        raise RuntimeError('generator raised StopIteration')
    cpu_target.target_context.refresh = broken
    raise KeyboardInterrupt
cpu_target.target_context.refresh = interrupt
try:
    compute()
except KeyboardInterrupt:
    print('interrupted')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    print(compute(), compute(), len(caught))
assert sys.modules['numba'] is numba
"""
        output = run_program(code, NUMBA_CACHE_DIR=cache).split()
        assert output == ['interrupted', 'cpu_scipy', 'cpu_scipy', '1']

    @pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='there is no timer')
    @pytest.mark.parametrize(
        ('delay', 'cold'), [(0.02, False), (0.15, False), (0.4, True)]
    )
    def test_by_a_signal(self, delay, cold, cache, tmp_path):
        """Whatever Numba is doing: it is imported, starts, or compiles."""
        code = f"""
def handle(number, frame):
    raise KeyboardInterrupt
for number in signal.SIGALRM, signal.SIGINT:
    signal.signal(number, handle)
signal.setitimer(signal.ITIMER_REAL, {delay})
end = time.monotonic() + 60
try:
    while time.monotonic() < end:
        compute()
except KeyboardInterrupt:
    print('interrupted')
print(compute(), signal.getsignal(signal.SIGINT) is handle)
"""
        output = run_program(code, NUMBA_CACHE_DIR=str(tmp_path) if cold else cache)
        assert output.split() == ['interrupted', 'cpu_numba', 'True']

    def test_signals_are_not_lost(self, cache):
        """Those that come while Numba is imported are handled after that."""
        code = """
handled = []
class Send(Raise):
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            for number in signal.SIGINT, signal.SIGTERM:
                signal.raise_signal(number)
            handled.append('found')
def handle(number, frame):
    handled.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
for number in signal.SIGTERM, signal.SIGINT:
    signal.signal(number, handle)
Send('numba.core.types', None)
try:
    compute()
except KeyboardInterrupt:
    print('interrupted', handled[0])
assert set(handled[1:]) == {signal.SIGINT, signal.SIGTERM}
print(compute())
"""
        output = run_program(code, NUMBA_CACHE_DIR=cache).split()
        assert output == ['interrupted', 'found', 'cpu_numba']

    @pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='there is no timer')
    def test_handler_that_computes(self, numba, tmp_path):
        """While the main thread imports Numba and compiles: it does not hang."""
        code = """
used = []
def handle(number, frame):
    used.append(compute())
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
print(compute())
signal.setitimer(signal.ITIMER_REAL, 0)
assert used
handle(0, None)
print(used[-1])
"""
        output = run_program(code, NUMBA_CACHE_DIR=str(tmp_path))
        assert output.split() == ['cpu_numba', 'cpu_numba']

    def test_call_in_the_middle(self, cache):
        """SciPy computes where Numba is not ready: nested in its own work."""
        code = """
class Compute(Raise):
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            print(compute())
Compute('numba.core.types', None)
print(compute())
from numba.core.compiler_lock import global_compiler_lock
with global_compiler_lock:
    print(compute())
print(compute())
"""
        output = run_program(code, NUMBA_CACHE_DIR=cache)
        assert output.split() == ['cpu_scipy', 'cpu_numba'] * 2


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork')
class TestFork:
    @pytest.mark.parametrize(
        ('delay', 'cold'), [(0.02, False), (0.3, False), (1, True)]
    )
    def test_while_a_thread_imports_or_compiles(self, delay, cold, cache, tmp_path):
        code = f"""
warnings.simplefilter('ignore')  # Python's, of threads and forks
other = threading.Thread(target=compute)
other.start()
time.sleep({delay})
child = os.fork()
if not child:
    signal.alarm(60)
    os._exit(0 if compute() == 'cpu_numba' else 3)
other.join()
assert os.waitpid(child, 0)[1] == 0
print(compute())
"""
        output = run_program(code, NUMBA_CACHE_DIR=str(tmp_path) if cold else cache)
        assert output == 'cpu_numba'

    def test_locks_are_free(self, cache):
        """In the parent and in the child, for threads that are new."""
        code = """
warnings.simplefilter('ignore')
compute()
child = os.fork()
from numba.core.compiler_lock import global_compiler_lock
import numba
results = []
def work():
    results.append((compute(), numba.njit(lambda a: a + 1)(1)))
other = threading.Thread(target=work)
other.start()
other.join(60)
assert results == [('cpu_numba', 2)]
assert not global_compiler_lock.is_locked()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print('done')
"""
        assert run_program(code, NUMBA_CACHE_DIR=cache) == 'done'


def total(a):
    result = 0.0
    for i in range(len(a)):
        result += 2 * a[i]
    return result


def hits():
    """Compiles ``total``; returns 1 if it was on disk, else 0."""
    compiled = compiler.jit()(total)
    assert compiled(numpy.ones(5, 'f')) == 10
    return sum(compiled.stats.cache_hits.values())


def _of_content(change):
    def damage(path):
        path.write_bytes(change(path.read_bytes()))

    return damage


def _flip(where):
    def change(content):
        at = int(where * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return _of_content(change)


def _folder(path):
    path.unlink()
    path.mkdir()


def _foreign(path):
    """A good file of another function."""
    other = compiler.jit('contract')(lambda a: 3 * a)
    other(1)
    (source,) = set(path.parent.glob('*.nbc')) - {path}
    source.replace(path)


def _unreadable(path):
    path.chmod(0)


DAMAGES = {
    'missing': pathlib.Path.unlink,
    'empty': _of_content(lambda content: b''),
    'half': _of_content(lambda content: content[: len(content) // 2]),
    'end missing': _of_content(lambda content: content[:-1]),
    'longer': _of_content(lambda content: content + b'x'),
    'zeros': _of_content(lambda content: bytes(len(content))),
    'garbage': _of_content(lambda content: numpy.random.bytes(len(content))),
    'text': _of_content(lambda content: b'cos\nsystem\n(S"exit 1"\ntR.'),
    'folder': _folder,
    'foreign': _foreign,
    'unreadable': _unreadable,
    **{f'bit at {i}/20': _flip(i / 20) for i in range(21)},
}


class TestKeptOnDisk:
    @pytest.fixture
    def folder(self, numba, tmp_path, monkeypatch):
        monkeypatch.setattr(numba.config, 'CACHE_DIR', str(tmp_path))
        return tmp_path

    def test_is_compiled_once(self, folder):
        assert [hits(), hits(), hits()] == [0, 1, 1]

    @pytest.mark.parametrize('kind', DAMAGES)
    def test_damaged_file(self, kind, folder):
        """It is compiled again, without a warning, and the file is good again."""
        hits()
        (path,) = folder.glob('*/*.nbc')
        DAMAGES[kind](path)
        root = kind == 'unreadable' and os.access(path, os.R_OK)
        assert [hits(), hits()] == [int(root), 1]
        assert [file for file in path.parent.iterdir() if file.suffix != '.nbc'] == []

    def test_folder_that_cannot_be_replaced(self, folder):
        hits()
        (path,) = folder.glob('*/*.nbc')
        _folder(path)
        (path / 'file').write_text('of somebody')
        assert [hits(), hits()] == [0, 0]
        assert list(path.parent.iterdir()) == [path]

    def test_file_in_place_of_the_folder(self, folder):
        hits()
        (path,) = folder.iterdir()
        shutil.rmtree(path)
        path.write_text('')
        hits()

    def test_folder_vanishes(self, folder):
        compiled = compiler.jit()(total)
        shutil.rmtree(folder)
        assert compiled(numpy.ones(5, 'f')) == 10
        assert hits() == 1

    def test_no_folder(self, numba, monkeypatch):
        caching = pytest.importorskip('numba.core.caching')
        monkeypatch.setattr(caching.CacheImpl, '_locator_classes', [])
        assert hits() == 0

    def test_no_room(self, folder):
        """The disk is full, or a limit is reached."""
        resource = pytest.importorskip('resource')
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            assert [hits(), hits()] == [0, 0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert [path for path in folder.glob('*/*') if path.is_file()] == []
        assert [hits(), hits()] == [0, 1]

    @pytest.mark.parametrize('name', ['_index_key', '_impl'])
    def test_unknown_internals(self, name, numba, folder, monkeypatch):
        """One warning, and it is compiled in each process."""
        caching = pytest.importorskip('numba.core.caching')

        class Renamed:
            def __init__(self, function):
                self.cache_path = str(folder)

        compiler._warn_of_cache.cache_clear()
        monkeypatch.setattr('numba.core.dispatcher.FunctionCache', Renamed)
        assert hasattr(caching, 'FunctionCache')
        with pytest.warns(RuntimeWarning, match='Numba keeps') as caught:
            assert [hits(), hits()] == [0, 0]
        assert len(caught) == 1

    def test_flags_reach_the_compiler(self, numba, folder):
        compiled = compiler.jit('contract', 'reassoc')(total)
        assert compiled.targetoptions['fastmath'] == {'contract', 'reassoc'}
        assert compiled.targetoptions['nogil']

    def test_another_source_of_the_folder_changes(self, numba, tmp_path):
        """A compiled function may contain a function of another file."""
        code = """
sys.path.insert(0, {folder!r})
import user
print(user.use(1), sum(user.use.stats.cache_hits.values()))
"""
        (tmp_path / 'user.py').write_text(
            'import rule\nfrom chainer_deform.sampling.compiler import jit\n'
            'inner = jit()(rule.rule)\n'
            '@jit()\ndef use(a):\n    return inner(a)\n'
        )
        found = []
        for number in 10, 10, 200:
            (tmp_path / 'rule.py').write_text(
                f'def rule(a):\n    return a + {number}\n'
            )
            found.append(
                run_program(
                    code.format(folder=str(tmp_path)),
                    NUMBA_CACHE_DIR=str(tmp_path / 'cache'),
                    PYTHONDONTWRITEBYTECODE='1',
                )
            )
        assert found == ['11 0', '11 1', '201 0']
