"""A deformable convolution of arrays and its gradients, for every backend.

``backend`` is the module :mod:`~chainer_deform.sampling.cpu` or
:mod:`~chainer_deform.sampling.cuda`. Images are copied channels last, some at a time,
and their output positions cut into tiles. In the forward pass a thread takes whole
tiles. In the backward pass each thread has images of its own, or all threads share a
tile, each with channels of its own: so no two add to the same number.

In the shapes below ``P = out_h * out_w``, ``K = kh * kw``, and a tile has ``m`` images,
``p`` positions of each and ``R = m * p`` in all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping

from chainer_deform.sampling.pieces import (
    Images,
    contiguous,
    cut,
    cut_tiles,
    new_gradients,
    shared_evenly,
)
from chainer_deform.sampling.points import Grid
from chainer_deform.sampling.threads import each, quietly

#: Bytes that the gradients of a filter may take which threads sum up for themselves.
FILTER_BYTES = 4 << 20


@quietly
def forward(backend, geometry, x, offset, W, mask=None, b=None):
    """Returns ``y``; shapes and dtypes are those of the public function."""
    call = _Call(backend, geometry, x, offset, W, mask, b)
    filters = call.filter(W)
    y = backend.empty(call.y_shape, x.dtype)
    y_view = call.by_position(y)

    def convolve(image, batch, tile):
        sampler = call.sampler(batch, tile)
        columns = sampler.sample(image, call.channels)
        backend.convolve([(filters, columns)], b, y_view[tile[0], :, tile[1]])

    for batch in call.images.batches():
        image = call.images.load(x, batch)
        call.each_tile(functools.partial(convolve, image, batch), batch)
        del image  # before the next one is copied
    return y


@quietly
def backward(
    backend, geometry, wanted: Collection[str], gy, x, offset, W, mask=None, b=None
) -> dict:
    """Returns the gradients of the arguments named in ``wanted``, and no others."""
    call = _Call(backend, geometry, x, offset, W, mask, b, gy)
    arrays = {'x': x, 'offset': offset, 'mask': mask, 'W': W}
    gradients = new_gradients(backend, wanted, arrays)
    filters = call.transposed_filters(W) if set(wanted) - {'b'} else []
    gy_view = call.by_position(gy)
    need_gcolumns = not {'x', 'offset', 'mask'}.isdisjoint(wanted)

    def differentiate(image, gimage, sampler, gy_tile, slot, part):
        channels, outputs = call.parts[part]
        if need_gcolumns:
            gcolumns = filters[part].gcolumns(gy_tile[outputs])
            columns = sampler.differentiate(
                image, gcolumns, gimage, channels, slot, columns='W' in wanted
            )
        else:
            columns = sampler.sample(image, channels)
        if 'W' in wanted:
            filters[part].add_gradient(gy_tile[outputs], columns)

    def work(image, gimage, batch, tile, parts):
        sampler = call.sampler(batch, tile, gradients=gradients)
        gy_tile = backend.load_gradient(gy_view, tile, call.dtypes[0])
        call.each_part(
            functools.partial(differentiate, image, gimage, sampler, gy_tile), parts
        )
        sampler.write_gradients()

    for batch in call.images.batches() if set(wanted) - {'b'} else ():
        image = call.images.load(x, batch)
        gimage = call.images.new_gradient(gradients.get('x'), batch)
        call.each_shared_tile(functools.partial(work, image, gimage, batch), batch)
        del image  # before the gradient is copied
        call.images.store(gimage, gradients.get('x'), batch)
    if 'W' in wanted:
        call.write_gradient(filters, gradients['W'])
    if 'b' in wanted:
        gb = gy.sum((0, 2, 3), call.dtypes[1])
        gradients['b'] = gb.astype(b.dtype, copy=False)
    return gradients


@quietly
def double_backward(
    backend,
    geometry,
    wanted: Collection[str],
    gg: Mapping,
    gy,
    x,
    offset,
    W,
    mask=None,
    b=None,
) -> dict:
    """Returns the gradients of the sum of ``gg[name] * backward(...)[name]``.

    They are those of the arguments named in ``wanted``, which may be ``gy``, but not
    ``b``: the sum does not depend on it. ``gg`` has arrays with the shape and a float
    dtype of arguments, by name; what it lacks counts as 0.

    Second derivatives are symmetric. So these gradients are how fast ``y`` and the
    first gradients change as the arguments move along ``gg``, and each line of the two
    functions below is the product rule of a line of those above. ``_dot`` stands for
    the derivative along ``gg``.
    """
    gg = {name: contiguous(array) for name, array in gg.items()}
    gradients = {}
    if 'gy' in wanted:
        y_dot = _forward_dot(backend, geometry, gg, gy, x, offset, W, mask)
        gradients['gy'] = y_dot
    if set(wanted) - {'gy'}:
        gradients.update(
            _backward_dot(backend, geometry, wanted, gg, gy, x, offset, W, mask)
        )
    return gradients


def _forward_dot(backend, geometry, gg, gy, x, offset, W, mask):
    """How fast ``y`` changes; in the dtype of ``gy``."""
    call = _Call(backend, geometry, x, offset, W, mask, gy, *gg.values())
    x_dot, W_dot, b_dot = (gg.get(name) for name in ('x', 'W', 'b'))
    columns_move = not gg.keys() <= {'W', 'b'}
    filters = call.filter(W) if columns_move else None
    filters_dot = None if W_dot is None else call.filter(W_dot)
    y_dot = backend.empty(call.y_shape, gy.dtype)
    y_dot_view = call.by_position(y_dot)

    def convolve(image, image_dot, batch, tile):
        sampler = call.sampler(batch, tile, tangents=gg)
        terms = []
        if columns_move:
            columns_dot = sampler.sample_dot(image, image_dot, call.channels)
            terms.append((filters, columns_dot))
        if W_dot is not None:
            terms.append((filters_dot, sampler.sample(image, call.channels)))
        backend.convolve(terms, b_dot, y_dot_view[tile[0], :, tile[1]])

    for batch in call.images.batches():
        # The columns are linear in the image: along it alone, it is not looked at.
        image = call.images.load(None if gg.keys() <= {'x', 'b'} else x, batch)
        image_dot = call.images.load(x_dot, batch)
        call.each_tile(
            functools.partial(convolve, image, image_dot, batch), batch, copies=2
        )
        del image, image_dot  # before the next ones are copied
    return y_dot


def _backward_dot(backend, geometry, wanted, gg, gy, x, offset, W, mask) -> dict:
    """How fast the gradients change that are named in ``wanted``."""
    call = _Call(backend, geometry, x, offset, W, mask, gy, *gg.values())
    x_dot, W_dot = gg.get('x'), gg.get('W')
    columns_move = not gg.keys() <= {'W', 'b'}
    still = gg.keys() <= {'x', 'b'}
    arrays = {'x': x, 'offset': offset, 'mask': mask, 'W': W}
    gradients = new_gradients(backend, wanted, arrays)
    need_gcolumns = not {'x', 'offset', 'mask'}.isdisjoint(wanted)
    filters = call.transposed_filters(W)
    filters_dot = None if W_dot is None else call.transposed_filters(W_dot)
    gy_view = call.by_position(gy)

    def differentiate(image, image_dot, gimage_dot, sampler, gy_tile, slot, part):
        channels, outputs = call.parts[part]
        if 'W' in wanted and columns_move:
            columns_dot = sampler.sample_dot(image, image_dot, channels)
            filters[part].add_gradient(gy_tile[outputs], columns_dot)
            del columns_dot  # before others take memory
        if need_gcolumns:
            gcolumns = gcolumns_dot = None
            if columns_move:
                gcolumns = filters[part].gcolumns(gy_tile[outputs])
            if W_dot is not None:
                gcolumns_dot = filters_dot[part].gcolumns(gy_tile[outputs])
            sampler.differentiate_dot(
                image, image_dot, gcolumns, gcolumns_dot, gimage_dot, channels, slot
            )

    def work(image, image_dot, gimage_dot, batch, tile, parts):
        sampler = call.sampler(batch, tile, tangents=gg, gradients=gradients)
        gy_tile = backend.load_gradient(gy_view, tile, call.dtypes[0])
        call.each_part(
            functools.partial(
                differentiate, image, image_dot, gimage_dot, sampler, gy_tile
            ),
            parts,
        )
        sampler.write_gradients()

    for batch in call.images.batches():
        image = call.images.load(None if still else x, batch)
        image_dot = call.images.load(x_dot, batch)
        gimage_dot = call.images.new_gradient(gradients.get('x'), batch)
        call.each_shared_tile(
            functools.partial(work, image, image_dot, gimage_dot, batch),
            batch,
            copies=2,
        )
        del image, image_dot  # before the gradient is copied
        call.images.store(gimage_dot, gradients.get('x'), batch)
    if 'W' in wanted:
        call.write_gradient(filters, gradients['W'])
    return gradients


class _Call:
    """The arguments of a call, and how its work is cut.

    Attributes:
        dtypes: That of images and products, and that of coordinates and sums.
        threads: How many threads share the work.
        images: The images, some at a time.
        channels: A slice of all channels.
        parts: For each thread of the backward pass a slice of the channels, and one of
            the outputs that depend on them.
        by_image: Whether each thread of the backward pass has images of its own, and
            all channels. A batch must have enough images, and the filter's gradients,
            one for each thread, must be small.

    """

    def __init__(self, backend, geometry, x, offset, W, mask, *others) -> None:
        self.backend, self.geometry = backend, geometry
        self.W = W
        self.offset, self.mask = contiguous(offset), contiguous(mask)
        n, c, _, _ = x.shape
        self.out_size = offset.shape[2:]
        self.positions = math.prod(self.out_size)
        self.y_shape = (n, len(W), *self.out_size)
        self.dtypes = backend.dtypes(x, W, offset, mask, *others)
        # For each number of the columns its products, and about 32 to sample it.
        multiply_adds = n * self.positions * geometry.taps * c
        multiply_adds *= len(W) // geometry.groups + 32
        self.threads = backend.thread_count(multiply_adds)
        self.images = Images(backend, x.shape, self.dtypes, self.threads)
        self.channels = slice(0, c)
        self.parts = self._parts()
        filter_bytes = self.threads * W.size * self.dtypes[0].itemsize
        self.by_image = (
            shared_evenly(n, self.threads)
            and 1 < self.threads <= self.images.at_a_time
            and filter_bytes <= FILTER_BYTES
        )
        if self.by_image:
            self.parts = self.threads * [(self.channels, slice(0, len(W)))]

    def _parts(self) -> list[tuple[slice, ...]]:
        c, out_c, groups = self.channels.stop, len(self.W), self.geometry.groups
        if groups == 1:
            channels = cut(c, c, self.threads, unit=16)
            return [(part, slice(0, out_c)) for part in channels]
        return [
            tuple(
                slice(part.start * each_has, part.stop * each_has)
                for each_has in (c // groups, out_c // groups)
            )
            for part in cut(groups, groups, self.threads)
        ]

    def each_tile(self, work, batch: slice, copies: int = 1) -> None:
        """Does the work for each tile of a batch; a thread takes whole tiles.

        ``copies`` is how many columns there are at a time.
        """
        most = self._tile_positions(self.channels, copies, tiles=self.threads)
        tiles = cut_tiles(batch, self.positions, most, self.threads)
        each(work, tiles, self.threads)

    def each_shared_tile(self, work, batch: slice, copies: int = 1) -> None:
        """Does ``work(tile, parts)`` for each tile of a batch.

        All parts share a tile; or each part has images, and so tiles, of its own.
        """
        parts = range(len(self.parts))
        most = self._tile_positions(
            self.parts[0][0],
            copies,
            tiles=len(parts) if self.by_image else 1,
            parts=1 if self.by_image else len(parts),
        )
        if not self.by_image:
            for tile in cut_tiles(batch, self.positions, most):
                work(tile, parts)
            return

        def work_on_images(part):
            images = shares[part]
            share = slice(batch.start + images.start, batch.start + images.stop)
            for tile in cut_tiles(share, self.positions, most):
                work(tile, [part])

        shares = cut(batch.stop - batch.start, batch.stop, self.threads)
        each(work_on_images, range(len(shares)), self.threads)

    def each_part(self, work, parts) -> None:
        """Does ``work(slot, part)`` for parts of the channels, numbered by slots."""
        each(lambda item: work(*item), list(enumerate(parts)), self.threads)

    def _tile_positions(self, channels: slice, copies: int, tiles=1, parts=1) -> int:
        taps = self.geometry.taps
        return self.backend.tile_positions(
            max(copies * taps * (channels.stop - channels.start), len(self.W)),
            taps * self.geometry.offset_groups,
            self.dtypes,
            tiles,
            parts,
        )

    def sampler(self, batch: slice, tile, tangents=None, gradients=None):
        """What samples a batch at the points of a tile.

        Args:
            batch: The images that there are.
            tile: Images and positions.
            tangents: Arrays by name, along which ``offset`` and ``mask`` move.
            gradients: Arrays by name for the gradients of ``offset`` and ``mask``.

        """
        tangents, gradients = tangents or {}, gradients or {}
        return self.backend.Sampler(
            Grid(self.geometry, self.out_size, tile, batch.start),
            (batch.stop - batch.start, self.images.h, self.images.w),
            self.dtypes,
            (self.offset, self.mask),
            (tangents.get('offset'), tangents.get('mask')),
            (gradients.get('offset'), gradients.get('mask')),
            1 if self.by_image else len(self.parts),
        )

    def by_position(self, y):
        """(n, out_c, out_h, out_w) -> (n, out_c, P)."""
        return y.reshape(*y.shape[:2], self.positions)

    def filter(self, W):
        """The filter for the products of the forward pass."""
        return self.backend.Filter(
            W, self.geometry.groups, self.dtypes[0], self.threads
        )

    def transposed_filters(self, W) -> list:
        """For each part of the channels the filter for those of the backward pass."""

        def make(part):
            W_part, groups = self._filter_part(W, part)
            return self.backend.TransposedFilter(W_part, groups, self.dtypes[0])

        return each(make, range(len(self.parts)), self.threads)

    def write_gradient(self, filters: list, gW) -> None:
        """Writes the gradient of the filter, piece by piece, to ``gW``."""
        if self.by_image:
            for other in filters[1:]:
                filters[0].add_gradient_of(other)
            filters = filters[:1]

        def write(part):
            gW_part, _ = self._filter_part(gW, part)
            filters[part].write_gradient(gW_part)

        each(write, range(len(filters)), self.threads)

    def _filter_part(self, W, part: int):
        """The piece of a filter for a part of the channels, and its groups."""
        channels, outputs = self.parts[part]
        if self.geometry.groups == 1:
            return W[:, channels], 1
        return W[outputs], self.geometry.groups * W[outputs].shape[0] // len(W)
