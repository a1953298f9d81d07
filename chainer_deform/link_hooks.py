"""What deformable layers are called with, recorded."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import chainer
from chainer.links.connection import deformable_convolution_2d as chainers

from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler
from chainer_deform.locations import sampling_locations

__all__ = ['SamplingCall', 'SamplingHook']

#: The layer and its sampler, of this package and of Chainer. (Nothing can have called
#: patch_chainer() before this module is imported.)
OURS = DeformableConvolution2D, DeformableConvolution2DSampler
CHAINERS_OWN = chainers.DeformableConvolution2D, chainers.DeformableConvolution2DSampler


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingCall:
    """One call of a deformable layer, as :class:`SamplingHook` records it.

    The arrays are those that the layer was given, not copies, and lie where it lies.

    Attributes:
        name (str): The layer's path in the model, such as
            ``'convs/2'``.
        link (~chainer_deform.links.DeformableConvolution2DSampler): What was called.
        x_shape (tuple of ints): Shape ``(n, c, h, w)`` of the layer's input.
        offset (:ref:`ndarray`): Offsets in pixels of that input, of shape ``(n,
            offset_groups * 2 * kh * kw, out_h, out_w)``.
        mask (:ref:`ndarray` or None): Modulation mask of shape ``(n, offset_groups * kh
            * kw, out_h, out_w)``, if there was one.

    """

    name: str
    link: DeformableConvolution2DSampler
    x_shape: tuple[int, int, int, int]
    offset: Any
    mask: Any = None

    def locations(self):
        """The sampling points, in pixels of the layer's input.

        Returns:
            :ref:`ndarray`: Points of shape ``(n, offset_groups, kh * kw, 2, out_h,
            out_w)``; axis 3 is ``(y, x)``. See
            :func:`chainer_deform.sampling_locations`.

        """
        link = self.link
        return sampling_locations(
            self.offset,
            link.ksize,
            link.stride,
            link.pad,
            link.dilate,
            link.offset_groups,
        )

    def centre(self, y: int, x: int) -> tuple[float, float]:
        """The middle of the points of output pixel ``(y, x)`` if no offset moved them.

        Returns:
            tuple of floats: ``(y, x)`` in pixels of the layer's input.

        """
        link = self.link
        return tuple(
            place * stride - pad + dilate * (ksize - 1) / 2
            for place, stride, pad, dilate, ksize in zip(
                (y, x), link.stride, link.pad, link.dilate, link.ksize
            )
        )


class SamplingHook(chainer.LinkHook):
    """Link hook that records the offsets and masks of deformable layers.

    Every call of a :class:`~chainer_deform.links.DeformableConvolution2DSampler`, alone
    or inside a :class:`~chainer_deform.links.DeformableConvolution2D`, adds a record to
    ``calls``. The hook works in a ``with`` statement, for all that is called in there,
    and as ``link.add_hook(hook)``, for a sampler (``layer.deform_conv``). It keeps the
    arrays of every call alive, on their device; ``hook.calls.clear()`` lets go of them.

    A warning says so, once, if the model has no deformable layer, or has layers of
    Chainer's own class, which are not recorded: call
    :func:`chainer_deform.patch_chainer` before the model is built.

    Args:
        model (~chainer.Link or None): Where the names come from: a layer is called by
            its path in this model, as in ``model.namedlinks()`` but without the first
            slash and without the ``deform_conv`` inside a ``DeformableConvolution2D``.
            Layers that are not part of it are not recorded. If ``None``, all are, by
            the name that each has in the link that holds it.

    Attributes:
        calls (list of SamplingCall): The records, in the order of the calls. Each has
            ``name``, ``link``, ``x_shape``, ``offset`` and ``mask``, and
            ``locations()`` makes the sampling points of it.

    .. seealso:: :func:`chainer_deform.visualize.plot_sampling_points`

    .. admonition:: Example

        >>> model = chainer.Sequential(
        ...     chainer_deform.links.DeformableConvolution2D(3, 8, 3, pad=1),
        ...     chainer.functions.relu,
        ...     chainer_deform.links.DeformableConvolution2D(8, 8, 3, stride=2),
        ... )
        >>> x = np.random.uniform(0, 1, (2, 3, 10, 14)).astype(np.float32)
        >>> with SamplingHook(model) as hook:
        ...     y = model(x)
        >>> [(call.name, call.x_shape) for call in hook.calls]
        [('0', (2, 3, 10, 14)), ('1', (2, 8, 10, 14))]
        >>> hook.calls[1].locations().shape
        (2, 1, 9, 2, 4, 6)

    """

    def __init__(self, model: chainer.Link | None = None) -> None:
        self.name = f'SamplingHook {id(self)}'  # there may be several
        self.calls: list[SamplingCall] = []
        self._layers = None if model is None else named_layers(model)
        self._silent = model is None  # neither recorded a call nor warned
        if model is not None:
            warn_of_unseen('SamplingHook', {'': model}, stacklevel=3)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self._silent and not any(error):
            self._silent = False
            warnings.warn(f'SamplingHook: {_NO_LAYER} was called', stacklevel=2)

    def forward_postprocess(self, args) -> None:
        link = args.link
        if self._silent and isinstance(link, CHAINERS_OWN[1]):
            self._silent = False
            warnings.warn(f'SamplingHook: {_own_layers([link.name])}', stacklevel=2)
        if not isinstance(link, DeformableConvolution2DSampler):
            return
        self._silent = False
        if self._layers is None:
            self.calls.append(sampling_call(args, link.name or ''))
        for name, layer in (self._layers or {}).items():
            if layer is link:
                self.calls.append(sampling_call(args, name))


def hook_on(layers: dict[str, DeformableConvolution2DSampler]) -> SamplingHook:
    """A hook that records these layers, by these names, and warns of nothing."""
    hook = SamplingHook()
    hook._layers, hook._silent = layers, False
    return hook


def sampling_call(args, name: str) -> SamplingCall:
    """The record of a call, from what a link hook is given of a sampler."""
    arguments = {**dict(zip(('x', 'offset', 'mask'), args.args)), **args.kwargs}
    return SamplingCall(
        name,
        args.link,
        arguments['x'].shape,
        # Not the variables, which would keep the graph alive.
        chainer.as_array(arguments['offset']),
        chainer.as_array(arguments.get('mask')),
    )


def named_layers(
    model: chainer.Link, classes: tuple[type, type] = OURS
) -> dict[str, chainer.Link]:
    """All samplers of a model by the path of the layer; see :class:`SamplingHook`.

    ``classes`` are those of the layer and of its sampler.
    """
    layer, sampler = classes
    layers = {}
    links = list(model.namedlinks())
    for path, link in links:
        if isinstance(link, layer) and isinstance(link.deform_conv, sampler):
            layers.setdefault(id(link.deform_conv), (path, link.deform_conv))
    for path, link in links:
        if isinstance(link, sampler):
            layers.setdefault(id(link), (path, link))
    return {path.strip('/'): link for path, link in layers.values()}


def warn_of_unseen(
    name: str, models: Mapping[str, chainer.Link], stacklevel: int = 2
) -> None:
    """Warns of layers that cannot be recorded, and if there are none that can.

    Args:
        name: Who warns.
        models: The models, by how the paths of their layers begin.
        stacklevel: That of the caller's ``warnings.warn``.

    """
    own = [
        f'{start}/{path}'.strip('/')
        for start, model in models.items()
        for path in named_layers(model, CHAINERS_OWN)
    ]
    if own:
        warnings.warn(f'{name}: {_own_layers(own)}', stacklevel=stacklevel)
    elif not any(map(named_layers, models.values())):
        warnings.warn(f'{name}: {_NO_LAYER} is in the model', stacklevel=stacklevel)


_NO_LAYER = (
    'no layer of chainer_deform.links (calls of the function alone are not seen)'
)


def _own_layers(paths: list) -> str:
    """The warning about layers of Chainer's own class."""
    more = f' and {len(paths) - 4} more' if len(paths) > 4 else ''
    return (
        "nothing is seen of deformable layers of Chainer's own class "
        f'({", ".join(map(repr, paths[:4]))}{more}): call '
        'chainer_deform.patch_chainer() before the model is built, or build it of '
        'chainer_deform.links'
    )
