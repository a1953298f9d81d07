"""The images: a training set, a test set, and the same test set warped."""

from __future__ import annotations

import contextlib
import sys

import numpy
from scipy import ndimage

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer.datasets import TupleDataset

DATASETS = ('digits', 'mnist', 'fashion-mnist')

#: How far the warped images may be from upright ones.
MAX_ROTATION = 30.0  # degrees, to either side
SCALES = 0.7, 1.2
MAX_SHEAR = 0.3  # pixels to the side per pixel of height

#: Split and warps are the same in every run, so that runs can be compared.
DATA_SEED = 0
DIGITS_TEST_SIZE = 500


def load_datasets(name: str) -> tuple[TupleDataset, TupleDataset, TupleDataset]:
    """Returns the training set, the test set and the warped test set.

    Images are float32 in [0, 1] of shape ``(1, 28, 28)``, labels are int32.
    """
    if name == 'digits':
        train, test = load_digits()
    else:
        get = getattr(chainer.datasets, 'get_' + name.replace('-', '_'))
        # Chainer announces its downloads on stderr, which is for errors here.
        with contextlib.redirect_stderr(sys.stdout):
            train, test = get(ndim=3)
    images, labels = chainer.dataset.concat_examples(test)
    return train, test, TupleDataset(warp(images), labels)


def load_digits() -> tuple[TupleDataset, TupleDataset]:
    """Returns the 1797 digits that ship inside scikit-learn, split in two."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    # The digits fill their 8 x 8 pixels: a blank border, then 10 -> 28.
    images = numpy.pad(digits.images / 16, ((0, 0), (1, 1), (1, 1)))
    images = ndimage.zoom(images, (1, 2.8, 2.8), order=1)
    train_x, test_x, train_t, test_t = sklearn.model_selection.train_test_split(
        images[:, None].astype(numpy.float32),
        digits.target.astype(numpy.int32),
        test_size=DIGITS_TEST_SIZE,
        random_state=DATA_SEED,
        stratify=digits.target,
    )
    return TupleDataset(train_x, train_t), TupleDataset(test_x, test_t)


def warp(images: numpy.ndarray) -> numpy.ndarray:
    """Rotates, scales and shears each image at random about its centre.

    Args:
        images: Images of shape ``(n, 1, h, w)``.

    Returns:
        The warped images, the same in every run.

    """
    random = numpy.random.RandomState(DATA_SEED)
    centre = (numpy.array(images.shape[2:]) - 1) / 2
    warped = numpy.empty_like(images)
    for source, target in zip(images[:, 0], warped[:, 0]):
        angle = numpy.deg2rad(random.uniform(-MAX_ROTATION, MAX_ROTATION))
        shear = random.uniform(-MAX_SHEAR, MAX_SHEAR)
        cos, sin = numpy.cos(angle), numpy.sin(angle)
        forward = numpy.array([[cos, -sin], [sin, cos]]) @ [[1, 0], [shear, 1]]
        # affine_transform wants the way back, from the target to the source.
        back = numpy.linalg.inv(forward * random.uniform(*SCALES))
        ndimage.affine_transform(
            source, back, centre - back @ centre, output=target, order=1
        )
    return warped
