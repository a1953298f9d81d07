"""A GPU, the contestants on it, and how they are checked and timed.

For ``run.py --device gpu`` and ``gpu_report.py``. What a contestant needs is imported
when it is made: one that is missing does not stop the others.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import platform
import statistics
import sys
import time
from typing import Callable, NamedTuple

import numpy

# Name: n, c, out_c, h, w. The kernel is 3 x 3, stride and pad are 1.
CASES = {
    'A': (2, 256, 256, 56, 56),
    'B': (8, 512, 512, 28, 28),
    'C': (1, 256, 256, 200, 336),
    'D': (16, 64, 64, 112, 112),
}
TINY = (1, 8, 8, 8, 8)
TAPS = 9
# Largest error of a result, relative to the largest number expected.
TOLERANCES = {'float32': 1e-4, 'tf32': 3e-3, 'float16': 3e-3}
MODES = tuple(TOLERANCES)
# Name: whether gradients are computed, too.
PASSES = {'forward': False, 'forward + backward': True}
OURS, DETERMINISTIC = 'chainer_deform', 'deterministic'
TORCHVISION, CHAINER = 'torchvision', "Chainer's own"
PLAIN = 'plain convolution'
# A timed stretch has as many runs as take this long, but no more than MOST_RUNS.
LEAST_MS, MOST_RUNS = 4, 50
# Sizes that measured rates come from: sides of the matrices, numbers that are copied.
PRODUCT_SIZE, COPY_SIZE = 8192, 1 << 29


class Contestant(NamedTuple):
    """``run(backward)`` computes ``y`` and, if asked, all gradients, on the device.

    ``read`` makes NumPy arrays by name of what ``run`` returned.
    """

    run: Callable
    read: Callable


@functools.lru_cache(maxsize=1)
def random_arrays(shape: tuple) -> dict:
    """Arguments and ``gy`` in float32."""
    n, c, out_c, h, w = shape
    random = numpy.random.default_rng(0)
    shapes = {
        'x': (n, c, h, w),
        'offset': (n, 2 * TAPS, h, w),
        'W': (out_c, c, 3, 3),
        'b': (out_c,),
        'gy': (n, out_c, h, w),
    }
    arrays = {
        name: random.standard_normal(shape, 'float32') for name, shape in shapes.items()
    }
    arrays['W'] *= (TAPS * c) ** -0.5
    # With a standard deviation of 2 pixels, in odd 128ths: exact in float16, too, and
    # never on a lattice line, where the gradient jumps.
    arrays['offset'] = (numpy.floor(128 * arrays['offset']) + 0.5) / 64
    return {name: array.astype('float32') for name, array in arrays.items()}


def arrays_of(shape: tuple, mode: str) -> dict:
    """The same in the dtype of a mode."""
    dtype = 'float16' if mode == 'float16' else 'float32'
    return {name: array.astype(dtype) for name, array in random_arrays(shape).items()}


def relative_errors(expected: dict, found: dict) -> dict:
    """The largest error of each array, relative to the largest number expected."""
    errors = {}
    for name, array in expected.items():
        error = math.inf
        if name in found and found[name].shape == array.shape:
            error = abs(found[name].astype(float) - array).max() / abs(array).max()
        errors[name] = float(error) if error < math.inf else math.inf  # nor NaN
    return errors


def expected_results(device, shape: tuple, mode: str) -> tuple[dict, str]:
    """All results of a case in float64, and what computed them."""
    arrays = {
        name: array.astype(float) for name, array in arrays_of(shape, mode).items()
    }
    if TORCHVISION in device.makers():
        contestant = device.makers()[TORCHVISION](arrays)
        return contestant.read(contestant.run(True)), 'torchvision in float64'
    from reference import deformable_convolution

    return deformable_convolution(**arrays), 'sparse matrices in float64'


def chainer_contestant(
    device, arrays: dict, function, deterministic=False, with_offset=True
) -> Contestant:
    """A function of Chainer's kind."""
    import chainer

    arrays = {name: device.send(array) for name, array in arrays.items()}
    gy = arrays.pop('gy')
    if not with_offset:
        del arrays['offset']

    def run(backward):
        with (
            chainer.using_config('cudnn_deterministic', deterministic),
            chainer.using_config('enable_backprop', backward),
        ):
            variables = {name: chainer.Variable(a) for name, a in arrays.items()}
            y = function(*variables.values(), 1, 1)
            if not backward:
                return {'y': y.array}
            y.grad = gy
            y.backward()
        gradients = {f'g{name}': v.grad for name, v in variables.items()}
        return {'y': y.array, **gradients}

    def read(found):
        return {name: device.receive(array) for name, array in found.items()}

    return Contestant(run, read)


