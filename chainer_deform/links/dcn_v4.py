"""The layer of DCNv4."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L

from chainer_deform._checks import boolean, integer, positive
from chainer_deform.links.dcn_v3 import (
    checked_geometry,
    depthwise_convolution,
    sampled,
    with_center,
)
from chainer_deform.links.deformable_convolution_2d import check_images


class DCNv4(chainer.Chain):
    """DCNv4: deformable convolution between two 1 x 1 convolutions.

    ``input_proj``, a 1 x 1 convolution, makes what is sampled. ``offset_conv``, also
    1 x 1, predicts the offsets and the weights of the taps from the input or, with
    ``dw_ksize``, from a depthwise convolution of it. It starts at zero. Nothing is
    applied to the weights, so the layer begins with an output of zeros, and its
    weights learn from the first step. ``output_proj``, 1 x 1 again, mixes the channels.

    With ``center_scale=True`` each group of channels is a mean of what the taps read
    and of the pixel in the kernel's centre; ``center_conv`` predicts the share of the
    latter from what the taps read. It is half at the start.

    The image is padded by half a kernel, so that ``out_h = (h - 1) // sy + 1``, and
    ``out_w`` likewise.

    Args:
        in_channels (int or None): Number of input channels. If ``None``, the parameters
            are initialised at the first call.
        out_channels (int): Number of output channels, and of those that are sampled.
        ksize (int or pair of ints): Size ``(kh, kw)`` of the kernel, odd.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels.
        offset_groups (int): Number of groups of channels with offsets and weights of
            their own. It must divide ``out_channels``.
        offset_scale (float): Factor of the kernel's size and of the offsets, above 0.
        dw_ksize (int or pair of ints or None): Size of the depthwise convolution's
            kernel, odd. If ``None``, there is none.
        center_scale (bool): Whether the pixel in the centre has a share of its own.
        remove_center (bool): Whether the tap in the centre is left out. For square
            kernels larger than 1 only.
        output_nobias (bool): If ``True``, ``output_proj`` has no bias.
        pointwise (bool): If ``False``, there is neither ``input_proj`` nor
            ``output_proj``; ``in_channels`` and ``out_channels`` must then be the same.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are ``W`` and
    ``b`` of ``input_proj``, ``dw_conv``, ``offset_conv``, ``output_proj`` and
    ``center_conv``. The channels of ``offset_conv`` are first all offsets, then all
    weights. ``input_proj`` and ``output_proj`` start as
    :class:`~chainer.initializers.GlorotUniform`. Those of the authors' program are
    copied by :func:`chainer_deform.convert.from_dcnv4`.

    See `DCNv4 <https://arxiv.org/abs/2401.06197>`_ (Xiong et al.).

    .. seealso:: :func:`chainer_deform.functions.dcn_v3_2d`

    .. admonition:: Example

        >>> layer = DCNv4(6, 8, ksize=3, offset_groups=2)
        >>> x = np.random.uniform(0, 1, (2, 6, 10, 14)).astype(np.float32)
        >>> layer(x).shape
        (2, 8, 10, 14)
        >>> layer.offset_conv.W.shape
        (54, 6, 1, 1)

    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        ksize=3,
        stride=1,
        dilate=1,
        *,
        offset_groups: int = 4,
        offset_scale: float = 1.0,
        dw_ksize=None,
        center_scale: bool = False,
        remove_center: bool = False,
        output_nobias: bool = False,
        pointwise: bool = True,
    ) -> None:
        super().__init__()
        out_channels = integer('out_channels', out_channels, minimum=1)
        self.out_channels = out_channels
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        self.pointwise = boolean('pointwise', pointwise)
        if not pointwise and in_channels not in (None, out_channels):
            raise ValueError(
                f'in_channels must be out_channels, {out_channels}, with '
                f'pointwise=False, not {in_channels}'
            )
        self.in_channels = in_channels if pointwise else out_channels
        g, taps = checked_geometry(
            out_channels, ksize, stride, dilate, offset_groups, remove_center
        )
        self.ksize, self.stride = (g.kh, g.kw), (g.sy, g.sx)
        self.pad, self.dilate = (g.ph, g.pw), (g.dy, g.dx)
        self.offset_groups = groups = g.offset_groups
        self.offset_scale = positive('offset_scale', offset_scale)
        self.center_scale = boolean('center_scale', center_scale)
        self.remove_center = bool(remove_center)
        boolean('output_nobias', output_nobias)
        initial = chainer.initializers.GlorotUniform()
        with self.init_scope():
            if dw_ksize is None:
                self.dw_conv = None
            else:
                self.dw_conv = depthwise_convolution(
                    self.in_channels, dw_ksize, self.stride
                )
            self.offset_conv = L.Convolution2D(
                self.in_channels, 3 * groups * taps, 1, initialW=0
            )
            if pointwise:
                self.input_proj = L.Convolution2D(
                    in_channels, out_channels, 1, initialW=initial
                )
                self.output_proj = L.Convolution2D(
                    out_channels,
                    out_channels,
                    1,
                    nobias=output_nobias,
                    initialW=initial,
                )
            if center_scale:
                self.center_conv = L.Convolution2D(out_channels, groups, 1, initialW=0)

    @property
    def printable_specs(self):
        for name in (
            'in_channels',
            'out_channels',
            'ksize',
            'stride',
            'dilate',
            'offset_groups',
            'offset_scale',
            'center_scale',
            'remove_center',
            'pointwise',
        ):
            yield name, getattr(self, name)
        yield 'dw_ksize', None if self.dw_conv is None else self.dw_conv.ksize
        yield 'output_nobias', self.pointwise and self.output_proj.b is None

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(self, x) -> chainer.Variable:
        """Applies the layer to ``x (n, in_channels, h, w)``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(n, out_channels, out_h, out_w)``.

        """
        check_images('x', x, self.in_channels)
        sy, sx = self.stride
        projected = self.input_proj(x) if self.pointwise else x
        features = x[:, :, ::sy, ::sx] if self.dw_conv is None else self.dw_conv(x)
        predicted = self.offset_conv(features)
        offset, mask = F.split_axis(predicted, [predicted.shape[1] // 3 * 2], axis=1)
        y = sampled(self, projected, offset, mask)
        if self.center_scale:
            share = self.center_conv(y)
            y = with_center(y, projected[:, :, ::sy, ::sx], share)
        return self.output_proj(y) if self.pointwise else y
