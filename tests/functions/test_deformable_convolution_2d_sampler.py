import itertools
import threading
import time
import tracemalloc

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer import gradient_check
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.sampling import convolution, cpu
from tests import reference
from tests.cases import (
    CASES,
    OFFSETS_TO_OUTSIDE,
    WANTED,
    WIDE_CASES,
    Case,
    assert_close,
    infinity_as_nan,
)

#: MiB that a call may take beside arguments, results and copies of them.
MEMORY = 40

every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def run(arrays, options, gy=None, wanted=None):
    """The output and, given ``gy``, the gradients by name."""
    variables = {
        name: chainer.Variable(array, requires_grad=wanted is None or name in wanted)
        for name, array in arrays.items()
    }
    y = deformable_convolution_2d_sampler(**variables, **options)
    if gy is None:
        return y.array
    y.grad = gy
    y.backward()
    return y.array, {name: variable.grad for name, variable in variables.items()}


def check(case, arrays, gy, dtype=None):
    """Compares the output and all gradients with the oracle's."""
    y, gradients = run(arrays, case.options, gy)
    expected_y, expected = reference.deformable_convolution_2d_sampler(
        **arrays, **case.options, gy=gy
    )
    assert y.dtype == arrays['x'].dtype
    assert_close(y, expected_y, 'y')
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_close(gradient, expected[name], name, dtype)
    return y, gradients


class TestAgainstOracle:
    @every_case
    @pytest.mark.parametrize(
        ('dtype', 'offset_dtype'),
        [
            ('float64', 'float64'),
            ('float32', 'float32'),
            ('float16', 'float16'),
            ('float16', 'float32'),
            ('float32', 'float64'),
            ('float64', 'float16'),
        ],
    )
    def test_output_and_gradients(self, case, dtype, offset_dtype):
        # What is computed in float32 is no better for being stored in float64.
        worst = min(dtype, offset_dtype, key=lambda d: numpy.dtype(d).itemsize)
        check(case, case.arrays(dtype, offset_dtype), case.gy(dtype), worst)

    @pytest.mark.parametrize('case', WIDE_CASES.values(), ids=WIDE_CASES.keys())
    @pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
    def test_many_channels(self, case, dtype):
        """More than a vector has numbers, and no multiple of them."""
        check(case, case.arrays(dtype), case.gy(dtype))

    @pytest.mark.parametrize(
        'case',
        [
            Case(n=1, c=2, out_c=2, size=(3, 60), ksize=(1, 2)),
            Case(n=1, c=2, out_c=2, size=(60, 3), ksize=(2, 1)),
            # A few points with many pixels in between.
            Case(n=2, c=4, out_c=2, size=(40, 50), stride=(13, 17), offset_groups=2),
        ],
        ids=['wide', 'tall', 'sparse'],
    )
    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    def test_far_offsets(self, case, dtype):
        """They lead anywhere in the image, and just beyond its sides."""
        arrays = case.arrays(dtype)
        view = arrays['offset'].reshape(case.n, case.offset_groups, 2, -1)
        for axis, size in enumerate(reversed(case.size)):
            view[:, :, axis] += numpy.random.RandomState(axis).randint(
                -size, size, view[:, :, axis].shape
            )
        check(case, arrays, case.gy(dtype))

    def test_offsets_that_lead_back_from_the_padding(self):
        """From the only place of the grid, which is far outside the image."""
        case = Case(
            n=2, c=2, out_c=3, size=(4, 5), ksize=(1, 1), pad=(9, 8), stride=(30, 30)
        )
        arrays = case.arrays()
        arrays['offset'] += numpy.array([10, 11]).reshape(1, 2, 1, 1)
        y, gradients = check(case, arrays, case.gy())
        assert gradients['offset'].all()

    @pytest.mark.parametrize('name', ['plain', 'all', '1 x 1 image'])
    def test_finite_differences(self, name):
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        _, gradients = run(arrays, case.options, gy)
        expected = gradient_check.numerical_grad(
            lambda: (run(arrays, case.options),),
            tuple(arrays.values()),
            (gy,),
            eps=1e-4,
        )
        for (name, gradient), numerical in zip(gradients.items(), expected):
            numpy.testing.assert_allclose(
                gradient, numerical, rtol=0, atol=1e-9, err_msg=name
            )

    def test_points_on_lattice_lines(self):
        """Whole offsets, among them points at exactly -1 and at the image's sides."""
        case = CASES['mask']
        arrays, gy = case.arrays('float32'), case.gy('float32')
        arrays['offset'] = numpy.round(arrays['offset'] * 3)
        check(case, arrays, gy)


