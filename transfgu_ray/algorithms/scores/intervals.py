"""Spread of a score over photographs and seeds, from sparse confusion counts per photograph.

Reference: Efron and Tibshirani (1993), percentile interval of a bootstrap. Departures: concepts keep the classes that
the whole split gave them. A resample repeats some photographs and misses others: with a match of its own it would score
higher than the split. A class that it misses has an IoU of 0 where it is predicted, as in any score.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer
from scipy.sparse import csr_array, vstack

from transfgu_ray.algorithms.scores.metrics import Score

RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
# Bounds memory: the number of dense confusion matrices held at a time.
_RESAMPLES_AT_ONCE = 32


def photo_counts(
    photo: Integer[np.ndarray, " n"],
    class_id: Integer[np.ndarray, " n"],
    *,
    concept_id: Integer[np.ndarray, " n"],
    pixels: Int64[np.ndarray, " n"],
    shape: tuple[int, int, int],
) -> csr_array:
    """Return the confusion matrix of each photograph as a flat sparse row, int64.

    Args:
        photo: number of the photograph of each entry.
        class_id: its true class.
        concept_id: its predicted concept.
        pixels: its count.
        shape: numbers of photographs, classes and concepts.
    """
    photos, classes, concepts = shape
    cells = class_id.astype(np.int64) * concepts + concept_id
    return csr_array((pixels, (photo, cells)), shape=(photos, classes * concepts))


def stack_counts(parts: Sequence[csr_array]) -> csr_array:
    """Stack the rows of all parts, in order."""
    return vstack(parts, format="csr")


def total_counts(counts: csr_array) -> Int64[np.ndarray, " cells"]:
    """Return the exact sum over the photographs."""
    total: np.ndarray = counts.sum(axis=0)
    return total


def merge_concepts(counts: csr_array, class_of: Integer[np.ndarray, " k"], num_merged: int) -> csr_array:
    """Merge concepts in the counts of each photograph.

    Args:
        counts: see `photo_counts`.
        class_of: the merged concept of each concept.
        num_merged: number of merged concepts.
    """
    entries, concepts = counts.tocoo(), len(class_of)
    cells = entries.col.astype(np.int64) // concepts * num_merged + class_of[entries.col % concepts]
    shape = counts.shape[0], counts.shape[1] // concepts * num_merged
    return csr_array((entries.data, (entries.row, cells)), shape=shape)


def class_counts(counts: csr_array, num_classes: int) -> csr_array:
    """Return the labelled pixels of each class, one row per photograph."""
    entries = counts.tocoo()
    concepts = counts.shape[1] // num_classes
    return csr_array((entries.data, (entries.row, entries.col // concepts)), shape=(counts.shape[0], num_classes))


def halves(counts: csr_array) -> tuple[csr_array, csr_array]:
    """Return the counts of two halves of the photographs.

    They are the same for every model and seed: photograph i of n is in the first half if i is among the first n // 2
    entries of `numpy.random.default_rng(0).permutation(n)`.
    """
    order, middle = np.random.default_rng(0).permutation(counts.shape[0]), counts.shape[0] // 2
    return counts[order[:middle]], counts[order[middle:]]


def worst_decile(values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the mean and the highest of the lowest tenth of values, rounded up to whole values."""
    lowest = np.sort(values)[: -(-len(values) // 10)]
    return float(lowest.mean()), float(lowest[-1])


def resampled_counts(counts: csr_array, seed: int) -> Iterator[Int64[np.ndarray, " cells"]]:
    """Yield the exact sum over each of RESAMPLES resamples: as many photographs as there are, with replacement.

    The draws depend only on the seed and the number of photographs, so that methods are compared on the same resamples.
    """
    photos, rng = counts.shape[0], np.random.default_rng(seed)
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(photos, size=(min(_RESAMPLES_AT_ONCE, RESAMPLES - start), photos))
        times = np.stack([np.bincount(draw, minlength=photos) for draw in drawn])
        yield from times @ counts


def resampled_scores(
    counts: csr_array, seed: int, score_of: Callable[[np.ndarray], Score]
) -> Float64[np.ndarray, "resamples 2"]:
    """Return mIoU and pixel accuracy of each resample; see `resampled_counts`.

    Args:
        counts: of each photograph with a labelled pixel; the others could not change a score.
        seed: of the draws.
        score_of: scores the counts of a resample.
    """
    found = [score_of(total) for total in resampled_counts(counts, seed)]
    return np.array([[each.miou, each.pixel_accuracy] for each in found])


def percentile_interval(values: Float64[np.ndarray, " resamples"]) -> list[float]:
    """Return the 95 % interval [low, high] of a score, or of the difference of two scores on the same resamples."""
    interval: list[float] = np.percentile(values, _PERCENTILES).tolist()
    return interval


def score_intervals(
    counts: csr_array, seed: int, score_of: Callable[[np.ndarray], Score]
) -> tuple[list[float], list[float]]:
    """Return 95 % intervals [low, high] of mIoU and pixel accuracy over photographs; see `resampled_scores`."""
    miou, pixel_accuracy = map(percentile_interval, resampled_scores(counts, seed, score_of).T)
    return miou, pixel_accuracy


def mean_interval(values: Float64[np.ndarray, "resamples seeds"], seed: int) -> list[float]:
    """Return the 95 % interval [low, high] of a score's mean over seeds, for other seeds and other photographs.

    A two-level bootstrap: each resample draws seeds with replacement, and has drawn photographs, the same for all seeds
    since they share the split. Of n seeds the drawn means spread by sqrt((n - 1) / n) of what they should, so that with
    few seeds the interval is too narrow; one seed leaves the photographs alone.

    Args:
        values: score of each seed on each resample of the photographs; see `resampled_scores`.
        seed: of the draws of seeds, which have a stream apart from those of photographs.
    """
    drawn = np.random.default_rng([seed, 1]).integers(values.shape[1], size=values.shape)
    return percentile_interval(np.take_along_axis(values, drawn, axis=1).mean(1))
