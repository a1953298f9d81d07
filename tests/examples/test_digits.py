"""The digits example, run as its users run it: as a program.

Most runs train on a small stand-in for MNIST, put where Chainer caches its downloads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'digits' / 'train.py'


def run(cwd, options, dataset='mnist'):
    """Runs the script with options that are separated by spaces."""
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        'CHAINER_DATASET_ROOT': str(cwd / 'datasets'),
        'http_proxy': 'http://127.0.0.1:9',  # nothing listens there: no downloads
    }
    # NumPy leaves a broken file open, which it should not: a ResourceWarning.
    warnings = ['-W', 'error', '-W', 'ignore::ResourceWarning']
    return subprocess.run(
        [sys.executable, *warnings, SCRIPT, '--dataset', dataset, *options.split()],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(cwd, options, dataset='mnist'):
    """Runs the script where it has to succeed, and returns what it printed."""
    result = run(cwd, options, dataset)
    assert (result.returncode, result.stderr) == (0, '')
    return result.stdout


@pytest.fixture
def cwd(tmp_path):
    """A directory with 160 training and 100 test images, in the place of MNIST."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    # 8 x 8 -> 24 x 24 -> 28 x 28
    x = numpy.kron(digits.images * 15, numpy.ones((1, 3, 3)))
    x = numpy.pad(x, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784).astype(numpy.uint8)
    t = digits.target.astype(numpy.uint8)
    folder = tmp_path / 'datasets' / 'pfnet' / 'chainer' / 'mnist'
    folder.mkdir(parents=True)
    numpy.savez(folder / 'train.npz', x=x[:160], y=t[:160])
    numpy.savez(folder / 'test.npz', x=x[160:260], y=t[160:260])
    return tmp_path


def read_log(path):
    """Returns a LogReport's entries, without the times."""
    log = json.loads(path.read_text())
    for entry in log:
        del entry['elapsed_time']
    return log


@pytest.mark.slow
def test_run_of_all_models(cwd):
    printed = train(
        cwd, '--model plain deformable modulated --epoch 3 --out some/where'
    )
    out = cwd / 'some' / 'where'
    report = json.loads((out / 'accuracies.json').read_text())
    models = report.pop('models')
    assert report == {'dataset': 'mnist', 'epoch': 3, 'batchsize': 32, 'seed': 0}
    assert list(models) == ['plain', 'deformable', 'modulated']
    for kind, result in models.items():
        log = read_log(out / kind / 'log')
        assert [entry['epoch'] for entry in log] == [1, 2, 3]
        assert log[-1]['main/loss'] < 0.8 * log[0]['main/loss']
        for name, key in ('upright', 'validation'), ('warped', 'warped'):
            accuracy = log[-1][f'{key}/main/accuracy']
            assert result[f'{name}_accuracy'] == pytest.approx(accuracy, abs=1e-6)
        assert result['seconds'] > 0
        row = (
            f'{kind} +{result["parameters"]:,} +{result["offset_parameters"]:,} '
            f'+{result["upright_accuracy"]:.2%} +{result["warped_accuracy"]:.2%} '
            f'+{result["seconds"]:.1f}'
        )
        assert re.search(f'^{row}$', printed, re.MULTILINE)
        files = {f'snapshot_epoch_{epoch}.npz' for epoch in (1, 2, 3)}
        files |= {'log', 'loss.png', 'accuracy.png'}
        assert {path.name for path in (out / kind).iterdir()} == files

    # Apart from the offset convolutions, the models are equal in size.
    sizes = {m['parameters'] - m['offset_parameters'] for m in models.values()}
    assert len(sizes) == 1
    assert models['plain']['offset_parameters'] == 0
    assert {path.name for path in out.iterdir()} == {
        *models, 'accuracies.json', 'curves.png'}  # fmt: skip

    import matplotlib.image

    height, width, _ = matplotlib.image.imread(out / 'curves.png').shape
    assert (width, height) == (1200, 480)


@pytest.mark.slow
def test_resumed_training_is_the_same(cwd):
    train(cwd, '--epoch 3 --batchsize 48 --seed 3 --out through')
    train(cwd, '--epoch 1 --batchsize 48 --seed 3 --out begun')
    snapshot = 'begun/deformable/snapshot_epoch_1.npz'
    train(cwd, f'--epoch 3 --batchsize 48 --seed 3 --out ended --resume {snapshot}')

    assert len(read_log(cwd / 'ended/deformable/log')) == 3
    assert read_log(cwd / 'ended/deformable/log') == read_log(
        cwd / 'through/deformable/log'
    )
    name = 'deformable/snapshot_epoch_3.npz'
    with numpy.load(cwd / 'through' / name) as a, numpy.load(cwd / 'ended' / name) as b:
        assert set(a) == set(b)
        state = [key for key in a if key.startswith('updater/')]
        assert any(key.endswith('offset_conv/W') for key in state)
        for key in state:
            numpy.testing.assert_array_equal(a[key], b[key], key)


