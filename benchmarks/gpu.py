"""The GPU part of the benchmark: the contestants interleaved in one process."""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
import sys
import time

import chainer_deform  # first, as it repairs Chainer

import chainer  # isort: skip
import chainer.functions as F
import numpy
import report as reporting
import scipy
from matplotlib.figure import Figure

# Name: n, c, out_c, h, w. The kernel is 3 x 3, stride and pad are 1.
CASES = {
    'A': (2, 256, 256, 56, 56),
    'B': (8, 512, 512, 28, 28),
    'C': (1, 256, 256, 200, 336),
    'D': (16, 64, 64, 112, 112),
}
TINY = (1, 8, 8, 8, 8)
MODES = 'float32', 'tf32', 'float16'
PASSES = 'forward', 'forward + backward'
OURS = 'chainer_deform'


def compare(cases: dict, repeat: int, out) -> None:
    device = Gpu()
    rows = []
    for name, shape in cases.items():
        for mode in MODES:
            for pass_ in PASSES:
                row = {'case': name, 'shape': shape, 'mode': mode, 'pass': pass_}
                row.update(measure(device, shape, mode, pass_, repeat))
                rows.append(row)
                print_row(row, header=len(rows) == 1)
    report = {
        'date': datetime.date.today().isoformat(),
        **device.description(),
        'versions': versions(),
        'unit': 'ms, median',
        'rows': rows,
        'host_us': host_share(device),
    }
    print('host, us a call:', report['host_us'])
    reporting.save(out, report, picture(report))


def measure(device, shape, mode, pass_, repeat) -> dict:
    """Medians of all contestants, taken in turn, and the most memory each one took."""
    arrays = random_arrays(shape, 'float16' if mode == 'float16' else 'float32')
    backward = pass_ == PASSES[1]
    with device.mode(mode):
        runs = {
            name: make(arrays, backward) for name, make in device.contestants().items()
        }
        memory = {name: device.memory(run, name) for name, run in runs.items()}
        times = {name: [] for name in runs}
        for _ in range(repeat):
            for name, run in runs.items():
                times[name].append(device.time(run))
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {
            'ms': medians,
            'ratio to ours': {
                name: value / medians[OURS] for name, value in medians.items()
            },
            'peak_mib': memory,
            'floor_ms': device.floor(shape, mode, backward),
        }


def random_arrays(shape, dtype) -> dict:
    n, c, out_c, h, w = shape
    random = numpy.random.RandomState(0)
    shapes = {
        'x': (n, c, h, w),
        'offset': (n, 18, h, w),
        'W': (out_c, c, 3, 3),
        'b': (out_c,),
        'gy': (n, out_c, h, w),
    }
    scales = {'W': (9 * c) ** -0.5, 'offset': 2.0}
    return {
        name: (random.standard_normal(shape) * scales.get(name, 1)).astype(dtype)
        for name, shape in shapes.items()
    }


def chainer_contestant(function, device, with_offset=True):
    """A function of Chainer's kind as a contestant."""

    def make(arrays, backward):
        arrays = {name: device.send(array) for name, array in arrays.items()}
        gy = arrays.pop('gy')
        if not with_offset:
            del arrays['offset']

        def run():
            variables = [
                chainer.Variable(array, requires_grad=backward)
                for array in arrays.values()
            ]
            y = function(*variables, 1, 1)
            if backward:
                y.grad = gy
                y.backward()

        return run

    return make


def chainer_contestants(device) -> dict:
    return {
        OURS: chainer_contestant(
            chainer_deform.functions.deformable_convolution_2d_sampler, device
        ),
        "Chainer's own": chainer_contestant(
            F.deformable_convolution_2d_sampler, device
        ),
        'plain convolution': chainer_contestant(F.convolution_2d, device, False),
    }


