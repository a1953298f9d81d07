"""ONNX forms of Chainer's functions where ONNX-Chainer has none, or a wrong one.

A converter makes ONNX nodes of one call of a function. :data:`CONVERTERS` has them by
the name of the function's class, in the order of Chainer's documentation. What it does
not have is left to ONNX-Chainer.

Nodes are of opset 11, which ``onnx`` converts to the one that is asked for, or, from
:meth:`_Builder.new`, of that opset at once.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

import chainer
import chainer.functions as F
import numpy
from chainer.utils import conv

from chainer_deform.convert import interleaved_order

_INT64 = numpy.iinfo(numpy.int64)

#: The domain of nodes that are of the opset asked for, until all others are, too.
DOMAIN = 'chainer_deform'


class NoForm(Exception):
    """A call has no ONNX form; the message says which option is the reason."""


class _Builder:
    """Makes the nodes of one call.

    Attributes:
        func: The call's function node.
        inputs: The names of its inputs.

    """

    def __init__(self, params) -> None:
        from onnx_chainer.onnx_helper import GraphBuilder

        self.func, self.inputs = params.func, params.input_names
        self._builder, self._params = GraphBuilder(), params
        self._nodes = self._constants = 0

    def shape(self, i: int = 0) -> tuple[int, ...]:
        return self.func.inputs[i].shape

    def dtype(self, i: int = 0) -> numpy.dtype:
        return numpy.dtype(self.func.inputs[i].dtype)

    def op(self, op_type: str, *inputs: str, **attributes) -> str:
        """Adds a node of opset 11 with one output, and returns the output's name."""
        self._nodes += 1
        return self._builder.op(op_type, inputs, **attributes)

    def new(self, op_type: str, *inputs: str, **attributes) -> str:
        """Adds a node of the opset that the export asks for, 19 or later."""
        return self.op(op_type, *inputs, domain=DOMAIN, **attributes)

    def parts(self, op_type: str, x: str, count: int, **attributes) -> list[str]:
        """Adds a node with ``count`` outputs."""
        outputs = self._builder.op(op_type, [x], num_outputs=count, **attributes)
        return [outputs] if count == 1 else list(outputs)

    def constant(self, value, dtype) -> str:
        self._constants += 1
        name = f'constant_{self._constants}'
        return self._params.context.add_const(numpy.array(value, dtype), name)

    def ints(self, *values: int) -> str:
        return self.constant(values, numpy.int64)

    def cast(self, x: str, dtype) -> str:
        import onnx

        to = onnx.helper.np_dtype_to_tensor_dtype(numpy.dtype(dtype))
        return self.op('Cast', x, to=to)

    def common_dtype(self, *others) -> numpy.dtype:
        """That of the inputs together, in which Chainer computes."""
        dtypes = [self.dtype(i) for i in range(len(self.inputs))]
        return numpy.result_type(*dtypes, *others)

    def cast_inputs(self, dtype) -> list[str]:
        """The inputs, all in one dtype."""
        return [
            name if self.dtype(i) == dtype else self.cast(name, dtype)
            for i, name in enumerate(self.inputs)
        ]

    def cast_output(self, y: str, dtype) -> None:
        """Makes ``y``, which has a dtype, the output, in that of the first input."""
        if self.dtype() != dtype:
            self.cast(y, self.dtype())

    def reshape(self, x: str, *sizes: int) -> str:
        """Reshapes ``x``; size 0 keeps an axis, and -1 takes the rest."""
        return self.op('Reshape', x, self.ints(*sizes))

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        return self.op('Slice', x, *map(self.ints, (start, stop, axis, step)))

    def nodes(self, outputs: list[str] | None = None) -> tuple:
        """The nodes; the last one makes the call's output, if there is but one."""
        if outputs is None:
            if not self._nodes:
                self.op('Identity', *self.inputs)
            return self._builder.nodes(self._params.output_names)
        for name, output_name in zip(outputs, self._params.output_names):
            self._builder.op_output_named('Identity', [name], [output_name])
        return self._builder.nodes()


