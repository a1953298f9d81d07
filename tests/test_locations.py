"""Sampling points, alone and through several layers."""

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils import type_check

from chainer_deform import receptive_points, sampling_locations
from chainer_deform.functions import dcn_v3_2d, deformable_convolution_2d_sampler
from chainer_deform.link_hooks import SamplingHook
from chainer_deform.links import DeformableConvolution2D, DeformableRoIPooling2D
from tests.cases import CASES, Case


def options_of(case):
    options = case.options
    del options['groups']
    return {'ksize': case.ksize, **options}


def naive_locations(offset, case):
    (kh, kw), groups = case.ksize, case.offset_groups
    (sy, sx), (ph, pw), (dy, dx) = case.stride, case.pad, case.dilate
    n, _, out_h, out_w = offset.shape
    points = numpy.full((n, groups, kh * kw, 2, out_h, out_w), numpy.nan)
    for image, g, i, j, oy, ox in numpy.ndindex(n, groups, kh, kw, out_h, out_w):
        tap, first = i * kw + j, g * 2 * kh * kw
        offset_x = offset[image, first + tap, oy, ox]
        offset_y = offset[image, first + kh * kw + tap, oy, ox]
        points[image, g, tap, 0, oy, ox] = oy * sy - ph + i * dy + offset_y
        points[image, g, tap, 1, oy, ox] = ox * sx - pw + j * dx + offset_x
    return points


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_agrees_with_loops(case):
    offset = case.arrays()['offset']
    points = sampling_locations(offset, **options_of(case))
    assert points.dtype == offset.dtype
    numpy.testing.assert_array_equal(points, naive_locations(offset, case))


@pytest.mark.parametrize('remove_center', [True, False])
def test_scaled_kernels(remove_center):
    """A tap alone reads its own place from images of their rows and columns."""
    options = {
        'ksize': 3,
        'stride': (2, 1),
        'pad': (0, 1),
        'dilate': (1, 2),
        'offset_groups': 2,
        'offset_scale': 1.5,
        'remove_center': remove_center,
    }
    taps = 9 - remove_center
    random = numpy.random.RandomState(0)
    offset = random.uniform(-1, 1, (1, 2 * 2 * taps, 5, 10))
    points = sampling_locations(offset, **options)
    assert points.shape == (1, 2, taps, 2, 5, 10)
    x = numpy.tile(numpy.indices((12, 12)).astype(float), (2, 1, 1))[None]
    inside = ((points >= 0) & (points <= 11)).all(axis=3)
    assert inside.mean() > 0.6
    for tap in range(taps):
        mask = numpy.zeros((1, 2 * taps, 5, 10))
        mask[:, tap::taps] = 1
        y = dcn_v3_2d(x, offset, mask, **options).array.reshape(2, 2, 5, 10)
        difference = (y - points[0, :, tap]) * inside[0, :, tap, None]
        assert abs(difference).max() < 1e-12


def test_kernel_without_a_centre_to_remove():
    with pytest.raises(ValueError, match='^ksize must be square, odd and at least'):
        sampling_locations(numpy.zeros((1, 16, 2, 2)), (3, 5), remove_center=True)


@pytest.mark.parametrize(
    ('dtype', 'expected'), [('float16', 'f'), ('float32', 'f'), ('float64', 'd')]
)
def test_at_least_single_precision(dtype, expected):
    case = CASES['all']
    offset = case.arrays(dtype)['offset']
    before = offset.copy()
    points = sampling_locations(chainer.Variable(offset), **options_of(case))
    assert type(points) is numpy.ndarray
    assert points.dtype == expected
    wide = naive_locations(offset.astype('d'), case)
    numpy.testing.assert_allclose(points, wide, rtol=1e-6)
    numpy.testing.assert_array_equal(offset, before)


def test_far_from_the_origin_half_precision_keeps_the_fraction():
    offset = numpy.full((1, 2, 1, 5000), 0.25, 'float16')
    points = sampling_locations(offset, 1)
    assert points[0, 0, 0, 1, 0, 4001] == 4001.25


