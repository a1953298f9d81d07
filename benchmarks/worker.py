"""One contestant in a process of its own, which ``run.py`` starts and questions.

It reads a JSON object from each line of its input, the name and the arguments of a
command, and answers with one on a line of its output. It runs under any Python that has
NumPy and the contestant's own library.

A contestant's ``make(arrays, options, backward)`` returns a run of a convolution, a
function that returns results by name; ``make_operator`` one of another operator.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time

import numpy


class ChainerDeform:
    """This package, with Numba where it is importable."""

    interleaved = False
    libraries = ('chainer_deform', 'chainer', 'numpy', 'scipy', 'numba')

    def __init__(self, threads: int) -> None:
        import chainer_deform

        self.function = chainer_deform.functions.deformable_convolution_2d_sampler

    def make(self, arrays: dict, options: dict, backward: bool):
        return convolution_run(self.function, arrays, backward, **options)

    def make_operator(self, operator: str, arrays: dict, options: dict, backward: bool):
        import chainer_deform

        function = getattr(chainer_deform.functions, operator)
        return chainer_run(function, arrays, backward, **options)

    def second_order(self, arrays: dict, options: dict) -> dict:
        """CPU seconds of all first gradients, and of the gradients of all these."""
        import chainer

        options = {'pad': arrays['W'].shape[2] // 2, **options}
        inputs = {name: chainer.Variable(array) for name, array in arrays.items()}
        gy = inputs.pop('gy')
        y = self.function(**inputs, **options)
        inputs = list(inputs.values())
        gradients = []

        def first():
            gradients[:] = chainer.grad([y], inputs, [gy], enable_double_backprop=True)

        def second():
            chainer.grad(gradients, [gy, *inputs], inputs)

        seconds = [
            [stopwatch(run, 0.02)['cpu'] for run in (first, second)] for _ in range(5)
        ]
        first, second = (statistics.median(times) for times in zip(*seconds))
        return {'first': first, 'second': second}


class ChainerDeformWithoutNumba(ChainerDeform):
    libraries = ChainerDeform.libraries[:-1]

    def __init__(self, threads: int) -> None:
        if importlib.util.find_spec('numba') is None:
            raise ImportError('no Numba, so chainer_deform itself runs without it')
        os.environ['CHAINER_DEFORM_NUMBA'] = '0'
        super().__init__(threads)


class ChainersOwn:
    interleaved = False
    libraries = ('chainer', 'numpy')

    def __init__(self, threads: int) -> None:
        import chainer_deform  # noqa: F401  (repairs Chainer)
        import chainer.functions as F  # isort: skip

        self.function = F.deformable_convolution_2d_sampler

    def make(self, arrays, options, backward):
        if 'mask' in arrays:
            raise NotImplementedError('has no mask')
        if options['groups'] > 1 or options['offset_groups'] > 1:
            raise NotImplementedError('has no groups')
        return convolution_run(self.function, arrays, backward)


class Convolution:
    """Chainer's ordinary convolution: what the offsets cost."""

    interleaved = False
    libraries = ('chainer', 'numpy')

    def __init__(self, threads: int) -> None:
        import chainer_deform  # noqa: F401  (repairs Chainer)
        import chainer.functions as F  # isort: skip

        self.function = F.convolution_2d

    def make(self, arrays, options, backward):
        arrays = {name: arrays[name] for name in ('x', 'W', 'b', 'gy')}
        groups = options['groups']
        return convolution_run(self.function, arrays, backward, groups=groups)


