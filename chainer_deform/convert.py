"""Offsets and parameters from and to torchvision, mmcv and ONNX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chainer
import chainer.functions as F
import numpy
from chainer import backend
from chainer.utils import type_check

from chainer_deform._checks import float_array, integer
from chainer_deform._deform_convolutions import deform_convolutions
from chainer_deform.geometry import Geometry
from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler

__all__ = [
    'deform_convolutions',
    'from_mmcv',
    'from_torchvision',
    'offset_from_interleaved',
    'offset_to_interleaved',
    'to_mmcv',
    'to_torchvision',
]


def offset_to_interleaved(offset, offset_groups: int = 1, axis: int = 1):
    """Offsets in the order of torchvision, mmcv and ONNX, from those of this package.

    This package has, as Chainer, for each offset group first the horizontal offsets of
    all taps, then the vertical ones: ``x0, x1, ..., y0, y1, ...``. The others have them
    interleaved, vertical before horizontal: ``y0, x0, y1, x1, ...``. Groups and taps
    come in the same order everywhere. Masks and filters need no conversion.

    Args:
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets, which have
            ``offset_groups * 2 * kh * kw`` channels along ``axis``. Any float dtype.
        offset_groups (int): Number of groups of input channels with offsets of their
            own.
        axis (int): Axis of the channels, not counted from the end: 1 for offsets ``(n,
            channels, out_h, out_w)``, 0 for the weight and the bias of a convolution
            that predicts them. (Where it predicts a mask too, convert the first two
            thirds of its channels only.)

    Returns:
        ~chainer.Variable or :ref:`ndarray`: A copy with the channels in the other
        order; a variable if ``offset`` is one, else an array.

    Raises:
        TypeError: ``offset`` is no array, or an option is no int.
        ValueError: An option is out of range.
        chainer.utils.type_check.InvalidType: The shape or dtype of ``offset`` does not
            fit.

    Differentiable any number of times; deterministic.

    .. seealso:: :func:`chainer_deform.convert.offset_from_interleaved`

    .. admonition:: Example

        >>> bias = np.array([10, 11, 12, 20, 21, 22], np.float32)  # x: 1., y: 2.
        >>> offset_to_interleaved(bias, axis=0)
        array([20., 10., 21., 11., 22., 12.], dtype=float32)

    """
    return _permute(offset, offset_groups, axis, inv=False)


def offset_from_interleaved(offset, offset_groups: int = 1, axis: int = 1):
    """Offsets in the order of this package, from torchvision's, mmcv's and ONNX's.

    The reverse of :func:`offset_to_interleaved`, with the same arguments, errors and
    kind of result.

    Args:
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets, which have
            ``offset_groups * 2 * kh * kw`` channels along ``axis``. Any float dtype.
        offset_groups (int): Number of groups of input channels with offsets of their
            own.
        axis (int): Axis of the channels, not counted from the end: 1 for offsets, 0 for
            the weight and the bias of a convolution that predicts them.

    Returns:
        ~chainer.Variable or :ref:`ndarray`: A copy with the channels in the other
        order; a variable if ``offset`` is one, else an array.

    Raises:
        TypeError: ``offset`` is no array, or an option is no int.
        ValueError: An option is out of range.
        chainer.utils.type_check.InvalidType: The shape or dtype of ``offset`` does not
            fit.

    Differentiable any number of times; deterministic.

    .. seealso:: :func:`chainer_deform.convert.offset_to_interleaved`

    .. admonition:: Example

        >>> bias = np.array([20, 10, 21, 11, 22, 12], np.float32)  # x: 1., y: 2.
        >>> offset_from_interleaved(bias, axis=0)
        array([10., 11., 12., 20., 21., 22.], dtype=float32)

    """
    return _permute(offset, offset_groups, axis, inv=True)


def from_torchvision(
    link: DeformableConvolution2D | DeformableConvolution2DSampler,
    state_dict: Mapping,
    *,
    prefix: str = '',
    offset_conv: str = 'offset_conv',
    mask_conv: str | None = None,
    deform_conv: str = 'deform_conv',
) -> None:
    """Copies the parameters of a torchvision layer into a link.

    torchvision's ``DeformConv2d`` is given its offsets, as
    :class:`~chainer_deform.links.DeformableConvolution2DSampler` is, and has the keys
    ``weight`` and ``bias``. For :class:`~chainer_deform.links.DeformableConvolution2D`
    torchvision has nothing: people write a module that holds a ``Conv2d`` for the
    offsets and a ``DeformConv2d``. It is converted by the names of these attributes.

    The link has to be made with the options of the module: kernel, stride, padding,
    dilation, groups, offset groups, biases. What the module does to the mask has to be
    what the link does, ``mask_scale * sigmoid(...)``; so for ``2 * sigmoid(...)`` make
    the link with ``mask_scale=2``.

    Args:
        link (~chainer_deform.links.DeformableConvolution2D or \
~chainer_deform.links.DeformableConvolution2DSampler): Where the parameters go, cast to
            its dtype and on its device. If it was made without ``in_channels``, its
            parameters are initialised. As with :func:`chainer.serializers.load_npz`,
            gradients and update rules stay as they are.
        state_dict (Mapping): The arrays by name: what ``module.state_dict()`` returns,
            with tensors on the CPU, or anything else that :func:`numpy.asarray` takes,
            bfloat16 included. It is not changed.
        prefix (str): How the keys of the layer begin, as ``'layer4.0.'``, where
            ``state_dict`` is that of a whole model. All that begin so have to be of the
            layer; others are left alone.
        offset_conv (str): Name of the convolution that predicts the offsets. Not used
            for a sampler, as the next two.
        mask_conv (str or None): Name of the convolution that predicts the mask. If
            ``None``, ``offset_conv`` does, with the last third of its channels.
        deform_conv (str): Name of the ``DeformConv2d``. ``''`` if the module is one
            itself.

    Raises:
        TypeError: ``link`` is of another class, ``state_dict`` no mapping, a name no
            str, or an array holds no real numbers, has a mask, or is not to be read by
            NumPy.
        ValueError: Keys are missing or superfluous, a shape does not fit, a number is
            too large for the dtype of its parameter, a parameter is read-only, two
            names are the same, or ``mask_conv`` is given for a link without a mask.

    Nothing is changed where there is an error, of whatever kind.

    .. seealso:: :func:`chainer_deform.convert.to_torchvision`

    .. admonition:: Example

        >>> state_dict = {  # model.state_dict(); torch tensors do as well
        ...     'stem.weight': np.zeros((6, 3, 7, 7), np.float32),
        ...     'block.offsets.weight': np.zeros((18, 6, 3, 3), np.float32),
        ...     'block.offsets.bias': np.zeros(18, np.float32),
        ...     'block.dcn.weight': np.ones((8, 6, 3, 3), np.float32),
        ... }
        >>> layer = chainer_deform.links.DeformableConvolution2D(
        ...     6, 8, 3, pad=1, deform_nobias=True
        ... )
        >>> from_torchvision(
        ...     layer,
        ...     state_dict,
        ...     prefix='block.',
        ...     offset_conv='offsets',
        ...     deform_conv='dcn',
        ... )
        >>> float(layer.deform_conv.W.array.mean())
        1.0

    """
    parts = _torchvision_parts(link, prefix, offset_conv, mask_conv, deform_conv)
    _check_mapping(state_dict)
    _load(parts, state_dict, prefix)


def to_torchvision(
    link: DeformableConvolution2D | DeformableConvolution2DSampler,
    *,
    prefix: str = '',
    offset_conv: str = 'offset_conv',
    mask_conv: str | None = None,
    deform_conv: str = 'deform_conv',
) -> dict[str, numpy.ndarray]:
    """The parameters of a link as a torchvision layer has them.

    The reverse of :func:`from_torchvision`, which says what the module has to be like.
    In torch, ``module.load_state_dict({key: torch.from_numpy(array) for key, array in
    state_dict.items()})`` takes them.

    Args:
        link (~chainer_deform.links.DeformableConvolution2D or \
~chainer_deform.links.DeformableConvolution2DSampler): The layer.
        prefix (str): How the keys are to begin.
        offset_conv (str): Name of the convolution that predicts the offsets. Not used
            for a sampler, as the next two.
        mask_conv (str or None): Name of the convolution that predicts the mask. If
            ``None``, ``offset_conv`` does, with the last third of its channels.
        deform_conv (str): Name of the ``DeformConv2d``. ``''`` if the module is one
            itself.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or a name is no str.
        ValueError: The link is not initialised yet, two names are the same, or
            ``mask_conv`` is given for a link without a mask.

    .. seealso:: :func:`chainer_deform.convert.from_torchvision`

    .. admonition:: Example

        >>> layer = chainer_deform.links.DeformableConvolution2D(
        ...     6, 8, 3, modulated=True
        ... )
        >>> state_dict = to_torchvision(layer, mask_conv='mask_conv')
        >>> for key, array in sorted(state_dict.items()):
        ...     print(key, array.shape)
        deform_conv.bias (8,)
        deform_conv.weight (8, 6, 3, 3)
        mask_conv.bias (9,)
        mask_conv.weight (9, 6, 3, 3)
        offset_conv.bias (18,)
        offset_conv.weight (18, 6, 3, 3)

    """
    parts = _torchvision_parts(link, prefix, offset_conv, mask_conv, deform_conv)
    return _save(parts)


def from_mmcv(
    link: DeformableConvolution2D | DeformableConvolution2DSampler,
    state_dict: Mapping,
    *,
    prefix: str = '',
) -> None:
    """Copies the parameters of an mmcv layer, or one like it, into a link.

    ============================= ======================================================
    mmcv                          Link
    ============================= ======================================================
    ``DeformConv2dPack``          ``DeformableConvolution2D(..., deform_nobias=True)``
    ``ModulatedDeformConv2dPack`` ``DeformableConvolution2D(..., modulated=True)``
    ``DeformConv2d``              ``DeformableConvolution2DSampler(..., nobias=True)``
    ``ModulatedDeformConv2d``     ``DeformableConvolution2DSampler(...)``
    ============================= ======================================================

    The layers of detectron2 and the ``DCN`` of CenterNet compute the same and are read,
    too. detectron2 has the offset convolution beside the layer, as
    ``'res4.0.conv2_offset.weight'``, and the normalisation after it inside, as
    ``'res4.0.conv2.norm.weight'``: with ``prefix='res4.0.conv2.'`` the former is found,
    and the latter is left alone, as it is a layer of its own in Chainer. CenterNet
    calls the offset convolution ``conv_offset_mask``.

    The link has to be made with the options of the module; ``offset_groups`` is what
    mmcv calls ``deform_groups``. The largest value of mmcv's mask is 1. If ``link`` has
    another ``mask_scale``, the filter is divided by it, so that both compute the same.

    Args:
        link (~chainer_deform.links.DeformableConvolution2D or \
~chainer_deform.links.DeformableConvolution2DSampler): Where the parameters go, cast to
            its dtype and on its device. If it was made without ``in_channels``, its
            parameters are initialised. As with :func:`chainer.serializers.load_npz`,
            gradients and update rules stay as they are.
        state_dict (Mapping): The arrays by name: what ``module.state_dict()`` returns,
            with tensors on the CPU, or anything else that :func:`numpy.asarray` takes,
            bfloat16 included. It is not changed.
        prefix (str): How the keys of the layer begin, as ``'layer4.0.conv2.'``, where
            ``state_dict`` is that of a whole model. All that begin so have to be of the
            layer, but for its ``norm``; others are left alone.

    Raises:
        TypeError: ``link`` is of another class, ``state_dict`` no mapping, ``prefix``
            no str, or an array holds no real numbers, has a mask, or is not to be read
            by NumPy.
        ValueError: Keys are missing or superfluous, a shape does not fit, a number is
            too large for the dtype of its parameter, a parameter is read-only, or
            ``mask_scale`` is 0, infinite or NaN.

    Nothing is changed where there is an error, of whatever kind.

    .. seealso:: :func:`chainer_deform.convert.to_mmcv`

    .. admonition:: Example

        >>> state_dict = {  # model.state_dict(); torch tensors do as well
        ...     'layer4.0.conv1.weight': np.zeros((6, 3, 1, 1), np.float32),
        ...     'layer4.0.conv2.weight': np.ones((8, 6, 3, 3), np.float32),
        ...     'layer4.0.conv2.conv_offset.weight': np.zeros((27, 6, 3, 3)),
        ...     'layer4.0.conv2.conv_offset.bias': np.zeros(27),
        ... }
        >>> layer = chainer_deform.links.DeformableConvolution2D(
        ...     None, 8, 3, pad=1, deform_nobias=True, modulated=True
        ... )
        >>> from_mmcv(layer, state_dict, prefix='layer4.0.conv2.')
        >>> layer.deform_conv.W.shape
        (8, 6, 3, 3)

    """
    _check_strs(prefix=prefix)
    _check_mapping(state_dict)
    offsets = (
        f'{prefix}conv_offset.',
        f'{prefix}conv_offset_mask.',  # CenterNet and early mmdetection
        f'{prefix[:-1]}_offset.',  # detectron2 and early mmdetection
    )
    if (
        isinstance(link, DeformableConvolution2D)
        and f'{prefix}weight' not in state_dict
    ):
        layers = _mmcv_layers(state_dict)
        if layers:
            raise ValueError(
                f'prefix must be that of a layer, {_listed(layers)}, not {prefix!r}'
            )
    found = [offset for offset in offsets if f'{offset}weight' in state_dict]
    offset = found[0] if found else offsets[0]
    factor = _mask_scale(link)
    if not factor or not numpy.isfinite(factor):
        raise ValueError(
            "mask_scale must not be 0, infinite or NaN, as mmcv's mask is up to 1, but "
            f'is {factor}'
        )
    parts = _parts(link, prefix, offset, factor=factor)
    _load(parts, state_dict, prefix, another=f'{prefix}norm.')


def to_mmcv(
    link: DeformableConvolution2D | DeformableConvolution2DSampler, *, prefix: str = ''
) -> dict[str, numpy.ndarray]:
    """The parameters of a link as an mmcv layer has them.

    The reverse of :func:`from_mmcv`, which says which layer fits which link. If the
    ``mask_scale`` of ``link`` is not 1, the filter is multiplied by it, so that both
    compute the same. mmcv's offset convolution has a bias in any case: it is zero if
    ``link`` has none. In torch, ``module.load_state_dict({key: torch.from_numpy(array)
    for key, array in state_dict.items()})`` takes the arrays.

    Args:
        link (~chainer_deform.links.DeformableConvolution2D or \
~chainer_deform.links.DeformableConvolution2DSampler): The layer.
        prefix (str): How the keys are to begin.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or ``prefix`` is no str.
        ValueError: The link is not initialised yet, the filter times ``mask_scale`` is
            too large for its dtype, or the link has a bias but no mask: mmcv's
            ``DeformConv2dPack`` has no bias.

    .. seealso:: :func:`chainer_deform.convert.from_mmcv`

    .. admonition:: Example

        >>> layer = chainer_deform.links.DeformableConvolution2D(
        ...     6, 8, 3, modulated=True
        ... )
        >>> for key, array in sorted(to_mmcv(layer).items()):
        ...     print(key, array.shape)
        bias (8,)
        conv_offset.bias (27,)
        conv_offset.weight (27, 6, 3, 3)
        weight (8, 6, 3, 3)

    """
    _check_strs(prefix=prefix)
    offset = f'{prefix}conv_offset.'
    state_dict = _save(_parts(link, prefix, offset, factor=_mask_scale(link)))
    if isinstance(link, DeformableConvolution2D):
        if not link.modulated and link.deform_conv.b is not None:
            raise ValueError(
                "link has a bias but no mask, and mmcv's DeformConv2dPack has no bias: "
                'make the link with deform_nobias=True'
            )
        weight = state_dict[f'{offset}weight']
        zeros = numpy.zeros(len(weight), weight.dtype)
        state_dict.setdefault(f'{offset}bias', zeros)
    return state_dict


def _mmcv_layers(state_dict: Mapping) -> set[str]:
    """How the keys of layers with an offset convolution begin."""
    layers = set()
    for key in map(str, state_dict):
        for end in '.conv_offset.weight', '.conv_offset_mask.weight', '_offset.weight':
            layer = f'{key[: -len(end)]}.'
            if key.endswith(end) and f'{layer}weight' in state_dict:
                layers.add(layer)
    return layers


class _Part(NamedTuple):
    """What an array of the other library holds of a link.

    Attributes:
        conv: The convolution that the parameter is of.
        param: The parameter; ``None`` if the link has no such bias.
        rows: Which rows of the parameter, in the other library's order.
        factor: What they are multiplied by.
        nobias: The option that says whether there is a bias.
        name: Path of the parameter in the link.

    """

    conv: chainer.Link
    param: chainer.Parameter | None
    rows: numpy.ndarray
    factor: float
    nobias: str
    name: str

    def shape(self, in_channels: int) -> tuple[int, ...]:
        """Shape of the array, for a link of so many input channels."""
        if self.param is self.conv.b:
            return (len(self.rows),)
        ksize = self.conv.ksize
        kh, kw = ksize if hasattr(ksize, '__len__') else (ksize, ksize)
        return len(self.rows), in_channels // self.conv.groups, kh, kw


def _parts(
    link, deform: str, offset: str, mask: str | None = None, factor: float = 1.0
) -> dict[str, _Part]:
    """The other library's arrays by key, that of the filter first.

    Args:
        link: The layer.
        deform: How the keys of the deformable convolution begin.
        offset: How the keys of the offset convolution begin.
        mask: How those of the mask's convolution begin, where it is another.
        factor: The other library's filter is the link's times this.

    """
    if isinstance(link, DeformableConvolution2D):
        sampler, path, nobias = link.deform_conv, 'deform_conv/', 'deform_nobias'
    else:
        _check_link(link)
        sampler, path, nobias = link, '', 'nobias'
    rows = numpy.arange(sampler.out_channels)
    convs = [(deform, sampler, rows, factor, nobias, path)]
    if link is not sampler:
        kh, kw = sampler.ksize
        order = interleaved_order(sampler.offset_groups, kh * kw)
        rows = numpy.arange(link.offset_conv.out_channels)
        rows[: len(order)] = order
        end = len(rows) if mask is None else len(order)
        rest = 1.0, 'offset_nobias', 'offset_conv/'
        convs.append((offset, link.offset_conv, rows[:end], *rest))
        if mask is not None:
            convs.append((mask, link.offset_conv, rows[end:], *rest))
    parts = {}
    for start, conv, rows, weight_factor, nobias, path in convs:
        weight = _Part(conv, conv.W, rows, weight_factor, nobias, f'{path}W')
        parts[f'{start}weight'] = weight
        parts[f'{start}bias'] = _Part(conv, conv.b, rows, 1.0, nobias, f'{path}b')
    return parts


def _torchvision_parts(
    link, prefix: str, offset_conv: str, mask_conv: str | None, deform_conv: str
) -> dict[str, _Part]:
    _check_link(link)
    names = {'offset_conv': offset_conv, 'deform_conv': deform_conv}
    if mask_conv is not None:
        names['mask_conv'] = mask_conv
        if not getattr(link, 'modulated', False):
            raise ValueError(
                'mask_conv must be None, as link has no mask of its own: it is no '
                f'DeformableConvolution2D with modulated=True; not {mask_conv!r}'
            )
    _check_strs(prefix=prefix, **names)
    if isinstance(link, DeformableConvolution2DSampler):
        return _parts(link, prefix, '')
    if len(set(names.values())) < len(names):
        raise ValueError(f'names must differ, but are {names}')
    starts = {k: f'{prefix}{name}.' if name else prefix for k, name in names.items()}
    return _parts(
        link, starts['deform_conv'], starts['offset_conv'], starts.get('mask_conv')
    )


def _mask_scale(link) -> float:
    """What the link multiplies its mask by, and so all that its filter reads."""
    return float(link.mask_scale) if getattr(link, 'modulated', False) else 1.0


def _load(
    parts: dict[str, _Part],
    state_dict: Mapping,
    prefix: str,
    another: str | None = None,
) -> None:
    """Copies arrays into the link, once all of them are found to fit.

    ``another`` is how the keys of another layer begin, if they begin with ``prefix``.
    """
    _check_keys(parts, state_dict, prefix, another)
    parts = {key: part for key, part in parts.items() if part.param is not None}
    arrays = {key: _array(key, state_dict[key]) for key in parts}
    in_channels = _in_channels(parts, arrays)
    for key, part in parts.items():
        expected, found = part.shape(in_channels), arrays[key].shape
        if found != expected:
            raise ValueError(
                f'state_dict[{key!r}] must have the shape {expected}, not {found}'
            )
    new: dict[str, tuple[chainer.Parameter, numpy.ndarray]] = {}
    for key, part in parts.items():
        shape = part.conv.out_channels, *part.shape(in_channels)[1:]
        dtype = _writable_dtype(part, shape)
        _, whole = new.setdefault(part.name, (part.param, numpy.empty(shape, dtype)))
        whole[part.rows] = _converted(
            f'state_dict[{key!r}]', part, arrays[key], numpy.divide, dtype
        )
    _write(list(new.values()))


def _save(parts: dict[str, _Part]) -> dict[str, numpy.ndarray]:
    state_dict = {}
    for key, part in parts.items():
        if part.param is None:
            continue
        if part.param.array is None:
            raise ValueError(
                'link is not initialised yet: call it once or make it with in_channels'
            )
        array = backend.CpuDevice().send(part.param.array)[part.rows]
        state_dict[key] = _converted('link', part, array, numpy.multiply, array.dtype)
    return state_dict


def _writable_dtype(part: _Part, shape: tuple[int, ...]) -> numpy.dtype:
    """The dtype of a parameter, which an array of this shape can be written into."""
    array = part.param.array
    if array is None:  # as Parameter.initialize() has it
        return chainer.get_dtype(getattr(part.param.initializer, 'dtype', None))
    if array.shape != shape:
        raise ValueError(
            f'{part.name} of link must have the shape {shape}, not {array.shape}'
        )
    flags = getattr(array, 'flags', None)
    if not getattr(flags, 'writeable', True):  # arrays on a GPU always are
        raise ValueError(f'{part.name} of link must not be read-only')
    return array.dtype


def _converted(
    where: str, part: _Part, array: numpy.ndarray, scale: Callable, dtype: numpy.dtype
) -> numpy.ndarray:
    """An array divided or multiplied by the factor, in another dtype.

    Raises:
        ValueError: A number becomes infinite or NaN.

    """
    with numpy.errstate(all='ignore'):
        result = scale(array, part.factor, dtype=float).astype(dtype)
    lost = numpy.isfinite(array) & ~numpy.isfinite(result)
    if lost.any():
        verb = 'divided' if scale is numpy.divide else 'multiplied'
        scaled = '' if part.factor == 1 else f' {verb} by mask_scale, {part.factor},'
        raise ValueError(
            f'{where} has the number {array[lost][0]}, which{scaled} is too large for '
            f'{part.name}, {dtype} (at most {numpy.finfo(dtype).max})'
        )
    return result


def _write(new: list[tuple[chainer.Parameter, numpy.ndarray]]) -> None:
    """Writes arrays into parameters: into all of them or, with an error, into none."""
    old = []
    try:
        for param, array in new:
            before = param.array if param.array is None else param.array.copy()
            old.append((param, before, dict(vars(param))))
            if before is None:
                param.initialize(array.shape)
            with chainer.using_device(param.device):
                param.array[...] = param.device.send(array)
    except BaseException:
        for param, before, attributes in old:
            with contextlib.suppress(Exception):  # the one that cannot be written
                if before is None:
                    param.array = None
                    vars(param).update(attributes)
                else:
                    param.array[...] = before
        raise


def _in_channels(parts: dict[str, _Part], arrays: dict) -> int:
    """The link's number of input channels; that of the filter's array if it has none.

    Raises:
        ValueError: The array does not fit any number.

    """
    for conv in {id(part.conv): part.conv for part in parts.values()}.values():
        if conv.W.array is not None:
            return conv.W.shape[1] * conv.groups
    key, part = next(iter(parts.items()))
    shape, conv = arrays[key].shape, part.conv
    if len(shape) != 4:
        kh, kw = conv.ksize
        raise ValueError(
            f'state_dict[{key!r}] must have the shape ({conv.out_channels}, '
            f'in_channels / {conv.groups}, {kh}, {kw}), not {shape}'
        )
    in_channels = shape[1] * conv.groups
    geometry = Geometry(
        conv.ksize, groups=conv.groups, offset_groups=conv.offset_groups
    )
    geometry.W_shape(in_channels, conv.out_channels)  # which checks the groups
    return in_channels


def _array(key: str, value) -> numpy.ndarray:
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(
            f'state_dict[{key!r}] must be an array without a mask, not a '
            f'{type(value).__name__}: fill it, as with .filled(0)'
        )
    try:
        if str(getattr(value, 'dtype', '')) == 'torch.bfloat16':
            value = value.float()  # NumPy has no such dtype
        array = numpy.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # say, on a GPU
        raise TypeError(
            f'state_dict[{key!r}] must be an array that NumPy can read, not a '
            f'{type(value).__name__}: {error}'
        ) from error
    if array.dtype.name == 'bfloat16':  # of ml_dtypes
        array = array.astype(numpy.float32)
    if array.dtype.kind not in 'fiu':
        hint = ''
        if array.dtype == 'V2':
            hint = ' (bfloat16 from a file? array.view(ml_dtypes.bfloat16) makes it so)'
        raise TypeError(
            f'state_dict[{key!r}] must hold real numbers, not {array.dtype}{hint}'
        )
    return array


def _check_keys(
    parts: dict[str, _Part], state_dict: Mapping, prefix: str, another: str | None
) -> None:
    expected = {key for key, part in parts.items() if part.param is not None}
    # str(), as a mapping may have other keys.
    found = {key for key in state_dict if str(key).startswith(prefix) or key in parts}
    if another is not None:
        found = {key for key in found if not str(key).startswith(another)}
    if found == expected:
        return
    message = f'state_dict must have the keys {_listed(expected)}'
    if prefix:
        message += f' and no others that begin with {prefix!r}'
    wrong = []
    if expected - found:
        wrong.append(f'lacks {_listed(expected - found)}')
    if found - expected:
        wrong.append(f'has {_listed(found - expected)} besides')
    message += ', but ' + ', and '.join(wrong)
    for key, part in parts.items():
        weight = f'{key[: -len("bias")]}weight'
        if (
            key.endswith('bias')
            and weight in found
            and (key in found) != (key in expected)
        ):
            message += (
                f'; {"with" if key in found else "without"} {key!r} the link has to be '
                f'made with {part.nobias}={key not in found}'
            )
    raise ValueError(message + _hint_for_plain_weights(parts, found, prefix))


def _hint_for_plain_weights(parts: dict[str, _Part], found: set, prefix: str) -> str:
    """What to do with weights that have none of an offset convolution beside them."""
    weight, part = next(iter(parts.items()))
    if part.nobias == 'nobias':  # link is a sampler
        return ''
    for start in weight[: -len('weight')], prefix:
        if f'{start}weight' in found and found <= {f'{start}weight', f'{start}bias'}:
            return (
                '; for weights alone, without an offset convolution, give '
                f'link.deform_conv in the place of link, with prefix={start!r}'
            )
    return ''


def _listed(keys) -> str:
    """Some keys, as the state of a whole model has hundreds."""
    names = sorted(map(repr, keys))
    rest = len(names) - 8
    return ', '.join(names[:8]) + (f' and {rest} more' if rest > 0 else '')


def _check_link(link) -> None:
    classes = DeformableConvolution2D, DeformableConvolution2DSampler
    if not isinstance(link, classes):
        raise TypeError(
            'link must be a DeformableConvolution2D or a '
            f'DeformableConvolution2DSampler of chainer_deform, not a {type(link)}'
        )


def _check_mapping(state_dict) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            'state_dict must be a mapping from names to arrays, not a '
            f'{type(state_dict).__name__}'
        )


def _check_strs(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f'{name} must be a str, not {value!r}')


def _permute(offset, offset_groups: int, axis: int, inv: bool):
    array = float_array('offset', offset)
    offset_groups = integer('offset_groups', offset_groups, minimum=1)
    axis = integer('axis', axis, minimum=0)
    if axis >= array.ndim or array.shape[axis] % (2 * offset_groups):
        raise type_check.InvalidType(
            f'offset.shape[{axis}] is a multiple of 2 * offset_groups == '
            f'{2 * offset_groups}',
            f'offset.shape == {array.shape}',
        )
    order = interleaved_order(offset_groups, array.shape[axis] // (2 * offset_groups))
    order = backend.get_device_from_array(array).send(order)
    permuted = F.permutate(offset, order, axis, inv)
    return permuted if isinstance(offset, chainer.Variable) else permuted.array


def interleaved_order(offset_groups: int, taps: int) -> numpy.ndarray:
    """Where the channels of the interleaved order are in this package's."""
    order = numpy.arange(offset_groups * 2 * taps, dtype=numpy.int64)
    order = order.reshape(offset_groups, 2, taps)
    # (offset group, x or y, tap) -> (offset group, tap, y or x)
    return order[:, ::-1].transpose(0, 2, 1).ravel()
