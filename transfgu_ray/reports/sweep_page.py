"""sweep.html: a self-contained page made from sweep.json and the run folders of its trials alone."""

import base64
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transfgu_ray.errors import ArtifactError, StorageError
from transfgu_ray.models.model import load_model_config
from transfgu_ray.reports.page import (
    figure_png,
    hex_colour,
    render,
    sample_mask,
    sample_numbers,
    sample_photo,
    strip_jpeg,
)
from transfgu_ray.reports.run_page import matched_colours
from transfgu_ray.reports.sweep_figures import (
    TITLES,
    against_settings,
    parallel_coordinates,
    score_against_miou,
    shown_trials,
)
from transfgu_ray.reports.sweep_tables import (
    best_trial,
    evidence_lines,
    evidence_table,
    failed_trials,
    ranked,
    short_id,
    sweep_table,
    value_text,
    varying,
)
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from PIL import Image

_MASK = "bootstrapped"
_MAX_PHOTOS = 8


def write_sweep_report(folder: Folder, sweep: Mapping[str, Any]) -> None:
    """Write sweep.html.

    Args:
        folder: folder of the sweep.
        sweep: content of its sweep.json.
    """
    trials, objective = sweep["trials"], sweep["objective"]
    best = best_trial(trials, objective)
    page = render(
        "sweep.html",
        sweep=sweep,
        has_labels=any(trial["miou"] is not None for trial in trials),
        counts=Counter(trial["status"] for trial in trials),
        best=best,
        best_id=None if best is None else short_id(best),
        best_point={} if best is None else {name: json.dumps(value) for name, value in best["point"].items()},
        command=None if best is None else f"transfgu predict {shlex.quote(best['run'])} --images DIR --out DIR",
        evidence_table=evidence_table(sweep) if sweep["evidence"] else None,
        evidence_lines=evidence_lines(sweep),
        trials_table=sweep_table(sweep, wide=True),
        failed=failed_trials(sweep),
        space={name: _space_text(values) for name, values in sweep["space"].items()},
        base={name: value_text(value) for name, value in sweep["base"].items()},
        num_varying=len(varying(sweep["space"])),
        num_shown=len(shown_trials(sweep)),
        objective_title=TITLES[objective],
        **_figures(sweep),
        **_masks(sweep),
    )
    folder.write_bytes("sweep.html", page)


def _space_text(values: Any) -> str:
    if isinstance(values, list):
        return ", ".join(map(value_text, values))
    scale = ", evenly on a logarithmic scale" if values.get("log") else ""
    return f"{value_text(values['low'])} to {value_text(values['high'])}{scale}"


def _figures(sweep: Mapping[str, Any]) -> dict[str, Any]:
    parallel, scatter = parallel_coordinates(sweep), score_against_miou(sweep)
    return {
        "parallel": None if parallel is None else figure_png(parallel),
        "scatter": None if scatter is None else figure_png(scatter),
        "multiples": [(title, figure_png(figure)) for title, figure in against_settings(sweep)],
    }


@dataclass(frozen=True)
class _Masks:
    """The masks in the run folder of a trial.

    Attributes:
        folder: the run folder.
        colours: colours of predictions and truth; see `matched_colours`.
        class_names: names of the classes that concepts are matched to; empty without labels.
        number_of: content of a sample photograph's file -> name of the sample.
    """

    folder: Folder
    colours: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    number_of: dict[bytes, str]

    @classmethod
    def read(cls, uri: str) -> "_Masks":
        """Open the run folder of a trial.

        Raises:
            OSError, ValueError, ArtifactError: it is incomplete.
        """
        folder = Folder(uri)
        metrics = json.loads(folder.read_bytes("metrics.json"))
        colours = matched_colours(load_model_config(Folder(folder.uri_of("model"))), metrics)
        names = tuple(row["name"] for row in metrics["per_class"] or [])
        number_of = {folder.read_bytes(f"samples/{number}/photo.jpg"): number for number in sample_numbers(folder)}
        return cls(folder, colours, names, number_of)

    def panel(self, photo: bytes, name: str) -> "Image.Image | None":
        """Return a photograph under one of its masks; None where there is no such mask."""
        number = self.number_of[photo]
        colours = self.colours["truth" if name == "truth" else "pred"]
        return sample_mask(self.folder, number, name=name, photo=sample_photo(self.folder, number), colours=colours)

    def legend(self) -> list[dict[str, str]]:
        """Return the classes and their colours."""
        colours = self.colours["truth"]
        return [{"label": name, "colour": hex_colour(colours[i])} for i, name in enumerate(self.class_names)]


def _masks(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Return photographs with the masks of the best and the worst trial by the objective, and with the truth."""
    order = ranked(sweep["trials"], sweep["objective"])
    opened: list[tuple[str, _Masks]] = []
    unread: list[str] = []
    for title, trial in zip(("best", "worst"), (order[0], order[-1]) if len(order) > 1 else order, strict=False):
        try:
            opened.append((f"{title} trial {short_id(trial)}", _Masks.read(trial["run"])))
        except StorageError:
            raise
        except (OSError, ValueError, ArtifactError):
            unread.append(f"{title} trial {short_id(trial)}")
    first = opened[0][1].number_of if opened else {}
    common = [photo for photo in first if all(photo in masks.number_of for _, masks in opened)]
    note = None
    if not order:
        note = "No trial finished."
    elif opened and not common:
        note = "The best and the worst trial have no photograph in common." if first else "No samples were requested."
    return {
        "photos": [_panels(photo, opened) for photo in common[:_MAX_PHOTOS]],
        "num_photos": len(common),
        "legend": opened[0][1].legend() if opened else [],
        "unread": unread,
        "masks_note": note,
    }


def _panels(photo: bytes, opened: list[tuple[str, _Masks]]) -> list[dict[str, str]]:
    first = opened[0][1]
    panels: dict[str, Image.Image | None] = {"photograph": sample_photo(first.folder, first.number_of[photo])}
    panels |= {title: masks.panel(photo, _MASK) for title, masks in opened}
    panels["truth"] = first.panel(photo, "truth")
    return [
        {"title": title, "jpeg": base64.b64encode(strip_jpeg([panel])).decode()}
        for title, panel in panels.items()
        if panel is not None
    ]
