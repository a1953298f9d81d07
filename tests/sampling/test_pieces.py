"""How work is cut."""

import hypothesis
import numpy
import pytest
from hypothesis import strategies as st

from chainer_deform.sampling import pieces


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    length=st.integers(0, 200),
    most=st.integers(1, 300),
    threads=st.integers(1, 5),
    unit=st.sampled_from((1, 16)),
)
def test_cut(length, most, threads, unit):
    """Whatever is cut is whole, and no slice is larger than it may be."""
    parts = pieces.cut(length, most, threads, unit)
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    if sizes:
        assert max(sizes) <= max(unit, -(-most // unit) * unit)
        assert all(size % unit == 0 for size in sizes[:-1])
        assert all(size == sizes[0] for size in sizes[:-1])
        assert 0 < sizes[-1] <= sizes[0]
    if unit == 1 and length % threads == 0 and len(parts) < 4 * threads:
        assert len(parts) % threads == 0


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    first=st.integers(0, 3),
    n=st.integers(0, 9),
    positions=st.integers(1, 40),
    most=st.integers(1, 100),
    threads=st.integers(1, 4),
)
def test_tiles(first, n, positions, most, threads):
    """Each position is in one tile, and no tile has more than it may have."""
    count = numpy.zeros((first + n, positions), int)
    for tile in pieces.cut_tiles(slice(first, first + n), positions, most, threads):
        assert 0 < count[tile].size <= most
        count[tile] += 1
        # Several images are whole ones.
        assert count[tile].shape[0] == 1 or count[tile].shape[1] == positions
    assert (count[first:] == 1).all()
    assert not count[:first].any()


@pytest.mark.parametrize(
    ('n', 'positions', 'most', 'threads', 'expected'),
    [
        (1, 100, 1000, 2, [50, 50]),
        (1, 100, 30, 2, [25] * 4),
        (2, 100, 1000, 2, [100, 100]),
        # Three images would be two for one thread, one for the other.
        (3, 100, 1000, 2, [50] * 6),
        (9, 100, 1000, 2, [500, 400]),
        (4, 10, 1000, 1, [40]),
    ],
)
def test_threads_have_as_much_to_do(n, positions, most, threads, expected):
    tiles = pieces.cut_tiles(slice(0, n), positions, most, threads)
    sizes = [(i.stop - i.start) * (p.stop - p.start) for i, p in tiles]
    assert sizes == expected
