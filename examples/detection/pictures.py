"""Pictures of what the detectors find, and of where their bins lie."""

from __future__ import annotations

from collections.abc import Sized

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from boxes import intersection_over_union  # isort: skip  (no package of its own)

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
TRUE, RIGHT, WRONG = '#f0e442', '#56b4e9', '#d55e00'
SHOWN_SCORE = 0.3  # from which on detections are drawn
DIGITS_SHOWN = 6  # with their bins


def plot_found(scenes: list[tuple], found: dict[str, list[tuple]]) -> Figure:
    """Returns a picture of scenes, their digits, and what each model finds.

    Args:
        scenes: Examples of the data set.
        found: For each model, the boxes, classes and scores in each scene.

    """
    titles = 'truth', *found
    figure, axes = make_grid(scenes, titles)
    for i, (row, (image, boxes, labels)) in enumerate(zip(axes, scenes)):
        for ax, title in zip(row, titles):
            show(ax, image)
            ax.set_title(title if i == 0 else '')
        for box, label in zip(boxes, labels):
            draw(row[0], box, TRUE, '-', label)
        for ax, each in zip(row[1:], found.values()):
            for box, label, score in zip(*each[i]):
                if score >= SHOWN_SCORE:
                    overlaps = intersection_over_union(box[None], boxes)[0]
                    right = (overlaps[labels == label] >= 0.5).any()
                    look = (RIGHT, '-') if right else (WRONG, '--')
                    draw(ax, box, *look, label)
    return figure


def plot_bins(scenes: list[tuple], points: dict[str, list[numpy.ndarray]]) -> Figure:
    """Returns a picture of digits, and of the points that each model reads.

    Args:
        scenes: Examples of the data set.
        points: For each model and each scene, the points ``(y, x)`` of the bins of the
            true boxes, of shape ``(digits, bins, bins, points, 2)``.

    """
    digits = [
        (i, j) for i, (_, boxes, _) in enumerate(scenes) for j in range(len(boxes))
    ][:DIGITS_SHOWN]
    figure, axes = make_grid(points, digits)
    for row, (kind, each) in zip(axes, points.items()):
        row[0].set_ylabel(kind)
        for ax, (i, j) in zip(row, digits):
            image, boxes, _ = scenes[i]
            show(ax, image)
            draw(ax, boxes[j], TRUE, '-')
            bins = each[i][j]
            odd = numpy.indices(bins.shape[:2]).sum(axis=0) % 2
            for colour, dots in (RIGHT, bins[odd == 0]), (WRONG, bins[odd == 1]):
                ax.plot(*dots.reshape(-1, 2).T[::-1], '.', color=colour, markersize=4)
            y, x, y_max, x_max = boxes[j]
            half = 0.7 * max(y_max - y, x_max - x)
            y, x = (y + y_max) / 2, (x + x_max) / 2
            ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
    return figure


def make_grid(rows: Sized, columns: Sized) -> tuple[Figure, numpy.ndarray]:
    """Returns a figure and its axes, a panel for each row and column."""
    size = 1.8 * len(columns) + 0.2, 1.8 * len(rows) + 0.4
    figure = Figure(figsize=size, dpi=90, layout='constrained')
    return figure, figure.subplots(len(rows), len(columns), squeeze=False)


def show(ax: Axes, image: numpy.ndarray) -> None:
    """Shows a scene, in the coordinates of the boxes."""
    _, h, w = image.shape
    ax.imshow(image[0], 'gray', vmin=0, vmax=1, extent=(0, w, h, 0))
    ax.set(xticks=[], yticks=[], facecolor='lightgrey')


def draw(
    ax: Axes, box: numpy.ndarray, colour: str, line: str, label: int | None = None
) -> None:
    """Draws a box, and at its corner what is in it."""
    y, x, y_max, x_max = box
    ax.add_patch(
        Rectangle((x, y), x_max - x, y_max - y, fill=False, ec=colour, ls=line, lw=1.2)
    )
    if label is not None:
        side = 'bottom' if y > 8 else 'top'  # of the text, which is above or inside
        ax.text(x, y, label, color=colour, size='small', va=side, weight='bold')
