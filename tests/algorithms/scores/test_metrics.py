import itertools
from pathlib import Path

import numpy as np
import pytest

from transfgu_ray.algorithms.scores.metrics import (
    chance_confusion,
    confusion_matrix,
    dead_concepts,
    foreground_iou,
    majority_confusion,
    match_concepts,
    overlapping_classes,
    score,
    score_held_out,
    score_matched,
    score_merged,
)

# What the published code computes on drawn labels and predictions (commit ea49bcd); label -1 is void.
GOLDEN = Path(__file__).parents[2] / "assets/golden/metrics.npz"
# Concepts 0, 1, 2 are classes 0, 1, 2: IoU 4/6, 3/6, 5/8.
CONFUSION = np.array([[4, 1, 0], [0, 3, 2], [1, 0, 5]])


def test_confusion_matrix__worked_by_hand():
    target = np.array([[0, 0, 1], [1, 2, 255]], dtype=np.uint8)
    pred = np.array([[0, 2, 1], [1, 0, 1]], dtype=np.uint8)
    assert confusion_matrix(target, pred, num_classes=3, num_concepts=3).tolist() == [[1, 0, 1], [0, 2, 0], [1, 0, 0]]


def test_confusion_matrix__void_never_scores():
    rng = np.random.default_rng(0)
    target, pred = rng.integers(0, 3, (6, 7)).astype(np.uint8), rng.integers(0, 4, (6, 7))
    target[2:4] = 255
    want = confusion_matrix(target, pred, num_classes=3, num_concepts=4)
    assert want.sum() == 28
    pred[2:4] = 3 - pred[2:4]
    assert np.array_equal(confusion_matrix(target, pred, num_classes=3, num_concepts=4), want)


def test_confusion_matrix__ids_beyond_a_byte():
    # 200 classes by 300 concepts overflow the type of the labels.
    target, pred = np.array([199], dtype=np.uint8), np.array([299], dtype=np.uint16)
    confusion = confusion_matrix(target, pred, num_classes=200, num_concepts=300)
    assert confusion.shape == (200, 300)
    assert confusion[199, 299] == confusion.sum() == 1


def test_score__three_classes_to_the_last_digit():
    got = score(CONFUSION)
    assert got.class_iou.tolist() == [4 / 6, 3 / 6, 5 / 8]
    assert got.miou == pytest.approx(43 / 72, abs=1e-15)
    assert got.pixel_accuracy == 12 / 16
    assert got.coverage == 1.0


def test_score__permuting_cluster_ids_changes_nothing():
    want = score(CONFUSION)
    for order in itertools.permutations(range(3)):
        got = score(CONFUSION[:, order])
        assert got.class_of_concept.tolist() == list(order)
        assert (got.miou, got.pixel_accuracy) == (want.miou, want.pixel_accuracy)


@pytest.mark.parametrize(("num_classes", "num_concepts"), [(4, 4), (3, 6), (6, 3), (6, 6), (1, 6)])
def test_match_concepts__no_other_matching_has_more_pixels(num_classes, num_concepts):
    rng = np.random.default_rng(num_classes)
    for _ in range(20):
        confusion = rng.integers(0, 50, (num_classes, num_concepts))
        matched = match_concepts(confusion)
        pairs = [(c, k) for k, c in enumerate(matched) if c >= 0]
        assert len(pairs) == len({c for c, _ in pairs}) == min(num_classes, num_concepts)
        tall = confusion if num_classes >= num_concepts else confusion.T
        best = max(
            sum(tall[row, column] for column, row in enumerate(rows))
            for rows in itertools.permutations(range(tall.shape[0]), tall.shape[1])
        )
        assert sum(confusion[c, k] for c, k in pairs) == best


def test_score__left_over_concepts_leave_the_score():
    # Concept 2 has no class: its 2 + 4 pixels are neither hits nor misses.
    got = score(np.array([[8, 0, 2], [2, 6, 4]]))
    assert got.class_of_concept.tolist() == [0, 1, -1]
    assert got.class_iou.tolist() == [8 / 10, 6 / 8]
    assert got.pixel_accuracy == 14 / 16
    assert got.coverage == 16 / 22


