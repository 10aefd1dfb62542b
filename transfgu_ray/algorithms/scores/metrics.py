"""Confusion matrix, match of concepts to classes, mIoU and pixel accuracy (4.1).

The mean is over the classes that are present in the ground truth or predicted, as in the published codes (TransFGU's
`get_result_metrics` is that of PiCIE, Cho et al., CVPR 2021): a class that is absent but predicted has an IoU of 0, and
only a class that is neither has none. The codes have as many clusters as classes; with more, `unmatched` decides.

Protocols differ in the frame, the whole photograph or its centre square, which is no matter of this module. Beyond it,
`stego` (Hamilton et al., ICLR 2022; `UnsupervisedMetrics.compute`) makes one more class of IoU 0 of all left-over
clusters, where their pixels are errors: under `unmatched` = `count`. Departure: its `update` drops predictions numbered
past the class count before any match, so that the score depends on the numbering of the clusters; here every concept
takes part in the match.

The policy `unmatched` says what happens to the pixels of concepts without a class: under `discard` they leave the score
(suppl., K), under `count` they are misses of their true class, and under `many_to_one` there are none.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer
from scipy.optimize import linear_sum_assignment

IGNORE = 255


@dataclass(frozen=True)
class Score:
    """Scores of one confusion matrix, all in [0, 1].

    Attributes:
        miou: mean IoU over the classes present or predicted.
        pixel_accuracy: share of the scored pixels that are correct.
        coverage: share of the labelled pixels whose concept has a class; the others are left out or count as errors.
        class_iou: IoU per class; NaN for a class that is neither present nor predicted.
        class_of_concept: class of each concept; -1 for a left-over concept.
    """

    miou: float
    pixel_accuracy: float
    coverage: float
    class_iou: np.ndarray
    class_of_concept: np.ndarray


def confusion_matrix(
    target: Integer[np.ndarray, "*hw"], pred: Integer[np.ndarray, "*hw"], *, num_classes: int, num_concepts: int
) -> Int64[np.ndarray, "c k"]:
    """Count pixels: rows = ground truth, columns = predicted concept; target 255 never counts."""
    valid = target != IGNORE
    index = target[valid].astype(np.int64) * num_concepts + pred[valid]
    return np.bincount(index, minlength=num_classes * num_concepts).reshape(num_classes, num_concepts)


def match_concepts(confusion: Int64[np.ndarray, "c k"]) -> Int64[np.ndarray, " k"]:
    """Match concepts to classes one to one so that the matched pixels are most; -1 for a left-over concept.

    Reference: Kuhn (1955), scipy.optimize.linear_sum_assignment. Departures: none.
    """
    classes, concepts = linear_sum_assignment(confusion, maximize=True)
    matched = np.full(confusion.shape[1], -1, dtype=np.int64)
    matched[concepts] = classes
    return matched


def overlapping_classes(confusion: Int64[np.ndarray, "c k"]) -> Int64[np.ndarray, " k"]:
    """Return the class with which each concept shares most pixels, the lowest on ties; -1 for one without pixels."""
    return np.where(confusion.any(0), confusion.argmax(0), -1)


def score(
    confusion: Int64[np.ndarray, "c k"],
    unmatched: str = "discard",
    *,
    protocol: str = "transfgu",
    num_matched: int | None = None,
) -> Score:
    """Match concepts to classes, then compute mIoU and accuracy.

    Args:
        confusion: pixel counts.
        unmatched: `discard` or `count`, after a Hungarian match, or `many_to_one`.
        protocol: `transfgu`, `picie` or `stego`.
        num_matched: only this many concepts, the first ones, may have a class; None = all.

    Raises:
        ValueError: there is no labelled pixel.
    """
    return score_matched(confusion, _match(confusion, unmatched, num_matched), unmatched=unmatched, protocol=protocol)


def score_held_out(
    halves: tuple[Int64[np.ndarray, "c k"], Int64[np.ndarray, "c k"]],
    unmatched: str = "discard",
    *,
    protocol: str = "transfgu",
    num_matched: int | None = None,
) -> Score:
    """Score each half of a split by the match of the other half, both as one confusion matrix of classes.

    A match is fitted to the labels that it is scored on; this is the score without that. Where both halves give the
    concepts the same classes, it is the score of the whole split.

    Args:
        halves: pixel counts of two halves of the photographs.
        unmatched: see `score`. A concept without a pixel in a half is left over in the other under `many_to_one`.
        protocol: see `score`.
        num_matched: see `score`.

    Returns:
        The scores; `class_of_concept` is of the columns of that matrix, one a class and one of concepts left over.

    Raises:
        ValueError: there is no labelled pixel.
    """
    num_classes = len(halves[0])
    merged = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
    for fitted, held_out in (halves, halves[::-1]):
        # Class -1 is the last column.
        np.add.at(merged.T, _match(fitted, unmatched, num_matched), held_out.T)
    return score_matched(merged, np.append(np.arange(num_classes), -1), unmatched=unmatched, protocol=protocol)


def _match(confusion: Int64[np.ndarray, "c k"], unmatched: str, num_matched: int | None) -> Int64[np.ndarray, " k"]:
    match = overlapping_classes if unmatched == "many_to_one" else match_concepts
    class_of_concept = np.full(confusion.shape[1], -1, dtype=np.int64)
    class_of_concept[:num_matched] = match(confusion[:, :num_matched])
    return class_of_concept


def score_merged(
    confusion: Int64[np.ndarray, "c k"],
    class_of_concept: Int64[np.ndarray, " k"],
    *,
    super_of: Int64[np.ndarray, " c"],
    unmatched: str = "discard",
    protocol: str = "transfgu",
) -> Score:
    """Score the same prediction at a coarser granularity: each concept stands for its class's coarser class.

    Args:
        confusion: pixel counts of the classes.
        class_of_concept: class of each concept; -1 for a left-over one.
        super_of: coarser class of each class.
        unmatched: see `score`.
        protocol: see `score`.

    Raises:
        ValueError: there is no labelled pixel.
    """
    merged = np.zeros((super_of.max() + 1, confusion.shape[1]), dtype=np.int64)
    np.add.at(merged, super_of, confusion)
    super_of_concept = np.where(class_of_concept >= 0, super_of[class_of_concept], -1)
    return score_matched(merged, super_of_concept, unmatched=unmatched, protocol=protocol)


def score_matched(
    confusion: Int64[np.ndarray, "c k"], class_of_concept: Int64[np.ndarray, " k"], *, unmatched: str, protocol: str
) -> Score:
    """Score concepts whose classes are known; several may share one.

    Raises:
        ValueError: there is no labelled pixel.
    """
    labelled = confusion.sum()
    if labelled == 0:
        raise ValueError("no labelled pixel to score")
    concepts = np.flatnonzero(class_of_concept >= 0)
    classes = class_of_concept[concepts]
    hits, taken = np.zeros((2, len(confusion)), dtype=np.int64)
    np.add.at(hits, classes, confusion[classes, concepts])
    np.add.at(taken, classes, confusion[:, concepts].sum(0))
    truth = confusion.sum(1) if unmatched == "count" else confusion[:, concepts].sum(1)
    averaged = confusion.any(1) | (taken > 0)
    iou = np.where(averaged, hits / np.maximum(truth + taken - hits, 1), np.nan)
    has_class_of_left_over = protocol == "stego" and unmatched == "count" and taken.sum() < labelled
    return Score(
        miou=float(np.nansum(iou) / (averaged.sum() + has_class_of_left_over)),
        pixel_accuracy=float(hits.sum() / max(truth.sum(), 1)),
        coverage=float(taken.sum() / labelled),
        class_iou=iou,
        class_of_concept=class_of_concept,
    )


def chance_confusion(
    class_pixels: Int64[np.ndarray, " c"], concept_pixels: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, "c k"]:
    """Return the expected confusion of labels with a model's concept sizes that know nothing of the truth.

    Every concept takes of every class the share that it has of all pixels. Labels drawn uniformly over K concepts would
    set the bar too low: a model that puts most pixels into one concept, as one with a background does, scores well
    above them by its sizes alone, once that concept is matched to the largest class. What a match gains by fitting
    accidents is not in it; see `score_held_out`.

    Args:
        class_pixels: pixels of each class.
        concept_pixels: pixels that the model gives each concept.

    Returns:
        Counts in units that keep them whole, one part in `concept_pixels.sum()` of a pixel; no score depends on it.
    """
    # From 2^30 pixels on, the shares are rounded to what keeps all sums, those of resamples too, within int64.
    excess = max(0, 2 * int(concept_pixels.sum()).bit_length() - 61)
    expected: np.ndarray = class_pixels[:, None] * (concept_pixels >> excess)
    return expected


def majority_confusion(class_pixels: Int64[np.ndarray, " c"]) -> Int64[np.ndarray, "c 1"]:
    """Return the confusion of one concept that takes every pixel; a match gives it the commonest class (an oracle)."""
    return class_pixels[:, None]


def dead_concepts(confusion: Int64[np.ndarray, "c k"]) -> list[int]:
    """Return the concepts that win no labelled pixel, ascending."""
    dead: list[int] = np.flatnonzero(~confusion.any(0)).tolist()
    return dead


def foreground_iou(
    confusion: Int64[np.ndarray, "c k"], is_thing: Bool[np.ndarray, " c"], is_background: Bool[np.ndarray, " k"]
) -> float | None:
    """Return the IoU of objects against everything else: foreground concepts merged, classes of things merged.

    Needs no match of concepts to classes. None if no concept is background, so that nothing was separated, or if there
    is neither a thing nor a pixel predicted as one.

    Args:
        confusion: pixel counts.
        is_thing: whether a class is one of objects.
        is_background: whether a concept is background.
    """
    things, taken = confusion[is_thing].sum(), confusion[:, ~is_background].sum()
    hits = confusion[is_thing][:, ~is_background].sum()
    union = things + taken - hits
    return float(hits / union) if is_background.any() and union else None
