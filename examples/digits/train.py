"""Trains digit classifiers with and without deformable convolutions.

All models see only upright digits in training. They are tested on other upright
digits, and on the same ones rotated, scaled and sheared. See README.rst.
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
from data import DATASETS, load_datasets
from models import LAST_CONVOLUTIONS, DigitNet

TEST_BATCHSIZE = 100  # divides the test sets, so that the mean over batches is exact
LOSSES = ['main/loss', 'validation/main/loss', 'warped/main/loss']
TEST_ACCURACIES = {
    'validation/main/accuracy': 'upright',
    'warped/main/accuracy': 'warped',
}
ACCURACIES = ['main/accuracy', *TEST_ACCURACIES]


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = make_parser(__doc__)
    parser.add_argument(
        '--device', default='@numpy', help='@numpy for the CPU, @cupy:0 or 0 for a GPU'
    )
    common.run_script(parser, run)


def make_parser(doc: str) -> common.Parser:
    """Returns the parser of the options that train_mn.py has, too."""
    parser = common.make_parser(doc, LAST_CONVOLUTIONS)
    parser.add_argument(
        '--dataset',
        choices=DATASETS,
        default='digits',
        help='all but digits are downloaded',
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Trains and compares the models that the options ask for.

    Raises:
        Failure: A file, the device or an option is not usable.

    """
    kinds = common.chosen_models(args)
    device = common.use_device(args.device)
    datasets = load(args.dataset)
    if args.batchsize > len(datasets[0]):
        raise Failure(
            f'--batchsize {args.batchsize} is too large: '
            f'there are {len(datasets[0])} training images'
        )
    for kind in kinds:
        common.make_directory(args.out / kind)

    common.configure()
    results, logs = {}, {}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, datasets)
        if args.resume:
            common.resume(args.resume, trainer)
        print(f'\n{kind}')
        trainer.run()
        logs[kind] = trainer.get_extension('LogReport').log
        results[kind] = summarise(trainer)
    compare(args, results, logs)


def load(name: str) -> tuple:
    """Returns the training set, the test set and the warped test set."""
    try:
        return load_datasets(name)
    except Exception as error:  # whatever the network or a broken file comes to
        raise Failure(
            f'cannot load --dataset {name}: {common.first_line(error)}'
        ) from None


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    datasets: tuple,
) -> training.Trainer:
    """Returns the trainer of one model, which writes to a directory of its own."""
    train, upright, warped = datasets
    optimizer = make_optimizer(kind, args.seed, device)
    trainer = make_training_loop(kind, args, device, train, optimizer)
    for name, dataset in ('validation', upright), ('warped', warped):
        iterator = chainer.iterators.SerialIterator(
            dataset, TEST_BATCHSIZE, repeat=False, shuffle=False
        )
        evaluator = extensions.Evaluator(iterator, optimizer.target, device=device)
        trainer.extend(evaluator, name=name)
    add_reports(trainer, upright, warped)
    return trainer


def make_optimizer(
    kind: str, seed: int, device: chainer.backend.Device
) -> chainer.Optimizer:
    """Returns the optimizer of a new model."""
    numpy.random.seed(seed)  # for the initial weights; nothing else draws from it
    model = chainer.links.Classifier(DigitNet(kind))
    model.to_device(device)
    return chainer.optimizers.Adam(alpha=2e-3).setup(model)


def make_training_loop(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    train: chainer.dataset.DatasetMixin,
    optimizer: chainer.Optimizer,
) -> training.Trainer:
    """Returns a trainer that updates the model, and neither tests it nor reports."""
    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=common.shuffler(args.seed)
    )
    updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))
    return trainer


def add_reports(
    trainer: training.Trainer,
    upright: chainer.dataset.DatasetMixin,
    warped: chainer.dataset.DatasetMixin,
) -> None:
    """Adds what prints and what writes files."""
    net = trainer.updater.get_optimizer('main').target.predictor
    if net.offset_convs():  # the plain model has none, and is not warned of
        trainer.extend(chainer_deform.extensions.OffsetStatistics())
        images = [upright[0], warped[0]]  # the same digit
        points = chainer_deform.extensions.SamplingPointsReport
        trainer.extend(points(images, labels=['upright', 'warped']))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(['epoch', 'main/loss', *ACCURACIES]))
    trainer.extend(extensions.PlotReport(LOSSES, 'epoch', filename='loss.png'))
    trainer.extend(extensions.PlotReport(ACCURACIES, 'epoch', filename='accuracy.png'))
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))


def summarise(trainer: training.Trainer) -> dict:
    """Returns the figures of a model at the end of its training."""
    last = trainer.get_extension('LogReport').log[-1]
    net = trainer.updater.get_optimizer('main').target.predictor
    return {
        'parameters': net.count_params(),
        'offset_parameters': sum(conv.count_params() for conv in net.offset_convs()),
        'upright_accuracy': round(last['validation/main/accuracy'], 6),
        'warped_accuracy': round(last['warped/main/accuracy'], 6),
        'seconds': round(trainer.elapsed_time, 1),
    }


def compare(
    args: argparse.Namespace, results: dict[str, dict], logs: dict, **more: int
) -> None:
    """Prints and writes what came out, under the options and ``more``."""
    options = ('dataset', 'epoch', 'batchsize', 'seed')
    report = {name: getattr(args, name) for name in options}
    report = {**report, **more, 'models': results}
    common.write_json(args.out / 'accuracies.json', report)
    curves = common.plot_curves(logs, TEST_ACCURACIES, 'accuracy')
    common.write(args.out / 'curves.png', curves.savefig)
    print(
        f'\n{table(results)}\n\n'
        f'See accuracies.json and curves.png in {args.out}, and the pictures of each '
        'model, such as its sampling points, in the directory named after it.'
    )


def table(results: dict[str, dict]) -> str:
    """Returns the table of all models."""
    lines = ['model       parameters  of offsets  upright   warped  seconds']
    for kind, result in results.items():
        parameters, offset_parameters, upright, warped, seconds = result.values()
        lines.append(
            f'{kind:10}  {parameters:10,}  {offset_parameters:10,}  '
            f'{upright:7.2%}  {warped:7.2%}  {seconds:7.1f}'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
