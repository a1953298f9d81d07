"""The sampler on the GPU: elementwise kernels for the columns, cuBLAS for the product.

Twin of :mod:`chainer_deform.sampling.cpu`, with the same letters for the shapes. The
image is channels last, so that a thread reads several channels of a pixel in one
access. A tap is the work of ``LANES`` neighbouring threads of a warp, which share its
channels. What does not change from batch to batch of a layer is compiled into its
kernels; the sizes of batch and images are not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import chainer
import numpy
from chainer.backends.cuda import cupy

from chainer_deform.geometry import Geometry
from chainer_deform.sampling.kernels import sampler_kernel, swap_kernel

#: Bytes that the columns of a piece may take.
COLUMN_BYTES = 1 << 30

#: Lanes of a warp that may share a tap.
MOST_LANES = 32

#: Positions per image below which one product for all images replaces one for each.
FEW_POSITIONS = 512


def forward(geometry: Geometry, x, offset, W, mask=None, b=None):
    """Returns ``y``; shapes and dtypes are those of the public function."""
    dtype, real = _dtypes(x, offset, W, mask, b)
    image = _swap(x, dtype)
    filters = _filters(geometry, W, dtype)
    y = cupy.empty((len(x), len(W), *offset.shape[2:]), dtype)
    y_view = _position_view(geometry, y)
    if b is not None:
        y_view[...] = b.astype(dtype).reshape(*y_view.shape[1:3], 1)

    for taps in _pieces(geometry, x.shape, offset, mask, dtype, real):
        view = y_view[taps.piece[0], :, :, taps.piece[1]]
        _convolve(filters, taps.sample(image), view, add=b is not None)
    return y.astype(x.dtype, copy=False)


def backward(
    geometry: Geometry,
    wanted: Collection[str],
    gy,
    x,
    offset,
    W,
    mask=None,
    b=None,
) -> dict:
    """Returns the gradients of the arguments named in ``wanted``, and no others."""
    dtype, real = _dtypes(x, offset, W, mask, gy)
    image = _swap(x, dtype)
    filters = _filters(geometry, W, dtype)
    gy_view = _position_view(geometry, gy)

    wanted = set(wanted)
    outputs = _outputs(wanted, x, offset, mask, real)
    gfilters = cupy.zeros(filters.shape, _wide(dtype)) if 'W' in wanted else None

    pieces = _pieces(geometry, x.shape, offset, mask, dtype, real)
    for taps in pieces if wanted - {'b'} else ():
        gy_piece = _gy_piece(gy_view, taps.piece, dtype)
        if wanted <= {'W', 'b'}:
            columns = taps.sample(image)
        else:
            gcolumns = taps.gcolumns(gy_piece, filters)
            columns = taps.columns_for(gcolumns) if 'W' in wanted else None
            taps.differentiate(
                {'image': image, 'gcolumns': gcolumns}, {'columns': columns, **outputs}
            )
            del gcolumns
        if 'W' in wanted:
            # (G, oCg, K * iCg) = (G, oCg, m * p) @ (G, m * p, K * iCg)
            _matmul(gy_piece, columns, gfilters, add=True)
        columns = None  # before the next piece takes its memory

    gradients = _gradients(geometry, outputs, gfilters, x, W)
    if 'b' in wanted:
        gradients['b'] = gy_view.sum((0, 3), real).reshape(-1).astype(b.dtype)
    return gradients


def double_backward(
    geometry: Geometry,
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
    ``b``: the sum does not depend on it. ``gg`` has arrays with the shape and dtype of
    arguments, by name; those that it lacks count as 0.
    """
    dtype, real = _dtypes(x, offset, W, mask, gy, gg.get('b'))
    filters = _filters(geometry, W, dtype)
    ggfilters = _filters(geometry, gg['W'], dtype) if 'W' in gg else None
    columns_move = not gg.keys() <= {'W', 'b'}
    # The columns are linear in the image: its gradient is 0 where nothing else moves,
    # and nothing else depends on it.
    linear = gg.keys() <= {'x', 'b'}
    inputs = {
        'image': None if linear else _swap(x, dtype),
        'ggimage': _swap(gg['x'], dtype) if 'x' in gg else None,
        'ggoffset': gg.get('offset'),
        'ggmask': gg.get('mask'),
    }
    gy_view = _position_view(geometry, gy)

    wanted = set(wanted)
    outputs = _outputs(wanted - {'x'} if linear else wanted, x, offset, mask, real)
    gfilters = cupy.zeros(filters.shape, _wide(dtype)) if 'W' in wanted else None
    if 'gy' in wanted:
        ggy = cupy.zeros(gy.shape, _wide(dtype))
        ggy_view = _position_view(geometry, ggy)
        if 'b' in gg:
            ggy_view[...] = gg['b'].reshape(*ggy_view.shape[1:3], 1)

    copies = columns_move + ('W' in gg)
    pieces = _pieces(geometry, x.shape, offset, mask, dtype, real, copies)
    for taps in pieces if copies else ():
        gy_piece = _gy_piece(gy_view, taps.piece, dtype)
        gcolumns = gcolumns_dot = columns = columns_dot = None
        if outputs and 'W' in gg:
            gcolumns = taps.gcolumns(gy_piece, ggfilters)
        if outputs and columns_move:
            gcolumns_dot = taps.gcolumns(gy_piece, filters)
        if 'gy' in wanted and 'W' in gg:
            columns = taps.columns_for(gcolumns)
        if wanted & {'gy', 'W'} and columns_move:
            columns_dot = taps.columns_for(gcolumns_dot)
        taps.differentiate(
            {**inputs, 'gcolumns': gcolumns, 'gcolumns_dot': gcolumns_dot},
            {**outputs, 'columns': columns, 'columns_dot': columns_dot},
        )
        del gcolumns, gcolumns_dot
        if 'W' in wanted and columns_move:
            _matmul(gy_piece, columns_dot, gfilters, add=True)
        if 'gy' in wanted:
            view = ggy_view[taps.piece[0], :, :, taps.piece[1]]
            if columns_move:
                _convolve(filters, columns_dot, view, add=True)
            if 'W' in gg:
                _convolve(ggfilters, columns, view, add=True)
        columns = columns_dot = None

    gradients = _gradients(geometry, outputs, gfilters, x, W)
    if 'gy' in wanted:
        gradients['gy'] = ggy.astype(gy.dtype, copy=False)
    if 'x' in wanted and linear:
        gradients['x'] = cupy.zeros(x.shape, x.dtype)
    return gradients


