"""What is reported of the offsets, against values by hand."""

import copy
import io
import json
import pickle
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import training
from chainer.training import extensions

from chainer_deform import links
from chainer_deform.extensions import OffsetStatistics
from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler

H, W = 4, 6
KEYS = 'offset_mean', 'offset_max', 'points_outside', 'offsets_not_finite'


class Given(chainer.Chain):
    """A layer of one tap that is called with the offsets in the data set."""

    def __init__(self, layers=('conv',)):
        super().__init__()
        self.layers = layers
        with self.init_scope():
            for name in layers:
                setattr(self, name, DeformableConvolution2DSampler(1, 1, 1))

    def forward(self, offset):
        x = numpy.ones((len(offset), 1, H, W), 'f')
        return sum(F.sum(self[name](x, offset)) for name in self.layers) * 0


def offsets(*pairs, dtype='f'):
    """One image of offsets: zeros but for the first pixels, which get (y, x) pairs."""
    offset = numpy.zeros((2, H, W), dtype)
    for i, (y, x) in enumerate(pairs):
        offset[:, 0, i] = x, y
    return offset


def make_trainer(model, data, out, batchsize=1, stop=(1, 'epoch'), **optimizers):
    if isinstance(model, dict):
        optimizers = {
            name: chainer.optimizers.SGD(0).setup(m) for name, m in model.items()
        }
    else:
        optimizers = chainer.optimizers.SGD(0).setup(model)
    iterator = chainer.iterators.SerialIterator(data, batchsize, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizers)
    trainer = training.Trainer(updater, stop, out=str(out))
    trainer.extend(extensions.LogReport())
    return trainer


def log_of(trainer):
    return trainer.get_extension('LogReport').log


def run(model, data, out, statistics=None, **options):
    trainer = make_trainer(model, data, out, **options)
    trainer.extend(statistics or OffsetStatistics())
    trainer.run()
    return log_of(trainer)


def values(entry, prefix):
    return [entry.get(f'{prefix}/{key}') for key in KEYS]


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('batchsize', [1, 3])
def test_values(tmp_path, dtype, batchsize):
    data = [
        offsets((3, 4), dtype=dtype),  # row 3: inside
        offsets((-0.5, 0), (-1, 0), (0, 3.5), dtype=dtype),  # only row -1 is outside
        offsets((0, 0), (0, -2), dtype=dtype),  # column 1 - 2 is outside
    ]
    (entry,) = run(Given(), data, tmp_path, batchsize=batchsize)
    total = 3 * H * W
    expected = [(5 + 0.5 + 1 + 3.5 + 2) / total, 5, 2 / total, 0]
    numpy.testing.assert_allclose(values(entry, 'main/conv'), expected, rtol=1e-6)


@pytest.mark.parametrize('batchsize', [1, 2])
def test_sums_are_exact(tmp_path, batchsize):
    """Those of one call and those of an epoch: float32 would lose the small lengths."""
    long, short = offsets((2.0**24, 0)), offsets(*[(0, 1)] * (W - 1))
    long[1, 1:] = 1
    statistics = OffsetStatistics(warn_above=1e9)
    (entry,) = run(Given(), [long, short], tmp_path, statistics, batchsize=batchsize)
    total = 2.0**24 + (H - 1) * W + W - 1
    assert entry['main/conv/offset_mean'] == total / (2 * H * W)


@pytest.mark.parametrize(
    ('pair', 'outside'),
    [
        ((-1, 0), True),
        ((-0.999, 0), False),
        ((H, 0), True),
        ((H - 0.001, 0), False),
        ((0, -1), True),
        ((0, -0.999), False),
        ((0, W), True),
        ((0, W - 0.001), False),
    ],
)
def test_outside_as_the_function_has_it(tmp_path, pair, outside):
    (entry,) = run(Given(), [offsets(pair)], tmp_path)
    assert entry['main/conv/points_outside'] == pytest.approx(outside / (H * W))


