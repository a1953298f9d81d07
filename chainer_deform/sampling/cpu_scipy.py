"""What the CPU path is made of, in NumPy and SciPy: it is always there.

Twin of :mod:`chainer_deform.sampling.cpu_numba`; :mod:`chainer_deform.sampling.cpu`
says what is what. Sampling is a sparse matrix of four entries per row: a row is a tap,
a column one pixel of the image. Its transpose scatters.
"""

from __future__ import annotations

import itertools

import numpy
from scipy import sparse

from chainer_deform.sampling.bilinear import axis, point_limit

#: Bytes that the columns of a tile may take. A sparse matrix is costly to set up.
TILE_BYTES = 8 << 20


def thread_count() -> int:
    """One: SciPy lets no other thread run. NumPy's products have threads of theirs."""
    return 1


def lanes(dtype) -> int:
    """What the rows of a matrix are padded to a multiple of."""
    return 1


def locate(grids, offsets, sizes, pixels, row_weights, col_weights) -> tuple[int, int]:
    """Finds the corners of the points ``grids + offsets``, each of rows and of columns.

    Returns the first and the last row that a point touches; (0, -1) if none does.
    """
    corners = []
    for grid, offset, size, weights in zip(
        grids, offsets, sizes, (row_weights, col_weights)
    ):
        limit = point_limit(grid, size, offset.dtype)
        index, after, before_inside, after_inside = axis(grid, offset, size, limit)
        weights[0] = numpy.where(before_inside, 1 - after, 0)
        weights[1] = numpy.where(after_inside, after, 0)
        corners.append(((index, before_inside), (index + 1, after_inside)))
    h, w = sizes
    first = numpy.arange(pixels.shape[1])[:, None, None, None] * h
    for corner, ((row, row_inside), (col, col_inside)) in enumerate(
        itertools.product(*corners)
    ):
        inside = row_inside & col_inside
        pixels[corner] = numpy.where(inside, 1 + (first + row) * w + col, 0)
    touched = numpy.concatenate([row[inside] for row, inside in corners[0]])
    return (int(touched.min()), int(touched.max())) if touched.size else (0, -1)


def gather(image, pixels, weights, scale, tile, columns, add) -> None:
    """``columns = sum of weights * image[pixels]``, times ``scale``; or ``+=``."""
    samples = _matrix(image, pixels, weights, tile) @ _pixel_rows(image)
    samples *= _by_tap(scale, tile)[:, None]
    samples = samples.reshape(columns.shape)
    if add:
        columns += samples
    else:
        columns[...] = samples


def scatter(gimage, pixels, weights, scale, tile, gcolumns) -> None:
    """``gimage[pixels] += weights * gcolumns``, times ``scale``."""
    scaled = gcolumns.reshape(-1, gimage.shape[2]) * _by_tap(scale, tile)[:, None]
    _pixel_rows(gimage)[...] += _matrix(gimage, pixels, weights, tile).T @ scaled


def dot(image, pixels, tile, gcolumns, products) -> None:
    """``products +=`` the dot products of ``gcolumns`` and ``image[pixels]``.

    Those with the row of zeros are 0, also for infinite ``gcolumns``.
    """
    images, positions = tile
    gcolumns = gcolumns.reshape(-1, image.shape[2])
    for corner in range(4):
        rows = _pixel_index(image, pixels[corner], tile)
        values = numpy.einsum('rc,rc->r', gcolumns, _pixel_rows(image)[rows])
        values[_by_tap(pixels[corner], tile) == 0] = 0
        view = products[corner, images, :, :, positions].transpose(0, 3, 2, 1)
        view += values.reshape(view.shape)


def turn(filters, matrices) -> None:
    """``matrices[k, i, o] = filters[o, i, k]``; what else ``matrices`` has, stays."""
    # A few at a time: they are far apart, and cached lines are used up so.
    for first in range(0, len(filters), 16):
        some = filters[first : first + 16]
        matrices[..., first : first + len(some)] = some.transpose(2, 1, 0)


def matmul(a, b, out, transposed=False) -> None:
    """``out += a @ b``, or with the matrices of ``a`` transposed."""
    out += (a.swapaxes(1, 2) if transposed else a) @ b


def matmul_lanes(a, b, out, transposed=False) -> None:
    """The same for matrices that lie along the last axis, one for each number there."""
    out += numpy.einsum('kig,kjg->ijg' if transposed else 'ikg,kjg->ijg', a, b)


def _matrix(image, pixels, weights, tile):
    """The sparse matrix (taps, pixels * og) of a tile."""
    pixels = numpy.stack([_pixel_index(image, corner, tile) for corner in pixels], -1)
    weights = numpy.stack([_by_tap(corner, tile) for corner in weights], -1)
    ends = numpy.arange(0, pixels.size + 1, 4, dtype=pixels.dtype)
    return sparse.csr_array(
        (weights.reshape(-1), pixels.reshape(-1), ends),
        shape=(len(pixels), image.shape[0] * image.shape[1]),
    )


def _pixel_index(image, pixels, tile):
    """The rows of :func:`_pixel_rows` that the taps of a tile read at one corner."""
    og = image.shape[1]
    groups = numpy.arange(og, dtype=pixels.dtype)
    return (_by_tap(pixels, tile).reshape(-1, og) * og + groups).reshape(-1)


def _pixel_rows(image):
    """(pixels, og, c / og) -> (pixels * og, c / og)."""
    return image.reshape(-1, image.shape[2])


def _by_tap(array, tile):
    """(m, og, K, p) -> (taps of the tile), in the order of the columns."""
    images, positions = tile
    return array[images, :, :, positions].transpose(0, 3, 2, 1).reshape(-1)
