import importlib

import pytest

from chainer_deform.sampling import compiler


@pytest.fixture(autouse=True, params=['scipy', 'numba'])
def loops(request, monkeypatch):
    """Every test here runs with either version of the CPU's loops."""
    if request.param == 'numba':
        pytest.importorskip('numba', exc_type=ImportError)
    module = importlib.import_module(f'chainer_deform.sampling.cpu_{request.param}')
    monkeypatch.setattr(compiler, 'loops', lambda: module)
    return module
