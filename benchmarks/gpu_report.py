"""Tells all that a GPU can tell about this package, with one command.

``python benchmarks/gpu_report.py --out FOLDER`` runs the tests, compares the results
with torchvision's, takes times, and asks the profiler and the sanitizers. Nothing is
fetched; Chainer may be carried along as a wheel. Each step is a process that is killed
when its share of the budget is over; what a step does not use goes to the later ones.

A step has jobs. When a job breaks the device or kills its process, a new process goes
on with the next job. The folder has four files: ``rows.jsonl``, a line a result, as
they come; ``steps.jsonl``, a line a step; ``log.txt``, what the steps printed;
``table.txt``, which is printed at the end, written anew after each step.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import datetime
import functools
import glob
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # the package need not be installed

import gpu  # noqa: E402

BUDGET = 560
#: Exit status of a step whose device can no longer be used.
BROKEN = 75
#: Where a wheel of Chainer is looked for.
WHEELS = (ROOT / '.whl', ROOT / 'build', ROOT / 'dist')
#: Where NVIDIA's programs may be besides $PATH.
TOOL_FOLDERS = (
    '/usr/local/cuda/bin',
    '/usr/local/cuda/compute-sanitizer',
    '/opt/nvidia/nsight-compute/*',
)
TESTS = 'tests/gpu'
ROWS_VARIABLE = 'GPU_REPORT_ROWS'
BLOCK = 'block size'
#: Case, mode, and the constant of ``sampling/cuda.py`` that takes several values.
SWEEPS = (
    ('A', 'tf32', 'MOST_LANES'),
    ('A', 'float16', 'MOST_LANES'),
    ('C', 'tf32', 'COLUMN_BYTES'),
    ('A', 'tf32', BLOCK),
    ('D', 'tf32', 'MOST_LANES'),
    ('B', 'tf32', 'MOST_LANES'),
    ('B', 'tf32', 'FEW_POSITIONS'),
    ('C', 'float16', 'COLUMN_BYTES'),
    ('A', 'float16', BLOCK),
    ('D', 'float16', 'MOST_LANES'),
)
VALUES = {
    'MOST_LANES': (1, 2, 4, 8, 16, 32),
    'COLUMN_BYTES': (1 << 25, 1 << 27, 1 << 29, 1 << 30, 1 << 31),
    'FEW_POSITIONS': (0, 1 << 10, 1 << 20),
    BLOCK: (64, 128, 256, 512),
}
#: Case, mode, deterministic.
COUNTED = (
    ('A', 'float32', False),
    ('A', 'float16', False),
    ('A', 'float32', True),
    ('C', 'float32', False),
    ('C', 'float16', False),
    ('D', 'float32', False),
)
#: The profiler's counters by their name in the table.
METRICS = {
    'us': 'gpu__time_duration.sum',
    'Minst': 'smsp__inst_executed.sum',
    'issue%': 'smsp__issue_active.avg.pct_of_peak_sustained_active',
    'regs': 'launch__registers_per_thread',
    'warps%': 'sm__warps_active.avg.pct_of_peak_sustained_active',
    'st%': 'smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct',
    'ld%': 'smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct',
    'L1hit%': 'l1tex__t_sector_hit_rate.pct',
    'L2hit%': 'lts__t_sector_hit_rate.pct',
    'L2 MB': 'lts__t_sectors.sum',
    'rd MB': 'dram__bytes_read.sum',
    'wr MB': 'dram__bytes_write.sum',
}
#: By what a counter is multiplied for the table.
FACTORS = {'us': 1e-3, 'Minst': 1e-6, 'L2 MB': 32e-6, 'rd MB': 1e-6, 'wr MB': 1e-6}
SANITIZERS = ('memcheck', 'initcheck', 'synccheck', 'racecheck')


def main() -> int | str:
    args = parse_args()
    if args.launch:
        launch(args.launch[0], args.launch[1], 'deterministic' in args.launch)
        return 0
    report = Report(args.out)
    if args.step:
        return run_jobs(report, args.step, args.skip)
    if args.table:
        print(table(report.rows(), report.steps()))
        return 0
    if report.path('rows.jsonl').exists():
        sys.exit(f'--out: {args.out} has a report already')
    args.out.mkdir(parents=True, exist_ok=True)
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix='chainer_deform_') as scratch:
        environment = {**os.environ, ROWS_VARIABLE: str(report.path('rows.jsonl'))}
        paths = [str(ROOT), os.environ.get('PYTHONPATH')]
        try:
            paths.insert(0, unpacked_chainer(args.chainer, pathlib.Path(scratch)))
        except Exception as error:  # the steps that need it will say so, too
            report.write(step='versions', note=f'Chainer: {gpu.first_line(error)}')
        environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        interrupted = None
        try:
            run_steps(report, args.steps, args.budget, environment)
        except Interrupted as error:
            interrupted = f'interrupted: {error}'
        text = table(report.rows(), report.steps())
        report.replace('table.txt', text + '\n')
        print(text, flush=True)
    return interrupted or 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--budget',
        type=float,
        default=BUDGET,
        metavar='SECONDS',
        help=f'for all steps together (default: {BUDGET})',
    )
    parser.add_argument(
        '--steps', nargs='+', choices=list(STEPS), metavar='STEP',
        help=f'only these of: {", ".join(STEPS)}',
    )  # fmt: skip
    name = f'{datetime.datetime.now():gpu-report-%Y-%m-%d-%H%M%S}'
    parser.add_argument(
        '--out',
        type=pathlib.Path,
        default=ROOT / 'result' / name,
        metavar='FOLDER',
        help='default: a new folder below result/',
    )
    parser.add_argument(
        '--chainer',
        type=pathlib.Path,
        metavar='WHEEL',
        help='a wheel of Chainer, or a folder with one; '
        'default: the installed one, else one in .whl, build or dist',
    )
    parser.add_argument(
        '--table', action='store_true', help='only print the table of what --out has'
    )
    parser.add_argument('--step', help=argparse.SUPPRESS)
    parser.add_argument('--skip', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--launch', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.budget < math.inf:
        parser.error(f'--budget must be a number of seconds above 0: {args.budget}')
    if args.table and not (args.out / 'rows.jsonl').exists():
        parser.error(f'--out: {args.out} has no report')
    args.steps = set(args.steps or STEPS)
    if args.steps & {'times', 'sweeps'}:  # only what agrees gets a time
        args.steps.add('agreement')
    args.out = args.out.resolve()
    return args


class Interrupted(BaseException):
    """A signal asks the script to end."""


def interrupt(number, frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # the table is still to be written
    raise Interrupted(signal.Signals(number).name)


def unpacked_chainer(path: pathlib.Path | None, scratch: pathlib.Path) -> str | None:
    """The folder that a wheel of Chainer was unpacked to; None if it is installed."""
    if path is None:
        check = [sys.executable, '-c', 'import importlib.util as u, sys;']
        check[-1] += 'sys.exit(u.find_spec("chainer") is None)'
        if not subprocess.run(check).returncode:
            return None
    folders = WHEELS if path is None else (path,)
    wheels = [
        wheel
        for folder in folders
        for wheel in ([folder] if folder.is_file() else folder.glob('chainer-*.whl'))
    ]
    if not wheels:
        places = ', '.join(map(str, folders))
        raise FileNotFoundError(f'not installed, and no chainer-*.whl in {places}')
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(scratch)
    return str(scratch)


class Report:
    """The files of a report. A line is written at once; lines cut short are skipped."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def path(self, name: str) -> pathlib.Path:
        return self.folder / name

    def write(self, **row) -> None:
        append(self.path('rows.jsonl'), row)

    def rows(self) -> list[dict]:
        return read_lines(self.path('rows.jsonl'))

    def steps(self) -> list[dict]:
        return read_lines(self.path('steps.jsonl'))

    def replace(self, name: str, text: str) -> None:
        scratch = self.path(name + '.part')
        scratch.write_text(text)
        scratch.replace(self.path(name))


