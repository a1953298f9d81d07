"""On a device: the same as on the CPU, and what only a device can show."""

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from chainer_deform import links
from chainer_deform.functions import deformable_convolution_2d_sampler, sampled_sum_2d
from chainer_deform.sampling import cuda as sampling
from tests.cases import CASES, SUM_CASES, Case, SumCase, assert_close

pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize(
    'case',
    [*CASES.values(), *SUM_CASES.values()],
    ids=[*CASES, *(f'sum: {name}' for name in SUM_CASES)],
)
both_borders = pytest.mark.parametrize('border', ['zero', 'clamp'])


def apply(variables, options, device):
    """What the function returns that takes these arguments."""
    if 'locations' not in variables:
        return deformable_convolution_2d_sampler(**variables, **options)
    indices = options['indices']
    if indices is not None:
        indices = device.send(indices)
    return sampled_sum_2d(**variables, indices=indices, border=options['border'])


def run(arrays, options, gy, device='@numpy'):
    """The output and the gradients by name, computed on a device, as NumPy arrays."""
    device = chainer.get_device(device)
    variables = {
        name: chainer.Variable(device.send(array)) for name, array in arrays.items()
    }
    y = apply(variables, options, device)
    y.grad = device.send(gy)
    y.backward()
    assert {y.device, *(v.device for v in variables.values())} == {device}
    to_cpu = chainer.get_device('@numpy').send
    return to_cpu(y.array), {name: to_cpu(v.grad) for name, v in variables.items()}


def run_second_order(arrays, options, gy, device='@numpy'):
    """The gradients, by name, of the sum of the gradients times random numbers."""
    random = numpy.random.RandomState(2)
    gg = [
        random.uniform(-1, 1, array.shape).astype(array.dtype)
        for array in arrays.values()
    ]
    device = chainer.get_device(device)
    *gg, gy = (chainer.Variable(device.send(array)) for array in (*gg, gy))
    variables = {
        name: chainer.Variable(device.send(array)) for name, array in arrays.items()
    }
    y = apply(variables, options, device)
    gradients = chainer.grad(
        [y], list(variables.values()), [gy], enable_double_backprop=True
    )
    arguments = {'gy': gy, **variables}
    arguments.pop('b', None)  # the gradients do not depend on it
    second_order = chainer.grad(gradients, list(arguments.values()), gg)
    assert {gradient.device for gradient in second_order} == {device}
    to_cpu = chainer.get_device('@numpy').send
    return {name: to_cpu(g.array) for name, g in zip(arguments, second_order)}


def assert_same(case, dtype, offset_dtype=None, device='@cupy:0'):
    arrays, gy = case.arrays(dtype, offset_dtype), case.gy(dtype)
    expected_y, expected = run(arrays, case.options, gy)
    y, gradients = run(arrays, case.options, gy, device)
    worst = min(dtype, offset_dtype or dtype, key=lambda d: numpy.dtype(d).itemsize)
    # Half-precision columns are rounded once more than the CPU's.
    scale = 4 if worst == 'float16' else 1
    assert_close(y / scale, expected_y / scale, 'y', worst)
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_close(gradient / scale, expected[name] / scale, name, worst)
    expected = run_second_order(arrays, case.options, gy)
    for name, gradient in run_second_order(arrays, case.options, gy, device).items():
        assert gradient.dtype == expected[name].dtype, name
        assert_close(gradient / scale, expected[name] / scale, name, worst)


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
@every_case
def test_same_as_the_cpu(case, dtype):
    assert_same(case, dtype)


@pytest.mark.parametrize(
    ('dtype', 'offset_dtype'),
    [('float16', 'float32'), ('float32', 'float64'), ('float64', 'float16')],
)
def test_mixed_dtypes(dtype, offset_dtype):
    assert_same(CASES['all'], dtype, offset_dtype)
    assert_same(SUM_CASES['groups, clamp'], dtype, offset_dtype)


