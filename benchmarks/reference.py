"""What the contestants have to agree with: sparse matrices in float64.

Independent of all of them. It has no rule for points on lattice lines or exactly at the
border: the benchmark has none.
"""

from __future__ import annotations

import numpy
from scipy import sparse


def deformable_convolution(
    x, offset, W, b, mask=None, gy=None, *, groups: int = 1, offset_groups: int = 1
) -> dict:
    """``y`` and, given ``gy``, all gradients by name; stride 1, size as before."""
    n, c, h, w = x.shape
    out_c, _, kh, kw = W.shape
    taps, points = kh * kw, n * h * w
    modulated = mask is not None
    if not modulated:
        mask = numpy.ones((n, offset_groups * taps, h, w))
    # (og, points, c / og)
    image = x.transpose(0, 2, 3, 1).reshape(points, offset_groups, -1).swapaxes(0, 1)
    image = image.astype(float)
    # (n, og, axis, taps, h * w) -> (og, axis, taps, points)
    offset = offset.reshape(n, offset_groups, 2, taps, h * w).astype(float)
    offset = offset.transpose(1, 2, 3, 0, 4).reshape(offset_groups, 2, taps, points)
    mask = mask.reshape(n, offset_groups, taps, h * w).astype(float)
    mask = mask.transpose(1, 2, 0, 3).reshape(offset_groups, taps, points)
    # (G, oCg, iCg, taps)
    filters = W.reshape(groups, out_c // groups, -1, taps).astype(float)
    y = numpy.zeros((groups, points, out_c // groups))
    if gy is not None:
        gb = gy.sum((0, 2, 3), float)
        # (G, points, oCg)
        gy = gy.transpose(0, 2, 3, 1).reshape(points, groups, -1).swapaxes(0, 1)
        gy = gy.astype(float)
        gimage, goffset, gmask, gfilters = (
            numpy.zeros_like(array) for array in (image, offset, mask, filters)
        )

    _, oy, ox = numpy.unravel_index(numpy.arange(points), (n, h, w))
    for k in range(taps):
        i, j = divmod(k, kw)
        samplers = [
            _samplers(
                oy - kh // 2 + i + offset[g, 1, k],
                ox - kw // 2 + j + offset[g, 0, k],
                (n, h, w),
            )
            for g in range(offset_groups)
        ]
        # (og, points, c / og)
        samples = numpy.stack([samplers[g][0] @ image[g] for g in range(offset_groups)])
        columns = _regroup(mask[:, k, :, None] * samples, groups)
        y += columns @ filters[..., k].swapaxes(1, 2)
        if gy is None:
            continue
        gfilters[..., k] = gy.swapaxes(1, 2) @ columns
        gcolumns = _regroup(gy @ filters[..., k], offset_groups)
        gmask[:, k] = (gcolumns * samples).sum(2)
        gcolumns *= mask[:, k, :, None]
        for g, (sampler, along_y, along_x) in enumerate(samplers):
            gimage[g] += sampler.T @ gcolumns[g]
            goffset[g, 1, k] = (gcolumns[g] * (along_y @ image[g])).sum(1)
            goffset[g, 0, k] = (gcolumns[g] * (along_x @ image[g])).sum(1)

    results = {'y': _to_image(y, (n, h, w)) + b.reshape(-1, 1, 1)}
    if gy is not None:
        results['gx'] = _to_image(gimage, (n, h, w))
        # (og, axis, taps, n, h, w) -> (n, og, axis, taps, h, w)
        goffset = goffset.reshape(offset_groups, 2, taps, n, h, w)
        results['goffset'] = goffset.transpose(3, 0, 1, 2, 4, 5).reshape(n, -1, h, w)
        results['gW'] = gfilters.reshape(W.shape)
        results['gb'] = gb
        if modulated:
            gmask = gmask.reshape(offset_groups, taps, n, h, w)
            results['gmask'] = gmask.transpose(2, 0, 1, 3, 4).reshape(n, -1, h, w)
    return results


def _samplers(v, u, shape):
    """The bilinear sampler at rows ``v``, columns ``u``; its slopes along v and u."""
    n, h, w = shape
    first_row = numpy.arange(len(v)) // (h * w) * h
    entries = []
    for a in 0, 1:
        for b in 0, 1:
            row, col = numpy.floor(v) + a, numpy.floor(u) + b
            row_weight, col_weight = 1 - abs(v - row), 1 - abs(u - col)
            weights = row_weight * col_weight, (2 * a - 1) * col_weight
            weights += ((2 * b - 1) * row_weight,)
            (point,) = numpy.nonzero((row >= 0) & (row < h) & (col >= 0) & (col < w))
            pixel = (first_row + row)[point] * w + col[point]
            entries.append((point, pixel, [weight[point] for weight in weights]))
    points, pixels, weights = zip(*entries)
    rows_cols = numpy.concatenate(points), numpy.concatenate(pixels).astype(int)
    return [
        sparse.csr_matrix((numpy.concatenate(weight), rows_cols), (len(v), n * h * w))
        for weight in zip(*weights)
    ]


def _regroup(array, groups):
    """Channels in other groups: (any, points, any) to (groups, points, c / groups)."""
    points = array.shape[1]
    return array.swapaxes(0, 1).reshape(points, groups, -1).swapaxes(0, 1)


def _to_image(array, shape):
    """(groups, points, c / groups) -> (n, c, h, w)."""
    return array.swapaxes(0, 1).reshape(*shape, -1).transpose(0, 3, 1, 2)
