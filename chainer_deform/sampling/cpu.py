"""The sampler on the CPU: NumPy for the coordinates, tile by tile for the rest.

A tap is one sampling point: its four corner pixels, where a row of zeros stands for
those outside the image, and their weights. Three primitives work on taps:
``gather`` samples, its transpose ``scatter`` adds to the image, ``dot`` multiplies what
a tap is given with what it reads. With matrix products they make up the forward pass,
its gradients and the gradients of those. :mod:`~chainer_deform.sampling.cpu_numba` has
them compiled, where Numba can be imported, else
:mod:`~chainer_deform.sampling.cpu_scipy` does the same.

In the shapes below ``P = out_h * out_w`` is the number of output positions of an
image, ``K = kh * kw`` that of kernel positions, ``og`` that of offset groups, ``G``
that of groups; ``iCg`` and ``oCg`` are the input and output channels of a group. A
piece has ``m`` images and ``p`` positions of each. A tile is a part of a piece, of
``R`` positions, whose columns stay in the cache.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy

from chainer_deform.geometry import Geometry

#: Bytes that taps and images may take, of all pieces worked on at the same time.
PIECE_BYTES = 16 << 20

#: Multiplications that are worth a thread of their own. With less to do, threads lose
#: more than they gain: by waiting for each other between the steps, and to be woken.
THREAD_WORK = 1 << 28


def _quietly(function: Callable) -> Callable:
    """NaN and infinity pass silently, as on a GPU, in whatever thread it is called."""

    @functools.wraps(function)
    def quiet(*args, **kwargs):
        with numpy.errstate(all='ignore'):
            return function(*args, **kwargs)

    return quiet


@functools.cache
def primitives():
    """The module of the primitives; ``CHAINER_DEFORM_NUMBA=0`` keeps Numba out."""
    _keep_freed_memory()
    if os.environ.get('CHAINER_DEFORM_NUMBA') != '0':
        try:
            return importlib.import_module('chainer_deform.sampling.cpu_numba')
        except ImportError:  # it is not installed, or not made for this NumPy
            pass
    return importlib.import_module('chainer_deform.sampling.cpu_scipy')


def _keep_freed_memory() -> None:
    """Has the GNU C library keep up to 62 MiB of freed arrays for the next ones.

    It would give them back to the system, which fills the next ones with zeros page by
    page: up to half of the time. It stops when it saw an array of this size, which no
    page was taken for, come and go.
    """
    numpy.empty(31 << 20, numpy.uint8)


@_quietly
def forward(geometry: Geometry, x, offset, W, mask=None, b=None):
    """Returns ``y``; shapes and dtypes are those of the public function."""
    dtype = _compute_dtype(x, offset, W, mask, b)
    filters = _Filters(geometry, W, dtype, forward=True)
    y = numpy.empty((len(x), len(W), *offset.shape[2:]), x.dtype)
    y_view, offset, mask = _by_position(y, offset, mask)

    def work(piece):
        taps = _Taps(geometry, piece, x.shape, offset, mask, dtype)
        image, weights = taps.image(x), taps.weights()
        scratch = _Scratch(dtype)
        for tile in taps.tiles(len(W)):
            columns = filters.new_columns(tile, scratch)
            taps.sample(image, tile, columns, weights)
            output = filters.new_output(tile, b, scratch)
            filters.convolve(columns, output, scratch)
            filters.store(output, taps.part(y_view, tile))

    for _ in _run(work, geometry, x.shape, len(W), dtype):
        pass
    return y


@_quietly
def backward(
    geometry: Geometry, wanted: Collection[str], gy, x, offset, W, mask=None, b=None
) -> dict:
    """Returns the gradients of the arguments named in ``wanted``, and no others."""
    dtype = _compute_dtype(gy, x, offset, W, mask)
    wanted = set(wanted)
    need_gcolumns = bool(wanted & {'x', 'offset', 'mask'})
    filters = _Filters(geometry, W, dtype, backward=need_gcolumns)
    gradients = _Gradients(wanted, x, offset, mask, filters)
    gy_view, offset, mask = _by_position(gy, offset, mask)

    def work(piece):
        taps = _Taps(geometry, piece, x.shape, offset, mask, dtype)
        image, weights = taps.image(x), taps.weights()
        gimage, gfilters = gradients.new_sums(image)
        products = taps.new_products() if wanted & {'offset', 'mask'} else None
        scratch = _Scratch(dtype)
        for tile in taps.tiles(len(W)):
            gy_tile = filters.load(taps.part(gy_view, tile), scratch)
            if 'W' in wanted:
                columns = filters.new_columns(tile, scratch)
                taps.sample(image, tile, columns, weights)
                filters.differentiate(gy_tile, columns, gfilters, scratch)
            if need_gcolumns:
                gcolumns = filters.gcolumns(gy_tile, scratch)
            if 'x' in wanted:
                taps.scatter(gimage, tile, gcolumns, weights)
            if products is not None:
                taps.dot(image, tile, gcolumns, products)
        if products is not None:
            gradients.set_of_taps(taps, *taps.slopes(products))
        return taps, gimage, gfilters

    if wanted - {'b'}:
        for sums in _run(work, geometry, x.shape, len(W), dtype):
            gradients.add(*sums)
    result = gradients.result(x, W)
    if 'b' in wanted:
        result['b'] = gy.sum((0, 2, 3), dtype).astype(b.dtype)
    return result


@_quietly
def double_backward(
    geometry: Geometry,
    wanted: Collection[str],
    gg: Mapping,
    gy,
    x,
    offset,
    W,
    mask=None,
    b=None,
) -> dict:
    """Returns the gradients of the sum of ``gg[name] * backward(...)[name]``.

    They are those of the arguments named in ``wanted``, which may be ``gy``, but not
    ``b``: the sum does not depend on it. ``gg`` has arrays with the shape and dtype of
    arguments, by name; those that it lacks count as 0.

    That sum is ``gy`` times how fast ``y`` changes while the arguments move along
    ``gg``. What ends in ``_dot`` is such a rate, or the gradient of one.
    """
    dtype = _compute_dtype(gy, x, offset, W, mask, *gg.values())
    wanted = set(wanted)
    need_gcolumns = bool(wanted & {'x', 'offset', 'mask'})
    directions = {'forward': 'gy' in wanted, 'backward': need_gcolumns}
    filters = _Filters(geometry, W, dtype, **directions)
    ggfilters = None
    if 'W' in gg:
        ggfilters = _Filters(geometry, gg['W'], dtype, **directions)
    gradients = _Gradients(wanted, x, offset, mask, filters)
    ggy = numpy.empty(gy.shape, gy.dtype) if 'gy' in wanted else None
    gy_view, ggy_view, offset, mask, ggoffset, ggmask = _by_position(
        gy, ggy, offset, mask, gg.get('offset'), gg.get('mask')
    )

    def work(piece):
        taps = _Taps(geometry, piece, x.shape, offset, mask, dtype)
        image, weights = taps.image(x), taps.weights()
        ggimage = taps.image(gg['x']) if 'x' in gg else None
        rates = weights_dot = None
        if ggoffset is not None or ggmask is not None:
            rates = taps.rates(ggoffset, ggmask)
            weights_dot = taps.weights_dot(rates)
        gimage, gfilters = gradients.new_sums(image)
        products = products_dot = None
        if wanted & {'offset', 'mask'}:
            products = taps.new_products()
            products_dot = None if rates is None else taps.new_products()
        scratch = _Scratch(dtype)

        columns_move = rates is not None or ggimage is not None
        for tile in taps.tiles(len(W)):
            if wanted & {'gy', 'W'} and columns_move:
                columns_dot = filters.new_columns(tile, scratch, 'columns_dot')
                columns_dot[...] = 0
                if rates is not None:
                    taps.sample(image, tile, columns_dot, weights_dot, add=True)
                if ggimage is not None:
                    taps.sample(ggimage, tile, columns_dot, weights, add=True)
            if 'gy' in wanted:
                output = filters.new_output(tile, gg.get('b'), scratch)
                if columns_move:
                    filters.convolve(columns_dot, output, scratch)
                if ggfilters is not None:
                    columns = filters.new_columns(tile, scratch)
                    taps.sample(image, tile, columns, weights)
                    ggfilters.convolve(columns, output, scratch)
                filters.store(output, taps.part(ggy_view, tile))

            gy_tile = filters.load(taps.part(gy_view, tile), scratch)
            if 'W' in wanted and columns_move:
                filters.differentiate(gy_tile, columns_dot, gfilters, scratch)
            if not need_gcolumns:
                continue
            if columns_move:
                gcolumns_dot = filters.gcolumns(gy_tile, scratch)
                if 'x' in wanted and rates is not None:
                    taps.scatter(gimage, tile, gcolumns_dot, weights_dot)
                if products is not None and ggimage is not None:
                    taps.dot(ggimage, tile, gcolumns_dot, products)
                if products_dot is not None:
                    taps.dot(image, tile, gcolumns_dot, products_dot)
            if ggfilters is not None:
                gcolumns = ggfilters.gcolumns(gy_tile, scratch)
                if 'x' in wanted:
                    taps.scatter(gimage, tile, gcolumns, weights)
                if products is not None:
                    taps.dot(image, tile, gcolumns, products)

        if products is not None:
            slopes = taps.slopes(products)
            if rates is not None:
                more = taps.slopes_dot(products_dot, rates)
                slopes = tuple(map(numpy.add, slopes, more))
            gradients.set_of_taps(taps, *slopes)
        return taps, gimage, gfilters

    for sums in _run(work, geometry, x.shape, len(W), dtype):
        gradients.add(*sums)
    result = gradients.result(x, W)
    if 'gy' in wanted:
        result['gy'] = ggy
    return result


class _Taps:
    """The sampling points of a piece.

    Arrays have a number for each tap (m, og, K, p), or for each of its corners
    (4, m, og, K, p): top left, top right, bottom left, bottom right.
    """

    def __init__(
        self,
        geometry: Geometry,
        piece: tuple[slice, slice],
        x_shape,
        offset,
        mask,
        dtype,
    ) -> None:
        self.geometry, self.piece, self.dtype = geometry, piece, dtype
        _, self.c, h, self.w = x_shape
        self.images, self.positions = (axis.stop - axis.start for axis in piece)

        # A point is a place of the regular grid, in exact integers, plus its offset.
        # (K, p)
        out_h, out_w = geometry.out_size(h, self.w)
        oy, ox = numpy.divmod(numpy.arange(piece[1].start, piece[1].stop), out_w)
        i, j = numpy.divmod(numpy.arange(geometry.taps)[:, None], geometry.kw)
        grid_y = oy * geometry.sy - geometry.ph + i * geometry.dy
        grid_x = ox * geometry.sx - geometry.pw + j * geometry.dx
        offset_x, offset_y = self._of_axes(offset)
        self.nan = None
        if numpy.isnan(offset_x.min() + offset_y.min()):
            self.nan = numpy.isnan(offset_x) | numpy.isnan(offset_y)
        self.factor = numpy.ones_like(offset_x) if mask is None else self._of_mask(mask)

        # A pixel is a row of the images, after the row of zeros. That is where all
        # corners outside are.
        numbers = (1 + self.images * h * self.w) * geometry.offset_groups
        index_dtype = numpy.int32 if numbers < 2**31 else numpy.int64
        self.pixels = numpy.empty((4, *offset_x.shape), index_dtype)
        self.row_weights = numpy.empty((2, *offset_x.shape), dtype)
        self.col_weights = numpy.empty((2, *offset_x.shape), dtype)
        first_row, last_row = primitives().locate(
            (grid_y, grid_x),
            (offset_y, offset_x),
            (h, self.w),
            self.pixels,
            self.row_weights,
            self.col_weights,
        )
        # Of one image, only the rows that are touched are sampled.
        self.rows = slice(0, h)
        if self.positions < out_h * out_w:
            self.rows = slice(first_row, last_row + 1)
            self.pixels -= first_row * self.w
            numpy.maximum(self.pixels, 0, out=self.pixels)

    def tiles(self, out_c: int) -> Iterator[tuple[slice, slice]]:
        """Cuts the piece into slices of its images and of its positions."""
        numbers = max(self.geometry.taps * self.c, out_c)
        count = primitives().TILE_BYTES // (numbers * self.dtype.itemsize)
        return self.geometry.pieces(self.images, self.positions, count)

    def part(self, array, tile):
        """What an array (n, channels, P) has for a tile, as a view."""
        images, positions = (
            slice(whole.start + part.start, whole.start + part.stop)
            for whole, part in zip(self.piece, tile)
        )
        return array[images, :, positions]

    def image(self, x):
        """The rows that the piece samples, after one of zeros: (pixels, og, c / og)."""
        og = self.geometry.offset_groups
        pixels = 1 + self.images * (self.rows.stop - self.rows.start) * self.w
        image = numpy.empty((pixels, og, self.c // og), self.dtype)
        image[0] = 0
        self._pixel_view(image)[...] = x[self.piece[0], :, self.rows]
        return image

    def add_image(self, image, x) -> None:
        """The inverse of ``image``: adds to ``x`` what such an image has."""
        # What has the order of x is added faster.
        image = numpy.ascontiguousarray(self._pixel_view(image))
        x[self.piece[0], :, self.rows] += image

    def weights(self) -> _Weights:
        """The bilinear weights, and the mask."""
        weights = numpy.empty(self.pixels.shape, self.dtype)
        for corner, (row, col) in enumerate(
            itertools.product(self.row_weights, self.col_weights)
        ):
            numpy.multiply(row, col, out=weights[corner])
        return _Weights(weights, self.factor)

    def sample(self, image, tile, columns, weights, add=False) -> None:
        """Writes, or adds, to the columns (R, K * c) the image at the points."""
        primitives().gather(image, self.pixels, *weights, tile, columns, add)
        if self.nan is not None:
            # (m, og, K, p) -> (R, K * c)
            nan = self.nan[tile[0], :, :, tile[1]].transpose(0, 3, 2, 1)
            nan = numpy.repeat(nan.reshape(len(columns), -1), image.shape[2], axis=1)
            columns[:, : nan.shape[1]][nan] = numpy.nan

    def scatter(self, gimage, tile, gcolumns, weights) -> None:
        """Adds to the image's gradient what the gradients of columns make of it."""
        primitives().scatter(gimage, self.pixels, *weights, tile, gcolumns)

    def new_products(self):
        return numpy.zeros(self.pixels.shape, self.dtype)

    def dot(self, image, tile, gcolumns, products) -> None:
        """Adds the dot products of columns' gradients with their taps' corners."""
        primitives().dot(image, self.pixels, tile, gcolumns, products)

    def slopes(self, products):
        """The gradients of vertical and horizontal offset and of the mask."""
        along_y, along_x, _ = self._derivatives(products)
        return self.factor * along_y, self.factor * along_x, self._value(products)

    def rates(self, ggoffset, ggmask):
        """How fast vertical and horizontal offset and the mask move."""
        still = numpy.zeros_like(self.factor)
        x_dot, y_dot = (still, still) if ggoffset is None else self._of_axes(ggoffset)
        return y_dot, x_dot, still if ggmask is None else self._of_mask(ggmask)

    def weights_dot(self, rates) -> _Weights:
        """How fast the weights, times the mask, change."""
        y_dot, x_dot, mask_dot = rates
        weights_dot = numpy.empty(self.pixels.shape, self.dtype)
        # The weights before and after a point go down and up with it.
        for corner, ((row, row_slope), (col, col_slope)) in enumerate(
            itertools.product(
                zip(self.row_weights, (-1, 1)), zip(self.col_weights, (-1, 1))
            )
        ):
            rate = row_slope * col * y_dot + row * col_slope * x_dot
            weights_dot[corner] = mask_dot * row * col + self.factor * rate
        weights_dot[self.pixels == 0] = 0
        return _Weights(weights_dot, numpy.ones_like(self.factor))

    def slopes_dot(self, products_dot, rates):
        """What is added to ``slopes`` where points and mask move."""
        y_dot, x_dot, mask_dot = rates
        along_y, along_x, along_both = self._derivatives(products_dot)
        return (
            mask_dot * along_y + self.factor * along_both * x_dot,
            mask_dot * along_x + self.factor * along_both * y_dot,
            y_dot * along_y + x_dot * along_x,
        )

    def _value(self, products):
        """The bilinear mean of the corners, NaN where the offset is."""
        (tl, tr, bl, br), (top, bottom) = products, self.row_weights
        left, right = self.col_weights
        value = top * (left * tl + right * tr) + bottom * (left * bl + right * br)
        return self._with_nan(value)

    def _derivatives(self, products):
        """Its derivatives along y, along x and along both."""
        (tl, tr, bl, br), (top, bottom) = products, self.row_weights
        left, right = self.col_weights
        along_y = left * (bl - tl) + right * (br - tr)
        along_x = top * (tr - tl) + bottom * (br - bl)
        along_both = tl - tr - bl + br
        return tuple(map(self._with_nan, (along_y, along_x, along_both)))

    def _with_nan(self, array):
        if self.nan is not None:
            array[self.nan] = numpy.nan
        return array

    def _of_axes(self, offset):
        """(n, og * 2 * K, P) -> horizontal and vertical (m, og, K, p)."""
        pairs = self.view_of_offset(offset)
        return tuple(pairs[:, :, axis].astype(self.dtype, 'C') for axis in (0, 1))

    def _of_mask(self, mask):
        return self.view_of_mask(mask).astype(self.dtype, 'C')

    def view_of_offset(self, offset):
        """(n, og * 2 * K, P) -> (m, og, 2, K, p)."""
        return offset[self.piece[0], :, self.piece[1]].reshape(
            self.images, self.geometry.offset_groups, 2, -1, self.positions
        )

    def view_of_mask(self, mask):
        """(n, og * K, P) -> (m, og, K, p)."""
        return mask[self.piece[0], :, self.piece[1]].reshape(
            self.images, self.geometry.offset_groups, -1, self.positions
        )

    def _pixel_view(self, image):
        """(pixels, og, c / og) -> (m, c, rows, w)."""
        return image[1:].reshape(self.images, -1, self.w, self.c).transpose(0, 3, 1, 2)


