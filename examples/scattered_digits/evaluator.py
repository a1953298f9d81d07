"""Intersection over union, from the confusion matrix of a whole data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer.backends import cuda
from chainer.training import extensions


class SegmentationEvaluator(extensions.Evaluator):
    """Reports ``iou/<class>`` for each class, and their mean, ``miou``.

    They are those of the whole data set at once, not means over batches or images.

    Args:
        iterator: Goes through the images and labels of the data set once.
        target: The link to report for, whose ``predictor`` gives the scores.
        classes: The names of the classes.
        device: The device to run on.

    """

    def __init__(
        self,
        iterator: chainer.dataset.Iterator,
        target: chainer.Link,
        classes: Sequence[str],
        device: chainer.backend.Device,
    ) -> None:
        super().__init__(iterator, target, device=device)
        self.classes = classes

    def evaluate(self) -> dict[str, float]:
        """Returns what is reported; the model is in test mode already."""
        iterator, target = self.get_iterator('main'), self.get_target('main')
        iterator.reset()
        confusion = 0
        for batch in iterator:
            x, t = self.converter(batch, self.device)
            with chainer.no_backprop_mode():
                y = target.predictor(x).array.argmax(axis=1)
            confusion += confusion_matrix(
                cuda.to_cpu(t), cuda.to_cpu(y), len(self.classes)
            )
        iou = intersection_over_union(confusion)
        observation = {}
        with chainer.reporter.report_scope(observation):
            scores = {f'iou/{name}': value for name, value in zip(self.classes, iou)}
            scores['miou'] = numpy.nanmean(iou)
            chainer.report(scores, target)
        return observation


def confusion_matrix(
    truth: numpy.ndarray, predicted: numpy.ndarray, classes: int
) -> numpy.ndarray:
    """Counts pixels: true classes downwards, predicted ones to the right."""
    pairs = truth.ravel().astype(numpy.int64) * classes + predicted.ravel()
    return numpy.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(confusion: numpy.ndarray) -> numpy.ndarray:
    """Returns the IoU of each class; of a class that is nowhere, not-a-number."""
    both = confusion.diagonal()
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return numpy.where(either > 0, both / numpy.maximum(either, 1), numpy.nan)