def _one_node(op_type: str):
    """A converter to one node with the same inputs."""
    return lambda b, func: b.op(op_type, *b.inputs)


def _axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


# Of this package.


def _deformable_convolution_2d_sampler(b, func):
    geometry = func.geometry
    dtype = b.common_dtype(numpy.float32)
    names = dict(zip(func.names, b.cast_inputs(dtype)))
    order = interleaved_order(geometry.offset_groups, geometry.taps)
    names['offset'] = b.op(
        'Gather', names['offset'], b.constant(order, numpy.int64), axis=1
    )
    inputs = [names.get(name, '') for name in ('x', 'W', 'offset', 'b', 'mask')]
    while not inputs[-1]:
        del inputs[-1]
    y = b.new(
        'DeformConv',
        *inputs,
        kernel_shape=(geometry.kh, geometry.kw),
        strides=(geometry.sy, geometry.sx),
        pads=(geometry.ph, geometry.pw, geometry.ph, geometry.pw),
        dilations=(geometry.dy, geometry.dx),
        group=geometry.groups,
        offset_group=geometry.offset_groups,
    )
    b.cast_output(y, dtype)


# Activation functions.


def _clip(b, func):
    clipped = (0, func.cap) if hasattr(func, 'cap') else (func.x_min, func.x_max)
    bounds = ['' if end is None else b.constant(end, b.dtype()) for end in clipped]
    b.op('Clip', *b.inputs, *bounds)


def _crelu(b, func):
    (x,) = b.inputs
    halves = b.op('Relu', x), b.op('Relu', b.op('Neg', x))
    b.op('Concat', *halves, axis=func.axis)


def _prelu(b, func):
    # Chainer's slopes are of the first axes after the batch, ONNX's of the last ones.
    x, slopes = b.inputs
    x_ndim, ndim = len(b.shape(0)), len(b.shape(1))
    if 0 < ndim < x_ndim - 1:
        slopes = b.op('Unsqueeze', slopes, axes=range(ndim, x_ndim - 1))
    b.op('PRelu', x, slopes)


def _softplus(b, func):
    beta = b.constant(func.beta, b.dtype())
    b.op('Div', b.op('Softplus', b.op('Mul', *b.inputs, beta)), beta)


def _swish(b, func):
    x, beta = b.inputs
    x_ndim, ndim = len(b.shape(0)), len(b.shape(1))
    beta = b.op('Unsqueeze', beta, axes=[0, *range(ndim + 1, x_ndim)])
    b.op('Mul', x, b.op('Sigmoid', b.op('Mul', beta, x)))


def _along_axis(op_type: str):
    return lambda b, func: b.new(op_type, *b.inputs, axis=func.axis)


# Array manipulations.


def _cumsum(b, func):
    (x,) = b.inputs
    if func.axis is None:
        x = b.reshape(x, -1)
    b.op('CumSum', x, b.constant(func.axis or 0, numpy.int64))


def _flip(axis=None):
    def flip(b, func):
        along = func.axis if axis is None else axis
        b.slice(b.inputs[0], along, -1, _INT64.min, -1)

    return flip


def _get_item(b, func):
    (x,) = b.inputs
    indices = _indices(func.slices, len(b.shape()))
    new = [axis for axis, index in enumerate(indices) if index is None]
    if new:
        x = b.op('Unsqueeze', x, axes=new)
    arrays = {}
    for axis, index in enumerate(indices):
        if not isinstance(index, (slice, type(None))):
            arrays[axis] = numpy.asarray(index, numpy.int64)
        elif index not in (None, slice(None)):
            x = b.slice(x, axis, *_bounds(index))
    if not all(array.ndim == 0 for array in arrays.values()) and len(arrays) > 1:
        x = _gather_together(b, x, arrays, len(indices))
    else:  # from the last axis on, as an integer takes its axis away
        for axis in sorted(arrays, reverse=True):
            index = b.constant(arrays[axis], numpy.int64)
            x = b.op('Gather', x, index, axis=axis)


