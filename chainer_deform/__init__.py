"""Deformable convolution for Chainer, on today's Python and NumPy."""

from chainer_deform import _compat as _compat  # isort: skip  (repairs Chainer first)

from chainer_deform import functions, links, optimizer_hooks
from chainer_deform._patch import patch_chainer, unpatch_chainer
from chainer_deform._version import __version__

__all__ = [
    '__version__',
    'functions',
    'links',
    'optimizer_hooks',
    'patch_chainer',
    'unpatch_chainer',
]
