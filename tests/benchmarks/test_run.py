"""The benchmark, on its trial case, and what keeps it honest."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import warnings

import numpy
import pytest

from tests.reference import deformable_convolution_2d_sampler as oracle

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'
ALWAYS_THERE = {'chainer_deform', "Chainer's own", 'F.convolution_2d', 'matrix product'}


@pytest.fixture
def bench(monkeypatch):
    """``run.py`` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # those of matplotlib's libraries
        import run

    return run


def run(*options):
    return subprocess.run(
        [sys.executable, BENCHMARKS / 'run.py', *options],
        capture_output=True,
        text=True,
        check=False,
    )


def test_comparison(tmp_path):
    result = run('--quick', '--out', tmp_path)
    assert (result.returncode, result.stderr) == (0, '')
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.png'}
    report = json.loads(next(tmp_path.glob('*-cpu.json')).read_text())
    for pass_ in 'forward', 'forward + backward':
        rows = {
            row['contestant']: row for row in report['rows'] if row['pass'] == pass_
        }
        assert rows.keys() >= ALWAYS_THERE
        for name in ALWAYS_THERE:
            assert 'reason' not in rows[name]
            assert rows[name]['cpu_ms'] > 0
            assert rows[name]['cpu_ratio'] > 0
            assert name in result.stdout
    # The others are there, too, or it is said why they are not.
    assert rows.keys() | report['missing'] == set(report['contestants'])


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


class FakeWorker:
    """A contestant whose results are given; a run takes it a second, or two of CPU."""

    def __init__(self, results):
        self.results = lambda: results

    def load(self, case, backward):
        pass

    def ask(self, command):
        if command == 'memory':
            return {'peak': 3 << 20, 'results': 1 << 20}
        return {'wall': 1, 'cpu': 2}


def measured(bench, expected, results):
    """The row of a contestant with these results."""
    worker = FakeWorker(results)
    row = bench.check(worker, worker, bench.Case(1, 2, 2, 3), True, expected)
    bench.take_times([row], [worker], 3)
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
        with pytest.raises(bench.Failure, match='died'):
            worker.ask('time')


def test_interpreter_that_is_not_there(bench, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHVISION_PYTHON', str(tmp_path / 'python'))
    worker = bench.Worker('torchvision', 1, tmp_path)
    with pytest.raises(bench.Failure, match='No such file'):
        worker.receive()
