"""Offsets and parameters from and to torchvision, mmcv, ONNX and other programs."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import chainer
import chainer.functions as F
import numpy
from chainer import backend
from chainer.utils import type_check

from chainer_deform._checks import float_array, integer
from chainer_deform._deform_convolutions import deform_convolutions
from chainer_deform._state_dicts import (
    Part,
    check_mapping,
    check_strs,
    listed,
    load,
    save,
)
from chainer_deform.geometry import Geometry
from chainer_deform.links import (
    DCNv3,
    DCNv4,
    DeformableConvolution2D,
    DeformableConvolution2DSampler,
    DeformableRoIPooling2D,
    MultiScaleDeformableAttention,
)

__all__ = [
    'deform_convolutions',
    'from_dcnv4',
    'from_deformable_detr',
    'from_internimage',
    'from_mmcv',
    'from_torchvision',
    'offset_from_interleaved',
    'offset_to_interleaved',
    'to_dcnv4',
    'to_deformable_detr',
    'to_internimage',
    'to_mmcv',
    'to_torchvision',
]


_CONVOLUTIONS = DeformableConvolution2D, DeformableConvolution2DSampler


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
    check_mapping(state_dict)
    _load(link, parts, state_dict, prefix)


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
    return save(parts)


def from_mmcv(link: chainer.Link, state_dict: Mapping, *, prefix: str = '') -> None:
    """Copies the parameters of an mmcv layer, or one like it, into a link.

    ================================= ==================================================
    mmcv                              Link
    ================================= ==================================================
    ``DeformConv2dPack``              ``DeformableConvolution2D(...,
                                      deform_nobias=True)``
    ``ModulatedDeformConv2dPack``     ``DeformableConvolution2D(..., modulated=True)``
    ``DeformConv2d``                  ``DeformableConvolution2DSampler(...,
                                      nobias=True)``
    ``ModulatedDeformConv2d``         ``DeformableConvolution2DSampler(...)``
    ``DeformRoIPoolPack``             ``DeformableRoIPooling2D(...)``
    ``ModulatedDeformRoIPoolPack``    ``DeformableRoIPooling2D(..., modulated=True)``
    ``MultiScaleDeformableAttention`` ``MultiScaleDeformableAttention(...)``
    ================================= ==================================================

    The layers of detectron2 and the ``DCN`` of CenterNet compute the same and are read,
    too. detectron2 has the offset convolution beside the layer, as
    ``'res4.0.conv2_offset.weight'``, and the normalisation after it inside, as
    ``'res4.0.conv2.norm.weight'``: with ``prefix='res4.0.conv2.'`` the former is found,
    and the latter is left alone, as it is a layer of its own in Chainer. CenterNet
    calls the offset convolution ``conv_offset_mask``.

    The link has to be made with the options of the module; ``offset_groups`` is what
    mmcv calls ``deform_groups``. The largest value of mmcv's mask is 1. If ``link`` has
    another ``mask_scale``, the filter is divided by it, so that both compute the same.

    mmcv's boxes have the image's number first, then ``x`` and ``y`` of two corners, and
    a ``sampling_ratio`` of 0 is ``None``. Its attention adds the query to its result.

    Args:
        link (~chainer.Link): Where the parameters go, cast to its dtype and on its
            device; one of the links above. If it was made without ``in_channels``, its
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
            too large for the dtype of its parameter, a parameter is read-only,
            ``mask_scale`` is 0, infinite or NaN, or attention has other numbers of
            input and output channels.

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
    check_strs(prefix=prefix)
    parts = _other_mmcv_parts(link, prefix)
    if parts is not None:
        load(parts, state_dict, prefix)
        return
    check_mapping(state_dict)
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
                f'prefix must be that of a layer, {listed(layers)}, not {prefix!r}'
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
    _load(link, parts, state_dict, prefix, another=f'{prefix}norm.')