class MatrixProduct:
    """The floor: filter times columns and, backward, both gradients of that."""

    interleaved = False
    libraries = ('numpy',)

    def __init__(self, threads: int) -> None:
        pass

    def make(self, arrays, options, backward):
        groups = options['groups']
        n, c, h, w = arrays['x'].shape
        # (G, oCg, iCg * taps), (G, iCg * taps, points), (G, oCg, points)
        filters = arrays['W'].reshape(groups, len(arrays['W']) // groups, -1)
        if 'columns' not in arrays:  # given, as the arrays are
            shape = groups, filters.shape[2], n * h * w
            columns = numpy.random.RandomState(0).standard_normal(shape)
            arrays['columns'] = columns.astype('float32')
        columns = arrays['columns']
        gy = arrays['gy'].reshape(groups, filters.shape[1], -1)

        def run():
            results = {'y': filters @ columns}
            if backward:
                results['gW'] = gy @ columns.swapaxes(1, 2)
                results['gcolumns'] = filters.swapaxes(1, 2) @ gy
            return results

        return run


class Torchvision:
    interleaved = True
    libraries = ('torch', 'torchvision', 'numpy')

    def __init__(self, threads: int) -> None:
        import torch
        import torchvision

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self.from_numpy = torch.from_numpy
        self.function = torchvision.ops.deform_conv2d

    def make(self, arrays, options, backward):
        # The numbers of groups follow from the shapes.
        pad = arrays['W'].shape[2] // 2

        def convolve(x, offset, W, b, mask=None):
            return self.function(x, offset, W, b, padding=pad, mask=mask)

        return self._run(convolve, arrays, backward)

    def make_operator(self, operator, arrays, options, backward):
        import torch_operators

        function = getattr(torch_operators, operator)
        return self._run(functools.partial(function, **options), arrays, backward)

    def _run(self, function, arrays, backward):
        tensors = {name: self.from_numpy(array) for name, array in arrays.items()}
        gy = tensors.pop('gy')
        constants = {name: tensors.pop(name) for name in CONSTANTS if name in tensors}

        def run():
            inputs = {
                name: tensor.detach().requires_grad_(backward)
                for name, tensor in tensors.items()
            }
            y = function(**inputs, **constants)
            results = {'y': y.detach()}
            if backward:
                y.backward(gy)
                gradients = ((f'g{name}', v.grad) for name, v in inputs.items())
                results.update(pair for pair in gradients if pair[1] is not None)
            return results

        return run


class Onnxruntime:
    interleaved = True
    libraries = ('onnxruntime', 'onnx', 'numpy')

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.onnxruntime, self.threads = onnx, onnxruntime, threads

    def make(self, arrays, options, backward):
        if backward:
            raise NotImplementedError('has no backward pass')
        helper = self.onnx.helper
        inputs = {name: arrays[name] for name in ('x', 'offset')}
        if 'mask' in arrays:
            inputs['mask'] = arrays['mask']
        float32 = self.onnx.TensorProto.FLOAT
        pad = arrays['W'].shape[2] // 2
        node = helper.make_node(
            'DeformConv',
            ['x', 'W', 'offset', 'b', *(['mask'] if 'mask' in arrays else [])],
            ['y'],
            group=options['groups'],
            offset_group=options['offset_groups'],
            pads=[pad] * 4,
        )
        graph = helper.make_graph(
            [node],
            'graph',
            [
                helper.make_tensor_value_info(name, float32, array.shape)
                for name, array in inputs.items()
            ],
            [helper.make_tensor_value_info('y', float32, arrays['gy'].shape)],
            [
                self.onnx.numpy_helper.from_array(arrays[name], name)
                for name in ('W', 'b')
            ],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid('', 19)], ir_version=9
        )
        settings = self.onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.threads
        settings.inter_op_num_threads = 1
        settings.add_session_config_entry('session.intra_op.allow_spinning', '0')
        settings.add_session_config_entry('session.inter_op.allow_spinning', '0')
        session = self.onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=['CPUExecutionProvider']
        )
        return lambda: {'y': session.run(None, inputs)[0]}


