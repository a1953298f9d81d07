"""Attention to a few points of images of several sizes, from Deformable DETR."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy
from chainer.utils import type_check

from chainer_deform._checks import argument_shapes, check_devices, check_shape, pair
from chainer_deform._composed import composed
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d


def multi_scale_deformable_attention(
    value, shapes, locations, weights
) -> chainer.Variable:
    """Attention of queries to a few points each, in images of several sizes.

    The images are levels of a pyramid, such as the feature maps of a detector. Each
    query has, for each head and level, some points and their weights. A head's output
    is the weighted sum of what is read at its points on all levels, by bilinear
    interpolation. Places are shares of a level's width and height: ``x * w - 0.5`` is
    the column of a point in pixels, ``y * h - 0.5`` its row. Pixels outside count as 0.
    A point a pixel or more outside gives 0, and so does an infinite one; a NaN location
    makes the output of its query and head NaN.

    Nothing is applied to ``weights``: the softmax over levels and points is taken
    before.

    Args:
        value (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, s, heads, d)``, where ``s`` is the sum of ``h * w`` over the levels:
            level after level, row by row. float16, float32 or float64. ``n`` may be 0.
        shapes (sequence of pairs of ints): The size ``(h, w)`` of each level.
        locations (:class:`~chainer.Variable` or :ref:`ndarray`): Points ``(x, y)`` of
            shape ``(n, q, heads, levels, points, 2)``, from 0 to 1 inside the image.
            ``q`` may be 0. Any float dtype.
        weights (:class:`~chainer.Variable` or :ref:`ndarray`): Weights of shape
            ``(n, q, heads, levels, points)``. Any float dtype.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(n, q, heads * d)`` and the dtype of
        ``value``. Coordinates and sums are computed in float32 or, if any input is
        float64, in float64.

    Raises:
        TypeError: An argument is no array, or ``shapes`` is not made of ints.
        ValueError: ``shapes`` is empty or has a size below 1, or an argument is on
            another device than ``value``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``value``, ``locations`` and ``weights``. On a
    lattice line, where the derivative jumps, that of the cell to the right or below is
    taken. Deterministic on the CPU, for a given number of threads. On a GPU the
    gradient of ``value`` may differ in its last bits from run to run, unless
    ``chainer.config.cudnn_deterministic`` is true.

    See `Deformable DETR <https://arxiv.org/abs/2010.04159>`_ (Zhu et al.), section 4.1.

    .. seealso:: :func:`~chainer_deform.functions.sampled_sum_2d`, which does the work.

    .. admonition:: Example

        Five queries, two heads, two levels of 4 x 6 and 2 x 3 pixels, three points:

        >>> value = np.random.uniform(0, 1, (1, 30, 2, 8)).astype(np.float32)
        >>> locations = np.random.uniform(0, 1, (1, 5, 2, 2, 3, 2)).astype(np.float32)
        >>> weights = np.full((1, 5, 2, 2, 3), 1 / 6, np.float32)
        >>> y = multi_scale_deformable_attention(
        ...     value, [(4, 6), (2, 3)], locations, weights)
        >>> y.shape
        (1, 5, 16)

    """
    arguments = {'value': value, 'locations': locations, 'weights': weights}
    check_devices(arguments)
    sizes = _checked_levels(shapes)
    _check_sizes(arguments, sizes)
    return _compute(value, locations, weights, sizes=sizes)


@composed
def _compute(value, locations, weights, *, sizes):
    """The function, once all is checked."""
    n, q, heads, _, points, _ = locations.shape
    d = value.shape[3]
    arrays = value, locations, weights
    dtype = numpy.result_type('f', *(array.dtype for array in arrays))
    starts = numpy.cumsum([h * w for h, w in sizes])[:-1]
    levels = zip(
        sizes,
        F.split_axis(value, starts, 1),
        F.separate(F.cast(locations, dtype), 3),
        F.separate(weights, 3),
    )
    result = 0
    for (h, w), image, places, share in levels:
        # (n, h * w, heads, d) -> (n, heads * d, h, w); the levels are added in dtype
        image = F.cast(F.transpose(image, (0, 2, 3, 1)), dtype)
        # (n, q, heads, points, xy) -> pixels (n * q, heads, points, yx)
        pixels = in_pixels(places, (h, w))
        result += sampled_sum_2d(
            F.reshape(image, (n, heads * d, h, w)),
            F.reshape(pixels, (n * q, heads, points, 2)),
            F.reshape(share, (n * q, heads, points)),
        )
    return F.reshape(F.cast(result, value.dtype), (n, q, heads * d))


def in_pixels(places, size):
    """Places ``(x, y)`` in shares of a level as pixels ``(y, x)``, on the last axis."""
    xp = chainer.backend.get_array_module(places)
    h, w = size
    with numpy.errstate(all='ignore'):  # an infinite point is outside
        pixels = places * xp.array([w, h], places.dtype) - 0.5
    return F.flip(pixels, places.ndim - 1)


def _checked_levels(shapes) -> list[tuple[int, int]]:
    """``shapes`` as a list of pairs of ints."""
    try:
        levels = list(shapes)
    except TypeError:
        raise TypeError(
            f'shapes must be a sequence of pairs of ints, not {shapes!r}'
        ) from None
    if not levels:
        raise ValueError('shapes must have at least one pair (h, w), but is empty')
    for level in levels:
        if not hasattr(level, '__len__') or len(level) != 2:
            raise TypeError(f'shapes must be a sequence of pairs of ints, not {shapes}')
    return [pair('shapes', level, minimum=1) for level in levels]


def _check_sizes(arguments, sizes) -> None:
    """Checks shapes and dtypes."""
    found = argument_shapes(arguments)
    value, locations = found['value'], found['locations']
    s = sum(h * w for h, w in sizes)
    if len(value) != 4 or value[1] != s or min(value[2:]) < 1:
        raise type_check.InvalidType(
            f'value.shape == (n, {s}, heads, d) with heads, d >= 1 for '
            f'shapes == {sizes}',
            f'value.shape == {value}',
        )
    n, _, heads, _ = value
    levels = len(sizes)
    fits = len(locations) == 6 and locations[4] >= 1
    if not fits or locations != (n, locations[1], heads, levels, locations[4], 2):
        raise type_check.InvalidType(
            f'locations.shape == ({n}, q, {heads}, {levels}, points, 2) with '
            f'points >= 1 for value.shape == {value} and {levels} levels',
            f'locations.shape == {locations}',
        )
    check_shape('weights', found['weights'], locations[:5])