def to_mmcv(link: chainer.Link, *, prefix: str = '') -> dict[str, numpy.ndarray]:
    """The parameters of a link as an mmcv layer has them.

    The reverse of :func:`from_mmcv`, which says which layer fits which link. If the
    ``mask_scale`` of ``link`` is not 1, the filter is multiplied by it, so that both
    compute the same. mmcv's offset convolution has a bias in any case: it is zero if
    ``link`` has none. In torch, ``module.load_state_dict({key: torch.from_numpy(array)
    for key, array in state_dict.items()})`` takes the arrays.

    Args:
        link (~chainer.Link): The layer, one of those that :func:`from_mmcv` lists.
        prefix (str): How the keys are to begin.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or ``prefix`` is no str.
        ValueError: The link is not initialised yet, the filter times ``mask_scale`` is
            too large for its dtype, attention has other numbers of input and output
            channels, or a convolution has a bias but no mask: mmcv's
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
    check_strs(prefix=prefix)
    parts = _other_mmcv_parts(link, prefix)
    if parts is not None:
        return save(parts)
    offset = f'{prefix}conv_offset.'
    state_dict = save(_parts(link, prefix, offset, factor=_mask_scale(link)))
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


def from_internimage(link: DCNv3, state_dict: Mapping, *, prefix: str = '') -> None:
    """Copies the parameters of InternImage's DCNv3 module into a link.

    The link has to be made with the options of the module: ``channels`` are both
    ``in_channels`` and ``out_channels``, ``kernel_size`` is ``ksize``, ``dilation``
    ``dilate``, ``group`` ``offset_groups``, ``dw_kernel_size`` ``dw_ksize`` and
    ``center_feature_scale`` ``center_scale``. The module must have ``pad=dilation *
    (kernel_size - 1) / 2``, as it keeps the size of its input, ``act_layer='GELU'`` and
    ``norm_layer='LN'``. Its images have their channels last, those of the link first.

    Args:
        link (~chainer_deform.links.DCNv3): Where the parameters go, cast to its dtype
            and on its device. If it was made without ``in_channels``, its parameters
            are initialised. As with :func:`chainer.serializers.load_npz`, gradients and
            update rules stay as they are.
        state_dict (Mapping): The arrays by name: what ``module.state_dict()`` returns,
            with tensors on the CPU, or anything else that :func:`numpy.asarray` takes,
            bfloat16 included. It is not changed.
        prefix (str): How the keys of the layer begin, as ``'levels.0.blocks.0.dcn.'``,
            where ``state_dict`` is that of a whole model. All that begin so have to be
            of the layer; others are left alone.

    Raises:
        TypeError: ``link`` is of another class, ``state_dict`` no mapping, ``prefix``
            no str, or an array holds no real numbers, has a mask, or is not to be read
            by NumPy.
        ValueError: Keys are missing or superfluous, a shape does not fit, a number is
            too large for the dtype of its parameter, a parameter is read-only, or
            ``in_channels`` of ``link`` are not its ``out_channels``.

    Nothing is changed where there is an error, of whatever kind.

    .. seealso:: :func:`chainer_deform.convert.to_internimage`

    .. admonition:: Example

        >>> layer = chainer_deform.links.DCNv3(8, 8, offset_groups=2)
        >>> state_dict = to_internimage(layer, prefix='dcn.')  # or model.state_dict()
        >>> state_dict['dcn.offset.bias'][:2] = 1, 2  # x and y of the first tap
        >>> from_internimage(layer, state_dict, prefix='dcn.')
        >>> layer.offset_conv.b.array[[0, 9]]
        array([1., 2.], dtype=float32)

    """
    load(_internimage_parts(link, prefix), state_dict, prefix)


def to_internimage(link: DCNv3, *, prefix: str = '') -> dict[str, numpy.ndarray]:
    """The parameters of a link as InternImage's DCNv3 module has them.

    The reverse of :func:`from_internimage`, which says what the module has to be like.
    In torch, ``module.load_state_dict({key: torch.from_numpy(array) for key, array in
    state_dict.items()})`` takes the arrays.

    Args:
        link (~chainer_deform.links.DCNv3): The layer.
        prefix (str): How the keys are to begin.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or ``prefix`` is no str.
        ValueError: The link is not initialised yet, or its ``in_channels`` are not its
            ``out_channels``.

    .. seealso:: :func:`chainer_deform.convert.from_internimage`

    .. admonition:: Example

        >>> layer = chainer_deform.links.DCNv3(8, 8, offset_groups=2)
        >>> for key, array in sorted(to_internimage(layer).items()):
        ...     print(key, array.shape)
        dw_conv.0.bias (8,)
        dw_conv.0.weight (8, 1, 3, 3)
        dw_conv.1.1.bias (8,)
        dw_conv.1.1.weight (8,)
        input_proj.bias (8,)
        input_proj.weight (8, 8)
        mask.bias (18,)
        mask.weight (18, 8)
        offset.bias (36,)
        offset.weight (36, 8)
        output_proj.bias (8,)
        output_proj.weight (8, 8)

    """
    return save(_internimage_parts(link, prefix))


def from_dcnv4(link: DCNv4, state_dict: Mapping, *, prefix: str = '') -> None:
    """Copies the parameters of the authors' DCNv4 module into a link.

    The link has to be made with the options of the module: ``channels`` are both
    ``in_channels`` and ``out_channels``, ``kernel_size`` is ``ksize``, ``dilation``
    ``dilate``, ``group`` ``offset_groups``, ``dw_kernel_size`` ``dw_ksize``,
    ``center_feature_scale`` ``center_scale``, ``output_bias`` ``not output_nobias`` and
    ``without_pointwise`` ``not pointwise``. The module must have ``pad=dilation *
    (kernel_size - 1) / 2``, as it keeps the size of its input. Its images are ``(n,
    h * w, c)``, those of the link ``(n, c, h, w)``.

    The module predicts a multiple of 8 numbers per pixel. What it does not use of them
    is left out.

    Args:
        link (~chainer_deform.links.DCNv4): Where the parameters go, cast to its dtype
            and on its device. If it was made without ``in_channels``, its parameters
            are initialised. As with :func:`chainer.serializers.load_npz`, gradients and
            update rules stay as they are.
        state_dict (Mapping): The arrays by name: what ``module.state_dict()`` returns,
            with tensors on the CPU, or anything else that :func:`numpy.asarray` takes,
            bfloat16 included. It is not changed.
        prefix (str): How the keys of the layer begin, as ``'levels.0.blocks.0.dcn.'``,
            where ``state_dict`` is that of a whole model. All that begin so have to be
            of the layer; others are left alone.

    Raises:
        TypeError: ``link`` is of another class, ``state_dict`` no mapping, ``prefix``
            no str, or an array holds no real numbers, has a mask, or is not to be read
            by NumPy.
        ValueError: Keys are missing or superfluous, a shape does not fit, a number is
            too large for the dtype of its parameter, a parameter is read-only, or
            ``in_channels`` of ``link`` are not its ``out_channels``.

    Nothing is changed where there is an error, of whatever kind.

    .. seealso:: :func:`chainer_deform.convert.to_dcnv4`

    .. admonition:: Example

        >>> layer = chainer_deform.links.DCNv4(8, 8, offset_groups=2)
        >>> state_dict = to_dcnv4(layer, prefix='dcn.')  # or model.state_dict()
        >>> state_dict['dcn.offset_mask.bias'][18] = 3  # weight of the first tap
        >>> from_dcnv4(layer, state_dict, prefix='dcn.')
        >>> float(layer.offset_conv.b.array[36])
        3.0

    """
    load(_dcnv4_parts(link, prefix), state_dict, prefix)


def to_dcnv4(link: DCNv4, *, prefix: str = '') -> dict[str, numpy.ndarray]:
    """The parameters of a link as the authors' DCNv4 module has them.

    The reverse of :func:`from_dcnv4`, which says what the module has to be like. What
    the module does not use is 0. In torch, ``module.load_state_dict({key:
    torch.from_numpy(array) for key, array in state_dict.items()})`` takes the arrays.

    Args:
        link (~chainer_deform.links.DCNv4): The layer.
        prefix (str): How the keys are to begin.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or ``prefix`` is no str.
        ValueError: The link is not initialised yet, or its ``in_channels`` are not its
            ``out_channels``.

    .. seealso:: :func:`chainer_deform.convert.from_dcnv4`

    .. admonition:: Example

        54 numbers for each pixel, and 2 that are not used:

        >>> layer = chainer_deform.links.DCNv4(8, 8, offset_groups=2)
        >>> for key, array in sorted(to_dcnv4(layer).items()):
        ...     print(key, array.shape)
        offset_mask.bias (56,)
        offset_mask.weight (56, 8)
        output_proj.bias (8,)
        output_proj.weight (8, 8)
        value_proj.bias (8,)
        value_proj.weight (8, 8)

    """
    return save(_dcnv4_parts(link, prefix))


def from_deformable_detr(
    link: MultiScaleDeformableAttention, state_dict: Mapping, *, prefix: str = ''
) -> None:
    """Copies the parameters of Deformable DETR's attention into a link.

    That is the module ``MSDeformAttn``; those of the transformers package and of mmcv
    have the same parameters. The link has to be made with the options of the module:
    ``d_model`` are both ``in_channels`` and ``out_channels``, ``n_levels`` is
    ``levels``, ``n_heads`` ``heads`` and ``n_points`` ``points``.

    Args:
        link (~chainer_deform.links.MultiScaleDeformableAttention): Where the parameters
            go, cast to its dtype and on its device. If it was made without
            ``in_channels``, its parameters are initialised. As with
            :func:`chainer.serializers.load_npz`, gradients and update rules stay as
            they are.
        state_dict (Mapping): The arrays by name: what ``module.state_dict()`` returns,
            with tensors on the CPU, or anything else that :func:`numpy.asarray` takes,
            bfloat16 included. It is not changed.
        prefix (str): How the keys of the layer begin, as
            ``'transformer.encoder.layers.0.self_attn.'``, where ``state_dict`` is that
            of a whole model. All that begin so have to be of the layer; others are left
            alone.

    Raises:
        TypeError: ``link`` is of another class, ``state_dict`` no mapping, ``prefix``
            no str, or an array holds no real numbers, has a mask, or is not to be read
            by NumPy.
        ValueError: Keys are missing or superfluous, a shape does not fit, a number is
            too large for the dtype of its parameter, a parameter is read-only, or
            ``in_channels`` of ``link`` are not its ``out_channels``.

    Nothing is changed where there is an error, of whatever kind.

    .. seealso:: :func:`chainer_deform.convert.to_deformable_detr`

    .. admonition:: Example

        >>> layer = chainer_deform.links.MultiScaleDeformableAttention(None, 16)
        >>> other = chainer_deform.links.MultiScaleDeformableAttention(16, 16)
        >>> state_dict = to_deformable_detr(other, prefix='a.')  # or model.state_dict()
        >>> from_deformable_detr(layer, state_dict, prefix='a.')
        >>> layer.offset_fc.W.shape
        (256, 16)

    """
    load(_attention_parts(link, prefix), state_dict, prefix)


def to_deformable_detr(
    link: MultiScaleDeformableAttention, *, prefix: str = ''
) -> dict[str, numpy.ndarray]:
    """The parameters of a link as Deformable DETR's attention has them.

    The reverse of :func:`from_deformable_detr`, which says what the module has to be
    like. In torch, ``module.load_state_dict({key: torch.from_numpy(array) for key,
    array in state_dict.items()})`` takes the arrays.

    Args:
        link (~chainer_deform.links.MultiScaleDeformableAttention): The layer.
        prefix (str): How the keys are to begin.

    Returns:
        dict: NumPy arrays by name, copies, of the dtype of the parameters.

    Raises:
        TypeError: ``link`` is of another class, or ``prefix`` is no str.
        ValueError: The link is not initialised yet, or its ``in_channels`` are not its
            ``out_channels``.

    .. seealso:: :func:`chainer_deform.convert.from_deformable_detr`

    .. admonition:: Example

        >>> layer = chainer_deform.links.MultiScaleDeformableAttention(16, 16)
        >>> for key, array in sorted(to_deformable_detr(layer).items()):
        ...     print(key, array.shape)
        attention_weights.bias (128,)
        attention_weights.weight (128, 16)
        output_proj.bias (16,)
        output_proj.weight (16, 16)
        sampling_offsets.bias (256,)
        sampling_offsets.weight (256, 16)
        value_proj.bias (16,)
        value_proj.weight (16, 16)

    """
    return save(_attention_parts(link, prefix))


def _other_mmcv_parts(link, prefix: str) -> dict[str, Part] | None:
    """What mmcv's layers other than convolutions hold; None if link is one of these."""
    others = DeformableRoIPooling2D, MultiScaleDeformableAttention
    _check_class(link, *_CONVOLUTIONS, *others)
    if isinstance(link, DeformableRoIPooling2D):
        return _roi_pooling_parts(link, prefix)
    if isinstance(link, MultiScaleDeformableAttention):
        return _attention_parts(link, prefix)
    return None


