"""Sums over points of weight times sample, and their gradients, for every backend.

What :mod:`~chainer_deform.sampling.convolution` says of backends, batches, tiles and
threads holds here, too. A tile has some of the ``q`` output positions, all of which
read images of the same batch.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from chainer_deform.sampling.pieces import Images, cut, new_gradients
from chainer_deform.sampling.points import Given
from chainer_deform.sampling.threads import each, quietly


@quietly
def forward(backend, x, locations, weights, indices, border: str):
    """Returns ``y (q, c)``.

    Args:
        backend: The module of the backend.
        x: Images (n, c, h, w).
        locations: Points (q, groups, K, 2), rows and columns in pixels.
        weights: Their weights (q, groups, K).
        indices: The image of each output position, int64 (q,), from 0 to n - 1.
        border: ``'zero'`` or ``'clamp'``.

    """
    call = _Call(backend, x, locations, weights, indices, border)
    y = backend.empty((len(indices), call.images.c), x.dtype)

    def add_up(image, batch, tile):
        sampler = call.sampler(batch, tile)
        y[tile] = sampler.sample(image, call.channels)[:, 0]

    for batch in call.images.batches():
        image = call.images.load(x, batch)
        call.each_tile(functools.partial(add_up, image, batch), batch)
        del image  # before the next one is copied
    return y


@quietly
def backward(
    backend, wanted: Collection[str], gy, x, locations, weights, indices, border: str
) -> dict:
    """Returns the gradients of the arguments named in ``wanted``, and no others."""
    call = _Call(backend, x, locations, weights, indices, border, gy)
    arrays = {'x': x, 'locations': locations, 'weights': weights}
    gradients = new_gradients(backend, wanted, arrays)

    def differentiate(image, gimage, sampler, gy_tile, part):
        channels = call.parts[part]
        gcolumns = backend.load_columns(gy_tile, channels, call.dtypes)
        sampler.differentiate(image, gcolumns, gimage, channels, part)

    for batch in call.images.batches():
        image = call.images.load(x, batch)
        gimage = call.images.new_gradient(gradients.get('x'), batch)
        for tile in call.shared_tiles(batch):
            sampler = call.sampler(batch, tile, gradients=gradients)
            call.each_part(
                functools.partial(differentiate, image, gimage, sampler, gy[tile])
            )
            sampler.write_gradients()
        del image  # before the gradient is copied
        call.images.store(gimage, gradients.get('x'), batch)
    return gradients


@quietly
def double_backward(
    backend,
    wanted: Collection[str],
    gg: Mapping,
    gy,
    x,
    locations,
    weights,
    indices,
    border: str,
) -> dict:
    """Returns the gradients of the sum of ``gg[name] * backward(...)[name]``.

    They are those of the arguments named in ``wanted``, which may be ``gy``: how fast
    ``y`` and the gradients change as the arguments move along ``gg``, as in
    :func:`chainer_deform.sampling.convolution.double_backward`.
    """
    call = _Call(backend, x, locations, weights, indices, border, gy, *gg.values())
    still = gg.keys() <= {'x'}
    arrays = {'x': x, 'locations': locations, 'weights': weights}
    gradients = new_gradients(backend, wanted, arrays)
    if 'gy' in wanted:
        gradients['gy'] = backend.empty(gy.shape, gy.dtype)

    def add_up(image, image_dot, batch, tile):
        sampler = call.sampler(batch, tile, tangents=gg)
        y_dot = sampler.sample_dot(image, image_dot, call.channels)
        gradients['gy'][tile] = y_dot[:, 0]

    def differentiate(image, image_dot, gimage_dot, sampler, gy_tile, part):
        channels = call.parts[part]
        gcolumns = backend.load_columns(gy_tile, channels, call.dtypes)
        sampler.differentiate_dot(
            image, image_dot, gcolumns, None, gimage_dot, channels, part
        )

    for batch in call.images.batches():
        # The sums are linear in the image: along it alone, it is not looked at.
        image = call.images.load(None if still else x, batch)
        image_dot = call.images.load(gg.get('x'), batch)
        if 'gy' in wanted:
            call.each_tile(functools.partial(add_up, image, image_dot, batch), batch)
        gimage_dot = call.images.new_gradient(gradients.get('x'), batch)
        for tile in call.shared_tiles(batch) if set(wanted) - {'gy'} else ():
            sampler = call.sampler(batch, tile, tangents=gg, gradients=gradients)
            call.each_part(
                functools.partial(
                    differentiate, image, image_dot, gimage_dot, sampler, gy[tile]
                )
            )
            sampler.write_gradients()
        del image, image_dot  # before the gradient is copied
        call.images.store(gimage_dot, gradients.get('x'), batch)
    return gradients


class _Call:
    """The arguments of a call, and how its work is cut.

    Attributes:
        dtypes: That of images, and that of coordinates and sums.
        threads: How many threads share the work.
        images: The images, some at a time.
        channels: A slice of all channels.
        parts: For each thread of the backward pass a slice of the channels.

    """

    def __init__(self, backend, x, locations, weights, indices, border, *others):
        self.backend, self.indices, self.border = backend, indices, border
        self.locations, self.weights = locations, weights
        c = x.shape[1]
        q, self.groups, self.K = weights.shape
        self.dtypes = backend.dtypes(x, x, locations, weights, *others)
        # About 32 multiply-adds to sample a channel at a point.
        self.threads = backend.thread_count(32 * q * self.K * c)
        self.images = Images(backend, x.shape, self.dtypes, self.threads)
        self.channels = slice(0, c)
        self.parts = cut(c, c, self.threads, unit=16)
        # The output positions, image after image; None if they are so already.
        self.order, self.sorted_indices = None, indices
        if len(self.images.batches()) > 1 and (indices[1:] < indices[:-1]).any():
            self.order = indices.argsort(kind='stable')
            self.sorted_indices = indices[self.order]

    def each_tile(self, work, batch: slice) -> None:
        """Does the work for each tile of a batch; a thread takes whole tiles."""
        tiles = self._tiles(batch, self.channels, tiles=self.threads)
        each(work, tiles, self.threads)

    def each_part(self, work) -> None:
        """Does the work for each part of the channels."""
        each(work, range(len(self.parts)), self.threads)

    def shared_tiles(self, batch: slice) -> list:
        """The tiles of a batch, each of which all threads share."""
        return self._tiles(batch, self.parts[0], parts=len(self.parts))

    def _tiles(self, batch: slice, channels: slice, tiles=1, parts=1) -> list:
        """Output positions that read a batch: slices, or arrays of their numbers."""
        most = self.backend.tile_positions(
            channels.stop - channels.start,
            self.groups * self.K,
            self.dtypes,
            tiles,
            parts,
        )
        start, stop = 0, len(self.indices)
        if batch.stop - batch.start < self.images.n:
            ends = self.sorted_indices.searchsorted([batch.start, batch.stop])
            start, stop = (int(end) for end in ends)
        positions = [
            slice(start + part.start, start + part.stop)
            for part in cut(stop - start, most, tiles)
        ]
        if self.order is not None:
            return [self.order[part] for part in positions]
        return positions

    def sampler(self, batch: slice, tile, tangents=None, gradients=None):
        """What samples a batch at the points of a tile; as for a convolution."""
        tangents, gradients = tangents or {}, gradients or {}
        return self.backend.Sampler(
            Given(self.weights.shape, tile, self.indices, batch.start, self.border),
            (batch.stop - batch.start, self.images.h, self.images.w),
            self.dtypes,
            (self.locations, self.weights),
            (tangents.get('locations'), tangents.get('weights')),
            (gradients.get('locations'), gradients.get('weights')),
            len(self.parts),
        )
