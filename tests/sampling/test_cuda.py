"""The GPU path on NumPy arrays: kernels emulated, products by their pointers."""

import pathlib
import sys
import weakref

import chainer
import numpy
import pytest

from chainer_deform.sampling import convolution, cuda, weighted_sum
from chainer_deform.sampling.points import Given, Grid
from tests import emulator, reference
from tests.cases import (
    CASES,
    SUM_CASES,
    WANTED,
    Case,
    SumCase,
    assert_close,
    infinity_as_nan,
)

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason='the emulator needs a C++ compiler'
)
every_case = pytest.mark.parametrize(
    'case',
    [*CASES.values(), *SUM_CASES.values()],
    ids=[*CASES, *(f'sum: {name}' for name in SUM_CASES)],
)
both_borders = pytest.mark.parametrize('border', ['zero', 'clamp'])


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulator.emulate(monkeypatch)
    monkeypatch.setattr(cuda, 'MOST_LANES', 1)


@pytest.fixture(params=[False, True], ids=['atomics', 'deterministic'])
def deterministic(request):
    with chainer.using_config('cudnn_deterministic', request.param):
        yield request.param


def options_of(case):
    """The driver of a case, and what it takes before and after the arrays."""
    if isinstance(case, Case):
        return convolution, (case.geometry,), {}
    indices = case.options['indices']
    if indices is None:
        indices = numpy.arange(case.n).repeat(case.q // max(1, case.n))
    return weighted_sum, (), {'indices': indices.astype('l'), 'border': case.border}


@numpy.errstate(all='ignore')  # as on a GPU
def run(case, arrays, gy, wanted=None):
    driver, args, kwargs = options_of(case)
    y = driver.forward(cuda, *args, **arrays, **kwargs)
    wanted = arrays if wanted is None else wanted
    return y, driver.backward(cuda, *args, wanted, gy, **arrays, **kwargs)


@numpy.errstate(all='ignore')
def run_second_order(case, arrays, gy, gg, wanted=None):
    driver, args, kwargs = options_of(case)
    wanted = {'gy', *arrays} - {'b'} if wanted is None else wanted
    return driver.double_backward(cuda, *args, wanted, gg, gy, **arrays, **kwargs)


def expected_of(case, arrays, gy):
    function = reference.deformable_convolution_2d_sampler
    if isinstance(case, SumCase):
        function = reference.sampled_sum_2d
    return function(**arrays, **case.options, gy=gy)


def expected_second_order(case, arrays, gy, gg):
    function = reference.deformable_convolution_2d_sampler_second_order
    if isinstance(case, SumCase):
        function = reference.sampled_sum_2d_second_order
    return function(**arrays, **case.options, gy=gy, gg=gg)


def tangents(arrays, moving=None):
    """Along which all arguments move, or those named."""
    random = numpy.random.RandomState(2)
    gg = {
        name: random.uniform(-1, 1, array.shape).astype(array.dtype)
        for name, array in arrays.items()
    }
    return {name: gg[name] for name in (arrays if moving is None else moving)}


def check(case, arrays, gy, dtype=None):
    check_first_order(case, arrays, gy, dtype)
    check_second_order(case, arrays, gy, dtype)


def check_first_order(case, arrays, gy, dtype=None, same=lambda array: array):
    y, gradients = run(case, arrays, gy)
    expected_y, expected = expected_of(case, arrays, gy)
    assert y.dtype == arrays['x'].dtype
    assert_close(y, expected_y, 'y', dtype)
    assert gradients.keys() == arrays.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        same_dtype = dtype or gradient.dtype
        assert_close(same(gradient), same(expected[name]), name, same_dtype)


def check_second_order(
    case, arrays, gy, dtype=None, moving=None, wanted=None, gg=None,
    same=lambda array: array,
):  # fmt: skip
    gg = tangents(arrays, moving) if gg is None else gg
    gradients = run_second_order(case, arrays, gy, gg, wanted)
    expected = expected_second_order(case, arrays, gy, gg)
    arguments = {'gy': gy, **arrays}
    assert gradients.keys() == set(wanted or arguments.keys() - {'b'})
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        same_dtype = dtype or gradient.dtype
        assert_close(same(gradient), same(expected[name]), name, same_dtype)


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
@every_case
def test_output_and_gradients(case, dtype):
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize(
    ('dtype', 'other'),
    [('float16', 'float32'), ('float32', 'float64'), ('float64', 'float16')],
)
@pytest.mark.parametrize(
    'case',
    [CASES['all'], CASES['no bias'], SUM_CASES['groups, clamp']],
    ids=['all', 'no bias', 'sum'],
)
def test_mixed_dtypes(case, dtype, other):
    """Offsets or locations, and their factors, are of another dtype than the image."""
    worst = min(dtype, other, key=lambda d: numpy.dtype(d).itemsize)
    arrays, gy = case.arrays(dtype, other), case.gy(dtype)
    check(case, arrays, gy, worst)
    # How they move may be of a third one.
    gg = tangents(arrays)
    for name in gg.keys() - {'x', 'W', 'b'}:
        gg[name] = gg[name].astype(dtype)
    check_second_order(case, arrays, gy, worst, gg=gg)


@pytest.mark.parametrize('name', ['x', 'offset', 'W', 'mask', 'b', 'gy'])
def test_one_argument_in_float64(name):
    """Everything is computed in float64 then, and rounded in the end only."""
    case = CASES['all']
    arrays, gy = case.arrays('float32'), case.gy('float32')
    arguments = {**arrays, 'gy': gy}
    arguments[name] = arguments[name].astype(float) + 1e-9
    gy = arguments.pop('gy')
    y, gradients = run(case, arguments, gy)
    expected_y, expected = expected_of(case, arguments, gy)
    if name != 'gy':  # on that y does not depend
        assert_rounded_once(y, expected_y)
    gg = tangents(arrays)
    if name != 'b':  # on which no gradient depends
        for argument, gradient in gradients.items():
            assert_rounded_once(gradient, expected[argument])
        wanted = {'gy', *arrays} - {'b'} - ({name} & {'gy'})
        gradients = run_second_order(case, arguments, gy, gg, wanted)
        expected = expected_second_order(case, arguments, gy, gg)
        for argument, gradient in gradients.items():
            assert_rounded_once(gradient, expected[argument])
    if name != 'gy':
        gg[name] = gg[name].astype(float) + 1e-9
        gradients = run_second_order(case, arrays, case.gy('float32'), gg)
        expected = expected_second_order(case, arrays, case.gy('float32'), gg)
        for argument, gradient in gradients.items():
            if (name, argument) == ('b', 'gy') or name != 'b':
                assert_rounded_once(gradient, expected[argument])


def assert_rounded_once(array, expected):
    numpy.testing.assert_allclose(
        array, expected.astype(array.dtype), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize('few_positions', [0, 512])
def test_half_precision_overflows_in_the_result_only(few_positions, monkeypatch):
    """Not in the product before the bias, nor in the columns' gradients."""
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    case = Case(c=2, out_c=64, ksize=(1, 1))
    arrays, gy = case.arrays('float16'), case.gy('float16')
    for name, value in ('x', 100), ('offset', 0), ('W', 350), ('b', -20000):
        arrays[name][...] = value
    y, _ = run(case, arrays, gy)
    numpy.testing.assert_allclose(y, 50000, rtol=1e-3)  # 70,000 - 20,000
    arrays['W'][...] = 10
    gy[...] = 200
    _, gradients = run(case, arrays, gy)  # the columns' are 64 * 10 * 200 = 128,000
    assert not gradients['offset'][:, :, :-1, :-1].any()  # the image is constant
    arrays['W'][...] = 350
    gg = {name: arrays[name] for name in ('x', 'b')}
    gradients = run_second_order(case, arrays, gy, gg, ('gy', 'offset'))
    numpy.testing.assert_array_equal(gradients['gy'], y)
    assert not gradients['offset'][:, :, :-1, :-1].any()
    # Two products of 70,000, one of them negative.
    gg['W'] = -arrays['W']
    gradients = run_second_order(case, arrays, gy, gg, ('gy',))
    numpy.testing.assert_allclose(gradients['gy'], -20000, rtol=1e-3)


@pytest.mark.parametrize('few_positions', [0, 512])
def test_bias_of_another_dtype_overflows_in_the_result_only(few_positions, monkeypatch):
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    case = Case(c=2, out_c=3, ksize=(1, 1))
    arrays = case.arrays('float16')
    for name, value in ('x', 100), ('offset', 0), ('W', -200):
        arrays[name][...] = value
    arrays['b'] = numpy.full(3, 1e5, 'f')
    y, _ = run(case, arrays, case.gy('float16'))
    numpy.testing.assert_allclose(y, 60000, rtol=1e-3)


def test_half_precision_is_summed_in_single(deterministic, monkeypatch):
    """Piece by piece: in float16, 2048 + 1 is 2048."""
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', 1)
    case = Case(n=1, c=2, out_c=1, size=(45, 46), ksize=(1, 1))
    arrays, gy = case.arrays('float16'), case.gy('float16')
    rows, columns = numpy.mgrid[:45, :46]
    arrays['offset'][0] = -columns, -rows  # all points are at the first pixel
    for array in arrays['x'], arrays['W'], gy:
        array[...] = 1
    _, gradients = run(case, arrays, gy, ('x', 'W'))
    numpy.testing.assert_array_equal(gradients['W'], 2070)
    numpy.testing.assert_array_equal(gradients['x'][0, :, 0, 0], 2070)
    gradients = run_second_order(case, arrays, gy, {'W': arrays['W']}, ('x',))
    numpy.testing.assert_array_equal(gradients['x'][0, :, 0, 0], 2070)
    gradients = run_second_order(case, arrays, gy, {'x': arrays['x']}, ('W',))
    numpy.testing.assert_array_equal(gradients['W'], 2070)

    case = SumCase(n=1, c=2, q=2070, points=1)
    arrays, gy = case.arrays('float16'), case.gy('float16')
    arrays['locations'][...] = 0
    arrays['weights'][...] = gy[...] = 1
    _, gradients = run(case, arrays, gy, ('x',))
    numpy.testing.assert_array_equal(gradients['x'][0, :, 0, 0], 2070)


def test_many_points_of_half_precision_are_summed_in_single():
    case = SumCase(n=1, c=2, q=1, points=2550)
    arrays = case.arrays('float16')
    arrays['locations'][...] = 0
    arrays['x'][...] = arrays['weights'][...] = 1
    y, _ = run(case, arrays, case.gy('float16'), ())
    numpy.testing.assert_array_equal(y, 2550)


def test_gradient_of_the_bias_is_summed_in_single():
    case = Case(n=1, out_c=2, size=(8, 8), ksize=(1, 1))
    arrays, gy = case.arrays('float16'), case.gy('float16')
    gy[0, :, :4] = 60000
    gy[0, :, 4:] = -60000
    gy[0, 1, 0, 0] += 1024
    _, gradients = run(case, arrays, gy, ('b',))
    numpy.testing.assert_array_equal(gradients['b'], [0, 1024])


def test_filter_of_another_dtype():
    """As in mixed precision, where parameters may be wider than the data."""
    case = CASES['all']
    arrays = case.arrays('float16')
    arrays['W'], arrays['b'] = (arrays[name].astype('f') for name in ('W', 'b'))
    check(case, arrays, case.gy('float16'), 'float16')


@pytest.mark.parametrize('few_positions', [0, 512])
@pytest.mark.parametrize('column_bytes', [1, 2_000, 10_000])
@pytest.mark.parametrize('name', ['all', 'depthwise', 'plain', 'empty batch'])
def test_pieces(name, column_bytes, few_positions, monkeypatch):
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', column_bytes)
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    check(CASES[name], CASES[name].arrays('float32'), CASES[name].gy('float32'))


@pytest.mark.parametrize('column_bytes', [1, 1_000])
@pytest.mark.parametrize('name', ['indices, clamp', 'groups, zero'])
def test_pieces_of_sums(name, column_bytes, deterministic, monkeypatch):
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', column_bytes)
    case = SUM_CASES[name]
    check(case, case.arrays('float32'), case.gy('float32'))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize(
    'case',
    [
        Case(c=16, out_c=16, groups=16, mask=True),
        Case(c=24, out_c=48, groups=24, offset_groups=3, bias=False),
        Case(c=5, out_c=15, groups=5),
    ],
    ids=['one output', 'two outputs', 'odd'],
)
def test_depthwise(case, dtype, deterministic, monkeypatch):
    """All at once and in pieces; the filter's gradient in several shares."""
    for column_bytes in 1 << 30, 20_000:
        monkeypatch.setattr(cuda, 'COLUMN_BYTES', column_bytes)
        monkeypatch.setattr(cuda._Depthwise, 'ROWS', 5)
        check(case, case.arrays(dtype), case.gy(dtype))


def vector_case(kind, c):
    if kind == 'sum':
        return SumCase(c=c, size=(4, 6), groups=2, border='clamp')
    return Case(c=c, out_c=4, size=(4, 6), groups=2, offset_groups=2, mask=True)


@pytest.mark.parametrize('kind', ['convolution', 'sum'])
@pytest.mark.parametrize('architecture', [800, 900])
@pytest.mark.parametrize('c', [8, 12, 16, 24])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_vectors_of_channels(c, dtype, architecture, kind, monkeypatch):
    """1 to 8 channels a thread, with and without atomics of four, and whole tiles of
    the transposition."""
    emulator.emulate(monkeypatch, architecture)
    case = vector_case(kind, c)
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize('kind', ['convolution', 'sum'])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('lanes', [2, 4, 32])
def test_lanes_share_the_channels(lanes, dtype, kind, monkeypatch):
    """Fewer lanes than vectors of channels, and more; they add up what each has."""
    monkeypatch.setattr(cuda, 'MOST_LANES', lanes)
    case = Case(n=1, c=40, out_c=4, size=(3, 4), offset_groups=2, groups=2, mask=True)
    if kind == 'sum':
        case = SumCase(c=40, size=(3, 4), q=2, groups=2, border='clamp')
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize('piece_bytes', [1 << 30, 2_000])
@pytest.mark.parametrize(
    'name', ['all', 'depthwise', 'plain', '1 x 1 image', 'large pad']
)
def test_deterministic(name, piece_bytes, monkeypatch):
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', piece_bytes)
    case = CASES[name]
    with (
        chainer.using_config('cudnn_deterministic', True),
        chainer.using_config('warn_nondeterministic', True),
    ):
        check(case, case.arrays('float32'), case.gy('float32'))
        lattice = case.arrays()
        lattice['offset'] = numpy.round(lattice['offset'])
        check(case, lattice, case.gy())


@pytest.mark.parametrize('name', SUM_CASES)
def test_deterministic_sums(name):
    """An infinite gradient, too, reaches those pixels only that count."""
    case = SUM_CASES[name]
    with (
        chainer.using_config('cudnn_deterministic', True),
        chainer.using_config('warn_nondeterministic', True),
    ):
        check(case, case.arrays('float32'), case.gy('float32'))
        gy = case.gy('float32')
        gy[::3] = numpy.inf
        check_first_order(case, case.arrays('float32'), gy, same=infinity_as_nan)


@both_borders
def test_sums_on_the_lattice(border, deterministic):
    """At whole and half coordinates in the image, at its border and beyond."""
    case = SumCase(n=1, c=2, size=(3, 4), q=13 * 15, points=1, border=border)
    arrays, gy = case.arrays(), case.gy()
    rows, columns = numpy.mgrid[-2:4.5:0.5, -2:5.5:0.5]
    arrays['locations'][:, 0, 0] = numpy.stack([rows, columns], -1).reshape(-1, 2)
    check(case, arrays, gy)


@pytest.mark.parametrize(
    'case',
    [CASES['all'], CASES['large pad'], SUM_CASES['groups, clamp']],
    ids=['all', 'large pad', 'sum'],
)
def test_wide_coordinates(case, deterministic, monkeypatch):
    """Kernels of large images, or of far grids, count with 64 bits."""

    class Kernel(emulator.ElementwiseKernel):
        def __call__(self, *args, size):
            assert 'swap' in self.name or '#define WIDE 1' in self.preamble
            super().__call__(*args, size=size)

    emulator.emulate(monkeypatch, ElementwiseKernel=Kernel)
    monkeypatch.setattr(cuda, 'NARROW', 0)
    check(case, case.arrays('float32'), case.gy('float32'))


@pytest.mark.parametrize(
    ('size', 'pad', 'wide'),
    [
        ((2, 30_000, 30_000), 1, False),
        ((2, 33_000, 33_000), 1, True),
        ((2, 1, 400_000_000), 1, False),
        ((2, 1, 600_000_000), 1, True),
        ((2, 1, 1), 500_000_000, False),
        ((2, 1, 1), 540_000_000, True),
    ],
)
def test_coordinates_are_wide_where_they_must_be(size, pad, wide):
    """Else twice the farthest point, and all cells, stay below 2 ** 31."""
    case = Case(ksize=(1, 1), pad=(pad, pad))
    offset = numpy.zeros((2, 2, 3, 3), 'f')
    tile = slice(0, 2), slice(0, 9)
    points = Grid(case.geometry, (3, 3), tile, 0)
    dtypes = cuda.dtypes(offset, offset)
    assert cuda.Sampler(points, size, dtypes, (offset, None)).wide == wide


def test_atomics_are_announced():
    case = CASES['plain']
    with chainer.using_config('warn_nondeterministic', True):
        run(case, case.arrays(), case.gy(), ('offset', 'W', 'b'))
        with pytest.warns(UserWarning, match='atomicAdd'):
            run(case, case.arrays(), case.gy(), ('x',))
        check_second_order(case, case.arrays(), case.gy(), moving=('x', 'b'))
        check_second_order(case, case.arrays(), case.gy(), wanted=('gy', 'offset', 'W'))
        with pytest.warns(UserWarning, match='atomicAdd'):
            check_second_order(case, case.arrays(), case.gy(), wanted=('x',))
        case = SUM_CASES['plain, zero']
        run(case, case.arrays(), case.gy(), ('locations', 'weights'))
        with pytest.warns(UserWarning, match='atomicAdd'):
            run(case, case.arrays(), case.gy(), ('x',))


@pytest.mark.parametrize('wanted', WANTED)
def test_only_the_gradients_asked_for(wanted, deterministic):
    case = CASES['all']
    _, expected = run(case, case.arrays(), case.gy())
    _, gradients = run(case, case.arrays(), case.gy(), wanted)
    assert gradients.keys() == set(wanted)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize('wanted', [('x',), ('locations',), ('weights', 'x')])
def test_only_the_gradients_of_a_sum_asked_for(wanted, deterministic):
    case = SUM_CASES['groups, clamp']
    _, expected = run(case, case.arrays(), case.gy())
    _, gradients = run(case, case.arrays(), case.gy(), wanted)
    assert gradients.keys() == set(wanted)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize('wanted', [None, ('gy',), ('x',), ('mask',), ('offset', 'W')])
@pytest.mark.parametrize(
    'moving',
    [
        (),
        ('b',),
        ('x',),
        ('W',),
        ('offset',),
        ('mask',),
        ('x', 'W', 'b'),
        ('offset', 'mask'),
    ],
)
def test_second_order_of_some(moving, wanted, deterministic):
    case = CASES['all']
    check_second_order(case, case.arrays(), case.gy(), moving=moving, wanted=wanted)


@pytest.mark.parametrize('wanted', [None, ('gy',), ('x',), ('locations', 'weights')])
@pytest.mark.parametrize(
    'moving', [(), ('x',), ('locations',), ('weights',), ('x', 'weights')]
)
@both_borders
def test_second_order_of_some_sums(border, moving, wanted, deterministic):
    case = SumCase(groups=2, border=border)
    check_second_order(case, case.arrays(), case.gy(), moving=moving, wanted=wanted)


@pytest.mark.parametrize(
    'case', [CASES['all'], SUM_CASES['groups, zero']], ids=['convolution', 'sum']
)
def test_second_order_along_the_image_does_not_read_the_image(case):
    """It is what the first order makes of the other image, as of a gradient penalty."""
    arrays, gy = case.arrays(), case.gy()
    gg = tangents(arrays, ('x',))
    others = {**arrays, **gg}
    if 'b' in arrays:
        others['b'] = 0 * arrays['b']
    y, expected = run(case, others, gy)
    arrays['x'][...] = numpy.nan
    gradients = run_second_order(case, arrays, gy, gg)
    assert not gradients['x'].any()
    for name, array in {**expected, 'gy': y}.items():
        if name not in ('x', 'b'):
            assert_close(gradients[name], array, name)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('seed', range(5))
def test_hostile_values(seed, dtype, deterministic):
    """They end in the oracle's answer, and no index leaves its array."""
    case = Case(n=2, c=4, out_c=2, pad=(1, 0), groups=2, offset_groups=2, mask=True)
    arrays, gy = case.arrays(dtype), case.gy(dtype)
    random = numpy.random.RandomState(seed)
    values = [numpy.nan, numpy.inf, -numpy.inf, 3e38, -3e38, 2**31, -(2**31), 2**63, -1]
    for value in values:
        flat = arrays['offset'].reshape(-1)
        flat[random.randint(flat.size, size=3)] = value
    for name in 'mask', 'x':
        flat = arrays[name].reshape(-1)
        flat[random.randint(flat.size, size=2)] = values[seed % 3]
    check_first_order(case, arrays, gy)
    # Times an infinite mask, the oracle's sum over the channels is that of
    # infinities of both signs.
    arrays['mask'][numpy.isinf(arrays['mask'])] = 1
    check_second_order(case, arrays, gy, same=infinity_as_nan)


@both_borders
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('seed', range(3))
def test_hostile_values_of_sums(seed, dtype, border, deterministic):
    case = SumCase(groups=2, points=5, border=border)
    arrays, gy = case.arrays(dtype), case.gy(dtype)
    random = numpy.random.RandomState(seed)
    flat = arrays['locations'].reshape(-1)
    for value in (
        numpy.nan, numpy.inf, -numpy.inf, 3e38, -3e38, 2**31, -(2**31), 2**63, -1
    ):  # fmt: skip
        flat[random.randint(flat.size, size=2)] = value
    check(case, arrays, gy)
    value = [numpy.nan, numpy.inf, -numpy.inf][seed]
    for name in 'x', 'weights':
        flat = arrays[name].reshape(-1)
        flat[random.randint(flat.size, size=2)] = value
        check_first_order(case, arrays, gy, same=infinity_as_nan)


@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf])
@pytest.mark.parametrize('axis', ['y', 'x'])
@pytest.mark.parametrize('bits', [25, 29])
def test_infinite_offset_along_one_axis_of_a_huge_grid(bits, axis, value):
    """The grid and the size of a small image add up to no number of float32."""
    pad, stride = 2**bits, 2 ** (bits + 1)
    case = Case(n=1, c=1, out_c=1, ksize=(1, 1), bias=False)
    along = {'size': (1, 3), 'pad': (pad, 0), 'stride': (stride, 1)}
    if axis == 'x':
        along = {name: pair[::-1] for name, pair in along.items()}
    for name, pair in along.items():
        setattr(case, name, pair)
    arrays, gy = case.arrays('float32'), case.gy('float32')
    arrays['offset'][...] = 0
    arrays['offset'][:, 'xy'.index(axis)] = value
    y, gradients = run(case, arrays, gy)
    assert y.size == 6
    assert not y.any()
    for gradient in gradients.values():
        assert not gradient.any()
    # The finite offset that leads into the image still does.
    arrays['offset'][0, 'xy'.index(axis)] = (
        [[pad], [-pad]] if axis == 'y' else [[pad, -pad]]
    )
    y, _ = run(case, arrays, gy)
    numpy.testing.assert_array_equal(
        y if axis == 'y' else y.swapaxes(2, 3),
        arrays['W'] * arrays['x'].reshape(1, 1, 1, 3).repeat(2, 2),
    )


