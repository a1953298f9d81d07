"""The report on a GPU, rehearsed without one.

This file is also the program of the rehearsal: ``gpu_report.py`` with the emulator of
``tests/emulator.py`` in place of a device, and tiny cases. NVIDIA's programs are small
scripts.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / 'benchmarks'
TINY_CASES = {
    'A': (2, 8, 8, 4, 5),
    'B': (3, 8, 8, 3, 4),
    'C': (1, 8, 8, 5, 4),
    'D': (2, 8, 8, 4, 4),
}
TINY_TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_right(): pass
def test_wrong(): assert 1 + 1 == 3
def test_short_run(): pass
@pytest.mark.skip(reason='no second device')
def test_skipped(): pass
"""
COUNTERS = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit 9
cat << 'END'
==PROF== Disconnected from process 7
"ID","Kernel Name","Block Size","gpu__time_duration.sum","dram__bytes_read.sum"
"","","","ns","byte"
"0","chainer_deform_sample(CArray<float, 1>)","(128, 1, 1)","12,500","2,000,000"
"1","chainer_deform_swap(CArray<float, 1>)","(128, 1, 1)","1500","n/a"
END
"""
SANITIZER = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit 9
echo "========= ERROR SUMMARY: 0 errors"
"""


# The program.


class StandIn:
    """A device whose arrays are NumPy's; torchvision's place is taken by matrices."""

    missing = {}

    def __init__(self) -> None:
        from chainer_deform.functions import deformable_convolution_2d_sampler as module
        from chainer_deform.sampling import cuda
        from tests import emulator

        self.launched = launched = collections.Counter()

        class Kernel(emulator.ElementwiseKernel):
            def __call__(self, *args, size, block_size=128):
                launched[self.name] += 1
                super().__call__(*args, size=size)

        emulator.emulate(pytest.MonkeyPatch(), ElementwiseKernel=Kernel)
        if hasattr(cuda, 'MOST_LANES'):
            cuda.MOST_LANES = 1
        module = sys.modules['chainer_deform.functions.' + module.__name__]
        for node in (
            module.DeformableConvolution2DSampler,
            module.DeformableConvolution2DSamplerGrad,
        ):
            node.forward_cpu = node.forward_gpu
        nothing = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
        self.cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(profiler=nothing))

    def makers(self):
        import gpu

        makers = gpu.our_makers(self)
        makers[gpu.TORCHVISION] = peer
        if os.environ.get('REHEARSAL') == 'wrong':
            makers[gpu.OURS] = lambda arrays: wrong(peer(arrays))
            makers[gpu.DETERMINISTIC] = fail
        if os.environ.get('REHEARSAL') == 'compare':
            makers[gpu.DETERMINISTIC] = lambda arrays: wrong(peer(arrays))
        return makers

    send = receive = staticmethod(numpy.asarray)
    mode = staticmethod(contextlib.nullcontext)

    def synchronize(self):
        pass

    free = synchronize

    def time(self, run, count=1):
        start = time.perf_counter()
        for _ in range(count):
            run()
        return 1e3 * (time.perf_counter() - start) / count

    def kernels(self, run):
        self.launched.clear()
        run()
        found = {name: (12.5, count) for name, count in self.launched.items()}
        return {**found, 'sm90_xmma_gemm_f32f32': (30, 2)}

    def allocations(self, run):
        run()
        return 7

    def memory(self, run, name):
        run()
        return 2.5

    def rate(self, what):
        return 3e12

    def product_ms(self, shape, mode, backward):
        return 0.5

    def description(self):
        return {'device': 'stand-in'}


def peer(arrays):
    import gpu
    from reference import deformable_convolution

    def run(backward):
        found = deformable_convolution(**arrays)
        return found if backward else {'y': found['y']}

    return gpu.Contestant(run, lambda found: found)


def wrong(contestant):
    return contestant._replace(
        read=lambda found: {**found, 'gx': found['gx'] + 0.5 * abs(found['gx']).max()}
    )


def fail(arrays):
    raise RuntimeError('out of memory')


