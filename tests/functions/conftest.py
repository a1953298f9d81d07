import importlib

import pytest

from chainer_deform.sampling import cpu


@pytest.fixture(autouse=True, params=['scipy', 'numba'])
def primitives(request, monkeypatch):
    """Every test here runs with either version of the CPU's primitives."""
    if request.param == 'numba':
        pytest.importorskip('numba', exc_type=ImportError)
    module = importlib.import_module(f'chainer_deform.sampling.cpu_{request.param}')
    monkeypatch.setattr(cpu, 'primitives', lambda: module)
    return module
