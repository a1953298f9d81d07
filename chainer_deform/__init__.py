"""Deformable convolution for Chainer, on today's Python and NumPy."""

from chainer_deform import _compat as _compat  # isort: skip  (repairs Chainer first)

from chainer_deform import (
    convert,
    extensions,
    functions,
    link_hooks,
    links,
    onnx_export,
    optimizer_hooks,
    visualize,
)
from chainer_deform._patch import patch_chainer, unpatch_chainer
from chainer_deform._version import __version__
from chainer_deform.locations import receptive_points, sampling_locations

__all__ = [
    '__version__',
    'convert',
    'extensions',
    'functions',
    'link_hooks',
    'links',
    'onnx_export',
    'optimizer_hooks',
    'patch_chainer',
    'receptive_points',
    'sampling_locations',
    'unpatch_chainer',
    'visualize',
]