def fault_steps() -> dict:
    """Steps without a device that go wrong in every way."""

    class Fragile:
        broken = False

        def synchronize(self):
            if self.broken:
                raise RuntimeError('illegal address')

        def free(self):
            pass

    def hang():
        command = [sys.executable, '-c', 'import time; time.sleep(600)']
        with subprocess.Popen(command) as process:
            yield {'pid': process.pid}
            process.wait()

    def die():
        os.kill(os.getpid(), signal.SIGSEGV)
        yield {}

    def break_device(device):
        device.broken = True
        raise RuntimeError('launch failed')
        yield {}

    def right():
        yield {'right': True}

    def fail():
        yield {'half': True}
        raise RuntimeError('no memory')

    def unable(device, report):
        raise RuntimeError('nothing can be set up')

    import gpu

    gpu.Gpu = Fragile
    return {
        'versions': (20, lambda *_: {'dies': die, 'right': right}),
        'tests': (20, lambda *_: {'fails': fail, 'right': right}),
        'agreement': (20, unable),
        'host': (
            20,
            lambda device, _: {
                'breaks': lambda: break_device(device),
                'right': right,
            },
        ),
        'counters': (1, lambda *_: {'right': right, 'hangs': hang, 'never': right}),
        'memcheck': (20, lambda *_: {'right': right, 'dies': die}),
    }


def rehearse() -> None:
    sys.path[:0] = [str(ROOT), str(BENCHMARKS)]
    import gpu
    import gpu_report

    kind = os.environ['REHEARSAL']
    if kind == 'faults':
        gpu_report.STEPS = fault_steps()
        gpu_report.ON_DEVICE = {'host'}
        sys.exit(gpu_report.main())
    gpu.Gpu, gpu.CASES, gpu.TINY, gpu.LEAST_MS = StandIn, TINY_CASES, (1, 8, 8, 4, 5), 0
    if kind == 'wrong':
        gpu.CASES = {'A': TINY_CASES['A']}
    if kind == 'compare':
        out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
        gpu.compare({'A': TINY_CASES['A']}, 1, out / 'day-gpu')
        return
    gpu_report.TESTS = os.environ['REHEARSAL_TESTS']
    gpu_report.TOOL_FOLDERS = ()
    gpu_report.VALUES = {
        **dict.fromkeys(gpu_report.VALUES, (1, 2)),
        'COLUMN_BYTES': (1 << 8,),
    }
    gpu_report.COUNTED = ('A', 'float32', False), ('A', 'float32', True)
    gpu_report.SWEEPS = (
        ('A', 'tf32', 'MOST_LANES'),
        ('C', 'float16', 'COLUMN_BYTES'),
        ('A', 'tf32', gpu_report.BLOCK),
        ('B', 'tf32', 'NONE_SUCH'),
    )
    gpu_report.VALUES['NONE_SUCH'] = (1,)
    sys.exit(gpu_report.main())


if __name__ == '__main__':
    rehearse()


# The tests.


@pytest.fixture
def bench(monkeypatch):
    """``gpu_report.py`` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_report

    return gpu_report


def start(kind, out, *options, path='', tests=''):
    environment = {**os.environ, 'REHEARSAL': kind, 'REHEARSAL_TESTS': str(tests)}
    environment['PATH'] = os.pathsep.join([str(path), '/usr/bin', '/bin'])
    environment['PYTHONPATH'] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, __file__, '--out', str(out), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def lines_of(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def rows_of(out, step):
    rows = [row for row in lines_of(out, 'rows.jsonl') if row['step'] == step]
    return [row for row in rows if not {'begun', 'jobs'} & row.keys()]


def statuses(out):
    return {row['step']: row['status'] for row in lines_of(out, 'steps.jsonl')}


def section(text, name):
    """The lines of a step in the table."""
    parts = text.split('== ')
    (part,) = (part for part in parts if part.startswith(f'{name} ('))
    return part.splitlines()


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        status = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return status.rpartition(')')[2].split()[0] != 'Z'


linux_only = pytest.mark.skipif(
    not os.path.exists('/proc/self/stat'), reason='no /proc'
)


@pytest.fixture(scope='module')
def tools(tmp_path_factory):
    """A folder with NVIDIA's programs, and one with tests."""
    folder = tmp_path_factory.mktemp('tools')
    for name, text in ('ncu', COUNTERS), ('compute-sanitizer', SANITIZER):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    (folder / 'nvidia-smi').write_text('#!/bin/sh\necho 580.1, 345 MHz\n')
    (folder / 'nvidia-smi').chmod(0o755)
    (folder / 'test_tiny.py').write_text(TINY_TESTS)
    return folder