@pytest.mark.parametrize('offset_groups', [1, 2])
def test_are_the_points_that_the_function_reads(offset_groups):
    """A ramp along each axis, sampled by one tap at a time, is the points themselves"""
    case = Case(
        n=2,
        c=2 * offset_groups,
        size=(15, 19),
        stride=(2, 3),
        dilate=(2, 1),
        offset_groups=offset_groups,
    )
    kh, kw = case.ksize
    x = numpy.empty((case.n, case.c, *case.size))
    x[:, 0::2] = numpy.arange(15)[:, None]
    x[:, 1::2] = numpy.arange(19)
    W = numpy.eye(case.c * kh * kw).reshape(-1, case.c, kh, kw)
    offset = case.arrays()['offset']
    y = deformable_convolution_2d_sampler(x, offset, W, **case.options).array
    # (n, offset_groups * 2 * taps, out_h, out_w)
    read = y.reshape(case.n, offset_groups, 2, kh * kw, *case.out_size)
    points = sampling_locations(offset, **options_of(case)).transpose(0, 1, 3, 2, 4, 5)
    v, u = points[:, :, 0], points[:, :, 1]
    interior = (v >= 0) & (v <= 14) & (u >= 0) & (u <= 18)
    assert interior.mean() > 0.5
    for axis in 0, 1:
        numpy.testing.assert_allclose(
            read[:, :, axis][interior], points[:, :, axis][interior], rtol=1e-12
        )


def test_offsets_that_are_not_finite():
    offset = numpy.zeros((1, 2, 1, 3), 'f')
    offset[0, :, 0, 1] = numpy.inf, numpy.nan
    points = sampling_locations(offset, 1)[0, 0, 0, :, 0]
    numpy.testing.assert_array_equal(points, [[0, numpy.nan, 0], [0, numpy.inf, 2]])


@pytest.mark.parametrize(
    ('offset', 'options', 'error', 'message'),
    [
        ([[0.0]], {}, TypeError, 'offset must be a Variable or an array, not a list'),
        (numpy.zeros((1, 18, 4, 5), int), {}, type_check.InvalidType, 'offset.dtype'),
        (
            numpy.zeros((1, 12, 4, 5), 'f'),
            {'offset_groups': 2},
            type_check.InvalidType,
            r'offset\.shape == \(n, 36, out_h, out_w\)(.|\n)*\(1, 12, 4, 5\)',
        ),
        (numpy.zeros((18, 4, 5), 'f'), {}, type_check.InvalidType, r'\(18, 4, 5\)'),
        (numpy.zeros((1, 18, 4, 5), 'f'), {'stride': 0}, ValueError, 'stride must'),
        (numpy.zeros((1, 18, 4, 5), 'f'), {'pad': 0.5}, TypeError, 'pad must be'),
        (numpy.zeros((1, 18, 4, 5), 'f'), {'offset_groups': 0}, ValueError, 'offset_g'),
    ],
)
def test_bad_arguments(offset, options, error, message):
    with pytest.raises(error, match=message):
        sampling_locations(offset, 3, **options)


def plain_points(size, ksize=3, pad=1):
    taps = ksize * ksize
    return sampling_locations(numpy.zeros((1, 2 * taps, *size), 'f'), ksize, pad=pad)[0]


@pytest.mark.parametrize(('layers', 'count'), [(1, 9), (2, 81), (3, 729)])
def test_count(layers, count):
    offset = numpy.random.RandomState(0).uniform(-0.7, 0.7, (1, 18, 15, 17))
    points = sampling_locations(offset.astype('f'), 3, pad=1)[0]
    reached = receptive_points([points] * layers, 7, 8)
    assert reached.shape == (count, 2)
    assert reached.dtype == numpy.float32