class TestKnownAnswers:
    @pytest.mark.parametrize('name', [name for name in CASES if name != 'empty batch'])
    def test_zero_offset_is_a_convolution(self, name):
        case = CASES[name]
        arrays = case.arrays()
        arrays['offset'][...] = 0
        arrays.pop('mask', None)
        expected = F.convolution_2d(
            arrays['x'],
            arrays['W'],
            arrays.get('b'),
            case.stride,
            case.pad,
            dilate=case.dilate,
            groups=case.groups,
        ).array
        assert_close(run(arrays, case.options), expected, 'y')

    def test_a_tile_of_many_positions(self):
        """No multiple of what a loop may do at a time."""
        case = Case(n=1, c=2, out_c=3, size=(43, 53), pad=(1, 0))
        arrays, gy = case.arrays(), case.gy()
        arrays['offset'][...] = 0
        y, gradients = run(arrays, case.options, gy)
        x, W, b = (chainer.Variable(arrays[name]) for name in ('x', 'W', 'b'))
        expected = F.convolution_2d(x, W, b, pad=case.pad)
        expected.grad = gy
        expected.backward()
        assert_close(y, expected.array, 'y')
        for name, variable in ('x', x), ('W', W), ('b', b):
            assert_close(gradients[name], variable.grad, name)

    @pytest.mark.parametrize(('shift_y', 'shift_x'), [(1, 0), (0, -2), (-3, 2)])
    def test_whole_offsets_shift_the_image(self, shift_y, shift_x):
        case = Case(size=(9, 8), pad=(1, 2))
        arrays = case.arrays()
        taps = case.ksize[0] * case.ksize[1]
        arrays['offset'][:, :taps] = shift_x
        arrays['offset'][:, taps:] = shift_y
        y = run(arrays, case.options)
        shifted = numpy.zeros((*arrays['x'].shape[:2], 9 + 12, 8 + 12))
        shifted[:, :, 6 - shift_y :, 6 - shift_x :][:, :, :9, :8] = arrays['x']
        expected = F.convolution_2d(
            shifted, arrays['W'], arrays['b'], pad=case.pad
        ).array
        assert_close(y, expected[:, :, 6 : 6 + y.shape[2], 6 : 6 + y.shape[3]], 'y')

    def test_ramp_is_sampled_exactly(self):
        case = Case(n=1, c=1, out_c=1, size=(11, 12), ksize=(1, 1), bias=False)
        v, u = numpy.mgrid[2:8, 2:9]
        arrays = {
            'x': 3 + 2 * numpy.mgrid[:11, :12][0] - 5 * numpy.mgrid[:11, :12][1] * 1.0,
            'offset': numpy.random.RandomState(0).uniform(-2, 2, (2, 11, 12)),
            'W': numpy.ones((1, 1, 1, 1)),
        }
        arrays['x'], arrays['offset'] = arrays['x'][None, None], arrays['offset'][None]
        y, gradients = run(arrays, case.options, numpy.ones((1, 1, 11, 12)))
        moved_u = u + arrays['offset'][0, 0, 2:8, 2:9]
        moved_v = v + arrays['offset'][0, 1, 2:8, 2:9]
        assert_close(y[0, 0, 2:8, 2:9], 3 + 2 * moved_v - 5 * moved_u, 'y')
        assert_close(gradients['offset'][0, 0, 2:8, 2:9], numpy.full((6, 7), -5.0), 'x')
        assert_close(gradients['offset'][0, 1, 2:8, 2:9], numpy.full((6, 7), 2.0), 'y')

    def test_size_of_the_documented_example(self):
        y = deformable_convolution_2d_sampler(
            numpy.zeros((2, 3, 4, 7), 'f'),
            numpy.zeros((2, 18, 2, 5), 'f'),
            numpy.zeros((4, 3, 3, 3), 'f'),
            numpy.zeros(4, 'f'),
        )
        assert y.shape == (2, 4, 2, 5)

    def test_same_as_chainers_own_function(self):
        """Its arguments by position, at the precision that Chainer's own has."""
        case = Case(size=(6, 9), stride=(2, 1), pad=(1, 2))
        arrays = case.arrays('float32')
        arguments = (*arrays.values(), case.stride, case.pad)
        y = deformable_convolution_2d_sampler(*arguments).array
        expected = F.deformable_convolution_2d_sampler(*arguments).array
        numpy.testing.assert_allclose(y, expected, atol=1e-4)

    @pytest.mark.parametrize('size', [(64, 48), (1024, 1024)])
    def test_half_precision_far_from_the_origin(self, size):
        """Half-precision coordinates would be whole numbers beyond 1024."""
        case = Case(n=1, c=2, out_c=2, size=size, ksize=(3, 3), pad=(1, 1))
        arrays = case.arrays('float16')
        arrays['offset'][...] = 0
        expected = F.convolution_2d(
            *(arrays[name].astype('float64') for name in ('x', 'W', 'b')), pad=1
        ).array
        error = numpy.abs(run(arrays, case.options) - expected).max()
        assert error < 0.01 * numpy.abs(expected).max()

    def test_float32_coordinates_lose_nothing_far_from_the_origin(self):
        """The offset, not the coordinate, is split into pixel and fraction."""
        x = numpy.zeros((1, 1, 1, 4096), 'f')
        x[..., -2:] = 1, 2
        offset = numpy.zeros((1, 2, 1, 4096), 'f')
        offset[0, 0, 0, -2] = 2.0**-20
        y = run({'x': x, 'offset': offset, 'W': numpy.ones((1, 1, 1, 1), 'f')}, {})
        assert y[0, 0, 0, -2] == 1 + 2.0**-20


