"""Deformable convolution without a filter: the core of DCNv3 and DCNv4."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy
from chainer.utils import type_check

from chainer_deform._checks import (
    argument_shapes,
    boolean,
    check_devices,
    check_shape,
    positive,
)
from chainer_deform._composed import composed
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d
from chainer_deform.geometry import Geometry


def dcn_v3_2d(
    x,
    offset,
    mask,
    ksize,
    stride=1,
    pad=0,
    dilate=1,
    *,
    offset_groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> chainer.Variable:
    """Deformable convolution without a filter, as in DCNv3 and DCNv4.

    Each output pixel is a weighted sum of what the taps of a kernel read, by bilinear
    interpolation. The channels are in groups; the taps of a group have offsets and
    weights of their own, and the same ones for each of its channels. Tap ``(i, j)`` at
    output ``(oy, ox)`` reads the image at row ``oy * sy - ph + cy + offset_scale *
    (i * dy - cy + offset_y)``, where ``cy = dy * (kh - 1) // 2`` is the row of the
    kernel's centre, and at the column that is made likewise. So ``offset_scale``
    stretches the kernel around its centre, offsets included. Pixels outside the image
    count as 0. A point at or beyond -1 or the image's side gives 0, and so does an
    infinite offset; a NaN offset makes its own output pixel NaN.

    Nothing is applied to ``mask``. DCNv3 takes a softmax over the taps before, DCNv4
    does not; apart from that they are the same.

    The output has the size ``out_h = (h + 2 * ph - dy * (kh - 1) - 1) // sy + 1``, and
    ``out_w`` likewise.

    Args:
        x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, c, h, w)``, float16, float32 or float64. ``n`` may be 0.
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets in pixels, before
            they are scaled, of shape ``(n, offset_groups * 2 * taps, out_h, out_w)``,
            where ``taps`` is ``kh * kw`` or, with ``remove_center``, one less: for each
            group first all horizontal ones, then all vertical ones, taps row by row.
            Any float dtype.
        mask (:class:`~chainer.Variable` or :ref:`ndarray`): Weights of shape
            ``(n, offset_groups * taps, out_h, out_w)``. Any float dtype.
        ksize (int or pair of ints): Size ``(kh, kw)`` of the kernel.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        pad (int or pair of ints): Zeros ``(ph, pw)`` around the image, in pixels.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels, before
            they are scaled.
        offset_groups (int): Number of groups of channels. It must divide ``c``.
        offset_scale (float): Factor of the kernel's size and of the offsets, above 0.
        remove_center (bool): Whether the tap in the centre is left out: it then has no
            offset and no weight. For odd square kernels larger than 1 only.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(n, c, out_h, out_w)`` and the dtype of
        ``x``. Coordinates and sums are computed in float32 or, if any input is float64,
        in float64.

    Raises:
        TypeError: An argument is no array, or an option has a wrong type.
        ValueError: An option is out of range, or an argument is on another device than
            ``x``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``x``, ``offset`` and ``mask``. On a lattice
    line, where the derivative jumps, that of the cell to the right or below is taken.
    Deterministic on the CPU, for a given number of threads. On a GPU the gradient of
    ``x`` may differ in its last bits from run to run, unless
    ``chainer.config.cudnn_deterministic`` is true.

    See `InternImage <https://arxiv.org/abs/2211.05778>`_ (Wang et al.) and `DCNv4
    <https://arxiv.org/abs/2401.06197>`_ (Xiong et al.). Their own programs have
    channels last, offsets as pairs and taps column by column.

    .. seealso:: :func:`~chainer_deform.functions.sampled_sum_2d`, which does the work.

    .. admonition:: Example

        >>> x = np.random.uniform(0, 1, (2, 6, 4, 7)).astype(np.float32)
        >>> offset = np.random.uniform(0, 1, (2, 36, 4, 7)).astype(np.float32)
        >>> mask = np.random.uniform(0, 1, (2, 18, 4, 7)).astype(np.float32)
        >>> y = dcn_v3_2d(x, offset, mask, ksize=3, pad=1, offset_groups=2)
        >>> y.shape
        (2, 6, 4, 7)

    """
    arguments = {'x': x, 'offset': offset, 'mask': mask}
    check_devices(arguments)
    geometry = Geometry(ksize, stride, pad, dilate, offset_groups=offset_groups)
    offset_scale = positive('offset_scale', offset_scale)
    _check_sizes(arguments, geometry, checked_taps(geometry, remove_center))
    return _compute(
        x,
        offset,
        mask,
        geometry=geometry,
        offset_scale=offset_scale,
        remove_center=bool(remove_center),
    )


@composed
def _compute(x, offset, mask, *, geometry, offset_scale, remove_center):
    """The function, once all is checked."""
    (n, c), (out_h, out_w) = x.shape[:2], mask.shape[2:]
    G, P = geometry.offset_groups, out_h * out_w
    taps = mask.shape[1] // G
    dtype = numpy.result_type('f', x.dtype, offset.dtype, mask.dtype)
    locations = points(offset, geometry, offset_scale, remove_center, dtype)
    # (n, G, xy, taps, P) -> (n, P, G, taps, yx)
    locations = F.flip(F.transpose(locations, (0, 4, 1, 3, 2)), 4)
    weights = F.transpose(F.reshape(mask, (n, G, taps, P)), (0, 3, 1, 2))
    y = sampled_sum_2d(
        x,
        F.reshape(locations, (n * P, G, taps, 2)),
        F.reshape(weights, (n * P, G, taps)),
    )
    y = F.transpose(F.reshape(y, (n, P, c)), (0, 2, 1))
    return F.reshape(y, (n, c, out_h, out_w))


def points(offset, geometry, offset_scale: float, remove_center: bool, dtype):
    """The points in pixels, ``(n, offset_groups, xy, taps, out_h * out_w)``."""
    n, _, out_h, out_w = offset.shape
    places = grid(geometry, out_h, out_w, offset_scale, remove_center, dtype)
    xp = chainer.backend.get_array_module(offset)
    shape = n, geometry.offset_groups, *places.shape
    with numpy.errstate(all='ignore'):  # an infinite point is outside
        moves = offset_scale * F.cast(F.reshape(offset, shape), dtype)
        return moves + xp.asarray(places)


def checked_taps(geometry, remove_center) -> int:
    """The number of taps; checks that there is a centre to remove."""
    if not boolean('remove_center', remove_center):
        return geometry.taps
    kernel = geometry.kh, geometry.kw
    if kernel[0] != kernel[1] or kernel[0] < 3 or kernel[0] % 2 == 0:
        raise ValueError(
            f'ksize must be square, odd and at least 3 with remove_center, not {kernel}'
        )
    return geometry.taps - 1


def _check_sizes(arguments, geometry, taps: int) -> None:
    """Checks shapes and dtypes."""
    shapes = argument_shapes(arguments)
    x_shape = shapes['x']
    if len(x_shape) != 4 or min(x_shape[1:]) < 1:
        raise type_check.InvalidType(
            'x.shape == (n, c, h, w) with c, h, w >= 1', f'x.shape == {x_shape}'
        )
    n, c, h, w = x_shape
    geometry.W_shape(c, c)  # whether the groups divide the channels
    out_h, out_w = geometry.out_size(h, w)
    if out_h < 1 or out_w < 1:
        raise type_check.InvalidType(
            'x.shape[2:] + 2 * pad >= dilate * (ksize - 1) + 1',
            f'x.shape == {x_shape} with ksize == {geometry.kh, geometry.kw}, '
            f'pad == {geometry.ph, geometry.pw} and '
            f'dilate == {geometry.dy, geometry.dx}',
        )
    channels = geometry.offset_groups * taps
    for name, shape, rule in (
        ('offset', (n, 2 * channels, out_h, out_w), '2 * taps * offset_groups'),
        ('mask', (n, channels, out_h, out_w), 'taps * offset_groups'),
    ):
        check_shape(name, shapes[name], shape, f'with {rule} channels')


def grid(geometry, out_h: int, out_w: int, scale: float, remove_center: bool, dtype):
    """Where the taps are without offsets: ``(xy, taps, out_h * out_w)``, in NumPy."""

    def places(k, step, pad, dilate, size):
        """Along one axis: ``(k, size)``."""
        centre = dilate * (k - 1) // 2
        taps = scale * (numpy.arange(k) * dilate - centre)
        return taps[:, None] + (numpy.arange(size) * step - pad + centre)

    g = geometry
    rows = places(g.kh, g.sy, g.ph, g.dy, out_h)[:, None, :, None]
    columns = places(g.kw, g.sx, g.pw, g.dx, out_w)[None, :, None, :]
    shape = g.kh, g.kw, out_h, out_w
    points = numpy.stack([numpy.broadcast_to(a, shape) for a in (columns, rows)])
    points = points.reshape(2, g.taps, out_h * out_w)
    if remove_center:
        points = numpy.delete(points, g.taps // 2, axis=1)
    return points.astype(dtype)
