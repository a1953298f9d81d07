"""Compiles every kernel for real, as CuPy would on a GPU; needs NVRTC, but no GPU.

The host code runs on NumPy arrays; each kernel that it launches is compiled instead,
for several architectures, from the source that CuPy generates for it.
"""

import re

import numpy
import pytest

from chainer_deform.sampling import convolution, cuda, weighted_sum
from tests import emulator
from tests.cases import CASES, Case, SumCase
from tests.cuda_compile import compiling
from tests.cuda_compile.compiling import accepted_architectures

#: Most registers of a thread, of those kernels that take the time. All others are only
#: held to no spills.
REGISTERS = {
    ('chainer_deform_sample', 'float32'): 48,
    ('chainer_deform_sample', 'float16'): 56,
    ('chainer_deform_sample, second order', 'float32'): 64,
    ('chainer_deform_sample, second order', 'float16'): 72,
    ('chainer_deform_sample_sum, given points', 'float32'): 64,
    ('chainer_deform_sample_sum, given points', 'float16'): 64,
    ('chainer_deform_sample_sum, second order, given points', 'float32'): 96,
    ('chainer_deform_sample_sum, second order, given points', 'float16'): 112,
    ('chainer_deform_differentiate', 'float32'): 64,
    ('chainer_deform_differentiate', 'float16'): 72,
    ('chainer_deform_differentiate, second order', 'float32'): 80,
    ('chainer_deform_differentiate, second order', 'float16'): 96,
    ('chainer_deform_differentiate, given points', 'float32'): 64,
    ('chainer_deform_differentiate, given points', 'float16'): 72,
    ('chainer_deform_differentiate, second order, given points', 'float32'): 80,
    ('chainer_deform_differentiate, second order, given points', 'float16'): 96,
    ('chainer_deform_gather', 'float32'): 40,
    ('chainer_deform_gather, second order', 'float32'): 48,
    ('chainer_deform_swap', 'float32'): 40,
    ('chainer_deform_swap', 'float16'): 56,
}


class CompiledKernel:
    """Compiles itself when it is called, for every architecture, and runs nothing."""

    compiled: dict = {}
    index_32_bits = True  # what CuPy says of arrays below 2 GiB

    def __init__(self, *args, **kwargs):
        self.kernel = compiling.cupy.ElementwiseKernel(*args, **kwargs)

    def __call__(self, *args, size):
        source = compiling.generated_source(self.kernel, args, self.index_32_bits)
        for architecture in accepted_architectures():
            if (source, architecture) in self.compiled:
                continue
            _, log = compiling.compiled(source, architecture)
            self.compiled[source, architecture] = log
            name = self.kernel.name
            if '#define DOT 1' in source:
                name += ', second order'
            if '#define SUMMED 1' in source:
                name += ', given points'
            self.check(log, name, args[0].dtype.name, architecture)

    def check(self, log, name, dtype, architecture):
        used = {
            what: sum(map(int, re.findall(rf'(\d+) {what}', log)))
            for what in (
                'registers',
                'bytes stack frame',
                'bytes spill stores',
                'bytes smem',
            )
        }
        print(name, dtype, architecture, used)
        assert used['registers']
        assert not used['bytes spill stores']
        assert not used['bytes stack frame']
        assert not used['bytes smem']
        assert used['registers'] <= REGISTERS.get((name, dtype), 255)


@pytest.fixture(autouse=True)
def kernels_compile(monkeypatch):
    # Sort keys have to be numbers, though nothing writes them.
    emulator.emulate(monkeypatch, ElementwiseKernel=CompiledKernel, empty=numpy.zeros)


def launch_everything(case, dtype, offset_dtype=None):
    arrays, gy = case.arrays(dtype, offset_dtype), case.gy(dtype)
    convolution.forward(cuda, case.geometry, **arrays)

    def backward(wanted):
        wanted &= arrays.keys()
        convolution.backward(cuda, case.geometry, wanted, gy, **arrays)

    def double_backward(moving):
        gg = {name: arrays[name] for name in moving & arrays.keys()}
        wanted = {'gy', *arrays} - {'b'}
        convolution.double_backward(cuda, case.geometry, wanted, gg, gy, **arrays)

    for wanted in {*arrays}, {'x'}, {'offset'}, {'mask', 'W'}, {'W'}:
        backward(wanted)
    for moving in {*arrays}, {'x'}, {'W'}, {'offset', 'mask'}:
        double_backward(moving)
    with cuda.chainer.using_config('cudnn_deterministic', True):
        for wanted in {*arrays}, {'x'}:
            backward(wanted)
        for moving in {*arrays}, {'W'}:
            double_backward(moving)


