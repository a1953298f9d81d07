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

# Matrices as small as these gain nothing from threads, and how many there are changes
# the last bits. It has to be said before NumPy is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import matplotlib
import numpy
from matplotlib.figure import Figure

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer import training
from chainer.training import extensions
from data import DATASETS, load_datasets
from models import LAST_CONVOLUTIONS, DigitNet

TEST_BATCHSIZE = 100  # divides the test sets, so that the mean over batches is exact
LOSSES = ['main/loss', 'validation/main/loss', 'warped/main/loss']
ACCURACIES = ['main/accuracy', 'validation/main/accuracy', 'warped/main/accuracy']


class Failure(Exception):
    """Something that the user has to put right; the message says what."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line, without the usage, what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


def main() -> None:
    """Trains the models one after another, then compares them."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        run(args)
    except Failure as failure:
        parser.error(str(failure))


def make_parser() -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    models = 'models to train, one after another'
    add('--model', nargs='+', choices=LAST_CONVOLUTIONS, help=models)
    add('--dataset', choices=DATASETS, help='all but digits are downloaded')
    add('--epoch', type=integer(1), help='epochs to train')
    add('--batchsize', type=integer(1), help='images per update')
    add('--seed', type=integer(0), help='of the initial weights and the shuffling')
    add('--device', help='@numpy for the CPU, @cupy:0 or 0 for a GPU')
    add('--resume', metavar='SNAPSHOT', help='continue the training of this file')
    add('--out', type=pathlib.Path, help='directory to write to')
    parser.set_defaults(
        model=['deformable'],
        dataset='digits',
        epoch=10,
        batchsize=32,
        seed=0,
        device='@numpy',
        out=pathlib.Path('result'),
    )
    return parser


def integer(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Returns the type of an option that is an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'must be an integer from {low} to {high}, not {text!r}'
            )
        return value

    return parse


def run(args: argparse.Namespace) -> None:
    """Trains and compares the models that the options ask for.

    Raises:
        Failure: A file, the device or an option is not usable.

    """
    kinds = list(dict.fromkeys(args.model))
    if args.resume and len(kinds) > 1:
        raise Failure('--resume continues one model: give --model one name')
    device = use_device(args.device)
    for kind in kinds:
        make_directory(args.out / kind)
    datasets = load(args.dataset)
    if args.batchsize > len(datasets[0]):
        raise Failure(
            f'--batchsize {args.batchsize} is too large: '
            f'there are {len(datasets[0])} training images'
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
        logs[kind] = trainer.get_extension('LogReport').log
        results[kind] = summarise(trainer)

    options = ('dataset', 'epoch', 'batchsize', 'seed')
    report = {**{name: getattr(args, name) for name in options}, 'models': results}
    text = json.dumps(report, indent=2)
    write(args.out / 'accuracies.json', lambda path: path.write_text(text + '\n'))
    write(args.out / 'curves.png', plot(logs).savefig)
    print(f'\n{table(results)}\n\nSee accuracies.json and curves.png in {args.out}.')


def use_device(name: str) -> chainer.backend.Device:
    """Returns the device, once it works."""
    try:
        device = chainer.get_device(name)
        device.use()
    except (OverflowError, RuntimeError, ValueError) as error:
        raise Failure(f'cannot use --device {name}: {first_line(error)}') from None
    return device


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory unless it is there, and sees that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Failure(f'cannot write to {path}: {error.strerror}') from None


def load(name: str) -> tuple:
    """Returns the training set, the test set and the warped test set."""
    try:
        return load_datasets(name)
    except Exception as error:  # whatever the network or a broken file comes to
        raise Failure(f'cannot load --dataset {name}: {first_line(error)}') from None


def resume(path: str, trainer: training.Trainer) -> None:
    """Loads a snapshot, from which the trainer then goes on."""
    try:
        with open(path, 'rb') as file:
            chainer.serializers.load_npz(file, trainer)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise Failure(f'cannot read --resume {path}: {reason}') from None
    except Exception:  # whatever a broken or foreign file comes to
        raise Failure(
            f'--resume {path} is broken, or no snapshot of this model and dataset'
        ) from None
    done, wanted = trainer.updater.epoch, trainer.stop_trigger.period
    if done >= wanted:
        raise Failure(
            f'--resume {path} has {done} epochs already: --epoch {wanted} is too few'
        )


def first_line(error: Exception) -> str:
    """Returns what an error says, cut to one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    datasets: tuple,
) -> training.Trainer:
    """Returns the trainer of one model, which writes to a directory of its own."""
    train, upright, warped = datasets
    numpy.random.seed(args.seed)  # for the initial weights; nothing else draws from it
    model = chainer.links.Classifier(DigitNet(kind))
    model.to_device(device)
    optimizer = chainer.optimizers.Adam(alpha=2e-3).setup(model)
    iterator = chainer.iterators.SerialIterator(
        train, args.batchsize, order_sampler=shuffler(args.seed)
    )
    updater = training.updaters.StandardUpdater(iterator, optimizer, device=device)
    trainer = training.Trainer(updater, (args.epoch, 'epoch'), out=args.out / kind)

    for name, dataset in ('validation', upright), ('warped', warped):
        iterator = chainer.iterators.SerialIterator(
            dataset, TEST_BATCHSIZE, repeat=False, shuffle=False
        )
        evaluator = extensions.Evaluator(iterator, model, device=device)
        trainer.extend(evaluator, name=name)
    trainer.extend(extensions.ExponentialShift('alpha', 0.85), trigger=(1, 'epoch'))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(['epoch', 'main/loss', *ACCURACIES]))
    trainer.extend(extensions.PlotReport(LOSSES, 'epoch', filename='loss.png'))
    trainer.extend(extensions.PlotReport(ACCURACIES, 'epoch', filename='accuracy.png'))
    trainer.extend(extensions.ProgressBar(update_interval=10))
    trainer.extend(extensions.snapshot(filename='snapshot_epoch_{.updater.epoch}.npz'))
    return trainer


def shuffler(seed: int) -> Callable:
    """Returns what puts the training images into a new random order for each epoch.

    Each order follows from the one before. So a snapshot, which holds the present
    order but no random generator, is enough to continue exactly.
    """

    def next_order(order, position):
        return numpy.random.RandomState([seed, *order]).permutation(len(order))

    return next_order


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


def plot(logs: dict[str, list[dict]]) -> Figure:
    """Returns a picture of loss and accuracy by epoch, one colour per model."""
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2)
    for number, (kind, log) in enumerate(logs.items()):
        for axes, key, style, label in (
            (left, 'main/loss', 'o-', kind),
            (right, 'validation/main/accuracy', 'o-', f'{kind}, upright'),
            (right, 'warped/main/accuracy', 's--', f'{kind}, warped'),
        ):
            x, y = zip(*((entry['epoch'], entry[key]) for entry in log))
            axes.plot(x, y, style, color=f'C{number}', label=label, markersize=4)
    left.set(title='Training', ylabel='loss (cross-entropy)', yscale='log')
    right.set(title='Test', ylabel='accuracy', ylim=(0, 1.02))
    for axes in left, right:
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
    """Saves a file beside its place and renames it: it is never there half written."""
    beside = path.with_name(f'.{path.name}')
    save(beside)
    os.replace(beside, path)


if __name__ == '__main__':
    main()
