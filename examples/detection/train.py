"""Trains detectors with and without deformable convolutions and deformable pooling.

They find digits that are scattered, turned and scaled over clutter. See README.rst.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # isort: skip  (before NumPy, for which it chooses the threads)

import numpy

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer import training
from chainer.training import extensions
from common import Failure
from data import load_datasets
from evaluator import DetectionEvaluator
from models import MODELS, DetectionLoss, Detector, regular_points
from pictures import plot_bins, plot_found

CLASSES = 10
TEST_BATCHSIZE = 20
MEASURES = [f'test/main/{name}' for name in ('ap50', 'ap75', 'ap')]
CURVES = {'test/main/ap50': 'IoU 0.5', 'test/main/ap75': 'IoU 0.75'}
SHOWN = 3  # test scenes in the pictures, the first ones
LOSSES = [f'main/{name}' for name in ('propose', 'place', 'classify', 'correct')]


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = common.make_parser(__doc__, MODELS)
    add = parser.add_argument
    add('--scenes', type=common.integer(1), help='scenes to train on')
    add('--device', help='@numpy for the CPU, @cupy:0 or 0 for a GPU')
    parser.set_defaults(scenes=600, batchsize=8, device='@numpy')
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
    datasets = load_datasets(args.scenes)

    common.configure()
    looked_at = datasets[1][:TEST_BATCHSIZE]
    results, logs, found, points = {}, {}, {}, {}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, datasets)
        if args.resume:
            common.resume(args.resume, trainer)
        print(f'\n{kind}')
        trainer.run()
        logs[kind] = trainer.get_extension('LogReport').log
        net = trainer.updater.get_optimizer('main').target.predictor
        found[kind], points[kind] = look(net, looked_at)
        moves = [
            points - regular_points(boxes)
            for points, (_, boxes, _) in zip(points[kind], looked_at)
        ]
        results[kind] = summarise(trainer, numpy.concatenate(moves))

    options = ('scenes', 'epoch', 'batchsize', 'seed')
    report = {**{name: getattr(args, name) for name in options}, 'models': results}
    common.write_json(args.out / 'results.json', report)
    curves = common.plot_curves(logs, CURVES, 'average precision')
    curves.axes[0].set_ylabel('loss')
    scenes = looked_at[:SHOWN]
    for name, picture in {
        'curves': curves,
        'found': plot_found(scenes, found),
        'bins': plot_bins(scenes, points),
    }.items():
        common.write(args.out / f'{name}.png', picture.savefig)
    print(
        f'\n{table(results)}\n\n'
        f'See results.json, curves.png, found.png and bins.png in {args.out}.'
    )


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    datasets: tuple,
) -> training.Trainer:
    """Returns the trainer of one model, which writes to a directory of its own."""
    train, test = datasets
    numpy.random.seed(args.seed)  # for the initial weights; nothing else draws from it
    net = Detector(kind, CLASSES)
    model = DetectionLoss(net)
    model.to_device(device)
    optimizer = chainer.optimizers.Adam(alpha=5e-3).setup(model)
    for link, factor in net.offset_links():
        chainer_deform.optimizer_hooks.scale_updates(link, factor)
    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=common.shuffler(args.seed)
    )
    updater = training.updaters.StandardUpdater(
        iterator, optimizer, converter=to_batch, device=device
    )
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)

    iterator = chainer.iterators.SerialIterator(
        test, TEST_BATCHSIZE, repeat=False, shuffle=False
    )
    trainer.extend(DetectionEvaluator(iterator, model, device=device), name='test')
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))
    if net.offset_links():  # the plain model has none, and is not warned of
        trainer.extend(chainer_deform.extensions.OffsetStatistics())
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(['epoch', 'main/loss', *MEASURES]))
    trainer.extend(extensions.PlotReport(LOSSES, 'epoch', filename='losses.png'))
    trainer.extend(extensions.PlotReport(MEASURES, 'epoch', filename='ap.png'))
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))
    return trainer


@chainer.dataset.converter()
def to_batch(batch: list[tuple], device: chainer.backend.Device) -> tuple:
    """Returns the images as one array on the device, boxes and classes as lists."""
    images, boxes, labels = zip(*batch)
    return device.send(numpy.stack(images)), list(boxes), list(labels)


def look(net: Detector, scenes: list[tuple]) -> tuple[list, list]:
    """Returns what a model finds in scenes, and where it reads the true boxes."""
    images, boxes, _ = to_batch(scenes, net.device)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        return net(images), net.sampling_points(images, boxes)


def summarise(trainer: training.Trainer, moves: numpy.ndarray) -> dict:
    """Returns the figures of a model at the end of its training.

    Args:
        trainer: The trainer.
        moves: How far points are moved, in pixels ``(y, x)`` along the last axis.

    """
    last = trainer.get_extension('LogReport').log[-1]
    net = trainer.updater.get_optimizer('main').target.predictor
    links = [link for link, _ in net.offset_links()]
    lengths = numpy.linalg.norm(moves, axis=-1)
    return {
        'parameters': net.count_params(),
        'offset_parameters': sum(link.count_params() for link in links),
        'ap50': round(last['test/main/ap50'], 6),
        'ap75': round(last['test/main/ap75'], 6),
        'ap': round(last['test/main/ap'], 6),
        'bin_shift': round(float(lengths.mean()), 6),
        'seconds': round(trainer.elapsed_time, 1),
    }


def table(results: dict[str, dict]) -> str:
    """Returns the table of all models."""
    lines = ['model        parameters  of offsets   AP50   AP75     AP  shift  seconds']
    for kind, result in results.items():
        parameters, of_offsets, ap50, ap75, ap, shift, seconds = result.values()
        lines.append(
            f'{kind:11}  {parameters:10,}  {of_offsets:10,}'
            f'  {ap50:5.1%}  {ap75:5.1%}  {ap:5.1%}  {shift:5.2f}  {seconds:7.1f}'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