def _mmcv_layers(state_dict: Mapping) -> set[str]:
    """How the keys of layers with an offset convolution begin."""
    layers = set()
    for key in map(str, state_dict):
        for end in '.conv_offset.weight', '.conv_offset_mask.weight', '_offset.weight':
            layer = f'{key[: -len(end)]}.'
            if key.endswith(end) and f'{layer}weight' in state_dict:
                layers.add(layer)
    return layers


def _parts(
    link, deform: str, offset: str, mask: str | None = None, factor: float = 1.0
) -> dict[str, Part]:
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
        sampler, path, nobias = link, '', 'nobias'
    rows = numpy.arange(sampler.out_channels)
    convs: list[tuple] = [(deform, sampler, rows, factor, nobias, path)]
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
        out_channels, share = conv.out_channels, Fraction(1, conv.groups)
        parts[f'{start}weight'] = Part(
            conv.W,
            f'{path}W',
            (out_channels, None, *sampler.ksize),
            rows=rows,
            factor=weight_factor,
            share=share,
        )
        options = f'{nobias}=False', f'{nobias}=True'
        parts[f'{start}bias'] = Part(
            conv.b, f'{path}b', (out_channels,), rows=rows, options=options
        )
    return parts


def _load(
    link, parts: dict[str, Part], state_dict: Mapping, prefix: str, another=None
) -> None:
    """Copies arrays into a deformable convolution."""
    sampler = link.deform_conv if isinstance(link, DeformableConvolution2D) else link
    geometry = Geometry(
        sampler.ksize, groups=sampler.groups, offset_groups=sampler.offset_groups
    )

    def check(in_channels):
        geometry.W_shape(in_channels, sampler.out_channels)  # which checks the groups

    def hint(found):
        return '' if link is sampler else _hint_for_plain_weights(parts, found, prefix)

    load(parts, state_dict, prefix, another, check, hint)