@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
def test_point_outside_passes_nothing(value):
    """Neither times an infinite mask, nor times an infinite gradient."""
    case = CASES['mask']
    arrays, gy = case.arrays(), case.gy()
    arrays['offset'][0, :, 1, 1] = numpy.inf
    at = 0, slice(None), 1, 1
    gg = tangents(arrays)
    wanted = 'x', 'offset', 'mask'
    _, expected = run(case, arrays, gy)
    expected_second = run_second_order(case, arrays, gy, gg)
    assert all(numpy.isfinite(array).all() for array in expected_second.values())

    spoilt_gy = gy.copy()
    spoilt_gy[at] = value
    spoilt = {**arrays, 'mask': arrays['mask'].copy()}
    spoilt['mask'][at] = value
    for some_arrays, some_gy in (arrays, spoilt_gy), (spoilt, gy), (spoilt, spoilt_gy):
        _, gradients = run(case, some_arrays, some_gy, wanted)
        second = run_second_order(case, some_arrays, some_gy, gg, wanted)
        for name in wanted:
            numpy.testing.assert_array_equal(gradients[name], expected[name], name)
            numpy.testing.assert_array_equal(second[name], expected_second[name], name)
        for array in gradients['offset'], gradients['mask']:
            assert not array[at].any()
        for array in second['offset'], second['mask']:
            assert not array[at].any()

    for name in 'offset', 'mask':
        gg[name][at] = value
    second = run_second_order(case, arrays, gy, gg)
    for name, gradient in second.items():
        numpy.testing.assert_array_equal(gradient, expected_second[name], name)