@pytest.mark.slow
def test_result_depends_on_the_seed_alone(cwd):
    train(cwd, '--epoch 1 --seed 7 --model plain deformable --out both')
    train(cwd, '--epoch 1 --seed 7 --model deformable --out alone')
    train(cwd, '--epoch 1 --seed 8 --model deformable --out other')
    both, alone, other = (
        read_log(cwd / out / 'deformable' / 'log') for out in ('both', 'alone', 'other')
    )
    assert both == alone
    assert both != other


def test_digits_from_scikit_learn(tmp_path):
    train(tmp_path, '--model plain --epoch 1', dataset='digits')
    report = json.loads((tmp_path / 'result' / 'accuracies.json').read_text())
    result = report['models']['plain']
    assert result['upright_accuracy'] > 0.6
    assert 0.2 < result['warped_accuracy'] < result['upright_accuracy']


def test_images():
    spec = importlib.util.spec_from_file_location('digits', SCRIPT.with_name('data.py'))
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)

    sets = [
        tuple(map(numpy.array, zip(*dataset)))
        for dataset in data.load_datasets('digits')
    ]
    for (images, labels), size in zip(sets, (1297, 500, 500)):
        assert images.shape == (size, 1, 28, 28)
        assert images.dtype == numpy.float32
        assert images.min() == 0
        assert 0.9 < images.max() <= 1
        assert labels.dtype == numpy.int32
        assert min(numpy.bincount(labels)) > 0.09 * size  # all digits in all sets
    _, (upright, labels), (warped, warped_labels) = sets
    assert (upright != warped).any(axis=(1, 2, 3)).all()
    numpy.testing.assert_array_equal(labels, warped_labels)
    numpy.testing.assert_array_equal(data.warp(upright), warped)


def expect_error(result, message):
    """Checks that a run ended with one line and exit status 2."""
    assert result.returncode == 2
    assert re.fullmatch(f'train.py: error: .*{message}.*\n', result.stderr)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--epoch 0', "--epoch: must be an integer from 1 to .*'0'"),
        ('--epoch 1.5', "--epoch: must be an integer .*'1.5'"),
        ('--batchsize -3', "--batchsize: must be an integer .*'-3'"),
        ('--batchsize 161', '--batchsize 161 is too large: .* 160 training images'),
        ('--seed -1', "--seed: must be an integer from 0 to 4294967295, not '-1'"),
        ('--seed 4294967296', '--seed: must be an integer'),
        ('--model other', "--model: invalid choice: 'other'"),
        ('--device nonsense', 'cannot use --device nonsense: '),
        ('--device @cupy:4096', 'cannot use --device @cupy:4096: '),
        ('--out a-file', 'cannot write to a-file/deformable: Not a directory'),
        ('--model plain modulated --resume x', '--resume continues one model'),
        ('--resume missing.npz', 'cannot read --resume missing.npz: No such file'),
        ('--resume datasets', 'cannot read --resume datasets: Is a directory'),
        ('--resume a-file', '--resume a-file is broken'),
        ('--resume empty', '--resume empty is broken'),
        ('--resume other.npz', '--resume other.npz is broken, or no snapshot'),
    ],
)
def test_errors(cwd, options, message):
    (cwd / 'a-file').write_text('no snapshot\n')
    (cwd / 'empty').touch()
    numpy.savez(cwd / 'other.npz', x=numpy.zeros(3))
    expect_error(run(cwd, options), message)


def test_errors_of_snapshots(cwd):
    train(cwd, '--model plain --epoch 1')
    snapshot = cwd / 'result' / 'plain' / 'snapshot_epoch_1.npz'
    result = run(cwd, f'--model plain --epoch 1 --resume {snapshot}')
    expect_error(result, 'has 1 epochs already: --epoch 1 is too few')
    expect_error(run(cwd, f'--model deformable --resume {snapshot}'), 'no snapshot of')
    result = run(cwd, f'--model plain --resume {snapshot}', dataset='digits')
    expect_error(result, 'no snapshot of this model and dataset')

    content = snapshot.read_bytes()
    snapshot.write_bytes(content[: len(content) // 2])
    expect_error(run(cwd, f'--model plain --resume {snapshot}'), 'is broken')
    middle = len(content) // 2
    snapshot.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    expect_error(run(cwd, f'--model plain --resume {snapshot}'), 'is broken')


def test_errors_of_datasets(cwd):
    result = run(cwd, '--epoch 1', dataset='fashion-mnist')
    expect_error(result, 'cannot load --dataset fashion-mnist: .*Connection refused')
    path = cwd / 'datasets' / 'pfnet' / 'chainer' / 'mnist' / 'test.npz'
    path.write_bytes(path.read_bytes()[:1000])
    expect_error(run(cwd, '--epoch 1'), 'cannot load --dataset mnist: ')
