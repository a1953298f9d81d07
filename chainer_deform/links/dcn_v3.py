"""The layer of DCNv3, from InternImage."""

from __future__ import annotations

import math

import chainer
import chainer.functions as F
import chainer.links as L
import numpy

from chainer_deform._checks import boolean, integer, pair, positive
from chainer_deform.functions.dcn_v3_2d import dcn_v3_2d
from chainer_deform.geometry import Geometry
from chainer_deform.links.deformable_convolution_2d import check_images


class DCNv3(chainer.Chain):
    """DCNv3: deformable convolution between two 1 x 1 convolutions, from InternImage.

    ``input_proj``, a 1 x 1 convolution, makes what is sampled. ``offset_conv`` and
    ``mask_conv``, also 1 x 1, predict the offsets and the weights of the taps; they
    read what a depthwise convolution of the input, a normalisation over the channels
    and a GELU make, and start at zero. A softmax over the taps is applied to the
    weights. ``output_proj``, 1 x 1 again, mixes the channels. So at the start each tap
    has the same weight and none is moved.

    With ``center_scale=True`` each group of channels is a mean of what the taps read
    and of the pixel in the kernel's centre; ``center_conv`` predicts the share of the
    latter, which is half at the start.

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
            kernel, odd. If ``None``, ``ksize``.
        center_scale (bool): Whether the pixel in the centre has a share of its own.
        remove_center (bool): Whether the tap in the centre is left out. For square
            kernels larger than 1 only.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are ``W`` and
    ``b`` of ``input_proj``, ``dw_conv``, ``offset_conv``, ``mask_conv``,
    ``output_proj`` and ``center_conv``, and ``gamma`` and ``beta`` of ``norm``.
    ``input_proj`` and ``output_proj`` start as
    :class:`~chainer.initializers.GlorotUniform`. Those of InternImage are copied by
    :func:`chainer_deform.convert.from_internimage`.

    See `InternImage <https://arxiv.org/abs/2211.05778>`_ (Wang et al.).

    .. seealso:: :func:`chainer_deform.functions.dcn_v3_2d`

    .. admonition:: Example

        >>> layer = DCNv3(6, 8, ksize=3, offset_groups=2)
        >>> x = np.random.uniform(0, 1, (2, 6, 10, 14)).astype(np.float32)
        >>> layer(x).shape
        (2, 8, 10, 14)
        >>> layer.offset_conv.W.shape
        (36, 6, 1, 1)

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
    ) -> None:
        super().__init__()
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        self.in_channels = in_channels
        out_channels = integer('out_channels', out_channels, minimum=1)
        self.out_channels = out_channels
        g, taps = checked_geometry(
            out_channels, ksize, stride, dilate, offset_groups, remove_center
        )
        self.ksize, self.stride = (g.kh, g.kw), (g.sy, g.sx)
        self.pad, self.dilate = (g.ph, g.pw), (g.dy, g.dx)
        self.offset_groups = groups = g.offset_groups
        self.offset_scale = positive('offset_scale', offset_scale)
        self.center_scale = boolean('center_scale', center_scale)
        self.remove_center = bool(remove_center)
        initial = chainer.initializers.GlorotUniform()
        with self.init_scope():
            self.input_proj = L.Convolution2D(
                in_channels, out_channels, 1, initialW=initial
            )
            self.dw_conv = depthwise_convolution(
                in_channels, ksize if dw_ksize is None else dw_ksize, self.stride
            )
            self.norm = L.LayerNormalization(in_channels, eps=1e-6)
            self.offset_conv = L.Convolution2D(
                in_channels, 2 * groups * taps, 1, initialW=0
            )
            self.mask_conv = L.Convolution2D(in_channels, groups * taps, 1, initialW=0)
            self.output_proj = L.Convolution2D(
                out_channels, out_channels, 1, initialW=initial
            )
            if center_scale:
                self.center_conv = L.Convolution2D(in_channels, groups, 1, initialW=0)

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
        ):
            yield name, getattr(self, name)
        yield 'dw_ksize', self.dw_conv.ksize

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(self, x) -> chainer.Variable:
        """Applies the layer to ``x (n, in_channels, h, w)``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(n, out_channels, out_h, out_w)``.

        """
        check_images('x', x, self.in_channels)
        sy, sx = self.stride
        projected = self.input_proj(x)
        features = gelu(_normalized(self.norm, self.dw_conv(x)))
        offset, mask = self.offset_conv(features), self.mask_conv(features)
        n, channels, h, w = mask.shape
        groups = n, self.offset_groups, channels // self.offset_groups, h, w
        mask = F.reshape(F.softmax(F.reshape(mask, groups), axis=2), mask.shape)
        y = sampled(self, projected, offset, mask)
        if self.center_scale:
            share = self.center_conv(features)
            y = with_center(y, projected[:, :, ::sy, ::sx], share)
        return self.output_proj(y)


def sampled(layer, projected, offset, mask) -> chainer.Variable:
    """What the taps of a layer read, with the layer's options."""
    return dcn_v3_2d(
        projected,
        offset,
        mask,
        layer.ksize,
        layer.stride,
        layer.pad,
        layer.dilate,
        offset_groups=layer.offset_groups,
        offset_scale=layer.offset_scale,
        remove_center=layer.remove_center,
    )


