"""The segmentation example: its scenes and measures, and its script as a program."""

from __future__ import annotations

import json
import re

import chainer
import numpy
import pytest

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

SCRIPT = ROOT / 'examples' / 'segmentation' / 'train.py'
SMALL = '--scenes 24 --batchsize 10'
MODELS = ['plain', 'deformable']
CLASSES = ['brick', 'grass', 'gravel', 'tissue']


data, evaluator, models = (
    load_module(SCRIPT.with_name(f'{name}.py'))
    for name in ('data', 'evaluator', 'models')
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """What a training of two models printed, and the directory it wrote to."""
    cwd = tmp_path_factory.mktemp('trained')
    options = f'{SMALL} --model {" ".join(MODELS)} --epoch 2 --out some/where'
    result = run_example(SCRIPT, cwd, options)
    expect_success(result)
    return result.stdout, cwd / 'some' / 'where'


@pytest.mark.slow
def test_files(trained):
    _, out = trained
    pictures = {'curves.png', 'predictions.png'}
    assert {path.name for path in out.iterdir()} == {*MODELS, 'results.json', *pictures}
    for kind in MODELS:
        files = {'log', 'loss.png', 'miou.png'}
        files |= {f'snapshot_epoch_{epoch}.npz' for epoch in (1, 2)}
        if kind == 'deformable':
            files |= {f'sampling_points_epoch_{epoch}.png' for epoch in (1, 2)}
        assert {path.name for path in (out / kind).iterdir()} == files
    expect_picture(out / 'curves.png', 1200, 480)
    expect_picture(out / 'predictions.png', 558, 900)


@pytest.mark.slow
def test_results(trained):
    printed, out = trained
    report = json.loads((out / 'results.json').read_text())
    results = report.pop('models')
    assert report == {'scenes': 24, 'epoch': 2, 'batchsize': 10, 'seed': 0}
    assert list(results) == MODELS
    for kind, result in results.items():
        log = read_log(out / kind / 'log')
        assert [entry['epoch'] for entry in log] == [1, 2]
        assert log[-1]['main/loss'] < log[0]['main/loss']
        for warps in 'mild', 'strong':
            scores = result[warps]
            for name, value in scores.items():
                logged = log[-1][f'{warps}/main/{name}']
                assert value == pytest.approx(logged, abs=1e-6)
            ious = [scores[f'iou/{name}'] for name in CLASSES]
            assert scores['miou'] == pytest.approx(numpy.mean(ious), abs=1e-6)
            assert 0 < scores['miou'] <= scores['accuracy'] < 1
        mild, strong = result['mild'], result['strong']
        row = (
            f'{kind} +{result["parameters"]:,} +{result["offset_parameters"]:,}'
            f' +{mild["miou"]:.1%} +{strong["miou"]:.1%}'
            f' +{mild["accuracy"]:.1%} +{strong["accuracy"]:.1%}'
            f' +{result["seconds"]:.1f}'
        )
        assert re.search(f'^{row}$', printed, re.MULTILINE)
        offsets = {key for key in log[-1] if key.endswith('offset_mean')}
        assert len(offsets) == (2 if kind == 'deformable' else 0)
    assert results['plain']['offset_parameters'] == 0


@pytest.mark.slow
def test_resumed_training_is_the_same(trained, tmp_path):
    # It is also the same without the training of another model before it.
    for options in '--epoch 1', '--resume result/deformable/snapshot_epoch_1.npz':
        result = run_example(SCRIPT, tmp_path, f'{SMALL} --epoch 2 {options}')
        expect_success(result)
    directory = tmp_path / 'result' / 'deformable'
    expect_same_training(directory, trained[1] / 'deformable', epoch=2)


@pytest.mark.slow
def test_errors_of_snapshots(trained, tmp_path):
    snapshot = trained[1] / 'plain' / 'snapshot_epoch_2.npz'
    for options in '--model wide --scenes 24', '--model plain --scenes 25':
        result = run_example(
            SCRIPT, tmp_path, f'{options} --batchsize 10 --resume {snapshot}'
        )
        expect_error(result, 'no snapshot of this model and dataset')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--scenes 0', "--scenes: must be an integer from 1 to .*'0'"),
        ('--scenes 8', '--batchsize 16 is too large: there are 8 training scenes'),
        ('--model other', "--model: invalid choice: 'other'"),
        ('--device nonsense', 'cannot use --device nonsense: '),
        ('--out a-file', 'cannot write to a-file/deformable: Not a directory'),
        ('--model plain wide --resume x', '--resume continues one model'),
    ],
)
def test_errors(tmp_path, options, message):
    (tmp_path / 'a-file').write_text('no directory\n')
    expect_error(run_example(SCRIPT, tmp_path, options), message)


