import os

# One thread a process: pytest runs one process a core.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import chainer_deform  # noqa: F401  (repairs Chainer before any test imports it)