# The same prediction as above under the other policies: concept 2 has no class.
LEFT_OVER = np.array([[8, 0, 2], [2, 6, 4]])


def test_score__left_over_concepts_count_as_misses_of_the_true_class():
    got = score(LEFT_OVER, "count")
    assert got.class_of_concept.tolist() == [0, 1, -1]
    assert got.class_iou.tolist() == [8 / 12, 6 / 12]
    assert got.pixel_accuracy == 14 / 22
    assert got.coverage == 16 / 22


def test_score__many_to_one_gives_each_concept_the_class_it_overlaps_most():
    got = score(LEFT_OVER, "many_to_one")
    assert got.class_of_concept.tolist() == [0, 1, 1]
    assert got.class_iou.tolist() == [8 / 12, 10 / 14]
    assert got.pixel_accuracy == 18 / 22
    assert got.coverage == 1.0
    assert overlapping_classes(np.array([[0, 1, 2], [0, 3, 2]])).tolist() == [-1, 1, 0]


@pytest.mark.parametrize("num_concepts", [3, 5, 6])
def test_score__discard_and_count_differ_by_exactly_the_unmatched_pixels(num_concepts):
    rng = np.random.default_rng(num_concepts)
    for _ in range(20):
        confusion = rng.integers(1, 50, (3, num_concepts))
        discard, count = score(confusion, "discard"), score(confusion, "count")
        assert np.array_equal(discard.class_of_concept, count.class_of_concept)
        missed = confusion[:, discard.class_of_concept < 0].sum(1)
        assert discard.coverage == count.coverage == (confusion.sum() - missed.sum()) / confusion.sum()
        hits = np.array([confusion[c, k] for k, c in enumerate(count.class_of_concept) if c >= 0])
        assert count.pixel_accuracy == hits.sum() / confusion.sum()
        assert discard.pixel_accuracy == hits.sum() / (confusion.sum() - missed.sum())
        hits = np.array([confusion[c, list(count.class_of_concept).index(c)] for c in range(3)])
        np.testing.assert_allclose(hits / count.class_iou - hits / discard.class_iou, missed, atol=1e-9)


def test_score__many_to_one_is_never_less_accurate_than_one_to_one():
    rng = np.random.default_rng(0)
    for _ in range(20):
        confusion = rng.integers(0, 50, (4, 6))
        assert score(confusion, "many_to_one").pixel_accuracy >= score(confusion, "count").pixel_accuracy


# Class 1 is absent, and concept 1 can only be matched to it.
ABSENT = np.array([[4, 1, 0], [0, 0, 0], [0, 2, 3]])


PROTOCOLS = ("transfgu", "picie", "stego")


def test_score__a_class_is_left_out_only_where_it_is_neither_present_nor_predicted():
    for protocol in PROTOCOLS:
        got = score(ABSENT, protocol=protocol)
        assert got.class_iou.tolist() == [4 / 5, 0.0, 3 / 5]
        assert got.miou == pytest.approx((4 / 5 + 0 + 3 / 5) / 3)
        neither = score(np.diag([4, 0, 3]), protocol=protocol)
        assert np.isnan(neither.class_iou[1])
        assert neither.miou == 1.0


@pytest.mark.parametrize("case", ["all_present", "class_2_absent_but_predicted"])
def test_score__equals_the_published_code(case):
    golden = np.load(GOLDEN)
    target, pred = golden[f"{case}:label"].astype(int), golden[f"{case}:pred"].astype(int)
    confusion = confusion_matrix(np.where(target < 0, 255, target), pred, num_classes=9, num_concepts=9)
    assert np.array_equal(confusion, golden[f"{case}:histogram"])
    got = score(confusion, protocol="transfgu")
    assert got.class_of_concept.tolist() == golden[f"{case}:class_of_concept"].tolist()
    # Its IoU are in the order of its clusters.
    np.testing.assert_allclose(100 * got.class_iou[got.class_of_concept], golden[f"{case}:iou"], rtol=0, atol=1e-9)
    miou_accuracy = 100 * np.array([got.miou, got.pixel_accuracy])
    np.testing.assert_allclose(miou_accuracy, golden[f"{case}:miou_acc_percent"], rtol=0, atol=1e-9)


