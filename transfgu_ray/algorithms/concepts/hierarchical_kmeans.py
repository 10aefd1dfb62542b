"""Hierarchical k-means with resampling: concepts spread over what there is, however often each was photographed.

Vo et al. (2024), "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach", arXiv 2405.15613,
section 3. Flat k-means puts its centroids where most points are. Here many centroids are found first, then the
centroids of these centroids, and so on: each level forgets how many points a cluster of the level below has. On each
level, resampling steps take the points nearest to each centroid, equally many of each cluster, and run k-means anew on
these alone.

The concepts are the centroids of the highest level and are used as those of flat k-means: a point belongs to the
nearest, `num_crops` counts the points so, and `min_crops` holds for this count. The paper's own cluster of a point is
the one that the hierarchy leads to, from its nearest centroid on the lowest level to that centroid's nearest on the
next; near the border of two concepts these may differ. `num_below` counts the points in that way.

Departures, all ours: the number of clusters follows from the number of points (the paper chooses 10 million to 10
thousand for 743 million), first centroids are drawn points (k-means++), and clusters without points are left out
below the highest level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from transfgu_ray.algorithms.concepts.kmeans import (
    Clustering,
    KMeans,
    Level,
    OnPass,
    draw_rows,
    has_gpu,
    nearest,
    not_finite,
    reseed_starved,
    too_few,
    train,
    unwatched,
)
from transfgu_ray.algorithms.concepts.sharded_kmeans import (
    CentralPoints,
    FitState,
    ShardedPoints,
    check_points,
    forgotten,
    iterate,
    merge_central,
)
from transfgu_ray.errors import DataError

# Points to a cluster of the lowest level (paper: 74).
POINTS_EACH = 64
# Clusters to one of the level above, at most (paper: 20, 10 and 5).
MAX_RATIO = 10


@dataclass(frozen=True)
class Hierarchy:
    """Settings of a hierarchy beside those of its k-means.

    Attributes:
        num_resamples: resampling steps of each level.
        init_points: most points that are held in memory at once.
    """

    num_resamples: int
    init_points: int

    def level_sizes(self, num_points: int, num_concepts: int) -> tuple[int, ...]:
        """Return the number of clusters of each level, the lowest first; there are at least two levels.

        The lowest has a cluster for each `POINTS_EACH` points that are held in memory, but at least two for each
        concept if there are so many points; the highest has the concepts. Between them lie as few levels as keep the
        ratio of one to the next at `MAX_RATIO` or below, all ratios being the same but for rounding.
        """
        lowest = max(min(num_points, self.init_points) // POINTS_EACH, min(2 * num_concepts, num_points))
        ratio = lowest / num_concepts
        steps = max(1, math.ceil(math.log(ratio, MAX_RATIO) - 1e-9))
        return tuple(round(num_concepts * ratio ** (step / steps)) for step in range(steps, -1, -1))

    def sample_size(self, num_points: int, num_clusters: int) -> int:
        """Return the points of a cluster that are resampled: half its mean size (paper), if memory holds so many."""
        return math.ceil(min(num_points, self.init_points) / (2 * num_clusters))

    def num_steps(self, num_points: int, num_clusters: int) -> int:
        """Return the resampling steps of a level: none where they would take one point of a cluster (paper)."""
        return self.num_resamples if self.sample_size(num_points, num_clusters) > 1 else 0

    def num_distances(self, num_points: int, num_concepts: int, passes: int) -> int:
        """Return the distances from a centroid that all levels take, where each k-means makes so many passes."""
        found = 0
        for size in self.level_sizes(num_points, num_concepts):
            steps = self.num_steps(num_points, size)
            resampled = steps * size * self.sample_size(num_points, size)
            found += size * (passes * (num_points + resampled) + steps * num_points)
            num_points = size
        return found


def fit_hierarchy(
    points: Float32[np.ndarray, "n d"],
    num_concepts: int,
    *,
    how: KMeans,
    hierarchy: Hierarchy,
    group: str,
    on_pass: OnPass = unwatched,
) -> Clustering:
    """Return the concepts of points in memory; the same seed and points give the same bits.

    Args:
        points: of one group.
        num_concepts: number of concepts.
        how: settings of every k-means; `max_points` is None.
        hierarchy: settings of the levels.
        group: its name, for messages.
        on_pass: told of each pass of the lowest level.

    Raises:
        DataError: there are fewer (distinct) points than concepts need, points are NaN or infinite, or starved concepts
            remain.
    """
    if not np.isfinite(points).all():
        raise not_finite(group)
    if len(points) < num_concepts * how.min_crops:
        raise too_few(num_concepts, len(points), min_crops=how.min_crops, group=group)
    how = replace(how, use_gpu=how.use_gpu and has_gpu())
    sizes = hierarchy.level_sizes(len(points), num_concepts)

    def count(centroids: np.ndarray) -> np.ndarray:
        return np.bincount(nearest(points, centroids)[1], minlength=len(centroids))

    centroids, level = _fit_level(points, sizes[0], how=how, hierarchy=hierarchy, on_pass=on_pass)
    most = how.num_redos * how.num_iterations * (1 + hierarchy.num_steps(len(points), sizes[0]))
    return _climb(
        centroids,
        count,
        level,
        sizes=sizes[1:],
        how=how,
        hierarchy=hierarchy,
        group=group,
        alive=lambda: on_pass(most, most),
        used_gpu=how.use_gpu,
    )


def fit_sharded_hierarchy(
    points: ShardedPoints,
    num_concepts: int,
    *,
    how: KMeans,
    hierarchy: Hierarchy,
    group: str,
    on_pass: OnPass = unwatched,
    keep: Callable[[FitState], None] = forgotten,
    begun: FitState | None = None,
) -> Clustering:
    """Return the concepts of points in shards, the same to the last bit for any number of them.

    On the lowest level, Lloyd iterations go over all points as in `fit_sharded_concepts`, and every resampling step is
    a pass that finds the nearest points of each centroid. Those of all clusters fit into the memory of one worker, as
    do the levels above.

    Args:
        points: of one group.
        num_concepts: number of concepts.
        how: settings of every k-means; `max_points` is None.
        hierarchy: settings of the levels.
        group: its name, for messages.
        on_pass: told of each pass over all points, of those that it takes without seeding anew.
        keep: given the state of the lowest level after each pass that moved its centroids.
        begun: a state that an earlier call with the same arguments kept, to go on from there.

    Raises:
        DataError: as `fit_sharded_concepts`.
    """
    check_points(points, num_concepts, min_crops=how.min_crops, group=group)
    total = points.num_points
    sizes = hierarchy.level_sizes(total, num_concepts)
    steps = hierarchy.num_steps(total, sizes[0])
    most = num_passes(how, steps)
    if begun is None:
        rows = draw_rows(total, max(hierarchy.init_points, sizes[0]), how.seed)
        begun = FitState(points.train_on(rows, sizes[0], how=how, start=None))
        keep(begun)
    state = begun
    if not state.num_resamples:
        state, _ = iterate(points, state, how.num_iterations, lambda number, _: on_pass(number, most), keep)
    for step in range(state.num_resamples, steps):
        sample_size = hierarchy.sample_size(total, sizes[0])
        rows = _resample(points.central(state.centroids, sample_size), sample_size)
        on_pass(how.num_iterations + 2 + step, most)
        if len(rows) < sizes[0]:
            break
        centroids = points.train_on(rows, sizes[0], how=how, start=None)
        state = replace(state, centroids=centroids, num_passes=state.num_passes + 1, num_resamples=step + 1)
        keep(state)
    passes = state.num_passes

    def count(centroids: np.ndarray) -> np.ndarray:
        nonlocal passes
        num_points: np.ndarray = np.sum([shard.num_points for shard in points.sum_nearest(centroids)], axis=0)
        passes += 1
        on_pass(most - (len(centroids) != num_concepts), most)
        return num_points

    clustering = _climb(
        state.centroids,
        count,
        Level(total, sizes[0], state.num_passes, state.num_resamples),
        sizes=sizes[1:],
        how=how,
        hierarchy=hierarchy,
        group=group,
        alive=lambda: on_pass(most - 1, most),
        used_gpu=points.used_gpu,
    )
    return replace(clustering, num_passes=passes)


def num_passes(how: KMeans, num_steps: int) -> int:
    """Return the passes over all points in shards that a hierarchy takes at most, if it seeds no concept anew.

    Args:
        how: settings of every k-means.
        num_steps: resampling steps of the lowest level.
    """
    # Those of Lloyd, which end with one that moves nothing, and one each that counts the lowest level and the concepts.
    return how.num_iterations + 1 + num_steps + 2


def _climb(
    centroids: Float32[np.ndarray, "k d"],
    count: Callable[[np.ndarray], np.ndarray],
    lowest: Level,
    *,
    sizes: tuple[int, ...],
    how: KMeans,
    hierarchy: Hierarchy,
    group: str,
    alive: Callable[[], None],
    used_gpu: bool,
) -> Clustering:
    """Go from the centroids of the lowest level to the concepts.

    Args:
        centroids: of the lowest level.
        count: counts the points of the group that are nearest to each of some centroids.
        lowest: the lowest level.
        sizes: clusters of each level above.
        how: settings of every k-means.
        hierarchy: settings of the levels.
        group: its name, for messages.
        alive: called after each pass over a level.
        used_gpu: whether a CUDA device counts.
    """
    levels, num_concepts = [lowest], sizes[-1]
    num_crops, num_below = np.empty(0, np.int64), count(centroids)
    num_reseeded = 0
    for size in sizes:
        below, num_below = centroids[num_below > 0], num_below[num_below > 0]
        if len(below) < num_concepts:
            raise DataError(
                f"{num_concepts} {group} concepts were asked of {lowest.num_points} {group} crops, of which only "
                f"{len(below)} clusters differ; lower concepts.num_concepts or leave out blank photographs, whose "
                "crops are all the same"
            )
        centroids, level = _fit_level(
            below, min(size, len(below)), how=how, hierarchy=hierarchy, on_pass=lambda *_: alive()
        )
        levels.append(level)
        if len(levels) > len(sizes):
            centroids, num_crops, num_reseeded = _seed_starved(
                centroids, below, count, how=how, level=lowest, group=group
            )
        assigned = nearest(below, centroids)[1]
        num_below = np.bincount(assigned, weights=num_below, minlength=len(centroids)).astype(np.int64)
    total = lowest.num_points
    return Clustering(centroids, num_crops, total, total, 0, num_reseeded, used_gpu, tuple(levels), num_below)


def _seed_starved(
    centroids: np.ndarray,
    below: np.ndarray,
    count: Callable[[np.ndarray], np.ndarray],
    *,
    how: KMeans,
    level: Level,
    group: str,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Move starved concepts to the centroids below that the largest concept serves worst; see `reseed_starved`.

    k-means goes on from there without resampling, which would begin anew.
    """

    def worst_served(centroids: np.ndarray, num_crops: np.ndarray, most: int) -> np.ndarray:
        distance, assigned = nearest(below, centroids)
        largest = np.flatnonzero(assigned == num_crops.argmax())
        return below[largest[np.argsort(-distance[largest], kind="stable")][:most]]

    return reseed_starved(
        centroids,
        lambda moved: (moved, count(moved)),
        worst_served=worst_served,
        retrain=lambda start: train(below, len(start), how=how, start=start),
        min_crops=how.min_crops,
        num_points=level.num_points,
        group=group,
    )


