"""Arguments for every public function of chainer.functions."""

from __future__ import annotations

import operator

import chainer.functions as F
import numpy

from tests.battery.arguments import (
    DTYPES,
    FLOATS,
    Call,
    Scalar,
    Sparse,
    Values,
    call,
    constant,
    index,
    large,
    real,
)


def cycle(shape):
    """A sampler of negative_sampling: 0, 1, 2, 3, 4, 0, ..."""
    return numpy.arange(numpy.prod(shape)).reshape(shape).astype('i') % 5


def product_of_tanh(x, y):
    """A function for forget."""
    return F.tanh(x) * y


def _weights(n_gates, units, inputs, n_layers, directions):
    """Weights and biases of a stacked recurrent network."""
    ws, bs = [], []
    for layer in range(n_layers):
        width = inputs if layer == 0 else units * directions
        for _ in range(directions):
            half = n_gates // 2
            ws.append([real(units, width)] * half + [real(units, units)] * half)
            bs.append([real(units)] * n_gates)
    return ws, bs


def _recurrent(n_gates, directions, states, **options):
    """A call of an n_step function: three sequences of four, three and one step."""
    n_layers, units, inputs = 2, 3, 4
    xs = [real(3, inputs), real(2, inputs), real(2, inputs), real(1, inputs)]
    hidden = [real(n_layers * directions, 3, units)] * states
    ws, bs = _weights(n_gates, units, inputs, n_layers, directions)
    return [
        call(n_layers, 0.0, *hidden, ws, bs, xs, **options),
        call(n_layers, 0.25, *hidden, ws, bs, xs, **options),
        call(n_layers, 0.25, *hidden, ws, bs, xs, **options).testing(),
    ]


def _elementwise(low=-2, high=2):
    return [call(real(3, 5, low=low, high=high)), call(real(low=low, high=high))]


#: More elements than 65504, the largest number of float16.
_MANY = 66003

_BOXES = Values([[0.5, 1, 4.25, 5], [2, 0, 6, 3.5], [1, 1, 1.5, 6.75]])
_BOX_IMAGES = Values([1, 0, 1], 'int32')
_LENGTHS = Values([4, 2, 3], 'int32')
_TEST_BOXES = [
    call(real(2, 3, 7, 8), _BOXES, _BOX_IMAGES, outsize, spatial_scale=scale)
    for outsize, scale in ((3, 1.0), ((2, 3), 0.75))
]
_ALIGN_BOXES = [
    *_TEST_BOXES,
    call(real(2, 3, 7, 8), _BOXES, _BOX_IMAGES, (2, 3), 0.75, sampling_ratio=(2, 3)),
]

_LABELS = index(5, upto=4)
_MARKED_LABELS = index(5, low=-1, upto=4)
_BINARY = index(5, 3, low=-1, upto=2)
_NORMALIZED = real(4, 3, 5, 2), real(3), real(3)
_FEW = {'low': -0.25, 'high': 0.25}  # their squares add up to less than 65504
_POSITIVE = {'low': 0.125, 'high': 2}
_CHANCE = {'low': 0, 'high': 1}

