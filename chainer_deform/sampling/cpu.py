"""The CPU backend: the loops of Numba or SciPy over tiles that stay in the cache.

Twin of :mod:`chainer_deform.sampling.cuda`: the same names with the same meaning, which
:mod:`~chainer_deform.sampling.convolution` and
:mod:`~chainer_deform.sampling.weighted_sum` are written with.
"""

from __future__ import annotations

import functools

import numpy

from chainer_deform.sampling import compiler
from chainer_deform.sampling.points import Corners
from chainer_deform.sampling.threads import each

empty = numpy.empty

#: Bytes of the images that are copied at a time, if they are smaller than this.
BATCH_BYTES = 4 << 20

#: Bytes that may be known of points, and bytes of columns, by all threads together.
POINT_BYTES = 8 << 20
COLUMN_BYTES = 16 << 20

#: Multiply-adds that are worth a thread of their own.
THREAD_WORK = 1 << 24


def loops():
    """The module of the loops, of Numba or of SciPy."""
    _keep_freed_memory()
    return compiler.loops()


@functools.cache
def _keep_freed_memory() -> None:
    """Has the GNU C library recycle arrays of up to 31 MiB.

    Freeing one block of 31 MiB raises its mmap threshold. Below it, freed memory is not
    given back to the system, which would fill the next array with zeros page by page:
    up to half of the time.
    """
    numpy.empty(31 << 20, numpy.uint8)


def dtypes(x, W, *others):
    """The dtype of images and products, and that of coordinates and sums: the same."""
    arrays = (x, W, *others)
    real = numpy.result_type(
        numpy.float32, *(array.dtype for array in arrays if array is not None)
    )
    return real, real


