"""The sampler on the CPU: NumPy for the coordinates, SciPy's sparse product.

Sampling is a sparse matrix with up to four entries per row. A row is one tap (image,
output position, kernel position, offset group), a column one pixel of the image,
channels last. The matrix makes the columns; its transpose scatters their gradients
back into the image.

In the shapes below ``P = out_h * out_w`` is the number of output positions of an
image, ``K = kh * kw`` that of kernel positions, ``og`` that of offset groups, ``G``
that of groups; ``iCg`` and ``oCg`` are the input and output channels of a group. A
piece has ``m`` images and ``p`` positions of each; ``R = m * p * K * og`` are its taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import numpy
from scipy import sparse

from chainer_deform.sampling.geometry import Geometry

#: Bytes that the columns of a piece, and all that is made from them, may take.
PIECE_BYTES = 16 << 20


@numpy.errstate(all='ignore')  # NaN and infinity pass silently, as on a GPU
def forward(geometry: Geometry, x, offset, W, mask=None, b=None):
    """Returns ``y``; shapes and dtypes are those of the public function."""
    dtype = _compute_dtype(x, offset, W, mask, b)
    image = _image(geometry, x, dtype)
    filters = _filters(geometry, W, dtype)
    y = numpy.empty((len(x), len(W), *offset.shape[2:]), x.dtype)
    y_view = _position_view(geometry, y)

    for taps in _pieces(geometry, x.shape, offset, mask, dtype):
        columns = _split_groups(geometry, taps.sample(image))
        # (G, oCg, m * p) = (G, oCg, K * iCg) @ (G, K * iCg, m * p)
        y_piece = filters @ columns.transpose(0, 2, 1)
        if b is not None:
            y_piece += b.reshape(geometry.groups, -1, 1)
        # (m, p, G, oCg)
        view = y_view[taps.piece]
        view[...] = y_piece.transpose(2, 0, 1).reshape(view.shape)
    return y


@numpy.errstate(all='ignore')
def backward(
    geometry: Geometry, wanted: Collection[str], gy, x, offset, W, mask=None, b=None
) -> dict:
    """Returns the gradients of the arguments named in ``wanted``, and no others."""
    dtype = _compute_dtype(x, offset, W, mask, gy)
    image = _image(geometry, x, dtype)
    filters = _filters(geometry, W, dtype)
    gy_view = _position_view(geometry, gy)

    wanted = set(wanted)
    gradients = {}
    slopes = {}
    for name, array in ('offset', offset), ('mask', mask):
        if name in wanted:
            gradients[name] = numpy.empty(array.shape, array.dtype)
            slopes[name] = _tap_view(geometry, gradients[name])
    gimage = numpy.zeros_like(image) if 'x' in wanted else None
    gfilters = numpy.zeros_like(filters) if 'W' in wanted else None

    for taps in (
        _pieces(geometry, x.shape, offset, mask, dtype) if wanted - {'b'} else ()
    ):
        # (G, oCg, m * p) from (m, p, G, oCg)
        gy_piece = (
            gy_view[taps.piece]
            .astype(dtype)
            .transpose(2, 3, 0, 1)
            .reshape(*filters.shape[:2], -1)
        )
        if 'W' in wanted:
            # (G, oCg, K * iCg) = (G, oCg, m * p) @ (G, m * p, K * iCg)
            gfilters += gy_piece @ _split_groups(geometry, taps.sample(image))
        if wanted <= {'W', 'b'}:
            continue
        # (G, m * p, K * iCg) = (G, m * p, oCg) @ (G, oCg, K * iCg)
        gcolumns = _join_groups(geometry, gy_piece.transpose(0, 2, 1) @ filters)
        if slopes:
            for name, gradient in zip(('offset', 'mask'), taps.slopes(image, gcolumns)):
                if name in slopes:
                    view = slopes[name][taps.piece]
                    view[...] = gradient.reshape(view.shape)
        if 'x' in wanted:
            taps.scatter(gcolumns, gimage)

    if 'x' in wanted:
        n, c, h, w = x.shape
        gradients['x'] = numpy.ascontiguousarray(
            gimage.reshape(n, h, w, c).transpose(0, 3, 1, 2), x.dtype
        )
    if 'W' in wanted:
        # (G, oCg, K, iCg) -> (G, oCg, iCg, K)
        gW = gfilters.reshape(*gfilters.shape[:2], geometry.taps, -1).swapaxes(2, 3)
        gradients['W'] = numpy.ascontiguousarray(gW, W.dtype).reshape(W.shape)
    if 'b' in wanted:
        gradients['b'] = gy.sum((0, 2, 3), dtype).astype(b.dtype)
    return gradients


class _Taps:
    """The sampling points of a piece, and the sparse matrix that they make.

    Arrays have one entry for each tap (R,), or one for each of its corners (R, 4) in
    the order top left, top right, bottom left, bottom right.
    """

    def __init__(
        self,
        geometry: Geometry,
        piece: tuple[slice, slice],
        x_shape,
        out_w: int,
        offset,
        mask,
        dtype,
    ) -> None:
        n, _, h, w = x_shape
        og = geometry.offset_groups
        self.piece = piece

        # A point is a place of the regular grid, in exact integers, plus its offset.
        # (p, K, 1)
        oy, ox = numpy.divmod(
            numpy.arange(piece[1].start, piece[1].stop)[:, None, None], out_w
        )
        i, j = numpy.divmod(numpy.arange(geometry.taps)[:, None], geometry.kw)
        # (m, p, K, og)
        offset_x, offset_y = numpy.moveaxis(offset[piece], -1, 0).astype(dtype, 'C')
        nan = numpy.isnan(offset_x) | numpy.isnan(offset_y)
        self.nan = nan.reshape(-1) if nan.any() else None
        offset_x[nan] = offset_y[nan] = numpy.inf  # such a point touches no pixel
        rows = _axis(oy * geometry.sy - geometry.ph + i * geometry.dy, offset_y, h)
        cols = _axis(ox * geometry.sx - geometry.pw + j * geometry.dx, offset_x, w)
        self.row_weights = [weight.reshape(-1) for _, weight, _ in rows]
        self.col_weights = [weight.reshape(-1) for _, weight, _ in cols]
        self.mask = None
        if mask is not None:
            self.mask = mask[piece].astype(dtype, 'C').reshape(-1)

        # A pixel is a row of the image (n * h * w * og, c / og). That of a corner
        # outside the image may be any number: it is never used.
        index_dtype = numpy.int32 if n * h * w * og < 2**31 else numpy.int64
        first_row = numpy.arange(piece[0].start, piece[0].stop)[:, None, None, None] * h
        row_pixels = [
            ((first_row + y) * (w * og)).astype(index_dtype) for y, _, _ in rows
        ]
        col_pixels = [
            (x * og + numpy.arange(og)).astype(index_dtype) for x, _, _ in cols
        ]
        taps = offset_x.size
        self.pixels = numpy.empty((taps, 4), index_dtype)
        self.inside = numpy.empty((taps, 4), bool)
        weights = numpy.empty((taps, 4), dtype)
        entries = numpy.zeros(taps, index_dtype)
        for q, (a, b) in enumerate(itertools.product((0, 1), repeat=2)):
            self.pixels[:, q] = (row_pixels[a] + col_pixels[b]).reshape(-1)
            self.inside[:, q] = (rows[a][2] & cols[b][2]).reshape(-1)
            numpy.multiply(self.row_weights[a], self.col_weights[b], weights[:, q])
            entries += self.inside[:, q]

        # Only the band from the first to the last pixel that is read takes part.
        pixels, weights = self.pixels[self.inside], weights[self.inside]
        self.band = (
            slice(pixels.min(), pixels.max() + 1) if len(pixels) else slice(0, 1)
        )
        ends = numpy.append(0, entries.cumsum()).astype(index_dtype)
        # (R, pixels of the band)
        self.matrix = sparse.csr_array(
            (weights, pixels - self.band.start, ends),
            shape=(taps, self.band.stop - self.band.start),
        )

    def sample(self, image):
        """The columns (R, c / og): the modulated values of the image at the points."""
        columns = self.matrix @ image[self.band]
        if self.nan is not None:
            columns[self.nan] = numpy.nan
        if self.mask is not None:
            columns *= self.mask[:, None]
        return columns

    def scatter(self, gcolumns, gimage) -> None:
        """Adds to ``gimage`` what the gradients of the columns make of it."""
        if self.mask is not None:
            gcolumns = gcolumns * self.mask[:, None]
        gimage[self.band] += self.matrix.T @ gcolumns

    def slopes(self, image, gcolumns):
        """The gradients of the offsets (R, 2), x first, and of the mask (R,)."""
        tl, tr, bl, br = (self._dot(image, gcolumns, corner) for corner in range(4))
        top, bottom = self.row_weights
        left, right = self.col_weights
        gmask = top * (left * tl + right * tr) + bottom * (left * bl + right * br)
        goffset = numpy.stack(
            (
                top * (tr - tl) + bottom * (br - bl),
                left * (bl - tl) + right * (br - tr),
            ),
            -1,
        )
        if self.nan is not None:
            goffset[self.nan] = gmask[self.nan] = numpy.nan
        if self.mask is not None:
            goffset *= self.mask[:, None]
        return goffset, gmask

    def _dot(self, image, gcolumns, corner: int):
        """The dot products of the columns' gradients with the pixels of one corner."""
        pixels = image.take(self.pixels[:, corner], axis=0, mode='clip')
        products = numpy.einsum('rc,rc->r', gcolumns, pixels)
        return numpy.where(self.inside[:, corner], products, 0)