def _hint_for_plain_weights(parts: dict[str, Part], found: set, prefix: str) -> str:
    """What to do with weights that have none of an offset convolution beside them."""
    weight = next(iter(parts))
    for start in weight[: -len('weight')], prefix:
        if f'{start}weight' in found and found <= {f'{start}weight', f'{start}bias'}:
            return (
                '; for weights alone, without an offset convolution, give '
                f'link.deform_conv in the place of link, with prefix={start!r}'
            )
    return ''


def _torchvision_parts(
    link, prefix: str, offset_conv: str, mask_conv: str | None, deform_conv: str
) -> dict[str, Part]:
    _check_class(link, *_CONVOLUTIONS)
    names = {'offset_conv': offset_conv, 'deform_conv': deform_conv}
    if mask_conv is not None:
        names['mask_conv'] = mask_conv
        if not getattr(link, 'modulated', False):
            raise ValueError(
                'mask_conv must be None, as link has no mask of its own: it is no '
                f'DeformableConvolution2D with modulated=True; not {mask_conv!r}'
            )
    check_strs(prefix=prefix, **names)
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


def _internimage_parts(link, prefix: str) -> dict[str, Part]:
    _check_class(link, DCNv3)
    check_strs(prefix=prefix)
    c = _channels(link, link.input_proj, link.offset_conv)
    offset_rows, mask_rows = _column_by_column(link)
    dw_conv, norm = link.dw_conv, link.norm
    return {
        **_projection(f'{prefix}input_proj.', link, 'input_proj', c),
        f'{prefix}dw_conv.0.weight': _depthwise_weight(dw_conv, c),
        f'{prefix}dw_conv.0.bias': Part(dw_conv.b, 'dw_conv/b', (c,)),
        f'{prefix}dw_conv.1.1.weight': Part(norm.gamma, 'norm/gamma', (c,)),
        f'{prefix}dw_conv.1.1.bias': Part(norm.beta, 'norm/beta', (c,)),
        **_projection(f'{prefix}offset.', link, 'offset_conv', c, offset_rows),
        **_projection(f'{prefix}mask.', link, 'mask_conv', c, mask_rows),
        **_projection(f'{prefix}output_proj.', link, 'output_proj', c),
        **_center_parts(prefix, link, c),
    }


