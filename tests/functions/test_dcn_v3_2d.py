"""Deformable convolution without a filter: cases, oracle, gradients, errors."""

import chainer
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import dcn_v3_2d, deformable_convolution_2d_sampler
from tests.cases import Case, assert_close
from tests.functions.operators import (
    check_case,
    check_finite_differences,
    check_first_order,
    check_second_order,
    every_dtype,
    run,
)

#: Geometries, and options that a convolution does not have.
CASES = {
    'plain': (Case(c=3), {}),
    'groups': (Case(c=6, offset_groups=3, pad=(1, 0)), {}),
    'stride, pad': (Case(size=(6, 9), stride=(2, 1), pad=(1, 3)), {}),
    'dilate': (Case(size=(7, 8), dilate=(2, 3), pad=(2, 1), stride=(1, 2)), {}),
    'scale': (
        Case(c=4, ksize=(3, 4), dilate=(2, 1), pad=(1, 2), offset_groups=2),
        {'offset_scale': 1.5},
    ),
    # With even kernels and odd steps the centre is rounded down.
    'even kernel': (
        Case(ksize=(2, 4), dilate=(3, 1), pad=(1, 2)),
        {'offset_scale': 0.7},
    ),
    'no centre': (
        Case(c=4, ksize=(3, 3), offset_groups=2, pad=(1, 2), stride=(1, 2)),
        {'remove_center': True, 'offset_scale': 2.0},
    ),
    'large, no centre': (
        Case(n=1, c=2, ksize=(5, 5), pad=(2, 1)),
        {'remove_center': True},
    ),
    '1 x 1 image': (Case(size=(1, 1), pad=(1, 1)), {}),
    'empty batch': (Case(n=0, c=4, offset_groups=2), {}),
}
every_case = pytest.mark.parametrize(('case', 'more'), CASES.values(), ids=CASES.keys())


def arguments(case, more, dtype='float64', offset_dtype=None):
    """Arrays by name, and options."""
    case.mask, case.bias = True, False
    arrays = case.arrays(dtype, offset_dtype)
    arrays = {name: arrays[name] for name in ('x', 'offset', 'mask')}
    options = {'ksize': case.ksize, **case.options, **more}
    del options['groups']
    if more.get('remove_center'):
        taps = case.offset_groups * (case.ksize[0] * case.ksize[1] - 1)
        arrays['offset'] = arrays['offset'][:, : 2 * taps]
        arrays['mask'] = arrays['mask'][:, :taps]
    # Clear of lattice lines, for factors that are no whole numbers.
    if more.get('offset_scale', 1) % 1:
        arrays['offset'] = arrays['offset'].round() / 3 + arrays['x'].dtype.type(0.11)
        arrays['offset'] = arrays['offset'].astype(offset_dtype or dtype)
    return arrays, options


@every_case
@every_dtype
def test_output_and_gradients(case, more, dtype, offset_dtype):
    check_first_order(dcn_v3_2d, *arguments(case, more, dtype, offset_dtype))


@every_case
def test_second_order(case, more):
    check_second_order(dcn_v3_2d, *arguments(case, more))


def test_finite_differences():
    case = Case(n=1, c=4, offset_groups=2, pad=(1, 0), size=(4, 3))
    arrays, options = arguments(case, {'offset_scale': 2.0})
    # A scaled offset may be on a lattice line.
    arrays['offset'] = arrays['offset'] / 2 + 0.5
    check_finite_differences(dcn_v3_2d, arrays, options)


@pytest.mark.parametrize(
    ('offset_scale', 'y'),
    [
        (
            1.0,
            [
                [1.125, 1.59375, 1.171875],
                [2.859375, 3.859375, 2.71875],
                [3.703125, 4.890625, 3.375],
            ],
        ),
        (2.0, [[0.9375] * 3, [1.875] * 3, [0.9375] * 3]),
    ],
)
def test_published_case(offset_scale, y):
    offset = numpy.full((1, 18, 3, 3), 0.25)
    offset[:, 9:] = -0.5
    arrays = {
        'x': numpy.arange(1.0, 10).reshape(1, 1, 3, 3),
        'offset': offset,
        'mask': numpy.full((1, 9, 3, 3), 1 / 8),
    }
    options = {'ksize': 3, 'pad': 1, 'offset_scale': offset_scale}
    check_case(dcn_v3_2d, arrays, options, [[y]], {})


@pytest.mark.parametrize('remove_center', [False, True])
@pytest.mark.parametrize('offset_scale', [1.0, 2.0])
def test_same_as_deformable_convolution(remove_center, offset_scale):
    """With weights of ones, groups of one channel and offsets that are moved."""
    case = Case(
        c=6,
        out_c=6,
        size=(6, 9),
        ksize=(3, 3),
        stride=(2, 1),
        pad=(1, 2),
        dilate=(2, 1),
        groups=6,
        offset_groups=2,
        mask=True,
        bias=False,
    )
    arrays = case.arrays()
    W = numpy.ones_like(arrays.pop('W'))
    n, _, out_h, out_w = arrays['mask'].shape
    if remove_center:
        arrays['mask'].reshape(n, 2, 9, out_h, out_w)[:, :, 4] = 0

    # Relative to the centre, a tap is at the scaled place of its tap and offset.
    offset = arrays['offset'].reshape(n, 2, 2, 3, 3, out_h, out_w) * offset_scale
    taps = (numpy.arange(3) - 1) * (offset_scale - 1)
    offset[:, :, 0] += taps[:, None, None] * 1
    offset[:, :, 1] += taps[:, None, None, None] * 2
    expected, theirs = run(
        deformable_convolution_2d_sampler,
        {**arrays, 'offset': offset.reshape(arrays['offset'].shape)},
        {**case.options, 'W': W},
        gy=case.gy(),
    )
    theirs['offset'] *= offset_scale

    kept = [k for k in range(9) if k != 4 or not remove_center]
    both = {'offset': 2 * 2, 'mask': 2}

    def without_centre(name, array):
        if name not in both:
            return array
        array = array.reshape(n, both[name], 9, out_h, out_w)
        return array[:, :, kept].reshape(n, -1, out_h, out_w)

    options = {k: v for k, v in case.options.items() if k != 'groups'}
    y, gradients = run(
        dcn_v3_2d,
        {name: without_centre(name, array) for name, array in arrays.items()},
        {
            'ksize': 3,
            **options,
            'offset_scale': offset_scale,
            'remove_center': remove_center,
        },
        gy=case.gy(),
    )
    assert_close(y, expected, 'y')
    for name, gradient in gradients.items():
        assert_close(gradient, without_centre(name, theirs[name]), name)


