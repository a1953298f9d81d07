"""Trains segmentation models with and without deformable convolutions.

All models see only upright digits of one size in training. They are tested on other
digits, upright, rotated, scaled, and both. See README.rst.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # isort: skip  (before NumPy, for which it chooses the threads)

import numpy
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer import training
from chainer.training import extensions
from common import Failure
from data import BACKGROUND, CLASSES, CONDITIONS, load_datasets
from evaluator import SegmentationEvaluator
from models import LAST_CONVOLUTIONS, SceneNet

TEST_BATCHSIZE = 20
MIOUS = {f'{condition}/main/miou': condition for condition in CONDITIONS}
SCENE_SHOWN = 0  # of the test scenes, in all conditions
DIGITS_SHOWN = 3  # of that scene, with the points where the layers look at them
COLOURS = ListedColormap([*colormaps['tab10'].colors, 'whitesmoke'])


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = common.make_parser(__doc__, LAST_CONVOLUTIONS)
    add = parser.add_argument
    add('--scenes', type=common.integer(1), help='scenes to train on')
    add('--test-scenes', type=common.integer(1), help='scenes to test on')
    add('--device', help='@numpy for the CPU, @cupy:0 or 0 for a GPU')
    parser.set_defaults(
        scenes=600, test_scenes=100, epoch=12, batchsize=16, device='@numpy'
    )
    common.run_script(parser, run)


def run(args: argparse.Namespace) -> None:
    """Trains and compares the models that the options ask for.

    Raises:
        Failure: A file, the device or an option is not usable.

    """
    kinds = common.chosen_models(args)
    device = common.use_device(args.device)
    if args.batchsize > args.scenes:
        raise Failure(
            f'--batchsize {args.batchsize} is too large: '
            f'there are {args.scenes} training scenes'
        )
    for kind in kinds:
        common.make_directory(args.out / kind)
    train, tests = load_datasets(args.scenes, args.test_scenes)

    common.configure()
    results, logs, predictions = {}, {}, {}
    shown = {condition: scenes[SCENE_SHOWN] for condition, scenes in tests.items()}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, train, tests, shown)
        if args.resume:
            common.resume(args.resume, trainer)
        print(f'\n{kind}')
        trainer.run()
        logs[kind] = trainer.get_extension('LogReport').log
        results[kind] = summarise(trainer)
        predictions[kind] = predict(trainer, shown)

    options = ('scenes', 'test_scenes', 'epoch', 'batchsize', 'seed')
    report = {**{name: getattr(args, name) for name in options}, 'models': results}
    common.write_json(args.out / 'results.json', report)
    curves = common.plot_curves(logs, MIOUS, 'mean IoU')
    common.write(args.out / 'curves.png', curves.savefig)
    picture = plot_predictions(shown, predictions)
    common.write(args.out / 'predictions.png', picture.savefig)
    print(
        f'\n{table(results)}\n\n'
        f'See results.json, curves.png and predictions.png in {args.out}.'
    )


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    train: chainer.dataset.DatasetMixin,
    tests: dict[str, chainer.dataset.DatasetMixin],
    shown: dict[str, tuple],
) -> training.Trainer:
    """Returns the trainer of one model, which writes to a directory of its own."""
    numpy.random.seed(args.seed)  # for the initial weights; nothing else draws from it
    net = SceneNet(kind, len(CLASSES))
    model = chainer.links.Classifier(net)
    model.to_device(device)
    optimizer = chainer.optimizers.Adam(alpha=1e-2).setup(model)
    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=common.shuffler(args.seed)
    )
    updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))

    for condition, scenes in tests.items():
        iterator = chainer.iterators.SerialIterator(
            scenes, TEST_BATCHSIZE, repeat=False, shuffle=False
        )
        evaluator = SegmentationEvaluator(iterator, model, CLASSES, device)
        trainer.extend(evaluator, name=condition)
    if net.offset_convs():  # the plain models have none, and are not warned of
        trainer.extend(chainer_deform.extensions.OffsetStatistics())
        images = [shown[condition][0] for condition in ('upright', 'both')]
        pixels = pixels_on_digits(shown['upright'][1])
        trainer.extend(chainer_deform.extensions.SamplingPointsReport(images, pixels))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(['epoch', 'main/loss', *MIOUS]))
    trainer.extend(extensions.PlotReport(['main/loss'], 'epoch', filename='loss.png'))
    trainer.extend(extensions.PlotReport([*MIOUS], 'epoch', filename='miou.png'))
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))
    return trainer


def pixels_on_digits(label: numpy.ndarray) -> list[tuple[int, int]]:
    """Returns a pixel ``(y, x)`` of each of some digits in a scene."""
    pixels = []
    for digit in numpy.unique(label[label != BACKGROUND])[:DIGITS_SHOWN]:
        places = numpy.argwhere(label == digit)
        pixels.append(tuple(places[len(places) // 2].tolist()))
    return pixels


def predict(trainer: training.Trainer, shown: dict[str, tuple]) -> numpy.ndarray:
    """Returns the classes of the pixels of scenes, as the trained model has them."""
    net = trainer.updater.get_optimizer('main').target.predictor
    images = net.device.send(numpy.stack([image for image, _ in shown.values()]))
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        return chainer.backends.cuda.to_cpu(net(images).array).argmax(axis=1)


def summarise(trainer: training.Trainer) -> dict:
    """Returns the figures of a model at the end of its training."""
    last = trainer.get_extension('LogReport').log[-1]
    net = trainer.updater.get_optimizer('main').target.predictor
    return {
        'parameters': net.count_params(),
        'offset_parameters': sum(conv.count_params() for conv in net.offset_convs()),
        'miou': {condition: round(last[key], 6) for key, condition in MIOUS.items()},
        'seconds': round(trainer.elapsed_time, 1),
    }


def table(results: dict[str, dict]) -> str:
    """Returns the table of all models."""
    conditions = ''.join(f'{condition:>9}' for condition in CONDITIONS)
    lines = [
        '                                   mean IoU',
        f'model       parameters  of offsets{conditions}  seconds',
    ]
    for kind, result in results.items():
        mious = ''.join(f'{miou:9.1%}' for miou in result['miou'].values())
        lines.append(
            f'{kind:10}  {result["parameters"]:10,}  {result["offset_parameters"]:10,}'
            f'{mious}  {result["seconds"]:7.1f}'
        )
    return '\n'.join(lines)


def plot_predictions(
    shown: dict[str, tuple], predictions: dict[str, numpy.ndarray]
) -> Figure:
    """Returns a picture of scenes, their true classes, and those of each model."""
    columns = 2 + len(predictions)
    size = 1.9 * columns, 1.9 * len(shown) + 0.7
    figure = Figure(figsize=size, dpi=90, layout='constrained')
    axes = figure.subplots(len(shown), columns)
    for ax, title in zip(axes[0], ['scene', 'truth', *predictions]):
        ax.set_title(title)
    for i, (row, (condition, (image, truth))) in enumerate(zip(axes, shown.items())):
        row[0].imshow(image[0], cmap='gray', vmin=0, vmax=1)
        row[0].set_ylabel(condition)
        labels = [truth, *(predicted[i] for predicted in predictions.values())]
        for ax, label in zip(row[1:], labels):
            ax.imshow(label, COLOURS, vmin=0, vmax=COLOURS.N - 1, interpolation='none')
        for ax in row:
            ax.set(xticks=[], yticks=[])
    handles = [Patch(color=c, label=n) for c, n in zip(COLOURS.colors, CLASSES)]
    handles = handles[:BACKGROUND]  # white needs no name
    figure.legend(handles=handles, loc='outside lower center', ncols=5)
    return figure


if __name__ == '__main__':
    main()
