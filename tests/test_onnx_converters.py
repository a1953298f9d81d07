"""Every function that can be exported, with each of its options, on another input.

A call is right in onnxruntime, for other values and another batch than it was exported
with, and for other image sizes where they were left open; or the export refuses it with
an error that names the function and the option; or, where only a size is frozen, warns.
"""

from __future__ import annotations

import inspect
import re
import warnings

import chainer
import chainer.functions as F
import numpy
import pytest

from chainer_deform import _onnx_converters, functions
from chainer_deform.onnx_export import export
from tests.cases import assert_close

pytest.importorskip('onnx', '1.14', 'onnx has DeformConv from 1.14 on')
onnxruntime = pytest.importorskip('onnxruntime')

#: Sizes that an export leaves open: those of its example, and those of the run.
OPEN = {'n': (1, 3), 'h': (6, 9), 'w': (8, 11), 'q': (4, 6), 'R': (2, 5)}


class Input:
    """An input of a model, of which each run has other values."""

    def __init__(self, *shape, dtype='float32', low=-2.0, high=2.0):
        self.shape, self.dtype, self.low, self.high = shape, dtype, low, high

    def array(self, run):
        shape = [OPEN[size][run] if size in OPEN else size for size in self.shape]
        random = numpy.random.RandomState(5 + run)
        if numpy.dtype(self.dtype).kind in 'iu':
            return random.randint(self.low, self.high, shape).astype(self.dtype)
        scale = (1, 3)[run] if self.low < 0 else 1
        return numpy.asarray(
            scale * random.uniform(self.low, self.high, shape), self.dtype
        )


class Boxes(Input):
    """Boxes whose first corner is before the second."""

    def array(self, run):
        boxes = super().array(run).reshape(-1, 2, 2)
        return numpy.sort(boxes, axis=1).reshape(-1, 4)


class Call:
    """A call of a function, with what is expected of its export.

    ``opset_version`` is the newest that onnxruntime has of it, ``first`` the first that
    the standard has.
    """

    def __init__(
        self,
        function,
        *inputs,
        refused=None,
        warns=None,
        tol=1,
        opset_version=22,
        first=16,
        **options,
    ):
        self.function, self.inputs, self.options = function, inputs, options
        self.refused, self.warns, self.tol = refused, warns, tol
        self.opset_version, self.first = opset_version, first

    def __repr__(self):
        name = self.function
        name = name if isinstance(name, str) else name.__name__
        options = ', '.join(f'{name}={short(v)}' for name, v in self.options.items())
        inputs = ' '.join(
            'x'.join(map(str, i.shape)) + f':{i.dtype[0]}{i.dtype[-2:]}'
            for i in self.inputs
        )
        return f'{name} {inputs} {options}'.strip()

    def model(self):
        class Model(chainer.Chain):
            def forward(model, *inputs):
                function = self.function
                if isinstance(function, str):
                    function = known(function)
                return function(*inputs, **self.options)

        return Model()


def known(name):
    """A function of Chainer's or of ours."""
    return getattr(F, name, None) or getattr(functions, name)


def short(value):
    return type(value).__name__ if isinstance(value, numpy.ndarray) else repr(value)


X = Input('n', 4, 6, 8)
HW = Input('n', 4, 'h', 'w')
ROWS = Input('n', 5)
POSITIVE = Input('n', 4, 6, 8, low=0.1)
UNIT = Input('n', 4, 6, 8, low=-0.9, high=0.9)
HALF = Input('n', 4, 6, 8, dtype='float16')
DOUBLE = Input('n', 4, 6, 8, dtype='float64')
INTS = Input('n', 4, 6, dtype='int32', low=-9, high=9)
WIDE = Input('n', 3, 13, 17)


def weights(*shape, dtype='float32'):
    return Input(*shape, dtype=dtype)


def vector(*shape, **options):
    return Input(*shape, low=0.5, high=2.0, **options)


def operator(text, *inputs, **options):
    """A call of an expression of x, y and z."""

    def call(*arrays):
        return eval(text, {'F': F, 'np': numpy}, dict(zip('xyz', arrays)))

    call.__name__ = text
    return Call(call, *inputs, **options)


def elementwise(name, x=X):
    return [
        Call(name, x),
        Call(name, Input('n', 5, dtype='float16', low=0.1, high=0.9)),
    ]


def reductions(name, X=X, keepdims=True):
    HW = Input('n', 4, 'h', 'w', low=0.1, high=1.1)
    calls = [
        Call(name, X, axis=(1, 2)),
        Call(name, X, axis=-1),
        Call(name, X, axis=(-1, 1)),
        Call(name, X, axis=0),
        Call(name, X),
        Call(name, X, axis=()),
        Call(name, HW, axis=(2, 3)),
        Call(name, HALF, axis=1),
    ]
    if keepdims:
        calls += [
            Call(name, X, axis=(1, -1), keepdims=True),
            Call(name, X, keepdims=True),
        ]
    return calls


def batch_norm(name, x, size, **options):
    inputs = [vector(size), Input(size)]
    if name.startswith('fixed'):
        inputs += [Input(size), vector(size)]
    return Call(name, x, *inputs, **options)


def n_step_gru(n_layers, dropout_ratio, lengths, **options):
    """The weights are constants; each sequence is an input."""
    random = numpy.random.RandomState(3)
    sizes = [
        (5 if layer == 0 and i < 3 else 7)
        for layer in range(n_layers)
        for i in range(6)
    ]
    ws = [random.uniform(-1, 1, (7, size)).astype('f') for size in sizes]
    bs = [random.uniform(-1, 1, 7).astype('f') for _ in sizes]

    def as_layers(arrays):
        variables = list(map(chainer.Variable, arrays))
        return [variables[i : i + 6] for i in range(0, len(variables), 6)]

    def gru(*xs):
        start = chainer.Variable(numpy.full((n_layers, lengths[0], 7), 0.5, 'f'))
        hy, ys = F.n_step_gru(
            n_layers,
            dropout_ratio,
            start,
            as_layers(ws),
            as_layers(bs),
            list(xs),
        )
        return [hy, *ys]

    gru.__name__ = 'n_step_gru'
    return Call(gru, *(Input(length, 5) for length in lengths), **options)