def _indices(slices: tuple, ndim: int) -> list:
    """One index for each axis: a slice, an integer or an array; None is a new axis."""
    indices = []
    for index in slices:
        if isinstance(index, list):
            index = numpy.array(index)
        elif isinstance(index, chainer.get_array_types()):
            index = chainer.get_device('@numpy').send(index)
        if isinstance(index, (bool, numpy.bool_)):
            raise NoForm('an index that is True or False')
        if isinstance(index, numpy.ndarray) and index.dtype == bool:
            indices.extend(index.nonzero())
        else:
            indices.append(index)
    rest = ndim - sum(index is not None and index is not Ellipsis for index in indices)
    at = [i for i, index in enumerate(indices) if index is Ellipsis]
    at = at[0] if at else len(indices)
    indices[at : at + 1] = rest * [slice(None)]
    return indices


def _bounds(index: slice) -> tuple[int, int, int]:
    """Start, stop and step, as ONNX has them."""
    step = 1 if index.step is None else int(index.step)
    ends = (0, _INT64.max) if step > 0 else (_INT64.max, _INT64.min)
    start, stop = (
        end if bound is None else int(bound)
        for bound, end in zip((index.start, index.stop), ends)
    )
    return start, stop, step


def _gather_together(b, x, arrays: dict[int, numpy.ndarray], ndim: int):
    """As NumPy: the arrays' axes stand where the first was, or first if others lie
    between."""
    axes = list(arrays)
    others = [axis for axis in range(ndim) if axis not in arrays]
    x = b.op('Transpose', x, perm=[*axes, *others])
    index = numpy.stack(numpy.broadcast_arrays(*arrays.values()), -1)
    x = b.op('GatherND', x, b.constant(index, numpy.int64))
    before = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0
    count = index.ndim - 1
    perm = list(range(count, count + before)) + list(range(count))
    return b.op(
        'Transpose', x, perm=[*perm, *range(count + before, count + len(others))]
    )


def _pad(b, func):
    ndim, keywords = len(b.shape()), dict(func.keywords)
    widths = numpy.broadcast_to(func.pad_width, (ndim, 2))
    inputs = [*b.inputs, b.ints(*widths.T.ravel())]
    if func.mode == 'constant':
        values = numpy.unique(keywords.pop('constant_values', 0))
        if len(values) > 1:
            raise NoForm('constant_values that differ')
        inputs.append(b.constant(values[0], b.dtype()))
    elif func.mode not in ('edge', 'reflect'):
        raise NoForm(f'mode={func.mode!r}')
    elif func.mode == 'reflect':
        if keywords.pop('reflect_type', 'even') != 'even':
            raise NoForm("reflect_type='odd'")
        if (widths.max(1) >= b.shape()).any():
            raise NoForm('pad_width as wide as the image, mirrored twice')
    if keywords:
        raise NoForm(', '.join(keywords))
    b.op('Pad', *inputs, mode=func.mode)


def _permutate(b, func):
    indices = chainer.get_device('@numpy').send(func.indices)
    if func.inv:
        indices = indices.argsort()
    # To Chainer a negative axis is the first one.
    axis = max(func.axis, 0)
    b.op('Gather', *b.inputs, b.constant(indices, numpy.int64), axis=axis)


def _repeat(b, func):
    (x,), axis, sizes = b.inputs, func.axis, b.shape()
    if axis is None:
        x, axis, sizes = b.reshape(x, -1), 0, (math.prod(sizes),)
    ndim = len(sizes)
    axis = _axis(axis, ndim)
    if len(func.repeats) > 1 or func.repeats[0] == 0:
        index = numpy.arange(sizes[axis]).repeat(func.repeats)
        b.op('Gather', x, b.constant(index, numpy.int64), axis=axis)
        return
    factors = numpy.ones(ndim + 1, int)
    factors[axis + 1] = func.repeats[0]
    sizes = b.op('Mul', b.op('Shape', x), b.ints(*numpy.delete(factors, axis)))
    repeated = b.op('Expand', b.op('Unsqueeze', x, axes=[axis + 1]), b.ints(*factors))
    b.op('Reshape', repeated, sizes)


