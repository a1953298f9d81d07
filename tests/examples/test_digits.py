"""The digits example, run as its users run it: as a program.

Most runs train on a small stand-in for MNIST, put where Chainer keeps its data sets.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import numpy
import pytest
import sklearn.datasets

from tests.programs import (
    ROOT,
    expect_error,
    expect_picture,
    expect_same_training,
    expect_success,
    load_module,
    read_log,
    run_example,
)

SCRIPT = ROOT / 'examples' / 'digits' / 'train.py'
MNIST = pathlib.Path('pfnet', 'chainer', 'mnist')  # where Chainer looks for it
MODELS = ['plain', 'deformable', 'modulated']


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    """The directory of Chainer's data sets, MNIST with 160 and 100 images."""
    root = tmp_path_factory.mktemp('datasets')
    make_mnist(root, 160, 100)
    return root


def make_mnist(root, train_size, test_size):
    """Puts a stand-in for MNIST where Chainer looks for it under ``root``."""
    digits = sklearn.datasets.load_digits()
    # 8 x 8 -> 24 x 24 -> 28 x 28
    x = numpy.kron(digits.images * 15, numpy.ones((1, 3, 3)))
    x = numpy.pad(x, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784).astype(numpy.uint8)
    t = digits.target.astype(numpy.uint8)
    (root / MNIST).mkdir(parents=True)
    end = train_size + test_size
    numpy.savez(root / MNIST / 'train.npz', x=x[:train_size], y=t[:train_size])
    numpy.savez(root / MNIST / 'test.npz', x=x[train_size:end], y=t[train_size:end])


@pytest.fixture
def run(datasets, tmp_path):
    """Runs the script in ``tmp_path``."""
    return lambda options: run_script(datasets, tmp_path, options)


@pytest.fixture(scope='module')
def trained(datasets, tmp_path_factory):
    """What a training of all models printed, and the directory it wrote to."""
    cwd = tmp_path_factory.mktemp('trained')
    options = f'--model {" ".join(MODELS)} --epoch 3 --batchsize 48 --out some/where'
    result = run_script(datasets, cwd, options)
    assert (result.returncode, result.stderr) == (0, '')
    return result.stdout, cwd / 'some' / 'where'


def run_script(datasets, cwd, options):
    """Runs the script with options that are separated by spaces."""
    options = f'--dataset mnist {options}'
    return run_example(SCRIPT, cwd, options, **offline(datasets))


def offline(datasets):
    """Returns what tells a script where data sets are, and not to load them down."""
    return {
        'CHAINER_DATASET_ROOT': str(datasets),
        'http_proxy': 'http://127.0.0.1:9',  # nothing listens there
        'no_proxy': '',
    }


@pytest.mark.slow
def test_files(trained):
    _, out = trained
    files = {*MODELS, 'accuracies.json', 'curves.png'}
    assert {path.name for path in out.iterdir()} == files
    files = {f'snapshot_epoch_{epoch}.npz' for epoch in (1, 2, 3)}
    files |= {'log', 'loss.png', 'accuracy.png'}
    points = {f'sampling_points_epoch_{epoch}.png' for epoch in (1, 2, 3)}
    for kind in MODELS:
        found = {path.name for path in (out / kind).iterdir()}
        assert found == (files if kind == 'plain' else files | points)
    expect_picture(out / 'curves.png', 1200, 480)


@pytest.mark.slow
def test_results(trained):
    printed, out = trained
    report = json.loads((out / 'accuracies.json').read_text())
    models = report.pop('models')
    assert report == {'dataset': 'mnist', 'epoch': 3, 'batchsize': 48, 'seed': 0}
    assert list(models) == MODELS
    for kind, result in models.items():
        log = read_log(out / kind / 'log')
        assert [entry['epoch'] for entry in log] == [1, 2, 3]
        assert log[-1]['main/loss'] < 0.8 * log[0]['main/loss']
        for conv in 2, 3:
            key = f'main/predictor/convs/{conv}/offset_mean'
            if kind == 'plain':
                assert key not in log[-1]
            else:
                assert 0 < log[0][key] < log[-1][key]  # pixels
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

    # Apart from the offset convolutions, the models are equal in size.
    sizes = {m['parameters'] - m['offset_parameters'] for m in models.values()}
    assert len(sizes) == 1
    assert models['plain']['offset_parameters'] == 0


