"""Trains digit classifiers with and without deformable convolutions.

All models see only upright digits in training. They are tested on other upright
digits, and on the same ones rotated, scaled and sheared. See README.rst.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import matplotlib
import numpy
from matplotlib.figure import Figure

import chainer_deform  # isort: skip  (before Chainer, which it repairs)

import chainer
import data
from chainer import training
from chainer.training import extensions
from models import LAST_CONVOLUTIONS, DigitNet

UPRIGHT = 'validation/main/accuracy'
WARPED = 'warped/main/accuracy'
TEST_BATCHSIZE = 100  # divides the test sets, so that the mean over batches is exact


class Failure(Exception):
    """Something the user has to put right; the message says what."""


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        run(args)
    except Failure as failure:
        parser.error(str(failure))


def run(args: argparse.Namespace) -> None:
    """Does what ``main`` does for options that have been parsed."""
    kinds = list(dict.fromkeys(args.model))
    if args.resume and len(kinds) > 1:
        raise Failure('--resume continues one model: give --model one name')
    device = use_device(args.device)
    for kind in kinds:
        make_directory(args.out / kind)
    datasets = load_data(args.dataset)
    if args.batchsize > len(datasets[0]):
        raise Failure(
            f'--batchsize {args.batchsize} is more than the {len(datasets[0])} '
            'training images'
        )

    matplotlib.use('Agg')  # no display is needed
    chainer.config.cudnn_deterministic = True
    results, logs = {}, {}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, datasets)
        if args.resume:
            resume(args.resume, trainer)
        print(f'\n{kind}')
        trainer.run()
        results[kind], logs[kind] = summarise(trainer)

    options = ('dataset', 'epoch', 'batchsize', 'seed', 'offset_rate')
    report = {**{name: getattr(args, name) for name in options}, 'models': results}
    text = json.dumps(report, indent=2) + '\n'
    replace(args.out / 'accuracies.json', lambda path: path.write_text(text))
    replace(args.out / 'curves.png', lambda path: plot(logs).savefig(path, format='png'))
    print(f'\n{table(results)}\n\nSee {args.out}/accuracies.json and curves.png.')


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line, without the usage, what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


def make_parser() -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--model', nargs='+', choices=LAST_CONVOLUTIONS, default=['deformable'],
        help='which models to train, one after another')  # fmt: skip
    add('--dataset', choices=data.DATASETS, default='digits',
        help='digits come with scikit-learn, the others are downloaded')  # fmt: skip
    add('--epoch', type=integer(1), default=10, help='epochs to train in all')
    add('--batchsize', type=integer(1), default=32, help='images per update')
    add('--seed', type=integer(0, 2**32 - 1), default=0,
        help='of the initial weights and of the order of the images')  # fmt: skip
    add('--offset-rate', type=factor, default=1.0,
        help="learning rate of the offset convolutions, relative to the rest's")  # fmt: skip
    add('--device', default='@numpy', help='@numpy, or @cupy:0 or 0 for a GPU')
    add('--resume', metavar='SNAPSHOT', help='continue from this file')
    add('--out', type=pathlib.Path, default='result', help='directory to write to')
    return parser


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns the type of an option that is an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            limit = f'of at least {low}' if high is None else f'from {low} to {high}'
            raise argparse.ArgumentTypeError(f'must be an integer {limit}, not {text!r}')
        return value

    return parse


def factor(text: str) -> float:
    """The type of an option that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(
            f'must be a finite number of at least 0, not {text!r}'
        )
    return value


def use_device(name: str) -> chainer.backend.Device:
    """Returns the device, once it works."""
    try:
        device = chainer.get_device(name)
        device.use()
    except (OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).partition('\n')[0]
        raise Failure(f'cannot use --device {name}: {reason}') from None
    return device


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory unless it is there, and sees that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Failure(f'cannot write to {path}: {error.strerror}') from None


def load_data(name: str) -> tuple:
    """Returns the training set, the test set and the warped test set."""
    try:
        return data.load(name)
    except Exception as error:  # whatever the network or a broken file comes to
        reason = str(error).partition('\n')[0]
        raise Failure(f'cannot load --dataset {name}: {reason}') from None