def arrays(dataset):
    """Returns the images and the labels of a data set."""
    return chainer.dataset.concat_examples(dataset[:])


def test_scenes():
    sets = [arrays(dataset) for dataset in data.load_datasets(30)]
    for (images, labels), scenes in zip(sets, (30, 100, 100)):
        assert images.shape == (scenes, 1, 97, 97)
        assert images.dtype == numpy.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.shape == (scenes, 97, 97)
        assert labels.dtype == numpy.int32
        assert labels.min() == 0
        assert min(numpy.bincount(labels.ravel())) > 0.15 * labels.size
    _, (mild, labels), (strong, strong_labels) = sets
    numpy.testing.assert_array_equal(labels, strong_labels)
    assert (mild != strong).any(axis=(1, 2, 3)).all()


def test_scenes_are_the_same_in_every_run():
    # The first scenes are also the same however many there are.
    for a, b in zip(data.load_datasets(3), data.load_datasets(5)):
        for x, y in zip(arrays(a[:3]), arrays(b[:3])):
            numpy.testing.assert_array_equal(x, y)


def test_photographs():
    photographs = data.load_photographs()
    assert list(data.PHOTOGRAPHS) == CLASSES
    assert [photograph.shape for photograph in photographs] == [(256, 256)] * 4
    import skimage.data

    brick = skimage.data.brick().astype(float)
    assert photographs[0][7, 200] == brick[14:16, 400:402].mean()


@pytest.mark.parametrize('half', ['left', 'right'])
def test_training_and_test_share_no_pixel(monkeypatch, half):
    expected = [arrays(dataset)[0] for dataset in data.load_datasets(20)]
    photographs = data.load_photographs()
    for photograph in photographs:
        view = photograph[:, :128] if half == 'left' else photograph[:, 128:]
        view[...] = numpy.random.RandomState(0).uniform(0, 255, view.shape)
    monkeypatch.setattr(data, 'load_photographs', lambda: photographs)
    images = [arrays(dataset)[0] for dataset in data.load_datasets(20)]
    same = [(a == b).all() for a, b in zip(expected, images)]
    assert same == [half == 'right', half == 'left', half == 'left']


@pytest.mark.parametrize('number', range(3))
def test_masks_are_exact(number):
    """Where a photograph is not-a-number, so are the scenes, and nowhere else."""
    textures = [numpy.full((50, 40), 0.5) for _ in range(3)]
    textures[number][...] = numpy.nan
    images, labels = arrays(data.compose(textures, data.STRONG, 20, 7))
    numpy.testing.assert_array_equal(numpy.isnan(images[:, 0]), labels == number)


def test_equalise():
    random = numpy.random.RandomState(0)
    image = random.permutation(numpy.arange(6, 56, 2)).reshape(5, 5)
    numpy.testing.assert_allclose(data.equalise(image), (image - 6) / 48)
    # Equal pixels stay equal.
    equal = data.equalise(numpy.array([[3, 1], [3, 9], [9, 9]]))
    numpy.testing.assert_allclose(equal, [[0.4, 0], [0.4, 1], [1, 1]])


