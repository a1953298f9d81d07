"""What the CPU path is made of, in Numba: compiled for this CPU, without the GIL.

Twin of :mod:`chainer_deform.sampling.cpu_scipy`; :mod:`chainer_deform.sampling.cpu`
says what is what. Numba compiles a function when it is first called, and keeps the
result on disk.
"""

from __future__ import annotations

import contextlib
import os

import numba
import numpy
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from chainer_deform.sampling import bilinear

#: Bytes that the columns of a tile may take: they stay in the cache of a core.
TILE_BYTES = 2 << 20

if numba.config.DISABLE_JIT:
    raise ImportError('Numba is switched off')

# Of the CPU that is compiled for, which need not be the one that compiles.
_features = cpu_target.target_context.codegen().magic_tuple()[2].split(',')
_VECTOR_BYTES = 64 if '+avx512f' in _features else 32 if '+avx2' in _features else 16

#: Rows of a block of the product: as many as the vector registers hold.
_ROWS = 14 if _VECTOR_BYTES == 64 else 6

#: Positions that are sampled kernel position by kernel position: what is known of them
#: lies next to each other.
_LINE = 8

#: Terms of the sums of a block, so that what it reads stays in the innermost cache.
_DEPTH = 384


def thread_count() -> int:
    """As many as NumPy's products take: what is asked for, or one for each core."""
    asked = os.environ.get('OMP_NUM_THREADS', '')
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lanes(dtype) -> int:
    """What the rows of a matrix are padded to a multiple of: numbers of a vector."""
    return _VECTOR_BYTES // dtype.itemsize


def locate(grids, offsets, sizes, pixels, row_weights, col_weights) -> tuple[int, int]:
    """Finds the corners of the points ``grids + offsets``, each of rows and of columns.

    Returns the first and the last row that a point touches; (0, -1) if none does.
    """
    limits = (
        bilinear.point_limit(grid, size, offset.dtype)
        for grid, offset, size in zip(grids, offsets, sizes)
    )
    first, last = _locate(
        *grids, *offsets, *sizes, *limits, pixels, row_weights, col_weights
    )
    return (first, last) if last >= first else (0, -1)


def gather(image, pixels, weights, scale, tile, columns, add) -> None:
    """``columns = sum of weights * image[pixels]``, times ``scale``; or ``+=``."""
    _gather(image, pixels, weights, scale, *_ends(tile), columns, add)


def scatter(gimage, pixels, weights, scale, tile, gcolumns) -> None:
    """``gimage[pixels] += weights * gcolumns``, times ``scale``."""
    _scatter(gimage, pixels, weights, scale, *_ends(tile), gcolumns)


def dot(image, pixels, tile, gcolumns, products) -> None:
    """``products +=`` the dot products of ``gcolumns`` and ``image[pixels]``.

    Those with the row of zeros are 0, also for infinite ``gcolumns``.
    """
    _dot(image, pixels, *_ends(tile), gcolumns, products)


def turn(filters, matrices) -> None:
    """``matrices[k, i, o] = filters[o, i, k]``; what else ``matrices`` has, stays."""
    out_c, in_c, taps = filters.shape
    # Where in the matrices the numbers of a filter go, in their order.
    rows = numpy.arange(in_c * taps, dtype=numpy.intp).reshape(taps, in_c).T.reshape(-1)
    _turn(filters.reshape(out_c, -1), rows, matrices.reshape(-1, matrices.shape[2]))


def matmul(a, b, out, transposed=False) -> None:
    """``out += a @ b``, or with the matrices of ``a`` transposed.

    The rows of ``b`` and ``out`` are of whole vectors. Those of ``a`` may be longer
    than ``b`` has rows: what is more in them is left out.
    """
    _matmul(a, b, out, transposed)


def matmul_lanes(a, b, out, transposed=False) -> None:
    """The same for matrices that lie along the last axis, one for each number there."""
    _matmul_lanes(a, b, out, transposed)


def _ends(tile) -> tuple[int, int, int, int]:
    return tuple(end for axis in tile for end in (axis.start, axis.stop))


def _jit(*fastmath):
    """Compiles without the GIL, and keeps the result where a folder can be written."""

    def decorate(function):
        options = {'nogil': True, 'fastmath': set(fastmath)}
        try:
            compiled = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)
        save = compiled._cache.save_overload

        def save_if_there_is_room(*args):
            with contextlib.suppress(OSError):
                save(*args)

        compiled._cache.save_overload = save_if_there_is_room
        return compiled

    return decorate


_axis = _jit()(bilinear.axis)