def traced(name, function):
    """A function that the model gives a name for ONNX-Chainer."""
    from onnx_chainer.replace_func import fake_as_funcnode

    node = fake_as_funcnode(function, name, experimental_warning=False)
    node.__name__ = name
    return node


def roi_pooling(x, boxes, **options):
    corners = F.concat([numpy.zeros((3, 1), 'f'), boxes], 1)
    return F.roi_pooling_2d(x, corners, **options)


CONDITION = numpy.random.RandomState(2).rand(4, 6, 8) > 0.5

#: Boxes of images of 6 by 8 or 9 by 11 pixels at a scale of 0.2, some beyond them.
BOXES = Boxes('R', 4, low=0.0, high=60.0)
#: What the newest opset has of RoiAlign, onnxruntime 1.32 has not.
ROI_ALIGN = {'opset_version': 21}


INDICES = numpy.zeros(2, 'i')
OFFSET = numpy.ones((2, 2, 3, 2), 'f')


def boxes_of(n):
    return Input('R', dtype='int32', low=0, high=n)


def sampled_sum(dtype, **options):
    return Call(
        'sampled_sum_2d',
        Input('n', 6, 'h', 'w', dtype=dtype),
        Input('q', 3, 5, 2, low=-3.0, high=9.0),
        Input('q', 3, 5),
        **options,
    )


def attention(shapes, dtype='float32', **options):
    def attend(value, *points):
        return functions.multi_scale_deformable_attention(value, shapes, *points)

    return Call(
        attend,
        Input('n', 30, 2, 4, dtype=dtype),
        Input('n', 'q', 2, 2, 3, 2, low=-0.3, high=1.3),
        Input('n', 'q', 2, 2, 3),
        **options,
    )


def dcn_v3(taps, size=('h', 'w'), *, groups=1, dtype='float32', **options):
    x_size = size if 'h' in size else (6, 8)
    return Call(
        'dcn_v3_2d',
        Input('n', 4, *x_size, dtype=dtype),
        Input('n', 2 * groups * taps, *size),
        Input('n', groups * taps, *size),
        offset_groups=groups,
        **options,
    )


def roi_align(dtype='float32', offset_dtype='float32', **options):
    return Call(
        'deformable_roi_average_align_2d',
        Input(2, 4, 'h', 'w', dtype=dtype),
        BOXES,
        boxes_of(2),
        Input('R', 2, 3, 2, dtype=offset_dtype),
        outsize=(3, 2),
        spatial_scale=0.2,
        **options,
        **ROI_ALIGN,
    )


def ps_roi_pooling(*offset, dtype='float32', **options):
    return Call(
        'deformable_ps_roi_average_pooling_2d',
        Input(2, 36, 'h', 'w', dtype=dtype),
        BOXES,
        boxes_of(2),
        *offset,
        outsize=(4, 5),
        spatial_scale=0.2,
        group_size=3,
        **options,
        **ROI_ALIGN,
    )


