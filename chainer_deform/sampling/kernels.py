"""The GPU's kernels; :mod:`chainer_deform.sampling.cuda` runs them.

Names of types: ``T`` is that of images and columns, ``G`` that of the columns'
gradient, ``O`` and ``F`` those of offsets and factors, ``P`` and ``Q`` those of how
these move, ``Real`` (and ``R``) that of coordinates and sums, ``Int`` that of the
numbers of pixels.

``_dot`` stands for the derivative along the tangents; kernels that compute it are
compiled with ``DOT``. With ``SUMMED`` the points are given (``points.Given``), and the
samples of an output position are added up; else they are a grid (``points.Grid``).
"""

from __future__ import annotations

import functools
import re
import string

from chainer.backends.cuda import cupy

# The arrays of the kernels, with their types.
_TYPES = {
    **dict.fromkeys(('image', 'image_dot', 'columns', 'filters', 'gy'), 'T'),
    **dict.fromkeys(('gcolumns', 'gcolumns_dot'), 'G'),
    **dict.fromkeys(('offsets', 'goffsets'), 'O'),
    **dict.fromkeys(('factors', 'gfactors'), 'F'),
    'offsets_dot': 'P',
    'factors_dot': 'Q',
    'indices': 'int64',
    'keys': 'int64',
    'starts': 'int32',
    **dict.fromkeys(('gimage', 'weights', 'weights_dot', 'sums', 'gfilters'), 'R'),
}

_NUMBERS = """
#if DOUBLE
typedef double Real;
#else
typedef float Real;
#endif

// Coordinates, and numbers of pixels and cells.
#if WIDE
typedef long long Int;
typedef unsigned long long Unsigned;
#else
typedef int Int;
typedef unsigned int Unsigned;
#endif
"""

_POINT = """
// Twin of rule.axis: the pixel before a coordinate and the next one, their weights,
// whether they count, and whether the sample changes with the coordinate.
struct Axis {
    Int before;
    Real weight[2];
    bool counts[2];
    bool slope;
    __device__ inline bool inside() const { return counts[0] || counts[1]; }
    // Where a coordinate was raised to pixel 0, the pixel after that does not count.
    __device__ inline bool raised() const { return CLAMP && !slope && before == 0; }
    // The place between pixels that the coordinate is in: that after pixel cell() - 1.
    __device__ inline Int cell() const { return before + (raised() ? 0 : 1); }
};

// A NaN point has no pixels. It is not outside: `nan` makes its weights NaN, and all
// else with them; of other points it is 0.
__device__ inline Axis make_axis(
        Int grid, Real offset, Int size, Real limit, Real nan) {
    if (!(offset <= limit)) offset = limit;  // NaN, too
    if (!(offset >= -limit)) offset = -limit;
    const Real lower = floor(offset);
    Real after = offset - lower;
    Axis axis;
    axis.before = static_cast<Int>(lower) + grid;
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
    // Along a clipped coordinate nothing moves, times whatever slope.
    __device__ inline Sample clipped(Sample s) const {
#if CLAMP
        if (!moves_with(y)) s.y = s.yx = 0;
        if (!moves_with(x)) s.x = s.yx = 0;
#endif
        return s;
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

# Arrays are read and written by whole vectors of channels, and an index counts vectors:
# then a vector is one access, and zeros take a register for each word of it.
_VECTOR = """
template <int bytes>
struct alignas(bytes) Words {
    unsigned int word[bytes / 4];
};
template <>
struct alignas(2) Words<2> {
    unsigned short word[1];
};

template <typename V>
struct Vector {
    V v[VEC];
};

// The vector `at` of an array, as words.
template <typename V, typename A>
__device__ inline Words<VEC * sizeof(V)>& words(A& array, long long at) {
    (void)&array[at * VEC + VEC - 1];  // in the tests an index outside is noticed
    return const_cast<Words<VEC * sizeof(V)>*>(
        reinterpret_cast<const Words<VEC * sizeof(V)>*>(&array[0]))[at];
}

