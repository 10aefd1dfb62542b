"""Bootstrap intervals over photographs, from confusion counts that are kept sparse a photograph.

Reference: Efron and Tibshirani (1993), percentile interval. Departures: concepts keep the classes that the whole split
gave them. A resample repeats some photographs and misses others: with a match of its own, and without the rare classes
that it misses, it would score higher than the split.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer
from scipy.sparse import csr_array, vstack

from transfgu_ray.algorithms.scores.metrics import Score

RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
# Bounds memory: so many dense confusion matrices are held at a time.
_RESAMPLES_AT_ONCE = 32


def photo_counts(
    photo: Integer[np.ndarray, " n"],
    class_id: Integer[np.ndarray, " n"],
    *,
    concept_id: Integer[np.ndarray, " n"],
    pixels: Int64[np.ndarray, " n"],
    shape: tuple[int, int, int],
) -> csr_array:
    """Confusion matrices of photographs, a flat sparse row each, int64.

    Args:
        photo: number of the photograph of each entry.
        class_id: its true class.
        concept_id: its predicted concept.
        pixels: its count.
        shape: photographs, classes and concepts in all.
    """
    photos, classes, concepts = shape
    cells = class_id.astype(np.int64) * concepts + concept_id
    return csr_array((pixels, (photo, cells)), shape=(photos, classes * concepts))


def stack_counts(parts: Sequence[csr_array]) -> csr_array:
    """The rows of all parts, in order."""
    return vstack(parts, format="csr")


def total_counts(counts: csr_array) -> Int64[np.ndarray, " cells"]:
    """Sum over the photographs, exact."""
    total: np.ndarray = counts.sum(axis=0)
    return total


def merge_concepts(counts: csr_array, class_of: Integer[np.ndarray, " k"], num_merged: int) -> csr_array:
    """The same photographs with some concepts made one.

    Args:
        counts: see `photo_counts`.
        class_of: what each concept becomes.
        num_merged: concepts in all afterwards.
    """
    entries, concepts = counts.tocoo(), len(class_of)
    cells = entries.col.astype(np.int64) // concepts * num_merged + class_of[entries.col % concepts]
    shape = counts.shape[0], counts.shape[1] // concepts * num_merged
    return csr_array((entries.data, (entries.row, cells)), shape=shape)


def class_counts(counts: csr_array, num_classes: int) -> csr_array:
    """Labelled pixels of each class, a row a photograph."""
    entries = counts.tocoo()
    concepts = counts.shape[1] // num_classes
    return csr_array((entries.data, (entries.row, entries.col // concepts)), shape=(counts.shape[0], num_classes))


def resampled_counts(counts: csr_array, seed: int) -> Iterator[Int64[np.ndarray, " cells"]]:
    """Sum over each of RESAMPLES draws, with replacement, of as many photographs as there are; exact.

    The draws depend on the seed and the number of photographs alone, so that methods are compared on the same ones.
    """
    photos, rng = counts.shape[0], np.random.default_rng(seed)
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(photos, size=(min(_RESAMPLES_AT_ONCE, RESAMPLES - start), photos))
        times = np.stack([np.bincount(draw, minlength=photos) for draw in drawn])
        yield from times @ counts


def resampled_scores(
    counts: csr_array, seed: int, score_of: Callable[[np.ndarray], Score]
) -> Float64[np.ndarray, "resamples 2"]:
    """Scores of each resample, mIoU and pixel accuracy; see `resampled_counts`.

    Args:
        counts: of each photograph that has a labelled pixel; the others could not change a score.
        seed: of the draws.
        score_of: scores of the counts of a resample.
    """
    found = [score_of(total) for total in resampled_counts(counts, seed)]
    return np.array([[each.miou, each.pixel_accuracy] for each in found])


def percentile_interval(values: Float64[np.ndarray, " resamples"]) -> list[float]:
    """95 % interval [low, high] of a score, or of the difference of two on the same resamples."""
    interval: list[float] = np.percentile(values, _PERCENTILES).tolist()
    return interval


def score_intervals(
    counts: csr_array, seed: int, score_of: Callable[[np.ndarray], Score]
) -> tuple[list[float], list[float]]:
    """95 % intervals [low, high] of mIoU and pixel accuracy over photographs; see `resampled_scores`."""
    miou, pixel_accuracy = map(percentile_interval, resampled_scores(counts, seed, score_of).T)
    return miou, pixel_accuracy
