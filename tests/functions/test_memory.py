"""The operators never have all samples at once, in the forward and backward pass."""

import chainer
import numpy
import pytest

from chainer_deform import functions


@pytest.fixture(autouse=True)
def loops():
    """The loops that are there: what is allocated outside of them is measured."""


def roi_arguments(channels: int, boxes: int) -> dict:
    box = numpy.array([1, 2, 15, 17], 'f')
    return {
        'x': numpy.ones((1, channels, 16, 20), 'f'),
        'rois': numpy.tile(box, (boxes, 1)),
        'roi_indices': numpy.zeros(boxes, 'i'),
        'outsize': 7,
        'spatial_scale': 1.0,
        'sampling_ratio': 4,
    }


#: By function its arguments, and the bytes of all samples.
CALLS = {
    functions.dcn_v3_2d: (
        {
            'x': numpy.ones((2, 128, 60, 60), 'f'),
            'offset': numpy.full((2, 50, 60, 60), 0.3, 'f'),
            'mask': numpy.ones((2, 25, 60, 60), 'f'),
            'ksize': 5,
            'pad': 2,
        },
        4 * 2 * 128 * 3600 * 25,
    ),
    functions.multi_scale_deformable_attention: (
        {
            'value': numpy.ones((2, 125, 2, 128), 'f'),
            'shapes': [(10, 10), (5, 5)],
            'locations': numpy.full((2, 4000, 2, 2, 4, 2), 0.3, 'f'),
            'weights': numpy.ones((2, 4000, 2, 2, 4), 'f'),
        },
        4 * 2 * 4000 * 2 * 8 * 128,
    ),
    functions.deformable_roi_average_align_2d: (
        {**roi_arguments(256, 100), 'offset': numpy.full((100, 2, 7, 7), 0.3, 'f')},
        4 * 100 * 256 * 49 * 16,
    ),
    functions.deformable_ps_roi_average_pooling_2d: (
        {
            **roi_arguments(256, 100),
            'offset': numpy.full((100, 2, 7, 7), 0.3, 'f'),
            'group_size': 1,
        },
        4 * 100 * 256 * 49 * 16,
    ),
}


@pytest.mark.parametrize('function', CALLS, ids=lambda function: function.__name__)
def test_memory_is_bounded(function, peak_of):
    arguments, samples = CALLS[function]
    variables = {
        name: chainer.Variable(array)
        for name, array in arguments.items()
        if isinstance(array, numpy.ndarray) and not name.startswith('roi')
    }

    def call():
        y = function(**{**arguments, **variables})
        chainer.grad([y], [*variables.values()])

    given = sum(variable.array.nbytes for variable in variables.values())
    room = 4 * given + (24 << 20)
    assert room < samples / 1.5
    assert peak_of(call) < room
