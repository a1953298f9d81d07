"""Which channel of an offset moves what, here and elsewhere."""

import matplotlib.pyplot as plt
import numpy as np

from chainer_deform.convert import offset_to_interleaved

ksize, offset_groups = (2, 2), 2
taps = [(i, j) for i in range(ksize[0]) for j in range(ksize[1])]
count = 2 * offset_groups * len(taps)
colours = {
    'x': ('#9ecae1', '#4292c6'),
    'y': ('#fdd0a2', '#fd8d3c'),
    'm': ('0.85', '0.6'),
}


def cells(ax, y, names):
    """A row of channels: what each is of, its group and its tap."""
    for channel, (kind, group, (i, j)) in enumerate(names):
        ax.add_patch(
            plt.Rectangle((channel, y), 1, 1, fc=colours[kind][group], ec='white', lw=2)
        )
        ax.text(channel + 0.5, y + 0.36, kind, ha='center', va='center', weight='bold')
        ax.text(channel + 0.5, y + 0.7, f'({i}, {j})', ha='center', va='center', size=7)
        ax.text(channel + 0.5, y - 0.14, channel, ha='center', color='0.4', size=7)


ours = [
    (kind, group, tap)
    for group in range(offset_groups)
    for kind in 'xy'
    for tap in taps
]
mask = [('m', group, tap) for group in range(offset_groups) for tap in taps]
# Sent through the conversion, the numbers of the channels say where each one goes.
numbers = np.arange(count, dtype=np.float32).reshape(1, count, 1, 1)
order = offset_to_interleaved(numbers, offset_groups).ravel().astype(int)

figure, ax = plt.subplots(figsize=(8, 3.9))
cells(ax, 0, ours)
cells(ax, 3, [ours[channel] for channel in order])
cells(ax, 5, mask)
for there, here in enumerate(order):
    ax.plot(
        [here + 0.5, there + 0.5],
        [1.08, 2.68],
        color=colours[ours[here][0]][1],
        linewidth=1.2,
    )
for y, text in (
    (0, 'chainer_deform,\nChainer'),
    (3, 'torchvision,\nmmcv, ONNX'),
    (5, 'mask, all'),
):
    ax.text(-0.3, y + 0.5, text, ha='right', va='center')
for group in range(offset_groups):
    x = (group + 0.5) * count / offset_groups
    ax.text(x, -0.6, f'offset group {group}', ha='center')
ax.set_xlim(-3, count)
ax.set_ylim(6.1, -1)
ax.axis('off')
