"""report.html: one self-contained page made from a run's artifacts alone."""

import base64
import itertools
import json
from typing import Any

import numpy as np

from transfgu_ray.artifacts import STAGES, Run
from transfgu_ray.config import flatten
from transfgu_ray.model import ModelConfig, load_model_config
from transfgu_ray.pages import figure_png, hex_colour, render, sample_mask, sample_numbers, sample_photo, strip_jpeg
from transfgu_ray.palette import class_colours
from transfgu_ray.scores import score_lines, score_table
from transfgu_ray.storage import Folder

_MASKS = ("initial", "trained", "bootstrapped", "truth")
_MAX_REFUSALS_SHOWN = 50


def write_report(run: Run) -> int:
    """Writes the sample strips and report.html; returns the number of strips."""
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    model = load_model_config(Folder(run.folder.uri_of("model")))
    colours = matched_colours(model, metrics)
    strips = []
    for number in sample_numbers(run.folder):
        data, titles = _strip(run.folder, number, colours)
        run.folder.write_bytes(f"samples/strip_{number}.jpg", data)
        strips.append({"jpeg": base64.b64encode(data).decode(), "titles": titles})
    history = json.loads(run.folder.read_bytes("train/history.json"))
    manifests = [m for m in (run.manifest(stage) for stage in STAGES) if m is not None]
    refusals = {r["image_id"]: r["reason"] for m in manifests for r in m["refused"]}
    page = render(
        "report.html",
        name=run.folder.uri.rstrip("/").rpartition("/")[2],
        config=run.config,
        settings=flatten(run.config.model_dump(mode="json")),
        metrics=metrics,
        score_table=score_table(metrics) if metrics["scored"] else None,
        score_lines=score_lines(metrics) if metrics["scored"] else [],
        manifests=manifests,
        refusals=list(refusals.items())[:_MAX_REFUSALS_SHOWN],
        num_refused=len(refusals),
        strips=strips,
        legend=_legend(model, metrics, colours["pred"]),
        loss_figure=_loss_figure(history) if history else None,
    )
    run.folder.write_bytes("report.html", page)
    return len(strips)


def matched_colours(model: ModelConfig, metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    """Colour tables of predictions and of the truth: a matched concept has its class's colour, others are grey."""
    if not metrics["per_class"]:
        pred = class_colours(len(model.kinds), model.background_id)
        return {"pred": pred, "truth": pred}
    pred = np.repeat(np.linspace(90, 220, len(model.kinds)).astype(np.uint8)[:, None], 3, axis=1)
    truth = class_colours(len(metrics["per_class"]), 0 if metrics["per_class"][0]["name"] == "background" else None)
    for class_id, row in enumerate(metrics["per_class"]):
        pred[row["concepts"]] = truth[class_id]
    return {"pred": pred, "truth": truth}


def _strip(run: Folder, number: str, colours: dict[str, np.ndarray]) -> tuple[bytes, list[str]]:
    photo = sample_photo(run, number)
    panels, titles = [photo], ["photograph"]
    for name in _MASKS:
        panel = sample_mask(run, number, name, photo, colours["truth" if name == "truth" else "pred"])
        if panel is not None:
            panels.append(panel)
            titles.append(name)
    return strip_jpeg(panels), titles


def _legend(model: ModelConfig, metrics: dict[str, Any], colours: np.ndarray) -> list[dict[str, str]]:
    names = {c: row["name"] for row in metrics["per_class"] or [] for c in row["concepts"]}
    entries = []
    for class_id, kind in enumerate(model.kinds):
        name = "background" if kind == "none" else f"concept {class_id}"
        matched = f" → {names[class_id]}" if class_id in names else ""
        entries.append({"label": name + matched, "colour": hex_colour(colours[class_id])})
    return entries


def _loss_figure(history: list[dict[str, float]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    for name in ("cross_entropy", "peer", "diversity", "uncertainty"):
        axes.plot(epochs, [row[name] for row in history], marker=".", label=name.replace("_", " "))
    for before, row in itertools.pairwise(history):
        if row["round"] != before["round"]:
            axes.axvline(row["epoch"] - 0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("epoch (dotted: a new round)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure_png(figure)
