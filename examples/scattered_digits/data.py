"""The scenes: digits scattered over clutter, and which digit each pixel shows."""

from __future__ import annotations

from typing import NamedTuple

import numpy
from scipy import ndimage

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

from chainer.datasets import TupleDataset

#: A class for each digit, and one for all that is no digit.
CLASSES = (*'0123456789', 'background')
BACKGROUND = 10

#: One more than a multiple of 4: both strides of the models keep the corner pixels in
#: the corners, where the upsampling expects them.
SIZE = 97
ZOOM = 3  # pixels of a scene per pixel of a digit: 8 x 8 -> 24 x 24
PLACES = 20  # tried in each scene; a digit comes where there is room for it
DISTANCE = 30  # at least, between the middles of two digits
BORDER = 12  # at least, between the middle of a digit and the edge of the scene
CLUTTER = 12  # pieces in each scene
PIECE = 4  # the side of a piece, in pixels of a digit
NOISE = 0.08  # standard deviation
INK = 0.4  # what is brighter belongs to the digit
MARGIN = 24  # of the canvas around a scene, so that digits may reach over its edge

#: The scenes are the same in every run, so that runs can be compared.
TRAIN_SEED, TEST_SEED = 0, 1


class Warps(NamedTuple):
    """How far each digit is warped at most."""

    rotation: float  # degrees, to either side
    scale: float  # a factor, larger and smaller


#: The test scenes; training scenes are upright.
CONDITIONS = {
    'upright': Warps(rotation=0, scale=1),
    'rotated': Warps(rotation=45, scale=1),
    'scaled': Warps(rotation=0, scale=1.5),
    'both': Warps(rotation=45, scale=1.5),
}


class Digits(NamedTuple):
    """Digits to make scenes of."""

    images: numpy.ndarray  # (n, 8, 8), from 0, which is blank, to 1
    classes: numpy.ndarray  # (n,)


def load_datasets(
    train_scenes: int, test_scenes: int
) -> tuple[TupleDataset, dict[str, TupleDataset]]:
    """Returns the scenes to train on, and those to test on in each condition.

    The test scenes of all conditions have the same digits at the same places, over the
    same clutter. No digit in them is in a training scene.

    Images are float32 in [0, 1] of shape ``(1, 97, 97)``. Labels are int32 of shape
    ``(97, 97)``: the place of the pixel's class in :data:`CLASSES`.
    """
    train, test = load_digits()
    tests = {
        name: compose(test, warps, test_scenes, TEST_SEED)
        for name, warps in CONDITIONS.items()
    }
    return compose(train, CONDITIONS['upright'], train_scenes, TRAIN_SEED), tests


def load_digits() -> tuple[Digits, Digits]:
    """Returns the 1797 digits that ship inside scikit-learn, every fourth to test."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    test = numpy.arange(len(digits.images)) % 4 == 3
    train, test = (
        Digits(digits.images[chosen] / 16, digits.target[chosen])
        for chosen in (~test, test)
    )
    return train, test


def compose(digits: Digits, warps: Warps, scenes: int, seed: int) -> TupleDataset:
    """Returns scenes of random digits at random places, warped at random.

    Args:
        digits: The digits, of which the clutter is made, too.
        warps: How far they are warped at most. All else depends on the seed alone.
        scenes: How many scenes.
        seed: Of the random numbers.

    """
    random = numpy.random.RandomState(seed)
    images = numpy.empty((scenes, 1, SIZE, SIZE), numpy.float32)
    labels = numpy.empty((scenes, SIZE, SIZE), numpy.int32)
    inside = slice(MARGIN, MARGIN + SIZE)
    canvas = numpy.empty((SIZE + 2 * MARGIN,) * 2)
    classes = numpy.empty(canvas.shape, int)
    for image, label in zip(images, labels):
        canvas[...] = 0
        classes[...] = BACKGROUND
        for place in random.randint(0, SIZE, (CLUTTER, 2)):
            piece = cut(digits.images[random.randint(len(digits.images))], random)
            draw(canvas, warp(piece, 0, 1), place, random.uniform(0.5, 1))
        for place in scatter(random):
            number = random.randint(len(digits.images))
            angle = random.uniform(-1, 1) * warps.rotation
            scale = warps.scale ** random.uniform(-1, 1)
            ink = warp(digits.images[number], angle, scale)
            window = draw(canvas, ink, place, random.uniform(0.5, 1))
            classes[window][ink > INK] = digits.classes[number]
        noise = random.normal(0, NOISE, canvas.shape)
        image[0] = numpy.clip(canvas + noise, 0, 1)[inside, inside]
        label[...] = classes[inside, inside]
    return TupleDataset(images, labels)


def scatter(random: numpy.random.RandomState) -> list[numpy.ndarray]:
    """Returns random places ``(y, x)`` in a scene, none close to another."""
    places = []
    for place in random.randint(BORDER, SIZE - BORDER, (PLACES, 2)):
        if all(numpy.hypot(*(place - other)) >= DISTANCE for other in places):
            places.append(place)
    return places


def cut(image: numpy.ndarray, random: numpy.random.RandomState) -> numpy.ndarray:
    """Returns a random square piece of a digit."""
    y, x = random.randint(0, len(image) - PIECE + 1, 2)
    return image[y : y + PIECE, x : x + PIECE]


def warp(image: numpy.ndarray, angle: float, scale: float) -> numpy.ndarray:
    """Returns an image of side ``2 * MARGIN + 1`` that has the digit in its middle.

    Args:
        image: The digit.
        angle: By how many degrees it is turned clockwise.
        scale: How large it becomes; at 1, a pixel becomes ``ZOOM`` pixels.

    """
    angle = numpy.deg2rad(angle)
    cos, sin = numpy.cos(angle), numpy.sin(angle)
    # affine_transform wants the way back, from the new image to the digit.
    back = numpy.array([[cos, -sin], [sin, cos]]) / (ZOOM * scale)
    shift = (len(image) - 1) / 2 - back @ (MARGIN, MARGIN)
    side = 2 * MARGIN + 1
    return ndimage.affine_transform(image, back, shift, (side, side), order=1)


def draw(
    canvas: numpy.ndarray, ink: numpy.ndarray, place: numpy.ndarray, brightness: float
) -> tuple[slice, slice]:
    """Draws a warped digit over a canvas, and returns the window where it is."""
    # Pixel (y, x) of the scene is (y + MARGIN, x + MARGIN) of the canvas.
    window = tuple(slice(start, start + len(ink)) for start in place)
    canvas[window] += ink * (brightness - canvas[window])
    return window
