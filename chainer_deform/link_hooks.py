"""What deformable layers are called with, recorded."""

from __future__ import annotations

import dataclasses
from typing import Any

import chainer

from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler
from chainer_deform.locations import sampling_locations

__all__ = ['SamplingCall', 'SamplingHook']


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

    def forward_postprocess(self, args) -> None:
        link = args.link
        if not isinstance(link, DeformableConvolution2DSampler):
            return
        if self._layers is None:
            self.calls.append(sampling_call(args, link.name or ''))
        for name, layer in (self._layers or {}).items():
            if layer is link:
                self.calls.append(sampling_call(args, name))


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


def named_layers(model: chainer.Link) -> dict[str, DeformableConvolution2DSampler]:
    """All samplers of a model by the path of the layer; see :class:`SamplingHook`."""
    layers = {}
    links = list(model.namedlinks())
    for path, link in links:
        if isinstance(link, DeformableConvolution2D):
            layers.setdefault(id(link.deform_conv), (path, link.deform_conv))
    for path, link in links:
        if isinstance(link, DeformableConvolution2DSampler):
            layers.setdefault(id(link), (path, link))
    return {path.strip('/'): link for path, link in layers.values()}
