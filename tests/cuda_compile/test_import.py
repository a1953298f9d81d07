"""Where CuPy is installed, but there is no driver, nothing alarming is said."""

import subprocess
import sys

import pytest

from tests.conftest import device_count

pytest.importorskip('cupy', reason='make test-cuda-compile installs CuPy')


@pytest.mark.skipif(device_count(), reason='there is a device')
def test_cupy_without_a_driver(tmp_path):
    code = """
import chainer_deform
import numpy

layer = chainer_deform.links.DeformableConvolution2D(3, 4, 3)
print(layer(numpy.zeros((1, 3, 5, 5), 'f')).shape)
try:
    layer.to_device('@cupy:0')
except RuntimeError as error:
    print('error:', error)
"""
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stderr) == (0, '')
    shape, _, error = result.stdout.partition('\nerror: ')
    assert shape == '(1, 4, 3, 3)'
    assert 'no GPU @cupy:0' in error or 'CUDA environment is not correctly' in error