@pytest.mark.slow
def test_resumed_training_is_the_same(trained, run, tmp_path):
    # It is also the same without the training of another model before it.
    expect_success(run('--epoch 1 --batchsize 48'))
    directory = tmp_path / 'result' / 'deformable'
    snapshot = directory / 'snapshot_epoch_1.npz'
    expect_success(run(f'--epoch 3 --batchsize 48 --resume {snapshot}'))
    expect_same_training(directory, trained[1] / 'deformable', epoch=3)


@pytest.mark.slow
def test_another_seed_is_another_training(trained, run, tmp_path):
    expect_success(run('--epoch 1 --batchsize 48 --model plain --seed 1'))
    first, *_ = read_log(trained[1] / 'plain' / 'log')
    assert read_log(tmp_path / 'result' / 'plain' / 'log') != [first]


@pytest.mark.slow
def test_errors_of_snapshots(trained, run, tmp_path):
    snapshot = trained[1] / 'plain' / 'snapshot_epoch_3.npz'
    result = run(f'--model plain --epoch 3 --resume {snapshot}')
    expect_error(result, 'has 3 epochs already: --epoch 3 is too few')
    result = run(f'--model deformable --resume {snapshot}')
    expect_error(result, 'no snapshot of this model and dataset')

    content = snapshot.read_bytes()
    middle = len(content) // 2
    broken = tmp_path / 'broken.npz'
    for rest in b'', bytes(64) + content[middle + 64 :]:
        broken.write_bytes(content[:middle] + rest)
        expect_error(run(f'--model plain --resume {broken}'), 'is broken')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--epoch 0', "--epoch: must be an integer from 1 to .*'0'"),
        ('--batchsize 1.5', "--batchsize: must be an integer .*'1.5'"),
        ('--batchsize 161', '--batchsize 161 is too large: .* 160 training images'),
        ('--seed 4294967296', '--seed: must be an integer from 0 to 4294967295'),
        ('--model other', "--model: invalid choice: 'other'"),
        ('--device nonsense', 'cannot use --device nonsense: '),
        ('--device @cupy:4096', 'cannot use --device @cupy:4096: '),
        ('--out a-file', 'cannot write to a-file/deformable: Not a directory'),
        ('--model plain modulated --resume x', '--resume continues one model'),
        ('--resume missing.npz', 'cannot read --resume missing.npz: No such file'),
        ('--resume a-file', '--resume a-file is broken'),
        ('--resume other.npz', '--resume other.npz is broken, or no snapshot'),
    ],
)
def test_errors(run, tmp_path, options, message):
    (tmp_path / 'a-file').write_text('no snapshot\n')
    numpy.savez(tmp_path / 'other.npz', x=numpy.zeros(3))
    expect_error(run(options), message)


def test_errors_of_datasets(datasets, run, tmp_path):
    # The offline stand-in is of MNIST alone.
    result = run('--dataset fashion-mnist')
    expect_error(result, 'cannot load --dataset fashion-mnist: .*Connection refused')
    copy = tmp_path / 'copy'
    shutil.copytree(datasets / MNIST, copy / MNIST)
    file = copy / MNIST / 'test.npz'
    file.write_bytes(file.read_bytes()[:1000])
    expect_error(run_script(copy, tmp_path, ''), 'cannot load --dataset mnist: ')


def test_digits_from_scikit_learn(run, tmp_path):
    expect_success(run('--dataset digits --model plain --epoch 1'))
    report = json.loads((tmp_path / 'result' / 'accuracies.json').read_text())
    result = report['models']['plain']
    assert result['upright_accuracy'] > 0.6
    assert 0.2 < result['warped_accuracy'] < result['upright_accuracy']


def test_images():
    data = load_module(SCRIPT.with_name('data.py'))

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
