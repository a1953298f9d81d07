"""How far the offsets of every deformable layer move its points, for the log."""

from __future__ import annotations

import json
import math
import warnings

import chainer
import numpy
from chainer import backend, training

from chainer_deform.link_hooks import (
    Recorder,
    described,
    named_layers,
    warn_of_unseen,
)


class OffsetStatistics(training.Extension):
    """Trainer extension that reports how far offsets move the sampling points.

    By itself it finds the deformable layers of all models that are trained. It measures
    every training pass through them (``chainer.config.train`` is true; the passes of an
    evaluator do not count), and reports once an epoch, in time for :class:`LogReport
    <chainer.training.extensions.LogReport>` and what reads it. Of each layer, by the
    name of the optimizer, ``main`` if there is one, and the layer's path in its model:

    - ``main/predictor/conv/offset_mean``: mean length of the offsets ``(y, x)``, in
      pixels of the layer's input: how far they move points or, in RoI pooling, bins;
      in attention, how far the points are from their reference,
    - ``main/predictor/conv/offset_max``: the largest length,
    - ``main/predictor/conv/points_outside``: share of the sampling points that lie at
      or beyond -1 or the side of the layer's input, where they read zeros, infinite
      ones among them; in RoI pooling, of those that are not read,
    - ``main/predictor/conv/offsets_not_finite``: share of the offsets that are infinite
      or NaN.

    Mean and maximum are over the finite offsets of all passes since the last report, or
    since the start of the run, and 0 if there is none. An offset longer than 1e19
    pixels counts as infinite. A layer that was not called is not reported. A warning
    says so, once, if there is no deformable layer, or one of Chainer's own class, which
    is not measured: call :func:`chainer_deform.patch_chainer` before the model is
    built.

    A warning is given, once for each layer, when an offset is longer than
    ``warn_above`` or not finite: offsets that explode never come back, as points
    outside the image pass no gradient.

    It costs a few passes over the offsets of each layer: 1 to 3% of a training step of
    ``examples/digits``, more where the layers have fewer channels. On a GPU the
    results stay there, and are looked at and warned of when they are reported. A
    snapshot holds what was measured since the last report; where that is missing or
    damaged, a warning says so, and the resumed training measures anew. With several
    processes, each reports its own.

    To report at other times give ``trainer.extend`` a trigger, the one of the
    ``LogReport``: ``trainer.extend(OffsetStatistics(), trigger=(100, 'iteration'))``.

    Args:
        warn_above (float or None): Length in pixels. If ``None``, the longer side of
            the layer's input. ``float('inf')`` warns only of offsets that are not
            finite.

    Raises:
        ValueError: ``warn_above`` is not a positive number.

    .. seealso:: :func:`chainer_deform.optimizer_hooks.scale_updates`, what helps
        against offsets that explode.

    .. admonition:: Example

        >>> import tempfile
        >>> from chainer import training
        >>> from chainer.training.extensions import LogReport
        >>> class Model(chainer.Chain):
        ...     def __init__(self):
        ...         super().__init__()
        ...         with self.init_scope():
        ...             self.conv = chainer_deform.links.DeformableConvolution2D(
        ...                 1, 4, 3, pad=1)
        ...     def forward(self, x):
        ...         return chainer.functions.mean(self.conv(x) ** 2)
        >>> optimizer = chainer.optimizers.SGD().setup(Model())
        >>> images = np.random.uniform(0, 1, (6, 1, 8, 10)).astype(np.float32)
        >>> iterator = chainer.iterators.SerialIterator(images, 2)
        >>> updater = training.updaters.StandardUpdater(iterator, optimizer)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     trainer = training.Trainer(updater, (1, 'epoch'), out)
        ...     trainer.extend(chainer_deform.extensions.OffsetStatistics())
        ...     trainer.extend(LogReport())
        ...     trainer.run()
        >>> log = trainer.get_extension('LogReport').log
        >>> bool(log[0]['main/conv/offset_max'] >= log[0]['main/conv/offset_mean'])
        True

    """

    trigger = 1, 'epoch'
    priority = training.PRIORITY_WRITER

    def __init__(self, warn_above: float | None = None) -> None:
        if warn_above is not None and not warn_above > 0:
            raise ValueError(f'warn_above must be a positive number, not {warn_above}')
        self._warn_above = warn_above
        self._hooks: dict[str, _Measure] = {}
        self._resumed: dict[str, list[float]] = {}

    def __repr__(self) -> str:
        return described(self, warn_above=self._warn_above, layers=list(self._hooks))

    def initialize(self, trainer: training.Trainer) -> None:
        self._remove_hooks()  # of a run that another extension kept from starting
        optimizers = trainer.updater.get_all_optimizers()
        models = {name: optimizer.target for name, optimizer in optimizers.items()}
        warn_of_unseen('OffsetStatistics', models)
        found = set()
        for name, model in models.items():
            for path, link in named_layers(model).items():
                if id(link) not in found:  # two optimizers may have the same model
                    found.add(id(link))
                    key = f'{name}/{path}'.rstrip('/')
                    hook = _Measure(key, link, self._warn_above)
                    hook.totals = self._resumed.get(key, hook.totals)
                    self._hooks[key] = hook
                    link.add_hook(hook)

    def __call__(self, trainer: training.Trainer) -> None:
        for hook in self._hooks.values():
            hook.warn()
            chainer.report(hook.report())

    def finalize(self) -> None:
        self._remove_hooks()
        self._resumed = {}

    def serialize(self, serializer) -> None:
        if isinstance(serializer, chainer.Serializer):
            totals = {
                key: [float(total) for total in hook.totals]  # copied from the GPU
                for key, hook in self._hooks.items()
            }
            # Bytes, as HDF5 files take no arrays of text.
            state = json.dumps(totals).encode()
            serializer('_totals', numpy.frombuffer(state, numpy.uint8))
        else:
            self._resumed = _resumed(serializer)
            for key, hook in self._hooks.items():  # if loaded after initialize()
                hook.totals = self._resumed.get(key, hook.totals)

    def _remove_hooks(self) -> None:
        for hook in self._hooks.values():
            if hook.name in hook.link.local_link_hooks:
                hook.link.delete_hook(hook.name)
        self._hooks = {}