@pytest.fixture(scope='module')
def rehearsal(tools, tmp_path_factory):
    from tests import emulator

    if emulator.COMPILER is None:
        pytest.skip('the emulator needs a C++ compiler')
    out = tmp_path_factory.mktemp('report')
    tests = tools / 'test_tiny.py'
    result = finish(start('all', out, '--budget', '500', path=tools, tests=tests))
    return (*result, out)


def test_every_step_runs(rehearsal):
    code, printed, stderr, out = rehearsal
    assert (code, stderr) == (0, '')
    assert set(statuses(out).values()) == {'done'}, (out / 'log.txt').read_text()
    errors = [row for row in lines_of(out, 'rows.jsonl') if 'error' in row]
    assert [row['job'] for row in errors] == ['B, tf32, NONE_SUCH']
    names = {'rows.jsonl', 'steps.jsonl', 'log.txt', 'table.txt'}
    assert {path.name for path in out.iterdir()} == names
    text = (out / 'table.txt').read_text()
    assert printed.endswith(text)
    assert len(text) < 12000
    for name in statuses(out):
        assert len(section(text, name)) > 1, name


def test_results_of_the_steps(rehearsal):
    *_, out = rehearsal
    outcomes = [row['outcome'] for row in rows_of(out, 'tests') if 'test' in row]
    assert sorted(outcomes) == ['failed', 'passed', 'passed', 'skipped']
    rows = rows_of(out, 'agreement')
    assert len(rows) == 4 * 3 * 3
    for row in rows:
        assert row['ok'], row
        assert row['errors'].keys() == {'y', 'gx', 'goffset', 'gW', 'gb'}
    rows = rows_of(out, 'times')
    assert len(rows) == 4 * 3 * 2
    for row in rows:
        assert row['ms'].keys() == {'chainer_deform', 'deterministic', 'torchvision'}
        assert min(row['ms'].values()) > 0
    assert len(rows_of(out, 'floors')) == 4 + 4 * 3 * 2
    assert len(rows_of(out, 'kernels')) == 4 * 3 * 3
    assert len(rows_of(out, 'host')) == 2 * 3 * 2
    rows = rows_of(out, 'counters')
    assert len(rows) == 2 * 2
    assert rows[0]['metrics']['gpu__time_duration.sum'] == 12500


def test_table(rehearsal):
    *_, out = rehearsal
    text = (out / 'table.txt').read_text()
    tests = section(text, 'tests')
    assert tests[1].startswith('2 passed, 1 failed, 1 skipped; pytest: ')
    assert 'test_wrong' in tests[2]
    assert 'stand-in' in ''.join(section(text, 'versions'))
    assert '345 MHz' in ''.join(section(text, 'versions'))
    assert section(text, 'agreement')[2].count(' ok') == 3
    head, first = section(text, 'times')[3:5]
    assert head.split().count('torchv') == 2
    assert first.startswith('A float32')
    for part in first.partition(' | ')[::2]:
        numbers = [float(number) for number in part.split()[-7:]]
        assert numbers[3] == pytest.approx(numbers[2] / numbers[0], 0.02)
        assert numbers[5] == 0.5
    kernels = section(text, 'kernels')[2]
    for part in 'product 30 (2)', ', swap ', ', sample ', ', differentiate ':
        assert part in kernels
    assert ', gather ' in section(text, 'kernels')[3]
    assert ', det. ' not in section(text, 'kernels')[5]
    assert '(7 allocations)' in ''.join(section(text, 'host'))
    counters = section(text, 'counters')
    names = 'case', 'mode', 'kernel', *counters[1].replace(' MB', 'MB').split()
    numbers = dict(zip(names, counters[2].split()))
    assert (numbers['kernel'], numbers['us'], numbers['rdMB']) == (
        'sample',
        '12.5',
        '2',
    )
    assert numbers['regs'] == '-'
    assert 'sample, det.' in counters[3]
    for name in 'memcheck', 'initcheck', 'synccheck', 'racecheck':
        assert section(text, name)[1].startswith('ERROR SUMMARY: 0 errors; 1 passed')


