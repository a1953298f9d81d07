"""The layer of multi-scale deformable attention, from Deformable DETR."""

from __future__ import annotations

import math

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.utils import type_check

from chainer_deform._checks import check_devices, check_shape, float_array, integer
from chainer_deform.functions.multi_scale_deformable_attention import (
    _checked_levels,
    multi_scale_deformable_attention,
)


class MultiScaleDeformableAttention(chainer.Chain):
    """Attention of queries to a few points that they choose, on several levels.

    Each query has a reference point or a reference box on each level. From the query
    ``offset_fc`` predicts where each head looks, relative to that, and ``weight_fc``
    how much each point counts, by a softmax over the levels and points. ``value_fc``
    makes what is read at the points; ``output_fc`` mixes the heads.

    Offsets from a reference point are in pixels of the level. Those from a box are
    shares of its half width and half height, divided by ``points``. At the start they
    do not depend on the query: the points of head ``m`` lie in the direction ``2 * pi *
    m / heads``, point ``k`` at ``k + 1`` pixels along the longer of x and y; all have
    the same weight.

    Args:
        in_channels (int or None): Number of channels of queries and images. If
            ``None``, the parameters are initialised at the first call.
        out_channels (int): Number of output channels, and of those that are sampled.
        levels (int): Number of levels.
        heads (int): Number of heads. It must divide ``out_channels``.
        points (int): Number of points that a head has on each level.

    Raises:
        TypeError, ValueError: An option is of a wrong type or out of range.

    Differentiable twice; deterministic as its function is. The parameters are ``W`` and
    ``b`` of ``offset_fc``, ``weight_fc``, ``value_fc`` and ``output_fc``; the latter
    two start as :class:`~chainer.initializers.GlorotUniform`. Those of Deformable DETR
    are copied by :func:`chainer_deform.convert.from_deformable_detr`. The paper trains
    ``offset_fc`` with a tenth of the learning rate: see
    :func:`chainer_deform.optimizer_hooks.scale_updates`.

    See `Deformable DETR <https://arxiv.org/abs/2010.04159>`_ (Zhu et al.), section 4.1.

    .. seealso:: :func:`chainer_deform.functions.multi_scale_deformable_attention`

    .. admonition:: Example

        Five queries that look at two levels of 4 x 6 and 2 x 3 pixels:

        >>> layer = MultiScaleDeformableAttention(8, 16, levels=2, heads=4, points=3)
        >>> query = np.random.uniform(0, 1, (1, 5, 8)).astype(np.float32)
        >>> reference = np.random.uniform(0, 1, (1, 5, 2, 2)).astype(np.float32)
        >>> value = np.random.uniform(0, 1, (1, 30, 8)).astype(np.float32)
        >>> layer(query, reference, value, [(4, 6), (2, 3)]).shape
        (1, 5, 16)

    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        levels: int = 4,
        heads: int = 8,
        points: int = 4,
    ) -> None:
        super().__init__()
        if in_channels is not None:
            in_channels = integer('in_channels', in_channels, minimum=1)
        self.in_channels = in_channels
        out_channels = integer('out_channels', out_channels, minimum=1)
        levels = integer('levels', levels, minimum=1)
        heads = integer('heads', heads, minimum=1)
        points = integer('points', points, minimum=1)
        if out_channels % heads:
            raise ValueError(
                f'heads must divide out_channels, {out_channels}, but is {heads}'
            )
        self.out_channels, self.levels = out_channels, levels
        self.heads, self.points = heads, points
        samples = heads * levels * points
        initial = chainer.initializers.GlorotUniform()
        with self.init_scope():
            self.offset_fc = L.Linear(
                in_channels,
                2 * samples,
                initialW=0,
                initial_bias=_directions(heads, levels, points),
            )
            self.weight_fc = L.Linear(in_channels, samples, initialW=0)
            self.value_fc = L.Linear(in_channels, out_channels, initialW=initial)
            self.output_fc = L.Linear(out_channels, out_channels, initialW=initial)

    @property
    def printable_specs(self):
        for name in 'in_channels', 'out_channels', 'levels', 'heads', 'points':
            yield name, getattr(self, name)

    # In one line, at the prompt and in notebooks, too.
    __str__ = __repr__ = chainer.Link.__str__

    def forward(
        self, query, reference, value, shapes, padding_mask=None
    ) -> chainer.Variable:
        """Applies the layer.

        Args:
            query (:class:`~chainer.Variable` or :ref:`ndarray`): Queries of shape
                ``(n, q, in_channels)``. ``n`` and ``q`` may be 0.
            reference (:class:`~chainer.Variable` or :ref:`ndarray`): For each query and
                level a point ``(x, y)`` or a box ``(x, y, width, height)``, ``x`` and
                ``y`` its centre, all in shares of the level's size: ``(n, q, levels,
                2)`` or ``(n, q, levels, 4)``.
            value (:class:`~chainer.Variable` or :ref:`ndarray`): Images of shape
                ``(n, s, in_channels)``, where ``s`` is the sum of ``h * w`` over the
                levels: level after level, row by row.
            shapes (sequence of pairs of ints): The size ``(h, w)`` of each level.
            padding_mask (:ref:`ndarray` or None): Which pixels of ``value`` count as 0,
                bool of shape ``(n, s)``.

        Returns:
            ~chainer.Variable: ``y`` of shape ``(n, q, out_channels)``.

        """
        shapes = _checked_levels(shapes)
        n, q, s = self._checked_sizes(query, reference, value, shapes, padding_mask)
        heads, levels, points = self.heads, self.levels, self.points

        value = _of_rows(self.value_fc, value)
        if padding_mask is not None:
            xp = chainer.backend.get_array_module(value)
            padding = xp.broadcast_to(padding_mask[:, :, None], value.shape)
            value = F.where(padding, xp.zeros((), value.dtype), value)
        value = F.reshape(value, (n, s, heads, self.out_channels // heads))

        weights = _of_rows(self.weight_fc, query)
        weights = F.reshape(weights, (n, q, heads, levels * points))
        weights = F.softmax(weights, axis=3)
        weights = F.reshape(weights, (n, q, heads, levels, points))

        offset = _of_rows(self.offset_fc, query)
        offset = F.reshape(offset, (n, q, heads, levels, points, 2))
        locations = self._locations(reference, offset, shapes)
        y = multi_scale_deformable_attention(value, shapes, locations, weights)
        return _of_rows(self.output_fc, y)

    def _locations(self, reference, offset, shapes) -> chainer.Variable:
        """Where the points are, in shares of the levels' sizes and at least float32."""
        dtype = numpy.result_type('f', reference.dtype, offset.dtype)
        xp = chainer.backend.get_array_module(offset)
        offset = F.cast(offset, dtype)
        # (n, q, levels, 2 or 4) -> (n, q, 1, levels, 1, 2 or 4)
        reference = F.cast(reference, dtype)[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sizes = [(w, h) for h, w in shapes]
            scale = xp.array(sizes, dtype)[:, None]
            moved = offset / F.broadcast_to(scale, offset.shape)
        else:
            half = reference[..., 2:] * (0.5 / self.points)
            moved = offset * F.broadcast_to(half, offset.shape)
        return F.broadcast_to(reference[..., :2], offset.shape) + moved

    def _checked_sizes(
        self, query, reference, value, shapes, padding_mask
    ) -> tuple[int, int, int]:
        """The sizes ``n, q, s``; checks shapes, dtypes and devices."""
        arguments = {'query': query, 'reference': reference, 'value': value}
        found = {name: float_array(name, a).shape for name, a in arguments.items()}
        if padding_mask is not None:
            arguments['padding_mask'] = padding_mask
        check_devices(arguments)
        if len(shapes) != self.levels:
            raise ValueError(
                f'shapes must have {self.levels} pairs, one for each level, '
                f'not {len(shapes)}'
            )
        if len(found['query']) != 3:
            raise type_check.InvalidType(
                'query.shape == (n, q, in_channels)', f'query.shape == {found["query"]}'
            )
        n, q, _ = found['query']
        s = sum(h * w for h, w in shapes)
        for name, size in ('query', q), ('value', s):
            shape = found[name]
            channels = self.in_channels
            if channels is None:
                channels = shape[-1] if shape else 1
            check_shape(name, shape, (n, size, channels))
        expected = n, q, self.levels
        if found['reference'] not in ((*expected, 2), (*expected, 4)):
            raise type_check.InvalidType(
                f'reference.shape == {(*expected, 2)} or {(*expected, 4)}',
                f'reference.shape == {found["reference"]}',
            )
        if padding_mask is not None:
            check_shape('padding_mask', padding_mask.shape, (n, s))
            if padding_mask.dtype != bool:
                raise type_check.InvalidType(
                    'padding_mask.dtype == bool',
                    f'padding_mask.dtype == {padding_mask.dtype}',
                )
        return n, q, s


def _directions(heads: int, levels: int, points: int) -> numpy.ndarray:
    """The offsets ``(x, y)`` at the start, in a row: those of ``offset_fc``'s bias."""
    angles = 2 * math.pi / heads * numpy.arange(heads)
    directions = numpy.stack([numpy.cos(angles), numpy.sin(angles)], -1)
    directions /= abs(directions).max(-1, keepdims=True)
    steps = numpy.arange(1, points + 1)
    # (heads, 1, 1, xy) * (points, 1)
    offsets = directions[:, None, None] * steps[:, None]
    return numpy.broadcast_to(offsets, (heads, levels, points, 2)).ravel()


def _of_rows(fc: L.Linear, x) -> chainer.Variable:
    """A fully connected layer of each row of ``x (n, rows, channels)``."""
    n, rows, channels = x.shape
    y = fc(F.reshape(x, (n * rows, channels)))
    return F.reshape(y, (n, rows, fc.out_size))
