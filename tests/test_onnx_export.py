"""What is exported gives Chainer's numbers in two runtimes, in standard operators."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest

import chainer_deform
from chainer_deform import functions, onnx_export
from chainer_deform import links as ours
from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.links import DeformableConvolution2D
from chainer_deform.onnx_export import export
from tests import reference
from tests.cases import CASES, Case, assert_close

onnx = pytest.importorskip('onnx', '1.14', 'onnx has DeformConv from 1.14 on')
evaluator = pytest.importorskip('onnx.reference')

NEWEST_OPSET = onnx.defs.onnx_opset_version()


def run_in_onnxruntime(exported, *args):
    onnxruntime = pytest.importorskip('onnxruntime')
    version = tuple(map(int, onnxruntime.__version__.split('.')[:2]))
    operators = {node.op_type for node in exported.graph.node}
    new = 'DeformConv' in operators or exported.opset_import[0].version > 19
    if new and version < (1, 25):
        pytest.skip('onnxruntime has DeformConv, and opset 22, from 1.25 on')
    session = onnxruntime.InferenceSession(
        exported.SerializeToString(), providers=['CPUExecutionProvider']
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, args)))


def run_in_reference(exported, *args):
    session = evaluator.ReferenceEvaluator(exported)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # onnx's own code
        return session.run(None, dict(zip(session.input_names, args)))


class Model(chainer.Chain):
    """A function of inputs, with links or parameters that it finds by name."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        with self.init_scope():
            for name, child in children.items():
                setattr(self, name, child)

    def forward(self, *args):
        return self.function(self, *args)


def sampler_model(case, arrays):
    """The bare function, with parameters, and x, offset and mask as inputs."""

    def forward(model, x, offset, mask=None):
        return deformable_convolution_2d_sampler(
            x, offset, model.W, getattr(model, 'b', None), mask=mask, **case.options
        )

    parameters = {
        name: chainer.Parameter(arrays[name]) for name in ('W', 'b') if name in arrays
    }
    inputs = [arrays[name] for name in ('x', 'offset', 'mask') if name in arrays]
    return Model(forward, **parameters), inputs


def image(*shape, dtype='float32'):
    return numpy.random.RandomState(5).uniform(-1, 1, shape).astype(dtype)


def randomize(link):
    """Gives a model what training would: parameters and statistics, none zero."""
    random = numpy.random.RandomState(7)
    for parameter in link.params():
        scale = 1 / numpy.sqrt(numpy.prod(parameter.shape[1:]))
        parameter.array[...] = random.uniform(-scale, scale, parameter.shape)
    for child in link.links():
        if isinstance(child, DeformableConvolution2D):
            child.offset_conv.W.array *= 4  # points that are pixels away
        if isinstance(child, L.BatchNormalization):
            child.gamma.array[...] = random.uniform(0.5, 1.5, child.gamma.shape)
            child.avg_mean[...] = random.uniform(-0.5, 0.5, child.avg_mean.shape)
            child.avg_var[...] = random.uniform(0.5, 2, child.avg_var.shape)


