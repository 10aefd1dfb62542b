"""Confusion matrix, Hungarian match, mIoU and pixel accuracy (4.1)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer
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
    if confusion.sum() == 0:
        raise ValueError("no labelled pixel to score")
    matched = match_concepts(confusion)
    num_classes = len(confusion)
    square = np.zeros((num_classes, num_classes), dtype=np.int64)
    for concept, class_id in enumerate(matched):
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
        class_of_concept=matched,
    )


def add_confusions(
    total: Int64[np.ndarray, "*shape"] | None, more: Int64[np.ndarray, "*shape"]
) -> Int64[np.ndarray, "*shape"]:
    """Running sum of confusion matrices; None starts it."""
    return more.copy() if total is None else total + more