def _dcnv4_parts(link, prefix: str) -> dict[str, Part]:
    _check_class(link, DCNv4)
    check_strs(prefix=prefix)
    c = _channels(link, link.offset_conv)
    groups = link.offset_groups
    offset_rows, mask_rows = _column_by_column(link)
    # For each group its offsets, then its weights; together a multiple of 8.
    rows = numpy.concatenate(
        [
            offset_rows.reshape(groups, -1),
            len(offset_rows) + mask_rows.reshape(groups, -1),
        ],
        axis=1,
    ).ravel()
    rows = numpy.pad(rows, (0, -len(rows) % 8), constant_values=-1)
    dw_conv, dw = link.dw_conv, f'{prefix}offset_mask_dw.'
    parts = _projection(f'{prefix}offset_mask.', link, 'offset_conv', c, rows)
    parts[f'{dw}weight'] = _depthwise_weight(dw_conv, c)
    parts[f'{dw}bias'] = Part(getattr(dw_conv, 'b', None), 'dw_conv/b', (c,))
    for key, name in ('value_proj', 'input_proj'), ('output_proj', 'output_proj'):
        start = f'{prefix}{key}.'
        parts.update(_projection(start, link, name, c, option='pointwise'))
    output_bias = f'{prefix}output_proj.bias'
    parts[output_bias] = parts[output_bias]._replace(
        options=('output_nobias=False', 'output_nobias=True')
    )
    return {**parts, **_center_parts(prefix, link, c)}


