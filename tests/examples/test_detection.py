"""The detection example: its scenes, boxes and measures, and its training."""

from __future__ import annotations

import json
import re
import sys
import types

import chainer
import numpy
import pytest

from tests.programs import (
    ROOT,
    expect_picture,
    expect_same_training,
    load_module,
    read_log,
)

SCRIPT = ROOT / 'examples' / 'detection' / 'train.py'
SMALL = '--scenes 10 --batchsize 4'
MODELS = ['plain', 'deformable']


def load_example():
    """Returns the script and its modules, which leave no trace among the imports."""
    names = 'boxes', 'data', 'evaluator', 'models', 'pictures', 'common'
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        script = load_module(SCRIPT)
    return script, *(sys.modules.pop(name) for name in names)


train, boxes, data, evaluator, models, pictures, _ = load_example()


def run(cwd, options):
    """Runs the script in this process and in a directory, with few test scenes."""
    argv = ['train.py', *options.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', argv)
        patch.setattr(data, 'TEST_SCENES', 7)
        patch.setattr(train, 'TEST_BATCHSIZE', 5)
        patch.setattr(train.common, 'configure', lambda: None)
        train.main()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The directory that a training of two models wrote to."""
    cwd = tmp_path_factory.mktemp('trained')
    run(cwd, f'{SMALL} --model {" ".join(MODELS)} --epoch 2 --out some/where')
    return cwd / 'some' / 'where'


def test_files(trained):
    files = {'results.json', 'curves.png', 'found.png', 'bins.png'}
    assert {path.name for path in trained.iterdir()} == {*MODELS, *files}
    files = {'log', 'losses.png', 'ap.png'}
    files |= {f'snapshot_epoch_{epoch}.npz' for epoch in (1, 2)}
    for kind in MODELS:
        assert {path.name for path in (trained / kind).iterdir()} == files
    expect_picture(trained / 'curves.png', 1200, 480)


def test_results(trained):
    report = json.loads((trained / 'results.json').read_text())
    results = report.pop('models')
    assert report == {'scenes': 10, 'epoch': 2, 'batchsize': 4, 'seed': 0}
    assert list(results) == MODELS
    lines = train.table(results).splitlines()
    for (kind, result), line in zip(results.items(), lines[1:]):
        log = read_log(trained / kind / 'log')
        assert [entry['epoch'] for entry in log] == [1, 2]
        assert log[-1]['main/loss'] < log[0]['main/loss']
        parts = 'propose', 'place', 'classify', 'correct'
        total = sum(log[-1][f'main/{part}'] for part in parts)
        assert log[-1]['main/loss'] == pytest.approx(total)
        for name in 'ap50', 'ap75', 'ap':
            logged = log[-1][f'test/main/{name}']
            assert result[name] == pytest.approx(logged, abs=1e-6)
        row = (
            f'{kind} +{result["parameters"]:,} +{result["offset_parameters"]:,}'
            f' +{result["ap50"]:.1%} +{result["ap75"]:.1%} +{result["ap"]:.1%}'
            f' +{result["bin_shift"]:.2f} +{result["seconds"]:.1f}'
        )
        assert re.fullmatch(row, line)
        deformable = kind == 'deformable'
        assert (result['offset_parameters'] > 0) == deformable
        assert (result['bin_shift'] > 0) == deformable
        offsets = {key for key in log[-1] if key.endswith('offset_mean')}
        assert len(offsets) == (3 if deformable else 0)


def test_resumed_training_is_the_same(trained, tmp_path):
    # It is also the same without the training of another model before it.
    snapshot = trained / 'deformable' / 'snapshot_epoch_1.npz'
    run(tmp_path, f'{SMALL} --epoch 2 --resume {snapshot}')
    directory = tmp_path / 'result' / 'deformable'
    expect_same_training(directory, trained / 'deformable', epoch=2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--scenes 0', "--scenes: must be an integer from 1 to .*'0'"),
        ('--scenes 7', '--batchsize 8 is too large: there are 7 training scenes'),
        ('--model other', "--model: invalid choice: 'other'"),
        ('--device nonsense', 'cannot use --device nonsense: '),
        ('--out a-file', 'cannot write to a-file/deformable: Not a directory'),
        ('--model plain pooling --resume x', '--resume continues one model'),
    ],
)
def test_errors(tmp_path, capsys, options, message):
    (tmp_path / 'a-file').write_text('no directory\n')
    with pytest.raises(SystemExit) as end:
        run(tmp_path, options)
    assert end.value.code == 2
    assert re.fullmatch(f'train.py: error: .*{message}.*\n', capsys.readouterr().err)


@pytest.fixture(scope='module')
def datasets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'TEST_SCENES', 20)
        return data.load_datasets(30)


def test_scenes(datasets):
    for dataset, scenes in zip(datasets, (30, 20)):
        assert len(dataset) == scenes
        for image, digits, labels in dataset:
            assert (image.shape, image.dtype) == ((1, 96, 96), numpy.float32)
            assert image.min() >= 0
            assert image.max() <= 1
            assert 1 <= len(labels) <= 5
            assert (digits.shape, digits.dtype) == ((len(labels), 4), numpy.float32)
            assert labels.dtype == numpy.int32
            assert digits.min() >= 0
            assert digits.max() <= 96
            overlaps = boxes.intersection_over_union(digits, digits)
            numpy.testing.assert_array_equal(overlaps, numpy.eye(len(labels)))
        labels = numpy.concatenate([labels for *_, labels in dataset])
        assert set(labels) == set(range(10))


def test_scenes_are_the_same_in_every_run(datasets):
    # The first ones are also the same however many there are.
    again, _ = data.load_datasets(3)
    for scene, expected in zip(again, datasets[0]):
        for array, other in zip(scene, expected):
            numpy.testing.assert_array_equal(array, other)


def test_training_and_test_share_no_digit_and_no_texture(monkeypatch):
    """They stay as they are when what the others are made of changes."""
    monkeypatch.setattr(data, 'TEST_SCENES', 5)
    (train_x, train_t), (test_x, test_t) = data.load_digits()
    assert (len(train_x), len(test_x)) == (1297, 500)
    everything = numpy.concatenate([train_x, test_x])
    assert len(numpy.unique(everything, axis=0)) == len(everything)
    textures = data.load_textures()
    assert [texture.shape for texture in textures] == 3 * [(256, 256)]
    expected = data.load_datasets(5)
    for changed in range(2):
        halves = [numpy.split(texture.copy(), 2, axis=1) for texture in textures]
        for pair in halves:
            pair[changed][...] = 0.5
        digits = [(train_x, train_t), (test_x, test_t)]
        digits[changed] = digits[changed][0][::-1], digits[changed][1]
        monkeypatch.setattr(data, 'load_digits', lambda digits=digits: digits)
        texts = [numpy.concatenate(pair, axis=1) for pair in halves]
        monkeypatch.setattr(data, 'load_textures', lambda texts=texts: texts)
        for i, (dataset, before) in enumerate(zip(data.load_datasets(5), expected)):
            same = [(a[0] == b[0]).all() for a, b in zip(dataset, before)]
            assert any(same) == all(same) == (i != changed)


def test_boxes_fit_the_digits(monkeypatch):
    """Digits alone on black: each box is the smallest one around a digit's pixels."""
    monkeypatch.setattr(data, 'PIECES', 0)
    monkeypatch.setattr(data, 'background', lambda *_: numpy.zeros((96, 96)))
    (digits, labels), _ = data.load_digits()
    for image, digit_boxes, _ in data.compose(digits, labels, [None], 20, seed=0):
        covered = numpy.zeros((96, 96), bool)
        for box in digit_boxes:
            y, x, y_max, x_max = box.astype(int)
            assert (box == [y, x, y_max, x_max]).all()
            inside = image[0, y:y_max, x:x_max] > 0
            assert inside[[0, -1]].any(axis=1).all()
            assert inside[:, [0, -1]].any(axis=0).all()
            covered[y:y_max, x:x_max] = True
        assert not image[0, ~covered].any()
        assert image[image > 0].min() > 0.069  # of the ink 0.7 or more, a tenth or more


def test_render(monkeypatch):
    """A square of 4 by 4 pixels, upright, then turned by 45 degrees."""
    square = numpy.zeros((8, 8))
    square[2:6, 2:6] = 1
    monkeypatch.setattr(data, 'PITCHES', (3, 3))
    monkeypatch.setattr(data, 'MAX_ROTATION', 0)
    random = numpy.random.RandomState(0)
    cover = data.render(square, random)
    assert cover.shape[0] == cover.shape[1]
    assert 12 <= len(cover) <= 14
    numpy.testing.assert_allclose(cover, cover[::-1])
    numpy.testing.assert_allclose(cover, cover.T, atol=1e-12)
    assert cover.sum() == pytest.approx(144, rel=0.02)

    monkeypatch.setattr(data, 'MAX_ROTATION', 45)
    highest = types.SimpleNamespace(uniform=lambda low, high: high)
    turned = data.render(square, highest)
    assert turned.sum() == pytest.approx(144, rel=0.04)
    assert len(turned) == pytest.approx(12 * 2**0.5, abs=1.5)
    middle = len(turned) // 2
    assert turned[0, middle] > 0
    assert turned[0, 0] == 0
    assert data.render(0 * square, random) is None


def some_boxes(random, size):
    low = random.uniform(0, 60, (size, 2))
    return numpy.hstack([low, low + random.uniform(5, 35, (size, 2))])


def test_intersection_over_union():
    a = numpy.array([[0, 0, 4, 2], [1, 1, 3, 3]])
    b = numpy.array([[0, 0, 4, 2], [2, 1, 4, 3], [4, 2, 5, 5], [0, 5, 4, 6]])
    expected = [[1, 2 / 10, 0, 0], [2 / 10, 2 / 6, 0, 0]]
    numpy.testing.assert_allclose(boxes.intersection_over_union(a, b), expected)


def test_corrections():
    assert boxes.encode(
        numpy.array([[10, 20, 20, 40]]), numpy.array([[12, 20, 22, 60]])
    ) == pytest.approx(numpy.array([[2, 5, 0, 5 * numpy.log(2)]]))
    random = numpy.random.RandomState(0)
    a, b = some_boxes(random, 30), some_boxes(random, 30)
    numpy.testing.assert_allclose(
        boxes.decode(a, boxes.encode(a, b), 100), b, rtol=1e-5, atol=1e-4
    )
    clipped = boxes.decode(a, boxes.encode(a, 3 * b - 60), 96)
    assert clipped.min() >= 0
    assert clipped.max() <= 96
    assert (clipped[:, 2:] - clipped[:, :2]).min() >= 1


def naive_suppress(boxes_, scores, most):
    """Goes through the boxes from the best on; keeps what overlaps none kept before."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        y, x, y_max, x_max = boxes_[i]
        for j in kept:
            v, u, v_max, u_max = boxes_[j]
            h = max(0, min(y_max, v_max) - max(y, v))
            w = max(0, min(x_max, u_max) - max(x, u))
            areas = (y_max - y) * (x_max - x) + (v_max - v) * (u_max - u)
            if h * w / (areas - h * w) > most:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize('most', [0.2, 0.5, 1])
def test_suppress(most):
    random = numpy.random.RandomState(0)
    for size in 0, 1, 40:
        some = some_boxes(random, size)
        scores = random.randint(0, 20, size) / 20  # some are equal
        kept = boxes.suppress(some, scores, most)
        assert kept.tolist() == naive_suppress(some, scores, most)
        assert kept.dtype == numpy.int64
    pair = numpy.array([BOX, CLOSE])  # neither is left out at just their IoU
    assert boxes.suppress(pair, numpy.array([0.5, 0.6]), 0.8).tolist() == [1, 0]


BOX = [0, 0, 10, 10]
CLOSE = [0, 0, 10, 8]  # IoU 0.8 with BOX
FAR = [50, 50, 60, 60]


@pytest.mark.parametrize(
    ('found', 'truth', 'expected'),
    [
        # One digit: found well; found at an IoU of 0.8; not at all.
        ([(BOX, 1, 0.9)], [(BOX, 1)], [1, 1, 1]),
        ([(CLOSE, 1, 0.9)], [(BOX, 1)], [1, 1, 0]),
        ([(BOX, 2, 0.9)], [(BOX, 1)], [0, 0, 0]),
        ([], [(BOX, 1)], [0, 0, 0]),
        # The same digit once more is wrong; that costs only where it comes first.
        ([(BOX, 1, 0.9), (CLOSE, 1, 0.8)], [(BOX, 1)], [1, 1, 1]),
        ([(BOX, 1, 0.8), (CLOSE, 1, 0.9)], [(BOX, 1)], [1, 1, 1 / 2]),
        ([(FAR, 1, 0.9), (BOX, 1, 0.8)], [(BOX, 1)], [1 / 2, 1 / 2, 1 / 2]),
        # One of two: a precision of 1 at the recalls 0, 0.01, ..., 0.5.
        ([(BOX, 1, 0.9)], [(BOX, 1), (FAR, 1)], [51 / 101] * 3),
        # Right, wrong, right: precisions 1 up to a recall of 0.5, and then 2 / 3.
        (
            [(BOX, 1, 0.9), (BOX, 1, 0.8), (FAR, 1, 0.7)],
            [(BOX, 1), (FAR, 1)],
            [(51 + 50 * 2 / 3) / 101] * 3,
        ),
        # The second takes what the first one left, although it is farther from it.
        ([(BOX, 1, 0.9), (BOX, 1, 0.8)], [(BOX, 1), (CLOSE, 1)], [1, 1, 51 / 101]),
        # The mean over the classes that there are.
        ([(BOX, 1, 0.9), (FAR, 3, 0.9)], [(BOX, 1), (FAR, 2)], [1 / 2] * 3),
    ],
)
def test_average_precision(found, truth, expected):
    found = tuple(map(numpy.array, zip(*found))) or (
        numpy.zeros((0, 4)),
        numpy.zeros(0, int),
        numpy.zeros(0),
    )
    truth = tuple(map(numpy.array, zip(*truth)))
    result = evaluator.average_precision([found], [truth], [0.5, 0.8, 0.85])
    numpy.testing.assert_allclose(result, expected)


def test_average_precision_is_that_of_all_images():
    """Scores are compared across images; boxes are not."""
    image = numpy.array([BOX]), numpy.array([1])
    found = [
        (numpy.array([FAR]), numpy.array([1]), numpy.array([0.9])),
        (numpy.array([BOX]), numpy.array([1]), numpy.array([0.8])),
    ]
    # Wrong, right: precision 1 / 2 up to a recall of 0.5.
    result = evaluator.average_precision(found, [image, image], [0.5])
    numpy.testing.assert_allclose(result, [51 / 2 / 101])
    empty = numpy.zeros((0, 4)), numpy.zeros(0, int)
    result = evaluator.average_precision(found[::-1], [image, empty], [0.5])
    numpy.testing.assert_allclose(result, [1 / 2])


def test_evaluator(datasets):
    """A detector that knows the truth, and one digit too many, in ragged batches."""
    _, test = datasets
    scenes = iter(test[:7])

    def predictor(images):
        found = []
        for image, (own, digits, labels) in zip(images, scenes):
            numpy.testing.assert_array_equal(image, own)
            digits = numpy.vstack([digits, [[0, 0, 1, 1]]])
            scores = numpy.append(numpy.full(len(labels), 0.9), 1)
            found.append((digits, numpy.append(labels, 3), scores))
        return found

    link = chainer.Link()
    link.predictor = predictor
    iterator = chainer.iterators.SerialIterator(
        test[:7], 3, repeat=False, shuffle=False
    )
    device = chainer.get_device('@numpy')
    extension = evaluator.DetectionEvaluator(iterator, link, device=device)
    extension.name = 'test'
    result = extension()
    labels = numpy.concatenate([labels for *_, labels in test[:7]])
    count, classes = (labels == 3).sum(), len(set(labels))
    assert count > 0
    # The first 7 detections are wrong: precision count / (count + 7) at all recalls.
    expected = 1 - 7 / (count + 7) / classes
    assert result == {
        f'test/main/{name}': pytest.approx(expected) for name in ('ap50', 'ap75', 'ap')
    }


def test_models_start_as_the_same_function(datasets):
    x = numpy.stack([image for image, *_ in datasets[0][:2]])
    digits = [d for _, d, _ in datasets[0][:2]]
    outputs, sizes, offset_sizes = {}, {}, {}
    for kind in models.MODELS:
        numpy.random.seed(0)
        net = models.Detector(kind, 10)
        with chainer.no_backprop_mode():
            features = net.extract(x)
            _, scores, places = net.find_proposals(features)
            outputs[kind] = [scores, places, *net.look_at(features, digits)]
        sizes[kind] = net.count_params()
        links = [link for link, _ in net.offset_links()]
        offset_sizes[kind] = sum(link.count_params() for link in links)
    for kind, arrays in outputs.items():
        for array, expected in zip(arrays, outputs['plain']):
            numpy.testing.assert_allclose(array.array, expected.array, atol=1e-4)
        assert sizes[kind] - offset_sizes[kind] == sizes['plain']
    of = offset_sizes
    assert of['plain'] == 0
    assert of['convolution'] + of['pooling'] == of['deformable']


def test_align_is_chainers():
    """Chainer's own RoI align, which takes no half pixel off the coordinates."""
    random = numpy.random.RandomState(0)
    x = random.uniform(-1, 1, (2, 3, 24, 24)).astype(numpy.float32)
    rois = some_boxes(random, 5).astype(numpy.float32)
    indices = numpy.array([0, 1, 1, 0, 1], numpy.int32)
    y = models.align(x, rois, indices)
    expected = chainer.functions.roi_average_align_2d(
        x, rois - models.STRIDE / 2, indices, 5, 1 / models.STRIDE, 2
    )
    numpy.testing.assert_allclose(y.array, expected.array, atol=1e-5)


def test_proposal_targets():
    base = models.base_boxes(24, 24)
    digits = numpy.array([[10, 20, 30, 60], [50, 50, 70, 62]], numpy.float32)
    wanted, corrections = models.proposal_targets(base, digits)
    centres = wanted.reshape(24, 24)
    for number, (y, x, y_max, x_max) in enumerate(digits):
        for i, j in numpy.ndindex(24, 24):
            v = abs(4 * i + 2 - (y + y_max) / 2) / (y_max - y)
            u = abs(4 * j + 2 - (x + x_max) / 2) / (x_max - x)
            if max(v, u) <= 0.5:
                assert centres[i, j] == (1 if max(v, u) <= 0.2 else -1)
                k = 24 * i + j
                box = boxes.decode(base[k, None], corrections[k, None], 96)
                numpy.testing.assert_allclose(box[0], digits[number], atol=1e-3)
                centres[i, j] = 0
    assert not centres.any()


def test_seen_targets():
    digits = numpy.array([[10, 20, 30, 60], [50, 50, 70, 62]], numpy.float32)
    seen = numpy.array(
        [[12, 20, 30, 60], [50, 50, 70, 62], [10, 20, 30, 39], [0, 0, 20, 20]]
    )
    wanted, corrections = models.seen_targets(10, seen, digits, numpy.array([7, 0]))
    assert wanted.tolist() == [7, 0, 10, 10]
    expected = boxes.encode(seen[:2], digits)
    numpy.testing.assert_allclose(corrections[:2], expected)
    assert not corrections[1].any()


def test_choose():
    seen = numpy.array([BOX, CLOSE, FAR], float)
    scores = numpy.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.01, 0.04, 0.95]])
    found, labels, probabilities = models.choose(seen, scores, numpy.zeros((3, 4)), 96)
    # The best of each class; neither class suppresses the other.
    numpy.testing.assert_array_equal(found, [BOX, CLOSE])
    assert labels.tolist() == [0, 1]
    assert probabilities.tolist() == [0.7, 0.3]


