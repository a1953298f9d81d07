"""The oracles' gradients against differences of what they differentiate."""

import numpy
import pytest

from tests import reference
from tests.cases import CASES, SUM_CASES

ORACLES = [
    *(
        pytest.param(
            reference.deformable_convolution_2d_sampler,
            reference.deformable_convolution_2d_sampler_second_order,
            CASES[name],
            id=name,
        )
        for name in ('plain', 'mask', 'all', 'depthwise')
    ),
    *(
        pytest.param(
            reference.sampled_sum_2d,
            reference.sampled_sum_2d_second_order,
            SUM_CASES[name],
            id=name,
        )
        for name in ('groups, zero', 'groups, clamp', 'indices, zero', 'plain, clamp')
    ),
]


@pytest.mark.parametrize(('first_order', 'second_order', 'case'), ORACLES)
def test_derivatives_along_a_direction(first_order, second_order, case):
    """All are polynomials between lattice lines, so differences are exact enough."""
    arrays, gy = case.arrays(), case.gy()
    random = numpy.random.RandomState(3)
    gg = {name: random.uniform(-1, 1, array.shape) for name, array in arrays.items()}
    eps = 1e-4
    ends = [
        first_order(
            **{name: array + step * gg[name] for name, array in arrays.items()},
            **case.options,
            gy=gy,
        )
        for step in (eps, -eps)
    ]
    (y, gradients), (y_before, gradients_before) = ends
    y_dot = (y - y_before) / (2 * eps)
    gradients_dot = {
        name: (gradient - gradients_before[name]) / (2 * eps)
        for name, gradient in gradients.items()
    }

    # Along a direction the output changes by the gradients times it.
    _, gradients = first_order(**arrays, **case.options, gy=gy)
    along = sum((gradients[name] * gg[name]).sum() for name in arrays)
    numpy.testing.assert_allclose((gy * y_dot).sum(), along, rtol=0, atol=1e-5)

    found = second_order(**arrays, **case.options, gy=gy, gg=gg)
    assert found.keys() == {'gy', *arrays} - {'b'}
    for name, expected in {**gradients_dot, 'gy': y_dot}.items():
        if name != 'b':
            numpy.testing.assert_allclose(
                found[name], expected, rtol=0, atol=1e-5, err_msg=name
            )
