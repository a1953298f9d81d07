"""Makes Chainer 7.8.1 import and train on today's Python, NumPy and setuptools.

Importing this module is enough, if it comes before the first ``import chainer``.

Chainer is repaired module by module, as it is loaded: :data:`_REPAIRS` maps the name of
a module to its repair, a function of the module and of ``execute``, which runs the
module's own code. What a repair does before and after that call is all that changes.
NumPy, the standard library and Chainer's files stay as they are, and what nobody
imports (ChainerMN, ONNX-Chainer, ``chainer.testing``) is not loaded to be repaired.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import threading
import types
import warnings
from typing import Any, Callable

import numpy

_NUMPY_2 = int(numpy.__version__.split('.')[0]) >= 2

_NOT_INSTALLED = """\
chainer_deform needs Chainer, which is not installed. Chainer 7.8.1 only builds with \
setuptools older than 81, which pip has to be told:
    echo 'setuptools<81' > build-constraints.txt
    export PIP_CONSTRAINT="$PWD/build-constraints.txt"
    export PIP_BUILD_CONSTRAINT="$PIP_CONSTRAINT"
    pip install chainer==7.8.1"""

_TOO_LATE = """\
chainer_deform was imported while `import chainer` was still running, too late to \
repair it: put `import chainer_deform` before the first `import chainer`."""


def install() -> None:
    """Repairs Chainer and imports it.

    The modules of Chainer that are loaded already are repaired in place, the others
    when their time comes.

    Raises:
        ImportError: If Chainer is not installed or is just being imported. The message
            says what to do.

    """
    sys.meta_path.insert(0, types.SimpleNamespace(find_spec=_find_spec))
    loaded = sys.modules.get('chainer')
    if loaded is None:
        # Python takes a module whose import failed out of sys.modules, but leaves the
        # submodules that were complete by then. They refer to the module that is gone,
        # and a second `import chainer` would fail over them, whatever is repaired.
        for name in [name for name in sys.modules if name.startswith('chainer.')]:
            del sys.modules[name]
    elif getattr(loaded.__spec__, '_initializing', False):
        raise ImportError(_TOO_LATE)
    else:
        for name in _REPAIRS.keys() & sys.modules.keys():
            _REPAIRS[name](sys.modules[name], lambda: None)
    try:
        importlib.import_module('chainer')
    except ModuleNotFoundError as e:
        if e.name != 'chainer':
            raise
        raise ModuleNotFoundError(_NOT_INSTALLED, name='chainer') from None


def _find_spec(name, path=None, target=None):
    """A finder for sys.meta_path: the usual one, with the repair in the loader."""
    repair = _REPAIRS.get(name)
    if repair is None:
        return None
    spec = importlib.machinery.PathFinder.find_spec(name, path, target)
    if spec is not None:
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: repair(
            module, functools.partial(run, module)
        )
    return spec


# What the repairs are made of.


def _rebind(function: Callable, **names: Any) -> Callable:
    """A copy of a function for which some global names mean something else.

    The module keeps its names: if ``numpy`` were replaced in all of it, its tests
    ``xp is numpy`` would take the GPU's branch.
    """
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return functools.update_wrapper(copy, function)


def _with(module: types.ModuleType, **names: Any) -> types.SimpleNamespace:
    """A look-alike of a module in which some names mean something else."""
    return types.SimpleNamespace(**{**vars(module), **names})


def _widen(x: Any) -> Any:
    """Takes a NumPy or CuPy scalar to 64 bits, and leaves anything else as it is.

    Since NumPy 2 (NEP 50) a Python number takes the type of a NumPy scalar that is
    added to it, so that a sum which starts as ``0.0`` stays in the type of its first
    term: one of float16 stands still at 2048.
    """
    if not hasattr(x, 'astype') or x.dtype.itemsize >= 8:
        return x
    return x.astype(numpy.float64 if x.dtype.kind == 'f' else numpy.int64)


# The repairs, in the order of the table below.


def _environment_check(module, execute):
    """Leaves out the module's code, which compares versions of optional packages.

    It needs numpy.distutils, which every NumPy from 1.23 warns about and Python 3.12
    lost, and pkg_resources, which setuptools 67 began to warn about and setuptools 82
    dropped. On a Python that this package supports, all that it could say is to go back
    to a CuPy that does not run there.
    """
    module.check = lambda: None


def _backends_cuda(module, execute):
    """Says nothing of cuDNN while Chainer is imported, and what GPU is missing.

    Chainer would warn, whether a GPU is used or not, that CuPy should be installed
    again with cuDNN, which CuPy 14 does not have any more; and it would let CUDA say
    that its driver is insufficient, or that a device ordinal is invalid.
    """
    execute()
    if not module.available:  # no CuPy: Chainer's own error says so
        return
    if not hasattr(module.check_cuda_available, '_already_warned'):
        module.check_cuda_available._already_warned = 'not yet'
    from_device_id = module.GpuDevice.from_device_id
    runtime = module.cupy.cuda.runtime

    @functools.wraps(from_device_id)
    def from_present_device_id(device_id):
        try:
            count = runtime.getDeviceCount()
            found = f'CUDA finds {count}'
        except runtime.CUDARuntimeError as e:
            count, found = 0, f'CUDA finds none ({e})'
        if isinstance(device_id, int) and device_id >= count:
            raise RuntimeError(f'there is no GPU @cupy:{device_id}: {found}')
        return from_device_id(device_id)

    module.GpuDevice.from_device_id = staticmethod(from_present_device_id)


def _chainer(module, execute):
    """Lets Chainer warn of a missing cuDNN again, where there could be one."""
    execute()
    cuda = module.backends.cuda
    warned = getattr(cuda.check_cuda_available, '_already_warned', None)
    if warned == 'not yet' and int(cuda.cupy.__version__.split('.')[0]) < 14:
        del cuda.check_cuda_available._already_warned


def _multiprocess_parallel_updater(module, execute):
    """CuPy 14 warns where NCCL is missing, which the module is prepared for."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'\s*nccl library could not be loaded')
        execute()


