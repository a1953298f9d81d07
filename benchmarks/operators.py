"""Cases of the operators beside the convolution, for ``run.py``."""

from __future__ import annotations

from typing import NamedTuple

import numpy


class OperatorCase(NamedTuple):
    """A function of this package, and the contestant whose results it has to have."""

    operator: str
    peer: str
    options: dict
    sizes: dict

    def random_arrays(self) -> dict:
        """Arguments by name, and the gradient of the output.

        Where a point decides which pixels it reads, it is exact in float32 or far from
        where that changes.
        """
        make = _ARRAYS[self.operator]
        arrays = make(numpy.random.RandomState(0), self.options, **self.sizes)
        return {
            name: array.astype('int32' if name == 'roi_indices' else 'float32')
            for name, array in arrays.items()
        }


def _dcn_v3(random, options, n, c, side) -> dict:
    taps = options['offset_groups'] * options['ksize'] ** 2
    return {
        'x': random.standard_normal((n, c, side, side)),
        'offset': _odd_parts(random, (n, 2 * taps, side, side), deviation=2),
        'mask': random.uniform(0, 1, (n, taps, side, side)),
        'gy': random.standard_normal((n, c, side, side)),
    }


def _attention(random, options, q, heads, d, points) -> dict:
    """Queries anywhere, whose points are near the same place on all levels."""
    shapes = options['shapes']
    at = 1, q, heads, len(shapes), points
    sides = numpy.array([(w, h) for h, w in shapes]).reshape(-1, 1, 2)
    pixels = numpy.floor(random.uniform(0, 1, (1, q, 1, 1, 1, 2)) * sides)
    pixels = pixels + _odd_parts(random, (*at, 2), deviation=2)
    return {
        'value': random.standard_normal((1, sum(h * w for h, w in shapes), heads, d)),
        'locations': (pixels + 0.5) / sides,
        'weights': random.uniform(0, 1, at),
        'gy': random.standard_normal((1, q, heads * d)),
    }


def _roi_align(random, options, boxes, c) -> dict:
    return {
        'x': random.standard_normal((1, c, *MAP)),
        'offset': _odd_parts(random, (boxes, 2, BINS, BINS), deviation=1),
        'gy': random.standard_normal((boxes, c, BINS, BINS)),
        'rois': _boxes(random, boxes),
        'roi_indices': numpy.zeros(boxes),
    }


def _ps_roi(random, options, boxes, out_c, classes) -> dict:
    # The last pixel belongs to a box, for this operator.
    rois = _boxes(random, boxes) - [0, 0, 1, 1]
    return {
        'x': random.standard_normal((1, out_c * BINS**2, *MAP)),
        'offset': _odd_parts(random, (boxes, 2 * classes, BINS, BINS), deviation=1),
        'gy': random.standard_normal((boxes, out_c, BINS, BINS)),
        'rois': rois,
        'roi_indices': numpy.zeros(boxes),
    }


def _odd_parts(random, shape, deviation: float):
    """Normally distributed, in odd 128ths: never a whole number."""
    return (numpy.floor(64 * deviation * random.standard_normal(shape)) + 0.5) / 64


def _boxes(random, count: int):
    """Boxes in the map, whose bins are whole pixels."""
    size = BINS * random.randint(1, min(MAP) // BINS, (count, 2))
    low = numpy.floor(random.uniform(0, 1, (count, 2)) * (MAP - size + 1))
    return numpy.concatenate([low, low + size], 1) / SCALE


MAP, BINS, SCALE = (50, 68), 7, 1 / 16
_ARRAYS = {
    'dcn_v3_2d': _dcn_v3,
    'multi_scale_deformable_attention': _attention,
    'deformable_roi_average_align_2d': _roi_align,
    'deformable_ps_roi_average_pooling_2d': _ps_roi,
}
# As in the third stage of InternImage-T.
_DCN_V3 = 'dcn_v3_2d', 'torchvision', {'ksize': 3, 'pad': 1, 'offset_groups': 16}
# As in Deformable DETR: in its encoder each pixel of each level is a query.
_ATTENTION = (
    'multi_scale_deformable_attention',
    'torchvision',
    {'shapes': [MAP, (25, 34), (13, 17), (7, 9)]},
)
_ROI = {'outsize': BINS, 'spatial_scale': SCALE, 'gamma': 1 / 8}
_ROI_ALIGN = (
    'deformable_roi_average_align_2d',
    'torchvision',
    {**_ROI, 'sampling_ratio': 2},
)
_PS_ROI = (
    'deformable_ps_roi_average_pooling_2d',
    'OpenVINO',
    {**_ROI, 'sampling_ratio': 4, 'group_size': BINS},
)
CASES = {
    name: OperatorCase(*operator, sizes)
    for name, operator, sizes in [
        ('DCNv3, 1x256x14', _DCN_V3, {'n': 1, 'c': 256, 'side': 14}),
        ('DCNv3, 2x256x28', _DCN_V3, {'n': 2, 'c': 256, 'side': 28}),
        ('encoder', _ATTENTION, {'q': 4534, 'heads': 8, 'd': 32, 'points': 4}),
        ('decoder', _ATTENTION, {'q': 300, 'heads': 8, 'd': 32, 'points': 4}),
        ('RoI align, 128 boxes', _ROI_ALIGN, {'boxes': 128, 'c': 256}),
        ('RoI align, 300 boxes', _ROI_ALIGN, {'boxes': 300, 'c': 256}),
        ('PS RoI, 1 class', _PS_ROI, {'boxes': 128, 'out_c': 21, 'classes': 1}),
        ('PS RoI, 21 classes', _PS_ROI, {'boxes': 300, 'out_c': 21, 'classes': 21}),
    ]
}
# The quick trial has one of each peer.
QUICK_CASES = {
    name: OperatorCase(*operator, sizes)
    for name, operator, sizes in [
        ('tiny attention', _ATTENTION, {'q': 2, 'heads': 2, 'd': 3, 'points': 1}),
        ('tiny PS RoI', _PS_ROI, {'boxes': 2, 'out_c': 1, 'classes': 1}),
    ]
}
