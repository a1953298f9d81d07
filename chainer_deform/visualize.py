"""Pictures of sampling points, offset fields and modulation masks, by Matplotlib.

Matplotlib is imported when a picture is drawn: ``pip install 'chainer-deform[plot]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import chainer
import numpy
from chainer.backends import cuda
from chainer.utils import type_check

from chainer_deform._checks import float_array, integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['plot_mask', 'plot_offset_field', 'plot_sampling_points']

#: Okabe and Ito's colours, which colour-blind readers can tell apart, on dark and on
#: light images; the markers differ as well.
COLOURS = '#E69F00', '#56B4E9', '#009E73', '#CC79A7', '#D55E00', '#F0E442', '#0072B2'
MARKERS = 'os^Dv<>'
BLUE, RED = '#0072B2', '#D55E00'

#: How far outside the image points are shown, as a part of its longer side.
MARGIN = 0.2

#: Arrows along the longer side of an offset field, at most.
ARROWS = 24


def plot_sampling_points(
    image,
    points,
    pixels: Sequence[tuple[int, int]] | None = None,
    *,
    centres: Sequence[tuple[float, float]] | None = None,
    scale: float | tuple[float, float] = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws sampling points over an image, in one colour for each output pixel.

    A cross marks where the output pixel itself lies. Points outside the image are shown
    up to a fifth of its longer side away; the title says how many lie farther out, or
    are not finite.

    Args:
        image (:class:`~chainer.Variable` or :ref:`ndarray`): One image, ``(c, h, w)``
            or ``(h, w)``, of any dtype and range: uint8 values, bools and floats from 0
            to 1 are shown as they are, else the smallest value is black and the largest
            white. Three channels are RGB; the mean of any other number is grey. What
            looks like ``(h, w, c)``, more than 4 by more than 4 by 1, 3 or 4, is an
            error.
        points (:ref:`ndarray` or sequence of :ref:`ndarray`): The sampling points of
            the image in a layer, ``(offset_groups, kh * kw, 2, out_h, out_w)``, as
            ``chainer_deform.sampling_locations(...)[i]``; or points ``(y, x)`` in an
            array of shape ``(points, 2)``, as ``chainer_deform.receptive_points``
            returns, or several such arrays, one for each output pixel; or the samples
            of a box's bins, ``(out_h, out_w, samples, 2)``, as a
            :class:`~chainer_deform.link_hooks.RoISamplingCall` has them. In pixels of
            the layer's input.
        pixels (sequence of pairs of ints): The output pixels ``(y, x)`` whose points
            are drawn. If ``None``, the one in the middle, and of a box all bins. Where
            ``points`` has the form ``(points, 2)`` they are for the legend alone.
        centres (sequence of pairs of floats): Where these output pixels lie, in pixels
            of the layer's input, as ``call.centre(y, x)`` of
            :class:`chainer_deform.link_hooks.SamplingCall` says. If ``None`` and
            ``points`` are those of a layer, the output is taken to cover the whole
            image evenly; else nothing is marked.
        scale (float or pair of floats): Pixels of the image to a pixel of the layer's
            input, ``image.shape[-1] / x.shape[-1]``; a pair is ``(y, x)``. The input
            lies over the whole image then: its pixel 0 over the image's pixel ``(scale
            - 1) / 2``.
        ax (~matplotlib.axes.Axes): Where to draw. If ``None``, a new figure of
            ``matplotlib.pyplot``.

    Returns:
        ~matplotlib.axes.Axes: The axes, in pixels of the image, ``y`` downwards.

    Raises:
        ImportError: Matplotlib cannot be imported.
        TypeError, ValueError: An argument is no array or does not fit.
        chainer.utils.type_check.InvalidType: A shape or dtype does not fit.

    .. seealso:: :class:`chainer_deform.link_hooks.SamplingHook`, which records the
        points of a model's layers.

    .. admonition:: Example

        >>> from matplotlib.figure import Figure
        >>> image = np.random.uniform(0, 1, (3, 28, 20)).astype(np.float32)
        >>> offset = np.random.normal(0, 1, (1, 2 * 3 * 3, 14, 10)).astype(np.float32)
        >>> points = chainer_deform.sampling_locations(offset, 3, pad=1)
        >>> ax = plot_sampling_points(
        ...     image, points[0], [(3, 4), (10, 7)], scale=2, ax=Figure().subplots()
        ... )
        >>> ax.get_title()
        'Sampling points'

    """
    image = _displayed(image)
    zoom = numpy.asarray(scale, float)
    if zoom.shape not in ((), (2,)) or not (numpy.isfinite(zoom) & (zoom > 0)).all():
        raise ValueError(
            f'scale must be a positive number or a pair of them, not {zoom.tolist()}'
        )
    input_size = image.shape[:2] / zoom
    sets, pixels, centres = _points_and_centres(points, pixels, centres, input_size)
    sets = [_laid_over(array, zoom) for array in sets]
    every = numpy.concatenate([numpy.zeros((0, 2)), *sets])
    finite = every[numpy.isfinite(every).all(axis=1)]
    low, high = _limits(finite, image.shape[:2])
    farther_out = ((finite < low) | (finite > high)).any(axis=1).sum()

    ax = _axes(ax)
    ax.imshow(image, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
    # About the same ink for 9, 81 and 729 points.
    area = 30 / max(1, max(map(len, sets), default=0) / 9) ** 0.5
    for i, array in enumerate(sets):
        look = {'color': COLOURS[i % len(COLOURS)], 'edgecolors': 'black'}
        ax.scatter(
            *array[numpy.isfinite(array).all(axis=1), ::-1].T,
            s=area,
            marker=MARKERS[i % len(MARKERS)],
            linewidths=area**0.5 / 12,
            label=None if pixels is None else '{}, {}'.format(*pixels[i]),
            zorder=3,
            **look,
        )
        if centres is not None:
            y, x = _laid_over(numpy.asarray(centres[i], float), zoom)
            ax.scatter(x, y, s=90, marker='P', linewidths=0.7, zorder=4, **look)
    if pixels is not None:
        ax.legend(
            title='Output\npixel (y, x)',
            loc='upper left',
            bbox_to_anchor=(1, 1),
            fontsize='small',
            title_fontsize='small',
            markerscale=(30 / area) ** 0.5,
            frameon=False,
        )
    ax.set(
        xlim=(low[1], high[1]),
        ylim=(high[0], low[0]),
        aspect='equal',
        facecolor='lightgrey',  # what lies outside the image
        xlabel='x (pixels)',
        ylabel='y (pixels)',
    )
    counts = (farther_out, 'farther out'), (len(every) - len(finite), 'not finite')
    notes = ', '.join(f'{count:,} {what}' for count, what in counts if count)
    ax.set_title('Sampling points' + (f'\n{notes}' if notes else ''))
    return ax


def plot_offset_field(
    offset, offset_groups: int = 1, group: int | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draws the mean offsets of a layer as arrows, from where to where on average.

    The mean is over the taps of each output pixel. A large output is thinned to about
    24 arrows along its longer side. Arrows are drawn to a scale of their own, which the
    key above shows; a red cross stands for a mean that is not finite.

    Args:
        offset (:class:`~chainer.Variable` or :ref:`ndarray`): Offsets of one image, in
            pixels of the layer's input, of shape ``(offset_groups * 2 * kh * kw, out_h,
            out_w)``: for each offset group first the horizontal ones. Any float dtype.
        offset_groups (int): Number of offset groups.
        group (int or None): The offset group to draw. If ``None``, the mean of all.
        ax (~matplotlib.axes.Axes): Where to draw. If ``None``, a new figure of
            ``matplotlib.pyplot``.

    Returns:
        ~matplotlib.axes.Axes: The axes, in pixels of the layer's output, ``y``
        downwards.

    Raises:
        ImportError: Matplotlib cannot be imported.
        TypeError, ValueError: An argument is no array or int, or is out of range.
        chainer.utils.type_check.InvalidType: The shape or dtype of ``offset`` does not
            fit.

    .. admonition:: Example

        >>> from matplotlib.figure import Figure
        >>> offset = np.random.normal(0, 1, (2 * 3 * 3, 14, 10)).astype(np.float32)
        >>> ax = plot_offset_field(offset, ax=Figure().subplots())
        >>> ax.get_title()
        'Mean offsets'

    """
    x, y = _mean_of_taps('offset', offset, 2, offset_groups, group)
    out_h, out_w = x.shape
    step = -(-max(out_h, out_w) // ARROWS)
    rows, columns = (
        numpy.arange(min(step, size) // 2, size, step) for size in (out_h, out_w)
    )
    columns, rows = (array.ravel() for array in numpy.meshgrid(columns, rows))
    x, y = x[rows, columns], y[rows, columns]
    finite = numpy.isfinite(x) & numpy.isfinite(y)
    length = numpy.hypot(x, y)[finite]
    # A few long arrows may cross others; all would be dots if they had to fit.
    longest = numpy.percentile(length, 95) if length.any() else 0
    longest = longest or length.max(initial=0) or 1

    ax = _axes(ax)
    # Matplotlib takes the directions of arrows from the size of what is drawn.
    ax.update_datalim([(-0.5, -0.5), (out_w - 0.5, out_h - 0.5)])
    arrows = ax.quiver(
        columns[finite],
        rows[finite],
        x[finite],
        y[finite],
        angles='xy',
        scale_units='xy',
        scale=longest / step,
        width=0.005,
        color=BLUE,
    )
    key = _round_down(longest)
    ax.quiverkey(arrows, 1, 1.04, key, f'{key:g} px', labelpos='W')
    ax.scatter(columns[~finite], rows[~finite], marker='x', color=RED)
    _output_axes(ax, out_h, out_w, margin=step / 2)
    ax.set_title('Mean offsets')
    return ax


def plot_mask(
    mask,
    offset_groups: int = 1,
    group: int | None = None,
    *,
    vmax: float = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws the modulation mask of a layer as a map.

    It shows the mean over the taps of each output pixel, in colours from 0 to ``vmax``,
    the same for every picture, with a colour bar.

    Args:
        mask (:class:`~chainer.Variable` or :ref:`ndarray`): Mask of one image, of shape
            ``(offset_groups * kh * kw, out_h, out_w)``. Any float dtype.
        offset_groups (int): Number of offset groups.
        group (int or None): The offset group to draw. If ``None``, the mean of all.
        vmax (float): The value at the end of the colours: the layer's ``mask_scale``.
        ax (~matplotlib.axes.Axes): Where to draw. If ``None``, a new figure of
            ``matplotlib.pyplot``.

    Returns:
        ~matplotlib.axes.Axes: The axes, in pixels of the layer's output, ``y``
        downwards. The colour bar has axes of its own in the same figure.

    Raises:
        ImportError: Matplotlib cannot be imported.
        TypeError, ValueError: An argument is no array or int, or is out of range.
        chainer.utils.type_check.InvalidType: The shape or dtype of ``mask`` does not
            fit.

    .. admonition:: Example

        >>> from matplotlib.figure import Figure
        >>> mask = np.random.uniform(0, 2, (3 * 3, 14, 10)).astype(np.float32)
        >>> ax = plot_mask(mask, vmax=2, ax=Figure().subplots())
        >>> ax.get_title()
        'Mean modulation mask'

    """
    (mask,) = _mean_of_taps('mask', mask, 1, offset_groups, group)
    if not 0 < vmax < float('inf'):
        raise ValueError(f'vmax must be a positive number, not {vmax!r}')
    ax = _axes(ax)
    image = ax.imshow(mask, cmap='cividis', vmin=0, vmax=vmax, interpolation='nearest')
    extend = 'max' if (mask > vmax).any() else 'neither'
    ax.figure.colorbar(image, ax=ax, label='mask', extend=extend)
    _output_axes(ax, *mask.shape)
    ax.set_title('Mean modulation mask')
    return ax


def _axes(ax: Axes | None) -> Axes:
    """The axes, or those of a new figure, which a notebook shows."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "pictures need Matplotlib: pip install 'chainer-deform[plot]'"
        ) from error
    return pyplot.subplots(layout='constrained')[1]


def _output_axes(ax: Axes, out_h: int, out_w: int, margin: float = 0) -> None:
    ax.set(
        xlim=(-0.5 - margin, out_w - 0.5 + margin),
        ylim=(out_h - 0.5 + margin, -0.5 - margin),
        aspect='equal',
        xlabel='x (output pixels)',
        ylabel='y (output pixels)',
    )


def _displayed(image) -> numpy.ndarray:
    """An image as Matplotlib shows it: (h, w) or (h, w, 3), from 0 to 1."""
    image = chainer.as_array(image)
    if not isinstance(image, chainer.get_array_types()):
        raise TypeError(
            f'image must be a Variable or an array, not a {type(image).__name__}'
        )
    image = cuda.to_cpu(image)
    if image.ndim not in (2, 3) or not image.size or image.dtype.kind not in 'biuf':
        raise type_check.InvalidType(
            'image.shape == (c, h, w) or (h, w), of numbers',
            f'image.shape == {image.shape} and image.dtype == {image.dtype}',
        )
    if image.ndim == 3 and image.shape[2] in (1, 3, 4) and min(image.shape[:2]) > 4:
        raise type_check.InvalidType(
            'image.shape == (c, h, w) or (h, w)',
            f'image.shape == {image.shape}, which looks like (h, w, c): give '
            'image.transpose(2, 0, 1), or image.mean(axis=0) if it is (c, h, w)',
        )
    largest = 255 if image.dtype == numpy.uint8 else 1
    image = image.astype(float)
    if image.ndim == 3:
        image = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(axis=0)
    finite = numpy.isfinite(image)
    low = image.min(initial=0, where=finite)
    high = image.max(initial=largest, where=finite)
    if low < 0 or high > largest:
        low = image.min(initial=high, where=finite)
        high = image.max(initial=low, where=finite)
    image = numpy.where(finite, image, low)
    return (image - low) / ((high - low) or 1)


def _points_and_centres(points, pixels, centres, input_size) -> tuple:
    """The points of each output pixel as float64 arrays, the pixels, their places."""
    if pixels is not None:
        if not len(pixels):
            raise ValueError('pixels must have at least one pair, not none')
        pixels = [
            tuple(integer('pixels', value, 0, 'pairs of ints') for value in pixel)
            for pixel in pixels
        ]
    if isinstance(points, (list, tuple)):
        sets = [_host(f'points[{i}]', array) for i, array in enumerate(points)]
    else:
        sets = [_host('points', points)]
        if sets[0].ndim == 5:
            sets, pixels, places = _of_layer(sets[0], pixels, input_size)
            centres = places if centres is None else centres
        elif sets[0].ndim == 4:
            sets = _of_bins(sets[0], pixels)
    for array in sets:
        if array.ndim != 2 or array.shape[1] != 2:
            raise type_check.InvalidType(
                'points.shape == (offset_groups, kh * kw, 2, out_h, out_w), '
                '(out_h, out_w, samples, 2) or (points, 2), or a list of the last',
                f'points.shape == {array.shape}',
            )
    for name, value in ('pixels', pixels), ('centres', centres):
        if value is not None and numpy.shape(value) != (len(sets), 2):
            raise ValueError(
                f'{name} must be a pair (y, x) for each of the {len(sets)} sets of '
                f'points, not {value!r}'
            )
    return sets, pixels, centres


def _of_layer(points: numpy.ndarray, pixels, input_size) -> tuple:
    """The points of output pixels of a layer, the pixels, and where they lie."""
    if points.shape[2] != 2 or not points.size:
        raise type_check.InvalidType(
            'points.shape == (offset_groups, kh * kw, 2, out_h, out_w)',
            f'points.shape == {points.shape}',
        )
    out_size = numpy.array(points.shape[3:])
    if pixels is None:
        pixels = [tuple((out_size // 2).tolist())]
    _check_pixels(pixels, out_size)
    # (offset_groups, taps, 2) -> (points, 2)
    sets = [points[:, :, :, y, x].reshape(-1, 2) for y, x in pixels]
    scale = input_size / out_size
    return sets, pixels, [_laid_over(numpy.array(pixel), scale) for pixel in pixels]


def _of_bins(points: numpy.ndarray, pixels) -> list[numpy.ndarray]:
    """The samples of some of a box's bins, or of all."""
    if points.shape[3] != 2:
        raise type_check.InvalidType(
            'points.shape == (out_h, out_w, samples, 2)',
            f'points.shape == {points.shape}',
        )
    if pixels is None:
        return [*points.reshape(-1, *points.shape[2:])]
    _check_pixels(pixels, numpy.array(points.shape[:2]))
    return [points[pixel] for pixel in pixels]


def _check_pixels(pixels, out_size: numpy.ndarray) -> None:
    for pixel in pixels:
        if len(pixel) != 2 or (pixel >= out_size).any():
            raise ValueError(
                f'pixels must be inside the output, {out_size[0]} by {out_size[1]} '
                f'pixels, but one is {pixel}'
            )


def _laid_over(points: numpy.ndarray, scale) -> numpy.ndarray:
    """Places of a small image in a ``scale`` times larger one that it lies over."""
    return (points + 0.5) * scale - 0.5


def _limits(points: numpy.ndarray, size: tuple[int, int]) -> tuple:
    """The corners of what is shown: the image, and points not far outside it."""
    low, high = numpy.full(2, -0.5), numpy.array(size) - 0.5
    margin = MARGIN * max(size)
    near = ((points >= low - margin) & (points <= high + margin)).all(axis=1)
    around = 0.02 * max(size)  # so that no marker is cut off
    low = numpy.minimum(low, points[near].min(axis=0, initial=numpy.inf) - around)
    high = numpy.maximum(high, points[near].max(axis=0, initial=-numpy.inf) + around)
    return low, high


def _mean_of_taps(
    name: str, array, axes: int, offset_groups: int, group: int | None
) -> numpy.ndarray:
    """The mean of the taps of one offset group or of all, (axes, out_h, out_w)."""
    array = _host(name, array)
    offset_groups = integer('offset_groups', offset_groups, minimum=1)
    channels = axes * offset_groups
    if array.ndim != 3 or not array.size or array.shape[0] % channels:
        taps = 'offset_groups * 2 * kh * kw' if axes == 2 else 'offset_groups * kh * kw'
        raise type_check.InvalidType(
            f'{name}.shape == ({taps}, out_h, out_w) with '
            f'offset_groups == {offset_groups}',
            f'{name}.shape == {array.shape}',
        )
    if group is not None and integer('group', group, minimum=0) >= offset_groups:
        raise ValueError(
            f'group must be less than offset_groups, {offset_groups}, not {group}'
        )
    array = array.reshape(offset_groups, axes, -1, *array.shape[1:])
    with numpy.errstate(invalid='ignore'):  # the mean of two infinities
        return array[slice(None) if group is None else [group]].mean(axis=(0, 2))


def _host(name: str, value) -> numpy.ndarray:
    """An array of floats as a NumPy array of float64."""
    return cuda.to_cpu(float_array(name, value)).astype(float)


def _round_down(value: float) -> float:
    """The largest of ... 0.5, 1, 2, 5, 10 ... that is not larger."""
    power = 10.0 ** numpy.floor(numpy.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value * 1.0001)
