"""Calls every function of Chainer, and writes what they compute into a file.

``python -m tests.battery.run FILE`` is one half of ``make test-numpy``; the other,
``compare.py``, compares the files of two NumPys.
"""

from __future__ import annotations

import pickle
import sys
import time
import warnings
from typing import Any, Callable

import chainer
import chainer.functions as F
import numpy

from tests.battery.arguments import Array, Call
from tests.battery.calls import CALLABLES, CALLS, OPERATOR_CALLS


def functions_without_calls() -> list[str]:
    """The public functions of chainer.functions, all of which take arrays, not called.

    A name for a function that is called under another name is none of them.
    """
    called = [CALLABLES[name] for name in CALLS]
    return [
        name
        for name, value in vars(F).items()
        if callable(value) and not name.startswith('_') and value not in called
    ]


def all_calls() -> dict[str, tuple[Callable, Call]]:
    """Every call under its name: those of CALLS, and those with NumPy scalars."""
    named = {}
    calls = {**CALLS, **{f'operator.{k}': v for k, v in OPERATOR_CALLS.items()}}
    for function, its_calls in calls.items():
        variants = list(its_calls)
        if function in CALLS:
            variants += [call.with_numpy_scalars() for call in its_calls]
        for call in filter(None, variants):
            name = function + str(call)
            if name in named:
                raise ValueError(f'two calls are {name}')
            named[name] = CALLABLES[function], call
    return named


def evaluate(function: Callable, call: Call, dtype: str) -> dict[str, numpy.ndarray]:
    """Calls a function, its backward and its double backward.

    Returns:
        Arrays by what they are: 'y 0', 'gx 1', 'ggx 2', 'changed 0' for an array among
        the arguments, 'warnings' for their categories. An error stands as the text
        'Type: message' under the step that raised it, a gradient that is not there as
        the text 'None'.

    """
    made = call.make(dtype)
    record: dict[str, numpy.ndarray] = {}

    def attempt(step, compute):
        try:
            results = list(_flatten(compute()))
        except Exception as e:
            record[step] = numpy.array(f'{type(e).__name__}: {e}')
            return []
        for i, x in enumerate(results):
            x = x.array if isinstance(x, chainer.Variable) else x
            record[f'{step} {i}'] = numpy.array('None' if x is None else x)
        return _differentiable(results)

    def seeds(ys):
        return [chainer.Variable(Array(y.shape).make(made.stream, y.dtype)) for y in ys]

    def double_backward():
        gxs = _differentiable(chainer.grad(ys, xs, gys, enable_double_backprop=True))
        return gxs and chainer.grad(gxs, [*xs, *gys], seeds(gxs))

    numpy.random.seed(0)
    with (
        warnings.catch_warnings(record=True) as caught,
        chainer.using_config('train', call.train),
    ):
        warnings.simplefilter('always')
        ys = attempt('y', lambda: function(*made.args, **made.options))
        for i, array in enumerate(made.arrays):
            record[f'changed {i}'] = array
        xs, gys = made.variables, seeds(ys)
        if ys:
            attempt('gx', lambda: chainer.grad(ys, xs, gys))
            attempt('ggx', double_backward)
    kinds = sorted({warning.category.__name__ for warning in caught})
    if kinds:
        record['warnings'] = numpy.array(', '.join(kinds))
    return record


def _flatten(result: Any):
    if isinstance(result, (list, tuple)):
        for x in result:
            yield from _flatten(x)
    else:
        yield result


def _differentiable(results):
    variables = [x for x in results if isinstance(x, chainer.Variable)]
    return [x for x in variables if x.requires_grad and x.creator is not None]


def write(path: str, results: dict[str, numpy.ndarray]) -> None:
    """Writes arrays in a form in which every NumPy reads them, and quickly."""
    plain = {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in results.items()}
    with open(path, 'wb') as file:
        pickle.dump((numpy.__version__, plain), file)


def read(path: str) -> tuple[str, dict[str, numpy.ndarray]]:
    """Returns NumPy's version and what :func:`write` wrote."""
    with open(path, 'rb') as file:
        version, plain = pickle.load(file)
    return version, {
        name: numpy.frombuffer(data, dtype).reshape(shape)
        for name, (dtype, shape, data) in plain.items()
    }


def main(path: str) -> None:
    missing = functions_without_calls()
    if missing:
        sys.exit(f'calls.py has no arguments for {", ".join(missing)}')
    start = time.perf_counter()
    calls = all_calls()
    results = {}
    for name, (function, call) in calls.items():
        for dtype in call.dtypes:
            for what, array in evaluate(function, call, dtype).items():
                results[f'{name}: {dtype}: {what}'] = array
    write(path, results)
    print(
        f'NumPy {numpy.__version__}: {len(calls)} calls of {len(CALLABLES)} functions'
        f' and operators, {len(results)} results, {time.perf_counter() - start:.0f} s'
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
