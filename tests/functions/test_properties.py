"""Any shapes, options and values end in the oracle's answer or a documented error."""

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
from chainer.utils import type_check

from tests import reference
from tests.cases import Case, SumCase, assert_close
from tests.functions import test_sampled_sum_2d as sums
from tests.functions.test_deformable_convolution_2d_sampler import run

settings = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)


VALUES = (
    'nan',
    'inf',
    '-inf',
    '3e38',
    '-3e38',
    '2147483648',
    '-2147483648',
    '-1',
    '0',
    '1',
)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def cases(least):
    """Geometries whose options are all valid for ``least == 1``."""
    return st.builds(
        Case,
        n=st.integers(0, 2),
        c=st.sampled_from((2, 4, 6)),
        out_c=st.sampled_from((2, 4)),
        size=pairs(least, 6),
        ksize=pairs(1, 3),
        stride=pairs(least, 3),
        pad=pairs(least - 1, 3),
        dilate=pairs(least, 3),
        groups=st.integers(least, 3 - least),
        offset_groups=st.integers(least, 3 - least),
        mask=st.booleans(),
        bias=st.booleans(),
    )


def set_values(arrays, values, coordinates):
    """Writes each value (name, place, value); only coordinates get huge ones."""
    for name, place, value in values:
        overflows = '3e38' in value and name != coordinates  # float32, not the oracle
        if name in arrays and not overflows:
            flat = arrays[name].reshape(-1)
            flat[int(place * flat.size) :][:1] = float(value)


def is_valid(case):
    return (
        min(*case.size, *case.stride, *case.dilate, case.groups, case.offset_groups) > 0
        and min(case.pad) >= 0
        and min(case.out_size) > 0
        and case.c % case.groups == case.out_c % case.groups == 0
        and case.c % case.offset_groups == 0
    )


@settings
@hypothesis.given(
    case=cases(1).filter(is_valid),
    dtype=st.sampled_from(('float32', 'float64')),
    seed=st.integers(0, 99),
    values=st.lists(
        st.tuples(
            st.sampled_from(('offset', 'mask', 'x')),
            st.floats(0, 1, exclude_max=True),
            st.sampled_from(VALUES),
        ),
        max_size=6,
    ),
)
def test_oracles_answer(case, dtype, seed, values):
    arrays, gy = case.arrays(dtype, seed=seed), case.gy(dtype)
    set_values(arrays, values, 'offset')
    y, gradients = run(arrays, case.options, gy)
    expected_y, expected = reference.deformable_convolution_2d_sampler(
        **arrays, **case.options, gy=gy
    )
    assert_close(y, expected_y, 'y')
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)


@st.composite
def sum_cases(draw):
    n = draw(st.integers(1, 3))
    indices = draw(st.none() | st.lists(st.integers(0, n - 1), max_size=8))
    return SumCase(
        n=n,
        c=draw(st.sampled_from((2, 4, 6))),
        size=draw(pairs(1, 6)),
        q=n * draw(st.integers(0, 3)) if indices is None else len(indices),
        groups=draw(st.integers(1, 2)),
        points=draw(st.integers(1, 4)),
        indices=indices,
        border=draw(st.sampled_from(('zero', 'clamp'))),
    )


@settings
@hypothesis.given(
    case=sum_cases(),
    dtype=st.sampled_from(('float32', 'float64')),
    seed=st.integers(0, 99),
    values=st.lists(
        st.tuples(
            st.sampled_from(('locations', 'weights', 'x')),
            st.floats(0, 1, exclude_max=True),
            st.sampled_from(VALUES),
        ),
        max_size=6,
    ),
)
def test_oracles_answer_of_a_sum(case, dtype, seed, values):
    arrays, gy = case.arrays(dtype, seed=seed), case.gy(dtype)
    set_values(arrays, values, 'locations')
    sums.check_first_order(arrays, case.options, gy)


def errors_of(case):
    """How the messages may begin that say what is wrong with a case."""
    minima = {'stride': 1, 'pad': 0, 'dilate': 1, 'groups': 1, 'offset_groups': 1}
    errors = [
        f'{name} must be at least {minimum}, not {value!r}'
        for name, minimum in minima.items()
        for value in numpy.ravel(case.options[name]).tolist()
        if value < minimum
    ]
    if errors:
        return errors
    # The filter has c // groups channels for each group.
    c = case.c // case.groups * case.groups
    for name, count, what, channels in (
        ('groups', case.groups, 'output', case.out_c),
        ('offset_groups', case.offset_groups, 'input', c),
    ):
        if channels % count:
            errors.append(
                f'{name} must divide the number of {what} channels, '
                f'but {name} is {count} and there are {channels}'
            )
    if errors:
        return errors
    if min(case.size) < 1 or c != case.c:
        return [f'Expect: x.shape == (n, {c}, h, w) with h, w >= 1']
    return ['Expect: x.shape[2:] + 2 * pad >= dilate * (W.shape[2:] - 1) + 1']


@settings
@hypothesis.given(case=cases(0).filter(lambda case: not is_valid(case)))
def test_documented_error(case):
    """It names an option or array that is wrong, and its value."""
    arrays = Case(size=(9, 9), bias=case.bias).arrays()
    arrays['x'] = numpy.zeros((case.n, case.c, *case.size))
    arrays['W'] = numpy.zeros(
        (case.out_c, max(1, case.c // max(1, case.groups)), *case.ksize)
    )
    with pytest.raises((ValueError, type_check.InvalidType)) as raised:
        run(arrays, case.options)
    message = str(raised.value).strip()
    assert any(error in message for error in errors_of(case))
    if 'Expect' in message:
        assert f'x.shape == {arrays["x"].shape}' in message.partition('Actual')[2]
    else:
        assert message.startswith(tuple(errors_of(case)))
