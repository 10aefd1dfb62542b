"""PiCIE: alternate clustering and training of a projection until a place has the same cluster in two views."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from transfgu_ray.algorithms.baselines.patch_kmeans import closeness, fit_centroids
from transfgu_ray.algorithms.concepts.kmeans import KMeans

# From the released code: width, epochs, k-means iterations per epoch, learning rate. Ours: the steps per epoch.
_WIDTH = 128
_EPOCHS = 10
_KMEANS_ITERATIONS = 10
_LEARNING_RATE = 1e-3
_STEPS_PER_EPOCH = 48
_BATCH = 1024
# Cosines alone cannot tell many clusters apart: the likeliest of 171 would have a probability of at most 0.04.
_TEMPERATURE = 0.1


def cluster_loss(
    features: Float[Tensor, "n p"], labels: Int64[Tensor, " n"], centroids: Float[Tensor, "k p"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of a softmax over the cosines to all centroids, PiCIE's non-parametric classifier.

    Args:
        features: of unit length.
        labels: cluster of each feature.
        centroids: means of such features.
    """
    return functional.cross_entropy(features @ centroids.T / _TEMPERATURE, labels)


def _loss_of_views(features: Iterable[Tensor], clusterings: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Return the mean `cluster_loss` of both views' features under both views' centroids and labels."""
    loss = torch.zeros((), device=clusterings[0][0].device)
    for of_view in features:
        for centroids, labels in clusterings:
            loss = loss + cluster_loss(of_view, labels[rows], centroids) / 4
    return loss


def fit_picie(
    tokens: Float32[np.ndarray, "n d"],
    view_1: Float32[np.ndarray, "n d"],
    *,
    view_2: Float32[np.ndarray, "n d"],
    num_clusters: int,
    how: KMeans,
    device: str,
) -> Float32[np.ndarray, "k d+1"]:
    """Fit a linear head that gives the similarity of a projected token to each centroid; its last column is the bias.

    Each view is clustered, then a projection to features of unit length is trained with each view's clusters on both
    views: within a view and across. Finally, the tokens of the unaltered photographs are clustered afresh.

    Reference: PiCIE (Cho, Mall, Bala and Hariharan, CVPR 2021), 3.2-3.3, and its released code. Departures: tokens are
    frozen and their projection is linear, where PiCIE trains a feature pyramid; places are patches drawn once, with the
    views of `token_views`; k-means sees all of them, not mini-batches; the projection starts orthogonal; the softmax
    has a temperature; all clusters have the same weight; there is no over-clustering head (PiCIE+H).

    Args:
        tokens: patch tokens of whole photographs.
        view_1: patch tokens of one view.
        view_2: patch tokens of the same places in another view.
        num_clusters: K.
        how: settings of the last k-means; its seed also fixes the initial weights and the order of places.
        device: where to train.

    Raises:
        DataError: there are fewer places than clusters.
    """
    rng = torch.Generator().manual_seed(how.seed)
    views = torch.from_numpy(np.stack([view_1, view_2])).to(device)
    start = torch.nn.init.orthogonal_(torch.empty(_WIDTH, views.shape[2]), generator=rng)
    weight = start.to(device).requires_grad_()
    bias = torch.zeros(_WIDTH, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=_LEARNING_RATE)

    def project(some: Tensor) -> Tensor:
        return functional.normalize(some @ weight.T + bias, dim=1)

    @torch.no_grad()
    def cluster(some: Tensor, how: KMeans) -> tuple[Tensor, Tensor]:
        features = project(some)
        found = fit_centroids(features.cpu().numpy(), num_clusters, how=how, name="picie")
        centroids = torch.from_numpy(found).to(device)
        return centroids, closeness(features, centroids).argmax(1)

    short = replace(how, num_iterations=_KMEANS_ITERATIONS, num_redos=1)
    for _ in range(_EPOCHS):
        clusterings = [cluster(view, short) for view in views]
        for _ in range(_STEPS_PER_EPOCH):
            rows = torch.randperm(views.shape[1], generator=rng)[:_BATCH]
            loss = _loss_of_views((project(view[rows]) for view in views), clusterings, rows)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    centroids, _ = cluster(torch.from_numpy(tokens).to(device), how)
    # A feature's length is the same for all K, so the head has the same argmax without it.
    head = torch.cat([centroids @ weight.detach(), (centroids @ bias.detach())[:, None]], 1)
    return head.cpu().numpy()
