"""k-means over class tokens: the semantic concepts S_k (3.2)."""

from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from transfgu_ray.errors import DataError

# Attempts at giving every concept its crops before the data are declared too few.
MAX_RESEEDS = 5


@dataclass(frozen=True)
class Clustering:
    """The concepts of one group.

    Attributes:
        centroids: one row a concept.
        num_crops: crops assigned to each concept, over all points.
        points_used: points that k-means saw.
        points_total: points of the group.
        num_passes: passes over all points, the one that counted the crops included; 0 where they were in memory.
        num_reseeded: starved concepts that were seeded anew.
        used_gpu: whether a CUDA index did the work.
    """

    centroids: Float32[np.ndarray, "k d"]
    num_crops: Int64[np.ndarray, " k"]
    points_used: int
    points_total: int
    num_passes: int
    num_reseeded: int
    used_gpu: bool


def fit_concepts(
    points: Float32[np.ndarray, "n d"],
    num_concepts: int,
    seed: int,
    num_iterations: int,
    num_redos: int,
    min_crops: int,
    max_points: int | None,
    use_gpu: bool,
    group: str,
) -> Clustering:
    """Euclidean k-means over all points, or over `max_points` drawn from the seed.

    Fixed seed and points give bit-identical centroids. Concepts with fewer than `min_crops` crops are moved to the
    points that the largest concept serves worst, and k-means is run on from there.

    Raises:
        DataError: fewer (distinct) points than concepts need, non-finite points, or starved concepts that remain.
    """
    if not np.isfinite(points).all():
        raise not_finite(group)
    if len(points) < num_concepts * min_crops:
        raise too_few(num_concepts, len(points), group)
    sample = points
    if max_points is not None and len(points) > max_points:
        sample = points[draw_rows(len(points), max(max_points, num_concepts), seed)]
    use_gpu = use_gpu and has_gpu()
    centroids = train(sample, num_concepts, seed, num_iterations, num_redos, use_gpu, start=None)
    num_reseeded = 0
    for attempt in range(MAX_RESEEDS + 1):
        distance, assigned = nearest(points, centroids)
        num_crops = np.bincount(assigned, minlength=num_concepts)
        starved = np.flatnonzero(num_crops < min_crops)
        if not len(starved):
            break
        if attempt == MAX_RESEEDS or len(np.unique(sample, axis=0)) < num_concepts:
            raise still_starved(len(starved), num_concepts, min_crops, len(points), group)
        largest = np.flatnonzero(assigned == num_crops.argmax())
        worst = largest[np.argsort(-distance[largest], kind="stable")]
        centroids[starved[: len(worst)]] = points[worst[: len(starved)]]
        centroids = train(sample, num_concepts, seed, num_iterations, 1, use_gpu, start=centroids)
        num_reseeded += len(starved)
    return Clustering(centroids, num_crops, len(sample), len(points), 0, num_reseeded, use_gpu)


def nearest(
    points: Float32[np.ndarray, "n d"], centroids: Float32[np.ndarray, "k d"]
) -> tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Squared distance to, and index of, each point's nearest centroid."""
    distance, assigned = flat_index(centroids, use_gpu=False).search(points, 1)
    return distance[:, 0], assigned[:, 0]


def flat_index(centroids: Float32[np.ndarray, "k d"], use_gpu: bool) -> faiss.Index:
    """Exact search for the nearest centroid by squared Euclidean distance."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return faiss.index_cpu_to_all_gpus(index, ngpu=1) if use_gpu else index


def has_gpu() -> bool:
    """Whether this FAISS can compute on a CUDA device of this machine."""
    return hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0


def draw_rows(num_points: int, most: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Indices of at most `most` points, each as likely as the others, drawn by the seed; ascending."""
    return np.sort(np.random.default_rng(seed).choice(num_points, min(most, num_points), replace=False))


def train(
    points: Float32[np.ndarray, "n d"],
    num_concepts: int,
    seed: int,
    num_iterations: int,
    num_redos: int,
    use_gpu: bool,
    start: Float32[np.ndarray, "k d"] | None,
) -> Float32[np.ndarray, "k d"]:
    """Centroids of FAISS k-means over all points: the best of `num_redos` runs from the seed, or a run from `start`."""
    # FAISS samples 256 points a centroid unless told otherwise.
    kmeans = faiss.Kmeans(
        points.shape[1], num_concepts, niter=num_iterations, nredo=num_redos, seed=seed, gpu=use_gpu,
        min_points_per_centroid=1, max_points_per_centroid=len(points) + 1,
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(points), init_centroids=start)
    return kmeans.centroids.reshape(num_concepts, -1).copy()


def not_finite(group: str) -> DataError:
    """What to say of points that are no numbers."""
    return DataError(f"the {group} class tokens hold NaN or infinity; check encoder.weights and encoder.precision")


def too_few(num_concepts: int, num_points: int, group: str) -> DataError:
    """What to say where there are fewer points than concepts need."""
    return DataError(
        f"{num_concepts} {group} concepts were asked of {num_points} {group} crops; lower concepts.num_concepts, "
        "or give more photographs or more extract.window_fracs"
    )


def still_starved(num_starved: int, num_concepts: int, min_crops: int, num_points: int, group: str) -> DataError:
    """What to say of concepts that no new seed gives their crops."""
    return DataError(
        f"{num_starved} of {num_concepts} {group} concepts have fewer than concepts.min_crops={min_crops} "
        f"crops among {num_points}; lower concepts.num_concepts or concepts.min_crops"
    )
