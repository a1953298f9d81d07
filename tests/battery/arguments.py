"""How the battery describes arguments, and makes the same ones on every NumPy.

Every number is an odd multiple of 1/256 or an integer. float16 holds both exactly, so
all dtypes get the same values, and no value sits on a kink such as 0 or a rounding tie.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import chainer
import numpy

FLOATS = 'float16', 'float32', 'float64'
SIGNED = 'int8', 'int16', 'int32', 'int64'
UNSIGNED = 'uint8', 'uint16', 'uint32', 'uint64'
DTYPES = (*FLOATS, *SIGNED, *UNSIGNED, 'bool')


@dataclasses.dataclass(frozen=True, repr=False)
class Array:
    """Numbers in (low, high), of the dtype that is run unless one is given.

    Attributes:
        diagonal: If not 0, square matrices: symmetric, with this on the diagonal.
        variable: Whether the function gets a Variable, whose gradient is taken.

    """

    shape: tuple[int, ...]
    low: float = -2
    high: float = 2
    diagonal: float = 0
    integer: bool = False
    dtype: str = ''
    variable: bool = True

    def __repr__(self):
        text = 'x'.join(map(str, self.shape)) or 'scalar'
        if not self.variable:
            text = f'array {text}'
        if self.dtype:
            text += f' {self.dtype}'
        if (self.low, self.high) != (-2, 2):
            text += f' in {self.low}..{self.high}'
        return text

    def make(self, stream: numpy.random.RandomState, dtype: str) -> numpy.ndarray:
        dtype = numpy.dtype(self.dtype or dtype)
        x = stream.random_sample(self.shape)
        x = numpy.asarray(x)  # not a scalar
        width = self.high - self.low
        if self.integer:
            return numpy.floor(self.low + width * x, out=x).astype(dtype)
        x[...] = self.low + (2 * numpy.floor(width * 128 * x) + 1) / 256
        if self.diagonal:
            x += x.swapaxes(-1, -2) + self.diagonal * numpy.eye(self.shape[-1])
        if dtype.kind == 'f':
            return x.astype(dtype)
        numpy.floor(4 * x, out=x)
        if dtype.kind == 'u':
            numpy.absolute(x, out=x)
        if dtype.kind == 'b':
            x %= 2
        return x.astype(dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Values:
    """An array of these values, of the dtype that is run unless one is given."""

    values: Any
    dtype: str = ''
    variable: bool = False

    def __repr__(self):
        return str(self.values)

    def make(self, stream: numpy.random.RandomState, dtype: str) -> numpy.ndarray:
        return numpy.array(self.values).astype(self.dtype or dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Scalar:
    """A NumPy scalar."""

    value: float
    dtype: str

    def __repr__(self):
        return f'{self.dtype}({self.value})'


@dataclasses.dataclass(frozen=True, repr=False)
class Sparse:
    """A sparse matrix whose stored elements are a Variable."""

    data: Array
    row: list
    col: list
    shape: tuple[int, int]

    def __repr__(self):
        return f'sparse {self.shape[0]}x{self.shape[1]}'


def real(*shape: int, **more) -> Array:
    return Array(shape, **more)


def constant(*shape: int, **more) -> Array:
    """An array that the function gets as it is."""
    return Array(shape, variable=False, **more)


def index(*shape: int, upto: int, low: int = 0, dtype: str = 'int32') -> Array:
    return Array(shape, low, upto, integer=True, dtype=dtype, variable=False)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, with arrays that are yet to be made.

    Attributes:
        dtypes: The dtypes in which it is called.
        train: The value of ``chainer.config.train``.
        numpy_scalars: Whether the Python floats among its arguments become NumPy's.

    """

    args: tuple
    options: dict[str, Any]
    dtypes: tuple[str, ...] = DTYPES
    train: bool = True
    numpy_scalars: bool = False

    def __str__(self):
        options = [f'{key}={_text(value)}' for key, value in self.options.items()]
        text = ', '.join([*map(_text, self.args), *options])
        mode = '' if self.train else ' [test mode]'
        return f'({text}){mode}{" [NumPy scalars]" if self.numpy_scalars else ""}'

    def only(self, *dtypes: str) -> Call:
        return dataclasses.replace(self, dtypes=dtypes)

    def testing(self) -> Call:
        return dataclasses.replace(self, train=False)

    def with_numpy_scalars(self) -> Call | None:
        """The same call with NumPy scalars; None where it has no float, or is large."""
        if self.dtypes != DTYPES or not any(
            isinstance(x, float) for x in (*self.args, *self.options.values())
        ):
            return None
        return dataclasses.replace(self, numpy_scalars=True)

    def make(self, dtype: str) -> Made:
        text = str(dataclasses.replace(self, numpy_scalars=False))
        made = Made(numpy.random.RandomState(zlib.crc32(text.encode())), dtype)
        scalar = _numpy_scalar if self.numpy_scalars else lambda x: x
        made.args = [scalar(made.build(x)) for x in self.args]
        made.options = {k: scalar(made.build(x)) for k, x in self.options.items()}
        return made


def call(*args: Any, **options: Any) -> Call:
    return Call(args, options)


def large(*args: Any, **options: Any) -> Call:
    """A call in float16 with more elements than its largest number, 65504.

    It is called in float64, too, which shows what float16 loses.
    """
    return Call(args, options, ('float16', 'float64'))


class Made:
    """The arguments of a call, and what arrays are among them.

    Attributes:
        variables: The Variables, for their gradients.
        arrays: The plain arrays, some of which functions change.

    """

    def __init__(self, stream: numpy.random.RandomState, dtype: str) -> None:
        self.stream = stream
        self.dtype = dtype
        self.args: list = []
        self.options: dict[str, Any] = {}
        self.variables: list[chainer.Variable] = []
        self.arrays: list[numpy.ndarray] = []

    def build(self, x: Any) -> Any:
        """Puts arrays in the place of their descriptions, at any depth."""
        if isinstance(x, (list, tuple)):
            return type(x)(map(self.build, x))
        if isinstance(x, Sparse):
            data = x.data.make(self.stream, self.dtype)
            row, col = (numpy.array(i, numpy.int32) for i in (x.row, x.col))
            matrix = chainer.utils.CooMatrix(
                data, row, col, x.shape, requires_grad=True
            )
            self.variables.append(matrix.data)
            return matrix
        if isinstance(x, Scalar):
            return numpy.dtype(x.dtype).type(x.value)
        if not isinstance(x, (Array, Values)):
            return x
        array = x.make(self.stream, self.dtype)
        if not x.variable:
            self.arrays.append(array)
            return array
        self.variables.append(chainer.Variable(array))
        return self.variables[-1]


def _text(x):
    return x.__name__ if callable(x) else str(x)


def _numpy_scalar(x):
    return numpy.float64(x) if isinstance(x, float) else x
