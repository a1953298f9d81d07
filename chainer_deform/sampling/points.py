"""Where the sampling points are: a regular grid plus offsets, or given locations.

In the shapes below ``K`` is the number of points of an output position in each of
``groups`` groups of channels, and ``R`` the number of output positions of a tile.
"""

from __future__ import annotations

import numpy

from chainer_deform.sampling.rule import point_limit, sample


class Grid:
    """The points of a deformable convolution at some of its output positions.

    Args:
        geometry: Options of the convolution.
        out_size: Its output size.
        tile: A slice of the images and a slice of the output positions.
        first_image: The first image that there is.

    Arrays of coordinates are like the offset, (n, groups * 2 * K, out_h, out_w), arrays
    of factors like the mask, (n, groups * K, out_h, out_w).

    """

    clamp = False
    summed = False  # each point has a column of its own

    def __init__(self, geometry, out_size, tile, first_image: int) -> None:
        self.geometry, self.out_size, self.tile = geometry, out_size, tile
        self.first_image = first_image
        self.groups, self.K = geometry.offset_groups, geometry.taps
        self.images, self.positions = (part.stop - part.start for part in tile)
        self.R = self.images * self.positions

    def image_numbers(self):
        """The image of each output position, (R,)."""
        images = numpy.arange(self.tile[0].start, self.tile[0].stop)
        return numpy.repeat(images - self.first_image, self.positions)

    def grid(self):
        """Rows and columns of the output positions (R,) and of the taps (K,)."""
        geometry = self.geometry
        positions = self.tile[1].start + numpy.arange(self.R) % self.positions
        oy, ox = numpy.divmod(positions, self.out_size[1])
        i, j = numpy.divmod(numpy.arange(self.K), geometry.kw)
        return (
            oy * geometry.sy - geometry.ph,
            ox * geometry.sx - geometry.pw,
            i * geometry.dy,
            j * geometry.dx,
        )

    def coordinates(self, offset, dtype):
        """Vertical and horizontal numbers, each (groups, K, R)."""
        view = self._view(offset, 2)
        return tuple(self._by_position(view[:, :, axis], dtype) for axis in (1, 0))

    def factors(self, mask, dtype):
        """The numbers (groups, K, R)."""
        return self._by_position(self._view(mask, 1)[:, :, 0], dtype)

    def write_coordinates(self, offset, y, x) -> None:
        """The inverse of :meth:`coordinates`."""
        view = self._view(offset, 2)
        for axis, array in (1, y), (0, x):
            array = array.reshape(self.groups, self.K, self.images, self.positions)
            view[:, :, axis] = array.transpose(2, 0, 1, 3)

    def write_factors(self, mask, factors) -> None:
        """The inverse of :meth:`factors`."""
        factors = factors.reshape(self.groups, self.K, self.images, self.positions)
        self._view(mask, 1)[:, :, 0] = factors.transpose(2, 0, 1, 3)

    def _view(self, array, axes: int):
        """(n, groups * axes * K, out_h, out_w) -> (m, groups, axes, K, p)."""
        images, positions = self.tile
        array = array.reshape(len(array), self.groups, axes, self.K, -1)
        return array[images, ..., positions]

    def _by_position(self, view, dtype):
        """(m, groups, K, p) -> (groups, K, R)."""
        view = view.transpose(1, 2, 0, 3).astype(dtype, 'C')
        return view.reshape(self.groups, self.K, self.R)


class Given:
    """Points that are given themselves, each with the weight of its sample.

    Args:
        shape: ``(q, groups, K)``.
        tile: The output positions: a slice, or an array of their numbers.
        indices: The image of each of the ``q`` output positions.
        first_image: The first image that there is.
        border: ``'zero'`` or ``'clamp'``.

    Arrays of coordinates are like the locations, (q, groups, K, 2), arrays of factors
    like the weights, (q, groups, K).

    """

    summed = True  # the samples of an output position are added up

    def __init__(self, shape, tile, indices, first_image: int, border: str) -> None:
        _, self.groups, self.K = shape
        self.tile, self.indices = tile, indices
        self.first_image, self.clamp = first_image, border == 'clamp'
        self.R = len(indices[tile])

    def image_numbers(self):
        """The image of each output position, (R,)."""
        return self.indices[self.tile] - self.first_image

    def grid(self):
        """Zeros for output positions (R,) and points (K,)."""
        zeros = numpy.zeros(max(self.R, self.K), numpy.int64)
        return zeros[: self.R], zeros[: self.R], zeros[: self.K], zeros[: self.K]

    def coordinates(self, locations, dtype):
        """Vertical and horizontal numbers, each (groups, K, R)."""
        view = locations[self.tile].transpose(3, 1, 2, 0)
        return tuple(view.astype(dtype, 'C'))

    def factors(self, weights, dtype):
        """The numbers (groups, K, R)."""
        return weights[self.tile].transpose(1, 2, 0).astype(dtype, 'C')

    def write_coordinates(self, locations, y, x) -> None:
        """The inverse of :meth:`coordinates`."""
        for axis, array in enumerate((y, x)):
            locations[self.tile, ..., axis] = array.transpose(2, 0, 1)

    def write_factors(self, weights, factors) -> None:
        """The inverse of :meth:`factors`."""
        weights[self.tile] = factors.transpose(2, 0, 1)