def load_digit_net(kind):
    path = pathlib.Path(__file__).parents[1] / 'examples' / 'digits' / 'models.py'
    spec = importlib.util.spec_from_file_location('digits_models', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.DigitNet(kind)
    randomize(model)
    return model


def predict(model, x):
    """What Chainer says, in test mode."""
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        return model(x)


@pytest.mark.parametrize(
    ('name', 'run'),
    [
        *((name, run_in_onnxruntime) for name in CASES if name != 'empty batch'),
        *((name, run_in_reference) for name in ('plain', 'groups', 'dilate', 'all')),
    ],
)
def test_every_geometry(name, run):
    case = CASES[name]
    arrays = case.arrays('float32')
    model, inputs = sampler_model(case, arrays)
    exported = export(model, inputs)
    operators = [node.op_type for node in exported.graph.node]
    assert operators == ['Constant', 'Gather', 'DeformConv']
    (y,) = run(exported, *inputs)
    expected = reference.deformable_convolution_2d_sampler(**arrays, **case.options)
    assert y.dtype == numpy.float32
    assert_close(y, expected, 'y')


@pytest.mark.parametrize(
    ('x_dtype', 'offset_dtype', 'W_dtype', 'casts'),
    [
        ('float64', 'float64', 'float64', 0),
        ('float16', 'float16', 'float16', 6),
        ('float16', 'float32', 'float32', 2),
        ('float32', 'float16', 'float32', 2),
        ('float32', 'float64', 'float32', 4),
        ('float64', 'float32', 'float16', 4),
    ],
)
def test_dtypes(x_dtype, offset_dtype, W_dtype, casts):
    case = CASES['all']
    dtypes = {'x': x_dtype, 'offset': offset_dtype, 'mask': offset_dtype}
    arrays = {
        name: array.astype(dtypes.get(name, W_dtype))
        for name, array in case.arrays('float64').items()
    }
    model, inputs = sampler_model(case, arrays)
    exported = export(model, inputs)
    assert [node.op_type for node in exported.graph.node].count('Cast') == casts
    (y,) = run_in_onnxruntime(exported, *inputs)
    expected = reference.deformable_convolution_2d_sampler(**arrays, **case.options)
    assert y.dtype == x_dtype
    assert_close(y, expected, 'y')


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'modulated': True},
        {'modulated': True, 'mask_scale': 2, 'deform_nobias': True},
        {'offset_nobias': True, 'stride': (2, 1), 'pad': (0, 2), 'dilate': (1, 3)},
        {'modulated': True, 'groups': 2, 'offset_groups': 4, 'pad': (2, 1)},
        {'modulated': True, 'max_offset': 0.7},
    ],
)
def test_layers_take_other_batches_and_larger_images(options):
    layer = DeformableConvolution2D(4, 6, (3, 2), **options)
    randomize(layer)
    exported = export(layer, image(1, 4, 6, 9), input_shapes=('n', 4, 'h', 'w'))
    for shape in (1, 4, 6, 9), (3, 4, 8, 13):
        x = image(*shape)
        (y,) = run_in_onnxruntime(exported, x)
        assert_close(y, predict(layer, x).array, 'y')


def test_offsets_from_another_feature_map():
    layer = DeformableConvolution2D(4, 6, 3, offset_in_channels=2, modulated=True)
    randomize(layer)
    x, feature = image(1, 4, 6, 9), image(1, 2, 6, 9)
    exported = export(layer, {'x': x, 'offset_input': feature})
    (y,) = run_in_onnxruntime(exported, 2 * x, 3 * feature)
    assert_close(y, layer(2 * x, 3 * feature).array, 'y')


@pytest.mark.parametrize('opset_version', [19, 22, NEWEST_OPSET])
@pytest.mark.parametrize('kind', ['plain', 'deformable', 'modulated'])
def test_digits(kind, opset_version):
    if opset_version > NEWEST_OPSET:
        pytest.skip('the installed onnx has no such opset')
    model = load_digit_net(kind)
    exported = export(
        model,
        image(1, 1, 28, 28),
        input_names='image',
        output_names='scores',
        input_shapes=('n', 1, 28, 28),
        opset_version=opset_version,
    )
    onnx.checker.check_model(exported, full_check=True)
    graph = exported.graph
    assert {node.domain for node in graph.node} == {''}
    operators = [node.op_type for node in graph.node]
    assert operators.count('DeformConv') == (0 if kind == 'plain' else 2)
    ((opset,),) = (exported.opset_import,)
    assert (opset.domain, opset.version) == ('', opset_version)
    assert exported.producer_name == 'chainer_deform'
    assert exported.producer_version == chainer_deform.__version__
    # Parameters and statistics are no inputs.
    ((name, shape),) = map(name_and_shape, graph.input)
    assert (name, shape) == ('image', ['n', 1, 28, 28])
    ((name, shape),) = map(name_and_shape, graph.output)
    assert (name, shape) == ('scores', ['n', 10])

    if opset_version > 22:
        return  # a runtime may not have the newest yet
    x = image(5, 1, 28, 28)
    (scores,) = run_in_onnxruntime(exported, x)
    expected = predict(model, x).array
    assert numpy.ptp(expected) > 0.1
    assert_close(scores, expected, 'scores')


def name_and_shape(value):
    dims = value.type.tensor_type.shape.dim
    return value.name, [dim.dim_param or dim.dim_value for dim in dims]


def test_the_model_stays_as_it_is(tmp_path):
    model = load_digit_net('modulated')
    model.cleargrads()
    before, after = {}, {}
    model.serialize(chainer.serializers.DictionarySerializer(before))
    before = {name: numpy.array(array) for name, array in before.items()}
    x = image(2, 1, 28, 28)
    args = [chainer.Variable(x)]
    export(model, args, tmp_path / 'model.onnx')
    model.serialize(chainer.serializers.DictionarySerializer(after))
    assert before.keys() == after.keys()
    for name, array in before.items():
        numpy.testing.assert_array_equal(array, after[name], name)
    assert all(parameter.grad is None for parameter in model.params())
    assert args[0].array is x
    args = [x]
    export(model, args)
    assert args[0] is x
    args = {'x': x}
    export(model, args)
    assert args == {'x': x}


