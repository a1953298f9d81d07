"""The four detectors: plain or deformable convolutions, plain or deformable pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy

# Before Chainer, which it repairs.
from chainer_deform.functions import deformable_roi_average_align_2d  # isort: skip
from chainer_deform.link_hooks import SamplingHook  # isort: skip
from chainer_deform.links import (  # isort: skip
    DeformableConvolution2D,
    DeformableRoIPooling2D,
)

import chainer
import chainer.functions as F
import chainer.links as L
from boxes import decode, encode, intersection_over_union, suppress
from chainer.backends import cuda

#: Which parts of each model are deformable: the last two convolutions, the pooling.
#: All four start as the same function: offsets start at zero.
MODELS = {
    'plain': (False, False),
    'convolution': (True, False),
    'pooling': (False, True),
    'deformable': (True, True),
}

STRIDE = 4  # pixels of the image to a pixel of the feature map
WIDTH = 48  # channels of the feature map
BINS = 5  # of a box, along each axis
SAMPLES = 2  # of a bin, along each axis
HIDDEN = 128  # units of the hidden layers that see the bins

BASE_SIZE = 24.0  # of the boxes that proposals are corrections of
CANDIDATES, PROPOSALS = 100, 16  # of an image, before and after the suppression
MOST_OVERLAP = 0.5  # IoU of two proposals, or of two detections of the same class

#: The part of a digit's box, about its centre, in which it has to be proposed; around
#: that part, it may be.
CENTRE = 0.4
MATCH = 0.5  # IoU with a digit's box from which on a proposal is to find that digit
LOWEST_SCORE = 0.05  # of a detection


class Detector(chainer.Chain):
    """A two-stage detector: proposes boxes, then says what is in each, and corrects it.

    The first stage gives each pixel of the feature map a score and a box. The second
    one pools the features of the best boxes into bins, and has two linear layers.

    Args:
        kind: One of :data:`MODELS`.
        classes: Number of classes.

    """

    def __init__(self, kind: str, classes: int) -> None:
        super().__init__()
        deformable_convolution, deformable_pooling = MODELS[kind]
        last = DeformableConvolution2D if deformable_convolution else L.Convolution2D
        channels = 16, 32, WIDTH, WIDTH, WIDTH
        with self.init_scope():
            self.convs = chainer.ChainList(
                # Kernels of 4: the pixels of the feature map lie evenly over the image.
                L.Convolution2D(1, 16, ksize=4, stride=2, pad=1),
                L.Convolution2D(16, 32, ksize=4, stride=2, pad=1),
                L.Convolution2D(32, WIDTH, ksize=3, pad=1),
                last(WIDTH, WIDTH, ksize=3, pad=1),
                last(WIDTH, WIDTH, ksize=3, pad=1),
            )
            self.norms = chainer.ChainList(*map(L.BatchNormalization, channels))
            self.propose = L.Convolution2D(WIDTH, 1 + 4, ksize=3, pad=1)
            self.hidden = L.Linear(WIDTH * BINS**2, HIDDEN)
            self.classify = L.Linear(HIDDEN, classes + 1)  # the last one is: no digit
            self.correct = L.Linear(HIDDEN, 4)
            # The last one, so that all models draw the same initial weights before.
            self.pool = (
                DeformableRoIPooling2D(WIDTH, BINS, 1 / STRIDE, SAMPLES, fc_size=HIDDEN)
                if deformable_pooling
                else chainer.Sequential(align)
            )

    def forward(self, x) -> list[tuple]:
        """Finds digits in images ``x (n, 1, h, w)``.

        Returns:
            For each image, the boxes ``(D, 4)``, classes ``(D,)`` and scores ``(D,)``
            of what was found, as NumPy arrays.

        """
        features = self.extract(x)
        proposals, _, _ = self.find_proposals(features)
        scores, corrections = self.look_at(features, proposals)
        scores, corrections = on_cpu(F.softmax(scores)), on_cpu(corrections)
        ends = numpy.cumsum([len(boxes) for boxes in proposals])[:-1]
        scores, corrections = (numpy.split(a, ends) for a in (scores, corrections))
        images = zip(proposals, scores, corrections)
        return [choose(*image, x.shape[2]) for image in images]

    def extract(self, x) -> chainer.Variable:
        """Returns the feature map."""
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        return x

    def find_proposals(
        self, features: chainer.Variable
    ) -> tuple[list[numpy.ndarray], chainer.Variable, chainer.Variable]:
        """The first stage.

        Returns:
            The proposed boxes of each image, and of all pixels of all images the scores
            ``(n, h * w)`` and the corrections of their boxes ``(n, h * w, 4)``.

        """
        n, _, h, w = features.shape
        y = F.reshape(F.transpose(self.propose(features), (0, 2, 3, 1)), (n, h * w, 5))
        scores, corrections = y[:, :, 0], y[:, :, 1:]
        base = base_boxes(h, w)
        proposals = []
        for score, correction in zip(on_cpu(scores), on_cpu(corrections)):
            best = numpy.argsort(-score, kind='stable')[:CANDIDATES]
            boxes = decode(base[best], correction[best], h * STRIDE)
            proposals.append(
                boxes[suppress(boxes, score[best], MOST_OVERLAP)][:PROPOSALS]
            )
        return proposals, scores, corrections

    def look_at(
        self, features: chainer.Variable, boxes: Sequence[numpy.ndarray]
    ) -> tuple[chainer.Variable, chainer.Variable]:
        """The second stage.

        Returns:
            Scores ``(R, classes + 1)`` and corrections ``(R, 4)`` of the boxes of all
            images, one after another.

        """
        bins = self.pool(features, *self.regions(boxes))
        h = F.relu(self.hidden(bins))
        return self.classify(h), self.correct(h)

    def regions(self, boxes: Sequence[numpy.ndarray]) -> tuple:
        """Returns the boxes of all images one after another, and their images."""
        rois = numpy.concatenate(boxes).astype(numpy.float32)
        indices = numpy.arange(len(boxes), dtype=numpy.int32)
        indices = indices.repeat([len(b) for b in boxes])
        return self.device.send(rois), self.device.send(indices)

    def sampling_points(self, x, boxes: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """Returns where the second stage reads boxes in images ``x (n, 1, h, w)``.

        Returns:
            For each image, places ``(y, x)`` in pixels of it, of shape ``(R, BINS,
            BINS, SAMPLES ** 2, 2)``.

        """
        if not isinstance(self.pool, DeformableRoIPooling2D):
            return [regular_points(b) for b in boxes]
        with SamplingHook(self) as hook:
            self.look_at(self.extract(x), boxes)
        # Of each box (1, BINS, BINS, points, yx), in pixels of the feature map.
        points = numpy.concatenate([*map(cuda.to_cpu, hook.calls[-1].locations())])
        points = (points + 0.5) * STRIDE
        return numpy.split(points, numpy.cumsum([len(b) for b in boxes])[:-1])

    def offset_links(self) -> list[tuple[chainer.Link, float]]:
        """Returns what predicts offsets, with the paper's factors of learning rates."""
        convs = [conv for conv in self.convs if hasattr(conv, 'offset_conv')]
        links = [(conv.offset_conv, 0.1) for conv in convs]
        if isinstance(self.pool, DeformableRoIPooling2D):
            links.append((self.pool.offset_fc, 0.01))
        return links