def test_options_may_be_ints():
    arrays, _ = arguments(Case(ksize=(2, 2), stride=(2, 2), pad=(1, 1)), {})
    ints = run(dcn_v3_2d, arrays, {'ksize': 2, 'stride': 2, 'pad': 1})
    pairs = {'ksize': (2, 2), 'stride': (2, 2), 'pad': (1, 1), 'dilate': (1, 1)}
    numpy.testing.assert_array_equal(ints, run(dcn_v3_2d, arrays, pairs))


def test_half_precision_far_from_the_origin():
    """Coordinates are those of float32, whose fractions float16 does not have."""
    x = numpy.zeros((1, 1, 1, 3000), 'float16')
    x[..., 1::2] = 1
    offset = numpy.zeros((1, 2, 1, 3000), 'float16')
    offset[:, 0] = 0.25
    y = dcn_v3_2d(x, offset, numpy.ones((1, 1, 1, 3000), 'float16'), 1).array
    numpy.testing.assert_array_equal(y[0, 0, 0, 2000:2002], [0.25, 0.75])


@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 3e38, numpy.nan])
def test_offsets_that_are_no_place(value):
    """Outside nothing is read; a NaN spoils its own output and group only."""
    case = Case(c=4, offset_groups=2, pad=(1, 0))
    arrays, options = arguments(case, {'offset_scale': 2.0}, 'float32')
    arrays['offset'][1, 2, 3, 4] = value
    y, gradients = check_first_order(dcn_v3_2d, arrays, options)
    spoilt = numpy.zeros(y.shape, bool)
    spoilt[1, :2, 3, 4] = numpy.isnan(value)
    numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
    assert numpy.isfinite(gradients['x']).all()


class TestErrors:
    def arrays(self, **changes):
        arrays, options = arguments(Case(c=6, offset_groups=2), {})
        return {**arrays, **options, **changes}

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            ('x', (2, 6, 5), r'x\.shape == \(n, c, h, w\).*x\.shape == \(2, 6, 5\)'),
            ('x', (2, 6, 0, 7), r'h, w >= 1.*\(2, 6, 0, 7\)'),
            ('x', (2, 6, 2, 7), r'ksize - 1.*x\.shape == \(2, 6, 2, 7\).*\(3, 2\)'),
            ('x', (2, 6, 6, 7), r'offset\.shape == \(2, 24, 4, 6\) .*\(2, 24, 3, 6\)'),
            (
                'offset',
                (2, 12, 3, 6),
                r'offset\.shape == \(2, 24, 3, 6\) with 2 \* tap',
            ),
            ('offset', (1, 24, 3, 6), r'offset\.shape == \(2, 24, 3, 6\).*\(1, 24'),
            ('mask', (2, 24, 3, 6), r'mask\.shape == \(2, 12, 3, 6\) with taps'),
            ('mask', (2, 12, 6, 3), r'mask\.shape == \(2, 12, 3, 6\).*\(2, 12, 6, 3\)'),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arguments = self.arrays(**{name: numpy.zeros(shape)})
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            dcn_v3_2d(**arguments)

    @pytest.mark.parametrize('name', ['x', 'offset', 'mask'])
    def test_array(self, name):
        array = self.arrays()[name]
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == int64'):
            dcn_v3_2d(**self.arrays(**{name: array.astype('int64')}))
        for value in None, array.tolist():
            with pytest.raises(TypeError, match=f'^{name} must be a Variable or an ar'):
                dcn_v3_2d(**self.arrays(**{name: value}))

    @pytest.mark.parametrize(
        ('name', 'value', 'error', 'message'),
        [
            ('ksize', 0, ValueError, '^ksize must be at least 1, not 0'),
            ('ksize', (3, 2.0), TypeError, '^ksize must be an int, not 2.0'),
            ('stride', 0, ValueError, '^stride must be at least 1'),
            ('pad', -1, ValueError, '^pad must be at least 0'),
            ('dilate', 0, ValueError, '^dilate must be at least 1'),
            ('offset_groups', 0, ValueError, '^offset_groups must be at least 1'),
            ('offset_groups', 4, ValueError, '^offset_groups must divide .* are 6'),
            ('offset_scale', 0, ValueError, '^offset_scale must be above 0'),
            ('offset_scale', 'a', TypeError, '^offset_scale must be a number'),
            ('remove_center', 1, TypeError, '^remove_center must be True or False'),
        ],
    )
    def test_option(self, name, value, error, message):
        with pytest.raises(error, match=message):
            dcn_v3_2d(**self.arrays(**{name: value}))

    @pytest.mark.parametrize('ksize', [(3, 5), 4, 1])
    def test_kernel_without_a_centre_to_remove(self, ksize):
        with pytest.raises(ValueError, match='^ksize must be square, odd and at least'):
            dcn_v3_2d(**self.arrays(ksize=ksize, remove_center=True))