def _resumed(serializer) -> dict[str, list[float]]:
    """The totals in a snapshot, by key; a warning and none if they cannot be read."""
    try:
        state = serializer('_totals', None)
        if state is None:
            return {}
        # Older snapshots hold text.
        text = state.tobytes() if state.dtype == numpy.uint8 else str(state)
        return {key: _totals(values) for key, values in json.loads(text).items()}
    except Exception as error:  # of the file's format, say, or of json
        warnings.warn(
            'The snapshot holds no offset statistics that can be read, so '
            f'OffsetStatistics starts anew ({type(error).__name__}: {error})',
            stacklevel=3,
        )
        return {}


def _totals(values) -> list[float]:
    """The totals of a layer, as :class:`_Measure` has them, if they can be that."""
    count, finite, total, largest, outside_count = map(float, values)
    totals = [count, finite, total, largest, outside_count]
    least, most = min(totals), max(finite, outside_count)
    if not (least >= 0 and most <= count and math.isfinite(sum(totals))):
        raise ValueError(f'impossible totals: {values}')
    return totals


class _Measure(chainer.LinkHook):
    """Adds up what is reported of one layer.

    ``totals`` are the number of offsets, that of the finite ones, the sum of their
    lengths, the largest of them, and the number of points outside. On a GPU all but the
    first are arrays without axes there, so that nothing has to wait for it.
    """

    nothing = 0, 0, 0.0, 0.0, 0

    def __init__(self, key: str, link: chainer.Link, warn_above: float | None) -> None:
        self.name = f'OffsetStatistics {id(self)}'  # two trainers may have the model
        self.link = link
        self.totals: tuple | list = self.nothing
        self._key = key
        self._warn_above = warn_above
        self._warned = False
        self._x_size = 0, 0  # the largest
        self._recorder = Recorder()

    def __repr__(self) -> str:
        return f'OffsetStatistics of {self._key!r}'

    def __reduce__(self):
        return chainer.LinkHook, ()  # a copy of the model is not measured

    def forward_preprocess(self, args) -> None:
        # A shallow copy of the link, on another GPU say, shares its hooks.
        if chainer.config.train and args.link is self.link:
            self._recorder.start(args.link)

    def forward_postprocess(self, args) -> None:
        if not chainer.config.train or args.link is not self.link:
            return
        call = self._recorder.sampling_call(args, self._key)
        if call is None:
            return
        with numpy.errstate(all='ignore'), chainer.using_device(self.link.device):
            moves = call.moves()
            if not moves[0].size:
                return
            self._x_size = max(self._x_size, call.x_size, key=max)
            xp = backend.get_array_module(moves[0])
            new = self._measure(xp, call, *moves)
            count, finite, total, largest, outside_count = self.totals
            self.totals = (
                count + new[0],
                finite + new[1],
                total + new[2],
                xp.maximum(largest, new[3]),
                outside_count + new[4],
            )
        if xp is numpy:
            self.warn()

    def _measure(self, xp, call, y, x) -> tuple:
        length = xp.sqrt(x * x + y * y)  # hypot takes five times as long
        finite = xp.isfinite(length)
        length = xp.where(finite, length, 0)
        return (
            length.size,
            xp.count_nonzero(finite),
            length.sum(dtype=numpy.float64),
            length.max(),
            call.outside().sum(),
        )

    def warn(self) -> None:
        """Warns, once, of offsets that are too long; waits for a GPU."""
        if self._warned or not max(self._x_size):
            return
        count, finite, _, largest, _ = self.totals
        limit = max(self._x_size) if self._warn_above is None else self._warn_above
        if finite < count:
            problem = (
                f'{int(count - finite):,} of {int(count):,} offsets are not finite'
            )
        elif largest > limit:
            problem = f'an offset is {float(largest):,.1f} pixels long'
        else:
            return
        self._warned = True
        warnings.warn(
            f'{self._key}: {problem}, where the input of the layer has '
            f'{self._x_size[0]} x {self._x_size[1]} pixels. Points outside it read '
            'zeros and get no gradient, so they stay there. To have what predicts the '
            'offsets learn more slowly: '
            'chainer_deform.optimizer_hooks.scale_updates('
            f'layer.{self._predictor()}, 0.1)',
            stacklevel=2,
        )

    def _predictor(self) -> str:
        return 'offset_fc' if hasattr(self.link, 'offset_fc') else 'offset_conv'

    def report(self) -> dict:
        """What is reported, by key; starts anew."""
        count, finite, total, largest, outside_count = self.totals
        self.totals = self.nothing
        if not count:
            return {}
        xp = backend.get_array_module(finite)
        with chainer.using_device(self.link.device):
            values = {
                'offset_mean': total / xp.maximum(finite, 1),
                'offset_max': largest,
                'points_outside': outside_count / count,
                'offsets_not_finite': (count - finite) / count,
            }
        return {f'{self._key}/{name}': value for name, value in values.items()}
