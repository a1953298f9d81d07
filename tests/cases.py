"""The geometries that every backend is tested with, and random arrays for them."""

from __future__ import annotations

import dataclasses

import numpy

from chainer_deform.geometry import Geometry


@dataclasses.dataclass
class Case:
    """One geometry; all of them are asymmetric, so that swapped axes cannot hide."""

    n: int = 2
    c: int = 3
    out_c: int = 4
    size: tuple[int, int] = (5, 7)
    ksize: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilate: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False
    bias: bool = True

    @property
    def options(self) -> dict:
        return {
            name: getattr(self, name)
            for name in ('stride', 'pad', 'dilate', 'groups', 'offset_groups')
        }

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.ksize, **self.options)

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(
            (size + 2 * pad - dilate * (ksize - 1) - 1) // stride + 1
            for size, ksize, stride, pad, dilate in zip(
                self.size, self.ksize, self.stride, self.pad, self.dilate
            )
        )

    def arrays(self, dtype='float64', offset_dtype=None, seed=0) -> dict:
        """Random arguments by name. The points are up to 2 pixels off the grid, and 0.1
        or more clear of lattice lines."""
        random = numpy.random.RandomState(seed)
        taps = self.offset_groups * self.ksize[0] * self.ksize[1]
        offset_shape = (self.n, 2 * taps, *self.out_size)
        arrays = {
            'x': random.uniform(-1, 1, (self.n, self.c, *self.size)),
            'offset': (
                random.randint(-2, 2, offset_shape)
                + random.uniform(0.1, 0.9, offset_shape)
            ),
            'W': random.uniform(
                -1, 1, (self.out_c, self.c // self.groups, *self.ksize)
            ),
        }
        if self.mask:
            arrays['mask'] = random.uniform(0, 2, (self.n, taps, *self.out_size))
        if self.bias:
            arrays['b'] = random.uniform(-1, 1, self.out_c)
        dtypes = dict.fromkeys(('offset', 'mask'), offset_dtype or dtype)
        return {
            name: array.astype(dtypes.get(name, dtype))
            for name, array in arrays.items()
        }

    def gy(self, dtype='float64', seed=1):
        shape = (self.n, self.out_c, *self.out_size)
        return numpy.random.RandomState(seed).uniform(-1, 1, shape).astype(dtype)


CASES = {
    'plain': Case(),
    'no bias': Case(bias=False),
    'stride, pad': Case(size=(6, 9), stride=(2, 1), pad=(1, 3)),
    'dilate': Case(size=(7, 8), dilate=(2, 3), pad=(2, 1), stride=(1, 2)),
    'mask': Case(mask=True, pad=(0, 1)),
    'groups': Case(c=6, out_c=4, groups=2, pad=(1, 0)),
    'offset groups': Case(c=6, offset_groups=3, pad=(1, 0), mask=True),
    'all': Case(
        n=3,
        c=6,
        out_c=4,
        size=(6, 5),
        ksize=(2, 3),
        stride=(2, 1),
        pad=(1, 2),
        dilate=(3, 2),
        groups=2,
        offset_groups=3,
        mask=True,
    ),
    'depthwise': Case(c=4, out_c=8, groups=4, offset_groups=2, pad=(1, 1)),
    '1 x 1 kernel': Case(ksize=(1, 1), stride=(2, 3)),
    '1 x 1 image': Case(size=(1, 1), pad=(1, 2), mask=True),
    'one column': Case(size=(6, 1), ksize=(3, 1), pad=(2, 0)),
    'large pad': Case(size=(3, 2), pad=(4, 5), stride=(3, 4)),
    'large kernel': Case(
        n=1, c=2, out_c=2, size=(31, 40), ksize=(30, 28), stride=(10, 9), pad=(7, 3)
    ),
    'empty batch': Case(n=0, mask=True),
}

#: Channels that fill vectors and panels of the products, and some beyond them.
WIDE_CASES = {
    'outputs': Case(
        n=1, c=20, out_c=35, size=(4, 3), ksize=(2, 1), pad=(0, 1), mask=True
    ),
    'groups': Case(
        n=2, c=14, out_c=74, size=(2, 3), ksize=(1, 2), groups=2, offset_groups=7
    ),
    'depthwise': Case(
        n=1, c=35, out_c=70, size=(3, 4), ksize=(2, 2), groups=35, offset_groups=5
    ),
    'inputs': Case(n=1, c=67, out_c=17, size=(2, 4), ksize=(1, 2), stride=(1, 2)),
}


@dataclasses.dataclass
class SumCase:
    """Shapes and options of a sampled sum, asymmetric like those of a :class:`Case`."""

    n: int = 2
    c: int = 6
    size: tuple[int, int] = (5, 7)
    q: int = 8
    groups: int = 1
    points: int = 3
    indices: tuple[int, ...] | None = None
    border: str = 'zero'

    @property
    def options(self) -> dict:
        indices = None if self.indices is None else numpy.array(self.indices, int)
        return {'indices': indices, 'border': self.border}

    def arrays(self, dtype='float64', location_dtype=None, seed=0) -> dict:
        """Random arguments by name. The points are up to 2 pixels outside the image,
        and 0.1 or more clear of lattice lines."""
        random = numpy.random.RandomState(seed)
        shape = self.q, self.groups, self.points
        cells = [random.randint(-2, size + 1, shape) for size in self.size]
        locations = numpy.stack(cells, -1) + random.uniform(0.1, 0.9, (*shape, 2))
        return {
            'x': random.uniform(-1, 1, (self.n, self.c, *self.size)).astype(dtype),
            'locations': locations.astype(location_dtype or dtype),
            'weights': random.uniform(-1, 1, shape).astype(location_dtype or dtype),
        }

    def gy(self, dtype='float64', seed=1):
        random = numpy.random.RandomState(seed)
        return random.uniform(-1, 1, (self.q, self.c)).astype(dtype)


SUM_CASES = {
    f'{name}, {border}': dataclasses.replace(case, border=border)
    for name, case in {
        'plain': SumCase(),
        'groups': SumCase(groups=3),
        'one channel a group': SumCase(n=1, c=4, q=7, groups=4),
        # In no order, of images 1 and 3 nothing.
        'indices': SumCase(n=5, groups=2, indices=(4, 0, 2, 2, 0, 4, 2, 4)),
        'one point': SumCase(points=1, q=12),
        'many points': SumCase(n=1, c=20, size=(9, 4), q=3, groups=2, points=25),
        '1 x 1 image': SumCase(size=(1, 1), groups=2),
        'one row': SumCase(size=(1, 6)),
        'one column': SumCase(size=(6, 1)),
        'no positions': SumCase(q=0, groups=2),
        'no positions, indices': SumCase(q=0, indices=()),
        'no images': SumCase(n=0, q=0, groups=2),
    }.items()
    for border in ('zero', 'clamp')
}

#: Gradients that may be asked for together.
WANTED = [
    ('x',),
    ('offset',),
    ('mask',),
    ('W',),
    ('b',),
    ('offset', 'mask'),
    ('W', 'b'),
    ('x', 'b'),
    ('mask', 'W'),
]

#: Offsets (y, x) that move a tap of a small image outside of it.
OFFSETS_TO_OUTSIDE = [
    (numpy.inf, 0.5),
    (0.5, -numpy.inf),
    (-3.5, 0.25),
    (0.25, 7.5),
    (-1e9, 1e9),
]

#: Largest error, relative to the largest number expected: a rounding for float16, whose
#: sums are float32, and about 100 for the others.
TOLERANCES = {'float16': 1e-3, 'float32': 1e-5, 'float64': 2e-14}


def assert_close(actual, expected, name: str, dtype=None) -> None:
    """Compares under the tolerance of ``dtype``, by default that of ``actual``."""
    assert actual.shape == expected.shape, name
    scale = max(
        1,
        numpy.abs(
            expected, where=numpy.isfinite(expected), out=numpy.zeros(expected.shape)
        ).max(initial=0),
    )
    numpy.testing.assert_allclose(
        actual.astype('float64'),
        expected.astype('float64'),
        rtol=0,
        atol=TOLERANCES[str(dtype or actual.dtype)] * scale,
        err_msg=name,
    )


def infinity_as_nan(array):
    """For sums of infinities: the order of a sum decides which of the two it is."""
    return numpy.where(numpy.isfinite(array), array, numpy.nan)
