"""The hook records what every deformable layer is called with."""

import gc
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest

import chainer_deform
from chainer_deform import sampling_locations
from chainer_deform.link_hooks import SamplingHook, named_layers
from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler

x = numpy.random.RandomState(0).uniform(-1, 1, (2, 3, 9, 7)).astype('f')


class Model(chainer.Chain):
    """Two deformable layers and one that is given zero offsets."""

    def __init__(self):
        super().__init__()
        noise = {'offset_initialW': chainer.initializers.Normal(0.1)}
        with self.init_scope():
            self.convs = chainer.ChainList(
                L.Convolution2D(3, 4, 3, pad=1),
                DeformableConvolution2D(
                    4,
                    4,
                    (3, 2),
                    (2, 1),
                    (1, 0),
                    dilate=(1, 2),
                    offset_groups=2,
                    **noise,
                ),
                DeformableConvolution2D(4, 6, 3, modulated=True, **noise),
            )
            self.sampler = DeformableConvolution2DSampler(6, 2, 1)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        zeros = numpy.zeros((len(x), 2, *x.shape[2:]), 'f')
        return self.sampler(offset=zeros, x=x, mask=None)


@pytest.fixture
def model():
    numpy.random.seed(0)
    return Model()


def test_records_every_call(model):
    with SamplingHook(model) as hook:
        model(x)
    first, second, third = hook.calls
    assert [call.name for call in hook.calls] == ['convs/1', 'convs/2', 'sampler']
    assert [call.link for call in hook.calls] == [
        model.convs[1].deform_conv,
        model.convs[2].deform_conv,
        model.sampler,
    ]
    assert [call.x_shape for call in hook.calls] == [
        (2, 4, 9, 7),
        (2, 4, 5, 5),
        (2, 6, 3, 3),
    ]
    h = F.relu(model.convs[0](x))
    numpy.testing.assert_array_equal(first.offset, model.convs[1].offset_conv(h).array)
    assert first.mask is None
    h = F.relu(model.convs[1](h))
    offset, mask = F.split_axis(model.convs[2].offset_conv(h), [18], 1)
    numpy.testing.assert_array_equal(second.offset, offset.array)
    numpy.testing.assert_array_equal(second.mask, F.sigmoid(mask).array)
    assert third.mask is None
    numpy.testing.assert_array_equal(third.offset, numpy.zeros((2, 2, 3, 3)))


def test_locations(model):
    with SamplingHook(model) as hook:
        model(x)
    for call, options in zip(
        hook.calls,
        (
            {
                'ksize': (3, 2),
                'stride': (2, 1),
                'pad': (1, 0),
                'dilate': (1, 2),
                'offset_groups': 2,
            },
            {'ksize': 3},
            {'ksize': 1},
        ),
    ):
        numpy.testing.assert_array_equal(
            call.locations(), sampling_locations(call.offset, **options)
        )


def test_centre_is_the_mean_of_the_grid(model):
    with SamplingHook(model) as hook:
        model(x)
    for call in hook.calls:
        plain = sampling_locations(
            numpy.zeros_like(call.offset),
            call.link.ksize,
            call.link.stride,
            call.link.pad,
            call.link.dilate,
            call.link.offset_groups,
        )
        y, x_ = call.offset.shape[2] - 1, 1
        numpy.testing.assert_allclose(
            call.centre(y, x_), plain[0, :, :, :, y, x_].mean(axis=(0, 1))
        )


def test_keeps_arrays_and_not_the_graph():
    layer = DeformableConvolution2DSampler(3, 2, 1)
    offset = chainer.Variable(numpy.zeros((2, 2, 9, 7), 'f'))
    with SamplingHook(layer) as hook:
        y = layer(x, offset)
    (call,) = hook.calls
    assert call.offset is offset.array
    node = weakref.ref(y.creator)
    del y
    gc.collect()
    assert node() is None


def test_repeated_calls_and_calls_outside(model):
    hook = SamplingHook(model)
    with hook:
        model(x)
        model(x[:1])
    model(x)
    assert [len(call.offset) for call in hook.calls] == [2, 2, 2, 1, 1, 1]


def test_on_one_link(model):
    hook = SamplingHook(model)
    model.convs[2].deform_conv.add_hook(hook)
    model(x)
    assert [call.name for call in hook.calls] == ['convs/2']
    model.convs[2].deform_conv.delete_hook(hook.name)
    model(x)
    assert len(hook.calls) == 1


def test_names_without_a_model(model):
    with SamplingHook() as hook:
        model(x)
    assert [call.name for call in hook.calls] == [
        'deform_conv',
        'deform_conv',
        'sampler',
    ]


