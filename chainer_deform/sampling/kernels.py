"""The GPU's kernels; :mod:`chainer_deform.sampling.cuda` runs them.

Names of types: ``T`` is that of image and columns, ``G`` that of the columns'
gradient, ``O`` that of the offset, ``M`` that of the mask, ``Real`` (and ``R``) that of
coordinates and sums.
"""

from __future__ import annotations

import functools

from chainer.backends.cuda import cupy

_REAL = """
#if DOUBLE
typedef double Real;
#else
typedef float Real;
#endif
"""

_POINT = """
// The bilinear rule along one axis: the pixel before a point and the pixel after it,
// their weights and whether they take part. Twin of _axis() in cpu.py.
struct Axis {
    long long before;
    Real weight[2];
    bool inside[2];
};

__device__ inline Axis make_axis(long long grid, Real offset, long long size) {
    const Real limit = Real(size + 1 + (grid < 0 ? -grid : grid));
    if (!(offset <= limit)) offset = limit;  // NaN, too
    if (!(offset >= -limit)) offset = -limit;
    const Real lower = floor(offset);
    const Real after = offset - lower;
    long long before = static_cast<long long>(lower) + grid;
    before = before < -2 ? -2 : before > size ? size : before;
    if (before == -1 && after == 0) before = -2;  // a point at -1 is outside
    Axis axis;
    axis.before = before;
    axis.weight[0] = 1 - after;
    axis.weight[1] = after;
    axis.inside[0] = before >= 0 && before < size;
    axis.inside[1] = before >= -1 && before < size - 1;
    return axis;
}

// The corners are in the order top left, top right, bottom left, bottom right.
struct Point {
    Axis y, x;
    __device__ inline bool inside(int corner) const {
        return y.inside[corner / 2] && x.inside[corner % 2];
    }
    __device__ inline bool touches() const {
        return (y.inside[0] || y.inside[1]) && (x.inside[0] || x.inside[1]);
    }
    __device__ inline Real weight(int corner) const {
        return y.weight[corner / 2] * x.weight[corner % 2];
    }
};
"""

_VECTOR = """
// Several channels in one access.
template <typename V>
struct alignas(VEC * sizeof(V)) Vector {
    V v[VEC];
};

template <typename V>
__device__ inline Vector<V> read(const V& first) {
    return *reinterpret_cast<const Vector<V>*>(&first);
}

// Where a channel of a tap is in the columns (G, rows, K, iCg).
__device__ inline long long column_at(int channel, long long row, int k, int rows) {
    const int depth = C / GROUPS;
    return ((channel / depth * static_cast<long long>(rows) + row) * K + k) * depth
        + channel % depth;
}
"""

_ADD = """
#define CUDA_VERSION (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__)

__device__ inline void add(Real* target, const Real* values) {
#if __CUDA_ARCH__ >= 900 && CUDA_VERSION >= 1201 && VEC % 4 == 0 && !DOUBLE
    #pragma unroll
    for (int e = 0; e < VEC; e += 4) {
        const float4 four = make_float4(
            values[e], values[e + 1], values[e + 2], values[e + 3]);
        atomicAdd(reinterpret_cast<float4*>(target + e), four);
    }
#else
    #pragma unroll
    for (int e = 0; e < VEC; ++e) atomicAdd(target + e, values[e]);
#endif
}
"""

# Unravels `tap`, one of m * p * K * og, and finds its point.
_TAP = """
    const int group = tap % OG, k = tap / OG % K, row = tap / (OG * K);
    const int position = first_position + row % positions;
    const long long image_index = first_image + row / positions;
    const long long out_size = static_cast<long long>(out_h) * out_w;
    const long long first_tap = (image_index * OG + group) * K;
    const long long at_x = (first_tap * 2 + k) * out_size + position;
    const long long at_y = at_x + K * out_size;
    const Real offset_x = Real(offset[at_x]), offset_y = Real(offset[at_y]);
    const bool is_nan = isnan(offset_x) || isnan(offset_y);
    Point point;
    point.y = make_axis(
        position / out_w * (SY * 1LL) - PH + k / KW * (DY * 1LL), offset_y, h);
    point.x = make_axis(
        position % out_w * (SX * 1LL) - PW + k % KW * (DX * 1LL), offset_x, w);
#if MASK
    const long long at_mask = (first_tap + k) * out_size + position;
    const Real modulation = Real(mask[at_mask]);
#else
    const Real modulation = 1;
#endif
"""