def checked_geometry(
    channels: int, ksize, stride, dilate, offset_groups, remove_center
) -> tuple[Geometry, int]:
    """The geometry of a kernel, padded by half its size, and its number of taps."""
    g = Geometry(ksize, stride, 0, dilate, offset_groups=offset_groups)
    _check_odd('ksize', (g.kh, g.kw))
    if channels % g.offset_groups:
        raise ValueError(
            f'offset_groups must divide out_channels, {channels}, but is '
            f'{g.offset_groups}'
        )
    taps = g.taps
    if boolean('remove_center', remove_center):
        if g.kh != g.kw or g.kh < 3:
            raise ValueError(
                f'ksize must be square and at least 3 with remove_center, not {ksize!r}'
            )
        taps -= 1
    pad = g.dy * (g.kh - 1) // 2, g.dx * (g.kw - 1) // 2
    return Geometry(ksize, stride, pad, dilate, offset_groups=offset_groups), taps


def depthwise_convolution(in_channels: int | None, ksize, stride):
    """A depthwise convolution that keeps the size, but for the stride."""
    ksize = kh, kw = pair('dw_ksize', ksize, minimum=1)
    _check_odd('dw_ksize', ksize)
    # Chainer's own initialiser would count all input channels, of which one is read.
    initialW = chainer.initializers.Normal(1 / math.sqrt(kh * kw))
    pad = kh // 2, kw // 2
    return L.DepthwiseConvolution2D(
        in_channels, 1, ksize, stride, pad, initialW=initialW
    )


def _check_odd(name: str, ksize: tuple[int, int]) -> None:
    if not (ksize[0] % 2 and ksize[1] % 2):
        raise ValueError(f'{name} must be odd, not {ksize}')


def gelu(x) -> chainer.Variable:
    """The Gaussian error linear unit, ``x`` times the normal distribution at ``x``."""
    return x * (F.erf(x * math.sqrt(0.5)) + 1) * 0.5


def _normalized(norm: L.LayerNormalization, x) -> chainer.Variable:
    """Images normalised over their channels, in at least float32."""
    n, c, h, w = x.shape
    if norm.gamma.array is None:
        norm._initialize_params(c)
    dtype = numpy.result_type('f', x.dtype)
    rows = F.reshape(F.transpose(x, (0, 2, 3, 1)), (n * h * w, c))
    rows = F.layer_normalization(
        *(F.cast(array, dtype) for array in (rows, norm.gamma, norm.beta)), norm.eps
    )
    rows = F.reshape(F.cast(rows, x.dtype), (n, h, w, c))
    return F.transpose(rows, (0, 3, 1, 2))


def with_center(y, centers, share) -> chainer.Variable:
    """Means of ``y`` and of the pixels in the centres, whose share is a sigmoid's.

    Args:
        y: What the taps read, ``(n, c, h, w)``.
        centers: The pixels, of the same shape.
        share: Before the sigmoid, one for each group of channels: ``(n, G, h, w)``.

    """
    n, c, h, w = y.shape
    groups = share.shape[1]
    share = F.reshape(F.sigmoid(share), (n, groups, 1, h, w))
    share = F.broadcast_to(share, (n, groups, c // groups, h, w))
    share = F.reshape(share, (n, c, h, w))
    return y * (1 - share) + centers * share
