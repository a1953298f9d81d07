"""Export to ONNX: a deformable convolution becomes the standard's DeformConv."""

from __future__ import annotations

import contextlib
import math
import os
import re
import types
import warnings
from typing import TYPE_CHECKING

import chainer
import chainer.functions as F
import numpy

from chainer_deform._checks import integer
from chainer_deform._version import __version__
from chainer_deform.convert import interleaved_order

if TYPE_CHECKING:
    import onnx

__all__ = ['export']

#: The first opset that has DeformConv.
_MIN_OPSET = 19
#: The last opset that ONNX-Chainer writes. DeformConv is in a domain of our own there,
#: and moves to the standard's when all other nodes have been brought to the opset
#: asked for.
_CHAINER_OPSET = 11
_DOMAIN = 'chainer_deform'

#: What is said of functions without an ONNX form, beside their name.
_HINTS = {
    'DeformableConvolution2DSamplerGrad': (
        ', the gradient of a deformable convolution, for which there is no operator'
    ),
    'SpatialTransformerSampler': (
        ". If it is part of Chainer's own deformable convolution, call "
        'chainer_deform.patch_chainer() before the model is built'
    ),
}


def export(
    model: chainer.Link,
    args,
    filename: str | os.PathLike | None = None,
    *,
    input_names=None,
    output_names=None,
    input_shapes=None,
    opset_version: int = 19,
) -> onnx.ModelProto:
    """Exports a model to ONNX, with its deformable convolutions as ``DeformConv``.

    The model is called once, in test mode, and what it does is written down by the
    ``onnx_chainer`` that comes with Chainer. Every node is one of the standard's,
    brought to the opset asked for by ``onnx``, whose checker has the last word. All
    options of :func:`~chainer_deform.functions.deformable_convolution_2d_sampler` can
    be exported. A ``Gather`` puts the offsets into the standard's order, pairs of (y,
    x). Like the function, ``DeformConv`` is computed in float32, or in float64 if any
    of its inputs is float64; where dtypes differ from that there are ``Cast`` nodes.

    onnxruntime runs ``DeformConv`` on the CPU from its version 1.25 on (in float64,
    too, but not an ordinary convolution). A point at or beyond -1 or the image's side
    gives 0 there as here, and so does an infinite offset; a NaN offset gives 0 as well,
    where this package gives NaN.

    With ``input_shapes`` the file takes other batches and images than ``args``, as far
    as the model does not count on their size: what it computes outside of Chainer's
    functions, with NumPy or from ``x.shape``, is a constant in the file, of the value
    that it had for ``args``. Let ``args`` be a batch of one, then: ONNX broadcasts it
    to any batch. A reshape finds the size of its first axis by itself.

    Args:
        model (~chainer.Link): The model. It stays as it is, but for parameters that a
            first call initialises.
        args (:ref:`ndarray`, :class:`~chainer.Variable`, or list or dict of them): What
            the model is called with, as ``model(args)``, ``model(*args)`` or
            ``model(**args)``.
        filename (path or None): The file to write, if any.
        input_names (str, list or dict): Names of the inputs, instead of ``Input_0``,
            ``Input_1`` and so on; a dict if ``args`` is one.
        output_names (str, list or dict): Names of the outputs, instead of names after
            the functions that compute them; a dict if the model returns one.
        input_shapes (tuple, or list or dict of tuples): Shapes of the inputs in the
            file, instead of those of ``args``. A name instead of a number leaves the
            size of an axis open, as in ``('n', 3, 'h', 'w')``.
        opset_version (int): Version of the standard's operators, 19 or later.

    Returns:
        onnx.ModelProto: The model, with its parameters.

    Raises:
        ImportError: ``onnx`` is not installed, or too old.
        TypeError: ``model`` is no link, one of ``args`` no array, or ``opset_version``
            no int.
        ValueError: ``opset_version`` is one that the installed ``onnx`` does not have,
            names do not fit or repeat, or the model uses a function without an ONNX
            form.
        RuntimeError: A function cannot be exported with the options, inputs or dtypes
            that it has in the model, or was called under ``chainer.no_backprop_mode``.

    The file is written beside its place and moved there: after an error there is none,
    or still the one that was there before.

    .. seealso:: :func:`chainer_deform.patch_chainer`, for models with Chainer's own
        layer, which cannot be exported.

    .. admonition:: Example

        >>> layer = chainer_deform.links.DeformableConvolution2D(3, 8, 3, pad=1)
        >>> x = np.zeros((1, 3, 10, 14), np.float32)
        >>> exported = export(layer, x, input_shapes=('n', 3, 'h', 'w'))
        >>> [node.op_type for node in exported.graph.node]
        ['Conv', 'Constant', 'Gather', 'DeformConv']

    """
    onnx = _import_onnx()
    if not isinstance(model, chainer.Link):
        raise TypeError(f'model must be a chainer.Link, not a {type(model).__name__}')
    opset_version = integer('opset_version', opset_version, minimum=_MIN_OPSET)
    newest = onnx.defs.onnx_opset_version()
    if opset_version > newest:
        raise ValueError(
            f'opset_version must be at most {newest}, the newest of the onnx that is '
            f'installed, not {opset_version}'
        )
    for option, names in ('input_names', input_names), ('output_names', output_names):
        _check_names(option, names)
    args = _checked(args)
    try:
        exported = _export_at_chainers_opset(
            _Traced(model), args, input_names, output_names, input_shapes
        )
        exported = _at_opset(onnx, exported, opset_version)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise RuntimeError(
            f'the model cannot be exported, as it would be no valid ONNX: {e}'
        ) from e
    if filename is not None:
        _write(os.fsdecode(filename), exported.SerializeToString())
    return exported


