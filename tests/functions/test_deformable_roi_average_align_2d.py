"""Deformable RoI align: published cases, oracle, gradients, boxes of all kinds."""

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import deformable_roi_average_align_2d
from tests.cases import assert_close
from tests.functions.operators import (
    check_case,
    check_finite_differences,
    check_first_order,
    check_second_order,
    every_dtype,
    run,
)

#: Over borders, beside the image, a point, upside down.
ROIS = [
    [1, 2, 9, 11.5],
    [-3, 0, 4, 20],
    [2, 2, 2, 2],
    [0.5, 1, 3.3, 6],
    [30, 40, 50, 44],
    [6, 1, 3, 7],
]
INDICES = [1, 0, 1, 2, 0, 1]

CASES = {
    'plain': {'outsize': (2, 3), 'spatial_scale': 0.6, 'sampling_ratio': (3, 2)},
    'one bin': {'outsize': 1, 'spatial_scale': 1, 'sampling_ratio': 2},
    'gamma': {
        'outsize': (3, 1),
        'spatial_scale': 0.5,
        'sampling_ratio': (1, 2),
        'gamma': -0.37,
    },
    'not aligned': {
        'outsize': (2, 3),
        'spatial_scale': 0.6,
        'sampling_ratio': (2, 1),
        'aligned': False,
    },
    'no ratio': {'outsize': (2, 3), 'spatial_scale': 0.7},
    'no ratio, not aligned': {
        'outsize': (3, 2),
        'spatial_scale': 0.7,
        'aligned': False,
        'gamma': 0.3,
    },
    'no ratio of rows': {
        'outsize': (1, 2),
        'spatial_scale': 0.8,
        'sampling_ratio': (None, 2),
    },
}
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def arguments(case, dtype='float64', offset_dtype=None, rois=ROIS, indices=INDICES):
    """Arrays by name, and options with the boxes."""
    random = numpy.random.RandomState(1)
    out_h, out_w = numpy.broadcast_to(case['outsize'], 2)
    offset = random.uniform(-1, 1, (len(rois), 2, out_h, out_w))
    arrays = {
        'x': random.uniform(-1, 1, (3, 2, 5, 7)).astype(dtype),
        'offset': offset.astype(offset_dtype or dtype),
    }
    rois = numpy.reshape(rois, (-1, 4)).astype('f')
    return arrays, {'rois': rois, 'roi_indices': numpy.array(indices, 'i'), **case}


@every_case
@every_dtype
def test_output_and_gradients(case, dtype, offset_dtype):
    check_first_order(
        deformable_roi_average_align_2d, *arguments(case, dtype, offset_dtype)
    )


@every_case
def test_second_order(case):
    check_second_order(deformable_roi_average_align_2d, *arguments(case))


@pytest.mark.parametrize('ratio', [(3, 2), None])
def test_finite_differences(ratio):
    """Of both gradients, at bins that reach over a border."""
    case = {**CASES['plain'], 'sampling_ratio': ratio, 'gamma': 0.3}
    arrays, options = arguments(case, rois=ROIS[:3], indices=INDICES[:3])
    check_finite_differences(deformable_roi_average_align_2d, arrays, options)


ONE = [[3.0625, 0.4375], [0.4375, 0.0625]]