def append(path, row: dict) -> None:
    line = json.dumps(row).encode() + b'\n'
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path) -> list[dict]:
    rows = []
    with contextlib.suppress(FileNotFoundError), open(path) as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def run_steps(report: Report, wanted, budget: float, environment: dict) -> None:
    """Runs the steps one after the other, each with its share of what is left."""
    end = time.monotonic() + budget
    names = [name for name in STEPS if name in wanted]
    for i, name in enumerate(names):
        weights = [STEPS[later][0] for later in names[i:]]
        limit = (end - time.monotonic()) * weights[0] / sum(weights)
        start = time.monotonic()
        print(f'{name}: at most {limit:.0f} s', flush=True)
        status = 'interrupted'
        try:
            status = run_step(report, name, max(0, limit), environment)
        finally:
            row = {'step': name, 'status': status, 'limit_s': round(limit, 1)}
            row['seconds'] = round(time.monotonic() - start, 1)
            append(report.path('steps.jsonl'), row)
            print(f'{name}: {status}, {row["seconds"]} s', flush=True)
        report.replace('table.txt', table(report.rows(), report.steps()) + '\n')


def run_step(report: Report, name: str, limit: float, environment: dict) -> str:
    """Runs a step, again for the jobs that follow one that broke; what came of it."""
    deadline = time.monotonic() + limit
    done, restarts = 0, 0
    while True:
        command = [sys.executable, os.path.abspath(sys.argv[0]), '--step', name]
        command += ['--skip', str(done), '--out', str(report.folder)]
        with open(report.path('log.txt'), 'a') as log:
            log.write(f'\n--- {name}, from job {done} on\n')
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            code = process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_group(process)
        rows = [row for row in report.rows() if row.get('step') == name]
        begun = [row['begun'] for row in rows if 'begun' in row]
        jobs = next((row['jobs'] for row in rows if 'jobs' in row), [])
        if code == 0:
            return f'done, {restarts} restarts' if restarts else 'done'
        if code is None:
            how = f'killed after {limit:.0f} s'
        else:
            how = signal.Signals(-code).name if code < 0 else f'exit {code}'
            how = f'died ({how})'
        progress = len(begun) > done
        if progress and code != BROKEN:
            report.write(step=name, job=begun[-1], error=how)
        done = len(begun)
        if code is None or not progress:
            return how
        if done >= len(jobs):
            return f'done, the last job {how}'
        restarts += 1


