"""Invariant information clustering: a linear head whose classes say as much as possible about those of another view."""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from transfgu_ray.algorithms.baselines.patch_kmeans import require_points

# The released code has 5 heads for clustering images and 1 for segmenting them; the other constants are ours.
_SUB_HEADS = 5
_STEPS = 400
_BATCH = 4096
_LEARNING_RATE = 0.05


def mutual_information(
    first: Float[Tensor, "*heads n k"], second: Float[Tensor, "*heads n k"]
) -> Float[Tensor, "*heads"]:
    """Return I(z, z') of the classes of n places in two views, in nats, 0 to log K.

    Reference: IIC (Ji, Henriques and Vedaldi, ICCV 2019), Eq. 2-3: the joint distribution is the mean product of the
    two views' probabilities, made symmetric.

    Args:
        first: class probabilities of each place; each row sums to 1.
        second: those of the same places in the other view.
    """
    joint = torch.einsum("...nk,...nl->...kl", first, second) / first.shape[-2]
    joint = (joint + joint.transpose(-2, -1)) / 2
    classes = joint.sum(-1)
    information: Tensor = torch.special.entr(classes).sum(-1) * 2 - torch.special.entr(joint).sum((-2, -1))
    return information


def fit_iic(
    view_1: Float32[np.ndarray, "n d"],
    view_2: Float32[np.ndarray, "n d"],
    *,
    num_clusters: int,
    seed: int,
    device: str,
) -> Float32[np.ndarray, "k d+1"]:
    """Train a linear head with a softmax over the clusters; return its weights, with the bias as the last column.

    Reference: IIC (Ji, Henriques and Vedaldi, ICCV 2019) and its released code, lambda = 1. Departures: features are
    frozen, where IIC trains a network from scratch, and standardised in place of its batch norm; there is thus no
    over-clustering head, which could only act through shared features; places are patches drawn once, with the views of
    `token_views`; a place is paired only with itself, not also with places displaced by up to 10 of 128 px; the head
    with the most information in the last steps is returned.

    Args:
        view_1: patch tokens.
        view_2: patch tokens of the same places in another view.
        num_clusters: K.
        seed: fixes the initial weights and the order of places.
        device: where to train.

    Raises:
        DataError: there are fewer places than clusters.
    """
    require_points(len(view_1), num_clusters, name="iic")
    views = torch.from_numpy(np.stack([view_1, view_2])).to(device)
    mean, deviation = views.mean((0, 1)), views.std((0, 1)).clamp(min=1e-6)
    views = (views - mean) / deviation
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(_SUB_HEADS, num_clusters, views.shape[2], generator=rng) / views.shape[2] ** 0.5
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(_SUB_HEADS, 1, num_clusters, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=_LEARNING_RATE)
    recent = torch.zeros(_SUB_HEADS, device=device)
    for _ in range(_STEPS):
        rows = torch.randperm(views.shape[1], generator=rng)[:_BATCH]
        first, second = ((view[rows] @ weight.transpose(1, 2) + bias).softmax(2) for view in views)
        information = mutual_information(first, second)
        optimiser.zero_grad()
        torch.autograd.backward(-information.sum())
        optimiser.step()
        recent = recent.lerp(information.detach(), 0.1)
    best = int(recent.argmax())
    scaled = weight.detach()[best] / deviation
    return torch.cat([scaled, (bias.detach()[best, 0] - scaled @ mean)[:, None]], 1).cpu().numpy()
