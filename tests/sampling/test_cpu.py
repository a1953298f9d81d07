"""Which version of the primitives the CPU path takes, and what they do alone."""

import os
import pathlib
import platform
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
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (0, '')
    return run.stdout.strip().rpartition('.')[2]


class TestChoice:
    def test_numba_where_it_can_be_imported(self):
        """But only when it is needed: that takes a while."""
        pytest.importorskip('numba', exc_type=ImportError)
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

    def test_scipy_where_nothing_is_to_be_compiled(self):
        name = primitives_of_a_program(NUMBA_DISABLE_JIT='1', CHAINER_DEFORM_NUMBA='1')
        assert name == 'cpu_scipy'

    def test_no_room_for_what_is_compiled(self, tmp_path):
        pytest.importorskip('numba', exc_type=ImportError)
        before = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
        name = primitives_of_a_program(
            before, NUMBA_CACHE_DIR=str(tmp_path), CHAINER_DEFORM_NUMBA='1'
        )
        assert name == 'cpu_numba'

    @pytest.mark.parametrize('cpu_name', ['generic', 'haswell'])
    def test_other_cpus(self, cpu_name, tmp_path):
        """With narrower vectors, and with none of multiplication and addition."""
        pytest.importorskip('numba', exc_type=ImportError)
        if platform.machine() not in ('x86_64', 'AMD64'):
            pytest.skip(f'{cpu_name} is another kind of CPU')
        after = """
from tests.cases import CASES, assert_close
from tests import reference
for name in 'all', 'depthwise', 'plain':
    case = CASES[name]
    for dtype in 'float32', 'float64':
        arrays, gy = case.arrays(dtype), case.gy(dtype)
        y = cpu.forward(case.geometry, **arrays)
        gradients = cpu.backward(case.geometry, set(arrays), gy, **arrays)
        expected_y, expected = reference.deformable_convolution_2d_sampler(
            **arrays, **case.options, gy=gy
        )
        assert_close(y, expected_y, 'y')
        for argument, gradient in gradients.items():
            assert_close(gradient, expected[argument], argument)
"""
        name = primitives_of_a_program(
            after=after,
            NUMBA_CPU_NAME=cpu_name,
            NUMBA_CPU_FEATURES='' if cpu_name == 'generic' else '+avx2,+fma,+avx,+sse',
            NUMBA_CACHE_DIR=str(tmp_path),
            CHAINER_DEFORM_NUMBA='1',
        )
        assert name == 'cpu_numba'

    @pytest.mark.parametrize('numba', ['0', '1'])
    def test_while_the_interpreter_ends(self, numba):
        """No thread can be had then."""
        after = """
import threading
cpu.THREAD_WORK = 1
cpu.primitives().thread_count = lambda: 2
def work():
    threading.main_thread().join()
    x = numpy.ones((4, 2, 5, 4), 'f')
    y = deformable_convolution_2d_sampler(
        x, numpy.zeros((4, 18, 3, 2), 'f'), numpy.ones((3, 2, 3, 3), 'f')
    )
    assert (y.array == 18).all()
    sys.stdout.flush()
    import os
    os.write(1, b'done ')
threading.Thread(target=work).start()
"""
        name = primitives_of_a_program(after=after, CHAINER_DEFORM_NUMBA=numba)
        assert name.endswith('done')


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
        pieces[:] = cpu._run(
            lambda piece: piece, case.geometry, shape, case.out_c, dtype
        )
        return len(pieces)

    assert count(Case(n=1, size=(9, 9))) == 1
    assert count(Case(n=1, c=256, out_c=256, size=(56, 56))) == 2
    assert count(Case(n=4, c=32, out_c=600, size=(56, 56))) == 2
    # As three images would be two for one thread, one for the other.
    assert count(Case(n=3, c=32, out_c=600, size=(56, 56))) == 6
    assert count(Case(n=0, size=(56, 56))) == 0


def test_pieces_of_an_image_are_about_as_large():
    geometry = Case().geometry
    pieces = list(geometry.pieces(2, 100, 75))
    assert pieces == [
        (slice(i, i + 1), slice(p, p + 50)) for i in (0, 1) for p in (0, 50)
    ]


@pytest.mark.parametrize('size', [1, 5])
def test_rule_along_an_axis(size):
    """For arrays and for single numbers, which is what Numba compiles."""
    grid = numpy.arange(-2, 3)[:, None]
    offset = numpy.array([0, 0.25, -1.5, numpy.nan, numpy.inf, -numpy.inf, 3e38, -2])
    limit = bilinear.point_limit(grid, size, offset.dtype)
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
    monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
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
    monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
    done = []

    def work(piece):
        if piece[0].start == 1:
            raise ValueError('broken')
        done.append(piece)

    case = Case(n=2)
    shape = (case.n, case.c, *case.size)
    with pytest.raises(ValueError, match='broken'):
        list(cpu._run(work, case.geometry, shape, 4, numpy.dtype('float32')))
    assert len(done) == 1