FUNCTIONS = {
    'mean': lambda x: F.mean(x, axis=(2, 3)),
    'average': lambda x: F.average(x, axis=(2, 3), keepdims=True),
    'sum': lambda x: F.sum(x, axis=1),
    'max': lambda x: F.max(x, axis=(1, 3)),
    'logsumexp': lambda x: F.logsumexp(x, axis=1),
    'argmax': lambda x: F.argmax(x, axis=1),
    'split_axis': lambda x: F.split_axis(x, [1, 3], axis=1),
    'split_axis, sections': lambda x: F.split_axis(x, 2, axis=1),
    'concat': lambda x: F.concat([x, 2 * x], axis=1),
    'stack': lambda x: F.stack([x, 2 * x], axis=2),
    'getitem': lambda x: x[:, 1:3, ::2, -1],
    'pad': lambda x: F.pad(x, ((0, 0), (0, 0), (1, 2), (0, 1)), 'constant'),
    'transpose': lambda x: F.transpose(x, (0, 2, 3, 1)),
    'expand_dims': lambda x: F.squeeze(F.expand_dims(x, 1), 1),
    'reshape': lambda x: F.reshape(x, (x.shape[0], -1)),
    'reshape twice': lambda x: F.reshape(F.reshape(x, (-1, 8)), x.shape),
    'flatten': lambda x: F.flatten(x),
    'broadcast_to': lambda x: F.broadcast_to(F.max(x, 1, keepdims=True), x.shape),
    'scale': lambda x: F.scale(x, F.sigmoid(F.mean(x, axis=(2, 3))), axis=0),
    'softmax': lambda x: F.softmax(x),
    'softmax, other axis': lambda x: F.softmax(x, axis=2),
    'log_softmax': lambda x: F.log_softmax(x),
    'sigmoid': lambda x: F.sigmoid(x) * 2 + 1 - x,
    'tanh': lambda x: F.tanh(x) / 3 - 1 / (x**2 + 1),
    'relu': lambda x: F.relu(x),
    'leaky_relu': lambda x: F.leaky_relu(x),
    'clipped_relu': lambda x: F.clipped_relu(x, 0.5),
    'elu': lambda x: F.elu(x),
    'softplus': lambda x: F.softplus(x),
    'clip': lambda x: F.clip(x, -0.5, 0.25),
    'exp': lambda x: F.sqrt(F.exp(x)) + F.log(F.absolute(x) + 1),
    'maximum': lambda x: F.maximum(x, -x),
    'matmul': lambda x: F.matmul(x, x, transb=True),
    'normalize': lambda x: F.normalize(x + 5, axis=1),
    'dropout': lambda x: F.dropout(x, 0.9) + x,
    'max_pooling_2d': lambda x: F.max_pooling_2d(x, 3, 2, 1),
    'max_pooling_2d, cover_all': lambda x: F.max_pooling_2d(x, 3, 2),
    'max_pooling_2d, floor': lambda x: F.max_pooling_2d(x, 3, 2, cover_all=False),
    'average_pooling_2d': lambda x: F.average_pooling_2d(x, 3, 2, 1),
    'average_pooling_2d, all': lambda x: F.average_pooling_2d(x, x.shape[2:]),
    'resize_images': lambda x: F.resize_images(x, (7, 13)),
    'resize_images, centers': lambda x: F.resize_images(
        x, (10, 5), align_corners=False
    ),
    'resize_images, nearest': lambda x: F.resize_images(x, (10, 5), mode='nearest'),
    'unpooling_2d': lambda x: F.unpooling_2d(x, 2, cover_all=False),
    'unpooling_2d, cover_all': lambda x: F.unpooling_2d(x, (3, 2)),
    'unpooling_2d, outsize': lambda x: F.unpooling_2d(x, 2, outsize=(12, 15)),
    'cast': lambda x: F.cast(x, 'float64'),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_around(name):
    expect_same(Model(lambda model, x: FUNCTIONS[name](x)))


LINKS = {
    'Convolution2D': lambda: L.Convolution2D(4, 6, 3, 2, 1, groups=2, dilate=2),
    'Convolution2D, no bias': lambda: L.Convolution2D(4, 6, 1, nobias=True),
    'DepthwiseConvolution2D': lambda: L.DepthwiseConvolution2D(4, 2, 3),
    'Deconvolution2D': lambda: L.Deconvolution2D(4, 6, 4, 2, 1),
    'Linear': lambda: L.Linear(4 * 6 * 8, 3),
    'Linear, no bias': lambda: L.Linear(4 * 6 * 8, 3, nobias=True),
    'BatchNormalization': lambda: L.BatchNormalization(4),
    'GroupNormalization': lambda: L.GroupNormalization(2, 4),
    'PReLU': lambda: L.PReLU((4,)),
    'PReLU, one slope': lambda: L.PReLU(),
    'PReLU, all slopes': lambda: L.PReLU((4, 6, 8)),
    'Scale': lambda: L.Scale(1, (4,), bias_term=True),
}


@pytest.mark.parametrize('name', LINKS)
def test_links_around(name):
    link = LINKS[name]()
    randomize(link)
    expect_same(Model(lambda model, x: model.link(x), link=link))


def expect_same(model):
    """Exports with one image, runs with that one and with three."""
    exported = export(model, image(1, 4, 6, 8), input_shapes=('n', 4, 6, 8))
    assert {node.domain for node in exported.graph.node} <= {''}
    for n in 1, 3:
        x = image(n, 4, 6, 8)
        expected = predict(model, chainer.Variable(x))
        if isinstance(expected, chainer.Variable):
            expected = [expected]
        actual = run_in_onnxruntime(exported, x)
        assert len(actual) == len(expected)
        for i, (a, e) in enumerate(zip(actual, expected)):
            assert a.dtype == e.dtype
            assert_close(a, e.array, f'output {i} of {n} images', 'float32')


@pytest.mark.parametrize(('size', 'out'), [(6, 10), (7, 10), (29, 61), (50, 33)])
@pytest.mark.parametrize('mode', ['align_corners', 'half_pixel', 'nearest'])
def test_resize_images_of_any_size(size, out, mode):
    """A scale that is rounded down makes the image smaller by one, and a wrong pixel
    is nearest."""

    def resize(model, x):
        return F.resize_images(
            x,
            (out, 2 * out),
            mode='nearest' if mode == 'nearest' else 'bilinear',
            align_corners=mode == 'align_corners',
        )

    model, x = Model(resize), image(1, 1, size, size)
    (y,) = run_in_onnxruntime(export(model, x), x)
    assert_close(y, predict(model, x).array, 'y')


@pytest.mark.parametrize('run', [run_in_onnxruntime, run_in_reference])
def test_several_inputs_and_outputs_by_name(run):
    case = Case(mask=True)
    arrays = case.arrays('float32')

    class Several(chainer.Chain):
        def forward(self, **arrays):
            y = deformable_convolution_2d_sampler(**arrays)
            return {'y': y, 'positive': F.relu(y)}

    model = Several()
    exported = export(
        model,
        arrays,
        input_names={name: f'the_{name}' for name in arrays},
        output_names={'y': 'out', 'positive': 'relu'},
        input_shapes={
            name: ('n', *array.shape[1:])
            if name in ('x', 'offset', 'mask')
            else array.shape
            for name, array in arrays.items()
        },
    )
    names = [value.name for value in exported.graph.input]
    assert names == [f'the_{name}' for name in arrays]
    assert name_and_shape(exported.graph.input[0]) == ('the_x', ['n', 3, 5, 7])
    assert [value.name for value in exported.graph.output] == ['out', 'relu']
    out, relu = run(exported, *arrays.values())
    expected = model(**arrays)
    assert_close(out, expected['y'].array, 'out')
    assert_close(relu, expected['positive'].array, 'relu')


@pytest.mark.parametrize('far', [-1, 3, 1e10, -1e30, numpy.inf, -numpy.inf])
@pytest.mark.parametrize('axis', [0, 1])
def test_points_outside(far, axis):
    x, W = image(1, 1, 3, 3), numpy.ones((1, 1, 1, 1), 'float32')
    offset = numpy.zeros((1, 2, 3, 3), 'float32')
    offset[0, axis, 0, 0] = far
    model = Model(lambda model, *args: deformable_convolution_2d_sampler(*args))
    (y,) = run_in_onnxruntime(export(model, [x, offset, W]), x, offset, W)
    expected = x.copy()
    expected[0, 0, 0, 0] = 0
    numpy.testing.assert_array_equal(y, expected)


#: Layers of the other operators, with the shapes of their inputs.
OTHER_LAYERS = {
    'DCNv3': (
        lambda: ours.DCNv3(4, 6, 3, 2, offset_groups=2, center_scale=True),
        [('n', 4, 9, 11)],
    ),
    'DCNv4': (
        lambda: ours.DCNv4(4, 6, 3, offset_groups=2, center_scale=True, dw_ksize=3),
        [('n', 4, 'h', 'w')],
    ),
    'DeformableRoIPooling2D': (
        lambda: ours.DeformableRoIPooling2D(4, (3, 2), 0.2, modulated=True, fc_size=8),
        [('n', 4, 'h', 'w'), ('R', 4), ('R',)],
    ),
    'DeformablePSRoIPooling2D': (
        lambda: ours.DeformablePSRoIPooling2D(36, 3, 0.2, 3, part_size=2, classes=2),
        [('n', 36, 'h', 'w'), ('R', 4), ('R',)],
    ),
    'MultiScaleDeformableAttention': (
        lambda: ours.MultiScaleDeformableAttention(4, 6, levels=2, heads=2, points=3),
        [('n', 5, 4), ('n', 5, 2, 2), ('n', 30, 4)],
    ),
}


@pytest.mark.parametrize('name', OTHER_LAYERS)
def test_layers_of_other_operators(name):
    """With another batch, number of boxes and size of images than they came with."""
    make, shapes = OTHER_LAYERS[name]
    layer = make()
    randomize(layer)
    shape_arguments = [[(4, 6), (2, 3)]] if 'Attention' in name else []
    model = Model(
        lambda model, *args: model.layer(*args, *shape_arguments), layer=layer
    )
    exported = export(model, arrays_of(shapes, 0), input_shapes=shapes)
    args = arrays_of(shapes, 1)
    (y,) = run_in_onnxruntime(exported, *args)
    expected = predict(lambda args: model(*args), args).array
    assert numpy.ptp(expected) > 0.1
    assert_close(y, expected, 'y')


def arrays_of(shapes, run):
    random = numpy.random.RandomState(run)
    sizes = {'n': (2, 3), 'h': (9, 8), 'w': (11, 13), 'R': (3, 5)}
    arrays = []
    for shape in shapes:
        shape = tuple(sizes[size][run] if size in sizes else size for size in shape)
        if len(shape) == 1:  # of which image a box is
            arrays.append(random.randint(0, 2, shape).astype('i'))
        elif len(shape) == 2:
            corners = random.uniform(0, 60, (shape[0], 2, 2)).astype('f')
            arrays.append(numpy.sort(corners, axis=1).reshape(shape))
        else:
            arrays.append(random.uniform(-1, 1, shape).astype('f'))
    return arrays


def sum_at(border):
    return lambda model, x, points, weights: functions.sampled_sum_2d(
        x, points, weights, border=border
    )


@pytest.mark.parametrize('border', ['zero', 'clamp'])
@pytest.mark.parametrize('far', [-1, 4, 1e10, -1e30, numpy.inf, -numpy.inf, numpy.nan])
@pytest.mark.parametrize('axis', [0, 1])
def test_points_of_sums_outside(border, far, axis):
    """Exactly at -1 and the image's side as well; NaN gives 0, not NaN."""
    x = 2 + image(1, 1, 4, 4)
    points = numpy.ones((2, 1, 1, 2), 'f')
    points[0, ..., axis] = far
    weights = numpy.ones((2, 1, 1), 'f')
    model = Model(sum_at(border))
    exported = export(model, [x, numpy.ones_like(points), weights])
    (y,) = run_in_onnxruntime(exported, x, points, weights)
    expected = numpy.nan_to_num(model(x, points, weights).array)
    inside = border == 'clamp' and far in (-1, 4)
    assert (expected[0, 0] != 0) == inside
    assert_close(y, expected, 'y')


@pytest.mark.parametrize('value', [1e30, numpy.inf, numpy.nan])
@pytest.mark.parametrize('ratio', [2, None])
def test_offsets_of_boxes_that_are_no_place(value, ratio):
    x, boxes = 2 + image(1, 1, 6, 6), numpy.array([[0, 0, 5, 5]], 'f')
    indices, offset = numpy.zeros(1, 'i'), numpy.zeros((1, 2, 2, 2), 'f')
    model = Model(
        lambda model, *args: functions.deformable_roi_average_align_2d(
            *args, 2, 1.0, ratio
        )
    )
    exported = export(model, [x, boxes, indices, offset])
    offset[0, 1, 0, 1] = value
    (y,) = run_in_onnxruntime(exported, x, boxes, indices, offset)
    expected = numpy.nan_to_num(model(x, boxes, indices, offset).array)
    assert expected[0, 0, 0, 1] == 0
    assert_close(y, expected, 'y')


def test_no_boxes():
    model = Model(
        lambda model, *args: functions.deformable_roi_average_align_2d(
            *args, (3, 2), 0.2
        )
    )
    shapes = [(2, 4, 9, 11), ('R', 4), ('R',), ('R', 2, 3, 2)]
    exported = export(model, arrays_of(shapes, 0), input_shapes=shapes)
    x, *others = arrays_of(shapes, 1)
    (y,) = run_in_onnxruntime(exported, x, *(array[:0] for array in others))
    assert y.shape == (0, 4, 3, 2)


def test_halves_of_boxes_are_rounded_away_from_zero():
    x, indices = image(1, 4, 9, 9), numpy.zeros(2, 'i')
    boxes = numpy.array([[0.5, 1.5, 5.5, 2.5], [-0.5, -1.5, 3.4999998, 2.51]], 'f')
    model = Model(
        lambda model, *args: functions.deformable_ps_roi_average_pooling_2d(
            *args, None, 2, 1.0, 2
        )
    )
    (y,) = run_in_onnxruntime(export(model, [x, 0 * boxes, indices]), x, boxes, indices)
    assert_close(y, model(x, boxes, indices).array, 'y')


@pytest.mark.parametrize('opset_version', [16, 18])
def test_opsets_without_deformable_convolution(opset_version):
    layer = DeformableConvolution2D(3, 8, 3)
    message = (
        rf'opset_version {opset_version}: F\.deformable_convolution_2d_sampler needs '
        'DeformConv, which is in opset 19 and later'
    )
    with pytest.raises(ValueError, match=message):
        export(layer, image(2, 3, 6, 7), opset_version=opset_version)


def test_file(tmp_path):
    layer = DeformableConvolution2D(3, 8, 3)
    path = tmp_path / 'model.onnx'
    path.write_text('an old one')
    for filename in path, str(path):
        exported = export(layer, image(2, 3, 6, 7), filename)
        assert path.read_bytes() == exported.SerializeToString()
        assert onnx.load(path) == exported
        assert [entry.name for entry in tmp_path.iterdir()] == ['model.onnx']


def test_an_error_leaves_no_file(tmp_path):
    layer, x = DeformableConvolution2D(3, 8, 3), image(2, 3, 6, 7)
    old = tmp_path / 'old.onnx'
    old.write_text('an old one')
    with pytest.raises(ValueError, match='F.cumprod'):
        export(Model(lambda model, x: F.cumprod(x, 3)), x, old)
    with pytest.raises(FileNotFoundError, match=r"missing/model\.onnx'$"):
        export(layer, x, tmp_path / 'missing' / 'model.onnx')
    (tmp_path / 'directory').mkdir()
    with pytest.raises(OSError, match='directory'):
        export(layer, x, tmp_path / 'directory')
    assert old.read_text() == 'an old one'
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        'directory',
        'old.onnx',
    ]


