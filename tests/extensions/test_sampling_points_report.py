"""The pictures of a training, and that they leave no trace in it."""

import errno
import io
import os
import sys
import warnings

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

from chainer_deform import links, receptive_points, sampling_locations
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

    def note(self, file, **kwargs):
        if not isinstance(file, io.BytesIO):  # which is the trial of the format
            found.append(self)
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


def test_labels_of_the_rows(tmp_path, figures):
    report = SamplingPointsReport(images, labels=['upright', 'warped'])
    make_trainer(tmp_path, report, stop=(1, 'epoch')).run()
    panels_of_a_row = 'a', 'b', 'through the last 2 layers'
    assert [title for title, _, _ in panels(figures[0])] == [
        f'{label}: {panel}'
        for label in ('upright', 'warped')
        for panel in panels_of_a_row
    ]
    with pytest.raises(ValueError, match='labels must be 2, .* not .*upright'):
        SamplingPointsReport(images, labels=['upright'])


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


def test_failing_model_leaves_no_trace_either(tmp_path):
    class Fails(Net):
        def forward(self, x):
            y = super().forward(x)
            if not chainer.config.train:
                raise ArithmeticError('of the model')
            return y

    trainer = make_trainer(
        tmp_path, SamplingPointsReport(images), L.Classifier(Fails())
    )
    with pytest.warns(UserWarning, match=r'picture \(ArithmeticError: of the model\)'):
        trainer.run()
    assert chainer.config.train
    assert chainer.config.enable_backprop
    assert not chainer._get_link_hooks()
    assert [path.name for path in tmp_path.iterdir()] == ['log']


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
    class Plain(Net):
        def __init__(self):
            super().__init__(deformable=False)

        def forward(self, x):
            assert chainer.config.train  # it is not run for nothing
            return super().forward(x)

    trainer = make_trainer(
        tmp_path, SamplingPointsReport(images), L.Classifier(Plain())
    )
    with pytest.warns(UserWarning, match='Report: no convolution of') as caught:
        trainer.run()
    assert len(caught) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['log']


class OtherLayers(chainer.Chain):
    """Layers with taps of their own, or of boxes."""

    def __init__(self, taps=True):
        super().__init__()
        with self.init_scope():
            if taps:
                self.v3 = links.DCNv3(1, 4, offset_groups=2)
                self.v4 = links.DCNv4(4, 4, offset_groups=1, stride=2)
            self.pool = links.DeformableRoIPooling2D(None, 2, 1.0, fc_size=3)

    def forward(self, x):
        h = self.v4(self.v3(x)) if hasattr(self, 'v3') else x
        boxes = numpy.array([[0, 0, 4, 5]] * len(x), 'f')
        y = self.pool(h, boxes, numpy.arange(len(x)))
        return F.reshape(y, (len(x), -1))


def test_draws_layers_with_taps_of_their_own(tmp_path, figures):
    """And leaves out boxes, though there are as many as images."""
    model = L.Classifier(OtherLayers())
    make_trainer(tmp_path, SamplingPointsReport(images), model, (1, 'epoch')).run()
    (figure,) = figures
    titles = ['v3', 'v4', 'through the last 2 layers']
    assert [title for title, _, _ in panels(figure)] == titles * 2
    counts = [[len(p) for p in points] for _, points, _ in panels(figure)[:2]]
    assert counts == [[18] * 3, [9] * 3]


def test_layers_that_are_not_drawn(tmp_path):
    model = L.Classifier(OtherLayers(taps=False))
    trainer = make_trainer(tmp_path, SamplingPointsReport(images), model, (1, 'epoch'))
    with pytest.warns(UserWarning, match='Report: no convolution of') as caught:
        trainer.run()
    assert len(caught) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['log']


def test_layers_of_chainers_own_class(tmp_path, figures):
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            del self.a
            with self.init_scope():
                self.a = L.DeformableConvolution2D(4, 4, 3, pad=1)

    model = L.Classifier(Mixed())
    trainer = make_trainer(tmp_path, SamplingPointsReport(images), model)
    message = r"SamplingPointsReport: .* own class \('a'\): .*patch_chainer\(\) before"
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.run()
    assert len(caught) == 1
    assert [[title for title, _, _ in panels(f)] for f in figures] == [['b', 'b']] * 2


def test_file_name_and_trigger(tmp_path, figures):
    report = SamplingPointsReport(images, filename='points/{.updater.iteration}.svg')
    trainer = make_trainer(tmp_path, stop=(3, 'iteration'))
    trainer.extend(report, trigger=(1, 'iteration'))
    trainer.run()
    names = sorted(path.name for path in (tmp_path / 'points').iterdir())
    assert names == ['1.svg', '2.svg', '3.svg']
    assert (tmp_path / 'points' / '3.svg').read_bytes() == b'new'


def run_with_snapshots(trainer):
    """All warnings of a training that ends, and what it wrote."""
    trainer.extend(extensions.snapshot(filename='snapshot_{.updater.epoch}'))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer.run()
    assert trainer.updater.epoch == 2
    assert os.path.getsize(os.path.join(trainer.out, 'snapshot_2'))
    names = sorted(os.listdir(trainer.out))
    assert names[-2:] == ['snapshot_1', 'snapshot_2']
    return [str(warning.message) for warning in caught], names[:-2]


