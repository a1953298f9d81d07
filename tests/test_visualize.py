"""The pictures hold the right numbers."""

import io
import subprocess
import sys

import chainer
import numpy
import pytest
from chainer.utils import type_check

pytest.importorskip('matplotlib')

from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from chainer_deform import sampling_locations
from chainer_deform.visualize import (
    COLOURS,
    plot_mask,
    plot_offset_field,
    plot_sampling_points,
)
from tests.programs import WARNINGS

random = numpy.random.RandomState(0)
image = random.uniform(0, 1, (3, 24, 30)).astype('f')
offset = random.uniform(-0.4, 0.4, (1, 2 * 2 * 6, 6, 10)).astype('f')
locations = sampling_locations(offset, (3, 2), (2, 1), 1, offset_groups=2)[0]


@pytest.fixture
def ax():
    return Figure().subplots()


def scatters(ax):
    """The (y, x) of each set of markers, and its colour."""
    found = [artist for artist in ax.collections if type(artist) is PathCollection]
    return [
        (numpy.asarray(artist.get_offsets())[:, ::-1], tuple(artist.get_facecolor()[0]))
        for artist in found
    ]


def test_points_of_a_layer(ax):
    pixels = [(1, 2), (5, 9), (0, 0)]
    centres = [(2.5, 3), (4, 8), (1, 1)]
    returned = plot_sampling_points(
        image, locations, pixels, centres=centres, scale=(4, 3), ax=ax
    )
    assert returned is ax
    artists = scatters(ax)
    assert len(artists) == 6
    for i, (y, x) in enumerate(pixels):
        (points, colour), (centre, centre_colour) = artists[2 * i : 2 * i + 2]
        expected = [
            ((v + 0.5) * 4 - 0.5, (u + 0.5) * 3 - 0.5)
            for group in locations[..., y, x]
            for v, u in group
        ]
        numpy.testing.assert_allclose(points, expected, atol=1e-5)
        v, u = centres[i]
        numpy.testing.assert_allclose(centre, [((v + 0.5) * 4 - 0.5, u * 3 + 1)])
        assert colour == centre_colour == to_rgba(COLOURS[i])
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ['1, 2', '5, 9', '0, 0']


def test_variables_and_defaults(ax):
    plot_sampling_points(chainer.Variable(image), chainer.Variable(locations), ax=ax)
    (points, _), (centre, _) = scatters(ax)
    numpy.testing.assert_allclose(points, locations[..., 3, 5].reshape(-1, 2))
    # The output covers the image evenly: 4 by 3 pixels to a pixel.
    numpy.testing.assert_allclose(centre, [(3.5 * 4 - 0.5, 5.5 * 3 - 0.5)])


@pytest.mark.parametrize('several', [False, True])
def test_plain_points(ax, several):
    sets = [numpy.array([[1, 2], [3, 4.5]], 'f'), numpy.array([[5, 6]], 'f')]
    plot_sampling_points(image, sets if several else sets[0], ax=ax)
    artists = scatters(ax)
    assert len(artists) == 1 + several
    for (points, _), expected in zip(artists, sets):
        numpy.testing.assert_array_equal(points, expected)
    assert ax.get_legend() is None


@pytest.mark.parametrize('pixels', [None, [(2, 0), (0, 1)]])
def test_bins_of_a_box(ax, pixels):
    points = random.uniform(0, 6, (3, 2, 4, 2)).astype('f')
    plot_sampling_points(image, points, pixels, scale=4, ax=ax)
    artists = scatters(ax)
    drawn = [*numpy.ndindex(3, 2)] if pixels is None else pixels
    assert len(artists) == len(drawn)
    for (found, _), pixel in zip(artists, drawn):
        numpy.testing.assert_allclose(found, points[pixel] * 4 + 1.5, rtol=1e-5)
    legend = ax.get_legend()
    texts = [] if legend is None else [t.get_text() for t in legend.get_texts()]
    assert texts == ([] if pixels is None else ['2, 0', '0, 1'])


def test_axes(ax):
    plot_sampling_points(image, numpy.array([[5, 6.0]]), ax=ax)
    assert ax.get_xlim() == (-0.5, 29.5)
    assert ax.get_ylim() == (23.5, -0.5)  # downwards
    assert ax.get_aspect() == 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('x (pixels)', 'y (pixels)')
    assert ax.get_title() == 'Sampling points'


def test_points_outside_the_image_are_shown_or_counted(ax):
    """A fifth of the longer side is 6 pixels."""
    points = numpy.array(
        [[5, 6], [-4, 6], [26, 6], [5, 1e9], [-7, 3], [numpy.nan, 2], [1, numpy.inf]]
    )
    plot_sampling_points(image, points, ax=ax)
    assert ax.get_xlim() == (-0.5, 29.5)
    bottom, top = ax.get_ylim()
    assert -6.5 <= top < -4
    assert 26 < bottom <= 29.5
    assert ax.get_title() == 'Sampling points\n2 farther out, 2 not finite'
    ((drawn, _),) = scatters(ax)
    numpy.testing.assert_array_equal(drawn, points[:5])