def test_layers_of_other_models_are_not_recorded(model):
    other = Model()
    with SamplingHook(other) as hook:
        model(x)
        other(x)
    assert [call.link for call in hook.calls] == list(named_layers(other).values())


@pytest.mark.parametrize(
    'layer',
    [DeformableConvolution2D(3, 2, 3), DeformableConvolution2DSampler(3, 2, 3)],
)
def test_model_is_one_layer(layer):
    assert list(named_layers(layer)) == ['']


def test_layer_used_in_two_places_has_one_name():
    layer = DeformableConvolution2D(3, 3, 3, pad=1)
    model = chainer.Chain()
    with model.init_scope():
        model.a = layer
        model.b = layer
    assert named_layers(model) == {'a': layer.deform_conv}
    with SamplingHook(model) as hook:
        model.b(model.a(x))
    assert [call.name for call in hook.calls] == ['a', 'a']


def test_call_that_fails_is_not_recorded(model):
    with SamplingHook(model) as hook, pytest.raises(TypeError, match='mask must'):
        model.sampler(x[:, :2], numpy.zeros((2, 2, 9, 7), 'f'), 'no mask')
    assert hook.calls == []


def test_several_hooks():
    model = Model()
    on_a_link = SamplingHook()
    model.convs[1].deform_conv.add_hook(on_a_link)
    with SamplingHook(model) as outer, SamplingHook(model) as inner:
        model(x)
    assert len(on_a_link.calls) == 1
    names = [call.name for call in outer.calls]
    assert names == [call.name for call in inner.calls] != []


def test_layer_whose_sampler_has_a_name_of_its_own():
    class Both(chainer.Chain):
        def __init__(self):
            super().__init__()
            layer = DeformableConvolution2D(1, 1, 3)
            with self.init_scope():
                self.a = layer.deform_conv
                self.z = layer

    assert list(named_layers(Both())) == ['z']


class OfChainer(chainer.Chain):
    """A plain convolution, and six layers of Chainer's own class or of ours."""

    def __init__(self, layer=L.DeformableConvolution2D):
        super().__init__()
        with self.init_scope():
            self.plain = L.Convolution2D(3, 3, 3, pad=1)
            self.layers = chainer.ChainList(*(layer(3, 3, 3, pad=1) for _ in range(6)))

    def forward(self, x):
        x = self.plain(x)
        for layer in self.layers:
            x = layer(x)
        return x


OWN = (
    "SamplingHook: nothing is seen of deformable layers of Chainer's own class "
    r'\(%s\): call chainer_deform\.patch_chainer\(\) before the model is built'
)


def test_layers_of_chainers_own_class():
    model = OfChainer()
    paths = "'layers/0', 'layers/1', 'layers/2', 'layers/3' and 2 more"
    with pytest.warns(UserWarning, match=OWN % paths) as caught:
        hook = SamplingHook(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with hook:
        model(x)
    assert hook.calls == []
    sampler = model.layers[0].deform_conv
    with pytest.warns(UserWarning, match=OWN % "''"):
        SamplingHook(sampler)


def test_layers_of_chainers_own_class_without_a_model():
    model = OfChainer()
    with pytest.warns(UserWarning, match=OWN % "'deform_conv'") as caught:  # noqa: SIM117
        with SamplingHook() as hook:
            model(x)
    assert len(caught) == 1
    assert hook.calls == []


def test_patched_and_mixed_models():
    chainer_deform.patch_chainer()
    try:
        model = OfChainer(L.DeformableConvolution2D)
        SamplingHook(model)
    finally:
        chainer_deform.unpatch_chainer()
    model.layers[2] = L.DeformableConvolution2D(3, 3, 3, pad=1)
    with pytest.warns(UserWarning, match=OWN % "'layers/2'"), SamplingHook(model):
        pass
    with SamplingHook() as hook:
        model(x)
    assert len(hook.calls) == 5


def test_layer_with_something_else_in_the_place_of_its_sampler():
    layer = DeformableConvolution2D(3, 3, 3)
    del layer.deform_conv
    layer.deform_conv = L.Convolution2D(3, 3, 3)
    assert named_layers(layer) == {}


def test_no_deformable_layer():
    model = OfChainer(L.Convolution2D)
    message = 'SamplingHook: no layer of chainer_deform.links .* is in the model'
    with pytest.warns(UserWarning, match=message) as caught:
        hook = SamplingHook(model)
    assert len(caught) == 1
    with hook:
        model(x)
    message = 'SamplingHook: no layer of chainer_deform.links .* was called'
    hook = SamplingHook()
    with pytest.warns(UserWarning, match=message), hook:
        model(x)
    with hook:  # and no warning again
        model(x)
    # Nothing is added to an error.
    with pytest.raises(ZeroDivisionError), SamplingHook():
        raise ZeroDivisionError
