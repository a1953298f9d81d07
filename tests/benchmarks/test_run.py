"""The benchmark, on its trial case, and what keeps it honest."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import numpy
import pytest

from tests.reference import deformable_convolution_2d_sampler as oracle

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'
OVERRIDES = {'OPENBLAS_CORETYPE': 'Prescott', 'OPENBLAS_L2_SIZE': '1024'}
ALWAYS_THERE = {'chainer_deform', "Chainer's own", 'F.convolution_2d', 'matrix product'}


@pytest.fixture
def bench(monkeypatch):
    """``run.py`` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # those of matplotlib's libraries
        import run

    return run


def run(*options, **environment):
    return subprocess.run(
        [sys.executable, BENCHMARKS / 'run.py', *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path, *lines):
    """A script at this path."""
    path.write_text('\n'.join(lines) + '\n')
    path.chmod(0o755)
    return str(path)


def test_comparison(tmp_path):
    result = run('--quick', '--out', tmp_path)
    assert (result.returncode, result.stderr) == (0, '')
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.png'}
    report = json.loads(next(tmp_path.glob('*-cpu.json')).read_text())
    for pass_ in 'forward', 'forward + backward':
        rows = rows_of(report, 'tiny', pass_)
        assert rows.keys() >= ALWAYS_THERE
        for name in ALWAYS_THERE:
            assert 'reason' not in rows[name]
            assert rows[name]['cpu_ms'] > 0
            assert rows[name]['cpu_ratio'] > 0
            assert name in result.stdout
            assert_recorded(report['blas'][name]['1'], result.stdout)
        # The others are there, too, or it is said why they are not.
        assert rows.keys() | report['missing'] == set(report['contestants'])
        for name, peer in ('attention', 'torchvision'), ('PS RoI', 'OpenVINO'):
            rows = rows_of(report, f'tiny {name}', pass_)
            assert rows.keys() <= {'chainer_deform', 'chainer_deform, no Numba', peer}
            ours = rows['chainer_deform']
            if peer in report['missing']:
                assert ours['reason'] == f'no {peer} to agree with'
            else:
                assert 0 < ours['error'] < 1e-5
                assert ours['cpu_ms'] > 0
                assert peer in rows


def rows_of(report, case, pass_):
    """The rows by contestant."""
    return {
        row['contestant']: row
        for row in report['rows']
        if (row['case'], row['pass']) == (case, pass_)
    }


def assert_recorded(libraries, printed):
    """There is a BLAS, and what is known of it is printed."""
    pytest.importorskip('threadpoolctl')
    blas = [entry for entry in libraries if entry['api'] != 'openmp']
    assert blas
    for entry in blas:
        assert entry['version']
        assert entry['threads'] == 1
        for key in 'library', 'api', 'version', 'architecture':
            assert str(entry[key] or '') in printed


def test_those_that_fail_do_not_stop_the_others(tmp_path):
    """A peer is wrong forward and dies backward; the package dies in its first call."""
    dies = 'import os, signal', 'os.kill(os.getpid(), signal.SIGKILL)'
    modules, peer = tmp_path / 'modules', tmp_path / 'peer'
    for folder in modules, peer:
        folder.mkdir()
    (modules / 'numba.py').write_text('\n'.join(dies))
    (peer / 'torchvision.py').write_text(
        'class ops:\n'
        '    def deform_conv2d(x, offset, W, b, padding, mask): return 0 * x\n'
    )
    (peer / 'torch.py').write_text(
        'import numpy\n'
        'class Tensor(numpy.ndarray):\n'
        '    def detach(self): return self\n'
        '    def requires_grad_(self, wanted): return self\n'
        f'    def backward(self, gy): {"; ".join(dies)}\n'
        'def from_numpy(array): return array.view(Tensor)\n'
        'def set_num_threads(count): pass\n'
        'set_num_interop_threads = set_num_threads\n'
    )
    python = executable(
        tmp_path / 'python',
        '#!/bin/sh',
        f'PYTHONPATH={peer} exec {sys.executable} "$@"',
    )
    environment = {'TORCHVISION_PYTHON': python, 'PYTHONPATH': str(modules)}
    cases = '--case', 'tiny', 'tiny attention'
    result = run('--quick', '--out', tmp_path / 'out', *cases, **environment)
    assert (result.returncode, result.stderr) == (0, '')
    report = json.loads(next((tmp_path / 'out').glob('*.json')).read_text())
    for pass_, reason in {
        'forward': 'wrong: y is off by 1e+00',
        'forward + backward': 'died (SIGKILL)',
    }.items():
        rows = rows_of(report, 'tiny', pass_)
        assert rows['torchvision']['reason'] == reason
        assert rows['chainer_deform']['reason'] == 'died (SIGKILL)'
        assert reason in result.stdout
        for name in 'torchvision', 'chainer_deform':
            assert not {'wall_ms', 'cpu_ms'} & rows[name].keys()
        for name in ALWAYS_THERE - {'chainer_deform'}:
            assert rows[name]['cpu_ms'] > 0
        # This peer fails, so there is nothing that others could agree with.
        rows = rows_of(report, 'tiny attention', pass_)
        assert 'reason' in rows['torchvision']
        others = rows['chainer_deform, no Numba']
        assert others['reason'] == 'no torchvision to agree with'
        assert 'cpu_ms' not in others


def test_growth(tmp_path):
    result = run('--growth', '--quick', '--out', tmp_path)
    assert (result.returncode, result.stderr) == (0, '')
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.png'}
    report = json.loads(next(tmp_path.glob('*-cpu-growth.json')).read_text())
    assert len(report['rows']) == 8
    assert all(row['ratio'] >= 1 for row in report['rows'])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--case', 'none such'], '--case'),
        (['--repeat', '0'], '--repeat'),
        (['--threads', '0'], '--threads'),
        (['--pause', '-1'], '--pause'),
        (['--pause', 'nan'], '--pause'),
    ],
)
def test_options_that_do_not_fit(options, message):
    result = run(*options)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('offset_groups', [1, 2])
