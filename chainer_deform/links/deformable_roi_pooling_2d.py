"""The layers of deformable RoI pooling, which predict their own offsets."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L

from chainer_deform._checks import boolean, finite, integer, pair, positive
from chainer_deform.functions.deformable_ps_roi_average_pooling_2d import (
    deformable_ps_roi_average_pooling_2d,
)
from chainer_deform.functions.deformable_roi_average_align_2d import (
    checked_ratio,
    deformable_roi_average_align_2d,
)
from chainer_deform.links.deformable_convolution_2d import check_images


class DeformableRoIPooling2D(chainer.Chain):
    """Deformable RoI pooling that predicts its offsets from the boxes' contents.

    Each box is pooled twice: first without offsets. From that ``offset_fc``, three
    fully connected layers with rectifiers in between, predicts an offset for each bin,
    with which the box is pooled again. The last of them starts at zero, so that the
    layer begins as ordinary RoI pooling.

    With ``modulated=True`` two more fully connected layers, ``mask_fc``, predict a
    factor from 0 to 1 for each bin, which is 0.5 at the start.

    Args:
        in_channels (int or None): Number of channels of the images. If ``None``, the
            parameters are initialised at the first call.
        outsize (int or pair of ints): Number of bins ``(out_h, out_w)``.
        spatial_scale (float): Factor from the boxes' coordinates to pixels of ``x``,
            above 0.
        sampling_ratio (int or pair of these or None): Samples ``(n_h, n_w)`` of a bin.
            Where ``None``, as many as a bin has pixels, rounded up.
        modulated (bool): If ``True``, the bins are multiplied by factors that are
            predicted, too (version 2).
        fc_size (int): Number of units of the hidden layers.
        gamma (float): Factor of the offsets, which are shares of the box.
        aligned (bool): If true, half a pixel is taken off all coordinates, so that
            coordinates of boxes are those of pixels' edges.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are ``W`` and
    ``b`` of ``offset_fc/0``, ``offset_fc/1``, ``offset_fc/2``, ``mask_fc/0`` and
    ``mask_fc/1``. The paper trains ``offset_fc`` with a hundredth of the learning rate:
    see :func:`chainer_deform.optimizer_hooks.scale_updates`.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.), section 2.2, and `Deformable ConvNets v2 <https://arxiv.org/abs/1811.11168>`_
    (Zhu et al.).

    .. seealso:: :func:`chainer_deform.functions.deformable_roi_average_align_2d`

    .. admonition:: Example

        >>> layer = DeformableRoIPooling2D(3, (7, 5), spatial_scale=0.1, fc_size=64)
        >>> x = np.random.uniform(0, 1, (2, 3, 12, 16)).astype(np.float32)
        >>> rois = np.array([[10, 20, 90, 140], [0, 0, 60, 60]], np.float32)
        >>> roi_indices = np.array([1, 0], np.int32)
        >>> layer(x, rois, roi_indices).shape
        (2, 3, 7, 5)
        >>> layer.offset_fc[-1].W.shape
        (70, 64)

    """

    def __init__(
        self,
        in_channels: int | None,
        outsize,
        spatial_scale: float,
        sampling_ratio=None,
        *,
        modulated: bool = False,
        fc_size: int = 1024,
        gamma: float = 0.1,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        self.in_channels = in_channels
        self.outsize = pair('outsize', outsize, minimum=1)
        self.spatial_scale = positive('spatial_scale', spatial_scale)
        checked_ratio(sampling_ratio)
        self.sampling_ratio = sampling_ratio
        self.modulated = boolean('modulated', modulated)
        self.fc_size = integer('fc_size', fc_size, minimum=1)
        self.gamma = finite('gamma', gamma)
        self.aligned = boolean('aligned', aligned)
        bins = self.outsize[0] * self.outsize[1]
        in_size = None if in_channels is None else in_channels * bins
        with self.init_scope():
            self.offset_fc = chainer.ChainList(
                L.Linear(in_size, self.fc_size),
                L.Linear(self.fc_size, self.fc_size),
                L.Linear(self.fc_size, 2 * bins, initialW=0),
            )
            if modulated:
                self.mask_fc = chainer.ChainList(
                    L.Linear(in_size, self.fc_size),
                    L.Linear(self.fc_size, bins, initialW=0),
                )

    @property
    def printable_specs(self):
        for name in (
            'in_channels',
            'outsize',
            'spatial_scale',
            'sampling_ratio',
            'modulated',
            'fc_size',
            'gamma',
            'aligned',
        ):
            yield name, getattr(self, name)

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(self, x, rois, roi_indices) -> chainer.Variable:
        """Pools boxes; the arguments are those of the function.

        Args:
            x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
                ``(n, in_channels, h, w)``.
            rois (:class:`~chainer.Variable` or :ref:`ndarray`): Boxes
                ``(y_min, x_min, y_max, x_max)`` of shape ``(R, 4)``. ``R`` may be 0.
            roi_indices (:class:`~chainer.Variable` or :ref:`ndarray`): The image that
                each box lies in, integers of shape ``(R,)``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(R, in_channels, out_h, out_w)``.

        """
        out_h, out_w = self.outsize
        W = self.offset_fc[0].W
        channels = None if W.array is None else W.shape[1] // (out_h * out_w)
        _, c, _, _ = check_images('x', x, channels)
        R = next(iter(getattr(rois, 'shape', ())), 0)  # the function checks rois

        def pool(offset):
            return deformable_roi_average_align_2d(
                x,
                rois,
                roi_indices,
                offset,
                self.outsize,
                self.spatial_scale,
                self.sampling_ratio,
                gamma=self.gamma,
                aligned=self.aligned,
            )

        xp = chainer.backend.get_array_module(x)
        contents = pool(xp.zeros((R, 2, out_h, out_w), x.dtype))
        contents = F.reshape(contents, (R, c * out_h * out_w))
        y = pool(F.reshape(_apply(self.offset_fc, contents), (R, 2, out_h, out_w)))
        if self.modulated:
            mask = F.sigmoid(_apply(self.mask_fc, contents))
            mask = F.reshape(mask, (R, 1, out_h, out_w))
            y *= F.broadcast_to(mask, y.shape)
        return y


def _apply(layers: chainer.ChainList, x) -> chainer.Variable:
    """Fully connected layers one after another, with rectifiers in between."""
    *hidden, last = layers
    for layer in hidden:
        x = F.relu(layer(x))
    return last(x)


class DeformablePSRoIPooling2D(chainer.Chain):
    """Position-sensitive deformable RoI pooling that predicts its offsets.

    This is the form of R-FCN. ``offset_conv``, a 1 x 1 convolution, predicts fields of
    offsets from the layer's input, or from another feature map of that size,
    ``offset_input``. The fields are pooled over each box without offsets, which gives
    the offsets of the box's parts, with which the input is pooled. ``offset_conv``
    starts at zero, so that the layer begins as pooling without offsets.

    Args:
        in_channels (int or None): Number of channels of the images, which have
            ``group_size ** 2`` for each output channel. If ``None``, the parameters are
            initialised at the first call.
        outsize (int or pair of ints): Number of bins ``(out_h, out_w)``.
        spatial_scale (float): Factor from the boxes' coordinates to pixels of ``x``,
            above 0.
        group_size (int): Number of cells along each side.
        part_size (int or pair of ints or None): Number of parts ``(part_h, part_w)``
            that have offsets of their own. If ``None``, each bin is a part.
        sampling_ratio (int or pair of ints): Samples ``(s_h, s_w)`` of a bin.
        classes (int): Number of groups of output channels that have offsets of their
            own.
        gamma (float): Factor of the offsets, which are shares of the box.
        offset_in_channels (int or None): Number of channels of ``offset_input``; that
            of the input if ``None``.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are
    ``offset_conv/W`` and ``offset_conv/b``. For a learning rate of their own see
    :func:`chainer_deform.optimizer_hooks.scale_updates`.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.), section 2.2, and `R-FCN <https://arxiv.org/abs/1605.06409>`_ (Dai et al.).

    .. seealso:: :func:`chainer_deform.functions.deformable_ps_roi_average_pooling_2d`

    .. admonition:: Example

        Two output channels, which read 3 x 3 cells; offsets come from 8 channels:

        >>> layer = DeformablePSRoIPooling2D(
        ...     18, 3, spatial_scale=0.1, group_size=3, offset_in_channels=8)
        >>> x = np.random.uniform(0, 1, (1, 18, 12, 16)).astype(np.float32)
        >>> features = np.random.uniform(0, 1, (1, 8, 12, 16)).astype(np.float32)
        >>> rois = np.array([[10, 20, 90, 140], [0, 0, 60, 60]], np.float32)
        >>> roi_indices = np.array([0, 0], np.int32)
        >>> layer(x, rois, roi_indices, features).shape
        (2, 2, 3, 3)

    """

    def __init__(
        self,
        in_channels: int | None,
        outsize,
        spatial_scale: float,
        group_size: int,
        *,
        part_size=None,
        sampling_ratio=4,
        classes: int = 1,
        gamma: float = 0.1,
        offset_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.outsize = pair('outsize', outsize, minimum=1)
        self.spatial_scale = positive('spatial_scale', spatial_scale)
        self.group_size = integer('group_size', group_size, minimum=1)
        if part_size is not None:
            part_size = pair('part_size', part_size, minimum=1)
        self.part_size = part_size
        self.sampling_ratio = pair('sampling_ratio', sampling_ratio, minimum=1)
        self.classes = integer('classes', classes, minimum=1)
        self.gamma = finite('gamma', gamma)
        cells = self.group_size**2
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
            if in_channels % (cells * self.classes):
                raise ValueError(
                    'in_channels must be a multiple of classes * group_size ** 2 == '
                    f'{self.classes * cells}, not {in_channels}'
                )
        self.in_channels = in_channels
        if offset_in_channels is None:
            offset_in_channels = in_channels
        else:
            offset_in_channels = integer('offset_in_channels', offset_in_channels, 1)
        with self.init_scope():
            self.offset_conv = L.Convolution2D(
                offset_in_channels, 2 * self.classes * cells, 1, initialW=0
            )

    @property
    def printable_specs(self):
        for name in (
            'in_channels',
            'outsize',
            'spatial_scale',
            'group_size',
            'part_size',
            'sampling_ratio',
            'classes',
            'gamma',
        ):
            yield name, getattr(self, name)

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(self, x, rois, roi_indices, offset_input=None) -> chainer.Variable:
        """Pools boxes; the first arguments are those of the function.

        Args:
            x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
                ``(n, in_channels, h, w)``.
            rois (:class:`~chainer.Variable` or :ref:`ndarray`): Boxes
                ``(y_min, x_min, y_max, x_max)`` of shape ``(R, 4)``. ``R`` may be 0.
            roi_indices (:class:`~chainer.Variable` or :ref:`ndarray`): The image that
                each box lies in, integers of shape ``(R,)``.
            offset_input (:class:`~chainer.Variable` or :ref:`ndarray` or None): Feature
                map ``(n, offset_in_channels, h, w)`` that the offsets are predicted
                from. If ``None``, ``x``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(R, in_channels / group_size ** 2,
            out_h, out_w)``.

        """
        n, _, h, w = check_images('x', x, self.in_channels)
        if offset_input is None:
            offset_input = x
        channels = self.offset_conv.in_channels
        check_images('offset_input', offset_input, channels, n, h, w)

        def pool(images, offset, outsize, **options):
            return deformable_ps_roi_average_pooling_2d(
                images,
                rois,
                roi_indices,
                offset,
                outsize,
                self.spatial_scale,
                self.group_size,
                sampling_ratio=self.sampling_ratio,
                gamma=self.gamma,
                **options,
            )

        parts = self.outsize if self.part_size is None else self.part_size
        offset = pool(self.offset_conv(offset_input), None, parts)
        return pool(x, offset, self.outsize, part_size=parts)