def kill_group(process: subprocess.Popen) -> None:
    """Ends a step with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits for a broken driver may not go; the report goes on.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.stdin.close()


def run_jobs(report: Report, step: str, skip: int) -> int:
    """The child's end: runs the jobs of a step, but for the first ones."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    device = None
    write = functools.partial(report.write, step=step)
    try:
        if step in ON_DEVICE:
            device = gpu.Gpu()
        jobs = STEPS[step][1](device, report)
    except Exception as error:
        traceback.print_exc()
        write(error=gpu.first_line(error))
        return 1
    write(jobs=list(jobs))
    for name, job in list(jobs.items())[skip:]:
        write(begun=name)
        print(f'--- {step}: {name}', flush=True)
        try:
            for row in job():
                write(job=name, **row)
        except Exception as error:
            traceback.print_exc()
            write(job=name, error=gpu.first_line(error))
        try:
            if device is not None:
                device.synchronize()
                device.free()
        except Exception as error:
            write(job=name, error=f'the device broke: {gpu.first_line(error)}')
            return BROKEN
    return 0


def end_with_parent() -> None:
    """Ends this step when the process that started it is gone."""
    # Not by sys.stdin, whose lock would be held when this process ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


# The steps: each returns functions by job, which yield rows.


def describe(device, report) -> dict:
    def packages():
        yield {'versions': gpu.versions()}

    def hardware():
        found = gpu.Gpu()
        yield {'device': found.description(), 'missing': found.missing}

    def state():
        query = 'driver_version,clocks.sm,clocks.mem,temperature.gpu,power.limit'
        command = [find_tool('nvidia-smi'), f'--query-gpu={query}']
        result = run_tool([*command, '--format=csv,noheader'])
        yield {'nvidia-smi': result[1].strip()}

    def tools():
        for name in 'ncu', 'compute-sanitizer':
            with contextlib.suppress(FileNotFoundError):
                yield {'tool': name, 'path': find_tool(name)}

    return {
        'packages': packages,
        'device': hardware,
        'nvidia-smi': state,
        'tools': tools,
    }


