import math

import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.links import DCNv3
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
    sigmoid,
    softmax,
)

x = numpy.random.RandomState(0).uniform(-1, 1, (2, 5, 6, 7)).astype('f')

OPTIONS = {
    'plain': {},
    'strides': {'ksize': (3, 1), 'stride': (2, 3), 'dilate': (2, 1), 'dw_ksize': 1},
    'centre': {
        'ksize': 3,
        'center_scale': True,
        'remove_center': True,
        'offset_scale': 1.5,
        'stride': (1, 2),
    },
    'large': {'ksize': (5, 3), 'dw_ksize': (3, 5), 'center_scale': True},
}
every_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)


def make(in_channels=5, **options):
    return DCNv3(in_channels, 6, **{'offset_groups': 3, **options})


def depthwise(images, parameters, stride):
    """A depthwise convolution, padded by half a kernel."""
    W, b = parameters['dw_conv/W'], parameters['dw_conv/b']
    _, c, kh, kw = W.shape
    n, _, h, w = images.shape
    pads = [(0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)]
    padded = numpy.pad(images.astype(float), pads)
    y = numpy.zeros((n, c, h, w)) + b[:, None, None]
    for i, j in numpy.ndindex(kh, kw):
        y += W[0, :, i, j, None, None] * padded[:, :, i : i + h, j : j + w]
    return y[:, :, :: stride[0], :: stride[1]]


def last(images):
    return images.transpose(0, 2, 3, 1)


def first(images):
    return images.transpose(0, 3, 1, 2)


def gelu(array):
    return array * (1 + numpy.vectorize(math.erf)(array / math.sqrt(2))) / 2


def with_center(y, centers, share):
    share = first(sigmoid(share)).repeat(y.shape[1] // share.shape[-1], axis=1)
    return (1 - share) * y + share * centers


def oracle(layer, images):
    parameters, (sy, sx) = arrays_of(layer), layer.stride
    projected = first(linear(last(images), parameters, 'input_proj'))
    rows = last(depthwise(images, parameters, layer.stride))
    deviation = rows - rows.mean(-1, keepdims=True)
    rows = deviation / numpy.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-6)
    rows = gelu(rows * parameters['norm/gamma'] + parameters['norm/beta'])
    mask = linear(rows, parameters, 'mask_conv')
    groups = mask.reshape(*mask.shape[:3], layer.offset_groups, -1)
    mask = softmax(groups, -1).reshape(mask.shape)
    y = reference.dcn_v3_2d(
        projected,
        first(linear(rows, parameters, 'offset_conv')),
        first(mask),
        layer.ksize,
        layer.stride,
        layer.pad,
        layer.dilate,
        offset_groups=layer.offset_groups,
        offset_scale=layer.offset_scale,
        remove_center=layer.remove_center,
    )
    if layer.center_scale:
        share = linear(rows, parameters, 'center_conv')
        y = with_center(y, projected[:, :, ::sy, ::sx], share)
    return first(linear(last(y), parameters, 'output_proj'))


