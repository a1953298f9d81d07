"""The three models: a plain CNN, and the same with deformable convolutions."""

from __future__ import annotations

import functools

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
import chainer.functions as F
import chainer.links as L

#: What the last two convolutions of each model are. All three start as the same
#: function: offsets start at zero, and the mask of the modulated layer at 2 * 0.5.
LAST_CONVOLUTIONS = {
    'plain': L.Convolution2D,
    'deformable': chainer_deform.links.DeformableConvolution2D,
    'modulated': functools.partial(
        chainer_deform.links.DeformableConvolution2D, modulated=True, mask_scale=2
    ),
}


class DigitNet(chainer.Chain):
    """Four convolutions, the mean over the image, and a linear classifier.

    The models differ in nothing but the convolutions that predict offsets.

    Args:
        kind: One of :data:`LAST_CONVOLUTIONS`.

    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        last = LAST_CONVOLUTIONS[kind]
        with self.init_scope():
            self.convs = chainer.ChainList(
                L.Convolution2D(1, 16, ksize=3, stride=2, pad=1),  # 28 -> 14
                L.Convolution2D(16, 32, ksize=3, stride=1, pad=1),
                last(32, 32, ksize=3, stride=1, pad=1),
                last(32, 64, ksize=3, stride=2, pad=1),  # 14 -> 7
            )
            self.norms = chainer.ChainList(*map(L.BatchNormalization, (16, 32, 32, 64)))
            self.classify = L.Linear(64, 10)

    def forward(self, x) -> chainer.Variable:
        """Returns the scores ``(n, 10)`` of images ``x (n, 1, 28, 28)``."""
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        return self.classify(F.mean(x, axis=(2, 3)))

    def offset_convs(self) -> list[chainer.Link]:
        """Returns the convolutions that predict offsets; the plain model has none."""
        return [conv.offset_conv for conv in self.convs if hasattr(conv, 'offset_conv')]