def test_bins_are_read_where_the_pictures_say(datasets, monkeypatch):
    """A feature map that is its own coordinates is read at the means of the points."""
    image, digits, _ = datasets[0][0]
    numpy.random.seed(0)
    net = models.Detector('pooling', 10)
    places = (numpy.indices((24, 24)).repeat(24, axis=0) + 0.5).astype(numpy.float32)
    places *= 4
    monkeypatch.setattr(net, 'extract', lambda x: chainer.Variable(places[None]))
    for moved in False, True:
        if moved:
            W = net.pool.offset_fc[2].W.array
            W[...] = numpy.random.normal(0, 0.01, W.shape)
        (points,) = net.sampling_points(image[None], [digits])
        moves = points - models.regular_points(digits)
        assert abs(moves).mean() > 0.5 if moved else abs(moves).max() < 1e-4
        middles = points.mean(axis=3)  # (R, BINS, BINS, yx)
        inside = ((points > 2) & (points < 94)).all(axis=(3, 4))
        assert inside.mean() > 0.5
        read = net.pool(places[None], *net.regions([digits])).array
        for axis, channel in (0, 0), (1, 24):
            expected = middles[..., axis][inside]
            numpy.testing.assert_allclose(read[:, channel][inside], expected, atol=1e-3)
    plain = models.Detector('plain', 10).sampling_points(image[None], [digits])
    numpy.testing.assert_array_equal(plain, [models.regular_points(digits)])