@pytest.mark.parametrize(
    ('x', 'y', 'gx'),
    [
        ([[[1, 2], [3, 4]]], [[[1, 1.25], [1.5, 1.75]]], [ONE]),
        (
            [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
            [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
            [ONE, ONE],
        ),
        (
            [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
            [[[1.9375, 4.75], [7.5625, 10.375]]],
            [
                [
                    [0.47265625, 0.4296875, 0.4296875, 0.04296875],
                    [0.4296875, 0.390625, 0.390625, 0.0390625],
                    [0.4296875, 0.390625, 0.390625, 0.0390625],
                    [0.04296875, 0.0390625, 0.0390625, 0.00390625],
                ]
            ],
        ),
    ],
)
def test_published_cases(x, y, gx):
    """Those of mmcv."""
    x = numpy.array([x], float)
    check_case(
        deformable_roi_average_align_2d,
        {'x': x, 'offset': numpy.zeros((1, 2, 2, 2))},
        {
            'rois': numpy.array([[0, 0, *numpy.array(x.shape[2:]) - 1]], float),
            'roi_indices': numpy.array([0]),
            'outsize': 2,
            'spatial_scale': 1.0,
            'sampling_ratio': 2,
        },
        [y],
        {'x': [gx]},
    )


@pytest.mark.parametrize('ratio', [None, 2, (3, 1), (None, 2)])
def test_zero_offset_is_chainers_own_function(ratio):
    case = {'outsize': (2, 3), 'spatial_scale': 0.6, 'sampling_ratio': ratio}
    arrays, options = arguments(case, 'float32')
    arrays['offset'][...] = 0
    gy = numpy.random.RandomState(0).uniform(-1, 1, (6, 2, 2, 3)).astype('f')
    y, gradients = run(
        deformable_roi_average_align_2d, arrays, {**options, 'aligned': False}, gy
    )
    x = chainer.Variable(arrays['x'])
    expected = F.roi_average_align_2d(x, **options)
    expected.grad = gy
    expected.backward()
    assert_close(y, expected.array, 'y')
    assert_close(gradients['x'], x.grad, 'x')


def test_offset_moves_a_bin():
    """By shares of the box: x first, then y."""
    x = numpy.arange(200.0).reshape(1, 1, 10, 20)
    offset = numpy.zeros((1, 2, 1, 1))
    offset[0, :, 0, 0] = 3, -2
    box = numpy.array([[3.0, 4, 7, 14]])
    y = deformable_roi_average_align_2d(x, box, numpy.array([0]), offset, 1, 1.0, 2)
    row, column = 5 - 0.5 - 2 * 0.1 * 4, 9 - 0.5 + 3 * 0.1 * 10
    numpy.testing.assert_allclose(y.array, [[[[row * 20 + column]]]])


def test_each_box_alone():
    """Boxes with fewer samples than others are as they are alone, and first order."""
    arrays, options = arguments(CASES['no ratio'])
    arrays['x'][2] = numpy.nan  # which box 3 alone reads
    y = run(deformable_roi_average_align_2d, arrays, options)
    for box in range(len(ROIS)):
        part = slice(box, box + 1)
        alone = run(
            deformable_roi_average_align_2d,
            {**arrays, 'offset': arrays['offset'][part]},
            {
                **options,
                'rois': options['rois'][part],
                'roi_indices': options['roi_indices'][part],
            },
        )
        assert_close(alone, y[part], 'y')
        assert numpy.isnan(alone).any() == (box == 3)


def test_padded_samples_read_nothing():
    """Not even the infinite pixels where they would be: a small box beside a big one"""
    x = numpy.full((1, 1, 9, 9), numpy.inf)
    x[..., :4, :4] = 1
    rois = numpy.array([[1, 1, 3, 3], [1, 1, 3, 3], [0, 0, 9, 9]], 'f')
    offset = numpy.zeros((3, 2, 1, 1))
    offset[1] = numpy.inf
    y = deformable_roi_average_align_2d(x, rois, numpy.zeros(3, int), offset, 1, 1.0)
    numpy.testing.assert_array_equal(y.array.ravel()[:2], [1, 0])
    assert not numpy.isfinite(y.array[2])


@pytest.mark.parametrize('ratio', [2, None])
@pytest.mark.parametrize(('n', 'dtype'), [(0, 'float32'), (3, 'float16')])
def test_no_boxes(ratio, n, dtype):
    case = {**CASES['plain'], 'sampling_ratio': ratio}
    arrays, options = arguments(case, dtype, rois=[], indices=[])
    arrays['x'] = arrays['x'][:n]
    y, gradients = check_first_order(deformable_roi_average_align_2d, arrays, options)
    assert y.shape == (0, 2, 2, 3)
    assert not gradients['x'].any()


@pytest.mark.parametrize('ratio', [2, None])
@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 3e38, numpy.nan])
def test_offsets_that_are_no_place(value, ratio):
    """Outside nothing is read; a NaN spoils its own bin only."""
    case = {**CASES['plain'], 'sampling_ratio': ratio}
    arrays, options = arguments(case, 'float32')
    arrays['offset'][1, 0, 1, 2] = value
    y, gradients = check_first_order(deformable_roi_average_align_2d, arrays, options)
    spoilt = numpy.zeros(y.shape, bool)
    spoilt[1, :, 1, 2] = numpy.isnan(value)
    numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
    assert numpy.isfinite(gradients['x']).all()


@pytest.mark.parametrize('ratio', [2, None])
def test_boxes_that_are_no_place(ratio):
    """A NaN box is NaN, an infinite one is 0 or NaN; others are untouched."""
    case = {**CASES['plain'], 'sampling_ratio': ratio}
    arrays, options = arguments(case)
    expected = run(deformable_roi_average_align_2d, arrays, options)
    options['rois'][0, 1] = numpy.nan
    options['rois'][1, 2] = numpy.inf
    y = run(deformable_roi_average_align_2d, arrays, options)
    assert numpy.isnan(y[0]).all()
    assert not numpy.nan_to_num(y[1]).any()
    assert_close(y[2:], expected[2:], 'y')


def test_variables_and_integers_of_any_kind():
    arrays, options = arguments(CASES['plain'])
    expected = run(deformable_roi_average_align_2d, arrays, options)
    for name in 'rois', 'roi_indices':
        options[name] = chainer.Variable(options[name])
    options['roi_indices'] = options['roi_indices'].array.astype('uint8')
    y = run(deformable_roi_average_align_2d, arrays, options)
    numpy.testing.assert_array_equal(y, expected)


class TestErrors:
    def arrays(self, **changes):
        arrays, options = arguments(CASES['plain'])
        return {**arrays, **options, **changes}

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            ('x', (2, 6, 5), r'x\.shape == \(n, c, h, w\).*x\.shape == \(2, 6, 5\)'),
            ('x', (3, 0, 5, 7), r'c, h, w >= 1.*\(3, 0, 5, 7\)'),
            ('rois', (6, 5), r'rois\.shape == \(R, 4\).*rois\.shape == \(6, 5\)'),
            ('rois', (), r'rois\.shape == \(R, 4\).*rois\.shape == \(\)'),
            ('rois', (5, 4), r'offset\.shape == \(5, 2, 2, 3\) for 5 boxes'),
            ('offset', (6, 2, 3, 2), r'offset\.shape == \(6, 2, 2, 3\) for 6 boxes an'),
            ('offset', (6, 3, 2, 3), r'outsize == \(2, 3\).*shape == \(6, 3, 2, 3\)'),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arguments = self.arrays(**{name: numpy.zeros(shape)})
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            deformable_roi_average_align_2d(**arguments)

    @pytest.mark.parametrize('name', ['x', 'rois', 'offset', 'roi_indices'])
    def test_array(self, name):
        array = self.arrays()[name]
        wrong = 'float32' if name == 'roi_indices' else 'int64'
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == {wrong}'):
            deformable_roi_average_align_2d(
                **self.arrays(**{name: array.astype(wrong)})
            )
        for value in None, array.tolist():
            with pytest.raises(TypeError, match=f'^{name} must be a Variable or an ar'):
                deformable_roi_average_align_2d(**self.arrays(**{name: value}))

    @pytest.mark.parametrize('shape', [(5,), (6, 1), ()])
    def test_shape_of_indices(self, shape):
        indices = numpy.zeros(shape, int)
        with pytest.raises(InvalidType, match=r'(?s)roi_indices\.shape == \(6,\).*=='):
            deformable_roi_average_align_2d(**self.arrays(roi_indices=indices))

    @pytest.mark.parametrize('value', [-1, 3, 2**40])
    def test_indices_out_of_range(self, value):
        indices = numpy.array([0, 1, value, 1, 0, 1])
        match = f'^roi_indices must be from 0 to 2, .* from {min(0, value)} to'
        with pytest.raises(ValueError, match=match):
            deformable_roi_average_align_2d(**self.arrays(roi_indices=indices))

    @pytest.mark.parametrize(
        ('name', 'value', 'error', 'message'),
        [
            ('outsize', 0, ValueError, '^outsize must be at least 1'),
            ('outsize', (2, 3.0), TypeError, '^outsize must be an int, not 3.0'),
            ('spatial_scale', 0, ValueError, '^spatial_scale must be above 0'),
            ('spatial_scale', None, TypeError, '^spatial_scale must be a number'),
            ('sampling_ratio', 0, ValueError, '^sampling_ratio must be at least 1'),
            ('sampling_ratio', 1.5, TypeError, '^sampling_ratio must be None, an int'),
            (
                'sampling_ratio',
                (1, 2, 3),
                TypeError,
                '^sampling_ratio must be None, an',
            ),
            ('gamma', numpy.nan, ValueError, '^gamma must be finite, not nan'),
            ('gamma', '1', TypeError, '^gamma must be a number'),
            ('aligned', 1, TypeError, '^aligned must be True or False, not 1'),
        ],
    )
    def test_option(self, name, value, error, message):
        with pytest.raises(error, match=message):
            deformable_roi_average_align_2d(**self.arrays(**{name: value}))

    def test_boxes_with_too_many_samples(self):
        rois = numpy.array(ROIS, 'f')
        rois[2, 2:] = 1e6
        with pytest.raises(ValueError, match='^rois have .* samples in a bin'):
            deformable_roi_average_align_2d(
                **self.arrays(rois=rois, sampling_ratio=None)
            )