def test_sweeps(rehearsal):
    *_, out = rehearsal
    settings = {}
    for row in rows_of(out, 'sweeps'):
        if 'constant' in row:
            settings.setdefault(row['constant'], []).append(row)
    for name in 'COLUMN_BYTES', 'block size':
        assert len(settings[name]) > 1
        assert sum(row['default'] for row in settings[name]) == 1
        for row in settings[name]:
            assert row['ms'].keys() == {'forward', 'forward + backward'}, row
    # The table says of a constant that was renamed that it is not there.
    lines = section((out / 'table.txt').read_text(), 'sweeps')
    assert any('NONE_SUCH' in line and line.startswith('! ') for line in lines)
    assert any('2^30*: ' in line for line in lines)


def test_only_what_agrees_gets_a_time(tmp_path):
    process = start('wrong', tmp_path, '--steps', 'times', '--budget', '60')
    assert finish(process)[0] == 0
    assert statuses(tmp_path) == {'agreement': 'done', 'times': 'done'}
    found = {
        row['contestant']: row['ok']
        for row in rows_of(tmp_path, 'agreement')
        if row.get('mode') == 'float32'
    }
    assert found == {
        'chainer_deform': False, 'deterministic': False, 'torchvision': True,
    }  # fmt: skip
    rows = rows_of(tmp_path, 'times')
    assert len(rows) == 6
    for row in rows:
        assert row['ms'].keys() == {'torchvision'}
        assert row['reasons'] == {
            'chainer_deform': 'wrong: gx is off by 5e-01',
            'deterministic': 'out of memory',
        }
    text = (tmp_path / 'table.txt').read_text()
    assert 'ours 5e-01 gx WRONG' in section(text, 'agreement')[2]
    assert '! A float32  ours: wrong: gx is off by 5e-01' in section(text, 'times')


@linux_only
def test_faults_stop_nothing_else(tmp_path):
    code, printed, stderr = finish(start('faults', tmp_path, '--budget', '60'))
    assert (code, stderr) == (0, '')
    found = statuses(tmp_path)
    assert found.pop('counters').startswith('killed after ')
    assert found == {
        'versions': 'done, 1 restarts',
        'tests': 'done',
        'agreement': 'died (exit 1)',
        'host': 'done, 1 restarts',
        'memcheck': 'done, the last job died (SIGSEGV)',
    }
    rows = {name: rows_of(tmp_path, name) for name in statuses(tmp_path)}
    for name in rows.keys() - {'agreement', 'counters'}:
        assert {'step': name, 'job': 'right', 'right': True} in rows[name]
    assert rows['versions'][0]['error'] == 'died (SIGSEGV)'
    assert [row.get('error') for row in rows['tests']] == [None, 'no memory', None]
    assert rows['agreement'][0]['error'] == 'nothing can be set up'
    errors = [row.get('error') for row in rows['host']]
    assert errors == ['launch failed', 'the device broke: illegal address', None]
    right, hanging, killed = rows['counters']
    assert (right['job'], hanging['job'], killed['job']) == ('right', 'hangs', 'hangs')
    assert killed['error'].startswith('killed after ')
    assert not alive(hanging['pid'])
    (step,) = (
        row for row in lines_of(tmp_path, 'steps.jsonl') if row['step'] == 'counters'
    )
    assert step['seconds'] < step['limit_s'] + 5
    # The table has all of that, and the steps that were not run.
    assert printed.endswith((tmp_path / 'table.txt').read_text())
    for name in 'versions', 'tests', 'agreement', 'host', 'counters':
        assert any(line.startswith('! ') for line in section(printed, name)), name
    assert section(printed, 'sweeps') == ['sweeps (not run)']


