"""k-means over class tokens: the semantic concepts S_k (3.2)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from transfgu_ray.errors import DataError

# Attempts at giving every concept enough crops before the data are declared too few.
MAX_RESEEDS = 5
# Called after each pass over the points with its number, from 1, and the number of passes there are at most.
OnPass = Callable[[int, int], None]


def unwatched(number: int, most: int) -> None:
    """Take no notice of a pass."""


@dataclass(frozen=True)
class Level:
    """One level of a hierarchy of clusters.

    Attributes:
        num_points: points clustered: all of the group, or the centroids of the level below.
        num_clusters: clusters of them; those without points are left out of the level above.
        num_passes: passes over all of its points until its clusters were final.
        num_resamples: resampling steps made.
    """

    num_points: int
    num_clusters: int
    num_passes: int
    num_resamples: int


@dataclass(frozen=True)
class Clustering:
    """The concepts of one group.

    Attributes:
        centroids: one row per concept.
        num_crops: crops assigned to each concept, over all points.
        points_used: points that k-means saw.
        points_total: points in the group.
        num_passes: passes over all points, including the one that counted the crops; 0 if they were in memory.
        num_reseeded: starved concepts that were seeded anew.
        used_gpu: whether a CUDA device found the nearest centroids of the points.
        levels: of the hierarchy that led to the concepts, the lowest first; none if there is none.
        num_below: crops that the hierarchy leads to each concept; see `hierarchical_kmeans`.
    """

    centroids: Float32[np.ndarray, "k d"]
    num_crops: Int64[np.ndarray, " k"]
    points_used: int
    points_total: int
    num_passes: int
    num_reseeded: int
    used_gpu: bool
    levels: tuple[Level, ...] = ()
    num_below: Int64[np.ndarray, " k"] | None = None


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Settings of k-means.

    Attributes:
        seed: fixes samples and first centroids.
        algorithm: "faiss" = Lloyd's, by FAISS; "mini_batch" = Sculley's (WWW 2010), by scikit-learn.
        num_iterations: Lloyd iterations per run, or passes over all points in mini-batches.
        num_redos: runs, of which the one with the lowest objective wins; with mini-batches first centroids to choose
            from.
        min_crops: points that a concept needs; one with fewer is seeded anew.
        max_points: cap on the points used; None = all.
        use_gpu: whether FAISS may compute on a CUDA device.
    """

    seed: int
    num_iterations: int
    algorithm: str = "faiss"
    num_redos: int = 1
    min_crops: int = 0
    max_points: int | None = None
    use_gpu: bool = False


