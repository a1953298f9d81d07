"""Naive oracles: loops that read like the paper, import nothing from the package.

They take complex arrays, too: real parts are compared and rounded down, imaginary ones
follow. So a complex step of the first order is the second order.
"""

import math

import numpy


@numpy.errstate(all='ignore')  # NaN and infinity are answers
def deformable_convolution_2d_sampler(
    x,
    offset,
    W,
    b=None,
    stride=1,
    pad=0,
    *,
    mask=None,
    dilate=1,
    groups=1,
    offset_groups=1,
    gy=None,
):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    (sy, sx), (ph, pw), (dy, dx) = _pair(stride), _pair(pad), _pair(dilate)
    n, c, h, w = x.shape
    out_c, group_c, kh, kw = W.shape
    out_h, out_w = offset.shape[2:]
    x, offset, W, b, mask, gy = _in_float64(x, offset, W, b, mask, gy)
    y = numpy.zeros((n, out_c, out_h, out_w), x.dtype)
    gx, goffset, gW = (numpy.zeros_like(array) for array in (x, offset, W))
    gmask = numpy.zeros((n, offset_groups * kh * kw, out_h, out_w), x.dtype)

    for image, oy, ox, i, j, group in numpy.ndindex(
        n, out_h, out_w, kh, kw, offset_groups
    ):
        k = i * kw + j
        at_x = image, group * 2 * kh * kw + k, oy, ox
        at_y = image, group * 2 * kh * kw + kh * kw + k, oy, ox
        at_mask = image, group * kh * kw + k, oy, ox
        v = oy * sy - ph + i * dy + offset[at_y]
        u = ox * sx - pw + j * dx + offset[at_x]
        modulation = 1.0 if mask is None else mask[at_mask]
        corners = _corners(v, u, h, w)
        if corners == []:  # its mask has no gradient, so nothing moves with it
            modulation = x.dtype.type(modulation.real)
        slope_v = slope_u = slope_m = 0.0

        for channel in _block(c, offset_groups, group):
            sample, along_v, along_u = _bilinear(x[image, channel], corners)
            column = modulation * sample
            gcolumn = 0.0
            conv_group, ic = divmod(channel, group_c)
            for o in _block(out_c, groups, conv_group):
                y[image, o, oy, ox] += W[o, ic, i, j] * column
                if gy is not None:
                    gW[o, ic, i, j] += gy[image, o, oy, ox] * column
                    gcolumn += gy[image, o, oy, ox] * W[o, ic, i, j]
            slope_v += gcolumn * along_v
            slope_u += gcolumn * along_u
            slope_m += gcolumn * sample
            for row, col, weight, _, _ in corners or ():
                gx[image, channel, row, col] += gcolumn * modulation * weight
        if corners != []:  # outside, nothing is passed, not even infinity
            goffset[at_y] = modulation * slope_v
            goffset[at_x] = modulation * slope_u
            gmask[at_mask] = slope_m

    if b is not None:
        y += b[:, None, None]
    if gy is None:
        return y
    gradients = {'x': gx, 'offset': goffset, 'W': gW}
    if mask is not None:
        gradients['mask'] = gmask
    if b is not None:
        gradients['b'] = gy.sum((0, 2, 3))
    return y, gradients


def deformable_convolution_2d_sampler_second_order(
    x,
    offset,
    W,
    b=None,
    stride=1,
    pad=0,
    *,
    mask=None,
    dilate=1,
    groups=1,
    offset_groups=1,
    gy,
    gg,
):
    """Gradients of the gradients: of the sum of ``gg[name] * gradient[name]``.

    ``gg`` has an array for each argument by name, or none. Returns the gradients of
    ``gy`` and of all arguments but ``b``, by name and in float64.
    """
    arguments = {'x': x, 'offset': offset, 'W': W, 'b': b, 'mask': mask, 'gy': gy}
    gradients = _derivative_along(
        gg,
        deformable_convolution_2d_sampler,
        {name: array for name, array in arguments.items() if array is not None},
        stride=stride,
        pad=pad,
        dilate=dilate,
        groups=groups,
        offset_groups=offset_groups,
    )
    gradients.pop('b', None)
    return gradients


