import numpy as np
import pytest

from transfgu_ray.algorithms.concepts import sharded_kmeans as lloyd
from transfgu_ray.algorithms.concepts.kmeans import (
    MAX_RESEEDS,
    KMeans,
    draw_rows,
    fit_concepts,
    nearest,
    train,
    unwatched,
)
from transfgu_ray.errors import DataError


class InMemory(lloyd.ShardedPoints):
    """Shards of an array, cut at multiples of the block as in the pipeline."""

    def __init__(self, points: np.ndarray, num_shards: int = 1) -> None:
        self._points = points.astype(np.float16)
        num_blocks = -(-len(points) // lloyd.BLOCK_ROWS)
        self._cuts = [num_blocks * i // num_shards * lloyd.BLOCK_ROWS for i in range(num_shards + 1)]
        self.num_points = len(points)
        self.largest_value = lloyd.largest_value(self._points[i : i + 100] for i in range(0, len(points), 100))
        self.used_gpu = False

    def _blocks(self, shard: int):
        for first in range(self._cuts[shard], self._cuts[shard + 1], lloyd.BLOCK_ROWS):
            yield self._points[first : min(first + lloyd.BLOCK_ROWS, self._cuts[shard + 1])]

    def train_on(self, rows, num_concepts, *, how, start):
        return train(self._points[rows].astype(np.float32), num_concepts, how=how, start=start)

    def sum_nearest(self, centroids):
        return [lloyd.sum_nearest(self._blocks(i), centroids, "cpu") for i in range(len(self._cuts) - 1)]

    def farthest(self, centroids, concept, most):
        return [
            lloyd.farthest(
                self._blocks(i), self._cuts[i], centroids=centroids, concept=concept, most=most, device="cpu"
            )
            for i in range(len(self._cuts) - 1)
        ]

    def central(self, centroids, most):
        return [
            lloyd.central(self._blocks(i), self._cuts[i], centroids=centroids, most=most, device="cpu")
            for i in range(len(self._cuts) - 1)
        ]


@pytest.fixture
def blocks_of_64(monkeypatch):
    monkeypatch.setattr(lloyd, "BLOCK_ROWS", 64)


def _fit(points, num_concepts, num_shards=1, **changes):
    init_points = changes.pop("init_points", 100)
    watched = {name: changes.pop(name) for name in ("on_pass", "keep", "begun") if name in changes}
    how = KMeans(**{"seed": 0, "num_iterations": 20, "num_redos": 2, "min_crops": 1} | changes)
    return lloyd.fit_sharded_concepts(
        InMemory(points, num_shards),
        num_concepts,
        how=how,
        init_points=init_points,
        group="foreground",
        **watched,
    )


def _cloud(num_points=1000, dim=6, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=(num_points, dim))).astype(np.float16)


def _plain_lloyd(points, centroids, num_iterations):
    """Textbook iterations in float64, the given number or until the centroids rest."""
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    objectives = []
    for _ in range(num_iterations):
        squared = ((points[:, None] - centroids[None]) ** 2).sum(-1)
        objectives.append(squared.min(1).sum())
        assigned = squared.argmin(1)
        moved = np.stack([points[assigned == k].mean(0) for k in range(len(centroids))])
        if (moved == centroids).all():
            break
        centroids = moved
    return centroids, objectives


def test_sum_nearest__worked_by_hand():
    points = np.array([[0, 1], [0, 3], [8, 0], [0.5, 2], [10, -1]], np.float16)
    got = lloyd.sum_nearest([points[:3], points[3:]], np.array([[0, 2], [9, 0], [50, 50]], np.float32), "cpu")
    assert got.num_points.tolist() == [3, 2, 0]
    assert (got.sums / 2**24).tolist() == [[0.5, 6], [18, -1], [0, 0]]


def test_sum_nearest__exact_for_the_largest_and_the_smallest_float16_together():
    # In float32 the smallest would vanish next to the largest, but not in another order.
    points = np.full((lloyd.BLOCK_ROWS, 2), 65504, np.float16)
    points[1::2] = 2.0**-24
    points[5, 1] = -(2.0**-24)
    got = lloyd.sum_nearest([points, points[::-1].copy()], np.zeros((1, 2), np.float32), "cpu")
    units = [[int(float(value) * 2**24) for value in row] for row in points]
    assert got.sums.tolist() == [[2 * sum(column) for column in zip(*units, strict=True)]]


def test_largest_value__of_either_sign():
    blocks = [np.array([[1, -3], [2, 0]], np.float16), np.array([[2, 2]], np.float16)]
    assert lloyd.largest_value(blocks) == 3
    blocks[1][0, 0] = -np.inf
    assert lloyd.largest_value(blocks) == np.inf


def test_iterate__a_concept_without_points_stays_where_it_is():
    start = np.array([[-1, 0], [1, 0], [90, 90]], np.float32)
    state = lloyd.FitState(start)
    state, num_crops = lloyd.iterate(InMemory(_cloud(dim=2)), state, 5, unwatched, lloyd.forgotten)
    assert state.centroids[2].tolist() == [90, 90]
    assert num_crops[2] == 0
    assert num_crops.sum() == 1000


def test_farthest__equal_to_a_sort_and_ties_go_by_row(blocks_of_64):
    points = np.repeat(_cloud(200), 2, axis=0)
    centroids = train(points.astype(np.float32), 4, how=KMeans(seed=0, num_iterations=5), start=None)
    distance, assigned = nearest(points.astype(np.float32), centroids)
    own = np.flatnonzero(assigned == 2)
    expected = own[np.argsort(-distance[own], kind="stable")][:7]
    blocks = [points[i : i + 64] for i in range(0, 400, 64)]
    got = lloyd.farthest(blocks, 1000, centroids=centroids, concept=2, most=7, device="cpu")
    assert got.row.tolist() == (1000 + expected).tolist()
    assert np.array_equal(got.points, points[expected])
    assert np.array_equal(got.points[0], got.points[1])


def test_draw_rows__exact_ascending_and_by_the_seed():
    rows = draw_rows(10_000_000, 5000, seed=3)
    assert len(np.unique(rows)) == 5000
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] < 10_000
    assert rows[-1] < 10_000_000
    assert np.array_equal(rows, draw_rows(10_000_000, 5000, seed=3))
    assert not np.array_equal(rows, draw_rows(10_000_000, 5000, seed=4))
    assert draw_rows(3, 5, seed=0).tolist() == [0, 1, 2]