def _import_onnx() -> types.ModuleType:
    try:
        import onnx
        import onnx.version_converter  # onnx leaves it to its users
    except ModuleNotFoundError as e:
        if e.name != 'onnx':
            raise
        raise ModuleNotFoundError(
            "export needs onnx: pip install 'chainer-deform[onnx]'", name='onnx'
        ) from None
    if onnx.defs.onnx_opset_version() < _MIN_OPSET:
        raise ImportError(
            f'export needs onnx 1.14 or later, not {onnx.__version__}: '
            "pip install --upgrade 'chainer-deform[onnx]'"
        )
    return onnx


def _check_names(option: str, names) -> None:
    if isinstance(names, dict):
        names = names.values()
    names = [names] if isinstance(names, str) else list(names or ())
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f'{option} must not repeat and not be empty, but are {names}')


def _checked(args):
    """The arrays of the arguments; ONNX-Chainer changes what it is given."""

    def checked(name, arg):
        array = chainer.as_array(arg)
        if not isinstance(array, chainer.get_array_types()):
            raise TypeError(
                f'{name} must be an array or a Variable, not a {type(arg).__name__}'
            )
        return array

    if isinstance(args, (list, tuple)):
        return [checked(f'args[{i}]', arg) for i, arg in enumerate(args)]
    if isinstance(args, dict):
        return {name: checked(f'args[{name!r}]', arg) for name, arg in args.items()}
    return checked('args', args)


class _Traced:
    """A model as ONNX-Chainer can write it down; it wants no more than is here.

    Attributes:
        outputs: What the model returned, one after another.

    """

    def __init__(self, model: chainer.Link) -> None:
        self.namedlinks = model.namedlinks
        self._model = model
        self._keep = _Keep()

    def namedparams(self):
        """Each parameter once, though layers may be in several places."""
        seen = set()
        for name, param in self._model.namedparams():
            if id(param) not in seen:
                seen.add(id(param))
                yield name, param

    def __call__(self, *args, **kwargs):
        # In ONNX an output is neither an input nor another output.
        self._taken = [*args, *kwargs.values()]
        self.outputs = []
        with self._keep, _NeedsGraph():
            outputs = self._model(*args, **kwargs)
            if isinstance(outputs, dict):
                return {name: self._once(y) for name, y in outputs.items()}
            if isinstance(outputs, (list, tuple)):
                return [self._once(y) for y in outputs]
            return self._once(outputs)

    def _once(self, y):
        if any(y is other for other in self._taken):
            y = F.identity(y)
        self._taken.append(y)
        self.outputs.append(y)
        return y


class _Keep(chainer.LinkHook):
    """Keeps what links are given: ONNX-Chainer knows variables while they live."""

    def __init__(self) -> None:
        self.name = f'onnx_export {id(self)}'
        self._kept = []

    def forward_preprocess(self, args) -> None:
        self._kept.append((args.args, args.kwargs))


class _NeedsGraph(chainer.FunctionHook):
    """Says which function leaves no trace."""

    name = 'onnx_export'

    def forward_preprocess(self, function, in_data) -> None:
        if not chainer.config.enable_backprop:
            raise RuntimeError(
                f'the model cannot be exported: it calls {function.label} without a '
                'graph, under chainer.no_backprop_mode'
            )


