import numpy as np
import pytest

from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.algorithms.scores.intervals import (
    class_counts,
    photo_counts,
    resampled_counts,
    score_intervals,
    stack_counts,
    total_counts,
)
from transfgu_ray.algorithms.scores.metrics import score

CLASSES, CONCEPTS = 3, 4


def sparse(confusions):
    """Counts of dense confusion matrices, (photographs, classes, concepts)."""
    photo, class_id, concept_id = confusions.nonzero()
    return photo_counts(
        photo, class_id, concept_id=concept_id, pixels=confusions[photo, class_id, concept_id], shape=confusions.shape
    )


def draw(photos, seed=0):
    """Photographs with mostly correct pixels, each with a few classes."""
    rng = np.random.default_rng(seed)
    right = np.eye(CLASSES, CONCEPTS, dtype=np.int64) * rng.integers(0, 200, (photos, CLASSES, 1))
    return right + rng.integers(0, 60, (photos, CLASSES, CONCEPTS)) * rng.integers(0, 2, (photos, CLASSES, CONCEPTS))


def score_of(cells):
    return score(cells.reshape(CLASSES, CONCEPTS), "count")


def test_photo_counts__sums_are_exact_integers():
    confusions = draw(9)
    # Odd, and too large for float64 to distinguish it from its neighbours.
    confusions[0, 0, 0] = 2**53 + 1
    counts = stack_counts([sparse(confusions[:4]), sparse(confusions[4:])])
    assert counts.shape == (9, 12)
    assert total_counts(counts).dtype == np.int64
    assert np.array_equal(total_counts(counts).reshape(CLASSES, CONCEPTS), confusions.sum(0))
    assert np.array_equal(class_counts(counts, CLASSES).toarray(), confusions.sum(2))


def test_resampled_counts__equals_a_plain_loop_over_photographs(monkeypatch):
    # One more than fits into a batch.
    monkeypatch.setattr(intervals, "RESAMPLES", 33)
    confusions = draw(7)
    confusions[2, 1, 1] = 2**53 + 1
    got = list(resampled_counts(sparse(confusions), seed=5))
    rng = np.random.default_rng(5)
    want = []
    for size in (32, 1):
        for chosen in rng.integers(7, size=(size, 7)):
            total = np.zeros(12, dtype=np.int64)
            for photo in chosen:
                total += confusions[photo].reshape(-1)
            want.append(total)
    assert np.array_equal(got, want)


def test_score_intervals__equals_a_plain_loop_over_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    counts = sparse(np.random.default_rng(0).integers(0, 60, (7, CLASSES, CONCEPTS)))
    miou, accuracy = score_intervals(counts, 5, score_of)
    found = [score_of(total) for total in resampled_counts(counts, 5)]
    for interval, name in ((miou, "miou"), (accuracy, "pixel_accuracy")):
        assert interval == [np.percentile([getattr(each, name) for each in found], level) for level in (2.5, 97.5)]
    assert (miou, accuracy) == score_intervals(counts, 5, score_of)
    assert (miou, accuracy) != score_intervals(counts, 6, score_of)


def test_score_intervals__hold_the_score_and_shrink_with_more_photographs(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    widths, photographs = [], draw(20)
    for times in (1, 4, 16):
        counts = sparse(np.tile(photographs, (times, 1, 1)))
        miou, accuracy = score_intervals(counts, 0, score_of)
        found = score_of(total_counts(counts))
        assert miou[0] < found.miou < miou[1]
        assert accuracy[0] < found.pixel_accuracy < accuracy[1]
        widths.append(accuracy[1] - accuracy[0])
    # Four times the photographs, half the width.
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.15)
    assert widths[2] / widths[1] == pytest.approx(0.5, abs=0.15)


def test_score_intervals__one_photograph_leaves_nothing_to_draw(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 3)
    counts = sparse(draw(1))
    found = score_of(total_counts(counts))
    assert score_intervals(counts, 0, score_of) == ([found.miou] * 2, [found.pixel_accuracy] * 2)
