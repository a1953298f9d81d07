"""Naive oracles: loops that read like the paper, import nothing from the package."""

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
    x, offset, W = x.astype(float), offset.astype(float), W.astype(float)
    y = numpy.zeros((n, out_c, out_h, out_w))
    gx, goffset, gW = (numpy.zeros_like(array) for array in (x, offset, W))
    gmask = numpy.zeros((n, offset_groups * kh * kw, out_h, out_w))

    for image, oy, ox, i, j, group in numpy.ndindex(
        n, out_h, out_w, kh, kw, offset_groups
    ):
        k = i * kw + j
        at_x = image, group * 2 * kh * kw + k, oy, ox
        at_y = image, group * 2 * kh * kw + kh * kw + k, oy, ox
        at_mask = image, group * kh * kw + k, oy, ox
        v = oy * sy - ph + i * dy + offset[at_y]
        u = ox * sx - pw + j * dx + offset[at_x]
        modulation = 1.0 if mask is None else float(mask[at_mask])
        slope_v = slope_u = slope_m = 0.0

        for channel in _block(c, offset_groups, group):
            pixels = x[image, channel]
            column = modulation * _bilinear(pixels, v, u)
            gcolumn = 0.0
            conv_group, ic = divmod(channel, group_c)
            for o in _block(out_c, groups, conv_group):
                y[image, o, oy, ox] += W[o, ic, i, j] * column
                if gy is not None:
                    gW[o, ic, i, j] += float(gy[image, o, oy, ox]) * column
                    gcolumn += float(gy[image, o, oy, ox]) * W[o, ic, i, j]
            slope_v += gcolumn * _bilinear(pixels, v, u, along_v=True)
            slope_u += gcolumn * _bilinear(pixels, v, u, along_u=True)
            slope_m += gcolumn * _bilinear(pixels, v, u)
            for row, row_weight, _ in _corners(v, u, h):
                for col, col_weight, _ in _corners(u, v, w):
                    gx[image, channel, row, col] += (
                        gcolumn * modulation * (row_weight * col_weight)
                    )
        goffset[at_y] = modulation * slope_v
        goffset[at_x] = modulation * slope_u
        gmask[at_mask] = slope_m

    if b is not None:
        y += b.astype(float)[:, None, None]
    if gy is None:
        return y
    gradients = {'x': gx, 'offset': goffset, 'W': gW}
    if mask is not None:
        gradients['mask'] = gmask
    if b is not None:
        gradients['b'] = gy.astype(float).sum((0, 2, 3))
    return y, gradients


@numpy.errstate(all='ignore')
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

    ``gg`` has an array for each argument by name, or none. The sum is that of ``gy``
    times how fast ``y`` changes as the arguments move along ``gg``, which is what the
    loops differentiate. Returns the gradients of ``gy`` and of all arguments but ``b``,
    by name and in float64.
    """
    (sy, sx), (ph, pw), (dy, dx) = _pair(stride), _pair(pad), _pair(dilate)
    n, c, h, w = x.shape
    out_c, group_c, kh, kw = W.shape
    out_h, out_w = offset.shape[2:]
    if mask is None:
        mask = numpy.ones((n, offset_groups * kh * kw, out_h, out_w))
        gg = {**gg, 'mask': numpy.zeros_like(mask)}
    arguments = {'gy': gy, 'x': x, 'offset': offset, 'mask': mask, 'W': W}
    arguments = {name: array.astype(float) for name, array in arguments.items()}
    gy, x, offset, mask, W = arguments.values()
    dot = {
        name: gg.get(name, numpy.zeros_like(array)).astype(float)
        for name, array in arguments.items()
    }
    g = {name: numpy.zeros_like(array) for name, array in arguments.items()}
    if 'b' in gg:
        g['gy'] += gg['b'].astype(float)[:, None, None]

    for image, oy, ox, i, j, group in numpy.ndindex(
        n, out_h, out_w, kh, kw, offset_groups
    ):
        k = i * kw + j
        at_x = image, group * 2 * kh * kw + k, oy, ox
        at_y = image, group * 2 * kh * kw + kh * kw + k, oy, ox
        at_mask = image, group * kh * kw + k, oy, ox
        v = oy * sy - ph + i * dy + offset[at_y]
        u = ox * sx - pw + j * dx + offset[at_x]
        m, m_dot = mask[at_mask], dot['mask'][at_mask]
        v_dot, u_dot = dot['offset'][at_y], dot['offset'][at_x]

        for channel in _block(c, offset_groups, group):
            pixels, pixels_dot = x[image, channel], dot['x'][image, channel]
            s, s_v, s_u, s_vu = _sample_and_slopes(pixels, v, u)
            t, t_v, t_u, _ = _sample_and_slopes(pixels_dot, v, u)
            column = m * s
            s_dot = t + s_v * v_dot + s_u * u_dot
            column_dot = m_dot * s + m * s_dot
            # The gradients of column_dot and of column.
            gcolumn_dot = gcolumn = 0.0
            conv_group, ic = divmod(channel, group_c)
            for o in _block(out_c, groups, conv_group):
                at_W, at_out = (o, ic, i, j), (image, o, oy, ox)
                g['gy'][at_out] += W[at_W] * column_dot + dot['W'][at_W] * column
                g['W'][at_W] += gy[at_out] * column_dot
                gcolumn_dot += gy[at_out] * W[at_W]
                gcolumn += gy[at_out] * dot['W'][at_W]
            g['mask'][at_mask] += gcolumn * s + gcolumn_dot * s_dot
            g['offset'][at_y] += gcolumn * m * s_v + gcolumn_dot * (
                m_dot * s_v + m * (t_v + s_vu * u_dot)
            )
            g['offset'][at_x] += gcolumn * m * s_u + gcolumn_dot * (
                m_dot * s_u + m * (t_u + s_vu * v_dot)
            )
            for row, row_weight, row_slope in _corners(v, u, h):
                for col, col_weight, col_slope in _corners(u, v, w):
                    weight = row_weight * col_weight
                    weight_dot = (
                        row_slope * col_weight * v_dot + row_weight * col_slope * u_dot
                    )
                    g['x'][image, channel, row, col] += gcolumn * m * weight
                    g['x'][image, channel, row, col] += gcolumn_dot * (
                        m_dot * weight + m * weight_dot
                    )
    return g


def _sample_and_slopes(pixels, v, u):
    """The image at row v, column u, its slopes along each axis and along both."""
    return [
        _bilinear(pixels, v, u, along_v, along_u)
        for along_v, along_u in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]


def _bilinear(pixels, v, u, along_v=False, along_u=False):
    """The image at row v, column u, zero outside, or its slope along one axis."""
    if math.isnan(v) or math.isnan(u):
        return math.nan
    h, w = pixels.shape
    value = 0.0
    for row, row_weight, row_slope in _corners(v, u, h):
        for col, col_weight, col_slope in _corners(u, v, w):
            value += pixels[row, col] * (
                (row_slope if along_v else row_weight)
                * (col_slope if along_u else col_weight)
            )
    return value


def _corners(v, other, size):
    """The pixels next to ``v`` on an axis: (index, weight, slope of the weight)."""
    if math.isnan(v) or math.isnan(other) or v <= -1 or v >= size:
        return []
    low = math.floor(v)
    pair = [(low, 1 - (v - low), -1.0), (low + 1, v - low, 1.0)]
    return [corner for corner in pair if 0 <= corner[0] < size]


def _block(channels, groups, group):
    """The channels of one group."""
    return range(channels // groups * group, channels // groups * (group + 1))


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)