def _attention_parts(link, prefix: str) -> dict[str, Part]:
    _check_class(link, MultiScaleDeformableAttention)
    check_strs(prefix=prefix)
    c = _channels(link, link.offset_fc, link.value_fc)
    parts = {}
    for key, name in (
        ('sampling_offsets', 'offset_fc'),
        ('attention_weights', 'weight_fc'),
        ('value_proj', 'value_fc'),
        ('output_proj', 'output_fc'),
    ):
        fc, start = getattr(link, name), f'{prefix}{key}.'
        parts[f'{start}weight'] = Part(fc.W, f'{name}/W', (fc.out_size, c))
        parts[f'{start}bias'] = Part(fc.b, f'{name}/b', (fc.out_size,))
    return parts


def _roi_pooling_parts(link: DeformableRoIPooling2D, prefix: str) -> dict[str, Part]:
    bins = link.outsize[0] * link.outsize[1]
    size = link.fc_size
    options = 'modulated=True', 'modulated=False'
    parts = {}
    for name, index, shape in (
        ('offset_fc', 0, (size, None)),
        ('offset_fc', 1, (size, size)),
        ('offset_fc', 2, (2 * bins, size)),
        ('mask_fc', 0, (size, None)),
        ('mask_fc', 1, (bins, size)),
    ):
        # mmcv counts the rectifiers, too.
        path, start = f'{name}/{index}', f'{prefix}{name}.{2 * index}.'
        fc = None
        if name == 'offset_fc' or link.modulated:
            fc = getattr(link, name)[index]
        W, b = (None, None) if fc is None else (fc.W, fc.b)
        parts[f'{start}weight'] = Part(W, f'{path}/W', shape, share=Fraction(bins))
        parts[f'{start}bias'] = Part(b, f'{path}/b', shape[:1])
    weight = f'{prefix}mask_fc.0.weight'
    parts[weight] = parts[weight]._replace(options=options)
    return parts