def _export_at_chainers_opset(traced, args, input_names, output_names, input_shapes):
    import onnx_chainer
    from onnx_chainer import mapping

    converters = {**mapping.converters, **_CONVERTERS}
    converters = {name: _named(name, f) for name, f in converters.items()}
    with warnings.catch_warnings():
        # They are about how ONNX-Chainer is called, and what it uses of onnx.
        warnings.filterwarnings(
            'ignore', '(external_.*|return_named_inout) is experimental', FutureWarning
        )
        warnings.filterwarnings(
            'ignore', r'`mapping\..* deprecated', DeprecationWarning
        )
        try:
            exported, _, outputs = onnx_chainer.export(
                traced,
                args,
                opset_version=_CHAINER_OPSET,
                input_names=input_names,
                output_names=output_names,
                input_shapes=input_shapes,
                external_converters=converters,
                external_opset_imports={_DOMAIN: 1},
                return_named_inout=True,
            )
        except ValueError as e:
            unknown = re.fullmatch(r'(\w+) is not supported', str(e))
            if unknown is None:
                raise
            name = unknown[1]
            raise ValueError(
                'the model cannot be exported: ONNX-Chainer has no ONNX form of the '
                f'function {name}{_HINTS.get(name, "")}'
            ) from None
    # ONNX-Chainer has them in the order in which it found them.
    names = {id(y): name for name, y in outputs.items()}
    values = {value.name: value for value in exported.graph.output}
    values = [values[names[id(y)]] for y in traced.outputs]
    del exported.graph.output[:]
    exported.graph.output.extend(values)
    return exported


def _named(name: str, converter):
    """The converter, with the function's name in its errors."""

    def convert(params):
        try:
            nodes = converter(params)
        except Exception as e:
            raise RuntimeError(
                f'the model cannot be exported: not the function {name} as it is '
                f'called there ({type(e).__name__}: {e})'
            ) from e
        # The statistics of a layer that is called twice are two, else.
        parameters = params.context.parameters
        parameters[:] = {id(array): array for array in parameters}.values()
        return nodes

    return convert


def _at_opset(onnx, exported, opset_version: int):
    """The exported model in the standard's operators only."""
    exported = onnx.version_converter.convert_version(exported, opset_version)
    graph = exported.graph
    for node in graph.node:
        if node.domain == _DOMAIN:
            node.domain = ''
    del exported.opset_import[:]
    exported.opset_import.append(onnx.helper.make_opsetid('', opset_version))
    # ONNX-Chainer asks for the newest, which a runtime may not know yet.
    exported.ir_version = onnx.helper.find_min_ir_version_for(exported.opset_import)
    exported.producer_name, exported.producer_version = 'chainer_deform', __version__

    # A parameter that is an input too could be given another value, so that runtimes
    # may not take it for a constant.
    parameters = {parameter.name for parameter in graph.initializer}
    inputs = [value for value in graph.input if value.name not in parameters]
    del graph.input[:]
    graph.input.extend(inputs)

    exported = onnx.shape_inference.infer_shapes(exported)
    onnx.checker.check_model(exported, full_check=True)
    return exported


def _write(path: str, content: bytes) -> None:
    path = os.path.realpath(path)  # a link stays a link
    part = f'{path}.{os.getpid()}.part'
    try:
        with open(part, 'wb') as f:
            f.write(content)
        os.replace(part, path)
    except BaseException as e:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        if isinstance(e, OSError):
            raise OSError(e.errno, e.strerror, path) from None
        raise


# The converters: from the parameters of an ONNX-Chainer converter to nodes.


def _deformable_convolution_2d_sampler(params):
    import onnx
    from onnx_chainer.onnx_helper import GraphBuilder

    builder = GraphBuilder()
    node, geometry = params.func, params.func.geometry
    dtypes = [variable.dtype for variable in node.inputs]
    x_dtype, dtype = dtypes[0], numpy.result_type(numpy.float32, *dtypes)

    def cast(name, to):
        return builder.op('Cast', [name], to=onnx.helper.np_dtype_to_tensor_dtype(to))

    names = {
        argument: name if found == dtype else cast(name, dtype)
        for argument, name, found in zip(node.names, params.input_names, dtypes)
    }
    order = interleaved_order(geometry.offset_groups, geometry.taps)
    order = params.context.add_const(order, 'interleaved')
    names['offset'] = builder.op('Gather', [names['offset'], order], axis=1)
    inputs = [names.get(name, '') for name in ('x', 'W', 'offset', 'b', 'mask')]
    while not inputs[-1]:
        del inputs[-1]
    y = builder.op(
        'DeformConv',
        inputs,
        domain=_DOMAIN,
        kernel_shape=(geometry.kh, geometry.kw),
        strides=(geometry.sy, geometry.sx),
        pads=(geometry.ph, geometry.pw, geometry.ph, geometry.pw),
        dilations=(geometry.dy, geometry.dx),
        group=geometry.groups,
        offset_group=geometry.offset_groups,
    )
    if x_dtype != dtype:
        cast(y, x_dtype)
    return builder.nodes(params.output_names)