def test_score__stego_makes_one_more_class_of_the_left_over_clusters():
    confusion = np.array([[8, 0, 2, 0], [2, 6, 4, 1]])
    want = (8 / 12 + 6 / 13) / 2
    assert score(confusion, "count", protocol="picie").miou == pytest.approx(want)
    got = score(confusion, "count", protocol="stego")
    assert got.miou == pytest.approx(want * 2 / 3)
    assert got.pixel_accuracy == 14 / 23
    # Without a pixel in left-over clusters, or if their pixels are not errors, that class does not exist.
    empty = np.array([[8, 0, 0], [2, 6, 0]])
    assert score(empty, "count", protocol="stego").miou == score(empty).miou
    for unmatched in ("discard", "many_to_one"):
        assert score(confusion, unmatched, protocol="stego").miou == score(confusion, unmatched).miou


def published_histogram_scores(confusion):
    """mIoU and accuracy as STEGO's and, for as many clusters as classes, PiCIE's code computes them: histograms."""
    classes, clusters = confusion.shape
    best = max(
        itertools.permutations(range(clusters), classes), key=lambda order: confusion[range(classes), order].sum()
    )
    histogram = np.zeros((classes + 1, classes + 1))
    histogram[:classes, :classes] = confusion[:, best]
    histogram[:classes, classes] = np.delete(confusion, best, axis=1).sum(1)
    hits = np.diag(histogram)
    union = histogram.sum(0) + histogram.sum(1) - hits
    return (hits[union > 0] / union[union > 0]).mean(), hits.sum() / histogram.sum()


@pytest.mark.parametrize("num_clusters", [3, 5])
def test_score__equals_the_published_codes_histograms(num_clusters):
    rng = np.random.default_rng(num_clusters)
    for absent in range(3):
        confusion = rng.integers(1, 50, (3, num_clusters))
        confusion[:absent] = 0
        miou, accuracy = published_histogram_scores(confusion)
        # Only STEGO over-clusters.
        for protocol in PROTOCOLS if num_clusters == 3 else ("stego",):
            got = score(confusion, "count", protocol=protocol)
            if absent < 2:
                assert got.miou == pytest.approx(miou)
            assert got.pixel_accuracy == pytest.approx(accuracy)


def test_score__majority_worked_by_hand():
    for unmatched in ("discard", "count", "many_to_one"):
        got = score(majority_confusion(np.array([6, 3, 0])), unmatched)
        assert (got.pixel_accuracy, got.coverage) == (6 / 9, 1.0)
        assert got.miou == pytest.approx((6 / 9 + 0) / 2)


def test_score__chance_worked_by_hand():
    # Of every class half goes to concept 1 and a quarter to each of the others.
    chance = chance_confusion(np.array([6, 3]), np.array([2, 4, 2]))
    assert (chance / 8).tolist() == [[1.5, 3, 1.5], [0.75, 1.5, 0.75]]
    got = score(chance, "count")
    # The largest class gets the largest concept.
    assert got.class_of_concept.tolist() in ([1, 0, -1], [-1, 0, 1])
    assert got.class_iou.tolist() == [3 / (6 + 4.5 - 3), 0.75 / (3 + 2.25 - 0.75)]
    assert (got.pixel_accuracy, got.coverage) == (3.75 / 9, 6.75 / 9)
    assert score(chance, "discard").pixel_accuracy == 3.75 / 6.75
    # Concepts of one size are what labels drawn uniformly are expected to give; sizes alone score more.
    uniform = score(chance_confusion(np.array([6, 3]), np.array([1, 1, 1])), "count")
    assert uniform.pixel_accuracy == pytest.approx(1 / 3)
    assert uniform.miou < got.miou


