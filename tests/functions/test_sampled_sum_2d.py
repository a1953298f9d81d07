"""Sampled sums: outputs, gradients and their gradients."""

import itertools
import re
import tracemalloc

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer import gradient_check
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import sampled_sum_2d
from chainer_deform.sampling import cpu, weighted_sum
from tests import reference
from tests.cases import SUM_CASES, SumCase, assert_close, infinity_as_nan

every_case = pytest.mark.parametrize('case', SUM_CASES.values(), ids=SUM_CASES.keys())
both_borders = pytest.mark.parametrize('border', ['zero', 'clamp'])
NAMES = 'x', 'locations', 'weights'

#: MiB that a call may take beside arguments, results and copies of them.
MEMORY = 40


def run(arrays, options, gy=None, wanted=NAMES):
    """The output and, given ``gy``, the gradients by name."""
    variables = {
        name: chainer.Variable(array, requires_grad=name in wanted)
        for name, array in arrays.items()
    }
    y = sampled_sum_2d(**variables, **options)
    if gy is None:
        return y.array
    y.grad = gy
    y.backward()
    return y.array, {name: variables[name].grad for name in wanted}


def second_order(arrays, options, gy, gg, wanted=('gy', *NAMES)):
    """Gradients, by name, of the sum of ``gg`` times the first gradients."""
    variables = {
        name: chainer.Variable(array) for name, array in {'gy': gy, **arrays}.items()
    }
    y = sampled_sum_2d(**{name: variables[name] for name in arrays}, **options)
    gradients = chainer.grad(
        [y],
        [variables[name] for name in gg],
        [variables['gy']],
        enable_double_backprop=True,
    )
    found = chainer.grad(
        gradients,
        [variables[name] for name in wanted],
        [chainer.Variable(array) for array in gg.values()],
    )
    return {name: None if g is None else g.array for name, g in zip(wanted, found)}


def random_gg(arrays, seed=2):
    """What the gradients are multiplied by, one array for each argument."""
    random = numpy.random.RandomState(seed)
    return {
        name: random.uniform(-0.25, 0.25, array.shape).astype(array.dtype)
        for name, array in arrays.items()
    }


def check_first_order(arrays, options, gy, dtype=None):
    y, gradients = run(arrays, options, gy)
    expected_y, expected = reference.sampled_sum_2d(**arrays, **options, gy=gy)
    assert y.dtype == arrays['x'].dtype
    assert_close(y, expected_y, 'y')
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_close(gradient, expected[name], name, dtype)
    return y, gradients


def check_second_order(arrays, options, gy, gg, dtype=None):
    found = second_order(arrays, options, gy, gg)
    expected = reference.sampled_sum_2d_second_order(**arrays, **options, gy=gy, gg=gg)
    for name, array in {'gy': gy, **arrays}.items():
        if found[name] is None:
            assert not expected[name].any(), name
            continue
        assert found[name].dtype == array.dtype, name
        assert_close(found[name], expected[name], name, dtype)
    return found


def lattice_case(border, dtype='float64'):
    """Points at all whole and half coordinates in and around an image, by arrays."""
    case = SumCase(n=1, c=2, size=(3, 4), q=13 * 15, points=1, border=border)
    arrays = case.arrays(dtype)
    places = itertools.product(numpy.arange(-2, 4.5, 0.5), numpy.arange(-2, 5.5, 0.5))
    arrays['locations'] = numpy.array(list(places), dtype).reshape(-1, 1, 1, 2)
    return case, arrays


class TestAgainstOracle:
    @every_case
    @pytest.mark.parametrize(
        ('dtype', 'location_dtype'),
        [
            ('float64', 'float64'),
            ('float32', 'float32'),
            ('float16', 'float16'),
            ('float16', 'float32'),
            ('float32', 'float64'),
            ('float64', 'float16'),
        ],
    )
    def test_output_and_gradients(self, case, dtype, location_dtype):
        """Each as exact as its dtype: float64 anywhere, and all is computed in it."""
        arrays = case.arrays(dtype, location_dtype)
        check_first_order(arrays, case.options, case.gy(dtype))

    @both_borders
    @pytest.mark.parametrize('name', NAMES)
    @pytest.mark.parametrize('dtype', ['float16', 'float64'])
    def test_one_argument_of_another_dtype(self, name, dtype, border):
        case = SumCase(groups=2, border=border)
        arrays = case.arrays('float32')
        arrays[name] = arrays[name].astype(dtype)
        check_first_order(arrays, case.options, case.gy(arrays['x'].dtype))

    @pytest.mark.parametrize('name', ['groups, zero', 'groups, clamp', 'indices, zero'])
    def test_finite_differences(self, name):
        case = SUM_CASES[name]
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

    @both_borders
    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    def test_points_on_lattice_lines_and_borders(self, dtype, border):
        case, arrays = lattice_case(border, dtype)
        check_first_order(arrays, case.options, case.gy(dtype))