CALLS = {
    'DeformableConvolution2DSampler': [
        Call(
            functions.deformable_convolution_2d_sampler,
            Input('n', 4, 'h', 'w'),
            Input('n', 18, 'h', 'w'),
            weights(6, 4, 3, 3),
            Input(6),
            pad=1,
            first=19,
        ),
    ],
    'SampledSum2D': [
        *(sampled_sum('float32') for _ in range(3)),  # for each opset
        sampled_sum('float16'),
        sampled_sum('float64', first=20),
        sampled_sum('float32', border='clamp', **ROI_ALIGN),
        sampled_sum('float16', border='clamp', **ROI_ALIGN),
        sampled_sum('float64', border='clamp', **ROI_ALIGN),
        *(
            Call(
                'sampled_sum_2d',
                Input(3, 2, 'h', 'w'),
                Input(4, 1, 5, 2, low=-3.0, high=9.0),
                Input(4, 1, 5),
                indices=numpy.array([2, 0, 0, 2]),
                border=border,
                **ROI_ALIGN,
            )
            for border in ('zero', 'clamp')
        ),
        Call(
            'sampled_sum_2d',
            Input(3, 2, 6, 8),
            Input(4, 1, 5, 2),
            Input(4, 1, 5),
            Input(4, dtype='int32', low=0, high=3),
            refused=r'functions\.sampled_sum_2d gets numbers that .* values of its in',
        ),
    ],
    'dcn_v3_2d': [
        *(dcn_v3(9, ksize=3, pad=1) for _ in range(3)),
        dcn_v3(6, (7, 8), ksize=(2, 3), pad=1, groups=2),
        dcn_v3(9, (3, 3), ksize=3, stride=(2, 3), pad=(1, 2), dilate=(1, 2)),
        dcn_v3(6, ksize=(3, 2), pad=(2, 1), dilate=2, groups=4),
        dcn_v3(8, ksize=3, pad=1, offset_scale=1.5, remove_center=True),
        dcn_v3(1, ksize=1, dtype='float16'),
        dcn_v3(4, ksize=2, dilate=2, pad=1, dtype='float64', first=20),
    ],
    'multi_scale_deformable_attention': [
        *(attention([(4, 6), (2, 3)]) for _ in range(3)),
        attention([(29, 1), (1, 1)], 'float16'),
        attention([(5, 4), (5, 2)], 'float64', first=20),
    ],
    'deformable_ps_roi_average_pooling_2d': [
        *(ps_roi_pooling(Input('R', 2, 4, 5)) for _ in range(2)),
        ps_roi_pooling(offset=None),
        ps_roi_pooling(
            Input('R', 4, 3, 2), part_size=(3, 2), sampling_ratio=(3, 2), gamma=0.2
        ),
        ps_roi_pooling(Input('R', 8, 5, 6), part_size=(5, 6), dtype='float16'),
        ps_roi_pooling(Input('R', 2, 4, 5), dtype='float64'),
    ],
    'deformable_roi_average_align_2d': [
        *(roi_align(sampling_ratio=2) for _ in range(2)),
        *(roi_align() for _ in range(2)),
        roi_align(sampling_ratio=(2, 3), gamma=0.3),
        roi_align(sampling_ratio=(None, 3), aligned=False),
        roi_align(sampling_ratio=1, aligned=False),
        roi_align('float16', 'float16'),
        roi_align('float64', sampling_ratio=3),
        # A layer that has no offsets yet.
        Call(
            lambda x, boxes, indices: functions.deformable_roi_average_align_2d(
                x, boxes, indices, numpy.zeros((len(boxes), 2, 3, 2), 'f'), (3, 2), 0.2
            ),
            Input(2, 4, 'h', 'w'),
            BOXES,
            boxes_of(2),
            **ROI_ALIGN,
        ),
        Call(
            lambda x, boxes: functions.deformable_roi_average_align_2d(
                x, boxes, INDICES, OFFSET, (3, 2), 0.2, 2
            ),
            Input(1, 4, 'h', 'w'),
            Boxes(2, 4, low=0.0, high=60.0),
            **ROI_ALIGN,
        ),
        Call(
            lambda x, boxes, indices, offset: functions.deformable_roi_average_align_2d(
                x, boxes.array, indices, offset, (3, 2), 0.2, 2
            ),
            Input(2, 4, 'h', 'w'),
            BOXES,
            boxes_of(2),
            Input('R', 2, 3, 2),
            refused=r'functions\.deformable_roi_average_align_2d gets numbers that',
        ),
    ],
    # Activation functions.
    'ClippedReLU': [
        Call('clipped_relu', X, z=0.5),
        Call('clipped_relu', HALF, z=0.5),
        Call('relu6', HW),
    ],
    'CReLU': [Call('crelu', X), Call('crelu', X, axis=-1), Call('crelu', HW, axis=2)],
    'ELU': [Call('elu', X), Call('elu', X, alpha=0.3)],
    'HardSigmoid': elementwise('hard_sigmoid'),
    'LeakyReLU': [Call('leaky_relu', X), Call('leaky_relu', X, slope=0.4)],
    'LogSoftmax': [
        Call('log_softmax', X),
        Call('log_softmax', X, axis=-1),
        Call('log_softmax', ROWS, axis=0),
        Call('log_softmax', HW, axis=2),
    ],
    'PReLUFunction': [
        Call('prelu', X, Input(4)),
        Call('prelu', X, Input(4, 6)),
        Call('prelu', X, Input()),
        Call('prelu', HW, Input(4)),
    ],
    'ReLU': elementwise('relu', HW),
    'Selu': [Call('selu', X), Call('selu', X, alpha=1.2, scale=0.8)],
    'Sigmoid': elementwise('sigmoid', HW),
    'Softmax': [
        Call('softmax', X),
        Call('softmax', X, axis=-2),
        Call('softmax', ROWS, axis=0),
        Call('softmax', HW, axis=3),
    ],
    'Softplus': [
        Call('softplus', X),
        Call('softplus', X, beta=2.5),
        Call('softplus', X, beta=0.5),
        Call('softplus', HALF, beta=2),
    ],
    'Swish': [
        Call('swish', X, vector(4)),
        Call('swish', X, vector()),
        Call('swish', HW, Input(4)),
    ],
    'Tanh': elementwise('tanh', HW),
    # Array manipulations.
    'Cast': [
        Call('cast', X, typ='float64'),
        Call('cast', X, typ='int32'),
        Call('cast', INTS, typ=numpy.float16),
        Call('cast', X, typ='bool'),
    ],
    'Concat': [
        Call(lambda x, y, axis: F.concat([x, y], axis), X, X, axis=axis)
        for axis in (0, 1, -1)
    ],
    'Copy': [Call('copy', X, dst=-1)],
    'Cumsum': [
        Call('cumsum', X),
        Call('cumsum', X, axis=1),
        Call('cumsum', X, axis=-1),
    ],
    'Depth2Space': [Call('depth2space', Input('n', 12, 'h', 'w'), r=2)],
    'Dstack': [operator('F.dstack([x, y])', x, x) for x in (X, ROWS, Input(4))],
    'ExpandDims': [Call('expand_dims', X, axis=axis) for axis in (0, 2, -1, -2)],
    'Flip': [Call('flip', X, axis=1), Call('flip', HW, axis=-1)],
    'FlipLR': [Call('fliplr', X)],
    'FlipUD': [Call('flipud', X)],
    'GetItem': [
        *(
            operator(f'x[{index}]', X)
            for index in (
                '0',
                '-1',
                '0, -2',
                ':, 1:3, ::2, -1',
                ':, ::-1',
                ':, 3:0:-2',
                '..., 1',
                'None, :, None, 2',
                '..., None',
                'np.array(-1) + 0, 1',
                ':, -3:-1',
                ':, [2, 0]',
                ':, [[2, 0], [1, -1]]',
                ':, [2, 0], [1, -1]',
                ':, [2, 0], 1:3, [1, -1]',
                ':, 2, :, [1, -1]',
                ':, :, 2, [1, -1]',
                ':, [[0], [2]], [1, -1, 3]',
                ':, None, [2, 0], [1, -1]',
                '0, [2, 0]',
                ':, np.array([True, False, True, False])',
                '..., [1, -1], None',
                ':, [2, 0], None, [1, 3]',
                ':, 1:, np.array([2, 0]), 1',
                'np.newaxis, 0, ..., [5, 2]',
                ':, [0, 1], :, 1:3',
            )
        ),
        operator('x[:, :, 1:-1, ::2]', HW),
        operator('x[:, [2, 0], -1]', HW),
        operator('F.get_item(x, (slice(None), 2))', X),
        operator('x[:, :, : x.shape[2] // 2]', HW, warns=r'\[\]'),
        operator('x[True]', X, refused=r'the operator \[\] .* True or False'),
        operator('x[:, x.array[0, :, 0, 0] > 0]', X, refused=r'\[\] .*values of its'),
    ],
    'Hstack': [
        operator('F.hstack([x, y])', x, x) for x in (X, ROWS, Input(4), Input())
    ],
    'Moveaxis': [
        Call('moveaxis', X, source=source, destination=destination)
        for source, destination in [
            (1, -1),
            ((1, 3), (-1, 1)),
            ((-1, 1), (0, 2)),
            (0, 2),
        ]
    ],
    'Pad': [
        Call('pad', X, pad_width=2, mode='constant'),
        Call('pad', X, pad_width=(1, 2), mode='constant', constant_values=-1.5),
        Call(
            'pad',
            HALF,
            pad_width=((0, 0), (1, 0), (0, 2), (3, 1)),
            mode='constant',
            constant_values=((7, 7),),
        ),
        Call(
            'pad',
            X,
            pad_width=1,
            mode='constant',
            constant_values=(1, 2),
            refused='F.pad .*constant_values that differ',
        ),
        Call('pad', HW, pad_width=((0, 0), (0, 0), (1, 2), (3, 0)), mode='edge'),
        Call('pad', HW, pad_width=((0, 0), (0, 0), (1, 2), (3, 0)), mode='reflect'),
        Call(
            'pad',
            X,
            pad_width=((0, 0), (0, 0), (1, 2), (3, 0)),
            mode='reflect',
            reflect_type='odd',
            refused="F.pad .*reflect_type='odd'",
        ),
        Call(
            'pad',
            X,
            pad_width=((0, 0), (0, 0), (6, 0), (0, 0)),
            mode='reflect',
            refused='F.pad .*pad_width',
        ),
        Call(
            'pad', X, pad_width=1, mode='symmetric', refused="F.pad .*mode='symmetric'"
        ),
        Call(
            'pad',
            X,
            pad_width=1,
            mode='maximum',
            stat_length=2,
            refused="F.pad .*mode='maximum'",
        ),
    ],
    'Permutate': [
        Call('permutate', X, indices=numpy.array([2, 0, 3, 1], 'i'), axis=axis, inv=inv)
        for axis, inv in [(1, False), (1, True)]
    ]
    + [
        Call('permutate', Input(4, 3), indices=numpy.array([2, 0, 3, 1], 'i')),
        Call('permutate', Input(4, 3), indices=numpy.array([2, 0, 3, 1], 'i'), axis=-1),
        operator(
            'F.permutate(x, np.argsort(x.array[0]).astype("i"), axis=1)',
            ROWS,
            refused='F.permutate .*values of its inputs',
        ),
    ],
    'Repeat': [Call('repeat', X, repeats=3, axis=axis) for axis in (None, 0, 1, -1)]
    + [
        Call('repeat', HW, repeats=2, axis=2),
        Call('repeat', INTS, repeats=2, axis=1),
        Call('repeat', X, repeats=(1, 0, 3, 2), axis=1),
        Call('repeat', X, repeats=(2, 1, 0, 3, 1, 2), axis=-2),
        Call('repeat', Input(3), repeats=(2, 0, 1)),
    ],
    'Reshape': [
        operator(f'F.reshape(x, {shape})', X)
        for shape in (
            '(x.shape[0], -1)',
            '(-1, 8)',
            '(x.shape[0], 2, 2, 48)',
            '(-1,)',
            '(x.shape[0], 4, 48)',
        )
    ]
    + [
        operator('F.reshape(x, (*x.shape[:2], -1))', HW),
        operator('F.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3]))', HW),
        operator('F.reshape(x, (x.shape[0], 2, 2, *x.shape[2:]))', HW),
        operator('F.reshape(x, (2 * x.shape[0], -1, *x.shape[2:]))', HW),
        operator('F.reshape(x, (4 * x.shape[0], *x.shape[2:]))', HW),
        operator('F.reshape(x, (-1, 4, 1, x.shape[3]))', HW),
        operator(
            'F.reshape(x, (x.shape[0], 4, x.shape[2] // 2, 2, x.shape[3]))',
            HW,
            warns='F.reshape',
        ),
        operator('F.flatten(x)', HW),
        operator('F.reshape(x, (1, -1, 6, 8))', X, warns='F.reshape'),
        Call(
            traced('Reshape', lambda x, s: chainer.Variable(x.array.reshape(s.array))),
            Input(4, 6),
            Input(1, dtype='int64', low=-1, high=0),
        ),
    ],
    'ResizeImages': [
        Call('resize_images', X, output_shape=(10, 5)),
        Call('resize_images', X, output_shape=(10, 5), align_corners=False),
        Call('resize_images', X, output_shape=(10, 5), mode='nearest'),
        Call('resize_images', HW, output_shape=(10, 5)),
        Call('resize_images', HW, output_shape=(10, 5), align_corners=False),
        Call(
            'resize_images',
            HW,
            output_shape=(10, 5),
            mode='nearest',
            warns='F.resize_images',
        ),
    ],
    'Rollaxis': [
        Call('rollaxis', X, axis=axis, start=start)
        for axis, start in [(2, 0), (1, 3), (1, 4), (-1, 1), (0, -1), (3, -3)]
    ],
    'SelectItem': [
        Call('select_item', ROWS, Input('n', dtype=dtype, low=0, high=5))
        for dtype in ('int32', 'int64')
    ],
    'Separate': [Call('separate', X, axis=axis) for axis in (1, -1)]
    + [Call('separate', Input('n', 1, 3), axis=1), Call('separate', Input(3, 2))],
    'Shape': [
        Call(traced('Shape', lambda x: chainer.Variable(numpy.array(x.shape))), HW)
    ],
    'Space2Depth': [Call('space2depth', Input('n', 3, 8, 6), r=2)],
    'SplitAxis': [
        Call('split_axis', X, indices_or_sections=[1, 3], axis=1),
        Call('split_axis', X, indices_or_sections=2, axis=-1),
        Call('split_axis', X, indices_or_sections=[1, -2], axis=2),
        Call('split_axis', HW, indices_or_sections=[2, 3], axis=2),
        Call('split_axis', X, indices_or_sections=1, axis=1, force_tuple=False),
    ],
    'Squeeze': [
        Call('squeeze', Input('n', 1, 3, 1), axis=axis) for axis in (1, -1, (1, 3))
    ]
    + [
        Call('squeeze', Input(2, 1, 3, 1)),
        Call('squeeze', Input('n', 1, 3), warns='F.squeeze'),
    ],
    'Stack': [
        Call(lambda x, y, axis: F.stack([x, y], axis), X, X, axis=axis)
        for axis in (0, 2, -1)
    ],
    'Swapaxes': [
        Call('swapaxes', X, axis1=a, axis2=b) for a, b in [(1, 2), (-1, 1), (0, -2)]
    ],
    'Tile': [
        Call('tile', X, reps=reps)
        for reps in (2, (2, 1), (1, 2, 1, 3), (2, 1, 1, 1, 2))
    ]
    + [Call('tile', HW, reps=(1, 1, 2, 2))],
    'Transpose': [
        Call('transpose', X),
        Call('transpose', X, axes=(0, 2, 3, 1)),
        Call('transpose', X, axes=(0, -1, 1, -2)),
        operator('x.T', X),
    ],
    'TransposeSequence': [
        operator('F.transpose_sequence([x, y])', Input(3, 4), Input(3, 4)),
        operator(
            'F.transpose_sequence([x, y])',
            Input(3, 4),
            Input(2, 4),
            refused='F.transpose_sequence',
        ),
    ],
    'Vstack': [
        operator('F.vstack([x, y])', x, x) for x in (X, ROWS, Input(4), Input())
    ],
    'Where': [
        Call(
            lambda x, y, condition: F.where(condition, x, y), X, X, condition=CONDITION
        ),
        operator('F.where(True, x, y)', X, X),
        operator('F.where(x.array > 0, x, -x)', X, refused='F.where .*values of its'),
    ],
    # Neural network connections.
    'Convolution2DFunction': [
        Call('convolution_2d', WIDE, weights(4, 3, 3, 2), Input(4), **options)
        for options in (
            {},
            {'stride': (2, 3)},
            {'pad': (2, 1)},
            {'dilate': (2, 3)},
            {'stride': (2, 3), 'pad': (1, 0), 'cover_all': True},
            {'stride': 3, 'dilate': (1, 2), 'cover_all': True},
        )
    ]
    + [
        Call('convolution_2d', WIDE, weights(6, 1, 3, 3), groups=3),
        Call(
            'convolution_2d', HW, weights(6, 4, 3, 3), stride=2, pad=1, cover_all=True
        ),
        Call(
            'convolution_2d',
            Input('n', 3, 9, 9, dtype='float16'),
            weights(4, 3, 3, 3),
            tol=3,
        ),
    ],
    'ConvolutionND': [
        Call('convolution_nd', x, W, Input(4), **options)
        for x, W in (
            (WIDE, weights(4, 3, 3, 2)),
            (Input('n', 3, 17), weights(4, 3, 3)),
            (Input('n', 3, 7, 8, 9), weights(4, 3, 3, 2, 3)),
        )
        for options in (
            {},
            {'stride': 2, 'pad': 1},
            {'dilate': 2, 'pad': 2},
            {'stride': 3, 'cover_all': True},
        )
    ]
    + [
        Call('convolution_nd', WIDE, weights(6, 1, 3, 3), groups=3),
        Call('convolution_1d', Input('n', 3, 17), weights(4, 3, 3), dilate=2),
        Call(
            'convolution_3d', Input('n', 3, 7, 8, 9), weights(4, 3, 3, 2, 3), dilate=2
        ),
        Call('convolution_nd', HW, weights(5, 4, 3, 3), pad=2, dilate=2),
    ],
    'Deconvolution2DFunction': [
        Call('deconvolution_2d', WIDE, weights(3, 4, 3, 2), Input(4), **options)
        for options in (
            {},
            {'stride': (2, 3)},
            {'pad': (2, 1)},
            {'dilate': (2, 3)},
            {'stride': (2, 3), 'pad': 1, 'outsize': (26, 49)},
            {'stride': (2, 3), 'pad': (1, 0), 'dilate': (2, 1), 'outsize': (28, 50)},
        )
    ]
    + [
        Call('deconvolution_2d', WIDE, weights(3, 2, 3, 3), groups=3),
        Call('deconvolution_2d', HW, weights(4, 3, 4, 4), stride=2, pad=1, dilate=2),
    ],
    'DeconvolutionND': [
        Call('deconvolution_nd', x, W, Input(4), **options)
        for x, W in (
            (WIDE, weights(3, 4, 3, 2)),
            (Input('n', 3, 17), weights(3, 4, 3)),
            (Input('n', 3, 7, 5, 9), weights(3, 4, 3, 2, 3)),
        )
        for options in ({}, {'stride': 2, 'pad': 1}, {'dilate': 2})
    ]
    + [
        Call('deconvolution_nd', WIDE, weights(3, 2, 3, 3), groups=3),
        Call(
            'deconvolution_nd',
            Input('n', 3, 17),
            weights(3, 4, 3),
            stride=3,
            pad=1,
            outsize=(51,),
        ),
        Call('deconvolution_1d', Input('n', 3, 17), weights(3, 4, 3), dilate=2),
        Call(
            'deconvolution_3d', Input('n', 3, 4, 5, 6), weights(3, 2, 3, 2, 3), dilate=2
        ),
        Call('deconvolution_nd', HW, weights(4, 3, 4, 4), stride=2, pad=1),
    ],
    'EmbedIDFunction': [
        Call('embed_id', Input('n', 6, dtype=dtype, low=0, high=5), weights(5, 3))
        for dtype in ('int32', 'int64')
    ]
    + [
        Call(
            'embed_id',
            Input('n', 6, dtype='int32', low=-1, high=5),
            weights(5, 3),
            ignore_label=-1,
        ),
        Call(
            'embed_id',
            Input('n', 6, dtype='int64', low=0, high=5),
            weights(5, 3),
            ignore_label=2,
        ),
    ],
    'LinearFunction': [
        Call('linear', ROWS, weights(3, 5), Input(3)),
        Call('linear', ROWS, weights(3, 5)),
        Call('linear', X, weights(3, 192), Input(3)),
        Call('linear', X, weights(3, 48), n_batch_axes=2),
        Call('linear', X, weights(3, 8), Input(3), n_batch_axes=3),
        Call('linear', Input('n', 5, dtype='float16'), weights(3, 5), tol=3),
    ],
    # Loss functions.
    'SoftmaxCrossEntropy': [
        Call(
            'softmax_cross_entropy',
            ROWS,
            Input('n', dtype='int32', low=-1, high=5),
            **options,
        )
        for options in (
            {},
            {'normalize': False},
            {'ignore_label': 2},
            {'reduce': 'no'},
            {'class_weight': numpy.array([1, 2, 0.5, 3, 0], 'f')},
            {'cache_score': False},
        )
    ]
    + [
        Call(
            'softmax_cross_entropy',
            HW,
            Input('n', 'h', 'w', dtype='int64', low=-1, high=4),
            **options,
        )
        for options in (
            {},
            {'normalize': False},
            {'reduce': 'no', 'ignore_label': 1},
            {'class_weight': numpy.array([1, 2, 0.5, 3], 'f')},
        )
    ]
    + [
        Call(
            'softmax_cross_entropy',
            ROWS,
            Input('n', dtype='int32', low=0, high=5),
            enable_double_backprop=True,
            warns='F.select_item',
        ),
        Call(
            'softmax_cross_entropy',
            Input(7, 5),
            Input(7, dtype='int32', low=-1, high=3),
            enable_double_backprop=True,
            refused='values of its inputs',
        ),
    ]
    + [
        Call(
            'softmax_cross_entropy',
            ROWS,
            Input('n', 5, low=0, high=1),
            soft_target_loss=loss,
            refused='F.softmax_cross_entropy .*probabilities',
        )
        for loss in ('cross-entropy', 'kl-divergence')
    ],
    # Mathematical functions.
    'Absolute': [*elementwise('absolute'), operator('abs(x)', X)],
    'Add': [
        operator('x + y', X, X),
        operator('x + y', X, Input(6, 1)),
        operator('F.add(x, y)', X, X),
        operator('x + y', INTS, INTS),
    ],
    'MultiAdd': [
        operator('F.add(x, y, z)', X, X, X),
        operator('F.add(x, y, z)', X, Input(6, 1), Input(8)),
    ],
    'Arccos': elementwise('arccos', Input('n', 5, low=0.1, high=0.9)),
    'Arcsin': elementwise('arcsin', Input('n', 5, low=0.1, high=0.9)),
    'Arctan': elementwise('arctan'),
    'ArgMax': [Call('argmax', X, axis=axis) for axis in (None, 0, 1, -1)],
    'ArgMin': [Call('argmin', X, axis=axis) for axis in (None, 0, 1, -1)],
    'Broadcast': [
        operator('F.broadcast(x, y)', X, Input(6, 1), warns='F.broadcast'),
        operator('F.broadcast(x, y, z)', Input(4, 1, 8), Input(6, 1), Input(8)),
    ],
    'BroadcastTo': [
        operator('F.broadcast_to(F.mean(x, (2, 3), keepdims=True), x.shape) * x', HW),
        operator('F.scale(x, F.sigmoid(F.mean(x, (2, 3))), axis=0)', HW),
        operator(
            'F.broadcast_to(x, (len(x), 4, 6)) * F.broadcast_to(y, (len(x), 4, 6))',
            Input('n', 4, 1),
            Input(6),
        ),
        operator('F.broadcast_to(x, (x.shape[0], 4, 6, 8))', Input('n', 4, 1, 8)),
        operator('F.broadcast_to(x, (5, 3, 4))', Input(3, 1)),
        operator('F.scale(x, y, axis=1)', X, Input(4)),
        operator('F.bias(x, y, axis=1)', X, Input(4)),
        operator(
            'F.broadcast_to(F.max(x, (2, 3), True), x.shape)',
            HW,
            warns='F.broadcast_to',
        ),
    ],
    'Clip': [
        Call('clip', X, x_min=-0.5, x_max=0.25),
        Call('clip', X, x_min=None, x_max=1.0),
        Call('clip', X, x_min=-0.5, x_max=None),
        Call('clip', HALF, x_min=-0.5, x_max=1),
        Call('clip', DOUBLE, x_min=0, x_max=1),
    ],
    'Cos': elementwise('cos', UNIT),
    'Cosh': elementwise('cosh', UNIT),
    'Div': [operator('x / y', X, POSITIVE), operator('x / y', X, Input(6, 1, low=0.5))],
    'Erf': elementwise('erf'),
    'Exp': elementwise('exp', UNIT),
    'Identity': [operator('F.identity(x)', X), operator('F.identity(x, y)', X, ROWS)],
    'LinearInterpolate': [
        Call(
            'linear_interpolate',
            Input('n', 4, low=0, high=1),
            Input('n', 4),
            Input('n', 4),
        ),
    ],
    'Log': elementwise('log', POSITIVE),
    'LogSumExp': reductions('logsumexp', keepdims=False),
    'MatMul': [
        Call('matmul', Input('n', 4, 5), Input('n', 5, 3)),
        Call('matmul', Input('n', 5, 4), Input('n', 5, 3), transa=True),
        Call('matmul', Input('n', 4, 5), Input('n', 3, 5), transb=True),
        Call('matmul', Input(5), Input(5)),
        Call('matmul', Input(4, 5), Input(5)),
        Call('matmul', Input(5), Input(3, 5), transb=True),
        Call('matmul', Input(5, 4), Input(5), transa=True),
        operator('x @ y', Input('n', 4, 5), Input(5, 3)),
    ],
    'Max': reductions('max'),
    'Maximum': [
        operator('F.maximum(x, y)', X, X),
        operator('F.maximum(x, y)', X, Input(6, 1)),
    ],
    'Mean': reductions('mean')
    + [
        operator('F.average(x, axis=1, weights=y, keepdims=True)', HW, vector(4)),
        Call('mean', X, axis=1, weights=numpy.array([1, 3, 0.5, 2], 'f')),
        operator('F.average(x, axis=(1, 2), keepdims=True)', X),
    ],
    'Min': reductions('min'),
    'Minimum': [operator('F.minimum(x, y)', X, X)],
    'Mul': [operator('x * y', X, X), operator('x * y', X, Input(6, 1))],
    'Neg': [operator('-x', X), operator('-x', INTS)],
    'PowVarVar': [operator('x ** y', POSITIVE, UNIT)],
    'Prod': reductions('prod', UNIT),
    'RsqrtGPU': [
        Call('rsqrt', POSITIVE),
        Call(traced('RsqrtGPU', lambda x: 1 / F.sqrt(x)), POSITIVE),
    ],
    'Sin': elementwise('sin', UNIT),
    'Sinh': elementwise('sinh', UNIT),
    'Sqrt': elementwise('sqrt', POSITIVE),
    'Square': elementwise('square'),
    'Sub': [operator('x - y', X, X), operator('x - y', X, Input(6, 1))],
    'Sum': reductions('sum'),
    'Tan': elementwise('tan', UNIT),
    'sign': [*elementwise('sign'), operator('F.sign(x) * x', X)],
    'floor': [
        *elementwise('floor'),
        operator('F.floor(x * 3) / 3 + x', HW),
        operator('x // y', X, POSITIVE),
        operator('x // 0.3', X),
    ],
    'ceil': [*elementwise('ceil'), operator('F.ceil(x * 3) / 3 + x', HW)],
    'fix': [*elementwise('fix'), operator('F.fix(x * 3) / 3 + x', HW)],
    # Noise injections.
    'Dropout': [
        Call('dropout', X, ratio=0.9),
        Call(
            lambda x, return_mask: F.dropout(x, return_mask=return_mask)[0],
            X,
            return_mask=True,
        ),
        Call('dropout', X, mask=numpy.ones((1, 4, 6, 8), 'f')),
        Call(
            lambda x, mask: in_training(F.dropout, x, mask=mask),
            X,
            mask=CONDITION.astype('f') * 3,
        ),
        Call(lambda x: in_training(F.dropout, x), X, refused='F.dropout .*train'),
    ],
    # Normalization functions.
    'BatchNormalization': [
        batch_norm('batch_normalization', x, size, **options)
        for x, size, options in (
            (X, 4, {}),
            (X, 4, {'eps': 0.5}),
            (X, 8, {'axis': (0, 1, 2)}),
            (Input('n', 4, 3), 3, {'axis': (0, 1)}),
            (HW, 4, {}),
            (HALF, 4, {}),
            (
                X,
                4,
                {
                    'running_mean': numpy.zeros(4, 'f'),
                    'decay': 0.5,
                    'running_var': numpy.ones(4, 'f'),
                },
            ),
        )
    ]
    + [operator('F.batch_normalization(x, y, z)', Input(3, 4, 2), *2 * [Input(4, 2)])],
    'FixedBatchNormalization': [
        batch_norm('fixed_batch_normalization', x, size, **options)
        for x, size, options in (
            (X, 4, {}),
            (X, 4, {'eps': 0.5}),
            (X, 8, {'axis': (0, 1, 2)}),
            (HW, 4, {}),
            (ROWS, 5, {}),
            (HALF, 4, {}),
        )
    ],
    'GroupNormalization': [
        Call(
            lambda x, gamma, beta, groups, eps=1e-5: F.group_normalization(
                x, groups, gamma, beta, eps
            ),
            x,
            vector(4),
            Input(4),
            **options,
        )
        for x, options in (
            (X, {'groups': 2}),
            (X, {'groups': 4, 'eps': 0.5}),
            (HW, {'groups': 1}),
            (HALF, {'groups': 2}),
            (Input('n', 4), {'groups': 2}),
        )
    ],
    'LayerNormalization': [
        Call('layer_normalization', ROWS, vector(5), Input(5)),
        Call('layer_normalization', ROWS, vector(5), Input(5), eps=0.5),
    ],
    'LocalResponseNormalization': [
        Call('local_response_normalization', Input('n', 9, 'h', 'w'), **options)
        for options in (
            {},
            {'n': 3},
            {'n': 4, 'alpha': 0.3},
            {'k': 1, 'alpha': 0.2, 'beta': 0.5},
        )
    ],
    'NormalizeL2': [
        Call('normalize', X),
        Call('normalize', X, axis=(1, 2)),
        Call('normalize', X, axis=-1),
        Call('normalize', X, eps=0.5),
        Call('normalize', Input('n', 4, 3, low=0, high=1e-6)),
    ],
    # Spatial pooling.
    'AveragePooling2D': [
        Call('average_pooling_2d', HW, **options)
        for options in (
            {'ksize': 3},
            {'ksize': (3, 2), 'stride': (2, 1), 'pad': (1, 0)},
            {'ksize': 2, 'pad': 2, 'stride': 1},
        )
    ]
    + [
        operator('F.average_pooling_2d(x, x.shape[2:])', X),
        operator(
            'F.average_pooling_2d(x, x.shape[2:])', HW, warns='F.average_pooling_2d'
        ),
    ],
    'AveragePoolingND': [
        Call('average_pooling_nd', x, **options)
        for x in (HW, Input('n', 2, 'w'), Input('n', 2, 5, 6, 7))
        for options in (
            {'ksize': 3},
            {'ksize': 3, 'stride': 2, 'pad': 1},
            {'ksize': 3, 'stride': 2, 'pad': 1, 'pad_value': None},
        )
    ]
    + [
        Call('average_pooling_1d', Input('n', 2, 'w'), ksize=3, pad=1, pad_value=None),
        Call('average_pooling_3d', Input('n', 2, 5, 6, 7), ksize=3, pad=1),
    ],
    'MaxPoolingND': [
        Call('max_pooling_nd', x, **options)
        for x in (HW, Input('n', 2, 'w'), Input('n', 2, 5, 6, 7))
        for options in (
            {'ksize': 3},
            {'ksize': 3, 'stride': 2, 'pad': 1},
            {'ksize': 2, 'stride': 3},
            {'ksize': 3, 'stride': 2, 'cover_all': False},
        )
    ]
    + [
        Call('max_pooling_1d', Input('n', 2, 'w'), ksize=3, stride=2),
        Call('max_pooling_3d', Input('n', 2, 5, 6, 7), ksize=3, stride=2),
        Call('max_pooling_nd', X, ksize=3, return_indices=True, refused='output 1 is'),
    ],
    'MaxPooling2D': [
        Call('max_pooling_2d', HW, **options)
        for options in (
            {'ksize': 3},
            {'ksize': (3, 2), 'stride': (2, 3), 'pad': (1, 0)},
            {'ksize': 2, 'stride': 5, 'pad': 1},
            {'ksize': 3, 'pad': 3, 'stride': 2},
            {'ksize': 3, 'stride': 2, 'cover_all': False},
        )
    ]
    + [
        operator('F.max_pooling_2d(x, 3, return_indices=True)[0]', X),
        Call('max_pooling_2d', X, ksize=3, return_indices=True, refused='output 1 is'),
    ],
    'ROIPooling2D': [
        Call(
            roi_pooling,
            X,
            Input(3, 4, low=0.0, high=7.0),
            outh=2,
            outw=3,
            spatial_scale=0.7,
            opset_version=19,
        ),
        Call(
            roi_pooling,
            HW,
            Input(3, 4, low=-3.0, high=9.0),
            outh=1,
            outw=2,
            spatial_scale=1.3,
            opset_version=19,
        ),
    ],
    'Unpooling2D': [
        Call('unpooling_2d', HW, **options)
        for options in (
            {'ksize': 2},
            {'ksize': (3, 2)},
            {'ksize': 2, 'cover_all': False},
            {'ksize': (3, 2), 'stride': (2, 3)},
            {'ksize': 3, 'stride': 2, 'pad': 1},
        )
    ]
    + [
        Call('unpooling_2d', X, ksize=2, outsize=(12, 15)),
        Call('unpooling_2d', X, ksize=3, stride=2, pad=1, outsize=(11, 15)),
    ],
    # Recurrent networks.
    'n_step_gru': [
        n_step_gru(1, 0.0, (3, 3)),
        n_step_gru(2, 0.5, (3, 3)),
        n_step_gru(1, 0.0, (3, 2), refused='F.n_step_gru'),
    ],
}
for name, text in [
    ('AddConstant', 'x + 1.5'),
    ('MulConstant', 'x * -2.5'),
    ('PowVarConst', 'x ** 3'),
    ('PowConstVar', '2 ** x'),
    ('SubFromConstant', '1.5 - x'),
    ('DivFromConstant', '2 / x'),
]:
    CALLS[name] = [
        operator(text, x)
        for x in (POSITIVE, HALF if name != 'DivFromConstant' else POSITIVE)
    ]