def test_score__chance_is_what_labels_of_the_same_sizes_come_to():
    rng, classes = np.random.default_rng(0), np.array([50_000, 30_000, 20_000])
    sizes = np.array([60_000, 5_000, 25_000, 10_000])
    drawn = rng.permutation(np.repeat(np.arange(4), sizes))
    random = confusion_matrix(np.repeat(np.arange(3), classes), drawn, num_classes=3, num_concepts=4)
    for unmatched in ("discard", "count", "many_to_one"):
        want, got = score(random, unmatched), score(chance_confusion(classes, sizes), unmatched)
        assert got.miou == pytest.approx(want.miou, abs=0.005)
        assert got.pixel_accuracy == pytest.approx(want.pixel_accuracy, abs=0.005)
        assert got.coverage == pytest.approx(want.coverage, abs=0.005)


def test_chance_confusion__more_pixels_than_exact_products_could_count():
    classes, sizes = np.array([6, 3]), np.array([2, 4, 3])
    want = score(chance_confusion(classes, sizes), "count")
    for times in (10**7, 10**9, 10**11):
        chance = chance_confusion(classes * times, sizes * times)
        assert 0 < sum(map(int, chance.flat)) < 2**62
        assert score(chance, "count").miou == pytest.approx(want.miou)


# The halves of `CONFUSION`, as those of two photographs.
HALVES = np.array([[2, 0, 0], [0, 1, 2], [0, 0, 4]]), np.array([[2, 1, 0], [0, 2, 0], [1, 0, 1]])


def test_score_held_out__is_the_score_where_both_halves_agree():
    assert np.array_equal(HALVES[0] + HALVES[1], CONFUSION)
    got, want = score_held_out(HALVES), score(CONFUSION)
    assert (got.miou, got.pixel_accuracy, got.coverage) == (want.miou, want.pixel_accuracy, want.coverage)
    assert got.class_iou.tolist() == want.class_iou.tolist()


def test_score_held_out__worked_by_hand():
    # By the first half concepts 0, 1, 2 are of classes 0, 1 and none, by the second of 1, 0 and none.
    one, other = np.array([[8, 0, 1], [0, 6, 2]]), np.array([[1, 7, 0], [5, 2, 3]])
    # The first half is scored as 1, 0, none: 6 pixels of class 1 are taken for 0, 8 of class 0 for 1. The second one as
    # 0, 1, none: 1 of class 0 and 2 of class 1 are right, 7 and 5 wrong.
    got = score_held_out((one, other), "count")
    assert got.class_iou.tolist() == [1 / (17 + 12 - 1), 2 / (18 + 17 - 2)]
    assert (got.pixel_accuracy, got.coverage) == (3 / 35, 29 / 35)
    assert score_held_out((one, other), "discard").pixel_accuracy == 3 / 29
    assert score_held_out((other, one), "count").miou == got.miou
    # The last of two concepts may not have a class.
    hidden = score_held_out((one[:, :2], one[:, :2]), "count", num_matched=1)
    assert (hidden.pixel_accuracy, hidden.coverage) == (8 / 14, 8 / 14)


