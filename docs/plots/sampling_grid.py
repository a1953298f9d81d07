"""Where one output of a 3 x 3 kernel reads the image: on its grid, and moved."""

import chainer_deform  # isort: skip
import matplotlib.pyplot as plt
import numpy as np

h, w = 6, 9
pixel = 0, 3  # the output that is shown
options = {'ksize': 3, 'pad': 1, 'dilate': (1, 2)}
rng = np.random.default_rng(4)
offset = np.zeros((1, 2 * 3 * 3, h, w - 2))
regular = chainer_deform.sampling_locations(offset, **options)
offset += rng.normal(0, 0.5, offset.shape)
offset += np.repeat([1.1, 0.6], 9)[:, None, None]  # to the right, and down
moved = chainer_deform.sampling_locations(offset, **options)
regular, moved = (array[0, 0, :, :, pixel[0], pixel[1]].T for array in (regular, moved))

figure, ax = plt.subplots(figsize=(8, 4.4))
ax.pcolormesh(
    np.arange(w + 1) - 0.5,
    np.arange(h + 1) - 0.5,
    np.random.default_rng(5).uniform(0.6, 0.95, (h, w)),
    cmap='gray',
    vmin=0,
    vmax=1,
    edgecolors='white',
    linewidth=1,
)
ax.plot(*np.mgrid[:w, :h].reshape(2, -1), '.', color='0.45', ms=3, label='pixel centre')
ax.plot(
    [-1, w, w, -1, -1],
    [-1, -1, h, h, -1],
    '--',
    color='0.45',
    linewidth=1,
    label='on it and beyond: 0',
)
ax.plot(*regular[::-1], 'o', mfc='none', mec='#0072B2', ms=9, label='without offset')
ax.quiver(
    *regular[::-1],
    *(moved - regular)[::-1],
    angles='xy',
    scale_units='xy',
    scale=1,
    width=0.003,
    color='0.15',
    zorder=3,
)
ax.plot(*moved[::-1], 'o', color='#D55E00', ms=7, zorder=4, label='sampling point')
v, u = moved[:, 7]
corners = np.floor(v) + [0, 0, 1, 1], np.floor(u) + [0, 1, 0, 1]
for row, column in zip(*corners):
    ax.plot([u, column], [v, row], ':', color='#D55E00', linewidth=1)
ax.plot(*corners[::-1], 's', mfc='none', mec='#D55E00', ms=10, label='its four pixels')
ax.set_xlim(-1.5, w + 0.5)
ax.set_ylim(h + 0.5, -1.5)
ax.set_aspect('equal')
ax.set_xticks(range(-1, w + 1))
ax.set_yticks(range(-1, h + 1))
ax.set_xlabel('x: column u')
ax.set_ylabel('y: row v')
ax.set_title('Output (0, 3) of a 3 x 3 kernel, pad = 1, dilate = (1, 2)')
ax.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