def _reshape(b, func):
    if not hasattr(func, 'shape'):  # the model gives it as an input
        b.op('Reshape', *b.inputs)
        return
    old, new = b.shape(), list(func.shape)
    copied = 0
    while new[copied : copied + 1] == list(old[copied : copied + 1]) != []:
        copied += 1
    if copied:
        new[:copied] = copied * [0]
        if len(new) - copied == 1:
            new[-1] = -1
    elif new:  # the first axis finds its size by itself
        if -1 in new:
            new[new.index(-1)] = math.prod(old) // -math.prod(new)
        new[0] = -1
    b.reshape(*b.inputs, *new)


def _resize_images(b, func):
    (x,) = b.inputs
    out_sizes = func.out_H, func.out_W
    if func.mode == 'nearest':
        # Chainer's own formula, as its rounding decides which of two pixels it is.
        for axis, out in zip((2, 3), out_sizes):
            size = b.shape()[axis]
            index = numpy.floor(numpy.arange(out) * (size / out))
            index = b.constant(numpy.minimum(index, size - 1), numpy.int64)
            x = b.op('Gather', x, index, axis=axis)
        return
    sizes = b.slice(b.op('Shape', x), 0, 0, 2)
    sizes = b.op('Concat', sizes, b.ints(*out_sizes), axis=0)
    transformation = 'align_corners' if func.align_corners else 'half_pixel'
    b.new(
        'Resize', x, '', '', sizes,
        mode='linear', coordinate_transformation_mode=transformation,
    )  # fmt: skip


def _rollaxis(b, func):
    ndim = len(b.shape())
    axis, start = _axis(func.axis, ndim), _axis(func.start, ndim)
    perm = [i for i in range(ndim) if i != axis]
    perm.insert(start - (axis < start), axis)
    b.op('Transpose', *b.inputs, perm=perm)


def _split_axis(b, func):
    (x,) = b.inputs
    if func.indices is None:
        return b.parts('Split', x, func.sections, axis=func.axis)
    bounds = [0, *map(int, func.indices), _INT64.max]
    return [b.slice(x, func.axis, *part) for part in zip(bounds, bounds[1:])]


def _tile(b, func):
    (x,), ndim, reps = b.inputs, len(b.shape()), func.reps
    if len(reps) > ndim:
        x = b.op('Unsqueeze', x, axes=range(len(reps) - ndim))
    reps = (ndim - len(reps)) * (1,) + reps
    b.op('Tile', x, b.ints(*reps))


def _transpose(b, func):
    axes, ndim = func.axes, len(b.shape())
    axes = range(ndim)[::-1] if axes is None else [_axis(axis, ndim) for axis in axes]
    b.op('Transpose', *b.inputs, perm=list(axes))


def _where(b, func):
    condition = chainer.get_device('@numpy').send(func.condition)
    b.op('Where', b.constant(condition, bool), *b.inputs)


# Neural network connections.


def _stride_pad_dilate(func):
    """Stride, pad and dilation of a convolution, one for each axis."""
    if hasattr(func, 'sy'):
        return (func.sy, func.sx), (func.ph, func.pw), (func.dy, func.dx)
    return func.stride, func.pad, func.dilate


def _pads(func, stride, pad) -> list[int]:
    """Before each axis and after it, where cover_all needs more."""
    after = [p + s - 1 if func.cover_all else p for p, s in zip(pad, stride)]
    return [*pad, *after]


def _convolution(b, func):
    stride, pad, dilate = _stride_pad_dilate(func)
    dtype = b.common_dtype()
    y = b.op(
        'Conv',
        *b.cast_inputs(dtype),
        kernel_shape=b.shape(1)[2:],
        pads=_pads(func, stride, pad),
        strides=stride,
        dilations=dilate,
        group=func.groups,
    )
    b.cast_output(y, dtype)


