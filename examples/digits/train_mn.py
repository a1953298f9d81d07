"""Trains digit classifiers with several workers: ChainerMN, over MPI.

The same training as that of train.py, one process per worker. See README.rst.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy

import train  # isort: skip  (before Chainer, which it has repaired)
import common  # isort: skip  (which train has put on the path)

import chainer
from chainer import training
from chainer.training import extension

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
    reason = common.first_line(error)
    common.Parser().error(f'needs MPI: pip install mpi4py mpich ({reason})')
import chainermn

#: What the gradients travel over, and the device that this takes.
COMMUNICATORS = {'naive': '@numpy', 'pure_nccl': '@cupy:{}'}

#: How long the launcher is given to pass on what a dying worker has to say.
LAST_WORDS = 1.0  # seconds


def main() -> None:
    """Trains the models one after another, then compares them."""
    sys.excepthook = say_and_wait
    chainermn.global_except_hook.add_hook()  # else the other workers would wait forever
    world = MPI.COMM_WORLD
    parser = train.make_parser(__doc__)
    parser.add_argument(
        '--communicator',
        choices=COMMUNICATORS,
        default='naive',
        help='naive for CPUs, pure_nccl for a GPU per worker',
    )
    args = parse(parser, world)
    try:
        run(args, world)
    except common.Failure as failure:  # the same one in all workers
        if world.rank == 0:
            print(f'{parser.prog}: error: {failure}', file=sys.stderr, flush=True)
        world.Barrier()  # the first worker that ends may end the others
        sys.exit(2)


def say_and_wait(*error: Any) -> None:
    """Prints an error that nobody caught, before the other workers are stopped.

    ChainerMN then calls MPI_Abort, upon which MPICH's launcher forgets what it has not
    passed on yet.
    """
    sys.__excepthook__(*error)
    sys.stderr.flush()
    time.sleep(LAST_WORDS)


def parse(parser: common.Parser, world: MPI.Comm) -> argparse.Namespace:
    """Returns the options, or ends all workers; only the first one says why."""
    args, status = None, None
    if world.rank == 0:
        try:
            args = parser.parse_args()
        except SystemExit as end:  # --help, or an error
            status = end.code
    args, status = world.bcast((args, status))
    if args is None:
        sys.exit(status)
    return args


def run(args: argparse.Namespace, world: MPI.Comm) -> None:
    """Trains and compares the models that the options ask for.

    Raises:
        Failure: A file, a device or an option is not usable, if only for one worker.

    """
    kinds = common.chosen_models(args)
    comm = together(world, make_communicator, args.communicator, world)
    name = COMMUNICATORS[args.communicator].format(comm.intra_rank)
    device = together(world, common.use_device, name, 'device')
    datasets = together(
        world, lambda: prepare(args, kinds, comm) if comm.rank == 0 else 3 * [None]
    )
    parts = scatter(datasets, comm, args)

    common.configure()
    results, logs = {}, {}
    for kind in kinds:
        trainer = make_trainer(kind, args, device, parts, comm)
        if args.resume:
            belongs_to = 'model, dataset and number of workers'
            together(world, common.resume, args.resume, trainer, belongs_to)
        if comm.rank == 0:
            print(f'\n{kind}')
        trainer.run()
        if comm.rank == 0:
            logs[kind] = trainer.get_extension('LogReport').log
            results[kind] = train.summarise(trainer)
    if comm.rank == 0:
        train.compare(args, results, logs, workers=comm.size)


def prepare(
    args: argparse.Namespace, kinds: list[str], comm: chainermn.CommunicatorBase
) -> tuple:
    """Makes the directories and returns the data sets, in the first worker alone."""
    for kind in kinds:
        common.make_directory(args.out / kind)
    datasets = train.load(args.dataset)
    images = min(map(len, datasets))
    if comm.size > images:
        raise common.Failure(f'{comm.size} workers are too many for {images} images')
    return datasets


def scatter(
    datasets: Sequence, comm: chainermn.CommunicatorBase, args: argparse.Namespace
) -> list[chainer.datasets.SubDataset]:
    """Returns this worker's parts of the first worker's data sets."""
    train_set, *test_sets = datasets
    # Parts of equal length, so that all workers do as many updates: if the images do
    # not come out even, a few of them are in two parts.
    parts = [chainermn.scatter_dataset(train_set, comm, shuffle=True, seed=args.seed)]
    if args.batchsize > len(parts[0]):
        raise common.Failure(
            f'--batchsize {args.batchsize} is too large: '
            f'each of {comm.size} workers has {len(parts[0])} training images'
        )
    for test_set in test_sets:  # each image in one part
        part = chainermn.scatter_dataset(test_set, comm, force_equal_length=False)
        parts.append(part)
    return parts


def together(world: MPI.Comm, function: Callable, *args: Any) -> Any:
    """Returns ``function(*args)``. If it fails for one worker, it does for all."""
    result, message = None, None
    try:
        result = function(*args)
    except common.Failure as failure:
        message = str(failure)
    messages = list(filter(None, world.allgather(message)))
    if messages:
        raise common.Failure(messages[0])
    return result


def make_communicator(name: str, world: MPI.Comm) -> chainermn.CommunicatorBase:
    """Returns the communicator, once it can be used."""
    try:
        return chainermn.create_communicator(name, world)
    except RuntimeError as error:  # CuPy or NCCL is not installed
        reason = common.first_line(error)
        raise common.Failure(
            f'cannot use --communicator {name}, which needs CuPy and NCCL: {reason}'
        ) from None


def make_trainer(
    kind: str,
    args: argparse.Namespace,
    device: chainer.backend.Device,
    datasets: tuple,
    comm: chainermn.CommunicatorBase,
) -> training.Trainer:
    """Returns one worker's trainer of one model. Only the first worker's reports."""
    part, upright, warped = datasets
    optimizer = train.make_optimizer(kind, args.seed, device)
    model = optimizer.target
    optimizer = chainermn.create_multi_node_optimizer(optimizer, comm)
    # Its first update would do just this instead of an update, also after resuming.
    comm.bcast_data(model)
    optimizer.is_changed(model)

    # All workers put the images of their parts into the same order, so that the one
    # order in the snapshot is that of all of them.
    trainer = train.make_training_loop(kind, args, device, part, optimizer)
    trainer.extend(average_observation(comm))
    trainer.extend(average_statistics(model, comm))
    for name, dataset in ('validation', upright), ('warped', warped):
        trainer.extend(make_evaluator(dataset, model, device, comm), name=name)
    if comm.rank == 0:
        train.add_reports(trainer, upright, warped)
    return trainer


def average_observation(comm: chainermn.CommunicatorBase) -> extension.Extension:
    """Returns an extension: loss and accuracy become those of all workers' images."""
    names = 'main/loss', 'main/accuracy'

    @training.make_extension(priority=extension.PRIORITY_EDITOR)
    def average(trainer):
        mine = [float(trainer.observation[name].array) for name in names]
        means = comm.allreduce_obj(numpy.array(mine)) / comm.size
        trainer.observation.update(zip(names, means.tolist()))

    return average


