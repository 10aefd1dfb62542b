"""metrics.json: the scores that follow from confusion matrices."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.sparse import csr_array

from transfgu_ray.algorithms.scores.intervals import (
    class_counts,
    halves,
    merge_concepts,
    resampled_scores,
    score_intervals,
    total_counts,
    worst_decile,
)
from transfgu_ray.algorithms.scores.metrics import (
    Score,
    chance_confusion,
    dead_concepts,
    foreground_iou,
    majority_confusion,
    score,
    score_held_out,
    score_matched,
    score_merged,
)
from transfgu_ray.config.run import RunConfig
from transfgu_ray.models.names import Names

STAGE_NAMES = ("initial", "trained", "bootstrapped")
REFINED = "refined"
# The methods whose masks are of the model's concepts.
_OF_MODEL = (*STAGE_NAMES, REFINED)


def metrics_json(
    config: RunConfig,
    split: str | None,
    *,
    num_images: int,
    counts: dict[str, csr_array],
    names: Names,
    weights_sha256: str,
) -> dict[str, Any]:
    """Return the content of metrics.json; `stages`, `refined`, `baselines`, `per_class` are null if nothing was scored.

    Beside the scores by the match of the whole split, every method has `held_out`, see `score_held_out` (null for a
    single photograph), and `photo_miou`: mean of the photographs' own mIoU, mean and highest of its worst decile.
    Stages and `refined` also list `dead_concepts`, which win no labelled pixel.

    The baselines always hold `chance`, the expected score of labels with the last stage's concept sizes that know
    nothing of the truth, and `majority`, the score of calling every pixel the most frequent true class; see
    `chance_confusion` and `majority_confusion`.

    Args:
        config: the run's configuration.
        split: the scored split.
        num_images: number of scored photographs.
        counts: per-photograph confusion matrices of each stage, of `refined` where requested, then of each baseline;
            see `photo_counts`. Empty where nothing was scored.
        names: names of the model's concepts. Concepts with the same name are scored as one, hidden ones as none;
            baselines keep their own clusters.
        weights_sha256: hash of the encoder's weights.
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
        # What the student reads; its labels always come from the encoder.
        "backbone": config.encoder.name if config.train.backbone == "prior" else config.train.backbone,
        "weights_sha256": weights_sha256,
        "seed": config.seed,
    }


def _scores(config: RunConfig, counts: dict[str, csr_array], names: Names) -> dict[str, Any]:
    is_thing = np.array([kind == "thing" for kind in config.class_kinds])
    is_background = np.array([kind in ("background", "none") for kind in names.kinds])
    methods, numbers = _methods(config, counts, names), {}
    for name, method in methods.items():
        intervals = score_intervals(method.counts, config.seed, method.score_of)
        numbers[name] = {
            **_numbers(config, method.confusion_of(total_counts(method.counts)), method.found),
            **dict(zip(("miou_interval", "pixel_accuracy_interval"), intervals, strict=True)),
            "held_out": _held_out(config, method, len(names.kinds)),
            "photo_miou": _photo_miou(method),
        }
        if name in _OF_MODEL:
            own = total_counts(counts[name]).reshape(len(config.class_names), -1)
            dead = dead_concepts(own[:, [kind != "none" for kind in names.kinds]])
            numbers[name] |= {
                "foreground_iou": foreground_iou(own, is_thing, is_background),
                "dead_concepts": dead,
                "num_dead_concepts": len(dead),
            }
    last = methods[STAGE_NAMES[-1]].found
    return {
        **by_group(numbers),
        # By the number of each concept, even where several make one class.
        "per_class": class_rows(config, replace(last, class_of_concept=last.class_of_concept[names.class_of])),
    }


def by_group(methods: dict[str, Any]) -> dict[str, Any]:
    """Return the values of methods as `stages`, `refined` (null where there is none) and `baselines`."""
    return {
        "stages": {name: methods[name] for name in STAGE_NAMES},
        REFINED: methods.get(REFINED),
        "baselines": {name: value for name, value in methods.items() if name not in _OF_MODEL},
    }


@dataclass(frozen=True)
class _Method:
    """What is scored beside others.

    Attributes:
        counts: of each photograph; see `photo_counts`.
        confusion_of: makes a confusion matrix of a sum of them.
        found: scores of the split.
        score_of: scores any sum of them by the match of the split.
    """

    counts: csr_array
    confusion_of: Callable[[np.ndarray], np.ndarray]
    found: Score
    score_of: Callable[[np.ndarray], Score]


def _methods(config: RunConfig, counts: dict[str, csr_array], names: Names) -> dict[str, _Method]:
    num_classes = len(config.class_names)

    def to_matrix(cells: np.ndarray) -> np.ndarray:
        return cells.reshape(num_classes, -1)

    def method(of_method: csr_array, confusion_of: Callable[[np.ndarray], np.ndarray]) -> _Method:
        # The one class beyond the model's own holds the hidden concepts.
        found = score_confusion(config, confusion_of(total_counts(of_method)), len(names.kinds))
        score_of = partial(score_resample, config=config, confusion_of=confusion_of, found=found)
        return _Method(of_method, confusion_of, found, score_of)

    named = {name: named_counts(each, names) if name in _OF_MODEL else each for name, each in counts.items()}
    last = named[STAGE_NAMES[-1]]
    # Every method's matrices have the same rows: the truth.
    truth, concept_pixels = class_counts(last, num_classes), to_matrix(total_counts(last)).sum(0)
    return {
        **{name: method(of_method, to_matrix) for name, of_method in named.items()},
        "chance": method(truth, partial(chance_confusion, concept_pixels=concept_pixels)),
        "majority": method(truth, majority_confusion),
    }


