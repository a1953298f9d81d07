"""The bilinear rule along one axis, for arrays and, compiled by Numba, for numbers."""

from __future__ import annotations

import numpy


def axis(grid, offset, size, limit, clamp):
    """The two pixels around the coordinate ``grid + offset``, and how they weigh.

    The pixel before the coordinate weighs ``1 - after``, the next one ``after``.

    With the zero border a coordinate counts in the open interval (-1, size); a pixel
    outside the image counts as 0. With the clamped border it counts in [-1, size],
    and is moved into [0, size - 1] first.

    Args:
        grid: Integer part of the coordinate, exact.
        offset: What is added to it, a float.
        size: Pixels along the axis.
        limit: What :func:`point_limit` returns.
        clamp: Whether the border is clamped.

    Returns:
        Index of the pixel before the coordinate, ``after``, whether that pixel counts,
        whether the next one counts, and whether the sample changes with the coordinate.

    """
    # NaN becomes a coordinate outside, too. No value overflows the integer.
    offset = numpy.fmin(numpy.fmax(offset, -limit), limit)
    # Only the offset is split: a large grid costs no bits of the fraction.
    floor = numpy.floor(offset)
    after = offset - floor
    index = numpy.int64(floor) + grid
    if clamp:
        inside = (index >= -1) & ((index < size) | ((index == size) & (after == 0)))
        slope = (index >= 0) & (index < size - 1)
        after = after * slope
        index = numpy.minimum(numpy.maximum(index, 0), size - 1)
        return index, after, inside, slope, slope
    before_counts = (index >= 0) & (index < size)
    next_counts = (index < size - 1) & ((index >= 0) | ((index == -1) & (after > 0)))
    return index, after, before_counts, next_counts, before_counts | next_counts


def point_limit(largest_grid: int, size: int, dtype):
    """An offset of this dtype that leads outside from any grid place, on both sides.

    Args:
        largest_grid: The largest absolute value of the grid.
        size: Pixels along the axis.
        dtype: A float dtype.

    """
    # The next larger number, as the conversion may round down.
    return numpy.nextafter(dtype.type(size + 2 + largest_grid), dtype.type(numpy.inf))


def sample(corners, row_weights, col_weights):
    """A bilinear sample, and its derivatives by row, by column and by both.

    Args:
        corners: Top left, top right, bottom left and bottom right.
        row_weights: Weights of top and bottom.
        col_weights: Weights of left and right.

    """
    tl, tr, bl, br = corners
    top, bottom = row_weights
    left, right = col_weights
    return (
        top * (left * tl + right * tr) + bottom * (left * bl + right * br),
        left * (bl - tl) + right * (br - tr),
        top * (tr - tl) + bottom * (br - bl),
        tl - tr - bl + br,
    )