def _make_locate(rule: bytes):
    """``rule`` tells one version of the rule from another, for Numba's cache."""

    @_jit()
    def locate(
        grid_y, grid_x, offset_y, offset_x, h, w, limit_y, limit_x,
        pixels, row_weights, col_weights,
    ):  # fmt: skip
        rule  # noqa: B018
        images, groups, taps, positions = offset_y.shape
        first, last = h, -1
        for i in range(images):
            for o in range(groups):
                for k in range(taps):
                    for p in range(positions):
                        y, below, top, low = _axis(
                            grid_y[k, p], offset_y[i, o, k, p], h, limit_y
                        )
                        x, right_of, left, right = _axis(
                            grid_x[k, p], offset_x[i, o, k, p], w, limit_x
                        )
                        row_weights[0, i, o, k, p] = 1 - below if top else 0
                        row_weights[1, i, o, k, p] = below if low else 0
                        col_weights[0, i, o, k, p] = 1 - right_of if left else 0
                        col_weights[1, i, o, k, p] = right_of if right else 0
                        pixel = 1 + (i * h + y) * w + x
                        pixels[0, i, o, k, p] = pixel if top and left else 0
                        pixels[1, i, o, k, p] = pixel + 1 if top and right else 0
                        pixels[2, i, o, k, p] = pixel + w if low and left else 0
                        pixels[3, i, o, k, p] = pixel + w + 1 if low and right else 0
                        if top or low:
                            first = min(first, y if top else y + 1)
                            last = max(last, y + 1 if low else y)
        return first, last

    return locate


_code = bilinear.axis.__code__
_locate = _make_locate(repr((_code.co_code, _code.co_consts, _code.co_names)).encode())


@_jit('contract')
def _gather(image, pixels, weights, scale, i0, i1, p0, p1, columns, add):
    _, og, channels = image.shape
    for i in range(i0, i1):
        for block in range(p0, p1, _LINE):
            for o in range(og):
                for k in range(pixels.shape[3]):
                    for p in range(block, min(block + _LINE, p1)):
                        row = (i - i0) * (p1 - p0) + p - p0
                        tl, tr = pixels[0, i, o, k, p], pixels[1, i, o, k, p]
                        bl, br = pixels[2, i, o, k, p], pixels[3, i, o, k, p]
                        tl_w, tr_w = weights[0, i, o, k, p], weights[1, i, o, k, p]
                        bl_w, br_w = weights[2, i, o, k, p], weights[3, i, o, k, p]
                        factor = scale[i, o, k, p]
                        first = (k * og + o) * channels
                        if add:
                            for c in range(channels):
                                columns[row, first + c] += factor * (
                                    tl_w * image[tl, o, c]
                                    + tr_w * image[tr, o, c]
                                    + bl_w * image[bl, o, c]
                                    + br_w * image[br, o, c]
                                )
                        else:
                            for c in range(channels):
                                columns[row, first + c] = factor * (
                                    tl_w * image[tl, o, c]
                                    + tr_w * image[tr, o, c]
                                    + bl_w * image[bl, o, c]
                                    + br_w * image[br, o, c]
                                )


@_jit('contract')
def _scatter(gimage, pixels, weights, scale, i0, i1, p0, p1, gcolumns):
    _, og, channels = gimage.shape
    for i in range(i0, i1):
        for block in range(p0, p1, _LINE):
            for o in range(og):
                for k in range(pixels.shape[3]):
                    for p in range(block, min(block + _LINE, p1)):
                        row = (i - i0) * (p1 - p0) + p - p0
                        first = (k * og + o) * channels
                        for corner in range(4):
                            pixel = pixels[corner, i, o, k, p]
                            factor = scale[i, o, k, p] * weights[corner, i, o, k, p]
                            for c in range(channels):
                                gimage[pixel, o, c] += factor * gcolumns[row, first + c]


@_jit('contract', 'reassoc')
def _dot(image, pixels, i0, i1, p0, p1, gcolumns, products):
    _, og, channels = image.shape
    for i in range(i0, i1):
        for block in range(p0, p1, _LINE):
            for o in range(og):
                for k in range(pixels.shape[3]):
                    for p in range(block, min(block + _LINE, p1)):
                        row = (i - i0) * (p1 - p0) + p - p0
                        tl, tr = pixels[0, i, o, k, p], pixels[1, i, o, k, p]
                        bl, br = pixels[2, i, o, k, p], pixels[3, i, o, k, p]
                        first = (k * og + o) * channels
                        tl_dot = tr_dot = bl_dot = br_dot = image.dtype.type(0)
                        for c in range(channels):
                            g = gcolumns[row, first + c]
                            tl_dot += g * image[tl, o, c]
                            tr_dot += g * image[tr, o, c]
                            bl_dot += g * image[bl, o, c]
                            br_dot += g * image[br, o, c]
                        products[0, i, o, k, p] += tl_dot if tl else 0
                        products[1, i, o, k, p] += tr_dot if tr else 0
                        products[2, i, o, k, p] += bl_dot if bl else 0
                        products[3, i, o, k, p] += br_dot if br else 0


