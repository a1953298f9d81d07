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
    rois, roi_indices = (
        a.array if isinstance(a, chainer.Variable) else a for a in (rois, roi_indices)
    )
    n, out_c, h, w, R, classes = _checked_sizes(arguments, g, parts)
    check_indices('roi_indices', roi_indices, (R,), n)

    dtype = numpy.result_type('f', *(array.dtype for array in arguments.values()))
    xp = chainer.backend.get_array_module(x)
    (out_h, out_w), (s_h, s_w) = out_size, ratio
    P, K = out_h * out_w, s_h * s_w
    rois = _rounded(xp, rois.astype(dtype))
    low = rois[:, :2] * dtype.type(spatial_scale) - dtype.type(0.5)
    high = (rois[:, 2:] + 1) * dtype.type(spatial_scale) - dtype.type(0.5)
    size = xp.maximum(high - low, dtype.type(0.1))

    # In shares of the box (out_h, out_w, 1, K, yx), in pixels (R, ..., yx)
    i, j, a, b = numpy.mgrid[:out_h, :out_w, :s_h, :s_w].reshape(4, out_h, out_w, 1, K)
    shares = numpy.stack([(i + a / s_h) / out_h, (j + b / s_w) / out_w], -1)
    low, size = (array[:, None, None, None, None] for array in (low, size))
    locations = low + xp.asarray(shares.astype(dtype)) * size
    if offset is not None:
        offset = F.reshape(F.cast(offset, dtype), (R, classes, 2, *parts))
        offset = _of_bins(_of_bins(offset, 3, out_h), 4, out_w)
        # (R, classes, xy, out_h, out_w) -> (R, out_h, out_w, classes, 1, yx)
        offset = F.flip(F.transpose(offset, (0, 3, 4, 1, 2)), 4)[:, :, :, :, None]
        with numpy.errstate(all='ignore'):  # an infinite point is outside
            locations = offset * (dtype.type(gamma) * size) + locations

    # What is left out of the mean goes far outside, where it reads nothing.
    places = locations.array if offset is not None else locations
    last = xp.array([h - 0.5, w - 0.5], dtype)
    inside = ~((places < -0.5) | (places > last)).any(-1)
    locations = F.where(inside[..., None], locations, xp.array(-2, dtype))
    weights = inside / xp.maximum(inside.sum(-1, keepdims=True), 1)

    # Each cell's channels as an image: (n, out_c, cells, h, w) -> (n * cells, ...)
    images = F.transpose(F.reshape(x, (n, out_c, g * g, h, w)), (0, 2, 1, 3, 4))
    rows, columns = (numpy.arange(size) * g // size for size in out_size)
    cells = xp.asarray((rows[:, None] * g + columns).reshape(P))
    indices = roi_indices.astype('int64')[:, None] * (g * g) + cells
    y = sampled_sum_2d(
        F.reshape(images, (n * g * g, out_c, h, w)),
        F.reshape(locations, (R * P, classes, K, 2)),
        weights.astype(dtype).reshape(R * P, classes, K),
        indices.reshape(R * P),
        border='clamp',
    )
    return F.transpose(F.reshape(y, (R, out_h, out_w, out_c)), (0, 3, 1, 2))


def _checked_sizes(arguments, g: int, parts) -> tuple[int, ...]:
    """The sizes ``n, out_c, h, w, R, classes``; checks shapes and dtypes."""
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
    n, c, h, w = x_shape
    out_c = c // g**2
    offset = shapes.get('offset', (R, 2, *parts))
    channels = offset[1] if len(offset) == 4 else 0
    fits = channels >= 2 and channels % 2 == 0 and out_c % (channels // 2) == 0
    if not fits or offset != (R, channels, *parts):
        raise type_check.InvalidType(
            f'offset.shape == ({R}, 2 * classes, {parts[0]}, {parts[1]}) with classes '
            f'that divide the {out_c} output channels',
            f'offset.shape == {offset}',
        )
    return n, out_c, h, w, R, channels // 2


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