def in_training(function, *args, **kwargs):
    with chainer.using_config('train', True):
        return function(*args, **kwargs)


ALL = [(name, call) for name, calls in CALLS.items() for call in calls]


def run(exported, inputs):
    session = onnxruntime.InferenceSession(
        exported.SerializeToString(), providers=['CPUExecutionProvider']
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs)))


@pytest.mark.parametrize(
    ('call', 'opset_version'),
    [
        pytest.param(
            call,
            max(call.first, min(call.opset_version, (16, 19, 22)[i % 3])),
            id=f'{name}: {call}',
        )
        for i, (name, call) in enumerate(ALL)
    ],
)
def test_call(call, opset_version):
    model = call.model()
    args = [i.array(0) for i in call.inputs]
    shapes = [tuple(i.shape) for i in call.inputs]
    if call.refused is not None:
        with pytest.raises((RuntimeError, ValueError), match=call.refused):
            export(model, args, input_shapes=shapes)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        exported = export(model, args, input_shapes=shapes, opset_version=opset_version)
    messages = [str(warning.message) for warning in caught]
    if call.warns is not None:
        (message,) = messages
        assert re.search(f'{call.warns}.* gets numbers .* sizes', message)
        return
    assert messages == []
    args = [i.array(1) for i in call.inputs]
    with chainer.using_config('train', False):
        expected = model(*map(chainer.Variable, args))
    if isinstance(expected, chainer.Variable):
        expected = [expected]
    actual = run(exported, args)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype
        if a.dtype.kind != 'f':
            numpy.testing.assert_array_equal(a, e.array)
            continue
        # onnxruntime takes the lowest number for a maximum of nothing.
        a, e = (
            numpy.maximum(array, -6e4).astype(array.dtype) for array in (a, e.array)
        )
        assert_close(a, e, f'{call}', 'float16' if call.tol == 3 else None)


@pytest.mark.parametrize('name', CALLS)
def test_every_option_is_swept(name):
    """Of the functions that are called by their names."""
    calls = [call for call in CALLS[name] if isinstance(call.function, str)]
    given, options = set(), {}
    for call in calls:
        parameters = inspect.signature(known(call.function)).parameters
        for i, parameter in enumerate(parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            options[parameter.name] = parameter.default
            value = call.options.get(parameter.name, parameter.default)
            if i < len(call.inputs) or value is not parameter.default:
                given.add(parameter.name)
    assert given == options.keys()


def test_every_converter_is_swept():
    from onnx_chainer import mapping

    assert (
        CALLS.keys() == mapping.converters.keys() | _onnx_converters.CONVERTERS.keys()
    )