def our_makers(device) -> dict:
    """Functions by name that make a contestant of arrays: those of this package."""
    from chainer_deform.functions import deformable_convolution_2d_sampler

    def make(arrays, deterministic=False):
        return chainer_contestant(
            device, arrays, deformable_convolution_2d_sampler, deterministic
        )

    return {OURS: make, DETERMINISTIC: functools.partial(make, deterministic=True)}


def torchvision_contestant(arrays: dict, device: str = 'cuda') -> Contestant:
    """torchvision's function, in the dtype of the arrays."""
    import torch
    from torchvision.ops import deform_conv2d

    # Chainer has all x, then all y; torchvision has y and x in pairs.
    order = [k + TAPS * axis for k in range(TAPS) for axis in (1, 0)]
    tensors = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
    tensors['offset'] = tensors['offset'][:, order].contiguous()
    gy = tensors.pop('gy')
    x, offset, W, b = tensors.values()

    def run(backward):
        for tensor in tensors.values():
            tensor.requires_grad_(backward)
        y = deform_conv2d(x, offset, W, b, padding=1)
        if not backward:
            return {'y': y}
        gradients = torch.autograd.grad(y, list(tensors.values()), gy)
        names = (f'g{name}' for name in tensors)
        return {'y': y.detach(), **dict(zip(names, gradients))}

    def read(found):
        results = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        if 'goffset' in results:
            goffset = numpy.empty_like(results['goffset'])
            goffset[:, order] = results['goffset']
            results['goffset'] = goffset
        return results

    return Contestant(run, read)


class NoDevice(Exception):
    """There is no GPU to measure on; the message says why."""


class Gpu:
    """A GPU, by CuPy; torch works in the same stream, the default one."""

    def __init__(self) -> None:
        try:
            import cupy

            if not cupy.cuda.runtime.getDeviceCount():
                raise NoDevice('CuPy finds no device')
        except NoDevice:
            raise
        except Exception as error:  # no CuPy, no library, no driver
            raise NoDevice(f'no GPU to measure on: {first_line(error)}') from error
        self.cupy, self.rates = cupy, {}
        self.missing = {}
        try:
            import torch
            import torchvision  # noqa: F401

            if not torch.cuda.is_available():
                raise NoDevice('torch finds no device')
            self.torch = torch
        except Exception as error:
            self.torch, self.missing[TORCHVISION] = None, first_line(error)

    def makers(self) -> dict:
        """Functions by name that make a contestant of arrays."""
        makers = our_makers(self)
        if self.torch is not None:
            makers[TORCHVISION] = torchvision_contestant
        return makers

    def send(self, array):
        return self.cupy.asarray(array)

    def receive(self, array):
        return self.cupy.asnumpy(array)

    def synchronize(self) -> None:
        """Waits for all work; raises what went wrong in it."""
        self.cupy.cuda.Device().synchronize()

    def free(self) -> None:
        """Gives unused memory back to the device."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    @contextlib.contextmanager
    def mode(self, mode: str):
        """TF32 for all, or for none."""
        from cupy._core import _routines_linalg as linalg

        tf32 = mode == 'tf32'
        before = linalg.get_compute_type(numpy.float32)
        linalg.set_compute_type(
            numpy.float32,
            linalg.COMPUTE_TYPE_TF32 if tf32 else linalg.COMPUTE_TYPE_DEFAULT,
        )
        if self.torch is not None:
            self.torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            linalg.set_compute_type(numpy.float32, before)

    def time(self, run, count: int = 1) -> float:
        """Milliseconds a run, by events around ``count`` runs."""
        start, end = (self.cupy.cuda.Event() for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / count

    def kernels(self, run) -> dict:
        """Microseconds and number of launches of each kernel of a run, by name."""
        profiler = self.torch.profiler
        run()
        self.synchronize()
        activities = [profiler.ProfilerActivity.CUDA]
        with profiler.profile(activities=activities) as profile:
            run()
            self.synchronize()
        found = {}
        for event in profile.key_averages():
            us = getattr(event, 'self_device_time_total', None)
            if us is None:  # torch before 2.4
                us = event.self_cuda_time_total
            if us > 0:
                found[event.key] = us, event.count
        if not found:
            raise RuntimeError("torch's profiler has seen no kernel")
        return found

    def allocations(self, run) -> int:
        """How often a run asks CuPy's memory pool for memory."""
        count = 0

        class Hook(self.cupy.cuda.MemoryHook):
            name = 'count'

            def malloc_preprocess(self, **kwargs):
                nonlocal count
                count += 1

        run()
        with Hook():
            run()
        return count

    def memory(self, run, name: str) -> float:
        """MiB that a run adds to the memory pool."""
        run()  # kernels are compiled, handles made
        self.synchronize()
        self.free()
        if name == TORCHVISION:
            before = self.torch.cuda.memory_reserved()
            self.torch.cuda.reset_peak_memory_stats()
            run()
            return (self.torch.cuda.max_memory_reserved() - before) / 2**20
        pool = self.cupy.get_default_memory_pool()
        before = pool.total_bytes()
        run()
        return (pool.total_bytes() - before) / 2**20

    def rate(self, what: str) -> float:
        """Operations a second of a large product, or bytes a second of a large copy."""
        if what not in self.rates:
            cupy = self.cupy
            if what == 'copy':
                source = cupy.ones(COPY_SIZE, numpy.float32)
                target = cupy.empty_like(source)
                amount = 2 * source.nbytes
                run = lambda: cupy.copyto(target, source)  # noqa: E731
            else:
                size = PRODUCT_SIZE
                a, b = (self._random((size, size), what) for _ in range(2))
                amount = 2 * size**3
                run = lambda: cupy.dot(a, b)  # noqa: E731
            with self.mode(what):
                ms = medians(self, {what: run}, 5)[what]
            self.rates[what] = 1e3 * amount / ms
        return self.rates[what]

    def product_ms(self, shape: tuple, mode: str, backward: bool) -> float:
        """Milliseconds of the matrix products of a case alone, by cuBLAS."""
        n, c, out_c, h, w = shape
        rows, depth = n * h * w, TAPS * c
        dot = self.cupy.dot
        filters = self._random((out_c, depth), mode)
        columns = self._random((rows, depth), mode)
        gy = self._random((out_c, rows), mode)
        runs = {'y': lambda: dot(filters, columns.T)}
        if backward:
            runs['gcolumns'] = lambda: dot(gy.T, filters)
            runs['gW'] = lambda: dot(gy, columns)
        with self.mode(mode):
            return sum(medians(self, runs, 5).values())

    def _random(self, shape, mode):
        dtype = 'float16' if mode == 'float16' else 'float32'
        # Zeros would be faster than real data.
        return self.cupy.random.standard_normal(shape, numpy.float32).astype(dtype)

    def description(self) -> dict:
        properties = self.cupy.cuda.runtime.getDeviceProperties(0)
        kinds = {
            'multiProcessorCount': 'multiprocessors',
            'l2CacheSize': 'L2 bytes',
            'totalGlobalMem': 'bytes',
        }
        return {
            'device': properties['name'].decode(),
            'architecture': f'sm_{properties["major"]}{properties["minor"]}',
            **{name: properties.get(key) for key, name in kinds.items()},
            'driver': self.cupy.cuda.runtime.driverGetVersion(),
            'CUDA of CuPy': self.cupy.cuda.runtime.runtimeGetVersion(),
        }


