import faiss
import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from transfgu_ray.algorithms.concepts.kmeans import KMeans, fit_concepts, nearest, train
from transfgu_ray.errors import DataError


def _fit(points, num_concepts, **changes):
    group = changes.pop("group", "foreground")
    how = KMeans(**{"seed": 0, "num_iterations": 20, "num_redos": 2, "min_crops": 1} | changes)
    return fit_concepts(points.astype(np.float32), num_concepts, how=how, group=group)


def _blobs(num=(30, 50, 20), radius=0.1, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 0, 9], [9, 0, 0, 0], [0, 9, 9, 0]], dtype=np.float32)
    return np.concatenate([c + radius * rng.normal(size=(n, 4)) for c, n in zip(centres, num, strict=False)])


def test_nearest__equal_to_brute_force():
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(200, 16)).astype(np.float32), rng.normal(size=(9, 16)).astype(np.float32)
    squared = ((points[:, None].astype(float) - centroids[None]) ** 2).sum(-1)
    distance, assigned = nearest(points, centroids)
    assert np.array_equal(assigned, squared.argmin(1))
    np.testing.assert_allclose(distance, squared.min(1), rtol=1e-4)


def test_fit_concepts__finds_separate_groups_and_their_means():
    points = _blobs()
    got = _fit(points, 3)
    order = np.argsort(got.num_crops)
    assert got.num_crops[order].tolist() == [20, 30, 50]
    means = [points[80:].mean(0), points[:30].mean(0), points[30:80].mean(0)]
    np.testing.assert_allclose(got.centroids[order], means, atol=1e-4)
    assert got.num_reseeded == 0
    assert not got.used_gpu


def test_fit_concepts__same_seed_same_bits():
    points = np.random.default_rng(1).normal(size=(300, 8))
    first, again, other = (_fit(points, 12, seed=seed) for seed in (3, 3, 4))
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.centroids.tobytes() != other.centroids.tobytes()


@pytest.mark.parametrize("num_redos", [1, 3])
@pytest.mark.parametrize(("num_points", "dim", "num_concepts"), [(300, 8, 12), (5000, 64, 27), (40, 3, 40)])
def test_train__same_bits_as_a_single_call_of_faiss(num_points, dim, num_concepts, num_redos):
    # On a grid clusters run empty and ties abound.
    points = np.round(np.random.default_rng(num_points).normal(size=(num_points, dim))).astype(np.float32)
    settings = {"min_points_per_centroid": 1, "max_points_per_centroid": num_points + 1, "seed": 7}
    for start in (None, points[:num_concepts]):
        plain = faiss.Kmeans(dim, num_concepts, niter=15, nredo=num_redos if start is None else 1, **settings)
        plain.train(points, init_centroids=start)
        got = train(points, num_concepts, how=KMeans(seed=7, num_iterations=15, num_redos=num_redos), start=start)
        assert got.tobytes() == plain.centroids.tobytes()


def test_train__tells_of_every_pass_of_all_runs():
    points, told = _blobs().astype(np.float32), []
    how = KMeans(seed=0, num_iterations=4, num_redos=3)
    train(points, 3, how=how, start=None, on_pass=lambda *pair: told.append(pair))
    train(points, 3, how=how, start=points[:3], on_pass=lambda *pair: told.append(pair))
    assert told == [(number, 12) for number in range(1, 13)] + [(number, 4) for number in range(1, 5)]


def test_fit_concepts__uses_every_point():
    # FAISS by default draws 256 points per centroid; the mean of all shows whether it did.
    points = np.random.default_rng(0).normal(size=(2000, 3))
    got = _fit(points, 1)
    assert (got.points_used, got.points_total) == (2000, 2000)
    np.testing.assert_allclose(got.centroids[0], points.mean(0), atol=1e-5)


def test_fit_concepts__cap_is_kept_and_reported():
    points = np.random.default_rng(0).normal(size=(500, 3))
    got = _fit(points, 4, max_points=100)
    assert (got.points_used, got.points_total) == (100, 500)
    # Crops are nevertheless counted over all points.
    assert got.num_crops.sum() == 500


def test_fit_concepts__starved_concepts_are_seeded_anew():
    # Not every cloud can be mended; those that are must meet the bound that the first fit missed.
    mended = 0
    for seed in range(10):
        points = np.random.default_rng(seed).normal(size=(40, 4))
        try:
            got = _fit(points, 6, min_crops=3)
        except DataError:
            continue
        assert got.num_crops.min() >= 3
        assert got.num_crops.sum() == 40
        assert (got.num_reseeded > 0) == (_fit(points, 6).num_crops.min() < 3)
        mended += got.num_reseeded > 0
    assert mended >= 1


def test_fit_concepts__refuses_concepts_that_stay_starved():
    # So far away that it always ends up alone.
    points = np.concatenate([_blobs(num=(20, 20)), [[1e6, 0.0, 0.0, 0.0]]])
    advice = r"lower concepts\.num_concepts or concepts\.min_crops$"
    with pytest.raises(DataError, match=rf"1 of 3 foreground concepts have fewer than concepts\.min_crops=2.*{advice}"):
        _fit(points, 3, min_crops=2)


@pytest.mark.reports
def test_fit_concepts__refuses_more_concepts_than_distinct_points():
    points = np.repeat([[0.0, 1.0], [1.0, 0.0]], 10, axis=0)
    # A bound that is 1 already cannot be lowered.
    advice = "lower concepts.num_concepts or leave out blank photographs, whose crops are all the same"
    with pytest.raises(
        DataError, match=rf"of 4 foreground concepts have fewer than concepts\.min_crops=1.*; {advice}$"
    ):
        _fit(points, 4)


def test_fit_concepts__refuses_more_concepts_than_points():
    with pytest.raises(DataError, match=r"5 foreground concepts were asked of 4 foreground crops.*num_concepts"):
        _fit(np.eye(4), 5)
    with pytest.raises(
        DataError, match=r"3 foreground concepts with at least concepts\.min_crops=2 each were asked of 4"
    ):
        _fit(np.eye(4), 3, min_crops=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fit_concepts__refuses_points_that_are_not_finite(bad):
    points = _blobs()
    points[3, 1] = bad
    with pytest.raises(DataError, match=r"NaN or infinity; check encoder\.weights"):
        _fit(points, 3)


def test_fit_concepts__mini_batches_are_scikit_learns_and_centroids_the_means_of_their_points():
    points = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    got = _fit(points, 5, algorithm="mini_batch", num_iterations=100, num_redos=3)
    # As the published code calls it, with the defaults of scikit-learn 1.0 written out.
    plain = MiniBatchKMeans(5, max_iter=100, random_state=0, n_init=3, batch_size=1024).fit(points)
    means = [points[plain.labels_ == concept].mean(0) for concept in range(5)]
    np.testing.assert_allclose(got.centroids, means, atol=1e-6)
    assert got.num_crops.sum() == 3000
    assert not np.allclose(got.centroids, _fit(points, 5).centroids, atol=1e-3)


def test_train__mini_batches_go_on_from_given_centroids():
    # As after starved concepts have been moved.
    points = _blobs(num=(600, 600, 9), radius=0.01).astype(np.float32)
    how = KMeans(seed=0, num_iterations=20, algorithm="mini_batch")
    got = train(points, 3, how=how, start=points[[0, 600, 1200]])
    means = [points[:600].mean(0), points[600:1200].mean(0), points[1200:].mean(0)]
    np.testing.assert_allclose(got, means, atol=1e-5)
