"""Chainer works once chainer_deform is imported, on the machine that runs the tests.

Each test is a program in an interpreter of its own, with warnings as errors: what is
tested is what happens before, during and after the first import of Chainer. Anything
that such a program prints to its standard error fails the test.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import numpy
import pytest

_ROOT = pathlib.Path(importlib.util.find_spec('chainer_deform').origin).parents[1]


def run(code, cwd, path=()):
    """Runs a program in cwd; returns what it printed."""
    path = [*map(str, path), str(_ROOT), os.environ.get('PYTHONPATH')]
    path = os.pathsep.join(filter(None, path))
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONPATH': path}
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, ''), result.stderr
    return result.stdout


def test_import_leaves_everything_else_as_found(tmp_path):
    run(
        """
        import sys
        import types
        import numpy
        before = dict(vars(numpy))
        had_sctypes = hasattr(numpy, 'sctypes')

        import chainer_deform
        import chainer

        assert chainer.__version__ == '7.8.1', chainer.__version__
        assert hasattr(numpy, 'sctypes') == had_sctypes
        after = dict(vars(numpy))
        for name, value in before.items():
            assert after.pop(name) is value, name
        # What is new are submodules, each of which Python sets when it is imported.
        for name, value in after.items():
            assert value is sys.modules['numpy.' + name], name

        # Nothing stands in for a module any more, and nothing was imported in vain.
        for name in ('pkg_resources', 'numpy.distutils', 'onnx', 'onnx.mapping',
                     'mpi4py', 'onnx_chainer', 'chainermn', 'chainer.testing'):
            assert name not in sys.modules, name
        """,
        tmp_path,
    )


def test_sctypes_are_taken_back_when_the_import_fails():
    from chainer_deform import _compat

    def fail():
        assert hasattr(numpy, 'sctypes')
        raise ZeroDivisionError

    before = hasattr(numpy, 'sctypes')
    with pytest.raises(ZeroDivisionError):
        _compat._as_strided(types.ModuleType('as_strided'), fail)
    assert hasattr(numpy, 'sctypes') == before


_USE_REPAIRED_FUNCTIONS = """
import warnings
import numpy as np
import chainer.functions as F

# A bilinear resize of a ramp is a ramp, a nearest one repeats pixels.
x = chainer.Variable(np.arange(3, dtype='f') * np.ones((1, 1, 3, 1), 'f'))
y = F.resize_images(x, (3, 5), align_corners=True)
np.testing.assert_allclose(y.array[0, 0, 1], [0, 0.5, 1, 1.5, 2], rtol=1e-6)
y = F.resize_images(x, (3, 6), align_corners=False)
np.testing.assert_allclose(
    y.array[0, 0, 1], [0, 0.25, 0.75, 1.25, 1.75, 2], rtol=1e-6)
y = F.resize_images(x, (3, 6), mode='nearest')
assert y.array[0, 0, 1].tolist() == [0, 0, 1, 1, 2, 2]
assert y.dtype == np.float32
F.sum(y).backward()
np.testing.assert_array_equal(x.grad, np.full((1, 1, 3, 3), 2))

# Windows of two over four elements: the inner ones are in two windows.
for dtype in np.float16, np.float32, np.float64:
    x = chainer.Variable(np.arange(4, dtype=dtype))
    y = F.as_strided(x, (3, 2), (1, 1), 0)
    assert y.array.tolist() == [[0, 1], [1, 2], [2, 3]]
    F.sum(y).backward()
    assert x.grad.tolist() == [1, 2, 2, 1]
    assert x.grad.dtype == dtype

# The rest is tested below; here, that it holds when Chainer was imported before.
x = chainer.Variable(np.array([3, 200], np.uint8))
with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # NumPy 1.24 to 1.26
    assert (x - 1).array.tolist() == [2, 199]
    assert F.pad_sequence([x, x[:1]], padding=-1).array.tolist() == [[3, 200], [3, 255]]
assert (chainer.Variable(np.ones(1)) / np.float16(3)).array == 1 / 3
x = np.full(120000, 0.1, np.float16)
np.testing.assert_allclose(F.mean_squared_error(x, -x).array, 0.04, rtol=1e-2)
assert F.fix(np.array([-2.5], 'f')).array == -2
W = chainer.Variable(np.ones((3, 2, 3, 3), 'f'))
F.sum(F.deconvolution_2d(np.ones((2, 3, 4, 4), 'f'), W)).backward()
np.testing.assert_array_equal(W.grad, np.full(W.shape, 32, 'f'))

# A sum of float16 stands still at 2048 and one of float32 loses digits.
for dtype, tolerance in (np.float16, 1e-12), (np.float32, 1e-12):
    summary = chainer.reporter.DictSummary()
    for _ in range(20000):
        summary.add({'scalar': dtype(0.7), 'array': np.array(0.7, dtype),
                     'variable': chainer.Variable(np.array(0.7, dtype))})
    for mean in summary.compute_mean().values():
        assert abs(mean / float(dtype(0.7)) - 1) < tolerance, mean
"""


def test_forward_backward_resize_as_strided_summary(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        """
        + textwrap.indent(_USE_REPAIRED_FUNCTIONS, ' ' * 8)
        + """
        import chainer.links as L
        np.random.seed(0)
        model = chainer.Sequential(
            L.Convolution2D(2, 3, 3, pad=1, nobias=True), L.BatchNormalization(3),
            F.relu, lambda h: F.max_pooling_2d(h, 2), L.Linear(None, 4))
        x = chainer.Variable(np.random.randn(5, 2, 6, 6).astype('f'))
        loss = F.softmax_cross_entropy(model(x), np.arange(5, dtype='i') % 4)
        model.cleargrads()
        loss.backward()
        assert loss.dtype == x.grad.dtype == np.float32
        for array in [x.grad, *(param.grad for param in model.params())]:
            assert np.isfinite(array).all() and np.abs(array).max() > 0
        """,
        tmp_path,
    )