class Corners:
    """The four pixels around each point, and what a sample is made of: on the CPU.

    Arrays have a number for each point (groups, K, R), for each corner (4, groups, K,
    R): top left, top right, bottom left, bottom right; or for the two corners along an
    axis (2, groups, K, R).

    A NaN coordinate makes all weights of its point NaN, and with them all that is
    computed of it; its corners are outside, where nothing arrives.

    Args:
        points: Where they are, :class:`Grid` or :class:`Given`.
        offsets: What is added to their grid, an array of coordinates.
        factors: What their samples are multiplied by, an array of factors or None.
        size: Number, height and width of the images.
        dtype: That of all weights.
        loops: The module of the loops.

    """

    def __init__(self, points, offsets, factors, size, dtype, loops) -> None:
        self.points, self.dtype, self.loops = points, dtype, loops
        n, h, w = size
        shape = points.groups, points.K, points.R
        # Pixel 0 is no pixel: all corners outside are there.
        many = (1 + n * h * w) * points.groups >= 2**31
        self.pixels = numpy.empty((4, *shape), numpy.int64 if many else numpy.int32)
        self.weights = numpy.empty((4, *shape), dtype)
        self.row_weights = numpy.empty((2, *shape), dtype)
        self.col_weights = numpy.empty((2, *shape), dtype)
        # Whether the sample changes with the row and the column.
        self.slopes = numpy.empty((2, *shape), bool)
        grid = points.grid()
        limits = tuple(
            point_limit(_largest(position) + _largest(tap), side, dtype)
            for position, tap, side in zip(grid[:2], grid[2:], (h, w))
        )
        loops.locate(
            points.image_numbers(), grid, points.coordinates(offsets, dtype), (h, w),
            limits, points.clamp, self.pixels, self.weights, self.row_weights,
            self.col_weights, self.slopes,
        )  # fmt: skip
        self.factors = self.ones()
        if factors is not None:
            self.factors = points.factors(factors, dtype)

    def ones(self):
        """Factors that change nothing."""
        return numpy.ones(self.pixels.shape[1:], self.dtype)

    def gradients(self, products):
        """The gradients of rows, columns and factors, (3, groups, K, R).

        Args:
            products: Over channels, column gradient times each corner pixel; an array
                (parts, 4, groups, K, R), of which the parts are added up.

        """
        gradients = numpy.empty((3, *self.pixels.shape[1:]), self.dtype)
        self.loops.gradients(
            products, self.row_weights, self.col_weights, self.slopes, self.factors,
            gradients,
        )  # fmt: skip
        return gradients

    def tangents(self, offsets, factors):
        """How rows, columns and factors move; a point outside does not.

        Args:
            offsets, factors: Arrays of coordinates and of factors, or None.

        """
        still = numpy.zeros(self.pixels.shape[1:], self.dtype)
        y_dot = x_dot = factors_dot = still
        if offsets is not None:
            moves = self.points.coordinates(offsets, self.dtype)
            y_dot, x_dot = numpy.where(self.slopes, moves, 0)
        if factors is not None:
            inside = (self.pixels != 0).any(axis=0)
            factors_dot = self.points.factors(factors, self.dtype)
            factors_dot = numpy.where(inside, factors_dot, 0)
        return y_dot, x_dot, factors_dot

    def weights_dot(self, tangents):
        """How fast the weights of the corners, times the factors, change."""
        y_dot, x_dot, factors_dot = tangents
        # The weight before a point falls as the point moves on, the next one rises.
        turn = numpy.array([-1, 1], self.dtype).reshape(2, 1, 1, 1)
        rows, cols = self.row_weights[:, None], self.col_weights
        weights_dot = (turn * y_dot)[:, None] * cols + rows * (turn * x_dot)
        weights_dot = factors_dot * rows * cols + self.factors * weights_dot
        return weights_dot.reshape(self.pixels.shape)

    def gradients_dot(self, products, tangents):
        """How fast :meth:`gradients` change as points and factors move."""
        y_dot, x_dot, factors_dot = tangents
        _, along_y, along_x, along_both = sample(
            products.sum(axis=0), self.row_weights, self.col_weights
        )
        by_y, by_x = self.slopes
        along_y, along_x, along_both = (
            numpy.where(moves, along, 0)
            for moves, along in zip(
                (by_y, by_x, by_y & by_x), (along_y, along_x, along_both)
            )
        )
        factors_y, factors_x = numpy.where(self.slopes, self.factors, 0)
        return numpy.stack(
            [
                factors_dot * along_y + factors_y * along_both * x_dot,
                factors_dot * along_x + factors_x * along_both * y_dot,
                along_y * y_dot + along_x * x_dot,
            ]
        )


def _largest(array) -> int:
    return int(numpy.abs(array).max())
