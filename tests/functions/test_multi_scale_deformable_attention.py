"""Multi-scale deformable attention: the published case, oracle, gradients, errors."""

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import multi_scale_deformable_attention
from tests.cases import assert_close
from tests.functions.operators import (
    check_case,
    check_finite_differences,
    check_first_order,
    check_second_order,
    every_dtype,
    run,
)

#: Shapes of the levels, then n, q, heads, points, d.
CASES = {
    'plain': ([(4, 6), (2, 3), (1, 2)], 2, 5, 3, 2, 4),
    'one level': ([(3, 5)], 2, 4, 2, 3, 2),
    'one head, one channel': ([(2, 3), (1, 2)], 1, 3, 1, 2, 1),
    'one query, one point': ([(5, 2), (1, 1)], 3, 1, 2, 1, 3),
    'many levels': ([(4, 3), (3, 2), (5, 1), (1, 4), (2, 2)], 1, 6, 2, 2, 2),
    'no queries': ([(2, 3), (1, 2)], 2, 0, 2, 2, 3),
    'empty batch': ([(2, 3), (1, 2)], 0, 3, 2, 2, 3),
}
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def arguments(case, dtype='float64', location_dtype=None):
    """Arrays by name, and options. The points reach over the borders."""
    shapes, n, q, heads, points, d = case
    random = numpy.random.RandomState(0)
    size = sum(h * w for h, w in shapes)
    at = n, q, heads, len(shapes), points
    # In pixels 0.1 or more clear of lattice lines.
    sides = numpy.array([(w, h) for h, w in shapes]).reshape(-1, 1, 2)
    pixels = random.randint(-2, sides + 1, (*at, 2)) + random.uniform(
        0.1, 0.9, (*at, 2)
    )
    arrays = {
        'value': random.uniform(-1, 1, (n, size, heads, d)).astype(dtype),
        'locations': ((pixels + 0.5) / sides).astype(location_dtype or dtype),
        'weights': random.uniform(0, 1, at).astype(location_dtype or dtype),
    }
    return arrays, {'shapes': shapes}


@every_case
@every_dtype
def test_output_and_gradients(case, dtype, offset_dtype):
    check_first_order(
        multi_scale_deformable_attention, *arguments(case, dtype, offset_dtype)
    )


@every_case
def test_second_order(case):
    check_second_order(multi_scale_deformable_attention, *arguments(case))


def test_finite_differences():
    arrays, options = arguments(CASES['one head, one channel'])
    check_finite_differences(multi_scale_deformable_attention, arrays, options)


def test_published_case():
    locations = [[[0.5, 0.5], [0.1, 0.9]], [[0.25, 0.5], [1.2, 0.5]]]
    weights = [[0.4, 0.3], [0.2, 0.1]]
    arrays = {
        'value': numpy.arange(1.0, 9).reshape(1, 8, 1, 1),
        'locations': numpy.array(locations).reshape(1, 1, 1, 2, 2, 2),
        'weights': numpy.array(weights).reshape(1, 1, 1, 2, 2),
    }
    gradients = {
        'value': [0, 0.2, 0, 0.168, 0.2, 0, 0.2, 0.01],
        'locations': [[[1.2, 2.4], [2.52, -1.92]], [[0.4, -1.4], [-1.6, -0.08]]],
        'weights': [[3.5, 2.24], [7, 0.8]],
    }
    check_case(
        multi_scale_deformable_attention,
        arrays,
        {'shapes': [(2, 3), (1, 2)]},
        [[[3.552]]],
        {
            name: numpy.reshape(gradient, arrays[name].shape)
            for name, gradient in gradients.items()
        },
    )


def test_one_level_is_a_spatial_transformer():
    """Whose grid is from -1 to 1 between the centres of the outermost pixels."""
    h, w = 4, 6
    random = numpy.random.RandomState(0)
    x = random.uniform(-1, 1, (2, 3, h, w))
    grid = random.uniform(-1.4, 1.4, (2, 2, 5, 1))
    expected = F.spatial_transformer_sampler(x, grid).array
    pixels = (grid[..., 0].transpose(0, 2, 1) + 1) / 2 * [w - 1, h - 1]
    y = multi_scale_deformable_attention(
        x.transpose(0, 2, 3, 1).reshape(2, h * w, 1, 3),
        [(h, w)],
        ((pixels + 0.5) / [w, h]).reshape(2, 5, 1, 1, 1, 2),
        numpy.ones((2, 5, 1, 1, 1)),
    )
    assert_close(y.array, expected[..., 0].transpose(0, 2, 1), 'y')


