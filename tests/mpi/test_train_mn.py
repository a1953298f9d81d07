"""The digits example with several workers, started by mpiexec as its users start it.

It trains on a small stand-in for MNIST. Neither its training images nor its test
images can be divided by two.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chainer
import numpy
import pytest

from tests.examples import test_digits
from tests.programs import (
    EXAMPLE_WARNINGS,
    environment,
    expect_same_training,
    expect_success,
    load_module,
    read_log,
)

HERE = pathlib.Path(__file__).parent
SCRIPT = test_digits.SCRIPT.with_name('train_mn.py')
TRAIN_SIZE, TEST_SIZE = 161, 101
TIMEOUT = 200  # seconds; a run takes ten

# The environment's own mpiexec goes with its mpi4py.
MPIEXEC = shutil.which('mpiexec', path=os.path.dirname(sys.executable))
MPIEXEC = MPIEXEC or shutil.which('mpiexec')

MPIRUN = [MPIEXEC, '-n', '2']

needs_mpi = pytest.mark.skipif(
    not (MPIEXEC and importlib.util.find_spec('mpi4py')),
    reason='mpi4py or mpiexec is not installed: make test-mpi installs both',
)


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    """The directory of Chainer's data sets."""
    root = tmp_path_factory.mktemp('datasets')
    test_digits.make_mnist(root, TRAIN_SIZE, TEST_SIZE)
    return root


@pytest.fixture
def run(datasets, tmp_path):
    """Runs the script in ``tmp_path`` with two workers."""
    return lambda options: run_workers(datasets, tmp_path, [SCRIPT], options)


@pytest.fixture(scope='module')
def trained(datasets, tmp_path_factory):
    """What a training printed, and the directory it ran in."""
    cwd = tmp_path_factory.mktemp('trained')
    options = '--epoch 3 --batchsize 20 --out some/where'
    result = run_workers(datasets, cwd, [HERE / 'watched.py'], options)
    expect_success(result)
    return result.stdout, cwd