@every_option
def test_composition(options):
    layer = randomize(make(**options), scale=0.7)
    y = layer(x)
    (sy, sx), (h, w) = layer.stride, x.shape[2:]
    assert y.shape == (2, 6, (h - 1) // sy + 1, (w - 1) // sx + 1)
    assert_close(y.array, oracle(layer, x), 'y')


class TestDefaults:
    def test_begins_as_a_mean(self):
        """Of what a plain 3 x 3 kernel reads, between the two projections."""
        layer = make()
        expected = F.average_pooling_2d(layer.input_proj(x), 3, 1, 1)
        expected = layer.output_proj(expected).array
        assert abs(expected).max() > 0.1
        assert_close(layer(x).array, expected, 'y')

    def test_centre_begins_with_half(self):
        layer = make(center_scale=True)
        projected = layer.input_proj(x)
        mean = (F.average_pooling_2d(projected, 3, 1, 1) + projected) / 2
        assert_close(layer(x).array, layer.output_proj(mean).array, 'y')

    def test_offsets_learn_from_the_first_step(self):
        layer = make()
        layer.cleargrads()
        F.sum(layer(x) ** 2).backward()
        for conv in layer.offset_conv, layer.mask_conv:
            assert not conv.W.array.any()
            assert not conv.b.array.any()
            assert abs(conv.W.grad).max() > 1e-4

    def test_initial_values(self):
        layer = DCNv3(64, 32)
        bound = math.sqrt(6 / (64 + 32))
        W = layer.input_proj.W.array
        assert 0.98 * bound < abs(W).max() <= bound
        assert layer.dw_conv.W.array.std() == pytest.approx(1 / 3, rel=0.1)
        for name, param in layer.namedparams():
            if name.endswith('/b') or name == '/norm/beta':
                assert not param.array.any(), name


def test_size_of_the_image_does_not_matter():
    layer = randomize(make())
    for shape in (1, 1), (1, 4), (9, 1):
        images = x[:, :, :1, :1] * numpy.ones((1, 1, *shape), 'f')
        assert_close(layer(images).array, oracle(layer, images), 'y')
    y = make(None)(x[:0])
    assert y.shape == (0, 6, 6, 7)
    F.sum(y).backward()


def test_layer_normalisation_in_half_precision():
    """Its squares would overflow; the mean of 300 and -300 is 0, its deviation 300."""
    with chainer.using_config('dtype', numpy.dtype('float16')):
        layer = make()
    layer.dw_conv.W.array[...] = 0
    layer.dw_conv.b.array[...] = [300, -300, 300, -300, 0]
    seen = []

    class Record(chainer.LinkHook):
        def forward_preprocess(self, args):
            seen.extend(args.args if args.link is layer.offset_conv else [])

    with Record():
        layer(x.astype('float16'))
    expected = gelu(numpy.array([1, -1, 1, -1, 0]) * math.sqrt(5 / 4))
    (features,) = seen
    numpy.testing.assert_allclose(features.array[0, :, 2, 3], expected, atol=2e-3)


def test_is_a_link(tmp_path):
    check_is_a_link(
        lambda in_channels=5: make(in_channels, center_scale=True), [x], tmp_path
    )


@every_option
def test_dtypes(options):
    check_dtypes(lambda in_channels=5: make(in_channels, **options), [x])


def test_every_parameter_learns():
    check_every_parameter_learns(lambda: make(center_scale=True), [x])


def test_second_order():
    check_second_order(lambda: make(center_scale=True, stride=2), [x])


def test_describes_itself():
    assert repr(make(ksize=(3, 1))) == (
        'DCNv3(in_channels=5, out_channels=6, ksize=(3, 1), stride=(1, 1), '
        'dilate=(1, 1), offset_groups=3, offset_scale=1.0, center_scale=False, '
        'remove_center=False, dw_ksize=(3, 1))'
    )


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'in_channels': 0}, ValueError, 'in_channels must be at least 1'),
        ({'out_channels': None}, TypeError, 'out_channels must be an int'),
        ({'ksize': 2}, ValueError, r'ksize must be odd, not \(2, 2\)'),
        ({'ksize': 'a'}, TypeError, 'ksize must be an int or a pair'),
        ({'stride': 0}, ValueError, 'stride must be at least 1'),
        ({'dilate': 0}, ValueError, 'dilate must be at least 1'),
        ({'offset_groups': 4}, ValueError, 'offset_groups must divide .* 6, but is 4'),
        ({'offset_scale': 0}, ValueError, 'offset_scale must be above 0'),
        ({'dw_ksize': (3, 4)}, ValueError, r'dw_ksize must be odd, not \(3, 4\)'),
        ({'dw_ksize': 0}, ValueError, 'dw_ksize must be at least 1'),
        ({'center_scale': 1}, TypeError, 'center_scale must be True or False'),
        ({'remove_center': 1}, TypeError, 'remove_center must be True or False'),
        ({'remove_center': True, 'ksize': 1}, ValueError, 'ksize must be square and'),
        ({'remove_center': True, 'ksize': (3, 5)}, ValueError, 'ksize must be square'),
    ],
)
def test_options(options, error, message):
    options = {'in_channels': 5, 'out_channels': 6, 'offset_groups': 3, **options}
    with pytest.raises(error, match='^' + message):
        DCNv3(**options)


@pytest.mark.parametrize(
    ('images', 'error', 'message'),
    [
        (x[:, 1:], InvalidType, r'x\.shape == \(n, 5, h, w\)\n.*\(2, 4, 6, 7\)'),
        (x[0], InvalidType, r'x\.shape == \(n, 5, h, w\)'),
        (x.astype(int), InvalidType, r'x\.dtype == int64'),
        (x.tolist(), TypeError, 'x must be a Variable or an array, not a list'),
    ],
)
def test_arguments(images, error, message):
    with pytest.raises(error, match=message):
        make()(images)
