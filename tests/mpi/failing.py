"""Runs train_mn.py with a second worker in which something goes wrong.

The first argument says what, the others are those of train_mn.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'examples' / 'digits'))
import train_mn  # isort: skip  (which finds common)
import common

use_device, make_trainer = common.use_device, train_mn.make_trainer
rank = train_mn.MPI.COMM_WORLD.rank


def use_no_device(*args):
    if rank == 1:
        raise common.Failure('no device for the second worker')
    return use_device(*args)


def make_failing_trainer(*args):
    trainer = make_trainer(*args)

    def fail(trainer):
        if rank == 1:
            raise ZeroDivisionError('in the second worker')

    trainer.extend(fail, trigger=(3, 'iteration'))
    return trainer


if sys.argv.pop(1) == 'device':
    common.use_device = use_no_device
else:
    train_mn.make_trainer = make_failing_trainer
train_mn.main()
