"""The hook records what every deformable layer is called with."""

import gc
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest

import chainer_deform
from chainer_deform import _composed, links, sampling_locations
from chainer_deform.functions import multi_scale_deformable_attention
from chainer_deform.link_hooks import (
    AttentionSamplingCall,
    RoISamplingCall,
    SamplingCall,
    SamplingHook,
    named_layers,
)
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


def test_reprs_are_short(model):
    # At the prompt and in notebooks, where the arrays would fill the screen.
    with SamplingHook(model) as hook, SamplingHook() as all_layers:
        model(x)
    layers = "['convs/1', 'convs/2', 'sampler']"
    assert repr(hook) == f'SamplingHook(layers={layers}, calls=3)'
    assert repr(all_layers) == "SamplingHook(layers='all', calls=3)"
    assert repr(hook.calls[:2]) == (
        "[SamplingCall(name='convs/1', link=DeformableConvolution2DSampler, "
        'x_shape=(2, 4, 9, 7), offset=float32 (2, 24, 5, 5), mask=None), '
        "SamplingCall(name='convs/2', link=DeformableConvolution2DSampler, "
        'x_shape=(2, 4, 5, 5), offset=float32 (2, 18, 3, 3), '
        'mask=float32 (2, 9, 3, 3))]'
    )

    many = SamplingHook(
        chainer.ChainList(*map(DeformableConvolution2D, *[range(1, 8)] * 3))
    )
    assert repr(many) == (
        "SamplingHook(layers=['0', '1', '2', '3', ... 3 more], calls=0)"
    )


def randomized(layer, scale=0.5):
    """The layer with parameters of which none is zero."""
    random = numpy.random.RandomState(1)
    for parameter in layer.params():
        parameter.array[...] = random.uniform(-scale, scale, parameter.shape)
    return layer


def recorded(layer, *args, **kwargs):
    """The output and the only record of a call, by a hook on the layer alone."""
    hook = SamplingHook()
    layer.add_hook(hook)
    y = layer(*args, **kwargs)
    assert not _composed._local.watchers
    layer.delete_hook(hook.name)
    (call,) = hook.calls
    return y.array, call


@pytest.mark.parametrize('kind', [links.DCNv3, links.DCNv4])
def test_layers_with_taps(kind):
    options = {'offset_groups': 2, 'offset_scale': 1.5, 'remove_center': True}
    layer = randomized(kind(3, 4, 3, (2, 1), (1, 2), **options))
    _, call = recorded(layer, x)
    assert type(call) is SamplingCall
    assert call.link is layer
    assert call.x_shape == (2, 3, 9, 7)
    assert call.offset.shape == (2, 2 * 2 * 8, 5, 7)
    assert call.mask.shape == (2, 2 * 8, 5, 7)
    if kind is links.DCNv3:
        taps = call.mask.reshape(2, 2, 8, 5, 7)
        numpy.testing.assert_allclose(taps.sum(axis=2), 1, rtol=1e-5)
    expected = sampling_locations(call.offset, 3, (2, 1), (1, 2), (1, 2), **options)
    points = call.locations()
    numpy.testing.assert_array_equal(points, expected)
    assert points.shape == (2, 2, 8, 2, 5, 7)
    plain = sampling_locations(0 * call.offset, 3, (2, 1), (1, 2), (1, 2), **options)
    for axis, moves in enumerate(call.moves()):
        there = (points - plain)[:, :, :, axis].swapaxes(0, 1)
        numpy.testing.assert_allclose(moves.ravel(), there.ravel(), atol=1e-5)
    assert call.centre(1, 2) == tuple(plain[0, 0, :, :, 1, 2].mean(axis=0))


def ramps(h, w):
    """An image of rows and one of columns."""
    return numpy.stack(numpy.indices((h, w), 'f'))[None]


BOXES = numpy.array([[10, 20, 60, 90], [30, 20, 75, 140], [40, 40, 40, 80]], 'f')
INDICES = numpy.array([0, 1, 1], 'i')


@pytest.mark.parametrize('ratio', [2, (3, 1), None])
@pytest.mark.parametrize('aligned', [True, False])
def test_samples_of_boxes(ratio, aligned):
    """Where an image is its own rows and columns, a bin is the mean of its places."""
    layer = links.DeformableRoIPooling2D(
        2, (3, 2), 0.1, ratio, modulated=False, fc_size=4, gamma=0.3, aligned=aligned
    )
    layer = randomized(layer, 0.2)
    images = numpy.repeat(ramps(20, 24), 2, axis=0)
    y, call = recorded(layer, images, rois=BOXES, roi_indices=INDICES)
    assert type(call) is RoISamplingCall
    assert call.x_shape == images.shape
    assert call.rois is BOXES
    assert call.roi_indices is INDICES
    assert call.offset.shape == (3, 2, 3, 2)
    assert abs(call.offset).max() > 0.1
    boxes = call.locations()
    counts = [points.shape[3] for points in boxes]
    last = 0 if aligned else 2  # it has no height, or one pixel
    assert counts == {2: [4, 4, 4], (3, 1): [3, 3, 3], None: [8, 12, last]}[ratio]
    for box, points in zip(y, boxes):
        assert points.shape == (1, 3, 2, points.shape[3], 2)
        if points.size:
            expected = points[0].mean(axis=2).transpose(2, 0, 1)
            numpy.testing.assert_allclose(box, expected, atol=1e-4)


