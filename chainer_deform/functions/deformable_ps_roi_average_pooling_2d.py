"""Deformable position-sensitive RoI pooling, from R-FCN."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy
from chainer.utils import type_check

from chainer_deform._checks import (
    argument_shapes,
    check_devices,
    check_indices,
    finite,
    integer,
    pair,
    positive,
)
from chainer_deform._composed import composed
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d


def deformable_ps_roi_average_pooling_2d(
    x,
    rois,
    roi_indices,
    offset,
    outsize,
    spatial_scale: float,
    group_size: int,
    *,
    part_size=None,
    sampling_ratio=4,
    gamma: float = 0.1,
) -> chainer.Variable:
    """Deformable position-sensitive RoI pooling: each bin reads channels of its own.

    A box is cut into ``out_h`` by ``out_w`` bins. The input has ``group_size ** 2``
    channels for each output channel, laid out as a square of cells over the box; a bin
    reads that of the cell it is in, which is ``(i * group_size // out_h, j * group_size
    // out_w)`` for bin ``(i, j)``. Channel ``(c * group_size + row) * group_size +
    column`` is that of output channel ``c`` and cell ``(row, column)``.

    Each bin is moved by an offset, which is ``gamma`` times a share of the box's height
    and width. Bins that are in the same part of the box, of ``part_h`` by ``part_w``
    parts, have the same one. The output channels may be in classes with offsets of
    their own.

    The box reaches from ``round(x_min) * spatial_scale - 0.5`` to
    ``(round(x_max) + 1) * spatial_scale - 0.5``, halves rounded away from zero, and is
    at least 0.1 pixels wide; likewise its height. A bin's output is the mean of ``s_h``
    by ``s_w`` samples, which are read by bilinear interpolation. Sample ``(a, b)`` of
    bin ``(i, j)`` is at row ``top + (i + a / s_h) * height / out_h + gamma * height *
    offset_y``, and at the column that is made likewise. Samples more than half a pixel
    outside the image are left out of the mean; a bin without any other is 0. A NaN
    offset makes its bins NaN.

    Args:
        x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, out_c * group_size ** 2, h, w)``, float16, float32 or float64.
        rois (:class:`~chainer.Variable` or :ref:`ndarray`): Boxes
            ``(y_min, x_min, y_max, x_max)`` of shape ``(R, 4)``, whose last pixels
            belong to them. ``R`` may be 0. Any float dtype.
        roi_indices (:class:`~chainer.Variable` or :ref:`ndarray`): The image that each
            box lies in, integers of shape ``(R,)`` from 0 to ``n - 1``.
        offset (:class:`~chainer.Variable` or :ref:`ndarray` or None): Offsets of shape
            ``(R, 2 * classes, part_h, part_w)``, for each class first the horizontal
            ones, then the vertical ones, in shares of the box before ``gamma`` is
            applied. ``classes`` must divide ``out_c``. Any float dtype. If None,
            nothing is moved.
        outsize (int or pair of ints): Number of bins ``(out_h, out_w)``.
        spatial_scale (float): Factor from the boxes' coordinates to pixels of ``x``,
            above 0.
        group_size (int): Number of cells along each side.
        part_size (int or pair of ints or None): Number of parts ``(part_h, part_w)``.
            If None, each bin is a part.
        sampling_ratio (int or pair of ints): Samples ``(s_h, s_w)`` of a bin.
        gamma (float): Factor of the offsets.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(R, out_c, out_h, out_w)`` and the dtype of
        ``x``. Coordinates and sums are computed in float32 or, if any input is float64,
        in float64. The coordinates of all samples are kept, and a copy of ``x``.

    Raises:
        TypeError: An argument is no array, or an option has a wrong type.
        ValueError: An option or ``roi_indices`` are out of range, or an argument is on
            another device than ``x``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``x`` and ``offset``; ``rois`` have no
    gradient. On a lattice line, where the derivative jumps, that of the cell to the
    right or below is taken. Along a coordinate beyond the image's outermost pixels the
    derivative is 0, and that a sample joins or leaves the mean has none. Deterministic
    on the CPU, for a given number of threads. On a GPU the gradient of ``x`` may differ
    in its last bits from run to run, unless ``chainer.config.cudnn_deterministic`` is
    true; and ``roi_indices`` are read back to be checked, for which the GPU is waited
    for.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.), section 2.2, and `R-FCN <https://arxiv.org/abs/1605.06409>`_ (Dai et al.).

    .. seealso:: :func:`~chainer_deform.functions.sampled_sum_2d`, which does the work.

    .. admonition:: Example

        Two output channels, which read 3 x 3 cells, with offsets for each:

        >>> x = np.random.uniform(0, 1, (1, 18, 12, 16)).astype(np.float32)
        >>> rois = np.array([[10, 20, 90, 140], [0, 0, 60, 60]], np.float32)
        >>> roi_indices = np.array([0, 0], np.int32)
        >>> offset = np.random.uniform(-1, 1, (2, 4, 3, 3)).astype(np.float32)
        >>> y = deformable_ps_roi_average_pooling_2d(
        ...     x, rois, roi_indices, offset, 3, spatial_scale=0.1, group_size=3)
        >>> y.shape
        (2, 2, 3, 3)

    """
    arguments = {'x': x, 'rois': rois, 'offset': offset}
    if offset is None:
        del arguments['offset']
    check_devices({**arguments, 'roi_indices': roi_indices})
    out_size = pair('outsize', outsize, minimum=1)
    spatial_scale = positive('spatial_scale', spatial_scale)
    g = integer('group_size', group_size, minimum=1)
    parts = out_size
    if part_size is not None:
        parts = pair('part_size', part_size, minimum=1)
    ratio = pair('sampling_ratio', sampling_ratio, minimum=1)
    gamma = finite('gamma', gamma)
    n, R = _checked_sizes(arguments, g, parts)
    check_indices('roi_indices', chainer.as_array(roi_indices), (R,), n)
    options = {
        'out_size': out_size,
        'spatial_scale': spatial_scale,
        'ratio': ratio,
        'gamma': gamma,
    }
    return _compute(x, rois, roi_indices, offset, g=g, **options)


@composed
def _compute(x, rois, roi_indices, offset, *, g, **options):
    """The function, once all is checked."""
    rois, roi_indices = map(chainer.as_array, (rois, roi_indices))
    arrays = [array for array in (x, rois, offset) if array is not None]
    dtype = numpy.result_type('f', *(array.dtype for array in arrays))
    n, c, h, w = x.shape
    out_c = c // g**2
    locations, weights = points(rois, offset, (h, w), dtype=dtype, **options)
    classes, s_h, s_w, out_h, out_w, R = weights.shape
    P, K = out_h * out_w, s_h * s_w
    xp = chainer.backend.get_array_module(x)
    # Each cell's channels as an image: (n, out_c, cells, h, w) -> (cells * n, ...)
    images = F.transpose(F.reshape(x, (n, out_c, g * g, h, w)), (2, 0, 1, 3, 4))
    cells = xp.asarray(cells_of_bins(g, out_h, out_w).reshape(P, 1))
    # Bin after bin, and box after box in each: memory has them in this order.
    y = sampled_sum_2d(
        F.reshape(images, (g * g * n, out_c, h, w)),
        F.transpose(F.reshape(locations, (2, classes, K, P * R)), (3, 1, 2, 0)),
        weights.reshape(classes, K, P * R).transpose(2, 0, 1),
        (cells * n + roi_indices.astype('int64')).reshape(P * R),
        border='clamp',
    )
    return F.transpose(F.reshape(y, (out_h, out_w, R, out_c)), (2, 3, 0, 1))


def points(rois, offset, x_size, *, out_size, spatial_scale, ratio, gamma, dtype):
    """The samples of each bin, and their weights.

    Args:
        rois: Boxes, an array.
        offset: Offsets, or None.
        x_size: Height and width of the images. If None, no sample is left out.
        out_size, spatial_scale, ratio, gamma: As of the function.
        dtype: That of the points.

    Returns:
        tuple: A variable of points in pixels, of shape ``(yx, classes, s_h, s_w, out_h,
        out_w, R)``, and an array of weights, without the first axis. Samples that are
        left out of the mean are far outside.

    """
    xp = chainer.backend.get_array_module(rois)
    (out_h, out_w), (s_h, s_w) = out_size, ratio
    R, classes = len(rois), 1
    rois = _rounded(xp, rois.astype(dtype))
    low = rois[:, :2] * dtype.type(spatial_scale) - dtype.type(0.5)
    high = (rois[:, 2:] + 1) * dtype.type(spatial_scale) - dtype.type(0.5)
    size = xp.maximum(high - low, dtype.type(0.1))

    if offset is not None:
        _, channels, *parts = offset.shape
        classes = channels // 2
        offset = F.reshape(F.cast(offset, dtype), (R, classes, 2, *parts))
        offset = _of_bins(_of_bins(offset, 3, out_h), 4, out_w)
        # x and y, each (classes, 1, out_h, out_w, R)
        offset = F.separate(F.transpose(offset, (2, 1, 3, 4, 0)))
        offset = [F.expand_dims(array, 1) for array in offset]

    # Rows depend on the sample's number a alone, columns on b alone:
    # (classes, s_h, out_h, out_w, R) and (classes, s_w, out_h, out_w, R)
    places, inside = [], []
    for axis in (0, 1):
        # In shares of the box (1, s_h, out_h, 1, 1) or (1, s_w, 1, out_w, 1)
        bins, samples = out_size[axis], ratio[axis]
        share = (numpy.arange(bins) + numpy.arange(samples)[:, None] / samples) / bins
        share = xp.asarray(numpy.expand_dims(share.astype(dtype), (0, 3 - axis, 4)))
        place = low[:, axis] + share * size[:, axis]
        if offset is not None:
            with numpy.errstate(all='ignore'):  # an infinite point is outside
                place = offset[1 - axis] * (dtype.type(gamma) * size[:, axis]) + place
        array = place if offset is None else place.array
        places.append(place)
        if x_size is None:
            inside.append(xp.ones(array.shape, bool))
        else:
            inside.append(~((array < -0.5) | (array > x_size[axis] - 0.5)))

    # Samples that do not count are moved far outside, where they read nothing.
    counts = [array.sum(1, keepdims=True) for array in inside]
    any_inside = counts[0] * counts[1] > 0
    inside = [array & any_inside for array in inside]
    outside = xp.array(-2, dtype)
    shape = classes, s_h, s_w, out_h, out_w, R
    locations = F.stack(
        [
            F.broadcast_to(F.expand_dims(F.where(array, place, outside), axis), shape)
            for array, place, axis in zip(inside, places, (2, 1))
        ]
    )
    row_weights, column_weights = (
        (array / xp.maximum(count, 1)).astype(dtype)
        for array, count in zip(inside, counts)
    )
    return locations, row_weights[:, :, None] * column_weights[:, None]


def cells_of_bins(g: int, out_h: int, out_w: int) -> numpy.ndarray:
    """The number of each bin's cell, ``(out_h, out_w)``."""
    rows, columns = (numpy.arange(bins) * g // bins for bins in (out_h, out_w))
    return rows[:, None] * g + columns


def _checked_sizes(arguments, g: int, parts) -> tuple[int, int]:
    """The sizes ``n, R``; checks shapes and dtypes."""
    shapes = argument_shapes(arguments)
    x_shape, R = shapes['x'], next(iter(shapes['rois']), 0)
    if len(x_shape) != 4 or min(x_shape[1:]) < 1 or x_shape[1] % g**2:
        raise type_check.InvalidType(
            'x.shape == (n, out_c * group_size ** 2, h, w) with out_c, h, w >= 1 and '
            f'group_size == {g}',
            f'x.shape == {x_shape}',
        )
    if shapes['rois'] != (R, 4):
        raise type_check.InvalidType(
            'rois.shape == (R, 4)', f'rois.shape == {shapes["rois"]}'
        )
    out_c = x_shape[1] // g**2
    offset = shapes.get('offset', (R, 2, *parts))
    channels = offset[1] if len(offset) == 4 else 0
    fits = channels >= 2 and channels % 2 == 0 and out_c % (channels // 2) == 0
    if not fits or offset != (R, channels, *parts):
        raise type_check.InvalidType(
            f'offset.shape == ({R}, 2 * classes, {parts[0]}, {parts[1]}) with classes '
            f'that divide the {out_c} output channels',
            f'offset.shape == {offset}',
        )
    return x_shape[0], R


def _rounded(xp, array):
    """Rounded to whole numbers, halves away from zero."""
    whole = xp.trunc(array)
    return whole + xp.sign(array) * (abs(array - whole) >= 0.5)


def _of_bins(offset, axis: int, size: int):
    """The offsets of ``size`` bins along an axis, from those of its parts."""
    count = offset.shape[axis]
    if count == size:
        return offset
    parts = F.split_axis(offset, count, axis)
    return F.concat([parts[i * count // size] for i in range(size)], axis)
