"""Arrays by name, as other libraries have them, from and to a link's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

import chainer
import numpy
from chainer import backend


class Part(NamedTuple):
    """What an array of the other library holds of a link.

    Attributes:
        param: The parameter; ``None`` if the link has none like it.
        name: Path of the parameter in the link.
        shape: Its shape. The size that depends on the number of input channels is
            ``None`` if that is not known yet.
        theirs: Shape of the array, where it is more than another number of rows.
        rows: Which row of the parameter each row of the array is; -1 for rows that the
            link has not, and which are 0. All in the same order if ``None``.
        factor: What the parameter is multiplied by.
        options: What the link is made with if the array is there, and if it is not.
        share: The size that is ``None`` is the number of input channels times this.

    """

    param: chainer.Parameter | None
    name: str
    shape: tuple
    theirs: tuple | None = None
    rows: numpy.ndarray | None = None
    factor: float = 1.0
    options: tuple[str, str] | None = None
    share: Fraction = Fraction(1)

    @property
    def their_shape(self) -> tuple:
        if self.theirs is not None:
            return self.theirs
        rows = self.shape[0] if self.rows is None else len(self.rows)
        return rows, *self.shape[1:]

    def sized(self, shape: tuple, in_channels: int) -> tuple[int, ...]:
        """A shape for a link of so many input channels."""
        size = int(in_channels * self.share)
        return tuple(size if length is None else length for length in shape)


def load(
    parts: dict[str, Part],
    state_dict: Mapping,
    prefix: str,
    another: str | None = None,
    check: Callable[[int], object] | None = None,
    hint: Callable[[set], str] | None = None,
) -> None:
    """Copies arrays into the link, once all of them are found to fit.

    Args:
        parts: What is expected, by key; if any size is not known, the first one has it.
        state_dict: The arrays by key.
        prefix: How the keys of the layer begin.
        another: How the keys of another layer begin, if they begin with ``prefix``.
        check: Called with the number of input channels if only the arrays tell it.
        hint: Makes the end of an error's text from the keys that were found.

    """
    check_mapping(state_dict)
    _check_keys(parts, state_dict, prefix, another, hint)
    parts = {key: part for key, part in parts.items() if part.param is not None}
    arrays = {key: _array(key, state_dict[key]) for key in parts}
    in_channels = _in_channels(parts, arrays, check)
    for key, part in parts.items():
        expected = part.sized(part.their_shape, in_channels)
        found = arrays[key].shape
        if found != expected:
            raise ValueError(
                f'state_dict[{key!r}] must have the shape {expected}, not {found}'
            )
    new: dict[str, tuple[chainer.Parameter, numpy.ndarray]] = {}
    for key, part in parts.items():
        shape = part.sized(part.shape, in_channels)
        dtype = _writable_dtype(part, shape)
        _, whole = new.setdefault(part.name, (part.param, numpy.empty(shape, dtype)))
        array = _converted(
            f'state_dict[{key!r}]', part, arrays[key], numpy.divide, dtype
        )
        if part.rows is None:
            whole[...] = array.reshape(shape)
        else:
            array = array.reshape(len(part.rows), *shape[1:])
            ours = part.rows >= 0
            whole[part.rows[ours]] = array[ours]
    _write(list(new.values()))


def save(parts: dict[str, Part]) -> dict[str, numpy.ndarray]:
    """The link's arrays as the other library has them, by key; copies."""
    state_dict = {}
    for key, part in parts.items():
        if part.param is None:
            continue
        if part.param.array is None:
            raise ValueError(
                'link is not initialised yet: call it once or make it with in_channels'
            )
        array = backend.CpuDevice().send(part.param.array)
        if part.rows is not None:
            array = array[part.rows]
            array[part.rows < 0] = 0
        array = _converted('link', part, array, numpy.multiply, array.dtype)
        if part.theirs is not None:
            array = array.reshape(part.theirs)
        state_dict[key] = array
    return state_dict


def _writable_dtype(part: Part, shape: tuple[int, ...]) -> numpy.dtype:
    """The dtype of a parameter, which an array of this shape can be written into."""
    param: chainer.Parameter = part.param  # which is there
    array = param.array
    if array is None:  # as Parameter.initialize() has it
        return chainer.get_dtype(getattr(param.initializer, 'dtype', None))
    if array.shape != shape:
        raise ValueError(
            f'{part.name} of link must have the shape {shape}, not {array.shape}'
        )
    flags = getattr(array, 'flags', None)
    if not getattr(flags, 'writeable', True):  # arrays on a GPU always are
        raise ValueError(f'{part.name} of link must not be read-only')
    return array.dtype