def test_files(tmp_path, monkeypatch):
    """An existing file's mode stays, a link stays a link, a fifo is refused."""
    layer, x = DeformableConvolution2D(3, 8, 3), image(2, 3, 6, 7)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'model.onnx'
    path.touch(0o600)
    (tmp_path / 'link').symlink_to('model.onnx')
    export(layer, x, 'link')
    assert path.stat().st_mode & 0o777 == 0o600
    assert onnx.load(path) == export(layer, x)
    os.mkfifo(tmp_path / 'fifo')
    with pytest.raises(OSError, match='fifo, not a regular file'):
        export(layer, x, tmp_path / 'fifo')
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ['fifo', 'link', 'model.onnx']


def test_models_of_more_bytes_than_a_file_can_have(monkeypatch):
    layer, x = DeformableConvolution2D(None, 8, 3), image(2, 3, 6, 7)
    bytes_ = 4 * (18 * 3 * 9 + 18 + 8 * 3 * 9 + 8)
    monkeypatch.setattr(onnx_export, '_MOST_BYTES', bytes_)
    export(layer, x)
    monkeypatch.setattr(onnx_export, '_MOST_BYTES', bytes_ - 1)
    with pytest.raises(RuntimeError, match=f'have {bytes_} bytes, .* {bytes_ - 1}'):
        export(layer, x)