def test_warp():
    random = numpy.random.RandomState(0)
    points = random.uniform(-50, 50, (2, 30))
    still = data.Warps(rotation=0, scale=1, shear=0, tilt=0)
    numpy.testing.assert_allclose(data.warp(points, still, random), points)

    lengths = numpy.hypot(*points)
    turned = data.warp(points, still._replace(rotation=90), random)
    numpy.testing.assert_allclose(numpy.hypot(*turned), lengths)
    scaled = data.warp(points, still._replace(scale=2), random)
    factor = scaled[0, 0] / points[0, 0]
    assert 1 / 2 <= factor <= 2
    numpy.testing.assert_allclose(scaled, factor * points)
    # A perspective keeps lines through the centre, but not distances along them.
    tilted = data.warp(points, still._replace(tilt=0.4), random)
    numpy.testing.assert_allclose(tilted[0] * points[1], tilted[1] * points[0])
    assert numpy.ptp(numpy.hypot(*tilted) / lengths) > 0.05


def test_perspectives_have_no_horizon():
    farthest = (data.SIZE - 1) * 2**0.5
    assert data.STRONG.tilt / 100 * 2**0.5 * farthest < 1


def naive_scores(truth, predicted, classes):
    """Returns mean IoU, accuracy and the IoU of each class, pixel by pixel."""
    pairs = list(zip(truth.ravel().tolist(), predicted.ravel().tolist()))
    ious = []
    for c in range(classes):
        both = sum(t == c and y == c for t, y in pairs)
        either = sum(t == c or y == c for t, y in pairs)
        ious.append(both / either if either else None)
    there = [iou for iou in ious if iou is not None]
    accuracy = sum(t == y for t, y in pairs) / len(pairs)
    return sum(there) / len(there), accuracy, ious


@pytest.mark.parametrize('absent', [None, 1])
def test_evaluator(absent):
    """It is not a mean over batches: the last one is smaller, and all differ."""
    random = numpy.random.RandomState(0)
    truth = numpy.sort(random.randint(0, 4, (7, 5, 6)), axis=0).astype(numpy.int32)
    scores = random.uniform(0, 1, (7, 4, 5, 6)).astype(numpy.float32)
    if absent is not None:
        truth[truth == absent] = 0
        scores[:, absent] = -1
    link = chainer.Link()
    link.predictor = chainer.Variable
    iterator = chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(scores, truth), 3, repeat=False, shuffle=False
    )
    extension = evaluator.SegmentationEvaluator(
        iterator, link, CLASSES, chainer.get_device('@numpy')
    )
    extension.name = 'mild'
    for _ in range(2):  # it starts anew
        result = extension()
    miou, accuracy, ious = naive_scores(truth, scores.argmax(axis=1), 4)
    assert result['mild/main/miou'] == pytest.approx(miou)
    assert result['mild/main/accuracy'] == pytest.approx(accuracy)
    assert (None in ious) == (absent is not None)
    for name, iou in zip(CLASSES, ious):
        expected = numpy.nan if iou is None else iou
        assert result[f'mild/main/iou/{name}'] == pytest.approx(expected, nan_ok=True)
    assert len(result) == 6


def test_models():
    x = numpy.random.RandomState(0).uniform(0, 1, (2, 1, 97, 61)).astype(numpy.float32)
    scores, sizes, offset_sizes = {}, {}, {}
    for kind in models.LAST_CONVOLUTIONS:
        numpy.random.seed(0)
        net = models.SegmentationNet(kind, 5)
        with chainer.no_backprop_mode():
            scores[kind] = net(x).array
        sizes[kind] = net.count_params()
        offset_sizes[kind] = sum(conv.count_params() for conv in net.offset_convs())
        assert scores[kind].shape == (2, 5, 97, 61)
    for kind in 'deformable', 'modulated':  # they start as the plain model
        numpy.testing.assert_allclose(scores[kind], scores['plain'], atol=1e-4)
        assert sizes[kind] - offset_sizes[kind] == sizes['plain']
    assert offset_sizes['plain'] == offset_sizes['wide'] == 0
    assert sizes['wide'] == pytest.approx(sizes['deformable'], rel=0.01)