class DetectionLoss(chainer.Chain):
    """What a detector is trained with: the sum of the losses of both stages.

    Args:
        predictor: The :class:`Detector`.

    """

    def __init__(self, predictor: Detector) -> None:
        super().__init__()
        with self.init_scope():
            self.predictor = predictor

    def forward(self, x, boxes: list, labels: list) -> chainer.Variable:
        """Returns the loss of images, with the boxes and classes in each."""
        net = self.predictor
        features = net.extract(x)
        proposals, scores, corrections = net.find_proposals(features)
        base = base_boxes(*features.shape[2:])
        targets = zip(*(proposal_targets(base, b) for b in boxes))
        wanted, wanted_corrections = map(numpy.concatenate, targets)
        is_digit = wanted == 1
        propose = F.sigmoid_cross_entropy(
            scores.reshape(-1), net.device.send(wanted), reduce='no'
        )
        losses = {
            'propose': F.sum(propose) / max(1, is_digit.sum()),
            'place': box_loss(corrections.reshape(-1, 4), wanted_corrections, is_digit),
        }

        # The second stage sees the proposals and, from the start on, all digits.
        seen = [numpy.concatenate(pair) for pair in zip(proposals, boxes)]
        background = len(net.classify.b) - 1
        targets = zip(*map(partial(seen_targets, background), seen, boxes, labels))
        wanted, wanted_corrections = map(numpy.concatenate, targets)
        scores, corrections = net.look_at(features, seen)
        losses['classify'] = F.softmax_cross_entropy(scores, net.device.send(wanted))
        losses['correct'] = box_loss(
            corrections, wanted_corrections, wanted != background
        )

        loss = sum(losses.values())
        chainer.report({'loss': loss, **losses}, self)
        return loss


