"""The operators against compositions of what torch and torchvision have."""

import json

import numpy
import pytest

from chainer_deform import functions
from tests.cases import assert_close
from tests.functions import (
    test_dcn_v3_2d,
    test_deformable_roi_average_align_2d,
    test_multi_scale_deformable_attention,
    torch_process,
)
from tests.functions.operators import random_like, run
from tests.processes import run_with_torch


def calls() -> dict:
    """For each case the function, its arrays, and its options."""
    calls = {}
    for name, (case, more) in test_dcn_v3_2d.CASES.items():
        arguments = test_dcn_v3_2d.arguments(case, more)
        calls[f'DCNv3, {name}'] = functions.dcn_v3_2d, *arguments
    for name, case in test_multi_scale_deformable_attention.CASES.items():
        arguments = test_multi_scale_deformable_attention.arguments(case)
        calls[f'attention, {name}'] = (
            functions.multi_scale_deformable_attention,
            *arguments,
        )
    for outsize, ratio, gamma in ((2, 3), 2, 0.3), ((3, 1), 1, -0.37), (1, 3, 0.1):
        options = {'outsize': outsize, 'sampling_ratio': ratio, 'gamma': gamma}
        arguments = test_deformable_roi_average_align_2d.arguments(
            {**options, 'spatial_scale': 0.6}
        )
        calls[f'RoI align, {outsize}'] = (
            functions.deformable_roi_average_align_2d,
            *arguments,
        )
    # Empty arrays are no matter of a peer.
    return {
        name: call
        for name, call in calls.items()
        if all(array.size for array in call[1].values())
    }


CALLS = calls()


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """Outputs and gradients by ``case|name``."""
    folder = tmp_path_factory.mktemp('torch')
    described, arrays = {}, {}
    for name, (function, of_case, options) in CALLS.items():
        constants = {k: v for k, v in options.items() if isinstance(v, numpy.ndarray)}
        options = {k: v for k, v in options.items() if k not in constants}
        moving = list(of_case)
        if constants:  # boxes: theirs have no gradient
            moving.remove('offset')
        described[name] = function.__name__, options, moving
        gy = random_like(run(function, of_case, {**options, **constants}))
        for key, array in {**of_case, **constants, 'gy': gy}.items():
            arrays[f'{name}|{key}'] = array
    (folder / 'calls.json').write_text(json.dumps(described))
    numpy.savez(folder / 'in.npz', **arrays)
    paths = (folder / name for name in ('calls.json', 'in.npz', 'out.npz'))
    run_with_torch(torch_process, *paths)
    with numpy.load(folder / 'out.npz') as archive:
        return dict(archive)


@pytest.mark.parametrize('name', CALLS)
def test_torch(theirs, name):
    function, arrays, options = CALLS[name]
    y, gradients = run(function, arrays, options, random_like(theirs[f'{name}|y']))
    found = {'y': y, **gradients}
    compared = {
        key.split('|')[1]: array
        for key, array in theirs.items()
        if key.startswith(f'{name}|')
    }
    assert compared.keys() >= {'y', *(arrays.keys() - {'offset'})}
    for key, expected in compared.items():
        assert_close(found[key], expected, key)
