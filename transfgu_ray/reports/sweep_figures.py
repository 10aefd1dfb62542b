"""Figures of a sweep: trials as lines over all settings, the objective against each setting, the score against mIoU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transfgu_ray.reports.page import figure_label, plain_axes
from transfgu_ray.reports.sweep_tables import best_trial, ranked, short_names, value_of, value_text, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"score": "score", "miou": "mIoU, %"}
_NUM_TICKS = 4
_MAX_LABELS = 12
# Trials with the same value are drawn at most this far apart, as a share of the distance between values, so that none
# hides another.
_SPREAD = 0.25
_MAX_SPREAD = 0.16
_STOPPED = "0.65"
_BEST = "black"


@dataclass(frozen=True)
class Axis:
    """A quantity over the trials.

    Attributes:
        title: its name.
        places: place of each trial, 0..1; NaN where it has no value.
        ticks: places and labels.
        spacing: distance between neighbouring values where there are only a few; 0 where the axis is continuous.
    """

    title: str
    places: np.ndarray
    ticks: list[tuple[float, str]]
    spacing: float = 0.0


def shown_trials(sweep: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the trials that figures show: finished or stopped, and with a value of the objective."""
    return [t for t in sweep["trials"] if t["status"] != "failed" and t[sweep["objective"]] is not None]