def _deconvolution(b, func):
    stride, pad, dilate = _stride_pad_dilate(func)
    out_sizes = func.outs if hasattr(func, 'outs') else (func.outh, func.outw)
    dtype, ksize = b.common_dtype(), b.shape(1)[2:]
    y = b.op(
        'ConvTranspose',
        *b.cast_inputs(dtype),
        kernel_shape=ksize,
        strides=stride,
        dilations=dilate,
        group=func.groups,
        **_out_sizes(b, ksize, stride, pad, dilate, out_sizes),
    )
    b.cast_output(y, dtype)


def _out_sizes(b, ksize, stride, pad, dilate, out_sizes) -> dict:
    """Attributes by which a transposed convolution gets these sizes."""
    usual = map(
        conv.get_deconv_outsize,
        *(b.shape()[2:], ksize, stride, pad, len(pad) * (False,), dilate),
    )
    more = [out - size for out, size in zip(out_sizes, usual)]
    end = [p - min(extra, 0) for p, extra in zip(pad, more)]
    return {'pads': [*pad, *end], 'output_padding': [max(extra, 0) for extra in more]}


def _embed_id(b, func):
    x, W = b.inputs
    if func.ignore_label is None:
        b.op('Gather', W, x)
        return
    ignored = b.op('Equal', x, b.constant(func.ignore_label, b.dtype()))
    known = b.op('Where', ignored, b.constant(0, b.dtype()), x)
    ignored = b.op('Unsqueeze', ignored, axes=[len(b.shape())])
    b.op('Where', ignored, b.constant(0, b.dtype(1)), b.op('Gather', W, known))


def _linear(b, func):
    dtype = b.common_dtype()
    b.cast_output(b.op('Gemm', *b.cast_inputs(dtype), transB=1), dtype)


# Loss functions.


def _softmax_cross_entropy(b, func):
    x, t = b.inputs
    if b.shape(0) == b.shape(1):
        raise NoForm('t as probabilities')
    dtype = b.dtype()
    log_y = b.new('LogSoftmax', x, axis=1)
    if func.class_weight is not None:
        weights = chainer.get_device('@numpy').send(func.class_weight)
        weights = weights.reshape(-1, *(len(b.shape()) - 2) * (1,))
        log_y = b.op('Mul', log_y, b.constant(weights, dtype))
    ignored = b.op('Equal', t, b.constant(func.ignore_label, b.dtype(1)))
    t = b.op('Where', ignored, b.constant(0, b.dtype(1)), t)
    t = b.op('Unsqueeze', t, axes=[1])
    losses = b.op('Squeeze', b.op('GatherElements', log_y, t, axis=1), axes=[1])
    losses = b.op('Where', ignored, b.constant(0, dtype), b.op('Neg', losses))
    if func.reduce == 'no':
        return
    total = b.op('ReduceSum', losses, keepdims=0)
    if func.normalize:
        count = b.op('Cast', b.op('Not', ignored), to=1)
        count = b.op('ReduceSum', count, keepdims=0)
        count = b.op('Max', count, b.constant(1, numpy.float32))
    else:
        count = b.op('Gather', b.op('Shape', x), b.constant(0, numpy.int64))
    b.op('Div', total, b.cast(count, dtype))


# Mathematical functions.


def _broadcast(b, func):
    shape = numpy.broadcast_shapes(*(v.shape for v in func.inputs))
    return [_expand(b, name, b.shape(i), shape) for i, name in enumerate(b.inputs)]


def _broadcast_to(b, func):
    _expand(b, b.inputs[0], b.shape(), func._shape)


def _expand(b, x: str, old, new) -> str:
    # 1 leaves an axis as it is, so that a batch may have another size.
    old = (len(new) - len(old)) * (1,) + old
    shape = [1 if size == was else size for size, was in zip(new, old)]
    return b.op('Expand', x, b.ints(*shape))


def _matmul(b, func):
    dtype = b.common_dtype()
    a, c = b.cast_inputs(dtype)
    a_ndim, c_ndim = len(b.shape(0)), len(b.shape(1))
    # onnxruntime 1.32 multiplies a vector with a transposed matrix wrongly.
    a = _matrix(b, a, a_ndim, func.transa, vector_axis=0)
    c = _matrix(b, c, c_ndim, func.transb, vector_axis=1)
    y = b.op('MatMul', a, c)
    squeezed = [axis for axis, ndim in ((-2, a_ndim), (-1, c_ndim)) if ndim == 1]
    if squeezed:
        b.op('Squeeze', y, axes=squeezed)