def _axis(grid, offset, size: int):
    """The bilinear rule along one axis, for the points ``grid + offset``.

    Returns for the pixel before and the pixel after each point its index, its weight
    and whether it takes part: both the pixel and the point are inside, which for a
    point means the open interval (-1, size).
    """
    # Floor and fraction of the offset alone: no bits are lost far from the origin.
    # Clipped before it becomes an integer, to where every point is outside.
    limit = size + 1 + int(numpy.abs(grid).max())
    offset = numpy.clip(offset, -limit, limit)
    floor = numpy.floor(offset)
    after = offset - floor
    index = numpy.clip(floor.astype(numpy.int64) + grid, -2, size)
    index[(index == -1) & (after == 0)] = -2  # a point at -1 is outside
    return (
        (index, 1 - after, (index >= 0) & (index < size)),
        (index + 1, after, (index >= -1) & (index < size - 1)),
    )


def _pieces(geometry: Geometry, x_shape, offset, mask, dtype) -> Iterator[_Taps]:
    """The work cut into pieces: whole images if they are small, else positions."""
    n, c = x_shape[:2]
    out_h, out_w = offset.shape[2:]
    # A tap has its columns, their gradient, one corner of each, and its coordinates.
    position_bytes = geometry.taps * (
        3 * c * dtype.itemsize + 20 * 8 * geometry.offset_groups
    )
    offset = _tap_view(geometry, offset)
    if mask is not None:
        mask = _tap_view(geometry, mask)[..., 0]
    count = PIECE_BYTES // position_bytes
    for piece in geometry.pieces(n, out_h * out_w, count):
        yield _Taps(geometry, piece, x_shape, out_w, offset, mask, dtype)