def align(features, rois, roi_indices) -> chainer.Variable:
    """Plain RoI align: the deformable pooling ``(R, WIDTH, BINS, BINS)`` unmoved."""
    xp = chainer.backend.get_array_module(features)
    offset = xp.zeros((len(rois), 2, BINS, BINS), features.dtype)
    return deformable_roi_average_align_2d(
        features, rois, roi_indices, offset, BINS, 1 / STRIDE, SAMPLES
    )


def regular_points(boxes: numpy.ndarray) -> numpy.ndarray:
    """Returns where plain RoI align reads boxes; see ``Detector.sampling_points``."""
    n = BINS * SAMPLES  # spread evenly over the box
    shares = (numpy.moveaxis(numpy.indices((n, n)), 0, -1) + 0.5) / n
    low, high = numpy.split(boxes[:, None, None], 2, axis=3)
    points = low + shares * (high - low)
    # (R, n, n, 2) -> (R, BINS, BINS, SAMPLES, SAMPLES, 2)
    points = points.reshape(-1, BINS, SAMPLES, BINS, SAMPLES, 2).swapaxes(2, 3)
    return points.reshape(-1, BINS, BINS, SAMPLES**2, 2)


def base_boxes(h: int, w: int) -> numpy.ndarray:
    """Returns the boxes ``(h * w, 4)`` about the pixels of a feature map."""
    centres = (numpy.indices((h, w)).reshape(2, -1).T + 0.5) * STRIDE
    return numpy.hstack([centres - BASE_SIZE / 2, centres + BASE_SIZE / 2])


def proposal_targets(
    base: numpy.ndarray, boxes: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Returns what the first stage is to say of one image.

    Args:
        base: The boxes ``(N, 4)`` about the pixels of the feature map.
        boxes: The boxes of the digits, which do not overlap.

    Returns:
        For each pixel 1 if it lies in the middle of a digit, -1 (either will do) if it
        lies elsewhere in its box, and else 0; and the corrections of the base boxes
        ``(N, 4)`` to those of the nearest digits.

    """
    centres = (base[:, :2] + base[:, 2:]) / 2
    low, high = boxes[:, :2], boxes[:, 2:]
    # (pixels, digits): 0 at the centre of a digit's box, 0.5 at its edges
    far = abs((centres[:, None] - (low + high) / 2) / (high - low)).max(axis=2)
    nearest = far.argmin(axis=1)
    far = far.min(axis=1)
    wanted = numpy.where(far <= CENTRE / 2, 1, numpy.where(far <= 0.5, -1, 0))
    return wanted.astype(numpy.int32), encode(base, boxes[nearest])


def seen_targets(
    background: int, seen: numpy.ndarray, boxes: numpy.ndarray, labels: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Returns what the second stage is to say of the boxes that it has seen.

    Returns:
        The classes ``(R,)``, ``background`` where there is no digit, and the
        corrections ``(R, 4)``.

    """
    overlaps = intersection_over_union(seen, boxes)
    best = overlaps.argmax(axis=1)
    wanted = numpy.where(overlaps.max(axis=1) >= MATCH, labels[best], background)
    return wanted.astype(numpy.int32), encode(seen, boxes[best])


def box_loss(
    corrections: chainer.Variable, wanted: numpy.ndarray, is_digit: numpy.ndarray
) -> chainer.Variable:
    """Returns the mean Huber loss of corrections ``(N, 4)`` where there is a digit."""
    chosen = numpy.flatnonzero(is_digit)
    wanted = corrections.device.send(wanted[chosen])
    losses = F.huber_loss(corrections[chosen], wanted, delta=1)
    return F.sum(losses) / max(1, len(chosen))


def choose(
    boxes: numpy.ndarray, scores: numpy.ndarray, corrections: numpy.ndarray, limit: int
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Returns the boxes, classes and scores of what the second stage has found.

    Args:
        boxes: The proposals of an image, ``(R, 4)``.
        scores: Their probabilities, ``(R, classes + 1)``.
        corrections: Those of the proposals, ``(R, 4)``.
        limit: The size of the image.

    """
    boxes = decode(boxes, corrections, limit)
    rows, classes = numpy.nonzero(scores[:, :-1] >= LOWEST_SCORE)
    boxes, scores = boxes[rows], scores[rows, classes]
    # Each class is moved to a place of its own, so that classes do not overlap.
    kept = suppress(boxes + 2 * limit * classes[:, None], scores, MOST_OVERLAP)
    return boxes[kept], classes[kept], scores[kept]


def on_cpu(variable: chainer.Variable) -> numpy.ndarray:
    """Returns the values of a variable, without a graph."""
    return cuda.to_cpu(variable.array)
