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