@_jit('contract')
def _matmul_lanes(a, b, out, transposed):
    for i in range(out.shape[0]):
        for k in range(b.shape[0]):
            for j in range(out.shape[1]):
                for g in range(out.shape[2]):
                    factor = a[k, i, g] if transposed else a[i, k, g]
                    out[i, j, g] += factor * b[k, j, g]


def _with_pointers(context, builder, kinds, args) -> list:
    """What a compiled function was given, with the memory of arrays in their place."""
    return [
        context.make_array(kind)(context, builder, arg).data
        if isinstance(kind, types.Array)
        else arg
        for kind, arg in zip(kinds, args)
    ]


@intrinsic
def _turn_square(typing, source, first, step, target, rows, first_row, width, column):
    """Turns over a square of as many rows and columns as a vector has numbers.

    All arrays are contiguous, ``first`` is where the square starts in ``source`` and
    ``step`` the length of its rows. A column of the square becomes a part, from
    ``column`` on, of that row of ``target``, of length ``width``, that ``rows`` says,
    from ``first_row`` on.
    """
    signature = types.void(
        source, types.intp, types.intp, target, rows, types.intp, types.intp, types.intp
    )

    def generate(context, builder, signature, args):
        source, first, step, target, rows, first_row, width, column = _with_pointers(
            context, builder, signature.args, args
        )
        size = context.get_abi_sizeof(source.type.pointee)
        count = _VECTOR_BYTES // size
        vector = ir.VectorType(source.type.pointee, count)
        intp, int32 = first.type, ir.IntType(32)

        def at_vector(pointer, offset):
            return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

        vectors = [
            builder.load(
                at_vector(source, builder.add(first, builder.mul(step, intp(r)))),
                align=size,
            )
            for r in range(count)
        ]
        # Each round interleaves the first half with the second.
        zipped = [
            [int32(start + i // 2 + i % 2 * count) for i in range(count)]
            for start in (0, count // 2)
        ]
        for _ in range(count.bit_length() - 1):
            vectors = [
                builder.shuffle_vector(
                    a, b, ir.Constant(ir.VectorType(int32, count), order)
                )
                for a, b in zip(vectors[: count // 2], vectors[count // 2 :])
                for order in zipped
            ]
        for c, turned in enumerate(vectors):
            at = builder.gep(rows, [builder.add(first_row, intp(c))])
            row = builder.load(at)
            offset = builder.add(builder.mul(row, width), column)
            builder.store(turned, at_vector(target, offset), align=size)
        return context.get_dummy_value()

    return signature, generate


@_jit()
def _turn(source, rows, target):
    lanes = _VECTOR_BYTES // source.itemsize
    height, length = source.shape
    width = target.shape[1]
    squares = length // lanes * lanes
    for r in range(0, height, lanes):
        if height - r >= lanes:
            for c in range(0, squares, lanes):
                _turn_square(source, r * length + c, length, target, rows, c, width, r)
        for i in range(r, min(r + lanes, height)):
            for c in range(squares if height - r >= lanes else 0, length):
                target[rows[c], i] = source[i, c]


def _block(vectors: int):
    """A function that adds to a block of ``_ROWS`` rows by ``vectors`` vectors.

    It adds the products of ``depth`` columns of ``a`` and rows of ``b``. All arrays are
    contiguous; ``..._at`` is where they start, ``..._row`` how far their rows are apart
    and ``..._step`` what they are multiplied along. The block stays in registers while
    the sums are taken, which no loop over arrays could tell the compiler. Rows past the
    last of ``rows`` are the last one again: they end with the same numbers.
    """

    @intrinsic
    def add_block(
        typing, a, a_at, a_row, a_step, b, b_at, b_step, out, out_at, out_row,
        rows, depth,
    ):  # fmt: skip
        integers = types.intp, types.intp, types.intp
        signature = types.void(
            a, *integers, b, *integers[:2], out, *integers[:2], *integers[:2]
        )

        def generate(context, builder, signature, args):
            args = _with_pointers(context, builder, signature.args, args)
            a, a_at, a_row, a_step, b, b_at, b_step, *args = args
            out, out_at, out_row, rows, depth = args
            a, b, out = (
                builder.gep(array, [at])
                for array, at in ((a, a_at), (b, b_at), (out, out_at))
            )
            number = a.type.pointee
            count = _VECTOR_BYTES // context.get_abi_sizeof(number)
            vector = ir.VectorType(number, count)
            letter = {4: 'f32', 8: 'f64'}[context.get_abi_sizeof(number)]
            multiply_add = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, [vector] * 3),
                f'llvm.fmuladd.v{count}{letter}',
            )
            int32, intp = ir.IntType(32), rows.type
            alignment = context.get_abi_sizeof(number)

            def at_vector(pointer, offset, v):
                offset = builder.add(offset, intp(v * count))
                return builder.bitcast(
                    builder.gep(pointer, [offset]), vector.as_pointer()
                )

            def prefetch(pointer):
                byte = ir.IntType(8).as_pointer()
                signature = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
                function = builder.module.declare_intrinsic(
                    'llvm.prefetch', [byte], signature
                )
                soon, to_write, data = int32(3), int32(1), int32(1)
                builder.call(
                    function, [builder.bitcast(pointer, byte), to_write, soon, data]
                )

            last = builder.sub(rows, intp(1))
            a_rows, out_rows = [], []
            for r in range(_ROWS):
                inside = builder.icmp_signed('<', intp(r), last)
                row = builder.select(inside, intp(r), last)
                a_rows.append(builder.gep(a, [builder.mul(row, a_row)]))
                out_rows.append(builder.mul(row, out_row))
            block = [
                cgutils.alloca_once(builder, vector) for _ in range(_ROWS * vectors)
            ]
            places = [(r, v) for r in range(_ROWS) for v in range(vectors)]
            # What is added to is fetched while the sums are taken.
            for slot, (r, v) in zip(block, places):
                builder.store(ir.Constant(vector, None), slot)
                prefetch(at_vector(out, out_rows[r], v))
            with cgutils.for_range(builder, depth) as loop:
                b_row = builder.mul(loop.index, b_step)
                a_offset = builder.mul(loop.index, a_step)
                b_vectors = [
                    builder.load(at_vector(b, b_row, v), align=alignment)
                    for v in range(vectors)
                ]
                for r in range(_ROWS):
                    factor = builder.load(builder.gep(a_rows[r], [a_offset]))
                    undefined = ir.Constant(vector, ir.Undefined)
                    factor = builder.shuffle_vector(
                        builder.insert_element(undefined, factor, int32(0)),
                        undefined,
                        ir.Constant(ir.VectorType(int32, count), [0] * count),
                    )
                    for v in range(vectors):
                        slot = block[r * vectors + v]
                        total = builder.call(
                            multiply_add, (factor, b_vectors[v], builder.load(slot))
                        )
                        builder.store(total, slot)
            # All are read before one is written: the last row may be among them twice.
            targets = [at_vector(out, out_rows[r], v) for r, v in places]
            totals = [
                builder.fadd(builder.load(at, align=alignment), builder.load(slot))
                for at, slot in zip(targets, block)
            ]
            for at, total in zip(targets, totals):
                builder.store(total, at, align=alignment)
            return context.get_dummy_value()

        return signature, generate

    return add_block


_add_block_1, _add_block_2 = _block(1), _block(2)


@_jit()
def _matmul(a, b, out, transposed):
    lanes = _VECTOR_BYTES // out.itemsize
    groups, rows, columns = out.shape
    a_row, a_step = (1, a.shape[2]) if transposed else (a.shape[2], 1)
    for g in range(groups):
        for k in range(0, b.shape[1], _DEPTH):
            depth = min(_DEPTH, b.shape[1] - k)
            for j in range(0, columns, 2 * lanes):
                for i in range(0, rows, _ROWS):
                    a_at = g * a.shape[1] * a.shape[2] + i * a_row + k * a_step
                    b_at = (g * b.shape[1] + k) * columns + j
                    out_at = (g * rows + i) * columns + j
                    if columns - j > lanes:
                        _add_block_2(
                            a, a_at, a_row, a_step, b, b_at, columns,
                            out, out_at, columns, rows - i, depth,
                        )  # fmt: skip
                    else:
                        _add_block_1(
                            a, a_at, a_row, a_step, b, b_at, columns,
                            out, out_at, columns, rows - i, depth,
                        )  # fmt: skip