def gradient_of_a_function(model, x):
    x = chainer.Variable(x.array)
    mask = chainer.Variable(numpy.ones((2, 1, 6, 7), 'f'))
    y = functions.dcn_v3_2d(x, numpy.zeros((2, 2, 6, 7), 'f'), mask, 1)
    (gx,) = chainer.grad([F.sum(y)], [x], enable_double_backprop=True)
    return gx


def gradient_of_a_layer(model, x):
    x = chainer.Variable(x.array)
    (gx,) = chainer.grad([F.sum(model.layer(x))], [x], enable_double_backprop=True)
    return gx


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda model, x: F.cumprod(x, 1), r'no ONNX form of F\.cumprod$'),
        (
            gradient_of_a_layer,
            r'of the gradient of F\.deformable_convolution_2d_sampler, for which',
        ),
        (
            gradient_of_a_function,
            r'of the gradient of functions\.dcn_v3_2d, for which there is no operator',
        ),
    ],
)
def test_functions_without_an_onnx_form(function, message):
    layer = DeformableConvolution2D(3, 8, 3)
    with pytest.raises(ValueError, match=message):
        export(Model(function, layer=layer), image(2, 3, 6, 7))


def test_chainers_own_layer_has_to_be_patched():
    def build():
        return L.DeformableConvolution2D(3, 8, 3, offset_initialW=0.1)

    x = image(2, 3, 6, 7)
    with pytest.raises(ValueError, match=r'call chainer_deform.patch_chainer\(\)'):
        export(build(), x)
    chainer_deform.patch_chainer()
    try:
        exported = export(build(), x)
    finally:
        chainer_deform.unpatch_chainer()
    assert 'DeformConv' in [node.op_type for node in exported.graph.node]


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (
            {'opset_version': 15},
            ValueError,
            'opset_version must be at least 16, not 15',
        ),
        ({'opset_version': 999}, ValueError, rf'at most {NEWEST_OPSET}, .*, not 999'),
        ({'opset_version': '19'}, TypeError, "opset_version must be an int, not '19'"),
        ({'model': F.relu}, TypeError, 'model must be a chainer.Link, not a function'),
        ({'args': 'x'}, TypeError, 'args must be an array or a Variable, not a str'),
        ({'args': [image(2, 3, 6, 7), None]}, TypeError, r'args\[1\] must be an array'),
        ({'args': {'x': 1.0}}, TypeError, r"args\['x'\] must be an array .* a float"),
        ({'input_names': ['']}, ValueError, 'input_names must not repeat'),
        (
            {'output_names': {'y': 'a', 'z': 'a'}},
            ValueError,
            'output_names must not re',
        ),
        ({'input_shapes': ('n', 3)}, ValueError, 'Shape length must be same'),
        ({'output_names': ['a', 'b']}, ValueError, 'must be single'),
    ],
)
def test_errors_of_arguments(options, error, message):
    layer = DeformableConvolution2D(3, 8, 3)
    with pytest.raises(error, match=message):
        export(**{'model': layer, 'args': image(2, 3, 6, 7), **options})


