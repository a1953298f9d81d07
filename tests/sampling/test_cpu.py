"""Which version of the primitives the CPU path takes, and what they do alone."""

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy
import pytest

from chainer_deform.sampling import bilinear, cpu
from tests.cases import Case

SAMPLE = """
import sys
{before}
import chainer_deform, numpy
from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.sampling import cpu
{after}
y = deformable_convolution_2d_sampler(
    numpy.ones((1, 2, 5, 4), 'f'),
    numpy.zeros((1, 18, 3, 2), 'f'),
    numpy.ones((3, 2, 3, 3), 'f'),
)
assert (y.array == 18).all()
print(cpu.primitives().__name__)
"""


def primitives_of_a_program(before='', after='', **environment):
    """The name of the module that a program takes.

    It runs the lines ``before`` and ``after`` the package is imported.
    """
    run = subprocess.run(
        [
            sys.executable,
            '-W',
            'error',
            '-c',
            SAMPLE.format(before=before, after=after),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().rpartition('.')[2]


class TestChoice:
    def test_numba_where_it_can_be_imported(self):
        pytest.importorskip('numba', exc_type=ImportError)
        """Only when it is needed: it takes a while to import."""
        after = "assert 'numba' not in sys.modules"
        name = primitives_of_a_program(after=after, CHAINER_DEFORM_NUMBA='1')
        assert name == 'cpu_numba'

    def test_scipy_on_request(self):
        assert primitives_of_a_program(CHAINER_DEFORM_NUMBA='0') == 'cpu_scipy'

    def test_scipy_where_there_is_no_numba(self):
        before = "sys.modules['numba'] = None"
        name = primitives_of_a_program(before, CHAINER_DEFORM_NUMBA='1')
        assert name == 'cpu_scipy'

    def test_no_folder_for_what_is_compiled(self):
        """Numba then compiles it anew in every program."""
        pytest.importorskip('numba', exc_type=ImportError)
        before = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
"""
        name = primitives_of_a_program(before, CHAINER_DEFORM_NUMBA='1')
        assert name == 'cpu_numba'


class TestNumba:
    @pytest.fixture
    def numba(self):
        return pytest.importorskip(
            'chainer_deform.sampling.cpu_numba', exc_type=ImportError
        )

    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    @pytest.mark.parametrize('transposed', [False, True])
    def test_matmul(self, numba, dtype, transposed):
        """Rows and columns that fill blocks and vectors, and those that do not."""
        random = numpy.random.RandomState(0)
        lanes = numba.lanes(numpy.dtype(dtype))
        for rows, depth, vectors in (
            (1, 1, 1), (13, 3, 2), (14, 256, 3), (15, 257, 1), (29, 600, 5),
        ):  # fmt: skip
            a = random.uniform(-1, 1, (3, rows, depth)).astype(dtype)
            b = random.uniform(-1, 1, (3, depth, vectors * lanes)).astype(dtype)
            out = numpy.ones((3, rows, vectors * lanes), dtype)
            expected = 1 + a @ b
            a = numpy.ascontiguousarray(a.swapaxes(1, 2)) if transposed else a
            numba.matmul(a, b, out, transposed)
            tolerance = {'float32': 1e-4, 'float64': 1e-12}[dtype]
            numpy.testing.assert_allclose(out, expected, atol=tolerance)

    @pytest.mark.parametrize(
        ('asked', 'expected'),
        [('1', 1), ('3', 3), ('0', None), ('x', None), ('', None)],
    )
    def test_thread_count(self, numba, asked, expected, monkeypatch):
        monkeypatch.setenv('OMP_NUM_THREADS', asked)
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 5}, raising=False)
        assert numba.thread_count() == (expected or 3)
        monkeypatch.delattr(os, 'sched_getaffinity')
        monkeypatch.setattr(os, 'cpu_count', lambda: 7)
        assert numba.thread_count() == (expected or 7)


def test_work_is_cut_for_the_threads(monkeypatch):
    """Work that is worth it is done by as many threads as there may be."""
    monkeypatch.setattr(cpu.primitives(), 'thread_count', lambda: 2)
    pieces = []

    def count(case):
        shape = (case.n, case.c, *case.size)
        dtype = numpy.dtype('float32')
        pieces[:] = cpu._run(lambda piece: piece, case.geometry, shape, dtype)
        return len(pieces)

    assert count(Case(n=1, size=(9, 9))) == 1
    assert count(Case(n=1, c=64, size=(56, 56))) == 2
    assert count(Case(n=4, c=16, size=(56, 56))) == 2


@pytest.mark.parametrize('size', [1, 5])
def test_rule_along_an_axis(size):
    """For arrays and for single numbers, which is what Numba compiles."""
    grid = numpy.arange(-2, 3)[:, None]
    offset = numpy.array([0, 0.25, -1.5, numpy.nan, numpy.inf, -numpy.inf, 3e38, -2])
    limit = float(bilinear.point_limit(grid, size))
    with numpy.errstate(invalid='ignore'):
        found = bilinear.axis(grid, offset, size, limit)
    for i, j in numpy.ndindex(5, 8):
        index, after, before_inside, after_inside = (
            numpy.broadcast_to(array, (5, 8))[i, j] for array in found
        )
        single = bilinear.axis(grid[i, 0], offset[j], size, limit)
        assert (index, after, before_inside, after_inside) == single
        point = grid[i, 0] + offset[j]
        inside = -1 < point < size
        assert before_inside == (inside and point >= 0)
        assert after_inside == (inside and point < size - 1)
        if inside:
            assert index + after == point
            assert 0 <= after < 1


def test_threads_after_a_fork(monkeypatch):
    """A child has none of its parent's threads, and starts its own."""
    if not hasattr(os, 'fork'):
        pytest.skip('there is no fork')
    monkeypatch.setattr(cpu.primitives(), 'thread_count', lambda: 2)
    monkeypatch.setattr(cpu, 'THREAD_COLUMNS', 1)
    case = Case(n=4, mask=True)
    expected = cpu.forward(case.geometry, **case.arrays())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Python's, of threads and forks
        child = os.fork()
    if not child:
        y = cpu.forward(case.geometry, **case.arrays())
        os._exit(0 if (y == expected).all() else 1)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail('the child hangs')
    assert os.waitstatus_to_exitcode(status) == 0


def test_error_in_a_thread(monkeypatch):
    """Is raised, once all threads are done."""
    monkeypatch.setattr(cpu.primitives(), 'thread_count', lambda: 2)
    monkeypatch.setattr(cpu, 'THREAD_COLUMNS', 1)
    done = []

    def work(piece):
        if piece[0].start == 1:
            raise ValueError('broken')
        done.append(piece)

    case = Case(n=2)
    shape = (case.n, case.c, *case.size)
    with pytest.raises(ValueError, match='broken'):
        list(cpu._run(work, case.geometry, shape, numpy.dtype('float32')))
    assert len(done) == 1