def test_fit_sharded_concepts__equal_to_plain_lloyd_from_the_drawn_start(blocks_of_64):
    points = _cloud()
    sample = points[draw_rows(1000, 100, seed=0)].astype(np.float32)
    start = train(sample, 5, how=KMeans(seed=0, num_iterations=8, num_redos=2), start=None)
    got = _fit(points, 5, num_shards=3, num_iterations=8)
    expected, _ = _plain_lloyd(points, start, 8)
    np.testing.assert_allclose(got.centroids, expected, rtol=1e-6, atol=1e-6)
    # Eight passes that move the centroids, and one that counts.
    assert (got.points_used, got.points_total, got.num_passes) == (1000, 1000, 9)
    assert np.array_equal(got.num_crops, np.bincount(nearest(points.astype(np.float32), got.centroids)[1]))


def test_fit_sharded_concepts__ends_where_the_centroids_stand_still(blocks_of_64):
    points = _cloud()
    told = []
    got = _fit(points, 5, num_iterations=500, on_pass=lambda *pair: told.append(pair))
    assert told == [(number, 501) for number in range(1, got.num_passes + 1)]
    assert 2 < got.num_passes < 100
    expected, _ = _plain_lloyd(points, got.centroids, 1)
    np.testing.assert_allclose(got.centroids, expected, rtol=1e-6, atol=1e-6)
    assert _fit(points, 5, num_iterations=500, num_shards=2).num_passes == got.num_passes


def test_fit_sharded_concepts__objective_never_rises(blocks_of_64):
    points = _cloud()
    start = _fit(points, 7, num_iterations=3).centroids
    shards = InMemory(points, 2)
    objectives = []
    for num_iterations in range(12):
        state, _ = lloyd.iterate(shards, lloyd.FitState(start), num_iterations, unwatched, lloyd.forgotten)
        objectives.append(_plain_lloyd(points, state.centroids, 1)[1][0])
    assert (np.diff(objectives) <= 0).all()
    assert objectives[-1] < objectives[0]


def test_fit_sharded_concepts__same_bits_for_any_number_of_shards(blocks_of_64):
    # On a coarse grid many points are equally near to two centroids, and many sums are rounding ties.
    points = np.round(_cloud(701))
    first, *others = (_fit(points, 9, num_shards=n, min_crops=20) for n in (1, 2, 3, 11))
    for other in others:
        assert other.centroids.tobytes() == first.centroids.tobytes()
        assert np.array_equal(other.num_crops, first.num_crops)
    assert _fit(points, 9, seed=1).centroids.tobytes() != first.centroids.tobytes()


def test_fit_sharded_concepts__goes_on_from_any_pass_to_the_same_bits(blocks_of_64):
    # 300 points in which starved concepts are seeded anew, after which passes count from one again.
    points, kept = _cloud(300, dim=4, seed=7), []
    whole = _fit(points, 6, min_crops=35, keep=kept.append)
    assert whole.num_reseeded > 0
    assert [state.num_passes for state in kept[:2]] == [0, 1]
    assert len({state.num_attempts for state in kept}) > 1
    for state in kept:
        told = []
        got = _fit(points, 6, 2, min_crops=35, begun=state, on_pass=lambda *pair, told=told: told.append(pair))
        assert got.centroids.tobytes() == whole.centroids.tobytes()
        assert got.num_crops.tolist() == whole.num_crops.tolist()
        assert (got.num_passes, got.num_reseeded) == (whole.num_passes, whole.num_reseeded)
        assert len(told) == whole.num_passes - state.num_passes
        assert told[0] == (state.num_moves + 1, 21)


