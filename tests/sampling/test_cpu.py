"""The CPU backend in programs: other CPUs, threads, forks, ends."""

import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy
import pytest

from chainer_deform.sampling import compiler, convolution, cpu
from tests.cases import Case

PROGRAM = """
import sys
import chainer_deform, numpy
from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.sampling import compiler, convolution, cpu
{code}
print(compiler.loops().__name__.rpartition('.')[2])
"""


def run_program(code, **environment):
    """What a program prints that runs the code: the loops that it took, last."""
    run = subprocess.run(
        [sys.executable, '-W', 'error', '-c', PROGRAM.format(code=code)],
        env={**os.environ, **environment},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (0, '')
    return run.stdout.strip()


@pytest.mark.parametrize('cpu_name', ['generic', 'haswell'])
def test_other_cpus(cpu_name, tmp_path):
    """With narrower vectors, and with none of multiplication and addition."""
    pytest.importorskip('numba', exc_type=ImportError)
    if platform.machine() not in ('x86_64', 'AMD64'):
        pytest.skip(f'{cpu_name} is another kind of CPU')
    features = {
        'generic': '',
        'haswell': '+avx2,+fma,+avx,+sse',
    }
    code = """
from tests.cases import CASES, Case, assert_close
from tests import reference
wide = Case(n=1, c=20, out_c=35, size=(4, 3), pad=(1, 0))
for case in CASES['all'], CASES['depthwise'], wide:
    for dtype in 'float32', 'float64':
        arrays, gy = case.arrays(dtype), case.gy(dtype)
        y = convolution.forward(cpu, case.geometry, **arrays)
        gradients = convolution.backward(cpu, case.geometry, list(arrays), gy, **arrays)
        expected_y, expected = reference.deformable_convolution_2d_sampler(
            **arrays, **case.options, gy=gy
        )
        assert_close(y, expected_y, 'y')
        for argument, gradient in gradients.items():
            assert_close(gradient, expected[argument], argument)
"""
    name = run_program(
        code,
        NUMBA_CPU_NAME=cpu_name,
        NUMBA_CPU_FEATURES=features[cpu_name],
        NUMBA_CACHE_DIR=str(tmp_path),
        CHAINER_DEFORM_NUMBA='1',
    )
    assert name == 'cpu_numba'


@pytest.mark.parametrize('numba', ['0', '1'])
def test_while_the_interpreter_ends(numba):
    """No thread can be had then."""
    code = """
import os, threading
cpu.THREAD_WORK = 1
def work():
    threading.main_thread().join()
    x = numpy.ones((4, 2, 5, 4), 'f')
    y = deformable_convolution_2d_sampler(
        x, numpy.zeros((4, 18, 3, 2), 'f'), numpy.ones((3, 2, 3, 3), 'f')
    )
    assert (y.array == 18).all()
    sys.stdout.flush()
    os.write(1, b'done ')
compiler.loops()
threading.Thread(target=work).start()
"""
    printed = run_program(code, CHAINER_DEFORM_NUMBA=numba, OMP_NUM_THREADS='2')
    assert printed.endswith('done')


def test_threads_after_a_fork(monkeypatch):
    """A child has none of its parent's threads, and starts its own."""
    if not hasattr(os, 'fork'):
        pytest.skip('there is no fork')
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
    case = Case(n=4, mask=True)
    expected = convolution.forward(cpu, case.geometry, **case.arrays())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Python's, of threads and forks
        child = os.fork()
    if not child:
        y = convolution.forward(cpu, case.geometry, **case.arrays())
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


def test_threads_that_cannot_be_started():
    """All is computed once, and nothing is left for threads that can be had later."""
    pytest.importorskip('numba', exc_type=ImportError)
    code = """
import threading, time
cpu.THREAD_WORK = 1
x = numpy.ones((4, 2, 15, 14), 'f')
arguments = x, numpy.zeros((4, 18, 13, 12), 'f'), numpy.ones((3, 2, 3, 3), 'f')
start = threading.Thread.start
def fail(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = fail
results = [deformable_convolution_2d_sampler(*arguments).array for _ in range(3)]
for y in results:
    assert (y == 18).all()
    y[...] = 0
threading.Thread.start = start
assert (deformable_convolution_2d_sampler(*arguments).array == 18).all()
time.sleep(0.1)
assert not any(y.any() for y in results)
"""
    name = run_program(code, CHAINER_DEFORM_NUMBA='1', OMP_NUM_THREADS='2')
    assert name == 'cpu_numba'


@pytest.mark.parametrize('name', ['sample', 'scatter', 'dot', 'add_product'])
def test_other_threads_go_on(name):
    """While one of Numba's loops takes its time, a thread counts milliseconds."""
    loops = pytest.importorskip(
        'chainer_deform.sampling.cpu_numba', exc_type=ImportError
    )
    times, stop = [], threading.Event()

    def count():
        while not stop.wait(0.001):
            times.append(time.perf_counter())

    channels = 1024
    # Many points, whose samples are added up: they take little memory.
    ones = numpy.ones((4, 1, 300, 1000), 'f')
    image, columns = (
        numpy.ones((2, channels), 'f'),
        numpy.ones((1000, 1, channels), 'f'),
    )
    points = image, ones.astype('i'), ones, ones[0]
    square = numpy.ones((1, channels, channels), 'f')
    arguments = {
        'sample': (*points, 0, columns, True),
        'scatter': (*points, 0, columns),
        'dot': (*points[:2], 0, columns, ones),
        'add_product': (square, square, numpy.zeros((1, channels, channels), 'f')),
    }[name]

    def ticks_of_call():
        begin = time.perf_counter()
        getattr(loops, name)(*arguments)
        end = time.perf_counter()
        return sum(begin < t < end for t in list(times))

    ticks_of_call()  # which may compile
    counter = threading.Thread(target=count)
    counter.start()
    try:
        # On a busy computer calls may pass before the thread has its turn. If they
        # kept the lock, it would have its turn once, at the end of each.
        assert any(ticks_of_call() >= 4 for _ in range(100))
    finally:
        stop.set()
        counter.join()


class TestThreadCount:
    """As many threads as there are and the work is worth, of Numba's loops."""

    @pytest.fixture(autouse=True)
    def three_threads(self, monkeypatch):
        numba = pytest.importorskip(
            'chainer_deform.sampling.cpu_numba', exc_type=ImportError
        )
        monkeypatch.setattr(compiler, 'loops', lambda: numba)
        monkeypatch.setenv('OMP_NUM_THREADS', '3')

    def test_follows_the_work(self):
        assert cpu.thread_count(0) == 1
        assert cpu.thread_count(2 * cpu.THREAD_WORK) == 2
        assert cpu.thread_count(2**60) == 3

    @pytest.mark.parametrize('points', [1, 9, 100, 10**6])
    @pytest.mark.parametrize('channels', [8, 300])
    @pytest.mark.parametrize('threads', [1, 2, 16, 64])
    def test_tiles_shrink_with_the_threads(self, points, channels, threads):
        """What all threads have at the same time is bounded."""
        dtypes = 2 * (numpy.dtype('float32'),)
        for tiles, parts in (threads, 1), (1, threads):
            numbers = channels * points
            count = cpu.tile_positions(numbers, points, dtypes, tiles, parts)
            assert count >= 1
            if count > 1:
                known = count * points * (160 + 16 * parts)
                assert tiles * known <= cpu.POINT_BYTES
                columns = count * numbers * 4
                assert columns * max(tiles, parts) <= cpu.COLUMN_BYTES


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_batches_keep_to_their_budget(dtype):
    """As many images as there is memory for, and one if it is larger."""
    dtypes = 2 * (numpy.dtype(dtype),)
    for numbers in 1, 1000, 10**6, 10**9:
        count = cpu.batch_images(numbers, dtypes)
        image = numbers * dtypes[0].itemsize
        assert count >= 1
        assert count * image <= max(cpu.BATCH_BYTES, image)
        assert (count + 1) * image > cpu.BATCH_BYTES


@pytest.mark.parametrize('side', ['h', 'w'])
def test_indices_beyond_32_bits(side):
    """An array made by ``broadcast_to`` takes no memory, whatever its size."""
    from chainer_deform.sampling.points import Corners, Given

    size = (3, 2**31, 1) if side == 'h' else (3, 1, 2**31)
    point = numpy.zeros((1, 1, 1, 2))
    point[..., 'hw'.index(side)] = 2.0**31 - 1.5
    points = Given((1, 1, 1), slice(0, 1), numpy.array([2]), 0, 'zero')
    corners = Corners(
        points, point, None, size, numpy.dtype('float64'), compiler.loops()
    )
    # The pixel that is before it, and the next one.
    first = 1 + 3 * 2**31 - 2
    pixels = sorted(corners.pixels.reshape(-1))
    assert pixels[-2:] == [first, first + 1]