@pytest.mark.parametrize('lanes', [1, 8, 32])
@pytest.mark.parametrize('few_positions', [0, 512])
@pytest.mark.parametrize(
    'case',
    [
        Case(n=3, c=256, out_c=64, size=(20, 31), ksize=(3, 3), pad=(1, 1), mask=True),
        Case(n=3, c=96, out_c=32, size=(20, 31), groups=4, offset_groups=2, mask=True),
        Case(n=2, c=40, out_c=40, size=(33, 20), groups=40, offset_groups=8),
        Case(n=5, c=7, out_c=3, size=(13, 12), dilate=(2, 1), stride=(1, 2)),
    ],
    ids=['wide', 'groups', 'depthwise', 'odd'],
)
def test_lanes_and_products(case, few_positions, lanes, monkeypatch):
    monkeypatch.setattr(sampling, 'MOST_LANES', lanes)
    monkeypatch.setattr(sampling, 'FEW_POSITIONS', few_positions)
    for dtype in 'float32', 'float16':
        assert_same(case, dtype)
    monkeypatch.setattr(sampling, 'COLUMN_BYTES', 1 << 18)
    assert_same(case, 'float32')


@pytest.mark.parametrize('deterministic', [False, True])
def test_wide_coordinates(deterministic, monkeypatch):
    """Kernels of large images count with 64 bits."""
    monkeypatch.setattr(sampling, 'NARROW', 0)
    with chainer.using_config('cudnn_deterministic', deterministic):
        assert_same(CASES['all'], 'float32')
        assert_same(SUM_CASES['groups, clamp'], 'float32')


@both_borders
@pytest.mark.parametrize('c', [7, 24, 256])
def test_lanes_of_sums(c, border, monkeypatch):
    case = SumCase(n=3, c=c, size=(20, 31), q=300, points=9, border=border)
    for dtype in 'float32', 'float16':
        assert_same(case, dtype)
    monkeypatch.setattr(sampling, 'COLUMN_BYTES', 1 << 12)
    assert_same(case, 'float32')


@pytest.mark.parametrize('value', [numpy.nan, numpy.inf, -numpy.inf, 3e38, 2.0**31])
@pytest.mark.parametrize(
    'case',
    [
        Case(c=8, mask=True, pad=(1, 0)),
        SumCase(c=8, points=5),
        SumCase(c=8, points=5, border='clamp'),
    ],
    ids=['convolution', 'sum, zero', 'sum, clamp'],
)
def test_hostile_coordinates(case, value):
    arrays, gy = case.arrays('float32'), case.gy('float32')
    coordinates = 'offset' if 'offset' in arrays else 'locations'
    arrays[coordinates].reshape(-1)[::7] = value
    expected_y, expected = run(arrays, case.options, gy)
    y, gradients = run(arrays, case.options, gy, '@cupy:0')
    assert_close(y, expected_y, 'y')
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)
    expected = run_second_order(arrays, case.options, gy)
    gradients = run_second_order(arrays, case.options, gy, '@cupy:0')
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize('name', ['all', 'plain'])
def test_finite_differences(name):
    case = CASES[name]
    device = chainer.get_device('@cupy:0')
    arrays = {name: device.send(array) for name, array in case.arrays().items()}
    tolerances = {'eps': 1e-4, 'rtol': 1e-6, 'atol': 1e-7}

    def function(*args):
        return deformable_convolution_2d_sampler(
            **dict(zip(arrays, args)), **case.options
        )

    x_data, gy = tuple(arrays.values()), device.send(case.gy())
    gg = tuple(device.send(array) for array in case.arrays(seed=2).values())
    gradient_check.check_backward(function, x_data, gy, **tolerances)
    gradient_check.check_double_backward(function, x_data, gy, gg, **tolerances)