def _matrix(b, x: str, ndim: int, swap: bool, vector_axis: int) -> str:
    """An operand: a vector as a matrix, or a matrix, swapped if it is to be."""
    if ndim == 1:
        return b.op('Unsqueeze', x, axes=[vector_axis])
    perm = [*range(ndim - 2), ndim - 1, ndim - 2]
    return b.op('Transpose', x, perm=perm) if swap else x


def _multi_add(b, func):
    y = b.inputs[0]
    for x in b.inputs[1:]:
        y = b.op('Add', y, x)


def _fix(b, func):
    (x,) = b.inputs
    b.op('Mul', b.op('Sign', x), b.op('Floor', b.op('Abs', x)))


def _reduction(op_type: str):
    def reduce(b, func):
        if func.axis == ():
            return
        axes = {} if func.axis is None else {'axes': func.axis}
        keepdims = int(getattr(func, 'keepdims', False))
        b.op(op_type, *b.inputs, keepdims=keepdims, **axes)

    return reduce


# Noise injections.


def _dropout(b, func):
    # Without a mask that is given, a model in test mode has no such node.
    dtype = b.common_dtype(func.mask.dtype)
    b.op('Mul', *b.cast_inputs(dtype), b.constant(func.mask, dtype))


# Normalization functions.


def _normalized(b, x: str, axes, eps: float, dtype) -> str:
    """``x`` less its mean, by its standard deviation, over some axes."""
    centered = b.op('Sub', x, b.op('ReduceMean', x, axes=axes))
    variance = b.op('ReduceMean', b.op('Mul', centered, centered), axes=axes)
    return b.op('Div', centered, _deviation(b, variance, eps, dtype))


def _deviation(b, variance: str, eps: float, dtype) -> str:
    return b.op('Sqrt', b.op('Add', variance, b.constant(eps, dtype)))


def _batch_normalization(b, func):
    """With the statistics of the batch, or with those that are given."""
    ndim, axes, dtype = len(b.shape()), func.axis, b.common_dtype()
    if axes is None:
        axes = 0, *range(len(b.shape(1)) + 1, ndim)
    x, *others = b.cast_inputs(dtype)
    if len(others) == 4 and axes == (0, *range(2, ndim)):
        y = b.op('BatchNormalization', x, *others, epsilon=func.eps)
        b.cast_output(y, dtype)
        return
    gamma, beta, *statistics = (b.op('Unsqueeze', name, axes=axes) for name in others)
    if statistics:
        mean, variance = statistics
        deviation = _deviation(b, variance, func.eps, dtype)
        normalized = b.op('Div', b.op('Sub', x, mean), deviation)
    else:
        normalized = _normalized(b, x, axes, func.eps, dtype)
    b.cast_output(b.op('Add', b.op('Mul', normalized, gamma), beta), dtype)


def _group_normalization(b, func):
    dtype = b.common_dtype()
    x, gamma, beta = b.cast_inputs(dtype)
    grouped = b.reshape(x, 0, func.groups, -1)
    normalized = _normalized(b, grouped, [2], func.eps, dtype)
    channels = b.reshape(normalized, 0, b.shape()[1], -1)
    gamma, beta = (b.op('Unsqueeze', name, axes=[1]) for name in (gamma, beta))
    y = b.op('Add', b.op('Mul', channels, gamma), beta)
    b.cast_output(b.op('Reshape', y, b.op('Shape', x)), dtype)


def _layer_normalization(b, func):
    x, gamma, beta = b.inputs
    normalized = _normalized(b, x, [1], func.eps, b.dtype())
    b.op('Add', b.op('Mul', normalized, gamma), beta)