def test_chainer_imported_before(tmp_path):
    """By those who had worked around it themselves, or on a NumPy that needs little."""
    run(
        """
        import sys
        import types
        import numpy
        sys.modules['chainer._environment_check'] = types.SimpleNamespace(check=list)
        missing = not hasattr(numpy, 'sctypes')
        if missing:
            numpy.sctypes = {'int': [numpy.int16, numpy.int32, numpy.int64]}
        import chainer
        if missing:
            del numpy.sctypes
        variable = chainer.Variable

        import chainer_deform

        assert chainer is sys.modules['chainer']
        assert chainer.Variable is variable
        """
        + textwrap.indent(_USE_REPAIRED_FUNCTIONS, ' ' * 8),
        tmp_path,
    )


def test_failed_import_of_chainer_before(tmp_path):
    """What it leaves in sys.modules is cleared away: nothing of it is used again."""
    run(
        """
        import sys
        try:
            import chainer
        except Exception:  # of another type on each NumPy
            pass
        else:
            raise AssertionError('Chainer needs no repair?')
        remains = {name: module for name, module in sys.modules.items()
                   if name.startswith('chainer.')}
        assert 'chainer.backend' in remains

        import chainer_deform
        import chainer

        for name, module in remains.items():
            assert sys.modules[name] is not module, name
        """
        + textwrap.indent(_USE_REPAIRED_FUNCTIONS, ' ' * 8),
        tmp_path,
    )


def test_message_when_chainer_is_being_imported(tmp_path):
    run(
        """
        import importlib.machinery
        import sys
        import types
        chainer = types.ModuleType('chainer')
        chainer.__spec__ = importlib.machinery.ModuleSpec('chainer', None)
        chainer.__spec__._initializing = True
        sys.modules['chainer'] = chainer
        try:
            import chainer_deform
        except ImportError as e:
            message = str(e)
        assert 'put `import chainer_deform` before' in message
        """,
        tmp_path,
    )


def test_message_when_chainer_is_not_installed(tmp_path):
    run(
        """
        import sys
        sys.modules['chainer'] = None
        try:
            import chainer_deform
        except ImportError as e:
            assert e.name == 'chainer'
            message = str(e)
        for word in ('pip install chainer==7.8.1', 'setuptools<81', 'PIP_CONSTRAINT=',
                     'PIP_BUILD_CONSTRAINT='):
            assert word in message, word
        """,
        tmp_path,
    )


def test_summaries(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import numpy as np
        from chainer import serializers
        from chainer.training import extensions

        summary = chainer.Summary()
        for value in np.int8(100), np.float16(0.1):
            summary.add(value, weight=np.int8(100))
        mean, std = summary.make_statistics()
        low = float(np.float16(0.1))
        np.testing.assert_allclose(mean, (100 + low) / 2, rtol=1e-12)
        np.testing.assert_allclose(std, (100 - low) / 2, rtol=1e-12)

        summary = chainer.Summary()
        for _ in range(5000):
            summary.add(3.0, weight=np.float16(1))
        assert summary.compute_mean() == 3

        # The sums survive a snapshot; a count stays an integer, as Chainer demands.
        summary = chainer.Summary()
        summary.add(np.float32(0.1), weight=np.int32(3))
        serializers.save_npz('summary.npz', summary)
        other = chainer.Summary()
        serializers.load_npz('summary.npz', other)
        for target in summary, other:
            target.add(np.float32(0.7), weight=np.int32(1))
        assert summary.make_statistics() == other.make_statistics()
        np.testing.assert_allclose(other.compute_mean(), 0.25, rtol=1e-7)

        # Values of other kinds are summed as before.
        summary = chainer.Summary()
        for value in 1, 2.5, True, np.int64(2), np.longdouble(3.5):
            summary.add(value)
        assert summary.compute_mean() == 2

        average = extensions.MicroAverage('n', 'd', 'n/d', trigger=lambda trainer: last)
        trainer = type('Trainer', (), {})()
        observation = {}
        with chainer.Reporter().scope(observation):
            for i in range(5000):
                last = i == 4999
                trainer.observation = {'n': np.float16(1), 'd': 2}
                average(trainer)
        assert observation == {'n/d': 0.5}, observation
        """,
        tmp_path,
    )


def test_categorical_and_padding(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import numpy as np
        p = np.array([[[0.25, 0.75]], [[0.5, 0.5]], [[0.1, 0.9]]], 'f')
        x = np.array([[1], [0], [0]], 'i')
        for x in x, chainer.Variable(x):
            y = chainer.distributions.Categorical(p=p).log_prob(x)
            np.testing.assert_allclose(
                y.array, np.log([[0.75], [0.5], [0.1]]), rtol=1e-6)

        batch = [np.ones((2, 1), 'f'), np.ones((1, 3), 'f')]
        y = chainer.dataset.concat_examples(batch, padding=7)
        assert y.tolist() == [[[1, 7, 7], [1, 7, 7]], [[1, 1, 1], [7, 7, 7]]]
        """,
        tmp_path,
    )


