"""Where a deformable convolution reads its image."""

from __future__ import annotations

from collections.abc import Sequence

import chainer
import numpy
from chainer import backend
from chainer.utils import type_check

from chainer_deform._checks import float_array, integer, positive
from chainer_deform.functions.dcn_v3_2d import checked_taps, grid
from chainer_deform.geometry import Geometry


def sampling_locations(
    offset,
    ksize,
    stride=1,
    pad=0,
    dilate=1,
    offset_groups: int = 1,
    *,
    offset_scale: float = 1.0,
    remove_center: bool = False,
):
    """The sampling points of a deformable convolution, in pixels of its input.

    Tap ``(i, j)`` of the kernel at output ``(oy, ox)`` reads the image at row ``oy * sy
    - ph + i * dy + offset_y`` and column ``ox * sx - pw + j * dx + offset_x``. With
    zero offsets these are the points of a plain convolution. The points of
    :func:`~chainer_deform.functions.dcn_v3_2d` are made with its other two options.

    Args:
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets in pixels, of
            shape ``(n, offset_groups * 2 * kh * kw, out_h, out_w)``, as for the
            function: for each offset group first the ``kh * kw`` horizontal ones, then
            the ``kh * kw`` vertical ones. Any float dtype. ``n`` may be 0.
        ksize (int or pair of ints): Size ``(kh, kw)`` of the kernel.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        pad (int or pair of ints): Zeros ``(ph, pw)`` around the image, in pixels.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels.
        offset_groups (int): Number of groups of input channels with offsets of their
            own.
        offset_scale (float): Factor of the offsets, and of the kernel's size around its
            centre, above 0.
        remove_center (bool): Whether there is no tap in the centre, for odd square
            kernels larger than 1: one less than ``kh * kw`` then.

    Returns:
        :ref:`ndarray`: Points of shape ``(n, offset_groups, kh * kw, 2, out_h,
        out_w)``; axis 3 is ``(y, x)``. Where ``offset`` lies, and of its dtype, but
        float32 for float16. An infinite or NaN offset gives an infinite or NaN point.

    Raises:
        TypeError: ``offset`` is no array, or an option is not made of ints.
        ValueError: An option is out of range.
        chainer.utils.type_check.InvalidType: The shape or dtype of ``offset`` does not
            fit.

    Not differentiable; deterministic.

    .. seealso:: :func:`chainer_deform.receptive_points`,
        :func:`chainer_deform.visualize.plot_sampling_points`

    .. admonition:: Example

        >>> offset = np.zeros((1, 2 * 3 * 3, 5, 7), np.float32)
        >>> offset[:, 9:] = 0.5  # all points half a pixel down
        >>> points = chainer_deform.sampling_locations(offset, 3, pad=1)
        >>> points.shape
        (1, 1, 9, 2, 5, 7)
        >>> points[0, 0, 0, :, 2, 4]  # of the first tap at output (2, 4)
        array([1.5, 3. ], dtype=float32)

    """
    geometry = Geometry(ksize, stride, pad, dilate, offset_groups=offset_groups)
    offset = float_array('offset', offset)
    offset_scale = positive('offset_scale', offset_scale)
    taps = checked_taps(geometry, remove_center)
    channels = 2 * geometry.offset_groups * taps
    if offset.ndim != 4 or offset.shape[1] != channels:
        raise type_check.InvalidType(
            f'offset.shape == (n, {channels}, out_h, out_w) for '
            f'ksize == {geometry.kh, geometry.kw} and '
            f'offset_groups == {geometry.offset_groups}',
            f'offset.shape == {offset.shape}',
        )
    xp = backend.get_array_module(offset)
    n, _, out_h, out_w = offset.shape
    dtype = numpy.promote_types(offset.dtype, numpy.float32)
    # (n, offset group, x or y, tap, out_h, out_w)
    offset = offset.reshape(n, geometry.offset_groups, 2, taps, out_h, out_w)
    with chainer.using_device(backend.get_device_from_array(offset)):
        points = xp.empty((n, geometry.offset_groups, taps, 2, out_h, out_w), dtype)
        places = grid(geometry, out_h, out_w, offset_scale, remove_center, dtype)
        places = xp.asarray(places.reshape(2, taps, out_h, out_w))
        for axis in (0, 1):
            moves, out = offset[:, :, 1 - axis], points[:, :, :, axis]
            if offset_scale != 1:
                with numpy.errstate(over='ignore'):  # an infinite point
                    moves = xp.multiply(moves, offset_scale, dtype=dtype)
            xp.add(moves, places[1 - axis], out=out, dtype=dtype)
    return points