# The tap of a thread, and a loop over its lane's share of the channels. All corners are
# read before one is used; those outside are 0 and not read.
_LANE = (
    """
    const int lane = i % LANES;
    const unsigned int tap = static_cast<unsigned int>(i / LANES);
"""
    + _TAP
)
_CORNERS = """
    for (int v = lane; v < C / OG / VEC; v += LANES) {
        const int channel = group * (C / OG) + v * VEC;
        const long long at_column = column_at(channel, row, k, rows);
        long long at_corner[4];
        Vector<T> corner[4];
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            const long long y = image_index * h + point.y.before + q / 2;
            at_corner[q] = (y * w + point.x.before + q % 2) * C + channel;
            if (point.inside(q)) {
                corner[q] = read(image[at_corner[q]]);
            } else {
                #pragma unroll
                for (int e = 0; e < VEC; ++e) corner[q].v[e] = T(0.0f);
            }
        }
        Vector<T> column;
"""

_SAMPLE = (
    _LANE
    + _CORNERS
    + """
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            Real sample = is_nan ? offset_x + offset_y : Real(0);
            #pragma unroll
            for (int q = 0; q < 4; ++q)
                sample += point.weight(q) * Real(corner[q].v[e]);
            column.v[e] = T(modulation * sample);
        }
        *reinterpret_cast<Vector<T>*>(&columns[at_column]) = column;
    }
"""
)

_DIFFERENTIATE = (
    _LANE
    + """
    // The sums over the channels of the column's gradient times the sample and times
    // its slopes along both axes.
    Real sum = 0, sum_y = 0, sum_x = 0;
"""
    + _CORNERS
    + """
        const Vector<G> gcolumn = read(gcolumns[at_column]);
        Real gsample[VEC];
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            const Real g = Real(gcolumn.v[e]);
            const Real top_left = Real(corner[0].v[e]);
            const Real top_right = Real(corner[1].v[e]);
            const Real low_left = Real(corner[2].v[e]);
            const Real low_right = Real(corner[3].v[e]);
            const Real top =
                point.x.weight[0] * top_left + point.x.weight[1] * top_right;
            const Real low =
                point.x.weight[0] * low_left + point.x.weight[1] * low_right;
            Real sample = is_nan ? offset_x + offset_y : Real(0);
            sample += point.y.weight[0] * top + point.y.weight[1] * low;
            sum += g * sample;
            sum_y += g * (low - top);
            sum_x += g * (point.y.weight[0] * (top_right - top_left)
                          + point.y.weight[1] * (low_right - low_left));
            column.v[e] = T(modulation * sample);
            gsample[e] = modulation * g;
        }
#if GIMAGE
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (!point.inside(q)) continue;
            Real part[VEC];
            #pragma unroll
            for (int e = 0; e < VEC; ++e) part[e] = point.weight(q) * gsample[e];
            add(&gimage[at_corner[q]], part);
        }
#endif
#if COLUMNS
        *reinterpret_cast<Vector<T>*>(&columns[at_column]) = column;
#endif
    }

#if GOFFSET || GMASK
    #if LANES > 1
    const unsigned int lanes = (0xffffffffu >> (32 - LANES))
        << (threadIdx.x % 32 / LANES * LANES);
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(lanes, sum, step);
        sum_y += __shfl_xor_sync(lanes, sum_y, step);
        sum_x += __shfl_xor_sync(lanes, sum_x, step);
    }
    #endif
    if (lane == 0) {
        // A point outside passes nothing, also to an infinite gradient.
        if (!point.touches())
            sum = sum_y = sum_x = is_nan ? offset_x + offset_y : Real(0);
    #if GOFFSET
        goffset[at_x] = O(modulation * sum_x);
        goffset[at_y] = O(modulation * sum_y);
    #endif
    #if GMASK
        gmask[at_mask] = M(sum);
    #endif
    }
#endif
"""
)

# The cell of the pixel grid that a tap's point is in, and the tap: sorted, the taps of
# a cell follow each other in an order that is always the same. Those that touch no
# pixel come last.
_SORT_KEY = (
    """
    const unsigned int tap = static_cast<unsigned int>(i);
"""
    + _TAP
    + """
    const long long part = row / positions * static_cast<long long>(OG) + group;
    long long cell = static_cast<long long>(rows / positions) * OG * (h + 1) * (w + 1);
    if (point.touches())
        cell = (part * (h + 1) + point.y.before + 1) * (w + 1) + point.x.before + 1;
    keys[i] = cell * (static_cast<long long>(rows) * K * OG) + i;
"""
)