def test_optimizers(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np
        classes = [
            cls for cls in vars(chainer.optimizers).values()
            if isinstance(cls, type) and issubclass(cls, chainer.GradientMethod)]
        assert len(classes) >= 15, classes
        for cls in classes:
            link = chainer.Link()
            with link.init_scope():
                link.x = chainer.Parameter(np.array([3, -2], 'f'))
                link.y = chainer.Parameter(np.array(1.5, 'f'))  # without dimensions
            optimizer = cls().setup(link)
            for hook in (chainer.optimizer_hooks.GradientClipping(10),
                         chainer.optimizer_hooks.WeightDecay(1e-3)):
                optimizer.add_hook(hook)
            losses = []

            def loss():
                y = F.sum(F.square(link.x)) + F.square(link.y)
                losses.append(float(y.array))
                return y

            for _ in range(20):
                optimizer.update(loss)
            assert losses[-1] < losses[0], (cls, losses)
            assert link.x.dtype == link.y.dtype == np.float32, cls
        """,
        tmp_path,
    )


def test_serializers(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        from chainer import serializers

        def build(seed):
            np.random.seed(seed)
            model = chainer.Sequential(
                L.Convolution2D(2, 3, 3), L.BatchNormalization(3), L.Linear(None, 4))
            optimizer = chainer.optimizers.Adam().setup(model)
            for _ in range(3):
                x = np.random.randn(5, 2, 6, 6).astype('f')
                optimizer.update(lambda: F.sum(F.square(model(x))))
            return optimizer

        def state(optimizer):
            writer = serializers.DictionarySerializer()
            writer.save(optimizer)
            writer['model'].save(optimizer.target)
            return writer.target

        for save, load in ((serializers.save_npz, serializers.load_npz),
                           (serializers.save_hdf5, serializers.load_hdf5)):
            old, new = build(0), build(1)
            save('model', old.target)
            save('optimizer', old)
            load('model', new.target)
            load('optimizer', new)
            expected, actual = state(old), state(new)
            assert expected.keys() == actual.keys() and len(expected) > 20
            for name, value in expected.items():
                np.testing.assert_array_equal(actual[name], value, name)
                assert np.asarray(actual[name]).dtype == np.asarray(value).dtype, name
        """,
        tmp_path,
    )


def test_trainer_with_its_extensions(tmp_path):
    printed = run(
        """
        import io
        import json
        import pathlib
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import matplotlib.pyplot
        import chainer_deform
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        from chainer.training import extensions

        class Classifier(L.Classifier):
            def forward(self, x, t):
                loss = super().forward(x, t)
                correct = (self.y.array.argmax(axis=1) == t).sum()
                chainer.report({'correct': correct, 'total': len(t)}, self)
                return loss

        rng = np.random.RandomState(0)
        x = rng.randn(60, 2).astype('f')
        train = chainer.datasets.TupleDataset(x, (x[:, 0] > x[:, 1]).astype('i'))

        def trainer(epochs, out):
            np.random.seed(0)
            model = Classifier(chainer.Sequential(
                L.Linear(2, 8), L.BatchNormalization(8), F.relu, L.Linear(8, 2)))
            optimizer = chainer.optimizers.MomentumSGD(0.1).setup(model)
            # Without shuffling, so that a resumed run sees the same batches.
            updater = chainer.training.StandardUpdater(
                chainer.iterators.SerialIterator(train, 20, shuffle=False), optimizer)
            trainer = chainer.training.Trainer(updater, (epochs, 'epoch'), out=out)
            printed = io.StringIO()
            for extension in (
                    extensions.Evaluator(chainer.iterators.SerialIterator(
                        train, 25, repeat=False, shuffle=False), model),
                    extensions.MicroAverage('main/correct', 'main/total', 'micro'),
                    extensions.observe_lr(),
                    extensions.FailOnNonNumber(),
                    extensions.ParameterStatistics(model, trigger=(1, 'iteration')),
                    extensions.LogReport(),
                    extensions.PrintReport(['epoch', 'main/loss', 'lr'], out=printed),
                    extensions.ProgressBar(update_interval=1),
                    extensions.PlotReport(['main/loss'], 'epoch', filename='loss.png'),
                    extensions.VariableStatisticsPlot(model, trigger=(2, 'epoch')),
                    extensions.DumpGraph('main/loss'),
                    extensions.snapshot_object(model, 'model_{.updater.epoch}'),
                    extensions.snapshot(filename='snapshot_{.updater.epoch}')):
                trainer.extend(extension)
            trainer.extend(extensions.ExponentialShift('lr', 0.9), trigger=(1, 'epoch'))
            return trainer, model, printed

        whole, model, printed = trainer(6, 'whole')
        whole.run()
        log = json.loads(pathlib.Path('whole/log').read_text())
        assert [entry['epoch'] for entry in log] == [1, 2, 3, 4, 5, 6]
        assert log[-1]['main/loss'] < log[0]['main/loss'] / 2, log
        assert log[-1]['validation/main/accuracy'] > 0.9
        np.testing.assert_allclose(log[-1]['lr'], 0.1 * 0.9 ** 5, rtol=1e-12)
        for entry in log:
            np.testing.assert_allclose(
                entry['micro'], entry['main/correct'] / 20, rtol=1e-12)
        assert any(key.endswith('/W/grad/mean') for key in log[0]), log[0]
        assert printed.getvalue().split()[:3] == ['epoch', 'main/loss', 'lr']
        for name in 'loss.png', 'cg.dot', 'statistics.png', 'model_6', 'snapshot_3':
            assert (pathlib.Path('whole') / name).stat().st_size > 0, name

        resumed, other, _ = trainer(6, 'resumed')
        chainer.serializers.load_npz('whole/snapshot_3', resumed)
        assert resumed.updater.epoch == 3
        resumed.run()
        for (name, a), (_, b) in zip(model.namedparams(), other.namedparams()):
            np.testing.assert_array_equal(a.array, b.array, name)
        for a, b in zip(log, json.loads(pathlib.Path('resumed/log').read_text())):
            for entry in a, b:
                del entry['elapsed_time']
                del entry['micro']  # MicroAverage does not save its trigger
            assert a == b
        """,
        tmp_path,
    )
    assert '18 iter, 6 epoch / 6 epochs' in printed, printed  # the progress bar