def test_shapes_as_an_array():
    arrays, options = arguments(CASES['plain'])
    expected = run(multi_scale_deformable_attention, arrays, options)
    options = {'shapes': numpy.array(options['shapes'])}
    y = run(multi_scale_deformable_attention, arrays, options)
    numpy.testing.assert_array_equal(y, expected)


def test_half_precision_rounds_once():
    """The levels are added in float32: in float16 the small ones would get lost."""
    value = numpy.full((1, 9, 1, 1), 0.5, 'float16')
    value[0, 0] = 2048
    y = multi_scale_deformable_attention(
        value,
        [(1, 1)] * 9,
        numpy.full((1, 1, 1, 9, 1, 2), 0.5, 'float16'),
        numpy.ones((1, 1, 1, 9, 1), 'float16'),
    )
    assert y.dtype == 'float16'
    assert y.array == 2052


@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 3e38, numpy.nan])
def test_locations_that_are_no_place(value):
    """Outside nothing is read; a NaN spoils its own query and head only."""
    arrays, options = arguments(CASES['plain'], 'float32')
    arrays['locations'][1, 3, 2, 0, 1, 0] = value
    y, gradients = check_first_order(multi_scale_deformable_attention, arrays, options)
    spoilt = numpy.zeros(y.shape, bool)
    spoilt[1, 3, 8:] = numpy.isnan(value)
    numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
    assert numpy.isfinite(gradients['value']).all()


class TestErrors:
    def arrays(self, **changes):
        arrays, options = arguments(CASES['plain'])
        return {**arrays, **options, **changes}

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            ('value', (2, 32, 3), r'value\.shape == \(n, 32, heads, d\).*\(2, 32, 3\)'),
            ('value', (2, 31, 3, 4), r'\(n, 32, heads, d\).*\[\(4, 6\), .*31'),
            ('value', (2, 32, 3, 0), r'heads, d >= 1.*\(2, 32, 3, 0\)'),
            ('value', (2, 32, 2, 4), r'locations\.shape == \(2, q, 2, 3, points, 2\)'),
            ('value', (1, 32, 3, 4), r'locations\.shape == \(1, q, 3, 3, points, 2\)'),
            ('locations', (2, 5, 3, 3, 2), r'points, 2\).*== \(2, 5, 3, 3, 2\)'),
            ('locations', (2, 5, 3, 2, 2, 2), r'3 levels.*\(2, 5, 3, 2, 2, 2\)'),
            ('locations', (2, 5, 3, 3, 2, 3), r'points, 2\).*\(2, 5, 3, 3, 2, 3\)'),
            ('locations', (2, 5, 3, 3, 0, 2), r'points >= 1.*\(2, 5, 3, 3, 0, 2\)'),
            ('weights', (2, 5, 3, 2, 3), r'weights\.shape == \(2, 5, 3, 3, 2\)'),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arguments = self.arrays(**{name: numpy.zeros(shape)})
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            multi_scale_deformable_attention(**arguments)

    @pytest.mark.parametrize('name', ['value', 'locations', 'weights'])
    def test_array(self, name, monkeypatch):
        array = self.arrays()[name]
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == int64'):
            multi_scale_deformable_attention(
                **self.arrays(**{name: array.astype('int64')})
            )
        for value in None, array.tolist():
            with pytest.raises(TypeError, match=f'^{name} must be a Variable or an ar'):
                multi_scale_deformable_attention(**self.arrays(**{name: value}))

    @pytest.mark.parametrize('name', ['locations', 'weights'])
    def test_device(self, name, monkeypatch):
        """A stand-in for a device, where there is none."""
        arrays = self.arrays()
        get_device = chainer.backend.get_device_from_array
        monkeypatch.setattr(
            chainer.backend,
            'get_device_from_array',
            lambda array: 'a GPU' if array is arrays[name] else get_device(array),
        )
        match = f'^{name} must be on the device of value, @numpy, but is on a GPU'
        with pytest.raises(ValueError, match=match):
            multi_scale_deformable_attention(**arrays)

    @pytest.mark.parametrize(
        ('shapes', 'error', 'message'),
        [
            ([], ValueError, '^shapes must have at least one pair'),
            (32, TypeError, '^shapes must be a sequence of pairs of ints, not 32'),
            ([32], TypeError, r'^shapes must be a sequence of pairs of ints, not \[32'),
            ([(4, 6, 1)], TypeError, '^shapes must be a sequence of pairs of ints'),
            ([(4, 6.0)], TypeError, '^shapes must be an int, not 6.0'),
            ([(4, 0)], ValueError, '^shapes must be at least 1, not 0'),
        ],
    )
    def test_shapes(self, shapes, error, message):
        with pytest.raises(error, match=message):
            multi_scale_deformable_attention(**self.arrays(shapes=shapes))