def test_without_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    message = r"needs onnx: pip install 'chainer-deform\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        export(DeformableConvolution2D(3, 8, 3), image(2, 3, 6, 7))


def test_an_onnx_that_is_too_old(monkeypatch):
    monkeypatch.setattr(onnx.defs, 'onnx_opset_version', lambda: 18)
    with pytest.raises(ImportError, match='needs onnx 1.14 or later, not'):
        export(DeformableConvolution2D(3, 8, 3), image(2, 3, 6, 7))


def test_warnings_of_the_model_are_not_hidden():
    def warn(model, x):
        warnings.warn('my own is deprecated, experimental', FutureWarning, stacklevel=1)
        return F.relu(x)

    with pytest.warns(FutureWarning, match='my own'):
        export(Model(warn), image(1, 2, 3, 4))


def test_file_behind_a_link(tmp_path):
    (tmp_path / 'link.onnx').symlink_to('model.onnx')
    exported = export(
        DeformableConvolution2D(3, 8, 3), image(2, 3, 6, 7), tmp_path / 'link.onnx'
    )
    assert (tmp_path / 'link.onnx').is_symlink()
    assert onnx.load(tmp_path / 'model.onnx') == exported


def small_layer(in_channels=3, out_channels=3):
    layer = DeformableConvolution2D(in_channels, out_channels, (3, 1), pad=(1, 0))
    randomize(layer)
    return layer