def fit_concepts(
    points: Float32[np.ndarray, "n d"], num_concepts: int, *, how: KMeans, group: str, on_pass: OnPass = unwatched
) -> Clustering:
    """Run Euclidean k-means over all points, or over `how.max_points` drawn from the seed.

    The same seed and points give bit-identical centroids. Concepts with fewer than `how.min_crops` crops move to the
    points that the largest concept serves worst, and k-means continues from there.

    Raises:
        DataError: there are fewer (distinct) points than concepts need, points are NaN or infinite, or starved concepts
            remain.
    """
    if not np.isfinite(points).all():
        raise not_finite(group)
    if len(points) < num_concepts * how.min_crops:
        raise too_few(num_concepts, len(points), min_crops=how.min_crops, group=group)
    sample = points
    if how.max_points is not None and len(points) > how.max_points:
        sample = points[draw_rows(len(points), max(how.max_points, num_concepts), how.seed)]
    how = replace(how, use_gpu=how.use_gpu and has_gpu())

    def settle(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return centroids, np.bincount(nearest(points, centroids)[1], minlength=num_concepts)

    def worst_served(centroids: np.ndarray, num_crops: np.ndarray, most: int) -> np.ndarray:
        if len(np.unique(sample, axis=0)) < num_concepts:
            return points[:0]
        distance, assigned = nearest(points, centroids)
        largest = np.flatnonzero(assigned == num_crops.argmax())
        return points[largest[np.argsort(-distance[largest], kind="stable")][:most]]

    centroids, num_crops, num_reseeded = reseed_starved(
        train(sample, num_concepts, how=how, start=None, on_pass=on_pass),
        settle,
        worst_served=worst_served,
        retrain=lambda start: train(sample, num_concepts, how=how, start=start, on_pass=on_pass),
        min_crops=how.min_crops,
        num_points=len(points),
        group=group,
    )
    return Clustering(centroids, num_crops, len(sample), len(points), 0, num_reseeded, how.use_gpu)


def reseed_starved(
    centroids: Float32[np.ndarray, "k d"],
    settle: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    *,
    worst_served: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    retrain: Callable[[np.ndarray], np.ndarray],
    min_crops: int,
    num_points: int,
    group: str,
    num_attempts: int = 0,
) -> tuple[Float32[np.ndarray, "k d"], Int64[np.ndarray, " k"], int]:
    """Move starved concepts to points that the largest concept serves worst, until every concept has its crops.

    Args:
        centroids: the first ones.
        settle: moves centroids until they rest, and counts the crops of each.
        worst_served: takes centroids, the crops of each and a number; returns at most that many points of the largest
            concept, the farthest first, or none if there are too few distinct points for all concepts.
        retrain: continues k-means from centroids of which some were moved.
        min_crops: points that a concept needs.
        num_points: points in the group.
        group: its name, for the message.
        num_attempts: how often concepts were moved before, in a fit that goes on.

    Returns:
        Centroids, the crops of each, and how many concepts were seeded anew by this call.

    Raises:
        DataError: starved concepts remain.
    """
    num_reseeded = 0
    for attempt in range(num_attempts, MAX_RESEEDS + 1):
        centroids, num_crops = settle(centroids)
        starved = np.flatnonzero(num_crops < min_crops)
        if not len(starved):
            break
        worst = () if attempt == MAX_RESEEDS else worst_served(centroids, num_crops, len(starved))
        if not len(worst):
            # With 1, each concept would be a crop if there were as many that differ.
            advice = (
                "concepts.min_crops" if min_crops > 1 else "leave out blank photographs, whose crops are all the same"
            )
            raise DataError(
                f"{len(starved)} of {len(centroids)} {group} concepts have fewer than concepts.min_crops={min_crops} "
                f"crops among {num_points}; lower concepts.num_concepts or {advice}"
            )
        # The state that a fit keeps holds them too.
        centroids = centroids.copy()
        centroids[starved[: len(worst)]] = worst
        centroids = retrain(centroids)
        num_reseeded += len(starved)
    return centroids, num_crops, num_reseeded


def nearest(
    points: Float32[np.ndarray, "n d"], centroids: Float32[np.ndarray, "k d"]
) -> tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return the squared distance to each point's nearest centroid, and its index."""
    distance, assigned = flat_index(centroids, use_gpu=False).search(points, 1)
    return distance[:, 0], assigned[:, 0]


def flat_index(centroids: Float32[np.ndarray, "k d"], use_gpu: bool) -> faiss.Index:
    """Build an exact search for the nearest centroid by squared Euclidean distance."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return faiss.index_cpu_to_all_gpus(index, ngpu=1) if use_gpu else index


def has_gpu() -> bool:
    """Return whether this FAISS can compute on a CUDA device of this machine."""
    return hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0


def draw_rows(num_points: int, most: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Draw the indices of at most `most` points uniformly from the seed, ascending."""
    return np.sort(np.random.default_rng(seed).choice(num_points, min(most, num_points), replace=False))


def train(
    points: Float32[np.ndarray, "n d"],
    num_concepts: int,
    *,
    how: KMeans,
    start: Float32[np.ndarray, "k d"] | None,
    on_pass: OnPass = unwatched,
) -> Float32[np.ndarray, "k d"]:
    """Run k-means over all points; return the best of `how.num_redos` runs, or of a single run from `start`.

    The passes of all runs are counted together. scikit-learn tells of none.
    """
    if how.algorithm == "mini_batch":
        return _train_mini_batch(points, num_concepts, how=how, start=start)
    points = np.ascontiguousarray(points)
    # FAISS samples 256 points per centroid unless told otherwise. One iteration a call, so that each can be told of:
    # what FAISS keeps between iterations are the centroids alone, so that the bits are those of a single call.
    settings = faiss.ClusteringParameters()
    settings.niter, settings.min_points_per_centroid, settings.max_points_per_centroid = 1, 1, len(points) + 1
    # Callers have looked; FAISS would do so before each iteration.
    settings.check_input_data_for_NaNs = False
    index = flat_index(np.empty((0, points.shape[1]), np.float32), how.use_gpu)
    num_runs = how.num_redos if start is None else 1
    best, lowest = np.empty(0, np.float32), np.inf
    for run in range(num_runs):
        first = _first_centroids(points, num_concepts, how.seed, run) if start is None else start
        # As Any: the stubs give its C++ vectors as lists.
        kmeans: Any = faiss.Clustering(points.shape[1], num_concepts, settings)
        faiss.copy_array_to_vector(np.ascontiguousarray(first).ravel(), kmeans.centroids)
        for iteration in range(how.num_iterations):
            kmeans.train(points, index)
            on_pass(run * how.num_iterations + iteration + 1, num_runs * how.num_iterations)
        objective = kmeans.iteration_stats.at(kmeans.iteration_stats.size() - 1).obj
        if not run or objective < lowest:
            best, lowest = faiss.vector_to_array(kmeans.centroids), objective
    return best.reshape(num_concepts, -1)


def _first_centroids(
    points: Float32[np.ndarray, "n d"], num_concepts: int, seed: int, run: int
) -> Float32[np.ndarray, "k d"]:
    """Draw points as FAISS does for the first centroids of one of several runs."""
    drawn, library = np.empty(len(points), np.int32), cast(Any, faiss)
    # Which the stubs leave out.
    library.rand_perm(library.swig_ptr(drawn), len(drawn), seed + 1 + run * 15_486_557)
    return points[drawn[:num_concepts]]


def _train_mini_batch(
    points: Float32[np.ndarray, "n d"], num_concepts: int, *, how: KMeans, start: Float32[np.ndarray, "k d"] | None
) -> Float32[np.ndarray, "k d"]:
    """Run scikit-learn's MiniBatchKMeans; each centroid is the mean of the points that it labels (released code)."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        num_concepts,
        init="k-means++" if start is None else start,
        n_init=how.num_redos if start is None else 1,
        max_iter=how.num_iterations,
        random_state=how.seed,
    ).fit(points)
    centroids: np.ndarray = kmeans.cluster_centers_.astype(np.float32)
    # A centroid without points stays where it is, and is found starved.
    for concept in np.unique(kmeans.labels_):
        centroids[concept] = points[kmeans.labels_ == concept].mean(0)
    return centroids


def not_finite(group: str) -> DataError:
    """Return the error for points that are NaN or infinite."""
    return DataError(f"the {group} class tokens hold NaN or infinity; check encoder.weights and encoder.precision")


def too_few(num_concepts: int, num_points: int, *, min_crops: int, group: str) -> DataError:
    """Return the error for fewer points than concepts need."""
    each = f" with at least concepts.min_crops={min_crops} each" if min_crops > 1 else ""
    lower = "concepts.num_concepts or concepts.min_crops" if min_crops > 1 else "concepts.num_concepts"
    return DataError(
        f"{num_concepts} {group} concepts{each} were asked of {num_points} {group} crops; lower {lower}, "
        "or give more photographs or more extract.window_fracs"
    )