def test_taps_and_offset_groups(tmp_path):
    """Counted one by one: each has a pair of numbers, of its own group"""

    class Model(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.conv = DeformableConvolution2DSampler(
                    2, 2, (1, 3), (2, 1), (1, 0), dilate=(1, 2), offset_groups=2
                )

        def forward(self, offset):
            return 0 * F.sum(self.conv(numpy.ones((1, 2, 5, 7), 'f'), offset))

    offset = numpy.random.RandomState(0).normal(0, 1, (2 * 2 * 3, 4, 3)).astype('f')
    (entry,) = run(Model(), [offset], tmp_path)
    lengths, outside = [], 0
    for group, tap, oy, ox in numpy.ndindex(2, 3, 4, 3):
        x, y = (float(offset[group * 6 + k * 3 + tap, oy, ox]) for k in (0, 1))
        lengths.append((x * x + y * y) ** 0.5)
        v, u = oy * 2 - 1 + y, ox + tap * 2 + x
        outside += v <= -1 or v >= 5 or u <= -1 or u >= 7
    assert 0 < outside < len(lengths)
    expected = [numpy.mean(lengths), max(lengths), outside / len(lengths), 0]
    numpy.testing.assert_allclose(values(entry, 'main/conv'), expected, rtol=1e-6)


class Calls(chainer.Chain):
    """A layer without a sampler, called with some arguments after an image."""

    def __init__(self, layer, *arguments):
        super().__init__()
        self.arguments = arguments
        with self.init_scope():
            self.layer = layer

    def forward(self, x):
        return 0 * F.sum(self.layer(x, *self.arguments))


IMAGE = numpy.ones((2, 8, 9), 'f')
BOX = numpy.array([[0.5, 0.5, 6.5, 8.5]], 'f'), numpy.zeros(1, 'i')


def test_of_taps_that_are_scaled(tmp_path):
    """Lengths are in pixels of the image."""
    layer = links.DCNv4(2, 2, 1, offset_groups=1, offset_scale=2)
    layer.offset_conv.b.array[:2] = 1.5, -2  # x, y
    (entry,) = run(Calls(layer), [IMAGE], tmp_path)
    # Rows 0 to 7 are moved up by 4, columns 0 to 8 to the right by 3.
    expected = [5, 5, 1 - (4 * 6) / (8 * 9), 0]
    numpy.testing.assert_allclose(values(entry, 'main/layer'), expected, rtol=1e-6)


def test_of_bins(tmp_path):
    """A box of 6 by 8 pixels, from (0, 0) on, whose lower bins are moved."""
    layer = links.DeformableRoIPooling2D(2, 2, 1.0, 2, fc_size=3, gamma=0.5)
    layer.offset_fc[-1].b.array.reshape(2, 2, 2)[:, 1] = [[0, 1], [2, 0.25]]
    (entry,) = run(Calls(layer, *BOX), [IMAGE], tmp_path)
    # By 0.5 * 6 * 2 down; by 0.5 * 8 * 1 to the right and 0.5 * 6 * 0.25 down.
    lengths = numpy.array([0, 0, 6, numpy.hypot(4, 0.75)])
    # Samples at rows 3.75 and 5.25, columns 0.5, 2.5 and so on: the rows of the first
    # become 9.75 and 11.25, the columns of the second 9 and 11, or more.
    outside = (4 + 2) / 16
    expected = [lengths.mean(), lengths.max(), outside, 0]
    numpy.testing.assert_allclose(values(entry, 'main/layer'), expected, rtol=1e-6)


def test_of_points_of_queries(tmp_path):
    """How far they are from the reference, which is at column 4, of 9."""
    layer = links.MultiScaleDeformableAttention(3, 4, levels=1, heads=2, points=5)
    arguments = (
        numpy.full((1, 1, 1, 2), 0.5, 'f'),
        numpy.ones((1, 72, 3), 'f'),
        [(8, 9)],
    )
    (entry,) = run(Calls(layer, *arguments), [numpy.ones((1, 3), 'f')], tmp_path)
    # 1 to 5 pixels to the right and to the left: -1 and 9 are outside.
    expected = [3, 5, 2 / 10, 0]
    numpy.testing.assert_allclose(
        values(entry, 'main/layer'), expected, rtol=1e-5, atol=1e-5
    )


def test_bins_that_are_moved_too_far(tmp_path):
    layer = links.DeformableRoIPooling2D(2, 2, 1.0, fc_size=3)
    layer.offset_fc[-1].b.array[...] = 40
    message = (
        r'main/layer: .* 40\.0 pixels long, .* 8 x 9 pixels.*\(layer\.offset_fc, 0'
    )
    with pytest.warns(UserWarning, match=message):
        run(Calls(layer, *BOX), [IMAGE], tmp_path)


def test_no_boxes_and_no_layer_in_test_mode(tmp_path):
    layer = links.DeformableRoIPooling2D(2, 2, 1.0, fc_size=3)
    with chainer.using_config('train', False):
        assert (
            run(Calls(layer, *BOX), [IMAGE], tmp_path)[0]
            .keys()
            .isdisjoint({'main/layer/offset_mean'})
        )
    boxes = numpy.zeros((0, 4), 'f'), numpy.zeros(0, 'i')
    (entry,) = run(Calls(layer, *boxes), [IMAGE], tmp_path)
    assert 'main/layer/offset_mean' not in entry


def test_largest_of_the_whole_epoch_and_anew_in_the_next(tmp_path):
    data = [offsets((2, 0)), offsets((0, 3)), offsets((1, 0)), offsets()]
    log = run(Given(), data[:2], tmp_path, stop=(2, 'epoch'))
    assert [entry['main/conv/offset_max'] for entry in log] == [3, 3]
    model = Given()
    trainer = make_trainer(model, data, tmp_path, stop=(4, 'iteration'))
    trainer.extend(OffsetStatistics(), trigger=(2, 'iteration'))
    trainer.extend(
        extensions.LogReport(trigger=(2, 'iteration'), filename='often'), name='often'
    )
    trainer.run()
    often = trainer.get_extension('often').log
    assert [entry['main/conv/offset_max'] for entry in often] == [3, 1]
    means = [entry['main/conv/offset_mean'] for entry in often]
    numpy.testing.assert_allclose(means, [5 / 48, 1 / 48])


def test_not_finite(tmp_path):
    nan, inf = numpy.nan, numpy.inf
    data = [offsets((3, 4), (nan, 1), (0, inf), (-inf, nan), (1e18, -1e18))]
    with pytest.warns(UserWarning, match='3 of 24 offsets are not finite'):
        (entry,) = run(Given(), data, tmp_path)
    long = 2**0.5 * 1e18
    expected = [(5 + long) / 21, long, 3 / 24, 3 / 24]  # a NaN alone is nowhere
    numpy.testing.assert_allclose(values(entry, 'main/conv'), expected, rtol=1e-6)


def test_too_long_to_be_finite(tmp_path):
    with pytest.warns(UserWarning, match='1 of 24 offsets are not finite'):
        (entry,) = run(Given(), [offsets((3e38, 3e38), (3, 4))], tmp_path)
    assert values(entry, 'main/conv') == [5 / 23, 5, 1 / 24, 1 / 24]


def test_none_finite(tmp_path):
    data = [numpy.full((2, H, W), numpy.nan, 'f')]
    with pytest.warns(UserWarning, match='24 of 24 offsets are not finite'):
        (entry,) = run(Given(), data, tmp_path)
    assert values(entry, 'main/conv') == [0, 0, 0, 1]
    json.dumps(entry, allow_nan=False)


def test_empty_batch(tmp_path):
    model = Given()
    trainer = make_trainer(model, [offsets((1, 0))], tmp_path)
    statistics = OffsetStatistics()
    trainer.extend(statistics)

    @training.make_extension(trigger=(1, 'iteration'), priority=1000)
    def call_with_nothing(trainer):
        model(numpy.zeros((0, 2, H, W), 'f'))

    trainer.extend(call_with_nothing)
    trainer.run()
    assert log_of(trainer)[0]['main/conv/offset_mean'] == pytest.approx(1 / 24)


def test_evaluators_do_not_count(tmp_path):
    model = Given()
    trainer = make_trainer(model, [offsets((1, 0))], tmp_path, stop=(2, 'epoch'))
    test = chainer.iterators.SerialIterator(
        [offsets((3, 3))], 1, repeat=False, shuffle=False
    )
    evaluator = extensions.Evaluator(test, model, eval_func=model)
    trainer.extend(evaluator, trigger=(1, 'iteration'), priority=1000)
    trainer.extend(OffsetStatistics())
    trainer.run()
    assert [e['main/conv/offset_max'] for e in log_of(trainer)] == [1, 1]


class Net(chainer.Chain):
    def __init__(self, deformable=True):
        super().__init__()
        layer = DeformableConvolution2D if deformable else L.Convolution2D
        with self.init_scope():
            self.convs = chainer.ChainList(
                L.Convolution2D(1, 2, 3, pad=1), layer(2, 3, 3, pad=1), layer(3, 3, 3)
            )

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.mean(x, axis=(2, 3))


EXAMPLES = [(numpy.random.RandomState(0).rand(1, 6, 7).astype('f'), 1)] * 4


def test_finds_the_layers_of_a_classifier(tmp_path):
    (entry,) = run(L.Classifier(Net()), EXAMPLES, tmp_path, batchsize=2)
    found = {key.rpartition('/')[0] for key in entry if key.endswith(KEYS)}
    assert found == {'main/predictor/convs/1', 'main/predictor/convs/2'}
    assert entry['main/predictor/convs/1/offset_mean'] == 0
    # Zero offsets: the points outside are those on the border of the padding.
    share = entry['main/predictor/convs/1/points_outside']
    assert share == pytest.approx(1 - 16 * 19 / (18 * 21))
    assert entry['main/predictor/convs/2/points_outside'] == 0


def test_target_is_one_layer(tmp_path):
    class Layer(DeformableConvolution2D):
        def forward(self, x):
            return F.sum(super().forward(x))

    (entry,) = run(Layer(1, 1, 3), [EXAMPLES[0][0]], tmp_path)
    assert values(entry, 'main') == [0, 0, 0, 0]


def test_several_optimizers(tmp_path):
    class Updater(training.updaters.StandardUpdater):
        def update_core(self):
            batch = self.converter(self.get_iterator('main').next())
            self.get_optimizer('one').target(batch)
            for _ in range(2):
                self.get_optimizer('two').target(batch + 1)

    one, two = Given(), Given(('a', 'b'))
    optimizers = {
        name: chainer.optimizers.SGD(0).setup(model)
        for name, model in (('one', one), ('two', two), ('again', one))
    }
    iterator = chainer.iterators.SerialIterator([offsets((1, 2))], 1)
    updater = Updater(iterator, optimizers)
    trainer = training.Trainer(updater, (1, 'epoch'), out=str(tmp_path))
    trainer.extend(OffsetStatistics(float('inf')))
    trainer.extend(extensions.LogReport())
    trainer.run()
    (entry,) = log_of(trainer)
    found = {key.rpartition('/')[0] for key in entry if key.endswith(KEYS)}
    assert found == {'one/conv', 'two/a', 'two/b'}
    assert entry['one/conv/offset_max'] == pytest.approx(5**0.5)
    assert entry['two/b/offset_max'] == pytest.approx(13**0.5)
    assert entry['two/b/offset_mean'] == pytest.approx((13**0.5 + 23 * 2**0.5) / 24)


def test_layer_that_is_not_called(tmp_path):
    model = Given(('a', 'b'))
    model.layers = ('b',)
    (entry,) = run(model, [offsets((1, 0))], tmp_path)
    assert values(entry, 'main/a') == [None] * 4
    assert entry['main/b/offset_max'] == 1


def test_no_deformable_layer(tmp_path):
    model = L.Classifier(Net(deformable=False))
    with pytest.warns(UserWarning, match='OffsetStatistics: no layer of') as caught:
        (entry,) = run(model, EXAMPLES, tmp_path)
    assert len(caught) == 1
    assert not [key for key in entry if key.endswith(KEYS)]


def test_layers_of_chainers_own_class(tmp_path):
    net = Net()
    convs = net.convs
    del net.convs
    with net.init_scope():
        net.convs = chainer.ChainList(
            L.DeformableConvolution2D(1, 3, 3, pad=1), convs[2]
        )
    message = (
        r"OffsetStatistics: .* own class \('main/predictor/convs/0'\): call "
        r'chainer_deform\.patch_chainer\(\) before the model is built'
    )
    with pytest.warns(UserWarning, match=message) as caught:
        (entry,) = run(L.Classifier(net), EXAMPLES, tmp_path)
    assert len(caught) == 1
    found = {key.rpartition('/')[0] for key in entry if key.endswith(KEYS)}
    assert found == {'main/predictor/convs/1'}


def test_warns_once_for_each_layer(tmp_path):
    model = Given(('a', 'b'))
    data = [offsets(), offsets((0, W)), offsets((0, W + 0.5)), offsets((0, 99))]
    with pytest.warns(UserWarning, match='pixels long') as caught:
        run(model, data, tmp_path, stop=(2, 'epoch'))
    a, b = (str(warning.message) for warning in caught)
    assert a.startswith('main/a: an offset is 6.5 pixels long')
    assert b.startswith('main/b: ')
    assert 'has 4 x 6 pixels' in a
    assert 'chainer_deform.optimizer_hooks.scale_updates(' in a


def test_limit_is_that_of_the_largest_image(tmp_path):
    class Sizes(Given):
        def forward(self, offset):
            super().forward(offset)
            small = numpy.zeros((1, 2, 1, 1), 'f')
            return 0 * F.sum(self.conv(numpy.ones((1, 1, 1, 1), 'f'), small))

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run(Sizes(), [offsets((0, W - 0.5))], tmp_path)


@pytest.mark.parametrize(('warn_above', 'warns'), [(1.9, True), (2, False)])
def test_threshold(tmp_path, warn_above, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run(Given(), [offsets((0, 2))], tmp_path, OffsetStatistics(warn_above))
    assert len(caught) == warns


def test_offsets_that_are_not_finite_always_warn(tmp_path):
    statistics = OffsetStatistics(float('inf'))
    with pytest.warns(UserWarning, match='1 of 24 offsets are not finite'):
        run(Given(), [offsets((0, numpy.inf))], tmp_path, statistics)


@pytest.mark.parametrize('warn_above', [0, -1, float('nan')])
def test_impossible_threshold(warn_above):
    with pytest.raises(ValueError, match='warn_above must be a positive number'):
        OffsetStatistics(warn_above)


def hooks_of(model):
    return [hook for link in model.links() for hook in link.local_link_hooks]


def test_hooks_are_removed(tmp_path):
    model, statistics = Given(), OffsetStatistics()
    trainer = make_trainer(model, [offsets()], tmp_path)
    trainer.extend(statistics)
    seen = []
    trainer.extend(lambda trainer: seen.append(len(hooks_of(model))), name='look')
    trainer.run()
    assert seen == [1]
    assert hooks_of(model) == []


def test_hooks_are_removed_after_an_error(tmp_path, capsys):
    model = Given()
    trainer = make_trainer(model, [offsets()], tmp_path)
    trainer.extend(OffsetStatistics())
    trainer.extend(lambda trainer: 1 / 0, name='fails')
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert hooks_of(model) == []


def test_same_extension_and_model_again(tmp_path):
    model, statistics = Given(), OffsetStatistics()
    data = [offsets((2, 0)), offsets()]
    # The first run ends in the middle of an epoch, so nothing of it is reported.
    run(model, data, tmp_path, statistics, stop=(1, 'iteration'))
    (entry,) = run(model, data[1:], tmp_path, statistics)
    assert values(entry, 'main/conv') == [0, 0, 0, 0]
    assert hooks_of(model) == []


def test_two_extensions_at_the_same_time(tmp_path):
    trainer = make_trainer(Given(), [offsets((2, 0))], tmp_path)
    trainer.extend(OffsetStatistics())
    trainer.extend(OffsetStatistics())
    trainer.run()
    assert log_of(trainer)[0]['main/conv/offset_max'] == 2


def test_run_that_did_not_start(tmp_path):
    model, statistics = Given(), OffsetStatistics()
    trainer = make_trainer(model, [offsets((2, 0))], tmp_path)
    statistics.initialize(trainer)  # and another extension failed to
    (entry,) = run(model, [offsets((1, 0))], tmp_path, statistics)
    assert entry['main/conv/offset_max'] == 1
    assert hooks_of(model) == []


def test_copies_of_the_model_are_not_measured(tmp_path):
    model = Given()
    trainer = make_trainer(model, [offsets((1, 0))], tmp_path)
    trainer.extend(OffsetStatistics())

    far = offsets((0, 99))[None]  # far enough for a warning
    copies = []

    @training.make_extension(trigger=(1, 'iteration'), priority=1000)
    def call_copies(trainer):
        copies.extend(
            [copy.deepcopy(model), model.copy(), pickle.loads(pickle.dumps(model))]
        )
        for copied in copies:
            copied(far)

    trainer.extend(call_copies)
    trainer.run()
    assert log_of(trainer)[0]['main/conv/offset_max'] == 1
    for copied in copies:
        copied(far)


@pytest.mark.parametrize('autoload', [False, True])
def test_resume_within_an_epoch(tmp_path, autoload):
    data = [
        offsets((3, 0)),
        offsets((0, 2)),
        offsets((1, 0), (numpy.inf, 0)),
        offsets(),
    ]

    def make(stop):
        trainer = make_trainer(Given(), data, tmp_path, stop=stop)
        trainer.extend(OffsetStatistics(1e9))
        trainer.extend(
            extensions.snapshot(filename='snapshot', autoload=autoload),
            trigger=(2, 'iteration'),
        )
        return trainer

    whole = make((1, 'epoch'))
    with pytest.warns(UserWarning, match='not finite'):
        whole.run()
    (tmp_path / 'snapshot').unlink()
    make((2, 'iteration')).run()
    resumed = make((1, 'epoch'))
    if not autoload:
        chainer.serializers.load_npz(tmp_path / 'snapshot', resumed)
    with pytest.warns(UserWarning, match='not finite'):
        resumed.run()
    (entry,), (expected,) = log_of(resumed), log_of(whole)
    assert entry['iteration'] == 4
    assert values(entry, 'main/conv') == values(expected, 'main/conv')
    assert values(entry, 'main/conv')[1] == 3
    assert values(entry, 'main/conv')[3] == 1 / 96


def test_what_was_resumed_is_not_in_the_next_run(tmp_path):
    data = [offsets((3, 0)), offsets()]
    first = make_trainer(Given(), data, tmp_path, stop=(1, 'iteration'))
    first.extend(OffsetStatistics())
    first.extend(extensions.snapshot(filename='snapshot'), trigger=(1, 'iteration'))
    first.run()
    statistics = OffsetStatistics()
    resumed = make_trainer(Given(), data, tmp_path)
    resumed.extend(statistics)
    resumed.extend(extensions.snapshot(filename='snapshot'))
    chainer.serializers.load_npz(tmp_path / 'snapshot', resumed)
    resumed.run()
    assert log_of(resumed)[0]['main/conv/offset_max'] == 3
    (entry,) = run(Given(), [offsets((1, 0))], tmp_path, statistics)
    assert entry['main/conv/offset_max'] == 1


@pytest.mark.parametrize('strict', [True, False])
def test_resume_of_a_snapshot_without_it(tmp_path, strict):
    trainer = make_trainer(Given(), [offsets((3, 0))], tmp_path)
    trainer.run()
    chainer.serializers.save_npz(tmp_path / 'snapshot.npz', trainer)
    resumed = make_trainer(Given(), [offsets((2, 0))], tmp_path, stop=(2, 'epoch'))
    resumed.extend(OffsetStatistics())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        chainer.serializers.load_npz(tmp_path / 'snapshot.npz', resumed, strict=strict)
    # Chainer's trigger warns for itself.
    assert strict == any('no offset statistics' in str(w.message) for w in caught)
    resumed.run()
    assert log_of(resumed)[-1]['main/conv/offset_max'] == 2


FORMATS = {
    'npz': (chainer.serializers.save_npz, chainer.serializers.load_npz),
    'hdf5': (chainer.serializers.save_hdf5, chainer.serializers.load_hdf5),
}


class Observed:
    """Stands for LogReport, which HDF5 files cannot hold."""

    name = 'observed'

    def __init__(self):
        self.log = []

    def __call__(self, trainer):
        self.log.append(dict(trainer.observation))


def make_saved(out, stop, save, data):
    """A trainer that is saved after its second iteration, and what it reports."""
    optimizer = chainer.optimizers.SGD(0).setup(Given())
    iterator = chainer.iterators.SerialIterator(data, 1, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, stop, out=str(out))
    trainer.extend(OffsetStatistics())
    observed = Observed()
    trainer.extend(observed, trigger=(1, 'epoch'))
    trainer.extend(
        extensions.snapshot(save, filename='snapshot'), trigger=(2, 'iteration')
    )
    return trainer, observed.log


@pytest.mark.parametrize('name', FORMATS)
def test_resume_in_both_formats(tmp_path, name):
    pytest.importorskip('h5py')
    save, load = FORMATS[name]
    data = [offsets((3, 0)), offsets((0, 2)), offsets((1, 0)), offsets()]
    whole, expected = make_saved(tmp_path / 'whole', (1, 'epoch'), save, data)
    whole.run()
    make_saved(tmp_path, (2, 'iteration'), save, data)[0].run()
    resumed, log = make_saved(tmp_path, (1, 'epoch'), save, data)
    load(tmp_path / 'snapshot', resumed)
    resumed.run()
    assert values(log[0], 'main/conv') == [6 / 96, 3, 0, 0]
    assert log == expected


@pytest.mark.parametrize('name', FORMATS)
def test_snapshot_before_a_training_and_after_it(tmp_path, name):
    pytest.importorskip('h5py')
    save, load = FORMATS[name]
    for run_first in False, True:
        trainer, _ = make_saved(tmp_path, (1, 'epoch'), save, [offsets()] * 2)
        if run_first:
            trainer.run()
        else:
            trainer._start_at = 0  # which a trainer is not saved without
        save(str(tmp_path / 'extra'), trainer)
        resumed, log = make_saved(tmp_path, (2, 'epoch'), save, [offsets((1, 0))] * 2)
        load(tmp_path / 'extra', resumed)
        resumed.run()
        assert values(log[-1], 'main/conv') == [1 / 24, 1, 0, 0]


def test_snapshot_of_an_earlier_version(tmp_path):
    """It held text, which only NPZ files can."""
    data = [offsets((3, 0)), offsets((0, 2)), offsets((1, 0)), offsets()]
    save, load = FORMATS['npz']
    make_saved(tmp_path, (2, 'iteration'), save, data)[0].run()
    with numpy.load(tmp_path / 'snapshot') as file:
        arrays = dict(file)
    old = '{"main/conv": [48.0, 48.0, 5.0, 3.0, 0.0]}'
    assert arrays[STATE].tobytes().decode() == old
    arrays[STATE] = numpy.asarray(old)
    numpy.savez(tmp_path / 'old.npz', **arrays)
    resumed, log = make_saved(tmp_path, (1, 'epoch'), save, data)
    load(tmp_path / 'old.npz', resumed)
    resumed.run()
    assert values(log[0], 'main/conv') == [6 / 96, 3, 0, 0]


STATE = 'extensions/OffsetStatistics/_totals'


def as_bytes(text):
    return numpy.frombuffer(text.encode(), 'u1')


@pytest.mark.parametrize(
    'state',
    [
        as_bytes('{"main/conv": [48.0, 48.0, 5.0'),  # cut off
        as_bytes('{"main/conv": [48.0, 48.0, 5.0, 3.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, 5.0, 3.0, 0.0, 1.0]}'),
        as_bytes('{"main/conv": [48.0, 49.0, 5.0, 3.0, 0.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, 5.0, 3.0, 49.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, NaN, 3.0, 0.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, 5.0, Infinity, 0.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, 5.0, -1, 0.0]}'),
        as_bytes('{"main/conv": [48.0, 48.0, null, 3.0, 0.0]}'),
        as_bytes('{"main/conv": 7}'),
        as_bytes('{"main/conv": {}}'),
        as_bytes('[1, 2]'),
        as_bytes('7'),
        as_bytes(''),
        numpy.full(9, 255, 'u1'),
        numpy.zeros((2, 3), 'f'),
        numpy.float64('nan'),
        numpy.asarray('no json'),
        numpy.asarray(b'{}'),
        numpy.asarray({'main/conv': 1}, object),
    ],
)
@pytest.mark.parametrize('name', FORMATS)
def test_damaged_state(tmp_path, name, state):
    h5py = pytest.importorskip('h5py')
    save, load = FORMATS[name]
    data = [offsets((3, 0)), offsets((0, 2)), offsets((1, 0)), offsets()]
    make_saved(tmp_path, (2, 'iteration'), save, data)[0].run()
    if name == 'npz':
        with numpy.load(tmp_path / 'snapshot') as file:
            arrays = dict(file)
        arrays[STATE] = state
        numpy.savez(tmp_path / 'damaged.npz', **arrays)
        (tmp_path / 'damaged.npz').rename(tmp_path / 'snapshot')
    else:
        with h5py.File(tmp_path / 'snapshot', 'r+') as file:
            del file[STATE]
            if numpy.asarray(state).dtype.kind in 'fuS':  # else it is missing
                file[STATE] = state
    resumed, log = make_saved(tmp_path, (1, 'epoch'), save, data)
    with pytest.warns(UserWarning, match='no offset statistics that can') as caught:
        load(tmp_path / 'snapshot', resumed)
    assert len(caught) == 1
    resumed.run()
    assert values(log[0], 'main/conv') == [1 / 48, 1, 0, 0]  # of the second half


def test_damaged_file(tmp_path):
    """Of which the other members can be read."""
    save, load = FORMATS['npz']
    data = [offsets((3, 0)), offsets((0, 2)), offsets((1, 0)), offsets()]
    make_saved(tmp_path, (2, 'iteration'), save, data)[0].run()
    with numpy.load(tmp_path / 'snapshot') as file:
        numpy.savez(tmp_path / 'plain.npz', **file)
    content = (tmp_path / 'plain.npz').read_bytes()
    assert content.count(b'"main/conv"') == 1
    (tmp_path / 'plain.npz').write_bytes(
        content.replace(b'"main/conv"', b'"main/xxxx"')
    )
    resumed, log = make_saved(tmp_path, (1, 'epoch'), save, data)
    with pytest.warns(UserWarning, match='anew .BadZipFile: Bad CRC'):
        load(tmp_path / 'plain.npz', resumed)
    resumed.run()
    assert values(log[0], 'main/conv') == [1 / 48, 1, 0, 0]


def test_hdf5_snapshot_without_it(tmp_path):
    """Chainer's trigger fails there, so only the extension is read."""
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path / 'empty', 'w'):
        pass
    with h5py.File(tmp_path / 'empty', 'r') as file:
        for strict in True, False:
            serializer = chainer.serializers.HDF5Deserializer(file, strict)
            for part in serializer, serializer['missing']:
                statistics = OffsetStatistics()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter('always')
                    statistics.serialize(part)
                assert len(caught) == strict


def train(tmp_path, extend):
    numpy.random.seed(0)
    model = L.Classifier(Net())
    optimizer = chainer.optimizers.Adam().setup(model)
    iterator = chainer.iterators.SerialIterator(EXAMPLES, 2)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (3, 'epoch'), out=str(tmp_path))
    if extend:
        trainer.extend(OffsetStatistics())
    trainer.run()
    return {name: param.array for name, param in model.namedparams()}


