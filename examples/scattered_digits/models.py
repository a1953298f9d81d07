"""The three models: a small dilated CNN, a wider one, and one that is deformable."""

from __future__ import annotations

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
import chainer.functions as F
import chainer.links as L

#: What the last two convolutions of each model are, and their channels. The plain and
#: the deformable model start as the same function, as offsets start at zero. The wide
#: model has as many parameters as the deformable one.
LAST_CONVOLUTIONS = {
    'plain': (L.Convolution2D, 32),
    'wide': (L.Convolution2D, 43),
    'deformable': (chainer_deform.links.DeformableConvolution2D, 32),
}


class SceneNet(chainer.Chain):
    """Five convolutions, the last two of them dilated, and a classifier of each pixel.

    Its scores are those of the last features, upsampled, plus those of the first ones,
    which are finer.

    Args:
        kind: One of :data:`LAST_CONVOLUTIONS`.
        classes: Number of classes.

    """

    def __init__(self, kind: str, classes: int) -> None:
        super().__init__()
        last, width = LAST_CONVOLUTIONS[kind]
        channels = 16, 32, 32, width, width
        with self.init_scope():
            self.convs = chainer.ChainList(
                L.Convolution2D(1, 16, ksize=3, stride=2, pad=1),  # 97 -> 49
                L.Convolution2D(16, 32, ksize=3, stride=2, pad=1),  # 49 -> 25
                L.Convolution2D(32, 32, ksize=3, pad=1),
                last(32, width, ksize=3, pad=2, dilate=2),
                last(width, width, ksize=3, pad=2, dilate=2),
            )
            self.norms = chainer.ChainList(*map(L.BatchNormalization, channels))
            self.classify = L.Convolution2D(width, classes, ksize=1)
            self.refine = L.Convolution2D(16, classes, ksize=1)

    def forward(self, x) -> chainer.Variable:
        """Returns the scores ``(n, classes, h, w)`` of images ``x (n, 1, h, w)``."""
        features = [x]
        for conv, norm in zip(self.convs, self.norms):
            features.append(F.relu(norm(conv(features[-1]))))
        fine, coarse = features[1], features[-1]
        scores = F.resize_images(self.classify(coarse), fine.shape[2:])
        return F.resize_images(scores + self.refine(fine), x.shape[2:])

    def offset_convs(self) -> list[chainer.Link]:
        """Returns the convolutions that predict offsets; the plain models have none."""
        return [conv.offset_conv for conv in self.convs if hasattr(conv, 'offset_conv')]
