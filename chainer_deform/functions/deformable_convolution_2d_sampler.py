"""Deformable convolution with given offsets and, in version 2, a modulation mask."""

from __future__ import annotations

import chainer

from chainer_deform._checks import (
    check_devices,
    check_gradient,
    check_in_any_case,
    check_second_gradients,
    third_order_error,
)
from chainer_deform.geometry import Geometry
from chainer_deform.sampling import convolution, cpu, cuda


def deformable_convolution_2d_sampler(
    x,
    offset,
    W,
    b=None,
    stride=1,
    pad=0,
    *,
    mask=None,
    dilate=1,
    groups: int = 1,
    offset_groups: int = 1,
) -> chainer.Variable:
    """Two-dimensional deformable convolution with given offsets.

    An ordinary convolution reads the image on a regular grid. Here each sampling point
    is moved off the grid by an offset of its own, in pixels, and the image is read
    there by bilinear interpolation; pixels outside the image count as 0. Tap ``(i, j)``
    of the kernel at output ``(oy, ox)`` reads the image at row ``oy * sy - ph + i * dy
    + offset_y`` and column ``ox * sx - pw + j * dx + offset_x``. A point at or beyond
    -1 or the image's side gives 0, and so does an infinite offset; a NaN offset makes
    its own output pixel NaN. With ``mask`` each value read is multiplied by a factor
    (modulated deformable convolution, version 2).

    The output has the size ``out_h = (h + 2 * ph - dy * (kh - 1) - 1) // sy + 1``, and
    ``out_w`` likewise.

    Args:
        x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, c, h, w)``, float16, float32 or float64. ``n`` may be 0.
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets in pixels, of
            shape ``(n, offset_groups * 2 * kh * kw, out_h, out_w)``: for each offset
            group first the ``kh * kw`` horizontal ones, then the ``kh * kw`` vertical
            ones, kernel positions row by row. Any float dtype.
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Filter of shape
            ``(out_c, c / groups, kh, kw)``. Any float dtype.
        b (:class:`~chainer.Variable` or :ref:`ndarray` or None): Bias of shape
            ``(out_c,)``. Any float dtype.
        stride (int or pair of ints): Step ``(sy, sx)`` between outputs, in pixels.
        pad (int or pair of ints): Zeros ``(ph, pw)`` around the image, in pixels.
        mask (:class:`~chainer.Variable` or :ref:`ndarray` or None): Modulation mask of
            shape ``(n, offset_groups * kh * kw, out_h, out_w)``, a plain factor: no
            sigmoid is applied. Any float dtype.
        dilate (int or pair of ints): Step ``(dy, dx)`` between taps, in pixels.
        groups (int): Number of groups of channels that are convolved separately.
        offset_groups (int): Number of groups of input channels that have offsets (and
            a mask) of their own. It must divide ``c``; it may differ from ``groups``.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(n, out_c, out_h, out_w)`` and the dtype of
        ``x``. Coordinates, weights and sums are computed in float32 or, if any input is
        float64, in float64. (On a GPU the values read from a float16 image are rounded
        to float16 before the filter is applied.)

    Raises:
        TypeError: An argument is no array, or an option is not made of ints.
        ValueError: An option is out of range, ``W`` does not have 4 axes, or an
            argument is on another device than ``x``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``x``, ``offset``, ``mask``, ``W`` and ``b``.
    On a lattice line, where the derivative jumps, that of the cell to the right or
    below is taken. Deterministic on the CPU, for a given number of threads
    (``OMP_NUM_THREADS``, else one for each core). On a GPU the gradient of ``x`` may
    differ in its last bits from run to run, unless
    ``chainer.config.cudnn_deterministic`` is true.

    On the CPU Numba is used where it can be imported, unless the environment variable
    ``CHAINER_DEFORM_NUMBA`` is 0 when the function is first called. It compiles for a
    few seconds then, and keeps what it compiled for the next time.

    See `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ (Dai et
    al.) and `Deformable ConvNets v2 <https://arxiv.org/abs/1811.11168>`_ (Zhu et al.).

    .. seealso:: :class:`~chainer_deform.links.DeformableConvolution2D`, which predicts
        the offsets.

    .. admonition:: Example

        >>> x = np.random.uniform(0, 1, (2, 3, 4, 7)).astype(np.float32)
        >>> offset = np.random.uniform(0, 1, (2, 18, 2, 5)).astype(np.float32)
        >>> W = np.random.uniform(0, 1, (4, 3, 3, 3)).astype(np.float32)
        >>> b = np.random.uniform(0, 1, (4,)).astype(np.float32)
        >>> y = deformable_convolution_2d_sampler(x, offset, W, b)
        >>> y.shape
        (2, 4, 2, 5)

    """
    arguments = {'x': x, 'offset': offset, 'W': W, 'mask': mask, 'b': b}
    for name in 'mask', 'b':
        if arguments[name] is None:
            del arguments[name]
    check_devices(arguments)
    if len(W.shape) != 4:
        raise ValueError(
            f'W must have 4 axes, (out_c, c / groups, kh, kw), not the shape {W.shape}'
        )
    geometry = Geometry(W.shape[2:], stride, pad, dilate, groups, offset_groups)
    check_in_any_case(geometry.check_arrays, arguments)
    node = DeformableConvolution2DSampler(geometry, tuple(arguments))
    (y,) = node.apply(tuple(arguments.values()))
    return y


