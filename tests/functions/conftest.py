import importlib
import tracemalloc

import chainer
import numpy
import pytest

from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.sampling import compiler, cpu
from tests.cases import Case


@pytest.fixture(autouse=True, params=['scipy', 'numba'])
def loops(request, monkeypatch):
    """Every test here runs with either version of the CPU's loops."""
    if request.param == 'numba':
        pytest.importorskip('numba', exc_type=ImportError)
    module = importlib.import_module(f'chainer_deform.sampling.cpu_{request.param}')
    monkeypatch.setattr(compiler, 'loops', lambda: module)
    return module


@pytest.fixture
def peak_of():
    """Measures the bytes that a function takes at most, beside what is there.

    What a first call imports and compiles is not counted.
    """
    case = Case(mask=True)
    arrays = case.arrays('float32')
    variables = {name: chainer.Variable(array) for name, array in arrays.items()}
    y = deformable_convolution_2d_sampler(**variables, **case.options)
    inputs = list(variables.values())
    gradients = chainer.grad([y], inputs, enable_double_backprop=True)
    chainer.grad(gradients, inputs)

    def peak_of(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return peak_of


@pytest.fixture
def unclean_memory(monkeypatch):
    """Lets new arrays hold NaN, as memory that was used before may."""
    empty = numpy.empty

    def spoilt(*args, **kwargs):
        array = empty(*args, **kwargs)
        array.fill(numpy.nan if array.dtype.kind == 'f' else 1)
        return array

    def spoil():
        monkeypatch.setattr(numpy, 'empty', spoilt)
        monkeypatch.setattr(cpu, 'empty', spoilt)

    return spoil