def resampled_methods(
    config: RunConfig, counts: dict[str, csr_array], names: Names, seed: int
) -> dict[str, Float64[np.ndarray, "resamples 2"]]:
    """Return mIoU and pixel accuracy of each method of metrics.json on resamples of the photographs.

    Args:
        config: see `metrics_json`.
        counts: see `metrics_json`.
        names: see `metrics_json`.
        seed: of the draws; runs on the same photographs have the same resamples.
    """
    methods = _methods(config, counts, names)
    return {name: resampled_scores(method.counts, seed, method.score_of) for name, method in methods.items()}


def _held_out(config: RunConfig, method: _Method, num_matched: int) -> dict[str, float] | None:
    """Return the scores of each half of the photographs by the match of the other; None for a single photograph."""
    if method.counts.shape[0] < 2:
        return None
    one, other = (method.confusion_of(total_counts(half)) for half in halves(method.counts))
    found = score_held_out((one, other), **_rule(config), num_matched=num_matched)
    return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}


def _photo_miou(method: _Method) -> dict[str, float]:
    values = _photo_mious(method.counts, method.score_of)
    worst, highest = worst_decile(values)
    return {"mean": float(values.mean()), "worst_decile": worst, "worst_decile_limit": highest}


def named_counts(counts: csr_array, names: Names) -> csr_array:
    """Return the counts of the classes that names make of the model's concepts; see `photo_counts`."""
    return merge_concepts(counts, names.class_of, names.num_classes)


def score_confusion(config: RunConfig, confusion: np.ndarray, num_matched: int | None = None) -> Score:
    """Return the scores of a split by the configured policy and protocol; for `num_matched` see `score`."""
    return score(confusion, **_rule(config), num_matched=num_matched)


def photo_mious(config: RunConfig, counts: csr_array, names: Names) -> np.ndarray:
    """Return the mIoU of each photograph by the match of the whole split, float64 (photographs,).

    Args:
        config: protocol and classes.
        counts: counts of one of the run's own stages; see `photo_counts`.
        names: names of the concepts.
    """
    named, num_classes = named_counts(counts, names), len(config.class_names)
    found = score_confusion(config, total_counts(named).reshape(num_classes, -1), len(names.kinds))
    score_of = partial(
        score_resample, config=config, confusion_of=lambda cells: cells.reshape(num_classes, -1), found=found
    )
    return _photo_mious(named, score_of)


def _photo_mious(counts: csr_array, score_of: Callable[[np.ndarray], Score]) -> np.ndarray:
    return np.array([score_of(counts[[photo]].toarray()[0]).miou for photo in range(counts.shape[0])])


def _rule(config: RunConfig) -> dict[str, str]:
    """Return the arguments that say how confusion matrices are scored."""
    return {"unmatched": config.evaluate.unmatched, "protocol": config.evaluate.protocol}


def score_resample(
    cells: np.ndarray, *, config: RunConfig, confusion_of: Callable[[np.ndarray], np.ndarray], found: Score
) -> Score:
    """Return the scores of a resample by the match of the whole split: its own match would favour every resample."""
    return score_matched(confusion_of(cells), found.class_of_concept, **_rule(config))


def _numbers(config: RunConfig, confusion: np.ndarray, found: Score) -> dict[str, Any]:
    super_of = config.data.spec.super_of
    coarser = None
    if super_of and config.concepts.granularity == "fine":
        merged = score_merged(confusion, found.class_of_concept, super_of=np.array(super_of), **_rule(config))
        coarser = {"miou": merged.miou, "pixel_accuracy": merged.pixel_accuracy}
    return {
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "coverage": found.coverage,
        "super": coarser,
    }


def class_rows(config: RunConfig, found: Score) -> list[dict[str, Any]]:
    """Return IoU and concepts of each class, as `per_class` of metrics.json; the IoU is null where it is not scored."""
    classes = zip(config.class_names, config.class_kinds, found.class_iou, strict=True)
    return [
        {
            "name": name,
            "kind": kind,
            "iou": None if np.isnan(iou) else float(iou),
            # A match without a single correct pixel is an accident of the matching, not a finding.
            "concepts": np.flatnonzero(found.class_of_concept == class_id).tolist() if iou > 0 else [],
        }
        for class_id, (name, kind, iou) in enumerate(classes)
    ]


def scores_by_method(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of each stage, `refined` and each baseline in a metrics.json; empty if nothing was scored."""
    refined = {} if metrics["refined"] is None else {REFINED: metrics["refined"]}
    return (metrics["stages"] or {}) | refined | (metrics["baselines"] or {})