@numpy.errstate(all='ignore')
def sampled_sum_2d(x, locations, weights, indices=None, *, border='zero', gy=None):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    n, c, h, w = x.shape
    q, groups, points, _ = locations.shape
    x, locations, weights, gy = _in_float64(x, locations, weights, gy)
    y = numpy.zeros((q, c), x.dtype)
    gx, glocations, gweights = map(numpy.zeros_like, (x, locations, weights))

    for at in numpy.ndindex(q, groups, points):
        position, group, _ = at
        image = position // (q // n) if indices is None else indices[position]
        v, u = locations[at]
        weight = weights[at]
        corners = _corners(v, u, h, w, border)
        if corners == []:  # its weight has no gradient, so nothing moves with it
            weight = x.dtype.type(weight.real)
        slope_v = slope_u = slope_w = 0.0

        for channel in _block(c, groups, group):
            sample, along_v, along_u = _bilinear(x[image, channel], corners)
            y[position, channel] += weight * sample
            if gy is not None:
                slope_v += gy[position, channel] * along_v
                slope_u += gy[position, channel] * along_u
                slope_w += gy[position, channel] * sample
                for row, col, share, _, _ in corners or ():
                    gx[image, channel, row, col] += (
                        gy[position, channel] * weight * share
                    )
        if corners != []:  # outside, nothing is passed, not even infinity
            gweights[at] = slope_w
            for axis, (place, size, slope) in enumerate(
                ((v, h, slope_v), (u, w, slope_u))
            ):
                if corners is None or not _is_held(place, size, border):
                    glocations[(*at, axis)] = weight * slope

    if gy is None:
        return y
    return y, {'x': gx, 'locations': glocations, 'weights': gweights}


def sampled_sum_2d_second_order(
    x, locations, weights, indices=None, *, border='zero', gy, gg
):
    """Gradients of the gradients: of the sum of ``gg[name] * gradient[name]``.

    ``gg`` has an array for each argument by name, or none. Returns the gradients of
    ``gy`` and of all arguments, by name and in float64.
    """
    arguments = {'x': x, 'locations': locations, 'weights': weights, 'gy': gy}
    return _derivative_along(
        gg, sampled_sum_2d, arguments, indices=indices, border=border
    )


