import itertools

import numpy as np
import pytest

from transfgu_ray.algorithms.metrics import confusion_matrix, foreground_iou, match_concepts, score, score_merged

# Concepts 0, 1, 2 are classes 0, 1, 2: IoU 4/6, 3/6, 5/8.
CONFUSION = np.array([[4, 1, 0], [0, 3, 2], [1, 0, 5]])


def test_confusion_matrix__worked_by_hand():
    target = np.array([[0, 0, 1], [1, 2, 255]], dtype=np.uint8)
    pred = np.array([[0, 2, 1], [1, 0, 1]], dtype=np.uint8)
    assert confusion_matrix(target, pred, 3, 3).tolist() == [[1, 0, 1], [0, 2, 0], [1, 0, 0]]


def test_confusion_matrix__ids_beyond_a_byte():
    # 200 classes by 300 concepts overflows the labels' own type.
    target, pred = np.array([199], dtype=np.uint8), np.array([299], dtype=np.uint16)
    confusion = confusion_matrix(target, pred, 200, 300)
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


@pytest.mark.parametrize(("num_classes", "num_concepts"), [(4, 4), (3, 5), (5, 3)])
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


def test_score__class_without_a_concept_counts_as_zero():
    got = score(np.array([[5, 0], [0, 5], [1, 1]]))
    assert got.class_iou.tolist() == [5 / 6, 5 / 6, 0.0]
    assert got.miou == pytest.approx(5 / 9)


def test_score__absent_class_leaves_the_mean():
    got = score(np.array([[4, 0, 0], [0, 0, 0], [0, 2, 2]]))
    assert np.isnan(got.class_iou[1])
    # The third concept is matched to the absent class, so its pixels are errors of class 2.
    assert got.miou == pytest.approx((1.0 + 0.5) / 2)


def test_score__refuses_a_split_without_labels():
    with pytest.raises(ValueError, match="no labelled pixel"):
        score(np.zeros((3, 3), dtype=np.int64))


# Classes 0 and 1 are of the coarser class 0, class 2 of class 1; concept 3 is left over.
MERGING = np.array([[5, 2, 1, 1], [3, 6, 0, 0], [0, 2, 7, 3]])


def test_score_merged__worked_by_hand():
    fine = score(MERGING)
    assert fine.class_of_concept.tolist() == [0, 1, 2, -1]
    got = score_merged(MERGING, fine.class_of_concept, np.array([0, 0, 1]))
    # Of the 17 scored pixels of class 0, 16 are right and 1 is taken for class 1; of the 9 of class 1, 7 and 2.
    assert got.class_iou.tolist() == [16 / 19, 7 / 10]
    assert got.miou == pytest.approx((16 / 19 + 7 / 10) / 2, abs=1e-15)
    assert got.pixel_accuracy == 23 / 26
    assert got.coverage == fine.coverage == 26 / 30
    assert got.class_of_concept.tolist() == [0, 0, 1, -1]


def test_score_merged__classes_that_stay_apart_change_nothing():
    fine = score(MERGING)
    got = score_merged(MERGING, fine.class_of_concept, np.arange(3))
    assert (got.miou, got.pixel_accuracy, got.coverage) == (fine.miou, fine.pixel_accuracy, fine.coverage)


def test_foreground_iou__worked_by_hand():
    is_thing, is_background = np.array([True, True, False]), np.array([False, False, True, True])
    # 18 pixels of things, 16 of them found, and 2 of the background taken for things.
    assert foreground_iou(MERGING, is_thing, is_background) == 16 / 20
    assert foreground_iou(MERGING[:, [1, 0, 3, 2]], is_thing, is_background) == 16 / 20


def test_foreground_iou__is_none_where_it_has_no_meaning():
    is_thing = np.array([True, True, False])
    assert foreground_iou(MERGING, is_thing, np.zeros(4, dtype=bool)) is None
    assert foreground_iou(np.array([[0, 0], [0, 0], [0, 5]]), is_thing, np.array([False, True])) is None
