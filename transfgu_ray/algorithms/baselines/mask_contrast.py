"""Clusters of whole foreground masks, after MaskContrast: each mask has one embedding and one cluster."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from transfgu_ray.algorithms.baselines.patch_kmeans import fit_centroids
from transfgu_ray.algorithms.concepts.kmeans import KMeans
from transfgu_ray.algorithms.encoder.vit import Encoder, above_mean


def mask_features(tokens: Float[Tensor, "b hw d"], foreground: Bool[Tensor, "b hw"]) -> Float[Tensor, "b hw d+1"]:
    """Return each patch's mask features: 1 in the foreground, else 0, then the mask's mean token at unit length."""
    inside = foreground.unsqueeze(2).to(tokens.dtype)
    within, beyond = (
        functional.normalize((tokens * mask).sum(1, keepdim=True), dim=2) for mask in (inside, 1 - inside)
    )
    return torch.cat([inside, torch.where(foreground.unsqueeze(2), within, beyond)], 2)


def read_mask_features(
    encoder: Encoder, images: UInt8[Tensor, "b 3 y x"], foreground_prior: str
) -> Float[Tensor, "b hw e"]:
    """Return `mask_features` of images whose foreground is where the prior is above its mean.

    Args:
        encoder: frozen.
        images: RGB in 0-255 on the encoder's device.
        foreground_prior: see `Encoder.saliency`.
    """
    tokens = encoder.prefix(images)
    grid_hw = encoder.grid_hw((images.shape[2], images.shape[3]))
    saliency = encoder.saliency(tokens, encoder.class_row(tokens, grid_hw), grid_hw=grid_hw, prior=foreground_prior)
    return mask_features(encoder.patch_tokens(images), above_mean(saliency).flatten(1))


def fit_masks(
    features: Float32[np.ndarray, "n e"],
    photos: Int64[np.ndarray, " n"],
    *,
    num_foreground: int,
    num_background: int,
    how: KMeans,
) -> tuple[Float32[np.ndarray, "k e"], tuple[int, int]]:
    """Cluster masks: centroids of the foregrounds (first column 1), then of the backgrounds (0), and the masks of each.

    Reference: MaskContrast (Van Gansbeke, Vandenhende, Georgoulis and Van Gool, ICCV 2021) and its released
    `save_embeddings_to_disk`: k-means of the masks' mean embeddings; a mask's pixels all get its cluster. Departures:
    tokens are frozen, where MaskContrast trains pixel embeddings with masks as positives; masks come from the run's
    foreground prior on the patch grid, not from a saliency network; clusters are fitted to training photographs, where
    MaskContrast clusters the scored ones; there is no whitening to 32 principal components; where the model has several
    background concepts, backgrounds are clustered too instead of forming one class.

    Args:
        features: `mask_features` of drawn patches.
        photos: photograph of each patch; a mask without a drawn patch is left out.
        num_foreground: clusters of foreground masks.
        num_background: clusters of backgrounds.
        how: k-means.

    Raises:
        DataError: there are fewer masks than clusters.
    """
    centroids, counts = [], []
    for flag, num_clusters, what in ((1, num_foreground, "foreground masks"), (0, num_background, "backgrounds")):
        rows = np.flatnonzero(features[:, 0] == flag)
        _, first = np.unique(photos[rows], return_index=True)
        masks = np.ascontiguousarray(features[rows[first], 1:])
        found = fit_centroids(masks, num_clusters, how=how, name="mask_contrast", points_are=what)
        centroids.append(np.insert(found, 0, flag, axis=1))
        counts.append(len(masks))
    return np.concatenate(centroids), (counts[0], counts[1])


def mask_maps(
    features: Float[Tensor, "b hw e"], centroids: Float[Tensor, "k e"], grid_hw: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Return maps that are 1 on a mask's patches in the map of the nearest centroid of its group, and 0 elsewhere."""
    other_group = features[..., None, 0] != centroids[:, 0]
    distances = torch.cdist(features[..., 1:], centroids[:, 1:]).masked_fill(other_group, torch.inf)
    chosen = functional.one_hot(distances.argmin(2), len(centroids)).to(features.dtype)
    return torch.unflatten(chosen.transpose(1, 2), 2, grid_hw)