def make_trainer(kind: str, args, device, datasets) -> training.Trainer:
    """Returns a trainer of one model, which writes to a directory of its own."""
    numpy.random.seed(args.seed)  # for the weights; nothing else draws from it
    train, upright, warped = datasets
    net = DigitNet(kind)
    model = chainer.links.Classifier(net)
    model.to_device(device)
    optimizer = chainer.optimizers.Adam(alpha=2e-3).setup(model)
    for conv in net.offset_convs():
        chainer_deform.optimizer_hooks.scale_updates(conv, args.offset_rate)

    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=order_sampler(args.seed)
    )
    updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)

    for name, dataset in ('validation', upright), ('warped', warped):
        batches = chainer.iterators.SerialIterator(
            dataset, TEST_BATCHSIZE, repeat=False, shuffle=False
        )
        evaluator = extensions.Evaluator(batches, model, device=device)
        trainer.extend(evaluator, name=name)
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))
    trainer.extend(extensions.LogReport())
    losses = ['main/loss', 'validation/main/loss', 'warped/main/loss']
    accuracies = ['main/accuracy', UPRIGHT, WARPED]
    trainer.extend(extensions.PrintReport(['epoch', losses[0], *accuracies]))
    for keys, filename in (losses, 'loss.png'), (accuracies, 'accuracy.png'):
        report = extensions.PlotReport(keys, 'epoch', filename=filename)
        trainer.extend(report, name=filename)
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(Settings(
        model=kind, dataset=args.dataset, batchsize=args.batchsize,
        seed=args.seed, offset_rate=args.offset_rate,
    ))  # fmt: skip
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))
    return trainer


def order_sampler(seed: int) -> Callable:
    """Returns what puts the training images into a new random order for each epoch.

    Each order follows from the one before. So a snapshot, which holds the present
    order but no random generator, is enough to continue exactly.
    """

    def next_order(order, position):
        random = numpy.random.RandomState([seed, *order])
        return random.permutation(len(order))

    return next_order


class Settings(training.Extension):
    """Keeps in the snapshots with which options their training was started."""

    def __init__(self, **settings) -> None:
        self.settings = settings

    def __call__(self, trainer) -> None:
        """Has nothing to do while training goes on."""

    def serialize(self, serializer) -> None:
        serializer('settings', json.dumps(self.settings))


def resume(path: str, trainer: training.Trainer) -> None:
    """Loads a snapshot, if it is one of the same training."""
    try:
        with numpy.load(path) as snapshot:
            old = json.loads(str(snapshot['extensions/Settings/settings']))
        for name, value in trainer.get_extension('Settings').settings.items():
            if old[name] != value:
                option = '--' + name.replace('_', '-')
                raise Failure(
                    f'--resume {path} was trained with {option} {old[name]}, '
                    f'not with {value}'
                )
        chainer.serializers.load_npz(path, trainer)
    except Failure:
        raise
    except OSError as error:
        raise Failure(f'--resume {path}: {error.strerror or error}') from None
    except Exception:  # a broken file can break anything on the way
        raise Failure(
            f'--resume {path} is no snapshot of this script, or is broken'
        ) from None
    epoch, target = trainer.updater.epoch, trainer.stop_trigger.period
    if epoch >= target:
        raise Failure(
            f'--resume {path} has {epoch} epochs already: --epoch must be more, '
            f'not {target}'
        )


def summarise(trainer: training.Trainer) -> tuple[dict, list[dict]]:
    """Returns the figures of a model at the end of its training, and its log."""
    log = trainer.get_extension('LogReport').log
    net = trainer.updater.get_optimizer('main').target.predictor
    result = {
        'parameters': net.count_params(),
        'offset_parameters': sum(conv.count_params() for conv in net.offset_convs()),
        'accuracy_upright': round(log[-1][UPRIGHT], 6),
        'accuracy_warped': round(log[-1][WARPED], 6),
        'seconds': round(trainer.elapsed_time, 1),
    }
    return result, log


def table(results: dict[str, dict]) -> str:
    """Returns the table of all models."""
    lines = ['model       parameters  of offsets  upright  warped  seconds']
    lines += [
        f'{kind:10}  {r["parameters"]:10,}  {r["offset_parameters"]:10,}  '
        f'{r["accuracy_upright"]:7.2%}  {r["accuracy_warped"]:6.2%}  {r["seconds"]:7.1f}'
        for kind, r in results.items()
    ]
    return '\n'.join(lines)


def plot(logs: dict[str, list[dict]]) -> Figure:
    """Returns a picture of loss and accuracy by epoch, one colour per model."""
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2)
    for number, (kind, log) in enumerate(logs.items()):
        epochs = [entry['epoch'] for entry in log]

        def line(axes, key, style, label, epochs=epochs, log=log, color=f'C{number}'):
            values = [entry[key] for entry in log]
            axes.plot(epochs, values, style, color=color, label=label, markersize=4)

        line(left, 'main/loss', 'o-', kind)
        line(right, UPRIGHT, 'o-', f'{kind}, upright')
        line(right, WARPED, 's--', f'{kind}, warped')
    left.set(title='Training loss', ylabel='cross-entropy', yscale='log')
    right.set(title='Accuracy on the test set', ylabel='accuracy', ylim=(0, 1.02))
    for axes in left, right:
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes a file beside its place and renames it: it is never there half written."""
    beside = path.with_name(path.name + '.part')
    write(beside)
    os.replace(beside, path)


if __name__ == '__main__':
    main()