def start(datasets, cwd, command, options, prefix=()):
    """Starts a program with options that are separated by spaces."""
    program = [sys.executable, *EXAMPLE_WARNINGS, *command]
    return subprocess.Popen(
        [*prefix, *program, '--dataset', 'mnist', *options.split()],
        cwd=cwd,
        env={
            **environment(**test_digits.offline(datasets)),
            # For Open MPI, in a container.
            'OMPI_ALLOW_RUN_AS_ROOT': '1',
            'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=TIMEOUT):
    """Waits for a program; what takes too long is ended with all its processes."""
    with process:
        try:
            output = process.communicate(timeout=timeout)
        finally:
            for pid in alive_under(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def run_workers(datasets, cwd, command, options):
    """Runs a program with two workers."""
    return finish(start(datasets, cwd, command, options, MPIRUN))


def alive_under(pid):
    """Returns a process, if it is alive, and its descendants."""
    parents = {}
    for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = file.read_text().rpartition(')')[2].split()[:2]
            if state != 'Z':
                parents[int(file.parent.name)] = int(parent)
    found = [pid] if pid in parents else []
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found


def wait_until(condition):
    """Waits for what another process does."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def expect_error(result, message):
    """Checks that all workers ended with one line for all, and exit status 2."""
    assert result.returncode == 2
    assert re.match(f'train_mn.py: error: .*{message}.*\n', result.stderr)
    # Open MPI's launcher adds lines of its own.
    assert result.stderr.count('error: ') == 1
    assert 'Traceback' not in result.stderr


@needs_mpi
@pytest.mark.slow
def test_only_the_first_worker_writes(trained):
    printed, cwd = trained
    out = cwd / 'some' / 'where'
    files = {'deformable', 'accuracies.json', 'curves.png'}
    assert {path.name for path in out.iterdir()} == files
    files = {f'snapshot_epoch_{epoch}.npz' for epoch in (1, 2, 3)}
    files |= {f'sampling_points_epoch_{epoch}.png' for epoch in (1, 2, 3)}
    files |= {'log', 'loss.png', 'accuracy.png'}
    assert {path.name for path in (out / 'deformable').iterdir()} == files

    report = json.loads((out / 'accuracies.json').read_text())
    assert report['workers'] == 2
    for line in '\ndeformable\n', 'epoch       main/loss', 'See accuracies.json':
        assert printed.count(line) == 1


@needs_mpi
@pytest.mark.slow
def test_losses_fall_and_are_those_of_all_workers(trained):
    _, cwd = trained
    log = read_log(cwd / 'some' / 'where' / 'deformable' / 'log')
    assert [entry['epoch'] for entry in log] == [1, 2, 3]
    assert log[-1]['main/loss'] < 0.8 * log[0]['main/loss']

    losses = numpy.array([numpy.load(cwd / f'losses-{rank}.npy') for rank in (0, 1)])
    assert (losses[0] != losses[1]).all()  # the workers see different images
    first = 0
    for entry in log:
        last = entry['iteration']
        mean = losses[:, first:last].mean()
        assert entry['main/loss'] == pytest.approx(mean, rel=1e-9)
        first = last
    assert first == losses.shape[1]


@needs_mpi
@pytest.mark.slow
def test_workers_end_equal(trained):
    _, cwd = trained
    directory = cwd / 'some' / 'where' / 'deformable'
    iterations = read_log(directory / 'log')[-1]['iteration']
    with contextlib.ExitStack() as stack:
        files = 'states-0.npz', 'states-1.npz', directory / 'snapshot_epoch_3.npz'
        a, b, snapshot = (stack.enter_context(numpy.load(cwd / name)) for name in files)
        assert set(a) == set(b)
        for end in 'offset_conv/W', 'avg_var', '/order':
            assert any(key.endswith(end) for key in a)
        for key in a:
            numpy.testing.assert_array_equal(a[key], b[key], key)
            numpy.testing.assert_array_equal(a[key], snapshot[f'updater/{key}'], key)
        assert a['optimizer:main/t'] == iterations  # each of them was an update


@needs_mpi
@pytest.mark.slow
def test_accuracy_is_that_of_one_process(trained, datasets):
    directory = trained[1] / 'some' / 'where' / 'deformable'
    model = chainer.links.Classifier(
        load_module(SCRIPT.with_name('models.py')).DigitNet('deformable')
    )
    with numpy.load(datasets / test_digits.MNIST / 'test.npz') as file:
        t = file['y'].astype(numpy.int32)
        x = file['x'].reshape(-1, 1, 28, 28).astype(numpy.float32) / 255
    warped = load_module(SCRIPT.with_name('data.py')).warp(x)
    assert len(t) == TEST_SIZE
    for entry in read_log(directory / 'log'):
        path = directory / f'snapshot_epoch_{entry["epoch"]}.npz'
        chainer.serializers.load_npz(path, model, path='updater/model:main/')
        for name, images in ('validation', x), ('warped', warped):
            with chainer.using_config('train', False), chainer.no_backprop_mode():
                loss = float(model(images, t).array)
            accuracy = (model.y.array.argmax(axis=1) == t).mean()
            assert entry[f'{name}/main/accuracy'] == pytest.approx(accuracy, rel=1e-6)
            assert entry[f'{name}/main/loss'] == pytest.approx(loss, rel=1e-5)


@needs_mpi
@pytest.mark.slow
def test_resumed_training_is_the_same(trained, datasets, run, tmp_path):
    expected = trained[1] / 'some' / 'where' / 'deformable'
    snapshot = expected / 'snapshot_epoch_1.npz'
    options = f'--epoch 3 --batchsize 20 --resume {snapshot}'
    expect_success(run(options))
    directory = tmp_path / 'result' / 'deformable'
    expect_same_training(directory, expected, epoch=3)

    # The parts of another number of workers are others.
    alone = finish(start(datasets, tmp_path, [SCRIPT], options))
    expect_error(alone, 'no snapshot of this model, dataset and number of workers')


@needs_mpi
@pytest.mark.slow
def test_one_worker_without_mpiexec(datasets, tmp_path):
    options = '--model plain --epoch 2'
    expect_success(finish(start(datasets, tmp_path, [SCRIPT], options)))
    first, second = read_log(tmp_path / 'result' / 'plain' / 'log')
    assert second['main/loss'] < first['main/loss']


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--epoch 0', "--epoch: must be an integer from 1 to .*'0'"),
        ('--communicator other', "--communicator: invalid choice: 'other'"),
        ('--batchsize 82', '82 is too large: each of 2 workers has 81 training images'),
        ('--out a-file', 'cannot write to a-file/deformable: Not a directory'),
        ('--resume missing.npz', 'cannot read --resume missing.npz: No such file'),
        ('--dataset fashion-mnist', 'cannot load --dataset fashion-mnist: '),
    ],
)
def test_errors(run, tmp_path, options, message):
    (tmp_path / 'a-file').touch()
    expect_error(run(options), message)


@needs_mpi
@pytest.mark.slow
def test_error_of_one_worker(datasets, tmp_path):
    result = run_workers(datasets, tmp_path, [HERE / 'failing.py', 'device'], '')
    result.stderr = result.stderr.replace('failing.py', SCRIPT.name)
    expect_error(result, 'no device for the second worker')


@needs_mpi
@pytest.mark.slow
def test_too_many_workers(tmp_path):
    test_digits.make_mnist(tmp_path, 161, 1)
    result = run_workers(tmp_path, tmp_path, [SCRIPT], '')
    expect_error(result, '2 workers are too many for 1 images')


@needs_mpi
@pytest.mark.slow
def test_pure_nccl_without_a_gpu(run):
    if importlib.util.find_spec('cupy'):
        pytest.skip('CuPy is installed')
    message = 'cannot use --communicator pure_nccl, which needs CuPy and NCCL'
    expect_error(run('--communicator pure_nccl'), message)


def test_without_mpi4py(tmp_path):
    (tmp_path / 'mpi4py.py').write_text('raise ModuleNotFoundError("it is gone")')
    path = os.pathsep.join([str(tmp_path), environment()['PYTHONPATH']])
    result = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, 'PYTHONPATH': path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    expect_error(result, r'needs MPI: pip install mpi4py mpich \(it is gone\)')


@needs_mpi
@pytest.mark.slow
def test_an_exception_in_one_worker_ends_all(datasets, tmp_path):
    result = run_workers(
        datasets, tmp_path, [HERE / 'failing.py', 'training'], '--model plain'
    )
    assert result.returncode not in (0, 2)
    assert 'ZeroDivisionError: in the second worker\n' in result.stderr
    assert 'MPI_Abort' in result.stderr


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/stat').exists(), reason='no /proc')
def test_a_killed_worker_ends_all(datasets, tmp_path):
    options = '--model plain --epoch 100000'
    process = start(datasets, tmp_path, [SCRIPT], options, MPIRUN)
    try:
        log = tmp_path / 'result' / 'plain' / 'log'
        wait_until(lambda: log.exists() or process.poll() is not None)
        alive = alive_under(process.pid)
        workers = [pid for pid in alive if executable(pid) == sys.executable]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
    finally:
        result = finish(process, 30)
    assert result.returncode != 0
    wait_until(lambda: not any(map(alive_under, alive)))


def executable(pid):
    """Returns the program that a process runs, as it was called."""
    return pathlib.Path(f'/proc/{pid}/cmdline').read_text().partition('\0')[0]
