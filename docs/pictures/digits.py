"""Draws digits.png: where a trained layer reads a digit, upright and warped.

    make demo
    .venv/bin/python docs/pictures/digits.py result/deformable/snapshot_epoch_10.npz

The snapshot is that of examples/digits, after its 10 epochs with seed 0.
"""

import pathlib
import sys

import chainer_deform  # isort: skip  (before chainer)
import chainer
import numpy as np
from matplotlib.figure import Figure

from chainer_deform.link_hooks import SamplingHook
from chainer_deform.visualize import plot_sampling_points

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / 'examples' / 'digits'))
from data import load_datasets  # noqa: E402
from models import DigitNet  # noqa: E402

DIGIT = 24  # of the test images
PIXELS = (2, 3), (4, 3)  # of the 7 x 7 output of the last convolution

model = chainer.links.Classifier(DigitNet('deformable'))
chainer.serializers.load_npz(sys.argv[1], model, path='updater/model:main/')
_, upright, warped = load_datasets('digits')
images = np.stack([upright[DIGIT][0], warped[DIGIT][0]])
with SamplingHook(model) as hook, chainer.using_config('train', False):
    scores = model.predictor(images).array
below, above = hook.calls

figure = Figure(figsize=(7.6, 5.2), layout='constrained')
rows = figure.subplots(2, 3, sharex=True, sharey=True)
titles = (
    'plain layer:\na regular grid',
    'deformable layer:\nmoved points',
    'two deformable layers:\nup to 81 points each',
)
grid = chainer_deform.sampling_locations(0 * above.offset, 3, 2, 1)
centres = [above.centre(*pixel) for pixel in PIXELS]
for i, (name, axes) in enumerate(zip(('upright', 'warped'), rows)):
    drawn = (
        [grid[i, 0, :, :, y, x] for y, x in PIXELS],
        [above.locations()[i, 0, :, :, y, x] for y, x in PIXELS],
        [chainer_deform.receptive_points([below, above], *p, image=i) for p in PIXELS],
    )
    for title, points, ax in zip(titles, drawn, axes):
        plot_sampling_points(images[i], points, centres=centres, scale=2, ax=ax)
        ax.set(
            title=title if i == 0 else '', xlabel='', ylabel='', xticks=[], yticks=[]
        )
        ax.set(xlim=(-4.5, 31.5), ylim=(31.5, -4.5))
    axes[0].set_ylabel(f'{name}: read as {scores[i].argmax()}', size=11)
figure.savefig(HERE / 'digits.png', dpi=110)