class TestNotFinite:
    """NaN, infinity and huge numbers, on an image of 5 x 7 with a 3 x 2 kernel."""

    case = Case(n=2, c=2, out_c=3, pad=(1, 0), mask=True)

    def run(self, arrays):
        return check(self.case, arrays, self.case.gy())

    @pytest.mark.parametrize(
        'value',
        [
            numpy.inf,
            -numpy.inf,
            3e38,
            -3e38,
            1e300,
            -1e300,
            2.0**31,
            -(2.0**31),
            2.0**63,
            -(2.0**63),
            1e9,
            -1e9,
        ],
    )
    def test_infinite_or_huge_offset_is_outside(self, value):
        arrays = self.case.arrays()
        arrays['offset'][1, :, 2, 3] = value
        y, gradients = self.run(arrays)
        numpy.testing.assert_array_equal(y[1, :, 2, 3], arrays['b'])
        assert not gradients['offset'][1, :, 2, 3].any()
        assert not gradients['mask'][1, :, 2, 3].any()

    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 3e38, -3e38])
    @pytest.mark.parametrize('bits', [26, 29])
    @pytest.mark.parametrize('axis', ['x', 'y'])
    def test_infinite_offset_of_a_huge_grid(self, axis, bits, value):
        """Along one axis, where float32 does not have all whole numbers any more.

        An offset cut off at the grid's size would lead from one end of it to the image.
        """
        shape = {'x': (1, 2), 'y': (2, 1)}[axis]
        offset = numpy.zeros((1, 2, *shape), 'f')
        offset[:, 'xy'.index(axis)] = value
        variables = [
            chainer.Variable(array)
            for array in (
                numpy.ones((1, 1, *shape), 'f'), offset, numpy.ones((1, 1, 1, 1), 'f')
            )
        ]  # fmt: skip
        y = deformable_convolution_2d_sampler(
            *variables,
            stride=2 ** (bits + 1),
            pad=[2**bits * (size - 1) for size in shape],
        )
        assert y.shape[2:] == shape
        assert not y.array.any()
        y.grad = numpy.ones_like(y.array)
        y.backward()
        for variable in variables:
            assert not variable.grad.any()

    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 1e30, -1e30])
    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    @pytest.mark.parametrize('axis', ['x', 'y'])
    def test_infinite_offset_along_one_axis(self, axis, dtype, value):
        """From all places of a grid that reaches far over the image."""
        case = Case(n=1, c=2, out_c=3, size=(4, 3), pad=(9, 8), dilate=(2, 3))
        arrays = case.arrays(dtype)
        arrays['offset'][:, slice(0, 6) if axis == 'x' else slice(6, 12)] = value
        y, gradients = run(arrays, case.options, case.gy(dtype))
        bias = arrays['b'].reshape(1, -1, 1, 1)
        numpy.testing.assert_array_equal(y, numpy.broadcast_to(bias, y.shape))
        for name in 'x', 'offset', 'W':
            assert not gradients[name].any()

    @pytest.mark.parametrize(('v', 'u'), OFFSETS_TO_OUTSIDE)
    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
    def test_point_outside_passes_nothing(self, v, u, value):
        """Neither times an infinite mask nor times an infinite gradient."""
        case, (image, tap, row, col) = self.case, (1, 3, 2, 3)
        arrays, gy = case.arrays(), case.gy()
        arrays['offset'][image, tap, row, col] = u
        arrays['offset'][image, 6 + tap, row, col] = v
        _, clean = run(arrays, case.options, gy)
        mask, arrays['mask'] = arrays['mask'], arrays['mask'].copy()
        arrays['mask'][image, tap, row, col] = value
        _, gradients = run(arrays, case.options, gy)
        for name in 'x', 'offset', 'mask':
            assert_close(gradients[name], clean[name], name)

        arrays['mask'] = mask
        gy[image, 0, row, col] = value
        _, gradients = run(arrays, case.options, gy)
        assert not gradients['offset'][image, [tap, 6 + tap], row, col].any()
        assert gradients['mask'][image, tap, row, col] == 0
        _, expected = reference.deformable_convolution_2d_sampler(
            **arrays, **case.options, gy=gy
        )
        for name, gradient in gradients.items():
            assert_close(
                infinity_as_nan(gradient), infinity_as_nan(expected[name]), name
            )

    @pytest.mark.parametrize('dtype', ['float16', 'float32'])
    def test_largest_offsets_of_other_dtypes(self, dtype):
        arrays = self.case.arrays(dtype)
        for position, value in enumerate(
            (numpy.finfo(dtype).max, numpy.finfo(dtype).min, numpy.inf, -numpy.inf)
        ):
            arrays['offset'][0, :, 0, position] = value
        y = run(arrays, self.case.options)
        numpy.testing.assert_array_equal(
            y[0, :, 0, :4], numpy.repeat(arrays['b'][:, None], 4, axis=1)
        )

    @pytest.mark.parametrize('channel', [0, 7])  # a horizontal, a vertical one
    @pytest.mark.parametrize('other', [0.5, 100.0, numpy.inf])
    def test_nan_offset_spoils_its_own_pixel_only(self, channel, other):
        arrays = self.case.arrays()
        clean_y, _ = self.run(arrays)
        arrays['offset'][1, (channel + 6) % 12, 2, 3] = other
        arrays['offset'][1, channel, 2, 3] = numpy.nan
        y, gradients = self.run(arrays)
        spoilt = numpy.zeros(y.shape, bool)
        spoilt[1, :, 2, 3] = True
        numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
        numpy.testing.assert_array_equal(y[~spoilt], clean_y[~spoilt])
        assert numpy.isfinite(gradients['x']).all()
        assert numpy.isnan(gradients['offset']).sum() == 2

    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
    def test_untouched_pixel_never_reaches_the_output(self, value):
        """Neither beside the points nor where a masked-out corner would be read."""
        case = Case(n=1, c=1, out_c=1, size=(4, 5), ksize=(1, 1), pad=(0, 0))
        arrays = case.arrays()
        arrays['offset'][...] = 0.5
        arrays['offset'][0, :, 0, :] = -1.5  # outside, next to the pixels (0, *)
        arrays['offset'][0, :, 1:, 0] = 10
        arrays['x'][0, 0, :2, 0] = value  # touched by no point
        arrays['x'][0, 0, 0, :] = value
        y, gradients = run(arrays, case.options, case.gy())
        assert numpy.isfinite(y).all()
        for name in 'offset', 'W', 'x':
            assert numpy.isfinite(gradients[name]).all(), name

    def test_infinite_pixel_spreads_to_those_who_read_it(self):
        arrays = self.case.arrays()
        arrays['x'][0, 1, 2, 2] = numpy.inf
        y = run(arrays, self.case.options)
        expected = reference.deformable_convolution_2d_sampler(
            **arrays, **self.case.options
        )
        assert not numpy.isfinite(expected).all()
        numpy.testing.assert_array_equal(numpy.isfinite(y), numpy.isfinite(expected))
        assert numpy.isfinite(y[1]).all()

    def test_points_at_minus_one_pass_no_gradient(self):
        case = Case(n=1, c=1, out_c=1, size=(3, 4), ksize=(1, 1), bias=False)
        arrays = case.arrays()
        arrays['offset'][0, 0] = -1 - numpy.arange(4.0)  # u == -1
        arrays['offset'][0, 1] = 0.25
        y, gradients = run(arrays, case.options, case.gy())
        assert not y.any()
        assert not gradients['offset'].any()