def run_and_compare(model, *args, **options):
    """Checks all outputs, in the order in which the model returns them."""
    exported = export(model, list(args), **options)
    expected = predict(lambda args: model(*args), args)
    if isinstance(expected, dict):
        expected = list(expected.values())
    if not isinstance(expected, (list, tuple)):
        expected = [expected]
    outputs = run_in_onnxruntime(exported, *args)
    assert len(outputs) == len(expected)
    for y, variable in zip(outputs, expected):
        numpy.testing.assert_allclose(y, chainer.as_array(variable), atol=1e-5)
    return [value.name for value in exported.graph.output]


@pytest.mark.parametrize(
    ('forward', 'count'),
    [
        (lambda model, x, z: (model.layer(x), F.relu(x)), 2),
        (lambda model, x, z: [model.layer(x) + z, model.layer(z)], 2),
        (lambda model, x, z: {'b': F.exp(z), 'a': model.layer(x) * z}, 2),
        (lambda model, x, z: (model.layer(x) + z,) * 3, 3),  # the same one again
        (lambda model, x, z: (z, model.layer(x + z), z), 3),  # an input
    ],
)
@pytest.mark.parametrize('named', [False, True])
def test_order_of_outputs(forward, count, named):
    names = ['one', 'two', 'three'][:count] if named else None
    model = Model(forward, layer=small_layer())
    x, z = image(2, 3, 6, 7), image(2, 3, 6, 7)[::-1].copy()
    if isinstance(predict(lambda args: model(*args), (x, z)), dict) and named:
        names = {'a': 'two', 'b': 'one'}
    found = run_and_compare(model, x, z, output_names=names)
    if named:
        assert found == ['one', 'two', 'three'][:count]


