"""Means over the bins of boxes, each moved by an offset: deformable RoI pooling."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy
from chainer.utils import type_check

from chainer_deform._checks import (
    argument_shapes,
    boolean,
    check_devices,
    check_indices,
    check_shape,
    finite,
    integer,
    pair,
    positive,
)
from chainer_deform._composed import composed
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d


def deformable_roi_average_align_2d(
    x,
    rois,
    roi_indices,
    offset,
    outsize,
    spatial_scale: float,
    sampling_ratio=None,
    *,
    gamma: float = 0.1,
    aligned: bool = True,
) -> chainer.Variable:
    """Deformable RoI pooling: means over the bins of boxes, each bin moved.

    A box is cut into ``out_h`` by ``out_w`` bins. Each bin is moved by an offset of its
    own, which is ``gamma`` times a share of the box's height and width. Its output is
    the mean of ``n_h`` by ``n_w`` samples, which are spread evenly over the bin and
    read by bilinear interpolation. Sample ``(a, b)`` of bin ``(i, j)`` is at row
    ``y_min + (i + (a + 0.5) / n_h) * height / out_h + gamma * height * offset_y``, and
    at the column that is made likewise.

    A sample up to a pixel outside the image reads the nearest place inside, one farther
    outside counts as 0. So does an infinite offset; a NaN offset makes its bin NaN.

    With zero offsets and ``aligned=False`` it is
    :func:`chainer.functions.roi_average_align_2d`.

    Args:
        x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, c, h, w)``, float16, float32 or float64.
        rois (:class:`~chainer.Variable` or :ref:`ndarray`): Boxes
            ``(y_min, x_min, y_max, x_max)`` of shape ``(R, 4)``. ``R`` may be 0. Any
            float dtype.
        roi_indices (:class:`~chainer.Variable` or :ref:`ndarray`): The image that each
            box lies in, integers of shape ``(R,)`` from 0 to ``n - 1``.
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets of shape
            ``(R, 2, out_h, out_w)``, first the horizontal ones, then the vertical ones,
            in shares of the box before ``gamma`` is applied. Any float dtype.
        outsize (int or pair of ints): Number of bins ``(out_h, out_w)``.
        spatial_scale (float): Factor from the boxes' coordinates to pixels of ``x``,
            above 0.
        sampling_ratio (int or pair of these or None): Samples ``(n_h, n_w)`` of a bin.
            Where None, as many as a bin has pixels, rounded up; a bin without height or
            width then gives 0.
        gamma (float): Factor of the offsets.
        aligned (bool): If true, half a pixel is taken off all coordinates, so that
            coordinates of boxes are those of pixels' edges. If false nothing is, and
            boxes are at least one pixel high and wide.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(R, c, out_h, out_w)`` and the dtype of
        ``x``. Coordinates and sums are computed in float32 or, if any input is float64,
        in float64. The coordinates of all samples are kept; where ``sampling_ratio`` is
        None, each bin takes the room of the one with most samples.

    Raises:
        TypeError: An argument is no array, or an option has a wrong type.
        ValueError: An option or ``roi_indices`` are out of range, ``rois`` have too
            many samples, or an argument is on another device than ``x``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``x`` and ``offset``; ``rois`` have no
    gradient. On a lattice line, where the derivative jumps, that of the cell to the
    right or below is taken. Along a coordinate beyond the image's outermost pixels the
    derivative is 0. Deterministic on the CPU, for a given number of threads. On a GPU
    the gradient of ``x`` may differ in its last bits from run to run, unless
    ``chainer.config.cudnn_deterministic`` is true; and ``roi_indices`` are read back to
    be checked, for which the GPU is waited for.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.), section 2.2, and `Mask R-CNN <https://arxiv.org/abs/1703.06870>`_ (He et al.)
    for the samples.

    .. seealso:: :func:`~chainer_deform.functions.sampled_sum_2d`, which does the work.

    .. admonition:: Example

        >>> x = np.random.uniform(0, 1, (2, 3, 12, 16)).astype(np.float32)
        >>> rois = np.array([[10, 20, 90, 140], [0, 0, 60, 60]], np.float32)
        >>> roi_indices = np.array([1, 0], np.int32)
        >>> offset = np.random.uniform(-1, 1, (2, 2, 7, 5)).astype(np.float32)
        >>> y = deformable_roi_average_align_2d(
        ...     x, rois, roi_indices, offset, (7, 5), spatial_scale=0.1)
        >>> y.shape
        (2, 3, 7, 5)

    """
    arguments = {'x': x, 'rois': rois, 'offset': offset}
    check_devices({**arguments, 'roi_indices': roi_indices})
    out_size = pair('outsize', outsize, minimum=1)
    options = {
        'spatial_scale': positive('spatial_scale', spatial_scale),
        'ratio': checked_ratio(sampling_ratio),
        'gamma': finite('gamma', gamma),
        'aligned': boolean('aligned', aligned),
    }
    n, R = _checked_sizes(arguments, *out_size)
    check_indices('roi_indices', chainer.as_array(roi_indices), (R,), n)
    return _compute(x, rois, roi_indices, offset, **options)


@composed
def _compute(x, rois, roi_indices, offset, **options):
    """The function, once all is checked."""
    rois, roi_indices = map(chainer.as_array, (rois, roi_indices))
    dtype = numpy.result_type('f', x.dtype, rois.dtype, offset.dtype)
    locations, inside = points(rois, offset, dtype=dtype, **options)
    R, out_h, out_w, K = locations.shape[:4]
    P = out_h * out_w
    xp = chainer.backend.get_array_module(x)
    weights = (inside / xp.maximum(inside.sum(1, keepdims=True), 1)).astype(dtype)
    y = sampled_sum_2d(
        x,
        F.reshape(locations, (R * P, 1, K, 2)),
        weights.repeat(P, axis=0)[:, None],
        roi_indices.repeat(P),
        border='clamp',
    )
    return F.transpose(F.reshape(y, (R, out_h, out_w, x.shape[1])), (0, 3, 1, 2))


def points(rois, offset, *, spatial_scale, ratio, gamma, aligned, dtype) -> tuple:
    """The samples of each bin, and which of them count.

    Returns:
        tuple: A variable of points in pixels, of shape ``(R, out_h, out_w, K, yx)``,
        and an array of bools, ``(R, K)``. The others are far outside.

    """
    xp = chainer.backend.get_array_module(rois)
    out_h, out_w = offset.shape[2:]
    rois = rois.astype(dtype) * dtype.type(spatial_scale)
    low, high = rois[:, :2], rois[:, 2:]
    size = high - low
    if aligned:
        low = low - dtype.type(0.5)
    else:
        size = xp.maximum(size, dtype.type(1))
    bins = size / xp.array([out_h, out_w], dtype)
    counts = [_counts(xp, n_, bins[:, axis]) for axis, n_ in enumerate(ratio)]

    # The samples of a bin one after another: (R, K), in pixels (R, 1, 1, K, yx)
    K = _most(counts)
    sample = xp.arange(K)
    n_h, n_w = (xp.maximum(count, 1)[:, None] for count in counts)
    a, b = sample // n_w, sample % n_w
    inside = (a < counts[0][:, None]) & (b < counts[1][:, None])
    shares = [((s + 0.5) / n_).astype(dtype) for s, n_ in ((a, n_h), (b, n_w))]
    shares = xp.stack(shares, -1)[:, None, None]
    cells = xp.stack(xp.meshgrid(xp.arange(out_h), xp.arange(out_w), indexing='ij'), -1)
    cells = cells[:, :, None].astype(dtype)
    low, size, bins = (array[:, None, None, None] for array in (low, size, bins))

    # (R, xy, out_h, out_w) -> (R, out_h, out_w, 1, yx)
    offset = F.flip(F.transpose(F.cast(offset, dtype), (0, 2, 3, 1)), 3)
    with numpy.errstate(all='ignore'):  # an infinite point is outside
        moves = F.expand_dims(offset, 3) * (dtype.type(gamma) * size)
        locations = moves + (low + (cells + shares) * bins)
    if None in ratio:
        # Boxes with fewer samples have some far outside, which read nothing.
        outside = xp.array(-2, dtype)
        locations = F.where(inside[:, None, None, :, None], locations, outside)
    return locations, inside


def checked_ratio(ratio) -> tuple:
    """``sampling_ratio`` as a pair, each an int or None."""
    if not hasattr(ratio, '__len__') or len(ratio) != 2:
        ratio = ratio, ratio
    return tuple(
        None
        if count is None
        else integer('sampling_ratio', count, 1, 'None, an int or a pair of these')
        for count in ratio
    )


def _checked_sizes(arguments, out_h: int, out_w: int) -> tuple[int, int]:
    """The sizes ``n, R``; checks shapes and dtypes."""
    shapes = argument_shapes(arguments)
    x_shape, R = shapes['x'], next(iter(shapes['rois']), 0)
    if len(x_shape) != 4 or min(x_shape[1:]) < 1:
        raise type_check.InvalidType(
            'x.shape == (n, c, h, w) with c, h, w >= 1', f'x.shape == {x_shape}'
        )
    if shapes['rois'] != (R, 4):
        raise type_check.InvalidType(
            'rois.shape == (R, 4)', f'rois.shape == {shapes["rois"]}'
        )
    rule = f'for {R} boxes and outsize == {out_h, out_w}'
    check_shape('offset', shapes['offset'], (R, 2, out_h, out_w), rule)
    return x_shape[0], R


def _counts(xp, ratio: int | None, bins):
    """How many samples the bins of each box have along one axis: ``(R,)``, int64."""
    if ratio is not None:
        return xp.full(bins.shape, ratio, 'int64')
    # A box that is not finite reads at infinite or NaN points, one for each bin.
    counts = xp.where(xp.isfinite(bins), xp.ceil(bins), 1)
    return xp.clip(counts, 0, 2**31).astype('int64')


def _most(counts) -> int:
    """How many samples the bin with most samples has, and 1 if there are none."""
    product = counts[0] * counts[1]
    most = int(product.max()) if product.size else 1
    if most > 2**31 - 1:
        raise ValueError(
            f'rois have {most} samples in a bin with sampling_ratio None, '
            f'more than {2**31 - 1}: clip them to the image'
        )
    return max(1, most)