class TestPrecision:
    """The dtype in which something is computed: these sums vanish in a narrower one."""

    @pytest.mark.parametrize('name', ['x', 'W', 'mask', 'b'])
    def test_wide_argument(self, name):
        """As exact as float64, though the output is float32."""
        shapes = {'x': (1, 2, 1, 1), 'W': (1, 2, 1, 1), 'mask': (1, 2, 1, 1), 'b': (1,)}
        arrays = {name: numpy.ones(shape, 'f') for name, shape in shapes.items()}
        arrays['offset'] = numpy.zeros((1, 4, 1, 1), 'f')
        if name == 'b':
            arrays['b'] = numpy.array([2.0**30 + 1])
            arrays['W'][...] = numpy.array([0, -(2**30)]).reshape(1, 2, 1, 1)
        else:
            arrays[name] = numpy.array([2.0**30 + 1, -(2.0**30)]).reshape(1, 2, 1, 1)
            arrays['b'][...] = 0
        y = run(arrays, {'offset_groups': 2})
        assert y.dtype == arrays['x'].dtype
        assert y == 1

    def test_wide_offset(self):
        arrays = {
            'x': numpy.array([-(2.0**30), 2**30], 'f').reshape(1, 1, 1, 2),
            'offset': numpy.array([0.5 + 2**-30, 0.0]).reshape(1, 2, 1, 1),
            'W': numpy.ones((1, 1, 1, 1), 'f'),
        }
        y, gradients = run(arrays, {'stride': 2}, numpy.ones((1, 1, 1, 1), 'f'))
        assert y == 2
        assert gradients['offset'][0, 0] == 2.0**31

    @pytest.mark.parametrize('name', ['W', 'mask', 'offset', 'x', 'b'])
    def test_gradient_of_a_wide_argument(self, name):
        """It is as exact, as all that it is made of is computed so."""
        case = Case(c=4, out_c=2, groups=2, offset_groups=2, mask=True)
        arrays = case.arrays('float32')
        arrays[name] = arrays[name].astype('float64')
        check(case, arrays, case.gy(arrays['x'].dtype))

    def test_wide_gradient_passed_in(self):
        arrays = {
            'x': numpy.ones((1, 1, 1, 2), 'f'),
            'offset': numpy.zeros((1, 2, 1, 2), 'f'),
            'W': numpy.ones((2, 1, 1, 1), 'f'),
            'b': numpy.ones(2, 'f'),
        }
        variables = {name: chainer.Variable(array) for name, array in arrays.items()}
        y = deformable_convolution_2d_sampler(**variables)
        # Both the sum over the outputs and that over the positions are small.
        numbers = numpy.array([2.0**30 + 1, -(2.0**30)])
        for gy, names in (
            (numbers.reshape(1, 2, 1, 1).repeat(2, 3), ('x',)),
            (numbers.reshape(1, 1, 1, 2).repeat(2, 1), ('W', 'b')),
        ):
            found = chainer.grad(
                [y], [variables[name] for name in names], [chainer.Variable(gy)]
            )
            for gradient in found:
                assert gradient.dtype == numpy.float32
                assert (gradient.array == 1).all()

    @pytest.mark.parametrize('tile_bytes', [16, None])
    def test_half_precision_sums(self, tile_bytes, loops, monkeypatch):
        """They are float32 within a tile and from tile to tile: of 4 positions here.

        All points read one pixel. A float16 of 8192 stays as it is when 4 are added.
        """
        if tile_bytes is not None:
            monkeypatch.setattr(loops, 'TILE_BYTES', tile_bytes)
        offset = numpy.zeros((1, 2, 40, 40), 'float16')
        offset[:, 0], offset[:, 1] = -numpy.mgrid[:40, :40][::-1]
        arrays = {
            'x': numpy.ones((1, 1, 40, 40), 'float16'),
            'offset': offset,
            'W': numpy.ones((1, 1, 1, 1), 'float16'),
            'b': numpy.zeros(1, 'float16'),
        }
        gy = numpy.ones((1, 1, 40, 40), 'float16')
        gy[..., 0, 0] = 8192
        _, gradients = run(arrays, {}, gy)
        for name in 'x', 'W', 'b':
            assert gradients[name].flat[0] == 8192 + 1600, name

    def test_sum_too_large_for_half_precision(self):
        """Of a gradient in float16, for a bias in float32."""
        arrays = Case(n=1, c=1, out_c=1, size=(300, 301), ksize=(1, 1)).arrays('e')
        arrays['b'] = arrays['b'].astype('f')
        _, gradients = run(arrays, {}, numpy.ones((1, 1, 300, 301), 'float16'))
        assert gradients['b'].dtype == numpy.float32
        assert gradients['b'] == 300 * 301

    def test_products_of_half_precision(self):
        """The sum of two terms that float16 cannot hold."""
        arrays = {
            'x': numpy.full((1, 2, 1, 1), 6e4, 'float16'),
            'offset': numpy.zeros((1, 2, 1, 1), 'float16'),
            'W': numpy.array([3, -2], 'float16').reshape(1, 2, 1, 1),
        }
        assert run(arrays, {}) == numpy.float16(6e4)