def test_fit_sharded_concepts__a_fit_that_goes_on_has_no_more_attempts_than_a_whole_one(blocks_of_64):
    points, kept = np.concatenate([_cloud(300, dim=2), [[60000.0, 0.0]]]), []
    with pytest.raises(DataError):
        _fit(points, 3, min_crops=2, init_points=300, keep=kept.append)
    last = kept[-1]
    assert last.num_attempts == MAX_RESEEDS
    told = []
    with pytest.raises(DataError, match="1 of 3 foreground concepts"):
        _fit(points, 3, min_crops=2, init_points=300, begun=last, on_pass=lambda *pair: told.append(pair))
    assert len(told) <= 2


def test_fit_sharded_concepts__a_cap_is_the_same_as_in_memory(blocks_of_64):
    points = _cloud()
    got = _fit(points, 6, num_shards=2, max_points=80, min_crops=100)
    how = KMeans(seed=0, num_iterations=20, num_redos=2, min_crops=100, max_points=80)
    expected = fit_concepts(points.astype(np.float32), 6, how=how, group="foreground")
    assert got.centroids.tobytes() == expected.centroids.tobytes()
    assert got.num_crops.tolist() == expected.num_crops.tolist()
    assert (got.points_used, got.points_total) == (expected.points_used, expected.points_total) == (80, 1000)
    assert got.num_reseeded == expected.num_reseeded > 0


def test_fit_sharded_concepts__starved_concepts_are_seeded_anew(blocks_of_64):
    # Not every cloud can be mended; those that are must meet the bound that the first fit missed.
    mended = 0
    for seed in range(8):
        points = _cloud(300, dim=4, seed=seed)
        try:
            one, three = (_fit(points, 6, num_shards, min_crops=35) for num_shards in (1, 3))
        except DataError:
            continue
        assert one.num_crops.min() >= 35
        assert one.num_crops.sum() == 300
        assert (one.num_reseeded > 0) == (_fit(points, 6).num_crops.min() < 35)
        assert one.centroids.tobytes() == three.centroids.tobytes()
        assert one.num_reseeded == three.num_reseeded
        mended += one.num_reseeded > 0
    assert mended >= 2


def test_fit_sharded_concepts__starved_concepts_go_where_the_largest_serves_worst(blocks_of_64):
    seen = []

    class Recording(InMemory):
        def sum_nearest(self, centroids):
            seen.append(centroids.copy())
            return super().sum_nearest(centroids)

        def farthest(self, centroids, concept, most):
            seen.append((concept, most))
            return super().farthest(centroids, concept, most)

    points = _cloud(300, dim=4)
    how = KMeans(seed=0, num_iterations=20, num_redos=2, min_crops=50)
    with pytest.raises(DataError, match=r"of 6 foreground concepts have fewer than concepts\.min_crops=50"):
        lloyd.fit_sharded_concepts(Recording(points, 3), 6, how=how, init_points=100, group="foreground")
    turns = [i for i, entry in enumerate(seen) if isinstance(entry, tuple)]
    assert len(turns) == 5
    for turn in turns:
        before, after = seen[turn - 1], seen[turn + 1]
        distance, assigned = nearest(points.astype(np.float32), before)
        num_crops = np.bincount(assigned, minlength=6)
        starved, largest = np.flatnonzero(num_crops < 50), num_crops.argmax()
        own = np.flatnonzero(assigned == largest)
        worst = own[np.argsort(-distance[own])][: len(starved)]
        assert seen[turn] == (largest, len(starved))
        assert np.array_equal(after[starved], points[worst].astype(np.float32))
        assert np.array_equal(np.delete(after, starved, 0), np.delete(before, starved, 0))


def test_fit_sharded_concepts__refuses_concepts_that_stay_starved(blocks_of_64):
    points = np.concatenate([_cloud(300, dim=2), [[60000.0, 0.0]]])
    with pytest.raises(DataError, match=r"1 of 3 foreground concepts have fewer than concepts\.min_crops=2 crops.*301"):
        _fit(points, 3, min_crops=2, init_points=300)


def test_fit_sharded_concepts__refuses_more_concepts_than_points():
    with pytest.raises(DataError, match=r"9 foreground concepts with .*=5 each were asked of 40 foreground crops"):
        _fit(_cloud(40), 9, min_crops=5, init_points=20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fit_sharded_concepts__refuses_points_that_are_not_finite(bad, blocks_of_64):
    points = _cloud()
    points[700, 1] = bad
    with pytest.raises(DataError, match=r"NaN or infinity; check encoder\.weights"):
        _fit(points, 3)


def test_fit_sharded_concepts__refuses_sums_that_int64_cannot_hold():
    shards = InMemory(_cloud(200))
    shards.largest_value = 2.0**39 / 200
    settings = {"how": KMeans(seed=0, num_iterations=1, min_crops=1), "init_points": 100, "group": "foreground"}
    with pytest.raises(DataError, match=r"reach 2748779069 *, and sums of 200 of them are exact only below 2748779069"):
        lloyd.fit_sharded_concepts(shards, 3, **settings)
    shards.largest_value *= 0.99
    assert lloyd.fit_sharded_concepts(shards, 3, **settings).num_passes == 2