def _reshape(params):
    """As ONNX-Chainer's, but the size of the first axis is left open."""
    from onnx_chainer import onnx_helper

    x_shape, shape = params.func.inputs[0].shape, list(params.func.shape)
    if shape and shape[:1] == list(x_shape[:1]):
        shape[0] = 0  # in ONNX the size that it has
    elif shape:
        if -1 in shape:
            shape[shape.index(-1)] = math.prod(x_shape) // -math.prod(shape)
        shape[0] = -1
    shape = params.context.add_const(numpy.array(shape, numpy.int64), 'shape')
    inputs = [*params.input_names, shape]
    return (onnx_helper.make_node('Reshape', inputs, params.output_names),)


def _prelu(params):
    """ONNX-Chainer's takes the slopes' axes for the last ones of the image."""
    from onnx_chainer.onnx_helper import GraphBuilder

    builder = GraphBuilder()
    x, slopes = params.input_names
    x_ndim, ndim = (len(variable.shape) for variable in params.func.inputs)
    if 0 < ndim < x_ndim - 1:
        slopes = builder.op('Unsqueeze', [slopes], axes=range(ndim, x_ndim - 1))
    builder.op('PRelu', [x, slopes])
    return builder.nodes(params.output_names)


def _resize_images(params):
    """ONNX-Chainer's does not look at ``align_corners`` and ``mode``."""
    from onnx_chainer import onnx_helper

    node = params.func
    sizes = node.inputs[0].shape[2:]
    out_sizes = node.out_H, node.out_W
    if node.mode == 'nearest':
        # Chainer's own formula, as its rounding decides which of two pixels it is.
        return _gather_pixels(
            params,
            *(
                numpy.minimum(numpy.floor(numpy.arange(out) * (size / out)), size - 1)
                for size, out in zip(sizes, out_sizes)
            ),
        )
    scales = [numpy.float32(out / size) for size, out in zip(sizes, out_sizes)]
    # A runtime takes floor(size * scale), which must not fall short by a rounding.
    scales = [
        numpy.nextafter(scale, numpy.float32('inf'))
        if size * float(scale) < out
        else scale
        for size, out, scale in zip(sizes, out_sizes, scales)
    ]
    add_const = params.context.add_const
    inputs = [
        *params.input_names,
        add_const(numpy.array([], numpy.float32), 'roi'),
        add_const(numpy.array([1, 1, *scales], numpy.float32), 'scales'),
    ]
    mode = 'align_corners' if node.align_corners else 'half_pixel'
    return (
        onnx_helper.make_node(
            'Resize',
            inputs,
            params.output_names,
            mode='linear',
            coordinate_transformation_mode=mode,
        ),
    )


def _unpooling_2d(params):
    """ONNX-Chainer's does not cut off what ``cover_all`` cuts off."""
    from onnx_chainer import mapping

    node = params.func
    ksize = node.kh, node.kw
    if not node.cover_all or (node.sy, node.sx) != ksize or node.ph or node.pw:
        return mapping.converters['Unpooling2D'](params)
    return _gather_pixels(
        params, numpy.arange(node.outh) // node.kh, numpy.arange(node.outw) // node.kw
    )


def _gather_pixels(params, rows, columns):
    """The image made of these rows and columns of the input."""
    from onnx_chainer.onnx_helper import GraphBuilder

    builder = GraphBuilder()
    image = params.input_names[0]
    for axis, name, index in (2, 'rows', rows), (3, 'columns', columns):
        index = params.context.add_const(index.astype(numpy.int64), name)
        image = builder.op('Gather', [image, index], axis=axis)
    return builder.nodes(params.output_names)


#: By the name of the function's class.
_CONVERTERS = {
    'DeformableConvolution2DSampler': _deformable_convolution_2d_sampler,
    'PReLUFunction': _prelu,
    'Reshape': _reshape,
    'ResizeImages': _resize_images,
    'Unpooling2D': _unpooling_2d,
}
