"""Weighted sums of bilinear samples at given points: what deformable operators are."""

from __future__ import annotations

from collections.abc import Mapping

import chainer
from chainer.utils import type_check

from chainer_deform._checks import (
    check_devices,
    check_gradient,
    check_in_any_case,
    check_indices,
    check_second_gradients,
    check_shape,
    float_shapes,
    third_order_error,
)
from chainer_deform.sampling import cpu, cuda, weighted_sum

#: The arguments that have gradients, in the order in which the nodes get them.
NAMES = ('x', 'locations', 'weights')


def sampled_sum_2d(
    x, locations, weights, indices=None, *, border: str = 'zero'
) -> chainer.Variable:
    r"""Weighted sums of an image's values at given points.

    Each output position ``q`` reads one image at ``k`` points of its own, by bilinear
    interpolation, and sums up what it reads, times a weight for each point. Channel
    ``c``, which is in group ``g = c // (channels / groups)``, becomes

    .. math::

        y_{qc} = \sum_k weights_{qgk} \;
                 bilinear(x_{indices_q, c}, locations_{qgk}) .

    Deformable operators are such sums: without a filter (DCNv3), over the points of a
    box (deformable RoI pooling), over images of several sizes (deformable attention).
    What makes points and weights, such as boxes, offsets or a softmax, is written with
    Chainer's own functions.

    What is read outside the image depends on ``border``:

    - ``'zero'``: a point is inside if its row is between -1 and ``h`` and its column
      between -1 and ``w``, without these ends. Pixels outside the image count as 0. So
      do deformable convolutions.
    - ``'clamp'``: a point is inside if its row is from -1 to ``h`` and its column from
      -1 to ``w``, with these ends. It is moved to the nearest place from 0 to ``h - 1``
      and from 0 to ``w - 1``, and then read. So does RoI align.

    A point outside gives 0 and passes no gradient to its location and weight, whatever
    they are multiplied by; an infinite or huge location is one. A NaN location makes
    the sums of its position and group NaN, and the gradients of itself and of its
    weight. A pixel beside no point never reaches the output, whatever it holds.

    Args:
        x (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
            ``(n, c, h, w)``, float16, float32 or float64. ``n`` may be 0.
        locations (:class:`~chainer.Variable` or :ref:`ndarray`): Points ``(y, x)`` in
            pixels, of shape ``(q, groups, k, 2)``: ``(0, 0)`` is the centre of the
            first pixel, ``(h - 1, w - 1)`` that of the last. ``groups``, which must
            divide ``c``, is the number of groups of channels with points of their own.
            ``q`` may be 0. Any float dtype; float16 has no fractions beyond 1024.
        weights (:class:`~chainer.Variable` or :ref:`ndarray`): Weights of shape
            ``(q, groups, k)``. Any float dtype.
        indices (:class:`~chainer.Variable` or :ref:`ndarray` or None): Which image each
            position reads, integers of shape ``(q,)`` from 0 to ``n - 1`` in any order.
            If None, ``q`` must be a multiple of ``n``: the first ``q / n`` positions
            read the first image, and so on.
        border (str): ``'zero'`` or ``'clamp'``.

    Returns:
        ~chainer.Variable: ``y`` of shape ``(q, c)`` and the dtype of ``x``. Coordinates
        and sums are computed in float32 or, if any input is float64, in float64.

    Raises:
        TypeError: An argument is no array.
        ValueError: ``border`` is none of the two, ``indices`` are out of range, or an
            argument is on another device than ``x``.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    Differentiable twice, with respect to ``x``, ``locations`` and ``weights``. On a
    lattice line, where the derivative jumps, that of the cell to the right or below is
    taken. With ``border='clamp'`` the derivative along a coordinate that was moved is
    0, as it is at ``h - 1`` and ``w - 1``. Deterministic on the CPU, for a given number
    of threads. On a GPU the gradient of ``x`` may differ in its last bits from run to
    run, unless ``chainer.config.cudnn_deterministic`` is true; and ``indices`` that are
    given are read back to be checked, for which the GPU is waited for.

    .. admonition:: Example

        The mean over each of two boxes ``(y_min, x_min, y_max, x_max)``, from 2 x 2
        points in each, which are the corners of its inner half:

        >>> x = np.arange(48, dtype=np.float32).reshape(2, 1, 4, 6)
        >>> boxes = np.array([[0, 0, 2, 2], [1, 2, 3, 5]], np.float32)
        >>> share = np.array([0.25, 0.75], np.float32)
        >>> rows = boxes[:, :1] + share * (boxes[:, 2:3] - boxes[:, :1])
        >>> columns = boxes[:, 1:2] + share * (boxes[:, 3:] - boxes[:, 1:2])
        >>> locations = np.empty((2, 1, 2, 2, 2), np.float32)
        >>> locations[..., 0] = rows[:, None, :, None]
        >>> locations[..., 1] = columns[:, None, None, :]
        >>> locations = locations.reshape(2, 1, 4, 2)
        >>> weights = np.full((2, 1, 4), 0.25, np.float32)
        >>> indices = np.array([1, 0])
        >>> y = sampled_sum_2d(x, locations, weights, indices, border='clamp')
        >>> y.array
        array([[31. ],
               [15.5]], dtype=float32)

    """
    if border not in ('zero', 'clamp'):
        raise ValueError(f"border must be 'zero' or 'clamp', not {border!r}")
    arguments = dict(zip(NAMES, (x, locations, weights)))
    if indices is None:
        check_devices(arguments)
    else:
        check_devices({**arguments, 'indices': indices})
        if isinstance(indices, chainer.Variable):
            indices = indices.array
    node = SampledSum2D(indices, border)
    check_in_any_case(node.check_arrays, arguments)
    (y,) = node.apply(tuple(arguments.values()))
    return y