def _as_strided(module, execute):
    """Lends the module numpy.sctypes, which NumPy 2 dropped."""
    if hasattr(numpy, 'sctypes'):
        execute()
        return
    sctypes = {
        'int': [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
        'float': [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
    }
    vars(numpy)['sctypes'] = sctypes  # the module's own code reads it
    try:
        execute()
    finally:
        del vars(numpy)['sctypes']
    grad = module.AsStridedGrad
    grad.forward = _rebind(grad.forward, np=_with(numpy, sctypes=sctypes))


def _resize_images(module, execute):
    """Lends one function numpy.float: dropped by NumPy 1.24, deprecated in 1.23."""
    execute()
    module.compute_indices_and_weights = _rebind(
        module.compute_indices_and_weights, numpy=_with(numpy, float=float)
    )


def _categorical(module, execute):
    """Since NumPy 2, numpy.meshgrid returns a tuple; log_prob adds a list to it."""
    execute()
    if _NUMPY_2:
        categorical = module.Categorical
        categorical.log_prob = _rebind(
            categorical.log_prob,
            numpy=_with(
                numpy, meshgrid=lambda *xi, **kw: list(numpy.meshgrid(*xi, **kw))
            ),
        )


def _convert(module, execute):
    """concat_examples pads with numpy.maximum(a, b, out), deprecated in NumPy 2.4."""
    execute()
    module._concat_arrays_with_padding = _rebind(
        module._concat_arrays_with_padding,
        numpy=_with(numpy, maximum=lambda a, b, out: numpy.maximum(a, b, out=out)),
    )


def _reporter(module, execute):
    """Has Summary, whose means LogReport and Evaluator print, sum in 64 bits."""
    execute()
    add = module.Summary.add

    @functools.wraps(add)
    def wide_add(self, value, weight=1):
        device = module.backend.get_device_from_array(value)
        with module.chainer.using_device(device):
            add(self, _widen(value), _widen(weight))

    module.Summary.add = wide_add


def _micro_average(module, execute):
    """Has MicroAverage sum in 64 bits."""
    execute()
    call = module.MicroAverage.__call__

    @functools.wraps(call)
    def wide_call(self, trainer):
        self._numerator = _widen(self._numerator)
        self._denominator = _widen(self._denominator)
        call(self, trainer)

    module.MicroAverage.__call__ = wide_call


def _multiprocess_iterator(module, execute):
    """Starts workers that repair themselves, and a thread without setDaemon()."""
    execute()

    class Thread(threading.Thread):
        def setDaemon(self, daemonic):  # deprecated since Python 3.10
            self.daemon = daemonic

    loop = module._PrefetchLoop
    loop.launch_thread = _rebind(
        loop.launch_thread,
        threading=_with(threading, Thread=Thread),
        _fetch_setup=_fetch_setup,
    )


def _fetch_setup(*args):
    """The initializer of MultiprocessIterator's workers.

    A worker that is spawned or comes from a fork server imports the main script first,
    which repairs it if the script imports chainer_deform at its top. A notebook has no
    such script. But a worker also unpickles its initializer, before the data set: this
    function stands in for Chainer's, so that chainer_deform is imported before Chainer.
    """
    from chainer.iterators import multiprocess_iterator

    multiprocess_iterator._fetch_setup(*args)


def _requirements(module, execute):
    """Lends the module pkg_resources, which setuptools 82 dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # all it says is that it will be dropped
            importlib.import_module('pkg_resources')
    except ImportError:
        pass
    else:
        execute()
        return
    sys.modules['pkg_resources'] = types.SimpleNamespace(
        WorkingSet=lambda: types.SimpleNamespace(require=_require),
        ResolutionError=importlib.metadata.PackageNotFoundError,
    )
    try:
        execute()
    finally:
        del sys.modules['pkg_resources']


def _require(*requirements):
    """Raises PackageNotFoundError unless all of e.g. 'numpy>=1.10' are installed."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            raise importlib.metadata.PackageNotFoundError(str(requirement))


def _multi_node_iterator(module, execute):
    """Reads the size of the data set, which arrives as an array of one element.

    ``int()`` of such an array is deprecated since NumPy 1.25 and raises since 2.4: on
    one rank, while the others wait for it.
    """
    execute()
    slave = module._MultiNodeIteratorSlave
    slave.__init__ = _rebind(slave.__init__, int=lambda size: int(size.item()))


def _memory_utility(module, execute):
    """Copies gradients that travel in another type than they have.

    Since NumPy 2 and CuPy 14, ``xp.array(v, copy=False)`` raises if it has to copy.
    """
    execute()
    xp = types.SimpleNamespace(array=lambda v, copy, dtype: v.astype(dtype, copy=copy))
    backend = types.SimpleNamespace(get_array_module=lambda v: xp)
    module.unpack_params = _rebind(
        module.unpack_params, chainer=types.SimpleNamespace(backend=backend)
    )


def _onnx_export(module, execute):
    """Lends ONNX-Chainer onnx.mapping, which newer versions of onnx dropped."""
    try:
        import onnx.helper

        missing = importlib.util.find_spec('onnx.mapping') is None
    except ImportError:  # no onnx: the module says so when it is used
        missing = False
    if not missing:
        execute()
        return
    dtypes = map(numpy.dtype, '?bBhHiIqQefdFD')
    mapping = types.SimpleNamespace(
        NP_TYPE_TO_TENSOR_TYPE={
            dtype: onnx.helper.np_dtype_to_tensor_dtype(dtype) for dtype in dtypes
        },
        # The types whose constants it would write in a readable form, too.
        STORAGE_TENSOR_TYPE_TO_FIELD={},
    )
    sys.modules['onnx.mapping'] = mapping
    try:
        execute()
    finally:
        del sys.modules['onnx.mapping']
    context = sys.modules['onnx_chainer.context']
    context._tensor_from_array_for_constant = _rebind(
        context._tensor_from_array_for_constant, onnx=_with(onnx, mapping=mapping)
    )


_REPAIRS: dict[str, Callable[[types.ModuleType, Callable[[], None]], None]] = {
    'chainer': _chainer,
    'chainer._environment_check': _environment_check,
    'chainer.backends.cuda': _backends_cuda,
    'chainer.functions.array.as_strided': _as_strided,
    'chainer.functions.array.resize_images': _resize_images,
    'chainer.distributions.categorical': _categorical,
    'chainer.dataset.convert': _convert,
    'chainer.reporter': _reporter,
    'chainer.training.extensions.micro_average': _micro_average,
    'chainer.iterators.multiprocess_iterator': _multiprocess_iterator,
    'chainer.training.updaters.multiprocess_parallel_updater': (
        _multiprocess_parallel_updater
    ),
    'chainer.testing.helper': _requirements,
    'chainer.testing.doctest_helper': _requirements,
    'chainermn.iterators.multi_node_iterator': _multi_node_iterator,
    'chainermn.communicators._memory_utility': _memory_utility,
    'onnx_chainer.export': _onnx_export,
}

install()