def test_only_points_that_are_not_finite(ax):
    plot_sampling_points(image, numpy.full((3, 2), numpy.nan), ax=ax)
    assert ax.get_title() == 'Sampling points\n3 not finite'
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 29.5), (23.5, -0.5))
    ((drawn, _),) = scatters(ax)
    assert not len(drawn)


def test_no_points(ax):
    plot_sampling_points(image, numpy.zeros((0, 2)), ax=ax)
    assert ax.get_title() == 'Sampling points'
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 29.5), (23.5, -0.5))
    ((drawn, _),) = scatters(ax)
    assert not len(drawn)


@pytest.mark.parametrize('value', [numpy.nan, numpy.inf, -numpy.inf])
def test_point_of_which_one_coordinate_is_not_finite(ax, value):
    points = numpy.array([[5, 6], [value, 2], [1, value]])
    plot_sampling_points(image, points, ax=ax)
    assert ax.get_title() == 'Sampling points\n2 not finite'
    ((drawn, _),) = scatters(ax)
    numpy.testing.assert_array_equal(drawn, [[5, 6]])


GREY = [[0, 10], [20, 40]]


@pytest.mark.parametrize(
    ('array', 'expected'),
    [
        (numpy.array(GREY, 'f') / 100, [[0, 0.1], [0.2, 0.4]]),  # as it is
        (numpy.array(GREY, 'uint8'), [[0, 10 / 255], [20 / 255, 40 / 255]]),
        (numpy.array(GREY, 'f'), [[0, 0.25], [0.5, 1]]),
        (numpy.array(GREY, 'i'), [[0, 0.25], [0.5, 1]]),
        (numpy.array(GREY, 'e') - 20, [[0, 0.25], [0.5, 1]]),
        (numpy.array([[0, 10], [numpy.nan, 40]]) + 5, [[0, 0.25], [0, 1]]),
        (numpy.array([[numpy.inf, -2], [2, -numpy.inf]]), [[0, 0], [1, 0]]),
        (numpy.full((2, 2), 7.0), [[0, 0], [0, 0]]),
        (numpy.array(GREY) > 15, [[0, 0], [1, 1]]),
        (numpy.array([GREY], 'uint8'), [[0, 10 / 255], [20 / 255, 40 / 255]]),
        (numpy.array([GREY, numpy.zeros((2, 2))]) / 100, [[0, 0.05], [0.1, 0.2]]),
    ],
)
def test_grey_images(ax, array, expected):
    before = array.copy()
    plot_sampling_points(array, numpy.zeros((1, 2)), ax=ax)
    (shown,) = ax.images
    numpy.testing.assert_allclose(shown.get_array(), expected, rtol=1e-3)
    assert shown.get_clim() == (0, 1)
    numpy.testing.assert_array_equal(array, before)


@pytest.mark.parametrize('dtype', ['f', 'uint8'])
def test_colour_images(ax, dtype):
    array = image if dtype == 'f' else (image * 255).astype(dtype)
    plot_sampling_points(array, numpy.zeros((1, 2)), ax=ax)
    expected = array.transpose(1, 2, 0) / (1 if dtype == 'f' else 255)
    numpy.testing.assert_allclose(ax.images[0].get_array(), expected, rtol=1e-6)


@pytest.mark.parametrize('shape', [(24, 30, 3), (5, 5, 4), (28, 28, 1)])
def test_image_with_its_channels_last(ax, shape):
    pixels = random.uniform(0, 1, shape)
    message = (
        r'(?s)image\.shape == \(c, h, w\).*\(h, w, c\): give image\.transpose\(2, '
    )
    with pytest.raises(type_check.InvalidType, match=message):
        plot_sampling_points(pixels, numpy.zeros((1, 2)), ax=ax)
    assert not ax.has_data()
    plot_sampling_points(pixels.transpose(2, 0, 1), numpy.zeros((1, 2)), ax=ax)
    assert ax.images[0].get_array().shape[:2] == shape[:2]