def test_variables_with_scalars(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np
        import warnings
        from chainer import Variable

        # Integers wrap around, as those of arrays do. NumPy 1.24 to 1.26 warns of it.
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            for dtype in np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16:
                x = np.array([3, 100], dtype)
                for n in 1, -1, 100, -200, 2 ** 31 - 1, 1e6:
                    c = np.int64(n).astype(dtype)
                    for actual, expected in (
                            (Variable(x) + n, x + c), (n + Variable(x), c + x),
                            (Variable(x) - n, x - c), (n - Variable(x), c - x),
                            (Variable(x) * n, x * c), (n * Variable(x), c * x)):
                        assert actual.dtype == dtype
                        np.testing.assert_array_equal(actual.array, expected)
                assert (Variable(x) - 1).array.tolist() == [2, 99]

        # A scalar of a coarser type is taken for the number that it is.
        for dtype in np.float32, np.float64:
            x = np.array([0.5, 3], dtype)
            tolerance = 4 * np.finfo(dtype).eps
            for scalar in (np.float16(0.3), np.float32(0.3), np.float64(0.3),
                           np.int8(3), np.uint8(3), np.uint64(0), np.float16(0.1)):
                number = float(scalar)
                with np.errstate(divide='ignore'):
                    y = (Variable(x) / scalar).array
                    expected = x.astype('d') / np.float64(number)
                assert y.dtype == dtype
                np.testing.assert_allclose(y, expected, rtol=tolerance)
                v = Variable(x)
                F.sum(v ** scalar).backward()
                np.testing.assert_allclose(
                    v.grad, number * x.astype('d') ** (number - 1), rtol=tolerance)
        """,
        tmp_path,
    )


def test_padding_of_unsigned_arrays(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np
        import warnings
        from chainer.dataset import convert
        warnings.simplefilter('ignore', DeprecationWarning)  # NumPy 1.24 to 1.26

        for dtype, padded in (np.uint8, 255), (np.uint32, 2 ** 32 - 1), (np.int8, -1):
            a, b = np.arange(2, dtype=dtype), np.arange(3, dtype=dtype)
            expected = [[0, 1, padded], [0, 1, 2]]
            for padding in -1, -1.0:
                y = F.pad_sequence([a, b], padding=padding)
                assert y.dtype == dtype
                assert y.array.tolist() == expected
            y = chainer.dataset.concat_examples([a, b], padding=-1)
            assert y.dtype == dtype
            assert y.tolist() == expected
            for converter in (convert.concat_examples,
                              convert.ConcatWithAsyncTransfer()):
                y = converter([{'a': a}, {'a': b}], padding=-1)['a']
                assert y.tolist() == expected
                y, z = converter([(a, 1), (b, 2)], padding=(-1, None))
                assert y.tolist() == expected

        a, b = np.arange(2, dtype='f'), np.arange(3, dtype='f')
        for padding in -1, np.inf, 0.5:
            for y in (F.pad_sequence([a, b], padding=padding).array,
                      chainer.dataset.concat_examples([a, b], padding=padding)):
                assert y.tolist() == [[0, 1, padding], [0, 1, 2]]
        """,
        tmp_path,
    )


def test_sparse_products_of_float16(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np

        rng = np.random.RandomState(0)
        for shape in (3, 4), (2, 3, 4):
            a = (rng.randint(0, 3, shape) * rng.randint(0, 2, shape)).astype('e')
            for dtype in 'ef':
                b = rng.randint(-3, 4, (*shape[:-2], 4, 2)).astype(dtype)
                gy = rng.randint(-3, 4, (*shape[:-2], 3, 2)).astype(dtype)
                sparse = chainer.utils.to_coo(a, requires_grad=True)
                x = chainer.Variable(b)
                y = F.sparse_matmul(sparse, x)
                assert y.dtype == dtype
                np.testing.assert_array_equal(y.array, a @ b)
                y.grad = gy
                y.backward()
                np.testing.assert_array_equal(x.grad, a.swapaxes(-1, -2) @ gy)
                assert x.grad.dtype == dtype
                assert sparse.data.grad.dtype == np.float16
                assert np.abs(sparse.data.grad).max() > 0
        """,
        tmp_path,
    )


def test_large_batches_of_float16(tmp_path):
    """More values than the largest float16, 65,504; compared with float32."""
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np

        rng = np.random.RandomState(0)
        n = 70000
        xs = [rng.uniform(-0.05, 0.05, (n, 2)) + a for a in (0, 0.1, -0.1)]
        ts = [rng.randint(0, 2, n).astype(dtype) for dtype in (np.int8, np.int32)]

        def compare(name, function, *xs, gy=1):
            results = {}
            for dtype in np.float16, np.float32:
                inputs = [chainer.Variable(x.astype('e').astype(dtype)) for x in xs]
                y = function(*inputs)
                y.grad = np.full(y.shape, gy, dtype)
                y.backward()
                results[dtype] = [y.array, *(x.grad for x in inputs)]
                assert all(array.dtype == dtype for array in results[dtype]), name
            for a, b in zip(*results.values()):
                # Gradients reach down to the denormal numbers of float16.
                np.testing.assert_allclose(a, b, rtol=0.02, atol=3e-7, err_msg=name)
                assert np.abs(a).max() > 0, name

        gy = n / 2
        compare('mean_squared_error', F.mean_squared_error, *xs[:2], gy=gy)
        compare('mean_absolute_error', F.mean_absolute_error, *xs[:2], gy=gy)
        compare('triplet', F.triplet, *xs, gy=gy)
        compare('average', F.average, xs[0], gy=gy)
        for t in ts:
            compare('contrastive', lambda a, b: F.contrastive(a, b, t), *xs[:2], gy=gy)
            x = np.where(t[:, None] == [0, 1], 0.9, -0.9) + xs[0]  # the sum fits
            for norm in 'L1', 'L2':
                compare('hinge', lambda x: F.hinge(x, t, norm), x, gy=gy)
            for normalize in False, True:
                compare(
                    'sigmoid_cross_entropy',
                    lambda x: F.sigmoid_cross_entropy(x[:, 0], t, normalize),
                    xs[0], gy=gy)
                compare(
                    'softmax_cross_entropy',
                    lambda x: F.softmax_cross_entropy(x, t, normalize), xs[0], gy=gy)
        n = 277309  # float16 holds its inverse to one percent
        x = chainer.Variable(np.zeros((n, 2), 'e'))
        y = F.softmax_cross_entropy(x, np.zeros(n, 'i'), normalize=False)
        y.grad = np.array(30000, 'e')
        y.backward()
        np.testing.assert_allclose(x.grad[0], [-15000 / n, 15000 / n], rtol=1e-3)
        n = 70000
        label = np.ones((n, 1), 'i')
        compare(
            'ctc',
            lambda x: F.connectionist_temporal_classification(list(x), label, 0),
            np.stack(xs[:2]), gy=gy)
        x = rng.uniform(-1, 1, (n, 2)).astype('e')
        z, x[:, 1] = x[:, ::-1].copy(), x[:, 0] / 2 + x[:, 1] / 4
        compare('decov', F.decov, x, gy=1)
        compare('decov', lambda x: F.decov(x, reduce='no'), x, gy=1)
        for reduce in 'no', 'half_squared_sum':
            compare(
                'cross_covariance',
                lambda x, z: F.cross_covariance(x, z, reduce), x, z, gy=1)

        x = rng.uniform(0, 1, (1, 2, 260, 256)).astype('e')
        for pool in F.average_pooling_2d, F.average_pooling_nd:
            compare(pool.__name__, lambda x: pool(x, (260, 256)), x, gy=gy)
        """,
        tmp_path,
    )


