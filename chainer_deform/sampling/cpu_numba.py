"""The loops of the CPU in Numba: compiled for this CPU, without the GIL.

Twin of :mod:`chainer_deform.sampling.cpu_scipy`, with the same functions. Numba
compiles a function when it is first called, and keeps the result on disk.

Arrays: ``image`` (pixels, c) has a row of zeros first, which stands for corners
outside. ``pixels`` and ``weights`` (4, groups, K, R) say which rows the points read,
and with which weights; ``scale`` (groups, K, R) multiplies each sample. ``columns``
(R, K, channels) have some of the channels, from ``first`` on; where the samples of a
position are added up they are (R, 1, channels).
"""

from __future__ import annotations

import numpy
from numpy import isnan, uintp

from chainer_deform.sampling import rule
from chainer_deform.sampling.compiler import jit
from chainer_deform.sampling.cpu_matmul import (
    Packed,
    add_product,
    multiply,
    multiply_lanes,
    pack_columns,
    swap,
)
from chainer_deform.sampling.threads import thread_count

__all__ = [
    'TILE_BYTES',
    'Packed',
    'add_product',
    'check',
    'dot',
    'gradients',
    'locate',
    'multiply',
    'multiply_lanes',
    'pack_columns',
    'sample',
    'scatter',
    'swap',
    'thread_count',
]

#: Bytes that the columns of a tile may take: they stay in the cache of a core.
TILE_BYTES = 2 << 20

#: Positions that are sampled point by point: what is known of them lies side by side.
_LINE = 8

_axis = jit()(rule.axis)
_sample = jit()(rule.sample)


@jit()
def locate(
    images, grid, offsets, size, limits, clamp,
    pixels, weights, row_weights, col_weights, slopes,
):  # fmt: skip
    """Finds the corners of the points, and their weights.

    Args:
        images: The image of each output position, (R,).
        grid: Rows and columns of the output positions (R,) and of the taps (K,).
        offsets: What is added to rows and columns, each (groups, K, R).
        size: Height and width of the images.
        limits: :func:`~chainer_deform.sampling.rule.point_limit` of both axes.
        clamp: Whether the border is clamped.
        pixels, weights, row_weights, col_weights, slopes: The results;
            :class:`~chainer_deform.sampling.points.Corners` says what they are.

    """
    position_y, position_x, tap_y, tap_x = grid
    offset_y, offset_x = offsets
    (h, w), (limit_y, limit_x) = size, limits
    groups, taps, positions = offset_y.shape
    for o in range(groups):
        for k in range(taps):
            nan = False
            for p in range(positions):
                move_y, move_x = offset_y[o, k, p], offset_x[o, k, p]
                nan |= move_y != move_y or move_x != move_x
                y, below, top, low, y_slope = _axis(
                    position_y[p] + tap_y[k], move_y, h, limit_y, clamp
                )
                x, right_of, left, right, x_slope = _axis(
                    position_x[p] + tap_x[k], move_x, w, limit_x, clamp
                )
                inside = (top or low) and (left or right)
                slopes[0, o, k, p] = y_slope and inside
                slopes[1, o, k, p] = x_slope and inside
                row_weights[0, o, k, p] = 1 - below if top else 0
                row_weights[1, o, k, p] = below if low else 0
                col_weights[0, o, k, p] = 1 - right_of if left else 0
                col_weights[1, o, k, p] = right_of if right else 0
                pixel = 1 + (images[p] * h + y) * w + x
                pixels[0, o, k, p] = pixel if top and left else 0
                pixels[1, o, k, p] = pixel + 1 if top and right else 0
                pixels[2, o, k, p] = pixel + w if low and left else 0
                pixels[3, o, k, p] = pixel + w + 1 if low and right else 0
            for p in range(positions if nan else 0):
                if isnan(offset_y[o, k, p]) or isnan(offset_x[o, k, p]):
                    slopes[:, o, k, p] = True
                    row_weights[:, o, k, p] = numpy.nan
                    col_weights[:, o, k, p] = numpy.nan
            for p in range(positions):
                top_w, low_w = row_weights[0, o, k, p], row_weights[1, o, k, p]
                left_w, right_w = col_weights[0, o, k, p], col_weights[1, o, k, p]
                weights[0, o, k, p], weights[1, o, k, p] = (
                    top_w * left_w,
                    top_w * right_w,
                )
                weights[2, o, k, p], weights[3, o, k, p] = (
                    low_w * left_w,
                    low_w * right_w,
                )


@jit()
def gradients(products, row_weights, col_weights, slopes, factors, results):
    """Writes the gradients of rows, columns and factors, (3, groups, K, R).

    ``products`` (parts, 4, groups, K, R) are over channels, column gradient times each
    corner pixel; :class:`~chainer_deform.sampling.points.Corners` says what the others
    are.
    """
    parts, _, groups, taps, positions = products.shape
    for o in range(groups):
        for k in range(taps):
            for p in range(positions):
                tl, tr = products[0, 0, o, k, p], products[0, 1, o, k, p]
                bl, br = products[0, 2, o, k, p], products[0, 3, o, k, p]
                for part in range(1, parts):
                    tl += products[part, 0, o, k, p]
                    tr += products[part, 1, o, k, p]
                    bl += products[part, 2, o, k, p]
                    br += products[part, 3, o, k, p]
                value, along_y, along_x, _ = _sample(
                    (tl, tr, bl, br),
                    (row_weights[0, o, k, p], row_weights[1, o, k, p]),
                    (col_weights[0, o, k, p], col_weights[1, o, k, p]),
                )
                factor = factors[o, k, p]
                results[0, o, k, p] = factor * along_y if slopes[0, o, k, p] else 0
                results[1, o, k, p] = factor * along_x if slopes[1, o, k, p] else 0
                results[2, o, k, p] = value


