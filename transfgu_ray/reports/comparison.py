"""comparison.json: versions of a model on the same photographs, and how the terminal and the picture show it."""

import html
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

from transfgu_ray.algorithms.scores.intervals import percentile_interval, resampled_scores, total_counts
from transfgu_ray.algorithms.scores.metrics import confusion_matrix, match_concepts
from transfgu_ray.config.run import RunConfig
from transfgu_ray.models.model import ModelConfig
from transfgu_ray.reports.page import sample_labels, sample_mask, sample_numbers, sample_photo
from transfgu_ray.reports.run_page import matched_colours
from transfgu_ray.reports.score_tables import percent, protocol_line
from transfgu_ray.reports.scores import STAGE_NAMES, class_rows, score_confusion, score_resample
from transfgu_ray.storage import Folder

# Versions may have different seeds; all are resampled with this one.
_SEED = 0
_MASK = STAGE_NAMES[-1]


def scored_rows(config: RunConfig, counts: Mapping[int, csr_array], reference: int) -> dict[int, dict[str, Any]]:
    """Return the scores of each version, and its paired difference to the reference.

    Args:
        config: protocol and classes, the same for all versions.
        counts: version -> confusion matrices of the same photographs; see `photo_counts`.
        reference: version that the others are compared to.

    Returns:
        version -> miou, pixel_accuracy and coverage in [0, 1], `difference` of mIoU to the reference (null for itself),
        their 95 % intervals over the same resamples of the photographs, and per_class as in metrics.json.
    """
    num_classes = len(config.class_names)
    found, resampled = {}, {}

    def to_matrix(cells: np.ndarray) -> np.ndarray:
        return cells.reshape(num_classes, -1)

    for version, of_version in counts.items():
        found[version] = score_confusion(config, to_matrix(total_counts(of_version)))
        score_of = partial(score_resample, config=config, confusion_of=to_matrix, found=found[version])
        resampled[version] = resampled_scores(of_version, _SEED, score_of)
    rows = {}
    for version, score in found.items():
        difference = None
        if version != reference:
            paired = resampled[version][:, 0] - resampled[reference][:, 0]
            difference = {"miou": score.miou - found[reference].miou, "interval": percentile_interval(paired)}
        miou, pixel_accuracy = resampled[version].T
        rows[version] = {
            "miou": score.miou,
            "miou_interval": percentile_interval(miou),
            "pixel_accuracy": score.pixel_accuracy,
            "pixel_accuracy_interval": percentile_interval(pixel_accuracy),
            "coverage": score.coverage,
            "difference": difference,
            "per_class": class_rows(config, score),
        }
    return rows


def unscored_row() -> dict[str, Any]:
    """Return what `scored_rows` says of a version where there are no labels."""
    names = (
        "miou",
        "miou_interval",
        "pixel_accuracy",
        "pixel_accuracy_interval",
        "coverage",
        "difference",
        "per_class",
    )
    return dict.fromkeys(names)


def best_version(rows: Sequence[dict[str, Any]], champion: int | None) -> int:
    """Return the version with the highest mIoU, or label-free score where there are no labels; the champion on ties."""
    ranked = "score" if rows[0]["miou"] is None else "miou"
    return int(max(rows, key=lambda row: (row[ranked], row["version"] == champion))["version"])


def decide(comparison: dict[str, Any], force: bool) -> tuple[bool, str]:
    """Return whether the best version becomes champion, and a sentence that says why or why not.

    Args:
        comparison: content of comparison.json.
        force: promote it even if the interval of its lead over the champion reaches 0, or there is no interval.
    """
    best, champion = comparison["best"], comparison["champion"]
    by = "mIoU" if comparison["scored"] else "label-free score"
    if champion is None:
        return True, f"version {best} is champion now: the best of those compared by {by}, and there was none before"
    if best == champion:
        return False, f"version {champion} stays champion: none of those compared is better by {by}"
    moved = f"version {best} is champion now and version {champion} previous-champion"
    forced = f"--force makes version {best} champion"
    if not comparison["scored"]:
        if force:
            return True, f"{moved}: --force, by the label-free score"
        return False, f"version {champion} stays champion: without labels no difference has an interval; {forced}"
    (row,) = (row for row in comparison["versions"] if row["version"] == best)
    low, high = row["difference"]["interval"]
    lead = f"{_points(row['difference']['miou'])} points of mIoU [{_points(low, 1)}, {_points(high, 1)}]"
    if low > 0:
        return True, f"{moved}: {lead}, an interval above 0"
    if force:
        return True, f"{moved}: --force, though {lead} is no clear difference"
    return False, f"version {champion} stays champion: {lead} is no clear difference to version {best}; {forced}"