@numpy.errstate(all='ignore')
def dcn_v3_2d(
    x,
    offset,
    mask,
    ksize,
    stride=1,
    pad=0,
    dilate=1,
    *,
    offset_groups=1,
    offset_scale=1.0,
    remove_center=False,
    gy=None,
):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    (kh, kw), (sy, sx), (ph, pw), (dy, dx) = map(_pair, (ksize, stride, pad, dilate))
    n, c = x.shape[:2]
    out_h, out_w = offset.shape[2:]
    x, offset, mask, gy = _in_float64(x, offset, mask, gy)
    y = numpy.zeros((n, c, out_h, out_w), x.dtype)
    gx, goffset, gmask = map(numpy.zeros_like, (x, offset, mask))
    taps = list(numpy.ndindex(kh, kw))
    if remove_center:
        taps.remove((kh // 2, kw // 2))
    centre_y, centre_x = dy * (kh - 1) // 2, dx * (kw - 1) // 2

    for image, group, oy, ox in numpy.ndindex(n, offset_groups, out_h, out_w):
        for k, (i, j) in enumerate(taps):
            at_x = image, group * 2 * len(taps) + k, oy, ox
            at_y = image, group * 2 * len(taps) + len(taps) + k, oy, ox
            at_mask = image, group * len(taps) + k, oy, ox
            v = oy * sy - ph + centre_y
            v += offset_scale * (i * dy - centre_y + offset[at_y])
            u = ox * sx - pw + centre_x
            u += offset_scale * (j * dx - centre_x + offset[at_x])
            for channel in _block(c, offset_groups, group):
                at = image, channel, oy, ox
                sample, slope_v, slope_u = _read(
                    x[image, channel],
                    (v, u, 'zero'),
                    gx[image, channel],
                    0.0 if gy is None else gy[at] * mask[at_mask],
                )
                y[at] += mask[at_mask] * sample
                if gy is not None:
                    gmask[at_mask] += gy[at] * sample
                    goffset[at_y] += gy[at] * mask[at_mask] * offset_scale * slope_v
                    goffset[at_x] += gy[at] * mask[at_mask] * offset_scale * slope_u
    if gy is None:
        return y
    return y, {'x': gx, 'offset': goffset, 'mask': gmask}


@numpy.errstate(all='ignore')
def multi_scale_deformable_attention(value, shapes, locations, weights, gy=None):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    n, _, heads, d = value.shape
    q, points = locations.shape[1], locations.shape[4]
    value, locations, weights, gy = _in_float64(value, locations, weights, gy)
    y = numpy.zeros((n, q, heads * d), value.dtype)
    gvalue, glocations, gweights = map(numpy.zeros_like, (value, locations, weights))

    for image, query, head, channel in numpy.ndindex(n, q, heads, d):
        at_y = image, query, head * d + channel
        start = 0
        for level, (h, w) in enumerate(shapes):
            pixels = image, slice(start, start + h * w), head, channel
            start += h * w
            for point in range(points):
                at = image, query, head, level, point
                x, y_ = locations[at]
                sample, slope_v, slope_u = _read(
                    value[pixels].reshape(h, w),
                    (y_ * h - 0.5, x * w - 0.5, 'zero'),
                    gvalue[pixels].reshape(h, w),
                    0.0 if gy is None else gy[at_y] * weights[at],
                )
                y[at_y] += weights[at] * sample
                if gy is not None:
                    gweights[at] += gy[at_y] * sample
                    glocations[at][0] += gy[at_y] * weights[at] * slope_u * w
                    glocations[at][1] += gy[at_y] * weights[at] * slope_v * h
    if gy is None:
        return y
    return y, {'value': gvalue, 'locations': glocations, 'weights': gweights}


@numpy.errstate(all='ignore')
def deformable_roi_average_align_2d(
    x,
    rois,
    roi_indices,
    offset,
    outsize,
    spatial_scale,
    sampling_ratio=None,
    *,
    gamma=0.1,
    aligned=True,
    gy=None,
):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    out_h, out_w = _pair(outsize)
    ratio_h, ratio_w = _pair(sampling_ratio)
    x, offset, gy = _in_float64(x, offset, gy)
    y = numpy.zeros((len(rois), x.shape[1], out_h, out_w), x.dtype)
    gx, goffset = map(numpy.zeros_like, (x, offset))

    for box, i, j in numpy.ndindex(len(rois), out_h, out_w):
        y_min, x_min, y_max, x_max = rois[box].astype(float) * spatial_scale
        height, width = y_max - y_min, x_max - x_min
        if aligned:
            y_min, x_min = y_min - 0.5, x_min - 0.5
        else:
            height, width = max(height, 1.0), max(width, 1.0)
        bin_h, bin_w = height / out_h, width / out_w
        n_h = math.ceil(bin_h) if ratio_h is None else ratio_h
        n_w = math.ceil(bin_w) if ratio_w is None else ratio_w
        moved_y = gamma * height * offset[box, 1, i, j]
        moved_x = gamma * width * offset[box, 0, i, j]
        for a, b, channel in numpy.ndindex(max(n_h, 0), max(n_w, 0), x.shape[1]):
            v = y_min + (i + (a + 0.5) / n_h) * bin_h + moved_y
            u = x_min + (j + (b + 0.5) / n_w) * bin_w + moved_x
            at, plane = (box, channel, i, j), (roi_indices[box], channel)
            share = 0.0 if gy is None else gy[at] / (n_h * n_w)
            sample, slope_v, slope_u = _read(
                x[plane], (v, u, 'clamp'), gx[plane], share
            )
            y[at] += sample / (n_h * n_w)
            goffset[box, 0, i, j] += share * slope_u * gamma * width
            goffset[box, 1, i, j] += share * slope_v * gamma * height
    if gy is None:
        return y
    return y, {'x': gx, 'offset': goffset}


@numpy.errstate(all='ignore')
def deformable_ps_roi_average_pooling_2d(
    x,
    rois,
    roi_indices,
    offset,
    outsize,
    spatial_scale,
    group_size,
    *,
    part_size=None,
    sampling_ratio=4,
    gamma=0.1,
    gy=None,
):
    """The output ``y`` and, given ``gy``, every gradient, by name and in float64."""
    out_h, out_w = _pair(outsize)
    part_h, part_w = _pair(outsize if part_size is None else part_size)
    n_h, n_w = _pair(sampling_ratio)
    x, offset, gy = _in_float64(x, offset, gy)
    out_c, (h, w) = x.shape[1] // group_size**2, x.shape[2:]
    y = numpy.zeros((len(rois), out_c, out_h, out_w), x.dtype)
    gx = numpy.zeros_like(x)
    goffset = None if offset is None else numpy.zeros_like(offset)

    for box, c, i, j in numpy.ndindex(y.shape):
        low_y, low_x, high_y, high_x = map(_half_away, rois[box].astype(float))
        y1, x1 = low_y * spatial_scale - 0.5, low_x * spatial_scale - 0.5
        height = max((high_y + 1) * spatial_scale - 0.5 - y1, 0.1)
        width = max((high_x + 1) * spatial_scale - 0.5 - x1, 0.1)
        moved_y = moved_x = x.dtype.type(0)
        if offset is not None:
            kind = c // (out_c // (offset.shape[1] // 2))
            part = i * part_h // out_h, j * part_w // out_w
            at_x, at_y = (box, 2 * kind, *part), (box, 2 * kind + 1, *part)
            moved_y = gamma * height * offset[at_y]
            moved_x = gamma * width * offset[at_x]
        points = []
        for a, b in numpy.ndindex(n_h, n_w):
            v = y1 + i * height / out_h + a * height / out_h / n_h + moved_y
            u = x1 + j * width / out_w + b * width / out_w / n_w + moved_x
            left_out = v.real < -0.5 or v.real > h - 0.5
            if not (left_out or u.real < -0.5 or u.real > w - 0.5):
                points.append((v, u, 'clamp'))
        row, column = i * group_size // out_h, j * group_size // out_w
        plane = roi_indices[box], (c * group_size + row) * group_size + column
        for point in points:
            share = 0.0 if gy is None else gy[box, c, i, j] / len(points)
            sample, slope_v, slope_u = _read(x[plane], point, gx[plane], share)
            y[box, c, i, j] += sample / len(points)
            if offset is not None:
                goffset[at_x] += share * slope_u * gamma * width
                goffset[at_y] += share * slope_v * gamma * height
    if gy is None:
        return y
    return y, {'x': gx} if offset is None else {'x': gx, 'offset': goffset}


def second_order(function, arguments, gg, **options):
    """Gradients of the gradients of one of these functions.

    They are those of the sum of ``gg[name] * gradient[name]``, by name and in float64,
    for ``arguments``, which have ``gy`` among them.
    """
    return _derivative_along(gg, function, arguments, **options)


@numpy.errstate(all='ignore')
def _derivative_along(gg, function, arguments, **options):
    """The derivative of ``y`` and of all gradients as the arguments move along ``gg``.

    That of ``y`` is called ``gy``: as second derivatives are symmetric, these are the
    gradients of the sum of ``gg[name] * gradient[name]``.
    """
    step = 1e-100  # its square is nothing beside 1, so no digit is lost
    moved = {name: array.astype(complex) for name, array in arguments.items()}
    for name, direction in gg.items():
        # Times 1j, an infinite direction would spoil the real part.
        moved[name].imag = step * direction.astype(float)
    y, gradients = function(**moved, **options)
    return {name: a.imag / step for name, a in {'gy': y, **gradients}.items()}


def _in_float64(*arrays):
    """The arrays in float64 or, if one is complex, in complex128; None stays None."""
    dtype = numpy.result_type(float, *(a.dtype for a in arrays if a is not None))
    return [None if array is None else array.astype(dtype) for array in arrays]


def _read(pixels, point, gpixels, gy):
    """The image at a point ``(v, u, border)`` and its slopes along v and along u.

    ``gy`` is the gradient of what is read; that of the pixels is added to ``gpixels``.
    """
    v, u, border = point
    corners = _corners(v, u, *pixels.shape, border)
    for row, col, weight, _, _ in corners or ():
        gpixels[row, col] += gy * weight
    return _bilinear(pixels, corners)


def _half_away(value):
    """Rounded to a whole number, halves away from zero."""
    return math.copysign(math.floor(abs(value) + 0.5), value)


def _bilinear(pixels, corners):
    """The image at a point and its slopes along v and along u."""
    if corners is None:
        return math.nan, math.nan, math.nan
    value = along_v = along_u = 0.0
    for row, col, weight, slope_v, slope_u in corners:
        value += pixels[row, col] * weight
        along_v += pixels[row, col] * slope_v
        along_u += pixels[row, col] * slope_u
    return value, along_v, along_u


def _corners(v, u, h, w, border='zero'):
    """The pixels around row v, column u: (row, col, weight, slopes along v and u).

    A point outside has none, a NaN one has None.
    """
    if math.isnan(v.real) or math.isnan(u.real):
        return None
    axis = {'zero': _zero_axis, 'clamp': _clamp_axis}[border]
    return [
        (row, col, at_v * at_u, slope_v * at_u, at_v * slope_u)
        for row, at_v, slope_v in axis(v, h)
        for col, at_u, slope_u in axis(u, w)
    ]


def _zero_axis(v, size):
    """The pixels next to ``v`` on an axis: (index, weight, slope of the weight)."""
    if v.real <= -1 or v.real >= size:
        return []
    low = math.floor(v.real)
    pair = [(low, 1 - (v - low), -1.0), (low + 1, v - low, 1.0)]
    return [corner for corner in pair if 0 <= corner[0] < size]


def _clamp_axis(v, size):
    """The same where points up to a pixel outside read the border."""
    if v.real < -1 or v.real > size:
        return []
    if v.real < 0:
        return [(0, 1.0, 0.0)]
    if v.real >= size - 1:
        return [(size - 1, 1.0, 0.0)]
    return _zero_axis(v, size)


def _is_held(v, size, border):
    """Whether a clamped border keeps the sample from changing with a coordinate."""
    return border == 'clamp' and (v.real < 0 or v.real >= size - 1)


def _block(channels, groups, group):
    """The channels of one group."""
    return range(channels // groups * group, channels // groups * (group + 1))


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)
