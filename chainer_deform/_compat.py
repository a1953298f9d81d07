"""Makes Chainer 7.8.1 import and train on today's Python, NumPy and setuptools.

Importing this module is enough, if it comes before the first ``import chainer``.

Chainer is repaired module by module, as it is loaded: :data:`_REPAIRS` maps the name of
a module to its repair, a function of the module and of ``execute``, which runs the
module's own code. What a repair does before and after that call is all that changes.
NumPy, the standard library and Chainer's files stay as they are, and what nobody
imports (ChainerMN, ONNX-Chainer, ``chainer.testing``) is not loaded to be repaired.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import operator
import sys
import textwrap
import threading
import types
import warnings
from math import inf, isfinite
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


def _with(module: types.ModuleType, **names: Any) -> types.ModuleType:
    """A look-alike of a module in which some names mean something else."""
    look_alike = types.ModuleType(module.__name__)
    vars(look_alike).update(names, __getattr__=functools.partial(getattr, module))
    return look_alike


def _widen(x: Any) -> Any:
    """Takes a NumPy or CuPy scalar to 64 bits, and leaves anything else as it is.

    Since NumPy 2 (NEP 50) a Python number takes the type of a NumPy scalar that is
    added to it, so that a sum which starts as ``0.0`` stays in the type of its first
    term: one of float16 stands still at 2048.
    """
    if not hasattr(x, 'astype') or x.dtype.itemsize >= 8:
        return x
    return x.astype(numpy.float64 if x.dtype.kind == 'f' else numpy.int64)


def _fit(value: Any, dtype: numpy.dtype) -> Any:
    """Wraps a Python number around that an integer type cannot hold.

    NumPy 1 did so when it made an array of the type, or filled one; NumPy 2 raises
    OverflowError.
    """
    if not _NUMPY_2 or type(value) not in (int, float) or dtype.kind not in 'iu':
        return value
    limits = numpy.iinfo(dtype)
    if limits.min <= value <= limits.max or not isfinite(value):
        return value
    return numpy.int64(value).astype(dtype)


def _like_numpy_1(*methods: str) -> Callable:
    """A repair: some ``'Class.method'`` of a module compute as they did on NumPy 1.

    They are compiled from their source again, with each ``a / b`` changed to
    ``_calculate('Div', a, b)``, and each ``a /= b`` to ``a /= _beside(b, a)``.
    """

    def repair(module, execute):
        execute()
        if not _NUMPY_2:
            return
        for method in methods:
            cls, name = method.split('.')
            cls = getattr(module, cls)
            function = getattr(cls, name)
            try:
                source = inspect.getsource(function)
            except OSError:  # in a program that was packed without its sources
                message = f'{module.__name__} cannot be repaired without its source'
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                continue
            tree = _ToCalls().visit(ast.parse(textwrap.dedent(source)))
            ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
            code = compile(
                ast.fix_missing_locations(tree), function.__code__.co_filename, 'exec'
            )
            names = {**vars(module), '_calculate': _calculate, '_beside': _beside}
            exec(code, names)
            copy = functools.update_wrapper(names[function.__name__], function)
            setattr(cls, name, copy)

    return repair


class _ToCalls(ast.NodeTransformer):
    def visit_BinOp(self, node):
        self.generic_visit(node)
        name = type(node.op).__name__
        if name not in _OPERATORS:
            return node
        operands = [ast.Constant(name), node.left, node.right]
        call = ast.Call(ast.Name('_calculate', ast.Load()), operands, [])
        return ast.copy_location(call, node)

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        a = ast.parse(ast.unparse(node.target), mode='eval').body
        call = ast.Call(ast.Name('_beside', ast.Load()), [node.value, a], [])
        node.value = ast.copy_location(call, node.value)
        return node


def _calculate(name: str, a: Any, b: Any) -> Any:
    """``a + b`` for the name Add, and so on."""
    return _OPERATORS[name](_beside(a, b), _beside(b, a))


_OPERATORS = {
    'Add': operator.add,
    'Sub': operator.sub,
    'Mult': operator.mul,
    'Div': operator.truediv,
    'FloorDiv': operator.floordiv,
    'Mod': operator.mod,
    'Pow': operator.pow,
}


def _beside(x: Any, other: Any) -> Any:
    """An operand, changed so that NumPy 2 computes in the type that NumPy 1 took.

    For NumPy 1 a Python number was an int64 or a float64 beside a scalar, and where the
    type of an array was too small for it; and a scalar beside an array took the type of
    the array. For NumPy 2 (NEP 50) a Python number takes the other's type, so that a
    float16 divided by 120,000 is 0 (float16 ends at 65,504), and an array takes the
    type of a wider scalar.
    """
    arrays = (numpy.ndarray, numpy.generic)
    if not isinstance(other, arrays):
        return x
    if isinstance(x, arrays) and x.ndim == 0 < other.ndim:
        both_float = x.dtype.kind == other.dtype.kind == 'f'
        x = x.item() if both_float else x
    if type(x) in (int, float):
        too_large = other.dtype == numpy.float16 and 65504 < abs(x) < inf
        return numpy.asarray(x)[()] if other.ndim == 0 or too_large else x
    return x


def _drop_tracebacks(module: types.ModuleType) -> None:
    """Cuts the tracebacks off the exceptions that a module keeps in its variables.

    A traceback keeps alive its frame, the frames that called it, and the local
    variables of all of these, up to the script that imported Chainer.
    """
    for error in vars(module).values():
        while isinstance(error, BaseException):
            error.__traceback__ = None
            error = error.__cause__ or error.__context__


# The repairs, in the order of the table below. First the import.


def _failed_imports(module, execute):
    """Drops what failed imports of optional packages keep alive."""
    execute()
    _drop_tracebacks(module)


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
    _drop_tracebacks(module)
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


# Variables, functions, links.


def _variable(module, execute):
    """Has debug_print say ``CPU``: arrays of NumPy 2 have a device, ``cpu``."""
    execute()

    def get(array, name, default):
        on_cpu = name == 'device' and isinstance(array, numpy.ndarray)
        return default if on_cpu else getattr(array, name, default)

    module.Variable.debug_print = _rebind(module.Variable.debug_print, getattr=get)


def _basic_math(module, execute):
    """Has the operators of Variable take scalars as on NumPy 1.

    Chainer makes a constant one of the array's type, which wraps -1 around for an
    unsigned array (it computes ``x - 1`` as ``x + -1``). It divides by multiplying with
    the reciprocal, and takes 1 from an exponent for the gradient, both of which NumPy 2
    does in the type of the constant, if that is a NumPy scalar.
    """
    execute()
    sub = module.sub

    @functools.wraps(sub)
    def signed_sub(self, rhs):
        # Chainer adds -rhs, which wraps around if that is unsigned, on any NumPy.
        if isinstance(rhs, (numpy.unsignedinteger, numpy.bool_)):
            if self.dtype.kind == 'u':
                bits = 8 * self.dtype.itemsize
                return module.add(self, self.dtype.type(-int(rhs) % 2**bits))
            rhs = int(rhs)
        return sub(self, rhs)

    module.sub = signed_sub
    if _NUMPY_2:
        _take_scalars_exactly(module)
    module.install_variable_arithmetics()


def _take_scalars_exactly(module) -> None:
    """The part of :func:`_basic_math` that NumPy 1 does not need."""
    module._preprocess_const = lambda x, value: x.dtype.type(_fit(value, x.dtype))
    div = module.div

    @functools.wraps(div)
    def wide_div(self, rhs):
        if isinstance(rhs, numpy.number):
            rhs = rhs.astype(numpy.result_type(rhs.dtype, numpy.float64))
        return div(self, rhs)

    module.div = wide_div
    _with_python_options('PowVarConstGrad')(module, lambda: None)


def _with_python_options(name: str) -> Callable:
    """A repair: the options of a class of a module are Python's numbers, not NumPy's.

    Since NumPy 2 a numpy.float64 widens the arrays that it is computed with, and a
    number beside a NumPy scalar takes its type.
    """

    def repair(module, execute):
        execute()
        cls = getattr(module, name)
        init = cls.__init__

        @functools.wraps(init)
        def with_python_numbers(self, *args, **kwargs):
            init(
                self, *map(_unwrap, args), **{k: _unwrap(v) for k, v in kwargs.items()}
            )

        cls.__init__ = with_python_numbers

    return repair


def _unwrap(option: Any) -> Any:
    is_real = isinstance(option, (numpy.integer, numpy.floating))
    return option.item() if is_real else option


def _loss_of_many(module, execute):
    """Has a loss of more samples than float16 can count computed in float32.

    Otherwise it divides by infinity, and its gradient is 0.
    """
    execute()
    name = module.__name__.rpartition('.')[2]
    loss = getattr(module, name)

    @functools.wraps(loss)
    def loss_of_many(x, *args, **kwargs):
        if x.dtype != numpy.float16 or len(x) <= 65504:
            return loss(x, *args, **kwargs)
        from chainer.functions import cast

        x, *args = (
            cast(arg, numpy.float32) if hasattr(arg, 'dtype') else arg
            for arg in (x, *args)
        )
        return cast(loss(x, *args, **kwargs), numpy.float16)

    setattr(module, name, loss_of_many)


def _fix(module, execute):
    """Computes F.fix with numpy.trunc: numpy.fix is deprecated."""
    execute()
    truncating = _with(numpy, fix=numpy.trunc)
    get_array_module = module.backend.get_array_module

    def get_truncating(x):
        xp = get_array_module(x)
        return truncating if xp is numpy else xp

    module.backend = types.SimpleNamespace(get_array_module=get_truncating)


def _sparse_matmul(module, execute):
    """Multiplies sparse float16 matrices in float32.

    SciPy, which did so on its own, takes no float16 since 1.14.
    """
    execute()
    matmul = module._coo_matmul_cpu

    @functools.wraps(matmul)
    def wide_matmul(a, row, col, shape, b, dtype):
        a, b = (
            x.astype(numpy.result_type(x, numpy.float32), copy=False) for x in (a, b)
        )
        return matmul(a, row, col, shape, b, dtype)

    module._coo_matmul_cpu = wide_matmul


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


def _pad_sequence(module, execute):
    """Pads unsigned arrays with -1."""
    execute()
    forward = module.PadSequence.forward

    @functools.wraps(forward)
    def fitting_forward(self, xs):
        self.padding = _fit(self.padding, xs[0].dtype)
        return forward(self, xs)

    module.PadSequence.forward = fitting_forward


def _resize_images(module, execute):
    """Lends one function numpy.float: dropped by NumPy 1.24, deprecated in 1.23."""
    execute()
    module.compute_indices_and_weights = _rebind(
        module.compute_indices_and_weights, numpy=_with(numpy, float=float)
    )


def _deconvolution_2d(module, execute):
    """Repairs the gradient of W where x needs none, as Chainer did after 7.8.1.

    It hands the variables x and W to a method that wants their shapes.
    """
    execute()
    deconvolution = module.Deconvolution2DFunction
    set_cover_all = deconvolution._set_cover_all

    @functools.wraps(set_cover_all)
    def set_by_shapes(self, x, w):
        set_cover_all(self, getattr(x, 'shape', x), getattr(w, 'shape', w))

    deconvolution._set_cover_all = set_by_shapes


def _sigmoid_cross_entropy(module, execute):
    """Has the sum divided by an int64: float16 does not hold the size of a large batch.

    Without ``normalize`` the size is a Python integer, see :func:`_beside`.
    """
    execute()
    loss = module.SigmoidCrossEntropy
    loss.forward = _rebind(loss.forward, max=lambda a, b: numpy.int64(max(a, b)))


def _roi(module, execute):
    """Scales and divides regions of interest in float64, as NumPy 1 did.

    They are scalars of a float16 or float32 array beside Python numbers, from which
    the borders of the bins are rounded, see :func:`_beside`.
    """
    execute()
    if not _NUMPY_2:
        return

    def wide(function):
        @functools.wraps(function)
        def wide_function(self, inputs, *gradients):
            (rois,) = (x for x in inputs if getattr(x, 'ndim', 0) == 2)
            wide_rois = rois.astype(numpy.float64)
            inputs = tuple(wide_rois if x is rois else x for x in inputs)
            outputs = function(self, inputs, *gradients)
            return tuple(
                y if y is None else y.astype(rois.dtype, copy=False) for y in outputs
            )

        return wide_function

    for cls in vars(module).values():
        for name in ('forward_cpu', 'backward_cpu'):
            if isinstance(cls, type) and name in vars(cls):
                setattr(cls, name, wide(vars(cls)[name]))


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


def _maxout(module, execute):
    """Gives the callables that fill a Maxout's parameters a view of the right shape.

    Chainer assigns to the array's ``shape``, which NumPy 2.5 deprecates.
    """
    execute()
    base = module.initializer.Initializer

    class Reshaped(base):
        def __init__(self, fill, *shape):
            super().__init__()
            self.fill, self.shape = fill, shape

        def __call__(self, array):
            self.fill(array.reshape(*self.shape, *array.shape[1:]))

    init = module.Maxout.__init__

    @functools.wraps(init)
    def init_with_views(
        self, in_size, out_size, pool_size, initialW=None, initial_bias=0
    ):
        fills = [
            Reshaped(fill, out_size, pool_size)
            if callable(fill) and not isinstance(fill, base)
            else fill
            for fill in (initialW, initial_bias)
        ]
        init(self, in_size, out_size, pool_size, *fills)

    module.Maxout.__init__ = init_with_views


def _caffe_pb2(module, execute):
    """Makes the messages of Caffe from their description.

    protobuf 4 and newer refuse code that a compiler before protobuf 3.19 generated.
    """
    try:
        execute()
        return
    except TypeError:
        from google.protobuf import descriptor_pool
        from google.protobuf.internal import builder
    # By then protobuf has read the description, with which the module begins.
    module.DESCRIPTOR = descriptor_pool.Default().FindFileByName('caffe.proto')
    names = vars(module)
    builder.BuildMessageAndEnumDescriptors(module.DESCRIPTOR, names)
    builder.BuildTopDescriptorsAndMessages(module.DESCRIPTOR, module.__name__, names)


# Training.


def _convert(module, execute):
    """Has concat_examples pad unsigned arrays with -1, and warn of nothing.

    It pads with numpy.maximum(a, b, out), deprecated in NumPy 2.4.
    """
    execute()
    concat = _rebind(
        module._concat_arrays_with_padding,
        numpy=_with(numpy, maximum=lambda a, b, out: numpy.maximum(a, b, out=out)),
    )
    module._concat_arrays_with_padding = lambda arrays, padding: concat(
        arrays, _fit(padding, arrays[0].dtype)
    )


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


def _gradient_clipping(module, execute):
    """Has the squared norms of the parameters summed in float64.

    In float16 the sum is soon infinite, and every gradient then clipped to 0.
    """
    execute()
    module._sum_sqnorm_grads = _rebind(
        module._sum_sqnorm_grads,
        sum=lambda norms: sum(
            _widen(x) if isinstance(x, numpy.generic) else x for x in norms
        ),
    )
    _like_numpy_1('GradientClipping.__call__')(module, lambda: None)


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


def _hdf5(module, execute):
    """Reads strings as str, which h5py 3 gives as bytes, and lets errors be seen.

    ``save_hdf5`` calls ``sys.exec_info``, which does not exist, for ``exc_info``.
    """
    execute()
    module.sys = _with(sys, exec_info=sys.exc_info)
    deserializer = module.HDF5Deserializer
    deserializer.__call__ = _rebind(
        deserializer.__call__, numpy=_with(numpy, asarray=_read_hdf5)
    )


def _read_hdf5(dataset, dtype=None):
    """numpy.asarray of a dataset, with strings as h5py 2 gave them."""
    import h5py

    string = h5py.check_string_dtype(dataset.dtype)
    if string is None or string.encoding != 'utf-8' or not hasattr(dataset, 'asstr'):
        return numpy.asarray(dataset, dtype)
    return numpy.asarray(dataset.asstr()[()], dtype or object)


def _micro_average(module, execute):
    """Has MicroAverage sum in 64 bits, and take arrays of one element.

    ``float()`` of such an array is deprecated since NumPy 1.25 and raises since 2.5.
    """
    execute()

    def wide(name):
        def set_wide(self, value):
            if getattr(value, 'ndim', 0) and value.size == 1:
                value = value.reshape(())[()]
            vars(self)[name] = _widen(value)

        return property(lambda self: vars(self)[name], set_wide)

    module.MicroAverage._numerator = wide('_numerator')
    module.MicroAverage._denominator = wide('_denominator')


def _multiprocess_parallel_updater(module, execute):
    """CuPy 14 warns where NCCL is missing, which the module is prepared for."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'\s*nccl library could not be loaded')
        execute()


