"""Checks of arguments that every operator shares."""

from __future__ import annotations

import operator

import chainer
from chainer import backend
from chainer.utils import type_check


def pair(name: str, value, minimum: int) -> tuple[int, int]:
    """An int or a pair of ints as a pair of ints; ``name`` is for the error."""
    if hasattr(value, '__len__') and len(value) == 2:
        return tuple(integer(name, v, minimum) for v in value)
    return (integer(name, value, minimum, 'an int or a pair of ints'),) * 2


def integer(name: str, value, minimum: int, expected: str = 'an int') -> int:
    """``value`` as an int of at least ``minimum``; ``name`` is for the error."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f'{name} must be {expected}, not {value!r}') from None
    if number < minimum:
        raise ValueError(f'{name} must be at least {minimum}, not {value!r}')
    return number


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


def check_gradient(what: str, gradient, shape: tuple[int, ...]) -> None:
    """Checks a gradient that was passed to ``chainer.grad``, which does not."""
    if gradient.shape != shape or gradient.dtype.char not in 'efd':
        raise type_check.InvalidType(
            f'the gradient of {what} has the shape {shape} and a float dtype',
            f'shape == {gradient.shape} and dtype == {gradient.dtype}',
        )


def check_devices(arguments: dict) -> None:
    """Checks that every argument is an array and lies where ``x`` lies."""
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
        if devices[name] != devices['x']:
            raise ValueError(
                f'{name} must be on the device of x, {devices["x"]}, '
                f'but is on {devices[name]}'
            )