class OpenVino:
    interleaved = True
    libraries = ('openvino', 'numpy')

    def __init__(self, threads: int) -> None:
        import openvino
        import openvino.opset1
        import openvino.opset8

        self.openvino, self.threads = openvino, threads

    def make(self, arrays, options, backward):
        if backward:
            raise NotImplementedError('has no backward pass')
        opset = self.openvino.opset8
        n, _, h, w = arrays['x'].shape
        taps = arrays['W'].shape[2] * arrays['W'].shape[3]
        pad = [arrays['W'].shape[2] // 2] * 2
        if 'mask' not in arrays:
            shape = n, options['offset_groups'] * taps, h, w
            arrays['mask'] = numpy.ones(shape, 'float32')
        inputs = [arrays[name] for name in ('x', 'offset', 'mask')]
        x, offset, mask = (opset.parameter(a.shape, numpy.float32) for a in inputs)
        y = opset.deformable_convolution(
            x,
            offset,
            opset.constant(arrays['W']),
            [1, 1],
            pad,
            pad,
            [1, 1],
            mask,
            group=options['groups'],
            deformable_group=options['offset_groups'],
            bilinear_interpolation_pad=True,
        )
        y = opset.add(y, opset.constant(arrays['b'].reshape(1, -1, 1, 1)))
        return self._run(y, [x, offset, mask], inputs)

    def make_operator(self, operator, arrays, options, backward):
        if backward:
            raise NotImplementedError('has no backward pass')
        opset = self.openvino.opset1
        # (R, 5): the image, then x before y
        boxes = arrays['roi_indices'][:, None], arrays['rois'][:, [1, 0, 3, 2]]
        boxes = numpy.concatenate(boxes, 1).astype('float32')
        inputs = [arrays['x'], boxes, arrays['offset']]
        nodes = [opset.parameter(a.shape, numpy.float32) for a in inputs]
        y = opset.deformable_psroi_pooling(
            *nodes[:2],
            output_dim=arrays['gy'].shape[1],
            spatial_scale=options['spatial_scale'],
            group_size=options['group_size'],
            spatial_bins_x=options['sampling_ratio'],
            spatial_bins_y=options['sampling_ratio'],
            trans_std=options['gamma'],
            part_size=options['outsize'],
            offsets=nodes[2],
        )
        return self._run(y, nodes, inputs)

    def _run(self, y, nodes, inputs):
        compiled = self.openvino.Core().compile_model(
            self.openvino.Model([y], nodes),
            'CPU',
            {
                'INFERENCE_NUM_THREADS': self.threads,
                'INFERENCE_PRECISION_HINT': 'f32',
                'NUM_STREAMS': 1,
                'ENABLE_CPU_PINNING': False,
            },
        )
        return lambda: {'y': compiled(inputs, share_inputs=True, share_outputs=True)[0]}


CONTESTANTS = {
    'chainer_deform': ChainerDeform,
    'chainer_deform, no Numba': ChainerDeformWithoutNumba,
    "Chainer's own": ChainersOwn,
    'torchvision': Torchvision,
    'onnxruntime': Onnxruntime,
    'OpenVINO': OpenVino,
    'F.convolution_2d': Convolution,
    'matrix product': MatrixProduct,
}


#: Arguments without a gradient.
CONSTANTS = 'rois', 'roi_indices'


def convolution_run(function, arrays, backward, **options):
    pad = arrays['W'].shape[2] // 2
    return chainer_run(function, arrays, backward, pad=pad, **options)


def chainer_run(function, arrays, backward, **options):
    """A run of a function of Chainer's kind."""
    import chainer

    arrays = dict(arrays)
    gy = arrays.pop('gy')
    constants = {name: arrays.pop(name) for name in CONSTANTS if name in arrays}

    def run():
        inputs = {
            name: chainer.Variable(array, requires_grad=backward)
            for name, array in arrays.items()
        }
        y = function(**inputs, **constants, **options)
        results = {'y': y.array}
        if backward:
            y.grad = gy
            y.backward()
            results.update((f'g{name}', v.grad) for name, v in inputs.items())
        return results

    return run


def interleave(offset, offset_groups: int):
    """From all x, then all y in each group to pairs of y and x."""
    n, channels, h, w = offset.shape
    offset = offset.reshape(n, offset_groups, 2, -1, h, w)[:, :, ::-1].swapaxes(2, 3)
    return numpy.ascontiguousarray(offset).reshape(n, channels, h, w)


def separate(offset, offset_groups: int):
    """What :func:`interleave` did, undone."""
    n, channels, h, w = offset.shape
    offset = offset.reshape(n, offset_groups, -1, 2, h, w).swapaxes(2, 3)[:, :, ::-1]
    return numpy.ascontiguousarray(offset).reshape(n, channels, h, w)


class Commands:
    """What the parent may ask for, one method per command."""

    def start(self, name: str, threads: int) -> dict:
        """Imports all; returns the versions of it."""
        self.contestant = CONTESTANTS[name](threads)
        found = {'python': platform.python_version()}
        for name in self.contestant.libraries:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = getattr(sys.modules.get(name), '__version__', None)
                found[name] = version or importlib.metadata.version(name)
        return found

    def blas(self) -> dict:
        """The libraries with threads of this process, after a product."""
        square = numpy.ones((256, 256), 'float32')
        numpy.matmul(square, square)
        return {'libraries': libraries()}

    def load(
        self, arrays: str, options: dict, backward: bool, operator: str | None
    ) -> None:
        """Prepares to run on the arrays of a file; no operator is the convolution."""
        self.arguments = None
        self.run = None
        with numpy.load(arrays) as archive:
            arrays = dict(archive)
        self.interleaved = self.contestant.interleaved and operator is None
        if self.interleaved:
            arrays['offset'] = interleave(arrays['offset'], options['offset_groups'])
        self.arguments = arrays, options, backward
        self.make = self.contestant.make
        if operator is not None:
            self.make = functools.partial(self.contestant.make_operator, operator)
        self.run = self.make(*self.arguments)

    def results(self, path: str) -> None:
        """Runs, and writes ``y`` and the gradients to a file."""
        results = {name: numpy.asarray(array) for name, array in self.run().items()}
        if self.interleaved and 'goffset' in results:
            groups = self.arguments[1]['offset_groups']
            results['goffset'] = separate(results['goffset'], groups)
        numpy.savez(path, **results)

    def time(self, pause: float) -> dict:
        """Seconds of a run, on the clock and of all cores.

        After :data:`WARM_UP` seconds that are not counted; the mean of so many that
        they and the pauses take 20 ms.
        """
        return stopwatch(self.run, 0.02, pause)

    def first(self) -> dict:
        """Seconds of the first run."""
        return stopwatch(self.run)

    def second_order(self) -> dict:
        """Seconds of all first gradients, and of the gradients of all these."""
        return self.contestant.second_order(*self.arguments[:2])

    def memory(self) -> dict:
        """Bytes by which a run makes the process grow, and bytes of its results.

        What a contestant sets aside before its first run, for use in all, is included.
        The median of five: what was free before, but not given back, is missing in one,
        and what one frees late is too much in the next.
        """
        peaks = []
        try:
            for _ in range(5):
                self.run = None
                trim()
                before = resident('VmRSS:')
                self.run = self.make(*self.arguments)
                trim()
                with open('/proc/self/clear_refs', 'w') as file:
                    file.write('5')  # the peak starts anew
                results = self.run()
                peaks.append(resident('VmHWM:') - before)
                size = sum(numpy.asarray(array).nbytes for array in results.values())
                del results
        except OSError:  # not on Linux
            return {'peak': None}
        return {'peak': statistics.median(peaks), 'results': size}


def libraries() -> list[dict]:
    """BLAS and OpenMP of this process, as threadpoolctl tells.

    Without threadpoolctl, the files of its BLAS.
    """
    try:
        import threadpoolctl
    except ImportError:
        return [{'library': name} for name in mapped_blas()]
    pools = sorted(threadpoolctl.threadpool_info(), key=lambda pool: pool['filepath'])
    return [
        {
            'library': os.path.basename(pool['filepath']),
            'api': pool['internal_api'],
            'version': pool['version'],
            'architecture': pool.get('architecture'),
            'threads': pool['num_threads'],
        }
        for pool in pools
    ]


def mapped_blas() -> list[str]:
    """Names of the files of a BLAS that this process has mapped."""
    try:
        with open('/proc/self/maps') as maps:
            names = {os.path.basename(line.split()[-1]) for line in maps}
    except OSError:  # not on Linux
        return []
    return sorted(filter(re.compile('lib.*(blas|mkl)').match, names))


#: Seconds of runs that are not counted. After 0.2 s of idleness, as while the others
#: are measured, Linux was seen to keep two threads on one core for 50 ms.
WARM_UP = 0.1


def stopwatch(run, least: float = 0, pause: float = 0) -> dict:
    """Seconds of a run, or the mean of so many, after another, that take ``least``.

    With ``least`` there is a warm-up before. ``pause`` seconds of idleness come before
    each run, and count for both.
    """
    count = 1
    if least:
        start, runs, seconds = time.perf_counter(), 0, 0
        while seconds < WARM_UP:
            time.sleep(pause)
            run()
            runs += 1
            seconds = time.perf_counter() - start
        count = max(1, math.ceil(least / (seconds / runs)))
    wall = cpu = 0
    for _ in range(count):
        if pause:
            time.sleep(pause)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        run()
        cpu += time.process_time() - cpu_start
        wall += time.perf_counter() - wall_start
    return {'wall': wall / count, 'cpu': cpu / count}


def trim() -> None:
    """Gives free memory back to the system, where that can be done."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) << 10 for line in status if field in line)


def main() -> None:
    # Replies have a way of their own: a library that prints does not disturb them.
    replies = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

    commands = Commands()
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            reply = getattr(commands, arguments.pop('command'))(**arguments) or {}
        except NotImplementedError as error:
            reply = {'error': str(error)}
        except Exception as error:
            reply = {'error': f'{type(error).__name__}: {error}'}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == '__main__':
    main()