# Tests, ChainerMN, ONNX-Chainer.


def _requirements(module, execute):
    """Lends the module pkg_resources, which setuptools 82 dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # all it says is that it will be dropped
            importlib.import_module('pkg_resources')
    except ImportError:
        pass
    else:
        _failed_imports(module, execute)
        return
    sys.modules['pkg_resources'] = types.SimpleNamespace(
        WorkingSet=lambda: types.SimpleNamespace(require=_require),
        ResolutionError=importlib.metadata.PackageNotFoundError,
    )
    try:
        _failed_imports(module, execute)
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
    # the import
    # The import.
    **{
        f'chainer.{name}': _failed_imports
        for name in (
            'backends.intel64',
            'datasets.image_dataset',
            'datasets.svhn',
            'distributions.multivariate_normal',
            'function_hooks.cupy_memory_profile',
            'functions.math.erfcinv',
            'functions.math.erfcx',
            'functions.math.erfinv',
            'functions.math.ndtri',
            'links.model.vision.googlenet',
            'links.model.vision.resnet',
            'links.model.vision.vgg',
            'testing.attr',
            'testing.condition',
            'testing.distribution_test',
            'testing.training',
            'testing.unary_math_function_test',
        )
    },
    'chainer._environment_check': _environment_check,
    'chainer.backends.cuda': _backends_cuda,
    'chainer': _chainer,
    # Variables, functions, links.
    'chainer.variable': _variable,
    'chainer.functions.math.basic_math': _basic_math,
    'chainer.functions.math.fix': _fix,
    'chainer.functions.math.sparse_matmul': _sparse_matmul,
    'chainer.functions.array.as_strided': _as_strided,
    'chainer.functions.array.pad_sequence': _pad_sequence,
    'chainer.functions.array.resize_images': _resize_images,
    'chainer.functions.connection.deconvolution_2d': _deconvolution_2d,
    'chainer.functions.loss.contrastive': _like_numpy_1('Contrastive.forward'),
    'chainer.functions.loss.ctc': _like_numpy_1(
        'ConnectionistTemporalClassification.backward'
    ),
    'chainer.functions.loss.cross_covariance': _loss_of_many,
    'chainer.functions.loss.decov': _loss_of_many,
    'chainer.functions.loss.hinge': _like_numpy_1(
        'Hinge.forward_cpu', 'Hinge.backward_cpu'
    ),
    'chainer.functions.loss.mean_squared_error': _like_numpy_1(
        'MeanSquaredError.forward_cpu'
    ),
    'chainer.functions.loss.sigmoid_cross_entropy': _sigmoid_cross_entropy,
    'chainer.functions.loss.softmax_cross_entropy': _like_numpy_1(
        '_SoftmaxCrossEntropyGrad_NoDoubleBackprop.forward_cpu'
    ),
    'chainer.functions.loss.triplet': _like_numpy_1('Triplet.forward'),
    'chainer.functions.normalization.batch_normalization': _with_python_options(
        'FixedBatchNormalization'
    ),
    'chainer.functions.normalization.batch_renormalization': _with_python_options(
        'BatchRenormalizationFunction'
    ),
    'chainer.functions.normalization.layer_normalization': _with_python_options(
        'LayerNormalization'
    ),
    'chainer.functions.normalization.local_response_normalization': (
        _with_python_options('LocalResponseNormalization')
    ),
    'chainer.functions.pooling.average_pooling_2d': _like_numpy_1(
        'AveragePooling2DGrad.forward_cpu'
    ),
    'chainer.functions.pooling.average_pooling_nd': _like_numpy_1(
        'AveragePoolingNDGrad.forward_cpu'
    ),
    **{
        f'chainer.functions.pooling.{name}': _roi
        for name in (
            'roi_average_align_2d',
            'roi_average_pooling_2d',
            'roi_max_align_2d',
            'roi_max_pooling_2d',
            'roi_pooling_2d',
        )
    },
    'chainer.distributions.categorical': _categorical,
    'chainer.links.activation.maxout': _maxout,
    'chainer.links.caffe.protobuf3.caffe_pb2': _caffe_pb2,
    # Training.
    'chainer.dataset.convert': _convert,
    'chainer.iterators.multiprocess_iterator': _multiprocess_iterator,
    'chainer.optimizer': _like_numpy_1('UpdateRule._UpdateRule__update'),
    'chainer.optimizer_hooks.gradient_clipping': _gradient_clipping,
    'chainer.optimizer_hooks.gradient_lars': _like_numpy_1('GradientLARS.__call__'),
    'chainer.reporter': _reporter,
    'chainer.serializers.hdf5': _hdf5,
    'chainer.training.extensions.micro_average': _micro_average,
    'chainer.training.updaters.multiprocess_parallel_updater': (
        _multiprocess_parallel_updater
    ),
    # Tests, ChainerMN, ONNX-Chainer.
    'chainer.testing.doctest_helper': _requirements,
    'chainer.testing.helper': _requirements,
    'chainermn.iterators.multi_node_iterator': _multi_node_iterator,
    'chainermn.communicators._memory_utility': _memory_utility,
    'onnx_chainer.export': _onnx_export,
}

install()