def version_table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per version, scores in percent; columns without any value are left out.

    Args:
        comparison: content of comparison.json.
    """
    rows = comparison["versions"]
    columns = {
        "version": [_title(comparison, row["version"]) for row in rows],
        "tagged score": ["" if row["tagged_score"] is None else f"{row['tagged_score']:.4f}" for row in rows],
        "score": [f"{row['score']:.4f}" for row in rows],
        "mIoU": [percent(row["miou"], row["miou_interval"]) for row in rows],
        "accuracy": [percent(row["pixel_accuracy"], None) for row in rows],
        f"minus {comparison['reference']}": [_difference(row["difference"]) for row in rows],
        "photos /s": [f"{row['photos_per_second']:.2f}" for row in rows],
        "MB": [f"{row['megabytes']:.1f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def class_table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per class that any version scores: its IoU in percent by each version.

    Args:
        comparison: content of a comparison.json that is scored.
    """
    rows = comparison["versions"]
    classes = zip(*(row["per_class"] for row in rows), strict=True)
    return ["IoU, %", *(_title(comparison, row["version"]) for row in rows)], [
        [of_class[0]["name"], *(percent(each["iou"], None) for each in of_class)]
        for of_class in classes
        if any(each["iou"] is not None for each in of_class)
    ]


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """Return lines that say what the tables mean.

    Args:
        comparison: content of comparison.json.
    """
    lines = [
        f"score: label-free, on {comparison['num_probed']} photographs; photos /s: of one worker on "
        f"{comparison['device']}" + ("" if comparison["champion"] is None else "; * champion")
    ]
    if any(row["tagged_score"] is not None for row in comparison["versions"]):
        lines.append("tagged score: from the sweep that made the version, which also knew how far two students agree")
    if comparison["scored"]:
        lines.append(f"{comparison['num_images']} photographs of split {comparison['split']}, in %")
        lines.append(protocol_line(comparison) + ", the same for all versions")
    else:
        lines.append(f"dataset {comparison['dataset']} has no labels; scores that need them are left out")
    if len({row["weights_sha256"] for row in comparison["versions"]}) > 1:
        lines.append("the versions use different encoders, so their label-free scores are hardly comparable")
    return lines


def comparison_markdown(comparison: dict[str, Any]) -> str:
    """Return tables and lines as Markdown."""
    tables = [version_table(comparison), *([class_table(comparison)] if comparison["scored"] else [])]
    blocks = ["\n".join(f"- {line}" for line in comparison_lines(comparison))]
    for header, rows in tables:
        lines = [header, ["---"] * len(header), *rows]
        # Class names come from the dataset: any text.
        escaped = [[html.escape(cell, quote=False).replace("|", "\\|") for cell in cells] for cells in lines]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in escaped))
    return "\n\n".join(blocks) + "\n"


def comparison_picture(
    comparison: dict[str, Any], folders: Mapping[int, Folder], models: Mapping[int, ModelConfig]
) -> bytes:
    """Return a PNG of the samples, one per row: photograph, truth where it is known, and the mask of each version.

    Each class has a colour; where there are no labels, a concept takes the colour of the concept of the reference that
    it shares most pixels with, one to one.

    Args:
        comparison: content of comparison.json.
        folders: version -> folder that holds samples/.
        models: version -> configuration of the model.
    """
    from matplotlib.figure import Figure

    reference = comparison["reference"]
    numbers = sample_numbers(folders[reference])
    colours = {row["version"]: matched_colours(models[row["version"]], row) for row in comparison["versions"]}
    if not comparison["scored"]:
        masks = {version: [sample_labels(folder, n, _MASK) for n in numbers] for version, folder in folders.items()}
        for version, model in models.items():
            pred = overlap_colours(
                colours[reference]["pred"], masks[reference], other_masks=masks[version], num_other=len(model.kinds)
            )
            colours[version]["pred"] = pred
    rows = []
    for number in numbers:
        photo = sample_photo(folders[reference], number)
        shown: dict[str, Image.Image | None] = {"photograph": photo}
        if comparison["scored"]:
            shown["truth"] = sample_mask(
                folders[reference], number, name="truth", photo=photo, colours=colours[reference]["truth"]
            )
        for version, folder in folders.items():
            panel = sample_mask(folder, number, name=_MASK, photo=photo, colours=colours[version]["pred"])
            shown[f"version {_title(comparison, version)}"] = panel
        rows.append(shown)
    figure = Figure(figsize=(2.4 * len(rows[0]), 0.3 + 1.8 * len(rows)), layout="constrained")
    for axes, shown in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axis, (title, panel) in zip(axes, shown.items(), strict=True):
            if panel is not None:
                axis.imshow(panel)
            axis.set_axis_off()
            if shown is rows[0]:
                axis.set_title(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def overlap_colours(
    colours: np.ndarray, masks: Sequence[np.ndarray], *, other_masks: Sequence[np.ndarray], num_other: int
) -> np.ndarray:
    """Return colours for concepts by their overlap with coloured ones, one to one; those left over are grey.

    Args:
        colours: colours of the coloured concepts, uint8 (k, 3).
        masks: masks of the coloured concepts, integers (height, width) each.
        other_masks: masks of the concepts to colour, on the same photographs.
        num_other: number of concepts to colour.

    Returns:
        uint8 (num_other, 3).
    """
    pairs = zip(masks, other_masks, strict=True)
    pixels = [confusion_matrix(mask, other, num_classes=len(colours), num_concepts=num_other) for mask, other in pairs]
    matched = match_concepts(np.sum(pixels, axis=0))
    return np.where(matched[:, None] >= 0, colours[matched], np.uint8(128))


def _title(comparison: dict[str, Any], version: int) -> str:
    return f"{version} *" if version == comparison["champion"] else str(version)


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    low, high = difference["interval"]
    return f"{_points(difference['miou'])} [{_points(low, 1)}, {_points(high, 1)}]"


def _points(value: float, digits: int = 2) -> str:
    return f"{100 * value:+.{digits}f}"