def naive_receptive_points(layers, y, x):
    """Recursively, from one output pixel of the last layer."""
    *below, layer = layers
    found = []
    for group, tap in numpy.ndindex(layer.shape[:2]):
        v, u = (float(place) for place in layer[group, tap, :, y, x])
        if not (numpy.isfinite(v) and numpy.isfinite(u)):
            continue
        if not below:
            found.append((v, u))
            continue
        h, w = below[-1].shape[3:]
        if -1 < v < h and -1 < u < w:
            row = min(max(int(numpy.floor(v + 0.5)), 0), h - 1)
            column = min(max(int(numpy.floor(u + 0.5)), 0), w - 1)
            found += naive_receptive_points(below, row, column)
    return found


@pytest.mark.parametrize(('y', 'x'), [(0, 0), (2, 1), (3, 5)])
def test_agrees_with_recursion(y, x):
    """Three layers of other kernels, strides and offset groups each, at the edge too"""
    random = numpy.random.RandomState(1)

    def layer(size, ksize, offset_groups, **options):
        channels = 2 * offset_groups * ksize[0] * ksize[1]
        offset = random.normal(0, 1.5, (1, channels, *size))
        for value in numpy.inf, -numpy.inf, numpy.nan, 1e9, -1e9:
            offset[random.uniform(size=offset.shape) < 0.01] = value
        return sampling_locations(
            offset, ksize, offset_groups=offset_groups, **options
        )[0]

    layers = [
        layer((9, 12), (3, 2), 2, stride=(2, 1)),
        layer((9, 12), (1, 3), 1, pad=(0, 1)),
        layer((4, 6), (2, 2), 3, stride=(2, 2), pad=1),
    ]
    expected = naive_receptive_points(layers, y, x)
    assert 0 < len(expected) < 12 * 3 * 12
    points = receptive_points(layers, y, x)
    numpy.testing.assert_array_equal(points, expected)


def test_by_hand():
    """Two layers of a 1 x 2 kernel: the points 1 and 2.75 lead to the pixels 1 and 3"""
    upper = numpy.zeros((1, 2, 2, 1, 1))
    upper[0, :, 1, 0, 0] = 1, 2.75
    lower = numpy.zeros((1, 2, 2, 1, 5))
    lower[0, :, 0] = -0.5
    lower[0, :, 1, 0] = numpy.arange(5), numpy.arange(5) + 10
    numpy.testing.assert_array_equal(
        receptive_points([lower, upper], 0, 0),
        [[-0.5, 1], [-0.5, 11], [-0.5, 3], [-0.5, 13]],
    )


@pytest.mark.parametrize(
    ('place', 'reached'),
    [(-1, None), (-0.99, 0), (0.49, 0), (0.5, 1), (3.99, 3), (4, None)]
    + [(numpy.inf, None), (-numpy.inf, None), (numpy.nan, None), (1e30, None)],
)
@pytest.mark.parametrize('axis', [0, 1])
def test_points_outside_reach_nothing(axis, place, reached):
    upper = numpy.zeros((1, 1, 2, 1, 1))
    upper[0, 0, axis] = place
    size = (4, 1) if axis == 0 else (1, 4)
    lower = plain_points(size, ksize=1, pad=0)
    points = receptive_points([lower, upper], 0, 0)
    if reached is None:
        assert points.shape == (0, 2)
    else:
        expected = (reached, 0) if axis == 0 else (0, reached)
        numpy.testing.assert_array_equal(points, [expected])


def test_points_of_the_first_layer_may_lie_outside_the_image():
    points = receptive_points([plain_points((5, 5), pad=3)], 0, 0)
    assert points.min() == -3
    assert len(points) == 9


def recorded_calls():
    """Of two layers with a pooling between them, for two images."""
    numpy.random.seed(0)
    model = chainer.Sequential(
        DeformableConvolution2D(
            1, 4, (3, 2), pad=1, offset_initialW=chainer.initializers.Normal(0.5)
        ),
        lambda h: F.max_pooling_2d(h, (3, 2), (2, 1), (1, 0)),
        DeformableConvolution2D(4, 4, 3, stride=2, offset_initial_bias=0.3),
    )
    with SamplingHook(model) as hook:
        model(numpy.random.uniform(-1, 1, (2, 1, 9, 12)).astype('f'))
    return hook.calls


