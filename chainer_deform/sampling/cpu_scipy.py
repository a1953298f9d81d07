"""The loops of the CPU in NumPy and SciPy, where Numba cannot be used.

Twin of :mod:`chainer_deform.sampling.cpu_numba`, which says what the arrays are; here
``columns`` always have all channels. Sampling is a sparse matrix with four numbers in
each row: a row is a point, a column a pixel of the image.
"""

from __future__ import annotations

import itertools

import numpy
from scipy import sparse

from chainer_deform.sampling import rule

#: Bytes that the columns of a tile may take. A sparse matrix is costly to set up.
TILE_BYTES = 8 << 20


def thread_count() -> int:
    """One: SciPy lets no other thread run. NumPy's products have their own."""
    return 1


def locate(
    images, grid, offsets, size, limits, clamp,
    pixels, weights, row_weights, col_weights, slopes,
):  # fmt: skip
    """Finds the corners of the points, and their weights."""
    corners = []
    for i, (axis_weights, position, tap) in enumerate(
        zip((row_weights, col_weights), grid[:2], grid[2:])
    ):
        index, after, before_counts, next_counts, slopes[i] = rule.axis(
            tap[:, None] + position, offsets[i], size[i], limits[i], clamp
        )
        axis_weights[0] = numpy.where(before_counts, 1 - after, 0)
        axis_weights[1] = numpy.where(next_counts, after, 0)
        corners.append(((index, before_counts), (index + 1, next_counts)))
    h, w = size
    for corner, ((row, row_counts), (col, col_counts)) in enumerate(
        itertools.product(*corners)
    ):
        inside = row_counts & col_counts
        pixels[corner] = numpy.where(inside, 1 + (images * h + row) * w + col, 0)
    nan = numpy.isnan(offsets[0]) | numpy.isnan(offsets[1])
    row_weights[:, nan] = col_weights[:, nan] = numpy.nan
    slopes &= (pixels != 0).any(axis=0)
    slopes |= nan
    weights.reshape(2, 2, *nan.shape)[...] = row_weights[:, None] * col_weights


def gradients(products, row_weights, col_weights, slopes, factors, results):
    """Writes the gradients of rows, columns and factors, (3, groups, K, R)."""
    products = products.sum(axis=0)
    value, along_y, along_x, _ = rule.sample(products, row_weights, col_weights)
    results[0] = numpy.where(slopes[0], factors * along_y, 0)
    results[1] = numpy.where(slopes[1], factors * along_x, 0)
    results[2] = value


def sample(image, pixels, weights, scale, first, columns, add):
    """``columns = scale * sum of weights * image[pixels]``, or ``+=``."""
    for some, some_weights, factors in _steps(columns, pixels, weights, scale):
        rows = _pixel_rows(image, some)
        samples = _matrix(len(rows), some, some_weights) @ rows
        samples *= _by_point(factors)[:, None]
        # (points, c / groups) -> (R, K, c), of which columns may have the sum
        samples = samples.reshape(len(columns), -1, columns.shape[2])
        if columns.shape[1] < samples.shape[1]:
            samples = samples.sum(axis=1, keepdims=True)
        if add:
            columns += samples
        else:
            columns[...] = samples


def scatter(gimage, pixels, weights, scale, first, gcolumns):
    """``gimage[pixels - 1] += scale * weights * gcolumns``; it has no row of zeros."""
    for some, some_weights, factors in _steps(gcolumns, pixels, weights, scale):
        rows, outside = _pixel_rows(gimage, some), some.shape[1]
        matrix = _matrix(outside + len(rows), some, some_weights)
        scaled = _gradient_rows(gcolumns, some) * _by_point(factors)[:, None]
        inside = matrix.indices[matrix.indices >= outside]
        if not inside.size:
            continue
        # Only those rows are looked at that are read, or that lie between them.
        low, high = inside.min(), inside.max() + 1
        if high - low <= matrix.nnz:
            matrix.indices = numpy.maximum(matrix.indices - (low - outside), 0)
            matrix.resize(len(scaled), outside + high - low)
            rows[low - outside : high - outside] += (matrix.T @ scaled)[outside:]
        else:
            read, matrix.indices = numpy.unique(matrix.indices, return_inverse=True)
            matrix.resize(len(scaled), len(read))
            first_inside = numpy.searchsorted(read, outside)
            read = read[first_inside:] - outside
            rows[read] += (matrix.T @ scaled)[first_inside:]