class TestThreads:
    """What several threads do together, each with work of its own."""

    case = Case(n=2, c=4, out_c=3, mask=True)

    @pytest.fixture(autouse=True)
    def two_threads(self, loops, monkeypatch):
        monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
        monkeypatch.setattr(loops, 'thread_count', lambda: 2)

    @pytest.fixture
    def in_both(self, loops, monkeypatch):
        """Has a function called at the end of each sampling, in two threads at once."""

        def in_both(function):
            sample, barrier = loops.sample, threading.Barrier(2)

            def sample_together(*args):
                sample(*args)
                barrier.wait(20)
                function(threading.current_thread() is threading.main_thread(), *args)

            monkeypatch.setattr(loops, 'sample', sample_together)

        return in_both

    def test_exception_reaches_the_caller(self, in_both, monkeypatch):
        """When the other thread has ended, too."""
        expected = run(self.case.arrays(), self.case.options)
        ended = []

        def fail_in_helper(in_main, *args):
            if not in_main:
                raise ArithmeticError('broken')
            time.sleep(0.05)
            ended.append(args)

        in_both(fail_in_helper)
        with pytest.raises(ArithmeticError, match='broken'):
            run(self.case.arrays(), self.case.options)
        assert len(ended) == 1
        monkeypatch.undo()
        assert_close(run(self.case.arrays(), self.case.options), expected, 'y')

    def test_results_are_complete(self, in_both):
        """A thread that is slower is waited for."""
        expected = run(self.case.arrays(), self.case.options)
        in_both(lambda in_main, *_: in_main or time.sleep(0.2))
        y = run(self.case.arrays(), self.case.options).copy()
        numpy.testing.assert_array_equal(y, expected)

    def test_numbers_too_large_pass_silently(self, in_both):
        """In the thread of the caller and in another."""
        silent = []

        def overflow(in_main, *_):
            silent.append(in_main)
            assert numpy.isnan(numpy.float32(3e38) * 10 - numpy.float32(numpy.inf) + 0)
            numpy.full(1, 1e5).astype('float16')

        in_both(overflow)
        arrays = self.case.arrays('float16')
        arrays['x'][...] = arrays['W'][...] = 6e4
        with numpy.errstate(all='raise'):
            y = run(arrays, self.case.options)
            with pytest.raises(FloatingPointError):
                numpy.full(1, 1e5).astype('float16')
        assert numpy.isinf(y).any()
        assert sorted(silent) == [False, True]

    @pytest.mark.parametrize(
        'case',
        [
            Case(n=1, c=64, out_c=2, size=(180, 180), ksize=(3, 3), pad=(1, 1)),
            Case(n=1, c=4, out_c=4, size=(1, 400_000), ksize=(1, 3)),
        ],
        ids=['columns', 'points'],
    )
    def test_memory_of_all_at_once(self, case, loops, peak_of, monkeypatch):
        """16 threads, each of which has sampled a tile, together keep to the budget."""
        if loops.__name__.endswith('scipy'):
            pytest.skip('SciPy has one thread')
        monkeypatch.setattr(loops, 'thread_count', lambda: 16)
        sample, barrier, calls = loops.sample, threading.Barrier(16), itertools.count()

        def sample_together(*args):
            sample(*args)
            if next(calls) < 16:
                barrier.wait(20)

        monkeypatch.setattr(loops, 'sample', sample_together)
        arrays = case.arrays('float32')
        known = arrays['x'].nbytes + case.gy('float32').nbytes
        peak = peak_of(lambda: convolution.forward(cpu, case.geometry, **arrays))
        assert peak < known + (MEMORY << 20)

    @pytest.mark.parametrize('options', [{}, {'groups': 2, 'offset_groups': 4}])
    @pytest.mark.parametrize('n', [8, 9])
    @pytest.mark.parametrize('batch', [2, 5, 9])
    def test_images_of_its_own(self, n, batch, options, loops, monkeypatch):
        """In batches, the last of which may have fewer images than others."""
        if loops.__name__.endswith('scipy'):
            pytest.skip('SciPy has one thread')
        case = Case(n=n, c=8, out_c=6, size=(6, 5), pad=(1, 0), mask=True, **options)
        arrays, gy = case.arrays(), case.gy()
        monkeypatch.setattr(cpu, 'BATCH_BYTES', batch * arrays['x'][0].nbytes)
        monkeypatch.setattr(loops, 'TILE_BYTES', 10_000)
        y, gradients = run(arrays, case.options, gy)
        monkeypatch.setattr(loops, 'thread_count', lambda: 1)
        expected_y, expected = run(arrays, case.options, gy)
        assert_close(y, expected_y, 'y')
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], name)

    def test_gradients_of_its_own(self, loops, monkeypatch):
        """Threads that have images of their own have a filter's gradient each."""
        if loops.__name__.endswith('scipy'):
            pytest.skip('SciPy has one thread')
        add_product, sums = loops.add_product, []

        def record(a, b, out):
            if out.shape == (1, 3, 24):
                sums.append(out)
            add_product(a, b, out)

        monkeypatch.setattr(loops, 'add_product', record)
        case = Case(n=8, c=4, out_c=3)
        run(case.arrays(), case.options, case.gy())
        assert len({out.ctypes.data for out in sums}) == 2

    def test_products_of_its_own(self, loops, monkeypatch):
        """Threads that share a tile add to different numbers."""
        if loops.__name__.endswith('scipy'):
            pytest.skip('SciPy has one thread')
        dot, products = loops.dot, {}

        def record(*args):
            products.setdefault(args[2], []).append(args[-1])
            dot(*args)

        monkeypatch.setattr(loops, 'dot', record)
        case = Case(n=1, c=32, mask=True)
        run(case.arrays(), case.options, case.gy())
        assert products.keys() == {0, 16}
        for first, second in itertools.product(products[0], products[16]):
            assert not numpy.shares_memory(first, second)

    def test_deterministic_with_many_channels(self, loops, monkeypatch):
        """Each thread has channels of its own, and sums of its own for the offsets."""
        if loops.__name__.endswith('scipy'):
            pytest.skip('SciPy has one thread')
        monkeypatch.setattr(loops, 'thread_count', lambda: 3)
        case = Case(n=1, c=48, out_c=3, size=(40, 30), pad=(1, 0), mask=True)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        first, *others = (run(arrays, case.options, gy) for _ in range(4))
        for other in others:
            for name, gradient in first[1].items():
                numpy.testing.assert_array_equal(gradient, other[1][name], name)
        monkeypatch.setattr(loops, 'thread_count', lambda: 1)
        y, gradients = run(arrays, case.options, gy)
        assert_close(first[0], y, 'y')
        for name, gradient in gradients.items():
            assert_close(first[1][name], gradient, name)


