"""The pictures of a training, and that they leave no trace in it."""

import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import training
from chainer.training import extensions
from chainer.utils import type_check

pytest.importorskip('matplotlib')

from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from chainer_deform import receptive_points, sampling_locations
from chainer_deform.extensions import SamplingPointsReport
from chainer_deform.links import DeformableConvolution2D

random = numpy.random.RandomState(0)
images = random.uniform(0, 1, (2, 1, 12, 16)).astype('f')
data = [(image, numpy.int32(i)) for i, image in enumerate(images)] * 2


class Net(chainer.Chain):
    """It has all that a careless extension would disturb."""

    def __init__(self, deformable=True):
        super().__init__()
        noise = {'offset_initialW': chainer.initializers.Normal(0.3)}
        with self.init_scope():
            self.conv = L.Convolution2D(1, 4, 3, stride=2, pad=1)
            self.norm = L.BatchNormalization(4)
            if deformable:
                self.a = DeformableConvolution2D(4, 4, (3, 2), pad=(1, 1), **noise)
                self.b = DeformableConvolution2D(4, 5, 3, 2, modulated=True, **noise)
            else:
                self.a = L.Convolution2D(4, 4, 3, pad=1)
                self.b = L.Convolution2D(4, 5, 3)

    def forward(self, x):
        x = F.dropout(F.relu(self.norm(self.conv(x))), 0.3)
        x = F.relu(self.b(F.relu(self.a(x))))
        numpy.random.uniform()  # as a random augmentation in the model does
        chainer.report({'largest': F.max(x)}, self)
        return F.mean(x, axis=(2, 3))


