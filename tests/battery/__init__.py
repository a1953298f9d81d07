"""Every function of Chainer, on two NumPys: ``make test-numpy``."""

import chainer_deform  # noqa: F401  (repairs Chainer before anything here imports it)
