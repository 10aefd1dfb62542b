"""k-means over points that no worker can hold: FAISS on a drawn sample, then Lloyd iterations over all points.

The points lie in shards, whose blocks are read one after another. The result is the same to the last bit for any
number of shards, because

- a block is a run of `BLOCK_ROWS` consecutive points of the group, wherever the shards begin: the last bits of the
  distances, and hence ties between two centroids, depend on the shape of the matrix product;
- sums are exact. A float16 is an integer multiple of 2**-24 below 2**16 in magnitude, so sums of 2**13 of them are
  multiples of 2**-24 below 2**29, which float64 (53 bits) holds exactly whatever the order of addition. Blocks are
  then added as int64 multiples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float16, Float32, Int64
from scipy.sparse import csr_array

from transfgu_ray.algorithms.concepts.kmeans import (
    Clustering,
    KMeans,
    OnPass,
    draw_rows,
    flat_index,
    not_finite,
    reseed_starved,
    too_few,
    unwatched,
)
from transfgu_ray.errors import DataError

# At most 2**13: beyond it, a block's sums may be inexact.
BLOCK_ROWS = 8192
_UNITS = 2.0**24
# Sums must stay below this to fit int64 in units of 2**-24.
_MAX_SUM = 2.0**63 / _UNITS


@dataclass(frozen=True)
class ClusterSums:
    """What an iteration needs to know about some points.

    Attributes:
        sums: sum of the points nearest to each centroid, in units of 2**-24.
        num_points: number of those points.
    """

    sums: Int64[np.ndarray, "k d"]
    num_points: Int64[np.ndarray, " k"]


@dataclass(frozen=True)
class FarPoints:
    """Some points of one concept, the farthest from its centroid first, ties in order of row.

    Attributes:
        distance: squared distance to the centroid.
        row: row of the point in the group.
        points: the points themselves.
    """

    distance: Float32[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    points: Float16[np.ndarray, "n d"]


@dataclass(frozen=True)
class FitState:
    """How far a fit is between two passes; from here it goes on to the same bits.

    Attributes:
        centroids: for the next pass.
        num_moves: times that they were moved since they were last seeded.
        num_passes: passes made over all points.
        num_attempts: times that starved concepts were seeded anew.
        num_reseeded: starved concepts that were seeded anew.
        num_resamples: resampling steps made, of a hierarchy.
    """

    centroids: Float32[np.ndarray, "k d"]
    num_moves: int = 0
    num_passes: int = 0
    num_attempts: int = 0
    num_reseeded: int = 0
    num_resamples: int = 0


def forgotten(state: FitState) -> None:
    """Keep no state."""


@dataclass(frozen=True)
class CentralPoints:
    """Some points of each cluster, the nearest to its centroid first, ties in order of row.

    Attributes:
        cluster: index of the centroid, ascending.
        distance: squared distance to it.
        row: row of the point in the group.
    """

    cluster: Int64[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]


class ShardedPoints(ABC):
    """The points of one group, in shards that begin at multiples of `BLOCK_ROWS`.

    Attributes:
        num_points: points in all shards.
        largest_value: largest magnitude of a coordinate; NaN or infinity if a point is not finite.
        used_gpu: whether a CUDA device finds the nearest centroids.
    """

    num_points: int
    largest_value: float
    used_gpu: bool

    @abstractmethod
    def train_on(
        self,
        rows: Int64[np.ndarray, " m"],
        num_concepts: int,
        *,
        how: KMeans,
        start: Float32[np.ndarray, "k d"] | None,
    ) -> Float32[np.ndarray, "k d"]:
        """Run `train` on these rows of the group, which are ascending, gathered in one place."""

    @abstractmethod
    def sum_nearest(self, centroids: Float32[np.ndarray, "k d"]) -> Sequence[ClusterSums]:
        """Return `sum_nearest` of every shard."""

    @abstractmethod
    def farthest(self, centroids: Float32[np.ndarray, "k d"], concept: int, most: int) -> Sequence[FarPoints]:
        """Return `farthest` of every shard."""

    @abstractmethod
    def central(self, centroids: Float32[np.ndarray, "k d"], most: int) -> Sequence[CentralPoints]:
        """Return `central` of every shard."""


def fit_sharded_concepts(
    points: ShardedPoints,
    num_concepts: int,
    *,
    how: KMeans,
    init_points: int,
    group: str,
    on_pass: OnPass = unwatched,
    keep: Callable[[FitState], None] = forgotten,
    begun: FitState | None = None,
) -> Clustering:
    """Run Euclidean k-means: FAISS on `init_points` drawn from the seed, then Lloyd iterations over all points.

    The iterations end when no centroid moves any more, or after `how.num_iterations`. If `how.max_points` is set (at
    most `init_points`), FAISS on that many points is all, as in `fit_concepts`. Concepts with fewer than
    `how.min_crops` crops move to the points that the largest concept serves worst, and the fit continues from there. A
    concept that loses all its points during the iterations stays where it is until then.

    Args:
        points: of one group.
        num_concepts: number of centroids.
        how: settings.
        init_points: most points that FAISS is given.
        group: its name, for messages.
        on_pass: told of each pass over all points.
        keep: given the state after each pass that moved the centroids, and after FAISS.
        begun: a state that an earlier call with the same arguments kept, to go on from there.

    Raises:
        DataError: there are fewer points than concepts need, points are not finite or too large to be summed exactly,
            or starved concepts remain.
    """
    check_points(points, num_concepts, min_crops=how.min_crops, group=group)
    total = points.num_points
    rows = draw_rows(total, max(how.max_points or init_points, num_concepts), how.seed)
    on_sample_alone = how.max_points is not None
    if begun is None:
        begun = FitState(points.train_on(rows, num_concepts, how=how, start=None))
        keep(begun)
    state = begun

    def settle(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal state
        num_iterations = 0 if on_sample_alone else how.num_iterations
        state, num_crops = iterate(points, replace(state, centroids=centroids), num_iterations, on_pass, keep)
        return state.centroids, num_crops

    def worst_served(centroids: np.ndarray, num_crops: np.ndarray, most: int) -> np.ndarray:
        nonlocal state
        state = replace(state, num_moves=0, num_attempts=state.num_attempts + 1, num_reseeded=state.num_reseeded + most)
        return _merge(points.farthest(centroids, int(num_crops.argmax()), most), most).points

    def retrain(start: np.ndarray) -> np.ndarray:
        # Otherwise `settle` iterates over all points from `start`.
        return points.train_on(rows, num_concepts, how=how, start=start) if on_sample_alone else start

    centroids, num_crops, _ = reseed_starved(
        begun.centroids,
        settle,
        worst_served=worst_served,
        retrain=retrain,
        min_crops=how.min_crops,
        num_points=total,
        group=group,
        num_attempts=begun.num_attempts,
    )
    points_used = len(rows) if on_sample_alone else total
    return Clustering(centroids, num_crops, points_used, total, state.num_passes, state.num_reseeded, points.used_gpu)


def check_points(points: ShardedPoints, num_concepts: int, *, min_crops: int, group: str) -> None:
    """Refuse points that cannot be clustered.

    Raises:
        DataError: there are fewer than concepts need, or they are not finite or too large to be summed exactly.
    """
    total = points.num_points
    if not np.isfinite(points.largest_value):
        raise not_finite(group)
    if total * points.largest_value >= _MAX_SUM:
        raise DataError(
            f"the {group} class tokens reach {points.largest_value:.0f}, and sums of {total} of them are exact only "
            f"below {_MAX_SUM / total:.0f}; check encoder.weights, or set concepts.max_points"
        )
    if total < num_concepts * min_crops:
        raise too_few(num_concepts, total, min_crops=min_crops, group=group)


def largest_value(blocks: Iterable[Float16[np.ndarray, "_ d"]]) -> float:
    """Return the largest magnitude of a coordinate; NaN or infinity if a point is not finite."""
    return float(np.max([np.abs(block).max() for block in blocks]))


def sum_nearest(
    blocks: Iterable[Float16[np.ndarray, "_ d"]], centroids: Float32[np.ndarray, "k d"], device: str
) -> ClusterSums:
    """Return the sum and number of the points nearest to each centroid, of several the first.

    Args:
        blocks: of `BLOCK_ROWS` finite points each, except the last of the group.
        centroids: of all concepts.
        device: "cpu" = FAISS; any other = torch there.
    """
    if device != "cpu":
        return sum_nearest_by_torch(blocks, centroids, device)
    search = _search(centroids, device)
    sums = np.zeros(centroids.shape, np.int64)
    num_points = np.zeros(len(centroids), np.int64)
    for block in blocks:
        points, assigned = block.astype(np.float32), search(block)[1]
        # A sparse product costs the same for any K.
        is_nearest = csr_array((np.ones(len(points)), assigned, np.arange(len(points) + 1)), (len(points), len(sums)))
        sums += (is_nearest.T @ points * _UNITS).astype(np.int64)
        num_points += np.bincount(assigned, minlength=len(sums))
    return ClusterSums(sums, num_points)


def sum_nearest_by_torch(
    blocks: Iterable[Float16[np.ndarray, "_ d"]], centroids: Float32[np.ndarray, "k d"], device: str
) -> ClusterSums:
    """Return what `sum_nearest` does, computed by torch on a device, where the sums stay until the last block."""
    import torch

    from transfgu_ray.algorithms.concepts.torch_nearest import TorchCentroids

    search = TorchCentroids(centroids, device)
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=device)
    num_points = torch.zeros(len(centroids), dtype=torch.int64, device=device)
    for block in blocks:
        points = torch.from_numpy(block).to(device)
        assigned = search.nearest(points)[1]
        # Whole numbers are the same in whatever order a device adds them.
        sums.index_add_(0, assigned, (points.double() * _UNITS).long())
        num_points.index_add_(0, assigned, torch.ones_like(assigned))
    return ClusterSums(sums.cpu().numpy(), num_points.cpu().numpy())


def farthest(
    blocks: Iterable[Float16[np.ndarray, "_ d"]],
    first_row: int,
    *,
    centroids: Float32[np.ndarray, "k d"],
    concept: int,
    most: int,
    device: str,
) -> FarPoints:
    """Return at most `most` points of a concept, the farthest from its centroid.

    Args:
        blocks: as for `sum_nearest`.
        first_row: row in the group of the first block's first point.
        centroids: of all concepts; a point belongs to the nearest.
        concept: index of the concept.
        most: how many points at most.
        device: as for `sum_nearest`.
    """
    far = FarPoints(np.empty(0, np.float32), np.empty(0, np.int64), np.empty((0, centroids.shape[1]), np.float16))
    search = _search(centroids, device)
    for block in blocks:
        distance, assigned = search(block)
        own = np.flatnonzero(assigned == concept)
        far = _merge([far, FarPoints(distance[own], first_row + own, block[own])], most)
        first_row += len(block)
    return far


def central(
    blocks: Iterable[Float16[np.ndarray, "_ d"]],
    first_row: int,
    *,
    centroids: Float32[np.ndarray, "k d"],
    most: int,
    device: str,
) -> CentralPoints:
    """Return at most `most` points of each cluster, the nearest to its centroid.

    Args:
        blocks: as for `sum_nearest`.
        first_row: row in the group of the first block's first point.
        centroids: of all clusters; a point belongs to the nearest.
        most: how many points of a cluster at most.
        device: as for `sum_nearest`.
    """
    found = CentralPoints(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
    search = _search(centroids, device)
    for block in blocks:
        distance, assigned = search(block)
        rows = np.arange(first_row, first_row + len(block))
        found = merge_central([found, CentralPoints(assigned, distance, rows)], most)
        first_row += len(block)
    return found


def merge_central(found: Sequence[CentralPoints], most: int) -> CentralPoints:
    """Return at most `most` points of each cluster, of all that were found, the nearest to its centroid."""
    cluster = np.concatenate([each.cluster for each in found])
    distance = np.concatenate([each.distance for each in found])
    row = np.concatenate([each.row for each in found])
    order = np.lexsort((row, distance, cluster))
    ordered = cluster[order]
    # Places count from the first point of a cluster.
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    kept = order[place < most]
    return CentralPoints(cluster[kept], distance[kept], row[kept])


def _search(
    centroids: np.ndarray, device: str
) -> Callable[[Float16[np.ndarray, "n d"]], tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]]:
    """Return a function from points to the squared distance to the nearest centroid, and its index."""
    if device == "cpu":
        index = flat_index(centroids, use_gpu=False)

        def by_faiss(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            distance, assigned = index.search(block.astype(np.float32), 1)
            return distance[:, 0], assigned[:, 0]

        return by_faiss
    import torch

    from transfgu_ray.algorithms.concepts.torch_nearest import TorchCentroids

    search = TorchCentroids(centroids, device)

    def by_torch(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distance, assigned = search.nearest(torch.from_numpy(block).to(device))
        return distance.cpu().numpy(), assigned.cpu().numpy()

    return by_torch


def iterate(
    points: ShardedPoints,
    state: FitState,
    num_iterations: int,
    on_pass: OnPass,
    keep: Callable[[FitState], None],
) -> tuple[FitState, Int64[np.ndarray, " k"]]:
    """Move centroids until they rest, at most `num_iterations` times; return them and the crops of each."""
    for num_moves in range(state.num_moves, num_iterations + 1):
        shards = points.sum_nearest(state.centroids)
        state = replace(state, num_passes=state.num_passes + 1)
        on_pass(num_moves + 1, num_iterations + 1)
        num_crops = np.sum([shard.num_points for shard in shards], axis=0)
        served = num_crops > 0
        moved = state.centroids.copy()
        sums = np.sum([shard.sums for shard in shards], axis=0)
        moved[served] = sums[served] / (num_crops[served, None] * _UNITS)
        if num_moves == num_iterations or np.array_equal(moved, state.centroids):
            break
        state = replace(state, centroids=moved, num_moves=num_moves + 1)
        keep(state)
    return state, num_crops


def _merge(found: Sequence[FarPoints], most: int) -> FarPoints:
    distance = np.concatenate([far.distance for far in found])
    row = np.concatenate([far.row for far in found])
    points = np.concatenate([far.points for far in found])
    kept = np.lexsort((row, -distance))[:most]
    return FarPoints(distance[kept], row[kept], points[kept])