@jit()
def _channels_of(group, group_c, first, count):
    """The channels of a group among the ``count`` channels from ``first`` on.

    Returns the first of them in the image and in the columns, and how many they are;
    unsigned, as Numba would look for negative indices in the innermost loops.
    """
    start = max(first, group * group_c)
    stop = max(start, min(first + count, (group + 1) * group_c))
    return uintp(start), uintp(start - first), uintp(stop - start)


@jit('contract')
def sample(image, pixels, weights, scale, first, columns, add):
    """``columns = scale * sum of weights * image[pixels]``, or ``+=``."""
    _, groups, taps, positions = pixels.shape
    group_c = image.shape[1] // groups
    step = 1 if columns.shape[1] == taps else 0
    for block in range(0, positions, _LINE):
        for o in range(groups):
            a, b, count = _channels_of(o, group_c, first, columns.shape[2])
            for k in range(taps if count else 0):
                for p in range(block, min(block + _LINE, positions)):
                    tl, tr = uintp(pixels[0, o, k, p]), uintp(pixels[1, o, k, p])
                    bl, br = uintp(pixels[2, o, k, p]), uintp(pixels[3, o, k, p])
                    tl_w, tr_w = weights[0, o, k, p], weights[1, o, k, p]
                    bl_w, br_w = weights[2, o, k, p], weights[3, o, k, p]
                    factor = scale[o, k, p]
                    if add:
                        for c in range(count):
                            columns[p, k * step, b + c] += factor * (
                                tl_w * image[tl, a + c]
                                + tr_w * image[tr, a + c]
                                + bl_w * image[bl, a + c]
                                + br_w * image[br, a + c]
                            )
                    else:
                        for c in range(count):
                            columns[p, k, b + c] = factor * (
                                tl_w * image[tl, a + c]
                                + tr_w * image[tr, a + c]
                                + bl_w * image[bl, a + c]
                                + br_w * image[br, a + c]
                            )


@jit('contract')
def scatter(gimage, pixels, weights, scale, first, gcolumns):
    """``gimage[pixels - 1] += scale * weights * gcolumns``; it has no row of zeros."""
    _, groups, taps, positions = pixels.shape
    group_c = gimage.shape[1] // groups
    one = uintp(1)
    step = 1 if gcolumns.shape[1] == taps else 0
    for block in range(0, positions, _LINE):
        for o in range(groups):
            a, b, count = _channels_of(o, group_c, first, gcolumns.shape[2])
            for k in range(taps if count else 0):
                for p in range(block, min(block + _LINE, positions)):
                    for corner in range(4):
                        pixel = uintp(pixels[corner, o, k, p])
                        if pixel == 0:
                            continue
                        factor = scale[o, k, p] * weights[corner, o, k, p]
                        for c in range(count):
                            gimage[pixel - one, a + c] += (
                                factor * gcolumns[p, k * step, b + c]
                            )


@jit('contract', 'reassoc')
def dot(image, pixels, first, gcolumns, products):
    """``products +=`` over channels, column gradient times each corner pixel.

    For a corner outside it is 0, also where the gradient is infinite.
    """
    _, groups, taps, positions = pixels.shape
    group_c = image.shape[1] // groups
    step = 1 if gcolumns.shape[1] == taps else 0
    for block in range(0, positions, _LINE):
        for o in range(groups):
            a, b, count = _channels_of(o, group_c, first, gcolumns.shape[2])
            for k in range(taps if count else 0):
                for p in range(block, min(block + _LINE, positions)):
                    tl, tr = uintp(pixels[0, o, k, p]), uintp(pixels[1, o, k, p])
                    bl, br = uintp(pixels[2, o, k, p]), uintp(pixels[3, o, k, p])
                    tl_dot = tr_dot = bl_dot = br_dot = image.dtype.type(0)
                    for c in range(count):
                        g = gcolumns[p, k * step, b + c]
                        tl_dot += g * image[tl, a + c]
                        tr_dot += g * image[tr, a + c]
                        bl_dot += g * image[bl, a + c]
                        br_dot += g * image[br, a + c]
                    products[0, o, k, p] += tl_dot if tl else 0
                    products[1, o, k, p] += tr_dot if tr else 0
                    products[2, o, k, p] += bl_dot if bl else 0
                    products[3, o, k, p] += br_dot if br else 0


def check() -> None:
    """Runs every loop once: what this Numba cannot compile raises its error here."""
    numbers = numpy.zeros((1, 1, 1, 1), numpy.float32)
    offset, columns, image = numbers[0], numbers[0], numbers[0, 0]
    corners = numpy.zeros((4, 1, 1, 1), numpy.float32)
    pixels = numpy.zeros((4, 1, 1, 1), numpy.int32)
    pair, slopes = corners[:2], numpy.zeros((2, 1, 1, 1), bool)
    places = numpy.zeros(1, numpy.int64)
    limits = 2 * (numpy.float32(4),)
    locate(
        places, 4 * (places,), 2 * (offset,), (1, 1), limits, False,
        pixels, corners, pair.copy(), pair.copy(), slopes,
    )  # fmt: skip
    pixels[...] = 0
    gradients(corners[None], pair, pair, slopes, offset, corners[:3])
    sample(image, pixels, corners, offset, 0, columns, False)
    scatter(image, pixels, corners, offset, 0, columns)
    dot(image, pixels, 0, columns, corners)
    packed = Packed(1, 1, 1, numpy.float32)
    pack_columns(numbers, packed, 0)
    multiply(columns, packed, columns.copy())
    multiply_lanes(columns, columns, columns.copy(), False)
