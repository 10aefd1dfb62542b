"""Figures of the report: the loss terms per epoch and round, and the confusion matrix of the classes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transfgu_ray.reports.page import figure_label, plain_axes
from transfgu_ray.reports.palette import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS = ("loss", "cross_entropy", "peer", "diversity", "uncertainty")
_MARKS = "osD^vP*"
_MAX_LABELS = 30


def loss_figure(history: Sequence[Mapping[str, float]], term: str) -> "Figure":
    """Return a figure of one loss term per epoch, each round with its own colour and mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    colours = class_colours(8, None) / 255
    # The darker ones first: thin light lines are lost on white.
    colours = colours[[4, 5, 2, 6, 0, 1, 7]]
    rounds = itertools.groupby(history, key=lambda row: int(row["round"]))
    for number, rows in rounds:
        epochs = list(rows)
        x, y = [row["epoch"] for row in epochs], [row[term] for row in epochs]
        if number:
            axes.axvline(x[0] - 0.5, color="0.4", linewidth=0.8, linestyle=":")
        style = {"color": colours[number % len(colours)], "marker": _MARKS[number % len(_MARKS)]}
        axes.plot(x, y, markersize=4, linewidth=1.8, **style)
    axes.set_xlabel("epoch", fontsize=9)
    axes.locator_params("x", integer=True)
    plain_axes(axes)
    return figure


def loss_alts(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return, for each loss term in use, a text for those who cannot see its figure."""
    first, last = history[0], history[-1]
    return {
        term: f"{term.replace('_', ' ')}: {first[term]:.3g} in the first epoch, {last[term]:.3g} in the last"
        for term in TERMS
        if term in first
    }


def class_confusion(confusion: np.ndarray, class_of_concept: np.ndarray) -> np.ndarray:
    """Return the pixels of each true class (row) by the class of the concept they were assigned to (column).

    The last column holds the pixels of concepts without a class.

    Args:
        confusion: pixels, (classes, concepts).
        class_of_concept: class of each concept, -1 for none.
    """
    by_class = np.zeros((len(confusion), len(confusion) + 1), dtype=np.int64)
    np.add.at(by_class.T, class_of_concept, confusion.T)
    return by_class


def confusion_figure(by_class: np.ndarray, names: Sequence[str]) -> "Figure":
    """Return a figure of the pixels of each true class (row) by predicted class (column), on a logarithmic scale.

    Args:
        by_class: pixels; see `class_confusion`.
        names: names of the classes.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(1, max(int(by_class.max()), 2))
    pixels = np.ma.masked_equal(by_class, 0)
    axes.imshow(pixels, norm=norm, cmap="cividis", interpolation="nearest", aspect="auto")
    step = -(-len(names) // _MAX_LABELS)
    shown = range(0, len(names), step)
    labels = [figure_label(names[i]) for i in shown]
    size = 8 if len(labels) <= 20 else 6
    axes.set_xticks([*shown, len(names)], [*labels, "no class"], rotation=90, fontsize=size)
    axes.set_yticks(list(shown), labels, fontsize=size)
    axes.axvline(len(names) - 0.5, color="0.4", linewidth=0.8)
    axes.set_xlabel("taken for", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, fraction=0.035, pad=0.02)
    bar.set_label("pixels", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def largest_confusions(by_class: np.ndarray, names: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """Return the largest cells off the diagonal: true class, predicted class, pixels, and their share of the class."""
    off = by_class.copy()
    np.fill_diagonal(off, 0)
    titles = [*names, "no class"]
    rows = []
    for cell in np.argsort(-off, axis=None, kind="stable")[:most]:
        truth, taken = divmod(int(cell), by_class.shape[1])
        pixels = int(off[truth, taken])
        if pixels:
            share = pixels / int(by_class[truth].sum())
            rows.append({"truth": titles[truth], "taken_for": titles[taken], "pixels": pixels, "share": share})
    return rows