@pytest.mark.parametrize(
    'case',
    [
        Case(n=4, c=64, out_c=16, size=(9, 40), ksize=(3, 3), pad=(1, 1), mask=True),
        SumCase(n=1, c=64, size=(9, 10), q=1440, groups=2, points=9),
    ],
    ids=['convolution', 'sum'],
)
def test_deterministic(case):
    """Thousands of taps add to the same pixels: atomics would show their order."""
    arrays, gy = case.arrays('float32'), case.gy('float32')
    if 'offset' in arrays:
        arrays['offset'] *= 3
    expected = run(arrays, case.options, gy)
    with chainer.using_config('cudnn_deterministic', True):
        runs = [run(arrays, case.options, gy, '@cupy:0') for _ in range(3)]
    for y, gradients in runs:
        assert_close(gradients['x'], expected[1]['x'], 'x')
        numpy.testing.assert_array_equal(y, runs[0][0])
        for name, gradient in gradients.items():
            numpy.testing.assert_array_equal(gradient, runs[0][1][name], name)
    expected = run_second_order(arrays, case.options, gy)
    with chainer.using_config('cudnn_deterministic', True):
        runs = [run_second_order(arrays, case.options, gy, '@cupy:0') for _ in '123']
    for gradients in runs:
        assert_close(gradients['x'], expected['x'], 'x')
        for name, gradient in gradients.items():
            numpy.testing.assert_array_equal(gradient, runs[0][name], name)


def test_layer_moves_and_trains():
    numpy.random.seed(0)
    layer = links.DeformableConvolution2D(
        6, 8, 3, pad=1, groups=2, offset_groups=3, modulated=True
    )
    x = numpy.random.uniform(-1, 1, (4, 6, 12, 11)).astype('f')
    target = numpy.random.uniform(-1, 1, (4, 8, 12, 11)).astype('f')
    losses = {}
    for name in '@numpy', '@cupy:0':
        model = layer.copy('copy')
        device = chainer.get_device(name)
        device.use()
        model.to_device(device)
        optimizer = chainer.optimizers.Adam(0.01).setup(model)
        losses[name] = []
        for _ in range(10):
            loss = F.mean_squared_error(model(device.send(x)), device.send(target))
            losses[name].append(float(loss.array))
            model.cleargrads()
            loss.backward()
            optimizer.update()
        assert losses[name][-1] < losses[name][0]
        model.to_device('@numpy')
    chainer.get_device('@numpy').use()
    numpy.testing.assert_allclose(losses['@cupy:0'], losses['@numpy'], rtol=1e-3)


def test_memory_is_bounded():
    """The columns would take 18 GiB and have more than 2 ** 31 elements."""
    cupy = cuda.cupy
    shape = (1, 128, 2048, 2048)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    x = chainer.Variable(cupy.ones(shape, 'f'))
    offset = cupy.full((1, 18, *shape[2:]), 0.25, 'f')
    W = chainer.Variable(cupy.ones((1, 128, 3, 3), 'f'))
    before = pool.total_bytes()
    y = deformable_convolution_2d_sampler(x, offset, W, pad=1)
    y.grad = cupy.ones_like(y.array)
    y.backward()
    assert float(y.array[0, 0, 1000, 1000]) == pytest.approx(128 * 9, rel=1e-4)
    assert float(x.grad[0, 5, 1000, 1000]) == pytest.approx(9, rel=1e-4)
    # The channels-last image, its gradient, both layouts of that, a piece of columns.
    assert (
        pool.total_bytes() - before < 4 * x.array.nbytes + 1.2 * sampling.COLUMN_BYTES
    )
    del x, y, W, offset
    pool.free_all_blocks()


def test_second_device():
    if cuda.cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip('there is one device')
    assert_same(CASES['all'], 'float32', device='@cupy:1')


def test_arrays_on_different_devices():
    arrays = CASES['plain'].arrays('float32')
    arrays['x'] = cuda.cupy.asarray(arrays['x'])
    with pytest.raises(ValueError, match='offset must be on the device of x, @cupy:0'):
        deformable_convolution_2d_sampler(**arrays)


def test_short_run_without_a_memory_pool():
    """For memory checkers, which cannot see past the ends of arrays within a pool."""
    with cuda.cupy.cuda.using_allocator(None):
        cases = [CASES[name] for name in ('all', 'plain', 'depthwise', 'mask')]
        cases += [SUM_CASES[name] for name in ('groups, zero', 'indices, clamp')]
        for case in cases:
            for dtype in 'float32', 'float16':
                assert_same(case, dtype)
                with chainer.using_config('cudnn_deterministic', True):
                    assert_same(case, dtype)
