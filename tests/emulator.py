"""Runs the GPU path on NumPy arrays: its kernels in C++, its products in NumPy.

``cupy`` here stands in for CuPy. Its ``ElementwiseKernel`` compiles the very sources
that a GPU gets and checks every index of every array; its cuBLAS follows the pointers
and leading dimensions that it is given. The lanes of a tap are threads, which exchange
values as those of a warp do. What it cannot show are races between taps, and
misalignment: those need a device.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import types

import numpy

from chainer_deform.sampling import cuda, kernels

COMPILER = os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++')

_TYPES = {
    'float16': 'float16',
    'float32': 'float',
    'float64': 'double',
    'int32': 'int',
    'int64': 'long long',
}

_HEADER = r"""
#include <cmath>
#include <cstddef>
#include <cstring>
using std::memcpy;
#define __device__
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
using std::floor;
using std::isnan;

// As CuPy's: stored in 16 bits, computed with in 32.
struct float16 {
    unsigned short bits;
    float16() {}
    float16(float value) {
        unsigned int f;
        std::memcpy(&f, &value, 4);
        const unsigned int sign = f >> 16 & 0x8000, magnitude = f & 0x7fffffff;
        if (magnitude > 0x7f800000) {
            bits = sign | 0x7e00;
        } else if (magnitude >= 0x477ff000) {  // rounds to more than the largest
            bits = sign | 0x7c00;
        } else if (magnitude < 0x38800000) {  // subnormal: a multiple of 2 ** -24
            bits = sign | (unsigned int)std::nearbyint(std::fabs(value) * 16777216.0f);
        } else {
            const unsigned int even = magnitude >> 13 & 1;
            bits = sign | ((magnitude - 0x38000000 + 0xfff + even) >> 13);
        }
    }
    explicit float16(double value) : float16((float)value) {}
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        float value = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
            : std::ldexp((float)fraction, -24);
        return bits & 0x8000 ? -value : value;
    }
};

static const char* broken;

template <typename T> T atomicAdd(T* address, T value) { return *address += value; }

