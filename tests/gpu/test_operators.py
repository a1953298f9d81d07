"""The other operators on a device: the same as on the CPU."""

import chainer
import numpy
import pytest

from chainer_deform import functions
from tests.cases import assert_close

pytestmark = pytest.mark.gpu

ROIS = [[1, 2, 9, 11.5], [-3, 0, 4, 20], [2, 2, 2, 2], [30, 40, 50, 44]]
BOXES = {'rois': numpy.array(ROIS, 'f'), 'roi_indices': numpy.array([1, 0, 1, 0], 'i')}

#: Shapes of the arrays that have gradients, and options.
CASES = {
    'deformable_roi_average_align_2d': (
        {'x': (2, 8, 5, 7), 'offset': (4, 2, 2, 3)},
        {**BOXES, 'outsize': (2, 3), 'spatial_scale': 0.6},
    ),
    'deformable_ps_roi_average_pooling_2d': (
        {'x': (2, 16, 5, 7), 'offset': (4, 4, 2, 3)},
        {**BOXES, 'outsize': (2, 3), 'spatial_scale': 0.6, 'group_size': 2},
    ),
    'dcn_v3_2d': (
        {'x': (2, 8, 5, 7), 'offset': (2, 24, 3, 5), 'mask': (2, 12, 3, 5)},
        {
            'ksize': (2, 3),
            'stride': (2, 1),
            'pad': (1, 0),
            'dilate': (2, 1),
            'offset_groups': 2,
            'offset_scale': 1.5,
        },
    ),
    'multi_scale_deformable_attention': (
        {
            'value': (2, 26, 2, 4),
            'locations': (2, 5, 2, 2, 3, 2),
            'weights': (2, 5, 2, 2, 3),
        },
        {'shapes': [(4, 5), (2, 3)]},
    ),
}


def run(name, arrays, options, device):
    """Output, gradients and the gradients of these, by name, as NumPy arrays."""
    device = chainer.get_device(device)
    random = numpy.random.RandomState(2)

    def like(array):
        drawn = random.uniform(-1, 1, array.shape).astype(array.dtype)
        return chainer.Variable(device.send(drawn))

    variables = {
        key: chainer.Variable(device.send(array)) for key, array in arrays.items()
    }
    options = {
        key: device.send(value) if isinstance(value, numpy.ndarray) else value
        for key, value in options.items()
    }
    y = getattr(functions, name)(**variables, **options)
    inputs = [*variables.values()]
    first = chainer.grad([y], inputs, [like(y)], enable_double_backprop=True)
    second = chainer.grad(first, inputs, [like(array) for array in inputs])
    results = {
        'y': y,
        **{f'gradient of {key}': g for key, g in zip(variables, first)},
        **{f'second of {key}': g for key, g in zip(variables, second)},
    }
    assert {result.device for result in results.values()} == {device}
    return {
        key: chainer.get_device('@numpy').send(result.array)
        for key, result in results.items()
    }


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
@pytest.mark.parametrize('name', CASES)
def test_same_as_the_cpu(name, dtype, deterministic):
    shapes, options = CASES[name]
    random = numpy.random.RandomState(1)
    arrays = {
        key: random.uniform(0, 1, shape).astype(dtype) for key, shape in shapes.items()
    }
    expected = run(name, arrays, options, '@numpy')
    with chainer.using_config('cudnn_deterministic', deterministic):
        found = run(name, arrays, options, '@cupy:0')
    # Half-precision results are rounded once more than the CPU's.
    scale = 4 if dtype == 'float16' else 1
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        assert_close(found[key] / scale, array / scale, key, dtype)