// Channels of a pixel; one that does not count is 0 and not read.
template <typename V, typename A>
__device__ inline Vector<V> read_if(bool counts, const A& array, long long at) {
    Words<VEC * sizeof(V)> some = {};
    if (counts) some = words<V>(array, at);
    Vector<V> vector;
    memcpy(&vector, &some, sizeof vector);
    return vector;
}

template <typename V, typename A>
__device__ inline Vector<V> read(const A& array, long long at) {
    return read_if<V>(true, array, at);
}

template <typename V, typename A>
__device__ inline void write(A& array, long long at, const Vector<V>& vector) {
    Words<VEC * sizeof(V)> some;
    memcpy(&some, &vector, sizeof vector);
    words<V>(array, at) = some;
}

template <typename V>
__device__ inline Sample sample(const Point& point, const Vector<V>* corner, int e) {
    return point.sample(
        Real(corner[0].v[e]), Real(corner[1].v[e]),
        Real(corner[2].v[e]), Real(corner[3].v[e]));
}

// The vector of columns, (G, rows, K, iCg) or (rows, C), that a vector of the channels
// has for a tap.
__device__ inline long long column_at(int vector, unsigned int tap, int rows) {
#if SUMMED
    return static_cast<long long>(tap / (OG * K)) * (C / VEC) + vector;
#else
    const int depth = C / GROUPS / VEC;
    return (static_cast<long long>(vector / depth) * (rows * static_cast<long long>(K))
            + tap / OG) * depth + vector % depth;
#endif
}
"""

_ADD = """
#define CUDA_VERSION (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__)

