import os

# One thread a process: pytest runs one process a core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import pytest

import chainer_deform  # noqa: F401  (repairs Chainer before any test imports it)


def device_count() -> int:
    from chainer.backends.cuda import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, no library, no driver
        return 0


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker('gpu')]
    if marked and not device_count():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason='there is no CUDA device'))
