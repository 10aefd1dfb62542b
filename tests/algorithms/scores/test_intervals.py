import numpy as np
import pytest

from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.algorithms.scores.intervals import (
    class_counts,
    halves,
    mean_interval,
    percentile_interval,
    photo_counts,
    resampled_counts,
    resampled_scores,
    score_intervals,
    stack_counts,
    total_counts,
    worst_decile,
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


@pytest.mark.parametrize("photos", [2, 7, 8])
def test_halves__hold_each_photograph_once_and_never_change(photos):
    # Photograph i has 2^i pixels.
    counts = sparse(2 ** np.arange(photos)[:, None, None])
    one, other = halves(counts)
    assert (one.shape[0], other.shape[0]) == (photos // 2, photos - photos // 2)
    assert total_counts(one)[0] + total_counts(other)[0] == 2**photos - 1
    assert sorted([*one.data, *other.data]) == (2 ** np.arange(photos)).tolist()
    again = sparse(3 ** np.arange(photos)[:, None, None])
    order = np.random.default_rng(0).permutation(photos)
    assert halves(again)[0].toarray().ravel().tolist() == [3**i for i in order[: photos // 2]]


def test_worst_decile__worked_by_hand():
    values = np.arange(21.0)[::-1] / 100
    # A tenth of 21 is three, of 20 two.
    assert worst_decile(values) == (pytest.approx(0.01), 0.02)
    assert worst_decile(values[1:]) == (pytest.approx(0.005), 0.01)
    assert worst_decile(np.array([0.4, 0.3])) == (0.3, 0.3)


def test_mean_interval__equals_a_plain_loop_over_seeds_and_photographs(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    runs = [draw(7, seed) for seed in range(3)]
    got = mean_interval(
        np.stack([resampled_scores(sparse(run), 5, score_of)[:, 0] for run in runs], axis=1),
        seed=5,
    )
    photos, seeds = np.random.default_rng(5), np.random.default_rng([5, 1]).integers(3, size=(40, 3))
    of_photos = [chosen for size in (32, 8) for chosen in photos.integers(7, size=(size, 7))]
    means = [
        np.mean([score_of(sum(runs[seed][photo] for photo in chosen).ravel()).miou for seed in of_seeds])
        for chosen, of_seeds in zip(of_photos, seeds, strict=True)
    ]
    assert got == pytest.approx(np.percentile(means, (2.5, 97.5)))


def test_mean_interval__has_the_spread_of_seeds_and_of_photographs():
    rng = np.random.default_rng(0)
    photographs, seeds = rng.normal(0, 0.03, (20_000, 1)), rng.normal(0, 0.04, (1, 200))
    low, high = mean_interval(photographs + seeds, seed=0)
    # Seeds share the photographs, so that more seeds do not average their spread away.
    assert (high - low) / 2 == pytest.approx(1.96 * np.hypot(0.03, 0.04 / 200**0.5), rel=0.05)
    # One seed leaves the photographs alone, and equal photographs the seeds.
    assert mean_interval(photographs, seed=0) == percentile_interval(photographs[:, 0])
    low, high = mean_interval(np.broadcast_to([0.4, 0.6], (20_000, 2)), seed=0)
    assert (low, high) == (0.4, 0.6)
