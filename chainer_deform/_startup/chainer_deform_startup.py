"""Repairs Chainer, and patches it, when a process first imports it.

:func:`install` runs at the start of processes of which most never import Chainer. So
this file is outside of chainer_deform, which imports Chainer, and imports nothing else
before Chainer is wanted.
"""

import os
import sys

#: Environment variable with the :func:`identity` of the Python that set it.
PYTHON = 'CHAINER_DEFORM_PYTHON'


def install(patch=True):
    """Has the first import of Chainer or this package repair it, and patch it."""
    _Finder.patch = _Finder.patch or patch
    if 'chainer_deform' not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def identity():
    """A text that differs from Python to Python, and between their environments."""
    return f'{sys.version_info[0]}.{sys.version_info[1]} {sys.prefix}'


class _Finder:
    """A finder for sys.meta_path: the specs of the others, with changed loaders."""

    patch = False

    @staticmethod
    def find_spec(name, path=None, target=None):
        load = _LOADS.get(name)
        spec = load and _find_spec(name, path, target)
        if not hasattr(getattr(spec, 'loader', None), 'exec_module'):
            return None
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: load(module, execute)
        return spec


def _find_spec(name, path=None, target=None):
    for finder in sys.meta_path:
        if finder is not _Finder and hasattr(finder, 'find_spec'):
            spec = finder.find_spec(name, path, target)
            # One without an origin is a folder without Python files.
            if spec is not None and spec.origin is not None:
                return spec
    if name == 'chainer_deform' and os.environ.get(PYTHON) == identity():
        # The parent process found it by its sys.path, which this process hasn't.
        from importlib.machinery import PathFinder

        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return PathFinder.find_spec(name, [os.path.dirname(package)])
    return None


def _load_chainer(module, execute):
    """Imports chainer_deform, and with it Chainer, in the place of this module.

    The import system takes what is in sys.modules then. Where there is no
    chainer_deform, Chainer is loaded as ever.
    """
    if _find_spec('chainer_deform') is None:
        sys.meta_path.remove(_Finder)
        execute(module)
        return
    del sys.modules['chainer']
    import chainer_deform  # noqa: F401


def _load_chainer_deform(module, execute):
    sys.meta_path.remove(_Finder)
    try:
        execute(module)
    except BaseException:
        sys.meta_path.insert(0, _Finder)
        raise
    if _Finder.patch:
        module.patch_chainer()


_LOADS = {'chainer': _load_chainer, 'chainer_deform': _load_chainer_deform}