def receptive_points(layers: Sequence, y: int, x: int, image: int = 0):
    """The points of the first layer's input that an output pixel of the last reads.

    Starts at output pixel ``(y, x)`` of the last layer and goes down: each sampling
    point of a layer stands for the nearest output pixel of the layer below (of two, the
    one below or to the right), whose sampling points come next. Three layers of 3 x 3
    kernels give 9 * 9 * 9 = 729 points, as in the figures of the paper. A point that
    reads zeros, as it lies at or beyond -1 or the side of the output below, reaches
    nothing and is left out, and so is one that is not finite; a point that more than
    one path leads to is there as many times.

    Each layer has to read the output of the one before, or something of the same size
    such as its ReLU. What lies between them and has windows of its own, such as a
    pooling or a plain convolution, is a layer, too.

    Args:
        layers (sequence): The layers, the first one first. Each is one of

            - a call that a :class:`~chainer_deform.link_hooks.SamplingHook` recorded;
            - sampling points of one image, of shape ``(offset_groups, kh * kw, 2,
              out_h, out_w)``, as ``sampling_locations(...)[i]``, of any float dtype;
            - a tuple ``(ksize, stride, pad)`` or ``(ksize, stride, pad, dilate)``, of a
              pooling or a plain convolution.
        y (int): Row of the output pixel.
        x (int): Column of the output pixel.
        image (int): Which image of the calls.

    Returns:
        :ref:`ndarray`: Points ``(y, x)`` in pixels of the first layer's input, of shape
        ``(points, 2)``: as many as the product of the layers' ``offset_groups * kh *
        kw``, less those left out. They may lie outside the image.

    Raises:
        TypeError: A layer is none of these, or ``y``, ``x`` or ``image`` is no int.
        ValueError: There is no layer, a layer does not give what the next one reads,
            or the last has no output pixel ``(y, x)``. Of points that are given as an
            array, it is not known what size they read.
        chainer.utils.type_check.InvalidType: The shape or dtype of a layer does not
            fit.

    .. seealso:: :func:`chainer_deform.sampling_locations`

    .. admonition:: Example

        >>> offset = np.zeros((1, 2 * 3 * 3, 14, 14), np.float32)
        >>> points = chainer_deform.sampling_locations(offset, 3, pad=1)[0]
        >>> [len(chainer_deform.receptive_points([points] * count, 7, 7))
        ...  for count in (1, 2, 3)]
        [9, 81, 729]

        Through a pooling of a network:

        >>> L, F = chainer.links, chainer.functions
        >>> model = chainer.Sequential(
        ...     chainer_deform.links.DeformableConvolution2D(1, 4, 3, pad=1),
        ...     lambda h: F.max_pooling_2d(h, 2),
        ...     chainer_deform.links.DeformableConvolution2D(4, 4, 3, pad=1),
        ... )
        >>> with chainer_deform.link_hooks.SamplingHook(model) as hook:
        ...     y = model(np.zeros((1, 1, 20, 28), np.float32))
        >>> below, above = hook.calls
        >>> pooling = 2, 2, 0
        >>> len(chainer_deform.receptive_points([below, pooling, above], 5, 7))
        324

    """
    layers = list(layers)
    if not layers:
        raise ValueError('layers must have at least one layer')
    layers = _with_points(layers, integer('image', image, minimum=0))
    for i, layer in enumerate(layers):
        if layer.ndim != 5 or layer.shape[2] != 2:
            raise type_check.InvalidType(
                f'layers[{i}].shape == (offset_groups, kh * kw, 2, out_h, out_w)',
                f'layers[{i}].shape == {layer.shape}',
            )
    y, x = integer('y', y, minimum=0), integer('x', x, minimum=0)
    out_h, out_w = layers[-1].shape[3:]
    if y >= out_h or x >= out_w:
        raise ValueError(
            f'y and x must be inside the output of the last layer, {out_h} by {out_w} '
            f'pixels, but are {y} and {x}'
        )
    with chainer.using_device(backend.get_device_from_array(layers[-1])):
        return _trace(layers, y, x)