@linux_only
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_end_in_the_middle(number, tmp_path):
    """Nothing is lost, and no process is left."""
    process = start(
        'faults', tmp_path, '--steps', 'tests', 'counters', '--budget', '90'
    )

    def hanging():
        if (tmp_path / 'rows.jsonl').exists():
            rows = lines_of(tmp_path, 'rows.jsonl')
            return [row['pid'] for row in rows if 'pid' in row]

    wait_for(hanging)
    (pid,) = hanging()
    assert alive(pid)
    os.kill(process.pid, number)
    code, printed, _ = finish(process)
    wait_for(lambda: not alive(pid))
    assert len(rows_of(tmp_path, 'tests')) == 3
    assert len(rows_of(tmp_path, 'counters')) == 2
    assert '(done, ' in section((tmp_path / 'table.txt').read_text(), 'tests')[0]
    if number == signal.SIGTERM:
        assert code == 1
        assert statuses(tmp_path) == {'tests': 'done', 'counters': 'interrupted'}
        assert 'interrupted' in section(printed, 'counters')[0]
    else:
        assert code == -signal.SIGKILL
        assert statuses(tmp_path) == {'tests': 'done'}
        _, printed, _ = finish(start('faults', tmp_path, '--table'))
        assert section(printed, 'tests')[1:] == ['0 passed, 0 failed, 0 skipped'] + [
            '! fails: no memory'
        ]


def test_missing_tools(tmp_path):
    """They are said in the table; that is no failure."""
    process = start('all', tmp_path, '--steps', 'versions', 'counters', 'memcheck')
    assert finish(process)[0] == 0
    assert set(statuses(tmp_path).values()) == {'done'}
    text = (tmp_path / 'table.txt').read_text()
    assert 'not found: ncu, compute-sanitizer' in section(text, 'versions')
    assert '! A, float32: ncu is not installed' in section(text, 'counters')
    assert '! memcheck: compute-sanitizer is not installed' in section(text, 'memcheck')


def test_tests_that_cannot_be_run(bench, monkeypatch):
    output = 'ERROR: usage: unknown option\n'
    monkeypatch.setattr(bench, 'run_tool', lambda *_, **__: (4, output))
    rows = bench.tests(None, None)['pytest']()
    assert next(rows)['exit'] == 4
    with pytest.raises(RuntimeError, match=r'\(exit 4\): .*unknown option'):
        next(rows)


@pytest.mark.parametrize(
    ('output', 'expected'),
    [
        ('==ERROR== ERR_NVGPUCTRPERM - no permission\n', 'ERR_NVGPUCTRPERM - no per'),
        ('==PROF== Connected\n==ERROR== Unknown metric\n', 'Unknown metric'),
        ('', ''),
    ],
)
def test_counters_that_cannot_be_had(bench, output, expected, monkeypatch):
    monkeypatch.setattr(bench, 'find_tool', lambda name: name)
    commands = []
    monkeypatch.setattr(
        bench, 'run_tool', lambda command: commands.append(command) or (1, output)
    )
    job = bench.counters(None, None)['A, float32']
    with pytest.raises(RuntimeError, match=rf'ncu \(exit 1\): {expected}'):
        list(job())
    # What is not permitted is not tried again.
    assert len(commands) == (1 if 'PERM' in output else 2)
    for command in commands:  # the device's clocks stay as they are
        assert command[command.index('--clock-control') + 1] == 'none'


def test_lines_cut_short(bench, tmp_path):
    report = bench.Report(tmp_path)
    report.write(step='host', us=1.5)
    with report.path('rows.jsonl').open('a') as file:
        file.write('{"step": "ho')
    assert report.rows() == [{'step': 'host', 'us': 1.5}]