def _local_response_normalization(b, func):
    size = 2 * (func.n // 2) + 1
    b.op(
        'LRN',
        *b.inputs,
        alpha=float(func.alpha) * size,
        beta=float(func.beta),
        bias=float(func.k),
        size=size,
    )


def _normalize(b, func):
    (x,) = b.inputs
    norm = b.op('ReduceL2', x, axes=func.axis)
    b.op('Div', x, b.op('Add', norm, b.constant(func.eps, b.dtype())))


# Spatial pooling.


def _window(func):
    if hasattr(func, 'ksize'):
        return func.ksize, func.stride, func.pad
    return (func.kh, func.kw), (func.sy, func.sx), (func.ph, func.pw)


def _pooling(b, op_type: str, func, value: float, **attributes):
    (x,) = b.inputs
    ksize, stride, pad = _window(func)
    pads, axes = _pads(func, stride, pad), len(pad)
    # Runtimes want a pad smaller than the window.
    if any(p >= k for p, k in zip(pads, 2 * ksize)):
        if attributes.get('count_include_pad') == 0:
            raise NoForm('pad as large as ksize and pad_value=None')
        widths = b.ints(0, 0, *pads[:axes], 0, 0, *pads[axes:])
        x = b.op('Pad', x, widths, b.constant(value, b.dtype()))
        pads = 2 * axes * [0]
    b.op(op_type, x, kernel_shape=ksize, strides=stride, pads=pads, **attributes)


def _average_pooling(b, func):
    include = getattr(func, 'pad_value', 0) is not None
    _pooling(b, 'AveragePool', func, 0, count_include_pad=int(include))


def _max_pooling(b, func):
    _pooling(b, 'MaxPool', func, -numpy.inf)


def _roi_pooling(b, func):
    b.op(
        'MaxRoiPool',
        *b.inputs,
        pooled_shape=(func.outh, func.outw),
        spatial_scale=func.spatial_scale,
    )


def _unpooling(b, func):
    """A transposed convolution of each channel with ones."""
    ksize, stride, pad = _window(func)
    c = b.shape()[1]
    b.op(
        'ConvTranspose',
        *b.inputs,
        b.constant(numpy.ones((c, 1, *ksize)), b.dtype()),
        kernel_shape=ksize,
        strides=stride,
        group=c,
        **_out_sizes(b, ksize, stride, pad, (1, 1), (func.outh, func.outw)),
    )


#: What makes the nodes of a call, by the name of the function's class.
_MAKERS = {
    'DeformableConvolution2DSampler': _deformable_convolution_2d_sampler,
    # Activation functions.
    'ClippedReLU': _clip,
    'CReLU': _crelu,
    'LogSoftmax': _along_axis('LogSoftmax'),
    'PReLUFunction': _prelu,
    'Softmax': _along_axis('Softmax'),
    'Softplus': _softplus,
    'Swish': _swish,
    # Array manipulations.
    'Cumsum': _cumsum,
    'Flip': _flip(),
    'FlipLR': _flip(axis=1),
    'FlipUD': _flip(axis=0),
    'GetItem': _get_item,
    'Pad': _pad,
    'Permutate': _permutate,
    'Repeat': _repeat,
    'Reshape': _reshape,
    'ResizeImages': _resize_images,
    'Rollaxis': _rollaxis,
    'SplitAxis': _split_axis,
    'Tile': _tile,
    'Transpose': _transpose,
    'Where': _where,
    # Neural network connections.
    'Convolution2DFunction': _convolution,
    'ConvolutionND': _convolution,
    'Deconvolution2DFunction': _deconvolution,
    'DeconvolutionND': _deconvolution,
    'EmbedIDFunction': _embed_id,
    'LinearFunction': _linear,
    # Loss functions.
    'SoftmaxCrossEntropy': _softmax_cross_entropy,
    # Mathematical functions.
    'Broadcast': _broadcast,
    'BroadcastTo': _broadcast_to,
    'Clip': _clip,
    'Identity': lambda b, func: b.inputs,
    'LogSumExp': _reduction('ReduceLogSumExp'),
    'MatMul': _matmul,
    'Max': _reduction('ReduceMax'),
    'Mean': _reduction('ReduceMean'),
    'Min': _reduction('ReduceMin'),
    'MultiAdd': _multi_add,
    'Prod': _reduction('ReduceProd'),
    'Sum': _reduction('ReduceSum'),
    'ceil': _one_node('Ceil'),
    'fix': _fix,
    'floor': _one_node('Floor'),
    # Noise injections.
    'Dropout': _dropout,
    # Normalization functions.
    'BatchNormalization': _batch_normalization,
    'FixedBatchNormalization': _batch_normalization,
    'GroupNormalization': _group_normalization,
    'LayerNormalization': _layer_normalization,
    'LocalResponseNormalization': _local_response_normalization,
    'NormalizeL2': _normalize,
    # Spatial pooling.
    'AveragePooling2D': _average_pooling,
    'AveragePoolingND': _average_pooling,
    'MaxPoolingND': _max_pooling,
    'ROIPooling2D': _roi_pooling,
    'Unpooling2D': _unpooling,
}


def _converter(make):
    def convert(params):
        b = _Builder(params)
        outputs = make(b, params.func)
        return b.nodes(outputs if isinstance(outputs, list) else None)

    return convert


#: From the parameters of an ONNX-Chainer converter to nodes.
CONVERTERS = {name: _converter(make) for name, make in _MAKERS.items()}


def drop_expands(graph, shapes: dict[str, tuple]) -> None:
    """Removes broadcasts to the shape of the other operand of an arithmetic operator.

    ONNX broadcasts operands by itself, and to any size. ``shapes`` has the shapes of
    the inputs of calls, by name.
    """
    users: dict = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    kept = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == 'Expand']:
        (name,) = node.output
        if name not in kept and all(
            user.op_type in ('Add', 'Div', 'Max', 'Min', 'Mul', 'Pow', 'Sub')
            and list(user.input).count(name) == 1
            and {shapes.get(other) for other in user.input} == {shapes[name]}
            for user in users[name]
        ):
            for user in users[name]:
                user.input[list(user.input).index(name)] = node.input[0]
            graph.node.remove(node)
            (shape,) = (made for made in graph.node if node.input[1] in made.output)
            graph.node.remove(shape)


