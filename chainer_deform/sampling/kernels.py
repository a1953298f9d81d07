"""The GPU's kernels; :mod:`chainer_deform.sampling.cuda` runs them.

Names of types: ``T`` is that of images and columns, ``G`` that of the columns'
gradient, ``O`` and ``F`` those of offsets and factors, ``P`` and ``Q`` those of how
these move, ``Real`` (and ``R``) that of coordinates and sums.

``_dot`` stands for the derivative along the tangents; kernels that compute it are
compiled with ``DOT``. With ``SUMMED`` the points are given (``points.Given``), and the
samples of an output position are added up; else they are a grid (``points.Grid``).
"""

from __future__ import annotations

import functools
import string

from chainer.backends.cuda import cupy

# The arrays of the kernels, with their types.
_TYPES = {
    **dict.fromkeys(('image', 'image_dot', 'columns'), 'T'),
    **dict.fromkeys(('gcolumns', 'gcolumns_dot'), 'G'),
    **dict.fromkeys(('offsets', 'goffsets'), 'O'),
    **dict.fromkeys(('factors', 'gfactors'), 'F'),
    'offsets_dot': 'P',
    'factors_dot': 'Q',
    **dict.fromkeys(('indices', 'keys', 'starts'), 'int64'),
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
// Twin of rule.axis: the pixel before a coordinate and the next one, their weights,
// whether they count, and whether the sample changes with the coordinate.
struct Axis {
    long long before;
    Real weight[2];
    bool counts[2];
    bool slope;
    __device__ inline bool inside() const { return counts[0] || counts[1]; }
};

// A NaN point has no pixels. It is not outside: `nan` makes its weights NaN, and all
// else with them; of other points it is 0.
__device__ inline Axis make_axis(
        long long grid, Real offset, long long size, Real limit, Real nan) {
    if (!(offset <= limit)) offset = limit;  // NaN, too
    if (!(offset >= -limit)) offset = -limit;
    const Real lower = floor(offset);
    Real after = offset - lower;
    Axis axis;
    axis.before = static_cast<long long>(lower) + grid;
#if CLAMP
    axis.counts[0] = axis.before >= -1
        && (axis.before < size || (axis.before == size && after == 0));
    axis.counts[1] = axis.slope = axis.before >= 0 && axis.before < size - 1;
    if (!axis.slope) after = 0;
    axis.before = axis.before < 0 ? 0 : axis.before < size ? axis.before : size - 1;
#else
    axis.counts[0] = axis.before >= 0 && axis.before < size;
    axis.counts[1] = axis.before >= -1 && axis.before < size - 1
        && (axis.before >= 0 || after > 0);
    axis.slope = axis.inside();
#endif
    axis.weight[1] = after + nan;
    axis.weight[0] = 1 - axis.weight[1];
    return axis;
}

// What is read at a point, and its slopes along y, along x and along both, before a
// coordinate is clipped.
struct Sample {
    Real value, y, x, yx;
};

// The corners are in the order top left, top right, bottom left, bottom right.
struct Point {
    Axis y, x;
    __device__ inline bool has_pixels() const { return y.inside() && x.inside(); }
    __device__ inline bool outside() const {
        return !has_pixels() && !isnan(y.weight[0]);
    }
    // Whether the sample changes with the coordinate of an axis.
    __device__ inline bool moves_with(const Axis& axis) const {
        return !outside() && (axis.slope || isnan(y.weight[0]));
    }
    __device__ inline bool counts(int corner) const {
        return y.counts[corner / 2] && x.counts[corner % 2];
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
            y.weight[0] * top + y.weight[1] * low,
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

template <typename V>
__device__ inline void write(V& first, const Vector<V>& vector) {
    *reinterpret_cast<Vector<V>*>(&first) = vector;
}

// Channels of a pixel; one that does not count is 0 and not read.
template <typename V, typename A>
__device__ inline Vector<V> read_if(bool counts, const A& image, long long at) {
    Vector<V> pixel;
    if (counts) {
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

// Where a channel of a point is in the columns, (G, rows, K, iCg) or (rows, C).
__device__ inline long long column_at(int channel, long long row, int k, int rows) {
#if SUMMED
    return row * C + channel;
#else
    const int depth = C / GROUPS;
    return ((channel / depth * static_cast<long long>(rows) + row) * K + k) * depth
        + channel % depth;
#endif
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

# Texts that the kernels have in common, by the name that stands for them there.
_PARTS = {}

# The lanes of a tap are neighbouring threads.
_PARTS['LANE'] = """
    const int lane = i % LANES;
    const unsigned int tap = static_cast<unsigned int>(i / LANES);
"""

# Unravels `tap`, one of rows * K * OG.
_PARTS['TAP'] = """
    const int group = tap % OG, k = tap / OG % K, row = tap / (OG * K);
"""

# Finds the point `k` of a group at an output position, and how it moves.
_PARTS['FIND'] = """
#if SUMMED
    const long long image_index = indices[row];
    const long long at_factor = (static_cast<long long>(row) * OG + group) * K + k;
    const long long at_y = 2 * at_factor, at_x = at_y + 1;
    const long long grid_y = 0, grid_x = 0;
#else
    const long long image_index = row / positions;
    const int position = first_position + row % positions;
    const long long out_size = static_cast<long long>(out_h) * out_w;
    const long long first_tap = (image_index * OG + group) * K;
    const long long at_factor = (first_tap + k) * out_size + position;
    const long long at_x = (first_tap * 2 + k) * out_size + position;
    const long long at_y = at_x + K * out_size;
    const long long grid_y = position / out_w * (SY * 1LL) - PH + k / KW * (DY * 1LL);
    const long long grid_x = position % out_w * (SX * 1LL) - PW + k % KW * (DX * 1LL);
#endif
    const Real offset_y = Real(offsets[at_y]), offset_x = Real(offsets[at_x]);
    const Real nan =
        isnan(offset_y) || isnan(offset_x) ? offset_y + offset_x : Real(0);
    const Point point = {
        make_axis(grid_y, offset_y, h, limit_y, nan),
        make_axis(grid_x, offset_x, w, limit_x, nan)};
#if FACTORS
    const Real factor = Real(factors[at_factor]);
#else
    const Real factor = 1;
#endif
    // What the sample does not change with does not move.
    Real y_dot = 0, x_dot = 0, factor_dot = 0;
#if OFFSETS_DOT
    if (point.moves_with(point.y)) y_dot = Real(offsets_dot[at_y]);
    if (point.moves_with(point.x)) x_dot = Real(offsets_dot[at_x]);
#endif
#if FACTORS_DOT
    if (point.has_pixels()) factor_dot = Real(factors_dot[at_factor]);
#endif
"""

# A loop over the vectors of channels that a lane has of a group.
_PARTS['CHANNELS'] = """
    for (int v = lane; v < C / OG / VEC; v += LANES) {
        const int channel = group * (C / OG) + v * VEC;
"""

# All corners are read before one is used.
_PARTS['CORNERS'] = """
        long long at_corner[4];
        Vector<T> corner[4], corner_dot[4];
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            const long long y = image_index * h + point.y.before + q / 2;
            at_corner[q] = (y * w + point.x.before + q % 2) * C + channel;
#if IMAGE
            corner[q] = read_if<T>(point.counts(q), image, at_corner[q]);
#endif
        }
#if IMAGE_DOT
        #pragma unroll
        for (int q = 0; q < 4; ++q)
            corner_dot[q] = read_if<T>(point.counts(q), image_dot, at_corner[q]);
#endif
"""

# The sample of a channel, and how fast it and its slopes change.
_PARTS['SAMPLES'] = """
            Sample s = {0, 0, 0, 0}, s_dot = {0, 0, 0, 0};
#if IMAGE
            s = sample(point, corner, e);
#endif
#if IMAGE_DOT
            s_dot = sample(point, corner_dot, e);
#endif
#if OFFSETS_DOT
    #if CLAMP  // along a clipped coordinate nothing moves, times whatever slope
            if (!point.moves_with(point.y)) s.y = s.yx = 0;
            if (!point.moves_with(point.x)) s.x = s.yx = 0;
    #endif
            s_dot.value += s.y * y_dot + s.x * x_dot;
            s_dot.y += s.yx * x_dot;
            s_dot.x += s.yx * y_dot;
#endif
"""

# The number that a channel of a point has in its column.
_PARTS['VALUE'] = """
#if DOT
            $SAMPLES
            Real value = factor * s_dot.value;
    #if FACTORS_DOT
            value += factor_dot * s.value;
    #endif
#else
            Real value = 0;
            #pragma unroll
            for (int q = 0; q < 4; ++q)
                value += point.weight(q) * Real(corner[q].v[e]);
            value *= factor;
#endif
"""

# The columns' gradients.
_PARTS['GCOLUMNS'] = """
        const long long at_column = column_at(channel, row, k, rows);
#if GCOLUMNS
        const Vector<G> gcolumn = read(gcolumns[at_column]);
#endif
#if GCOLUMNS_DOT
        const Vector<G> gcolumn_dot = read(gcolumns_dot[at_column]);
#endif
"""

# What these pass to a corner's channels.
_PARTS['PASS'] = """
            #pragma unroll
            for (int e = 0; e < VEC; ++e) {
#if !DOT
                part[e] += factor * point.weight(q) * Real(gcolumn.v[e]);
#endif
#if GCOLUMNS_DOT
                part[e] += factor * point.weight(q) * Real(gcolumn_dot.v[e]);
#endif
#if OFFSETS_DOT || FACTORS_DOT
                const Real weight_dot = factor * point.weight_dot(q, y_dot, x_dot)
                    + factor_dot * point.weight(q);
                part[e] += weight_dot * Real(gcolumn.v[e]);
#endif
            }
"""

_PREAMBLE = _REAL + _POINT + _VECTOR + _ADD

_BODIES = {}

_BODIES['sample'] = """
    $LANE $TAP $FIND
    $CHANNELS
        $CORNERS
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            $VALUE
            column.v[e] = T(value);
        }
        write(columns[column_at(channel, row, k, rows)], column);
    }
"""

# Here a tap is a group of an output position, and adds up what its points have.
_BODIES['sample_sum'] = """
    $LANE
    const int group = tap % OG, row = tap / OG;
    $CHANNELS
        Real sum[VEC] = {};
        for (int k = 0; k < K; ++k) {
            $FIND $CORNERS
            #pragma unroll
            for (int e = 0; e < VEC; ++e) {
                $VALUE
                sum[e] += value;
            }
        }
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) column.v[e] = T(sum[e]);
        write(columns[column_at(channel, row, 0, rows)], column);
    }
"""

_BODIES['differentiate'] = """
    $LANE $TAP $FIND
    // Over channels, gradient times sample, and times its slopes. The last two are to
    // be multiplied by how fast the factor moves, those before by the factor.
    Real sum = 0, sum_y = 0, sum_x = 0, still_y = 0, still_x = 0;
    $CHANNELS
        $CORNERS $GCOLUMNS
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            $SAMPLES
#if GCOLUMNS
            const Real g = Real(gcolumn.v[e]);
            const Sample& by_g = DOT ? s_dot : s;
            sum += g * by_g.value;
            sum_y += g * by_g.y;
            sum_x += g * by_g.x;
    #if FACTORS_DOT
            still_y += g * s.y;
            still_x += g * s.x;
    #endif
#endif
#if GCOLUMNS_DOT
            const Real g_dot = Real(gcolumn_dot.v[e]);
            sum += g_dot * s.value;
            sum_y += g_dot * s.y;
            sum_x += g_dot * s.x;
#endif
            column.v[e] = T(factor * s.value);
        }
#if GIMAGE
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (!point.counts(q)) continue;
            Real part[VEC] = {};
            $PASS
            add(&gimage[at_corner[q]], part);
        }
#endif
#if COLUMNS
        write(columns[at_column], column);
#endif
    }

#if GOFFSETS || GFACTORS
    #if LANES > 1
    const unsigned int lanes = (0xffffffffu >> (32 - LANES))
        << (threadIdx.x % 32 / LANES * LANES);
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(lanes, sum, step);
        sum_y += __shfl_xor_sync(lanes, sum_y, step);
        sum_x += __shfl_xor_sync(lanes, sum_x, step);
        #if FACTORS_DOT
        still_y += __shfl_xor_sync(lanes, still_y, step);
        still_x += __shfl_xor_sync(lanes, still_x, step);
        #endif
    }
    #endif
    // A point outside passes nothing on, also of an infinite gradient or factor.
    if (lane == 0) {
    #if GOFFSETS
        sum_y = factor * sum_y + factor_dot * still_y;
        sum_x = factor * sum_x + factor_dot * still_x;
        goffsets[at_y] = O(point.moves_with(point.y) ? sum_y : Real(0));
        goffsets[at_x] = O(point.moves_with(point.x) ? sum_x : Real(0));
    #endif
    #if GFACTORS
        gfactors[at_factor] = F(point.outside() ? Real(0) : sum);
    #endif
    }
#endif
"""

# The cell of the pixel grid that a point is in, and its tap: sorted, the taps of a cell
# follow each other in an order that is always the same. Those without pixels come last.
_BODIES['sort_key'] = """
    const unsigned int tap = static_cast<unsigned int>(i);
    $TAP $FIND
    long long cell = static_cast<long long>(images) * OG * (h + 1) * (w + 1);
    if (point.has_pixels()) {
        const long long part = image_index * OG + group;
        cell = (part * (h + 1) + point.y.before + 1) * (w + 1) + point.x.before + 1;
    }
    keys[i] = cell * (static_cast<long long>(rows) * K * OG) + i;
"""

# A pixel adds up what the taps of the four cells around it pass to it.
_BODIES['gather'] = """
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
            $TAP $FIND
            if (!point.counts(q)) continue;
            $GCOLUMNS $PASS
        }
    }
    #pragma unroll
    for (int e = 0; e < VEC; ++e) gimage[pixel * C + channel + e] += part[e];
"""


def _body(name: str) -> str:
    """The text of a kernel, with the parts put in."""
    body = _BODIES[name]
    while '$' in body:
        body = string.Template(body).substitute(_PARTS)
    return body


@functools.cache
def sampler_kernel(
    name: str,
    inputs: tuple[str, ...],
    scalars: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: tuple[tuple[str, int], ...],
):
    """A kernel over taps or pixels.

    Args:
        name: That of its body.
        inputs, outputs: Names of arrays. Optional ones may be left out.
        scalars: Names of numbers: limits are floats, the others integers.
        constants: What does not change from batch to batch, by name.

    """
    flags = {array.upper(): int(array in inputs + outputs) for array in _TYPES}
    defines = {**dict(constants), **flags}
    real = 'float64' if defines['DOUBLE'] else 'float32'
    return cupy.ElementwiseKernel(
        ', '.join(
            [f'raw {_TYPES[array]} {array}' for array in inputs]
            + [f'{real if "limit" in name else "int32"} {name}' for name in scalars]
        ),
        ', '.join(f'raw {_TYPES[array]} {array}' for array in outputs),
        _body(name),
        f'chainer_deform_{name}',
        preamble=''.join(f'#define {flag} {value}\n' for flag, value in defines.items())
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
