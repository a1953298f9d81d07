"""The scenes: warped photographs side by side, and which one each pixel shows."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from scipy import ndimage

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

from chainer.datasets import TupleDataset

#: The classes, and their photographs, which ship inside scikit-image.
PHOTOGRAPHS = {
    'brick': 'brick.png',
    'grass': 'grass.png',
    'gravel': 'gravel.png',
    'tissue': 'ihc.png',
}

#: One more than a multiple of 4: both strides of the models keep the corner pixels in
#: the corners, where the upsampling expects them.
SIZE = 97
REGIONS = 6  # in each scene
TEST_SCENES = 100

#: The scenes are the same in every run, so that runs can be compared.
TRAIN_SEED, TEST_SEED = 0, 1


class Warps(NamedTuple):
    """How far photographs are warped at most."""

    rotation: float  # degrees, to either side
    scale: float  # a factor, larger and smaller
    shear: float  # pixels to the side per pixel of height
    tilt: float  # change of scale, as a part of it, per 100 pixels


MILD = Warps(rotation=15, scale=1.25, shear=0.1, tilt=0.1)
STRONG = Warps(rotation=90, scale=1.7, shear=0.4, tilt=0.4)


def load_datasets(scenes: int) -> tuple[TupleDataset, TupleDataset, TupleDataset]:
    """Returns ``scenes`` to train on, and the mild and the strong scenes to test on.

    Training scenes show the left halves of the photographs, the others the right
    halves. The strong scenes are the mild ones, warped further.

    Images are float32 in [0, 1] of shape ``(1, 97, 97)``. Labels are int32 of shape
    ``(97, 97)``: the place of the pixel's photograph in :data:`PHOTOGRAPHS`.
    """
    photographs = load_photographs()
    middle = photographs[0].shape[1] // 2
    left = [equalise(photograph[:, :middle]) for photograph in photographs]
    right = [equalise(photograph[:, middle:]) for photograph in photographs]
    return (
        compose(left, MILD, scenes, TRAIN_SEED),
        compose(right, MILD, TEST_SCENES, TEST_SEED),
        compose(right, STRONG, TEST_SCENES, TEST_SEED),
    )


def load_photographs() -> list[numpy.ndarray]:
    """Returns the photographs in grey and at half their size: 256 x 256 pixels."""
    import skimage.data
    import skimage.io

    directory = pathlib.Path(skimage.data.__file__).parent
    photographs = []
    for name in PHOTOGRAPHS.values():
        photograph = skimage.io.imread(directory / name)
        if photograph.ndim == 3:
            photograph = photograph.mean(axis=2)
        # (h, w) -> (h / 2, 2, w / 2, 2)
        h, w = photograph.shape
        halved = photograph.reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3))
        photographs.append(halved)
    return photographs


def equalise(image: numpy.ndarray) -> numpy.ndarray:
    """Spreads grey values evenly over [0, 1]: they tell no photograph from another."""
    values, inverse, counts = numpy.unique(
        image, return_inverse=True, return_counts=True
    )
    rank = (numpy.cumsum(counts) - 1) / (image.size - 1)
    return rank[inverse].reshape(image.shape)


def compose(
    textures: Sequence[numpy.ndarray], warps: Warps, scenes: int, seed: int
) -> TupleDataset:
    """Returns scenes of regions that each show a part of a warped texture.

    A region is what lies closer to its site, a random place, than to the others. With
    the same seed there are the same regions, however far the textures are warped.
    """
    random = numpy.random.RandomState(seed)
    pixels = numpy.indices((SIZE, SIZE)).reshape(2, -1)
    images = numpy.empty((scenes, SIZE * SIZE), numpy.float32)
    labels = numpy.empty((scenes, SIZE * SIZE), numpy.int32)
    for image, label in zip(images, labels):
        sites = random.uniform(0, SIZE, (REGIONS, 2, 1))
        nearest = ((pixels - sites) ** 2).sum(axis=1).argmin(axis=0)
        for i, site in enumerate(sites):
            inside = nearest == i
            number = random.randint(len(textures))
            texture = textures[number]
            points = warp(pixels[:, inside] - site, warps, random)
            points += random.uniform(size=(2, 1)) * numpy.reshape(texture.shape, (2, 1))
            # Beyond its edges a texture goes on as its own mirror image.
            values = ndimage.map_coordinates(texture, points, order=1, mode='mirror')
            contrast = random.uniform(0.6, 1)
            image[inside] = contrast * values + random.uniform(0, 1 - contrast)
            label[inside] = number
    shape = scenes, 1, SIZE, SIZE
    return TupleDataset(images.reshape(shape), labels.reshape(scenes, SIZE, SIZE))


def warp(
    points: numpy.ndarray, warps: Warps, random: numpy.random.RandomState
) -> numpy.ndarray:
    """Rotates, scales, shears and tilts at random, about ``(0, 0)``.

    Args:
        points: Places ``(y, x)`` in the scene, of shape ``(2, n)``.
        warps: How far at most.
        random: Where the random numbers come from.

    Returns:
        The places in the texture that are seen there, of shape ``(2, n)``.

    """
    angle = numpy.deg2rad(random.uniform(-1, 1) * warps.rotation)
    scale = warps.scale ** random.uniform(-1, 1)
    shear = random.uniform(-1, 1) * warps.shear
    tilt = random.uniform(-1, 1, 2) * warps.tilt / 100
    cos, sin = numpy.cos(angle), numpy.sin(angle)
    forward = scale * numpy.array([[cos, -sin], [sin, cos]]) @ [[1, 0], [shear, 1]]
    # The divisor of a perspective. It stays positive over a whole scene.
    return numpy.linalg.inv(forward) @ points / (1 + tilt @ points)