def _converted(
    where: str, part: Part, array: numpy.ndarray, scale: Callable, dtype: numpy.dtype
) -> numpy.ndarray:
    """An array divided or multiplied by the factor, in another dtype.

    Raises:
        ValueError: A number becomes infinite or NaN.

    """
    with numpy.errstate(all='ignore'):
        result = scale(array, part.factor, dtype=float).astype(dtype)
    lost = numpy.isfinite(array) & ~numpy.isfinite(result)
    if lost.any():
        verb = 'divided' if scale is numpy.divide else 'multiplied'
        scaled = '' if part.factor == 1 else f' {verb} by mask_scale, {part.factor},'
        raise ValueError(
            f'{where} has the number {array[lost][0]}, which{scaled} is too large for '
            f'{part.name}, {dtype} (at most {numpy.finfo(dtype).max})'
        )
    return result


def _write(new: list[tuple[chainer.Parameter, numpy.ndarray]]) -> None:
    """Writes arrays into parameters: into all of them or, with an error, into none."""
    old = []
    try:
        for param, array in new:
            before = param.array if param.array is None else param.array.copy()
            old.append((param, before, dict(vars(param))))
            if before is None:
                param.initialize(array.shape)
            with chainer.using_device(param.device):
                param.array[...] = param.device.send(array)
    except BaseException:
        for param, before, attributes in old:
            with contextlib.suppress(Exception):  # the one that cannot be written
                if before is None:
                    param.array = None
                    vars(param).update(attributes)
                else:
                    param.array[...] = before
        raise


def _in_channels(parts: dict[str, Part], arrays: dict, check) -> int:
    """The number of input channels: the link's or, if it has none yet, the arrays'.

    Raises:
        ValueError: The array does not fit any number.

    """
    open_parts = {key: part for key, part in parts.items() if None in part.shape}
    for part in open_parts.values():
        param: chainer.Parameter = part.param  # which is there
        if param.array is not None:
            return int(param.shape[part.shape.index(None)] / part.share)
    if not open_parts:
        return 1
    key, part = next(iter(open_parts.items()))
    found, shape = arrays[key].shape, part.their_shape
    if len(found) != len(shape):
        share = part.share
        size = 'in_channels' + (f' * {share}' if share > 1 else f' / {1 / share}')
        expected = ', '.join(size if n is None else str(n) for n in shape)
        raise ValueError(
            f'state_dict[{key!r}] must have the shape ({expected}), not {found}'
        )
    in_channels = int(found[shape.index(None)] / part.share)
    if check is not None:
        check(in_channels)
    return in_channels


def _array(key: str, value) -> numpy.ndarray:
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(
            f'state_dict[{key!r}] must be an array without a mask, not a '
            f'{type(value).__name__}: fill it, as with .filled(0)'
        )
    try:
        if str(getattr(value, 'dtype', '')) == 'torch.bfloat16':
            value = value.float()  # NumPy has no such dtype
        array = numpy.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # say, on a GPU
        raise TypeError(
            f'state_dict[{key!r}] must be an array that NumPy can read, not a '
            f'{type(value).__name__}: {error}'
        ) from error
    if array.dtype.name == 'bfloat16':  # of ml_dtypes
        array = array.astype(numpy.float32)
    if array.dtype.kind not in 'fiu':
        hint = ''
        if array.dtype == 'V2':
            hint = ' (bfloat16 from a file? array.view(ml_dtypes.bfloat16) makes it so)'
        raise TypeError(
            f'state_dict[{key!r}] must hold real numbers, not {array.dtype}{hint}'
        )
    return array


def _check_keys(
    parts: dict[str, Part],
    state_dict: Mapping,
    prefix: str,
    another: str | None,
    hint: Callable[[set], str] | None,
) -> None:
    expected = {key for key, part in parts.items() if part.param is not None}
    # str(), as a mapping may have other keys.
    found = {key for key in state_dict if str(key).startswith(prefix) or key in parts}
    if another is not None:
        found = {key for key in found if not str(key).startswith(another)}
    if found == expected:
        return
    message = f'state_dict must have the keys {listed(expected)}'
    if prefix:
        message += f' and no others that begin with {prefix!r}'
    wrong = []
    if expected - found:
        wrong.append(f'lacks {listed(expected - found)}')
    if found - expected:
        wrong.append(f'has {listed(found - expected)} besides')
    message += ', but ' + ', and '.join(wrong)
    for key, part in parts.items():
        there = key in found
        if part.options is None or there == (key in expected):
            continue
        weight = f'{key[: -len("bias")]}weight' if key.endswith('.bias') else None
        if weight in found if weight in parts else found & expected:
            message += (
                f'; {"with" if there else "without"} {key!r} the link has to be made '
                f'with {part.options[not there]}'
            )
    raise ValueError(message + ('' if hint is None else hint(found)))


def listed(keys) -> str:
    """Some keys, as the state of a whole model has hundreds."""
    names = sorted(map(repr, keys))
    rest = len(names) - 8
    return ', '.join(names[:8]) + (f' and {rest} more' if rest > 0 else '')


def check_mapping(state_dict) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            'state_dict must be a mapping from names to arrays, not a '
            f'{type(state_dict).__name__}'
        )


def check_strs(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f'{name} must be a str, not {value!r}')
