"""Has Chainer repaired and patched in this process, when it is first imported.

Python's site module imports this file at the start, as the first sitecustomize of
PYTHONPATH. Any Python may, so it is written for old ones, too.
"""

import os
import sys

if __name__ == 'sitecustomize':
    if sys.version_info >= (3, 9):  # noqa: UP036
        import chainer_deform_startup

        chainer_deform_startup.install()
    here = os.path.dirname(__file__)
    sys.path[:] = [path for path in sys.path if path != here]
    # The user's own sitecustomize comes in the place of this one. If there is none, the
    # ImportError tells site so, as it would without this file.
    del sys.modules['sitecustomize']
    import sitecustomize  # noqa: F401
