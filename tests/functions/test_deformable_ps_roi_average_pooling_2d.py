"""Deformable position-sensitive RoI pooling: oracle, gradients, a peer, errors."""

import chainer
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import deformable_ps_roi_average_pooling_2d
from tests.cases import assert_close
from tests.functions.operators import (
    check_finite_differences,
    check_first_order,
    check_second_order,
    every_dtype,
    run,
)

#: Over borders, beside the image, a point, halves to round, upside down.
ROIS = [
    [1, 2, 9, 11],
    [-3, -2, 4, 20],
    [2, 2, 2, 2],
    [0.5, 1.5, 2.5, 6],
    [30, 40, 50, 44],
    [6, 1, 3, 7],
    [-0.5, -1.5, 3.49, 4.51],
]
INDICES = [1, 0, 1, 2, 0, 1, 2]

#: Options and the number of classes, of 4 output channels.
CASES = {
    'plain': ({'outsize': 2, 'spatial_scale': 0.53, 'group_size': 2}, 1),
    'classes': (
        {
            'outsize': (3, 2),
            'spatial_scale': 0.53,
            'group_size': 2,
            'sampling_ratio': (2, 3),
            'gamma': 0.27,
        },
        2,
    ),
    'few parts': (
        {
            'outsize': (3, 4),
            'spatial_scale': 0.47,
            'group_size': 3,
            'part_size': (2, 3),
            'sampling_ratio': 2,
        },
        4,
    ),
    'many parts': (
        {
            'outsize': (2, 1),
            'spatial_scale': 0.47,
            'group_size': 1,
            'part_size': (5, 2),
            'sampling_ratio': 2,
        },
        1,
    ),
    'many groups': (
        {'outsize': (1, 2), 'spatial_scale': 1.03, 'group_size': 3, 'gamma': -0.2},
        2,
    ),
    'no offset': (
        {'outsize': 2, 'spatial_scale': 0.53, 'group_size': 2, 'offset': None},
        0,
    ),
}
every_case = pytest.mark.parametrize(
    ('case', 'classes'), CASES.values(), ids=CASES.keys()
)


def arguments(
    case, classes, dtype='float64', offset_dtype=None, rois=ROIS, indices=INDICES
):
    """Arrays by name, and options with the boxes."""
    random = numpy.random.RandomState(1)
    channels = 4 * case['group_size'] ** 2
    arrays = {'x': random.uniform(-1, 1, (3, channels, 5, 7)).astype(dtype)}
    parts = numpy.broadcast_to(case.get('part_size', case['outsize']), 2)
    if classes:
        offset = random.uniform(-1, 1, (len(rois), 2 * classes, *parts))
        arrays['offset'] = offset.astype(offset_dtype or dtype)
    rois = numpy.reshape(rois, (-1, 4)).astype('f')
    return arrays, {'rois': rois, 'roi_indices': numpy.array(indices, 'i'), **case}


@every_case
@every_dtype
def test_output_and_gradients(case, classes, dtype, offset_dtype):
    check_first_order(
        deformable_ps_roi_average_pooling_2d,
        *arguments(case, classes, dtype, offset_dtype),
    )


@every_case
def test_second_order(case, classes):
    check_second_order(deformable_ps_roi_average_pooling_2d, *arguments(case, classes))


def test_finite_differences():
    """No sample joins or leaves a mean here as it moves by 1e-5."""
    arrays, options = arguments(*CASES['classes'], rois=ROIS[:3], indices=INDICES[:3])
    check_finite_differences(deformable_ps_roi_average_pooling_2d, arrays, options)


def test_constant_cells_are_read_by_their_bins():
    x = numpy.arange(18.0).reshape(1, 18, 1, 1) * numpy.ones((8, 9))
    box = numpy.array([[1.0, 1, 6, 6]])
    y = deformable_ps_roi_average_pooling_2d(x, box, numpy.array([0]), None, 3, 1, 3)
    numpy.testing.assert_allclose(y.array, numpy.arange(18.0).reshape(1, 2, 3, 3))


def test_samples_outside_are_left_out_of_the_mean():
    """Of a ramp, from 4 samples at -2.5, -1, 0.5 and 2 pixels along each axis."""
    x = numpy.arange(20.0).reshape(1, 1, 4, 5)
    box = numpy.array([[-2.0, -2, 3, 3]])
    y = deformable_ps_roi_average_pooling_2d(x, box, numpy.array([0]), None, 1, 1, 1)
    numpy.testing.assert_allclose(y.array, [[[[1.25 * 5 + 1.25]]]])


