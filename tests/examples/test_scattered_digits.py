"""The example scattered_digits: its parts, and its script as a program."""

from __future__ import annotations

import json
import re

import chainer
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

SCRIPT = ROOT / 'examples' / 'scattered_digits' / 'train.py'
SMALL = '--scenes 24 --test-scenes 3 --batchsize 10'
MODELS = ['plain', 'deformable']
CONDITIONS = ['upright', 'rotated', 'scaled', 'both']

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
    expect_picture(out / 'predictions.png', 684, 747)


@pytest.mark.slow
def test_results(trained):
    printed, out = trained
    report = json.loads((out / 'results.json').read_text())
    results = report.pop('models')
    assert report == {
        'scenes': 24,
        'test_scenes': 3,
        'epoch': 2,
        'batchsize': 10,
        'seed': 0,
    }
    assert list(results) == MODELS
    for kind, result in results.items():
        log = read_log(out / kind / 'log')
        assert [entry['epoch'] for entry in log] == [1, 2]
        assert log[-1]['main/loss'] < log[0]['main/loss']
        mious = result['miou']
        assert list(mious) == CONDITIONS
        for condition, miou in mious.items():
            start = f'{condition}/main/'
            assert miou == pytest.approx(log[-1][f'{start}miou'], abs=1e-6)
            ious = [log[-1][f'{start}iou/{name}'] for name in data.CLASSES]
            assert miou == pytest.approx(numpy.nanmean(ious), abs=1e-6)
        row = (
            f'{kind} +{result["parameters"]:,} +{result["offset_parameters"]:,} +'
            + ' +'.join(f'{miou:.1%}' for miou in mious.values())
            + f' +{result["seconds"]:.1f}'
        )
        assert re.search(f'^{row}$', printed, re.MULTILINE)
        offsets = {key for key in log[-1] if key.endswith('offset_mean')}
        assert len(offsets) == (2 if kind == 'deformable' else 0)


@pytest.mark.slow
def test_resumed_training_is_the_same(trained, tmp_path):
    # It is also the same without the training of another model before it.
    expected = trained[1] / 'deformable'
    snapshot = expected / 'snapshot_epoch_1.npz'
    expect_success(
        run_example(SCRIPT, tmp_path, f'{SMALL} --epoch 2 --resume {snapshot}')
    )
    expect_same_training(tmp_path / 'result' / 'deformable', expected, epoch=2)


def test_too_few_scenes(tmp_path):
    result = run_example(SCRIPT, tmp_path, '--scenes 8')
    expect_error(result, '--batchsize 16 is too large: there are 8 training scenes')


def arrays(dataset):
    """Returns the images and the labels of a data set."""
    return chainer.dataset.concat_examples(dataset[:])


def test_scenes():
    train, tests = data.load_datasets(20, 15)
    assert list(tests) == CONDITIONS
    for (images, labels), scenes in zip(
        map(arrays, (train, *tests.values())), [20] + [15] * 4
    ):
        assert images.shape == (scenes, 1, 97, 97)
        assert images.dtype == numpy.float32
        assert images.min() == 0
        assert 0.8 < images.max() <= 1
        assert labels.shape == (scenes, 97, 97)
        assert labels.dtype == numpy.int32
        shares = numpy.bincount(labels.ravel()) / labels.size
        assert shares.shape == (11,)  # all classes, and no other number
        assert shares[:10].min() > 0.001
        assert 0.8 < shares[10] < 0.97
    images, labels = map(list, zip(*map(arrays, tests.values())))
    for i in range(1, 4):  # the conditions differ, in the digits alone
        changed = images[i] != images[0]
        assert changed.any(axis=(1, 2, 3)).all()
        assert changed.mean() < 0.6
        corners = [labels[k][:, ::96, ::96] for k in (0, i)]
        assert (corners[0] == corners[1]).mean() > 0.8


def test_scenes_are_the_same_in_every_run():
    # The first scenes are also the same however many there are.
    (train, tests), (more_train, more_tests) = (
        data.load_datasets(3, 2),
        data.load_datasets(5, 4),
    )
    pairs = [(train, more_train), *zip(tests.values(), more_tests.values())]
    for few, many in pairs:
        for x, y in zip(arrays(few), arrays(many[: len(few)])):
            numpy.testing.assert_array_equal(x, y)


def test_training_and_test_share_no_digit():
    train, test = data.load_digits()
    assert (len(train.images), len(test.images)) == (1348, 449)
    images = [{image.tobytes() for image in part.images} for part in (train, test)]
    assert not images[0] & images[1]
    digits = sklearn.datasets.load_digits()
    both = {*zip(map(bytes, digits.images.astype('u1')), digits.target)}
    for part in train, test:
        pairs = zip(map(bytes, (part.images * 16).astype('u1')), part.classes)
        assert {*pairs} <= both
        assert min(numpy.bincount(part.classes)) > 0.09 * len(part.classes)