def launch_sums(case, dtype, location_dtype=None):
    arrays, gy = case.arrays(dtype, location_dtype), case.gy(dtype)
    indices = numpy.zeros(case.q, numpy.int64)
    arguments = *arrays.values(), indices, case.border
    weighted_sum.forward(cuda, *arguments)

    def double_backward(moving):
        gg = {name: arrays[name] for name in moving}
        weighted_sum.double_backward(cuda, {'gy', *arrays}, gg, gy, *arguments)

    for wanted in {*arrays}, {'x'}, {'locations'}:
        weighted_sum.backward(cuda, wanted, gy, *arguments)
    for moving in {*arrays}, {'x'}, {'locations'}, {'weights'}:
        double_backward(moving)
    with cuda.chainer.using_config('cudnn_deterministic', True):
        weighted_sum.backward(cuda, {*arrays}, gy, *arguments)
        double_backward({*arrays})


def test_architectures():
    accepted = accepted_architectures()
    print('compiled for', accepted)
    assert {'sm_80', 'sm_90'} <= set(accepted)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize(
    'case',
    [
        Case(n=1, c=256, out_c=1, ksize=(3, 3), pad=(1, 1)),
        Case(n=1, c=64, out_c=1, ksize=(3, 3), mask=True, groups=1, offset_groups=2),
        CASES['all'],
        CASES['plain'],
    ],
    ids=['256 channels', 'modulated', 'all', 'plain'],
)
def test_every_kernel_compiles(case, dtype):
    launch_everything(case, dtype)


@pytest.mark.parametrize(
    ('dtype', 'offset_dtype'),
    [
        ('float16', 'float32'),
        ('float16', 'float64'),
        ('float32', 'float64'),
        ('float64', 'float16'),
    ],
)
def test_mixed_dtypes_compile(dtype, offset_dtype):
    launch_everything(CASES['all'], dtype, offset_dtype)


@pytest.mark.parametrize(
    ('border', 'dtype', 'location_dtype'),
    [
        ('zero', 'float32', None),
        ('clamp', 'float32', None),
        ('clamp', 'float16', None),
        ('clamp', 'float64', None),
        ('zero', 'float16', 'float32'),
    ],
)
def test_sums_compile(border, dtype, location_dtype):
    for case in (
        SumCase(n=1, c=256, q=2, groups=8, points=4, border=border),
        SumCase(n=1, c=6, q=2, groups=2, border=border),
    ):
        launch_sums(case, dtype, location_dtype)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
def test_depthwise_compiles(dtype):
    for c in 6, 16:
        case = Case(n=1, c=c, out_c=2 * c, groups=c, ksize=(3, 3), mask=True)
        arrays, gy = case.arrays(dtype), case.gy(dtype)
        gg = {name: arrays[name] for name in ('W', 'x')}
        convolution.forward(cuda, case.geometry, **arrays)
        convolution.backward(cuda, case.geometry, {*arrays}, gy, **arrays)
        convolution.double_backward(cuda, case.geometry, {'gy'}, gg, gy, **arrays)


def test_tangents_of_other_dtypes_compile():
    case = CASES['all']
    arrays, gy = case.arrays('float16'), case.gy('float16')
    gg = {name: arrays[name].astype('f') for name in ('offset', 'mask')}
    wanted = {'gy', *arrays} - {'b'}
    convolution.double_backward(cuda, case.geometry, wanted, gg, gy, **arrays)


def test_large_arrays_compile(monkeypatch):
    """With 64-bit indices, and coordinates."""
    monkeypatch.setattr(CompiledKernel, 'index_32_bits', False)
    monkeypatch.setattr(cuda, 'NARROW', 0)
    launch_everything(CASES['all'], 'float32')
    launch_sums(SumCase(c=8, q=2), 'float32')


def test_vector_atomics():
    """The image gradient of float32 is added in one access of 16 bytes on sm_90."""
    launch_everything(Case(n=1, c=256, out_c=1), 'float32')
    for order in 0, 1:
        sources = [
            source
            for source, _ in CompiledKernel.compiled
            if 'chainer_deform_differentiate' in source
            and '#define GIMAGE 1' in source
            and '#define VEC 4' in source
            and f'#define DOT {order}' in source
        ]
        ptx = compiling.ptx(sources[-1], 'sm_90')
        assert re.search(r'(red|atom)\.global\.[a-z.]*v4\.f32', ptx)