@pytest.mark.parametrize('with_offset', [True, False])
@pytest.mark.parametrize('classes', [1, 2])
def test_openvino(with_offset, classes):
    openvino = pytest.importorskip('openvino')
    opset1 = pytest.importorskip('openvino.opset1')
    case = {
        'outsize': 3,
        'spatial_scale': 0.53,
        'group_size': 3,
        'sampling_ratio': (2, 3),
        'gamma': 0.27,
    }
    arrays, options = arguments(case, classes, 'float32')
    if not with_offset:
        arrays['offset'] = None
    coordinates = numpy.concatenate(
        [options['roi_indices'][:, None], options['rois'][:, [1, 0, 3, 2]]], 1
    ).astype('f')
    inputs = [arrays['x'], coordinates]
    if with_offset:
        inputs.append(arrays['offset'])
    nodes = [opset1.parameter(a.shape, numpy.float32) for a in inputs]
    pooling = opset1.deformable_psroi_pooling(
        *nodes[:2],
        output_dim=4,
        spatial_scale=0.53,
        group_size=3,
        spatial_bins_x=3,
        spatial_bins_y=2,
        trans_std=0.27,
        part_size=3,
        offsets=nodes[2] if with_offset else None,
    )
    model = openvino.Model([pooling], nodes)
    expected = openvino.Core().compile_model(model, 'CPU')(inputs)[0]
    y = deformable_ps_roi_average_pooling_2d(**arrays, **options)
    assert_close(y.array, expected, 'y', 'float32')


@pytest.mark.parametrize(('n', 'dtype'), [(0, 'float32'), (3, 'float16')])
@pytest.mark.parametrize('name', ['plain', 'few parts', 'no offset'])
def test_no_boxes(name, n, dtype):
    arrays, options = arguments(*CASES[name], dtype, rois=[], indices=[])
    arrays['x'] = arrays['x'][:n]
    y, gradients = check_first_order(
        deformable_ps_roi_average_pooling_2d, arrays, options
    )
    assert y.shape == (0, 4, *numpy.broadcast_to(options['outsize'], 2))
    assert not gradients['x'].any()


@pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, 3e38, numpy.nan])
def test_offsets_that_are_no_place(value):
    """Outside nothing is read; a NaN spoils its own bin and class only."""
    arrays, options = arguments(*CASES['classes'], 'float32')
    arrays['offset'][1, 2, 1, 0] = value
    y, gradients = check_first_order(
        deformable_ps_roi_average_pooling_2d, arrays, options
    )
    spoilt = numpy.zeros(y.shape, bool)
    spoilt[1, 2:, 1, 0] = numpy.isnan(value)
    numpy.testing.assert_array_equal(numpy.isnan(y), spoilt)
    assert numpy.isfinite(gradients['x']).all()


@pytest.mark.parametrize('axis', [0, 1])
def test_what_is_left_out_is_not_read(axis):
    """Samples at -0.75 and 3.75 would read the outer rows or columns; 1.5 does not."""
    x = numpy.full((4, 4), numpy.nan)
    x[1], x[2] = 1, 2
    box = numpy.array([-1.0, 4, 25, 4]).reshape(2, 2)
    ratio = 3, 1
    if axis == 1:
        x, box, ratio = x.T, box[:, ::-1], ratio[::-1]
    y, gradients = run(
        deformable_ps_roi_average_pooling_2d,
        {'x': x[None, None], 'offset': numpy.zeros((1, 2, 1, 1))},
        {
            'rois': box.reshape(1, 4),
            'roi_indices': numpy.array([0]),
            'outsize': 1,
            'spatial_scale': 0.25,
            'group_size': 1,
            'sampling_ratio': ratio,
        },
        numpy.ones((1, 1, 1, 1)),
    )
    assert y == 1.5
    assert (gradients['x'][0, 0] != 0).sum() == 4
    assert not gradients['x'][0, 0][numpy.isnan(x)].any()
    numpy.testing.assert_allclose(
        gradients['offset'].ravel(), [0.1 * 6.75 * axis, 0.1 * 6.75 * (1 - axis)]
    )


def test_bin_without_samples_is_not_read():
    """All of them are at -0.875 or farther outside, after the offset."""
    x = numpy.ones((1, 1, 4, 4))
    x[0, 0, 0] = numpy.nan
    box = numpy.array([[-8.0, 0, -2, 2]])  # rows -8.5 to -1.5
    offset = numpy.full((1, 2, 1, 1), 0.0)
    offset[0, 1] = 1
    y = deformable_ps_roi_average_pooling_2d(
        x, box, numpy.array([0]), offset, 1, 1, 1, sampling_ratio=(28, 1), gamma=1 / 8
    )
    assert y.array == 0