@pytest.mark.parametrize("unmatched", ["discard", "count", "many_to_one"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_score_held_out__equals_relabelled_pixels(unmatched, protocol):
    rng = np.random.default_rng(0)
    for _ in range(10):
        halves = rng.integers(0, 9, (2, 3, 5)) * rng.integers(0, 2, (2, 1, 5))
        targets, relabelled = [], []
        for half, other in ((0, 1), (1, 0)):
            class_of = score(halves[other], unmatched).class_of_concept
            for class_id, concept in np.ndindex(3, 5):
                targets += [class_id] * halves[half, class_id, concept]
                relabelled += [class_of[concept] % 4] * halves[half, class_id, concept]
        pixels = confusion_matrix(np.array(targets), np.array(relabelled), num_classes=3, num_concepts=4)
        want = score_matched(pixels, np.array([0, 1, 2, -1]), unmatched=unmatched, protocol=protocol)
        got = score_held_out(tuple(halves), unmatched, protocol=protocol)
        assert (got.miou, got.pixel_accuracy, got.coverage) == (want.miou, want.pixel_accuracy, want.coverage)


def test_score_held_out__is_never_more_accurate_and_shows_a_match_to_accidents():
    # Concepts that know nothing of the classes: each match finds pixels that the other half does not have.
    rng, found = np.random.default_rng(0), []
    for _ in range(50):
        halves = tuple(rng.poisson(3, (2, 8, 8)))
        found.append([score_held_out(halves, "count").pixel_accuracy, score(sum(halves), "count").pixel_accuracy])
        assert found[-1][0] <= found[-1][1]
    held_out, whole = np.mean(found, axis=0)
    assert held_out == pytest.approx(1 / 8, abs=0.01)
    assert whole > 0.18


def test_dead_concepts__are_those_without_a_pixel():
    assert dead_concepts(np.array([[0, 1, 0, 0], [0, 0, 0, 2]])) == [0, 2]
    assert dead_concepts(CONFUSION) == []


def test_score__class_without_a_concept_counts_as_zero():
    got = score(np.array([[5, 0], [0, 5], [1, 1]]))
    assert got.class_iou.tolist() == [5 / 6, 5 / 6, 0.0]
    assert got.miou == pytest.approx(5 / 9)


def test_score__refuses_a_split_without_labels():
    with pytest.raises(ValueError, match="no labelled pixel"):
        score(np.zeros((3, 3), dtype=np.int64))


# Classes 0 and 1 belong to the coarser class 0, class 2 to class 1; concept 3 is left over.
MERGING = np.array([[5, 2, 1, 1], [3, 6, 0, 0], [0, 2, 7, 3]])


def test_score_merged__worked_by_hand():
    fine = score(MERGING)
    assert fine.class_of_concept.tolist() == [0, 1, 2, -1]
    got = score_merged(MERGING, fine.class_of_concept, super_of=np.array([0, 0, 1]))
    # Of the 17 scored pixels of class 0, 16 are correct and 1 is predicted as class 1; of the 9 of class 1, 7 and 2.
    assert got.class_iou.tolist() == [16 / 19, 7 / 10]
    assert got.miou == pytest.approx((16 / 19 + 7 / 10) / 2, abs=1e-15)
    assert got.pixel_accuracy == 23 / 26
    assert got.coverage == fine.coverage == 26 / 30
    assert got.class_of_concept.tolist() == [0, 0, 1, -1]


def test_score_merged__left_over_concepts_as_for_the_classes():
    fine = score(MERGING, "count")
    got = score_merged(MERGING, fine.class_of_concept, super_of=np.array([0, 0, 1]), unmatched="count")
    assert got.class_iou.tolist() == [16 / 20, 7 / 13]
    assert got.pixel_accuracy == 23 / 30


def test_score_merged__classes_that_stay_apart_change_nothing():
    fine = score(MERGING)
    got = score_merged(MERGING, fine.class_of_concept, super_of=np.arange(3))
    assert (got.miou, got.pixel_accuracy, got.coverage) == (fine.miou, fine.pixel_accuracy, fine.coverage)


def test_foreground_iou__worked_by_hand():
    is_thing, is_background = np.array([True, True, False]), np.array([False, False, True, True])
    # 18 pixels of things, 16 of them found, and 2 of the background predicted as things.
    assert foreground_iou(MERGING, is_thing, is_background) == 16 / 20
    assert foreground_iou(MERGING[:, [1, 0, 3, 2]], is_thing, is_background) == 16 / 20


def test_foreground_iou__is_none_where_it_has_no_meaning():
    is_thing = np.array([True, True, False])
    assert foreground_iou(MERGING, is_thing, np.zeros(4, dtype=bool)) is None
    assert foreground_iou(np.array([[0, 0], [0, 0], [0, 5]]), is_thing, np.array([False, True])) is None
