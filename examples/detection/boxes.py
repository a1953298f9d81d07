"""Boxes ``(y_min, x_min, y_max, x_max)``: overlaps, corrections and suppression.

Coordinates are pixels; the image's first pixel reaches from 0 to 1.
"""

from __future__ import annotations

import numpy

#: Corrections are in these units: about as far as a good box is off.
UNITS = numpy.array([0.1, 0.1, 0.2, 0.2], numpy.float32)


def intersection_over_union(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Returns the IoU ``(A, B)`` of each of boxes ``a (A, 4)`` and ``b (B, 4)``."""
    low = numpy.maximum(a[:, None, :2], b[:, :2])
    high = numpy.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both)


def encode(boxes: numpy.ndarray, targets: numpy.ndarray) -> numpy.ndarray:
    """Returns the corrections ``(N, 4)`` that make ``targets`` of ``boxes``.

    They are how far the centre moves, in sizes of the box, and the logarithm of the
    factor of its size; see :data:`UNITS`.
    """
    size, new_size = (b[:, 2:] - b[:, :2] for b in (boxes, targets))
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    corrections = numpy.hstack([shift / size, numpy.log(new_size / size)])
    return (corrections / UNITS).astype(numpy.float32)


def decode(
    boxes: numpy.ndarray, corrections: numpy.ndarray, limit: float
) -> numpy.ndarray:
    """Returns the corrected boxes ``(N, 4)``, clipped to 0 ... ``limit``.

    All are at least one pixel high and wide.
    """
    corrections = corrections * UNITS
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + corrections[:, :2] * size
    half = size * numpy.exp(corrections[:, 2:].clip(-3, 3)) / 2
    low = (centre - half).clip(0, limit - 1)
    high = numpy.maximum((centre + half).clip(0, limit), low + 1)
    return numpy.hstack([low, high])


def suppress(boxes: numpy.ndarray, scores: numpy.ndarray, most: float) -> numpy.ndarray:
    """Non-maximum suppression: of boxes that overlap, only the best is kept.

    Args:
        boxes: Boxes ``(N, 4)``.
        scores: How good each is, ``(N,)``.
        most: The IoU with a better box that was kept, above which one is left out.

    Returns:
        The indices of the boxes that are kept, the best first.

    """
    left = numpy.argsort(-scores, kind='stable')
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = intersection_over_union(boxes[best, None], boxes[left])[0]
        left = left[overlap <= most]
    return numpy.array(kept, numpy.int64)
