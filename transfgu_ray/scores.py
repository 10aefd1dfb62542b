"""What metrics.json says of confusion matrices, and how the terminal and the report tell it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transfgu_ray.algorithms.metrics import Score, foreground_iou, score, score_merged
from transfgu_ray.benchmarks import BENCHMARKS
from transfgu_ray.config import RunConfig

STAGE_NAMES = ("initial", "trained", "bootstrapped")
_BASELINE_TITLES = {
    "patch_tokens": "k-means, patch tokens",
    "decoder_tokens": "k-means, decoder's tokens",
    "random_vit": "k-means, untrained ViT",
    "raw_colour": "k-means, colours",
    "iic": "IIC head, patch tokens",
    "picie": "PiCIE head, patch tokens",
    "mask_contrast": "k-means, foreground masks",
}
# An object class counts as found from this IoU on.
_FOUND_IOU = 0.3


def metrics_json(
    config: RunConfig,
    split: str | None,
    num_images: int,
    confusions: dict[str, np.ndarray] | None,
    kinds: Sequence[str],
    weights_sha256: str,
) -> dict[str, Any]:
    """The content of metrics.json; `stages`, `baselines` and `per_class` are null where nothing was scored.

    Args:
        config: the run's configuration.
        split: the scored split.
        num_images: scored photographs.
        confusions: pixel counts (classes, concepts) of each stage, then of each baseline.
        kinds: kind of each concept of the model.
        weights_sha256: of the encoder.
    """
    content: dict[str, Any] = {
        "dataset": config.data.dataset,
        "split": split,
        "granularity": config.concepts.granularity,
        "protocol": "transfgu",
        "num_images": num_images if confusions else 0,
        "num_classes": len(config.class_names),
        "num_concepts": config.num_concepts,
        "scored": confusions is not None,
        "stages": None,
        "baselines": None,
        "per_class": None,
    }
    if confusions is not None:
        is_thing = np.array([kind == "thing" for kind in config.class_kinds])
        is_background = np.array([kind in ("background", "none") for kind in kinds])
        scores = {name: score(confusion) for name, confusion in confusions.items()}
        numbers = {name: _numbers(config, confusions[name], found) for name, found in scores.items()}
        content["stages"] = {
            name: numbers[name] | {"foreground_iou": foreground_iou(confusions[name], is_thing, is_background)}
            for name in STAGE_NAMES
        }
        content["baselines"] = {name: found for name, found in numbers.items() if name not in STAGE_NAMES}
        content["per_class"] = _per_class(config, scores[STAGE_NAMES[-1]])
    return content | {
        "recipe": config.preset,
        "backbone": config.encoder.name,
        "weights_sha256": weights_sha256,
        "seed": config.seed,
    }


def _numbers(config: RunConfig, confusion: np.ndarray, found: Score) -> dict[str, Any]:
    super_of = BENCHMARKS[config.data.dataset].super_of
    coarser = None
    if super_of and config.concepts.granularity == "fine":
        merged = score_merged(confusion, found.class_of_concept, np.array(super_of))
        coarser = {"miou": merged.miou, "pixel_accuracy": merged.pixel_accuracy}
    return {
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "coverage": found.coverage,
        "super": coarser,
    }


def _per_class(config: RunConfig, found: Score) -> list[dict[str, Any]]:
    classes = zip(config.class_names, config.class_kinds, found.class_iou, strict=True)
    return [
        {
            "name": name,
            "kind": kind,
            "iou": None if np.isnan(iou) else float(iou),
            # A match without a single right pixel is an accident of the matching, not a finding.
            "concepts": np.flatnonzero(found.class_of_concept == class_id).tolist() if iou > 0 else [],
        }
        for class_id, (name, kind, iou) in enumerate(classes)
    ]


def score_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a stage or baseline each, in percent; columns without a single value are left out.

    Args:
        metrics: content of a metrics.json that is scored.
    """
    titled = metrics["stages"] | {_BASELINE_TITLES[name]: s for name, s in metrics["baselines"].items()}
    columns = {
        "mIoU": [s["miou"] for s in titled.values()],
        "accuracy": [s["pixel_accuracy"] for s in titled.values()],
        "foreground IoU": [s.get("foreground_iou") for s in titled.values()],
        "super mIoU": [s["super"] and s["super"]["miou"] for s in titled.values()],
        "coverage": [s["coverage"] for s in titled.values()],
    }
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    coarser = " super-categories" if metrics["granularity"] == "super" else ""
    header = [f"{metrics['dataset']} {metrics['split']}{coarser}, %", *columns]
    rows = [
        [title, *("" if value is None else f"{100 * value:.2f}" for value in values)]
        for title, *values in zip(titled, *columns.values(), strict=True)
    ]
    return header, rows


def score_lines(metrics: dict[str, Any]) -> list[str]:
    """The last stage against the best baseline, and how many object classes it found; where either has a meaning.

    Args:
        metrics: content of a metrics.json that is scored.
    """
    lines = []
    last, baselines = metrics["stages"][STAGE_NAMES[-1]]["miou"], metrics["baselines"]
    best = max(baselines, key=lambda name: baselines[name]["miou"], default=None)
    if best is not None and baselines[best]["miou"] > 0:
        ratio = last / baselines[best]["miou"]
        lines.append(f"{STAGE_NAMES[-1]} is {ratio:.2f} x the best baseline ({_BASELINE_TITLES[best]})")
    objects = [row["iou"] for row in metrics["per_class"] if row["kind"] == "thing" and row["iou"] is not None]
    if objects:
        found = sum(iou >= _FOUND_IOU for iou in objects)
        lines.append(f"objects at IoU >= {_FOUND_IOU}: {found} of {len(objects)}")
    return lines
