"""The GPU backend: elementwise kernels for the columns, cuBLAS for the products.

Twin of :mod:`chainer_deform.sampling.cpu`: the same names with the same meaning. Images
are channels last, so that a thread reads several channels of a pixel in one access. A
point is the work of ``LANES`` neighbouring threads of a warp, which share its channels.
What does not change from batch to batch of a layer is compiled into its kernels; the
sizes of batch and images are not.

The columns of a convolution lie by groups, (G, R, K * iCg), as its products take them;
where each group has one channel (depthwise), they are (1, R, K * c), and kernels of our
own multiply them.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import chainer
import numpy
from chainer.backends.cuda import cupy

from chainer_deform.sampling.kernels import sampler_kernel, swap_kernel
from chainer_deform.sampling.rule import point_limit

#: Bytes that the columns of a tile, with their gradient, may take.
COLUMN_BYTES = 1 << 30

#: Coordinates and numbers of cells below this have 32 bits in the kernels.
NARROW = 1 << 31

#: Lanes of a warp that may share a point.
MOST_LANES = 8

#: Channels whose sums a lane keeps, where samples are added up.
HELD_CHANNELS = 16

#: Positions per image below which one product for all images replaces one for each.
FEW_POSITIONS = 512


def empty(shape, dtype):
    """Memory for an array."""
    return cupy.empty(shape, dtype)


def dtypes(x, W, *others):
    """The dtype of images and products, and that of coordinates and sums.

    Both are float64 if any array is; else the first is that of image and filter, of
    which half precision is enough for a product that sums in float32.
    """
    arrays = (x, W, *others)
    real = numpy.result_type(
        numpy.float32, *(array.dtype for array in arrays if array is not None)
    )
    if real == numpy.float64:
        return real, real
    return numpy.promote_types(x.dtype, W.dtype), real


def thread_count(multiply_adds: int) -> int:
    """One: the host only launches kernels."""
    return 1


def batch_images(numbers: int, dtypes) -> int:
    """All images are copied at a time."""
    return sys.maxsize


def tile_positions(numbers: int, points: int, dtypes, tiles: int, parts: int) -> int:
    """How many output positions a tile may have.

    Args:
        numbers: Numbers of a position, in its columns or its output.
        points: Points of a position.
        dtypes: What :func:`dtypes` returns.
        tiles, parts: One; there are no threads.

    """
    itemsize, wide = dtypes[0].itemsize, _wide(dtypes[0]).itemsize
    column_bytes = numbers * (wide if wide == itemsize else wide + itemsize)
    key_bytes = 0
    if chainer.config.cudnn_deterministic:
        # The keys that points are sorted by, with what sorting takes, and weights.
        key_bytes = points * (3 * 8 + 8 * dtypes[1].itemsize)
    most = COLUMN_BYTES // max(1, column_bytes, key_bytes)
    return max(1, min(most, (2**31 - 1) // max(numbers, points)))


def new_image(x, dtype):
    """Memory for images (n, c, h, w), channels last."""
    n, c, h, w = x.shape
    return cupy.empty((n, h * w, c), dtype)


def load_image(x, image, channels) -> None:
    """Copies the images ``x (n, c, h, w)``, all channels, to ``image``."""
    n, c, h, w = x.shape
    _swap(cupy.ascontiguousarray(x).reshape(n, c, h * w), image)


def new_gradient(gx, dtype):
    """Zeros for the gradient of images, channels last."""
    n, c, h, w = gx.shape
    return cupy.zeros((n, h * w, c), dtype)


def apart(gimage, gx):
    """``gimage``, which has memory of its own."""
    return gimage


def store_gradient(gimage, gx, channels) -> None:
    """Writes the gradient to ``gx (n, c, h, w)``, which is contiguous."""
    n, c, h, w = gx.shape
    _swap(gimage, gx.reshape(n, c, h * w))


def load_gradient(gy, tile, dtype):
    """What ``gy (n, channels, P)`` has for a tile, (channels, R)."""
    # (channels, m, p) from (m, channels, p)
    part = gy[tile[0], :, tile[1]].swapaxes(0, 1)
    return cupy.ascontiguousarray(part, dtype).reshape(len(part), -1)


def load_columns(gy, channels, dtypes):
    """Output gradients (R, c) as gradients of columns (R, 1, c)."""
    # A copy in any case, as the kernels' vectors have to be aligned.
    return gy[:, channels].astype(_wide(dtypes[0]), 'C')[:, None]


def _swap(source, target) -> None:
    """``target[i, c, r] = source[i, r, c]``, in another dtype, too."""
    n, rows, cols = source.shape
    # A thread reads and writes 16 bytes at a time, where the arrays are aligned to it.
    tile_rows, tile_cols = _vector(rows, target), _vector(cols, source)
    blocks = -(-rows // (4 * tile_rows)), -(-cols // (8 * tile_cols))
    threads = n * blocks[0] * blocks[1] * 32
    sizes = rows, cols, *blocks
    kernel = swap_kernel(tile_rows, tile_cols)
    kernel(source.reshape(-1), *sizes, target.reshape(-1), size=threads)


def _vector(length: int, array) -> int:
    """How many elements of rows of this length are in one access."""
    return math.gcd(length, 16 // array.itemsize, _pointer(array) // array.itemsize)


class Sampler:
    """Samples images at the points of a tile, and differentiates the samples.

    Columns are (G, R, K * iCg) in the groups of a convolution, (1, R, K * c) if it is
    depthwise, and (R, 1, c) where the samples of an output position are added up.

    Args:
        points: Where the points are.
        size: Number, height and width of the images.
        dtypes: What :func:`dtypes` returns.
        arguments: Arrays of coordinates and of factors.
        tangents: How these move, or None where they do not.
        gradients: Arrays that the kernels write to, or None.
        parts: One.

    """

    def __init__(
        self, points, size, dtypes, arguments,
        tangents=(None, None), gradients=(None, None), parts=1,
    ) -> None:  # fmt: skip
        self.points = points
        self.dtype, self.real = dtypes
        self.constants: dict = {}
        self.scalars: dict = {}
        pads = 0, 0
        if points.summed:
            self.groups, self.images, self.tile = 1, size[0], points.tile
        else:  # a tile has some of the images
            self.groups, self.images = points.geometry.groups, points.images
            self.constants, self.scalars, pads = _grid(points)
            self.tile = points.tile[0]
        if max(size) >= 2**31:
            raise ValueError(
                f'x has {max(size)} images, rows or columns; '
                'a GPU takes fewer than 2 ** 31'
            )
        self.arguments = self._of_tile(('offsets', 'factors'), arguments)
        self.tangents = self._of_tile(('offsets_dot', 'factors_dot'), tangents)
        self.gradients = self._of_tile(('goffsets', 'gfactors'), gradients)
        if points.summed:
            self.arguments['indices'] = points.indices[self.tile]
        self.taps = points.R * points.groups * points.K
        _, self.h, self.w = size
        self.scalars.update(images=self.images, rows=points.R, h=self.h, w=self.w)
        cells = self.images * points.groups * (self.h + 1) * (self.w + 1)
        self.wide = cells >= NARROW
        for name, pad, side in zip(('y', 'x'), pads, size[1:]):
            limit = _limit(side + pad, side, self.real)
            self.scalars[f'limit_{name}'] = limit
            # No place of the grid, and no point, is further from 0.
            self.wide = self.wide or 2 * (limit + pad) >= NARROW
        self.scalars['tap_bits'] = max(0, self.taps - 1).bit_length()

    def sample(self, image, channels):
        """The columns."""
        return self._sample({'image': image}, channels.stop)

    def sample_dot(self, image, image_dot, channels):
        """How fast the columns change; ``image_dot`` is None if the image does not."""
        images = {'image': image, 'image_dot': image_dot}
        return self._sample(images, channels.stop, dot=True)

    def differentiate(self, image, gcolumns, gimage, channels, part, columns=False):
        """Adds to ``gimage``, and writes the other gradients.

        ``gimage`` may be None. Returns the columns, if they are asked for; where the
        dtype is the same, they are written over their gradients.
        """
        c, target = channels.stop, None
        if columns:
            same = gcolumns.dtype == self.dtype
            target = gcolumns if same else self._new_columns(c)
        arrays = {'image': image, 'gcolumns': gcolumns}
        self._differentiate(arrays, gimage, target, c)
        return target

    def differentiate_dot(
        self, image, image_dot, gcolumns, gcolumns_dot, gimage_dot, channels, part
    ) -> None:
        """Writes how fast that changes; None stands for what is not there or still."""
        if image_dot is None and not self.tangents:
            gcolumns = None  # the columns are still
        if gcolumns_dot is None and not self.tangents:
            gimage_dot = None  # the sum is linear in the image
        if gcolumns is None and gcolumns_dot is None:
            for gradient in self.gradients.values():
                gradient[...] = 0
            return
        arrays = {'image': image, 'image_dot': image_dot}
        arrays.update(gcolumns=gcolumns, gcolumns_dot=gcolumns_dot)
        self._differentiate(arrays, gimage_dot, None, channels.stop, dot=True)

    def write_gradients(self) -> None:
        """Does nothing: the kernels have written them."""

    def _of_tile(self, names, arrays) -> dict:
        """What arrays have for the tile, by name; contiguous ones as views."""
        return {
            name: cupy.ascontiguousarray(array[self.tile])
            for name, array in zip(names, arrays)
            if array is not None
        }

    def _new_columns(self, c: int):
        if self.points.summed:
            return cupy.empty((self.points.R, 1, c), self.dtype)
        groups = self._column_groups(c)
        depth = self.points.K * c // groups
        return cupy.empty((groups, self.points.R, depth), self.dtype)

    def _sample(self, images: dict, c: int, dot=False):
        columns = self._new_columns(c)
        name, taps = 'sample', self.taps
        if self.points.summed:
            name, taps = 'sample_sum', self.points.R * self.points.groups
        threads = taps * self._shared(c)[1]
        inputs = {**images, **self._points(dot)}
        self._launch(name, threads, c, inputs, {'columns': columns}, dot)
        return columns

    def _differentiate(self, arrays: dict, gimage, columns, c: int, dot=False) -> None:
        outputs = {**self.gradients, 'columns': columns}
        if gimage is not None and chainer.config.cudnn_deterministic:
            self._gather(arrays, gimage, c, dot)
        elif gimage is not None:
            chainer.utils.nondeterministic('atomicAdd')
            outputs['gimage'] = gimage
        if any(array is not None for array in outputs.values()):
            threads = self.taps * self._shared(c)[1]
            inputs = {**arrays, **self._points(dot)}
            self._launch('differentiate', threads, c, inputs, outputs, dot)

    def _gather(self, arrays: dict, gimage, c: int, dot: bool) -> None:
        """Adds to ``gimage`` in an order that is the same in every run.

        The taps are sorted by the cell of the pixel grid that their point lies in; each
        pixel then sums over the taps of its four cells.
        """
        cells = self.images * self.points.groups * (self.h + 1) * (self.w + 1)
        keys = cupy.empty(self.taps, numpy.int64)
        weights = {'weights': cupy.empty((self.taps, 4), self.real)}
        if dot and self.tangents:
            weights['weights_dot'] = cupy.empty((self.taps, 4), self.real)
        outputs = {'keys': keys, **weights}
        self._launch('sort_key', self.taps, c, self._points(dot), outputs, dot)
        keys = cupy.sort(keys)
        starts = cupy.empty(cells + 1, numpy.int32)
        self._launch('start', cells + 1, c, {'keys': keys}, {'starts': starts})
        inputs = {name: arrays.get(name) for name in ('gcolumns', 'gcolumns_dot')}
        inputs.update(keys=keys, starts=starts, **weights)
        threads = self.images * self.h * self.w * (c // self._shared(c)[0])
        self._launch('gather', threads, c, inputs, {'gimage': gimage}, dot)

    def _column_groups(self, c: int) -> int:
        """The groups that columns lie by: one where each has one channel only."""
        return 1 if c == self.groups else self.groups

    def _shared(self, c: int) -> tuple[int, int]:
        groups = self._column_groups(c), self.points.groups
        return _shared(*groups, c, self.dtype.itemsize, MOST_LANES)

    def _points(self, dot: bool) -> dict:
        """The arrays that say where the points are, and how they move."""
        return {**self.arguments, **self.tangents} if dot else self.arguments

    def _present(self, arrays: dict) -> dict:
        """Those arrays that are not None; of images the tile's."""
        images = {} if self.points.summed else ('image', 'image_dot', 'gimage')
        return {
            name: array[self.tile] if name in images else array
            for name, array in arrays.items()
            if array is not None
        }

    def _launch(self, name, threads: int, c: int, inputs, outputs, dot=False) -> None:
        """Runs a kernel over arrays, by name, that may be None, and numbers."""
        inputs, outputs = self._present(inputs), self._present(outputs)
        vector, lanes = self._shared(c)
        held = min(HELD_CHANNELS, c // self.points.groups // lanes) // vector
        constants = {
            **self.constants,
            'VEC': vector,
            'LANES': lanes,
            # More would take too many registers along tangents.
            'HELD': 1 if dot else max(1, held),
            'C': c,
            'GROUPS': self._column_groups(c),
            'OG': self.points.groups,
            'K': self.points.K,
            'CLAMP': int(self.points.clamp),
            'SUMMED': int(self.points.summed),
            'DOT': int(dot),
            'DOUBLE': int(self.real == numpy.float64),
            'WIDE': int(self.wide),
        }
        _launch(name, threads, inputs, outputs, self.scalars, constants)


def _launch(name, threads: int, inputs, outputs, scalars, constants) -> None:
    """Runs a kernel over arrays and numbers, by name."""
    names = tuple(inputs), tuple(scalars), tuple(outputs)
    kernel, scalar_names = sampler_kernel(name, *names, tuple(constants.items()))
    arrays = [array.reshape(-1) for array in (*inputs.values(), *outputs.values())]
    numbers = [scalars[name] for name in scalar_names]
    kernel(*arrays[: len(inputs)], *numbers, *arrays[len(inputs) :], size=threads)


@functools.lru_cache(1000)
def _limit(largest_grid: int, size: int, dtype) -> float:
    return float(point_limit(largest_grid, size, dtype))


@functools.cache
def _shared(
    groups: int, points_groups: int, c: int, itemsize: int, most_lanes: int
) -> tuple[int, int]:
    """Channels that are read in one access, and threads that share a point.

    The latter are a power of two; each has at least two vectors of the point's
    channels, where there are as many.
    """
    channels = math.gcd(c // groups, c // points_groups)
    vector = math.gcd(channels, 16 // itemsize)
    most = max(1, min(most_lanes, c // points_groups // vector // 2))
    return vector, 1 << most.bit_length() - 1


def _grid(points) -> tuple[dict, dict, tuple[int, int]]:
    """What kernels have to know of a grid: constants, scalars, how far it reaches."""
    geometry, (out_h, out_w) = points.geometry, points.out_size
    if out_h * out_w >= 2**31:
        raise ValueError(
            f'offset has {out_h * out_w} output positions; '
            'a GPU takes fewer than 2 ** 31'
        )
    options = 'kw', 'sy', 'sx', 'ph', 'pw', 'dy', 'dx'
    constants = {name.upper(): getattr(geometry, name) for name in options}
    scalars = dict(
        first_position=points.tile[1].start,
        positions=points.positions,
        out_w=out_w,
        out_size=out_h * out_w,
    )
    # The grid reaches no further than the padding.
    return constants, scalars, (geometry.ph, geometry.pw)


class Filter:
    """A filter, for its products with columns.

    Args:
        W: Array (out_c, c / groups, kh, kw).
        groups: Number of groups.
        dtype: That of the products.
        threads: One.

    """

    def __init__(self, W, groups: int, dtype, threads: int) -> None:
        self.depthwise = _Depthwise.of(W, groups, dtype)
        self.filters: Any = None if self.depthwise else _by_group(W, groups, dtype)

    def multiply(self, columns, y, add: bool) -> None:
        """``y (m, out_c, p) = filter @ columns``, or ``+=``."""
        m, out_c, p = y.shape
        groups = len(self.filters)
        y = y.reshape(m, groups, out_c // groups, p)
        # (G, m, K * iCg, p)
        columns = columns.reshape(groups, m, p, -1).swapaxes(2, 3)
        if groups <= m:
            for g in range(groups):
                # (m, oCg, p) = (oCg, K * iCg) @ (m, K * iCg, p)
                _matmul(self.filters[g : g + 1], columns[g], y[:, g], add)
        else:
            for i in range(m):
                # (G, oCg, p) = (G, oCg, K * iCg) @ (G, K * iCg, p)
                _matmul(self.filters, columns[:, i], y[i], add)


def convolve(terms, b, y) -> None:
    """Writes bias plus filters times columns, for all terms, to ``y (m, out_c, p)``.

    In half precision only the result is rounded, so that nothing else overflows.
    """
    if not terms:
        y[...] = 0 if b is None else b[:, None]
        return
    if terms[0][0].depthwise:
        _convolve_depthwise(terms, b, y)
        return
    m, out_c, p = y.shape
    dtype = terms[0][1].dtype
    rounded_once = len(terms) == 1 and (
        b is None or numpy.promote_types(b.dtype, y.dtype) == y.dtype
    )
    if m > 1 and p < FEW_POSITIONS:
        target = cupy.empty((1, out_c, m * p), _wide(dtype))
    elif y.dtype == _wide(dtype) or (y.dtype == dtype and rounded_once):
        target = y
    else:
        target = cupy.empty(y.shape, _wide(dtype))
    if b is not None:
        target[...] = b[:, None]
    for number, (filters, columns) in enumerate(terms):
        filters.multiply(columns, target, add=b is not None or number > 0)
    if len(target) != m:
        target = target.reshape(out_c, m, p).swapaxes(0, 1)
    if target is not y:
        y[...] = target


def _convolve_depthwise(terms, b, y) -> None:
    """The same for filters that have one channel a group."""
    m, out_c, p = y.shape
    depthwise = terms[0][0].depthwise
    c = depthwise.c
    sums = cupy.empty((depthwise.multiplier, m, p, c), _wide(terms[0][1].dtype))
    if b is not None:
        # (multiplier, 1, 1, c)
        sums[...] = b.reshape(c, -1).swapaxes(0, 1)[:, None, None]
    for number, (filters, columns) in enumerate(terms):
        filters.depthwise.multiply(columns, sums, add=b is not None or number > 0)
    sums = sums.reshape(-1, p, c)
    if depthwise.multiplier == 1 and y.flags.c_contiguous:
        _swap(sums, y)
        return
    swapped = cupy.empty((len(sums), c, p), y.dtype)
    _swap(sums, swapped)
    # (multiplier, m, c, p) -> (m, c, multiplier, p)
    swapped = swapped.reshape(-1, m, c, p).transpose(1, 2, 0, 3)
    y[...] = swapped.reshape(y.shape)


class _Depthwise:
    """A filter that has one channel a group, for its products with columns.

    Its vectors are of all channels, and its columns (R, K, c).

    Args:
        W: Array (c * multiplier, 1, kh, kw).
        c: The channels.
        dtype: That of the products.

    """

    #: Sums of a filter's gradient that threads share, and rows of each at least.
    SUMS, ROWS = 1 << 19, 64

    @classmethod
    def of(cls, W, groups: int, dtype):
        """None for a filter that has more channels, or one group."""
        return cls(W, groups, dtype) if groups > 1 and W.shape[1] == 1 else None

    def __init__(self, W, c: int, dtype) -> None:
        self.c, self.multiplier, self.dtype = c, len(W) // c, dtype
        # (c, multiplier, K) -> (multiplier, K, c)
        filters = W.reshape(c, self.multiplier, -1).transpose(1, 2, 0)
        self.filters = cupy.ascontiguousarray(filters, dtype)
        self.vector = math.gcd(c, 16 // dtype.itemsize)

    def multiply(self, columns, sums, add: bool) -> None:
        """``sums (multiplier, m, p, c) = filter * columns``, or ``+=``."""
        rows = columns.shape[1]
        inputs = {'columns': columns, 'filters': self.filters}
        threads = rows * self.c // self.vector
        self._launch('depthwise', threads, inputs, {'sums': sums}, {'rows': rows}, add)

    def gcolumns(self, gy):
        """The gradient of the columns, of that of outputs (c * multiplier, R)."""
        gy = self._channels_last(gy)
        rows, depth = gy.shape[1], self.filters.shape[1] * self.c
        gcolumns = cupy.empty((1, rows, depth), _wide(self.dtype))
        inputs, outputs = {'gy': gy, 'filters': self.filters}, {'gcolumns': gcolumns}
        threads = gcolumns.size // self.vector
        self._launch('depthwise_gcolumns', threads, inputs, outputs, {'rows': rows})
        return gcolumns

    def gradient(self, gy, columns):
        """The filter's gradient (multiplier, K, c)."""
        gy = self._channels_last(gy)
        rows = gy.shape[1]
        shares = max(1, min(self.SUMS // self.filters.size, rows // self.ROWS))
        gfilters = cupy.empty((shares, *self.filters.shape), _wide(self.dtype))
        inputs, outputs = {'gy': gy, 'columns': columns}, {'gfilters': gfilters}
        threads = gfilters.size // self.vector
        scalars = {'rows': rows, 'shares': shares}
        self._launch('depthwise_gfilters', threads, inputs, outputs, scalars)
        return gfilters.sum(0)

    def _channels_last(self, gy):
        """(c * multiplier, R) -> (multiplier, R, c)."""
        gy = cupy.ascontiguousarray(
            gy.reshape(self.c, self.multiplier, -1).swapaxes(0, 1)
        )
        swapped = cupy.empty((self.multiplier, gy.shape[2], self.c), gy.dtype)
        _swap(gy, swapped)
        return swapped

    def _launch(self, name, threads, inputs, outputs, scalars, add=False) -> None:
        constants = {
            'VEC': self.vector,
            'C': self.c,
            'K': self.filters.shape[1],
            'MULTIPLIER': self.multiplier,
            'ADD': int(add),
            'GROUPS': 1,
            'OG': 1,
            'CLAMP': 0,
            'SUMMED': 0,
            'DOUBLE': int(self.dtype == numpy.float64),
            'WIDE': 0,
        }
        _launch(name, threads, inputs, outputs, scalars, constants)


class TransposedFilter:
    """A filter, for the gradients of its columns and of itself.

    Args:
        W: Array (out_c, c / groups, kh, kw).
        groups: Number of groups.
        dtype: That of the products.

    """

    def __init__(self, W, groups: int, dtype) -> None:
        self.depthwise = _Depthwise.of(W, groups, dtype)
        self.filters: Any = None if self.depthwise else _by_group(W, groups, dtype)
        self.dtype = _wide(dtype)
        self.gradient = None

    def gcolumns(self, gy):
        """The gradient of the columns, of that of outputs (out_c, R)."""
        if self.depthwise:
            return self.depthwise.gcolumns(gy)
        groups, _, depth = self.filters.shape
        gcolumns = cupy.empty((groups, gy.shape[1], depth), self.dtype)
        # (G, R, K * iCg) = (G, R, oCg) @ (G, oCg, K * iCg)
        _matmul(self._by_group(gy).swapaxes(1, 2), self.filters, gcolumns)
        return gcolumns

    def add_gradient(self, gy, columns) -> None:
        """Adds to the filter's gradient what outputs and columns make of it."""
        add = self.gradient is not None
        if self.depthwise:
            gradient = self.depthwise.gradient(gy, columns)
            self.gradient = self.gradient + gradient if add else gradient
            return
        if not add:
            self.gradient = cupy.empty(self.filters.shape, self.dtype)
        # (G, oCg, K * iCg) = (G, oCg, R) @ (G, R, K * iCg)
        _matmul(self._by_group(gy), columns, self.gradient, add)

    def write_gradient(self, gW) -> None:
        """Writes the filter's gradient to ``gW (out_c, c / groups, kh, kw)``."""
        if self.gradient is None:
            gW[...] = 0
            return
        if self.depthwise:
            # (multiplier, K, c) -> (c, multiplier, K)
            gradient = self.gradient.transpose(2, 0, 1)
            gW.reshape(gradient.shape)[...] = gradient
            return
        groups, out_c, _ = self.filters.shape
        in_c, kh, kw = gW.shape[1:]
        # (G, oCg, K, iCg) -> (G, oCg, iCg, K)
        gradient = self.gradient.reshape(groups, out_c, kh * kw, in_c).swapaxes(2, 3)
        gW.reshape(gradient.shape)[...] = gradient

    def _by_group(self, gy):
        """(out_c, R) -> (G, oCg, R)."""
        groups, out_c, _ = self.filters.shape
        return gy.reshape(groups, out_c, -1)


def _by_group(W, groups: int, dtype):
    """(out_c, iCg, kh, kw) -> (G, oCg, K * iCg)."""
    out_c, in_c, kh, kw = W.shape
    filters = W.reshape(groups, out_c // groups, in_c, kh * kw).swapaxes(2, 3)
    filters = cupy.ascontiguousarray(filters, dtype)
    return filters.reshape(groups, out_c // groups, kh * kw * in_c)


@functools.cache
def _wide(dtype):
    """The dtype of what is summed up, for factors of ``dtype``."""
    return numpy.promote_types(dtype, numpy.float32)


def _matmul(a, b, out, add=False) -> None:
    """``out[i] = a[i] @ b[i]``, or ``+=``, for each i; ``a`` may have just one matrix.

    All are views in which one of the last two axes is contiguous, in ``out`` the last.
    cupy.matmul would copy such views, and rounds float16 otherwise.
    """
    batch, rows, cols = out.shape
    # cuBLAS counts by columns: it computes the transpose of the product.
    b_transposed, *b = _matrices(b)
    a_transposed, *a_numbers = _matrices(a)
    _, *out = _matrices(out)
    zero, one, _ = _zero_and_one(_wide(a.dtype))
    cupy.cuda.cublas.gemmStridedBatchedEx(
        cupy.cuda.device.get_cublas_handle(),
        *(b_transposed, a_transposed, cols, rows, a.shape[2], one),
        *(*b, *a_numbers, one if add else zero, *out),
        *(batch, _compute_type(a.dtype), -1),
    )


@functools.cache
def _zero_and_one(dtype) -> tuple:
    """Where these numbers are on the host, and what keeps them there."""
    numbers = numpy.array([0, 1], dtype)
    return numbers.ctypes.data, numbers.ctypes.data + numbers.itemsize, numbers


def _matrices(array) -> tuple[int, int, int, int, int]:
    """Row-major matrices (batch, rows, cols) for cuBLAS.

    Whether it has to transpose them; then their pointer, type, leading dimension and
    the step from one to the next, which is 0 where there is one.
    """
    batch, rows, cols = array.shape
    step, row, col = [stride // array.itemsize for stride in array.strides]
    if (col == 1 or cols == 1) and (row >= cols or rows == 1):
        transposed, leading = 0, max(row if rows > 1 else 0, cols)
    else:
        transposed, leading = 1, max(col if cols > 1 else 0, rows)
    step = step if batch > 1 else 0
    return transposed, _pointer(array), _CUDA_TYPES[array.dtype.char], leading, step


# Numbers of cudaDataType and cublasComputeType_t.
_CUDA_TYPES = {'e': 2, 'f': 0, 'd': 1}
_COMPUTE_FLOAT32, _COMPUTE_FLOAT64, _COMPUTE_TF32 = 68, 70, 77


def _compute_type(dtype) -> int:
    """What sums and, for float32, factors are rounded to: TF32 where both allow it.

    CuPy does by the environment variable ``CUPY_TF32``, Chainer does not where its
    configuration says ``use_cudnn_tensor_core = 'never'``.
    """
    if dtype == numpy.float64:
        return _COMPUTE_FLOAT64
    allowed = chainer.config.use_cudnn_tensor_core != 'never'
    if dtype == numpy.float32 and allowed and _cupy_uses_tf32():
        return _COMPUTE_TF32
    return _COMPUTE_FLOAT32


def _cupy_uses_tf32() -> bool:
    from cupy._core import _routines_linalg as linalg

    return linalg.get_compute_type(numpy.float32) == linalg.COMPUTE_TYPE_TF32


def _pointer(array) -> int:
    return array.data.ptr