class _Taps:
    """The sampling points of a piece, and what the kernels do with them."""

    def __init__(
        self,
        geometry: Geometry,
        piece: tuple[slice, slice],
        x_shape,
        offset,
        mask,
        dtype,
        real,
    ) -> None:
        self.geometry, self.piece = geometry, piece
        self.dtype, self.real = dtype, real
        _, self.c, self.h, self.w = x_shape
        self.offset, self.mask = offset, mask
        self.images, self.positions = (axis.stop - axis.start for axis in piece)
        self.rows = self.images * self.positions
        self.taps = self.rows * geometry.taps * geometry.offset_groups

        group_c = self.c // geometry.groups
        offset_c = self.c // geometry.offset_groups
        self.vector = math.gcd(math.gcd(group_c, offset_c), 16 // dtype.itemsize)
        lanes = 1
        while lanes < min(MOST_LANES, offset_c // self.vector):
            lanes *= 2
        self.lanes = lanes

    def new_columns(self, dtype):
        """Memory for columns, or their gradients (G, m * p, K * iCg)."""
        groups = self.geometry.groups
        depth = self.geometry.taps * self.c // groups
        return cupy.empty((groups, self.rows, depth), dtype)

    def sample(self, image):
        """The columns: the modulated values of the image at the points."""
        columns = self.new_columns(self.dtype)
        self._launch(
            'sample', self.taps * self.lanes, {'image': image}, {'columns': columns}
        )
        return columns

    def gcolumns(self, gy_piece, filters):
        """The gradient of the columns that ``filters`` are applied to."""
        gcolumns = self.new_columns(_wide(self.dtype))
        # (G, m * p, K * iCg) = (G, m * p, oCg) @ (G, oCg, K * iCg)
        _matmul(gy_piece.transpose(0, 2, 1), filters, gcolumns)
        return gcolumns

    def columns_for(self, gcolumns):
        """Memory for columns: where the dtype is the same, that of their gradient."""
        if gcolumns is not None and gcolumns.dtype == self.dtype:
            return gcolumns
        return self.new_columns(self.dtype)

    def differentiate(self, inputs: dict, outputs: dict) -> None:
        """What the columns' gradients make of the other gradients.

        Adds to ``gimage``, and writes the other outputs, among them the columns
        themselves; what is None is left out.
        """
        inputs, outputs = (
            {name: array for name, array in arrays.items() if array is not None}
            for arrays in (inputs, outputs)
        )
        if 'gimage' in outputs:
            if chainer.config.cudnn_deterministic:
                self._gather(inputs, outputs.pop('gimage'))
            else:
                chainer.utils.nondeterministic('atomicAdd')
        if outputs:
            self._launch('differentiate', self.taps * self.lanes, inputs, outputs)

    def _gather(self, inputs: dict, gimage) -> None:
        """Adds to ``gimage`` in an order that is the same in every run.

        The taps are sorted by the cell of the pixel grid that their point lies in; each
        pixel then sums over the taps of its four cells.
        """
        cells = self.images * self.geometry.offset_groups * (self.h + 1) * (self.w + 1)
        keys = cupy.empty(self.taps, numpy.int64)
        self._launch('sort_key', self.taps, {}, {'keys': keys})
        keys = cupy.sort(keys)
        starts = cupy.searchsorted(
            keys, cupy.arange(cells + 1, dtype=numpy.int64) * self.taps
        )
        self._launch(
            'gather',
            self.images * self.h * self.w * (self.c // self.vector),
            {**inputs, 'keys': keys, 'starts': starts},
            {'gimage': gimage},
        )

    def _launch(self, name, size, inputs, outputs) -> None:
        """Runs a kernel over arrays, by name, and what every kernel takes."""
        geometry = self.geometry
        inputs = {**inputs, 'offset': self.offset}
        if self.mask is not None:
            inputs['mask'] = self.mask
        constants = {
            'VEC': self.vector,
            'LANES': self.lanes,
            'C': self.c,
            'GROUPS': geometry.groups,
            'OG': geometry.offset_groups,
            'K': geometry.taps,
            'KW': geometry.kw,
            'SY': geometry.sy,
            'SX': geometry.sx,
            'PH': geometry.ph,
            'PW': geometry.pw,
            'DY': geometry.dy,
            'DX': geometry.dx,
            'DOUBLE': int(self.real == numpy.float64),
        }
        constants = tuple(constants.items())
        kernel = sampler_kernel(name, tuple(inputs), tuple(outputs), constants)
        kernel(
            *(array.ravel() for array in inputs.values()),
            self.piece[0].start,
            self.piece[1].start,
            self.positions,
            self.rows,
            self.h,
            self.w,
            *self.offset.shape[2:],
            *(array.reshape(-1) for array in outputs.values()),
            size=size,
        )


def _pieces(
    geometry: Geometry, x_shape, offset, mask, dtype, real, copies: int = 1
) -> Iterator[_Taps]:
    """The work cut into pieces; few, as only memory and 32-bit indices ask for them.

    ``copies`` says how many columns there are at a time.
    """
    offset = cupy.ascontiguousarray(offset)
    if mask is not None:
        mask = cupy.ascontiguousarray(mask)
    positions = offset.shape[2] * offset.shape[3]
    if positions >= 2**31:
        raise ValueError(
            f'offset has {positions} output positions; a GPU takes fewer than 2 ** 31'
        )
    # Of one position: the columns, their gradient if its dtype differs; and the keys
    # that the taps are sorted by, with what sorting takes.
    columns = geometry.taps * x_shape[1]
    wide = _wide(dtype).itemsize
    column_bytes = columns * (wide if wide == dtype.itemsize else wide + dtype.itemsize)
    column_bytes *= copies
    key_bytes = geometry.taps * geometry.offset_groups * 3 * 8
    count = min(COLUMN_BYTES // max(column_bytes, key_bytes), (2**31 - 1) // columns)
    for piece in geometry.pieces(x_shape[0], positions, count):
        yield _Taps(geometry, piece, x_shape, offset, mask, dtype, real)


def _dtypes(*arrays):
    """The dtype of image, columns and products, and that of coordinates and sums.

    Both are float64 if any array is; else the first is that of image and filter, of
    which half precision is enough for a product that sums in float32.
    """
    x, _, W = arrays[:3]
    dtypes = (array.dtype for array in arrays if array is not None)
    real = numpy.result_type(numpy.float32, *dtypes)
    if real == numpy.float64:
        return real, real
    return numpy.promote_types(x.dtype, W.dtype), real


def _wide(dtype):
    """The dtype of what is summed up, for factors of ``dtype``."""
    return numpy.promote_types(dtype, numpy.float32)


def _filters(geometry: Geometry, W, dtype):
    """(out_c, iCg, kh, kw) -> (G, oCg, K * iCg)."""
    groups, K = geometry.groups, geometry.taps
    filters = W.reshape(groups, -1, W.shape[1], K).swapaxes(2, 3)
    return cupy.ascontiguousarray(filters, dtype).reshape(groups, -1, K * W.shape[1])


def _position_view(geometry: Geometry, y):
    """(n, out_c, out_h, out_w) -> (n, G, oCg, P)."""
    n, out_c, out_h, out_w = y.shape
    return y.reshape(n, geometry.groups, out_c // geometry.groups, out_h * out_w)


def _gy_piece(gy_view, piece, dtype):
    """(n, G, oCg, P) -> (G, oCg, m * p)."""
    # (G, oCg, m, p) from (m, G, oCg, p)
    gy_piece = gy_view[piece[0], :, :, piece[1]].transpose(1, 2, 0, 3)
    return cupy.ascontiguousarray(gy_piece, dtype).reshape(*gy_piece.shape[:2], -1)


def _outputs(wanted: set[str], x, offset, mask, real) -> dict:
    """The kernels' outputs, all 0 yet, from which :func:`_gradients` are made."""
    outputs = {}
    if 'x' in wanted:
        n, c, h, w = x.shape
        outputs['gimage'] = cupy.zeros((n, h * w, c), real)
    for name, array in ('offset', offset), ('mask', mask):
        if name in wanted:
            outputs[f'g{name}'] = cupy.zeros(array.shape, array.dtype)
    return outputs


def _gradients(geometry: Geometry, outputs: dict, gfilters, x, W) -> dict:
    """The gradients of the arguments, by name."""
    gradients = {
        name: outputs[f'g{name}']
        for name in ('offset', 'mask')
        if f'g{name}' in outputs
    }
    if 'gimage' in outputs:
        gradients['x'] = _swap(outputs['gimage'], x.dtype).reshape(x.shape)
    if gfilters is not None:
        # (G, oCg, K, iCg) -> (G, oCg, iCg, K)
        gW = gfilters.reshape(*gfilters.shape[:2], geometry.taps, -1).swapaxes(2, 3)
        gradients['W'] = cupy.ascontiguousarray(gW, W.dtype).reshape(W.shape)
    return gradients


def _swap(array, dtype):
    """(n, r, s...) -> (n, s..., r), the s as one axis, in another dtype."""
    n, rows = array.shape[:2]
    cols = math.prod(array.shape[2:])
    array = cupy.ascontiguousarray(array)
    target = cupy.empty((n, cols, rows), dtype)
    whole = rows % 4 == cols % 4 == _pointer(array) % (4 * array.itemsize) == 0
    tile = 4 if whole else 1
    blocks = -(-rows // (4 * tile)), -(-cols // (8 * tile))
    swap_kernel(tile)(
        array.ravel(),
        rows,
        cols,
        *blocks,
        target.reshape(-1),
        size=n * blocks[0] * blocks[1] * 32,
    )
    return target


def _matmul(a, b, out, add=False) -> None:
    """``out[i] = a[i] @ b[i]``, or ``+=``, for each i; ``a`` may have just one matrix.

    All are views in which one of the last two axes is contiguous, in ``out`` the last.
    cupy.matmul would copy such views, and rounds float16 otherwise.
    """
    batch, rows, cols = out.shape
    # cuBLAS counts by columns: it computes the transpose of the product.
    b_transposed, b_leading = _order(b)
    a_transposed, a_leading = _order(a)
    _, leading = _order(out)
    real = numpy.float64 if a.dtype == numpy.float64 else numpy.float32
    one, beta = numpy.ones((), real), numpy.full((), add, real)
    cublas = cupy.cuda.cublas
    cublas.gemmStridedBatchedEx(
        cupy.cuda.device.get_cublas_handle(),
        *(b_transposed, a_transposed, cols, rows, a.shape[2], one.ctypes.data),
        *(_pointer(b), _CUDA_TYPES[b.dtype.char], b_leading, _stride(b, 0)),
        *(_pointer(a), _CUDA_TYPES[a.dtype.char], a_leading, _stride(a, 0)),
        beta.ctypes.data,
        *(_pointer(out), _CUDA_TYPES[out.dtype.char], leading, _stride(out, 0)),
        *(batch, _compute_type(a.dtype), -1),
    )


def _convolve(filters, columns, view, add: bool) -> None:
    """``view (m, G, oCg, p) = filters @ columns``, or ``+=``; a view of the output."""
    m, groups, group_out, p = view.shape
    if m > 1 and p < FEW_POSITIONS:
        # (G, oCg, m * p) = (G, oCg, K * iCg) @ (G, K * iCg, m * p)
        flat = cupy.empty((groups, group_out, m * p), _wide(view.dtype))
        _matmul(filters, columns.transpose(0, 2, 1), flat)
        flat = flat.reshape(groups, group_out, m, p).transpose(2, 0, 1, 3)
        view[...] = view + flat if add else flat
        return
    # (G, m, K * iCg, p)
    columns = columns.reshape(groups, m, p, -1).transpose(0, 1, 3, 2)
    if groups <= m:
        for g in range(groups):
            # (m, oCg, p) = (oCg, K * iCg) @ (m, K * iCg, p)
            _matmul(filters[g : g + 1], columns[g], view[:, g], add)
    else:
        for i in range(m):
            # (G, oCg, p) = (G, oCg, K * iCg) @ (G, K * iCg, p)
            _matmul(filters, columns[:, i], view[i], add)


def _order(matrices) -> tuple[int, int]:
    """Whether cuBLAS has to transpose a row-major matrix, and its leading dimension."""
    _, rows, cols = matrices.shape
    row, col = _stride(matrices, 1), _stride(matrices, 2)
    if (col == 1 or cols == 1) and (row >= cols or rows == 1):
        return 0, max(row, cols)
    return 1, max(col, rows)


def _stride(matrices, axis: int) -> int:
    """The step along an axis, in elements; 0 along a batch of one."""
    if matrices.shape[axis] == 1:
        return 0
    return matrices.strides[axis] // matrices.itemsize


# Numbers of cudaDataType and cublasComputeType_t.
_CUDA_TYPES = {'e': 2, 'f': 0, 'd': 1}
_COMPUTE_FLOAT32, _COMPUTE_FLOAT64, _COMPUTE_TF32 = 68, 70, 77


def _compute_type(dtype) -> int:
    """What sums and, for float32, factors are rounded to: TF32 where both allow it.

    CuPy does by the environment variable ``CUPY_TF32``, Chainer does not where its
    configuration says ``use_cudnn_tensor_core = 'never'``.
    """
    if dtype == numpy.float64:
        return _COMPUTE_FLOAT64
    allowed = chainer.config.use_cudnn_tensor_core != 'never'
    if dtype == numpy.float32 and allowed and _cupy_uses_tf32():
        return _COMPUTE_TF32
    return _COMPUTE_FLOAT32


def _cupy_uses_tf32() -> bool:
    from cupy._core import _routines_linalg as linalg

    return linalg.get_compute_type(numpy.float32) == linalg.COMPUTE_TYPE_TF32


def _pointer(array) -> int:
    return array.data.ptr
