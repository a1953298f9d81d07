"""Export to ONNX: deformable operators become DeformConv, GridSample or RoiAlign."""

from __future__ import annotations

import copy
import os
import re
import types
import warnings
from typing import TYPE_CHECKING

import chainer
import chainer.functions as F
import numpy

from chainer_deform import _onnx_converters
from chainer_deform._checks import integer
from chainer_deform._files import replacing
from chainer_deform._version import __version__

if TYPE_CHECKING:
    import onnx

__all__ = ['export']

#: The first opset that has GridSample, and RoiAlign with half pixels.
_MIN_OPSET = 16
#: The opset that is written if none is asked for, the first that has DeformConv.
_OPSET = 19
#: The last opset that ONNX-Chainer writes. What is newer is in a domain of our own
#: there, and moves to the standard's when all other nodes have been brought to the
#: opset asked for.
_CHAINER_OPSET = 11
#: Protobuf's limit, which holds for what onnx's checker and converter are given, too.
_MOST_BYTES = 2**31 - 1

#: What is said of functions without an ONNX form, beside their name.
_HINTS = {
    'DeformableConvolution2DSamplerGrad': ', for which there is no operator',
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
    opset_version: int = _OPSET,
) -> onnx.ModelProto:
    """Exports a model to ONNX, with its deformable convolutions as ``DeformConv``.

    The model is called in test mode, and what it does is written down by the
    ``onnx_chainer`` that comes with Chainer, and by converters of this package where
    that has none or overlooks an option. Every node is one of the standard's,
    brought to the opset asked for by ``onnx``, whose checker has the last word. All
    options of :func:`~chainer_deform.functions.deformable_convolution_2d_sampler` can
    be exported. A ``Gather`` puts the offsets into the standard's order, pairs of (y,
    x). Like the function, ``DeformConv`` is computed in float32, or in float64 if any
    of its inputs is float64; where dtypes differ from that there are ``Cast`` nodes.

    onnxruntime runs ``DeformConv`` on the CPU from its version 1.25 on (in float64,
    too, but not an ordinary convolution). A point at or beyond -1 or the image's side
    gives 0 there as here, and so does an infinite offset; a NaN offset gives 0 as well,
    where this package gives NaN.

    The other operators of this package are written with standard ones of opset 16, and
    take batches, boxes, queries and (but for attention) image sizes that are left open:

    - DCNv3, DCNv4, deformable attention and ``sampled_sum_2d`` with zeros around the
      image read by ``GridSample``, whose places are shares of the image. In float32
      that rounds them to about ``6e-8`` of half the image's side. onnxruntime has it
      for float64 from opset 20 on.
    - RoI pooling reads by ``RoiAlign``: with one ``sampling_ratio`` for both axes each
      bin is a box of it; else, and in the position-sensitive form, each sample is a box
      of one point. In that form all samples are kept, with all their channels; where
      ``sampling_ratio`` is None each bin takes the room of the one with most, so give a
      number where memory counts. onnxruntime 1.32 has ``RoiAlign`` up to opset 21.

    There, too, a NaN offset or location gives 0, where this package gives NaN.

    What a model computes outside of Chainer's functions, with NumPy or from
    ``x.shape``, is a constant in the file. So a copy of the model is called again, with
    other values: if a constant is another one then, that is an error. With
    ``input_shapes`` the file takes other batches and images than ``args``, and the copy
    is called with twice the sizes that are left open: if a constant depends on them,
    that is a warning which names the function. Let ``args`` be a batch of one, then:
    ONNX broadcasts it to any batch.

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
        opset_version (int): Version of the standard's operators, 16 or later, and 19 or
            later if the model has deformable convolutions.

    Returns:
        onnx.ModelProto: The model, with its parameters.

    Raises:
        ImportError: ``onnx`` is not installed, or too old.
        TypeError: ``model`` is no link, one of ``args`` no array, or ``opset_version``
            no int.
        ValueError: ``opset_version`` is one that the installed ``onnx`` does not have,
            or that does not have what the model needs, names do not fit or repeat, or
            the model uses a function without an ONNX form.
        RuntimeError: A function cannot be exported with the options, inputs or dtypes
            that it has in the model, was called under ``chainer.no_backprop_mode``, or
            with numbers that were computed from the inputs' values by other means than
            Chainer's functions.

    Warns:
        UserWarning: A number in the file depends on a size that is left open.

    The file is written beside its place and moved there when it is complete and on
    disk: after an error there is none, or still the one that was there before. Files
    have at most 2 GiB; a model with more parameters is refused.

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
    before = model.copy()  # a call may change the model's state

    def trace(model, args):
        # ONNX-Chainer changes the list or dict that it is given.
        return _export_at_chainers_opset(
            _Traced(model), copy.copy(args), input_names, output_names, input_shapes
        )

    try:
        exported = trace(model, args)
        _check_constants(
            exported, lambda args: trace(before.copy(), args), args, input_shapes
        )
        exported = _at_opset(onnx, exported, opset_version)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise RuntimeError(
            'the model cannot be exported, as it would be no valid ONNX: '
            + re.sub(r'\b([A-Za-z]\w*?)_\d+(_tmp_\d+|_const_\w+)*\b', _in_words, str(e))
        ) from e
    if filename is not None:
        content = exported.SerializeToString()
        with replacing(filename) as file:
            file.write(content)
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
    if onnx.defs.onnx_opset_version() < _OPSET:
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
    """The arrays of the arguments."""

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
        with self._keep, _Watch(), _onnx_converters.functions_as_nodes():
            outputs = self._model(*args, **kwargs)
            arrays = [param.array for _, param in self.namedparams()]
            size = sum(array.nbytes for array in arrays if array is not None)
            if size > _MOST_BYTES:
                raise RuntimeError(
                    f'the model cannot be exported: its parameters have {size} bytes, '
                    f'but ONNX files have at most {_MOST_BYTES}'
                )
            if isinstance(outputs, dict):
                return {name: self._once(y) for name, y in outputs.items()}
            if isinstance(outputs, (list, tuple)):
                return [self._once(y) for y in outputs]
            return self._once(outputs)

    def _once(self, y):
        if any(y is other for other in self._taken):
            y = F.identity(y)
        reason = None
        if not isinstance(y, chainer.Variable):
            reason = f'is no Variable, but a {type(y).__name__}'
        elif y.creator_node is None:
            reason = "does not come out of Chainer's functions"
        if reason is not None:
            raise RuntimeError(
                f'the model cannot be exported: its output {len(self.outputs)} {reason}'
            )
        self._taken.append(y)
        self.outputs.append(y)
        return y


class _Keep(chainer.LinkHook):
    """Keeps what links are given: ONNX-Chainer knows variables while they live."""

    def __init__(self) -> None:
        self.name = f'onnx_export {id(self)}'
        self._kept: list = []

    def forward_preprocess(self, args) -> None:
        self._kept.append((args.args, args.kwargs))


class _Watch(chainer.FunctionHook):
    """Refuses calls of functions that leave no trace, or are random."""

    name = 'onnx_export'

    def forward_preprocess(self, function, in_data) -> None:
        reason = None
        if not chainer.config.enable_backprop:
            reason = 'without a graph, under chainer.no_backprop_mode'
        elif isinstance(function, F.noise.dropout.Dropout) and function.mask is None:
            reason = 'with chainer.config.train, where it is random'
        if reason is not None:
            name = _onnx_converters.public_name(type(function).__name__)
            raise RuntimeError(
                f'the model cannot be exported: it calls {name} {reason}'
            )


def _export_at_chainers_opset(traced, args, input_names, output_names, input_shapes):
    import onnx_chainer
    from onnx_chainer import mapping

    converters = {**mapping.converters, **_onnx_converters.CONVERTERS}
    shapes = {}
    converters = {name: _named(name, f, shapes) for name, f in converters.items()}
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
                external_opset_imports={_onnx_converters.DOMAIN: 1},
                return_named_inout=True,
            )
        except ValueError as e:
            unknown = re.fullmatch(r'(\w+) is not supported', str(e))
            if unknown is None:
                raise
            name = unknown[1]
            raise ValueError(
                'the model cannot be exported: there is no ONNX form of '
                f'{_onnx_converters.public_name(name)}{_HINTS.get(name, "")}'
            ) from None
    _onnx_converters.drop_expands(exported.graph, shapes)
    # What was inferred with them: a runtime would take such a size for a constant.
    del exported.graph.value_info[:]
    if input_shapes is not None:
        for output in exported.graph.output:
            for size in output.type.tensor_type.shape.dim:
                size.Clear()
    # ONNX-Chainer has them in the order in which it found them.
    names = {id(y): name for name, y in outputs.items()}
    values = {value.name: value for value in exported.graph.output}
    values = [values[names[id(y)]] for y in traced.outputs]
    del exported.graph.output[:]
    exported.graph.output.extend(values)
    return exported


def _named(name: str, converter, shapes: dict[str, tuple]):
    """The converter, with the function's name in its errors.

    It adds to ``shapes`` those of the inputs, by name.
    """

    def convert(params):
        inputs = zip(params.input_names, params.func.inputs)
        shapes.update((name, variable.shape) for name, variable in inputs)
        try:
            return converter(params)
        except _onnx_converters.NoForm as e:
            function = _onnx_converters.public_name(name)
            raise RuntimeError(
                f'the model cannot be exported: {function} has no ONNX form with {e}'
            ) from None
        except Exception as e:
            function = _onnx_converters.public_name(name)
            raise RuntimeError(
                f'the model cannot be exported: not {function} as it is called there '
                f'({type(e).__name__}: {e})'
            ) from e

    return convert


def _in_words(match: re.Match) -> str:
    """The name of a node, as that of the function whose node it is."""
    return _onnx_converters.public_name(match[1])


def _check_constants(exported, trace, args, input_shapes) -> None:
    """Finds what is a constant in the file, but not in the model.

    A model that computes something outside of Chainer's functions does not compute it
    in the file. It shows when the model is traced again, with other inputs: of other
    values, and where a size is left open of another size, too.
    """
    shapes = _shapes(args, input_shapes)
    found = _changes(exported, trace, _other(args, shapes))
    if found == []:
        return
    of_values = _changes(exported, trace, _other(args, _shapes(args, None)))
    if of_values:
        raise RuntimeError(
            f'the model cannot be exported: {_enumeration(of_values)} gets numbers '
            'that the model computes from the values of its inputs or at random, but '
            "not with Chainer's functions. Compute them so, or make them an input"
        )
    if found:
        warnings.warn(
            f'{_enumeration(found)} gets numbers that depend on the sizes of the '
            'inputs. In the exported model they are those for the given args, also '
            'where input_shapes leaves a size open',
            stacklevel=3,
        )


def _shapes(args, input_shapes) -> list[tuple]:
    """The shapes of the arguments, twice as large where they are left open."""
    arrays = _values(args)
    if input_shapes is None:
        return [array.shape for array in arrays]
    if isinstance(input_shapes, tuple):
        input_shapes = [input_shapes]
    if isinstance(input_shapes, dict):
        input_shapes = [input_shapes[name] for name in args]
    return [
        tuple(
            size if isinstance(size, int) else 2 * used
            for size, used in zip(shape, array.shape)
        )
        for shape, array in zip(input_shapes, arrays)
    ]


def _values(args) -> list:
    if isinstance(args, dict):
        return list(args.values())
    return args if isinstance(args, list) else [args]


def _other(args, shapes):
    """Arguments of other values, of the same kind and about as large."""
    random = numpy.random.RandomState(0)

    def other(array, shape):
        device = chainer.backend.get_device_from_array(array)
        if not array.size:
            return device.send(numpy.zeros(shape, array.dtype))
        # Indices and labels stay such.
        values = array.ravel()[device.send(random.randint(0, array.size, shape))]
        if array.dtype.kind != 'f':
            return values
        noise = random.uniform(0, 0.25, shape).astype(array.dtype)
        return 0.75 * values + device.send(noise)

    others = list(map(other, _values(args), shapes))
    if isinstance(args, dict):
        return dict(zip(args, others))
    return others if isinstance(args, list) else others[0]


def _changes(exported, trace, args) -> list[str] | None:
    """Functions of other constants when the model is traced with other arguments.

    None if it cannot be called with them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            other = trace(args)
    except Exception:
        return None
    steps, other_steps = _steps(exported.graph), _steps(other.graph)
    names = [
        name
        for (name, *step), (_, *other_step) in zip(steps, other_steps)
        if step != other_step
    ]
    if len(steps) != len(other_steps) and not names:
        names = [max(steps, other_steps, key=len)[-1][0]]
    classes = (re.sub(r'_\d+(_tmp_\d+)?$', '', name) for name in names)
    return list(dict.fromkeys(map(_onnx_converters.public_name, classes)))