@both_borders
@pytest.mark.parametrize('place', [(numpy.inf, 1.5), (1.5, -(2.0**63)), (-1.5, 2.5)])
@pytest.mark.parametrize('value', [numpy.inf, numpy.nan])
def test_given_point_outside_passes_nothing(value, place, border, deterministic):
    case = SumCase(groups=2, border=border)
    arrays, gy = case.arrays(), case.gy()
    at = 5, 1, 2
    arrays['locations'][at] = place
    gg = tangents(arrays)
    _, expected = run(case, arrays, gy)
    expected_second = run_second_order(case, arrays, gy, gg)

    spoilt = {**arrays, 'weights': arrays['weights'].copy()}
    spoilt['weights'][at] = value
    _, gradients = run(case, spoilt, gy)
    second = run_second_order(case, spoilt, gy, gg)
    for name, gradient in gradients.items():
        numpy.testing.assert_array_equal(gradient, expected[name], name)
        numpy.testing.assert_array_equal(second[name], expected_second[name], name)

    spoilt_gy = gy.copy()
    spoilt_gy[5, 3:] = value
    _, gradients = run(case, arrays, spoilt_gy)
    second = run_second_order(case, arrays, spoilt_gy, gg)
    for found in gradients, second:
        assert not found['locations'][at].any()
        assert not found['weights'][at].any()

    for name in 'locations', 'weights':
        gg[name][at] = value
    second = run_second_order(case, arrays, gy, gg)
    for name, gradient in second.items():
        numpy.testing.assert_array_equal(gradient, expected_second[name], name)


