"""report.html: a self-contained page made from a run's artifacts alone."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

from transfgu_ray import __version__
from transfgu_ray.algorithms.scores.intervals import total_counts
from transfgu_ray.config.base import flatten
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.model import ModelConfig, load_model_config
from transfgu_ray.models.names import Names, load_names
from transfgu_ray.reports.page import (
    figure_png,
    hex_colour,
    render,
    sample_labels,
    sample_mask,
    sample_names,
    sample_photo,
    strip_jpeg,
    within_bytes,
)
from transfgu_ray.reports.palette import class_colours, overlay, spotlight
from transfgu_ray.reports.run_figures import (
    class_confusion,
    confusion_figure,
    largest_confusions,
    loss_alts,
    loss_figure,
)
from transfgu_ray.reports.score_tables import score_lines, score_table, trust_table
from transfgu_ray.reports.scores import photo_mious
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder

_MASKS = ("initial", "trained", "bootstrapped", "truth")
_MAX_REFUSALS_SHOWN = 50
# The photographs' part of the page's 8 MB.
_PHOTO_BYTES = 6_000_000
_GROUPS = {"": "Chosen by the seed", "best": "Best scored", "worst": "Worst scored"}


def write_report(run: Run, counts: csr_array | None, scored_ids: Sequence[str]) -> int:
    """Write the sample strips and report.html, and return the number of photographs.

    Args:
        run: an evaluated run.
        counts: confusion matrices of the last stage; see `photo_counts`. None where nothing was scored.
        scored_ids: image_id of each row of `counts`.
    """
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    model_folder = Folder(run.folder.uri_of("model"))
    model = load_model_config(model_folder)
    names = load_names(model_folder, model.kinds)
    colours = matched_colours(model, metrics, names)
    mious = {}
    if counts is not None:
        mious = dict(zip(scored_ids, photo_mious(run.config, counts, names).tolist(), strict=True))
    photos = [_photo(run.folder, name, colours=colours, mious=mious) for name in sample_names(run.folder)]
    history = json.loads(run.folder.read_bytes("train/history.json"))
    # Only earlier stages, so that the page is the same whenever it is made.
    manifests = [m for m in map(run.manifest, STAGES.before("report")) if m is not None]
    refusals = {r["image_id"]: r["reason"] for m in manifests for r in m["refused"]}
    # If not all fit, each group keeps its first ones.
    order = sorted(range(len(photos)), key=lambda i: photos[i]["rank"])
    num_shown = within_bytes((b"".join(photos[i]["bytes"]) for i in order), _PHOTO_BYTES)
    shown = [photos[i] for i in sorted(order[:num_shown])]
    alts = loss_alts(history) if history else {}
    page = render(
        "report.html",
        name=run.folder.uri.rstrip("/").rpartition("/")[2],
        version=__version__,
        config=run.config,
        settings={name: _text(value) for name, value in flatten(run.config.model_dump(mode="json")).items()},
        changed=_changed(run.config),
        metrics=metrics,
        names_line=names_line(names),
        score_table=score_table(metrics) if metrics["scored"] else None,
        trust_table=trust_table(metrics) if metrics["scored"] else None,
        score_lines=score_lines(metrics) if metrics["scored"] else [],
        manifests=manifests,
        refusals=list(refusals.items())[:_MAX_REFUSALS_SHOWN],
        num_refused=len(refusals),
        groups=[
            {"title": title, "photos": [photo for photo in shown if photo["group"] == group]}
            for group, title in _GROUPS.items()
            if any(photo["group"] == group for photo in shown)
        ],
        most_panels=max((len(photo["panels"]) for photo in shown), default=1),
        num_left_out=len(photos) - len(shown),
        has_atlas=run.folder.exists("atlas.json"),
        legend=_legend(names, metrics, colours),
        classes=_classes(names, metrics, colours["truth"]),
        losses=[
            {"title": term.replace("_", " "), "alt": alt, "png": figure_png(loss_figure(history, term))}
            for term, alt in alts.items()
        ],
        **_confusion(run.config, counts, metrics=metrics, num_concepts=len(model.kinds)),
    )
    run.folder.write_bytes("report.html", page)
    return len(photos)


def matched_colours(model: ModelConfig, metrics: dict[str, Any], names: Names | None = None) -> dict[str, np.ndarray]:
    """Return colour tables of predictions and truth: a matched concept has the colour of its class, others are grey.

    Args:
        model: model that has the concepts.
        metrics: content of metrics.json; its `per_class` says what concepts are matched to, null if nothing was scored.
        names: concepts with the same name share a colour, and hidden ones are black; None for no names.
    """
    names = names or Names(model.kinds, {})
    if not metrics["per_class"]:
        pred = class_colours(names.num_classes, names.background_id)[names.class_of]
        return {"pred": pred, "truth": pred}
    pred = np.repeat(np.linspace(90, 220, len(model.kinds)).astype(np.uint8)[:, None], 3, axis=1)[
        names.class_of.clip(max=len(model.kinds) - 1)
    ]
    truth = class_colours(len(metrics["per_class"]), 0 if metrics["per_class"][0]["name"] == "background" else None)
    for class_id, row in enumerate(metrics["per_class"]):
        pred[row["concepts"]] = truth[class_id]
    if names.background_id == len(model.kinds):
        pred[names.hidden] = 0
    return {"pred": pred, "truth": truth}


def names_line(names: Names) -> str | None:
    """Return a sentence on what the names of concepts change; None where there are no names."""
    if not names.of_concept:
        return None
    num_classes = len(np.unique(np.delete(names.class_of, names.hidden)))
    hidden = f"; {len(names.hidden)} hidden" if names.hidden else ""
    return (
        f"Concepts have names: the model's {len(names.kinds)} classes become {num_classes}{hidden}. "
        "Training does not use them, and the baselines keep their own clusters."
    )


def _photo(run_folder: Folder, name: str, *, colours: dict[str, np.ndarray], mious: dict[str, float]) -> dict[str, Any]:
    """Write the strip of a sample photograph, and return its panels as JPEG."""
    photo, group, _ = sample_photo(run_folder, name), *name.rpartition("_")[::2]
    image_id = run_folder.read_json(f"samples/{name}/sample.json")["image_id"]
    panels: dict[str, Image.Image | None] = {"photograph": photo}
    panels["prior attention"] = spotlight(photo, sample_labels(run_folder, name, "prior") / 255)
    coarse = Image.fromarray(sample_labels(run_folder, name, "pseudo_label").astype(np.int32))
    patches = np.asarray(coarse.resize(photo.size, Image.Resampling.NEAREST))
    pred = colours["pred"]
    panels["pseudo-label"] = overlay(photo, patches, colours=pred, opacity=0.7)
    for mask in _MASKS:
        panels[mask] = sample_mask(
            run_folder, name, name=mask, photo=photo, colours=colours["truth" if mask == "truth" else "pred"]
        )
    seen = {title: panel for title, panel in panels.items() if panel is not None}
    run_folder.write_bytes(f"samples/strip_{name}.jpg", strip_jpeg(list(seen.values())))
    jpegs = {title: strip_jpeg([panel]) for title, panel in seen.items()}
    width, height = Image.open(io.BytesIO(jpegs["photograph"])).size
    return {
        "image_id": image_id,
        "group": group,
        "rank": int(name.rpartition("_")[2]),
        "miou": mious.get(image_id),
        "bytes": list(jpegs.values()),
        "panels": [
            {"title": title, "jpeg": base64.b64encode(jpeg).decode(), "width": width, "height": height}
            for title, jpeg in jpegs.items()
        ],
    }


def _legend(names: Names, metrics: dict[str, Any], colours: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """Return what the colours of the masks mean: classes, or concepts where there are no classes."""
    if metrics["per_class"]:
        rows = enumerate(metrics["per_class"])
        entries = [
            {"label": row["name"], "colour": hex_colour(colours["truth"][class_id])}
            for class_id, row in rows
            if row["iou"] is not None or row["concepts"]
        ]
        return [*entries, {"label": "no class", "colour": "#9b9b9b"}]
    shown = dict.fromkeys(names.class_of.tolist())
    return [
        {"label": names.label(c), "colour": hex_colour(colours["pred"][names.members(c)[0]])} for c in sorted(shown)
    ]


def _classes(names: Names, metrics: dict[str, Any], colours: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows of the table of classes, best first, absent ones last."""
    rows = [
        row
        | {
            "colour": hex_colour(colours[class_id]),
            "made_of": ", ".join(
                f"{names.of_concept[c]} ({c})" if names.of_concept.get(c) else str(c) for c in row["concepts"]
            ),
        }
        for class_id, row in enumerate(metrics["per_class"] or [])
    ]
    return sorted(rows, key=lambda row: (row["iou"] is None, -(row["iou"] or 0)))


def _confusion(
    config: RunConfig, counts: csr_array | None, *, metrics: dict[str, Any], num_concepts: int
) -> dict[str, Any]:
    if counts is None:
        return {}
    class_of_concept = np.full(num_concepts, -1)
    for class_id, row in enumerate(metrics["per_class"]):
        class_of_concept[row["concepts"]] = class_id
    names = config.class_names
    by_class = class_confusion(total_counts(counts).reshape(len(names), -1), class_of_concept)
    return {
        "confusion_png": figure_png(confusion_figure(by_class, names)),
        "confused": largest_confusions(by_class, names),
    }


def _text(value: Any) -> str:
    """Return a setting's value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _changed(config: RunConfig) -> list[tuple[str, str, str]] | None:
    """Return each changed setting with the preset's value and the run's; None where there is no such preset."""
    try:
        preset = get_preset(config.preset, config.data.dataset)
    except ConfigError:
        return None
    before, values = flatten(preset.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    return [
        (name, _text(before.get(name)), _text(values.get(name)))
        for name in dict.fromkeys((*before, *values))
        if before.get(name) != values.get(name)
    ]