def _fit_level(
    points: Float32[np.ndarray, "n d"], num_clusters: int, *, how: KMeans, hierarchy: Hierarchy, on_pass: OnPass
) -> tuple[Float32[np.ndarray, "k d"], Level]:
    """Cluster points in memory, with the resampling steps of one level; its passes are counted together."""
    sample_size = hierarchy.sample_size(len(points), num_clusters)
    steps, done, each = hierarchy.num_steps(len(points), num_clusters), 0, how.num_redos * how.num_iterations

    def told(number: int, _: int) -> None:
        on_pass(done * each + number, (1 + steps) * each)

    centroids = train(points, num_clusters, how=how, start=None, on_pass=told)
    while done < steps:
        distance, assigned = nearest(points, centroids)
        rows = _resample([CentralPoints(assigned, distance, np.arange(len(points)))], sample_size)
        if len(rows) < num_clusters:
            break
        done += 1
        centroids = train(points[rows], num_clusters, how=how, start=None, on_pass=told)
    return centroids, Level(len(points), num_clusters, each + done, done)


def _resample(found: Sequence[CentralPoints], sample_size: int) -> Int64[np.ndarray, " m"]:
    """Return the rows of the points nearest to each centroid, ascending.

    Fewer than there are clusters only if the points of most are all the same.
    """
    return np.sort(merge_central(found, sample_size).row)