@pytest.mark.parametrize('axis', [0, 1])
def test_bin_without_samples_is_0_even_if_an_offset_along_it_is_no_number(axis):
    """Along the other axis all samples are outside."""
    arrays, options = arguments(*CASES['plain'], rois=[[30, 40, 50, 44]], indices=[0])
    arrays['offset'][:, axis] = numpy.nan
    y, gradients = check_first_order(
        deformable_ps_roi_average_pooling_2d, arrays, options
    )
    assert not y.any()
    assert not gradients['offset'].any()


class TestErrors:
    def arrays(self, **changes):
        arrays, options = arguments(*CASES['classes'])
        return {**arrays, **options, **changes}

    @pytest.mark.parametrize(
        ('name', 'shape', 'message'),
        [
            ('x', (3, 16, 5), r'x\.shape == \(n, out_c \* group_size.*\(3, 16, 5\)'),
            ('x', (3, 18, 5, 7), r'group_size == 2.*x\.shape == \(3, 18, 5, 7\)'),
            ('x', (3, 16, 0, 7), r'h, w >= 1.*\(3, 16, 0, 7\)'),
            ('x', (3, 12, 5, 7), r'divide the 3 output channels.*\(7, 4, 3, 2\)'),
            ('rois', (7, 5), r'rois\.shape == \(R, 4\).*rois\.shape == \(7, 5\)'),
            ('rois', (5, 4), r'offset\.shape == \(5, 2 \* classes, 3, 2\)'),
            ('offset', (7, 4, 2, 3), r'\(7, 2 \* classes, 3, 2\).*\(7, 4, 2, 3\)'),
            ('offset', (7, 3, 3, 2), r'\(7, 2 \* classes, 3, 2\).*\(7, 3, 3, 2\)'),
            ('offset', (7, 0, 3, 2), r'\(7, 2 \* classes, 3, 2\).*\(7, 0, 3, 2\)'),
            ('offset', (7, 4, 3), r'\(7, 2 \* classes, 3, 2\).*\(7, 4, 3\)'),
        ],
    )
    @pytest.mark.parametrize('type_check', [True, False])
    def test_shape(self, name, shape, message, type_check):
        arguments = self.arrays(**{name: numpy.zeros(shape)})
        with (
            chainer.using_config('type_check', type_check),
            pytest.raises(InvalidType, match='(?s)' + message),
        ):
            deformable_ps_roi_average_pooling_2d(**arguments)

    @pytest.mark.parametrize('name', ['x', 'rois', 'offset', 'roi_indices'])
    def test_array(self, name):
        function = deformable_ps_roi_average_pooling_2d
        array = self.arrays()[name]
        wrong = 'float32' if name == 'roi_indices' else 'int64'
        with pytest.raises(InvalidType, match=rf'{name}\.dtype == {wrong}'):
            function(**self.arrays(**{name: array.astype(wrong)}))
        with pytest.raises(TypeError, match=f'^{name} must be a Variable or an array'):
            function(**self.arrays(**{name: array.tolist()}))

    @pytest.mark.parametrize('value', [-1, 3, 2**40])
    def test_indices_out_of_range(self, value):
        indices = numpy.array([0, 1, value, 1, 0, 1, 2])
        match = f'^roi_indices must be from 0 to 2, .* from {min(0, value)} to'
        with pytest.raises(ValueError, match=match):
            deformable_ps_roi_average_pooling_2d(**self.arrays(roi_indices=indices))

    @pytest.mark.parametrize(
        ('name', 'value', 'error', 'message'),
        [
            ('outsize', 0, ValueError, '^outsize must be at least 1'),
            ('spatial_scale', 0, ValueError, '^spatial_scale must be above 0'),
            ('group_size', 0, ValueError, '^group_size must be at least 1'),
            ('group_size', (2, 2), TypeError, '^group_size must be an int'),
            ('part_size', 0, ValueError, '^part_size must be at least 1'),
            ('part_size', 1.5, TypeError, '^part_size must be an int or a pair'),
            ('sampling_ratio', 0, ValueError, '^sampling_ratio must be at least 1'),
            ('sampling_ratio', None, TypeError, '^sampling_ratio must be an int or a'),
            ('gamma', numpy.inf, ValueError, '^gamma must be finite, not inf'),
        ],
    )
    def test_option(self, name, value, error, message):
        with pytest.raises(error, match=message):
            deformable_ps_roi_average_pooling_2d(**self.arrays(**{name: value}))