@pytest.mark.parametrize('shape', [(3, 24, 3), (1, 28, 1), (64, 4, 4), (4, 9, 3)])
def test_narrow_images(ax, shape):
    plot_sampling_points(random.uniform(0, 1, shape), numpy.zeros((1, 2)), ax=ax)
    assert ax.images[0].get_array().shape[:2] == shape[1:]


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'image': 'no'}, TypeError, 'image must be .* not a str'),
        ({'image': image[None]}, type_check.InvalidType, r'image\.shape == \(1, 3, 24'),
        ({'image': image[:, :0]}, type_check.InvalidType, r'\(3, 0, 30\)'),
        ({'points': 'no'}, TypeError, 'points must be'),
        ({'points': [[1.0, 2.0]]}, TypeError, r'points\[0\] must be'),
        ({'points': numpy.zeros((3, 3))}, type_check.InvalidType, r'== \(3, 3\)'),
        ({'points': locations[None]}, type_check.InvalidType, r'\(1, 2, 6, 2, 6, 10\)'),
        ({'points': offset}, type_check.InvalidType, r'== \(1, 24, 6, 10\)'),
        (
            {'points': numpy.zeros((3, 2, 4, 2)), 'pixels': [(3, 0)]},
            ValueError,
            r'the output, 3 by 2 pixels, but one is \(3, 0\)',
        ),
        ({'pixels': [(6, 0)]}, ValueError, r'6 by 10 pixels, but one is \(6, 0\)'),
        ({'pixels': []}, ValueError, 'pixels must have at least one pair'),
        ({'pixels': [(0, -1)]}, ValueError, 'pixels must be at least 0'),
        ({'pixels': [(0.5, 1)]}, TypeError, 'pixels must be pairs of ints'),
        ({'pixels': [(0, 1, 2)]}, ValueError, r'one is \(0, 1, 2\)'),
        ({'centres': [(0, 1), (2, 3)]}, ValueError, 'centres must be .* of the 1 sets'),
        ({'scale': 0}, ValueError, 'scale must be a positive'),
        ({'scale': (1, 2, 3)}, ValueError, 'scale must be a positive'),
        ({'scale': numpy.nan}, ValueError, 'scale must be a positive'),
    ],
)
def test_bad_sampling_points(ax, arguments, error, message):
    with pytest.raises(error, match=message):
        plot_sampling_points(
            **{'image': image, 'points': locations, **arguments}, ax=ax
        )
    assert not ax.has_data()  # nothing half drawn


def arrows(ax):
    (quiver,) = (artist for artist in ax.collections if isinstance(artist, Quiver))
    return quiver


@pytest.mark.parametrize('group', [None, 0, 1])
def test_offset_field(ax, group):
    assert plot_offset_field(offset[0], 2, group, ax=ax) is ax
    quiver = arrows(ax)
    by_tap = offset[0].reshape(2, 2, 6, 6, 10).astype('d')
    groups = [0, 1] if group is None else [group]
    for mean, drawn in (by_tap[groups, 0], quiver.U), (by_tap[groups, 1], quiver.V):
        numpy.testing.assert_allclose(drawn, mean.mean(axis=(0, 1)).ravel())
    rows, columns = numpy.mgrid[:6, :10]
    numpy.testing.assert_array_equal(quiver.X, columns.ravel())
    numpy.testing.assert_array_equal(quiver.Y, rows.ravel())
    assert quiver.angles == quiver.scale_units == 'xy'
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert ax.get_aspect() == 1


@pytest.mark.parametrize('size', [(1, 1), (1, 3)])
def test_small_offset_field_is_drawn(ax, size):
    plot_offset_field(numpy.ones((18, *size), 'f'), ax=ax)
    ax.figure.savefig(io.BytesIO())  # which warns where there are no directions


def test_image_with_pixels_that_are_not_finite(ax):
    image = numpy.array([[0, 1, numpy.nan], [0.5, -numpy.inf, numpy.inf]])
    plot_sampling_points(image, numpy.zeros((0, 2)), ax=ax)
    shown = ax.images[0].get_array()
    numpy.testing.assert_array_equal(shown, [[0, 1, 0], [0.5, 0, 0]])


def test_large_offset_field_is_thinned(ax):
    field = numpy.zeros((2, 100, 1), 'f')
    field[0] = numpy.arange(100)[:, None] * 4  # x
    plot_offset_field(field, ax=ax)
    quiver = arrows(ax)
    numpy.testing.assert_array_equal(quiver.Y, numpy.arange(2, 100, 5))
    numpy.testing.assert_array_equal(quiver.X, 0)
    numpy.testing.assert_array_equal(quiver.U, quiver.Y * 4)
    # Most arrows are not longer than the distance between two.
    assert numpy.percentile(quiver.U / quiver.scale, 95) == pytest.approx(5)


@pytest.mark.parametrize(
    ('length', 'key'),
    [(0, '1 px'), (0.0037, '0.002 px'), (7, '5 px'), (2e3, '2000 px')],
)
def test_key_of_the_offset_field(ax, length, key):
    field = numpy.zeros((2, 3, 4))
    field[1] = length
    plot_offset_field(field, ax=ax)
    (found,) = (artist for artist in ax.artists if hasattr(artist, 'label'))
    assert found.label == key
    assert f'{found.U:g} px' == key


