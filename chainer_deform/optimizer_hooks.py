"""Learning rates of their own for parts of a model."""

from __future__ import annotations

import contextlib

import chainer

__all__ = ['scale_updates']


def scale_updates(link: chainer.Link, factor: float) -> None:
    """Makes every update of a link's parameters ``factor`` times as large.

    That is a learning-rate factor for any optimizer, with or without momentum, and one
    that follows every schedule of the learning rate. The papers train the convolution
    that predicts the offsets more slowly than the rest of the model, by 0.1, and the
    layers that predict those of RoI pooling by 0.01.

    Args:
        link (~chainer.Link): The parameters, as ``layer.offset_conv`` or, of RoI
            pooling and attention, ``layer.offset_fc``.
        factor (float): The factor, at least 0. A later call replaces it.

    Raises:
        ValueError: ``factor`` is negative or not a finite number, or the link has no
            optimizer yet.

    .. admonition:: Example

        >>> layer = chainer_deform.links.DeformableConvolution2D(3, 8, 3)
        >>> optimizer = chainer.optimizers.Adam().setup(layer)
        >>> chainer_deform.optimizer_hooks.scale_updates(layer.offset_conv, 0.1)

    """
    if not 0 <= factor < float('inf'):
        raise ValueError(
            f'factor must be a finite number of at least 0, not {factor!r}'
        )
    params = list(link.params())
    if any(param.update_rule is None for param in params):
        raise ValueError('link has no optimizer yet: call optimizer.setup(model) first')
    for param in params:
        scale = _UpdateScale(factor)
        for timing, hook in ('pre', scale.before), ('post', scale.after):
            name = f'scale_updates_{timing}'
            with contextlib.suppress(KeyError):  # there is none at the first call
                param.update_rule.remove_hook(name)
            param.update_rule.add_hook(hook, name, timing)


class _UpdateScale:
    """The two hooks of one parameter: before an update, and after it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.old = None

    def __repr__(self) -> str:
        return f'scale_updates({self.factor})'

    def before(self, rule, param) -> None:
        if param.array is not None:  # else it will be initialised later
            self.old = param.array.copy()

    def after(self, rule, param) -> None:
        if self.old is not None:
            param.array[...] = self.old + self.factor * (param.array - self.old)
            self.old = None
