"""The CPU's matrix product: a filter is packed once, then multiplied with each tile.

A tile is multiplied as soon as it is sampled, while it is in the cache. NumPy's product
packs the filter again for each tile: with it the forward pass took 1.08 to 1.24 times
as long (2026-11-25, AVX-512, OpenBLAS 0.3.31, one thread). And beside threads of ours
those of NumPy's product have to be limited, for the whole process.

Compiled functions are given a matrix by its address and by how many numbers lie between
its rows, and between its columns where these need not be next to each other.
"""

from __future__ import annotations

import numpy
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from chainer_deform.sampling.compiler import jit

# Of the CPU that is compiled for, which need not be the one that compiles.
_features = cpu_target.target_context.codegen().magic_tuple()[2].split(',')
_VECTOR_BYTES = 64 if '+avx512f' in _features else 32 if '+avx2' in _features else 16

#: Rows of a block of the product; with two vectors each they fill the registers.
_ROWS = 14 if _VECTOR_BYTES == 64 else 6

#: Terms that a block sums up in one go, so that what it reads stays in the first cache.
_DEPTH = 384


class Packed:
    """Matrices (batch, depth, width), of which the columns lie in panels.

    A panel has as many columns as two vectors have numbers; those beyond ``width`` are
    0. ``numbers`` are (batch, panels, depth, columns of a panel).
    """

    def __init__(self, batch: int, depth: int, width: int, dtype) -> None:
        columns = 2 * _lanes(dtype)
        self.panels = range(-(-width // columns))
        self.numbers = numpy.empty((batch, len(self.panels), depth, columns), dtype)


def pack_columns(filters, packed: Packed, panel: int) -> None:
    """Writes a panel of the matrices (K * in_c, out_c).

    They are the filters (G, out_c, in_c, K).
    """
    groups, _, in_c, K = filters.shape
    target = packed.numbers[:, panel]
    columns = target.shape[2]
    part = filters[:, panel * columns : (panel + 1) * columns]
    if part.shape[1] < columns:
        target[...] = 0
    i, k = numpy.divmod(numpy.arange(in_c * K), K)
    part = part.reshape(groups, -1, in_c * K)
    _swap_to(part, target, (k * in_c + i) * columns)


def multiply(a, packed: Packed, out) -> None:
    """``out[i] += a[i] @ matrices[i]``; the rows of ``out`` are contiguous."""
    _, _, depth, _ = packed.numbers.shape
    b = (*_address(packed.numbers), *_steps(packed.numbers, 2, 1))
    _add_product(
        (*_address(a), *_steps(a, 1, 2)),
        b,
        (*_address(out), *_steps(out, 1)),
        (*out.shape, depth),
        True,
        _lanes(out.dtype),
        out.dtype.type(0),
    )


def add_product(a, b, out) -> None:
    """``out[i] += a[i] @ b[i]``; the rows of ``b`` and ``out`` are contiguous."""
    lanes = _lanes(out.dtype)
    _add_product(
        (*_address(a), *_steps(a, 1, 2)),
        (*_address(b), *_steps(b, 1), 2 * lanes),
        (*_address(out), *_steps(out, 1)),
        (*out.shape, b.shape[1]),
        False,
        lanes,
        out.dtype.type(0),
    )


def swap(source, target) -> None:
    """``target[i, c, r] = source[i, r, c]``; the rows of both are contiguous."""
    (step,) = _steps(target, 1)
    _swap_to(source, target, numpy.arange(source.shape[2]) * step)


def _swap_to(source, target, places) -> None:
    """``target[i, places[c] + r] = source[i, r, c]``, target as one row of numbers."""
    _swap(
        (*_address(source), *_steps(source, 1)),
        _address(target),
        places,
        source.shape,
        _lanes(source.dtype),
        source.dtype.type(0),
    )


def _lanes(dtype) -> int:
    """Numbers of a vector."""
    return _VECTOR_BYTES // numpy.dtype(dtype).itemsize


def _address(array) -> tuple[int, int]:
    """Of the first number, and how many numbers the matrices of a batch are apart."""
    return array.ctypes.data, array.strides[0] // array.itemsize


def _steps(array, *axes: int) -> tuple[int, ...]:
    """How many numbers lie between neighbours along some axes."""
    return tuple(array.strides[axis] // array.itemsize for axis in axes)


class _Memory:
    """How the compiled functions below reach numbers, and vectors of them.

    ``zero`` is a number of the kind in question; addresses are integers.
    """

    def __init__(self, context, builder, zero) -> None:
        self.builder = builder
        self.number = context.get_value_type(zero)
        self.size = context.get_abi_sizeof(self.number)
        self.count = _VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.number, self.count)

    def pointer(self, address, *at):
        """A pointer to a number, the sum of ``at`` numbers behind an address."""
        pointer = self.builder.inttoptr(address, self.number.as_pointer())
        for offset in at:
            pointer = self.builder.gep(pointer, [offset])
        return pointer

    def load(self, pointer):
        """The vector at a pointer, which need not be aligned."""
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        return self.builder.load(pointer, align=self.size)

    def store(self, vector, pointer) -> None:
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        self.builder.store(vector, pointer, align=self.size)


@intrinsic
def _read(typing, address, at, zero):
    """The number ``at`` numbers behind an address."""

    def generate(context, builder, signature, args):
        return builder.load(_Memory(context, builder, zero).pointer(*args[:2]))

    return zero(types.intp, types.intp, zero), generate


@intrinsic
def _write(typing, address, at, value):
    """Puts a number ``at`` numbers behind an address."""

    def generate(context, builder, signature, args):
        memory = _Memory(context, builder, value)
        builder.store(args[2], memory.pointer(*args[:2]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, value), generate


@intrinsic
def _swap_square(typing, source, at, step, target, to, places, column, zero):
    """Swaps the axes of a square with as many rows as a vector has numbers.

    The square is ``at`` numbers behind ``source``, its rows ``step`` numbers apart. Its
    columns become vectors at ``target``, ``to + places[column]`` numbers on and so
    forth.
    """

    def generate(context, builder, signature, args):
        source, at, step, target, to, places, column, _ = args
        places = context.make_array(signature.args[5])(context, builder, places).data
        memory = _Memory(context, builder, zero)
        count, intp, int32 = memory.count, step.type, ir.IntType(32)
        vectors = [
            memory.load(memory.pointer(source, at, builder.mul(step, intp(r))))
            for r in range(count)
        ]
        # Each round interleaves the first half of the vectors with the second.
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
        for c, vector in enumerate(vectors):
            place = builder.gep(places, [builder.add(column, intp(c))])
            memory.store(vector, memory.pointer(target, to, builder.load(place)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, places, types.intp, zero), generate


@jit()
def _swap(source, target, places, shape, lanes, zero):
    source, source_step, source_row = source
    target, target_step = target
    batch, rows, cols = shape
    for i in range(batch):
        for r in range(0, rows, lanes):
            height = min(lanes, rows - r)
            whole = cols // lanes * lanes if height == lanes else 0
            at = i * source_step + r * source_row
            to = i * target_step + r
            for c in range(0, whole, lanes):
                _swap_square(source, at + c, source_row, target, to, places, c, zero)
            for row in range(height):
                for c in range(whole, cols):
                    number = _read(source, at + row * source_row + c, zero)
                    _write(target, to + row + places[c], number)


def _block(vectors: int):
    """A function that adds to a block of ``_ROWS`` rows by ``vectors`` vectors.

    It adds products of ``depth`` numbers from each row of ``a``, which are ``a_step``
    numbers apart, and as many rows of ``b``. The block stays in registers meanwhile,
    which no loop over arrays could tell the compiler. Rows beyond the last of ``rows``
    are the last one again: they end with the same numbers.
    """

    @intrinsic
    def add_block(
        typing, a, a_at, a_row, a_step, b, b_at, b_row, out, out_at, out_row,
        rows, depth, zero,
    ):  # fmt: skip
        def generate(context, builder, signature, args):
            a, a_at, a_row, a_step, b, b_at, b_row, *args = args
            out, out_at, out_row, rows, depth, _ = args
            memory = _Memory(context, builder, zero)
            a, b, out = (
                memory.pointer(*place)
                for place in ((a, a_at), (b, b_at), (out, out_at))
            )
            vector, count = memory.vector, memory.count
            int32, intp = ir.IntType(32), rows.type
            letter = {4: 'f32', 8: 'f64'}[memory.size]
            multiply_add = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, [vector] * 3),
                f'llvm.fmuladd.v{count}{letter}',
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
            a_rows, targets = [], []
            for r in range(_ROWS):
                inside = builder.icmp_signed('<', intp(r), last)
                row = builder.select(inside, intp(r), last)
                a_rows.append(builder.gep(a, [builder.mul(row, a_row)]))
                out_r = builder.gep(out, [builder.mul(row, out_row)])
                targets += [
                    builder.gep(out_r, [intp(v * count)]) for v in range(vectors)
                ]
            block = [cgutils.alloca_once(builder, vector) for _ in targets]
            # What is added to is fetched while the sums are taken.
            for slot, target in zip(block, targets):
                builder.store(ir.Constant(vector, None), slot)
                prefetch(target)
            with cgutils.for_range(builder, depth) as loop:
                b_place = builder.gep(b, [builder.mul(loop.index, b_row)])
                a_place = builder.mul(loop.index, a_step)
                b_vectors = [
                    memory.load(builder.gep(b_place, [intp(v * count)]))
                    for v in range(vectors)
                ]
                for r in range(_ROWS):
                    factor = builder.load(builder.gep(a_rows[r], [a_place]))
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
            totals = [
                builder.fadd(memory.load(target), builder.load(slot))
                for target, slot in zip(targets, block)
            ]
            for total, target in zip(totals, targets):
                memory.store(total, target)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 12, zero), generate

    return add_block


_add_block_1, _add_block_2 = _block(1), _block(2)


@jit()
def _add_product(a, b, out, shape, packed, lanes, zero):
    """``out += a @ b``; ``packed`` says that the rows of ``b`` are whole vectors."""
    a, a_batch, a_row, a_step = a
    b, b_batch, b_row, b_panel = b
    out, out_batch, out_row = out
    batch, rows, width, all_depth = shape
    # Copies of the edge of b and of out, where whole vectors would reach beyond it.
    b_edge = numpy.full(_DEPTH * 2 * lanes, zero)
    out_edge = numpy.full(_ROWS * 2 * lanes, zero)
    for i in range(batch):
        for k in range(0, all_depth, _DEPTH):
            depth = min(_DEPTH, all_depth - k)
            for c in range(0, width, 2 * lanes):
                used = min(2 * lanes, width - c)
                columns = 2 * lanes if used > lanes else lanes
                source, row = b, b_row
                at = i * b_batch + k * b_row + c // (2 * lanes) * b_panel
                if used < columns and not packed:
                    for d in range(depth):
                        for j in range(used):
                            number = _read(b, at + d * b_row + j, zero)
                            b_edge[d * columns + j] = number
                    source, at, row = b_edge.ctypes.data, 0, columns
                for r in range(0, rows, _ROWS):
                    height = min(_ROWS, rows - r)
                    a_at = i * a_batch + r * a_row + k * a_step
                    out_at = i * out_batch + r * out_row + c
                    target, to, step = out, out_at, out_row
                    if used < columns:
                        out_edge[:] = 0
                        target, to, step = out_edge.ctypes.data, 0, columns
                    if columns > lanes:
                        _add_block_2(
                            a, a_at, a_row, a_step, source, at, row,
                            target, to, step, height, depth, zero,
                        )  # fmt: skip
                    else:
                        _add_block_1(
                            a, a_at, a_row, a_step, source, at, row,
                            target, to, step, height, depth, zero,
                        )  # fmt: skip
                    if used < columns:
                        for h in range(height):
                            for j in range(used):
                                place = out_at + h * out_row + j
                                number = _read(out, place, zero)
                                _write(out, place, number + out_edge[h * columns + j])


@jit('contract')
def multiply_lanes(a, b, out, transposed):
    """``out[i, j, g] += sum over k of a[i, k, g] * b[k, j, g]``; or a[k, i, g]."""
    for i in range(out.shape[0]):
        for k in range(b.shape[0]):
            for j in range(out.shape[1]):
                for g in range(out.shape[2]):
                    factor = a[k, i, g] if transposed else a[i, k, g]
                    out[i, j, g] += factor * b[k, j, g]