def test_offset_field_with_offsets_that_are_not_finite(ax):
    field = offset[0].copy()
    field[3, 2, 1] = numpy.inf
    field[7, 4, 0] = numpy.nan
    field[8:10, 5, 5] = numpy.inf, -numpy.inf
    plot_offset_field(field, 2, ax=ax)
    assert arrows(ax).N == 57
    ((crosses, _),) = scatters(ax)
    numpy.testing.assert_array_equal(crosses, [(2, 1), (4, 0), (5, 5)])


@pytest.mark.parametrize('group', [None, 0, 1])
def test_mask(ax, group):
    mask = random.uniform(0, 2, (2 * 6, 5, 7)).astype('f')
    assert plot_mask(chainer.Variable(mask), 2, group, vmax=2, ax=ax) is ax
    (shown,) = ax.images
    by_tap = mask.reshape(2, 6, 5, 7).astype('d')
    groups = [0, 1] if group is None else [group]
    numpy.testing.assert_allclose(shown.get_array(), by_tap[groups].mean(axis=(0, 1)))
    assert shown.get_clim() == (0, 2)
    assert shown.colorbar.ax.figure is ax.figure
    assert ax.get_ylim() == (4.5, -0.5)
    assert ax.get_aspect() == 1


def test_range_of_the_mask_is_fixed(ax):
    plot_mask(numpy.full((1, 2, 3), 0.25), ax=ax)
    plot_mask(numpy.full((1, 2, 3), 3.0), ax=ax)
    small, large = ax.images
    assert small.get_clim() == large.get_clim() == (0, 1)
    assert (small.colorbar.extend, large.colorbar.extend) == ('neither', 'max')


@pytest.mark.parametrize(
    ('function', 'shape', 'options', 'error', 'message'),
    [
        (
            plot_offset_field,
            (18, 4, 5),
            {'offset_groups': 2},
            type_check.InvalidType,
            r'offset\.shape == \(offset_groups \* 2(.|\n)*\(18, 4, 5\)',
        ),
        (plot_offset_field, (1, 18, 4, 5), {}, type_check.InvalidType, r'\(1, 18, 4'),
        (plot_offset_field, (18, 0, 5), {}, type_check.InvalidType, r'\(18, 0, 5\)'),
        (plot_mask, (9, 4, 5), {'offset_groups': 2}, type_check.InvalidType, 'mask'),
        (plot_mask, (9, 4, 5), {'offset_groups': 0}, ValueError, 'offset_groups must'),
        (
            plot_mask,
            (8, 4, 5),
            {'offset_groups': 2, 'group': 2},
            ValueError,
            'group must',
        ),
        (plot_mask, (9, 4, 5), {'group': 0.5}, TypeError, 'group must be an int'),
        (plot_mask, (9, 4, 5), {'vmax': 0}, ValueError, 'vmax must be a positive'),
    ],
)
def test_bad_fields_and_masks(ax, function, shape, options, error, message):
    with pytest.raises(error, match=message):
        function(numpy.zeros(shape, 'f'), **options, ax=ax)
    assert not ax.has_data()


SCRIPT = """
import sys
import numpy as np
import chainer_deform
from chainer_deform.visualize import plot_mask, plot_offset_field, plot_sampling_points
assert 'matplotlib' not in sys.modules
offset = np.ones((1, 18, 4, 5), 'f')
image, points = offset[0, 0], chainer_deform.sampling_locations(offset, 3, pad=1)[0]
from matplotlib.figure import Figure
for ax in Figure().subplots(3), (None, None, None):
    for returned, given in zip((
        plot_sampling_points(image, points, ax=ax[0]),
        plot_offset_field(offset[0], ax=ax[1]),
        plot_mask(offset[0, :9], ax=ax[2]),
    ), ax):
        assert given is None or returned is given
        returned.figure.savefig(sys.argv[1])
    if ax[0] is not None:
        assert 'matplotlib.pyplot' not in sys.modules
from matplotlib import pyplot
assert len(pyplot.get_fignums()) == 3  # those of no axes, which a notebook shows
"""


def test_without_a_display(tmp_path):
    """pyplot is left alone where axes are given, and is used where there are none"""
    environment = {'PATH': '', 'HOME': str(tmp_path), 'PYTHONPATH': ':'.join(sys.path)}
    subprocess.run(
        [sys.executable, *WARNINGS, '-c', SCRIPT, tmp_path / 'picture.png'],
        check=True,
        timeout=100,
        env=environment,
        cwd=tmp_path,
    )


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    with pytest.raises(ImportError, match=r"pip install 'chainer-deform\[plot\]'"):
        plot_mask(numpy.zeros((9, 4, 5)))
