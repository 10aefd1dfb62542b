"""Scores as the terminal and the report show them."""

from typing import Any

from transfgu_ray.algorithms.scores.intervals import (
    RESAMPLES,
)
from transfgu_ray.reports.scores import REFINED, STAGE_NAMES, scores_by_method

_TITLES = {
    REFINED: "bootstrapped + PAMR",
    "patch_tokens": "k-means, patch tokens",
    "decoder_tokens": "k-means, decoder's tokens",
    "random_vit": "k-means, untrained ViT",
    "raw_colour": "k-means, colours",
    "iic": "IIC head, patch tokens",
    "picie": "PiCIE head, patch tokens",
    "mask_contrast": "k-means, foreground masks",
    "chance": "chance",
    "majority": "majority class",
}

_RULES = {
    "discard": "one concept per class (Hungarian), pixels of concepts left over are not scored",
    "count": "one concept per class (Hungarian), pixels of concepts left over are errors",
    "many_to_one": "each concept to the class it overlaps most",
}

# An object class counts as found from this IoU on.
_FOUND_IOU = 0.3


def score_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per method, in percent; mIoU with its interval, columns without any value left out.

    Args:
        metrics: content of the metrics.json of a scored run.
    """
    scores = scores_by_method(metrics)
    columns = {
        "mIoU": [(s["miou"], s["miou_interval"]) for s in scores.values()],
        "accuracy": [(s["pixel_accuracy"], None) for s in scores.values()],
        "foreground IoU": [(s.get("foreground_iou"), None) for s in scores.values()],
        "super mIoU": [(s["super"] and s["super"]["miou"], None) for s in scores.values()],
        "coverage": [(s["coverage"], None) for s in scores.values()],
    }
    columns = {name: cells for name, cells in columns.items() if any(value is not None for value, _ in cells)}
    coarser = " super-categories" if metrics["granularity"] == "super" else ""
    header = [f"{metrics['dataset']} {metrics['split']}{coarser}, %", *columns]
    titles = [_TITLES.get(name, name) for name in scores]
    return header, [
        [title, *(percent(*cell) for cell in cells)] for title, *cells in zip(titles, *columns.values(), strict=True)
    ]


def trust_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one per method, in percent: scores on labels not matched on, and of single photographs.

    Args:
        metrics: content of the metrics.json of a scored run.
    """
    header = ["method", "mIoU", "held-out mIoU", "mIoU of a photograph", "worst decile", "unused concepts"]
    return header, [
        [
            _TITLES.get(name, name),
            percent(scores["miou"], None),
            percent(scores["held_out"] and scores["held_out"]["miou"], None),
            percent(scores["photo_miou"]["mean"], None),
            percent(scores["photo_miou"]["worst_decile"], None),
            str(scores.get("num_dead_concepts", "")),
        ]
        for name, scores in scores_by_method(metrics).items()
    ]


def percent(value: float | None, interval: list[float] | None) -> str:
    """Return a share in percent, and its interval where there is one; empty for None."""
    if value is None:
        return ""
    if interval is None:
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def protocol_line(metrics: dict[str, Any]) -> str:
    """Return how a metrics.json, or any content with its `protocol` and `unmatched`, was scored."""
    return (
        f"protocol {metrics['protocol']}; {_RULES[metrics['unmatched']]}; "
        f"[ ] 95 % of {RESAMPLES} resamples of the photographs"
    )


def score_lines(metrics: dict[str, Any]) -> list[str]:
    """Return how a run was scored, and of its last stage: how far it holds, the best baseline, object classes found.

    Chance and the majority class count as baselines. The last two lines are left out where they have no meaning.

    Args:
        metrics: content of the metrics.json of a scored run.
    """
    lines = [protocol_line(metrics), _trust_line(metrics)]
    last, baselines = metrics["stages"][STAGE_NAMES[-1]]["miou"], metrics["baselines"]
    best = max(baselines, key=lambda name: baselines[name]["miou"])
    if baselines[best]["miou"] > 0:
        ratio = last / baselines[best]["miou"]
        lines.append(f"{STAGE_NAMES[-1]} is {ratio:.2f} x the best baseline ({_TITLES[best]})")
    objects = [row["iou"] for row in metrics["per_class"] if row["kind"] == "thing" and row["iou"] is not None]
    if objects:
        found = sum(iou >= _FOUND_IOU for iou in objects)
        lines.append(f"objects at IoU >= {_FOUND_IOU}: {found} of {len(objects)}")
    return lines


def _trust_line(metrics: dict[str, Any]) -> str:
    last = metrics["stages"][STAGE_NAMES[-1]]
    parts = [f"worst decile of photographs {percent(last['photo_miou']['worst_decile'], None)}"]
    if last["held_out"]:
        parts.insert(0, f"held-out mIoU {percent(last['held_out']['miou'], None)} (matched on the other photographs)")
    parts.append(f"{last['num_dead_concepts']} of {metrics['num_concepts']} concepts unused")
    return f"{STAGE_NAMES[-1]}: {', '.join(parts)}"