@pytest.mark.parametrize('lanes', [1, 2])
def test_infinite_gradient_at_the_corner_of_the_image(lanes, monkeypatch):
    """Of the point's pixels one is in the image; the others are no infinite zeros."""
    monkeypatch.setattr(cuda, 'MOST_LANES', lanes)
    case = Case(n=1, c=16, out_c=1, size=(1, 1), ksize=(1, 1), mask=True, bias=False)
    arrays, gy = case.arrays('float32'), case.gy('float32')
    for name, value in ('x', 2), ('offset', 0.25), ('W', 1), ('mask', 1):
        arrays[name][...] = value
    gy[...] = numpy.inf
    _, gradients = run(case, arrays, gy)
    assert numpy.isposinf(gradients['mask']).all()
    assert numpy.isneginf(gradients['offset']).all()


@pytest.mark.parametrize('side', [-0.5, 3.5])
def test_clipped_coordinate_passes_nothing(side):
    """Not even times an infinite weight; the other coordinate does."""
    case = SumCase(n=1, size=(4, 5), q=1, points=1, border='clamp')
    arrays, gy = case.arrays(), case.gy()
    arrays['locations'][...] = side, 1.5
    arrays['weights'][...] = numpy.inf
    gg = tangents(arrays)
    for gradients in run(case, arrays, gy)[1], run_second_order(case, arrays, gy, gg):
        assert not gradients['locations'][..., 0].any()
        assert not numpy.isfinite(gradients['locations'][..., 1]).any()


