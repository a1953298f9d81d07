"""What a deformable convolution looks like, and every check of it."""

from __future__ import annotations

from collections.abc import Mapping

from chainer.utils import type_check

from chainer_deform._checks import check_shape, float_shapes, integer, pair


class Geometry:
    """Kernel, stride, pad, dilate, groups and offset groups of one convolution.

    Args:
        ksize: Size ``(kh, kw)`` of the kernel, an int or a pair of ints.
        stride: Step ``(sy, sx)`` between outputs, likewise, in pixels.
        pad: Zeros ``(ph, pw)`` around the image, likewise, in pixels.
        dilate: Step ``(dy, dx)`` between taps, likewise, in pixels.
        groups: Number of groups of channels that are convolved separately.
        offset_groups: Number of groups of input channels with offsets of their own.

    Raises:
        TypeError: An option is not made of ints.
        ValueError: An option is out of range.

    """

    def __init__(
        self, ksize, stride=1, pad=0, dilate=1, groups: int = 1, offset_groups: int = 1
    ) -> None:
        self.kh, self.kw = pair('ksize', ksize, minimum=1)
        self.sy, self.sx = pair('stride', stride, minimum=1)
        self.ph, self.pw = pair('pad', pad, minimum=0)
        self.dy, self.dx = pair('dilate', dilate, minimum=1)
        self.groups = integer('groups', groups, minimum=1)
        self.offset_groups = integer('offset_groups', offset_groups, minimum=1)
        self.taps = self.kh * self.kw

    def W_shape(self, c: int, out_c: int) -> tuple[int, int, int, int]:
        """Shape of the filter from ``c`` to ``out_c`` channels.

        Raises:
            ValueError: The groups or offset groups do not divide the channels.

        """
        for option, count, what, channels in (
            ('groups', self.groups, 'input', c),
            ('groups', self.groups, 'output', out_c),
            ('offset_groups', self.offset_groups, 'input', c),
        ):
            if channels < 1 or channels % count:
                raise ValueError(
                    f'{option} must divide the number of {what} channels, '
                    f'but {option} is {count} and there are {channels}'
                )
        return out_c, c // self.groups, self.kh, self.kw

    def out_size(self, h: int, w: int) -> tuple[int, int]:
        """Output size ``(out_h, out_w)`` for images of ``h`` by ``w`` pixels."""
        return (
            (h + 2 * self.ph - self.dy * (self.kh - 1) - 1) // self.sy + 1,
            (w + 2 * self.pw - self.dx * (self.kw - 1) - 1) // self.sx + 1,
        )

    def check_arrays(self, types: Mapping) -> None:
        """Checks shapes and dtypes, by argument name.

        Args:
            types: Maps ``x``, ``offset``, ``W`` and, where given, ``mask`` and ``b`` to
                what :meth:`chainer.FunctionNode.check_type_forward` receives; in
                Chainer's light mode that is the arrays.

        Raises:
            chainer.utils.type_check.InvalidType: A shape or dtype is wrong.
            ValueError: The groups or offset groups do not divide the channels.

        """
        shapes = float_shapes(types)
        out_c, group_c = shapes['W'][:2]
        c = group_c * self.groups
        self.W_shape(c, out_c)
        x_shape = shapes['x']
        if len(x_shape) != 4 or x_shape[1] != c or min(x_shape[2:]) < 1:
            raise type_check.InvalidType(
                f'x.shape == (n, {c}, h, w) with h, w >= 1 '
                f'for W.shape == {shapes["W"]} and groups == {self.groups}',
                f'x.shape == {x_shape}',
            )
        n, _, h, w = x_shape
        out_h, out_w = self.out_size(h, w)
        if out_h < 1 or out_w < 1:
            raise type_check.InvalidType(
                'x.shape[2:] + 2 * pad >= dilate * (W.shape[2:] - 1) + 1',
                f'x.shape == {x_shape} and W.shape == {shapes["W"]} with '
                f'pad == {self.ph, self.pw} and dilate == {self.dy, self.dx}',
            )

        taps = self.offset_groups * self.taps
        offset_shape = n, 2 * taps, out_h, out_w
        channels = 'with 2 * kh * kw * offset_groups channels'
        if shapes.get('offset') == (n, 3 * taps, out_h, out_w):
            channels += '; if the last third of these is the mask, split it off'
        for name, shape, rule in (
            ('offset', offset_shape, channels),
            ('mask', (n, taps, out_h, out_w), 'with kh * kw * offset_groups channels'),
            ('b', (out_c,), ''),
        ):
            check_shape(name, shapes.get(name, shape), shape, rule)