def tied():
    first, second = small_layer(), small_layer()
    with second.deform_conv.init_scope():
        second.deform_conv.W = first.deform_conv.W
    return chainer.Sequential(first, second)


def sequence(layer):
    return chainer.Sequential(layer, F.relu, layer)


@pytest.mark.parametrize(
    'build',
    [
        lambda: sequence(small_layer()),
        lambda: Model(
            lambda model, x: model.b(model.a(x)),
            **dict.fromkeys('ab', small_layer()),
        ),
        tied,
        lambda: sequence(L.BatchNormalization(3)),
    ],
    ids=['twice in a row', 'two names', 'tied filter', 'normalisation'],
)
def test_what_is_in_several_places(build):
    model = build()
    randomize(model)
    run_and_compare(model, image(2, 3, 6, 7))


def test_variable_made_on_the_way():
    layer = chainer_deform.links.DeformableConvolution2DSampler(3, 4, 3, pad=1)
    offset = image(1, 18, 6, 7)
    run_and_compare(
        Model(lambda model, x: model.layer(x, chainer.Variable(offset)), layer=layer),
        image(1, 3, 6, 7),
    )


def test_call_without_a_graph():
    def forward(model, x):
        with chainer.no_backprop_mode():
            return F.relu(model.layer(x))

    with pytest.raises(RuntimeError, match=r'it calls F\.convolution_2d without a g'):
        export(Model(forward, layer=small_layer()), image(2, 3, 6, 7))


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda model, x: F.where(x.array > 0, x, -x), r'F\.where gets numbers that'),
        (lambda model, x: x * float(x.array.max()), r'operator \* gets numbers that'),
        (lambda model, x: x + x.array * 2, r'operator \+ gets numbers that'),
        (lambda model, x: chainer.Variable(x.array * 2), 'its output 0 does not come'),
    ],
)
def test_functions_that_come_out_wrong(function, message):
    with pytest.raises(RuntimeError, match=message):
        export(Model(function), image(2, 3, 6, 7))


def test_random_numbers_are_no_constants():
    def forward(model, x):
        return x + numpy.random.uniform(size=x.shape).astype('f')

    with pytest.raises(RuntimeError, match=r'operator \+ gets numbers .* at random'):
        export(Model(forward), image(2, 3, 6, 7))


def test_state_of_the_model():
    """The file does what a first call does, and the state is that after one call."""

    class Counts(chainer.Chain):
        total = None

        def forward(self, x):
            self.total = x if self.total is None else self.total + x
            return F.tanh(self.total)

    model, x = Counts(), image(2, 3)
    (y,) = run_in_onnxruntime(export(model, x), x)
    assert_close(y, numpy.tanh(x), 'y')
    assert_close(model.total.array, x, 'total')


def test_model_that_takes_no_other_sizes():
    linear = L.Linear(3 * 6 * 7, 4)
    model = Model(lambda model, x: model.linear(x), linear=linear)
    x = image(2, 3, 6, 7)
    exported = export(model, x, input_shapes=('n', 3, 'h', 'w'))
    assert_close(run_in_onnxruntime(exported, x)[0], linear(x).array, 'y')


def test_integer_inputs_stay_in_their_range():
    model = Model(lambda model, i: model.embed(i), embed=L.EmbedID(5, 3))
    i = numpy.array([[0, 4, 2]], 'int32')
    exported = export(model, i, input_shapes=('n', 'length'))
    i = numpy.array([[1, 2, 3, 4], [0, 0, 4, 4]], 'int32')
    assert_close(run_in_onnxruntime(exported, i)[0], model(i).array, 'y')


def test_errors_of_the_model_are_its_own():
    def forward(model, x):
        raise KeyError('of the model')

    with pytest.raises(KeyError, match='of the model'):
        export(Model(forward), image(2, 3, 6, 7))
