"""Puts the package's function and layer in the place of Chainer's own."""

from __future__ import annotations

import importlib

from chainer_deform import functions, links

_FUNCTION = 'chainer.functions.connection.deformable_convolution_2d_sampler'
_LINK = 'chainer.links.connection.deformable_convolution_2d'

#: Every place in Chainer that holds one of them: module, name, and what replaces it.
_PLACES = tuple(
    (importlib.import_module(module), name, getattr(ours, name))
    for module, name, ours in (
        ('chainer.functions', 'deformable_convolution_2d_sampler', functions),
        (_FUNCTION, 'deformable_convolution_2d_sampler', functions),
        (_LINK, 'deformable_convolution_2d_sampler', functions),
        ('chainer.links', 'DeformableConvolution2D', links),
        (_LINK, 'DeformableConvolution2D', links),
        (_LINK, 'DeformableConvolution2DSampler', links),
    )
)
_CHAINERS_OWN = tuple(getattr(module, name) for module, name, _ in _PLACES)


def patch_chainer() -> None:
    """Puts this package's deformable convolution in the place of Chainer's own.

    Afterwards ``chainer.functions.deformable_convolution_2d_sampler`` and
    ``chainer.links.DeformableConvolution2D`` are those of this package. Call it before
    models are built; names that a module imported from Chainer earlier stay as they
    are. Calling it again changes nothing.

    .. admonition:: Example

        >>> import chainer.links as L
        >>> chainer_deform.patch_chainer()
        >>> L.DeformableConvolution2D is chainer_deform.links.DeformableConvolution2D
        True
        >>> chainer_deform.unpatch_chainer()

    """
    for module, name, ours in _PLACES:
        setattr(module, name, ours)


def unpatch_chainer() -> None:
    """Puts Chainer's own deformable convolution back; see :func:`patch_chainer`.

    .. admonition:: Example

        >>> import chainer.links as L
        >>> chainer_deform.unpatch_chainer()
        >>> L.DeformableConvolution2D is chainer_deform.links.DeformableConvolution2D
        False

    """
    for (module, name, _), original in zip(_PLACES, _CHAINERS_OWN):
        setattr(module, name, original)