@both_borders
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('other', [0.5, 100.0, numpy.inf])
def test_nan_location_spoils_its_own_sum_only(axis, other, border, deterministic):
    case = SumCase(groups=2, border=border)
    arrays, gy = case.arrays(), case.gy()
    clean_y, clean = run(case, arrays, gy)
    at = 5, 1, 2
    arrays['locations'][at] = other
    arrays['locations'][(*at, axis)] = numpy.nan
    y, gradients = run(case, arrays, gy)
    spoilt = numpy.zeros(y.shape, bool)
    spoilt[5, 3:] = True
    numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
    numpy.testing.assert_array_equal(y[~spoilt], clean_y[~spoilt])
    assert numpy.isfinite(gradients['x']).all()
    for name in 'locations', 'weights':
        spoilt = numpy.zeros(arrays[name].shape, bool)
        spoilt[at] = True
        numpy.testing.assert_array_equal(numpy.isnan(gradients[name]), spoilt)
        assert_close(gradients[name][~spoilt], clean[name][~spoilt], name)


class Memory:
    """Counts the bytes of arrays while they live."""

    def __init__(self, monkeypatch):
        self.bytes = self.peak = 0
        names = {name: self.counted(getattr(emulator.cupy, name)) for name in MAKERS}
        emulator.emulate(monkeypatch, **names)

    def counted(self, make):
        def counted_make(*args):
            array = make(*args)
            self.bytes += array.nbytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(array, self.free, array.nbytes)
            return array

        return counted_make

    def free(self, count):
        self.bytes -= count

    def peak_of(self, function):
        self.peak = self.bytes
        start = self.bytes
        function()
        return self.peak - start