# A pixel adds up what the taps of the four cells around it pass to it.
_GATHER = (
    """
    const int channel = i % (C / VEC) * VEC;
    const long long pixel = i / (C / VEC);
    const long long part = pixel / w / h * OG + channel / (C / OG);
    Real sum[VEC];
    #pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] = 0;
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
        const long long cell = (part * (h + 1) + pixel / w % h + 1 - q / 2) * (w + 1)
            + pixel % w + 1 - q % 2;
        for (long long s = starts[cell]; s < starts[cell + 1]; ++s) {
            const unsigned int tap = static_cast<unsigned int>(
                keys[s] % (static_cast<long long>(rows) * K * OG));
"""
    + _TAP
    + """
            const Vector<G> gcolumn = read(gcolumns[column_at(channel, row, k, rows)]);
            #pragma unroll
            for (int e = 0; e < VEC; ++e)
                sum[e] += point.weight(q) * (modulation * Real(gcolumn.v[e]));
        }
    }
    const long long first = (static_cast<long long>(first_image) * h * w + pixel) * C;
    #pragma unroll
    for (int e = 0; e < VEC; ++e) gimage[first + channel + e] += sum[e];
"""
)

_BODIES = {
    'sample': (_POINT + _VECTOR, _SAMPLE),
    'differentiate': (_POINT + _VECTOR + _ADD, _DIFFERENTIATE),
    'sort_key': (_POINT, _SORT_KEY),
    'gather': (_POINT + _VECTOR, _GATHER),
}

# What every one of these takes besides its arrays: the piece, and the sizes.
_SCALARS = (
    'int32 first_image, int32 first_position, int32 positions, int32 rows, '
    'int32 h, int32 w, int32 out_h, int32 out_w'
)


@functools.cache
def sampler_kernel(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: tuple[tuple[str, int], ...],
):
    """A kernel over taps or pixels.

    Args:
        name: ``sample``, ``differentiate``, ``sort_key`` or ``gather``.
        inputs, outputs: The arrays, as ``'T image'``. Optional ones may be left out.
        constants: What does not change from batch to batch, by name.

    """
    arrays = (*inputs, *outputs)
    flags = {
        flag: int(any(array.endswith(f' {flag.lower()}') for array in arrays))
        for flag in ('MASK', 'COLUMNS', 'GIMAGE', 'GOFFSET', 'GMASK')
    }
    defines = {**dict(constants), **flags}.items()
    preamble, body = _BODIES[name]
    return cupy.ElementwiseKernel(
        ', '.join([*(f'raw {array}' for array in inputs), _SCALARS]),
        ', '.join(f'raw {array}' for array in outputs),
        body,
        f'chainer_deform_{name}',
        preamble=''.join(f'#define {flag} {value}\n' for flag, value in defines)
        + _REAL
        + preamble,
    )


@functools.cache
def swap_kernel(tile: int):
    """Swaps the last two axes (rows, cols) of an array, and converts it.

    A thread moves a tile of ``tile`` by ``tile`` elements, a warp 4 by 8 tiles, so that
    both its reads and its writes are of whole sectors of memory.
    """
    return cupy.ElementwiseKernel(
        'raw T source, int64 rows, int64 cols, int64 row_blocks, int64 col_blocks',
        'raw U target',
        """
    const long long block = i / 32;
    const long long row = (block / col_blocks % row_blocks * 4 + i / 8 % 4) * TILE;
    const long long col = (block % col_blocks * 8 + i % 8) * TILE;
    const long long batch = block / col_blocks / row_blocks;
    if (row < rows && col < cols) {
        Tile<T> in[TILE];
        #pragma unroll
        for (int r = 0; r < TILE; ++r)
            in[r] = *reinterpret_cast<const Tile<T>*>(
                &source[(batch * rows + row + r) * cols + col]);
        #pragma unroll
        for (int c = 0; c < TILE; ++c) {
            Tile<U> out;
            #pragma unroll
            for (int r = 0; r < TILE; ++r) out.v[r] = U(in[r].v[c]);
            *reinterpret_cast<Tile<U>*>(
                &target[(batch * cols + col + c) * rows + row]) = out;
        }
    }
""",
        'chainer_deform_swap',
        preamble=f"""
#define TILE {tile}
template <typename V>
struct alignas(TILE * sizeof(V)) Tile {{
    V v[TILE];
}};
""",
    )
