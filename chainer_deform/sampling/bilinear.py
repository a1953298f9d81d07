"""The bilinear rule of the CPU, for arrays and, compiled by Numba, for numbers."""

from __future__ import annotations

import numpy


def axis(grid, offset, size, limit):
    """The pixels before and after the points ``grid + offset`` along one axis.

    Args:
        grid: Places of the regular grid, integers.
        offset: How far the points are off it, in pixels.
        size: Pixels along the axis.
        limit: What :func:`point_limit` returns.

    Returns:
        The index of the pixel before the point, how far the point is after it, and
        whether the pixel before and the one after take part: both the pixel and the
        point are inside, which for a point means the open interval (-1, size).

    """
    # Held where every point is outside, NaN as well, before it becomes an integer.
    offset = numpy.fmin(numpy.fmax(offset, -limit), limit)
    # Floor and fraction of the offset alone: no bits are lost far from the origin.
    floor = numpy.floor(offset)
    after = offset - floor
    index = numpy.int64(floor) + grid
    before_inside = (index >= 0) & (index < size)
    after_inside = (index < size - 1) & ((index >= 0) | ((index == -1) & (after > 0)))
    return index, after, before_inside, after_inside


def point_limit(grid, size: int, dtype):
    """An offset, of this dtype, that takes every point outside, on either side."""
    limit = dtype.type(size + 1 + int(numpy.abs(grid).max()))
    # The next larger one, as it may have been rounded down.
    return numpy.nextafter(limit, dtype.type(numpy.inf))
