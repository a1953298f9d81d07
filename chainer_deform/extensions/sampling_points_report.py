"""Pictures of the sampling points of every deformable layer, epoch by epoch."""

from __future__ import annotations

import io
import os
import types
import warnings
from collections.abc import Sequence

import chainer
import numpy
from chainer import training
from chainer.backends import cuda
from chainer.utils import type_check

from chainer_deform import visualize
from chainer_deform._checks import integer
from chainer_deform._files import replacing
from chainer_deform.link_hooks import (
    OUR_CONVOLUTIONS,
    SamplingCall,
    described,
    hook_on,
    named_layers,
    warn_of_unseen,
)
from chainer_deform.locations import receptive_points

#: How many points of one output pixel are drawn through several layers, at most: those
#: of three layers of 3 x 3 kernels, as in the paper, are 729.
MOST_POINTS = 1000


class SamplingPointsReport(training.Extension):
    """Trainer extension that draws where the deformable layers read some images.

    Once an epoch it runs the model on the images and writes one picture, with a row for
    each image and a column for each call of a deformable layer with the whole batch:
    the layer's sampling points over the image, in a colour for each of some output
    pixels. If the last layers follow on each other, so that each has an output of the
    size and channels that the next reads, another column has the points that the last
    one reads through as many of them as make no more than 1000 (see
    :func:`chainer_deform.receptive_points`). Convolutions without offsets before or
    between the layers are not traced: a layer's input is taken to lie over the whole
    image evenly.

    Training goes on as without it: the model runs in test mode
    (``chainer.config.train`` is false) without a graph, so that nothing is learnt
    and no statistics of a batch normalisation change; what it reports is dropped,
    and NumPy's random generator is put back. (What a model keeps from one call to
    the next, such as the state of an LSTM, is not.) If a picture cannot be made or
    written, as on a full disk, a warning says so, once in a training, and the next one
    is tried again.

    RoI pooling and attention, whose points belong to boxes and queries, are not drawn.
    Where there is no deformable convolution, nothing is written, and a warning says so
    when the training starts; so it does of layers of Chainer's own class, which are not
    drawn: call :func:`chainer_deform.patch_chainer` before the model is built. Where
    there is no Matplotlib, a warning says so when the extension is made, and it does
    nothing.

    Args:
        images (:ref:`ndarray`, tuple, or list of them): What to run the model on: an
            image of shape ``(c, h, w)``, an example of a data set whose first item is
            one, such as ``(image, label)``, or a list of these, or several images in an
            array of shape ``(n, c, h, w)``. All of the same shape, on the CPU, as the
            model reads them.
        pixels (sequence of pairs of ints): Where to look: pixels ``(y, x)`` of the
            image. In each layer the output pixel that lies there is drawn. If ``None``,
            the middle of the image, and between there and the corners at the upper left
            and lower right.
        target (~chainer.Link): The model, called with an array ``(n, c, h, w)``. If
            ``None``, the target of the optimizer ``'main'`` or, where this has one, its
            ``predictor``, as a :class:`~chainer.links.Classifier` does.
        filename (str): Name of the picture in the directory of the trainer, formatted
            with the trainer as the one of :func:`chainer.training.extensions.snapshot`
            is. Its ending is the format, one of Matplotlib's. The picture appears there
            when it is complete.
        labels (sequence of str): What each image is, for the titles of its row. If
            ``None``, they have the name of the layer alone.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, a pixel is outside,
            there are more or fewer labels than images, Matplotlib cannot write the
            format, a trainer has no such attribute as ``filename`` names, or, when the
            training starts, there is no target, or the updater has no such attribute.
        chainer.utils.type_check.InvalidType: The images do not have the shape.

    .. seealso:: :func:`chainer_deform.visualize.plot_sampling_points`

    .. admonition:: Example

        >>> images = np.random.uniform(0, 1, (2, 1, 28, 28)).astype(np.float32)
        >>> report = chainer_deform.extensions.SamplingPointsReport(images)
        >>> report.trigger
        (1, 'epoch')

        and then ``trainer.extend(report)``.

    """

    trigger = 1, 'epoch'

    def __init__(
        self,
        images,
        pixels: Sequence[tuple[int, int]] | None = None,
        *,
        target: chainer.Link | None = None,
        filename: str = 'sampling_points_epoch_{.updater.epoch}.png',
        labels: Sequence[str] | None = None,
    ) -> None:
        self._images = _batch(images)
        if labels is not None and len(labels) != len(self._images):
            raise ValueError(
                f'labels must be {len(self._images)}, as many as images, not {labels!r}'
            )
        self._labels = labels
        self._pixels = _image_pixels(pixels, self._images.shape[2:])
        self._target = target
        self._filename = filename
        self._warned = False
        _check_placeholders(filename, _some_trainer())
        self._available = True
        try:
            _check_format(filename)
        except ImportError as error:
            self._available = False
            warnings.warn(
                f'SamplingPointsReport draws nothing without Matplotlib ({error}): '
                "pip install 'chainer-deform[plot]'",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return described(
            self,
            images=self._images,
            pixels=self._pixels,
            target=self._target,
            filename=self._filename,
        )

    def initialize(self, trainer: training.Trainer) -> None:
        self._warned = False
        target = self._target_of(trainer)  # no target is an error before the training
        # A placeholder may name a value that is reported only later.
        _check_placeholders(self._filename, trainer, ignored=(IndexError, KeyError))
        if self._available:
            warn_of_unseen(
                'SamplingPointsReport', {'': target}, classes=OUR_CONVOLUTIONS
            )

    def __call__(self, trainer: training.Trainer) -> None:
        if not self._available:
            return
        try:
            self._report(trainer)
        except Exception as error:  # whatever it is, the training goes on
            if not self._warned:
                self._warned = True
                warnings.warn(
                    'SamplingPointsReport could not make a picture '
                    f'({type(error).__name__}: {error}); the training goes on, and '
                    'further failures are not reported',
                    stacklevel=2,
                )

    def _report(self, trainer: training.Trainer) -> None:
        calls = self._run(self._target_of(trainer), trainer)
        if calls:
            figure = self._draw(calls)
            figure.suptitle(
                f'Epoch {trainer.updater.epoch}, iteration {trainer.updater.iteration}'
            )
            _save(figure, os.path.join(trainer.out, self._filename.format(trainer)))

    def _target_of(self, trainer: training.Trainer) -> chainer.Link:
        if self._target is not None:
            return self._target
        optimizers = trainer.updater.get_all_optimizers()
        if 'main' not in optimizers:
            raise ValueError(
                'target must be given to SamplingPointsReport where no optimizer is '
                f"named 'main'; there are {sorted(optimizers)}"
            )
        target = optimizers['main'].target
        return getattr(target, 'predictor', target)

    def _run(self, target: chainer.Link, trainer) -> list[SamplingCall]:
        """The calls of the deformable layers for the images; leaves no trace."""
        layers = named_layers(target, OUR_CONVOLUTIONS)
        if not layers:
            return []
        hook = hook_on(layers)
        state = numpy.random.get_state()
        test_mode = chainer.using_config('train', False)
        quietly = trainer.reporter.scope({})
        try:
            with test_mode, chainer.no_backprop_mode(), quietly, hook:
                target(target.device.send(self._images))
        finally:
            numpy.random.set_state(state)
        return [call for call in hook.calls if len(call.offset) == len(self._images)]

    def _draw(self, calls: list[SamplingCall]):
        """A figure with a row for each image and a column for each call."""
        from matplotlib.figure import Figure

        images, size = self._images, numpy.array(self._images.shape[2:])
        points = [cuda.to_cpu(call.locations()) for call in calls]
        below = _stack(calls)
        columns = len(calls) + (below < len(calls) - 1)
        height, width = 3.6 * size / size.max() + (0.9, 1.3)
        figure = Figure((columns * width, len(images) * height), layout='constrained')
        axes = figure.subplots(len(images), columns, squeeze=False)
        for i, row in enumerate(axes):
            label = '' if self._labels is None else f'{self._labels[i]}: '
            for call, array, ax in zip(calls, points, row):
                pixels = _output_pixels(self._pixels, size, call.offset.shape[2:])
                _draw_panel(
                    images[i],
                    array[i],
                    pixels,
                    [call.centre(*pixel) for pixel in pixels],
                    size / call.x_shape[2:],
                    label + call.name,
                    ax,
                )
            if columns > len(calls):  # pixels are those of the last layer
                layers = [array[i] for array in points[below:]]
                centres: list[tuple[float, float]] = [*pixels]
                for call in reversed(calls[below:]):
                    centres = [call.centre(*centre) for centre in centres]
                _draw_panel(
                    images[i],
                    [receptive_points(layers, *pixel) for pixel in pixels],
                    pixels,
                    centres,
                    size / calls[below].x_shape[2:],
                    f'{label}through the last {len(layers)} layers',
                    row[-1],
                )
        return figure


def _draw_panel(image, points, pixels, centres, scale, title, ax) -> None:
    visualize.plot_sampling_points(
        image, points, pixels, centres=centres, scale=scale, ax=ax
    )
    ax.set_title(title + ax.get_title().removeprefix('Sampling points'))


def _stack(calls: list[SamplingCall]) -> int:
    """The first of the last calls that each read what the call before may have made.

    No further down than points can be told apart.
    """
    first = len(calls) - 1
    count = calls[first].offset.shape[1] // 2
    while first:
        above, call = calls[first], calls[first - 1]
        count *= call.offset.shape[1] // 2
        follows = above.x_shape[1:] == (call.link.out_channels, *call.offset.shape[2:])
        if not follows or count > MOST_POINTS:
            break
        first -= 1
    return first


def _output_pixels(pixels, size, out_size) -> list[tuple[int, int]]:
    """The pixels of an output that lie over pixels of the image."""
    places = (numpy.array(pixels) + 0.5) * out_size / size
    return [tuple(place) for place in places.astype(int).tolist()]


def _batch(images) -> numpy.ndarray:
    """The images of an array, an example or a list of these, as one array."""
    if isinstance(images, list):
        arrays = [_image(example) for example in images]
        if not arrays or len({array.shape for array in arrays}) > 1:
            shapes = sorted({array.shape for array in arrays})
            raise ValueError(f'images must be of one shape, not of the shapes {shapes}')
        batch = numpy.stack(arrays)
    else:
        array = _image(images)
        batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or not batch.size:
        raise type_check.InvalidType(
            'images.shape == (c, h, w), or (n, c, h, w)',
            f'images.shape == {batch.shape}',
        )
    return batch


def _image(example) -> numpy.ndarray:
    """The image of an example, which may be a tuple of it and a label."""
    image = chainer.as_array(example[0] if isinstance(example, tuple) else example)
    if not isinstance(image, chainer.get_array_types()):
        raise TypeError(
            'images must be arrays or examples that begin with one, '
            f'not a {type(image).__name__}'
        )
    return cuda.to_cpu(image)


def _image_pixels(pixels, size: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pixels to look at, checked."""
    h, w = size
    if pixels is None:
        return [(h // 2, w // 2), (h // 4, w // 4), (h * 3 // 4, w * 3 // 4)]
    pixels = [
        tuple(integer('pixels', v, 0, 'pairs of ints') for v in p) for p in pixels
    ]
    if not pixels or any(len(p) != 2 or p[0] >= h or p[1] >= w for p in pixels):
        raise ValueError(
            f'pixels must be pairs (y, x) inside the images of {h} by {w} pixels, '
            f'not {pixels}'
        )
    return pixels


class _SomeValue:
    """Stands for a value that only a running training has."""

    def __getattr__(self, name):
        return self

    def __getitem__(self, key):
        return self

    def __format__(self, spec):
        return ''


def _some_trainer():
    """Stands for the trainer where there is none yet: it has the same attributes."""
    updater = types.SimpleNamespace(
        get_all_optimizers=dict, connect_trainer=lambda trainer: None
    )
    names = [name for name in dir(training.Trainer(updater)) if name[0] != '_']
    return type('Trainer', (), dict.fromkeys(names, _SomeValue()))()


def _check_placeholders(filename, trainer, ignored: tuple = ()) -> None:
    if not isinstance(filename, str):
        raise TypeError(f'filename must be a str, not {filename!r}')
    try:
        filename.format(trainer)
    except ignored:
        pass
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            'filename must be a str that can be formatted with the trainer, not '
            f'{filename!r}: {type(error).__name__}: {error}'
        ) from error


def _check_format(filename: str) -> None:
    from matplotlib import backend_bases, figure

    formats = backend_bases.FigureCanvasBase.get_supported_filetypes()
    ending = os.path.splitext(filename)[1]
    if ending[1:].lower() not in formats:
        raise ValueError(
            f'filename must end with a format of Matplotlib, .{", .".join(formats)}, '
            f'not with {ending!r}: {filename!r}'
        )
    try:  # some formats need other programs
        figure.Figure((1, 1)).savefig(io.BytesIO(), format=ending[1:])
    except Exception as error:
        raise ValueError(
            'filename must end with a format that Matplotlib can write here, not with '
            f'{ending!r}: {type(error).__name__}: {error}'
        ) from error


def _save(figure, path: str) -> None:
    """Writes a picture, which appears at its place when it is complete."""
    os.makedirs(os.path.dirname(path) or os.curdir, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:], dpi=110)