def medians(device, runs: dict, rounds: int) -> dict:
    """Median milliseconds of each run, all taken in turn."""
    counts = {}
    for name, run in runs.items():
        for _ in range(2):
            run()
        ms = device.time(run)
        counts[name] = max(1, min(MOST_RUNS, math.ceil(LEAST_MS / max(ms, 1e-3))))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(device.time(run, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def host_us(device, run, rounds: int = 20) -> float:
    """Microseconds that the host takes to launch a run."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(3):  # few, so that the queue is never full
            run()
        times.append((time.perf_counter() - start) / 3)
    device.synchronize()
    return 1e6 * statistics.median(times)


def floors_ms(device, shape: tuple, mode: str, backward: bool) -> dict:
    """What no run can be faster than, from measured rates.

    ``arguments``: each argument and result read or written once. ``columns``: these
    written once and read once by each product. ``arithmetic``: at the rate of a large
    product. ``product``: the products of this very size.
    """
    n, c, out_c, h, w = shape
    flops = 2 * out_c * TAPS * c * n * h * w
    item = 2 if mode == 'float16' else 4
    numbers = n * h * w * (c + 2 * TAPS + out_c) + out_c * TAPS * c
    columns = n * h * w * TAPS * c
    # Backward: columns and their gradients, each written and read once.
    copies = 2
    if backward:
        flops, numbers, copies = 3 * flops, 3 * numbers, 6
    return {
        'arithmetic': 1e3 * flops / device.rate(mode),
        'arguments': 1e3 * numbers * item / device.rate('copy'),
        'columns': 1e3 * copies * columns * item / device.rate('copy'),
        'product': device.product_ms(shape, mode, backward),
    }


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def versions() -> dict:
    """Those of what is installed, or why it cannot be imported."""
    import importlib

    found = {'python': platform.python_version()}
    # This package comes first, as it repairs Chainer.
    names = 'chainer_deform', 'chainer', 'numpy', 'scipy', 'cupy', 'torch'
    for name in (*names, 'torchvision', 'pytest'):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as error:
            found[name] = f'missing: {first_line(error)}'
    return found


def compare(cases: dict, repeat: int, out) -> None:
    """Times all contestants on all cases; writes after each row, a picture at last."""
    try:
        device = Gpu()
    except NoDevice as error:
        sys.exit(str(error))
    report = {
        'date': datetime.date.today().isoformat(),
        **device.description(),
        'versions': versions(),
        'missing': device.missing,
        'unit': 'ms, median',
        'rows': [],
    }
    for name, shape in cases.items():
        for mode in MODES:
            for row in measure(device, name, shape, mode, repeat):
                report['rows'].append(row)
                print_row(row, header=len(report['rows']) == 1)
                save(out, report)
    report['host_us'] = host_share(device)
    print('host, us a call:', report['host_us'])
    save(out, report)
    import report as reporting

    reporting.save(out, report, picture(report))


def save(path, report: dict) -> None:
    """Writes the report beside, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + '.part')
    scratch.write_text(json.dumps(report, indent=1) + '\n')
    scratch.replace(path.with_name(path.name + '.json'))


def all_makers(device) -> dict:
    """Those of the device, and Chainer's own functions."""
    import chainer.functions as F

    return {
        **device.makers(),
        CHAINER: lambda arrays: chainer_contestant(
            device, arrays, F.deformable_convolution_2d_sampler
        ),
        PLAIN: lambda arrays: chainer_contestant(
            device, arrays, F.convolution_2d, with_offset=False
        ),
    }


def measure(device, name: str, shape: tuple, mode: str, repeat: int):
    """A row a pass: times and memory of those that agree, reasons for the others."""
    arrays = arrays_of(shape, mode)
    expected, against = expected_results(device, shape, mode)
    contestants, reasons, errors = {}, {}, {}
    with device.mode(mode):
        for contestant, make in all_makers(device).items():
            try:
                made = make(arrays)
                found = made.read(made.run(True))
            except Exception as error:
                reasons[contestant] = first_line(error)
                continue
            if contestant != PLAIN:
                errors[contestant] = relative_errors(expected, found)
                worst = max(errors[contestant].values())
                if worst > TOLERANCES[mode] and contestant != TORCHVISION:
                    reasons[contestant] = f'wrong by {worst:.0e}'
                    continue
            contestants[contestant] = made
        for pass_, backward in PASSES.items():
            runs = {
                contestant: functools.partial(made.run, backward)
                for contestant, made in contestants.items()
            }
            memory = {key: device.memory(run, key) for key, run in runs.items()}
            times = medians(device, runs, repeat)
            ours = times.get(OURS)
            yield {
                **{'case': name, 'shape': shape, 'mode': mode, 'pass': pass_},
                **{'ms': times, 'peak_mib': memory, 'reasons': reasons},
                'errors': errors,
                'against': against,
                'ratio to ours': {key: ours and ms / ours for key, ms in times.items()},
                'floors_ms': floors_ms(device, shape, mode, backward),
            }


def host_share(device) -> dict:
    """Microseconds of the host a call, on a case that takes the GPU no time."""
    shares = {}
    arrays = arrays_of(TINY, 'float32')
    for name, make in all_makers(device).items():
        with contextlib.suppress(Exception):  # its rows have the reason
            made = make(arrays)
            for pass_, backward in PASSES.items():
                run = functools.partial(made.run, backward)
                shares[f'{name}, {pass_}'] = round(host_us(device, run))
    return shares


def print_row(row: dict, header: bool) -> None:
    if header:
        print(f'{"":38} ms, x ours, MiB of each contestant; floor')
    label = f'{row["case"]}, {row["mode"]}, {row["pass"]}'
    cells = [
        f'{name} {ms:.2f} {row["ratio to ours"][name] or math.nan:.1f} '
        f'{row["peak_mib"][name]:.0f}'
        for name, ms in row['ms'].items()
    ]
    cells += [f'{name}: {reason}' for name, reason in row['reasons'].items()]
    floor = max(row['floors_ms'][name] for name in ('arithmetic', 'arguments'))
    print(f'{label:38} {"; ".join(cells)}; floor {floor:.3f}', flush=True)


def picture(report: dict):
    from matplotlib.figure import Figure

    rows = report['rows']
    names = list(dict.fromkeys(name for row in rows for name in row['ms']))
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.barh(
            [row + i * height for row in range(len(rows))],
            [row['ratio to ours'].get(name) or 0 for row in rows],
            height,
            label=name,
        )
    axes.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(rows))],
        [f'{row["case"]}, {row["mode"]}\n{row["pass"]}' for row in rows],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xscale('log')
    axes.set_xlabel('time, as a multiple of chainer_deform (longer is slower)')
    axes.set_title(f'{report["device"]}, {report["date"]}')
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure
