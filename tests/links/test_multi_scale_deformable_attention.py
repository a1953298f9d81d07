import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.links import MultiScaleDeformableAttention
from tests import reference
from tests.cases import assert_close
from tests.links.operators import (
    arrays_of,
    check_dtypes,
    check_every_parameter_learns,
    check_is_a_link,
    check_second_order,
    linear,
    randomize,
    softmax,
)

SHAPES = [(4, 5), (2, 3)]
random = numpy.random.RandomState(0)
query = random.uniform(-1, 1, (2, 3, 5)).astype('f')
value = random.uniform(-1, 1, (2, 26, 5)).astype('f')
points = random.uniform(0, 1, (2, 3, 2, 2)).astype('f')
sizes = random.uniform(0.1, 0.5, (2, 3, 2, 2)).astype('f')
boxes = numpy.concatenate([points, sizes], -1)
padding_mask = random.uniform(0, 1, (2, 26)) < 0.4
by_reference = pytest.mark.parametrize(
    'reference_', [points, boxes], ids=['points', 'boxes']
)


def make(in_channels=5, **options):
    options = {'levels': 2, 'heads': 3, 'points': 4, **options}
    return MultiScaleDeformableAttention(in_channels, 6, **options)


@by_reference
@pytest.mark.parametrize('mask', [None, padding_mask], ids=['all', 'padding'])
def test_composition(reference_, mask):
    layer = randomize(make(), scale=0.7)
    parameters = arrays_of(layer)
    values = linear(value, parameters, 'value_fc')
    if mask is not None:
        values[mask] = 0
    offset = linear(query, parameters, 'offset_fc').reshape(2, 3, 3, 2, 4, 2)
    weights = linear(query, parameters, 'weight_fc').reshape(2, 3, 3, 8)
    locations = numpy.empty(offset.shape)
    for at in numpy.ndindex(offset.shape[:-1]):
        image, q, _, level, _ = at
        (h, w), box = SHAPES[level], reference_[image, q, level]
        scale = box[2:] / 2 / 4 if len(box) == 4 else [1 / w, 1 / h]
        locations[at] = box[:2] + offset[at] * scale
    y = reference.multi_scale_deformable_attention(
        values.reshape(2, 26, 3, 2),
        SHAPES,
        locations,
        softmax(weights, -1).reshape(2, 3, 3, 2, 4),
    )
    expected = linear(y, parameters, 'output_fc')
    y = layer(query, reference_, value, SHAPES, mask)
    assert_close(y.array, expected, 'y')


def test_begins_in_all_directions():
    layer = make(heads=6)
    offset = layer.offset_fc(query[0]).array.reshape(3, 6, 2, 4, 2)
    s = 3**-0.5  # of (1 / 2, sqrt(3) / 2), the longer one is 1
    for head, direction in enumerate(
        [(1, 0), (s, 1), (-s, 1), (-1, 0), (-s, -1), (s, -1)]
    ):
        for point in range(4):
            expected = numpy.array(direction) * (point + 1)
            found = offset[:, head, :, point]
            numpy.testing.assert_allclose(
                found, numpy.tile(expected, (3, 2, 1)), atol=1e-6
            )
    assert not layer.weight_fc(query[0]).array.any()
    bound = (6 / (5 + 6)) ** 0.5
    assert 0.8 * bound < abs(layer.value_fc.W.array).max() <= bound


def test_references_pass_gradients():
    for reference_ in points, boxes:
        variable = chainer.Variable(reference_)
        F.sum(randomize(make())(query, variable, value, SHAPES) ** 2).backward()
        assert abs(variable.grad).min() > 0


def test_padding_may_hold_anything():
    layer = randomize(make())
    expected = layer(query, points, value, SHAPES, padding_mask).array
    spoilt = value.copy()
    spoilt[padding_mask] = numpy.nan
    y = layer(query, points, spoilt, SHAPES, padding_mask)
    numpy.testing.assert_array_equal(y.array, expected)