def _compute_dtype(*arrays):
    """At least float32, and no less than any of the arrays has."""
    return numpy.result_type(numpy.float32, *(a.dtype for a in arrays if a is not None))


def _image(geometry: Geometry, x, dtype):
    """(n, c, h, w) -> (n * h * w * og, c / og), channels last."""
    n, c, h, w = x.shape
    og = geometry.offset_groups
    return numpy.ascontiguousarray(x.transpose(0, 2, 3, 1), dtype).reshape(
        n * h * w * og, c // og
    )


def _filters(geometry: Geometry, W, dtype):
    """(out_c, iCg, kh, kw) -> (G, oCg, K * iCg)."""
    filters = W.reshape(geometry.groups, -1, W.shape[1], geometry.taps)
    return numpy.ascontiguousarray(filters.swapaxes(2, 3), dtype).reshape(
        geometry.groups, -1, geometry.taps * W.shape[1]
    )


def _position_view(geometry: Geometry, y):
    """(n, out_c, out_h, out_w) -> (n, P, G, oCg)."""
    n, out_c, out_h, out_w = y.shape
    return y.reshape(
        n, geometry.groups, out_c // geometry.groups, out_h * out_w
    ).transpose(0, 3, 1, 2)


def _tap_view(geometry: Geometry, array):
    """An offset (n, og * 2 * K, out_h, out_w) -> (n, P, K, og, 2); a mask likewise."""
    n, channels, out_h, out_w = array.shape
    groups_taps = geometry.offset_groups * geometry.taps
    return array.reshape(
        n, geometry.offset_groups, channels // groups_taps, geometry.taps, out_h * out_w
    ).transpose(0, 4, 3, 1, 2)


def _split_groups(geometry: Geometry, columns):
    """(R, c / og) -> (G, m * p, K * iCg)."""
    G, K = geometry.groups, geometry.taps
    group_c = columns.shape[1] * geometry.offset_groups // G
    return (
        columns.reshape(-1, K, G, group_c)
        .transpose(2, 0, 1, 3)
        .reshape(G, -1, K * group_c)
    )


def _join_groups(geometry: Geometry, columns):
    """(G, m * p, K * iCg) -> (R, c / og)."""
    G, positions, taps_channels = columns.shape
    K, og = geometry.taps, geometry.offset_groups
    group_c = taps_channels // K
    return (
        columns.reshape(G, positions, K, group_c)
        .transpose(1, 2, 0, 3)
        .reshape(positions * K * og, G * group_c // og)
    )