class Gpu:
    """A GPU, with the rates that its floor is computed from measured on the spot."""

    def __init__(self) -> None:
        try:
            import cupy

            cupy.cuda.runtime.getDeviceCount()
            self.cupy = cupy
        except Exception as error:
            sys.exit(f'no GPU to measure on: {str(error).splitlines()[0]}')
        try:
            import torch
            import torchvision

            self.torch, self.deform_conv2d = torch, torchvision.ops.deform_conv2d
        except ImportError:
            self.torch = None
        self.rates = {}

    def contestants(self) -> dict:
        contestants = chainer_contestants(self)
        if self.torch is not None:
            contestants['torchvision'] = self.torchvision
        return contestants

    def torchvision(self, arrays, backward):
        torch = self.torch
        tensors = {
            name: torch.from_numpy(array).cuda() for name, array in arrays.items()
        }
        # From all x, then all y, to y and x in pairs.
        order = [k + 9 * axis for k in range(9) for axis in (1, 0)]
        tensors['offset'] = tensors['offset'][:, order].contiguous()
        gy = tensors.pop('gy')
        for tensor in tensors.values():
            tensor.requires_grad_(backward)

        def run():
            y = self.deform_conv2d(
                tensors['x'], tensors['offset'], tensors['W'], tensors['b'], padding=1
            )
            if backward:
                y.backward(gy)
                for tensor in tensors.values():
                    tensor.grad = None  # as Chainer's variables are gone by then

        return run

    def send(self, array):
        return self.cupy.asarray(array)

    @contextlib.contextmanager
    def mode(self, mode):
        from cupy._core import _routines_linalg as linalg

        before = linalg.get_compute_type(numpy.float32)
        tf32 = mode == 'tf32'
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

    def time(self, run) -> float:
        start, end = (self.cupy.cuda.Event() for _ in range(2))
        for _ in range(2):
            run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end)

    def memory(self, run, name) -> float:
        run()  # kernels are compiled, handles made
        pool = self.cupy.get_default_memory_pool()
        if name == 'torchvision':
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()
            before = self.torch.cuda.memory_reserved()
            self.torch.cuda.reset_peak_memory_stats()
            run()
            return (self.torch.cuda.max_memory_reserved() - before) / 2**20
        self.cupy.cuda.Device().synchronize()
        pool.free_all_blocks()
        before = pool.total_bytes()
        run()
        return (pool.total_bytes() - before) / 2**20

    def floor(self, shape, mode, backward) -> float:
        """The larger of the arithmetic and of reading and writing each array once."""
        n, c, out_c, h, w = shape
        flops = 2 * out_c * 9 * c * n * h * w
        item = 2 if mode == 'float16' else 4
        numbers = n * h * w * (c + 18 + out_c) + out_c * 9 * c
        if backward:  # three times the product; and all arrays' gradients
            flops, numbers = 3 * flops, 3 * numbers
        return 1e3 * max(flops / self.rate(mode), numbers * item / self.rate('copy'))

    def rate(self, what) -> float:
        """Operations a second of a large product, or bytes a second of a large copy."""
        if what not in self.rates:
            cupy = self.cupy
            if what == 'copy':
                source = cupy.ones(1 << 29, numpy.float32)
                target = cupy.empty_like(source)
                amount = 2 * source.nbytes
                run = lambda: cupy.copyto(target, source)  # noqa: E731
            else:
                size = 8192
                dtype = 'float16' if what == 'float16' else 'float32'
                a, b = (
                    cupy.random.standard_normal((size, size), numpy.float32).astype(
                        dtype
                    )
                    for _ in range(2)
                )
                amount = 2 * size**3
                run = lambda: cupy.dot(a, b)  # noqa: E731
            self.rates[what] = amount / (
                1e-3 * statistics.median(self.time(run) for _ in range(5))
            )
        return self.rates[what]

    def description(self) -> dict:
        properties = self.cupy.cuda.runtime.getDeviceProperties(0)
        return {
            'device': properties['name'].decode(),
            'rates': {name: f'{rate:.3g}/s' for name, rate in self.rates.items()},
        }


def host_share(device) -> dict:
    """Microseconds of the host a call, on a case that takes the GPU no time."""
    shares = {}
    arrays = random_arrays(TINY, 'float32')
    for pass_, backward in zip(PASSES, (False, True)):
        for name, make in device.contestants().items():
            run = make(arrays, backward)
            for _ in range(20):
                run()
            times = []
            for _ in range(200):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            device.cupy.cuda.Device().synchronize()
            shares[f'{name}, {pass_}'] = round(1e6 * statistics.median(times))
    return shares


def print_row(row, header) -> None:
    names = list(row['ms'])
    if header:
        print(f'{"":38}', *(f'{name:>18}' for name in names), f'{"floor":>10}')
        print(f'{"":38}', *(f'{"ms    x ours   MiB":>18}' for _ in names))
    label = f'{row["case"]}, {row["mode"]}, {row["pass"]}'
    cells = (
        f'{row["ms"][name]:7.2f} {row["ratio to ours"][name]:5.1f} '
        f'{row["peak_mib"][name]:5.0f}'
        for name in names
    )
    floor = row['floor_ms']
    print(
        f'{label:38}',
        *(f'{cell:>18}' for cell in cells),
        '' if floor is None else f'{floor:10.3f}',
        flush=True,
    )


def versions() -> dict:
    names = {'chainer': chainer, 'numpy': numpy, 'scipy': scipy}
    for name in 'cupy', 'torch', 'torchvision':
        if name in sys.modules:
            names[name] = sys.modules[name]
    found = {name: module.__version__ for name, module in names.items()}
    return {
        'python': platform.python_version(),
        'chainer_deform': chainer_deform.__version__,
        **found,
    }


def picture(report: dict) -> Figure:
    rows = report['rows']
    names = list(rows[0]['ms'])
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.barh(
            [row + i * height for row in range(len(rows))],
            [row['ratio to ours'][name] for row in rows],
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