def test_options_as_numpy_scalars(tmp_path):
    """They change no dtype, and differ from Python's by no bit."""
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np

        rng = np.random.RandomState(0)
        x = rng.uniform(-1, 1, (6, 4)).astype('f')
        gamma, beta, mean, var = rng.uniform(0.5, 1, (4, 4)).astype('f')

        def results(f, float):
            variables = [chainer.Variable(a) for a in (x, gamma, beta)]
            y = f(*variables, float)
            gradients = chainer.grad([y], variables, enable_double_backprop=True)
            return [v.array for v in (y, *gradients) if v is not None]

        for f in (
            lambda x, g, b, f: F.layer_normalization(x, g, b, eps=f(0.01)),
            lambda x, g, b, f: F.fixed_batch_normalization(
                x, g, b, mean, var, eps=f(0.01)),
            lambda x, g, b, f: F.local_response_normalization(
                x, 3, f(1.5), f(0.1), f(0.5)),
        ):
            for a, b in zip(results(f, float), results(f, np.float64)):
                assert a.dtype == b.dtype == np.float32
                np.testing.assert_array_equal(a, b)
        y = F.batch_renormalization(
            chainer.Variable(x), gamma, beta, rmax=np.float64(1.5),
            dmax=np.float64(0.5), running_mean=mean, running_var=var)
        F.sum(y).backward()
        """,
        tmp_path,
    )


def test_unsigned_scalars_are_subtracted(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import numpy as np

        for dtype in 'efdiq':
            x = chainer.Variable(np.array([5, 6], dtype))
            for scalar in np.uint8(3), np.uint16(3), np.uint32(3), np.uint64(3):
                assert (x - scalar).array.tolist() == [2, 3]
            assert (x - np.bool_(True)).array.tolist() == [4, 5]
        x = chainer.Variable(np.array([5, 6], 'uint8'))
        assert (x - np.uint8(3)).array.tolist() == [2, 3]
        assert (x - np.uint8(6)).array.tolist() == [255, 0]
        """,
        tmp_path,
    )