def test_moves_and_centres_of_bins():
    layer = links.DeformableRoIPooling2D(2, (3, 2), 0.1, 2, fc_size=4, gamma=0.5)
    bias = layer.offset_fc[-1].b.array.reshape(2, 3, 2)
    bias[0], bias[1, 1] = 0.25, -3
    _, call = recorded(layer, numpy.repeat(ramps(9, 14), 2, axis=0), BOXES, INDICES)
    y, x_ = (moves[:, 0] for moves in call.moves())
    numpy.testing.assert_allclose(x_[:2, 0, 0], [0.5 * 0.25 * 7, 0.5 * 0.25 * 12])
    assert not y[:, ::2].any()
    numpy.testing.assert_allclose(y[:2, 1, 0], [0.5 * -3 * 5, 0.5 * -3 * 4.5])
    # Bins of 5 / 3 by 3.5 pixels, from 0.5 and 1.5 on
    expected = 0.5 + 5 / 3 / 2, 1.5 + 3.5 / 2
    numpy.testing.assert_allclose(call.centres()[0, 0, 0], expected, rtol=1e-6)
    assert call.centres().shape == (3, 3, 2, 2)
    share = call.outside()
    assert (share[:2, 0, 1] == 1).all()  # rows -8 to -4
    assert not share[:, 0, ::2].any()


def test_samples_of_position_sensitive_boxes():
    layer = links.DeformablePSRoIPooling2D(
        8, (3, 2), 0.1, 2, part_size=(2, 1), sampling_ratio=(3, 2), classes=2
    )
    layer = randomized(layer)
    images = ramps(20, 24).repeat(4, axis=1).repeat(2, axis=0)  # for each cell
    features = numpy.random.RandomState(0).uniform(-4, 4, images.shape).astype('f')
    y, call = recorded(layer, images, BOXES, INDICES, features)
    assert type(call) is RoISamplingCall
    assert call.offset.shape == (3, 4, 2, 1)
    boxes = call.locations()
    assert [points.shape for points in boxes] == 3 * [(2, 3, 2, 6, 2)]
    for box, points in zip(y, boxes):
        for axis in (0, 1):  # the class of rows and that of columns
            expected = points[axis, ..., axis].mean(axis=-1)
            numpy.testing.assert_allclose(box[axis], expected, atol=1e-4)
    assert not call.outside().any()

    corner = numpy.array([[0, 0, 10, 10]], 'f')
    layer.offset_conv.b.array[...] = -20
    _, call = recorded(layer, images, corner, INDICES[:1])
    assert (call.outside() > 0).any()
    assert (call.locations()[0] < -0.5).any()  # where they would be read


def test_points_of_attention():
    """At the start head 0 looks to the right, head 1 to the left."""
    layer = links.MultiScaleDeformableAttention(4, 6, levels=2, heads=2, points=3)
    shapes = [(4, 6), (2, 3)]
    query, value = (numpy.ones((1, count, 4), 'f') for count in (5, 30))
    reference = numpy.random.RandomState(0).uniform(0, 1, (1, 5, 2, 2)).astype('f')
    y, call = recorded(layer, query, reference, value, shapes)
    assert type(call) is AttentionSamplingCall
    assert call.link is layer
    assert call.shapes == shapes
    assert call.reference is reference
    numpy.testing.assert_allclose(call.weights, numpy.full((1, 5, 2, 2, 3), 1 / 6))
    for level, (points, (h, w)) in enumerate(zip(call.locations(), shapes)):
        assert points.shape == (1, 5, 2, 3, 2)
        rows = numpy.broadcast_to(
            reference[:, :, None, None, level, 1] * h - 0.5, points.shape[:-1]
        )
        numpy.testing.assert_allclose(points[..., 0], rows, atol=1e-5)
        steps = numpy.array([[1, 2, 3], [-1, -2, -3]])
        columns = reference[:, :, None, None, level, 0] * w - 0.5 + steps
        numpy.testing.assert_allclose(points[..., 1], columns, atol=1e-5)
        outside = (points[..., 1] <= -1) | (points[..., 1] >= w)
        numpy.testing.assert_array_equal(call.outside()[:, :, :, level], outside)
    (points,) = call.locations((8, 12))[:, 0]
    expected = call.locations()[0][0, 0] * 2 + 0.5  # the first level is half of that
    numpy.testing.assert_allclose(points[:, 0], expected, atol=1e-5)
    centres = call.centres((4, 6))
    expected = reference[..., ::-1] * [4, 6] - 0.5
    numpy.testing.assert_allclose(centres, expected, atol=1e-5)
    rows, columns = call.moves()
    numpy.testing.assert_allclose(rows, 0 * rows, atol=1e-5)
    numpy.testing.assert_allclose(abs(columns[0, 0, 0, 0]), [1, 2, 3], rtol=1e-5)


