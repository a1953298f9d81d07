import pytest

from chainer_deform.geometry import Geometry


@pytest.mark.parametrize(
    ('options', 'size', 'expected'),
    [
        ({'ksize': 3}, (4, 7), (2, 5)),
        ({'ksize': (3, 2), 'pad': (1, 0)}, (4, 7), (4, 6)),
        ({'ksize': 3, 'stride': (2, 3)}, (8, 9), (3, 3)),
        ({'ksize': (2, 3), 'dilate': (3, 2)}, (8, 9), (5, 5)),
        ({'ksize': (30, 30), 'stride': 10}, (59, 61), (3, 4)),
        ({'ksize': 3}, (2, 9), (0, 7)),
    ],
)
def test_out_size(options, size, expected):
    assert Geometry(**options).out_size(*size) == expected


def test_filter_shape():
    geometry = Geometry((3, 2), groups=2, offset_groups=3)
    assert geometry.W_shape(6, 4) == (4, 3, 3, 2)
    for channels in (9, 4), (6, 5), (8, 4), (0, 4):
        with pytest.raises(ValueError, match='must divide the number of'):
            geometry.W_shape(*channels)


def test_ksize_is_checked():
    with pytest.raises(ValueError, match='ksize must be at least 1, not 0'):
        Geometry((3, 0))
    with pytest.raises(TypeError, match='ksize must be an int or a pair of ints'):
        Geometry(None)