def thread_count(multiply_adds: int) -> int:
    """As many threads as there are and the work is worth."""
    return max(1, min(loops().thread_count(), multiply_adds // THREAD_WORK))


def batch_images(numbers: int, dtypes) -> int:
    """How many images of so many numbers may be copied at a time."""
    return max(1, BATCH_BYTES // (numbers * dtypes[0].itemsize))


def tile_positions(numbers: int, points: int, dtypes, tiles: int, parts: int) -> int:
    """How many output positions a tile may have.

    Args:
        numbers: Numbers of a position, in its columns or its output.
        points: Points of a position.
        dtypes: What :func:`dtypes` returns.
        tiles: How many tiles are worked on at the same time.
        parts: Into how many parts the channels of a tile are cut.

    """
    most_bytes = min(loops().TILE_BYTES, COLUMN_BYTES // max(tiles, parts))
    # Of a point: corners, weights, what they are made of, and products of each part.
    point_bytes = points * (160 + 16 * parts)
    return max(
        1,
        min(
            most_bytes // (numbers * dtypes[0].itemsize),
            POINT_BYTES // tiles // point_bytes,
        ),
    )


def new_image(x, dtype):
    """Memory for images (n, c, h, w): a row of zeros, then a row for each pixel."""
    n, c, h, w = x.shape
    image = numpy.empty((1 + n * h * w, c), dtype)
    image[0] = 0
    return image


def load_image(x, image, channels) -> None:
    """Copies channels of the images ``x (n, c, h, w)`` to ``image``."""
    n, c, h, w = x.shape
    target = image[1:].reshape(n, h * w, c)[:, :, channels]
    if x.flags.c_contiguous:
        _swap(x.reshape(n, c, h * w)[:, channels], target)
    else:
        target.reshape(n, h, w, -1).transpose(0, 3, 1, 2)[...] = x[:, channels]


def new_gradient(gx, dtype):
    """Zeros for the gradient of images, a row for each pixel.

    They are the memory of ``gx (n, c, h, w)`` where that has the dtype.
    """
    n, c, h, w = gx.shape
    gimage = gx.reshape(n * h * w, c)
    gimage = gimage if gx.dtype == dtype else numpy.empty(gimage.shape, dtype)
    gimage[...] = 0
    return gimage


def apart(gimage, gx):
    """``gimage``, or a copy of it if it is in the memory of ``gx``."""
    return gimage.copy() if numpy.may_share_memory(gimage, gx) else gimage


def store_gradient(gimage, gx, channels) -> None:
    """Writes channels of the gradient to ``gx (n, c, h, w)``, which is contiguous."""
    n, c, h, w = gx.shape
    source = gimage.reshape(n, h * w, c)[:, :, channels]
    _swap(source, gx.reshape(n, c, h * w)[:, channels])


def load_gradient(gy, tile, dtype):
    """What ``gy (n, channels, P)`` has for a tile, (channels, R)."""
    part = gy[tile[0], :, tile[1]]
    m, channels, p = part.shape
    # A product that sums over far apart numbers is slow: channels lie side by side.
    rows = numpy.empty((m, p, channels), dtype)
    _swap(part, rows)
    return rows.reshape(m * p, channels).T


def load_columns(gy, channels, dtypes):
    """Channels of output gradients (R, c) as gradients of columns (R, 1, channels)."""
    return numpy.ascontiguousarray(gy[:, channels], dtypes[0])[:, None]


def _swap(source, target) -> None:
    """``target[i, c, r] = source[i, r, c]``, in another dtype, too."""
    contiguous = source.strides[2] == target.strides[2] == source.itemsize
    if source.dtype == target.dtype and contiguous:
        loops().swap(source, target)
    else:
        target[...] = source.swapaxes(1, 2)


class Sampler:
    """Samples images at the points of a tile, and differentiates the samples.

    Columns are (R, K, channels), of the given ``channels`` only; where the samples of
    an output position are added up they are (R, 1, channels).

    Args:
        points: Where the points are.
        size: Number, height and width of the images that there are.
        dtypes: What :func:`dtypes` returns.
        arguments: Arrays of coordinates and of factors.
        tangents: How these move, or None where they do not.
        gradients: Arrays that :meth:`write_gradients` writes to, or None.
        parts: Into how many parts the channels are cut.

    """

    def __init__(
        self, points, size, dtypes, arguments,
        tangents=(None, None), gradients=(None, None), parts=1,
    ) -> None:  # fmt: skip
        self.points, self.dtype, self.gradients = points, dtypes[0], gradients
        offsets, factors = arguments
        self.corners = Corners(points, offsets, factors, size, self.dtype, loops())
        self.standing = self.corners.weights, self.corners.factors
        self.tangents = self.moving = None
        if any(array is not None for array in tangents):
            self.tangents = self.corners.tangents(*tangents)
            self.moving = self.corners.weights_dot(self.tangents), self.corners.ones()
        self.products = self.moving_products = None
        if any(array is not None for array in gradients):
            shape = parts, *self.corners.pixels.shape
            self.products = numpy.zeros(shape, self.dtype)
            if self.moving is not None:
                self.moving_products = numpy.zeros(shape, self.dtype)

    def sample(self, image, channels):
        """The columns."""
        columns = self._new_columns(channels)
        self._sample(image, self.standing, channels, columns)
        return columns

    def sample_dot(self, image, image_dot, channels):
        """How fast the columns change; ``image_dot`` is None if the image does not."""
        columns_dot = self._new_columns(channels)
        if image_dot is not None:
            self._sample(image_dot, self.standing, channels, columns_dot)
        if self.moving is not None:
            add = image_dot is not None
            self._sample(image, self.moving, channels, columns_dot, add)
        return columns_dot

    def differentiate(self, image, gcolumns, gimage, channels, part, columns=False):
        """Adds to ``gimage`` and to the gradients what column gradients make of them.

        ``gimage`` may be None. Returns the columns, if they are asked for.
        """
        if gimage is not None:
            self._scatter(gimage, self.standing, channels, gcolumns)
        if self.products is not None:
            self._dot(image, channels, gcolumns, self.products[part])
        return self.sample(image, channels) if columns else None

    def differentiate_dot(
        self, image, image_dot, gcolumns, gcolumns_dot, gimage_dot, channels, part
    ) -> None:
        """Adds how fast that changes; None stands for what is not there or still."""
        if gcolumns_dot is not None:
            self.differentiate(image, gcolumns_dot, gimage_dot, channels, part)
        if image_dot is not None and self.products is not None:
            self._dot(image_dot, channels, gcolumns, self.products[part])
        if self.moving is not None and gimage_dot is not None:
            self._scatter(gimage_dot, self.moving, channels, gcolumns)
        if self.moving is not None and self.moving_products is not None:
            self._dot(image, channels, gcolumns, self.moving_products[part])

    def write_gradients(self) -> None:
        """Writes the gradients of coordinates and factors, or how fast they change."""
        if self.products is None:
            return
        gradients = self.corners.gradients(self.products)
        if self.moving is not None:
            gradients += self.corners.gradients_dot(self.moving_products, self.tangents)
        y, x, factors = gradients
        gcoordinates, gfactors = self.gradients
        if gcoordinates is not None:
            self.points.write_coordinates(gcoordinates, y, x)
        if gfactors is not None:
            self.points.write_factors(gfactors, factors)

    def _new_columns(self, channels):
        K = 1 if self.points.summed else self.points.K
        make = numpy.zeros if self.points.summed else numpy.empty
        return make((self.points.R, K, channels.stop - channels.start), self.dtype)

    def _sample(self, image, weights, channels, columns, add=False) -> None:
        add = add or self.points.summed
        loops().sample(
            image, self.corners.pixels, *weights, channels.start, columns, add
        )

    def _scatter(self, gimage, weights, channels, gcolumns) -> None:
        loops().scatter(gimage, self.corners.pixels, *weights, channels.start, gcolumns)

    def _dot(self, image, channels, gcolumns, products) -> None:
        loops().dot(image, self.corners.pixels, channels.start, gcolumns, products)


class Filter:
    """A filter, packed for its products with columns.

    Matrices lie one behind the other, one for each group; those of a depthwise
    convolution along their last axis.

    Args:
        W: Array (out_c, c / groups, kh, kw).
        groups: Number of groups.
        dtype: That of the products.
        threads: Threads that pack.

    """

    def __init__(self, W, groups: int, dtype, threads: int) -> None:
        self.groups, self.dtype = groups, dtype
        filters, self.depthwise = _by_group(W, groups)
        _, self.out_c, in_c, K = filters.shape
        if self.depthwise:
            # (K, oCg, G)
            self.packed = filters[:, :, 0].transpose(2, 1, 0).astype(dtype, 'C')
            return
        filters = numpy.ascontiguousarray(filters, dtype)
        self.packed = loops().Packed(groups, K * in_c, self.out_c, dtype)
        each(
            lambda panel: loops().pack_columns(filters, self.packed, panel),
            self.packed.panels,
            threads,
        )

    def new_output(self, R: int, b):
        """Outputs (G, R, oCg), depthwise (R, oCg, G), that start as the bias."""
        if b is None:
            b = numpy.zeros(self.groups * self.out_c, self.dtype)
        # (G, 1, oCg)
        b = b.reshape(self.groups, 1, self.out_c)
        b = b.transpose(1, 2, 0) if self.depthwise else b
        shape = (R, *b.shape[1:]) if self.depthwise else (self.groups, R, self.out_c)
        return numpy.broadcast_to(b, shape).astype(self.dtype, 'C')

    def add_product(self, columns, output) -> None:
        """Adds the product of columns (R, K, c) and filter to outputs."""
        if self.depthwise:
            loops().multiply_lanes(columns, self.packed, output, False)
        else:
            loops().multiply(_split(columns, self.groups), self.packed, output)

    def store(self, output, y) -> None:
        """Writes outputs to ``y (m, out_c, p)``."""
        m, _, p = y.shape
        y = y.reshape(m, self.groups, self.out_c, p)
        if self.depthwise:
            y[...] = output.reshape(m, p, self.out_c, -1).transpose(0, 3, 2, 1)
            return
        for g, of_group in enumerate(output.reshape(self.groups, m, p, -1)):
            _swap(of_group, y[:, g])


def convolve(terms, b, y) -> None:
    """Writes the bias plus filters times columns, all terms, to ``y (m, out_c, p)``."""
    if not terms:
        y[...] = 0 if b is None else b[:, None]
        return
    first, _ = terms[0]
    output = first.new_output(y.shape[0] * y.shape[2], b)
    for filters, columns in terms:
        filters.add_product(columns, output)
    first.store(output, y)


class TransposedFilter:
    """A filter, for the gradients of its columns and of itself.

    Args:
        W: Array (out_c, c / groups, kh, kw).
        groups: Number of groups.
        dtype: That of the products.

    """

    def __init__(self, W, groups: int, dtype) -> None:
        self.groups, self.dtype = groups, dtype
        filters, self.depthwise = _by_group(W, groups)
        # (G, oCg, K, iCg), or depthwise (oCg, K, G)
        filters = filters.swapaxes(2, 3)
        if self.depthwise:
            filters = filters[..., 0].transpose(1, 2, 0)
        self.filters = filters.astype(dtype, 'C')
        self.gradient = None

    def gcolumns(self, gy):
        """The gradient of the columns (R, K, c), of that of outputs (out_c, R)."""
        R = gy.shape[1]
        # (G, R, oCg)
        gy = gy.reshape(self.groups, -1, R).swapaxes(1, 2)
        if self.depthwise:
            _, K, c = self.filters.shape
            gcolumns = numpy.zeros((R, K, c), self.dtype)
            gy = numpy.ascontiguousarray(gy.transpose(1, 2, 0))
            loops().multiply_lanes(gy, self.filters, gcolumns, False)
            return gcolumns
        groups, out_c, K, in_c = self.filters.shape
        gcolumns = numpy.zeros((groups, R, K * in_c), self.dtype)
        # (G, R, K * iCg) = (G, R, oCg) @ (G, oCg, K * iCg)
        loops().add_product(gy, self.filters.reshape(groups, out_c, -1), gcolumns)
        # (G, R, K, iCg) -> (R, K, G, iCg)
        gcolumns = gcolumns.reshape(groups, R, K, in_c).transpose(1, 2, 0, 3)
        return gcolumns.reshape(R, K, groups * in_c)

    def add_gradient(self, gy, columns) -> None:
        """Adds to the filter's gradient what outputs and columns make of it."""
        if self.gradient is None:
            self.gradient = self._zeros()
        # (G, oCg, R)
        gy = gy.reshape(self.groups, -1, gy.shape[1])
        if self.depthwise:
            gy = numpy.ascontiguousarray(gy.transpose(2, 1, 0))
            loops().multiply_lanes(columns, gy, self.gradient, True)
        else:
            # (G, oCg, K * iCg) += (G, oCg, R) @ (G, R, K * iCg)
            loops().add_product(gy, _split(columns, self.groups), self.gradient)

    def add_gradient_of(self, other) -> None:
        """Adds the gradient that another copy of the filter has summed up."""
        if self.gradient is None:
            self.gradient = self._zeros()
        if other.gradient is not None:
            self.gradient += other.gradient

    def write_gradient(self, gW) -> None:
        """Writes the filter's gradient to ``gW (out_c, c / groups, kh, kw)``."""
        gradient = self._zeros() if self.gradient is None else self.gradient
        filters, _ = _by_group(gW, self.groups)
        if self.depthwise:
            # (K, oCg, G) -> (G, oCg, 1, K)
            filters[:, :, 0] = gradient.transpose(2, 1, 0)
        else:
            # (G, oCg, K, iCg) -> (G, oCg, iCg, K)
            filters[...] = gradient.reshape(self.filters.shape).swapaxes(2, 3)

    def _zeros(self):
        """Gradients (G, oCg, K * iCg), or depthwise (K, oCg, G)."""
        if self.depthwise:
            out_c, K, groups = self.filters.shape
            return numpy.zeros((K, out_c, groups), self.dtype)
        groups, out_c, K, in_c = self.filters.shape
        return numpy.zeros((groups, out_c, K * in_c), self.dtype)


def _by_group(W, groups: int):
    """A view (G, oCg, iCg, K), and whether the convolution is depthwise."""
    out_c, in_c, kh, kw = W.shape
    filters = W.reshape(groups, out_c // groups, in_c, kh * kw)
    return filters, in_c == 1 < groups


def _split(columns, groups: int):
    """(R, K, c) -> (G, R, K * iCg)."""
    R, K, c = columns.shape
    columns = columns.reshape(R, K, groups, c // groups).transpose(2, 0, 1, 3)
    return columns.reshape(groups, R, -1)