def average_statistics(
    model: chainer.Link, comm: chainermn.CommunicatorBase
) -> extension.Extension:
    """Returns an extension: the models of all workers become the same for testing.

    Their parameters always are. But each worker normalises by its own batches, so that
    their running means and variances differ. ChainerMN's AllreducePersistent would
    hand a GPU's memory to MPI, which not every MPI can read.
    """

    @training.make_extension(
        trigger=(1, 'epoch'), priority=extension.PRIORITY_WRITER + 1
    )  # before the evaluators and the snapshot
    def average(trainer):
        for norm in model.predictor.norms:
            for statistic in norm.avg_mean, norm.avg_var:
                total = comm.allreduce_obj(chainer.backends.cuda.to_cpu(statistic))
                statistic[...] = norm.xp.asarray(total / comm.size)

    return average


def make_evaluator(
    dataset: chainer.dataset.DatasetMixin,
    model: chainer.Link,
    device: chainer.backend.Device,
    comm: chainermn.CommunicatorBase,
) -> training.extensions.Evaluator:
    """Returns the evaluator of a test set of which each worker has a part."""
    iterator = chainer.iterators.SerialIterator(
        dataset, train.TEST_BATCHSIZE, repeat=False, shuffle=False
    )
    evaluator = PartEvaluator(iterator, model, device=device)
    # ChainerMN takes the mean of what the workers return.
    evaluator.weight = comm.size / comm.allreduce_obj(len(dataset))
    return chainermn.create_multi_node_evaluator(evaluator, comm)


class PartEvaluator(training.extensions.Evaluator):
    """Returns sums over the images, times a weight, and not means over the batches.

    Neither the batches nor the workers' parts need then be equal in size.
    """

    weight: float

    def evaluate(self) -> dict[str, float]:
        sums = collections.defaultdict(float)
        iterator = self.get_iterator('main')
        iterator.reset()
        for batch in iterator:
            means = {}
            with chainer.reporter.report_scope(means), chainer.no_backprop_mode():
                self.get_target('main')(*self.converter(batch, self.device))
            for name, mean in means.items():
                sums[name] += float(mean.array) * len(batch)
        return {name: value * self.weight for name, value in sums.items()}


if __name__ == '__main__':
    main()