def _projection(
    start: str, link, name: str, in_channels: int, rows=None, option=None
) -> dict[str, Part]:
    """A 1 x 1 convolution of the link, which is a fully connected layer of theirs.

    ``option`` is the link's, False if it has no such convolution.
    """
    conv = getattr(link, name, None)
    if conv is None:
        W, b, out_channels = None, None, in_channels
    else:
        W, b, out_channels = conv.W, conv.b, conv.out_channels
    count = out_channels if rows is None else len(rows)
    weight = Part(
        W,
        f'{name}/W',
        (out_channels, in_channels, 1, 1),
        (count, in_channels),
        rows,
        options=option and (f'{option}=True', f'{option}=False'),
    )
    bias = Part(b, f'{name}/b', (out_channels,), rows=rows)
    return {f'{start}weight': weight, f'{start}bias': bias}


def _depthwise_weight(conv, channels: int) -> Part:
    ksize = (1, 1) if conv is None else conv.ksize
    return Part(
        getattr(conv, 'W', None),
        'dw_conv/W',
        (1, channels, *ksize),
        (channels, 1, *ksize),
        options=('a dw_ksize', 'dw_ksize=None'),
    )


def _center_parts(prefix: str, link, channels: int) -> dict[str, Part]:
    start = f'{prefix}center_feature_scale_proj_'
    return _projection(start, link, 'center_conv', channels, option='center_scale')


def _column_by_column(link) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Where the channels of DCNv3's offsets and weights are in those of the link.

    Theirs have the taps column by column, and x and y of a tap side by side.
    """
    kh, kw = link.ksize
    taps = numpy.arange(kh * kw).reshape(kh, kw).T.ravel()
    if link.remove_center:
        center = len(taps) // 2
        taps = taps[taps != center]
        taps -= taps > center
    K = len(taps)
    groups = numpy.arange(link.offset_groups)
    # (G, tap, xy), (G, tap)
    offset_rows = groups[:, None, None] * 2 * K + taps[:, None] + [0, K]
    mask_rows = groups[:, None] * K + taps
    return offset_rows.ravel(), mask_rows.ravel()


def _channels(link, *layers) -> int:
    """The number of input and of output channels of the link, which must be the same.

    ``layers`` are those that read the input.
    """
    found = {layer.W.shape[1] for layer in layers if layer.W.array is not None}
    for in_channels in found | {link.in_channels} - {None}:
        if in_channels != link.out_channels:
            raise ValueError(
                'link must have as many input channels as output channels, but has '
                f'in_channels={in_channels} and out_channels={link.out_channels}'
            )
    return link.out_channels


def _check_class(link, *expected: type) -> None:
    if not isinstance(link, expected):
        names = ' or a '.join(c.__name__ for c in expected)
        raise TypeError(f'link must be a {names} of chainer_deform, not a {type(link)}')


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
    order = numpy.arange(offset_groups * 2 * taps, dtype=numpy.int64).reshape(
        offset_groups, 2, taps
    )
    # (offset group, x or y, tap) -> (offset group, tap, y or x)
    return order[:, ::-1].transpose(0, 2, 1).ravel()