MAKERS = 'empty', 'zeros'


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('wanted', [None, ('W',), ('x',)])
@pytest.mark.parametrize('few_positions', [0, 512])
@pytest.mark.parametrize(
    'case',
    [
        Case(n=9, c=12, size=(6, 5), groups=2, offset_groups=3, mask=True),
        Case(n=9, c=12, out_c=12, size=(6, 5), groups=12),
    ],
    ids=['groups', 'depthwise'],
)
def test_one_piece_at_a_time(case, few_positions, wanted, dtype, monkeypatch):
    """The columns of a piece are gone before those of the next are made."""
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    memory = Memory(monkeypatch)
    arrays, gy = case.arrays(dtype), case.gy(dtype)
    driver, args, _ = options_of(case)
    calls = {
        'forward': lambda: driver.forward(cuda, *args, **arrays),
        'backward': lambda: run_backward(case, arrays, gy, wanted),
    }
    for moving in ('x',), ('W',), ('x', 'W', 'offset'):
        gg = tangents(arrays, moving)
        calls[moving] = lambda gg=gg: run_second_order(case, arrays, gy, gg, wanted)
    for name, call in calls.items():
        monkeypatch.setattr(cuda, 'COLUMN_BYTES', 1)
        without = memory.peak_of(call)
        monkeypatch.setattr(cuda, 'COLUMN_BYTES', 12_000)
        peak = memory.peak_of(call) - without
        # The products that are in a wide dtype yet take a fifth at most.
        assert peak <= 1.2 * 12_000, name
        if wanted is None or name == 'forward':
            assert peak > 1_200, name


