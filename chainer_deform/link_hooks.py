"""What deformable layers are called with, recorded."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import chainer
import numpy
from chainer import backend
from chainer.links.connection import deformable_convolution_2d as chainers

from chainer_deform import _composed
from chainer_deform.functions.deformable_ps_roi_average_pooling_2d import (
    points as ps_roi_points,
)
from chainer_deform.functions.deformable_roi_average_align_2d import (
    checked_ratio,
)
from chainer_deform.functions.deformable_roi_average_align_2d import (
    points as roi_points,
)
from chainer_deform.functions.multi_scale_deformable_attention import in_pixels
from chainer_deform.links import (
    DCNv3,
    DCNv4,
    DeformableConvolution2D,
    DeformableConvolution2DSampler,
    DeformablePSRoIPooling2D,
    DeformableRoIPooling2D,
    MultiScaleDeformableAttention,
)
from chainer_deform.locations import outside, sampling_locations

__all__ = [
    'AttentionSamplingCall',
    'RoISamplingCall',
    'SamplingCall',
    'SamplingHook',
]

#: Layers that make their own offsets and have no sampler to be seen: convolutions, and
#: the others.
CONVOLUTIONS = DCNv3, DCNv4
OTHERS = (
    DeformablePSRoIPooling2D,
    DeformableRoIPooling2D,
    MultiScaleDeformableAttention,
)
#: The layer and its sampler, of this package and of Chainer, and layers without one.
#: (Nothing can have called patch_chainer() before this module is imported.)
OURS = DeformableConvolution2D, DeformableConvolution2DSampler, CONVOLUTIONS + OTHERS
OUR_CONVOLUTIONS = (*OURS[:2], CONVOLUTIONS)
CHAINERS_OWN = (
    chainers.DeformableConvolution2D,
    chainers.DeformableConvolution2DSampler,
    (),
)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingCall:
    """One call of a deformable convolution, as :class:`SamplingHook` records it.

    The arrays are those that the function was given, not copies, and lie where the
    layer lies. In the shapes ``taps`` is ``kh * kw``, or one less with
    ``remove_center``.

    Attributes:
        name (str): The layer's path in the model, such as
            ``'convs/2'``.
        link (:class:`~chainer_deform.links.DeformableConvolution2DSampler`, \
            :class:`~chainer_deform.links.DCNv3` or \
            :class:`~chainer_deform.links.DCNv4`): What was called.
        x_shape (tuple of ints): Shape ``(n, c, h, w)`` of the layer's input.
        offset (:ref:`ndarray`): Offsets in pixels of that input, of shape ``(n,
            offset_groups * 2 * taps, out_h, out_w)``. Those of DCNv3 and DCNv4 are not
            multiplied by ``offset_scale`` yet.
        mask (:ref:`ndarray` or None): Modulation mask of shape ``(n, offset_groups *
            taps, out_h, out_w)``, if there was one.

    """

    name: str
    link: Any
    x_shape: tuple[int, int, int, int]
    offset: Any
    mask: Any = None

    def __repr__(self) -> str:
        return _described_call(self)

    @property
    def x_size(self) -> tuple[int, int]:
        """Height and width of the layer's input."""
        return self.x_shape[2:]

    def locations(self):
        """The sampling points, in pixels of the layer's input.

        Returns:
            :ref:`ndarray`: Points of shape ``(n, offset_groups, taps, 2, out_h,
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
            offset_scale=getattr(link, 'offset_scale', 1),
            remove_center=getattr(link, 'remove_center', False),
        )

    def moves(self):
        """How far offsets move the points, in pixels.

        Returns:
            tuple of :ref:`ndarray`: Vertical and horizontal distances, each with a
            number for each point, in an order of their own.

        """
        dtype = numpy.result_type(numpy.float32, self.offset.dtype)
        n, channels, *out_size = self.offset.shape
        groups = self.link.offset_groups
        offset = self.offset.reshape(n, groups, 2, channels // groups // 2, *out_size)
        x, y = offset.astype(dtype, copy=False).swapaxes(0, 2)
        scale = getattr(self.link, 'offset_scale', 1)
        return (y, x) if scale == 1 else (y * scale, x * scale)

    def outside(self):
        """Which points read nothing but zeros, an array of bools."""
        return outside(self.locations(), self.x_size, axis=3)

    def centre(self, y: float, x: float) -> tuple[float, float]:
        """The middle of the points of output pixel ``(y, x)`` if no offset moved them.

        Returns:
            tuple of floats: ``(y, x)`` in pixels of the layer's input.

        """
        link = self.link
        middle_y, middle_x = (
            place * stride - pad + dilate * (ksize - 1) / 2
            for place, stride, pad, dilate, ksize in zip(
                (y, x), link.stride, link.pad, link.dilate, link.ksize
            )
        )
        return middle_y, middle_x


@dataclasses.dataclass(frozen=True, eq=False)
class RoISamplingCall:
    """One call of a layer of RoI pooling, as :class:`SamplingHook` records it.

    The arrays are those that the function was given, not copies, and lie where the
    layer lies.

    Attributes:
        name (str): The layer's path in the model, such as ``'head/pool'``.
        link (:class:`~chainer_deform.links.DeformableRoIPooling2D` or \
            :class:`~chainer_deform.links.DeformablePSRoIPooling2D`): What was called.
        x_shape (tuple of ints): Shape ``(n, c, h, w)`` of the layer's input.
        rois (:ref:`ndarray`): The boxes, ``(R, 4)``.
        roi_indices (:ref:`ndarray`): The image that each box lies in, ``(R,)``.
        offset (:ref:`ndarray`): The offsets, in shares of the box before ``gamma`` is
            applied: ``(R, 2, out_h, out_w)``, or ``(R, 2 * classes, part_h, part_w)``.

    """

    name: str
    link: Any
    x_shape: tuple[int, int, int, int]
    rois: Any
    roi_indices: Any
    offset: Any

    def __repr__(self) -> str:
        return _described_call(self)

    @property
    def x_size(self) -> tuple[int, int]:
        """Height and width of the layer's input."""
        return self.x_shape[2:]

    def locations(self) -> list:
        """The samples of each box, in pixels of the layer's input.

        Returns:
            list of :ref:`ndarray`: For each box points ``(y, x)`` of shape ``(classes,
            out_h, out_w, samples, 2)``. ``classes`` is 1 but for a position-sensitive
            pooling with more. Where ``sampling_ratio`` is None, boxes differ in the
            number of samples, which may be 0.

        """
        points, counted = self._points(self.offset)
        return [box[:, :, :, samples] for box, samples in zip(points, counted)]

    def centres(self):
        """The middle of each bin's samples if no offset moved them.

        Returns:
            :ref:`ndarray`: Points ``(y, x)`` of shape ``(R, out_h, out_w, 2)``, NaN for
            a box without samples.

        """
        xp = backend.get_array_module(self.rois)
        points, counted = self._points(xp.zeros_like(self.offset))
        counted = counted[:, None, None, :, None]
        with numpy.errstate(invalid='ignore'):
            return xp.where(counted, points[:, 0], 0).sum(3) / counted.sum(3)

    def moves(self):
        """How far offsets move the bins, in pixels.

        Returns:
            tuple of :ref:`ndarray`: Vertical and horizontal distances, each of shape
            ``(R, classes, out_h, out_w)``.

        """
        xp = backend.get_array_module(self.rois)
        first = [
            self._points(offset)[0][..., 0, :]
            for offset in (self.offset, xp.zeros_like(self.offset))
        ]
        with numpy.errstate(all='ignore'):
            moves = first[0] - first[1]
        return moves[..., 0], moves[..., 1]

    def outside(self):
        """Which share of each bin's samples lies outside and is not read."""
        points, counted = self._points(self.offset)
        (h, w), rows, columns = self.x_size, points[..., 0], points[..., 1]
        # From the centres of the outermost pixels.
        margin = 0.5 if isinstance(self.link, DeformablePSRoIPooling2D) else 1
        beyond = (rows < -margin) | (rows > h - 1 + margin)
        beyond |= (columns < -margin) | (columns > w - 1 + margin)
        counted = counted[:, None, None, None]
        return (beyond & counted).sum(-1) / counted.sum(-1).clip(1)

    def _points(self, offset) -> tuple:
        """Samples (R, classes, out_h, out_w, K, yx), and which ones count, (R, K)."""
        link = self.link
        xp = backend.get_array_module(self.rois)
        options = {
            'spatial_scale': link.spatial_scale,
            'gamma': link.gamma,
            'dtype': numpy.result_type(numpy.float32, self.rois.dtype, offset.dtype),
        }
        with chainer.using_device(backend.get_device_from_array(self.rois)):
            if not isinstance(link, DeformablePSRoIPooling2D):
                options.update(ratio=checked_ratio(link.sampling_ratio))
                options.update(aligned=link.aligned)
                points, counted = roi_points(self.rois, offset, **options)
                return points.array[:, None], counted
            options.update(ratio=link.sampling_ratio, out_size=link.outsize)
            points, _ = ps_roi_points(self.rois, offset, None, **options)
        # (yx, classes, s_h, s_w, out_h, out_w, R)
        points = points.array.transpose(6, 1, 4, 5, 2, 3, 0)
        R, classes, out_h, out_w, s_h, s_w, _ = points.shape
        K = s_h * s_w
        return points.reshape(R, classes, out_h, out_w, K, 2), xp.ones((R, K), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSamplingCall:
    """One call of a layer of deformable attention, as :class:`SamplingHook` records it.

    The arrays are those that the function was given, not copies, and lie where the
    layer lies.

    Attributes:
        name (str): The layer's path in the model, such as ``'encoder/0'``.
        link (~chainer_deform.links.MultiScaleDeformableAttention): What was called.
        shapes (list of pairs of ints): The size ``(h, w)`` of each level.
        reference (:ref:`ndarray`): The reference points or boxes of the queries, in
            shares of the level's size: ``(n, q, levels, 2)`` or ``(n, q, levels, 4)``.
        places (:ref:`ndarray`): Points ``(x, y)``, likewise: ``(n, q, heads, levels,
            points, 2)``.
        weights (:ref:`ndarray`): Their weights, ``(n, q, heads, levels, points)``.

    """

    name: str
    link: Any
    shapes: list[tuple[int, int]]
    reference: Any
    places: Any
    weights: Any

    def __repr__(self) -> str:
        return _described_call(self)

    @property
    def x_size(self) -> tuple[int, int]:
        """Height and width of the largest level."""
        return max(self.shapes)

    def locations(self, size: tuple[int, int] | None = None):
        """The points, in pixels of their levels or of an image that these lie over.

        Args:
            size (pair of ints or None): Height and width of the image.

        Returns:
            :ref:`ndarray` or list of :ref:`ndarray`: Points ``(y, x)`` of shape ``(n,
            q, heads, levels, points, 2)`` in pixels of the image. If ``size`` is None,
            one array for each level, without that axis, in pixels of the level.

        """
        places = self._at_least_float32(self.places)
        if size is not None:
            return in_pixels(places, size).array
        return [
            in_pixels(places[:, :, :, level], shape).array
            for level, shape in enumerate(self.shapes)
        ]

    def centres(self, size: tuple[int, int]):
        """The reference points, or the boxes' centres, in pixels of an image.

        Args:
            size (pair of ints): Height and width of the image that the levels lie over.

        Returns:
            :ref:`ndarray`: Points ``(y, x)`` of shape ``(n, q, levels, 2)``.

        """
        reference = self._at_least_float32(self.reference[..., :2])
        return in_pixels(reference, size).array

    def moves(self):
        """How far the points are from their references, in pixels of their level.

        Returns:
            tuple of :ref:`ndarray`: Vertical and horizontal distances, each of shape
            ``(n, q, heads, levels, points)``.

        """
        reference = self._at_least_float32(self.reference)
        centres = reference[:, :, None, :, None, :2]
        heights, widths = self._sizes()
        with numpy.errstate(all='ignore'):
            moves = self._at_least_float32(self.places) - centres
            return moves[..., 1] * heights, moves[..., 0] * widths

    def outside(self):
        """Which points read nothing but zeros, an array of bools."""
        places = self._at_least_float32(self.places)
        sizes = self._sizes()
        with numpy.errstate(all='ignore'):
            rows, columns = (
                places[..., 1 - axis] * sizes[axis] - 0.5 for axis in (0, 1)
            )
        beyond = (rows <= -1) | (rows >= sizes[0])
        return beyond | (columns <= -1) | (columns >= sizes[1])

    def _sizes(self):
        """The heights and the widths of the levels, each (levels, 1)."""
        xp = backend.get_array_module(self.places)
        return xp.array(self.shapes).T[..., None]

    def _at_least_float32(self, array):
        return array.astype(numpy.result_type(numpy.float32, array.dtype), copy=False)


def _described_call(call) -> str:
    """In one line: the arrays' dtypes and shapes in place of the arrays."""
    fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return described(call, **fields)


class SamplingHook(chainer.LinkHook):
    """Link hook that records where deformable layers read.

    Every call of a layer adds a record to ``calls``: a :class:`SamplingCall` for a
    :class:`~chainer_deform.links.DeformableConvolution2DSampler`, alone or inside a
    :class:`~chainer_deform.links.DeformableConvolution2D`, for a
    :class:`~chainer_deform.links.DCNv3` and a :class:`~chainer_deform.links.DCNv4`; a
    :class:`RoISamplingCall` for the layers of RoI pooling; an
    :class:`AttentionSamplingCall` for
    :class:`~chainer_deform.links.MultiScaleDeformableAttention`. The hook works in a
    ``with`` statement, for all that is called in there, and as ``link.add_hook(hook)``,
    for one of these layers, of a ``DeformableConvolution2D`` its sampler
    (``layer.deform_conv``). It keeps the arrays of every call alive, on their device;
    ``hook.calls.clear()`` lets go of them.

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
        calls (list): The records, in the order of the calls. Each has a ``name`` and a
            ``link``, and ``locations()`` makes the sampling points of it.

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
        self.calls: list = []
        self._layers = None if model is None else named_layers(model)
        self._silent = model is None  # neither recorded a call nor warned
        self._recorder = Recorder()
        if model is not None:
            warn_of_unseen('SamplingHook', {'': model}, stacklevel=3)

    def __repr__(self) -> str:
        layers = 'all' if self._layers is None else list(self._layers)
        return described(self, layers=layers, calls=len(self.calls))

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._recorder.stop()
        if self._silent and not any(error):
            self._silent = False
            warnings.warn(f'SamplingHook: {_NO_LAYER} was called', stacklevel=2)

    def forward_preprocess(self, args) -> None:
        self._recorder.start(args.link)

    def forward_postprocess(self, args) -> None:
        link = args.link
        if self._silent and isinstance(link, CHAINERS_OWN[1]):
            self._silent = False
            warnings.warn(f'SamplingHook: {_own_layers([link.name])}', stacklevel=2)
        if not isinstance(link, (DeformableConvolution2DSampler, *OURS[2])):
            return
        self._silent = False
        names = [link.name or '']
        if self._layers is not None:
            names = [name for name, layer in self._layers.items() if layer is link]
        for name in names:
            call = self._recorder.sampling_call(args, name)
            if call is not None:
                self.calls.append(call)


def described(thing, **values) -> str:
    """A line for ``repr``: the name of the class, and values in short."""
    inside = ', '.join(f'{name}={_in_short(value)}' for name, value in values.items())
    return f'{type(thing).__name__}({inside})'


def _in_short(value) -> str:
    """An array as its dtype and shape, a link as its class, a list by its start."""
    if isinstance(value, chainer.get_array_types()):
        return f'{value.dtype} {value.shape}'
    if isinstance(value, chainer.Link):
        return type(value).__name__
    if isinstance(value, list) and len(value) > 4:
        return f'[{", ".join(map(repr, value[:4]))}, ... {len(value) - 4} more]'
    return repr(value)


def hook_on(layers: Mapping[str, chainer.Link]) -> SamplingHook:
    """A hook that records these layers, by these names, and warns of nothing."""
    hook = SamplingHook()
    hook._layers, hook._silent = dict(layers), False
    return hook


class Recorder:
    """Makes the records of calls; a link hook passes its arguments to it.

    A layer that makes its own offsets is recorded by what it gives to its function, the
    last time in a call: RoI pooling pools without offsets before. A call that fails
    leaves the recorder watching; the next one starts it anew.
    """

    def __init__(self) -> None:
        self._seen: _composed.Call | None = None

    def start(self, link: chainer.Link) -> None:
        """To be called before the forward pass of each link."""
        if isinstance(link, OURS[2]):
            self._seen = None
            _composed.add_watcher(self)

    def watch(self, call: _composed.Call) -> None:
        self._seen = call

    def stop(self) -> None:
        _composed.remove_watcher(self)
        self._seen = None

    def sampling_call(self, args, name: str):
        """The record of a call of a layer or a sampler, after its forward pass."""
        link = args.link
        if isinstance(link, DeformableConvolution2DSampler):
            given = _arguments(args, 'x', 'offset', 'mask')
            x_shape, mask = given['x'].shape, given.get('mask')
            return SamplingCall(name, link, x_shape, given['offset'], mask)
        if self._seen is None:
            return None
        arrays = _as_arrays(self._seen.arrays)
        options = self._seen.options
        self.stop()
        if isinstance(link, MultiScaleDeformableAttention):
            reference = _arguments(args, 'query', 'reference')['reference']
            places, weights = arrays['locations'], arrays['weights']
            return AttentionSamplingCall(
                name, link, options['sizes'], reference, places, weights
            )
        x_shape = _arguments(args, 'x')['x'].shape
        if isinstance(link, CONVOLUTIONS):
            return SamplingCall(name, link, x_shape, arrays['offset'], arrays['mask'])
        del arrays['x']
        return RoISamplingCall(name, link, x_shape, **arrays)


def _arguments(args, *names: str) -> dict:
    """The first arguments of a link, by name."""
    return _as_arrays({**dict(zip(names, args.args)), **args.kwargs})


def _as_arrays(values: Mapping) -> dict:
    """Not the variables, which would keep the graph alive."""
    return {name: chainer.as_array(value) for name, value in values.items()}


def named_layers(model: chainer.Link, classes: tuple = OURS) -> dict[str, chainer.Link]:
    """What can be recorded in a model, by path; see :class:`SamplingHook`.

    ``classes`` are those of the layer and of its sampler, which stands for it, and
    those of layers that have none.
    """
    layer, sampler, others = classes
    layers: dict[int, tuple[str, chainer.Link]] = {}
    links = list(model.namedlinks())
    for path, link in links:
        if isinstance(link, layer) and isinstance(link.deform_conv, sampler):
            layers.setdefault(id(link.deform_conv), (path, link.deform_conv))
    for path, link in links:
        if isinstance(link, (sampler, *others)):
            layers.setdefault(id(link), (path, link))
    return {path.strip('/'): link for path, link in layers.values()}


def warn_of_unseen(
    name: str,
    models: Mapping[str, chainer.Link],
    stacklevel: int = 2,
    classes: tuple = OURS,
) -> None:
    """Warns of layers that cannot be recorded, and if there are none that can.

    Args:
        name: Who warns.
        models: The models, by how the paths of their layers begin.
        stacklevel: That of the caller's ``warnings.warn``.
        classes: What can be, as for :func:`named_layers`.

    """
    own = [
        f'{start}/{path}'.strip('/')
        for start, model in models.items()
        for path in named_layers(model, CHAINERS_OWN)
    ]
    if own:
        warnings.warn(f'{name}: {_own_layers(own)}', stacklevel=stacklevel)
    elif not any(named_layers(model, classes) for model in models.values()):
        none = _NO_LAYER
        if classes is OUR_CONVOLUTIONS:
            none = none.replace('layer', 'convolution')
        warnings.warn(f'{name}: {none} is in the model', stacklevel=stacklevel)


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