def dot(image, pixels, first, gcolumns, products):
    """``products +=`` over channels, column gradient times each corner pixel.

    For a corner outside it is 0, also where the gradient is infinite.
    """
    for some, some_products in _steps(gcolumns, pixels, products):
        rows, gradients = _pixel_rows(image, some), _gradient_rows(gcolumns, some)
        for corner, sums in zip(some, some_products):
            values = numpy.einsum('rc,rc->r', gradients, rows[_row_numbers(corner)])
            values[_by_point(corner) == 0] = 0
            # (R, K, groups) -> (groups, K, R)
            sums += values.reshape(sums.shape[::-1]).transpose()


def _steps(columns, *arrays):
    """Arrays (..., K, R), for as many points at a time as columns may have memory."""
    K = arrays[0].shape[-2]
    step = K if columns.shape[1] == K else max(1, TILE_BYTES // columns.nbytes)
    for k in range(0, K, step):
        yield tuple(array[..., k : k + step, :] for array in arrays)


class Packed:
    """Matrices (batch, depth, width), of which one panel has all columns."""

    def __init__(self, batch: int, depth: int, width: int, dtype) -> None:
        self.panels = range(1)
        self.numbers = numpy.empty((batch, depth, width), dtype)


def pack_columns(filters, packed: Packed, panel: int) -> None:
    """Writes the matrices (K * in_c, out_c) of filters (G, out_c, in_c, K)."""
    groups, out_c, in_c, K = filters.shape
    numbers = packed.numbers.reshape(groups, K, in_c, out_c)
    # A few at a time: they are far apart, and cached lines are used up so.
    for first in range(0, out_c, 16):
        some = filters[:, first : first + 16]
        numbers[..., first : first + 16] = some.transpose(0, 3, 2, 1)


def multiply(a, packed: Packed, out) -> None:
    """``out[i] += a[i] @ matrices[i]``."""
    out += a @ packed.numbers


def add_product(a, b, out) -> None:
    """``out[i] += a[i] @ b[i]``."""
    out += a @ b


def multiply_lanes(a, b, out, transposed) -> None:
    """``out[i, j, g] += sum over k of a[i, k, g] * b[k, j, g]``; or a[k, i, g]."""
    out += numpy.einsum('kig,kjg->ijg' if transposed else 'ikg,kjg->ijg', a, b)


def swap(source, target) -> None:
    """``target[i, c, r] = source[i, r, c]``."""
    target[...] = source.swapaxes(1, 2)


def _matrix(width: int, pixels, weights):
    """The sparse matrix (points, width = pixels * groups)."""
    rows = numpy.stack([_row_numbers(corner) for corner in pixels], -1)
    weights = numpy.stack([_by_point(corner) for corner in weights], -1)
    ends = numpy.arange(0, rows.size + 1, 4, dtype=rows.dtype)
    return sparse.csr_array(
        (weights.reshape(-1), rows.reshape(-1), ends),
        shape=(len(rows), width),
    )


def _row_numbers(pixels):
    """The rows of :func:`_pixel_rows` that points read at one corner."""
    groups = len(pixels)
    numbers = pixels * groups + numpy.arange(groups, dtype=pixels.dtype)[:, None, None]
    return _by_point(numbers)


def _pixel_rows(image, pixels):
    """(pixels, c) -> (pixels * groups, c / groups)."""
    groups = pixels.shape[1]
    return image.reshape(len(image) * groups, -1)


def _gradient_rows(gcolumns, pixels):
    """(R, K or 1, c) -> (points, c / groups)."""
    _, groups, K, R = pixels.shape
    gcolumns = numpy.broadcast_to(gcolumns, (R, K, gcolumns.shape[2]))
    return gcolumns.reshape(R * K * groups, -1)


def _by_point(array):
    """(groups, K, R) -> (points,), in the order of the columns."""
    return array.transpose().reshape(-1)