struct float4 {
    float x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float4 atomicAdd(float4* address, float4 value) {
    if ((size_t)address % 16) broken = "alignment of a float4";
    const float4 old = *address;
    *address = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
    return old;
}

template <typename T> struct Raw {
    T* data;
    long long size;
    const char* name;
    T& operator[](long long k) const {
        if (k < 0 || k >= size) {
            broken = name;
            return *data;
        }
        return data[k];
    }
};
"""


# Of kernels whose lanes may tell each other something: each lane is a thread.
_WARP = r"""
#include <atomic>
#include <thread>
#include <vector>

static thread_local struct { unsigned int x; } threadIdx;
static std::atomic<int> waiting, generation;

// Waits until all lanes of the tap are here.
static void meet(int lanes) {
    const int mine = generation;
    if (++waiting == lanes) {
        waiting = 0;
        ++generation;
    } else {
        while (generation == mine) std::this_thread::yield();
    }
}

template <typename T> T exchange(unsigned int mask, T value, int step, int lanes) {
    static T values[32];
    const unsigned int lane = threadIdx.x % 32;
    if (!(mask >> lane & mask >> (lane ^ step) & 1)) broken = "warp";
    values[lane] = value;
    meet(lanes);
    const T other = values[lane ^ step];
    meet(lanes);
    return other;
}
#define __shfl_xor_sync(mask, value, step) exchange(mask, value, step, LANES)
"""

_RUN_LANES = """
std::vector<std::thread> lanes;
for (int lane = 0; lane < LANES; ++lane)
    lanes.emplace_back([=] {
        for (ptrdiff_t i = lane; i < n; i += LANES) {
            threadIdx.x = i % 128;
            body(i);
        }
    });
for (std::thread& lane : lanes) lane.join();
"""


class ElementwiseKernel:
    """Compiles for the host what CuPy compiles for a GPU of some architecture."""

    architecture = 800

    def __init__(self, in_params, out_params, operation, name, preamble=''):
        self.inputs = [param.split() for param in in_params.split(',')]
        self.outputs = [param.split() for param in out_params.split(',')]
        self.operation, self.preamble, self.name = operation, preamble, name

    def __call__(self, *args, size):
        params = self.inputs + self.outputs
        if len(args) != len(params):
            raise TypeError(f'{self.name} takes {len(params)} arguments: {len(args)}')
        letters, fields, values = {}, [], []
        for param, arg in zip(params, args):
            name = param[-1]
            if param[0] != 'raw':
                kind = 'reals' if param[0].startswith('float') else 'scalars'
                type_name = _TYPES[param[0]]
                fields.append(f'const {type_name} {name} = {kind}[{name}_];')
                if kind == 'scalars' and not -(2**31) <= arg < 2**31:
                    raise OverflowError(f'{name} is {arg}')
                values.append((name, arg, 0))
                continue
            type_name = _TYPES[arg.dtype.name]
            if letters.setdefault(param[1], type_name) != type_name:
                raise TypeError(f'{name} is {type_name}, not {letters[param[1]]}')
            if not (arg.flags.c_contiguous and arg.ndim == 1):
                raise TypeError(f'{name} is not 1-D and contiguous')
            const = 'const ' if param in self.inputs else ''
            fields.append(
                f'const Raw<{const}{type_name}> {name} = {{({const}{type_name}*)'
                f'scalars[{name}_], sizes[{name}_], "{name}"}};'
            )
            values.append((name, arg.ctypes.data, arg.size))
        warp = re.search(r'#define LANES (?!1\n)', self.preamble)
        source = '\n'.join(
            [
                f'#define __CUDA_ARCH__ {self.architecture}',
                _HEADER,
                _WARP if warp else '',
                *(
                    f'typedef {t} {letter};'
                    for letter, t in letters.items()
                    if len(letter) == 1
                ),
                self.preamble,
                'enum {' + ', '.join(f'{name}_' for name, _, _ in values) + '};',
                'extern "C" const char* run(',
                '    long long n, const long long* scalars, const double* reals,',
                '    const long long* sizes) {',
                *fields,
                'broken = 0;',
                'const auto body = [&](ptrdiff_t i) {',
                self.operation,
                '};',
                _RUN_LANES if warp else 'for (ptrdiff_t i = 0; i < n; ++i) body(i);',
                'return broken;',
                '}',
            ]
        )
        array = ctypes.c_longlong * len(values)
        reals = ctypes.c_double * len(values)
        broken = _compile(source)(
            ctypes.c_longlong(size),
            array(*(int(value) for _, value, _ in values)),
            reals(*(float(value) for _, value, _ in values)),
            array(*(size for _, _, size in values)),
        )
        if broken:
            raise IndexError(f'{self.name} left the array {broken.decode()}')


@functools.cache
def _compile(source: str):
    """The function ``run`` of a source, compiled once for all processes."""
    folder = pathlib.Path(__file__).parents[1] / 'build' / 'emulator'
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / (hashlib.sha256(source.encode()).hexdigest() + '.so')
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = pathlib.Path(scratch) / 'kernel.cpp'
            path.write_text(source)
            subprocess.run(
                [
                    COMPILER,
                    '-std=c++14',
                    '-pthread',
                    '-O1',
                    '-shared',
                    '-fPIC',
                    '-w',
                    '-o',
                    str(path.with_suffix('.so')),
                    str(path),
                ],
                check=True,
            )
            path.with_suffix('.so').rename(library)
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run


def _empty(shape, dtype=float):
    """Memory with something in it that shows if it is used."""
    return numpy.full(shape, numpy.nan if numpy.dtype(dtype).kind == 'f' else -1, dtype)


def _matrices(pointer, type_number, rows, cols, leading, step, batch):
    """A batch of matrices as cuBLAS sees it, column by column."""
    if leading < max(1, rows):
        raise ValueError(f'leading dimension {leading} of {rows} rows')
    dtype = numpy.dtype({2: 'e', 0: 'f', 1: 'd'}[type_number])
    elements = 1 + (batch - 1) * step + (cols - 1) * leading + rows - 1
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(pointer)
    return numpy.lib.stride_tricks.as_strided(
        numpy.frombuffer(memory, dtype),
        (batch, rows, cols),
        [dtype.itemsize * stride for stride in (step, 1, leading)],
    )


@numpy.errstate(all='ignore')
def _gemm(
    handle, transa, transb, m, n, k, alpha, a, a_type, lda, a_step, b, b_type, ldb,
    b_step, beta, c, c_type, ldc, c_step, batch, compute_type, algorithm,
):  # fmt: skip
    """cublasGemmStridedBatchedEx."""
    if (a_type, b_type) != (b_type, a_type) or (a_type, c_type) not in (
        (2, 2), (2, 0), (0, 0), (1, 1)
    ):  # fmt: skip
        raise TypeError(f'no product of types {a_type}, {b_type}, {c_type}')
    if compute_type not in {2: (68,), 0: (68, 77), 1: (70,)}[a_type]:
        raise TypeError(f'compute type {compute_type} for type {a_type}')
    scalar = ctypes.c_double if compute_type == 70 else ctypes.c_float
    alpha, beta = (scalar.from_address(pointer).value for pointer in (alpha, beta))
    a = _matrices(a, a_type, *((k, m) if transa else (m, k)), lda, a_step, batch)
    b = _matrices(b, b_type, *((n, k) if transb else (k, n)), ldb, b_step, batch)
    c = _matrices(c, c_type, m, n, ldc, c_step, batch)
    a = a.swapaxes(1, 2) if transa else a
    b = b.swapaxes(1, 2) if transb else b
    real = numpy.float64 if compute_type == 70 else numpy.float32
    product = alpha * (a.astype(real) @ b.astype(real))
    c[...] = product if beta == 0 else product + beta * c


cupy = types.SimpleNamespace(
    **{name: getattr(numpy, name) for name in ('ascontiguousarray', 'sort', 'zeros')},
    empty=_empty,
    ElementwiseKernel=ElementwiseKernel,
    cuda=types.SimpleNamespace(
        cublas=types.SimpleNamespace(gemmStridedBatchedEx=_gemm),
        device=types.SimpleNamespace(get_cublas_handle=lambda: 0),
    ),
)


def emulate(monkeypatch, architecture: int = 800, tf32: bool = False, **names) -> None:
    """Has the GPU path run on NumPy arrays, until the test ends.

    Args:
        monkeypatch: The fixture.
        architecture: What kernels are compiled for; 900 has atomics of four floats.
        tf32: Whether CuPy is set to use TF32.
        names: They replace some of what stands in for CuPy.

    """
    monkeypatch.setattr(ElementwiseKernel, 'architecture', architecture)
    stand_in = types.SimpleNamespace(**{**vars(cupy), **names})
    for module in cuda, kernels:
        monkeypatch.setattr(module, 'cupy', stand_in)
    for name in 'sampler_kernel', 'swap_kernel':
        make_kernel = getattr(kernels, name).__wrapped__
        monkeypatch.setattr(cuda, name, functools.cache(make_kernel))
    monkeypatch.setattr(cuda, '_pointer', lambda array: array.ctypes.data)
    monkeypatch.setattr(cuda, '_cupy_uses_tf32', lambda: tf32)