def test_old_picture_stays_when_the_new_one_fails(tmp_path, monkeypatch):
    (tmp_path / 'points.png').write_bytes(b'old')
    report = SamplingPointsReport(images, filename='points.png')

    def fails(self, file, **kwargs):
        file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Figure, 'savefig', fails)
    (message,), names = run_with_snapshots(make_trainer(tmp_path, report))
    assert 'make a picture (OSError: [Errno 28] No space left' in message
    assert (tmp_path / 'points.png').read_bytes() == b'old'
    assert names == ['log', 'points.png']


@pytest.mark.parametrize('filename', ['a/points.png', 'b/points.png', 'b/c/points.png'])
def test_place_that_cannot_be_written(tmp_path, figures, filename):
    (tmp_path / 'a' / 'points.png').mkdir(parents=True)
    (tmp_path / 'b').write_bytes(b'no folder')
    report = SamplingPointsReport(images, filename=filename)
    (message,), names = run_with_snapshots(make_trainer(tmp_path, report))
    assert 'SamplingPointsReport could not make a picture' in message
    assert names == ['a', 'b', 'log']
    assert not list((tmp_path / 'a' / 'points.png').iterdir())
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['points.png']


def test_folder_that_may_not_be_written(tmp_path, figures, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied')

    report = SamplingPointsReport(images, filename='points.png')
    trainer = make_trainer(tmp_path, report)
    monkeypatch.setattr(
        'chainer_deform.extensions.sampling_points_report.replacing', denied
    )
    (message,), names = run_with_snapshots(trainer)
    assert 'PermissionError: [Errno 13] Permission denied' in message
    assert names == ['log']


def test_next_picture_is_tried_again(tmp_path, figures):
    folder = tmp_path / '1.svg'
    folder.mkdir()
    report = SamplingPointsReport(images, filename='{.updater.epoch}.svg')
    (message,), names = run_with_snapshots(make_trainer(tmp_path, report))
    assert names == ['1.svg', '2.svg', 'log']
    assert folder.is_dir()
    # The next training warns anew.
    (message,), _ = run_with_snapshots(make_trainer(tmp_path, report))
    assert '1.svg' in message


def test_out_is_the_current_folder(tmp_path, figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer('', SamplingPointsReport(images), stop=(1, 'epoch')).run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['log', 'sampling_points_epoch_1.png']


def test_long_file_name(tmp_path, figures):
    name = 'n' * 251 + '.png'
    report = SamplingPointsReport(images, filename=name)
    make_trainer(tmp_path, report, stop=(1, 'epoch')).run()
    assert (tmp_path / name).read_bytes() == b'new'


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


@pytest.mark.parametrize(
    ('filename', 'problem'),
    [
        ('x{.nosuch}.png', "AttributeError: 'Trainer' object has no .* 'nosuch'"),
        ('{.updater.epoch}_{.updater.iteration}.png', 'IndexError'),
        ('{epoch}.png', "KeyError: 'epoch'"),
        ('{1.updater}.png', 'IndexError'),
        ('{.updater.epoch.png', 'ValueError'),
        ('}.png', 'ValueError'),
    ],
)
def test_placeholders_that_no_trainer_has(filename, problem):
    with pytest.raises(ValueError, match=f'filename must be .*{problem}'):
        SamplingPointsReport(images, filename=filename)


@pytest.mark.parametrize('filename', [None, 3, b'points.png'])
def test_file_name_that_is_no_str(filename):
    with pytest.raises(TypeError, match='filename must be a str, not '):
        SamplingPointsReport(images, filename=filename)


@pytest.mark.parametrize(
    ('filename', 'problem'),
    [
        ('{.updater.nosuch}.png', 'AttributeError'),
        ('{.updater.epoch:s}.png', 'ValueError'),
        ('{.updater.epoch[0]}.png', 'TypeError'),
    ],
)
def test_placeholders_that_this_trainer_lacks(tmp_path, filename, problem):
    trainer = make_trainer(tmp_path, SamplingPointsReport(images, filename=filename))
    with pytest.raises(ValueError, match=f'filename must be .*{problem}'):
        trainer.run()
    assert trainer.updater.iteration == 0


def test_placeholders_of_all_kinds(tmp_path, figures):
    filename = (
        '{0.updater.epoch:03d}_{0.elapsed_time:.0g}_{0.out!r:.0}'
        '_{0.observation[main/accuracy].array:.1f}_{{}}.png'
    )
    report = SamplingPointsReport(images, filename=filename)
    make_trainer(tmp_path, report, stop=(1, 'epoch')).run()
    (name,) = (path.name for path in tmp_path.glob('*.png'))
    assert name.startswith('001_')
    assert name.endswith('_{}.png')


def test_format_that_needs_a_missing_program(monkeypatch):
    """As 'pgf' does, where there is no LaTeX."""

    def fails(self, file, **kwargs):
        raise FileNotFoundError('xelatex not found')

    monkeypatch.setattr(Figure, 'savefig', fails)
    with pytest.raises(ValueError, match=r"here, not with '\.pgf': .* xelatex not"):
        SamplingPointsReport(images, filename='points.pgf')


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.warns(UserWarning, match=r"pip install 'chainer-deform\[plot\]'"):
        report = SamplingPointsReport(images)
    make_trainer(tmp_path, report).run()
    assert [path.name for path in tmp_path.iterdir()] == ['log']


def test_repr_is_short():
    report = SamplingPointsReport(images, [(1, 2)], target=Net(), filename='a.png')
    assert repr(report) == (
        'SamplingPointsReport(images=float32 (2, 1, 12, 16), pixels=[(1, 2)], '
        "target=Net, filename='a.png')"
    )
