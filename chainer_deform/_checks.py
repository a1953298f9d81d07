"""Checks of arguments that every operator shares."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping

import chainer
import numpy
from chainer import backend
from chainer.utils import type_check

#: The largest number that an option may be: products of two never overflow 64 bits.
MOST = 2**31 - 1


def pair(name: str, value, minimum: int) -> tuple[int, int]:
    """An int or a pair of ints as a pair of ints; ``name`` is for the error."""
    if hasattr(value, '__len__') and len(value) == 2:
        first, second = (integer(name, v, minimum) for v in value)
        return first, second
    return (integer(name, value, minimum, 'an int or a pair of ints'),) * 2


def integer(name: str, value, minimum: int, expected: str = 'an int') -> int:
    """``value`` as an int from ``minimum`` to ``MOST``; ``name`` is for the error."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f'{name} must be {expected}, not {value!r}') from None
    if number < minimum:
        raise ValueError(f'{name} must be at least {minimum}, not {value!r}')
    if number > MOST:
        raise ValueError(f'{name} must be at most {MOST}, not {value!r}')
    return number


def boolean(name: str, value) -> bool:
    """``value``, which must be True or False; ``name`` is for the error."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f'{name} must be True or False, not {value!r}')
    return bool(value)


def positive(name: str, value) -> float:
    """``value``, a finite number above 0, as a float; ``name`` is for the error."""
    number = _real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f'{name} must be above 0 and finite, not {value!r}')
    return number


def finite(name: str, value) -> float:
    """``value``, a finite number, as a float; ``name`` is for the error."""
    number = _real(name, value)
    if not math.isfinite(number):
        raise ValueError(f'{name} must be finite, not {value!r}')
    return number


def _real(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} must be a number, not {value!r}')
    return float(value)


def float_array(name: str, value):
    """The array of an array or a variable; ``name`` is for the error."""
    array = value.array if isinstance(value, chainer.Variable) else value
    if not isinstance(array, chainer.get_array_types()):
        raise TypeError(
            f'{name} must be a Variable or an array, not a {type(value).__name__}'
        )
    if array.dtype.char not in 'efd':
        raise type_check.InvalidType(
            f'{name}.dtype is float16, float32 or float64',
            f'{name}.dtype == {array.dtype}',
        )
    return array


def float_shapes(types: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by argument name, all of which have a float dtype.

    Args:
        types: Maps argument names to what
            :meth:`chainer.FunctionNode.check_type_forward` receives; in Chainer's light
            mode that is the arrays.

    """
    shapes = {}
    for name, array_type in types.items():
        shapes[name] = type_check.eval(array_type.shape)
        dtype = type_check.eval(array_type.dtype)
        if dtype.char not in 'efd':
            raise type_check.InvalidType(
                f'{name}.dtype is float16, float32 or float64',
                f'{name}.dtype == {dtype}',
            )
    return shapes


def argument_shapes(arguments: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of a function's arguments by name, all of which have a float dtype."""
    with type_check.light_mode:
        return float_shapes(arguments)


def check_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], rule: str = ''
) -> None:
    """Checks the shape of an array; ``name`` and ``rule`` are for the error."""
    if shape != expected:
        raise type_check.InvalidType(
            f'{name}.shape == {expected} {rule}'.rstrip(), f'{name}.shape == {shape}'
        )


def check_indices(name: str, indices, shape: tuple[int, ...], count: int) -> None:
    """Checks an array of integers from 0 to ``count - 1``; ``name`` is for the error.

    Of an array on a GPU the values are read back, for which the GPU is waited for.
    """
    check_shape(name, indices.shape, shape)
    if indices.dtype.kind not in 'iu':
        raise type_check.InvalidType(
            f'{name}.dtype is an integer one', f'{name}.dtype == {indices.dtype}'
        )
    if indices.size:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= count:
            raise ValueError(
                f'{name} must be from 0 to {count - 1}, as there are {count} images, '
                f'but are from {low} to {high}'
            )


def check_in_any_case(check: Callable, arguments: Mapping) -> None:
    """Calls ``check`` with the arrays where Chainer calls no ``check_type_forward``.

    That is where ``chainer.config.type_check`` is false. Compiled code has to be able
    to rely on the shapes even then.
    """
    if not chainer.config.type_check:
        with type_check.light_mode:
            check(arguments)


def check_gradient(what: str, gradient, shape: tuple[int, ...]) -> None:
    """Checks a gradient that was passed to ``chainer.grad``, which does not."""
    if gradient.shape != shape or gradient.dtype.char not in 'efd':
        raise type_check.InvalidType(
            f'the gradient of {what} has the shape {shape} and a float dtype',
            f'shape == {gradient.shape} and dtype == {gradient.dtype}',
        )


def check_second_gradients(gg: Mapping, arguments: Mapping) -> None:
    """Checks gradients of gradients, by argument name, that were passed in."""
    for name, gradient in gg.items():
        check_gradient(f'the gradient of {name}', gradient, arguments[name].shape)


def third_order_error(function: str) -> RuntimeError:
    """The error of a function that is differentiable twice, by its name."""
    return RuntimeError(
        f'{function} is differentiable twice: gradients of the gradients of its '
        'gradients are not available'
    )


def check_devices(arguments: dict) -> None:
    """Checks that every argument is an array and lies where the first one lies."""
    first = next(iter(arguments))
    array_types = chainer.get_array_types()
    devices = {}
    for name, argument in arguments.items():
        array = argument.array if isinstance(argument, chainer.Variable) else argument
        if not isinstance(array, array_types):
            found = type(argument).__name__
            if isinstance(argument, chainer.Variable):
                found += ' that is not initialised'
            raise TypeError(f'{name} must be a Variable or an array, not a {found}')
        devices[name] = backend.get_device_from_array(array)
        if devices[name] != devices[first]:
            raise ValueError(
                f'{name} must be on the device of {first}, {devices[first]}, '
                f'but is on {devices[name]}'
            )