class TestArrays:
    def test_batch_does_not_matter(self):
        case = Case(n=37, mask=True, pad=(1, 1))
        arrays, gy = case.arrays('float32'), case.gy('float32')
        y, gradients = run(arrays, case.options, gy)
        per_image = 'x', 'offset', 'mask'
        summed = {name: 0 for name in ('W', 'b')}
        for i in range(37):
            one = {
                name: array[i : i + 1] if name in per_image else array
                for name, array in arrays.items()
            }
            one_y, one_gradients = run(one, case.options, gy[i : i + 1])
            assert_close(one_y[0], y[i], 'y')
            for name in per_image:
                assert_close(one_gradients[name][0], gradients[name][i], name)
            for name in summed:
                summed[name] = summed[name] + one_gradients[name]
        for name, gradient in summed.items():
            assert_close(gradient, gradients[name], name)

    @pytest.mark.parametrize('piece_bytes', [1, 5_000, 40_000])
    @every_case
    def test_piece_size_does_not_matter(self, case, piece_bytes, loops, monkeypatch):
        arrays, gy = case.arrays(), case.gy()
        y, gradients = run(arrays, case.options, gy)
        monkeypatch.setattr(cpu, 'BATCH_BYTES', piece_bytes)
        monkeypatch.setattr(loops, 'TILE_BYTES', piece_bytes // 4)
        pieced_y, pieced = run(arrays, case.options, gy)
        assert_close(pieced_y, y, 'y')
        for name, gradient in gradients.items():
            assert_close(pieced[name], gradient, name)

    @every_case
    def test_threads_do_not_matter(self, case, monkeypatch):
        arrays, gy = case.arrays(), case.gy()
        y, gradients = run(arrays, case.options, gy)
        monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
        monkeypatch.setenv('OMP_NUM_THREADS', '3')
        threads_y, threads = run(arrays, case.options, gy)
        assert_close(threads_y, y, 'y')
        for name, gradient in gradients.items():
            assert_close(threads[name], gradient, name)

    def test_numbers_too_large_pass_silently(self):
        case = Case(c=64)
        arrays, gy = case.arrays('float16'), case.gy('float16')
        arrays['x'][...] = arrays['W'][...] = gy[...] = 6e4
        gy[0, 0, 0, 0], gy[0, 0, 0, 1] = numpy.inf, -numpy.inf
        with numpy.errstate(all='raise'):
            y, gradients = run(arrays, case.options, gy)
        assert numpy.isinf(y).any()
        assert numpy.isnan(gradients['b'][0])

    @pytest.mark.parametrize('threads', [1, 2, 3])
    def test_deterministic(self, threads, loops, monkeypatch):
        """Whatever thread is done first: many points share pixels, of all pieces."""
        monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
        monkeypatch.setattr(loops, 'TILE_BYTES', 60_000)
        monkeypatch.setenv('OMP_NUM_THREADS', str(threads))
        case = Case(n=1, c=8, out_c=8, size=(21, 18), ksize=(3, 3), pad=(1, 1))
        arrays = case.arrays('float32')
        arrays['offset'] *= 5
        first, *others = (
            run(arrays, case.options, case.gy('float32')) for _ in range(5)
        )
        for other in others:
            numpy.testing.assert_array_equal(first[0], other[0])
            for name, gradient in first[1].items():
                numpy.testing.assert_array_equal(gradient, other[1][name], name)

    @every_case
    def test_inputs_are_never_written_to(self, case):
        arrays, gy = case.arrays(), case.gy()
        copies = {name: array.copy() for name, array in arrays.items()}
        for array in (*arrays.values(), gy):
            array.setflags(write=False)
        run(arrays, case.options, gy)
        for name, array in arrays.items():
            numpy.testing.assert_array_equal(array, copies[name], name)

    @pytest.mark.parametrize('name', ['plain', 'all', 'depthwise'])
    def test_memory_order_does_not_matter(self, name):
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        y, gradients = run(arrays, case.options, gy)
        strided = {
            name: numpy.repeat(array, 2, axis=-1)[..., ::2]
            for name, array in arrays.items()
        }
        fortran = {name: numpy.asfortranarray(array) for name, array in arrays.items()}
        for other, other_gy in (
            (strided, numpy.repeat(gy, 2, axis=-1)[..., ::2]),
            (fortran, numpy.asfortranarray(gy)),
        ):
            other_y, other_gradients = run(other, case.options, other_gy)
            assert_close(other_y, y, 'y')
            for name, gradient in other_gradients.items():
                assert_close(gradient, gradients[name], name)

    @pytest.mark.parametrize('name', ['plain', 'all', 'depthwise'])
    def test_gradient_without_memory_of_its_own(self, name):
        """As that of a sum is: one number, which all places share."""
        case = CASES[name]
        arrays, ones = case.arrays(), numpy.ones_like(case.gy())
        _, expected = run(arrays, case.options, ones)
        _, gradients = run(arrays, case.options, numpy.broadcast_to(1.0, ones.shape))
        for name, gradient in gradients.items():
            numpy.testing.assert_array_equal(gradient, expected[name], name)

    def test_arrays_and_variables(self):
        case = CASES['mask']
        arrays = case.arrays()
        y = deformable_convolution_2d_sampler(**arrays, **case.options)
        assert isinstance(y, chainer.Variable)
        numpy.testing.assert_array_equal(y.array, run(arrays, case.options))

    @pytest.mark.parametrize(
        'case',
        [
            Case(n=4, c=256, out_c=256, size=(56, 56), ksize=(3, 3), pad=(1, 1)),
            Case(n=1, c=64, out_c=2, size=(256, 256), ksize=(3, 3), pad=(1, 1)),
            # One row of outputs alone would have columns of 26 MB.
            Case(n=1, c=128, out_c=1, size=(7, 512), ksize=(5, 20)),
            Case(n=99, c=64, out_c=2, size=(40, 40), ksize=(2, 2), dilate=(38, 38)),
            Case(n=1, c=1, out_c=256, size=(200, 300), ksize=(1, 1), bias=False),
            Case(n=1, c=4, out_c=4, size=(1, 300_000), ksize=(1, 3)),
            Case(n=1, c=256, out_c=256, size=(14, 13), ksize=(3, 3), pad=(1, 1)),
        ],
        ids=[
            'channels',
            'image',
            'kernel',
            'few positions',
            'filters',
            'one row',
            'filter',
        ],
    )
    @pytest.mark.parametrize(('threads', 'far'), [(1, False), (2, True), (16, False)])
    def test_memory_is_bounded(self, case, threads, far, monkeypatch):
        """A copy of an image and a constant, wherever the points are."""
        monkeypatch.setenv('OMP_NUM_THREADS', str(threads))
        arrays, gy = case.arrays('float32'), case.gy('float32')
        if far:
            arrays['offset'] *= max(case.size)
        copies = arrays['x'][0].nbytes + 2 * arrays['W'].nbytes
        run(Case().arrays('float32'), {}, Case().gy('float32'))  # loads what is needed
        variables = {name: chainer.Variable(array) for name, array in arrays.items()}
        tracemalloc.start()
        try:
            y = deformable_convolution_2d_sampler(**variables, **case.options)
            kept, peak = tracemalloc.get_traced_memory()
            assert kept < y.array.nbytes + (1 << 20)
            assert peak < y.array.nbytes + copies + (MEMORY << 20)
            y.grad = gy
            tracemalloc.reset_peak()
            y.backward()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        results = y.array.nbytes + sum(v.grad.nbytes for v in variables.values())
        assert peak < results + copies + (MEMORY << 20)

    def test_large_images(self, peak_of):
        """Two copies at most, and one in the backward pass, however many there are."""
        case = Case(n=3, c=64, out_c=1, size=(20, 20), ksize=(1, 1), bias=False)
        arrays = case.arrays('float32')
        arrays['x'] = numpy.ones((3, 64, 500, 400), 'f')
        image = arrays['x'][0].nbytes
        results = []

        def forward():
            variables = map(chainer.Variable, arrays.values())
            y = deformable_convolution_2d_sampler(*variables, stride=(26, 21))
            results.append(y)

        assert peak_of(forward) < 2 * image + (16 << 20)
        (y,) = results
        y.grad = numpy.ones_like(y.array)
        assert peak_of(y.backward) < 3 * image + image + (16 << 20)

    @pytest.mark.parametrize(
        'case',
        [
            Case(n=1, c=64, out_c=1, size=(110, 100), ksize=(3, 3), bias=False),
            Case(n=1, c=1, out_c=576, size=(110, 100), ksize=(1, 1), bias=False),
        ],
        ids=['columns', 'outputs'],
    )
    def test_columns_keep_to_their_budget(self, case, loops, peak_of, monkeypatch):
        """All of them or of the outputs would take 24 MiB."""
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        monkeypatch.setattr(loops, 'TILE_BYTES', 1 << 20)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        run(arrays, case.options, gy)
        forward = peak_of(lambda: convolution.forward(cpu, case.geometry, **arrays))
        known = case.gy('float32').nbytes + arrays['x'].nbytes
        assert forward < known + (5 << 20)

        def backward():
            convolution.backward(cpu, case.geometry, list(arrays), gy, **arrays)

        results = sum(array.nbytes for array in arrays.values())
        assert peak_of(backward) < results + arrays['x'].nbytes + (6 << 20)

    def test_points_of_many_groups_keep_to_their_budget(self, peak_of):
        """For each point about 200 bytes are known, and here are 1.2 million."""
        case = Case(
            n=1, c=64, out_c=1, size=(46, 47), ksize=(3, 3), offset_groups=64,
            bias=False,
        )  # fmt: skip
        arrays, gy = case.arrays('float32'), case.gy('float32')

        def both():
            convolution.forward(cpu, case.geometry, **arrays)
            convolution.backward(cpu, case.geometry, ['x', 'offset'], gy, **arrays)

        results = arrays['x'].nbytes + arrays['offset'].nbytes
        assert peak_of(both) < results + arrays['x'].nbytes + (MEMORY << 20)

    @pytest.mark.parametrize(
        'case',
        [
            Case(n=64, c=256, out_c=256, size=(4, 3), ksize=(3, 3), pad=(1, 1)),
            Case(n=32, c=8, out_c=4, size=(80, 80), ksize=(3, 3), pad=(1, 1)),
        ],
        ids=['filters', 'points'],
    )
    def test_memory_of_many_threads_with_many_images(self, case, peak_of, monkeypatch):
        """16 filters with gradients would take 75 MiB, all points of 16 images 150."""
        monkeypatch.setenv('OMP_NUM_THREADS', '16')
        arrays, gy = case.arrays('float32'), case.gy('float32')

        def backward():
            convolution.backward(cpu, case.geometry, list(arrays), gy, **arrays)

        known = sum(array.nbytes for array in (*arrays.values(), arrays['W']))
        assert peak_of(backward) < known + (MEMORY << 20)

    @pytest.mark.parametrize('name', ['plain', 'all', 'depthwise', 'no bias'])
    def test_unclean_memory(self, name, unclean_memory):
        """What is not written must not be read."""
        case = CASES[name]
        unclean_memory()
        check(case, case.arrays('float32'), case.gy('float32'))

    def test_far_points_take_as_long(self, monkeypatch):
        """But for the cache: what is done for a tap does not depend on where it is."""
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        case = Case(n=1, c=64, out_c=1, size=(330, 340), ksize=(3, 3), pad=(1, 1))
        arrays, gy = case.arrays('float32'), case.gy('float32')
        seconds = {}
        for scale in 1, 170, 1, 170:
            moved = {**arrays, 'offset': scale * arrays['offset']}
            start = time.process_time()
            run(moved, case.options, gy)
            taken = time.process_time() - start
            seconds[scale] = min(taken, seconds.get(scale, taken))
        assert seconds[170] < 3 * seconds[1]


class TestGraph:
    @pytest.mark.parametrize('wanted', WANTED)
    def test_only_the_gradients_asked_for(self, wanted, loops, monkeypatch):
        case = CASES['all']
        arrays, gy = case.arrays(), case.gy()
        _, expected = run(arrays, case.options, gy)
        called = []

        def record(name):
            original = getattr(loops, name)
            monkeypatch.setattr(
                loops, name, lambda *args: called.append(name) or original(*args)
            )

        for name in 'sample', 'scatter', 'dot':
            record(name)
        gradients = convolution.backward(cpu, case.geometry, wanted, gy, **arrays)
        assert gradients.keys() == set(wanted)
        for name, gradient in gradients.items():
            numpy.testing.assert_array_equal(gradient, expected[name], name)
        needed = {'x': 'scatter', 'offset': 'dot', 'mask': 'dot', 'W': 'sample'}
        assert set(called) == {needed[name] for name in wanted if name in needed}


class TestErrors:
    case = Case(n=2, c=6, out_c=4, pad=(1, 0), groups=2, offset_groups=3, mask=True)

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            (
                'x',
                (2, 5, 5, 7),
                r'x\.shape == \(n, 6, h, w\).*x\.shape == \(2, 5, 5, 7\)',
            ),
            ('x', (6, 5, 7), r'x\.shape == \(n, 6, h, w\).*x\.shape == \(6, 5, 7\)'),
            ('x', (2, 6, 0, 7), r'h, w >= 1.*x\.shape == \(2, 6, 0, 7\)'),
            ('x', (2, 6, 5, 0), r'h, w >= 1.*x\.shape == \(2, 6, 5, 0\)'),
            (
                'x',
                (2, 6, 5, 1),
                r'x\.shape == \(2, 6, 5, 1\) and W\.shape == \(4, 3, 3, 2',
            ),
            ('x', (3, 6, 5, 7), r'offset\.shape == \(3, 36, 5, 6\).*\(2, 36, 5, 6\)'),
            (
                'offset',
                (2, 12, 5, 6),
                r'offset\.shape == \(2, 36, 5, 6\).*\(2, 12, 5, 6\)',
            ),
            (
                'offset',
                (2, 36, 6, 5),
                r'offset\.shape == \(2, 36, 5, 6\).*\(2, 36, 6, 5\)',
            ),
            ('offset', (36, 5, 6), r'offset\.shape == \(2, 36, 5, 6\).*\(36, 5, 6\)'),
            ('mask', (2, 6, 5, 6), r'mask\.shape == \(2, 18, 5, 6\).*\(2, 6, 5, 6\)'),
            ('mask', (2, 18, 5, 7), r'mask\.shape == \(2, 18, 5, 6\).*\(2, 18, 5, 7\)'),
            ('b', (3,), r'b\.shape == \(4,\).*b\.shape == \(3,\)'),
            ('b', (4, 1), r'b\.shape == \(4,\).*b\.shape == \(4, 1\)'),
            (
                'W',
                (4, 2, 3, 2),
                r'x\.shape == \(n, 4, h, w\).*W\.shape == \(4, 2, 3, 2\)',
            ),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arrays = self.case.arrays()
        arrays[name] = numpy.zeros(shape)
        options = self.case.options
        if name == 'W':
            options['offset_groups'] = 1
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            deformable_convolution_2d_sampler(**arrays, **options)

    @pytest.mark.parametrize('shape', [(4, 3, 3), (4, 3, 3, 3, 3), (4,)])
    def test_axes_of_W(self, shape):
        arrays = {**self.case.arrays(), 'W': numpy.zeros(shape)}
        with pytest.raises(ValueError, match=r'W must have 4 axes.*' + str(shape[0])):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    @pytest.mark.parametrize('name', ['x', 'offset', 'W', 'mask', 'b'])
    @pytest.mark.parametrize('dtype', ['int64', 'bool', 'complex128', 'longdouble'])
    def test_dtype(self, name, dtype):
        arrays = self.case.arrays()
        arrays[name] = numpy.zeros(arrays[name].shape, dtype)
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == '):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    @pytest.mark.parametrize('name', ['x', 'offset', 'W', 'mask', 'b'])
    @pytest.mark.parametrize('value', [[1.0, 2.0], 3.0, 'a'])
    def test_no_array(self, name, value):
        arrays = {**self.case.arrays(), name: value}
        with pytest.raises(TypeError, match=f'^{name} must be a Variable or an array'):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    @pytest.mark.parametrize('name', ['x', 'offset', 'W'])
    def test_missing_array(self, name):
        arrays = {**self.case.arrays(), name: None}
        with pytest.raises(TypeError, match=f'^{name} must be a Variable or an array'):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    def test_uninitialised_parameter(self):
        arrays = {**self.case.arrays(), 'W': chainer.Parameter(0)}
        with pytest.raises(TypeError, match='W .* not a Parameter that is not init'):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    @pytest.mark.parametrize('name', ['offset', 'W', 'mask', 'b'])
    def test_device(self, name, monkeypatch):
        """A stand-in for a device, where there is none."""
        arrays = self.case.arrays()
        get_device = chainer.backend.get_device_from_array
        monkeypatch.setattr(
            chainer.backend,
            'get_device_from_array',
            lambda array: 'a GPU' if array is arrays[name] else get_device(array),
        )
        with pytest.raises(
            ValueError,
            match=f'^{name} must be on the device of x, @numpy, but is on a GPU',
        ):
            deformable_convolution_2d_sampler(**arrays, **self.case.options)

    @pytest.mark.parametrize(
        ('option', 'value', 'error', 'message'),
        [
            ('stride', 0, ValueError, 'stride must be at least 1, not 0'),
            ('stride', (1, 0), ValueError, 'stride must be at least 1, not 0'),
            (
                'stride',
                1.5,
                TypeError,
                'stride must be an int or a pair of ints, not 1.5',
            ),
            ('stride', (1, 2, 3), TypeError, r'stride must be .* not \(1, 2, 3\)'),
            ('stride', '12', TypeError, 'stride must be .* not'),
            ('pad', -1, ValueError, 'pad must be at least 0, not -1'),
            ('pad', (0, None), TypeError, 'pad must be .* not None'),
            ('dilate', 0, ValueError, 'dilate must be at least 1, not 0'),
            ('dilate', (2, -1), ValueError, 'dilate must be at least 1, not -1'),
            *(
                (name, value, ValueError, f'{name} must be at most 2147483647, not')
                for name in ('stride', 'pad', 'dilate', 'groups', 'offset_groups')
                for value in (2**31, 2**63, 2**64)
            ),
            ('dilate', (1, 2**63), ValueError, 'dilate must be at most 2147483647'),
            ('groups', 0, ValueError, 'groups must be at least 1, not 0'),
            ('groups', (1, 1), TypeError, r'groups must be an int, not \(1, 1\)'),
            (
                'groups',
                3,
                ValueError,
                'groups must divide the number of output channels',
            ),
            ('offset_groups', 0, ValueError, 'offset_groups must be at least 1, not 0'),
            (
                'offset_groups',
                4,
                ValueError,
                'offset_groups must divide the number of input channels, but '
                'offset_groups is 4 and there are 6',
            ),
        ],
    )
    def test_option(self, option, value, error, message):
        options = {**self.case.options, option: value}
        with pytest.raises(error, match='^' + message):
            deformable_convolution_2d_sampler(**self.case.arrays(), **options)

    def test_largest_options(self):
        """No product of them overflows, and only the point in the middle is inside."""
        most = 2**31 - 1
        arrays = Case(n=1, c=1, out_c=1, ksize=(1, 1), bias=False).arrays()
        options = {'stride': most, 'pad': most, 'dilate': most}
        arrays['offset'] = numpy.zeros((1, 2, 3, 3))
        y, gradients = run(arrays, options, numpy.ones((1, 1, 3, 3)))
        expected = numpy.zeros((3, 3))
        expected[1, 1] = arrays['W'][0, 0, 0, 0] * arrays['x'][0, 0, 0, 0]
        numpy.testing.assert_array_equal(y[0, 0], expected)
        assert gradients['x'][0, 0, 0, 0] == arrays['W'][0, 0, 0, 0]
        assert gradients['x'].astype(bool).sum() == 1

    def test_largest_dilation(self):
        """Taps so far apart that the first and the last are at the padding's ends."""
        most = 2**31 - 1
        arrays = {
            'x': numpy.ones((1, 1, 1, 1)),
            'offset': numpy.zeros((1, 6, 1, 1)),
            'W': numpy.array([1.0, 2, 4]).reshape(1, 1, 1, 3),
        }
        y = run(arrays, {'pad': (0, most), 'dilate': (1, most)})
        assert y == 2

    @pytest.mark.parametrize('dtype', ['int64', 'complex128', 'bool'])
    def test_dtype_of_the_gradient_passed_in(self, dtype):
        """Which Chainer does not check."""
        x = chainer.Variable(self.case.arrays()['x'])
        y = deformable_convolution_2d_sampler(
            **{**self.case.arrays(), 'x': x}, **self.case.options
        )
        gy = chainer.Variable(numpy.ones(y.shape, dtype))
        with pytest.raises(InvalidType, match='gradient of y .*a float dtype'):
            chainer.grad([y], [x], [gy])

    def test_numpy_integers_are_ints(self):
        case = Case(stride=(2, 1))
        y = deformable_convolution_2d_sampler(
            **case.arrays(), stride=numpy.array([2, 1]), pad=numpy.int32(0)
        )
        assert y.shape[2:] == case.out_size

    def test_dilate_is_no_positional_argument(self):
        with pytest.raises(TypeError, match='positional'):
            deformable_convolution_2d_sampler(
                *self.case.arrays().values(), (1, 1), (1, 0), None
            )