@numpy.errstate(all='ignore')
def run_backward(case, arrays, gy, wanted):
    driver, args, kwargs = options_of(case)
    wanted = arrays if wanted is None else wanted
    return driver.backward(cuda, *args, wanted, gy, **arrays, **kwargs)


class Host:
    """Counts what the host does, while kernels and products do nothing."""

    def __init__(self, monkeypatch):
        self.launches, self.allocations, self.calls = [], 0, 0

        class Kernel:
            def __init__(self, inputs, outputs, operation, name, preamble=''):
                self.name = name.replace('chainer_deform_', '')

            def __call__(kernel, *args, size):  # noqa: N805
                self.launches.append(kernel.name)

        def product(*args):
            self.launches.append('product')

        names = {name: self.counted(getattr(numpy, name)) for name in MAKERS}
        emulator.emulate(monkeypatch, ElementwiseKernel=Kernel, **names)
        monkeypatch.setattr(cuda.cupy.cuda.cublas, 'gemmStridedBatchedEx', product)

    def counted(self, make):
        def counted_make(*args):
            self.allocations += 1
            return make(*args)

        return counted_make

    def profile(self, frame, event, arg):
        package = str(pathlib.Path(cuda.__file__).parents[1])
        self.calls += event == 'call' and frame.f_code.co_filename.startswith(package)

    def of(self, function):
        """Launches by name, allocations and calls of our functions, once warm."""
        function()
        self.__dict__.update(launches=[], allocations=0, calls=0)
        sys.setprofile(self.profile)
        try:
            function()
        finally:
            sys.setprofile(None)
        print(self.launches, self.allocations, self.calls)
        return self.launches, self.allocations, self.calls


def test_work_of_the_host(deterministic, monkeypatch):
    """Of a layer of 2 x 256 x 56 x 56, of a depthwise one, and of a sum."""
    host = Host(monkeypatch)
    size = {'n': 2, 'size': (56, 56), 'ksize': (3, 3), 'pad': (1, 1), 'bias': False}
    gather = ['sort_key', 'start', 'gather'] if deterministic else []
    more, calls_more = (3, 40) if deterministic else (0, 0)
    for case, forward, backward, allocations, calls in (
        (
            Case(c=256, out_c=256, **size),
            ['swap', 'sample', 'product'],
            ['swap', 'product', *gather, 'differentiate', 'product', 'swap'],
            (3, 7 + more),
            (95, 140 + calls_more),
        ),
        (
            Case(c=64, out_c=64, groups=64, **size),
            ['swap', 'sample', 'depthwise', 'swap'],
            [
                *('swap', 'swap', 'depthwise_gcolumns', *gather),
                *('differentiate', 'swap', 'depthwise_gfilters', 'swap'),
            ],
            (4, 9 + more),
            (98, 143 + calls_more),
        ),
        (
            SumCase(c=256, size=(56, 56), q=300, groups=8, points=4),
            ['swap', 'sample_sum'],
            ['swap', *gather, 'differentiate', 'swap'],
            (3, 5 + more),
            (69, 92 + calls_more),
        ),
    ):
        arrays, gy = case.arrays('float32'), case.gy('float32')
        driver, args, kwargs = options_of(case)
        names, made, called = host.of(
            lambda: driver.forward(cuda, *args, **arrays, **kwargs)  # noqa: B023
        )
        assert (names, made) == (forward, allocations[0])
        assert called <= calls[0]
        names, made, called = host.of(
            lambda: driver.backward(cuda, *args, {*arrays}, gy, **arrays, **kwargs)  # noqa: B023
        )
        assert (names, made) == (backward, allocations[1])
        assert called <= calls[1]


def test_pieces_keep_indices_below_two_to_the_31(monkeypatch):
    """Though memory may allow for more; columns, points and outputs count."""
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', 1 << 60)
    for dtype in 'float16', 'float32', 'float64':
        dtypes = cuda.dtypes(numpy.empty(0, dtype), numpy.empty(0, dtype))
        for numbers, points in (2304, 9), (5, 700), (1, 1):
            count = cuda.tile_positions(numbers, points, dtypes, 1, 1)
            assert count * max(numbers, points) < 2**31
            assert (count + 1) * max(numbers, points) >= 2**31
    assert cuda.tile_positions(2**32, 1, dtypes, 1, 1) == 1


def test_too_many_positions():
    """The offset takes no memory: one number stands for all."""
    size = 2**16, 2**15
    offset = numpy.broadcast_to(0.0, (1, 2, *size))
    tile = slice(0, 1), slice(0, 10)
    points = Grid(Case(ksize=(1, 1)).geometry, size, tile, 0)
    dtypes = cuda.dtypes(offset, offset)
    with pytest.raises(ValueError, match='2147483648 output positions; a GPU takes'):
        cuda.Sampler(points, (1, 2, 2), dtypes, (offset, None))