def test_scalars_of_float16(tmp_path):
    """Norms, a loss scale and regions of interest."""
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        from chainer import optimizer_hooks

        # Each squared norm is a float16, their sum is not.
        link = chainer.Sequential(*(L.Linear(4, 4, nobias=True) for _ in range(9)))
        for param in link.params():
            param.array = np.ones((4, 4), 'e')
            param.grad = np.full((4, 4), 30, 'e')
        optimizer = chainer.optimizers.SGD().setup(link)
        optimizer_hooks.GradientClipping(3)(optimizer)
        for param in link.params():
            np.testing.assert_allclose(param.grad, 0.25, rtol=1e-3)
            assert param.grad.dtype == np.float16

        # 1e-9, which float16 does not hold, keeps 0 from being divided by 0.
        param.grad = np.zeros((4, 4), 'e')
        optimizer_hooks.GradientLARS()(param.update_rule, param)
        assert param.grad.tolist() == np.zeros((4, 4)).tolist()

        # A loss scale that float16 does not hold.
        param.grad = np.full((4, 4), 32768, 'e')
        param._loss_scale = 65536.0
        param.update_rule.update(param)
        np.testing.assert_allclose(param.array, 1 - 0.01 / 2, rtol=1e-3)

        # 0.7 * 1001 and the bins between are no float16.
        x = np.arange(1600, dtype='e').reshape(1, 1, 1, 1600) / 2
        for scale in 0.7, 0.3:
            rois = np.array([[0, 301, 0, 2001, 0], [0, 999, 0, 1001, 0]], 'e')
            for dtype in 'ed':
                y = F.roi_pooling_2d(x.astype(dtype), rois.astype(dtype), 1, 7, scale)
                z = F.roi_max_pooling_2d(
                    x.astype(dtype), rois[:, [2, 1, 4, 3]].astype(dtype),
                    np.zeros(2, 'i'), (1, 7), scale)
                assert y.dtype == z.dtype == dtype
                if dtype == 'e':
                    half = y.array, z.array
            np.testing.assert_array_equal(half[0], y.array)
            np.testing.assert_array_equal(half[1], z.array)
        for function in F.roi_max_align_2d, F.roi_average_align_2d:
            x = chainer.Variable(np.ones((1, 2, 5, 6), 'f'))
            y = function(x, np.array([[0, 1, 3, 4]], 'f'), np.zeros(1, 'i'), 2, 0.7, 1)
            F.sum(y).backward()
            assert y.dtype == x.grad.dtype == np.float32
            np.testing.assert_allclose(y.array, 1, rtol=1e-6)
            np.testing.assert_allclose(x.grad.sum(), 8, rtol=1e-6)
        """,
        tmp_path,
    )


def test_functions_without_source_are_left_with_a_warning():
    from chainer_deform import _compat

    module = types.ModuleType('module')
    exec('class C:\n    def f(self, x):\n        return x / 2', vars(module))
    before = module.C.f
    if not _compat._NUMPY_2:
        _compat._like_numpy_1('C.f')(module, lambda: None)
    else:
        with pytest.warns(RuntimeWarning, match='module cannot be repaired without'):
            _compat._like_numpy_1('C.f')(module, lambda: None)
    assert module.C.f is before


def test_micro_average_of_arrays(tmp_path):
    run(
        """
        import chainer_deform
        import chainer
        import numpy as np
        import types
        from chainer.training import extensions
        for make in (
                float, np.float32, np.float16, np.int8,
                lambda x: np.array(x, 'f'), lambda x: np.array([x], 'e'),
                lambda x: np.array([[x]], 'i')):
            average = extensions.MicroAverage(
                'n', 'd', 'r', trigger=lambda trainer: last)
            for total in make(4), 4, np.array(4), np.array([4]):
                for last in False, True:
                    observation = {}
                    trainer = types.SimpleNamespace(
                        observation={'n': make(3), 'd': total})
                    with chainer.reporter.Reporter().scope(observation):
                        average(trainer)
                assert observation == {'r': 0.75}
                assert isinstance(observation['r'], float)
        chainer.serializers.save_npz('average', average)
        chainer.serializers.load_npz('average', average)
        """,
        tmp_path,
    )


def test_hdf5_strings_and_errors(tmp_path):
    pytest.importorskip('h5py')
    run(
        """
        import chainer_deform
        import chainer
        import contextlib
        import h5py
        import io
        import numpy as np
        from chainer import serializers
        with h5py.File('strings', 'w') as f:
            f['one'] = 'gr\\u00fcn'
            f['two'] = ['a', 'bc']
            f['bytes'] = np.bytes_(b'abc')
            f['number'] = 3.5
        with h5py.File('strings', 'r') as f:
            read = serializers.HDF5Deserializer(f)
            assert read('one', '') == 'gr\\u00fcn'
            assert read('one', None) == 'gr\\u00fcn'
            assert read('two', None).tolist() == ['a', 'bc']
            assert read('bytes', b'') == b'abc'
            assert read('number', 0.0) == 3.5
            assert read('number', np.zeros((), 'f')) == 3.5

        # What it cannot write is an error that says so.
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                serializers.save_hdf5('error', {'object': np.array(object())})
            except TypeError as e:
                message = str(e)
        assert "'O'" in message or 'Object' in message, message
        assert 'unable to save in HDF5 format' in printed.getvalue()
        """,
        tmp_path,
    )


def test_functions_that_numpy_deprecates(tmp_path):
    """numpy.fix and assigning to an array's shape, and what its ``device`` confuses."""
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        del np.fix
        x = np.array([-1.5, -0.5, 0, 2.5, np.nan, np.inf])
        for dtype in 'efd':
            y = F.fix(x.astype(dtype))
            assert y.dtype == dtype
            np.testing.assert_array_equal(y.array, [-1, 0, 0, 2, np.nan, np.inf])
        assert F.fix(chainer.Variable(np.array([-3, 4]))).array.tolist() == [-3, 4]

        shapes = []

        def fill(array):
            assert array.base is not None  # a view, so that no shape was assigned
            shapes.append(array.shape)
            array[...] = np.arange(array.size).reshape(array.shape)

        link = L.Maxout(3, 4, 2, initialW=fill, initial_bias=fill)
        assert shapes == [(4, 2, 3), (4, 2)]
        assert link.linear.W.array.tolist() == np.arange(24).reshape(8, 3).tolist()
        assert link.linear.b.array.tolist() == np.arange(8).tolist()
        assert link(np.ones((2, 3), 'f')).shape == (2, 4)
        link = L.Maxout(3, 4, 2, initialW=np.ones((4, 2, 3), 'f'), initial_bias=None)
        assert link.linear.W.array.tolist() == np.ones((8, 3)).tolist()
        L.Maxout(3, 4, 2, initialW=chainer.initializers.Zero(), initial_bias=1)

        x = chainer.Variable(np.ones(2, 'f'))
        assert '- device: CPU' in x.debug_print()
        assert '- device: None' in chainer.Variable().debug_print()
        """,
        tmp_path,
    )


def test_gradient_penalty_through_convolutions(tmp_path):
    """Of W where x needs no gradient: an error that Chainer repaired after 7.8.1."""
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import numpy as np
        rng = np.random.RandomState(0)
        for options in {}, {'stride': 2}, {'pad': 1, 'dilate': 2}, {'groups': 2}:
            groups = options.get('groups', 1)
            x = rng.randn(2, 4, 7, 6)
            W = chainer.Variable(rng.randn(4, 4 // groups, 3, 3))
            direction = rng.randn(*W.shape)

            def penalty():
                v = chainer.Variable(x)
                y = F.sum(F.convolution_2d(v, W, **options) ** 2)
                gx, = chainer.grad([y], [v], enable_double_backprop=True)
                return F.sum(gx ** 2)

            W.cleargrad()
            penalty().backward()
            rate = float((W.grad * direction).sum())
            values = []
            W0 = W.array.copy()
            for step in 1e-5, -1e-5:
                W.array[...] = W0 + step * direction
                values.append(float(penalty().array))
            W.array[...] = W0
            np.testing.assert_allclose(
                (values[0] - values[1]) / 2e-5, rate, rtol=1e-6)

        # x needs no gradient; the shapes of W would fool a check of its length.
        for function, x, W in (
                (F.deconvolution_2d, rng.randn(2, 4, 5, 5), rng.randn(4, 4, 3, 3)),
                (F.deconvolution_2d, rng.randn(2, 3, 5, 5), rng.randn(3, 2, 3, 3)),
                (F.deconvolution_nd, rng.randn(2, 3, 5), rng.randn(3, 2, 3)),
                (F.convolution_nd, rng.randn(2, 3, 5), rng.randn(2, 3, 3)),
                (F.convolution_2d, rng.randn(2, 3, 5, 5), rng.randn(2, 3, 3, 3))):
            gradients = []
            for x in x, chainer.Variable(x):
                v = chainer.Variable(W)
                F.sum(function(x, v, stride=2) ** 2).backward()
                gradients.append(v.grad)
            np.testing.assert_array_equal(*gradients)
        """,
        tmp_path,
    )


