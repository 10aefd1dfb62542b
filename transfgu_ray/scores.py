"""What metrics.json says of confusion matrices, and how the terminal and the report tell it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from transfgu_ray.algorithms.intervals import (
    RESAMPLES,
    class_counts,
    merge_concepts,
    score_intervals,
    total_counts,
)
from transfgu_ray.algorithms.metrics import (
    Score,
    chance_confusion,
    foreground_iou,
    majority_confusion,
    score,
    score_matched,
    score_merged,
)
from transfgu_ray.config import RunConfig
from transfgu_ray.errors import ConfigError
from transfgu_ray.names import Names

STAGE_NAMES = ("initial", "trained", "bootstrapped")
REFINED = "refined"
# The methods whose masks are of the model's concepts.
_OF_MODEL = (*STAGE_NAMES, REFINED)
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
    "discard": "one concept a class (Hungarian), the pixels of concepts left over are not scored",
    "count": "one concept a class (Hungarian), the pixels of concepts left over are errors",
    "many_to_one": "each concept to the class it overlaps most",
}
# An object class counts as found from this IoU on.
_FOUND_IOU = 0.3
# What runs that differ in their seed only have in common.
_IDENTITY = (
    "dataset", "split", "granularity", "protocol", "unmatched", "num_images", "num_classes", "num_concepts", "recipe",
    "backbone", "concept_names",
)  # fmt: skip


def metrics_json(
    config: RunConfig,
    split: str | None,
    num_images: int,
    counts: dict[str, csr_array],
    names: Names,
    weights_sha256: str,
) -> dict[str, Any]:
    """The content of metrics.json; `stages`, `refined`, `baselines` and `per_class` are null where nothing was scored.

    The baselines always hold `chance`, the expected score of labels drawn uniformly over the concepts, and `majority`,
    that of calling every pixel the most frequent true class; see `chance_confusion` and `majority_confusion`.

    Args:
        config: the run's configuration.
        split: the scored split.
        num_images: scored photographs.
        counts: per-photograph confusion matrices of each stage, of `refined` where it was asked for, then of each
            baseline; see `photo_counts`. Empty where nothing was scored.
        names: of the model's concepts. Concepts of one name are scored as one, and hidden ones as none; baselines have
            clusters of their own.
        weights_sha256: of the encoder.
    """
    content: dict[str, Any] = {
        "dataset": config.data.dataset,
        "split": split,
        "granularity": config.concepts.granularity,
        "protocol": config.evaluate.protocol,
        "unmatched": config.evaluate.unmatched,
        "num_images": num_images if counts else 0,
        "num_classes": len(config.class_names),
        "num_concepts": config.num_concepts,
        "concept_names": {str(concept): name for concept, name in names.of_concept.items()} or None,
        "scored": bool(counts),
        "stages": None,
        "refined": None,
        "baselines": None,
        "per_class": None,
    }
    if counts:
        content |= _scores(config, counts, names)
    return content | {
        "recipe": config.preset,
        "backbone": config.encoder.name,
        "weights_sha256": weights_sha256,
        "seed": config.seed,
    }


def _scores(config: RunConfig, counts: dict[str, csr_array], names: Names) -> dict[str, Any]:
    num_classes, kinds = len(config.class_names), names.kinds
    is_thing = np.array([kind == "thing" for kind in config.class_kinds])
    is_background = np.array([kind in ("background", "none") for kind in kinds])
    # Every method's matrices have the same rows: the truth.
    truth = class_counts(counts[STAGE_NAMES[0]], num_classes)

    def to_matrix(cells: np.ndarray) -> np.ndarray:
        return cells.reshape(num_classes, -1)

    methods: dict[str, tuple[csr_array, Callable[[np.ndarray], np.ndarray]]] = {
        **{
            name: (named_counts(of_method, names) if name in _OF_MODEL else of_method, to_matrix)
            for name, of_method in counts.items()
        },
        "chance": (truth, partial(chance_confusion, num_concepts=len(kinds))),
        "majority": (truth, majority_confusion),
    }
    numbers, scores = {}, {}
    for name, (of_method, confusion_of) in methods.items():
        confusion = confusion_of(total_counts(of_method))
        # The one class beyond the model's own holds what is hidden.
        scores[name] = score_confusion(config, confusion, len(kinds))
        numbers[name] = _numbers(config, confusion, scores[name])
        intervals = score_intervals(of_method, config.seed, partial(score_resample, config, confusion_of, scores[name]))
        numbers[name] |= dict(zip(("miou_interval", "pixel_accuracy_interval"), intervals, strict=True))
        if name in _OF_MODEL:
            own = to_matrix(total_counts(counts[name]))
            numbers[name]["foreground_iou"] = foreground_iou(own, is_thing, is_background)
    last = scores[STAGE_NAMES[-1]]
    return {
        "stages": {name: numbers.pop(name) for name in STAGE_NAMES},
        "refined": numbers.pop(REFINED, None),
        "baselines": numbers,
        # Each of the model's concepts by its number, also of those that are one class.
        "per_class": class_rows(config, replace(last, class_of_concept=last.class_of_concept[names.class_of])),
    }


def named_counts(counts: csr_array, names: Names) -> csr_array:
    """Counts of the model's concepts as those of the classes that their names make of them; see `photo_counts`."""
    return merge_concepts(counts, names.class_of, names.num_classes)


