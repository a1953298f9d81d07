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

from chainer_deform import functions
from chainer_deform._composed import Call, replaced
from chainer_deform.convert import interleaved_order
from chainer_deform.functions.deformable_ps_roi_average_pooling_2d import cells_of_bins

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
        """Adds a node of the opset that the export asks for, 16 or later."""
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

    def reshape_to(self, x: str, *sizes: int | str) -> str:
        """Reshapes ``x`` to sizes of which some are known when the file is run.

        Each is an int, -1 for the rest, or the name of an array of one or more.
        """
        names = [s if isinstance(s, str) else self.ints(s) for s in sizes]
        return self.op('Reshape', x, self.op('Concat', *names, axis=0))

    def sizes(self, x: str, start: int, stop: int) -> str:
        """The sizes of some axes of ``x``, when the file is run."""
        return self.slice(self.op('Shape', x), 0, start, stop)

    def range(self, count: str, dtype) -> str:
        """The numbers from 0 on, as many as an array of one number says."""
        start, step = (self.constant(i, numpy.int64) for i in (0, 1))
        numbers = self.op('Range', start, self.op('Squeeze', count, axes=[0]), step)
        return numbers if dtype == numpy.int64 else self.cast(numbers, dtype)

    def coordinate(self, points: str, i: int, axis: int) -> str:
        """One of the two numbers of points, which are along ``axis``."""
        return self.op('Gather', points, self.constant(i, numpy.int64), axis=axis)

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


