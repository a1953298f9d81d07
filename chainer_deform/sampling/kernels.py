"""The GPU's kernels; :mod:`chainer_deform.sampling.cuda` runs them.

Names of types: ``T`` is that of image and columns, ``G`` that of the columns'
gradient, ``O`` that of the offset, ``M`` that of the mask, ``Real`` (and ``R``) that of
coordinates and sums.

In the second order the arguments move along the arrays ``gg...``. What ends in ``_dot``
is how fast something changes then, or the gradient of that.
"""

from __future__ import annotations

import functools

from chainer.backends.cuda import cupy

# The arrays of the kernels, with their types.
_TYPES = {
    **dict.fromkeys(('image', 'ggimage', 'columns', 'columns_dot'), 'T'),
    **dict.fromkeys(('gcolumns', 'gcolumns_dot'), 'G'),
    **dict.fromkeys(('offset', 'ggoffset', 'goffset'), 'O'),
    **dict.fromkeys(('mask', 'ggmask', 'gmask'), 'M'),
    **dict.fromkeys(('keys', 'starts'), 'int64'),
    'gimage': 'R',
}

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

// What is read at a point, and its slopes along y, along x and along both.
struct Sample {
    Real value, y, x, yx;
};

// The corners are in the order top left, top right, bottom left, bottom right.
struct Point {
    Axis y, x;
    Real nothing;  // is read at a point outside: 0, or NaN for a NaN offset
    __device__ inline bool inside(int corner) const {
        return y.inside[corner / 2] && x.inside[corner % 2];
    }
    __device__ inline bool touches() const {
        return (y.inside[0] || y.inside[1]) && (x.inside[0] || x.inside[1]);
    }
    __device__ inline Real weight(int corner) const {
        return y.weight[corner / 2] * x.weight[corner % 2];
    }
    __device__ inline Real weight_dot(int corner, Real y_dot, Real x_dot) const {
        return (corner / 2 ? y_dot : -y_dot) * x.weight[corner % 2]
            + (corner % 2 ? x_dot : -x_dot) * y.weight[corner / 2];
    }
    __device__ inline Sample sample(
            Real top_left, Real top_right, Real low_left, Real low_right) const {
        const Real top = x.weight[0] * top_left + x.weight[1] * top_right;
        const Real low = x.weight[0] * low_left + x.weight[1] * low_right;
        const Real top_slope = top_right - top_left, low_slope = low_right - low_left;
        return {
            nothing + (y.weight[0] * top + y.weight[1] * low),
            low - top,
            y.weight[0] * top_slope + y.weight[1] * low_slope,
            low_slope - top_slope};
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

// Channels of a pixel; one outside is 0 and not read.
template <typename V, typename A>
__device__ inline Vector<V> read_if(bool inside, const A& image, long long at) {
    Vector<V> pixel;
    if (inside) {
        pixel = read(image[at]);
    } else {
        #pragma unroll
        for (int e = 0; e < VEC; ++e) pixel.v[e] = V(0.0f);
    }
    return pixel;
}

template <typename V>
__device__ inline Sample sample(const Point& point, const Vector<V>* corner, int e) {
    return point.sample(
        Real(corner[0].v[e]), Real(corner[1].v[e]),
        Real(corner[2].v[e]), Real(corner[3].v[e]));
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
    Point point;
    point.nothing =
        isnan(offset_x) || isnan(offset_y) ? offset_x + offset_y : Real(0);
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

# How fast the point and the mask move: where the point is outside, not at all.
_TANGENTS = """
    Real y_dot = 0, x_dot = 0, modulation_dot = 0;
#if GGOFFSET
    if (point.touches()) {
        y_dot = Real(ggoffset[at_y]);
        x_dot = Real(ggoffset[at_x]);
    }
#endif
#if GGMASK
    if (point.touches()) modulation_dot = Real(ggmask[at_mask]);
#endif
"""

# The tap of a thread, and a loop over its lane's share of the channels. All corners are
# read before one is used.
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
#if IMAGE
            corner[q] = read_if<T>(point.inside(q), image, at_corner[q]);
#endif
        }
"""

# The columns' gradients, and what they pass to a corner's channels.
_GCOLUMNS = """
#if GCOLUMNS
            const Vector<G> gcolumn = read(gcolumns[at_column]);
#endif
#if GCOLUMNS_DOT
            const Vector<G> gcolumn_dot = read(gcolumns_dot[at_column]);
#endif
"""
_PASS = """
            #pragma unroll
            for (int e = 0; e < VEC; ++e) {
#if GCOLUMNS
                part[e] += modulation * point.weight(q) * Real(gcolumn.v[e]);
#endif
#if GCOLUMNS_DOT && (GGOFFSET || GGMASK)
                const Real weight_dot = modulation * point.weight_dot(q, y_dot, x_dot)
                    + modulation_dot * point.weight(q);
                part[e] += weight_dot * Real(gcolumn_dot.v[e]);
#endif
            }
"""

_SAMPLE = (
    _LANE
    + _CORNERS
    + """
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            Real sample = point.nothing;
            #pragma unroll
            for (int q = 0; q < 4; ++q)
                sample += point.weight(q) * Real(corner[q].v[e]);
            column.v[e] = T(modulation * sample);
        }
        *reinterpret_cast<Vector<T>*>(&columns[at_column]) = column;
    }