def test_whole_table_is_short(bench):
    """As where only the end of the output is kept."""
    rows = []
    versions = {'versions': bench.gpu.versions()}
    rows.append({'step': 'versions', **versions, 'nvidia-smi': 80 * 'x'})
    for i in range(30):
        test = f'tests/gpu/test_gpu.py::test_same_as_the_cpu[a case, float32-{i}]'
        outcome = {'outcome': 'failed', 'message': 100 * 'x'}
        rows.append({'step': 'tests', 'test': test, **outcome})
    contestants = bench.gpu.OURS, bench.gpu.DETERMINISTIC, bench.gpu.TORCHVISION
    kernels = 'sample', 'sort_key', 'gather', 'differentiate', 'swap'
    found = {f'chainer_deform_{name}': (1234.5, 2) for name in kernels}
    found.update(dict.fromkeys(('gemm', 'cupy_copy'), (1234.5, 2)))
    for case, mode in itertools.product(bench.gpu.CASES, bench.gpu.MODES):
        row = {'case': case, 'mode': mode}
        for contestant in contestants:
            both = {**row, 'contestant': contestant}
            result = {'ok': True, 'errors': {'goffset': 1e-7}, 'against': 'float64'}
            rows.append({'step': 'agreement', **both, **result})
            rows.append({'step': 'kernels', **both, 'kernels': found})
        for pass_ in bench.gpu.PASSES:
            ms = dict.fromkeys(contestants, 123.456)
            rows.append(
                {'step': 'times', **row, 'pass': pass_, 'ms': ms, 'reasons': {}}
            )
    for case, mode, constant in bench.SWEEPS:
        for value in bench.VALUES[constant]:
            ms = dict.fromkeys(bench.gpu.PASSES, 12.345)
            row = {'case': case, 'mode': mode, 'constant': constant, 'value': value}
            rows.append({'step': 'sweeps', **row, 'default': False, 'ms': ms})
    metrics = dict.fromkeys(bench.METRICS.values(), 123456789.0)
    for case, mode, deterministic in bench.COUNTED:
        for name in kernels:
            row = {'case': case, 'mode': mode, 'deterministic': deterministic}
            row.update(kernel=f'chainer_deform_{name}(int)', metrics=metrics)
            rows.append({'step': 'counters', **row})
    text = bench.table(rows, [])
    assert len(text) < 11000
    assert max(map(len, text.splitlines())) < 250
    assert 'no table' not in text


def test_table_without_anything(bench):
    text = bench.table([], [])
    for name in bench.STEPS:
        assert section(text, name)[0] == f'{name} (not run)'