def _steps(graph) -> list[tuple]:
    """Of each node: its name, what it does, and the constants that it is given."""
    constants = {
        value.name: (*value.dims, value.data_type, value.raw_data)
        for value in graph.initializer
        if not value.name.startswith('param_')  # a parameter, the same in each
    }
    return [
        (node.name, node.op_type, *node.attribute, *map(constants.get, node.input))
        for node in graph.node
    ]


def _enumeration(names: list[str]) -> str:
    return ' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))


def _check_opset(onnx, node, opset_version: int) -> None:
    """Checks that the standard has the operator of a node."""
    if not onnx.defs.has(node.op_type, opset_version):
        function = re.sub(r'_\d+(_tmp_\d+)?$', '', node.name)
        first = onnx.defs.get_schema(node.op_type, _OPSET).since_version
        raise ValueError(
            f'the model cannot be exported with opset_version {opset_version}: '
            f'{_onnx_converters.public_name(function)} needs {node.op_type}, which is '
            f'in opset {first} and later'
        )


def _at_opset(onnx, exported, opset_version: int):
    """The exported model in the standard's operators only."""
    for node in exported.graph.node:
        if node.domain == _onnx_converters.DOMAIN:
            _check_opset(onnx, node, opset_version)
    exported = onnx.version_converter.convert_version(exported, opset_version)
    graph = exported.graph
    for node in graph.node:
        if node.domain == _onnx_converters.DOMAIN:
            node.domain = ''
            if node.op_type == 'GridSample' and opset_version < 20:
                for attribute in node.attribute:
                    if attribute.name == 'mode':
                        attribute.s = b'bilinear'  # what it is called from 16 to 19
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