@pytest.mark.parametrize('mask', [False, True])
def test_expected_results(bench, groups, offset_groups, mask):
    case = bench.Case(2, 6, 3, 5, 3, groups, offset_groups, mask)
    arrays = bench.random_arrays(case)
    assert ('mask' in arrays) == mask
    y, gradients = oracle(**arrays, pad=1, **case.options)
    expected = {'y': y, **{f'g{name}': array for name, array in gradients.items()}}
    actual = bench.reference.deformable_convolution(**arrays, **case.options)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        numpy.testing.assert_allclose(actual[name], array, 1e-10, 1e-10, err_msg=name)


def test_offsets_are_exact_and_never_on_a_lattice_line(bench):
    arrays = bench.random_arrays(bench.Case(1, 4, 4, 40))
    offset = arrays['offset']
    assert abs(offset.std() - 2) < 0.02
    assert (offset % 1 != 0).all()
    for place in -1, 400:
        at = numpy.float32(place) + offset
        numpy.testing.assert_array_equal(at, place + offset.astype(float))


@pytest.mark.parametrize('name', ['decoder', 'RoI align, 128 boxes', 'PS RoI, 1 class'])
def test_points_of_operators_are_clear_of_lattice_lines_and_borders(bench, name):
    """Rounding errors of float32 do not move them to other pixels."""
    case = bench.CASES[name]
    arrays = case.random_arrays()
    if name == 'decoder':
        sides = numpy.array([(w, h) for h, w in case.options['shapes']])
        places = arrays['locations'] * sides.reshape(-1, 1, 2).astype('f') - 0.5
    else:
        moves = case.options['gamma'] * arrays['offset'].astype(float)
        rois = arrays['rois'] * case.options['spatial_scale']
        if 'classes' in case.sizes:
            rois[:, 2:] += case.options['spatial_scale']
        sizes = rois[:, 2:] - rois[:, :2]
        assert (rois[:, :2] % 1 == 0).all()
        assert (sizes % 7 == 0).all()
        assert rois.min() >= 0
        assert (rois[:, 2:] <= arrays['x'].shape[2:]).all()
        # Without offsets, quarters of a pixel, as lattice lines and borders are.
        moves = moves.reshape(len(rois), -1, 2, 7, 7)[:, :, ::-1]
        places = 4 * moves * sizes[:, None, :, None, None]
    assert (abs(places - places.round()) > 1 / 512).all()


class FakeWorker:
    """A contestant whose results are given; a run takes it a second, or two of CPU."""

    def __init__(self, results):
        self.results = lambda: results

    def load(self, case, backward):
        pass

        self.pauses = []

    def ask(self, command, pause=None):
        self.pauses.append(pause)
        if command == 'memory':
            return {'peak': 3 << 20, 'results': 1 << 20}
        return {'wall': 1, 'cpu': 2}


def measured(bench, expected, results):
    """The row of a contestant with these results."""
    worker = FakeWorker(results)
    row = bench.check(worker, worker, bench.Case(1, 2, 2, 3), True, expected)
    bench.take_times([row], [worker], 3, 0.5)
    assert 'reason' in row or worker.pauses == [None, 0.5, 0.5, 0.5]
    return row


def test_right_contestant_gets_its_time(bench):
    expected = {'y': numpy.array([1.0, -4.0]), 'gx': numpy.array([0.5])}
    close = {'y': numpy.array([1.0003, -4.0]), 'gx': numpy.array([0.5])}
    row = measured(bench, expected, close)
    assert row.pop('error') == pytest.approx(0.0003 / 4)
    assert row == {'peak_mib': 3, 'beside_mib': 2, 'wall_ms': 1000, 'cpu_ms': 2000}