def test_wheel_of_chainer(bench, tmp_path):
    wheel = tmp_path / 'wheels' / 'chainer-7.8.1-py3-none-any.whl'
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('chainer/__init__.py', 'name = "carried along"')
    for place in wheel, wheel.parent:
        folder = bench.unpacked_chainer(place, tmp_path)
        code = 'import chainer; print(chainer.name)'
        command = [sys.executable, '-c', code]
        environment = {**os.environ, 'PYTHONPATH': folder}
        assert 'carried along' in subprocess.check_output(
            command, env=environment, text=True
        )
    assert bench.unpacked_chainer(None, tmp_path) is None  # it is installed
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match=r'no chainer-\*\.whl in .*empty'):
        bench.unpacked_chainer(tmp_path / 'empty', tmp_path)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--budget', '0'], '--budget must be'),
        (['--budget', 'nan'], '--budget must be'),
        (['--steps', 'none such'], '--steps'),
        (['--table', '--out', 'none such'], 'has no report'),
        (['--out', '.'], 'has a report already'),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    (tmp_path / 'rows.jsonl').write_text('')
    result = subprocess.run(
        [sys.executable, BENCHMARKS / 'gpu_report.py', *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['rows.jsonl']


def test_without_a_device(tmp_path):
    """As it is started by a user; the steps say why they cannot be done."""
    from tests.conftest import device_count

    if device_count():
        pytest.skip('there is a device')
    result = subprocess.run(
        [sys.executable, BENCHMARKS / 'gpu_report.py', '--out', tmp_path / 'out']
        + ['--steps', 'versions', 'agreement'],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, '')
    (error,) = rows_of(tmp_path / 'out', 'agreement')
    assert error['error'].startswith('no GPU to measure on: ')
    assert any('no GPU' in line for line in section(result.stdout, 'agreement'))
    assert 'chainer 7.8.1' in ''.join(section(result.stdout, 'versions'))


def test_comparison_of_all_contestants(tmp_path):
    """``run.py --device gpu``: what disagrees gets a reason, all others their times."""
    code, printed, stderr = finish(start('compare', tmp_path))
    assert (code, stderr) == (0, '')
    assert {path.name for path in tmp_path.iterdir()} == {
        'day-gpu.json', 'day-gpu.png',
    }  # fmt: skip
    report = json.loads((tmp_path / 'day-gpu.json').read_text())
    assert len(report['rows']) == 3 * 2
    for row in report['rows']:
        assert row['ms'].keys() | row['reasons'].keys() == {
            'chainer_deform', 'deterministic', 'torchvision', "Chainer's own",
            'plain convolution',
        }  # fmt: skip
        assert row['ms']['chainer_deform'] > 0
        assert 'plain convolution' in row['ms']
        assert row['reasons']['deterministic'] == 'wrong by 5e-01'
        assert f'{row["case"]}, {row["mode"]}, {row["pass"]}' in printed
    assert 'chainer_deform, forward' in report['host_us']


def test_torchvision_is_asked_the_same(bench, tmp_path):
    """In another interpreter: layouts of offsets, names and shapes of gradients."""
    from reference import deformable_convolution

    python = os.environ.get('TORCHVISION_PYTHON', '/usr/bin/python3')
    arrays = bench.gpu.random_arrays((2, 3, 4, 6, 5))
    arrays = {name: array.astype(float) for name, array in arrays.items()}
    numpy.savez(tmp_path / 'arrays.npz', **arrays)
    code = (
        f'import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n'
        'try: import numpy, torch, torchvision\n'
        'except ImportError: sys.exit(77)\n'
        'import gpu\n'
        'with numpy.load("arrays.npz") as archive: arrays = dict(archive)\n'
        'peer = gpu.torchvision_contestant(arrays, "cpu")\n'
        'assert list(peer.read(peer.run(False))) == ["y"]\n'
        'numpy.savez("found.npz", **peer.read(peer.run(True)))\n'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    try:
        result = subprocess.run([python, '-c', code], cwd=tmp_path, env=environment)
    except OSError:
        pytest.skip(f'there is no {python}')
    if result.returncode == 77:
        pytest.skip('torchvision is not installed')
    assert result.returncode == 0
    with numpy.load(tmp_path / 'found.npz') as archive:
        found = dict(archive)
    expected = deformable_convolution(**arrays)
    assert found.keys() == expected.keys()
    assert max(bench.gpu.relative_errors(expected, found).values()) < 1e-10


def test_offsets_are_the_same_in_half_precision(bench):
    """And never on a lattice line."""
    offset = bench.gpu.random_arrays(bench.gpu.CASES['A'])['offset']
    assert (offset % 1 != 0).all()
    numpy.testing.assert_array_equal(offset, offset.astype('float16'))


def test_what_is_asked_of_cupy_and_torch(bench, monkeypatch):
    """By stand-ins that have only what both libraries have."""
    calls = []

    class Event:
        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            calls.append('synchronized')

    class MemoryHook:
        def __enter__(self):
            calls.append(self)

        def __exit__(self, *_):
            pass

    def standard_normal(shape, dtype):
        return numpy.random.RandomState(0).standard_normal(shape).astype(dtype)

    properties = {'name': b'H100', 'major': 9, 'minor': 0, 'l2CacheSize': 50 << 20}
    pool = types.SimpleNamespace(free_all_blocks=lambda: None, total_bytes=lambda: 0)
    cupy = types.SimpleNamespace(
        **{
            name: getattr(numpy, name)
            for name in ('asarray', 'copyto', 'dot', 'empty_like', 'ones')
        },
        asnumpy=numpy.asarray,
        random=types.SimpleNamespace(standard_normal=standard_normal),
        get_default_memory_pool=lambda: pool,
        cuda=types.SimpleNamespace(
            Device=lambda: types.SimpleNamespace(synchronize=lambda: None),
            Event=Event,
            MemoryHook=MemoryHook,
            get_elapsed_time=lambda start, end: 1e3 * (end.at - start.at),
            runtime=types.SimpleNamespace(
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda _: properties,
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 13000,
            ),
        ),
    )
    types_now = [0]
    linalg = types.SimpleNamespace(
        COMPUTE_TYPE_DEFAULT=0,
        COMPUTE_TYPE_TF32=3,
        get_compute_type=lambda dtype: types_now[-1],
        set_compute_type=lambda dtype, value: types_now.append(value),
    )
    matmul = types.SimpleNamespace(allow_tf32=None)
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            is_available=lambda: True,
            empty_cache=lambda: None,
            memory_reserved=lambda: 0,
            max_memory_reserved=lambda: 3 << 20,
            reset_peak_memory_stats=lambda: None,
        ),
        backends=types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=matmul)),
    )
    core = types.SimpleNamespace(_routines_linalg=linalg)
    modules = {'cupy': cupy, 'torch': torch, 'torchvision': types.SimpleNamespace()}
    for name, module in {**modules, 'cupy._core': core}.items():
        monkeypatch.setitem(sys.modules, name, module)
    gpu = bench.gpu
    for name in 'PRODUCT_SIZE', 'COPY_SIZE':
        monkeypatch.setattr(gpu, name, 64)
    device = gpu.Gpu()
    assert device.missing == {}
    assert device.makers().keys() == {gpu.OURS, gpu.DETERMINISTIC, gpu.TORCHVISION}
    assert device.description()['architecture'] == 'sm_90'
    with device.mode('tf32'):
        assert (types_now[-1], matmul.allow_tf32) == (3, True)
    with device.mode('float32'):
        assert (types_now[-1], matmul.allow_tf32) == (0, False)
    floors = gpu.floors_ms(device, TINY_CASES['A'], 'float16', backward=True)
    assert floors.keys() == {'arithmetic', 'arguments', 'columns', 'product'}
    assert all(0 < floor < 1e3 for floor in floors.values())
    assert 'synchronized' in calls
    assert types_now[-1] == 0
    run = lambda: calls[-1].malloc_preprocess(size=1, mem_size=512)  # noqa: E731
    calls.append(types.SimpleNamespace(malloc_preprocess=lambda **_: None))
    assert device.allocations(run) == 1
    assert device.memory(lambda: None, gpu.OURS) == 0
    assert device.memory(lambda: None, gpu.TORCHVISION) == 3
    torch.cuda.is_available = lambda: False
    device = gpu.Gpu()
    assert device.missing == {'torchvision': 'torch finds no device'}
    assert gpu.TORCHVISION not in device.makers()
    device.synchronize()
    device.free()
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    with pytest.raises(gpu.NoDevice, match='CuPy finds no device'):
        gpu.Gpu()


