"""What the training scripts of the examples share: command line, files and curves."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable

# Matrices as small as these gain nothing from threads, and how many there are changes
# the last bits. It has to be said before NumPy is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import matplotlib
import numpy
from matplotlib.figure import Figure

import chainer_deform  # noqa: F401  # isort: skip  (before Chainer, which it repairs)

import chainer
from chainer import training


class Failure(Exception):
    """Something that the user has to put right; the message says what."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line, without the usage, what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


def make_parser(doc: str, models: Iterable[str]) -> Parser:
    """Returns the parser of the options that all scripts have."""
    parser = Parser(
        description=doc.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--model', nargs='+', choices=models, help='models to train, one after another')
    add('--epoch', type=integer(1), help='epochs to train')
    add('--batchsize', type=integer(1), help='images per update')
    add('--seed', type=integer(0), help='of the initial weights and the shuffling')
    add('--resume', metavar='SNAPSHOT', help='continue the training of this file')
    add('--out', type=pathlib.Path, help='directory to write to')
    parser.set_defaults(
        model=['deformable'],
        epoch=10,
        batchsize=32,
        seed=0,
        out=pathlib.Path('result'),
    )
    return parser


def run_script(parser: Parser, run: Callable[[argparse.Namespace], None]) -> None:
    """Runs a script with its options; of a failure it says in one line what it is."""
    args = parser.parse_args()
    try:
        run(args)
    except Failure as failure:
        parser.error(str(failure))


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


def chosen_models(args: argparse.Namespace) -> list[str]:
    """Returns the names of the models to train, each once."""
    kinds = list(dict.fromkeys(args.model))
    if args.resume and len(kinds) > 1:
        raise Failure('--resume continues one model: give --model one name')
    return kinds


def configure() -> None:
    """Chooses what needs no display, and what is deterministic."""
    matplotlib.use('Agg')
    chainer.config.cudnn_deterministic = True


def use_device(name: str, option: str = '--device') -> chainer.backend.Device:
    """Returns the device, once it works."""
    try:
        device = chainer.get_device(name)
        device.use()
    except (OverflowError, RuntimeError, ValueError) as error:
        raise Failure(f'cannot use {option} {name}: {first_line(error)}') from None
    return device


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory unless it is there, and sees that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Failure(f'cannot write to {path}: {error.strerror}') from None


def resume(
    path: str, trainer: training.Trainer, belongs_to: str = 'model and dataset'
) -> None:
    """Loads a snapshot, from which the trainer then goes on."""
    try:
        with open(path, 'rb') as file:
            chainer.serializers.load_npz(file, trainer)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise Failure(f'cannot read --resume {path}: {reason}') from None
    except Exception:  # whatever a broken or foreign file comes to
        raise Failure(
            f'--resume {path} is broken, or no snapshot of this {belongs_to}'
        ) from None
    done, wanted = trainer.updater.epoch, trainer.stop_trigger.period
    if done >= wanted:
        raise Failure(
            f'--resume {path} has {done} epochs already: --epoch {wanted} is too few'
        )


def first_line(error: Exception) -> str:
    """Returns what an error says, cut to one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def shuffler(seed: int) -> Callable:
    """Returns what puts the training images into a new random order for each epoch.

    Each order follows from the one before. So a snapshot, which holds the present
    order but no random generator, is enough to continue exactly.
    """

    def next_order(order, position):
        return numpy.random.RandomState([seed, *order]).permutation(len(order))

    return next_order


def plot_curves(
    logs: dict[str, list[dict]], measures: dict[str, str], ylabel: str
) -> Figure:
    """Returns a picture of loss and test results by epoch, one colour per model.

    Args:
        logs: What LogReport has of each model.
        measures: What to show of the test results: one to four keys of the log, and
            what to call them.
        ylabel: What these measures are.

    """
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2)
    for number, (kind, log) in enumerate(logs.items()):
        epochs = [entry['epoch'] for entry in log]
        curves = [(left, 'main/loss', 'o-', kind)]
        for style, (key, name) in zip(('o-', 's--', '^:', 'v-.'), measures.items()):
            curves.append((right, key, style, f'{kind}, {name}'))
        for axes, key, style, label in curves:
            y = [entry[key] for entry in log]
            axes.plot(epochs, y, style, color=f'C{number}', label=label, markersize=4)
    left.set(title='Training', ylabel='loss (cross-entropy)', yscale='log')
    right.set(title='Test', ylabel=ylabel, ylim=(0, 1.02))
    for axes in left, right:
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + '\n'
    write(path, lambda beside: beside.write_text(text))


def write(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
    """Saves a file beside its place and renames it: it is never there half written."""
    beside = path.with_name(f'.{path.name}')
    save(beside)
    os.replace(beside, path)