def tests(device, report) -> dict:
    """All tests that need a device; this file is the plugin that writes the rows."""

    def pytest():
        command = [sys.executable, '-m', 'pytest', '-m', 'gpu', TESTS, '-q', '-rfE']
        command += ['--tb=short', '-p', 'gpu_report', '-p', 'no:cacheprovider']
        with contextlib.suppress(ImportError):  # most of the time is compilation
            import xdist  # noqa: F401

            command += ['-p', 'xdist', '-n', str(min(8, os.cpu_count() or 1))]
        code, output = run_tool(command, PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
        yield {'exit': code, 'last': last_line(output)}
        if code not in (0, 1):  # pytest itself failed, or found no test
            raise RuntimeError(f'pytest (exit {code}): {complaint(output)}')

    return {'pytest': pytest}


def pytest_runtest_logreport(report) -> None:
    """Hook of pytest: a row a test."""
    # A process of xdist that runs tests sends its reports to the one that writes them.
    if ROWS_VARIABLE not in os.environ or 'PYTEST_XDIST_WORKER' in os.environ:
        return
    if report.when == 'call' or report.outcome != 'passed':
        row = {'step': 'tests', 'test': report.nodeid, 'outcome': report.outcome}
        if report.failed:
            row['message'] = last_line(report.longreprtext)[:200]
        append(os.environ[ROWS_VARIABLE], row)


def each_case(function) -> dict:
    """A job a case and mode."""
    return {
        f'{case}, {mode}': functools.partial(function, case, mode)
        for case in gpu.CASES
        for mode in gpu.MODES
    }


def agreement(device, report) -> dict:
    def check(case, mode):
        shape = gpu.CASES[case]
        expected, against = gpu.expected_results(device, shape, mode)
        device.free()
        arrays = gpu.arrays_of(shape, mode)
        for name, make in device.makers().items():
            row = {'case': case, 'mode': mode, 'contestant': name, 'against': against}
            try:
                with device.mode(mode):
                    contestant = make(arrays)
                    found = contestant.read(contestant.run(True))
            except Exception as error:
                yield {**row, 'ok': False, 'error': gpu.first_line(error)}
                device.synchronize()  # raises, if the device broke
                continue
            errors = gpu.relative_errors(expected, found)
            ok = max(errors.values()) <= gpu.TOLERANCES[mode]
            yield {**row, 'ok': ok, 'errors': errors}

    return each_case(check)


def agreed(report, case: str, mode: str) -> tuple[set, dict]:
    """Those that may be timed, and why others may not."""
    names, reasons = set(), {}
    for row in report.rows():
        if row.get('step') == 'agreement' and 'contestant' in row:
            if (row['case'], row['mode']) != (case, mode):
                continue
            # A peer may be less exact: its error is in the table.
            if row['ok'] or (row['contestant'] == gpu.TORCHVISION and 'errors' in row):
                names.add(row['contestant'])
            elif 'errors' in row:
                worst = max(row['errors'], key=row['errors'].get)
                reasons[row['contestant']] = (
                    f'wrong: {worst} is off by {row["errors"][worst]:.0e}'
                )
            else:
                reasons[row['contestant']] = row['error']
    return names, reasons


def times(device, report) -> dict:
    def measure(case, mode):
        names, reasons = agreed(report, case, mode)
        arrays, contestants = gpu.arrays_of(gpu.CASES[case], mode), {}
        for name, make in device.makers().items():
            if name in names:
                contestants[name] = make(arrays)
            else:
                reasons.setdefault(name, 'no agreement was found')
        for pass_, backward in gpu.PASSES.items():
            runs = {
                name: functools.partial(contestant.run, backward)
                for name, contestant in contestants.items()
            }
            with device.mode(mode):
                ms = gpu.medians(device, runs, 7)
            row = {'case': case, 'mode': mode, 'pass': pass_}
            yield {**row, 'ms': ms, 'reasons': reasons}

    return each_case(measure)


def floors(device, report) -> dict:
    def rates():
        for what in 'copy', *gpu.MODES:
            yield {'rate': what, 'per_second': device.rate(what)}

    def measure(case, mode):
        for pass_, backward in gpu.PASSES.items():
            floors = gpu.floors_ms(device, gpu.CASES[case], mode, backward)
            yield {'case': case, 'mode': mode, 'pass': pass_, 'floors_ms': floors}

    return {'rates': rates, **each_case(measure)}


def kernels(device, report) -> dict:
    def measure(case, mode):
        arrays = gpu.arrays_of(gpu.CASES[case], mode)
        for name, make in device.makers().items():
            with device.mode(mode):
                run = functools.partial(make(arrays).run, True)
                found = device.kernels(run)
            row = {'case': case, 'mode': mode, 'contestant': name}
            yield {**row, 'kernels': found}

    return each_case(measure)


def host(device, report) -> dict:
    def measure(case, shape):
        arrays = gpu.arrays_of(shape, 'float32')
        for name, make in device.makers().items():
            contestant = make(arrays)
            for pass_, backward in gpu.PASSES.items():
                run = functools.partial(contestant.run, backward)
                row = {'case': case, 'contestant': name, 'pass': pass_}
                row['us'] = gpu.host_us(device, run)
                if name != gpu.TORCHVISION:
                    row['allocations'] = device.allocations(run)
                yield row

    return {
        'tiny': functools.partial(measure, 'tiny', gpu.TINY),
        'A': functools.partial(measure, 'A', gpu.CASES['A']),
    }


@contextlib.contextmanager
def setting(name: str, value: int):
    """A constant of the GPU path, or the block size of its kernels, with a value."""
    from chainer_deform.sampling import cuda

    attribute = 'sampler_kernel' if name == BLOCK else name
    before = module_constant(attribute)
    used = name != BLOCK
    if name == BLOCK:

        def sampler_kernel(*args, **kwargs):
            nonlocal used
            used = True
            kernel, scalars = before(*args, **kwargs)
            return functools.partial(kernel, block_size=value), scalars

        value = sampler_kernel
    setattr(cuda, attribute, value)
    try:
        yield
    finally:
        setattr(cuda, attribute, before)
    if not used:
        raise RuntimeError(f'{cuda.__name__} has not asked {attribute} for kernels')


def module_constant(name: str):
    from chainer_deform.sampling import cuda

    if not hasattr(cuda, name):
        raise LookupError(
            f'{cuda.__name__} has no {name}: give SWEEPS in {__file__} its new name'
        )
    return getattr(cuda, name)


def sweeps(device, report) -> dict:
    def sweep(case, mode, name):
        default = 128 if name == BLOCK else module_constant(name)
        values = sorted({*VALUES[name], default})
        if gpu.OURS not in agreed(report, case, mode)[0]:
            raise RuntimeError('no agreement was found')
        arrays = gpu.arrays_of(gpu.CASES[case], mode)
        with device.mode(mode):
            contestant = device.makers()[gpu.OURS](arrays)
            expected = contestant.read(contestant.run(True))
            expected = {key: array.astype(float) for key, array in expected.items()}
            for value in values:
                row = {'case': case, 'mode': mode, 'constant': name, 'value': value}
                row['default'] = value == default
                try:
                    with setting(name, value):
                        found = contestant.read(contestant.run(True))
                        errors = gpu.relative_errors(expected, found)
                        if max(errors.values()) > gpu.TOLERANCES[mode]:
                            raise RuntimeError(f'other results: {errors}')
                        row['ms'] = {
                            pass_: gpu.medians(
                                device,
                                {value: functools.partial(contestant.run, backward)},
                                5,
                            )[value]
                            for pass_, backward in gpu.PASSES.items()
                        }
                except Exception as error:
                    row['error'] = gpu.first_line(error)
                yield row

    return {
        ', '.join(settings): functools.partial(sweep, *settings)
        for settings in SWEEPS
        if settings[0] in gpu.CASES
    }


def counters(device, report) -> dict:
    """What the profiler counts in one launch of each of our kernels."""

    def count(case, mode, deterministic):
        program = [sys.executable, os.path.abspath(sys.argv[0]), '--launch', case, mode]
        program += ['deterministic'] if deterministic else []
        row = {'case': case, 'mode': mode, 'deterministic': deterministic}
        command = [find_tool('ncu'), '--csv', '--page', 'raw', '--print-units', 'base']
        command += ['--clock-control', 'none', '--profile-from-start', 'off']
        command += ['--kernel-name', 'regex:chainer_deform']
        # Without those counters that this version does not know, those that it has.
        for what in ['--metrics', ','.join(METRICS.values())], ['--set', 'basic']:
            code, output = run_tool([*command, *what, *program])
            found = read_counters(output)
            if found or 'ERR_NVGPUCTRPERM' in output:
                break
        if not found:
            raise RuntimeError(f'ncu (exit {code}): {complaint(output)}')
        for kernel, metrics in found:
            yield {**row, 'kernel': kernel, 'metrics': metrics}

    return {
        f'{case}, {mode}{", deterministic" * deterministic}': functools.partial(
            count, case, mode, deterministic
        )
        for case, mode, deterministic in COUNTED
        if case in gpu.CASES
    }


def read_counters(output: str) -> list[tuple[str, dict]]:
    """Kernels with their counters, from the table that ncu prints."""
    lines = output.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        return []
    table = [line for line in lines[starts[0] :] if line.startswith('"')]
    found = []
    for row in csv.DictReader(table):
        metrics = {}
        for name, value in row.items():
            with contextlib.suppress(ValueError, AttributeError):
                if name and '__' in name:
                    metrics[name] = float(value.replace(',', ''))
        if row['ID'].strip():  # the first line has the units
            found.append((row['Kernel Name'], metrics))
    return found


def launch(case: str, mode: str, deterministic: bool) -> None:
    """For the profiler: one run with gradients, after one that it does not see."""
    device = gpu.Gpu()
    make = device.makers()[gpu.DETERMINISTIC if deterministic else gpu.OURS]
    with device.mode(mode):
        contestant = make(gpu.arrays_of(gpu.CASES[case], mode))
        contestant.run(True)
        device.synchronize()
        profiler = device.cupy.cuda.profiler
        profiler.start()
        contestant.run(True)
        device.synchronize()
        profiler.stop()


def sanitizer(tool: str, device, report) -> dict:
    def check():
        command = [find_tool('compute-sanitizer'), '--tool', tool]
        # Those of cuBLAS and CuPy are not ours to check.
        command += ['--kernel-name', 'kns=chainer_deform', '--error-exitcode', '86']
        command += [sys.executable, '-m', 'pytest', '-m', 'gpu', TESTS, '-q']
        command += ['-k', 'short_run', '-p', 'no:cacheprovider']
        code, output = run_tool(command, PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
        lines = output.splitlines()
        summaries = [line for line in lines if 'SUMMARY' in line]
        ran = [line for line in lines if re.search(r'\d (passed|failed|skipped)', line)]
        yield {
            'exit': code,
            'summary': (summaries or [complaint(output)])[-1].strip('= '),
            'tests': ran[-1].strip('= ') if ran else 'no test was run',
        }

    return {tool: check}


#: Name: share of the budget, and its jobs; the most important ones first.
STEPS = {
    'versions': (15, describe),
    'tests': (150, tests),
    'agreement': (75, agreement),
    'times': (85, times),
    'floors': (25, floors),
    'kernels': (30, kernels),
    'host': (15, host),
    'sweeps': (70, sweeps),
    'counters': (50, counters),
    **{
        tool: (share, functools.partial(sanitizer, tool))
        for tool, share in zip(SANITIZERS, (25, 15, 10, 10))
    },
}
ON_DEVICE = {'agreement', 'times', 'floors', 'kernels', 'host', 'sweeps'}


def find_tool(name: str) -> str:
    places = [shutil.which(name)]
    for folder in TOOL_FOLDERS:
        places += sorted(glob.glob(os.path.join(folder, name)))
    for place in filter(None, places):
        return place
    raise FileNotFoundError(f'{name} is not installed')


def run_tool(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit status and output, which also goes to the log, line by line."""
    paths = [str(HERE), os.environ.get('PYTHONPATH')]
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
    environment = {**os.environ, **environment}
    environment.pop('PYTEST_XDIST_WORKER', None)  # of who started the report
    print('$', *command, flush=True)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    ) as process:
        lines = []
        for line in process.stdout:
            print(line, end='', flush=True)
            lines.append(line)
    return process.returncode, ''.join(lines)


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), '')


def complaint(output: str) -> str:
    """The line of a tool's output that says what is wrong."""
    for word in 'ERR_NVGPUCTRPERM', 'not supported', 'ERROR', 'Error', 'error':
        for line in output.splitlines():
            if word in line:
                return re.sub(r'^=+(ERROR=+)?\s*|=*$', '', line)[:200]
    return last_line(output)[:200]


# The table.

#: Lines that a section has at most for its errors.
MOST_ERRORS = 6
WIDTH = 110


def table(rows: list[dict], steps: list[dict]) -> str:
    """What counts, on some hundred lines; a section a step, also where nothing came."""
    statuses = {step['step']: step for step in steps}
    sections = {
        'versions': versions_lines,
        'tests': tests_lines,
        'agreement': agreement_lines,
        'times': times_lines,
        'floors': floors_lines,
        'kernels': kernels_lines,
        'host': host_lines,
        'sweeps': sweeps_lines,
        'counters': counters_lines,
        **dict.fromkeys(SANITIZERS, sanitizer_lines),
    }
    lines = []
    for name, make in sections.items():
        of_step = [row for row in rows if row.get('step') == name]
        step = statuses.get(name, {'status': 'not run'})
        seconds = f', {step["seconds"]:.0f} s' if 'seconds' in step else ''
        lines.append(f'== {name} ({step["status"]}{seconds})')
        try:
            lines += make(of_step, rows)
        except Exception as error:  # a row that is not as it should be
            lines.append(f'no table: {error!r}')
        errors = [
            f'{row["job"] + ": " if "job" in row else ""}{row["error"]}'
            for row in of_step
            if 'error' in row and 'contestant' not in row and 'constant' not in row
        ]
        lines += [f'! {error}'[:WIDTH] for error in errors[:MOST_ERRORS]]
        if len(errors) > MOST_ERRORS:
            lines.append(f'! and {len(errors) - MOST_ERRORS} more')
    return '\n'.join(lines)


def versions_lines(rows, _) -> list[str]:
    lines = []
    for row in rows:
        for key in 'versions', 'device', 'missing':
            if row.get(key):
                lines.append(', '.join(f'{k} {v}' for k, v in row[key].items()))
        lines += [row[key] for key in ('note', 'nvidia-smi') if key in row]
    found = {row['tool'] for row in rows if 'tool' in row}
    missing = [name for name in ('ncu', 'compute-sanitizer') if name not in found]
    if missing:
        lines.append(f'not found: {", ".join(missing)}')
    return lines


def tests_lines(rows, _) -> list[str]:
    outcomes = {}  # a test whose teardown fails has failed
    for row in rows:
        if 'test' in row and outcomes.get(row['test']) != 'failed':
            outcomes[row['test']] = row['outcome']
    counts = collections.Counter(outcomes.values())
    line = ', '.join(f'{counts[key]} {key}' for key in ('passed', 'failed', 'skipped'))
    lines = [f'{line}; pytest: {row["last"]}' for row in rows if 'last' in row]
    failed = [row for row in rows if row.get('outcome') == 'failed']
    lines = lines or [line]
    if outcomes and counts['skipped'] == len(outcomes):
        lines.append('! all were skipped')
    for row in failed[:MOST_ERRORS]:
        lines.append(f'! {row["test"]}: {row["message"]}'[:WIDTH])
    if len(failed) > MOST_ERRORS:
        lines.append(f'! and {len(failed) - MOST_ERRORS} more')
    return lines


def label(row: dict) -> str:
    return f'{row["case"]} {row["mode"]:8}'


def agreement_lines(rows, _) -> list[str]:
    rows = [row for row in rows if 'contestant' in row]
    lines = []
    if rows:
        against = ', '.join(dict.fromkeys(row['against'] for row in rows))
        lines.append(f'largest error of y and all gradients; against {against}')
    for case in by(rows, 'case', 'mode').values():
        cells = []
        for row in case:
            cell = row.get('error', '')[:60]
            if 'errors' in row:
                worst = max(row['errors'], key=row['errors'].get)
                cell = f'{row["errors"][worst]:.0e} {worst}'
            verdict = 'ok' if row['ok'] else 'WRONG'
            cells.append(f'{short(row["contestant"])} {cell} {verdict}')
        lines.append(f'{label(case[0])} {"; ".join(cells)}')
    return lines


def rounded(number: float) -> str:
    """Three digits, or all before the point."""
    return f'{number:.0f}' if number >= 100 else f'{number:.3g}'


def short(contestant: str) -> str:
    return {gpu.OURS: 'ours', gpu.DETERMINISTIC: 'det.'}.get(contestant, contestant)


def times_lines(rows, all_rows) -> list[str]:
    rows = [row for row in rows if 'ms' in row]
    if not rows:
        return []
    floors = {
        (row['case'], row['mode'], row['pass']): row['floors_ms']
        for row in all_rows
        if 'floors_ms' in row
    }
    names = gpu.OURS, gpu.DETERMINISTIC, gpu.TORCHVISION
    columns = [*map(short, names), 'x', 'floor', 'product', 'columns']
    head = ''.join(f' {column[:6]:>6}' for column in columns)
    lines = [
        'ms, forward | forward + backward; x: torchvision / ours; floor: arithmetic or '
        'arguments;',
        'product: by cuBLAS alone; columns: written and read',
        f'{"":10}{head} |{head}',
    ]
    for of_case in by(rows, 'case', 'mode').values():
        parts, reasons = [], {}
        for row in of_case:
            ms = row['ms']
            numbers = [ms.get(name) for name in names]
            ratio = gpu.TORCHVISION in ms and gpu.OURS in ms
            numbers.append(ms[gpu.TORCHVISION] / ms[gpu.OURS] if ratio else None)
            floor = floors.get((row['case'], row['mode'], row['pass']))
            numbers += [None] * 3
            if floor:
                least = max(floor['arithmetic'], floor['arguments'])
                numbers[4:] = least, floor['product'], floor['columns']
            cells = ('-' if n is None else rounded(n) for n in numbers)
            parts.append(''.join(f' {cell:>6}' for cell in cells))
            reasons.update(row['reasons'])
        lines.append(f'{label(of_case[0])}{" |".join(parts)}')
        for name, reason in reasons.items():
            lines.append(f'! {label(of_case[0])} {short(name)}: {reason}'[:WIDTH])
    return lines


def floors_lines(rows, _) -> list[str]:
    rates = [
        f'{row["rate"]} {row["per_second"] / 1e12:.2f} T'
        f'{"B" if row["rate"] == "copy" else "FLOP"}/s'
        for row in rows
        if 'rate' in row
    ]
    return [', '.join(rates)] if rates else []


def kernels_lines(rows, _) -> list[str]:
    lines = []
    for row in rows:
        # The others are much the same, and in rows.jsonl.
        most = {gpu.OURS: gpu.MODES, gpu.TORCHVISION: ('float32', 'float16')}
        if row.get('mode') not in most.get(row.get('contestant'), ('float32',)):
            continue
        if 'kernels' not in row:
            continue
        groups = collections.defaultdict(lambda: [0, 0])
        for name, (us, count) in row['kernels'].items():
            ours = re.search(r'chainer_deform_(\w+)', name)
            product = re.search('gemm|cutlass|xmma|nvjet|gemv|splitK', name, re.I)
            peer = re.search('deform|col2im|im2col', name)
            group = ours.group(1) if ours else 'product' if product else 'other'
            if peer and not ours:
                group = re.sub(r'.*?((\w*)(deform\w*|col2im|im2col)\w*).*', r'\1', name)
            groups[group][0] += us
            groups[group][1] += count
        cells = [
            f'{group[:32]} {us:.0f}{f" ({count})" if count > 1 else ""}'
            for group, (us, count) in sorted(groups.items(), key=lambda g: -g[1][0])
        ]
        total = sum(us for us, _ in row['kernels'].values())
        launches = sum(count for _, count in row['kernels'].values())
        lines.append(
            f'{label(row)} {short(row["contestant"])} {total:.0f} in {launches}: '
            f'{", ".join(cells)}'[:WIDTH]
        )
    head = 'forward + backward: us of kernels in launches; by kernel (launches)'
    return [head, *lines] if lines else []


def host_lines(rows, _) -> list[str]:
    lines = []
    rows = [row for row in rows if 'us' in row]
    for of_name in by(rows, 'case', 'contestant').values():
        cells = []
        for row in of_name:
            memory = row.get('allocations')
            memory = '' if memory is None else f' ({memory} allocations)'
            cells.append(f'{row["pass"]} {row["us"]:.0f}{memory}')
        head = f'{of_name[0]["case"]}, {short(of_name[0]["contestant"])}'
        lines.append(f'{head:18} us of the host: {", ".join(cells)}')
    return lines


def sweeps_lines(rows, _) -> list[str]:
    rows = [row for row in rows if 'constant' in row]
    lines = []
    for of_sweep in by(rows, 'case', 'mode', 'constant').values():
        cells = []
        for row in of_sweep:
            value = row['value']
            value = f'2^{value.bit_length() - 1}' if value >= 1 << 20 else value
            cell = row.get('error', '')[:40]
            if 'ms' in row:
                cell = '/'.join(map(rounded, row['ms'].values()))
            cells.append(f'{value}{"*" * row["default"]}: {cell}')
        lines.append(
            f'{label(of_sweep[0])} {of_sweep[0]["constant"]} {", ".join(cells)}'
        )
    head = 'ms forward/with backward by value; *: as it is'
    return [head, *lines] if lines else []


def counters_lines(rows, _) -> list[str]:
    lines, seen = [], set()
    for row in rows:
        if 'metrics' not in row:
            continue
        kernel = row['kernel'].replace('chainer_deform_', '').split('(')[0]
        key = kernel, row['case'], row['mode'], row['deterministic']
        if key in seen or (kernel == 'swap' and seen):  # one of its kind will do
            continue
        seen.add(key)
        cells = [
            rounded(row['metrics'][metric] * FACTORS.get(name, 1))
            if metric in row['metrics']
            else '-'
            for name, metric in METRICS.items()
        ]
        kernel = f'{kernel[:13]}{", det." if row["deterministic"] else ""}'
        lines.append(f'{label(row)} {kernel:18}{"".join(f"{c:>7}" for c in cells)}')
    head = f'{"":29}' + ''.join(f'{name:>7}' for name in METRICS)
    return [head, *lines] if lines else []


def sanitizer_lines(rows, _) -> list[str]:
    return [f'{row["summary"]}; {row["tests"]}' for row in rows if 'summary' in row]


def by(rows: list[dict], *keys: str) -> dict:
    """Rows that have the same values, in the order in which they come."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


if __name__ == '__main__':
    sys.exit(main())
