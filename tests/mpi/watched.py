"""Runs train_mn.py, and has each worker write down what only it can see.

``states-RANK.npz`` gets the worker's model, optimizer and iterator after the training,
``losses-RANK.npy`` the loss of each of its own batches.
"""

import pathlib
import sys

import numpy

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'examples' / 'digits'))
import train_mn  # isort: skip  (before Chainer, which it has repaired)

import chainer

make_trainer = train_mn.make_trainer
rank = train_mn.MPI.COMM_WORLD.rank


class Watch(chainer.training.Extension):
    priority = 10000  # before the workers exchange what they observed

    def __init__(self, updater):
        self.updater = updater
        self.losses = []

    def __call__(self, trainer):
        self.losses.append(float(trainer.observation['main/loss'].array))

    def finalize(self):
        chainer.serializers.save_npz(f'states-{rank}.npz', self.updater)
        numpy.save(f'losses-{rank}.npy', self.losses)


def make_watched_trainer(*args):
    trainer = make_trainer(*args)
    trainer.extend(Watch(trainer.updater))
    return trainer


train_mn.make_trainer = make_watched_trainer
train_mn.main()