class TestSecondOrder:
    @every_case
    @pytest.mark.parametrize(
        ('dtype', 'location_dtype'),
        [
            ('float64', 'float64'),
            ('float32', 'float32'),
            ('float16', 'float32'),
            ('float32', 'float64'),
        ],
    )
    def test_all_gradients_of_all_gradients(self, case, dtype, location_dtype):
        arrays, gy = case.arrays(dtype, location_dtype), case.gy(dtype)
        check_second_order(arrays, case.options, gy, random_gg(arrays))

    def test_a_wider_gradient_passed_in(self):
        """It makes the computation wider, too: these sums vanish in float32."""
        arrays = {
            'x': numpy.ones((1, 2, 1, 1), 'f'),
            'locations': numpy.zeros((1, 1, 2, 2), 'f'),
            'weights': numpy.ones((1, 1, 2), 'f'),
        }
        x, locations, weights = map(chainer.Variable, arrays.values())
        wide = chainer.Variable(numpy.array([1e9 + 1, -1e9]))
        gy = F.reshape(wide, (1, 2))
        y = sampled_sum_2d(x, locations, weights)
        (gweights,) = chainer.grad([y], [weights], [gy], enable_double_backprop=True)
        numpy.testing.assert_array_equal(gweights.array, [[[1, 1]]])

        narrow = chainer.Variable(numpy.ones((1, 2), 'f'))
        gweights, gx = chainer.grad(
            [y], [weights, x], [narrow], enable_double_backprop=True
        )
        ggweights = F.reshape(wide, (1, 1, 2))
        (ggy,) = chainer.grad([gweights], [narrow], [ggweights])
        numpy.testing.assert_array_equal(ggy.array, [[1, 1]])

    def test_a_wider_gradient_has_a_wider_gradient(self):
        case = SUM_CASES['groups, zero']
        arrays = case.arrays('float32')
        check_second_order(arrays, case.options, case.gy('float64'), random_gg(arrays))

    @both_borders
    @pytest.mark.parametrize('given', NAMES)
    def test_gradients_of_one_gradient(self, given, border):
        case = SUM_CASES[f'indices, {border}']
        arrays = case.arrays()
        gg = {given: random_gg(arrays)[given]}
        check_second_order(arrays, case.options, case.gy(), gg)

    @pytest.mark.parametrize(
        'wanted', [('gy',), ('x',), ('locations',), ('weights', 'x'), ('gy', 'weights')]
    )
    def test_only_the_gradients_asked_for(self, wanted):
        case = SUM_CASES['indices, zero']
        arrays, gy, gg = case.arrays(), case.gy(), random_gg(case.arrays())
        expected = second_order(arrays, case.options, gy, gg)
        found = second_order(arrays, case.options, gy, gg, wanted)
        for name in wanted:
            assert_close(found[name], expected[name], name)

    @both_borders
    def test_along_the_image_alone_it_is_not_read(self, border):
        """As in a gradient penalty: the sums are linear in the image."""
        case = SumCase(groups=2, border=border)
        arrays, gy = case.arrays(), case.gy()
        gg = {'x': random_gg(arrays)['x']}
        y, expected = run({**arrays, **gg}, case.options, gy)
        arrays['x'][...] = numpy.nan
        found = second_order(arrays, case.options, gy, gg)
        assert_close(found['gy'], y, 'gy')
        for name in 'locations', 'weights':
            assert_close(found[name], expected[name], name)
        assert found['x'] is None or not found['x'].any()

    @both_borders
    def test_points_on_lattice_lines_and_borders(self, border):
        case, arrays = lattice_case(border)
        check_second_order(arrays, case.options, case.gy(), random_gg(arrays))

    @pytest.mark.parametrize('name', ['groups, zero', 'groups, clamp', 'indices, zero'])
    def test_finite_differences(self, name):
        case = SUM_CASES[name]
        arrays = case.arrays()
        gradient_check.check_double_backward(
            lambda *args: sampled_sum_2d(*args, **case.options),
            tuple(arrays.values()),
            case.gy(),
            tuple(random_gg(arrays).values()),
            eps=1e-4,
            rtol=1e-4,
            atol=1e-4,
        )

    @pytest.mark.parametrize('type_check', [True, False])
    @pytest.mark.parametrize('shape', [(7, 6), (8, 5), (1, 6), (8,), (8, 6, 1)])
    def test_shape_of_the_gradient_passed_in(self, shape, type_check):
        """Which Chainer does not check."""
        case = SumCase()
        variables = list(map(chainer.Variable, case.arrays().values()))
        with chainer.using_config('type_check', type_check):
            y = sampled_sum_2d(*variables)
            gy = chainer.Variable(numpy.zeros(shape))
            match = (
                rf'(?s)gradient of y has the shape \(8, 6\).*{re.escape(str(shape))}'
            )
            with pytest.raises(InvalidType, match=match):
                chainer.grad([y], variables, [gy])

    @pytest.mark.parametrize('shape', [(1, 6, 5, 7), (2, 6, 5, 8), (2, 6, 1, 1)])
    def test_shape_of_the_second_gradient_passed_in(self, shape):
        x, locations, weights = map(chainer.Variable, SumCase().arrays().values())
        y = sampled_sum_2d(x, locations, weights)
        gy = chainer.Variable(numpy.ones_like(y.array))
        (gx,) = chainer.grad([y], [x], [gy], enable_double_backprop=True)
        with pytest.raises(InvalidType, match=r'gradient of the gradient of x'):
            chainer.grad([gx], [weights], [chainer.Variable(numpy.zeros(shape))])

    def test_no_third_order(self):
        x, locations, weights = map(chainer.Variable, SumCase().arrays().values())
        y = sampled_sum_2d(x, locations, weights)
        (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
        (gw,) = chainer.grad([F.sum(gx * gx)], [weights], enable_double_backprop=True)
        with pytest.raises(RuntimeError, match='^sampled_sum_2d is differentiable twi'):
            F.sum(gw * gw).backward()


class TestKnownAnswers:
    def image(self, dtype='float64'):
        return numpy.random.RandomState(0).uniform(-1, 1, (2, 3, 5, 7)).astype(dtype)

    @both_borders
    @pytest.mark.parametrize('size', [(9, 4), (5, 7), (2, 20)])
    def test_resized_image(self, size, border):
        x = self.image('float32')
        rows, columns = (
            numpy.linspace(0, old - 1, new) for old, new in zip((5, 7), size)
        )
        grid = numpy.stack(numpy.meshgrid(rows, columns, indexing='ij'), -1)
        # The last row and column may be rounded up, out of the image.
        grid = numpy.minimum(grid, (4, 6))
        locations = numpy.tile(grid.reshape(-1, 1, 1, 2), (2, 1, 1, 1))
        y = run(
            {
                'x': x,
                'locations': locations,
                'weights': numpy.ones((len(locations), 1, 1)),
            },
            {'border': border},
        )
        y = y.reshape(2, *size, 3).transpose(0, 3, 1, 2)
        assert_close(y, F.resize_images(x, size).array, 'y')

    def test_spatial_transformer(self):
        """Its grid is relative, x before y, and reaches over the image here."""
        x = self.image()
        grid = numpy.random.RandomState(1).uniform(-1.7, 1.7, (2, 2, 4, 6))
        expected = F.spatial_transformer_sampler(x, grid).array
        pixels = (grid + 1) / 2 * numpy.array([6, 4]).reshape(2, 1, 1)
        locations = pixels[:, ::-1].transpose(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        y = sampled_sum_2d(x, locations, numpy.ones((2 * 4 * 6, 1, 1))).array
        assert_close(y.reshape(2, 4, 6, 3).transpose(0, 3, 1, 2), expected, 'y')

    def test_average_pooling(self):
        """Points at pixels; the padding counts as 0."""
        x = self.image()
        expected = F.average_pooling_2d(x, (2, 3), stride=(2, 1), pad=1).array
        out_h, out_w = expected.shape[2:]
        oy, ox, i, j = numpy.mgrid[:out_h, :out_w, :2, :3]
        points = numpy.stack((oy * 2 + i - 1, ox + j - 1), -1).reshape(-1, 1, 6, 2)
        locations = numpy.tile(points, (2, 1, 1, 1)).astype(float)
        weights = numpy.full((len(locations), 1, 6), 1 / 6)
        y = sampled_sum_2d(x, locations, weights).array
        assert_close(y.reshape(2, out_h, out_w, 3).transpose(0, 3, 1, 2), expected, 'y')

    @both_borders
    def test_ramp_is_sampled_exactly(self, border):
        rows, columns = numpy.mgrid[:9, :11]
        x = (3.0 + 2 * rows - 5 * columns)[None, None]
        locations = numpy.random.RandomState(0).uniform(0, 8, (50, 1, 1, 2))
        arrays = {'x': x, 'locations': locations, 'weights': numpy.ones((50, 1, 1))}
        y, gradients = run(arrays, {'border': border}, numpy.ones((50, 1)))
        v, u = locations[:, 0, 0].T
        assert_close(y[:, 0], 3 + 2 * v - 5 * u, 'y')
        slopes = numpy.broadcast_to([2.0, -5.0], locations.shape)
        assert_close(gradients['locations'], slopes, 'locations')

    @pytest.mark.parametrize('place', [-1.5, -1, -0.25, 0, 2.5, 3, 3.25, 4, 4.5])
    @pytest.mark.parametrize('axis', [0, 1])
    def test_clamped_border(self, place, axis):
        """Along an axis of the pixels 1, 2, 4, 8."""
        x = numpy.array([1.0, 2, 4, 8]).reshape(
            (1, 1, 4, 1) if axis == 0 else (1, 1, 1, 4)
        )
        locations = numpy.zeros((1, 1, 1, 2))
        locations[..., axis] = place
        arrays = {
            'x': x,
            'locations': locations,
            'weights': numpy.full((1, 1, 1), 10.0),
        }
        y, gradients = run(arrays, {'border': 'clamp'}, numpy.ones((1, 1)))
        inside = -1 <= place <= 4
        expected = numpy.interp(place, range(4), [1, 2, 4, 8]) if inside else 0
        assert y == 10 * expected
        assert gradients['weights'] == expected
        slope = 10 * {0: 1, 2.5: 4}.get(place, 0)
        numpy.testing.assert_array_equal(
            gradients['locations'][0, 0, 0], numpy.eye(2)[axis] * slope
        )

    def test_order_of_positions(self):
        """Without indices image after image; in another order the same sums."""
        case = SumCase(n=3, q=12, groups=2)
        arrays = case.arrays()
        expected = run(arrays, {})
        order = numpy.random.RandomState(0).permutation(12)
        for name in 'locations', 'weights':
            arrays[name] = arrays[name][order]
        numpy.testing.assert_array_equal(
            run(arrays, {'indices': order // 4}), expected[order]
        )

    def test_half_precision_far_from_the_origin(self):
        """Of float16 images, read at points in float32."""
        x = numpy.zeros((1, 1, 2, 4000), 'float16')
        x[..., 1::2] = 1
        locations = numpy.array([0.5, 3000.25], 'float32').reshape(1, 1, 1, 2)
        y = sampled_sum_2d(x, locations, numpy.ones((1, 1, 1), 'float16'))
        assert y.dtype == 'float16'
        assert y.array == 0.25


class TestHostileValues:
    @both_borders
    @pytest.mark.parametrize('seed', range(4))
    @pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
    def test_locations(self, seed, dtype, border):
        """A point outside passes nothing; a NaN location spoils its own sum only."""
        case = SumCase(groups=2, points=5, border=border)
        arrays, gy = case.arrays('float32', dtype), case.gy('float32')
        flat = arrays['locations'].reshape(-1)
        random = numpy.random.RandomState(seed)
        largest = numpy.finfo(dtype).max
        for value in (
            numpy.nan, numpy.inf, -numpy.inf, largest, -largest, 2**15, 2**31, 2**63, -1
        ):  # fmt: skip
            with numpy.errstate(over='ignore'):
                flat[random.randint(flat.size, size=2)] = value
        worst = 'float16' if dtype == 'float16' else 'float32'
        check_first_order(arrays, case.options, gy, worst)
        check_second_order(arrays, case.options, gy, random_gg(arrays), worst)

    @both_borders
    @pytest.mark.parametrize('value', [numpy.nan, numpy.inf, -numpy.inf])
    @pytest.mark.parametrize('where', ['x', 'weights', 'gy'])
    @pytest.mark.parametrize('seed', range(2))
    def test_others(self, where, value, seed, border):
        case = SumCase(n=1, groups=2, points=5, border=border)
        arrays, gy = case.arrays(), case.gy()
        flat = {**arrays, 'gy': gy}[where].reshape(-1)
        random = numpy.random.RandomState(seed)
        flat[random.randint(flat.size, size=3)] = value
        y, gradients = run(arrays, case.options, gy)
        expected_y, expected = reference.sampled_sum_2d(**arrays, **case.options, gy=gy)
        assert_close(y, expected_y, 'y')
        for name, gradient in gradients.items():
            assert_close(
                infinity_as_nan(gradient), infinity_as_nan(expected[name]), name
            )
        second = second_order(arrays, case.options, gy, random_gg(arrays))
        expected = reference.sampled_sum_2d_second_order(
            **arrays, **case.options, gy=gy, gg=random_gg(arrays)
        )
        for name, gradient in second.items():
            assert_close(
                infinity_as_nan(gradient), infinity_as_nan(expected[name]), name
            )

    outside = pytest.mark.parametrize(
        ('v', 'u'),
        [
            (numpy.inf, 1.5),
            (1.5, numpy.inf),
            (-numpy.inf, 2),
            (1, -numpy.inf),
            (1e300, -1e300),
            (-1.5, 2.5),
            (1.5, 7.5),
            (2.0**31 + 1.5, 2.5),
            (1.5, 2.0**32 + 2.5),
            (1.5, -(2.0**63)),
        ],
    )

    @both_borders
    @outside
    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
    def test_point_outside_passes_nothing(self, v, u, value, border):
        """Neither times an infinite weight nor times an infinite gradient."""
        case = SumCase(groups=2, border=border)
        arrays, gy = case.arrays(), case.gy()
        at = 5, 1, 2
        arrays['locations'][at] = v, u
        y, gradients = run(arrays, case.options, gy)
        without = {**arrays, 'weights': arrays['weights'].copy()}
        without['weights'][at] = 0
        assert_close(y, run(without, case.options), 'y')

        gg = random_gg(arrays)
        second = second_order(arrays, case.options, gy, gg)
        for name, array in ('weights', arrays['weights']), ('gy', gy):
            spoilt_arrays = {**arrays, 'gy': gy, name: array.copy()}
            if name == 'weights':
                spoilt_arrays[name][at] = value
            else:
                spoilt_arrays[name][5, 3:] = value
            spoilt_gy = spoilt_arrays.pop('gy')
            _, spoilt = run(spoilt_arrays, case.options, spoilt_gy)
            assert not spoilt['locations'][at].any()
            assert spoilt['weights'][at] == 0
            spoilt_second = second_order(spoilt_arrays, case.options, spoilt_gy, gg)
            assert not spoilt_second['locations'][at].any()
            assert spoilt_second['weights'][at] == 0
            if name == 'weights':
                for argument in NAMES:
                    assert_close(spoilt[argument], gradients[argument], argument)
                    assert_close(spoilt_second[argument], second[argument], argument)

        for name in 'locations', 'weights':
            gg[name][at] = value
        for name, gradient in second_order(arrays, case.options, gy, gg).items():
            assert_close(gradient, second[name], name)

    @both_borders
    @pytest.mark.parametrize('axis', [0, 1])
    @pytest.mark.parametrize('other', [0.5, 100.0, numpy.inf])
    def test_nan_location_spoils_its_own_sum_only(self, axis, other, border):
        case = SumCase(groups=2, border=border)
        arrays, gy = case.arrays(), case.gy()
        clean_y, clean = run(arrays, case.options, gy)
        at = 5, 1, 2
        arrays['locations'][at] = other
        arrays['locations'][(*at, axis)] = numpy.nan
        y, gradients = run(arrays, case.options, gy)
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

    @both_borders
    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
    def test_untouched_pixel_never_reaches_the_output(self, value, border):
        """Neither beside the points nor where a corner outside would be read."""
        x = numpy.ones((1, 1, 4, 5))
        x[0, 0, :, 0] = x[0, 0, 0, :] = value
        places = [(1.5, 1.5), (2.5, 3.25), (-1.5, 2), (1.5, -1.5), (9, 0), (0, -9)]
        arrays = {
            'x': x,
            'locations': numpy.array(places).reshape(3, 1, 2, 2),
            'weights': numpy.ones((3, 1, 2)),
        }
        y, gradients = run(arrays, {'border': border}, numpy.ones((3, 1)))
        numpy.testing.assert_array_equal(y[:, 0], [2, 0, 0])
        for name, gradient in gradients.items():
            assert numpy.isfinite(gradient).all(), name

    def test_image_that_nobody_reads(self):
        case = SUM_CASES['indices, zero']
        arrays, gy = case.arrays(), case.gy()
        arrays['x'][[1, 3]] = numpy.nan
        y, gradients = run(arrays, case.options, gy)
        assert numpy.isfinite(y).all()
        assert not gradients['x'][[1, 3]].any()
        second = second_order(arrays, case.options, gy, random_gg(arrays))
        assert not second['x'][[1, 3]].any()
        assert all(numpy.isfinite(gradient).all() for gradient in second.values())


class TestArrays:
    @every_case
    def test_inputs_are_never_written_to(self, case):
        arrays, gy, gg = case.arrays(), case.gy(), random_gg(case.arrays())
        options = case.options
        given = {**arrays, 'gy': gy, **{f'gg{name}': a for name, a in gg.items()}}
        if options['indices'] is not None:
            given['indices'] = options['indices']
        copies = {name: array.copy() for name, array in given.items()}
        for array in given.values():
            array.setflags(write=False)
        run(arrays, options, gy)
        second_order(arrays, options, gy, gg)
        for name, array in given.items():
            numpy.testing.assert_array_equal(array, copies[name], name)

    @pytest.mark.parametrize(
        'name', ['groups, zero', 'indices, clamp', 'one row, zero']
    )
    def test_memory_order_does_not_matter(self, name):
        case = SUM_CASES[name]
        arrays, gy, gg = case.arrays(), case.gy(), random_gg(case.arrays())
        y, gradients = run(arrays, case.options, gy)
        second = second_order(arrays, case.options, gy, gg)

        def strided(array):
            return numpy.repeat(array, 2, axis=-1)[..., ::2]

        def backward(array):
            return array[::-1, ..., ::-1].copy()[::-1, ..., ::-1]

        for change in strided, backward, numpy.asfortranarray:
            changed = {name: change(array) for name, array in arrays.items()}
            options = case.options
            if options['indices'] is not None:
                options['indices'] = strided(options['indices'])
            other_y, other = run(changed, options, change(gy))
            assert_close(other_y, y, 'y')
            for name, gradient in gradients.items():
                assert_close(other[name], gradient, name)
            changed_gg = {name: change(array) for name, array in gg.items()}
            other = second_order(changed, options, change(gy), changed_gg)
            for name, gradient in second.items():
                assert_close(other[name], gradient, name)

    def test_arrays_and_variables(self):
        case = SUM_CASES['indices, zero']
        arrays, indices = case.arrays(), case.options['indices']
        expected = run(arrays, case.options)
        for wrapped in {'x'}, {'locations'}, {'weights', 'indices'}, set():
            arguments = {
                name: chainer.Variable(array) if name in wrapped else array
                for name, array in {**arrays, 'indices': indices}.items()
            }
            y = sampled_sum_2d(**arguments)
            assert isinstance(y, chainer.Variable)
            numpy.testing.assert_array_equal(y.array, expected)

    @pytest.mark.parametrize('dtype', ['int8', 'int32', 'uint8', 'uint64', '>i4'])
    def test_integers_of_any_kind(self, dtype):
        case = SUM_CASES['indices, zero']
        arrays = case.arrays()
        y = sampled_sum_2d(**arrays, indices=case.options['indices'].astype(dtype))
        numpy.testing.assert_array_equal(y.array, run(arrays, case.options))

    def test_indices_that_change_later(self):
        """They were checked before; the backward pass has those of the forward pass."""
        case = SUM_CASES['indices, zero']
        arrays, gy, options = case.arrays(), case.gy(), case.options
        _, expected = run(arrays, options, gy)
        x = chainer.Variable(arrays.pop('x'))
        y = sampled_sum_2d(x, **arrays, **options)
        options['indices'][...] = 10**9
        y.grad = gy
        y.backward()
        numpy.testing.assert_array_equal(x.grad, expected['x'])

    @pytest.mark.parametrize('wanted', [('x',), ('locations',), ('weights', 'x')])
    def test_only_the_gradients_asked_for(self, wanted):
        case = SUM_CASES['indices, zero']
        arrays, gy = case.arrays(), case.gy()
        _, expected = run(arrays, case.options, gy)
        _, gradients = run(arrays, case.options, gy, wanted)
        for name in wanted:
            assert_close(gradients[name], expected[name], name)

    @pytest.mark.parametrize('type_check', [True, False])
    def test_type_check_does_not_matter(self, type_check):
        case = SUM_CASES['indices, zero']
        with chainer.using_config('type_check', type_check):
            check_first_order(case.arrays(), case.options, case.gy())

    @pytest.mark.parametrize(('threads', 'border'), [('1', 'clamp'), ('3', 'zero')])
    @pytest.mark.parametrize(
        'case',
        [
            SumCase(n=3, c=64, size=(20, 30), q=6000, groups=2, points=9),
            SumCase(n=7, c=20, size=(200, 150), q=840, groups=2, points=50),
        ],
        ids=['positions', 'images'],
    )
    @pytest.mark.parametrize('order', ['None', 'sorted', 'shuffled'])
    def test_many_pieces(self, case, order, threads, border, monkeypatch):
        """More than are worked on at a time: each must be as it is alone."""
        monkeypatch.setenv('OMP_NUM_THREADS', threads)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        indices = numpy.arange(case.q) * case.n // case.q
        if order == 'shuffled':
            numpy.random.RandomState(3).shuffle(indices)
        options = {'indices': None if order == 'None' else indices, 'border': border}
        gg = random_gg(arrays)
        y, gradients = run(arrays, options, gy)
        second = second_order(arrays, options, gy, gg)
        for image in range(case.n):
            part = indices == image
            one, one_gg = (
                {
                    'x': a['x'][image : image + 1],
                    **{name: a[name][part] for name in NAMES[1:]},
                }
                for a in (arrays, gg)
            )
            one_y, one_gradients = run(one, {'border': border}, gy[part])
            assert_close(y[part], one_y, 'y')
            one_second = second_order(one, {'border': border}, gy[part], one_gg)
            for name in NAMES[1:]:
                assert_close(gradients[name][part], one_gradients[name], name)
                assert_close(second[name][part], one_second[name], name)
            assert_close(second['gy'][part], one_second['gy'], 'gy')
            assert_close(gradients['x'][image], one_gradients['x'][0], 'x')
            assert_close(second['x'][image], one_second['x'][0], 'x')

    @pytest.mark.parametrize('threads', ['1', '3'])
    def test_many_positions_of_an_image(self, threads, monkeypatch):
        """Their sum is that of a few at a time, whose points nobody shares."""
        monkeypatch.setenv('OMP_NUM_THREADS', threads)
        case = SumCase(n=1, c=64, size=(20, 30), q=6000, groups=2, points=9)
        arrays, gy = case.arrays(), case.gy()
        y, gradients = run(arrays, {}, gy)
        gx = numpy.zeros_like(arrays['x'])
        for start in range(0, 6000, 500):
            part = slice(start, start + 500)
            some = {**arrays, **{name: arrays[name][part] for name in NAMES[1:]}}
            some_y, some_gradients = run(some, {}, gy[part])
            assert_close(y[part], some_y, 'y')
            for name in NAMES[1:]:
                assert_close(gradients[name][part], some_gradients[name], name)
            gx += some_gradients['x']
        assert_close(gradients['x'], gx, 'x')

    def test_half_precision_sums(self):
        """Over many points, which share a pixel; they are summed in float32."""
        ones = {
            'x': numpy.ones((1, 1, 2, 2), 'float16'),
            'locations': numpy.zeros((1, 1, 30000, 2), 'float16'),
            'weights': numpy.full((1, 1, 30000), 0.25, 'float16'),
        }
        y, gradients = run(ones, {}, numpy.ones((1, 1), 'float16'))
        assert y == gradients['x'][0, 0, 0, 0] == 7500

    def test_numbers_too_large_pass_silently(self):
        case = SumCase(c=64, groups=2, points=30)
        arrays, gy = case.arrays('float16'), case.gy('float16')
        arrays['x'][...] = arrays['weights'][...] = gy[...] = 6e4
        arrays['locations'][0, 0, 0] = numpy.inf, numpy.nan
        with numpy.errstate(all='raise'):
            y, gradients = run(arrays, case.options, gy)
        assert numpy.isinf(y).any()
        assert numpy.isinf(gradients['x']).any()

    @pytest.mark.parametrize('threads', ['1', '3'])
    @pytest.mark.parametrize('name', ['indices', 'None'])
    def test_deterministic(self, name, threads, monkeypatch):
        """Many points share pixels, of all pieces."""
        monkeypatch.setenv('OMP_NUM_THREADS', threads)
        case = SumCase(n=2, c=16, size=(7, 5), q=20000, groups=2, points=4)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        indices = numpy.random.RandomState(3).randint(0, 2, 20000)
        options = {'indices': indices if name == 'indices' else None}
        first, *others = (run(arrays, options, gy) for _ in range(4))
        for other in others:
            numpy.testing.assert_array_equal(first[0], other[0])
            for name, gradient in first[1].items():
                numpy.testing.assert_array_equal(gradient, other[1][name], name)

    @pytest.mark.parametrize(
        ('case', 'shuffled'),
        [
            (SumCase(n=1, c=256, size=(50, 60), q=20_000, points=9), False),
            (SumCase(n=40, c=64, size=(50, 60), q=40 * 400, points=9), True),
            (SumCase(n=1, c=2, size=(50, 60), q=20, points=40_000), False),
            (SumCase(n=1, c=4, size=(50, 60), q=400_000, groups=4, points=1), False),
        ],
        ids=['channels', 'images', 'points', 'positions'],
    )
    @pytest.mark.parametrize('threads', ['1', '2'])
    def test_memory_is_bounded(self, case, shuffled, threads, monkeypatch):
        """Beyond inputs, outputs and gradients; all samples would take up to 184 MB."""
        monkeypatch.setenv('OMP_NUM_THREADS', threads)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        indices = numpy.arange(case.q) % case.n if shuffled else None
        variables = {name: chainer.Variable(array) for name, array in arrays.items()}
        image = arrays['x'][0].nbytes
        tracemalloc.start()
        try:
            y = sampled_sum_2d(**variables, indices=indices)
            kept, peak = tracemalloc.get_traced_memory()
            # For each position the image that it reads is kept.
            assert kept < y.array.nbytes + 8 * case.q + (1 << 20)
            assert peak < y.array.nbytes + 8 * case.q + 2 * image + (40 << 20)
            y.grad = gy
            tracemalloc.reset_peak()
            y.backward()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        results = y.array.nbytes + sum(v.grad.nbytes for v in variables.values())
        assert peak < results + 8 * case.q + 2 * image + (64 << 20)

    def test_large_images(self, peak_of):
        """Beside results two copies of one image, in the first and the second order."""
        case = SumCase(n=2, c=64, size=(20, 20), q=20)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        arrays['x'] = numpy.ones((2, 64, 500, 400), 'f')
        gg = {**random_gg(case.arrays('float32')), 'x': arrays['x']}
        rest = arrays['locations'], arrays['weights'], numpy.arange(20) // 10, 'zero'
        image, results = arrays['x'][0].nbytes, arrays['x'].nbytes
        room = 16 << 20

        def first():
            weighted_sum.backward(cpu, ['x'], gy, arrays['x'], *rest)

        def second():
            weighted_sum.double_backward(cpu, ['x'], gg, gy, arrays['x'], *rest)

        assert peak_of(first) < results + image + room
        assert peak_of(second) < results + 2 * image + room

    @pytest.mark.parametrize('threads', ['1', '16'])
    def test_points_of_many_groups_keep_to_their_budget(
        self, threads, peak_of, monkeypatch
    ):
        """For each point about 200 bytes are known, and here are 400,000."""
        monkeypatch.setenv('OMP_NUM_THREADS', threads)
        case = SumCase(n=1, c=64, size=(20, 20), q=1600, groups=64, points=4)
        arrays, gy = case.arrays('float32'), case.gy('float32')
        rest = numpy.zeros(1600, int), 'zero'

        def both():
            weighted_sum.forward(cpu, *arrays.values(), *rest)
            weighted_sum.backward(cpu, NAMES, gy, *arrays.values(), *rest)

        results = sum(array.nbytes for array in arrays.values())
        assert peak_of(both) < results + (MEMORY << 20)


class TestErrors:
    case = SumCase(n=2, c=6, q=8, groups=3, points=4)

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            ('x', (6, 5, 7), r'x\.shape == \(n, c, h, w\).*x\.shape == \(6, 5, 7\)'),
            ('x', (), r'x\.shape == \(n, c, h, w\).*x\.shape == \(\)'),
            ('x', (2, 6, 0, 7), r'c, h, w >= 1.*x\.shape == \(2, 6, 0, 7\)'),
            ('x', (2, 6, 5, 0), r'c, h, w >= 1.*x\.shape == \(2, 6, 5, 0\)'),
            ('x', (2, 0, 5, 7), r'c, h, w >= 1.*x\.shape == \(2, 0, 5, 7\)'),
            (
                'x',
                (2, 4, 5, 7),
                r'groups that divide the 4 channels of x\.shape == \(2, 4, 5, 7\)'
                r'.*locations\.shape == \(8, 3, 4, 2\)',
            ),
            (
                'x',
                (3, 6, 5, 7),
                r'q a multiple of n == 3 for x\.shape == \(3, 6, 5, 7\) and no indices'
                r'.*locations\.shape == \(8, 3, 4, 2\)',
            ),
            ('x', (0, 6, 5, 7), r'q a multiple of n == 0.*shape == \(8, 3, 4, 2\)'),
            (
                'locations',
                (8, 3, 4, 3),
                r'locations\.shape == \(q, groups, k, 2\).*shape == \(8, 3, 4, 3\)',
            ),
            ('locations', (8, 12, 2), r'\(q, groups, k, 2\).*shape == \(8, 12, 2\)'),
            ('locations', (8, 3, 4), r'\(q, groups, k, 2\).*shape == \(8, 3, 4\)'),
            ('locations', (8, 3, 0, 2), r'k >= 1.*shape == \(8, 3, 0, 2\)'),
            ('locations', (8, 0, 4, 2), r'groups that divide.*shape == \(8, 0, 4, 2\)'),
            ('locations', (8, 4, 4, 2), r'groups that divide.*shape == \(8, 4, 4, 2\)'),
            (
                'locations',
                (6, 3, 4, 2),
                r'weights\.shape == \(6, 3, 4\).*weights\.shape == \(8, 3, 4\)',
            ),
            ('weights', (8, 4, 3), r'shape == \(8, 3, 4\).*shape == \(8, 4, 3\)'),
            ('weights', (8, 3, 4, 1), r'shape == \(8, 3, 4\).*shape == \(8, 3, 4, 1\)'),
            ('weights', (1, 1, 1), r'shape == \(8, 3, 4\).*shape == \(1, 1, 1\)'),
            ('indices', (7,), r'indices\.shape == \(8,\).*indices\.shape == \(7,\)'),
            ('indices', (8, 1), r'indices\.shape == \(8,\).*shape == \(8, 1\)'),
            ('indices', (), r'indices\.shape == \(8,\).*shape == \(\)'),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arrays = self.case.arrays()
        arrays[name] = numpy.zeros(shape, int if name == 'indices' else float)
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            sampled_sum_2d(**arrays)

    @pytest.mark.parametrize('name', NAMES)
    @pytest.mark.parametrize('dtype', ['int64', 'bool', 'complex128', 'longdouble'])
    def test_dtype(self, name, dtype):
        arrays = self.case.arrays()
        arrays[name] = numpy.zeros(arrays[name].shape, dtype)
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == '):
            sampled_sum_2d(**arrays)

    @pytest.mark.parametrize('dtype', ['float32', 'bool', 'complex64', 'object'])
    @pytest.mark.parametrize('type_check', [True, False])
    def test_dtype_of_indices(self, dtype, type_check):
        indices = numpy.zeros(8, dtype)
        match = f'(?s)indices.dtype is an integer one.*indices.dtype == {dtype}'
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match=match),
        ):
            sampled_sum_2d(**self.case.arrays(), indices=indices)

    @pytest.mark.parametrize('type_check', [True, False])
    @pytest.mark.parametrize('value', [-1, 2, 2**31, -(2**63), 2**32])
    def test_indices_out_of_range(self, value, type_check):
        indices = numpy.array([0, 1, 1, 0, 1, 0, value, 0])
        low, high = min(value, 0), max(value, 1)
        match = f'^indices must be from 0 to 1, .* 2 images.* from {low} to {high}$'
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(ValueError, match=match),
        ):
            sampled_sum_2d(**self.case.arrays(), indices=indices)

    def test_no_image_to_read(self):
        arrays = {**self.case.arrays(), 'x': numpy.zeros((0, 6, 5, 7))}
        with pytest.raises(ValueError, match='^indices .* 0 images, but are from 0'):
            sampled_sum_2d(**arrays, indices=numpy.zeros(8, int))

    @pytest.mark.parametrize('border', ['reflect', None, 0, b'zero', ['zero']])
    def test_border(self, border):
        match = f"^border must be 'zero' or 'clamp', not {re.escape(repr(border))}$"
        with pytest.raises(ValueError, match=match):
            sampled_sum_2d(**self.case.arrays(), border=border)

    @pytest.mark.parametrize('name', [*NAMES, 'indices'])
    @pytest.mark.parametrize('value', [[1.0, 2.0], 3, 'a'])
    def test_no_array(self, name, value):
        arrays = {**self.case.arrays(), name: value}
        with pytest.raises(TypeError, match=f'^{name} must be a Variable or an array'):
            sampled_sum_2d(**arrays)

    @pytest.mark.parametrize('name', NAMES)
    def test_missing_array(self, name):
        arrays = {**self.case.arrays(), name: None}
        with pytest.raises(TypeError, match=f'^{name} must be a Variable or an array'):
            sampled_sum_2d(**arrays)

    @pytest.mark.parametrize('name', ['locations', 'weights', 'indices'])
    def test_device(self, name, monkeypatch):
        """A stand-in for a device, where there is none."""
        arrays = {**self.case.arrays(), 'indices': numpy.zeros(8, int)}
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
            sampled_sum_2d(**arrays)

    def test_border_is_no_positional_argument(self):
        with pytest.raises(TypeError, match='positional'):
            sampled_sum_2d(*self.case.arrays().values(), None, 'zero')