#: The calls of each function.
CALLS: dict[str, list[Call]] = {
    # activation
    'clipped_relu': [call(real(3, 5)), call(real(3, 5), z=0.75)],
    'relu6': [call(real(3, 5, low=-8, high=8))],
    'crelu': [call(real(3, 5)), call(real(3, 4, 5), axis=-1)],
    'elu': [
        call(real(3, 5)),
        call(real(3, 5), alpha=0.3),
        call(real(3, 5), alpha=Scalar(2, 'int64')),
    ],
    'hard_sigmoid': [call(real(3, 5, low=-4, high=4))],
    'leaky_relu': [call(real(3, 5)), call(real(3, 5), slope=0.3)],
    'log_softmax': [
        call(real(3, 5)),
        call(real(3, 4, 5), axis=2),
        large(real(3, _MANY)),
    ],
    'maxout': [call(real(3, 6), 2), call(real(3, 4, 6), 3, axis=2)],
    'prelu': [
        call(real(3, 4, 5), real(4)),
        call(real(3, 4, 5), real(4, 5)),
        call(real(3, 4), real()),
    ],
    'relu': _elementwise(),
    'rrelu': [
        call(real(3, 5)),
        call(real(3, 5), l=0.2, u=0.7, return_r=True),
        call(real(3, 5), l=0.2, u=0.7).testing(),
        call(real(3, 5), r=constant(3, 5)),
    ],
    'selu': [call(real(3, 5)), call(real(3, 5), alpha=0.7, scale=1.3)],
    'sigmoid': _elementwise(),
    'softmax': [
        call(real(3, 5)),
        call(real(3, 4, 5), axis=-1),
        large(real(3, _MANY)),
    ],
    'softplus': [call(real(3, 5)), call(real(3, 5), beta=2.5)],
    'swish': [call(real(3, 4), real(4)), call(real(3, 4, 5), real(4, 5))],
    'tanh': _elementwise(),
    # array
    'as_strided': [
        call(real(7), (3, 2), (1, 1)),
        call(real(3, 4), (2, 3), (5, 1), storage_offset=2),
    ],
    'broadcast': [
        call(real(3, 1), real(1, 4), real(2, 1, 1)),
        call(real(3, 4), real(dtype='float32')),
    ],
    'broadcast_to': [call(real(3, 1), (2, 3, 4))],
    'cast': [
        call(real(3, 4), dtype)
        for dtype in (*FLOATS, 'int8', 'int32', 'uint8', 'uint64', 'bool')
    ],
    'concat': [call([real(3, 2), real(3, 4)]), call([real(2, 3), real(1, 3)], axis=0)],
    'copy': [call(real(3, 4), '@numpy'), call(real(3, 4), -1)],
    'depth2space': [call(real(2, 12, 3, 4), 2)],
    'diagonal': [call(real(3, 4)), call(real(2, 3, 4), offset=1, axis1=2, axis2=0)],
    'dstack': [call([real(3, 4), real(3, 4)]), call([real(3), real(3)])],
    'expand_dims': [call(real(3, 4), 1), call(real(3, 4), -1)],
    'flatten': [call(real(3, 4)), call(real())],
    'flip': [call(real(3, 4), 0), call(real(3, 4), -1)],
    'fliplr': [call(real(3, 4))],
    'flipud': [call(real(3, 4))],
    'get_item': [
        call(real(3, 4, 5), slices)
        for slices in (
            1,
            -1,
            (slice(None), slice(3, None, -2)),
            (Ellipsis, 2, None),
            [2, 0, 2],
            (index(2, 2, upto=3), index(2, 2, upto=4)),
            Values([True, False, True], 'bool'),
        )
    ],
    'hstack': [call([real(3, 2), real(3, 4)]), call([real(3), real(2)])],
    'im2col': [
        call(real(2, 3, 7, 6), 3),
        call(real(2, 3, 7, 6), (3, 2), (2, 1), (1, 0), cover_all=True, dilate=(1, 2)),
    ],
    'moveaxis': [call(real(2, 3, 4), 0, -1), call(real(2, 3, 4), (0, 1), (2, 0))],
    'pad': [
        call(real(3, 4), 2, 'constant'),
        call(real(3, 4), ((1, 2), (0, 3)), 'constant', constant_values=3),
        call(real(3, 4), ((1, 2), (0, 3)), 'constant', constant_values=-1),
        call(real(3, 4), (1, 2), 'constant', constant_values=((1, 2), (3, 4))),
        call(real(3, 4), 2, 'edge'),
        call(real(3, 4), 2, 'reflect'),
    ],
    'pad_sequence': [
        call([real(3, 2), real(1, 2), real(4, 2)]),
        call([real(3), real(1), real(4)], length=6, padding=-1),
        call([real(3), real(1), real(4)], length=6, padding=1.5),
    ],
    'permutate': [
        call(real(3, 4), Values([2, 0, 1], 'int32')),
        call(real(4, 3), Values([2, 0, 1], 'int32'), axis=1, inv=True),
    ],
    'repeat': [call(real(3, 4), 2), call(real(3, 4), (2, 0, 3), axis=0)],
    'reshape': [call(real(3, 4), (2, -1)), call(real(3, 4), (6, 2))],
    'resize_images': [
        call(real(2, 3, 4, 5), (7, 3)),
        call(real(2, 3, 4, 5), (7, 3), align_corners=False),
        call(real(2, 3, 4, 5), (7, 3), mode='nearest', align_corners=False),
    ],
    'rollaxis': [call(real(2, 3, 4), 2), call(real(2, 3, 4), 0, start=2)],
    'scatter_add': [
        call(real(3, 4), 1, real(4)),
        call(real(3, 4), [0, 2, 0], real(3, 4)),
        call(real(3, 4), (slice(None), index(5, upto=4)), real(3, 5)),
        call(real(3), Values([True, False, True], 'bool'), real(2)),
    ],
    'select_item': [call(real(5, 4), _LABELS)],
    'separate': [call(real(3, 4)), call(real(3, 4), axis=-1)],
    'space2depth': [call(real(2, 3, 4, 6), 2)],
    'spatial_transformer_grid': [call(real(2, 2, 3), (4, 5))],
    'spatial_transformer_sampler': [
        call(real(2, 3, 5, 4), real(2, 2, 3, 6, low=-1.5, high=1.5)),
    ],
    'split_axis': [
        call(real(3, 6), 3, 1),
        call(real(3, 6), [1, 4], 1),
        call(real(3, 6), Values([1, 4], 'int64'), -1),
        call(real(3, 6), 1, 1, force_tuple=False),
    ],
    'squeeze': [call(real(1, 3, 1)), call(real(1, 3, 1), axis=-1)],
    'stack': [call([real(3, 4), real(3, 4)]), call([real(3), real(3)], axis=-1)],
    'swapaxes': [call(real(2, 3, 4), 0, -1)],
    'tile': [call(real(3, 4), 2), call(real(3, 4), (2, 1, 3))],
    'transpose': [call(real(2, 3, 4)), call(real(2, 3, 4), axes=(-1, 0, 1))],
    'transpose_sequence': [call([real(4, 2), real(3, 2), real(1, 2)])],
    'vstack': [call([real(2, 3), real(1, 3)]), call([real(3), real(3)])],
    'where': [
        call(index(3, 4, upto=2, dtype='bool'), real(3, 4), real(3, 4)),
        call(index(4, upto=2, dtype='bool'), real(3, 1), real(3, 4)),
    ],
    # connection
    'bilinear': [
        call(real(3, 4), real(3, 5), real(4, 5, 2)),
        call(real(3, 2, 2), real(3, 5), real(4, 5, 2), real(4, 2), real(5, 2), real(2)),
    ],
    'convolution_2d': [
        call(real(2, 3, 7, 6), real(4, 3, 3, 2)),
        call(
            real(2, 4, 7, 6),
            real(6, 2, 3, 2),
            real(6),
            (2, 1),
            (1, 0),
            cover_all=True,
            dilate=(1, 2),
            groups=2,
        ),
    ],
    'convolution_1d': [
        call(real(2, 3, 7), real(4, 3, 3)),
        call(
            real(2, 4, 7),
            real(6, 2, 3),
            real(6),
            2,
            1,
            cover_all=True,
            dilate=2,
            groups=2,
        ),
    ],
    'convolution_3d': [
        call(real(2, 3, 5, 4, 3), real(4, 3, 3, 2, 2)),
        call(
            real(2, 4, 5, 4, 3),
            real(6, 2, 3, 2, 1),
            real(6),
            (2, 1, 1),
            (1, 0, 1),
            cover_all=True,
            dilate=(1, 2, 1),
            groups=2,
        ),
    ],
    'convolution_nd': [call(real(2, 3, 5, 4), real(4, 3, 3, 2), real(4), 2, (1, 0))],
    'deconvolution_2d': [
        call(real(2, 3, 4, 5), real(3, 4, 3, 2)),
        call(
            real(2, 4, 4, 5),
            real(4, 3, 3, 2),
            real(6),
            (2, 1),
            (1, 0),
            outsize=(8, 7),
            dilate=(1, 2),
            groups=2,
        ),
    ],
    'deconvolution_1d': [
        call(real(2, 3, 4), real(3, 4, 3)),
        call(
            real(2, 4, 4),
            real(4, 3, 3),
            real(6),
            2,
            1,
            outsize=(10,),
            dilate=2,
            groups=2,
        ),
    ],
    'deconvolution_3d': [
        call(real(2, 3, 3, 4, 2), real(3, 4, 3, 2, 2)),
        call(real(2, 4, 3, 4, 2), real(4, 3, 3, 2, 1), real(6), (2, 1, 1), groups=2),
    ],
    'deconvolution_nd': [call(real(2, 3, 4, 5), real(3, 4, 3, 2), real(4), 2, (1, 0))],
    'deformable_convolution_2d_sampler': [
        call(real(2, 3, 6, 5), real(2, 12, 4, 4), real(4, 3, 3, 2)),
        call(
            real(2, 3, 6, 5),
            real(2, 12, 3, 4),
            real(4, 3, 3, 2),
            real(4),
            stride=(2, 1),
            pad=(1, 0),
        ),
    ],
    'depthwise_convolution_2d': [
        call(real(2, 3, 7, 6), real(2, 3, 3, 2)),
        call(real(2, 3, 7, 6), real(2, 3, 3, 2), real(6), (2, 1), (1, 0)),
    ],
    'dilated_convolution_2d': [
        call(real(2, 3, 7, 6), real(4, 3, 3, 2)),
        call(
            real(2, 3, 7, 6),
            real(4, 3, 3, 2),
            real(4),
            (2, 1),
            (1, 0),
            (1, 2),
            cover_all=True,
        ),
    ],
    'embed_id': [
        call(_LABELS, real(4, 3)),
        call(index(3, 2, low=-1, upto=4), real(4, 3), ignore_label=-1),
    ],
    'linear': [
        call(real(3, 4), real(5, 4)),
        call(real(3, 2, 2), real(5, 4), real(5)),
        call(real(3, 2, 4), real(5, 4), real(5), n_batch_axes=2),
        large(real(_MANY, 2, **_FEW), real(3, 2), real(3)),
    ],
    'local_convolution_2d': [
        call(real(2, 3, 7, 6), real(4, 3, 5, 3, 3, 2), real(4, 3, 5), (2, 1)),
    ],
    'shift': [call(real(2, 10, 5, 4)), call(real(2, 7, 5, 4), ksize=(3, 1), dilate=2)],
    # evaluation
    'accuracy': [
        call(real(5, 4), _LABELS),
        call(real(5, 4), _MARKED_LABELS, ignore_label=-1),
        large(real(_MANY, 3), index(_MANY, upto=3)),
        large(real(_MANY, 3), index(_MANY, low=-1, upto=3), ignore_label=-1),
    ],
    'binary_accuracy': [
        call(real(5, 3), _BINARY),
        large(real(_MANY), index(_MANY, low=-1, upto=2)),
    ],
    'classification_summary': [
        call(real(5, 4), _LABELS),
        call(real(5, 4), _MARKED_LABELS, label_num=4, beta=0.5),
        large(real(_MANY, 3), index(_MANY, upto=3)),
    ],
    'f1_score': [
        call(real(5, 4), _LABELS),
        large(real(_MANY, 3), index(_MANY, upto=3)),
    ],
    'precision': [
        call(real(5, 4), _LABELS),
        large(real(_MANY, 3), index(_MANY, upto=3)),
    ],
    'recall': [
        call(real(5, 4), _LABELS, ignore_label=2),
        large(real(_MANY, 3), index(_MANY, upto=3)),
    ],
    'r2_score': [
        call(real(5, 3), real(5, 3)),
        call(real(5, 3), real(5, 3), multioutput='raw_values'),
        large(real(_MANY, 2, **_FEW), real(_MANY, 2, **_FEW)),
    ],
    # loss
    'absolute_error': [call(real(3, 5), real(3, 5))],
    'black_out': [
        call(real(5, 3), _LABELS, real(4, 3), index(5, 2, upto=4)),
        call(real(5, 3), _LABELS, real(4, 3), index(5, 2, upto=4), reduce='no'),
        large(
            real(_MANY, 2, **_FEW),
            index(_MANY, upto=4),
            real(4, 2),
            index(_MANY, 2, upto=4),
        ),
    ],
    'contrastive': [
        call(real(5, 3), real(5, 3), index(5, upto=2)),
        call(real(5, 3), real(5, 3), index(5, upto=2), margin=4, reduce='no'),
        call(real(5, 3), real(5, 3), index(5, upto=2), margin=2.5),
        call(real(5, 3), real(5, 3), index(5, upto=2), margin=Scalar(4, 'int64')),
        large(real(_MANY, 2, **_FEW), real(_MANY, 2, **_FEW), index(_MANY, upto=2)),
    ],
    'crf1d': [
        call(
            real(3, 3),
            [real(4, 3), real(2, 3)],
            [index(4, upto=3), index(2, upto=3)],
            reduce=reduce,
        )
        for reduce in ('mean', 'no')
    ]
    + [
        large(real(2, 2), [real(_MANY, 2, **_FEW)], [index(_MANY, upto=2)]),
    ],
    'argmax_crf1d': [call(real(3, 3), [real(4, 3), real(2, 3)])],
    'cross_covariance': [
        call(real(5, 3), real(5, 2)),
        call(real(5, 3), real(5, 2), reduce='no'),
        large(real(_MANY, 2, **_FEW), real(_MANY, 3, **_FEW), reduce='no'),
        large(real(_MANY, 2, **_FEW), real(_MANY, 3, **_FEW)),
    ],
    'connectionist_temporal_classification': [
        call([real(3, 5)] * 4, index(3, 2, low=1, upto=5), 0),
        call([real(3, 5)] * 4, index(3, 2, low=1, upto=5), 0, reduce='no'),
        call(
            [real(3, 5)] * 4,
            index(3, 2, low=0, upto=4),
            4,
            _LENGTHS,
            Values([2, 1, 2], 'int32'),
        ),
        large([real(_MANY, 3, **_FEW)] * 2, index(_MANY, 1, low=1, upto=3), 0),
    ],
    'decov': [
        call(real(5, 3)),
        call(real(5, 3), reduce='no'),
        large(real(_MANY, 3, **_FEW), reduce='no'),
        large(real(_MANY, 3, **_FEW)),
    ],
    'discriminative_margin_based_clustering_loss': [
        call(real(3, 3, 5, 4), index(3, 5, 4, upto=4), 0.5, 1.5, 3),
        call(
            real(3, 3, 5, 4),
            index(3, 5, 4, upto=4),
            0.5,
            1.5,
            3,
            norm=2,
            alpha=0.5,
            beta=1.5,
            gamma=0.25,
        ),
        large(real(1, 2, 263, 251, **_FEW), index(1, 263, 251, upto=3), 0.05, 1.5, 2),
    ],
    'hinge': [
        call(real(5, 4), _LABELS),
        call(real(5, 4), _LABELS, norm='L2'),
        call(real(5, 4), _LABELS, norm='L2', reduce='no'),
        large(real(_MANY, 1, low=0.75, high=1.25), index(_MANY, upto=1)),
    ],
    'huber_loss': [
        call(real(3, 5), real(3, 5), Scalar(1, 'int64')),
        call(real(3, 5), real(3, 5), 1),
        call(real(3, 5), real(3, 5), 0.5, reduce='no'),
        call(real(3, 5), real(3, 5), delta=0.3),
        large(real(3, _MANY, **_FEW), real(3, _MANY, **_FEW), 0.125),
    ],
    'mean_absolute_error': [
        call(real(3, 5), real(3, 5)),
        large(real(_MANY, 2, **_FEW), real(_MANY, 2, **_FEW)),
    ],
    'mean_squared_error': [
        call(real(3, 5), real(3, 5)),
        large(real(_MANY, 2, **_FEW), real(_MANY, 2, **_FEW)),
    ],
    'negative_sampling': [
        call(real(5, 3), _LABELS, real(5, 3), cycle, 3),
        call(real(5, 3), _LABELS, real(5, 3), cycle, 3, reduce='no'),
        call(real(5, 3), _MARKED_LABELS, real(5, 3), cycle, 3, return_samples=True),
    ],
    'sigmoid_cross_entropy': [
        call(real(5, 3), _BINARY),
        call(real(5, 3), _BINARY, normalize=False),
        call(real(5, 3), _BINARY, reduce='no'),
        large(real(_MANY, 2), index(_MANY, 2, low=-1, upto=2)),
        large(real(_MANY, 2), index(_MANY, 2, upto=2), normalize=False),
    ],
    'softmax_cross_entropy': [
        call(real(5, 4), _LABELS),
        call(real(5, 4), _MARKED_LABELS, normalize=False),
        call(real(5, 4), _LABELS, cache_score=False, ignore_label=2),
        call(real(5, 4), _LABELS, class_weight=constant(4, **_POSITIVE)),
        call(real(5, 4), _MARKED_LABELS, enable_double_backprop=True),
        call(real(5, 4), _LABELS, reduce='no', enable_double_backprop=True),
        call(real(5, 4, 2), index(5, 2, upto=4), reduce='no'),
        call(real(5, 4), real(5, 4, **_CHANCE)),
        call(real(5, 4), real(5, 4, **_CHANCE), soft_target_loss='kl-divergence'),
        large(real(_MANY, 3, **_FEW), index(_MANY, upto=3)),
        large(
            real(_MANY, 3, **_FEW),
            index(_MANY, low=-1, upto=3),
            normalize=False,
            enable_double_backprop=True,
        ),
        large(real(_MANY, 2, **_FEW), real(_MANY, 2, **_CHANCE)),
    ],
    'squared_difference': [call(real(3, 5), real(3, 5))],
    'squared_error': [call(real(3, 5), real(3, 5))],
    'triplet': [
        call(real(5, 3), real(5, 3), real(5, 3)),
        call(real(5, 3), real(5, 3), real(5, 3), margin=1.5, reduce='no'),
        large(*[real(_MANY, 2, **_FEW)] * 3),
    ],
    'bernoulli_nll': [
        call(real(3, 5), real(3, 5), reduce=reduce) for reduce in ('sum', 'mean', 'no')
    ]
    + [large(real(_MANY), real(_MANY), reduce='mean')],
    'gaussian_kl_divergence': [
        call(real(3, 5), real(3, 5), reduce=reduce) for reduce in ('sum', 'mean', 'no')
    ]
    + [large(real(_MANY, **_FEW), real(_MANY, **_FEW), reduce='mean')],
    'gaussian_nll': [
        call(real(3, 5), real(3, 5), real(3, 5), reduce=reduce)
        for reduce in ('sum', 'mean', 'no')
    ]
    + [large(*[real(_MANY, **_FEW)] * 3, reduce='mean')],
    # math
    'arctanh': _elementwise(-1, 1),
    'average': [
        call(real(3, 4, 5)),
        call(real(3, 4, 5), axis=(0, -1), keepdims=True),
        call(real(3, 4, 5), axis=1, weights=constant(4, **_POSITIVE)),
        call(real(3, 4), weights=real(3, 4, **_POSITIVE)),
        large(real(_MANY, 2)),
        large(real(_MANY, 2), axis=0),
        large(real(_MANY, 2), axis=0, weights=constant(_MANY, **_CHANCE)),
    ],
    'absolute': _elementwise(),
    'add': [
        call(real(3, 4), real(3, 4)),
        call(real(3, 4), real(4), real(3, 1)),
        call(real(3, 4), 1.5),
    ],
    'batch_l2_norm_squared': [call(real(3, 4, 5)), large(real(2, _MANY, **_FEW))],
    'bias': [call(real(3, 4, 5), real(4)), call(real(3, 4, 5), real(3, 4), axis=0)],
    'ceil': _elementwise(),
    'cholesky': [call(real(3, 3, diagonal=8))],
    'clip': [
        call(real(3, 5), -0.7, 0.9),
        call(real(3, 5), 0, 1),
        call(real(3, 5), Scalar(0, 'int64'), Scalar(1, 'int64')),
        call(real(3, 5), None, 1.25),
    ],
    'cumprod': [call(real(3, 4)), call(real(3, 4), axis=-1)],
    'cumsum': [
        call(real(3, 4)),
        call(real(3, 4), axis=0),
        large(real(_MANY, **_FEW)),
    ],
    'batch_det': [call(real(2, 3, 3, diagonal=5))],
    'det': [call(real(3, 3, diagonal=5))],
    'digamma': _elementwise(0.5, 4),
    'einsum': [
        call('ij,jk->ik', real(3, 4), real(4, 2)),
        call('iij,...j->...i', real(3, 3, 2), real(2, 3, 2)),
        call('ij->', real(3, 4)),
    ],
    'erf': _elementwise(),
    'erfc': _elementwise(),
    'erfcinv': _elementwise(0, 2),
    'erfcx': _elementwise(),
    'erfinv': _elementwise(-1, 1),
    'exp': _elementwise(),
    'log': _elementwise(0.125, 4),
    'log10': _elementwise(0.125, 4),
    'log2': _elementwise(0.125, 4),
    'expm1': _elementwise(),
    'fft': [call((real(3, 5), real(3, 5)))],
    'ifft': [
        call((real(3, 5), real(3, 5))),
        large((real(1, _MANY, **_FEW), real(1, _MANY, **_FEW))),
    ],
    'fix': _elementwise(),
    'floor': _elementwise(),
    'fmod': [call(real(3, 5, low=-4, high=4), real(3, 5, **_POSITIVE))],
    'cosh': _elementwise(),
    'sinh': _elementwise(),
    'identity': [call(real(3, 5)), call(real(3, 5), real(2))],
    'batch_inv': [call(real(2, 3, 3, diagonal=5))],
    'inv': [call(real(3, 3, diagonal=5))],
    'lgamma': _elementwise(0.5, 4),
    'linear_interpolate': [call(real(3, 5, **_CHANCE), real(3, 5), real(3, 5))],
    'log_ndtr': _elementwise(),
    'log1p': _elementwise(-0.5, 2),
    'logsumexp': [
        call(real(3, 5)),
        call(real(3, 4, 5), axis=(0, -1)),
        large(real(_MANY)),
    ],
    'batch_matmul': [
        call(real(2, 3, 4), real(2, 4, 5)),
        call(real(2, 4, 3), real(2, 5, 4), transa=True, transb=True),
    ],
    'matmul': [
        call(real(3, 4), real(4, 5)),
        call(real(2, 4, 3), real(2, 5, 4), transa=True, transb=True),
        call(real(4), real(4)),
        call(real(2, 3, 4), real(4)),
    ],
    'maximum': [call(real(3, 5), real(3, 5))],
    'minimum': [call(real(3, 5), real(3, 5)), call(real(3, 5), real(5))],
    'argmax': [call(real(3, 5)), call(real(3, 5), axis=-1), large(real(_MANY))],
    'argmin': [call(real(3, 5)), call(real(3, 5), axis=0), large(real(_MANY))],
    'max': [
        call(real(3, 5)),
        call(real(3, 4, 5), axis=(0, -1), keepdims=True),
        large(real(_MANY)),
    ],
    'min': [call(real(3, 5)), call(real(3, 4, 5), axis=1), large(real(_MANY))],
    'ndtr': _elementwise(),
    'ndtri': _elementwise(0, 1),
    'polygamma': [
        call(index(3, 5, upto=3), real(3, 5, low=0.5, high=4)),
    ],
    'prod': [call(real(3, 5)), call(real(3, 4, 5), axis=(0, -1), keepdims=True)],
    'scale': [call(real(3, 4, 5), real(4)), call(real(3, 4, 5), real(3, 4), axis=0)],
    'sign': _elementwise(),
    'sparse_matmul': [
        call(Sparse(real(4), [0, 2, 2, 1], [3, 0, 1, 3], (3, 4)), real(4, 2)),
        call(
            real(2, 4), Sparse(real(4), [0, 2, 2, 1], [3, 0, 1, 3], (3, 4)), transb=True
        ),
        call(
            Sparse(real(4), [0, 2, 2, 1], [3, 0, 1, 3], (3, 4)),
            real(2, 3),
            transa=True,
            transb=True,
        ),
    ],
    'rsqrt': _elementwise(0.125, 4),
    'sqrt': _elementwise(0.125, 4),
    'square': _elementwise(),
    'sum': [
        call(real(3, 4, 5)),
        call(real(3, 4, 5), axis=(0, -1), keepdims=True),
        large(real(_MANY, 2, **_FEW)),
        large(real(_MANY, 2, **_FEW), axis=0),
    ],
    'sum_to': [call(real(3, 4, 5), (4, 1)), large(real(_MANY, 2, **_FEW), (1, 2))],
    'tensordot': [
        call(real(3, 4, 5), real(4, 5, 2)),
        call(real(3, 4, 5), real(5, 3, 2), axes=((0, 2), (1, 0))),
    ],
    'arccos': _elementwise(-1, 1),
    'arcsin': _elementwise(-1, 1),
    'arctan': _elementwise(),
    'arctan2': [call(real(3, 5), real(3, 5))],
    'cos': _elementwise(),
    'sin': _elementwise(),
    'tan': _elementwise(-1, 1),
    'zeta': [call(2.5, real(3, 5, low=1, high=4)), call(3, real(3, 5, low=1, high=4))],
    # noise
    'dropout': [
        call(real(3, 5)),
        call(real(3, 5), ratio=0.3, return_mask=True),
        call(real(3, 5), ratio=0.3).testing(),
        call(real(3, 5), mask=constant(3, 5)),
    ],
    'gaussian': [
        call(real(3, 5), real(3, 5)),
        call(real(3, 5), real(3, 5), return_eps=True),
        call(real(3, 5), real(3, 5), eps=constant(3, 5)),
        call(real(3, 5), real(3, 5)).testing(),
    ],
    'gumbel_softmax': [call(real(3, 5)), call(real(3, 5), tau=0.7, axis=0)],
    'simplified_dropconnect': [
        call(real(3, 4), real(5, 4)),
        call(real(3, 2, 2), real(5, 4), real(5), ratio=0.3, use_batchwise_mask=False),
        call(real(3, 4), real(5, 4), real(5), 0.3, mask=constant(3, 5, 4)),
        call(real(3, 4), real(5, 4), train=False),
    ],
    'zoneout': [
        call(real(3, 5), real(3, 5)),
        call(real(3, 5), real(3, 5), ratio=0.3),
        call(real(3, 5), real(3, 5), ratio=0.3).testing(),
    ],
    # normalization
    'batch_normalization': [
        call(*_NORMALIZED),
        call(
            *_NORMALIZED,
            eps=0.01,
            decay=0.7,
            running_mean=constant(3),
            running_var=constant(3, **_POSITIVE),
        ),
        call(real(4, 3, 5), real(3, 5), real(3, 5), axis=0),
        call(real(4, 3), real(3, dtype='float32'), real(3, dtype='float32')),
        large(
            real(_MANY, 2),
            real(2),
            real(2),
            running_mean=constant(2),
            running_var=constant(2, **_POSITIVE),
        ),
    ],
    'fixed_batch_normalization': [
        call(*_NORMALIZED, real(3), real(3, **_POSITIVE)),
        call(*_NORMALIZED, real(3), real(3, **_POSITIVE), eps=0.01),
        call(
            real(4, 3, 5),
            real(3, 5),
            real(3, 5),
            real(3, 5),
            real(3, 5, **_POSITIVE),
            axis=0,
        ),
    ],
    'batch_renormalization': [
        call(
            *_NORMALIZED,
            1.5,
            0.5,
            running_mean=constant(3),
            running_var=constant(3, **_POSITIVE),
        ),
        call(
            *_NORMALIZED,
            1.5,
            0.5,
            eps=0.01,
            running_mean=constant(3),
            running_var=constant(3, **_POSITIVE),
            decay=0.7,
            update_statistics=True,
        ),
        large(
            real(_MANY, 2),
            real(2),
            real(2),
            1.5,
            0.5,
            running_mean=constant(2),
            running_var=constant(2, **_POSITIVE),
            update_statistics=True,
        ),
    ],
    'fixed_batch_renormalization': [
        call(*_NORMALIZED, real(3), real(3, **_POSITIVE), eps=0.01),
    ],
    'decorrelated_batch_normalization': [
        call(real(9, 4), groups=2),
        call(
            real(5, 4, 3),
            groups=2,
            eps=0.01,
            decay=0.7,
            running_mean=constant(2, 2),
            running_projection=constant(2, 2, 2),
        ),
        large(real(_MANY, 2), groups=1),
    ],
    'fixed_decorrelated_batch_normalization': [
        call(real(5, 4, 3), real(2, 2), real(2, 2, 2), groups=2),
    ],
    'group_normalization': [
        call(real(3, 4, 5, 2), 2, real(4), real(4)),
        call(real(3, 4, 5, 2), 4, real(4), real(4), eps=0.01),
        large(real(1, 2, _MANY), 1, real(2), real(2)),
    ],
    'normalize': [
        call(real(3, 5)),
        call(real(3, 4, 5), eps=0.01, axis=(1, 2)),
        large(real(2, _MANY, **_FEW)),
    ],
    'layer_normalization': [
        call(real(3, 5), real(5), real(5)),
        call(real(3, 5), real(5), real(5), eps=0.01),
        large(real(1, _MANY), real(_MANY), real(_MANY)),
        large(real(_MANY, 5), real(5), real(5)),
    ],
    'local_response_normalization': [
        call(real(2, 7, 3)),
        call(real(2, 7, 3, 2), n=3, k=1, alpha=0.3, beta=0.6),
    ],
    # rnn
    'lstm': [call(real(3, 2), real(3, 8)), call(real(3, 2), real(2, 8))],
    'n_step_bigru': _recurrent(6, 2, 1),
    'n_step_gru': _recurrent(6, 1, 1),
    'n_step_bilstm': _recurrent(8, 2, 2),
    'n_step_lstm': _recurrent(8, 1, 2),
    'n_step_birnn': _recurrent(2, 2, 1),
    'n_step_rnn': _recurrent(2, 1, 1) + _recurrent(2, 1, 1, activation='relu'),
    'slstm': [call(real(3, 2), real(3, 2), real(3, 8), real(3, 8))],
    'tree_lstm': [
        call(real(3, 2), real(3, 2), real(3, 10)),
        call(real(3, 2), real(3, 2), real(3, 2), real(3, 12)),
    ],
    # pooling
    'average_pooling_2d': [
        call(real(2, 3, 7, 6), 3),
        call(real(2, 3, 7, 6), (3, 2), (2, 1), (1, 0)),
        large(real(1, 1, 263, 251), (263, 251)),
    ],
    'average_pooling_1d': [
        call(real(2, 3, 7), 3),
        call(real(2, 3, 7), 3, 2, 1, pad_value=None),
    ],
    'average_pooling_3d': [
        call(real(2, 3, 5, 4, 3), 2),
        call(real(2, 3, 5, 4, 3), (3, 2, 1), (2, 1, 1), (1, 0, 0), pad_value=None),
    ],
    'average_pooling_nd': [
        call(real(2, 3, 7, 6), (3, 2), (2, 1), (1, 0), pad_value=None),
        large(real(1, 1, 263, 251), (263, 251)),
    ],
    'max_pooling_1d': [
        call(real(2, 3, 7), 3),
        call(real(2, 3, 7), 3, 2, 1, cover_all=False, return_indices=True),
    ],
    'max_pooling_2d': [
        call(real(2, 3, 7, 6), 3),
        call(real(2, 3, 7, 6), (3, 2), (2, 1), (1, 0), False, return_indices=True),
    ],
    'max_pooling_3d': [
        call(real(2, 3, 5, 4, 3), 2),
        call(real(2, 3, 5, 4, 3), (3, 2, 1), (2, 1, 1), (1, 0, 0), cover_all=False),
    ],
    'max_pooling_nd': [call(real(2, 3, 7, 6), (3, 2), (2, 1), (1, 0))],
    'roi_average_align_2d': _ALIGN_BOXES,
    'roi_average_pooling_2d': _TEST_BOXES,
    'roi_max_align_2d': _ALIGN_BOXES,
    'roi_max_pooling_2d': _TEST_BOXES,
    'roi_pooling_2d': [
        call(
            real(2, 3, 7, 8),
            Values([[1, 0, 1, 5, 6], [0, 2, 0, 6.5, 4.25]]),
            2,
            3,
            spatial_scale=0.75,
        ),
    ],
    'spatial_pyramid_pooling_2d': [call(real(2, 3, 9, 7), 3, 'max')],
    'unpooling_2d': [
        call(real(2, 3, 4, 5), 2),
        call(real(2, 3, 4, 5), (3, 2), (2, 1), (1, 0), cover_all=False),
        call(real(2, 3, 4, 5), 2, outsize=(7, 10)),
    ],
    'unpooling_1d': [
        call(real(2, 3, 4), 2),
        call(real(2, 3, 4), 3, 2, 1, cover_all=False),
    ],
    'unpooling_3d': [
        call(real(2, 3, 3, 4, 2), 2),
        call(real(2, 3, 3, 4, 2), (3, 2, 1), (2, 1, 1), (1, 0, 0), cover_all=False),
    ],
    'unpooling_nd': [call(real(2, 3, 4, 5), (3, 2), (2, 1), (1, 0), cover_all=False)],
    'upsampling_2d': [
        call(real(2, 3, 3, 3), index(2, 3, 3, 3, upto=4), 2),
        call(
            real(2, 3, 4, 5),
            index(2, 3, 4, 5, upto=6),
            (3, 2),
            (2, 1),
            (1, 0),
            cover_all=False,
        ),
    ],
    # util
    'forget': [call(product_of_tanh, real(3, 4), real(3, 4))],
}