class SampledSum2D(chainer.FunctionNode):
    """The function as a node of the graph.

    Args:
        indices: Which image each position reads, or None.
        border: What counts outside the image.

    """

    def __init__(self, indices, border: str) -> None:
        self.indices = indices
        self.border = border

    def check_type_forward(self, in_types):
        self.check_arrays(dict(zip(NAMES, in_types)))

    def check_arrays(self, types: Mapping) -> None:
        """Checks shapes and dtypes, by argument name."""
        shapes = float_shapes(types)
        x_shape, shape = shapes['x'], shapes['locations']
        if len(x_shape) != 4 or min(x_shape[1:]) < 1:
            raise type_check.InvalidType(
                'x.shape == (n, c, h, w) with c, h, w >= 1', f'x.shape == {x_shape}'
            )
        n, c, _, _ = x_shape
        if len(shape) != 4 or min(shape[1:]) < 1 or shape[3] != 2 or c % shape[1]:
            raise type_check.InvalidType(
                'locations.shape == (q, groups, k, 2) with k >= 1 and groups that '
                f'divide the {c} channels of x.shape == {x_shape}',
                f'locations.shape == {shape}',
            )
        check_shape('weights', shapes['weights'], shape[:3])
        q = shape[0]
        if self.indices is None and (q % n if n else q):
            raise type_check.InvalidType(
                f'locations.shape == (q, groups, k, 2) with q a multiple of n == {n} '
                f'for x.shape == {x_shape} and no indices',
                f'locations.shape == {shape}',
            )

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        self.retain_inputs(range(len(inputs)))
        x, locations, _ = inputs
        self.indices = _checked_indices(self.indices, x, len(locations))
        return (weighted_sum.forward(backend, *inputs, self.indices, self.border),)

    def backward(self, indexes, gy):
        wanted = tuple(NAMES[i] for i in indexes)
        node = SampledSum2DGrad(self.indices, self.border, wanted)
        return node.apply((*gy, *self.get_retained_inputs()))


class SampledSum2DGrad(chainer.FunctionNode):
    """The gradient as a node of the graph: of ``gy`` and the arguments.

    Args:
        indices: Which image each position reads.
        border: What counts outside the image.
        wanted: The names of the arguments whose gradients are the outputs.

    """

    def __init__(self, indices, border: str, wanted: tuple[str, ...]) -> None:
        self.indices = indices
        self.border = border
        self.wanted = wanted

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        self.retain_inputs(range(len(inputs)))
        gy, x, locations, _ = inputs
        check_gradient('y', gy, (len(locations), x.shape[1]))
        gradients = weighted_sum.backward(
            backend, self.wanted, *inputs, self.indices, self.border
        )
        return tuple(gradients[name] for name in self.wanted)

    def backward(self, indexes, gg):
        gg = {name: array for name, array in zip(self.wanted, gg) if array is not None}
        names = ('gy', *NAMES)
        node = SampledSum2DDoubleGrad(
            self.indices, self.border, tuple(gg), tuple(names[i] for i in indexes)
        )
        return node.apply((*gg.values(), *self.get_retained_inputs()))


class SampledSum2DDoubleGrad(chainer.FunctionNode):
    """The gradient of the gradient as a node of the graph: of ``gg`` and the others.

    Args:
        indices: Which image each position reads.
        border: What counts outside the image.
        gg_names: The names of the gradients whose own gradients come first.
        wanted: The names of the arguments whose gradients are the outputs.

    """

    def __init__(
        self,
        indices,
        border: str,
        gg_names: tuple[str, ...],
        wanted: tuple[str, ...],
    ) -> None:
        self.indices = indices
        self.border = border
        self.gg_names = gg_names
        self.wanted = wanted

    def forward_cpu(self, inputs):
        return self._forward(cpu, inputs)

    def forward_gpu(self, inputs):
        return self._forward(cuda, inputs)

    def _forward(self, backend, inputs):
        gg = dict(zip(self.gg_names, inputs))
        arguments = inputs[len(gg) :]
        check_second_gradients(gg, dict(zip(('gy', *NAMES), arguments)))
        gradients = weighted_sum.double_backward(
            backend, self.wanted, gg, *arguments, self.indices, self.border
        )
        return tuple(gradients[name] for name in self.wanted)

    def backward(self, indexes, grad_outputs):
        raise third_order_error('sampled_sum_2d')


def _checked_indices(indices, x, q: int):
    """The image that each of ``q`` positions reads, in int64, on the device of ``x``.

    Raises:
        ValueError: ``indices`` are out of range.
        chainer.utils.type_check.InvalidType: Their shape or dtype does not fit.

    """
    n = len(x)
    if indices is None:
        xp = chainer.backend.get_array_module(x)
        return xp.arange(n, dtype='int64').repeat(q // max(1, n))
    # A copy, which nobody changes between this check and the backward pass.
    indices = indices.copy()
    check_indices('indices', indices, (q,), n)
    return indices.astype('int64', copy=False)