def test_changes_nothing(tmp_path):
    without = train(tmp_path, False)
    for name, array in train(tmp_path, True).items():
        numpy.testing.assert_array_equal(array, without[name], err_msg=name)
    assert without['/predictor/convs/1/offset_conv/W'].any()


def test_print_report(tmp_path):
    out = io.StringIO()
    trainer = make_trainer(Given(), [offsets((3, 4))], tmp_path)
    trainer.extend(OffsetStatistics())
    trainer.extend(extensions.PrintReport(['epoch', 'main/conv/offset_max'], out=out))
    trainer.run()
    head, line = out.getvalue().splitlines()
    assert head.split() == ['epoch', 'main/conv/offset_max']
    assert line.split()[-1] == '5'


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    class OnDevice(Given):
        def forward(self, offset):
            x = self.xp.ones((len(offset), 1, H, W), 'f')
            return F.sum(self.conv(x, self.device.send(offset))) * 0

    model = OnDevice()
    model.to_device('@cupy:0')
    data = [offsets((3, 4), (numpy.inf, 0)), offsets((0, 2), (0, 99))]
    with pytest.warns(UserWarning, match='1 of 48 offsets are not finite'):
        (entry,) = run(model, data, tmp_path)
    expected = [(5 + 2 + 99) / 47, 99, 2 / 48, 1 / 48]
    numpy.testing.assert_allclose(values(entry, 'main/conv'), expected, rtol=1e-6)


def test_reprs_are_short(tmp_path):
    model = Given()
    statistics = OffsetStatistics(warn_above=9)
    assert repr(statistics) == 'OffsetStatistics(warn_above=9, layers=[])'
    statistics.initialize(make_trainer(model, [offsets()], tmp_path))
    assert repr(statistics) == "OffsetStatistics(warn_above=9, layers=['main/conv'])"
    (hook,) = model.conv.local_link_hooks.values()
    assert repr(hook) == "OffsetStatistics of 'main/conv'"