@pytest.mark.parametrize('image', [0, 1])
def test_calls_and_what_lies_between(image):
    below, above = recorded_calls()
    assert below.offset.shape[2:] == (9, 13)
    assert above.x_shape[2:] == (5, 12)
    pooling = sampling_locations(numpy.zeros((1, 12, 5, 12)), (3, 2), (2, 1), (1, 0))
    expected = naive_receptive_points(
        [below.locations()[image], pooling[0], above.locations()[image]], 1, 3
    )
    points = receptive_points([below, ((3, 2), (2, 1), (1, 0)), above], 1, 3, image)
    assert len(points) > 100
    numpy.testing.assert_array_equal(points, expected)


def test_sizes_of_calls_must_fit():
    below, above = recorded_calls()
    message = r'layers\[1\] reads 5 by 12 pixels, but layers\[0\] gives 9 by 13'
    with pytest.raises(ValueError, match=message):
        receptive_points([below, above], 0, 0)
    message = r'layers\[2\] reads 5 by 12 pixels, but layers\[1\] gives 3 by 4'
    with pytest.raises(ValueError, match=message):
        receptive_points([below, (3, 3, 0), above], 0, 0)
    with pytest.raises(ValueError, match='image must be below 2, .*, but is 2'):
        receptive_points([above], 0, 0, image=2)
    with pytest.raises(ValueError, match=r'the size that layers\[0\] gives cannot'):
        receptive_points([(3, 1, 1), below.locations()[0]], 0, 0)
    with pytest.raises(ValueError, match='stride must be at least 1'):
        receptive_points([below, (3, 0, 0), above], 0, 0)


@pytest.mark.parametrize(
    ('layers', 'y', 'x', 'error', 'message'),
    [
        ([], 0, 0, ValueError, 'layers must have at least one'),
        (3 * [[0.0]], 0, 0, TypeError, r'layers\[0\] must be .* not a list'),
        ('last', 0, 5, ValueError, '4 by 5 pixels, but are 0 and 5'),
        ('last', 4, 0, ValueError, '4 by 5 pixels, but are 4 and 0'),
        ('last', -1, 0, ValueError, 'y must be at least 0'),
        ('last', 0, 1.5, TypeError, 'x must be an int'),
        (
            'batch',
            0,
            0,
            type_check.InvalidType,
            r'layers\[0\]\.shape(.|\n)*\(1, 1, 9, 2',
        ),
        (
            'offset',
            0,
            0,
            type_check.InvalidType,
            r'layers\[1\]\.shape(.|\n)*\(18, 4, 5',
        ),
    ],
)
def test_bad_arguments_of_receptive_points(layers, y, x, error, message):
    points = plain_points((4, 5))
    layers = {
        'last': [points],
        'batch': [points[None]],
        'offset': [points, numpy.zeros((18, 4, 5), 'f')],
    }.get(str(layers), layers)
    with pytest.raises(error, match=message):
        receptive_points(layers, y, x)


def test_receptive_points_of_boxes():
    layer = DeformableRoIPooling2D(1, 2, 1.0, 2, fc_size=2)
    with SamplingHook(layer) as hook:
        layer(numpy.ones((1, 1, 4, 5), 'f'), numpy.ones((1, 4), 'f'), numpy.array([0]))
    with pytest.raises(TypeError, match=r'layers\[0\] must be a call of a convolution'):
        receptive_points(hook.calls, 0, 0)


@pytest.mark.gpu
def test_on_a_gpu():
    case = CASES['all']
    device = chainer.get_device('@cupy:0')
    offset = case.arrays()['offset']
    points = sampling_locations(device.send(offset), **options_of(case))
    assert isinstance(points, device.xp.ndarray)
    expected = sampling_locations(offset, **options_of(case))
    numpy.testing.assert_array_equal(points.get(), expected)
    layers = [expected[0], expected[1]]
    numpy.testing.assert_array_equal(
        receptive_points([device.send(layer) for layer in layers], 1, 2).get(),
        receptive_points(layers, 1, 2),
    )
