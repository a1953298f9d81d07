"""Trains segmentation models with and without deformable convolutions.

All models see only mildly warped photographs in training. They are tested on other
parts of the photographs, warped as mildly and more strongly. See README.rst.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # isort: skip  (before NumPy, for which it chooses the threads)

import numpy
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer import training
from chainer.training import extensions
from common import Failure
from data import PHOTOGRAPHS, load_datasets
from evaluator import SegmentationEvaluator
from models import LAST_CONVOLUTIONS, SegmentationNet

TEST_BATCHSIZE = 20
WARPS = 'mild', 'strong'
MIOUS = {f'{warps}/main/miou': warps for warps in WARPS}
SCENES_SHOWN = 3  # of the test scenes, the first ones, mildly and strongly warped
COLOURS = ListedColormap(['#d55e00', '#009e73', '#56b4e9', '#cc79a7'])


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = common.make_parser(__doc__, LAST_CONVOLUTIONS)
    add = parser.add_argument
    add('--scenes', type=common.integer(1), help='scenes to train on')
    add('--device', help='@numpy for the CPU, @cupy:0 or 0 for a GPU')
    parser.set_defaults(scenes=600, batchsize=16, device='@numpy')
    args = parser.parse_args()
    try:
        run(args)
    except Failure as failure:
        parser.error(str(failure))


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
    datasets = load_datasets(args.scenes)

    common.configure()
    results, logs, predictions = {}, {}, {}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, datasets)
        if args.resume:
            common.resume(args.resume, trainer)
        print(f'\n{kind}')
        trainer.run()
        logs[kind] = trainer.get_extension('LogReport').log
        results[kind] = summarise(trainer)
        predictions[kind] = predict(trainer, shown(datasets))

    options = ('scenes', 'epoch', 'batchsize', 'seed')
    report = {**{name: getattr(args, name) for name in options}, 'models': results}
    common.write_json(args.out / 'results.json', report)
    curves = common.plot_curves(logs, MIOUS, 'mean IoU')
    common.write(args.out / 'curves.png', curves.savefig)
    picture = plot_predictions(shown(datasets), predictions)
    common.write(args.out / 'predictions.png', picture.savefig)
    print(
        f'\n{table(results)}\n\n'
        f'See results.json, curves.png and predictions.png in {args.out}.'
    )


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    datasets: tuple,
) -> training.Trainer:
    """Returns the trainer of one model, which writes to a directory of its own."""
    train, *tests = datasets
    numpy.random.seed(args.seed)  # for the initial weights; nothing else draws from it
    net = SegmentationNet(kind, len(PHOTOGRAPHS))
    model = chainer.links.Classifier(net)
    model.to_device(device)
    optimizer = chainer.optimizers.Adam(alpha=1e-2).setup(model)
    for conv in net.offset_convs():
        chainer_deform.optimizer_hooks.scale_updates(conv, 0.1)
    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=common.shuffler(args.seed)
    )
    updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)

    for warps, dataset in zip(WARPS, tests):
        iterator = chainer.iterators.SerialIterator(
            dataset, TEST_BATCHSIZE, repeat=False, shuffle=False
        )
        evaluator = SegmentationEvaluator(iterator, model, [*PHOTOGRAPHS], device)
        trainer.extend(evaluator, name=warps)
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))
    if net.offset_convs():  # the plain model has none, and is not warned of
        trainer.extend(chainer_deform.extensions.OffsetStatistics())
        images = [image for image, _ in shown(datasets)[:2]]
        trainer.extend(chainer_deform.extensions.SamplingPointsReport(images))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(['epoch', 'main/loss', *MIOUS]))
    trainer.extend(extensions.PlotReport(['main/loss'], 'epoch', filename='loss.png'))
    trainer.extend(extensions.PlotReport([*MIOUS], 'epoch', filename='miou.png'))
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))
    return trainer


def shown(datasets: tuple) -> list[tuple]:
    """Returns the scenes to draw: some of the mild test scenes, each with the strong.

    They are the first ones, whatever the models make of them.
    """
    _, mild, strong = datasets
    pairs = zip(mild[:SCENES_SHOWN], strong[:SCENES_SHOWN])
    return [scene for pair in pairs for scene in pair]


def predict(trainer: training.Trainer, scenes: list[tuple]) -> numpy.ndarray:
    """Returns the classes of the pixels of scenes, as the trained model has them."""
    net = trainer.updater.get_optimizer('main').target.predictor
    images = net.device.send(numpy.stack([image for image, _ in scenes]))
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        return chainer.backends.cuda.to_cpu(net(images).array).argmax(axis=1)


def summarise(trainer: training.Trainer) -> dict:
    """Returns the figures of a model at the end of its training."""
    last = trainer.get_extension('LogReport').log[-1]
    net = trainer.updater.get_optimizer('main').target.predictor
    result = {
        'parameters': net.count_params(),
        'offset_parameters': sum(conv.count_params() for conv in net.offset_convs()),
    }
    for warps in WARPS:
        names = 'miou', 'accuracy', *(f'iou/{name}' for name in PHOTOGRAPHS)
        result[warps] = {name: round(last[f'{warps}/main/{name}'], 6) for name in names}
    result['seconds'] = round(trainer.elapsed_time, 1)
    return result


def table(results: dict[str, dict]) -> str:
    """Returns the table of all models."""
    lines = [
        '                                   mean IoU        accuracy',
        'model       parameters  of offsets   mild  strong   mild  strong  seconds',
    ]
    for kind, result in results.items():
        mild, strong = (result[warps] for warps in WARPS)
        lines.append(
            f'{kind:10}  {result["parameters"]:10,}  {result["offset_parameters"]:10,}'
            f'  {mild["miou"]:5.1%}  {strong["miou"]:6.1%}'
            f'  {mild["accuracy"]:5.1%}  {strong["accuracy"]:6.1%}'
            f'  {result["seconds"]:7.1f}'
        )
    return '\n'.join(lines)


def plot_predictions(
    scenes: list[tuple], predictions: dict[str, numpy.ndarray]
) -> Figure:
    """Returns a picture of scenes, their true classes, and those of each model."""
    columns = 2 + len(predictions)
    size = 1.55 * columns, 1.55 * len(scenes) + 0.7
    figure = Figure(figsize=size, dpi=90, layout='constrained')
    axes = figure.subplots(len(scenes), columns)
    for ax, title in zip(axes[0], ['scene', 'truth', *predictions]):
        ax.set_title(title)
    for i, (row, (image, truth)) in enumerate(zip(axes, scenes)):
        row[0].imshow(image[0], cmap='gray', vmin=0, vmax=1)
        row[0].set_ylabel(WARPS[i % 2])
        labels = [truth, *(predicted[i] for predicted in predictions.values())]
        for ax, label in zip(row[1:], labels):
            ax.imshow(label, COLOURS, vmin=0, vmax=COLOURS.N - 1, interpolation='none')
        for ax in row:
            ax.set(xticks=[], yticks=[])
    handles = [Patch(color=c, label=n) for c, n in zip(COLOURS.colors, PHOTOGRAPHS)]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
    return figure


if __name__ == '__main__':
    main()