def test_caffe(tmp_path):
    pytest.importorskip('google.protobuf')
    run(
        """
        import chainer_deform
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        from chainer.exporters import caffe
        from chainer.links.caffe import CaffeFunction
        np.random.seed(0)
        link = chainer.Sequential(
            L.Convolution2D(3, 4, 3, pad=1), L.BatchNormalization(4), F.relu,
            lambda h: F.max_pooling_2d(h, 2), L.Linear(48, 5), F.softmax)
        x = chainer.Variable(np.random.randn(2, 3, 8, 6).astype('f'))
        with chainer.using_config('train', False):
            caffe.export(link, [x], '.', graph_name='net')
            function = CaffeFunction('chainer_model.caffemodel')
            y, = function(inputs={'data': x}, outputs=[function.layers[-1][2][0]])
            np.testing.assert_array_equal(y.array, link(x).array)

        from chainer.links.caffe.protobuf3 import caffe_pb2
        layer = caffe_pb2.LayerParameter(name='a', phase=caffe_pb2.TEST)
        layer.blobs.add().data.extend([1, 2])
        layer.pooling_param.pool = caffe_pb2.PoolingParameter.MAX
        copy = caffe_pb2.LayerParameter.FromString(layer.SerializeToString())
        assert copy == layer
        assert copy.pooling_param.pool == caffe_pb2.PoolingParameter.MAX
        """,
        tmp_path,
    )


def test_caffe_without_protobuf(tmp_path):
    run(
        """
        import sys
        sys.modules['google'] = None
        import chainer_deform
        for _ in range(2):
            try:
                import chainer.links.caffe
            except ImportError as e:
                message = str(e)
            assert 'google.protobuf' in message
        """,
        tmp_path,
    )


def test_failed_imports_keep_nothing_alive(tmp_path):
    run(
        """
        import gc
        import importlib
        import sys
        import weakref
        for name in 'cupy', 'ideep4py', 'mock', 'PIL', 'scipy.special', 'scipy.io':
            sys.modules[name] = None

        class Local:
            pass

        def program():
            local = Local()
            import chainer_deform
            for name, repair in chainer_deform._compat._REPAIRS.items():
                if name.split('.')[0] == 'chainer' and 'caffe' not in name:
                    importlib.import_module(name)
            return weakref.ref(local)

        local = program()
        gc.collect()
        assert local() is None
        kept = [error for name, module in list(sys.modules.items())
                if name.split('.')[0] in ('chainer', 'chainermn', 'chainerx')
                for error in vars(module).values() if isinstance(error, BaseException)]
        assert len(kept) >= 8, kept
        for error in kept:
            assert error.__traceback__ is None
            assert str(error)
        """,
        tmp_path,
    )


def test_multiprocess_iterator(tmp_path):
    """Also without a main script that would repair the worker processes."""
    run(
        """
        import multiprocessing
        import chainer_deform
        import chainer
        import numpy as np
        data = chainer.datasets.TupleDataset(np.arange(6), np.arange(6, dtype='f') ** 2)
        for method in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(method, force=True)
            iterator = chainer.iterators.MultiprocessIterator(
                data, 4, repeat=False, shuffle=False, n_processes=1)
            batches = [[tuple(map(float, example)) for example in batch]
                       for batch in iterator]
            iterator.finalize()
            assert batches == [
                [(0, 0), (1, 1), (2, 4), (3, 9)], [(4, 16), (5, 25)]], (method, batches)
        """,
        tmp_path,
    )


@pytest.mark.parametrize('installed', [False, True])
def test_chainer_testing(tmp_path, installed):
    """Without pkg_resources, and with one that warns as setuptools 67 to 81 do."""
    (tmp_path / 'pkg_resources.py').write_text(
        textwrap.dedent(f"""
        import warnings
        if not {installed}:
            raise ModuleNotFoundError('gone')
        warnings.warn('pkg_resources is deprecated as an API.')

        class ResolutionError(Exception):
            pass

        class WorkingSet:
            def require(self, requirement):
                if requirement in ('numpy>=99', 'no-such-package'):
                    raise ResolutionError
        """)
    )
    run(
        f"""
        installed = {installed}
        import sys
        import chainer_deform
        import numpy as np
        from chainer import gradient_check, testing
        from chainer.functions import tanh
        from chainer.testing import doctest_helper

        assert ('pkg_resources' in sys.modules) == installed
        x = np.random.RandomState(0).randn(3, 4)
        gradient_check.check_backward(tanh, x, np.ones_like(x))

        def skips(decorator):
            return hasattr(decorator(lambda: None), '__unittest_skip__')

        for requirement, fulfilled in (
                ('numpy>=1.10', True), ('numpy>=99', False),
                ('no-such-package', False)):
            assert skips(testing.with_requires(requirement)) != fulfilled
            assert skips(testing.without_requires(requirement)) == fulfilled
            assert doctest_helper.skipif_requires_satisfied(requirement) == fulfilled
        """,
        tmp_path,
        path=[tmp_path],
    )