@pytest.mark.parametrize('part', [0, 1])
def test_scenes_are_of_their_own_digits(monkeypatch, part):
    """Digits of one part are replaced: its scenes change, those of the other don't."""
    digits = data.load_digits()
    before = data.load_datasets(4, 4)
    digits[part].images[...] = 1
    monkeypatch.setattr(data, 'load_digits', lambda: digits)
    after = data.load_datasets(4, 4)
    same = [
        (arrays(a)[0] == arrays(b)[0]).all()
        for a, b in zip(
            (before[0], *before[1].values()), (after[0], *after[1].values())
        )
    ]
    assert same == [part == 1, *[part == 0] * 4]


def test_labels_fit_the_image(monkeypatch):
    """Without clutter and noise, a digit is what is bright, and has its class."""
    monkeypatch.setattr(data, 'CLUTTER', 0)
    monkeypatch.setattr(data, 'NOISE', 0)
    # Each digit is a square of its own brightness, in the middle of its pixels.
    images = numpy.zeros((3, 8, 8))
    images[:, 2:6, 2:6] = numpy.array([0.6, 0.8, 1])[:, None, None]
    digits = data.Digits(images, numpy.array([7, 0, 4]))
    monkeypatch.setattr(data, 'draw', draw_at_full_brightness(data.draw))
    for warps in data.CONDITIONS.values():
        scenes, labels = arrays(data.compose(digits, warps, 5, seed=0))
        numpy.testing.assert_array_equal(labels < 10, scenes[:, 0] > 0.4)
        for brightness, digit in (0.6, 7), (0.8, 0), (1, 4):
            inside = numpy.isclose(scenes[:, 0], brightness, atol=1e-6)
            assert inside.sum() > 100
            assert (labels[inside] == digit).mean() > 0.9


def draw_at_full_brightness(draw):
    return lambda canvas, ink, place, brightness: draw(canvas, ink, place, 1)


def test_warp():
    image = numpy.zeros((8, 8))
    image[1, 3:5] = 1  # a bar above the middle
    for angle, scale, place in [
        (0, 1, (-7.5, 0)),  # 2.5 pixels of the digit, 3 of the scene each
        (0, 1.5, (-7.5 * 1.5, 0)),
        (90, 1, (0, 7.5)),  # clockwise
        (-90, 0.5, (0, -7.5 / 2)),
        (180, 1, (7.5, 0)),
    ]:
        warped = data.warp(image, angle, scale)
        assert warped.shape == (49, 49)
        places = numpy.indices(warped.shape) - 24
        middle = (places * warped).sum(axis=(1, 2)) / warped.sum()
        numpy.testing.assert_allclose(middle, place, atol=0.3)
        assert warped.sum() == pytest.approx(2 * (3 * scale) ** 2, rel=0.1)


def test_scatter():
    random = numpy.random.RandomState(0)
    counts = set()
    for _ in range(30):
        places = numpy.array(data.scatter(random))
        counts.add(len(places))
        assert places.min() >= 12
        assert places.max() < 97 - 12
        distances = numpy.hypot(*(places[:, None] - places).T)
        assert (distances[~numpy.eye(len(places), dtype=bool)] >= 30).all()
    assert 3 <= min(counts) < max(counts) <= 8


def naive_ious(truth, predicted, classes):
    """Returns the IoU of each class, pixel by pixel."""
    pairs = list(zip(truth.ravel().tolist(), predicted.ravel().tolist()))
    ious = []
    for c in range(classes):
        both = sum(t == c and y == c for t, y in pairs)
        either = sum(t == c or y == c for t, y in pairs)
        ious.append(both / either if either else numpy.nan)
    return ious


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
    names = 'abcd'
    extension = evaluator.SegmentationEvaluator(
        iterator, link, names, chainer.get_device('@numpy')
    )
    extension.name = 'rotated'
    for _ in range(2):  # it starts anew
        result = extension()
    ious = naive_ious(truth, scores.argmax(axis=1), 4)
    assert numpy.isnan(ious).any() == (absent is not None)
    expected = {f'rotated/main/iou/{name}': iou for name, iou in zip(names, ious)}
    expected['rotated/main/miou'] = numpy.nanmean(ious)
    assert result == pytest.approx(expected, nan_ok=True)


def test_models():
    x = numpy.random.RandomState(0).uniform(0, 1, (2, 1, 97, 61)).astype(numpy.float32)
    scores, sizes, offset_sizes = {}, {}, {}
    for kind in models.LAST_CONVOLUTIONS:
        numpy.random.seed(0)
        net = models.SceneNet(kind, 11)
        with chainer.no_backprop_mode():
            scores[kind] = net(x).array
        sizes[kind] = net.count_params()
        offset_sizes[kind] = sum(conv.count_params() for conv in net.offset_convs())
        assert scores[kind].shape == (2, 11, 97, 61)
    # The deformable model starts as the plain one, and is as large as the wide one.
    numpy.testing.assert_allclose(scores['deformable'], scores['plain'], atol=1e-4)
    assert sizes['deformable'] - offset_sizes['deformable'] == sizes['plain']
    assert offset_sizes['plain'] == offset_sizes['wide'] == 0
    assert sizes['wide'] == pytest.approx(sizes['deformable'], rel=0.01)