@pytest.mark.parametrize(
    'gradient', [[0.5001], [numpy.nan], [numpy.inf], [0.5, 0.5], None]
)
def test_wrong_contestant_gets_no_time(bench, gradient):
    expected = {'y': numpy.array([1.0, -4.0]), 'gx': numpy.array([0.5])}
    results = {'y': expected['y']}
    if gradient is not None:
        results['gx'] = numpy.array(gradient)
    row = measured(bench, expected, results)
    assert list(row) == ['reason']
    assert row['reason'].startswith('wrong: gx is off by ')


def test_dead_contestant_gets_no_time(bench, tmp_path):
    with bench.Worker('none such', 1, tmp_path) as worker:
        with pytest.raises(bench.Failure, match='none such'):
            worker.receive()
        worker.process.kill()
        with pytest.raises(bench.Failure, match=r'died \(SIGKILL\)'):
            worker.ask('time')


def test_interpreter_that_is_not_there(bench, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHVISION_PYTHON', str(tmp_path / 'python'))
    worker = bench.Worker('torchvision', 1, tmp_path)
    with pytest.raises(bench.Failure, match='No such file'):
        worker.receive()


def test_environment_of_the_contestants(bench, tmp_path, monkeypatch):
    python = executable(
        tmp_path / 'python',
        f'#!{sys.executable}',
        'import json, os',
        'print(json.dumps(dict(os.environ)))',
    )
    monkeypatch.setattr(sys, 'executable', python)
    monkeypatch.setenv('TORCHVISION_PYTHON', python)
    monkeypatch.setenv('PYTHONPATH', 'elsewhere')
    for name, value in OVERRIDES.items():
        monkeypatch.setenv(name, value)
    for name in bench.CONTESTANTS:
        with bench.Worker(name, 2, tmp_path, OPENBLAS_L2_SIZE='1024') as worker:
            environment = worker.receive()
        assert environment['OPENBLAS_NUM_THREADS'] == '2'
        assert not OVERRIDES.keys() & environment.keys(), name
        path = f'{BENCHMARKS.parent}{os.pathsep}elsewhere'
        expected = None if name == 'torchvision' else path
        assert environment.get('PYTHONPATH') == expected


def test_expected_results_keep_the_environment():
    code = 'import os, run; print(os.environ["OPENBLAS_CORETYPE"])'
    printed = subprocess.check_output(
        [sys.executable, '-c', code],
        env={**os.environ, **OVERRIDES},
        cwd=BENCHMARKS,
        text=True,
    )
    assert printed.split() == ['Prescott']


def test_record_of_the_blas(bench, tmp_path, monkeypatch):
    pytest.importorskip('threadpoolctl')
    code = (
        'import json, numpy, threadpoolctl;'
        'print(json.dumps(threadpoolctl.threadpool_info()))'
    )
    environment = {**os.environ, 'OPENBLAS_NUM_THREADS': '2', 'OMP_NUM_THREADS': '2'}
    for name, value in OVERRIDES.items():
        environment.pop(name, None)
        monkeypatch.setenv(name, value)
    printed = subprocess.check_output([sys.executable, '-c', code], env=environment)
    expected = {
        (
            os.path.basename(pool['filepath']),
            pool['internal_api'],
            pool['version'],
            pool.get('architecture'),
            pool['num_threads'],
        )
        for pool in json.loads(printed)
    }
    with bench.Worker('matrix product', 2, tmp_path) as worker:
        worker.receive()
        libraries = worker.ask('blas')['libraries']
    keys = 'library', 'api', 'version', 'architecture', 'threads'
    assert {tuple(entry[key] for key in keys) for entry in libraries} == expected


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='not on Linux')
def test_record_without_threadpoolctl(bench, tmp_path, monkeypatch):
    (tmp_path / 'threadpoolctl.py').write_text('raise ImportError')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with bench.Worker('matrix product', 1, tmp_path) as worker:
        worker.receive()
        libraries = worker.ask('blas')['libraries']
    assert libraries
    for entry in libraries:
        assert entry.keys() == {'library'}
        assert 'blas' in entry['library'] or 'mkl' in entry['library']
    assert libraries[0]['library'] in bench.reporting.blas_table(
        {'matrix product': {'1': libraries}}
    )


def test_idleness_before_each_run_is_not_timed(bench):
    import worker

    calls = []
    seconds = worker.stopwatch(lambda: calls.append(time.perf_counter()), 0.25, 0.1)
    assert len(calls) == 4  # the first is not counted
    assert min(numpy.diff(calls)) >= 0.1
    assert seconds['wall'] < 0.1


def test_gain_from_threads(bench):
    rows = [
        {'contestant': 'ours', 'threads': 1, 'wall_ms': 3},
        {'contestant': 'ours', 'threads': 2, 'wall_ms': 2},
        {'contestant': 'ours', 'threads': 4, 'reason': 'wrong'},
        {'contestant': 'another', 'threads': 2, 'wall_ms': 1},
    ]
    gains = bench.reporting.thread_gains(rows, 'ours')
    assert gains.endswith(': 1.50 (threads: 2)')
    assert bench.reporting.thread_gains(rows, 'another') == ''
    assert bench.reporting.thread_gains(rows, 'none such') == ''