def test_chainermn(tmp_path):
    """With a mpi4py of which nothing works but its import."""
    (tmp_path / 'mpi4py').mkdir()
    (tmp_path / 'mpi4py/__init__.py').touch()
    (tmp_path / 'mpi4py/MPI.py').write_text(
        textwrap.dedent("""
        import collections
        _typedict = collections.defaultdict(str)

        def __getattr__(name):
            if name.startswith('__'):
                raise AttributeError(name)
        """)
    )
    run(
        """
        import chainer_deform
        import numpy as np
        import chainermn
        from chainermn.iterators import multi_node_iterator

        class Communicator:
            rank = 1
            messages = [np.array([20], 'f'), np.array([-1], 'f')]

            def bcast(self, message, root):
                return self.messages.pop(0)

        slave = multi_node_iterator._MultiNodeIteratorSlave(Communicator(), 0)
        assert slave.dataset_size == 20
        assert type(slave.dataset_size) is int

        # Gradients that travel as float16 arrive in parameters of float32.
        import chainer
        from chainermn.communicators import _memory_utility

        class Buffer:
            def to_device(self, array, size, offset, stream):
                assert (array.dtype, size, offset) == (np.float16, 6, 0)
                array[...] = [1, 2, 3]

        param = chainer.Parameter(np.zeros(3, 'f'))
        _memory_utility.unpack_params([param], 'data', Buffer(), np.float16, False)
        assert param.array.tolist() == [1, 2, 3]
        assert param.dtype == np.float32
        """,
        tmp_path,
        path=[tmp_path],
    )


@pytest.mark.parametrize('has_mapping', [False, True])
def test_onnx_chainer(tmp_path, has_mapping):
    """With the outline of an onnx, with and without the module that newer ones lack."""
    package = tmp_path / 'onnx'
    package.mkdir()
    for name in 'checker', 'numpy_helper', 'shape_inference', 'helper':
        (package / f'{name}.py').touch()
    (package / '__init__.py').write_text('__version__ = "1.23.0"')
    (package / 'helper.py').write_text('np_dtype_to_tensor_dtype = "type of {}".format')
    (package / 'numpy_helper.py').write_text(
        textwrap.dedent("""
        import types
        def from_array(array, name):
            return types.SimpleNamespace(data_type=1, array=array, name=name)
        """)
    )
    if has_mapping:
        (package / 'mapping.py').write_text(
            'NP_TYPE_TO_TENSOR_TYPE = {}; STORAGE_TENSOR_TYPE_TO_FIELD = {}'
        )
    run(
        f"""
        has_mapping = {has_mapping}
        import sys
        import chainer_deform
        import numpy as np
        import onnx_chainer
        assert sys.modules['onnx_chainer.export']._available
        assert ('onnx.mapping' in sys.modules) == has_mapping
        assert hasattr(sys.modules['onnx'], 'mapping') == has_mapping

        types = sys.modules['onnx_chainer.functions.array'].NP_TYPE_TO_TENSOR_TYPE
        if has_mapping:
            assert types is sys.modules['onnx.mapping'].NP_TYPE_TO_TENSOR_TYPE
        else:
            for name in ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint64',
                         'float16', 'float32', 'float64', 'complex64'):
                assert types[np.dtype(name)] == 'type of ' + name
        from onnx_chainer import context
        tensor = context._tensor_from_array_for_constant(np.arange(3), 'name')
        assert tensor.array.tolist() == [0, 1, 2]
        """,
        tmp_path,
        path=[tmp_path],
    )


def test_onnx_chainer_without_onnx(tmp_path):
    run(
        """
        import sys
        sys.modules['onnx'] = None
        import chainer_deform
        import onnx_chainer
        try:
            onnx_chainer.export(None, None)
        except ImportError as e:
            message = str(e)
        assert 'ONNX is not installed' in message
        """,
        tmp_path,
    )


class NoDriverError(Exception):
    pass


def fake_cuda_backend(version, count):
    """As much of chainer.backends.cuda as the repair touches, with some devices."""

    def get_device_count():
        if count is None:
            raise NoDriverError('no driver')
        return count

    runtime = types.SimpleNamespace(
        getDeviceCount=get_device_count, CUDARuntimeError=NoDriverError
    )
    return types.SimpleNamespace(
        available=True,
        cupy=types.SimpleNamespace(
            __version__=version, cuda=types.SimpleNamespace(runtime=runtime)
        ),
        check_cuda_available=types.SimpleNamespace(),
        GpuDevice=type(
            'GpuDevice', (), {'from_device_id': staticmethod(lambda i: f'device {i}')}
        ),
    )


@pytest.mark.parametrize(
    ('count', 'message'),
    [
        (None, r'no GPU @cupy:1: CUDA finds none \(no driver\)'),
        (0, 'no GPU @cupy:1: CUDA finds 0'),
        (1, 'no GPU @cupy:1: CUDA finds 1'),
        (2, None),
    ],
)
def test_missing_gpu_is_named(count, message):
    from chainer_deform import _compat

    backend = fake_cuda_backend('14.2.0', count)
    _compat._backends_cuda(backend, lambda: None)
    if message is None:
        assert backend.GpuDevice.from_device_id(1) == 'device 1'
        return
    with pytest.raises(RuntimeError, match=message):
        backend.GpuDevice.from_device_id(1)


@pytest.mark.parametrize(('version', 'quiet'), [('13.6.0', False), ('14.2.0', True)])
def test_cudnn_is_not_missed_where_cupy_dropped_it(version, quiet):
    from chainer_deform import _compat

    backend = fake_cuda_backend(version, 1)
    _compat._backends_cuda(backend, lambda: None)
    assert backend.check_cuda_available._already_warned  # while Chainer is imported
    chainer = types.SimpleNamespace(backends=types.SimpleNamespace(cuda=backend))
    _compat._chainer(chainer, lambda: None)
    assert hasattr(backend.check_cuda_available, '_already_warned') == quiet


def test_chainers_own_warning_is_not_repeated():
    from chainer_deform import _compat

    backend = fake_cuda_backend('13.6.0', 1)
    backend.check_cuda_available._already_warned = True
    _compat._backends_cuda(backend, lambda: None)
    chainer = types.SimpleNamespace(backends=types.SimpleNamespace(cuda=backend))
    _compat._chainer(chainer, lambda: None)
    assert backend.check_cuda_available._already_warned is True
