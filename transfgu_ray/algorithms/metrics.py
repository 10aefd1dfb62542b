"""Confusion matrix, Hungarian match, mIoU and pixel accuracy (4.1)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer
from scipy.optimize import linear_sum_assignment

IGNORE = 255


@dataclass(frozen=True)
class Score:
    """Scores of one confusion matrix, all in [0, 1].

    Attributes:
        miou: mean IoU over classes that are present in the ground truth.
        pixel_accuracy: share of the scored pixels that are right.
        coverage: share of the labelled pixels that are scored; below 1 when K exceeds the classes.
        class_iou: IoU a class; NaN for a class that is not present.
        class_of_concept: class matched to each concept; -1 for a left-over concept.
    """

    miou: float
    pixel_accuracy: float
    coverage: float
    class_iou: np.ndarray
    class_of_concept: np.ndarray


def confusion_matrix(
    target: Integer[np.ndarray, "*hw"], pred: Integer[np.ndarray, "*hw"], num_classes: int, num_concepts: int
) -> Int64[np.ndarray, "c k"]:
    """Pixel counts, rows = ground truth, columns = predicted concept; target 255 never counts."""
    valid = target != IGNORE
    index = target[valid].astype(np.int64) * num_concepts + pred[valid]
    return np.bincount(index, minlength=num_classes * num_concepts).reshape(num_classes, num_concepts)


def match_concepts(confusion: Int64[np.ndarray, "c k"]) -> Int64[np.ndarray, " k"]:
    """Class for each concept, one to one, chosen to maximise the matched pixels; -1 for a left-over concept.

    Reference: Kuhn (1955), scipy.optimize.linear_sum_assignment. Departures: none.
    """
    classes, concepts = linear_sum_assignment(confusion, maximize=True)
    matched = np.full(confusion.shape[1], -1, dtype=np.int64)
    matched[concepts] = classes
    return matched


def score(confusion: Int64[np.ndarray, "c k"]) -> Score:
    """Hungarian match, then mIoU and accuracy; pixels of left-over concepts leave the score (suppl., K).

    Raises:
        ValueError: no labelled pixel at all.
    """
    return _score_matched(confusion, match_concepts(confusion))


def score_merged(
    confusion: Int64[np.ndarray, "c k"], class_of_concept: Int64[np.ndarray, " k"], super_of: Int64[np.ndarray, " c"]
) -> Score:
    """Scores of the same prediction at a coarser granularity: each concept stands for its class's coarser class.

    Args:
        confusion: pixel counts of the classes.
        class_of_concept: class matched to each concept; -1 for a left-over one, which leaves the score.
        super_of: coarser class of each class.

    Raises:
        ValueError: no labelled pixel at all.
    """
    merged = np.zeros((super_of.max() + 1, confusion.shape[1]), dtype=np.int64)
    np.add.at(merged, super_of, confusion)
    return _score_matched(merged, np.where(class_of_concept >= 0, super_of[class_of_concept], -1))


def foreground_iou(
    confusion: Int64[np.ndarray, "c k"], is_thing: Bool[np.ndarray, " c"], is_background: Bool[np.ndarray, " k"]
) -> float | None:
    """IoU of objects against all else: every concept but the background's merged, every class of things merged.

    Needs no match of concepts to classes. None where no concept is background, so that nothing was told apart, or
    where there is neither a thing nor a pixel taken for one.

    Args:
        confusion: pixel counts.
        is_thing: whether a class is of objects.
        is_background: whether a concept is of the background.
    """
    things, taken = confusion[is_thing].sum(), confusion[:, ~is_background].sum()
    hits = confusion[is_thing][:, ~is_background].sum()
    union = things + taken - hits
    return float(hits / union) if is_background.any() and union else None


def _score_matched(confusion: np.ndarray, class_of_concept: np.ndarray) -> Score:
    if confusion.sum() == 0:
        raise ValueError("no labelled pixel to score")
    num_classes = len(confusion)
    square = np.zeros((num_classes, num_classes), dtype=np.int64)
    for concept, class_id in enumerate(class_of_concept):
        if class_id >= 0:
            square[:, class_id] += confusion[:, concept]
    hits = np.diag(square)
    union = square.sum(0) + square.sum(1) - hits
    present = confusion.sum(1) > 0
    iou = np.where(present, hits / np.maximum(union, 1), np.nan)
    scored = square.sum()
    return Score(
        miou=float(np.nanmean(iou)),
        pixel_accuracy=float(hits.sum() / max(scored, 1)),
        coverage=float(scored / confusion.sum()),
        class_iou=iou,
        class_of_concept=class_of_concept,
    )


def add_confusions(
    total: Int64[np.ndarray, "*shape"] | None, more: Int64[np.ndarray, "*shape"]
) -> Int64[np.ndarray, "*shape"]:
    """Running sum of confusion matrices; None starts it."""
    return more.copy() if total is None else total + more
