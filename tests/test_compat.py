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