_SCALARS = [
    3,
    -2,
    0.75,
    True,
    *(Scalar(3, dtype) for dtype in DTYPES),
    *(Scalar(0.75, dtype) for dtype in FLOATS),
    *(constant(dtype=dtype) for dtype in DTYPES),
]
_ARRAYS = [
    *(constant(3, 3, dtype=dtype) for dtype in DTYPES),
    *(real(3, 3, dtype=dtype) for dtype in DTYPES),
]

#: The calls of each operator of Variable, with the operands on either side.
OPERATOR_CALLS: dict[str, list[Call]] = {
    name: [call(real(3, 3), operand) for operand in _SCALARS + _ARRAYS]
    + [call(operand, real(3, 3)) for operand in _SCALARS + _ARRAYS]
    for name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'pow')
}
OPERATOR_CALLS['matmul'] = [call(real(3, 3), operand) for operand in _ARRAYS] + [
    call(operand, real(3, 3)) for operand in _ARRAYS
]
OPERATOR_CALLS['neg'] = OPERATOR_CALLS['abs'] = [call(real(3, 3))]

#: What is called under which name.
CALLABLES = {name: getattr(F, name) for name in CALLS}
CALLABLES.update(
    {f'operator.{name}': getattr(operator, name) for name in OPERATOR_CALLS}
)