def make_trainer(out, report=None, model=None, stop=(2, 'epoch')):
    numpy.random.seed(0)
    model = model or L.Classifier(Net())
    optimizer = chainer.optimizers.Adam().setup(model)
    iterator = chainer.iterators.SerialIterator(data, 2)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, stop, out=str(out))
    if report is not None:
        trainer.extend(report)
    trainer.extend(extensions.LogReport())
    return trainer


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, and are not rendered, which takes long."""
    found = []

    def note(self, path, **kwargs):
        found.append(self)
        with open(path, 'wb') as file:
            file.write(b'new')

    monkeypatch.setattr(Figure, 'savefig', note)
    return found


def panels(figure):
    """The points (y, x) and centres of each panel, by its title."""
    found = []
    for ax in figure.axes:
        artists = [a for a in ax.collections if type(a) is PathCollection]
        places = [numpy.asarray(artist.get_offsets())[:, ::-1] for artist in artists]
        found.append((ax.get_title().split('\n')[0], places[::2], places[1::2]))
    return found


def test_writes_a_picture_an_epoch(tmp_path):
    make_trainer(tmp_path, SamplingPointsReport(images[0])).run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        'log',
        'sampling_points_epoch_1.png',
        'sampling_points_epoch_2.png',
    ]
    assert imread(tmp_path / 'sampling_points_epoch_2.png').std() > 0.1


def test_title(tmp_path, figures):
    make_trainer(tmp_path, SamplingPointsReport(images)).run()
    assert [figure._suptitle.get_text() for figure in figures] == [
        'Epoch 1, iteration 2',
        'Epoch 2, iteration 4',
    ]


def test_draws_the_points_of_every_layer(tmp_path, figures):
    pixels = [(0, 15), (7, 3)]
    trainer = make_trainer(
        tmp_path, SamplingPointsReport(images, pixels), stop=(1, 'epoch')
    )
    trainer.run()
    net = trainer.updater.get_optimizer('main').target.predictor
    with chainer.using_config('train', False):
        h = F.relu(net.norm(net.conv(images)))  # 6 by 8
        a = sampling_locations(net.a.offset_conv(h), (3, 2), pad=(1, 1))
        h = F.relu(net.a(h))  # 6 by 9
        b = sampling_locations(net.b.offset_conv(h)[:, :18], 3, stride=2)  # 2 by 4
    (figure,) = figures
    found = panels(figure)
    assert [title for title, _, _ in found] == [
        'a',
        'b',
        'through the last 2 layers',
    ] * 2
    # The output pixels under the pixels of the image, of the outputs' sizes.
    a_pixels, b_pixels = [(0, 8), (3, 1)], [(0, 3), (1, 0)]
    for i in range(2):
        layers = [a[i], b[i]]
        for k, expected, scale in (
            (0, [a[i, :, :, :, y, x].reshape(-1, 2) for y, x in a_pixels], (2, 2)),
            (1, [b[i, :, :, :, y, x].reshape(-1, 2) for y, x in b_pixels], (2, 16 / 9)),
            (2, [receptive_points(layers, y, x) for y, x in b_pixels], (2, 2)),
        ):
            _, points, _ = found[3 * i + k]
            assert len(points) == 2
            for drawn, array in zip(points, expected):
                wanted = (array + 0.5) * numpy.array(scale) - 0.5
                numpy.testing.assert_allclose(drawn, wanted, atol=1e-4)
    # The centres of the unmoved points: a's lie half a pixel left of its output pixels.
    (_, _, a_centres), (_, _, b_centres), (_, _, centres) = found[:3]
    for drawn, (y, x) in zip(a_centres, a_pixels):
        numpy.testing.assert_allclose(drawn, [(y * 2 + 0.5, (x - 0.5) * 2 + 0.5)])
    for drawn, (y, x) in zip(b_centres, b_pixels):
        v, u = 2 * y + 1, 2 * x + 1
        numpy.testing.assert_allclose(drawn, [(v * 2 + 0.5, (u + 0.5) * 16 / 9 - 0.5)])
    for drawn, (y, x) in zip(centres, b_pixels):
        v, u = 2 * y + 1, 2 * x + 1 - 0.5
        numpy.testing.assert_allclose(drawn, [(v * 2 + 0.5, u * 2 + 0.5)])
    shown = figure.axes[3].images[0].get_array()
    numpy.testing.assert_allclose(shown, images[1, 0], rtol=1e-6)


def test_layers_that_do_not_follow_on_each_other(tmp_path, figures):
    class Pooled(Net):
        def forward(self, x):
            x = F.max_pooling_2d(self.a(self.norm(self.conv(x))), 2)
            return F.mean(self.b(x), axis=(2, 3))

    model = L.Classifier(Pooled())
    make_trainer(tmp_path, SamplingPointsReport(images[0]), model, (1, 'epoch')).run()
    assert [title for title, _, _ in panels(figures[0])] == ['a', 'b']


@pytest.mark.parametrize(
    ('ksize', 'offset_groups', 'layers'),
    [
        (3, 1, 3),
        (3, 4, 1),
        ((2, 5), 1, 3),  # 10 * 10 * 10 points are still drawn
    ],
)
def test_no_more_points_than_can_be_told_apart(
    tmp_path, figures, ksize, offset_groups, layers
):
    class Deep(chainer.ChainList):
        def __init__(self):
            options = {'pad': 1, 'offset_groups': offset_groups}
            deep = (DeformableConvolution2D(4, 4, ksize, **options) for _ in range(5))
            super().__init__(L.Convolution2D(1, 4, 1), *deep)

        def forward(self, x):
            for layer in self:
                x = layer(x)
            return F.mean(x, axis=(2, 3))

    model = L.Classifier(Deep())
    make_trainer(tmp_path, SamplingPointsReport(images[0]), model, (1, 'epoch')).run()
    titles = [title for title, _, _ in panels(figures[0])]
    stack = [] if layers == 1 else [f'through the last {layers} layers']
    assert titles == [str(i) for i in range(1, 6)] + stack


def test_only_calls_with_the_whole_batch(tmp_path, figures):
    class Halves(Net):
        def forward(self, x):
            h = F.relu(self.norm(self.conv(x)))
            self.a(h[:1])
            return F.mean(self.b(h), axis=(2, 3))

    model = L.Classifier(Halves())
    make_trainer(tmp_path, SamplingPointsReport(images), model, (1, 'epoch')).run()
    assert [title for title, _, _ in panels(figures[0])] == ['b', 'b']


def test_no_target(tmp_path, capsys):
    optimizer = chainer.optimizers.Adam().setup(L.Classifier(Net()))
    iterator = chainer.iterators.SerialIterator(data, 2)
    updater = training.updaters.StandardUpdater(iterator, {'gen': optimizer})
    trainer = training.Trainer(updater, (1, 'epoch'), out=str(tmp_path))
    trainer.extend(SamplingPointsReport(images))
    with pytest.raises(ValueError, match=r"target must be given .* \['gen'\]"):
        trainer.run()
    assert updater.iteration == 0


def trace(out, report):
    """All that a training leaves behind."""
    trainer = make_trainer(out, report)
    trainer.run()
    target = trainer.updater.get_optimizer('main').target
    arrays = {}
    chainer.serializers.DictionarySerializer(arrays).save(trainer.updater)
    for name, param in target.namedparams():
        arrays[f'grad{name}'] = param.grad
    log = [
        {key: value for key, value in entry.items() if key != 'elapsed_time'}
        for entry in trainer.get_extension('LogReport').log
    ]
    return arrays, log, numpy.random.get_state()[1:3]


def test_leaves_no_trace(tmp_path):
    arrays, log, state = trace(tmp_path / 'with', SamplingPointsReport(images[0]))
    expected_arrays, expected_log, expected_state = trace(tmp_path / 'without', None)
    assert any('avg_mean' in name for name in arrays)
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        numpy.testing.assert_array_equal(array, expected_arrays[name], err_msg=name)
    assert log == expected_log
    assert 'main/predictor/largest' in log[0]
    numpy.testing.assert_array_equal(state[0], expected_state[0])
    assert state[1] == expected_state[1]


def test_runs_in_test_mode_without_a_graph(tmp_path, figures):
    seen = []

    class Spy(Net):
        def forward(self, x):
            y = super().forward(x)
            seen.append((chainer.config.train, y.creator is None, type(x), len(x)))
            return y

    model = L.Classifier(Spy())
    make_trainer(tmp_path, SamplingPointsReport(images), model, (1, 'epoch')).run()
    *training_passes, test_pass = seen
    assert all(passed[:2] == (True, False) for passed in training_passes)
    assert test_pass == (False, True, numpy.ndarray, 2)


def test_beside_a_hook_of_the_user(tmp_path, figures):
    from chainer_deform.link_hooks import SamplingHook

    with SamplingHook() as hook:
        make_trainer(tmp_path, SamplingPointsReport(images), stop=(1, 'epoch')).run()
    assert len(figures) == 1
    assert len(hook.calls) == 2 * 2 + 2


def test_failing_model_leaves_no_trace_either(tmp_path, capsys):
    class Fails(Net):
        def forward(self, x):
            y = super().forward(x)
            if not chainer.config.train:
                raise ArithmeticError
            return y

    trainer = make_trainer(
        tmp_path, SamplingPointsReport(images), L.Classifier(Fails()), (1, 'epoch')
    )
    with pytest.raises(ArithmeticError):
        trainer.run()
    assert chainer.config.train
    assert chainer.config.enable_backprop
    assert not chainer._get_link_hooks()
    assert not list(tmp_path.iterdir())


def test_given_target(tmp_path, figures):
    target = DeformableConvolution2D(1, 1, 3)
    report = SamplingPointsReport(images, target=target)
    make_trainer(tmp_path, report, stop=(1, 'epoch')).run()
    assert [title for title, _, _ in panels(figures[0])] == ['', '']


def test_target_without_a_predictor(tmp_path, figures):
    class Whole(Net):
        def forward(self, x, t=None):
            y = super().forward(x)
            return y if t is None else F.softmax_cross_entropy(y, t)

    make_trainer(tmp_path, SamplingPointsReport(images), Whole(), (1, 'epoch')).run()
    assert len(figures[0].axes) == 6


def test_no_deformable_layer(tmp_path):
    model = L.Classifier(Net(deformable=False))
    make_trainer(tmp_path, SamplingPointsReport(images), model, (1, 'epoch')).run()
    assert [path.name for path in tmp_path.iterdir()] == ['log']


def test_file_name_and_trigger(tmp_path, figures):
    report = SamplingPointsReport(images, filename='points/{.updater.iteration}.svg')
    trainer = make_trainer(tmp_path, stop=(3, 'iteration'))
    trainer.extend(report, trigger=(1, 'iteration'))
    trainer.run()
    names = sorted(path.name for path in (tmp_path / 'points').iterdir())
    assert names == ['1.svg', '2.svg', '3.svg']
    assert (tmp_path / 'points' / '3.svg').read_bytes() == b'new'


def test_old_picture_stays_when_the_new_one_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / 'points.png').write_bytes(b'old')

    def fails(self, path, **kwargs):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fails)
    trainer = make_trainer(
        tmp_path, SamplingPointsReport(images, filename='points.png'), stop=(1, 'epoch')
    )
    with pytest.raises(OSError, match='disk full'):
        trainer.run()
    assert (tmp_path / 'points.png').read_bytes() == b'old'
    assert [path.name for path in tmp_path.iterdir()] == ['points.png']


@pytest.mark.parametrize(
    ('given', 'count'),
    [
        (images, 2),
        (images[0], 1),
        (chainer.Variable(images[0]), 1),
        (data[0], 1),
        (data[:2], 2),
        ([images[1], data[0]], 2),
    ],
)
def test_forms_of_images(tmp_path, figures, given, count):
    make_trainer(tmp_path, SamplingPointsReport(given), stop=(1, 'epoch')).run()
    assert len(figures[0].axes) == 3 * count


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (('image.png',), TypeError, 'images must be arrays .* not a str'),
        (([],), ValueError, 'images must be of one shape'),
        (([images[0], images[0, :, :5]],), ValueError, r'\(1, 5, 16\), \(1, 12, 16\)'),
        ((images[0, 0],), type_check.InvalidType, r'images\.shape == \(12, 16\)'),
        ((images[:0],), type_check.InvalidType, r'\(0, 1, 12, 16\)'),
        ((images, [(12, 0)]), ValueError, r'12 by 16 pixels, not \[\(12, 0\)\]'),
        ((images, [(1, 2, 3)]), ValueError, 'pixels must be pairs'),
        ((images, [(-1, 2)]), ValueError, 'pixels must be at least 0'),
        ((images, [(0.5, 2)]), TypeError, 'pixels must be pairs of ints'),
        ((images, []), ValueError, 'pixels must be pairs'),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SamplingPointsReport(*arguments)


@pytest.mark.parametrize('filename', ['points', 'points.xyz', '{.updater.epoch}'])
def test_file_that_is_no_picture(filename):
    with pytest.raises(ValueError, match=r'filename must end with .*\.png, '):
        SamplingPointsReport(images, filename=filename)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.warns(UserWarning, match=r"pip install 'chainer-deform\[plot\]'"):
        report = SamplingPointsReport(images)
    make_trainer(tmp_path, report).run()
    assert [path.name for path in tmp_path.iterdir()] == ['log']
