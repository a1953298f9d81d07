"""The bilinear rule along one axis."""

import numpy
import pytest

from chainer_deform.sampling import rule

OFFSETS = [0, 0.25, -1.5, numpy.nan, numpy.inf, -numpy.inf, 3e38, -2, 1, -0.75]


@pytest.mark.parametrize('clamp', [False, True])
@pytest.mark.parametrize('size', [1, 5])
def test_arrays_and_numbers(size, clamp):
    """For arrays and for single numbers, which is what Numba compiles."""
    grid = numpy.arange(-3, 7)[:, None]
    offset = numpy.array(OFFSETS)
    limit = rule.point_limit(6, size, offset.dtype)
    with numpy.errstate(invalid='ignore'):
        found = rule.axis(grid, offset, size, limit, clamp)
    for i, j in numpy.ndindex(10, len(OFFSETS)):
        found_here = tuple(
            numpy.broadcast_to(array, (10, len(OFFSETS)))[i, j] for array in found
        )
        single = rule.axis(grid[i, 0], offset[j], size, limit, clamp)
        assert found_here == single
        index, after, before_counts, next_counts, slope = found_here
        point = grid[i, 0] + offset[j]
        if clamp:
            inside = -1 <= point <= size
            assert before_counts == inside
            assert next_counts == slope == (0 <= point < size - 1)
            point = min(max(point, 0), size - 1)
        else:
            inside = -1 < point < size
            assert before_counts == (inside and point >= 0)
            assert next_counts == (inside and point < size - 1)
            assert slope == (before_counts or next_counts)
        if inside:
            assert index + after == pytest.approx(point, abs=1e-300)
            assert 0 <= after <= 1


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('clamp', [False, True])
@pytest.mark.parametrize('grid', [0, 7, 2**27, 2**31, 2**40, 2**55 - 1])
def test_limit_is_outside(grid, clamp, dtype):
    """From any place of the grid, also where the dtype lacks whole numbers."""
    for size in 1, 3, 2**24 + 1:
        limit = rule.point_limit(grid, size, numpy.dtype(dtype))
        assert limit.dtype == dtype
        for place in -grid, grid:
            for offset in limit, -limit:
                *_, before, following, _ = rule.axis(place, offset, size, limit, clamp)
                assert not before
                assert not following
