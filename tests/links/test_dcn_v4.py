import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.links import DCNv4
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
)
from tests.links.test_dcn_v3 import depthwise, first, last, with_center

x = numpy.random.RandomState(0).uniform(-1, 1, (2, 6, 6, 7)).astype('f')

OPTIONS = {
    'plain': {},
    'strides': {'ksize': (3, 1), 'stride': (2, 3), 'dilate': (2, 1)},
    'depthwise': {'ksize': (1, 3), 'dw_ksize': (3, 5), 'stride': (1, 2)},
    'centre': {
        'center_scale': True,
        'remove_center': True,
        'offset_scale': 1.5,
        'stride': (1, 2),
        'output_nobias': True,
    },
    'no projections': {'pointwise': False, 'center_scale': True, 'dw_ksize': 3},
}
every_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)


def make(in_channels=6, **options):
    return DCNv4(in_channels, 6, **{'offset_groups': 3, **options})


def oracle(layer, images):
    parameters, (sy, sx) = arrays_of(layer), layer.stride
    projected, features = images, images[:, :, ::sy, ::sx]
    if layer.pointwise:
        projected = first(linear(last(images), parameters, 'input_proj'))
    if layer.dw_conv is not None:
        features = depthwise(images, parameters, layer.stride)
    predicted = first(linear(last(features), parameters, 'offset_conv'))
    taps = layer.ksize[0] * layer.ksize[1] - layer.remove_center
    y = reference.dcn_v3_2d(
        projected,
        predicted[:, : 3 * 2 * taps],
        predicted[:, 3 * 2 * taps :],
        layer.ksize,
        layer.stride,
        layer.pad,
        layer.dilate,
        offset_groups=3,
        offset_scale=layer.offset_scale,
        remove_center=layer.remove_center,
    )
    if layer.center_scale:
        share = linear(last(y), parameters, 'center_conv')
        y = with_center(y, projected[:, :, ::sy, ::sx], share)
    if layer.pointwise:
        y = first(linear(last(y), parameters, 'output_proj'))
    return y


@every_option
def test_composition(options):
    layer = randomize(make(**options), scale=0.7)
    y = layer(x)
    (sy, sx), (h, w) = layer.stride, x.shape[2:]
    assert y.shape == (2, 6, (h - 1) // sy + 1, (w - 1) // sx + 1)
    assert_close(y.array, oracle(layer, x), 'y')


def test_begins_with_zeros_and_learns_weights_first():
    layer = make(dw_ksize=3)
    assert not layer(x).array.any()
    layer.cleargrads()
    F.sum(layer(x)).backward()
    assert not layer.offset_conv.W.array.any()
    grad = layer.offset_conv.W.grad
    assert not grad[:54].any()
    assert abs(grad[54:]).max() > 1e-4


def test_other_numbers_of_channels():
    layer = randomize(DCNv4(6, 9, offset_groups=3))
    assert_close(layer(x).array, oracle(layer, x), 'y')


def test_empty_batch():
    for options in OPTIONS.values():
        y = make(None, **options)(x[:0])
        assert y.shape[:2] == (0, 6)
        F.sum(y).backward()


@every_option
def test_is_a_link(options, tmp_path):
    check_is_a_link(lambda in_channels=6: make(in_channels, **options), [x], tmp_path)


@every_option
def test_dtypes(options):
    check_dtypes(lambda in_channels=6: make(in_channels, **options), [x])


def test_every_parameter_learns():
    options = {'center_scale': True, 'dw_ksize': 3}
    check_every_parameter_learns(lambda: make(**options), [x])


def test_second_order():
    check_second_order(lambda: make(center_scale=True, stride=2), [x])


def test_describes_itself():
    assert repr(make(dw_ksize=3, pointwise=False)) == (
        'DCNv4(in_channels=6, out_channels=6, ksize=(3, 3), stride=(1, 1), '
        'dilate=(1, 1), offset_groups=3, offset_scale=1.0, center_scale=False, '
        'remove_center=False, pointwise=False, dw_ksize=(3, 3), output_nobias=False)'
    )


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'in_channels': 0}, ValueError, 'in_channels must be at least 1'),
        ({'ksize': (3, 4)}, ValueError, r'ksize must be odd, not \(3, 4\)'),
        ({'offset_groups': 4}, ValueError, 'offset_groups must divide .* 6, but is 4'),
        ({'offset_scale': -1}, ValueError, 'offset_scale must be above 0'),
        ({'dw_ksize': 2}, ValueError, r'dw_ksize must be odd, not \(2, 2\)'),
        ({'center_scale': None}, TypeError, 'center_scale must be True or False'),
        ({'output_nobias': 0}, TypeError, 'output_nobias must be True or False'),
        ({'pointwise': 'no'}, TypeError, 'pointwise must be True or False'),
        (
            {'pointwise': False, 'in_channels': 5},
            ValueError,
            'in_channels must be out_channels, 6, with pointwise=False, not 5',
        ),
    ],
)
def test_options(options, error, message):
    options = {'in_channels': 6, 'out_channels': 6, 'offset_groups': 3, **options}
    with pytest.raises(error, match='^' + message):
        DCNv4(**options)


def test_arguments():
    for layer in make(), make(None, pointwise=False):
        with pytest.raises(InvalidType, match=r'x\.shape == \(n, 6, h, w\)'):
            layer(x[:, 1:])
