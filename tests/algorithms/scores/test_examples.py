import numpy as np
import pytest

from transfgu_ray.algorithms.scores.examples import Best, nearest_crops, plane, stand_ins, strongest_responses

CENTROIDS = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.float32)
ANY = np.ones(3, dtype=bool)


def test_nearest_crops__one_per_photograph_of_those_that_belong_to_the_concept():
    tokens = np.array([[1, 0], [3, 0], [2, 0], [10, 1], [9, 0]], dtype=np.float32)
    best = nearest_crops(
        tokens, np.array([0, 0, 1, 1, 2]), may_be=np.tile(ANY, (5, 1)), centroids=CENTROIDS, part=7, num_kept=2
    )
    # Concept 0: crop 0 of the first photograph, crop 2 of the second; concept 1: crops 3 and 4, equally near.
    assert best.values.tolist() == [[1, 1, np.inf], [2, 1, np.inf]]
    assert best.rows[:, :2].tolist() == [[0, 3], [2, 4]]
    assert (best.parts[:, :2] == 7).all()


def test_nearest_crops__belong_to_a_concept_of_their_kind():
    tokens = np.array([[1, 0]], dtype=np.float32)
    best = nearest_crops(
        tokens, np.array([0]), may_be=np.array([[False, True, True]]), centroids=CENTROIDS, part=0, num_kept=1
    )
    assert best.values.tolist() == [[np.inf, 9, np.inf]]


def test_best__does_not_depend_on_how_the_parts_are_split():
    rng = np.random.default_rng(0)
    # Coarse values, so that there are ties.
    found = [
        Best(rng.integers(0, 4, (2, 5)).astype(np.float32), np.full((2, 5), part), rng.integers(0, 9, (2, 5)))
        for part in range(6)
    ]
    found = [Best.none(2, 5).merge(each) for each in found]

    def merged(parts):
        best = Best.none(2, 5)
        for each in parts:
            best = best.merge(each)
        return best

    whole = merged(found)
    for cut in range(1, 6):
        split = merged(found[:cut]).merge(merged(found[cut:]))
        for name in ("values", "parts", "rows"):
            assert (getattr(split, name) == getattr(whole, name)).all()


def test_strongest_responses__the_highest_means_and_none_of_zero():
    means = np.array([[0.1, 0], [0.3, 0], [0.2, 0.5]], dtype=np.float32)
    best = strongest_responses(means, part=1, num_kept=2)
    assert -best.values == pytest.approx(np.array([[0.3, 0.5], [0.2, -np.inf]]))
    assert best.rows[:, 0].tolist() == [1, 2]
    assert best.rows[0, 1] == 2


def test_stand_ins__winners_and_runners_up_worked_by_hand():
    # Concept 0 wins three patches, before 1, before 2, and alone; concept 2 wins one before 0.
    codes = np.array([[[63, 63], [63, 5]], [[9, 2], [0, 4]], [[3, 8], [0, 63]]], dtype=np.uint8)
    won, followed = stand_ins(codes)
    assert won.tolist() == [3, 0, 1]
    assert followed.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_plane__keeps_the_distances_of_points_that_lie_on_one():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(6, 2))
    points = flat @ rng.normal(size=(2, 5)) + 3
    placed, share = plane(points)
    assert share == pytest.approx(1)
    for i in range(6):
        for j in range(6):
            assert np.linalg.norm(placed[i] - placed[j]) == pytest.approx(np.linalg.norm(points[i] - points[j]))
    assert np.take_along_axis(placed, np.abs(placed).argmax(0)[None], 0).min() > 0


@pytest.mark.parametrize("points", [np.ones((1, 4)), np.ones((3, 4)), np.eye(2, 1)])
def test_plane__of_too_little_is_still_a_plane(points):
    placed, share = plane(points)
    assert placed.shape == (len(points), 2)
    assert np.isfinite(placed).all()
    assert 0 <= share <= 1
