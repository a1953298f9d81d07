"""The operators on the GPU path, emulated: they have nothing of their own there."""

import importlib

import numpy
import pytest

from chainer_deform import functions
from chainer_deform.sampling import cuda
from tests import emulator
from tests.functions import (
    test_dcn_v3_2d,
    test_deformable_ps_roi_average_pooling_2d,
    test_deformable_roi_average_align_2d,
    test_multi_scale_deformable_attention,
)
from tests.functions.operators import check_first_order

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason='the emulator needs a C++ compiler'
)

CALLS = {
    functions.dcn_v3_2d: test_dcn_v3_2d.arguments(*test_dcn_v3_2d.CASES['no centre']),
    functions.deformable_roi_average_align_2d: (
        test_deformable_roi_average_align_2d.arguments(
            test_deformable_roi_average_align_2d.CASES['no ratio']
        )
    ),
    functions.deformable_ps_roi_average_pooling_2d: (
        test_deformable_ps_roi_average_pooling_2d.arguments(
            *test_deformable_ps_roi_average_pooling_2d.CASES['few parts']
        )
    ),
    functions.multi_scale_deformable_attention: (
        test_multi_scale_deformable_attention.arguments(
            test_multi_scale_deformable_attention.CASES['plain']
        )
    ),
}


@pytest.fixture(autouse=True)
def loops():
    """The CPU's loops take no part."""


@pytest.mark.parametrize('function', CALLS, ids=lambda function: function.__name__)
def test_output_and_gradients(function, monkeypatch):
    emulator.emulate(monkeypatch)
    module = importlib.import_module('chainer_deform.functions.sampled_sum_2d')
    monkeypatch.setattr(module, 'cpu', cuda)
    with numpy.errstate(all='ignore'):  # as on a GPU
        check_first_order(function, *CALLS[function])
