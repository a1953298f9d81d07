"""Times deformable operators against their peers, and how one grows with its input.

``python benchmarks/run.py`` compares on the CPU, each contestant in a process of its
own; ``--growth`` takes growing images and batches; ``--device gpu`` compares on a GPU.
Each prints a table, and writes the same as JSON and a picture into
``benchmarks/results/``.

On the CPU each BLAS chooses its own code: the contestants' processes do not get the
variables ``BLAS_OVERRIDES``. The report has what threadpoolctl says of each process.
"""

from __future__ import annotations

import os

for _name in 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS':
    os.environ.setdefault(_name, '1')

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy
import operators
import reference
import report as reporting

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / 'results'
sys.path.insert(1, str(ROOT))  # the package need not be installed


class Case(NamedTuple):
    """A convolution; stride is 1, and the padding keeps the image's size."""

    operator = peer = None  # all contestants take part

    n: int
    c: int
    out_c: int
    size: int
    k: int = 3
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False

    @property
    def options(self) -> dict:
        return {'groups': self.groups, 'offset_groups': self.offset_groups}

    def random_arrays(self) -> dict:
        return random_arrays(self)


CASES = {
    '1x64x64x56': Case(1, 64, 64, 56),
    '2x256x256x28': Case(2, 256, 256, 28),
    '8x16x32x32': Case(8, 16, 32, 32),
    '1x512x512x14': Case(1, 512, 512, 14),
    '1x256x256x100': Case(1, 256, 256, 100),
    'modulated': Case(2, 64, 64, 56, offset_groups=4, mask=True),
    'depthwise': Case(2, 128, 128, 56, groups=128),
    **operators.CASES,
}
QUICK_CASES = {'tiny': Case(1, 8, 8, 12), **operators.QUICK_CASES}
# Name: whether gradients are computed, too.
PASSES = {'forward': False, 'forward + backward': True}

OURS = 'chainer_deform'
OURS_WITHOUT_NUMBA = 'chainer_deform, no Numba'
CONTESTANTS = (
    OURS,
    OURS_WITHOUT_NUMBA,
    "Chainer's own",
    'torchvision',
    'onnxruntime',
    'OpenVINO',
    'F.convolution_2d',
    'matrix product',
)
# Other operations, shown beside: they have nothing to agree with.
EXEMPT = 'F.convolution_2d', 'matrix product'
TOLERANCE = 1e-4

# They replace what OpenBLAS detects: its code for the CPU and the size of a cache. The
# process that computes the expected results keeps them: it is not timed, and an old
# BLAS may need them to compute correctly.
BLAS_OVERRIDES = 'OPENBLAS_CORETYPE', 'OPENBLAS_L2_SIZE'
CONDITIONS = (
    'Each contestant has a process of its own, without '
    f'{" and ".join(BLAS_OVERRIDES)} in its environment, so its BLAS chooses the code '
    'for the CPU. blas is what threadpoolctl says of the process, by contestant and '
    'number of threads; without threadpoolctl it has names of files only. A contestant '
    'with wrong results, or whose process dies, gets no time, but a reason. '
)
NOTES = CONDITIONS + (
    'Times are medians of runs taken in turn, each after one that is not counted, and '
    'where it is short the mean of several. Each timed run follows pause_s seconds of '
    'idleness. '
    'peak_mib is by how much a run makes the resident memory of its process grow, with '
    'its results and with what the contestant sets aside for all runs on the case; '
    'beside_mib is without the results. error is the largest, relative to the largest '
    'number expected. The matrix product is that of NumPy and its BLAS, on all columns '
    'at once: a contestant with a matrix product of its own may be faster. '
    'Operators beside the convolution have a peer, and are compared with its results, '
    'as far as it has them. In the process of torchvision, DCNv3 and attention are '
    'compositions of grid_sample, and RoI align has each bin as a box, for which there '
    'is no gradient; this package computes that, too.'
)