template <typename A>
__device__ inline void add(A& array, long long at, const Real* values) {
    Real* target = reinterpret_cast<Real*>(&words<Real>(array, at));
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
    const unsigned long long thread = i;
    const int lane = thread % LANES;
    const unsigned int tap = static_cast<unsigned int>(thread / LANES);
"""

# Unravels `tap`, one of rows * K * OG.
_PARTS['TAP'] = """
    const int group = tap % OG, k = tap / OG % K;
    const unsigned int row = tap / (OG * K);
"""

# Finds the point `k` of a group at an output position, and how it moves.
_PARTS['FIND'] = """
#if SUMMED
    const long long image_index = indices[row];
    const long long at_factor = (static_cast<long long>(row) * OG + group) * K + k;
    const long long at_y = 2 * at_factor, at_x = at_y + 1;
    const Int grid_y = 0, grid_x = 0;
#else
    const unsigned int in_image = positions, width = out_w;
    const unsigned int position = first_position + row % in_image;
    const long long image_index = row / in_image;
    const long long first_tap = (image_index * OG + group) * K;
    const long long at_factor = (first_tap + k) * out_size + position;
    const long long at_x = (first_tap * 2 + k) * out_size + position;
    const long long at_y = at_x + static_cast<long long>(K) * out_size;
    const Int grid_y = static_cast<Int>(position / width) * SY - PH + k / KW * DY;
    const Int grid_x = static_cast<Int>(position % width) * SX - PW + k % KW * DX;
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

# The weights of the corners, with the factor, and how fast they change.
_PARTS['WEIGHTS'] = """
    Real weight[4], weight_dot[4];
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
        weight[q] = factor * point.weight(q);
        weight_dot[q] = factor * point.weight_dot(q, y_dot, x_dot)
            + factor_dot * point.weight(q);
    }
"""

# Where the corners are in the image, but for the vector of the channels.
_PARTS['PLACE'] = """
    const long long at_point =
        ((image_index * h + point.y.before) * w + point.x.before) * (C / VEC);
    const long long below = static_cast<long long>(w) * (C / VEC);
    bool counts[4];
    #pragma unroll
    for (int q = 0; q < 4; ++q) counts[q] = point.counts(q);
"""

# A loop over the vectors of channels that a lane has of a group.
_PARTS['CHANNELS'] = """
    const int first_vector = group * (C / OG / VEC) + lane;
    long long at_column = column_at(first_vector, tap, rows);
    long long at_image = at_point + first_vector;
    #pragma unroll 1
    for (int vector = first_vector; vector < (group + 1) * (C / OG / VEC);
            vector += LANES, at_image += LANES, at_column += LANES) {
#if GROUPS > 1
        at_column = column_at(vector, tap, rows);
#endif
"""

# All corners are read before one is used.
_PARTS['CORNERS'] = """
        long long at_corner[4];
        Vector<T> corner[4], corner_dot[4];
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            at_corner[q] = at_image + q / 2 * below + q % 2 * (C / VEC);
#if IMAGE
            corner[q] = read_if<T>(counts[q], image, at_corner[q]);
#endif
#if IMAGE_DOT
            corner_dot[q] = read_if<T>(counts[q], image_dot, at_corner[q]);
#endif
        }
"""

# The sample of a channel.
_PARTS['VALUE'] = """
#if DOT
            Sample s = {0, 0, 0, 0}, s_dot = {0, 0, 0, 0};
    #if IMAGE
            s = sample(point, corner, e);
    #endif
    #if IMAGE_DOT
            s_dot = sample(point, corner_dot, e);
    #endif
    #if OFFSETS_DOT
            const Sample slopes = point.clipped(s);
            s_dot.value += slopes.y * y_dot + slopes.x * x_dot;
    #endif
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
        Vector<G> gcolumn, gcolumn_dot;
#if GCOLUMNS
        gcolumn = read<G>(gcolumns, at_column);
#endif
#if GCOLUMNS_DOT
        gcolumn_dot = read<G>(gcolumns_dot, at_column);
#endif
"""

# What these pass to the channels of a corner.
_PARTS['PASS'] = """
            #pragma unroll
            for (int e = 0; e < VEC; ++e) {
#if !DOT
                part[e] += corner_weight * Real(gcolumn.v[e]);
#endif
#if GCOLUMNS_DOT
                part[e] += corner_weight * Real(gcolumn_dot.v[e]);
#endif
#if OFFSETS_DOT || FACTORS_DOT || WEIGHTS_DOT
                part[e] += corner_weight_dot * Real(gcolumn.v[e]);
#endif
            }
"""

_PREAMBLE = _NUMBERS + _POINT + _VECTOR + _ADD

_BODIES = {}

_BODIES['sample'] = """
    $LANE $TAP $FIND $PLACE
    $CHANNELS
        $CORNERS
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            $VALUE
            column.v[e] = T(value);
        }
        write(columns, at_column, column);
    }
"""

# Adds up the samples of a group at an output position. A lane sums HELD vectors of
# channels at a time.
_BODIES['sample_sum'] = """
    const unsigned long long thread = i;
    const int lane = thread % LANES, group = thread / LANES % OG;
    const unsigned int row = static_cast<unsigned int>(thread / LANES / OG);
    const int vectors = C / OG / VEC;
    for (int first = lane; first < vectors; first += LANES * HELD) {
        Real sum[HELD][VEC] = {};
        #pragma unroll 1
        for (int k = 0; k < K; ++k) {
            $FIND $PLACE
            #pragma unroll
            for (int held = 0; held < HELD; ++held) {
                const int vector = first + held * LANES;
                if (vectors % (LANES * HELD) && vector >= vectors) break;
                const long long at_image = at_point + group * vectors + vector;
                $CORNERS
                #pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    $VALUE
                    sum[held][e] += value;
                }
            }
        }
        #pragma unroll
        for (int held = 0; held < HELD; ++held) {
            const int vector = first + held * LANES;
            if (vectors % (LANES * HELD) && vector >= vectors) break;
            Vector<T> column;
            #pragma unroll
            for (int e = 0; e < VEC; ++e) column.v[e] = T(sum[held][e]);
            const long long at_row = static_cast<long long>(row) * OG + group;
            write(columns, at_row * vectors + vector, column);
        }
    }
"""

_BODIES['differentiate'] = """
    $LANE $TAP $FIND $WEIGHTS $PLACE
    // Over channels, column gradient times each corner pixel, and how fast it changes.
    Real products[4] = {}, products_dot[4] = {};
    $CHANNELS
        $CORNERS $GCOLUMNS
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            #pragma unroll
            for (int e = 0; e < VEC; ++e) {
#if IMAGE && GCOLUMNS
                products[q] += Real(gcolumn.v[e]) * Real(corner[q].v[e]);
#endif
#if IMAGE_DOT && GCOLUMNS
                products_dot[q] += Real(gcolumn.v[e]) * Real(corner_dot[q].v[e]);
#endif
#if IMAGE && GCOLUMNS_DOT
                products_dot[q] += Real(gcolumn_dot.v[e]) * Real(corner[q].v[e]);
#endif
            }
        }
#if COLUMNS
        Vector<T> column;
        #pragma unroll
        for (int e = 0; e < VEC; ++e) {
            $VALUE
            column.v[e] = T(value);
        }
        write(columns, at_column, column);
#endif
#if GIMAGE
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (!counts[q]) continue;
            const Real corner_weight = weight[q], corner_weight_dot = weight_dot[q];
            Real part[VEC] = {};
            $PASS
            add(gimage, at_corner[q], part);
        }
#endif
    }

#if GOFFSETS || GFACTORS
    #if LANES > 1
    const unsigned int lanes = (0xffffffffu >> (32 - LANES))
        << (threadIdx.x % 32 / LANES * LANES);
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            products[q] += __shfl_xor_sync(lanes, products[q], step);
        #if DOT
            products_dot[q] += __shfl_xor_sync(lanes, products_dot[q], step);
        #endif
        }
    }
    #endif
    if (lane == 0) {
        // A corner that does not count is 0, also times an infinite gradient.
        #pragma unroll
        for (int q = 0; q < 4; ++q)
            if (!counts[q]) products[q] = products_dot[q] = 0;
        const Sample s = point.clipped(
            point.sample(products[0], products[1], products[2], products[3]));
    #if DOT
        Sample along = point.sample(
            products_dot[0], products_dot[1], products_dot[2], products_dot[3]);
        #if OFFSETS_DOT
        along.value += s.y * y_dot + s.x * x_dot;
        along.y += s.yx * x_dot;
        along.x += s.yx * y_dot;
        #endif
    #else
        const Sample along = s;
    #endif
        // A point outside passes nothing on, also of an infinite gradient or factor.
    #if GOFFSETS
        Real along_y = factor * along.y, along_x = factor * along.x;
        #if FACTORS_DOT
        along_y += factor_dot * s.y;
        along_x += factor_dot * s.x;
        #endif
        goffsets[at_y] = O(point.moves_with(point.y) ? along_y : Real(0));
        goffsets[at_x] = O(point.moves_with(point.x) ? along_x : Real(0));
    #endif
    #if GFACTORS
        gfactors[at_factor] = F(point.outside() ? Real(0) : along.value);
    #endif
    }
#endif
"""

# The cell of the pixel grid that a point is in, and its tap: sorted, the taps of a cell
# follow each other in an order that is always the same. Those without pixels come last.
# The corners of a cell are the pixels around it, and their weights are in that order;
# those that do not count are outside the image.
_BODIES['sort_key'] = """
    const unsigned int tap = static_cast<unsigned int>(i);
    $TAP $FIND $WEIGHTS
    long long cell = static_cast<long long>(images) * OG * (h + 1LL) * (w + 1LL);
    if (point.has_pixels())
        cell = ((image_index * OG + group) * (h + 1LL) + point.y.cell()) * (w + 1LL)
            + point.x.cell();
    keys[i] = cell << tap_bits | tap;
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int corner = q ^ (point.y.raised() * 2 + point.x.raised());
        weights[4LL * tap + corner] = weight[q];
#if WEIGHTS_DOT
        weights_dot[4LL * tap + corner] = weight_dot[q];
#endif
    }
"""

# The first of the sorted taps that is not before a cell.
_BODIES['start'] = """
    int first = 0, last = rows * (K * OG);
    while (first < last) {
        const int middle = first + (last - first) / 2;
        if (keys[middle] >> tap_bits < i)
            first = middle + 1;
        else
            last = middle;
    }
    starts[i] = first;
"""

# A pixel adds up what the taps of the four cells around it pass to it.
_BODIES['gather'] = """
    const unsigned long long thread = i;
    const int vector = thread % (C / VEC);
    const Unsigned pixel = static_cast<Unsigned>(thread / (C / VEC));
    const Unsigned height = h, width = w, line = pixel / width;
    const Unsigned group_of_image = line / height * OG + vector / (C / OG / VEC);
    const Unsigned first_cell =
        (group_of_image * (height + 1) + line % height) * (width + 1) + pixel % width;
    Real part[VEC] = {};
    #pragma unroll 1
    for (int q = 0; q < 4; ++q) {
        const long long cell = first_cell
            + static_cast<Unsigned>(1 - q / 2) * (width + 1) + (1 - q % 2);
        const int end = starts[cell + 1];
        #pragma unroll 1
        for (int s = starts[cell]; s < end; ++s) {
            const unsigned int tap =
                static_cast<unsigned int>(keys[s]) & ((1u << tap_bits) - 1);
            const long long at_column = column_at(vector, tap, rows);
            $GCOLUMNS
            const Real corner_weight = weights[4LL * tap + q];
#if WEIGHTS_DOT
            const Real corner_weight_dot = weights_dot[4LL * tap + q];
#endif
            $PASS
        }
    }
    Vector<Real> sums = read<Real>(gimage, i);
    #pragma unroll
    for (int e = 0; e < VEC; ++e) sums.v[e] += part[e];
    write(gimage, i, sums);
"""


# The products of a filter that has one channel a group, and MULTIPLIER outputs of it:
# columns (rows, K, C), filters (MULTIPLIER, K, C), outputs (MULTIPLIER, rows, C).
_BODIES['depthwise'] = """
    const int vectors = C / VEC, vector = i % vectors;
    const long long row = i / vectors;
    #pragma unroll 1
    for (int j = 0; j < MULTIPLIER; ++j) {
        const long long at_sum = (static_cast<long long>(j) * rows + row) * vectors;
        Vector<Real> sum = {};
#if ADD
        sum = read<Real>(sums, at_sum + vector);
#endif
        #pragma unroll 3
        for (int k = 0; k < K; ++k) {
            const Vector<T> column =
                read<T>(columns, (row * K + k) * vectors + vector);
            const Vector<T> weight =
                read<T>(filters, static_cast<long long>(j * K + k) * vectors + vector);
            #pragma unroll
            for (int e = 0; e < VEC; ++e)
                sum.v[e] += Real(weight.v[e]) * Real(column.v[e]);
        }
        write(sums, at_sum + vector, sum);
    }
"""

_BODIES['depthwise_gcolumns'] = """
    const int vectors = C / VEC, vector = i % vectors, k = i / vectors % K;
    const long long row = i / (vectors * K);
    Vector<G> gcolumn = {};
    #pragma unroll 1
    for (int j = 0; j < MULTIPLIER; ++j) {
        const Vector<T> g = read<T>(
            gy, (static_cast<long long>(j) * rows + row) * vectors + vector);
        const Vector<T> weight =
            read<T>(filters, static_cast<long long>(j * K + k) * vectors + vector);
        #pragma unroll
        for (int e = 0; e < VEC; ++e)
            gcolumn.v[e] += Real(weight.v[e]) * Real(g.v[e]);
    }
    write(gcolumns, i, gcolumn);
"""

# A thread adds up each of `shares` rows; what all have is added up later.
_BODIES['depthwise_gfilters'] = """
    const int vectors = C / VEC, vector = i % vectors, k = i / vectors % K;
    const int j = i / (vectors * K) % MULTIPLIER;
    Vector<Real> sum = {};
    #pragma unroll 1
    for (long long row = i / (vectors * K * MULTIPLIER); row < rows; row += shares) {
        const Vector<T> g = read<T>(
            gy, (static_cast<long long>(j) * rows + row) * vectors + vector);
        const Vector<T> column = read<T>(columns, (row * K + k) * vectors + vector);
        #pragma unroll
        for (int e = 0; e < VEC; ++e) sum.v[e] += Real(g.v[e]) * Real(column.v[e]);
    }
    write(gfilters, i, sum);
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
    """A kernel, and the names of the numbers it takes.

    Args:
        name: That of its body.
        inputs, outputs: Names of arrays. Optional ones may be left out.
        scalars: Names of numbers: limits are floats, the others integers. It takes
            those that its body has.
        constants: What does not change from batch to batch, by name.

    """
    flags = {array.upper(): int(array in inputs + outputs) for array in _TYPES}
    defines = {**dict(constants), **flags}
    real = 'float64' if defines['DOUBLE'] else 'float32'
    body = _body(name)
    words = set(re.findall(r'\w+', body))
    scalars = tuple(scalar for scalar in scalars if scalar in words)
    kernel = cupy.ElementwiseKernel(
        ', '.join(
            [f'raw {_TYPES[array]} {array}' for array in inputs]
            + [f'{real if "limit" in name else "int32"} {name}' for name in scalars]
        ),
        ', '.join(f'raw {_TYPES[array]} {array}' for array in outputs),
        body,
        f'chainer_deform_{name}',
        preamble=''.join(f'#define {flag} {value}\n' for flag, value in defines.items())
        + _PREAMBLE,
    )
    return kernel, scalars


@functools.cache
def swap_kernel(rows: int, cols: int):
    """Swaps the last two axes of an array, and converts it.

    A thread moves a tile: it reads ``rows`` vectors of ``cols`` elements, and writes
    ``cols`` vectors of ``rows``. A warp moves 4 by 8 tiles, so that both its reads and
    its writes are of whole sectors of memory.
    """
    return cupy.ElementwiseKernel(
        'raw T source, int64 height, int64 width, int32 row_blocks, int32 col_blocks',
        'raw U target',
        """
    const unsigned int thread = i % 32;
    const unsigned int block = static_cast<unsigned int>(i / 32);
    const unsigned int across = col_blocks, down = row_blocks;
    const long long row = (block / across % down * 4LL + thread / 8) * ROWS;
    const long long col = (block % across * 8LL + thread % 8) * COLS;
    const long long batch = block / across / down;
    if (row < height && col < width) {
        const long long at_source = (batch * height + row) * width + col;
        const long long at_target = (batch * width + col) * height + row;
        Tile<T, COLS> in[ROWS];
        #pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            (void)&source[at_source + r * width + COLS - 1];
            in[r] = reinterpret_cast<const Tile<T, COLS>*>(&source[0])[
                (at_source + r * width) / COLS];
        }
        #pragma unroll
        for (int c = 0; c < COLS; ++c) {
            Tile<U, ROWS> out;
            #pragma unroll
            for (int r = 0; r < ROWS; ++r) out.v[r] = U(in[r].v[c]);
            (void)&target[at_target + c * height + ROWS - 1];
            reinterpret_cast<Tile<U, ROWS>*>(&target[0])[
                (at_target + c * height) / ROWS] = out;
        }
    }
""",
        'chainer_deform_swap',
        preamble=f"""
#define ROWS {rows}
#define COLS {cols}
template <typename V, int count>
struct alignas(count * sizeof(V)) Tile {{
    V v[count];
}};
""",
    )