@pytest.mark.parametrize('size', [(2, 2**31, 1), (2, 1, 2**31)])
def test_too_large_images(size):
    weights = numpy.zeros((1, 1, 1))
    points = Given(weights.shape, slice(0, 1), numpy.zeros(1, 'l'), 0, 'zero')
    dtypes = cuda.dtypes(weights, weights)
    with pytest.raises(ValueError, match='2147483648 images, rows or columns'):
        cuda.Sampler(points, size, dtypes, (numpy.zeros((1, 1, 1, 2)), weights))


@pytest.mark.parametrize(
    'case', [CASES['all'], SUM_CASES['groups, zero']], ids=['convolution', 'sum']
)
def test_memory_order_does_not_matter(case):
    y, gradients = run(case, case.arrays(), case.gy())
    gg = tangents(case.arrays())
    second_order = run_second_order(case, case.arrays(), case.gy(), gg)
    for change in (numpy.asfortranarray, lambda a: numpy.repeat(a, 2, -1)[..., ::2]):
        arrays = {name: change(array) for name, array in case.arrays().items()}
        for array in arrays.values():
            array.setflags(write=False)
        other_y, other = run(case, arrays, change(case.gy()))
        assert_close(other_y, y, 'y')
        for name, gradient in gradients.items():
            assert_close(other[name], gradient, name)
        other_gg = {name: change(array) for name, array in gg.items()}
        other = run_second_order(case, arrays, change(case.gy()), other_gg)
        for name, gradient in second_order.items():
            assert_close(other[name], gradient, name)


@pytest.mark.parametrize('dtypes', ['ff', 'ee', 'fe', 'ef', 'dd', 'df'])
@pytest.mark.parametrize('shape', [(2, 8, 16), (1, 24, 40), (3, 6, 9), (2, 7, 32)])
def test_swap(shape, dtypes):
    """Tiles of 1 to 8 elements along each axis, and more than a warp has."""
    source = numpy.arange(numpy.prod(shape)).reshape(shape).astype(dtypes[0])
    target = numpy.full((shape[0], shape[2], shape[1]), -1, dtypes[1])
    cuda._swap(source, target)
    numpy.testing.assert_array_equal(target, source.swapaxes(1, 2))


def test_copy_of_an_unaligned_image():
    x = numpy.arange(1, 1 + 2 * 8 * 12, dtype='f').reshape(2, 8, 3, 4)
    unaligned = numpy.zeros(x.size + 1, 'f')[1:].reshape(x.shape)
    unaligned[...] = x
    for source in x, unaligned:
        for dtype in 'float16', 'float64':
            image = cuda.new_image(source, numpy.dtype(dtype))
            cuda.load_image(source, image, slice(0, 8))
            numpy.testing.assert_array_equal(image, x.reshape(2, 8, 12).swapaxes(1, 2))
            back = numpy.zeros_like(source)
            cuda.store_gradient(image, back, slice(0, 8))
            numpy.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    ('dtype', 'environment', 'tensor_core', 'expected'),
    [
        ('float32', False, 'auto', 68),
        ('float32', True, 'auto', 77),
        ('float32', True, 'never', 68),
        ('float16', True, 'auto', 68),
        ('float64', True, 'auto', 70),
    ],
)
def test_compute_type(dtype, environment, tensor_core, expected, monkeypatch):
    emulator.emulate(monkeypatch, tf32=environment)
    cublas, used = cuda.cupy.cuda.cublas, set()
    product = cublas.gemmStridedBatchedEx

    def record(*args):
        used.add(args[-2])
        product(*args)

    monkeypatch.setattr(cublas, 'gemmStridedBatchedEx', record)
    case = CASES['all']
    with chainer.using_config('use_cudnn_tensor_core', tensor_core):
        run(case, case.arrays(dtype), case.gy(dtype))
    assert used == {expected}


def test_emulator_notices_an_index_outside():
    kernel = emulator.ElementwiseKernel(
        'raw T x, int32 shift', 'raw T y', 'y[i] = x[i + shift];', 'shift'
    )
    x, y = numpy.arange(5.0), numpy.zeros(5)
    kernel(x, 0, y, size=5)
    numpy.testing.assert_array_equal(y, x)
    for shift, size in (1, 5), (-1, 5), (0, 6):
        with pytest.raises(IndexError, match='shift left the array'):
            kernel(x, shift, y, size=size)


def test_emulated_half_is_numpys():
    values = numpy.concatenate(
        [
            numpy.arange(65536, dtype=numpy.uint16).view('float16').astype('f'),
            numpy.random.RandomState(0).normal(size=1000).astype('f')
            * 10.0 ** numpy.arange(-10, 10).repeat(50).astype('f'),
            numpy.array([65519, 65520, 1e30], 'f'),
        ]
    )
    half = numpy.zeros(values.size, 'float16')
    kernel = emulator.ElementwiseKernel(
        'raw T x', 'raw U y', 'y[i] = U(x[i]);', 'convert'
    )
    kernel(values, half, size=values.size)
    back = numpy.zeros_like(values)
    kernel(half, back, size=values.size)
    with numpy.errstate(all='ignore'):
        expected = values.astype('float16')
        numpy.testing.assert_array_equal(half, expected)
        numpy.testing.assert_array_equal(back, expected.astype('f'))
