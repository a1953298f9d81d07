"""What the tests of the layers with a sampled sum inside have in common."""

import copy
import pickle

import chainer
import chainer.functions as F
import numpy
from chainer import serializers

HALVES = {'float16': 'float16', 'mixed16': 'float16', 'float64': 'float64'}


def randomize(layer, seed=0, scale=0.3):
    """Gives every parameter random numbers, the same ones by name for each seed."""
    random = numpy.random.RandomState(seed)
    for _, param in sorted(layer.namedparams()):
        param.array[...] = random.normal(0, scale, param.shape)
    return layer


def arrays_of(layer):
    """All parameters in float64, by name without the first slash."""
    return {name[1:]: p.array.astype(float) for name, p in layer.namedparams()}


def linear(rows, parameters, name):
    """A fully connected layer of the last axis; 1 x 1 convolutions are such, too."""
    W = parameters[f'{name}/W']
    y = rows @ W.reshape(len(W), -1).T
    return y + parameters[f'{name}/b'] if f'{name}/b' in parameters else y


def sigmoid(array):
    return 1 / (1 + numpy.exp(-array))


def softmax(array, axis):
    weights = numpy.exp(array - array.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def gradients_of(layer, arguments):
    """The gradients of a sum of the output, of all parameters and float arguments."""
    layer.cleargrads()
    variables = [
        chainer.Variable(a) if getattr(a, 'dtype', numpy.dtype('i')).kind == 'f' else a
        for a in arguments
    ]
    y = layer(*variables)
    gy = numpy.random.RandomState(3).uniform(-1, 1, y.shape).astype(y.dtype)
    F.sum(y * gy).backward()
    assert all(param.grad.dtype == param.dtype for param in layer.params())
    gradients = {name: param.grad for name, param in layer.namedparams()}
    for i, variable in enumerate(variables):
        if isinstance(variable, chainer.Variable):
            gradients[i] = variable.grad
    return gradients


def check_is_a_link(make, arguments, tmp_path):
    """Files, copies, late initialisation; ``make`` takes ``in_channels``."""
    layer = randomize(make())
    expected = layer(*arguments).array
    for other in (
        layer.copy('copy'),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        numpy.testing.assert_array_equal(other(*arguments).array, expected)

    late = make(in_channels=None)
    late(*arguments)
    shapes = {name: param.shape for name, param in layer.namedparams()}
    assert {name: param.shape for name, param in late.namedparams()} == shapes
    for kind in 'npz', 'hdf5':
        path = tmp_path / f'layer.{kind}'
        getattr(serializers, f'save_{kind}')(path, layer)
        for other in make(), make(in_channels=None), late:
            getattr(serializers, f'load_{kind}')(path, other)
            numpy.testing.assert_array_equal(other(*arguments).array, expected)

    name = type(layer).__name__
    assert repr(layer) == str(layer)
    assert repr(layer).startswith(f'{name}(in_channels=')
    assert '\n' not in repr(layer)


def check_dtypes(make, arguments, tolerance=0.02):
    """Each dtype of Chainer's configuration: outputs, gradients, their sizes."""
    layer = randomize(make())
    expected, gradients = layer(*arguments).array, gradients_of(layer, arguments)
    for config, name in HALVES.items():
        dtype = numpy.dtype(name)
        config = chainer.mixed16 if config == 'mixed16' else dtype
        cast = [a.astype(dtype) if _is_float(a) else a for a in arguments]
        for in_channels in {}, {'in_channels': None}:
            with chainer.using_config('dtype', config):
                layer = make(**in_channels)
                layer(*cast)
                randomize(layer)
                y, found = layer(*cast), gradients_of(layer, cast)
            assert {param.dtype for param in layer.params()} == {dtype}
            assert y.dtype == dtype
            atol = tolerance * abs(expected).max()
            numpy.testing.assert_allclose(y.array, expected, atol=atol)
            assert found.keys() == gradients.keys()
            for key, gradient in found.items():
                assert gradient is None or numpy.isfinite(gradient).all(), key


def check_every_parameter_learns(make, arguments):
    for key, gradient in gradients_of(randomize(make()), arguments).items():
        assert gradient is None or abs(gradient).max() > 1e-4, key


def check_second_order(make, arguments, count=None, step=1e-6):
    """The gradient of a sum of all gradients against a difference of such sums.

    Only the first ``count`` arguments are differentiable.
    """
    arguments, fixed = arguments[:count], [] if count is None else arguments[count:]
    arguments = [a.astype(float) if _is_float(a) else a for a in arguments]
    with chainer.using_config('dtype', numpy.float64):
        layer = randomize(make())
    random = numpy.random.RandomState(4)
    start = [a for a in arguments if _is_float(a)]
    start += [param.array.copy() for param in layer.params()]
    weights, direction = (
        [random.uniform(-1, 1, array.shape) for array in start] for _ in range(2)
    )
    gy = None

    def sum_of_gradients(distance):
        nonlocal gy
        moved = iter([a + distance * d for a, d in zip(start, direction)])
        inputs = [
            chainer.Variable(next(moved)) if _is_float(a) else a for a in arguments
        ]
        for param in layer.params():
            param.array = next(moved)
        y = layer(*inputs, *fixed)
        if gy is None:
            gy = random.uniform(-1, 1, y.shape)
        variables = [v for v in inputs if isinstance(v, chainer.Variable)]
        variables += layer.params()
        gradients = chainer.grad(
            [y], variables, [chainer.Variable(gy)], enable_double_backprop=True
        )
        pairs = [(g, c) for g, c in zip(gradients, weights) if g is not None]
        return sum(F.sum(g * c) for g, c in pairs), variables

    total, variables = sum_of_gradients(0)
    gradients = chainer.grad([total], variables)
    found = sum(
        (g.array * d).sum() for g, d in zip(gradients, direction) if g is not None
    )
    ahead, behind = (float(sum_of_gradients(s)[0].array) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    assert abs(expected) > 0.01
    numpy.testing.assert_allclose(found, expected, rtol=1e-5)


def _is_float(array):
    return getattr(array, 'dtype', numpy.dtype('i')).kind == 'f'
