"""The other operators made of what torch and torchvision have, as their authors do.

Functions have names, arguments and layouts of those of ``chainer_deform.functions``,
with tensors for arrays, and not all options. The tests use them, too.
"""

from __future__ import annotations

import torch
import torchvision
from torch.nn.functional import grid_sample


def dcn_v3_2d(
    x, offset, mask, ksize, stride=1, pad=0, dilate=1,
    offset_groups=1, offset_scale=1.0, remove_center=False,
):  # fmt: skip
    """One ``grid_sample`` of images of a group each, and a sum over the taps."""
    (n, c, h, w), (out_h, out_w), G = x.shape, mask.shape[2:], offset_groups
    taps, outputs = [], []  # along y, then along x
    for k, s, p, d, out in zip(
        *map(_pair, (ksize, stride, pad, dilate)), (out_h, out_w)
    ):
        centre = d * (k - 1) // 2
        taps.append(offset_scale * (torch.arange(k, dtype=x.dtype) * d - centre))
        outputs.append(torch.arange(out, dtype=x.dtype) * s - p + centre)
    taps, outputs = _places(*taps), _places(*outputs)
    if remove_center:
        centre = taps.shape[1] // 2
        taps = torch.cat([taps[:, :centre], taps[:, centre + 1 :]], 1)
    grid = taps[:, :, None] + outputs[:, None]  # (xy, taps, P)
    points = offset_scale * offset.reshape(n, G, *grid.shape) + grid
    # (n * G, P, taps, xy), from -1 to 1
    points = points.flatten(0, 1).permute(0, 3, 2, 1)
    points = (2 * points + 1) / torch.tensor([w, h]) - 1
    samples = grid_sample(x.reshape(n * G, c // G, h, w), points, align_corners=False)
    factors = mask.reshape(n * G, 1, -1, out_h * out_w).transpose(2, 3)
    return (samples * factors).sum(3).reshape(n, c, out_h, out_w)


def multi_scale_deformable_attention(value, shapes, locations, weights):
    """A ``grid_sample`` for each level, and a sum over levels and points."""
    n, _, heads, d = value.shape
    q = locations.shape[1]
    # (levels, n * heads, q, points, xy), from -1 to 1
    points = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    samples = []
    for (h, w), image, of_level in zip(
        shapes, value.split([h * w for h, w in shapes], 1), points
    ):
        image = image.flatten(2).transpose(1, 2).reshape(n * heads, d, h, w)
        samples.append(grid_sample(image, of_level, align_corners=False))
    # (n * heads, d, q, levels * points)
    samples = torch.stack(samples, 3).flatten(3)
    factors = weights.transpose(1, 2).reshape(n * heads, 1, q, -1)
    y = (samples * factors).sum(3)
    return y.reshape(n, heads * d, q).transpose(1, 2)


def deformable_roi_average_align_2d(
    x, rois, roi_indices, offset, outsize, spatial_scale, sampling_ratio, gamma=0.1
):
    """``roi_align`` with each bin as a box; it has no gradient for boxes."""
    R, (out_h, out_w) = len(rois), _pair(outsize)
    rois = rois.to(x.dtype)
    size = (rois[:, 2:] - rois[:, :2]).flip(1)  # (R, xy), as all below
    bins = size / torch.tensor([out_w, out_h])
    cells = _places(torch.arange(out_h), torch.arange(out_w)).T
    # (R, P, xy)
    low = rois[:, None, :2].flip(2) + cells * bins[:, None]
    low = low + gamma * size[:, None] * offset.detach().flatten(2).transpose(1, 2)
    numbers = roi_indices[:, None, None].expand(*low.shape[:2], 1).to(x.dtype)
    boxes = torch.cat([numbers, low, low + bins[:, None]], 2).flatten(0, 1)
    y = torchvision.ops.roi_align(
        x, boxes, 1, spatial_scale, sampling_ratio, aligned=True
    )
    return y.reshape(R, out_h, out_w, x.shape[1]).permute(0, 3, 1, 2)


def _places(rows, columns):
    """``(x, y)`` of all pairs of a row and a column, (2, rows * columns)."""
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x, y]).flatten(1)


def _pair(value) -> tuple:
    return tuple(value) if hasattr(value, '__len__') else (value, value)
