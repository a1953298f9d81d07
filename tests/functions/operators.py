"""What the tests of every operator that is a sampled sum have in common."""

import chainer
import numpy
import pytest
from chainer import gradient_check

from tests import reference
from tests.cases import assert_close

#: Dtypes of images and weights, and of what says where the points are.
every_dtype = pytest.mark.parametrize(
    ('dtype', 'offset_dtype'),
    [
        ('float64', 'float64'),
        ('float32', 'float32'),
        ('float16', 'float16'),
        ('float16', 'float32'),
        ('float32', 'float64'),
    ],
)


def run(function, arrays, options, gy=None):
    """The output and, given ``gy``, the gradients by name."""
    variables = {name: chainer.Variable(array) for name, array in arrays.items()}
    y = function(**variables, **options)
    if gy is None:
        return y.array
    gradients = chainer.grad([y], [*variables.values()], [chainer.Variable(gy)])
    return y.array, {name: g.array for name, g in zip(variables, gradients)}


def random_like(array, seed=1):
    random = numpy.random.RandomState(seed)
    return random.uniform(-1, 1, array.shape).astype(array.dtype)


def check_first_order(function, arrays, options, dtype=None):
    """Output and all gradients against the oracle, each as exact as its dtype."""
    oracle = getattr(reference, function.__name__)
    gy = random_like(run(function, arrays, options))
    y, gradients = run(function, arrays, options, gy)
    expected_y, expected = oracle(**arrays, **options, gy=gy)
    first = next(iter(arrays))
    assert y.dtype == arrays[first].dtype
    assert_close(y, expected_y, 'y', dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_close(gradient, expected[name], name, dtype)
    return y, gradients


def check_second_order(function, arrays, options):
    """All gradients of all gradients against a complex step of the oracle."""
    oracle = getattr(reference, function.__name__)
    gy = random_like(run(function, arrays, options))
    gg = {name: random_like(array, 2) for name, array in arrays.items()}
    arguments = {**arrays, 'gy': gy}
    variables = {name: chainer.Variable(array) for name, array in arguments.items()}
    y = function(**{name: variables[name] for name in arrays}, **options)
    gradients = chainer.grad(
        [y],
        [variables[name] for name in gg],
        [variables['gy']],
        enable_double_backprop=True,
    )
    found = chainer.grad(
        gradients,
        [*variables.values()],
        [chainer.Variable(array) for array in gg.values()],
    )
    expected = reference.second_order(oracle, arguments, gg, **options)
    for (name, array), gradient in zip(arguments.items(), found):
        if gradient is None:
            assert not expected[name].any(), name
            continue
        assert gradient.dtype == array.dtype, name
        assert_close(gradient.array, expected[name], name)


def check_finite_differences(function, arrays, options):
    """The gradients of all gradients, in the directions of random numbers."""
    y = run(function, arrays, options)
    random = numpy.random.RandomState(3)
    gradient_check.check_double_backward(
        lambda *args: function(**dict(zip(arrays, args)), **options),
        tuple(arrays.values()),
        random.uniform(-1, 1, y.shape),
        tuple(random.uniform(-1, 1, a.shape) for a in arrays.values()),
        eps=1e-5,
        rtol=1e-4,
        atol=1e-4,
    )


def check_case(function, arrays, options, y, gradients, atol=1e-12):
    """A published case: the output, and the gradients of its sum."""
    found = run(function, arrays, options)
    found, found_gradients = run(function, arrays, options, numpy.ones_like(found))
    numpy.testing.assert_allclose(found, y, rtol=0, atol=atol)
    for name, expected in gradients.items():
        numpy.testing.assert_allclose(
            found_gradients[name], expected, rtol=0, atol=atol, err_msg=name
        )
