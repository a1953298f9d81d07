"""Convolutions of models of all forms, made deformable."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest

from chainer_deform import optimizer_hooks
from chainer_deform.convert import deform_convolutions
from chainer_deform.links import (
    DCNv3,
    DCNv4,
    DeformableConvolution2D,
    DeformablePSRoIPooling2D,
)


def images(*shape):
    return numpy.random.RandomState(3).uniform(-1, 1, shape).astype('f')


class Block(chainer.Chain):
    """A convolution under its name, and in lists and dicts as well."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(4, 4, 1)
            self.conv2 = L.Convolution2D(
                4, 4, (3, 2), (2, 1), (1, 2), dilate=(1, 2), groups=2, nobias=True
            )
            self.norm = L.BatchNormalization(4)
        self.layers = [self.conv1, [self.conv2], (self.norm, F.relu)]
        self.by_name = {'second': self.conv2}
        self.by_name['all'] = self.layers
        self.layers.append(self.by_name)

    def forward(self, x):
        return self.norm(self.by_name['second'](self.layers[0](x)))


class Model(chainer.Chain):
    def __init__(self, in_channels=3):
        super().__init__()
        with self.init_scope():
            self.first = L.Convolution2D(in_channels, 4, 3, pad=1)
            self.blocks = chainer.ChainList(Block(), Block())
            self.dilated = L.DilatedConvolution2D(4, 6, 3, pad=2, dilate=2)
            self.rest = chainer.Sequential(
                F.relu, L.Convolution2D(None, 6, 3), L.Convolution2D(6, 6, 3)
            ).repeat(1)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.rest(self.dilated(h))


def paths_of(model):
    return {
        path.strip('/')
        for path, link in model.namedlinks()
        if isinstance(link, DeformableConvolution2D)
    }


@pytest.mark.parametrize('options', [{}, {'modulated': True, 'offset_groups': 2}])
@pytest.mark.parametrize(
    ('which', 'expected'),
    [
        ('first', {'first'}),
        ('/blocks/*/conv2', {'blocks/0/conv2', 'blocks/1/conv2'}),
        ('blocks/1*', {'blocks/1/conv1', 'blocks/1/conv2'}),
        (['dilated', '*/0/conv1'], {'dilated', 'blocks/0/conv1'}),
        ('rest*', {'rest/0/0', 'rest/0/1'}),
        (lambda path, link: getattr(link, 'ksize', 0) == 3, {
            'first', 'dilated', 'rest/0/0', 'rest/0/1'}),
        ('links', {'blocks/0/conv2', 'first'}),
    ],
)  # fmt: skip
def test_the_output_stays_the_same(which, expected, options):
    model, x = Model(), images(2, 3, 24, 15)
    if which == 'links':
        which = [model.blocks[0].conv2, model.first]
    if 'first' in expected:  # of 3 channels
        options = {**options, 'offset_groups': 1}
    with chainer.using_config('train', False):
        before = model(x).array
    old = dict(model.namedparams())
    found = deform_convolutions(model, which, **options)
    assert found.keys() == expected == paths_of(model)
    with chainer.using_config('train', False):
        numpy.testing.assert_allclose(model(x).array, before, atol=1e-5)
    for path, layer in found.items():
        assert layer.deform_conv.W is old[f'/{path}/W']
        assert layer.deform_conv.b is old.get(f'/{path}/b')
        assert layer.name == path.rpartition('/')[2]
    # What was not chosen is as before, and what was has no other place.
    links = {id(link) for link in model.links()}
    for block in model.blocks:
        assert block.by_name['second'] is block.layers[1][0] is block.conv2
        assert block.layers[0] is block.conv1
        assert id(block.conv2) in links
    # It moves.
    for layer in found.values():
        layer.offset_conv.b.array[...] = 0.4
    with chainer.using_config('train', False):
        assert abs(model(x).array - before).max() > 1e-3


@pytest.mark.parametrize('when', ['before', 'after'])
def test_files_of_the_plain_model(when, tmp_path):
    plain, x = Model(), images(2, 3, 24, 15)
    with chainer.using_config('train', False):
        expected = plain(x).array
    chainer.serializers.save_npz(tmp_path / 'plain.npz', plain)
    model = Model(None if when == 'before' else 3)
    deform_convolutions(model, ['first', 'blocks*', 'rest*'])
    if when == 'after':
        model(x)
    chainer.serializers.load_npz(tmp_path / 'plain.npz', model)
    with chainer.using_config('train', False):
        numpy.testing.assert_allclose(model(x).array, expected, atol=1e-5)
    chainer.serializers.save_npz(tmp_path / 'model.npz', model)
    again = Model()
    deform_convolutions(again, ['first', 'blocks*', 'rest*'])
    chainer.serializers.load_npz(tmp_path / 'model.npz', again)


