"""Has every process of an environment repair Chainer when it first imports it.

A file ``.pth`` in the environment's folder of packages does it, which Python's ``site``
reads at each start. With it the order of imports does not matter.
"""

from __future__ import annotations

import os
import site
import sysconfig

from chainer_deform import _startup
from chainer_deform._files import replacing

_NAME = 'chainer_deform_enable.pth'

#: One line, as ``site`` executes a line that begins with ``import``. It does nothing
#: where the package is gone.
_LINE = (
    'import os, sys; f = {folder!r}; os.path.isdir(f) and (sys.path.append(f), '
    "__import__('chainer_deform_startup').install(patch=False), sys.path.remove(f))\n"
)


def enable() -> str:
    """Writes the file and returns its path; in the user's folder if it has to be."""
    errors = []
    for path in _places():
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as file:
                file.write(_line().encode())
            return path
        except OSError as e:
            errors.append(e)
    raise errors[0]


def disable() -> list[str]:
    """Removes the files and returns their paths."""
    found = enabled()
    for path in found:
        os.unlink(path)
    return found


def enabled() -> list[str]:
    """The paths of the files that there are."""
    return [path for path in _places() if os.path.isfile(path)]


def is_current(path: str) -> bool:
    """Whether a file is the one that this package would write."""
    with open(path, encoding='utf-8') as file:
        return file.read() == _line()


def _line() -> str:
    return _LINE.format(folder=os.path.dirname(os.path.abspath(_startup.__file__)))


def _places() -> list[str]:
    folders = [sysconfig.get_path('purelib')]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [os.path.join(folder, _NAME) for folder in folders]