def setting_axes(sweep: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """Return an axis for each setting that the sweep varies."""
    settings = varying(sweep["space"])
    return [
        _setting_axis(title, name, space=settings[name], trials=trials) for name, title in short_names(settings).items()
    ]


def parallel_coordinates(sweep: Mapping[str, Any]) -> "Figure | None":
    """Return a figure of the trials as lines over settings, score and mIoU, coloured by the objective.

    The best trial is edged in black, stopped trials are grey. None where fewer than two trials can be shown.
    """
    from matplotlib.figure import Figure

    trials = shown_trials(sweep)
    if len(trials) < 2:
        return None
    axes_of = setting_axes(sweep, trials)
    for name, title in TITLES.items():
        if any(trial[name] is not None for trial in trials):
            axes_of.append(_value_axis(title, [_scaled(trial, name) for trial in trials]))
    figure = Figure(figsize=(max(6.5, 1.2 * len(axes_of) + 1.5), 3.9), layout="constrained")
    axes = figure.subplots()
    lines = np.stack([axis.places + min(axis.spacing, _MAX_SPREAD) * _spread(len(trials)) for axis in axes_of], axis=1)
    best = best_trial(trials, sweep["objective"])
    colour_of = _colours(figure, axes, sweep=sweep, trials=trials)
    # The best is drawn last, on top.
    for i in sorted(range(len(trials)), key=lambda i: (trials[i] is best, trials[i]["status"] == "finished")):
        if trials[i]["status"] != "finished":
            axes.plot(lines[i], color=_STOPPED, linewidth=0.8, linestyle=":")
            continue
        if trials[i] is best:
            axes.plot(lines[i], color=_BEST, linewidth=5, solid_capstyle="round")
        axes.plot(lines[i], color=colour_of(trials[i]), linewidth=2.5 if trials[i] is best else 1.3)
    _draw_axes(axes, axes_of)
    return figure


def _draw_axes(axes: "Axes", axes_of: Sequence[Axis]) -> None:
    axes.set_axis_off()
    axes.set_xlim(-0.3, len(axes_of) - 0.7)
    axes.set_ylim(-0.12, 1.16)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for x, axis in enumerate(axes_of):
        axes.axvline(x, 0.12 / 1.28, 1.12 / 1.28, color="0.4", linewidth=0.8, zorder=0)
        axes.text(x, 1.09, figure_label(axis.title), ha="center", va="bottom", fontsize=9, fontweight="bold")
        for place, label in axis.ticks:
            axes.plot([x - 0.02, x + 0.02], [place, place], color="0.4", linewidth=0.8)
            axes.text(x + 0.04, place, figure_label(label), va="center", fontsize=8, bbox=box, zorder=5)


def against_settings(sweep: Mapping[str, Any]) -> list[tuple[str, "Figure"]]:
    """Return a figure of the objective against each varied setting, as (title, figure).

    A bar is the mean over the finished trials with one value; stopped trials are hollow and the best has a ring. Empty
    where fewer than two trials can be shown.
    """
    from matplotlib.figure import Figure

    trials, objective = shown_trials(sweep), sweep["objective"]
    if len(trials) < 2:
        return []
    values = np.array([_scaled(trial, objective) for trial in trials])
    finished = np.array([trial["status"] == "finished" for trial in trials])
    best = best_trial(trials, objective)
    figures = []
    for axis in setting_axes(sweep, trials):
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        axes = figure.subplots()
        places = axis.places + axis.spacing * _spread(len(trials))
        axes.scatter(places[~finished], values[~finished], s=18, facecolors="none", edgecolors=_STOPPED)
        axes.scatter(places[finished], values[finished], s=22, color="#0072b2", alpha=0.75, linewidths=0)
        if axis.spacing:
            for place in np.unique(axis.places[finished & ~np.isnan(axis.places)]):
                mean, half = values[finished & (axis.places == place)].mean(), axis.spacing * _SPREAD
                axes.plot([place - half, place + half], [mean, mean], color="#d55e00", linewidth=2)
        if best is not None:
            at = trials.index(best)
            axes.scatter(places[at], values[at], s=110, facecolors="none", edgecolors=_BEST, linewidths=1.5)
        margin = max(0.06, axis.spacing * 2 * _SPREAD)
        axes.set_xlim(-margin, 1 + margin)
        places_of_ticks, labels = zip(*axis.ticks, strict=True)
        tilted = sum(map(len, labels)) > 28
        axes.set_xticks(
            places_of_ticks, [figure_label(text) for text in labels], fontsize=8,
            rotation=25 if tilted else 0, ha="right" if tilted else "center",
        )  # fmt: skip
        axes.set_xlabel(figure_label(axis.title), fontsize=9)
        axes.set_ylabel(TITLES[objective], fontsize=9)
        plain_axes(axes)
        figures.append((axis.title, figure))
    return figures


def score_against_miou(sweep: Mapping[str, Any]) -> "Figure | None":
    """Return a figure of the score of each finished trial against its mIoU; None where fewer than two have both."""
    from matplotlib.figure import Figure

    trials = ranked([trial for trial in sweep["trials"] if trial["miou"] is not None], "score")
    if len(trials) < 2:
        return None
    figure = Figure(figsize=(3.6, 2.9), layout="constrained")
    axes = figure.subplots()
    scores, mious = [trial["score"] for trial in trials], [100 * trial["miou"] for trial in trials]
    axes.scatter(scores, mious, s=26, color="#0072b2", alpha=0.75, linewidths=0)
    by_labels = max(range(len(trials)), key=mious.__getitem__)
    rings = {"best score": (0, "o", _BEST), "best mIoU": (by_labels, "s", "#d55e00")}
    for label, (at, marker, colour) in rings.items():
        ring: dict[str, Any] = {"marker": marker, "facecolors": "none", "edgecolors": colour, "linewidths": 1.6}
        axes.scatter(scores[at], mious[at], s=130, label=label, **ring)
    axes.set_xlabel("score, without labels", fontsize=9)
    axes.set_ylabel(TITLES["miou"], fontsize=9)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plain_axes(axes)
    return figure


def _colours(
    figure: "Figure", axes: "Axes", *, sweep: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> Callable[[Mapping[str, Any]], tuple[float, float, float, float]]:
    """Return a function that gives a trial's colour, and draw a bar beside the figure that says what it means."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    objective = sweep["objective"]
    values = [_shown_value(trial, objective) for trial in ranked(trials, objective) or trials]
    # Its lightest tenth is lost on white.
    viridis = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    norm = Normalize(min(values), max(values))
    bar = figure.colorbar(ScalarMappable(norm, viridis), ax=axes, pad=0.01, fraction=0.03)
    bar.set_label(TITLES[objective], fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return lambda trial: viridis(norm(_shown_value(trial, objective)))


def _setting_axis(title: str, name: str, *, space: Any, trials: Sequence[Mapping[str, Any]]) -> Axis:
    points = [trial["point"].get(name) for trial in trials]
    if not isinstance(space, list):
        low, high = float(space["low"]), float(space["high"])
        return _continuous(title, points, low=low, high=high, log=bool(space.get("log")))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in space):
        space = sorted(space)
    texts = [value_text(value) for value in points]
    labels = list(dict.fromkeys([*map(value_text, space), *texts]))
    spacing = 1 / max(len(labels) - 1, 1)
    place_of = {label: i * spacing if len(labels) > 1 else 0.5 for i, label in enumerate(labels)}
    shown = labels[:: -(-len(labels) // _MAX_LABELS)]
    ticks = [(place_of[label], label) for label in shown]
    return Axis(title, np.array([place_of[text] for text in texts]), ticks, spacing)


def _value_axis(title: str, values: Sequence[float | None]) -> Axis:
    known = [value for value in values if value is not None]
    return _continuous(title, values, low=min(known), high=max(known), log=False)


def _continuous(title: str, values: Sequence[float | None], *, low: float, high: float, log: bool) -> Axis:
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    if low == high:
        return Axis(title, np.where(np.isnan(numbers), np.nan, 0.5), [(0.5, f"{low:.3g}")])
    space = np.geomspace if log else np.linspace
    at = np.log if log else np.asarray
    places = (at(numbers) - at(low)) / (at(high) - at(low))
    ticks = zip(np.linspace(0, 1, _NUM_TICKS), space(low, high, _NUM_TICKS), strict=True)
    return Axis(title, places, [(float(place), f"{value:.3g}") for place, value in ticks])


def _scaled(trial: Mapping[str, Any], name: str) -> float | None:
    """Return a value as it is shown: mIoU in percent."""
    value = value_of(trial, name)
    return 100 * value if name == "miou" and value is not None else value


def _shown_value(trial: Mapping[str, Any], objective: str) -> float:
    value = _scaled(trial, objective)
    assert value is not None, "see shown_trials"
    return value


def _spread(num_trials: int) -> np.ndarray:
    return np.linspace(-_SPREAD, _SPREAD, num_trials)