@pytest.mark.parametrize(
    ('found', 'error'),
    [
        ({'y': [1.0, -4.002]}, 0.0005),
        ({'y': [1.0, numpy.nan]}, numpy.inf),
        ({'y': [1.0]}, numpy.inf),
        ({}, numpy.inf),
    ],
)
def test_errors(bench, found, error):
    found = {name: numpy.array(values) for name, values in found.items()}
    errors = bench.gpu.relative_errors({'y': numpy.array([1.0, -4.0])}, found)
    assert errors == {'y': pytest.approx(error)}


def test_kernels_of_the_profiler(bench):
    """torch's, also where its older name for the time is in use."""

    class Profile:
        activities = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            new = types.SimpleNamespace(
                key='sample', self_device_time_total=12.5, count=2
            )
            old = types.SimpleNamespace(key='swap', self_cuda_time_total=3, count=1)
            launch = types.SimpleNamespace(
                key='cudaLaunchKernel', self_device_time_total=0, count=3
            )
            return [new, old, launch]

    profiler = types.SimpleNamespace(
        ProfilerActivity=types.SimpleNamespace(CUDA='cuda'),
        profile=lambda activities: Profile(),
    )
    device = types.SimpleNamespace(
        torch=types.SimpleNamespace(profiler=profiler), synchronize=lambda: None
    )
    runs = []
    found = bench.gpu.Gpu.kernels(device, lambda: runs.append(1))
    assert found == {'sample': (12.5, 2), 'swap': (3, 1)}
    assert len(runs) == 2  # the first one compiles