"""
)

# The derivatives of the sum of `gcolumns * columns + gcolumns_dot * columns_dot`, of
# which the first order has only the former.
_DIFFERENTIATE = (
    _LANE
    + _TANGENTS
    + """
    // The derivatives by the mask; by the coordinates, still to be multiplied by the
    // mask; and by the coordinates, to be multiplied by how fast the mask moves.
    Real sum = 0, sum_y = 0, sum_x = 0, mask_y = 0, mask_x = 0;
"""
    + _CORNERS
    + """
#if GGIMAGE
        Vector<T> ggcorner[4];
        #pragma unroll
        for (int q = 0; q < 4; ++q)
            ggcorner[q] = read_if<T>(point.inside(q), ggimage, at_corner[q]);
#endif
"""
    + _GCOLUMNS
    + """
        Vector<T> column, column_dot;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
#if IMAGE
            const Sample s = sample(point, corner, e);
            column.v[e] = T(modulation * s.value);
#endif
#if GCOLUMNS
            const Real g = Real(gcolumn.v[e]);
            sum += g * s.value;
            sum_y += g * s.y;
            sum_x += g * s.x;
#endif
#if GGIMAGE
            Sample s_dot = sample(point, ggcorner, e);
#else
            Sample s_dot = {point.nothing, 0, 0, 0};
#endif
#if GGOFFSET
            s_dot.value += s.y * y_dot + s.x * x_dot;
            s_dot.y += s.yx * x_dot;
            s_dot.x += s.yx * y_dot;
#endif
#if GCOLUMNS_DOT
            const Real g_dot = Real(gcolumn_dot.v[e]);
            sum += g_dot * s_dot.value;
            sum_y += g_dot * s_dot.y;
            sum_x += g_dot * s_dot.x;
    #if GGMASK
            mask_y += g_dot * s.y;
            mask_x += g_dot * s.x;
    #endif
#endif
            Real value_dot = modulation * s_dot.value;
#if GGMASK
            value_dot += modulation_dot * s.value;
#endif
            column_dot.v[e] = T(value_dot);
        }
#if GIMAGE
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (!point.inside(q)) continue;
            Real part[VEC] = {};
"""
    + _PASS
    + """
            add(&gimage[at_corner[q]], part);
        }
#endif
#if COLUMNS
        *reinterpret_cast<Vector<T>*>(&columns[at_column]) = column;
#endif
#if COLUMNS_DOT
        *reinterpret_cast<Vector<T>*>(&columns_dot[at_column]) = column_dot;
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
        #if GGMASK
        mask_y += __shfl_xor_sync(lanes, mask_y, step);
        mask_x += __shfl_xor_sync(lanes, mask_x, step);
        #endif
    }
    #endif
    if (lane == 0) {
        // A point outside passes nothing, also to an infinite gradient.
        if (!point.touches()) {
            sum = sum_y = sum_x = point.nothing;
            mask_y = mask_x = 0;
        }
    #if GOFFSET
        goffset[at_x] = O(modulation * sum_x + modulation_dot * mask_x);
        goffset[at_y] = O(modulation * sum_y + modulation_dot * mask_y);
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
    const long long image_part = pixel / w / h * OG + channel / (C / OG);
    Real part[VEC] = {};
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
        const long long cell =
            (image_part * (h + 1) + pixel / w % h + 1 - q / 2) * (w + 1)
            + pixel % w + 1 - q % 2;
        for (long long s = starts[cell]; s < starts[cell + 1]; ++s) {
            const unsigned int tap = static_cast<unsigned int>(
                keys[s] % (static_cast<long long>(rows) * K * OG));
"""
    + _TAP
    + _TANGENTS
    + """
            const long long at_column = column_at(channel, row, k, rows);
"""
    + _GCOLUMNS
    + _PASS
    + """
        }
    }
    const long long first = (static_cast<long long>(first_image) * h * w + pixel) * C;
    #pragma unroll
    for (int e = 0; e < VEC; ++e) gimage[first + channel + e] += part[e];
"""
)

_PREAMBLE = _REAL + _POINT + _VECTOR + _ADD

_BODIES = {
    'sample': _SAMPLE,
    'differentiate': _DIFFERENTIATE,
    'sort_key': _SORT_KEY,
    'gather': _GATHER,
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
        inputs, outputs: Names of arrays. Optional ones may be left out.
        constants: What does not change from batch to batch, by name.

    """
    flags = {array.upper(): int(array in inputs + outputs) for array in _TYPES}
    defines = {**dict(constants), **flags}.items()
    return cupy.ElementwiseKernel(
        ', '.join([*(f'raw {_TYPES[array]} {array}' for array in inputs), _SCALARS]),
        ', '.join(f'raw {_TYPES[array]} {array}' for array in outputs),
        _BODIES[name],
        f'chainer_deform_{name}',
        preamble=''.join(f'#define {flag} {value}\n' for flag, value in defines)
        + _PREAMBLE,
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
