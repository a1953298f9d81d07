"""The layers of deformable convolution: with its offset convolution, and without."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import initializers, serializers
from chainer.utils import type_check

from chainer_deform._checks import boolean, float_array, integer, positive
from chainer_deform.functions.deformable_convolution_2d_sampler import (
    deformable_convolution_2d_sampler,
)
from chainer_deform.geometry import Geometry


class DeformableConvolution2D(chainer.Chain):
    """Deformable convolutional layer that predicts its offsets from its input.

    An ordinary convolution, ``offset_conv``, predicts an offset in pixels for each
    sampling point of ``deform_conv``, a deformable convolution of the same kernel,
    stride, pad and dilation. Both read the layer's input, or ``offset_conv`` another
    feature map of that size, ``offset_input``.

    The defaults follow the papers: ``offset_conv`` starts at zero, so that the layer
    begins as a plain convolution, and the filter of ``deform_conv`` starts as that of
    :class:`chainer.links.Convolution2D`. (Chainer's own layer has it the other way
    round: its filter starts at zero and its offsets at random.)

    Args:
        in_channels (int or None): Number of input channels. If ``None``, the parameters
            are initialised at the first call.
        out_channels (int): Number of output channels.
        ksize (int or pair of ints): Size ``(kh, kw)`` of the kernel.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        pad (int or pair of ints): Zeros ``(ph, pw)`` around the image, in pixels.
        offset_nobias (bool): If ``True``, ``offset_conv`` has no bias.
        offset_initialW (:ref:`initializer <initializer>`): Initialiser of
            ``offset_conv/W``, of shape ``(offset channels, in_channels, kh, kw)``. Zero
            if ``None``.
        offset_initial_bias (:ref:`initializer <initializer>`): Initialiser of
            ``offset_conv/b``. Zero if ``None``.
        deform_nobias (bool): If ``True``, ``deform_conv`` has no bias.
        deform_initialW (:ref:`initializer <initializer>`): Initialiser of
            ``deform_conv/W``, of shape ``(out_channels, in_channels / groups, kh,
            kw)``. :class:`~chainer.initializers.LeCunNormal` if ``None``.
        deform_initial_bias (:ref:`initializer <initializer>`): Initialiser of
            ``deform_conv/b``. Zero if ``None``.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels.
        groups (int): Number of groups of channels that are convolved separately.
        offset_groups (int): Number of groups of input channels with offsets (and a
            mask) of their own.
        modulated (bool): If ``True``, ``offset_conv`` predicts a modulation mask too
            (version 2): ``mask_scale * sigmoid(its last offset_groups * kh * kw
            channels)``.
        mask_scale (float): The largest value of the mask. At the zero start the mask is
            half of it: 0.5 for 1, as in the paper, and 1 for 2, with which a modulated
            layer, too, begins as a plain convolution.
        max_offset (float or None): How far a point can be moved along each axis, in
            pixels: ``max_offset * tanh(o / max_offset)`` takes the place of the
            predicted offset ``o``. Small offsets are hardly changed, and none explode.
            If ``None``, offsets are as predicted.
        offset_in_channels (int or None): Number of channels of ``offset_input``; that
            of the input if ``None``.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are
    ``offset_conv/W``, ``offset_conv/b``, ``deform_conv/W`` and ``deform_conv/b``, so
    that files of Chainer's own layer can be loaded. For a learning rate of
    ``offset_conv``'s own see :func:`chainer_deform.optimizer_hooks.scale_updates`.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.) and `Deformable ConvNets v2 <https://arxiv.org/abs/1811.11168>`_ (Zhu et al.).

    .. seealso:: :func:`chainer_deform.functions.deformable_convolution_2d_sampler`

    .. admonition:: Example

        >>> layer = DeformableConvolution2D(3, 8, 3, stride=2, pad=1, modulated=True)
        >>> x = np.random.uniform(0, 1, (2, 3, 10, 14)).astype(np.float32)
        >>> layer(x).shape
        (2, 8, 5, 7)
        >>> layer.offset_conv.W.shape
        (27, 3, 3, 3)

    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        ksize,
        stride=1,
        pad=0,
        offset_nobias: bool = False,
        offset_initialW=None,
        offset_initial_bias=None,
        deform_nobias: bool = False,
        deform_initialW=None,
        deform_initial_bias=None,
        *,
        dilate=1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
        mask_scale: float = 1.0,
        max_offset: float | None = None,
        offset_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.modulated = boolean('modulated', modulated)
        self.mask_scale = mask_scale
        self.max_offset = (
            None if max_offset is None else positive('max_offset', max_offset)
        )
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        if offset_in_channels is None:
            offset_in_channels = in_channels
        else:
            offset_in_channels = integer('offset_in_channels', offset_in_channels, 1)
        geometry = Geometry(ksize, stride, pad, dilate, groups, offset_groups)
        with self.init_scope():
            self.offset_conv = L.Convolution2D(
                offset_in_channels,
                (3 if modulated else 2) * geometry.offset_groups * geometry.taps,
                ksize,
                stride,
                pad,
                offset_nobias,
                0 if offset_initialW is None else offset_initialW,
                offset_initial_bias,
                dilate=dilate,
            )
            self.deform_conv = DeformableConvolution2DSampler(
                in_channels,
                out_channels,
                ksize,
                stride,
                pad,
                deform_nobias,
                deform_initialW,
                deform_initial_bias,
                dilate=dilate,
                groups=groups,
                offset_groups=offset_groups,
            )

    @property
    def printable_specs(self):
        yield from self.deform_conv.printable_specs
        for name in 'modulated', 'mask_scale', 'max_offset':
            yield name, getattr(self, name)

    def serialize(self, serializer) -> None:
        """Reads or writes the parameters.

        A file of a plain convolution fits, too: its filter and bias are read, and the
        offset convolution stays as it is.
        """
        if not _is_of_plain_convolution(serializer):
            super().serialize(serializer)
            return
        self.deform_conv.serialize(serializer)
        if self.offset_conv.W.array is None:
            in_channels = self.deform_conv.W.shape[1] * self.deform_conv.groups
            self.offset_conv._initialize_params(in_channels)

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(self, x, offset_input=None) -> chainer.Variable:
        """Applies the layer to ``x (n, in_channels, h, w)``.

        Args:
            x (:class:`~chainer.Variable` or :ref:`ndarray`): Images.
            offset_input (:class:`~chainer.Variable` or :ref:`ndarray` or None): Feature
                map ``(n, offset_in_channels, h, w)`` that the offsets (and the mask)
                are predicted from, such as that of another frame. If ``None``, ``x``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(n, out_channels, out_h, out_w)``.

        """
        n, _, h, w = check_images('x', x, self.deform_conv.in_channels)
        if offset_input is None:
            offset_input = x
        else:
            channels = self.offset_conv.in_channels
            check_images('offset_input', offset_input, channels, n, h, w)
        offset, mask = self.offset_conv(offset_input), None
        if self.modulated:
            offset, mask = F.split_axis(offset, [offset.shape[1] // 3 * 2], axis=1)
            mask = F.sigmoid(mask) * self.mask_scale
        if self.max_offset is not None:
            offset = F.tanh(offset / self.max_offset) * self.max_offset
        return self.deform_conv(x, offset, mask)


def _is_of_plain_convolution(serializer) -> bool:
    """Whether the layer is to be read from what a plain convolution has written."""
    if isinstance(serializer, serializers.NpzDeserializer):
        found, path = serializer.npz, serializer.path
    elif isinstance(serializer, serializers.HDF5Deserializer) and serializer.group:
        found, path = serializer.group, ''
    else:
        return False
    return f'{path}W' in found and f'{path}deform_conv/W' not in found


def check_images(name: str, images, c, n='n', h='h', w='w') -> tuple[int, ...]:
    """The shape of images; sizes are numbers or, where any will do, names or None."""
    shape = float_array(name, images).shape
    expected = n, 'in_channels' if c is None else c, h, w
    if len(shape) != 4 or any(
        isinstance(size, int) and size != found for size, found in zip(expected, shape)
    ):
        raise type_check.InvalidType(
            f'{name}.shape == ({", ".join(map(str, expected))})',
            f'{name}.shape == {shape}',
        )
    return shape


class DeformableConvolution2DSampler(chainer.Link):
    """Deformable convolutional layer that is given its offsets.

    Args:
        in_channels (int or None): Number of input channels. If ``None``, the filter is
            initialised at the first call.
        out_channels (int): Number of output channels.
        ksize (int or pair of ints): Size ``(kh, kw)`` of the kernel.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        pad (int or pair of ints): Zeros ``(ph, pw)`` around the image, in pixels.
        nobias (bool): If ``True``, the layer has no bias.
        initialW (:ref:`initializer <initializer>`): Initialiser of the filter ``W``, of
            shape ``(out_channels, in_channels / groups, kh, kw)``.
            :class:`~chainer.initializers.LeCunNormal` if ``None``.
        initial_bias (:ref:`initializer <initializer>`): Initialiser of the bias ``b``.
            Zero if ``None``.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels.
        groups (int): Number of groups of channels that are convolved separately.
        offset_groups (int): Number of groups of input channels with offsets (and a
            mask) of their own.

    Raises:
        TypeError, ValueError: An option is not made of ints or is out of range.

    Differentiable twice; deterministic as its function is. Parameters: ``W``, ``b``.

    .. seealso:: :func:`chainer_deform.functions.deformable_convolution_2d_sampler`

    .. admonition:: Example

        >>> layer = DeformableConvolution2DSampler(None, 8, (3, 5), pad=(1, 2))
        >>> x = np.random.uniform(0, 1, (2, 3, 6, 7)).astype(np.float32)
        >>> offset = np.zeros((2, 2 * 3 * 5, 6, 7), np.float32)
        >>> layer(x, offset).shape
        (2, 8, 6, 7)

    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        ksize,
        stride=1,
        pad=0,
        nobias: bool = False,
        initialW=None,
        initial_bias=None,
        *,
        dilate=1,
        groups: int = 1,
        offset_groups: int = 1,
    ) -> None:
        super().__init__()
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        geometry = Geometry(ksize, stride, pad, dilate, groups, offset_groups)
        self.in_channels = in_channels
        self.out_channels = integer('out_channels', out_channels, minimum=1)
        self.ksize = geometry.kh, geometry.kw
        self.stride = geometry.sy, geometry.sx
        self.pad = geometry.ph, geometry.pw
        self.dilate = geometry.dy, geometry.dx
        self.groups = geometry.groups
        self.offset_groups = geometry.offset_groups
        with self.init_scope():
            self.W = chainer.Parameter(initializers._get_initializer(initialW))
            self.b = None
            if not nobias:
                bias_initializer = initializers._get_initializer(
                    0 if initial_bias is None else initial_bias
                )
                self.b = chainer.Parameter(bias_initializer, self.out_channels)
        if in_channels is not None:
            self._initialize_params(in_channels)

    @property
    def printable_specs(self):
        for name in (
            'in_channels',
            'out_channels',
            'ksize',
            'stride',
            'pad',
            'dilate',
            'groups',
            'offset_groups',
        ):
            yield name, getattr(self, name)
        yield 'nobias', self.b is None

    __repr__ = chainer.Link.__str__

    def _initialize_params(self, in_channels: int) -> None:
        geometry = Geometry(
            self.ksize, groups=self.groups, offset_groups=self.offset_groups
        )
        self.W.initialize(geometry.W_shape(in_channels, self.out_channels))

    def forward(self, x, offset, mask=None) -> chainer.Variable:
        """Applies the layer; the shapes are those of the function.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(n, out_channels, out_h, out_w)``.

        """
        if self.W.array is None:
            self._initialize_params(x.shape[1])
        return deformable_convolution_2d_sampler(
            x,
            offset,
            self.W,
            self.b,
            self.stride,
            self.pad,
            mask=mask,
            dilate=self.dilate,
            groups=self.groups,
            offset_groups=self.offset_groups,
        )