def _sampled_sum_2d(b, func):
    n, c, _, _ = b.shape(0)
    q, groups, K, _ = b.shape(1)
    dtype = b.common_dtype(numpy.float32)
    x, locations, weights = b.cast_inputs(dtype)
    indices = chainer.get_device('@numpy').send(func.indices)
    if not numpy.array_equal(indices, numpy.arange(n).repeat(q // max(1, n))):
        # Each position reads an image of its own.
        x = b.op('Gather', x, b.constant(indices, numpy.int64), axis=0)
    n = b.sizes(x, 0, 1)
    x = b.reshape_to(x, -1, c // groups, b.sizes(x, 2, 4))
    # (n * q / n, groups, K, yx) -> (n * groups, q / n, K, yx)
    locations = b.reshape_to(locations, n, -1, groups, K, 2)
    locations = b.op('Transpose', locations, perm=[0, 2, 1, 3, 4])
    locations = b.reshape_to(locations, -1, b.sizes(locations, 2, 5))
    # (n * q / n, groups, K) -> (n * groups, 1, q / n, K)
    weights = b.reshape_to(weights, n, -1, groups, K)
    weights = b.op('Transpose', weights, perm=[0, 2, 1, 3])
    weights = b.reshape_to(weights, -1, 1, b.sizes(weights, 2, 4))
    if func.border == 'zero':
        rows, columns = (b.coordinate(locations, i, axis=3) for i in (0, 1))
        samples = _samples(b, x, rows, columns, dtype)
    else:
        samples = _clamped_samples(b, x, locations, dtype)
    y = b.op('ReduceSum', b.op('Mul', samples, weights), axes=[3], keepdims=0)
    # (n * groups, c / groups, q / n) -> (q, c)
    y = b.op('Transpose', b.reshape_to(y, n, c, -1), perm=[0, 2, 1])
    b.cast_output(b.reshape(y, -1, c), dtype)


def _samples(b, x: str, rows: str, columns: str, dtype) -> str:
    """Samples of ``x (n, c, h, w)`` at ``(n, q, K)`` pixels: ``(n, c, q, K)``."""
    two, one = b.constant(2, dtype), b.constant(1, dtype)
    grid = []
    for places, axis in (columns, 3), (rows, 2):
        size = b.cast(b.sizes(x, axis, axis + 1), dtype)
        places = b.op('Add', b.op('Mul', places, two), one)
        places = b.op('Sub', b.op('Div', places, size), one)
        grid.append(b.op('Unsqueeze', places, axes=[3]))
    return _grid_sample(b, x, b.op('Concat', *grid, axis=3), dtype)


def _grid_sample(b, x: str, grid: str, dtype) -> str:
    """Samples of ``x (n, c, h, w)`` at ``grid (n, q, K, xy)``: ``(n, c, q, K)``.

    The image's edges are at -1 and 1.
    """
    # onnxruntime reads inside at points that are not finite, or large. NaN is not
    # above the limit.
    low, high = b.constant(-5, dtype), b.constant(5, dtype)
    grid = b.op('Where', b.op('Greater', grid, low), grid, low)
    grid = b.op('Where', b.op('Less', grid, high), grid, high)
    return b.new(
        'GridSample', x, grid, mode='linear', padding_mode='zeros', align_corners=0
    )


def _clamped_samples(b, x: str, locations: str, dtype) -> str:
    """Samples of ``x (n, c, h, w)`` at ``(n, q, K, yx)`` pixels: ``(n, c, q, K)``."""
    sizes = b.sizes(locations, 0, 3)
    images = b.range(b.sizes(locations, 0, 1), numpy.int64)
    images = b.op('Expand', b.op('Unsqueeze', images, axes=[1, 2]), sizes)
    points = b.reshape(locations, -1, 2)
    samples = _roi_align(b, x, points, None, b.reshape(images, -1), dtype)
    samples = b.reshape_to(samples, sizes, b.sizes(x, 1, 2))
    return b.op('Transpose', samples, perm=[0, 3, 1, 2])


def _roi_align(b, x: str, low: str, size: str | None, images: str, dtype, count=1):
    """The mean of each of some boxes of ``x (n, c, h, w)``: ``(boxes, c)``.

    Args:
        low: The boxes' first corners, ``(boxes, yx)`` in pixels.
        size: Their heights and widths, or None for points.
        images: The image of each box, in int64.
        count: Samples along each side of a box.

    """
    # onnxruntime reads anywhere in memory at points that are not finite.
    low = _where_finite(b, low, -(2**20), dtype)
    low = b.op('Add', low, b.constant(0.5, dtype))  # half_pixel takes it off
    high = low if size is None else b.op('Add', low, size)
    boxes = b.op('Concat', low, high, axis=1)
    y = b.new(
        'RoiAlign', x, b.op('Gather', boxes, b.ints(1, 0, 3, 2), axis=1), images,
        output_height=1, output_width=1, sampling_ratio=count,
        coordinate_transformation_mode='half_pixel',
    )  # fmt: skip
    return b.op('Squeeze', y, axes=[2, 3])


def _where_finite(b, x: str, otherwise: float, dtype) -> str:
    """``x`` where it is a place of an image, or not far from one."""
    near = b.op('Less', b.op('Abs', x), b.constant(2**20, dtype))  # false for NaN
    return b.op('Where', near, x, b.constant(otherwise, dtype))


def _composed_inputs(b) -> tuple:
    """The inputs of a composed function by name, and the dtype that they are in.

    Indices are in int64.
    """
    names = b.func.names
    indices = [name == 'roi_indices' for name in names]
    dtypes = [b.dtype(i) for i, is_index in enumerate(indices) if not is_index]
    dtype = numpy.result_type(numpy.float32, *dtypes)
    inputs = {}
    for i, (name, x) in enumerate(zip(names, b.inputs)):
        wanted = numpy.int64 if indices[i] else dtype
        inputs[name] = x if b.dtype(i) == wanted else b.cast(x, wanted)
    return inputs, dtype


def _dcn_v3_2d(b, func):
    g, scale = func.options['geometry'], func.options['offset_scale']
    inputs, dtype = _composed_inputs(b)
    x, offset, mask = inputs.values()
    c, taps = b.shape(0)[1], numpy.arange(g.taps)
    if func.options['remove_center']:
        taps = numpy.delete(taps, g.taps // 2)
    n, out_size = b.sizes(x, 0, 1), b.sizes(offset, 2, 4)
    # (n * groups, xy, taps, out_h, out_w)
    offset = b.reshape_to(offset, -1, 2, len(taps), out_size)

    def places(axis, tap, k, stride, pad, dilate):
        """Rows or columns, (n * groups, taps, out_h * out_w)."""
        centre = dilate * (k - 1) // 2
        tap = scale * (tap * dilate - centre) + (centre - pad)
        output = b.range(b.slice(out_size, 0, axis, axis + 1), dtype)
        output = b.op('Mul', output, b.constant(stride, dtype))
        if axis == 0:
            output = b.op('Unsqueeze', output, axes=[1])
        grid = b.op('Add', b.constant(tap[:, None, None], dtype), output)
        moved = b.coordinate(offset, 1 - axis, axis=1)
        moved = b.op('Mul', moved, b.constant(scale, dtype))
        return b.reshape(b.op('Add', moved, grid), 0, 0, -1)

    rows = places(0, taps // g.kw, g.kh, g.sy, g.ph, g.dy)
    columns = places(1, taps % g.kw, g.kw, g.sx, g.pw, g.dx)
    x = b.reshape_to(x, -1, c // g.offset_groups, b.sizes(x, 2, 4))
    samples = _samples(b, x, rows, columns, dtype)
    mask = b.reshape_to(mask, -1, 1, len(taps), b.sizes(rows, 2, 3))
    y = b.op('ReduceSum', b.op('Mul', samples, mask), axes=[2], keepdims=0)
    b.cast_output(b.reshape_to(y, n, c, out_size), dtype)


def _multi_scale_deformable_attention(b, func):
    inputs, dtype = _composed_inputs(b)
    value, locations, weights = inputs.values()
    _, _, heads, d = b.shape(0)
    *_, levels, points, _ = b.shape(1)
    n, q = b.sizes(locations, 0, 1), b.sizes(locations, 1, 2)
    grid = b.op('Mul', locations, b.constant(2, dtype))
    grid = b.op('Sub', grid, b.constant(1, dtype))
    grid = b.op('Transpose', grid, perm=[0, 2, 3, 1, 4, 5])
    samples, start = [], 0
    for level, (h, w) in enumerate(func.options['sizes']):
        image = b.slice(value, 1, start, start + h * w)
        start += h * w
        # (n, h * w, heads, d) -> (n * heads, d, h, w)
        image = b.reshape(b.op('Transpose', image, perm=[0, 2, 3, 1]), -1, d, h, w)
        places = b.coordinate(grid, level, axis=2)
        places = b.reshape_to(places, -1, q, points, 2)
        samples.append(_grid_sample(b, image, places, dtype))
    weights = b.op('Transpose', weights, perm=[0, 2, 1, 3, 4])
    weights = b.reshape_to(weights, -1, 1, q, levels * points)
    y = b.op('Mul', b.op('Concat', *samples, axis=3), weights)
    y = b.op('ReduceSum', y, axes=[3], keepdims=0)
    # (n * heads, d, q) -> (n, q, heads * d)
    y = b.op('Transpose', b.reshape_to(y, n, heads * d, q), perm=[0, 2, 1])
    b.cast_output(y, dtype)


def _deformable_roi_average_align_2d(b, func):
    options = func.options
    inputs, dtype = _composed_inputs(b)
    c, (out_h, out_w) = b.shape(0)[1], func.shapes['offset'][2:]
    rois = b.op('Mul', inputs['rois'], b.constant(options['spatial_scale'], dtype))
    low, high = b.slice(rois, 1, 0, 2), b.slice(rois, 1, 2, 4)
    size = _where_finite(b, b.op('Sub', high, low), 0, dtype)
    if options['aligned']:
        low = b.op('Sub', low, b.constant(0.5, dtype))
    else:
        size = b.op('Max', size, b.constant(1, dtype))
    bins = b.op('Div', size, b.constant([out_h, out_w], dtype))
    low, size, bins = (b.op('Unsqueeze', a, axes=[1, 2]) for a in (low, size, bins))
    # The first corner of each bin, (R, out_h, out_w, yx)
    cells = numpy.stack(numpy.indices((out_h, out_w)), -1)
    low = b.op('Add', low, b.op('Mul', b.constant(cells, dtype), bins))
    if 'offset' in inputs:
        offset = b.op('Transpose', inputs['offset'], perm=[0, 2, 3, 1])
        offset = b.op('Gather', offset, b.ints(1, 0), axis=3)
        scale = b.op('Mul', size, b.constant(options['gamma'], dtype))
        low = b.op('Add', low, b.op('Mul', offset, scale))

    n_h, n_w = options['ratio']
    images = b.op('Unsqueeze', inputs['roi_indices'], axes=[1])
    if n_h == n_w is not None:
        # Each bin is a box.
        bins = b.op('Expand', bins, b.ints(1, out_h, out_w, 1))
        images = b.op('Expand', images, b.ints(1, out_h * out_w))
        low, bins = b.reshape(low, -1, 2), b.reshape(bins, -1, 2)
        y = _roi_align(b, inputs['x'], low, bins, b.reshape(images, -1), dtype, n_h)
        y = b.reshape(y, -1, out_h * out_w, c)
    else:
        y = _means(b, inputs['x'], low, bins, images, (n_h, n_w), dtype)
    # (R, out_h * out_w, c) -> (R, c, out_h, out_w)
    y = b.reshape(b.op('Transpose', y, perm=[0, 2, 1]), -1, c, out_h, out_w)
    b.cast_output(y, dtype)


def _means(b, x: str, low, bins, images: str, ratio, dtype) -> str:
    """The mean of each bin of some boxes, from points: ``(R, out_h * out_w, c)``.

    Args:
        low: The first corner of each bin, ``(R, out_h, out_w, yx)`` in pixels.
        bins: The height and width of each box's bins, ``(R, 1, 1, yx)``.
        images: The image of each box, ``(R, 1)`` in int64.
        ratio: Samples along each side of a bin, or None for as many as it has pixels.

    """
    (out_h, out_w), c = b.func.shapes['offset'][2:], b.shape(0)[1]
    one, half = b.constant(1, dtype), b.constant(0.5, dtype)
    corners, sides = (
        [b.coordinate(array, i, axis=3) for i in (0, 1)] for array in (low, bins)
    )
    # (R, 1), as floats
    counts = [
        b.reshape(b.op('Ceil', side), -1, 1)
        if count is None
        else b.constant([[count]], dtype)
        for count, side in zip(ratio, sides)
    ]
    n_h, n_w = (b.op('Max', count, one) for count in counts)
    # As many as the bin with most samples has, and one where there is no box.
    most = b.reshape(b.op('Mul', n_h, n_w), -1)
    most = b.op('Concat', most, b.constant([1], dtype), axis=0)
    most = b.cast(b.op('ReduceMax', most, axes=[0]), numpy.int64)
    # Sample (a, b) of each, (R, K)
    numbers = b.range(most, dtype)
    rows = b.op('Floor', b.op('Div', numbers, n_w))
    columns = b.op('Sub', numbers, b.op('Mul', rows, n_w))
    inside = [b.op('Less', *pair) for pair in zip((rows, columns), counts)]
    inside = b.cast(b.op('And', *inside), dtype)
    total = b.op('ReduceSum', inside, axes=[1])
    weights = b.op('Div', inside, b.op('Max', total, one))

    places = []
    for number, count, corner, side in zip((rows, columns), (n_h, n_w), corners, sides):
        share = b.op('Div', b.op('Add', number, half), count)
        share = b.op('Unsqueeze', share, axes=[1, 2])
        side, corner = (b.op('Unsqueeze', a, axes=[3]) for a in (side, corner))
        place = b.op('Add', corner, b.op('Mul', share, side))
        places.append(b.op('Unsqueeze', place, axes=[4]))
    points = b.reshape(b.op('Concat', *places, axis=4), -1, 2)
    many = b.op('Mul', most, b.ints(out_h * out_w))
    images = b.op('Expand', images, b.op('Concat', b.ints(1), many, axis=0))
    y = _roi_align(b, x, points, None, b.reshape(images, -1), dtype)
    y = b.reshape_to(y, -1, out_h * out_w, most, c)
    y = b.op('Mul', y, b.op('Unsqueeze', weights, axes=[1, 3]))
    return b.op('ReduceSum', y, axes=[2], keepdims=0)


def _deformable_ps_roi_average_pooling_2d(b, func):
    options = func.options
    inputs, dtype = _composed_inputs(b)
    x, images = inputs['x'], inputs['roi_indices']
    g, (out_h, out_w), (s_h, s_w) = options['g'], options['out_size'], options['ratio']
    K, classes, out_c = s_h * s_w, 1, b.shape(0)[1] // g**2
    rois, half = inputs['rois'], b.constant(0.5, dtype)
    # Rounded, halves away from zero.
    sign, length = b.op('Sign', rois), b.op('Abs', rois)
    whole = b.op('Floor', length)
    below = b.cast(b.op('Less', b.op('Sub', length, whole), half), dtype)
    up = b.op('Sub', b.constant(1, dtype), below)
    rois = b.op('Mul', sign, b.op('Add', whole, up))
    # From the first pixel to the end of the last one.
    rois = b.op('Add', rois, b.constant([0, 0, 1, 1], dtype))
    rois = b.op('Mul', rois, b.constant(options['spatial_scale'], dtype))
    rois = b.op('Sub', rois, half)
    low, high = b.slice(rois, 1, 0, 2), b.slice(rois, 1, 2, 4)
    size = _where_finite(b, b.op('Sub', high, low), 0, dtype)
    size = b.op('Max', size, b.constant(0.1, dtype))
    moves = None
    if 'offset' in inputs:
        _, channels, *parts = func.shapes['offset']
        offset, classes = inputs['offset'], channels // 2
        for axis, (out, part) in enumerate(zip((out_h, out_w), parts)):
            index = b.ints(*(numpy.arange(out) * part // out))
            offset = b.op('Gather', offset, index, axis=2 + axis)
        moves = b.reshape(offset, 0, classes, 2, out_h, out_w)

    # (R, classes, out_h, out_w, s_h, s_w) or with ones
    places, weights = [], []
    for axis, (out, count) in enumerate(zip((out_h, out_w), (s_h, s_w))):
        start, length = (
            b.op('Unsqueeze', b.coordinate(a, axis, axis=1), axes=[1, 2, 3, 4, 5])
            for a in (low, size)
        )
        share = numpy.arange(out)[:, None] + numpy.arange(count) / count
        shape = (out, 1, count, 1) if axis == 0 else (1, out, 1, count)
        share = b.constant((share / out).reshape(shape), dtype)
        place = b.op('Add', start, b.op('Mul', share, length))
        if moves is not None:
            moved = b.op('Unsqueeze', b.coordinate(moves, 1 - axis, 2), axes=[4, 5])
            length = b.op('Mul', length, b.constant(options['gamma'], dtype))
            place = b.op('Add', place, b.op('Mul', moved, length))
        last = b.cast(b.sizes(x, 2 + axis, 3 + axis), dtype)
        last = b.op('Sub', last, half)
        beyond = [
            b.op('Less', place, b.constant(-0.5, dtype)),
            b.op('Greater', place, last),
        ]
        inside = b.cast(b.op('Not', b.op('Or', *beyond)), dtype)
        total = b.op('ReduceSum', inside, axes=[4 + axis])
        weights.append(b.op('Div', inside, b.op('Max', total, b.constant(1, dtype))))
        place = b.op('Expand', place, b.ints(1, 1, out_h, out_w, s_h, s_w))
        places.append(b.op('Unsqueeze', place, axes=[6]))
    points = b.reshape(b.op('Concat', *places, axis=6), -1, 2)
    weights = b.reshape(b.op('Mul', *weights), -1, classes, out_h * out_w, K, 1)

    # Each cell's channels as an image: (n * cells * classes, out_c / classes, h, w)
    d, x_size = out_c // classes, b.sizes(x, 2, 4)
    x = b.reshape_to(x, -1, classes, d, g * g, x_size)
    x = b.op('Transpose', x, perm=[0, 3, 1, 2, 4, 5])
    x = b.reshape_to(x, -1, d, x_size)
    cells = cells_of_bins(g, out_h, out_w) * classes
    cells = cells + numpy.arange(classes)[:, None, None]
    images = b.op('Mul', images, b.ints(g * g * classes))
    images = b.op('Unsqueeze', images, axes=[1, 2, 3, 4])
    images = b.op('Add', images, b.constant(cells[..., None], numpy.int64))
    images = b.op('Expand', images, b.ints(1, 1, 1, 1, K))
    y = _roi_align(b, x, points, None, b.reshape(images, -1), dtype)
    y = b.op('Mul', b.reshape(y, -1, classes, out_h * out_w, K, d), weights)
    y = b.op('ReduceSum', y, axes=[3], keepdims=0)
    # (R, classes, out_h * out_w, d) -> (R, out_c, out_h, out_w)
    y = b.op('Transpose', y, perm=[0, 1, 3, 2])
    b.cast_output(b.reshape(y, -1, out_c, out_h, out_w), dtype)


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
    indices: list = []
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
    dots = [i for i, index in enumerate(indices) if index is Ellipsis]
    at = dots[0] if dots else len(indices)
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
    # Axes at the end that stay as they are may have other sizes, too.
    kept, most = 0, min(len(old) - copied, len(new) - max(copied, 1))
    while kept < most and new[-1 - kept] == old[-1 - kept]:
        kept += 1
    if copied:
        new[:copied] = copied * [0]
        if len(new) - copied == 1:
            new[-1], kept = -1, 0
    elif new:  # the first axis finds its size by itself
        if -1 in new:
            new[new.index(-1)] = math.prod(old) // -math.prod(new)
        new[0] = -1
    (x,) = b.inputs
    if kept:
        b.reshape_to(x, *new[:-kept], b.sizes(x, len(old) - kept, len(old)))
    else:
        b.reshape(x, *new)


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
    'SampledSum2D': _sampled_sum_2d,
    'dcn_v3_2d': _dcn_v3_2d,
    'deformable_ps_roi_average_pooling_2d': _deformable_ps_roi_average_pooling_2d,
    'deformable_roi_average_align_2d': _deformable_roi_average_align_2d,
    'multi_scale_deformable_attention': _multi_scale_deformable_attention,
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
    'Erf': _one_node('Erf'),
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


class Composed(chainer.FunctionNode):
    """A call of a function that is made of Chainer's own, as one node.

    Attributes:
        names: The names of the node's inputs, in their order.
        shapes: The shapes of the arguments that are arrays, by name.
        options: The other arguments, by name.

    """

    def __init__(self, call: Call) -> None:
        self.custom_function_node_name = call.name
        arrays = {name: a for name, a in call.arrays.items() if a is not None}
        self.shapes = {name: array.shape for name, array in arrays.items()}
        # A layer without offsets gives zeros, as many as there are boxes.
        self.names = [
            name
            for name, array in arrays.items()
            if not (name == 'offset' and _is_zeros(array))
        ]
        self.options = call.options
        self._call = call

    def __call__(self) -> chainer.Variable:
        (y,) = self.apply([self._call.arrays[name] for name in self.names])
        return y

    def forward(self, inputs):
        arrays = {**self._call.arrays, **dict(zip(self.names, inputs))}
        return (self._call.compute(*arrays.values(), **self.options).array,)

    def backward(self, indexes, gy):
        raise ValueError(
            'the model cannot be exported: there is no ONNX form of '
            f'{public_name(self._call.name + "Grad")}, for which there is no operator'
        )


def _is_zeros(array) -> bool:
    return not isinstance(array, chainer.Variable) and not array.any()


@contextlib.contextmanager
def functions_as_nodes() -> Iterator[None]:
    """Has functions leave a trace as they are, also where they are no nodes.

    These are composed functions, and those that have no gradient.
    """
    with replaced(lambda call: Composed(call)()), _rounding_as_nodes():
        yield


@contextlib.contextmanager
def _rounding_as_nodes() -> Iterator[None]:
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
    if short in names:
        return f'F.{names[short]}'
    ours = {known.replace('_', ''): known for known in functions.__all__}
    return f'functions.{ours[short]}' if short in ours else f'the function {name}'


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
