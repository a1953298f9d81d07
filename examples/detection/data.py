"""The scenes: turned and scaled digits over textures and pieces of other digits."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy
from scipy import ndimage

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

from chainer.datasets import TupleDataset

#: Photographs that ship inside scikit-image.
TEXTURES = 'brick.png', 'grass.png', 'gravel.png'

SIZE = 96  # of a scene, in pixels
MOST_DIGITS = 5  # in a scene, and at least 2 are tried
PIECES = 8  # of other digits, in a scene
PITCHES = 2.0, 4.5  # pixels of the scene to a pixel of a digit, which has 8 x 8
MAX_ROTATION = 45.0  # degrees, to either side
FAINTEST = 0.1  # pixels that a digit covers less than this are not part of it

TEST_DIGITS, TEST_SCENES = 500, 200

#: Split and scenes are the same in every run, so that runs can be compared.
SPLIT_SEED, TRAIN_SEED, TEST_SEED = 0, 1, 2


def load_datasets(scenes: int) -> tuple[TupleDataset, TupleDataset]:
    """Returns ``scenes`` to train on, and the scenes to test on.

    They share no digit and no pixel of a texture: training scenes show the left halves
    of the textures, test scenes the right halves.

    An example is an image, float32 in [0, 1] of shape ``(1, 96, 96)``; the boxes
    ``(y_min, x_min, y_max, x_max)`` of its digits, float32 of shape ``(digits, 4)``;
    and which digits these are, int32 of shape ``(digits,)``.
    """
    train, test = load_digits()
    textures = load_textures()
    middle = textures[0].shape[1] // 2
    return (
        compose(*train, [t[:, :middle] for t in textures], scenes, TRAIN_SEED),
        compose(*test, [t[:, middle:] for t in textures], TEST_SCENES, TEST_SEED),
    )


def load_digits() -> tuple[tuple, tuple]:
    """Returns images ``(n, 8, 8)`` in [0, 1] and labels to train on, and to test on."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    train_x, test_x, train_t, test_t = sklearn.model_selection.train_test_split(
        digits.images / 16,
        digits.target,
        test_size=TEST_DIGITS,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    return (train_x, train_t), (test_x, test_t)


def load_textures() -> list[numpy.ndarray]:
    """Returns the textures in [0, 1], at half their size: 256 x 256 pixels."""
    import skimage.data
    import skimage.io

    directory = pathlib.Path(skimage.data.__file__).parent
    textures = []
    for name in TEXTURES:
        texture = skimage.io.imread(directory / name).astype(float)
        # (512, 512) -> (256, 2, 256, 2)
        texture = texture.reshape(256, 2, 256, 2).mean(axis=(1, 3))
        textures.append((texture - texture.min()) / numpy.ptp(texture))
    return textures


def compose(
    digits: numpy.ndarray,
    labels: numpy.ndarray,
    textures: Sequence[numpy.ndarray],
    scenes: int,
    seed: int,
) -> TupleDataset:
    """Returns scenes of digits that do not overlap.

    Args:
        digits: What to draw from, ``(n, 8, 8)`` in [0, 1].
        labels: Which digits these are, ``(n,)``.
        textures: What to take the background from, each ``(h, w)`` in [0, 1].
        scenes: How many scenes.
        seed: Of the random numbers. The first scenes are the same, however many.

    """
    random = numpy.random.RandomState(seed)
    examples = []
    for _ in range(scenes):
        image = background(textures[random.randint(len(textures))], random)
        for digit in digits[random.randint(len(digits), size=PIECES)]:
            y, x = random.randint(5, size=2)
            piece = render(digit[y : y + 4, x : x + 4], random)
            if piece is not None:
                paint(
                    image,
                    piece,
                    random.randint(SIZE - numpy.array(piece.shape)),
                    random,
                )
        boxes, shown = [], []
        for number in random.randint(
            len(digits), size=random.randint(2, MOST_DIGITS + 1)
        ):
            digit = render(digits[number], random)
            size = numpy.array(digit.shape)
            for _ in range(20):  # else there is no room for it
                low = random.randint(SIZE - size + 1)
                if not any(overlap(box, [*low, *low + size]) for box in boxes):
                    paint(image, digit, low, random)
                    boxes.append([*low, *low + size])
                    shown.append(labels[number])
                    break
        examples.append(
            (
                image[None].astype(numpy.float32),
                numpy.array(boxes, numpy.float32),
                numpy.array(shown, numpy.int32),
            )
        )
    return TupleDataset(*zip(*examples))


def background(
    texture: numpy.ndarray, random: numpy.random.RandomState
) -> numpy.ndarray:
    """Returns a part of a texture, turned by quarters and with a random contrast."""
    y, x = random.randint(numpy.array(texture.shape) - SIZE + 1)
    part = numpy.rot90(texture[y : y + SIZE, x : x + SIZE], random.randint(4))
    contrast = random.uniform(0.3, 0.6)
    return contrast * part + random.uniform(0, 0.6 - contrast)


def render(
    digit: numpy.ndarray, random: numpy.random.RandomState
) -> numpy.ndarray | None:
    """Turns and scales a digit at random, and cuts off what is around it.

    Returns:
        How much of each pixel of the scene it covers; None if that is nothing.

    """
    angle = numpy.deg2rad(random.uniform(-MAX_ROTATION, MAX_ROTATION))
    pitch = numpy.exp(random.uniform(*numpy.log(PITCHES)))
    cos, sin = numpy.cos(angle), numpy.sin(angle)
    back = numpy.array([[cos, -sin], [sin, cos]]) / pitch
    # Large enough for the digit turned by 45 degrees, and a border.
    shape = 2 * [int((max(digit.shape) + 1) * pitch * 2**0.5)]
    centre, new_centre = ((numpy.array(s) - 1) / 2 for s in (digit.shape, shape))
    cover = ndimage.affine_transform(
        digit,
        back,
        centre - back @ new_centre,
        output_shape=shape,
        order=1,
        mode='grid-constant',  # fades beyond the outermost pixels
    )
    cover = (2 * cover - 0.5).clip(0, 1)  # sharpens its edges
    cover[cover < FAINTEST] = 0
    rows, columns = (numpy.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def paint(
    image: numpy.ndarray,
    cover: numpy.ndarray,
    low: numpy.ndarray,
    random: numpy.random.RandomState,
) -> None:
    """Paints a digit, or a piece of one, with its upper left corner at ``low``."""
    (y, x), (h, w) = low, cover.shape
    place = image[y : y + h, x : x + w]
    place += cover * (random.uniform(0.7, 1) - place)


def overlap(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two boxes have a pixel in common."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