def test_locations_in_float32():
    """In float16 they would be off by 0.12 pixels, at 1000 pixels."""
    with chainer.using_config('dtype', numpy.dtype('float16')):
        layer = MultiScaleDeformableAttention(1, 1, levels=1, heads=1, points=1)
    for fc in layer.value_fc, layer.output_fc:
        fc.W.array[...] = 1
    layer.offset_fc.b.array[...] = 0.25, 0
    ramp = numpy.zeros((1, 1000, 1), 'float16')
    ramp[0, 800:, 0] = numpy.arange(200)
    reference_ = numpy.array([[[[0.8505, 0.5]]]], 'f')
    y = layer(numpy.zeros((1, 1, 1), 'float16'), reference_, ramp, [(1, 1000)])
    assert y.array.item() == pytest.approx(850.5 + 0.25 - 0.5 - 800, abs=0.02)


def test_empty():
    for in_channels in 5, None:
        y = make(in_channels)(query[:, :0], points[:, :0], value, SHAPES)
        assert y.shape == (2, 0, 6)
        F.sum(y).backward()
        y = make(in_channels)(query[:0], boxes[:0], value[:0], SHAPES, padding_mask[:0])
        assert y.shape == (0, 3, 6)
        F.sum(y).backward()


@by_reference
def test_is_a_link(reference_, tmp_path):
    check_is_a_link(make, [query, reference_, value, SHAPES], tmp_path)


@by_reference
def test_dtypes(reference_):
    check_dtypes(make, [query, reference_, value, SHAPES, padding_mask])


def test_every_parameter_learns():
    check_every_parameter_learns(make, [query, points, value, SHAPES])


@by_reference
def test_second_order(reference_):
    check_second_order(make, [query, reference_, value, SHAPES], count=3)


def test_describes_itself():
    assert repr(make()) == (
        'MultiScaleDeformableAttention(in_channels=5, out_channels=6, levels=2, '
        'heads=3, points=4)'
    )


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'in_channels': 0}, ValueError, 'in_channels must be at least 1'),
        ({'levels': 0}, ValueError, 'levels must be at least 1'),
        ({'heads': 4}, ValueError, 'heads must divide out_channels, 6, but is 4'),
        ({'points': 1.5}, TypeError, 'points must be an int'),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match='^' + message):
        make(**options)


@pytest.mark.parametrize(
    ('changed', 'error', 'message'),
    [
        ({'query': query[0]}, InvalidType, r'query\.shape == \(n, q, in_channels\)'),
        ({'query': query[..., 1:]}, InvalidType, r'query\.shape == \(2, 3, 5\)'),
        ({'query': query.tolist()}, TypeError, 'query must be a Variable or'),
        ({'value': value[:, 1:]}, InvalidType, r'value\.shape == \(2, 26, 5\)'),
        ({'value': value[:1]}, InvalidType, r'value\.shape == \(2, 26, 5\)'),
        ({'value': value.astype(int)}, InvalidType, r'value\.dtype is float'),
        (
            {'reference': points[..., :1]},
            InvalidType,
            r'reference\.shape == \(2, 3, 2, 2\) or \(2, 3, 2, 4\)\n.*\(2, 3, 2, 1\)',
        ),
        ({'reference': points[:, :, :1]}, InvalidType, r'reference\.shape == \(2, 3'),
        ({'shapes': SHAPES[:1]}, ValueError, 'shapes must have 2 pairs, .* not 1'),
        ({'shapes': 3}, TypeError, 'shapes must be a sequence of pairs'),
        (
            {'padding_mask': padding_mask[:, 1:]},
            InvalidType,
            r'padding_mask\.shape == \(2, 26\)',
        ),
        (
            {'padding_mask': padding_mask.astype('f')},
            InvalidType,
            r'padding_mask\.dtype == bool',
        ),
        ({'padding_mask': [1]}, TypeError, 'padding_mask must be a Variable or'),
    ],
)
def test_arguments(changed, error, message):
    arguments = {'query': query, 'reference': points, 'value': value, 'shapes': SHAPES}
    with pytest.raises(error, match=message):
        make()(**{**arguments, **changed})