class _Weights(NamedTuple):
    """What the corners of taps are multiplied by, and then their sum."""

    corners: numpy.ndarray
    factor: numpy.ndarray


class _Filters:
    """The filter as matrices, and the products that a convolution is made of.

    Matrices have rows of whole vectors, of which not all numbers may be in use. What
    is one matrix for each group lies one after the other, unless the convolution is
    depthwise: then the groups are the last axis.
    """

    def __init__(
        self, geometry: Geometry, W, dtype, forward=False, backward=False
    ) -> None:
        self.dtype = dtype
        self.groups, self.taps = geometry.groups, geometry.taps
        self.group_out, self.group_in = len(W) // self.groups, W.shape[1]
        self.depthwise = self.group_in == 1 < self.groups
        W = W.reshape(self.groups, self.group_out, self.group_in, self.taps)
        self.matrices = self._matrices(W) if forward else None
        self.transposed = self._transposed(W) if backward else None

    def _matrices(self, W):
        """From columns to outputs: (G, K * iCg, oCg), or depthwise (K, oCg, G)."""
        # (G, oCg, iCg, K)
        if self.depthwise:
            return W[:, :, 0].transpose(2, 1, 0).astype(self.dtype, 'C')
        matrices = self._empty(self.taps, self.group_in, self.group_out)
        for group, turned in zip(numpy.ascontiguousarray(W, self.dtype), matrices):
            primitives().turn(group, turned)
        return matrices.reshape(self.groups, self.taps * self.group_in, -1)

    def _transposed(self, W):
        """From outputs to columns: (G, oCg, K * iCg), or depthwise (oCg, K, G)."""
        # (G, oCg, iCg, K)
        if self.depthwise:
            return W[:, :, 0].transpose(1, 2, 0).astype(self.dtype, 'C')
        used = self.taps * self.group_in
        matrices = self._empty(self.group_out, used)
        # (G, oCg, K, iCg) from (G, oCg, iCg, K)
        matrices[..., :used].reshape(*W.shape[:2], self.taps, -1)[...] = W.swapaxes(
            2, 3
        )
        return matrices

    def zeros(self):
        """A sum of gradients: (G, oCg, K * iCg), or depthwise (K, oCg, G)."""
        if self.depthwise:
            return numpy.zeros((self.taps, self.group_out, self.groups), self.dtype)
        width = self._whole(self.taps * self.group_in)
        return numpy.zeros((self.groups, self.group_out, width), self.dtype)

    def gradient(self, gfilters, W):
        """Such a sum in the shape and the dtype of the filter."""
        if self.depthwise:
            gW = gfilters.transpose(2, 1, 0)
        else:
            gW = gfilters[..., : self.taps * self.group_in].reshape(
                self.groups, self.group_out, self.taps, self.group_in
            )
            gW = gW.swapaxes(2, 3)
        return numpy.ascontiguousarray(gW, W.dtype).reshape(W.shape)

    def new_columns(self, tile, scratch, name='columns'):
        """Memory for columns (R, K * c)."""
        width = self.taps * self.group_in * self.groups
        padded = self._whole(width) if self.groups == 1 else width
        columns = scratch(name, _count(tile), padded)
        columns[:, width:] = 0
        return columns

    def new_output(self, tile, b, scratch):
        """Outputs (G, R, oCg), or depthwise (R, oCg, G), that start as the bias."""
        R = _count(tile)
        if self.depthwise:
            output = scratch('output', R, self.group_out, self.groups)
            output[...] = 0 if b is None else b.reshape(self.groups, -1).T
        else:
            output = scratch('output', self.groups, R, self._whole(self.group_out))
            output[...] = 0
            if b is not None:
                output[..., : self.group_out] = b.reshape(self.groups, 1, -1)
        return output

    def convolve(self, columns, output, scratch) -> None:
        """Adds to the outputs the products of columns and filter."""
        if self.depthwise:
            a = columns.reshape(-1, self.taps, self.groups)
            primitives().matmul_lanes(a, self.matrices, output)
        else:
            a = self._split(columns, scratch)
            primitives().matmul(a, self.matrices, output)

    def gcolumns(self, gy, scratch):
        """The gradients of columns (R, K * c), of those of outputs."""
        if self.depthwise:
            gcolumns = scratch('gcolumns', len(gy), self.taps, self.groups)
            gcolumns[...] = 0
            primitives().matmul_lanes(gy, self.transposed, gcolumns)
            return gcolumns.reshape(len(gy), -1)
        R = gy.shape[1]
        matrices = self.transposed
        gcolumns = scratch('gcolumns', self.groups, R, matrices.shape[2])
        gcolumns[...] = 0
        primitives().matmul(gy, matrices, gcolumns)
        if self.groups == 1:
            return gcolumns[0]
        joined = scratch('joined', R, self.taps, self.groups, self.group_in)
        gcolumns = gcolumns[..., : self.taps * self.group_in]
        joined[...] = gcolumns.reshape(self.groups, R, self.taps, -1).transpose(
            1, 2, 0, 3
        )
        return joined.reshape(R, -1)

    def differentiate(self, gy, columns, gfilters, scratch) -> None:
        """Adds to the filter's gradient what a tile makes of it."""
        if self.depthwise:
            a = columns.reshape(-1, self.taps, self.groups)
            primitives().matmul_lanes(a, gy, gfilters, transposed=True)
        else:
            b = self._split(columns, scratch)
            primitives().matmul(gy, b, gfilters, transposed=True)

    def load(self, gy, scratch):
        """(m, out_c, p) -> (G, R, oCg), or depthwise (R, oCg, G)."""
        m, _, p = gy.shape
        gy = gy.reshape(m, self.groups, self.group_out, p)
        # (m, G, oCg, p) -> (m, p, oCg, G) or (G, m, p, oCg)
        gy = gy.transpose((0, 3, 2, 1) if self.depthwise else (1, 0, 3, 2))
        loaded = scratch('gy', *gy.shape)
        loaded[...] = gy
        if self.depthwise:
            return loaded.reshape(m * p, self.group_out, self.groups)
        return loaded.reshape(self.groups, m * p, self.group_out)

    def store(self, output, y) -> None:
        """The inverse of ``load``, into a view (m, out_c, p)."""
        m, _, p = y.shape
        y = y.reshape(m, self.groups, self.group_out, p)
        if self.depthwise:
            output = output.reshape(m, p, self.group_out, self.groups)
            y[...] = output.transpose(0, 3, 2, 1)
        else:
            output = output.reshape(self.groups, m, p, -1)[..., : self.group_out]
            y[...] = output.transpose(1, 0, 3, 2)

    def _split(self, columns, scratch):
        """(R, K * c) -> (G, R, K * iCg)."""
        if self.groups == 1:
            return columns[None]
        R, used = len(columns), self.taps * self.group_in
        split = scratch('split', self.groups, R, self._whole(used))
        split[..., used:] = 0
        split[..., :used].reshape(self.groups, R, self.taps, self.group_in)[...] = (
            columns.reshape(R, self.taps, self.groups, -1).transpose(2, 0, 1, 3)
        )
        return split

    def _whole(self, width: int) -> int:
        lanes = primitives().lanes(self.dtype)
        return -(-width // lanes) * lanes

    def _empty(self, *shape: int):
        """Memory (G, ...) for matrices with rows of whole vectors."""
        *shape, width = shape
        memory = numpy.empty((self.groups, *shape, self._whole(width)), self.dtype)
        memory[..., width:] = 0
        return memory


class _Gradients:
    """The gradients that are wanted, to which the pieces add."""

    def __init__(self, wanted, x, offset, mask, filters: _Filters) -> None:
        self.filters = filters
        self.gx = numpy.zeros(x.shape, filters.dtype) if 'x' in wanted else None
        self.gfilters = None
        self.wanted = wanted
        self.of_taps = {
            name: numpy.empty(array.shape, array.dtype)
            for name, array in (('offset', offset), ('mask', mask))
            if name in wanted
        }

    def new_sums(self, image):
        """What a piece adds up: the gradients of its image and of the filter."""
        return (
            numpy.zeros_like(image) if 'x' in self.wanted else None,
            self.filters.zeros() if 'W' in self.wanted else None,
        )

    def add(self, taps: _Taps, gimage, gfilters) -> None:
        if gimage is not None:
            taps.add_image(gimage, self.gx)
        if self.gfilters is None:
            self.gfilters = gfilters
        elif gfilters is not None:
            self.gfilters += gfilters

    def set_of_taps(self, taps: _Taps, along_y, along_x, value) -> None:
        for name, array in self.of_taps.items():
            (array,) = _by_position(array)
            if name == 'offset':
                view = taps.view_of_offset(array)
                view[:, :, 0], view[:, :, 1] = along_x, along_y
            else:
                taps.view_of_mask(array)[...] = value

    def result(self, x, W) -> dict:
        result = dict(self.of_taps)
        if self.gx is not None:
            result['x'] = self.gx.astype(x.dtype, copy=False)
        if 'W' in self.wanted:
            empty = self.gfilters is None  # as the batch is
            gfilters = self.filters.zeros() if empty else self.gfilters
            result['W'] = self.filters.gradient(gfilters, W)
        return result


class _Scratch:
    """Memory that the tiles of a piece use one after the other, by name."""

    def __init__(self, dtype) -> None:
        self.dtype = dtype
        self.arrays = {}

    def __call__(self, name: str, *shape: int):
        size = math.prod(shape)
        array = self.arrays.get(name)
        if array is None or array.size < size:
            array = self.arrays[name] = numpy.empty(size, self.dtype)
        return array[:size].reshape(shape)


def _run(work: Callable, geometry: Geometry, x_shape, out_c: int, dtype) -> Iterator:
    """Does the work piece by piece, on several threads; yields what comes out in order.

    As many pieces as there are threads are worked on at the same time.
    """
    n, c, h, w = x_shape
    positions = math.prod(geometry.out_size(h, w))
    # Of a number of the columns: its products, and about as much as these to sample it.
    work_size = n * positions * geometry.taps * c * (out_c // geometry.groups + 32)
    threads = min(primitives().thread_count(), max(1, work_size // THREAD_WORK))
    # Of a tap: pixels, weights, dot products, all of them twice, and what they are
    # made from. Of a position: its share of three images.
    position_bytes = dtype.itemsize * (
        40 * geometry.taps * geometry.offset_groups + -(-3 * c * h * w // positions)
    )
    most = max(1, PIECE_BYTES // threads // position_bytes)
    if most >= positions and (n % threads == 0 or n >= 4 * threads):
        # Whole images: as many pieces as there are threads, or a multiple of them.
        rounds = max(1, -(-n // (most // positions * threads)))
        count = -(-n // (rounds * threads)) * positions
    else:
        # Parts of images, of which each is shared by the threads.
        count = -(-positions // threads)
        count = -(-count // -(-count // most))
    pieces = list(geometry.pieces(n, positions, count))

    work = _quietly(work)
    for i in range(0, len(pieces), threads):
        others = [_start(work, piece) for piece in pieces[i + 1 : i + threads]]
        try:
            yield work(pieces[i])
        finally:
            wait(others)
        yield from (other.result() for other in others)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait for work, started when they are first needed."""
    return ThreadPoolExecutor(os.cpu_count(), 'chainer_deform')


def _start(work: Callable, piece) -> Future:
    try:
        return _pool().submit(work, piece)
    except RuntimeError:  # no thread can be had, as the interpreter ends: here and now
        future = Future()
        try:
            future.set_result(work(piece))
        except Exception as error:
            future.set_exception(error)
        return future


if hasattr(os, 'register_at_fork'):  # the threads stay behind
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _compute_dtype(*arrays):
    """At least float32, and no less than any of the arrays has."""
    return numpy.result_type(numpy.float32, *(a.dtype for a in arrays if a is not None))


def _by_position(*arrays) -> list:
    """(n, channels, out_h, out_w) -> (n, channels, P); None stays None."""
    return [
        array
        if array is None
        else array.reshape(*array.shape[:2], math.prod(array.shape[2:]))
        for array in arrays
    ]


def _count(tile) -> int:
    """The positions of a tile."""
    return math.prod(axis.stop - axis.start for axis in tile)