def _with_points(layers: list, image: int) -> list:
    """The sampling points of each layer, once it is checked that they fit."""
    found: list = []
    for i, layer in enumerate(layers):
        name = f'layers[{i}]'
        given = found[-1].shape[-2:] if found else None
        if isinstance(layer, tuple):
            geometry = Geometry(*layer)
            above = [*layers, None][i + 1]
            sizes = [above.x_shape[2:]] if hasattr(above, 'x_shape') else []
            if given is not None:
                least = geometry.out_size(*given)
                # With cover_all there is one more.
                if sizes and not all(0 <= a - b <= 1 for a, b in zip(sizes[0], least)):
                    raise ValueError(_misfit(i + 1, sizes[0], least))
                sizes.append(least)
            if not sizes:
                raise ValueError(f'the size that {name} gives cannot be known')
            height, width = sizes[0]
            points = grid(geometry, height, width, 1, False, numpy.float32)
            points = points[::-1].swapaxes(0, 1).reshape(1, -1, 2, height, width)
        elif hasattr(layer, 'rois'):
            raise TypeError(f'{name} must be a call of a convolution, not {layer!r}')
        elif hasattr(layer, 'x_shape'):
            if given is not None and given != layer.x_shape[2:]:
                raise ValueError(_misfit(i, layer.x_shape[2:], given))
            if image >= layer.x_shape[0]:
                raise ValueError(
                    f'image must be below {layer.x_shape[0]}, the number of images of '
                    f'{name}, but is {image}'
                )
            points = layer.locations()[image]
        else:
            points = float_array(name, layer)
        found.append(points)
    device = backend.get_device_from_array(found[-1])
    return [device.send(points) for points in found]


def _misfit(i: int, reads: tuple, given: tuple) -> str:
    return (
        f'layers[{i}] reads {reads[0]} by {reads[1]} pixels, but layers[{i - 1}] gives '
        f'{given[0]} by {given[1]}; what lies between them is a layer, too, such as '
        '(ksize, stride, pad) of a pooling'
    )


def _trace(layers: list, y: int, x: int):
    """The work of :func:`receptive_points`, once all is checked."""
    xp = backend.get_array_module(layers[-1])
    points = xp.array([[y, x]], float)
    for layer in reversed(layers):
        size = layer.shape[3:]
        points = points[~outside(points, size, axis=1)]
        # The nearest pixel of the output: a point may lie less than 1 beside it.
        last = xp.array(size) - 1
        rows, columns = xp.clip(xp.floor(points + 0.5).astype(numpy.int64), 0, last).T
        # (offset_groups, taps, 2, points) -> (points, offset_groups, taps, 2)
        points = layer[:, :, :, rows, columns].transpose(3, 0, 1, 2).reshape(-1, 2)
        points = points[xp.isfinite(points).all(axis=1)]
    return points


def outside(points, size: tuple[int, int], axis: int):
    """Which points read nothing but zeros of an image of ``size`` pixels; no NaN.

    Args:
        points: Points with ``(y, x)`` along ``axis``.
        size: Height and width.
        axis: An axis, not counted from the end.

    Returns:
        Array of bools, without ``axis``.

    """
    before = (slice(None),) * axis
    v, u = points[(*before, 0)], points[(*before, 1)]
    h, w = size
    return (v <= -1) | (v >= h) | (u <= -1) | (u >= w)
