"""Bottom-up segmentation as a baseline: clusters of patch features, without concepts, response maps or a decoder.

k-means clusters the features of some patches of the training photographs; a pixel of another photograph belongs to the
cluster whose centroid is nearest to its features. `iic`, `picie` and `mask_contrast` share the helpers of this module.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from transfgu_ray.algorithms.concepts.kmeans import KMeans, fit_concepts
from transfgu_ray.errors import DataError


def patch_colours(images: UInt8[Tensor, "b 3 y x"], patch_size: int) -> Float[Tensor, "b hw 3"]:
    """Return the mean RGB in [0, 1] of each square patch, row by row."""
    return functional.avg_pool2d(images.float() / 255, patch_size).flatten(2).transpose(1, 2)


def draw_photos(num_photos: int, most: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Draw the indices of at most `most` photographs from the seed, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(num_photos)[:most])


def draw_patches(num_patches: int, most: int, *, seed: int, photo: int) -> Int64[np.ndarray, " n"]:
    """Draw the indices of at most `most` patches from the seed and the photograph's number, ascending."""
    return np.sort(np.random.default_rng([seed, photo]).permutation(num_patches)[:most])


def fit_centroids(
    points: Float32[np.ndarray, "n d"], num_clusters: int, *, how: KMeans, name: str, points_are: str = "patches"
) -> Float32[np.ndarray, "k d"]:
    """Run k-means over all points as for concepts, except that a cluster may end up empty.

    Raises:
        DataError: there are fewer points than clusters, or points are NaN or infinite.
    """
    require_points(len(points), num_clusters, name=name, points_are=points_are)
    return fit_concepts(points, num_clusters, how=replace(how, min_crops=0, max_points=None), group=name).centroids


def require_points(num_points: int, num_clusters: int, *, name: str, points_are: str = "patches") -> None:
    """Refuse to cluster too few points.

    Raises:
        DataError: there are fewer points than clusters.
    """
    if num_points < num_clusters:
        raise DataError(
            f"the baseline {name} cannot make {num_clusters} clusters of {num_points} {points_are}; lower "
            "concepts.num_concepts or leave it out of evaluate.baselines"
        )


def centroid_maps(
    features: Float[Tensor, "b hw d"], centroids: Float[Tensor, "k d"], grid_hw: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Return maps whose argmax over K is the nearest centroid.

    They are the negated squared distances without the features' own norm, which all K share. They are therefore linear
    in the features: upsampled bilinearly, their argmax is the centroid nearest to the bilinearly upsampled features.
    """
    return torch.unflatten(closeness(features, centroids).transpose(1, 2), 2, grid_hw)


def closeness(features: Float[Tensor, "*n d"], centroids: Float[Tensor, "k d"]) -> Float[Tensor, "*n k"]:
    """Return the negated squared distances to the centroids, without the features' own norm, which all K share."""
    return 2 * features @ centroids.T - centroids.square().sum(1)


def linear_maps(
    features: Float[Tensor, "b hw d"], head: Float[Tensor, "k d+1"], grid_hw: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Return the maps of a linear head whose last column is its bias."""
    maps = features @ head[:, :-1].T + head[:, -1]
    return torch.unflatten(maps.transpose(1, 2), 2, grid_hw)