# What layers of 14 x 14 often have. With fewer, what Chainer takes and what is done
# once for the filter weigh more there: 1.5 times the least with 128.
CHANNELS = 256
GROWTH = {
    'images': [(1, size) for size in (14, 28, 56, 100, 200, 400)],
    'batches': [(n, 28) for n in (1, 2, 4, 8, 16, 32, 64)],
}
QUICK_GROWTH = {'images': [(1, 7), (1, 14)], 'batches': [(1, 7), (2, 7)]}


def main() -> None:
    args = parse_args()
    if args.device == 'gpu':
        import gpu

        cases = {name: gpu.CASES[name] for name in args.case or gpu.CASES}
        path = (args.out or RESULTS) / f'{datetime.date.today()}-gpu'
        gpu.compare(cases, args.repeat, path)
        return
    with tempfile.TemporaryDirectory(prefix='chainer_deform_') as folder:
        run = grow if args.growth else compare
        report, figure = run(args, pathlib.Path(folder))
    # What is not the whole is only kept where the user says so.
    if args.out or not (args.quick or args.case):
        name = f'{report["date"]}-cpu{"-growth" if args.growth else ""}'
        name += f'-pause-{args.pause:g}' if args.pause else ''
        reporting.save((args.out or RESULTS) / name, report, figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
    parser.add_argument('--growth', action='store_true', help='time and memory by size')
    parser.add_argument('--case', nargs='+', help='only these cases')
    parser.add_argument('--repeat', type=int, default=9, help='runs of each contestant')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument(
        '--pause',
        type=float,
        default=0,
        metavar='SECONDS',
        help='idleness before each timed run (default: none, a loop)',
    )
    parser.add_argument('--quick', action='store_true', help='a trial of a few seconds')
    parser.add_argument('--out', type=pathlib.Path, help=f'default: {RESULTS}')
    args = parser.parse_args()
    if args.device == 'gpu':
        if args.growth or args.quick or args.pause:
            parser.error('--growth, --quick and --pause are of the CPU')
        import gpu

        known = gpu.CASES
    else:
        known = QUICK_CASES if args.quick else CASES
    if args.case and not set(args.case) <= set(known):
        parser.error(f'--case takes {", ".join(known)}')
    if min(args.repeat, *args.threads) < 1:
        parser.error('--repeat and --threads must be at least 1')
    if not 0 <= args.pause < float('inf'):
        parser.error('--pause must be a number of seconds, 0 or more')
    if args.quick:
        args.threads, args.repeat = [1], 1
    return args


def compare(args, folder: pathlib.Path):
    """All contestants on all cases: the report and its picture."""
    cases = QUICK_CASES if args.quick else CASES
    cases = {name: cases[name] for name in args.case or cases}
    compilation = None
    if not args.quick and importlib.util.find_spec('numba'):
        with contextlib.suppress(Failure):  # start() gives the reason
            compilation = compile_seconds(folder)
            print(f'seconds that Numba adds to a first call: {compilation}')
    with contextlib.ExitStack() as stack:
        workers, probes, found = start(args.threads, folder, stack)
        rows, second_order = [], {}
        for name, case in cases.items():
            arrays = case.random_arrays()
            numpy.savez(folder / 'arrays.npz', **arrays)
            taking_part = {
                key: worker
                for key, worker in workers.items()
                if case.peer is None or key[0] in (OURS, OURS_WITHOUT_NUMBA, case.peer)
            }
            expected = {}
            if case.peer is None:
                expected = reference.deformable_convolution(**arrays, **case.options)
            for pass_, backward in PASSES.items():
                with contextlib.suppress(Failure, KeyError):  # its rows give the reason
                    if case.peer is not None:
                        peer = workers[case.peer, min(args.threads)]
                        peer.load(case, backward)
                        expected.update(peer.results())
                new = []
                for (contestant, threads), worker in taking_part.items():
                    row = {'case': name, 'pass': pass_}
                    row.update(contestant=contestant, threads=threads)
                    new.append(row)
                    wanted = {k: v for k, v in expected.items() if backward or k == 'y'}
                    if contestant in (*EXEMPT, case.peer):
                        wanted = {}
                    elif not wanted:
                        row['reason'] = f'no {case.peer} to agree with'
                        continue
                    probe = probes[contestant, threads]
                    row.update(check(worker, probe, case, backward, wanted))
                take_times(new, taking_part.values(), args.repeat, args.pause)
                add_ratios(new)
                rows += new
                items = (f'{k} {v}' for k, v in case._asdict().items())
                print(f'\n{name}, {pass_} ({", ".join(items)})')
                print(reporting.table(new), flush=True)
                if gains := reporting.thread_gains(new, OURS):
                    print(gains, flush=True)
            if case.operator is not None:
                continue
            with contextlib.suppress(Failure, KeyError):  # its rows give the reason
                ours = workers[OURS, min(args.threads)]
                second_order[name] = ours.ask('second_order')
                ratio = second_order[name]['second'] / second_order[name]['first']
                print(f'{name}: the second order takes {ratio:.1f} times the first')
    report = {
        'date': datetime.date.today().isoformat(),
        'machine': machine(),
        'repeat': args.repeat,
        'pause_s': args.pause,
        **found,
        'contestants': CONTESTANTS,
        'cases': {name: case._asdict() for name, case in cases.items()},
        'notes': NOTES,
        'numba_compile_s': compilation,
        'second_order_cpu_s': second_order,
        'rows': rows,
    }
    return report, reporting.picture(report)


def start(threads: list[int], folder: pathlib.Path, stack: contextlib.ExitStack):
    """Workers and memory probes by name and threads, and what the report says of them.

    That is by name: versions, the BLAS by number of threads, and the reason why a
    contestant is missing.
    """
    print(f'starting {len(CONTESTANTS)} contestants', flush=True)
    workers, probes = {}, {}
    for key in itertools.product(CONTESTANTS, threads):
        workers[key] = probes[key] = stack.enter_context(Worker(*key, folder))
        # Threads have arenas of their own, which keep what is freed: no measure of what
        # a run takes. With a single arena runs would be slower.
        if key[1] > 1:
            probe = Worker(*key, folder, MALLOC_ARENA_MAX='1')
            probes[key] = stack.enter_context(probe)
    versions, blas, missing = {}, {}, {}
    for key, worker in list(workers.items()):
        name, of_threads = key[0], str(key[1])
        try:
            versions[name] = worker.receive()
            blas.setdefault(name, {})[of_threads] = worker.ask('blas')['libraries']
            if probes[key] is not worker:
                probes[key].receive()
        except Failure as failure:
            missing[name] = str(failure)
            del workers[key]
    for name, found in versions.items():
        print(f'{name}: {", ".join(f"{k} {v}" for k, v in found.items())}')
    print(reporting.blas_table(blas))
    for name, reason in missing.items():
        print(f'{name}: left out ({reason})')
    return workers, probes, {'versions': versions, 'blas': blas, 'missing': missing}


def grow(args, folder: pathlib.Path):
    """This package on growing images and batches: the report and its picture."""
    series = QUICK_GROWTH if args.quick else GROWTH
    sizes = list(dict.fromkeys(size for sizes in series.values() for size in sizes))
    rows = []
    with contextlib.ExitStack() as stack:
        print(f'starting {len(sizes)} processes', flush=True)
        workers = [stack.enter_context(Worker(OURS, 1, folder)) for _ in sizes]
        versions = [worker.receive() for worker in workers][0]
        blas = {OURS: {'1': workers[0].ask('blas')['libraries']}}
        print(reporting.blas_table(blas))
        for pass_, backward in PASSES.items():
            new = []
            for (n, size), worker in zip(sizes, workers):
                case = Case(n, CHANNELS, CHANNELS, size)
                arrays = random_arrays(case)
                numpy.savez(folder / 'arrays.npz', **arrays)
                if not backward:
                    del arrays['gy']
                expected = reference.deformable_convolution(**arrays, **case.options)
                row = {'n': n, 'side': size, 'pass': pass_}
                row.update(check(worker, worker, case, backward, expected))
                new.append(row)
                print(f'{pass_}, {n} x {size} x {size}: checked', flush=True)
            take_times(new, workers, args.repeat, args.pause)
            by_size = dict(zip(sizes, new))
            for name, of_series in series.items():
                rows += add_growth([{'series': name, **by_size[s]} for s in of_series])
    print(reporting.growth_table(rows))
    report = {
        'date': datetime.date.today().isoformat(),
        'machine': machine(),
        'repeat': args.repeat,
        'pause_s': args.pause,
        'contestant': OURS,
        'channels': CHANNELS,
        'notes': CONDITIONS,
        'versions': versions,
        'blas': blas,
        'rows': rows,
    }
    return report, reporting.growth_picture(report)


class Failure(Exception):
    """A contestant can't do what it is asked; the message is the reason."""


class Worker:
    """A contestant in a process of its own: the parent's end."""

    def __init__(self, name: str, threads: int, folder, **environment: str) -> None:
        python = sys.executable
        environment = {**os.environ, **environment}
        for variable in BLAS_OVERRIDES:
            environment.pop(variable, None)
        for variable in 'OMP', 'OPENBLAS', 'MKL', 'NUMBA':
            environment[f'{variable}_NUM_THREADS'] = str(threads)
        # Threads without work sleep, or they would disturb the other contestants.
        environment['OMP_WAIT_POLICY'] = 'passive'
        environment['OPENBLAS_THREAD_TIMEOUT'] = '16'
        environment.pop('CHAINER_DEFORM_NUMBA', None)
        if name == 'torchvision':
            python = os.environ.get('TORCHVISION_PYTHON', '/usr/bin/python3')
            environment.pop('PYTHONPATH', None)
        else:
            paths = [str(ROOT), environment.get('PYTHONPATH')]
            environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        self.folder = folder
        self.log = folder / f'{id(self)}.log'
        try:
            with self.log.open('w') as log:
                self.process = subprocess.Popen(
                    [python, str(HERE / 'worker.py')],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
        except OSError as error:
            self.process, self.reason = None, f'{python}: {error.strerror}'
        self.send('start', name=name, threads=threads)

    def load(self, case: Case, backward: bool) -> None:
        self.ask(
            'load',
            arrays=str(self.folder / 'arrays.npz'),
            options=case.options,
            backward=backward,
            operator=case.operator,
        )

    def results(self) -> dict:
        path = self.folder / 'results.npz'
        self.ask('results', path=str(path))
        with numpy.load(path) as archive:
            return dict(archive)

    def ask(self, command: str, **arguments) -> dict:
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments) -> None:
        line = json.dumps({'command': command, **arguments}) + '\n'
        with contextlib.suppress(OSError):  # receive() tells
            if self.process is not None:
                self.process.stdin.write(line)
                self.process.stdin.flush()

    def receive(self) -> dict:
        if self.process is None:
            raise Failure(self.reason)
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            how = signal.Signals(-status).name if status < 0 else f'exit {status}'
            last = self.log.read_text().splitlines()[-1:]
            raise Failure(': '.join([f'died ({how})', *last]))
        reply = json.loads(line)
        if 'error' in reply:
            raise Failure(reply['error'])
        return reply

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()  # which ends it
            self.process.stdout.close()
            self.process.wait()


def random_arrays(case: Case) -> dict:
    n, c, out_c, size, k = case[:5]
    taps = case.offset_groups * k * k
    random = numpy.random.RandomState(0)
    shapes = {
        'x': (n, c, size, size),
        'offset': (n, 2 * taps, size, size),
        'W': (out_c, c // case.groups, k, k),
        'b': (out_c,),
        'gy': (n, out_c, size, size),
    }
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    arrays['W'] /= (arrays['W'][0].size) ** 0.5
    # With a standard deviation of 2 pixels, in odd 128ths: exact in float32 wherever
    # they lead, and never to a lattice line, where the gradient jumps.
    arrays['offset'] = (numpy.floor(128 * arrays['offset']) + 0.5) / 64
    if case.mask:
        arrays['mask'] = random.uniform(0, 1, (n, taps, size, size))
    return {name: array.astype('float32') for name, array in arrays.items()}


def check(worker, probe, case: Case, backward: bool, expected: dict) -> dict:
    """Error and memory of a contestant, or the reason why it gets no time.

    ``probe`` is where memory is measured. Nothing expected is nothing to agree with.
    """
    row = {'error': None, 'peak_mib': None, 'beside_mib': None}
    try:
        worker.load(case, backward)
        errors = relative_errors(expected, worker.results())
        if errors:
            worst = max(errors, key=errors.get)
            row['error'] = errors[worst]
            if row['error'] > TOLERANCE:
                raise Failure(f'wrong: {worst} is off by {row["error"]:.0e}')
        if probe is not worker:
            probe.load(case, backward)
            probe.results()
        memory = probe.ask('memory')
    except Failure as failure:
        return {'reason': str(failure)}
    if memory['peak'] is not None:
        row['peak_mib'] = memory['peak'] / 2**20
        row['beside_mib'] = (memory['peak'] - memory['results']) / 2**20
    return row


def relative_errors(expected: dict, found) -> dict:
    """The largest error of each array, relative to the largest number expected."""
    errors = {}
    for name, array in expected.items():
        error = numpy.inf
        if name in found and found[name].shape == array.shape:
            error = abs(found[name] - array).max() / abs(array).max()
        errors[name] = float(error) if error < numpy.inf else numpy.inf  # nor NaN
    return errors


def take_times(rows: list[dict], workers, repeat: int, pause: float) -> None:
    """Adds the medians of runs in turn to the rows without a reason against.

    Each timed run follows ``pause`` seconds of idleness.
    """
    times = [[] for _ in rows]
    for turn in range(repeat):
        show_progress(f'round {turn + 1} of {repeat}')
        for row, worker, of_row in zip(rows, workers, times):
            if 'reason' not in row:
                try:
                    of_row.append(worker.ask('time', pause=pause))
                except Failure as failure:
                    row['reason'] = str(failure)
    show_progress('')
    for row, of_row in zip(rows, times):
        if 'reason' not in row:
            for name in 'wall', 'cpu':
                seconds = statistics.median(time[name] for time in of_row)
                row[f'{name}_ms'] = 1e3 * seconds


def show_progress(text: str) -> None:
    """In a line of its own that the next one overwrites."""
    if sys.stderr.isatty():
        print(f'\r{text:40}\r', end='', file=sys.stderr, flush=True)


def add_ratios(rows: list[dict]) -> None:
    """Adds each row's times relative to ours on as many threads."""
    ours = {row['threads']: row for row in rows if row['contestant'] == OURS}
    for row in rows:
        for name in 'wall', 'cpu':
            if f'{name}_ms' in row:
                our = ours.get(row['threads'], {}).get(f'{name}_ms')
                row[f'{name}_ratio'] = row[f'{name}_ms'] / our if our else None


def add_growth(rows: list[dict]) -> list[dict]:
    """Adds the time per output pixel, and how it compares to the least of the rows."""
    timed = [row for row in rows if 'reason' not in row]
    for row in timed:
        row['ns_a_pixel'] = 1e6 * row['cpu_ms'] / (row['n'] * row['side'] ** 2)
    for row in timed:
        row['ratio'] = row['ns_a_pixel'] / min(row['ns_a_pixel'] for row in timed)
    return rows


def compile_seconds(folder) -> dict:
    """Seconds by which the first call is longer than another, with its gradient."""
    case = QUICK_CASES['tiny']
    numpy.savez(folder / 'arrays.npz', **random_arrays(case))
    seconds = {}
    for cache in 'empty cache', 'filled cache':
        environment = {'NUMBA_CACHE_DIR': str(folder / 'numba')}
        with Worker(OURS, 1, folder, **environment) as worker:
            worker.receive()
            worker.load(case, backward=True)
            first = worker.ask('first')['wall']
            seconds[cache] = round(first - worker.ask('time', pause=0)['wall'], 3)
    return seconds


def machine() -> dict:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as info:
        lines = (line.split(':', 1) for line in info if ':' in line)
        found = {name.strip(): value.strip() for name, value in lines}
        processor = found.get('model name', processor)
        # The name of a virtual machine's CPU often leaves out which one it is.
        if 'cpu family' in found:
            processor += f' (family {found["cpu family"]}, model {found["model"]})'
    return {
        'processor': processor,
        'architecture': platform.machine(),
        'cores': os.cpu_count(),
        'system': platform.system(),
    }


if __name__ == '__main__':
    main()