class DeformableConvolution2DSampler(chainer.FunctionNode):
    """The function as a node of the graph.

    Args:
        geometry: What the convolution looks like.
        names: The names of the arguments, in the order in which they are applied.

    """

    def __init__(self, geometry: Geometry, names: tuple[str, ...]) -> None:
        self.geometry = geometry
        self.names = names

    def check_type_forward(self, in_types):
        self.geometry.check_arrays(dict(zip(self.names, in_types)))

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        self.retain_inputs(range(len(inputs)))
        arguments = dict(zip(self.names, inputs))
        return (convolution.forward(backend, self.geometry, **arguments),)

    def backward(self, indexes, gy):
        node = DeformableConvolution2DSamplerGrad(
            self.geometry, ('gy', *self.names), tuple(self.names[i] for i in indexes)
        )
        return node.apply((*gy, *self.get_retained_inputs()))


class DeformableConvolution2DSamplerGrad(chainer.FunctionNode):
    """The gradient as a node of the graph.

    Args:
        geometry: What the convolution looks like.
        names: The names of the arguments, in the order in which they are applied.
        wanted: The names of the arguments whose gradients are the outputs.

    """

    def __init__(
        self, geometry: Geometry, names: tuple[str, ...], wanted: tuple[str, ...]
    ) -> None:
        self.geometry = geometry
        self.names = names
        self.wanted = wanted

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        self.retain_inputs(range(len(inputs)))
        arguments = dict(zip(self.names, inputs))
        n, _, h, w = arguments['x'].shape
        y_shape = (n, len(arguments['W']), *self.geometry.out_size(h, w))
        check_gradient('y', arguments['gy'], y_shape)
        gradients = convolution.backward(
            backend, self.geometry, self.wanted, **arguments
        )
        return tuple(gradients[name] for name in self.wanted)

    def backward(self, indexes, gg):
        gg = {name: array for name, array in zip(self.wanted, gg) if array is not None}
        # No gradient depends on the bias.
        wanted = tuple(self.names[i] for i in indexes if self.names[i] != 'b')
        node = DeformableConvolution2DSamplerDoubleGrad(
            self.geometry, tuple(gg), self.names, wanted
        )
        gradients = node.apply((*gg.values(), *self.get_retained_inputs()))
        gradients = dict(zip(wanted, gradients))
        return tuple(gradients.get(self.names[i]) for i in indexes)


class DeformableConvolution2DSamplerDoubleGrad(chainer.FunctionNode):
    """The gradient of the gradient as a node of the graph.

    Args:
        geometry: What the convolution looks like.
        gg_names: The names of the gradients whose own gradients come first.
        names: The names of the arguments that follow them.
        wanted: The names of the arguments whose gradients are the outputs.

    """

    def __init__(
        self,
        geometry: Geometry,
        gg_names: tuple[str, ...],
        names: tuple[str, ...],
        wanted: tuple[str, ...],
    ) -> None:
        self.geometry = geometry
        self.gg_names = gg_names
        self.names = names
        self.wanted = wanted

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        gg = dict(zip(self.gg_names, inputs))
        arguments = dict(zip(self.names, inputs[len(gg) :]))
        check_second_gradients(gg, arguments)
        gradients = convolution.double_backward(
            backend, self.geometry, self.wanted, gg, **arguments
        )
        return tuple(gradients[name] for name in self.wanted)

    def backward(self, indexes, grad_outputs):
        raise third_order_error('deformable_convolution_2d_sampler')
