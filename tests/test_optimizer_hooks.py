import copy

import chainer
import chainer.functions as F
import numpy
import pytest

from chainer_deform import links
from chainer_deform.optimizer_hooks import scale_updates

x = numpy.random.RandomState(0).uniform(-1, 1, (2, 3, 6, 7)).astype('f')


def steps_of(layer, optimizer, steps=1):
    """How far each parameter has moved after some steps."""
    dtype = layer.deform_conv.W.dtype
    before = {name: param.array.copy() for name, param in layer.namedparams()}
    for _ in range(steps):
        optimizer.update(lambda: F.sum(layer(x.astype(dtype)) ** 2))
    return {name: param.array - before[name] for name, param in layer.namedparams()}


def make_layer():
    numpy.random.seed(0)
    return links.DeformableConvolution2D(
        3, 4, 3, pad=1, offset_initialW=chainer.initializers.Normal(0.1)
    )


@pytest.mark.parametrize(
    'make_optimizer',
    [
        lambda: chainer.optimizers.SGD(0.01),
        lambda: chainer.optimizers.Adam(0.01),
        lambda: chainer.optimizers.MomentumSGD(0.01),
        chainer.optimizers.AdaDelta,
    ],
)
def test_scales_the_update_of_any_optimizer(make_optimizer):
    layer = make_layer()
    scaled_layer = copy.deepcopy(layer)
    plain = steps_of(layer, make_optimizer().setup(layer))
    optimizer = make_optimizer().setup(scaled_layer)
    scale_updates(scaled_layer.offset_conv, 0.1)
    scaled = steps_of(scaled_layer, optimizer)
    for name, step in plain.items():
        factor = 0.1 if 'offset_conv' in name else 1
        assert numpy.abs(step).max() > 0, name
        numpy.testing.assert_allclose(
            scaled[name], factor * step, rtol=1e-3, atol=1e-7, err_msg=name
        )


def test_follows_a_schedule():
    layer = make_layer()
    optimizer = chainer.optimizers.SGD(0.01).setup(layer)
    scale_updates(layer.offset_conv, 0.5)
    twin = copy.deepcopy(layer)
    optimizer.lr = 0.001
    step = steps_of(layer, optimizer)['/offset_conv/W']
    twin_optimizer = chainer.optimizers.SGD(0.0005).setup(twin)
    expected = steps_of(twin, twin_optimizer)['/offset_conv/W']
    numpy.testing.assert_allclose(step, expected, rtol=1e-3, atol=1e-7)


def test_later_call_replaces_the_factor():
    layer = make_layer()
    optimizer = chainer.optimizers.SGD(0.01).setup(layer)
    for factor in 0.5, 0:
        scale_updates(layer.offset_conv, factor)
    moved = steps_of(layer, optimizer, steps=2)
    assert not moved['/offset_conv/W'].any()
    assert moved['/deform_conv/W'].any()


def test_layer_initialised_later():
    layer = links.DeformableConvolution2D(None, 4, 3, pad=1)
    optimizer = chainer.optimizers.SGD(0.01).setup(layer)
    scale_updates(layer.offset_conv, 0)
    for _ in range(2):
        optimizer.update(lambda: F.sum(layer(x) ** 2))
    assert not layer.offset_conv.W.array.any()


def test_half_precision_with_float32_updates():
    with chainer.using_config('dtype', numpy.float16):
        layer = make_layer()
    optimizer = chainer.optimizers.SGD(0.01)
    optimizer.use_fp32_update()
    optimizer.setup(layer)
    scale_updates(layer.offset_conv, 0)
    moved = steps_of(layer, optimizer)
    assert layer.offset_conv.W.dtype == numpy.float16
    assert not moved['/offset_conv/W'].any()
    assert moved['/deform_conv/W'].any()


@pytest.mark.parametrize('factor', [-0.1, float('nan'), float('inf')])
def test_impossible_factor(factor):
    layer = make_layer()
    chainer.optimizers.SGD().setup(layer)
    with pytest.raises(ValueError, match='factor must be a finite number'):
        scale_updates(layer.offset_conv, factor)


def test_no_optimizer():
    with pytest.raises(ValueError, match=r'call optimizer\.setup'):
        scale_updates(make_layer().offset_conv, 0.1)


def test_the_hooks_repr_is_short():
    layer = make_layer()
    chainer.optimizers.SGD(0.01).setup(layer)
    scale_updates(layer.offset_conv, 0.5)
    hooks = layer.offset_conv.W.update_rule._hookable._pre_update_hooks
    assert repr(hooks['scale_updates_pre']) == (
        '<bound method _UpdateScale.before of scale_updates(0.5)>'
    )