def test_points_of_attention_to_boxes():
    layer = links.MultiScaleDeformableAttention(4, 6, levels=1, heads=1, points=1)
    query, value = (numpy.ones((1, count, 4), 'f') for count in (1, 24))
    reference = numpy.array([[[[0.5, 0.25, 0.5, 0.1]]]], 'f')
    _, call = recorded(
        layer, value=value, query=query, shapes=[(4, 6)], reference=reference
    )
    rows, columns = call.moves()
    # One step to the right is half of the box's width, of 6 pixels.
    numpy.testing.assert_allclose([rows.item(), columns.item()], [0, 1.5], atol=1e-6)
    (points,) = call.locations()
    numpy.testing.assert_allclose(points.ravel(), [0.5, 4], atol=1e-6)


class Detector(chainer.Chain):
    """All layers that make their own offsets."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.body = chainer.ChainList(
                links.DCNv3(3, 4, offset_groups=2),
                links.DCNv4(4, 4, offset_groups=2),
                DeformableConvolution2D(4, 4, 3, pad=1),
            )
            self.attention = links.MultiScaleDeformableAttention(4, 4, 1, 2, 2)
            self.pool = links.DeformableRoIPooling2D(4, 2, 0.1, fc_size=4)
            self.ps_pool = links.DeformablePSRoIPooling2D(4, 2, 0.1, 2)

    def forward(self, x):
        h = x
        for conv in self.body:
            h = conv(h)
        n, c, height, width = h.shape
        rows = F.reshape(F.transpose(h, (0, 2, 3, 1)), (n, height * width, c))
        reference = numpy.full((n, height * width, 1, 2), 0.5, 'f')
        self.attention(rows, reference, rows, [(height, width)])
        self.pool(h, BOXES, INDICES)
        return self.ps_pool(h, BOXES, INDICES)


NAMES = ['body/0', 'body/1', 'body/2', 'attention', 'pool', 'ps_pool']


def test_every_layer_of_a_model():
    model = Detector()
    assert sorted(named_layers(model)) == sorted(NAMES)
    with SamplingHook(model) as hook:
        model(x)
    assert [call.name for call in hook.calls] == NAMES
    for call in hook.calls:
        assert len(repr(call)) < 400
        assert call.x_size == (9, 7)
        assert not numpy.isnan(call.moves()[0]).any()
        call.outside()
    with SamplingHook() as hook:
        model(x)
    names = ['0', '1', 'deform_conv', 'attention', 'pool', 'ps_pool']
    assert [call.name for call in hook.calls] == names
    assert not _composed._local.watchers


def test_functions_alone_are_not_recorded():
    place = numpy.full((1, 1, 1, 1, 1, 2), 0.5, 'f')
    value = numpy.ones((1, 6, 1, 1), 'f')
    model = Detector()
    with SamplingHook(model) as hook:
        model(x)
        y = multi_scale_deformable_attention(value, [(2, 3)], place, place[..., 0])
    assert y.array == 0.5
    assert [call.name for call in hook.calls] == NAMES


def test_layer_after_a_call_of_it_that_fails():
    model = Detector()
    with SamplingHook(model) as hook:
        with pytest.raises(TypeError, match='rois must be'):
            model.pool(x.repeat(2, 1)[:, :4], None, INDICES)
        assert hook.calls == []
        model.pool(x.repeat(2, 1)[:, :4], BOXES[:1], INDICES[:1])
    (call,) = hook.calls
    assert call.rois.shape == (1, 4)
    assert not _composed._local.watchers


@pytest.mark.parametrize('name', ['body/0', 'attention', 'pool'])
def test_no_graph_is_kept_of_layers_without_a_sampler(name):
    model = Detector()
    nodes = []

    class Watch(chainer.FunctionHook):
        def forward_postprocess(self, function, in_data):
            nodes.append(weakref.ref(function))

    with SamplingHook(model) as hook, Watch():
        model(x)
    hook.calls[:] = [call for call in hook.calls if call.name == name]
    gc.collect()
    assert len(nodes) > 20
    assert not any(node() for node in nodes)