def score_confusion(config: RunConfig, confusion: np.ndarray, num_matched: int | None = None) -> Score:
    """Scores of a split by the configured policy and protocol; for `num_matched` see `score`."""
    return score(confusion, config.evaluate.unmatched, config.evaluate.protocol, num_matched)


def photo_mious(config: RunConfig, counts: csr_array, names: Names) -> np.ndarray:
    """Score of each photograph, its mIoU by the match of all of them, float64 (photographs,).

    Args:
        config: protocol and classes.
        counts: of one of the run's own stages; see `photo_counts`.
        names: of the concepts.
    """
    named, num_classes = named_counts(counts, names), len(config.class_names)
    found = score_confusion(config, total_counts(named).reshape(num_classes, -1), len(names.kinds))
    score_of = partial(score_resample, config, lambda cells: cells.reshape(num_classes, -1), found)
    return np.array([score_of(named[[photo]].toarray()[0]).miou for photo in range(named.shape[0])])


def score_resample(
    config: RunConfig, confusion_of: Callable[[np.ndarray], np.ndarray], found: Score, cells: np.ndarray
) -> Score:
    """Scores of a resample by the match of the whole split: one of its own would favour every resample."""
    rule = config.evaluate.unmatched, config.evaluate.protocol
    return score_matched(confusion_of(cells), found.class_of_concept, *rule)


def _numbers(config: RunConfig, confusion: np.ndarray, found: Score) -> dict[str, Any]:
    super_of = config.data.benchmark.super_of
    coarser = None
    if super_of and config.concepts.granularity == "fine":
        rule = config.evaluate.unmatched, config.evaluate.protocol
        merged = score_merged(confusion, found.class_of_concept, np.array(super_of), *rule)
        coarser = {"miou": merged.miou, "pixel_accuracy": merged.pixel_accuracy}
    return {
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "coverage": found.coverage,
        "super": coarser,
    }


def class_rows(config: RunConfig, found: Score) -> list[dict[str, Any]]:
    """IoU and concepts of each class, as `per_class` of metrics.json; the IoU of a class that is not scored is null."""
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


def scores_by_method(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of each stage, of `refined` and of each baseline in a metrics.json; empty where nothing was scored."""
    refined = {} if metrics["refined"] is None else {REFINED: metrics["refined"]}
    return (metrics["stages"] or {}) | refined | (metrics["baselines"] or {})


def score_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a method each, in percent; mIoU with its interval; columns without a single value are left out.

    Args:
        metrics: content of a metrics.json that is scored.
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


def percent(value: float | None, interval: list[float] | None) -> str:
    """A share in percent, and its interval where there is one; empty for None."""
    if value is None:
        return ""
    if interval is None:
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def protocol_line(metrics: dict[str, Any]) -> str:
    """How a metrics.json, or what else has its `protocol` and `unmatched`, was scored."""
    return (
        f"protocol {metrics['protocol']}; {_RULES[metrics['unmatched']]}; "
        f"[ ] 95 % of {RESAMPLES} resamples of the photographs"
    )


def score_lines(metrics: dict[str, Any]) -> list[str]:
    """How it was scored; the last stage against the best baseline, and how many object classes it found.

    Chance and the majority class are baselines like any other: a method that does not beat them is told so. The two
    last lines are left out where they have no meaning.

    Args:
        metrics: content of a metrics.json that is scored.
    """
    lines = [protocol_line(metrics)]
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


def aggregate(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of runs that differ in their seed only.

    Args:
        metrics: contents of their metrics.json, all scored.

    Returns:
        What the runs have in common, `seeds`, and under `stages`, `refined` and `baselines` for each method, for each
        of miou, pixel_accuracy and coverage, {"mean": ..., "deviation": ...}; the deviation (n - 1) of a single run is
        null.

    Raises:
        ConfigError: there is no run, one is not scored, or they differ in more than the seed, or not in the seed.
    """
    _check_same(metrics)
    first = metrics[0]
    return {name: first[name] for name in _IDENTITY} | {
        "seeds": [each["seed"] for each in metrics],
        "stages": _spread([each["stages"] for each in metrics]),
        "refined": None
        if first["refined"] is None
        else _spread([{REFINED: each["refined"]} for each in metrics])[REFINED],
        "baselines": _spread([each["baselines"] for each in metrics]),
    }


def _check_same(metrics: Sequence[dict[str, Any]]) -> None:
    if not metrics or not all(each["scored"] for each in metrics):
        raise ConfigError("seeds are aggregated over runs that are scored; give runs on a dataset with labels")
    first = metrics[0]
    for each in metrics[1:]:
        different = [f"{name}: {first[name]} and {each[name]}" for name in _IDENTITY if each[name] != first[name]]
        if set(scores_by_method(each)) != set(scores_by_method(first)):
            different.append(f"methods: {', '.join(scores_by_method(first))} and {', '.join(scores_by_method(each))}")
        if different:
            raise ConfigError(
                f"the runs differ in more than their seed ({'; '.join(different)}); give runs of one recipe"
            )
    seeds = [each["seed"] for each in metrics]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"two of the runs have one seed ({', '.join(map(str, seeds))}); give each run a seed of its own"
        )


def _spread(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        method: {
            name: {
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
            for name in ("miou", "pixel_accuracy", "coverage")
            for values in [[each[method][name] for each in scores]]
        }
        for method in scores[0]
    }