@contextlib.contextmanager
def rounding_as_nodes() -> Iterator[None]:
    """Has functions leave a trace that have no gradient, and so no function node."""
    from onnx_chainer.replace_func import fake_as_funcnode

    places = []
    for name in 'ceil', 'fix', 'floor', 'sign':
        module = sys.modules[f'chainer.functions.math.{name}']
        function = getattr(module, name)
        node = fake_as_funcnode(function, name, experimental_warning=False)

        def traced(x, function=function, node=node):
            return (node if isinstance(x, chainer.Variable) else function)(x)

        places += [(place, name, getattr(place, name), traced) for place in (F, module)]
    try:
        for place, name, _, traced in places:
            setattr(place, name, traced)
        yield
    finally:
        for place, name, original, _ in places:
            setattr(place, name, original)


def public_name(name: str) -> str:
    """The name of a function node's class, as a user knows it."""
    if name.endswith('Grad'):
        return f'the gradient of {public_name(name[: -len("Grad")])}'
    if name in _OPERATORS:
        return f'the operator {_OPERATORS[name]}'
    short = name.lower().replace('function', '').replace('_', '')
    names = {known.replace('_', ''): known for known in dir(F) if known.islower()}
    names.update(
        multiadd='add',
        normalizel2='normalize',
        rsqrtgpu='rsqrt',
    )
    return f'F.{names[short]}' if short in names else f'the function {name}'


_OPERATORS = {
    'Absolute': 'abs',
    'Add': '+',
    'AddConstant': '+',
    'Div': '/',
    'DivFromConstant': '/',
    'GetItem': '[]',
    'MatMul': '@',
    'Mul': '*',
    'MulConstant': '*',
    'Neg': '-',
    'PowConstVar': '**',
    'PowVarConst': '**',
    'PowVarVar': '**',
    'Sub': '-',
    'SubFromConstant': '-',
}
