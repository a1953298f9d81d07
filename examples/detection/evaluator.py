"""Average precision, as COCO defines it: how many detections are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

import chainer
from boxes import intersection_over_union
from chainer.training import extensions

#: The IoUs from which on a detection has found a digit; ``ap`` is the mean over them.
THRESHOLDS = numpy.linspace(0.5, 0.95, 10)
RECALLS = numpy.linspace(0, 1, 101)


class DetectionEvaluator(extensions.Evaluator):
    """Reports ``ap50`` and ``ap75``, at an IoU of 0.5 and 0.75, and ``ap``.

    All are those of the whole data set at once, and means over the classes.
    """

    def evaluate(self) -> dict[str, float]:
        """Returns what is reported; the model is in test mode already."""
        iterator, target = self.get_iterator('main'), self.get_target('main')
        iterator.reset()
        found, truth = [], []
        for batch in iterator:
            images = self.device.send(numpy.stack([image for image, *_ in batch]))
            with chainer.no_backprop_mode():
                found += target.predictor(images)
            truth += [(boxes, labels) for _, boxes, labels in batch]
        ap = average_precision(found, truth, THRESHOLDS)
        observation = {}
        with chainer.reporter.report_scope(observation):
            scores = {'ap50': ap[0], 'ap75': ap[5], 'ap': ap.mean()}
            chainer.report(scores, target)
        return observation


def average_precision(
    found: Sequence[tuple], truth: Sequence[tuple], thresholds: Sequence[float]
) -> numpy.ndarray:
    """Returns the mean over the classes of the average precision, at each threshold.

    In the order of their scores, each detection of a class takes, of the boxes of that
    class in its image that none before has taken, the one with the largest IoU, if that
    is at least the threshold. The precision at a recall is the largest that any number
    of the best detections has with at least that recall; it is averaged over the
    recalls 0, 0.01, ..., 1.

    Args:
        found: For each image, boxes ``(D, 4)``, classes ``(D,)`` and scores ``(D,)``.
        truth: For each image, boxes ``(G, 4)`` and classes ``(G,)``.
        thresholds: The IoUs from which on a detection is right.

    """
    classes = numpy.unique(numpy.concatenate([labels for _, labels in truth]))
    ap = []
    for c in classes:
        images = [
            (boxes[labels == c], scores[labels == c], true_boxes[true_labels == c])
            for (boxes, labels, scores), (true_boxes, true_labels) in zip(found, truth)
        ]
        ap.append(precision_of_class(images, thresholds))
    return numpy.mean(ap, axis=0)


def precision_of_class(
    images: Sequence[tuple], thresholds: Sequence[float]
) -> list[float]:
    """Returns the average precision of one class at each threshold.

    Args:
        images: For each image, the boxes and scores of its detections, and the true
            boxes.
        thresholds: The IoUs from which on a detection is right.

    """
    total = sum(len(true_boxes) for *_, true_boxes in images)
    order = numpy.argsort(
        -numpy.concatenate([scores for _, scores, _ in images]), kind='stable'
    )
    results = []
    for threshold in thresholds:
        right = numpy.concatenate([matches(*image, threshold) for image in images])
        hits = right[order].cumsum()
        precision = hits / numpy.arange(1, len(hits) + 1)
        # The largest from here on; nothing reaches a recall that is beyond the last.
        precision = numpy.maximum.accumulate(precision[::-1])[::-1]
        reached = numpy.searchsorted(hits / total, RECALLS)
        results.append(numpy.append(precision, 0)[reached].mean())
    return results


def matches(
    boxes: numpy.ndarray,
    scores: numpy.ndarray,
    true_boxes: numpy.ndarray,
    threshold: float,
) -> numpy.ndarray:
    """Returns which detections of a class in an image are right, as bools ``(D,)``."""
    right = numpy.zeros(len(boxes), bool)
    overlaps = intersection_over_union(boxes, true_boxes)
    for i in numpy.argsort(-scores, kind='stable'):
        j = overlaps[i].argmax() if len(true_boxes) else 0
        if len(true_boxes) and overlaps[i, j] >= threshold:
            right[i] = True
            overlaps[:, j] = -1  # taken
    return right