def test_an_optimizer_goes_on():
    model, x = Model(), images(2, 3, 24, 15)
    model(x)
    optimizer = chainer.optimizers.Adam(0.01).setup(model)
    decay = chainer.optimizer_hooks.WeightDecay(1e-4)
    for parameter in model.params():
        parameter.update_rule.add_hook(decay)

    def step():
        model.cleargrads()
        F.sum(model(x) ** 2).backward()
        optimizer.update()

    step()
    old = model.blocks[0].conv2.W
    state = old.update_rule.state['m'].copy()
    (layer,) = deform_convolutions(model, 'blocks/0/conv2').values()
    assert layer.deform_conv.W is old
    numpy.testing.assert_array_equal(old.update_rule.state['m'], state)
    offset_conv = layer.offset_conv
    rules = [parameter.update_rule for parameter in offset_conv.params()]
    assert {type(rule) for rule in rules} == {type(old.update_rule)}
    assert {rule.t for rule in rules} == {0}
    optimizer_hooks.scale_updates(offset_conv, 0.1)
    hooks = [list(rule._hookable._post_update_hooks) for rule in rules]
    assert hooks[0]
    assert hooks[0] == hooks[1]
    assert not old.update_rule._hookable._post_update_hooks
    for rule in rules:
        assert rule._hookable._pre_update_hooks['WeightDecay'] is decay
    optimizer.alpha = 0.02
    for rule in rules:
        assert rule.hyperparam.alpha == 0.02
    before = [parameter.array.copy() for parameter in layer.params()]
    step()
    for parameter, array in zip(layer.params(), before):
        assert abs(parameter.array - array).max() > 0
    # Adam's first step is alpha long, and this is a tenth of it.
    assert abs(offset_conv.W.array).max() == pytest.approx(0.002, rel=0.1)
    assert rules[0].state['m'] is not rules[1].state['m']


def test_half_precision():
    model = chainer.Sequential(L.Convolution2D(2, 4, 3))
    model[0].W.array = model[0].W.array.astype('float16')
    model[0].b.array = model[0].b.array.astype('float16')
    (layer,) = deform_convolutions(model, '0').values()
    assert {str(parameter.dtype) for parameter in layer.params()} == {'float16'}


def test_resnet():
    model = L.ResNet50Layers(pretrained_model=None)
    x = images(1, 3, 33, 35)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        (before,) = model(x, ['res5']).values()
        found = deform_convolutions(model, 'res5/*/conv2', offset_groups=4)
        (after,) = model(x, ['res5']).values()
    assert sorted(found) == [f'res5/{block}/conv2' for block in ('a', 'b1', 'b2')]
    scale = abs(before.array).max()
    numpy.testing.assert_allclose(after.array, before.array, atol=1e-5 * scale)


def test_layers_that_are_deformable_stay_as_they_are():
    layers = [
        DeformableConvolution2D(3, 4, 3),
        DCNv3(4, 4, dw_ksize=3),
        DCNv4(4, 4, dw_ksize=3, center_scale=True),
        DeformablePSRoIPooling2D(4, 2, 1.0, 2),
    ]
    model = chainer.ChainList(*layers, L.Convolution2D(3, 4, 3))
    inside = [[id(link) for link in layer.links()] for layer in layers]
    assert list(deform_convolutions(model, '*')) == ['4']
    assert [[id(link) for link in layer.links()] for layer in layers] == inside


class Shared(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.a = L.Convolution2D(3, 3, 3)
            self.b = self.a


@pytest.mark.parametrize(
    ('which', 'options', 'error', 'message'),
    [
        ('nosuch', {}, ValueError, "'nosuch' fits no convolution .* has .*first,"),
        (['first', 'no'], {}, ValueError, "'no' fits no convolution"),
        ([], {}, ValueError, 'at least one convolution'),
        (lambda path, link: False, {}, ValueError, 'true of no link'),
        (lambda path, link: 'norm' in path, {}, ValueError,
         "'blocks/0/norm' must be a Convolution2D .* not a BatchNormalization"),
        (L.Convolution2D(3, 3, 3), {}, ValueError, 'a link that the model does not'),
        (3, {}, TypeError, 'which must be a pattern, .* not 3'),
        ([3], {}, TypeError, 'which must have patterns or links, not 3'),
        ('first', {'stride': 2}, TypeError, 'stride cannot be given'),
        ('first', {'nosuch': 2}, TypeError, "'first' cannot be made .*nosuch"),
        (['blocks*', 'first'], {'offset_groups': 2}, ValueError,
         "'first' cannot be made .*offset_groups must divide"),
    ],
)  # fmt: skip
def test_errors_change_nothing(which, options, error, message):
    model = Model()
    links = [(path, id(link)) for path, link in model.namedlinks()]
    with pytest.raises(error, match=message):
        deform_convolutions(model, which, **options)
    assert [(path, id(link)) for path, link in model.namedlinks()] == links


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (chainer.Sequential(L.Deconvolution2D(3, 3, 3)), 'not a Deconvolution2D'),
        (chainer.Sequential(L.ConvolutionND(2, 3, 3, 3)), 'not a ConvolutionND'),
        (
            chainer.Sequential(type('Own', (L.Convolution2D,), {})(3, 3, 3)),
            'not a Own',
        ),
        (Shared(), "'a' is shared: the model has it under the paths a, b"),
        (chainer.Sequential(DeformableConvolution2D(3, 3, 3)), 'has none'),
        (L.Convolution2D(3, 3, 3), 'has none'),
        (DeformableConvolution2D(3, 3, 3), 'has none'),
        (DCNv3(4, 4), 'has none'),
    ],
)
def test_other_links(model, message):
    with pytest.raises(ValueError, match=message):
        deform_convolutions(model, '*')


def test_no_model():
    with pytest.raises(TypeError, match='model must be a chainer.Link, not a list'):
        deform_convolutions([L.Convolution2D(3, 3, 3)], '*')
