"""Bootstrapping losses (Eq. 9, 13-16). Letters: b images, k classes, d width, (h, w) patch grid."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional


def bootstrap_targets(
    scores: Float[Tensor, "b k h w"], teacher_logits: Float[Tensor, "b k h w"] | None
) -> Int64[Tensor, "b h w"]:
    """Return the argmax over classes of the scores (round 0), or of 0.5 * (scores + softmax(teacher)) (Eq. 11, 12)."""
    if teacher_logits is None:
        return scores.argmax(1)
    return (0.5 * (scores + teacher_logits.softmax(1))).argmax(1)


def peer_loss(
    logits: Float[Tensor, "b k h w"],
    targets: Int64[Tensor, "b h w"],
    *,
    shuffle: Int64[Tensor, " k"],
    alpha: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return CE(P, M) - alpha * CE(P, M') (Eq. 13), and its first term alone.

    Args:
        logits: student output.
        targets: bootstrapped labels M.
        shuffle: permutation of the K maps; M' are the labels that follow from the shuffled maps.
        alpha: peer weight, 0.03 to 0.1; 0 leaves the first term alone.
    """
    cross_entropy = functional.cross_entropy(logits, targets)
    if alpha == 0:
        return cross_entropy, cross_entropy
    return cross_entropy - alpha * functional.cross_entropy(logits, shuffle[targets]), cross_entropy


def foreground_patches(scores: Float[Tensor, "b k h w"], threshold: float) -> Bool[Tensor, "b h w"]:
    """Return where a concept scores above T_bg; the last class, the background of Eq. 8, is not one (released code)."""
    return scores[:, :-1].amax(1) > threshold


def uncertainty_loss(
    logits: Float[Tensor, "b k h w"], foreground: Bool[Tensor, "b h w"] | None = None
) -> Float[Tensor, ""]:
    """Return 1 - the mean over positions of the gap between the two largest probabilities (Eq. 14), in [0, 1].

    Args:
        logits: student output.
        foreground: the positions that count, with probabilities over all but the last class, the background of Eq. 8
            (released code); if there is none, the loss is 0 (released: NaN). None = all positions and classes.
    """
    if foreground is None:
        return 1 - _probability_gap(logits).mean()
    uncertain = (1 - _probability_gap(logits[:, :-1])) * foreground
    return uncertain.sum() / foreground.sum().clamp(min=1)


def _probability_gap(logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b h w"]:
    top = logits.softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def diversity_loss(classes: Float[Tensor, "b k d"], pairs: str = "all_pairs") -> Float[Tensor, ""]:
    """Return 1 + the mean over pairs of the cosine between an image's class embeddings (Eq. 15), in [0, 2].

    Args:
        classes: of unit length.
        pairs: "all_pairs": K x K, including each class with itself (Eq. 15); "upper_triangle": each pair of different
            classes once (released code).

    Departures: the embeddings have unit length, so C C^T is already the cosine of the text, without division by
    sqrt(d).
    """
    cosines = classes @ classes.transpose(1, 2)
    if pairs == "all_pairs":
        return 1 + cosines.mean()
    row, column = torch.triu_indices(cosines.shape[1], cosines.shape[2], offset=1, device=cosines.device)
    return 1 + cosines[:, row, column].mean()


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of Eq. 13 and 16.

    Attributes:
        alpha: of the negatives in the peer loss.
        omega_1: of the diversity loss.
        omega_2: of the uncertainty loss.
    """

    alpha: float
    omega_1: float
    omega_2: float


def total_loss(
    logits: Float[Tensor, "b k h w"],
    classes: Float[Tensor, "b k d"],
    *,
    targets: Int64[Tensor, "b h w"],
    shuffle: Int64[Tensor, " k"],
    weights: LossWeights,
    pairs: str = "all_pairs",
    foreground: Bool[Tensor, "b h w"] | None = None,
) -> dict[str, Tensor]:
    """Return all terms and `total` = peer + omega_1 * diversity + omega_2 * uncertainty (Eq. 16), as scalars.

    A term of weight 0 is reported but takes no part in the backward pass.

    Args:
        logits: student output.
        classes: its class embeddings, of unit length.
        targets: bootstrapped labels M.
        shuffle: see `peer_loss`.
        weights: of the terms.
        pairs: see `diversity_loss`.
        foreground: see `uncertainty_loss`.
    """
    peer, cross_entropy = peer_loss(logits, targets, shuffle=shuffle, alpha=weights.alpha)
    diversity = diversity_loss(classes if weights.omega_1 else classes.detach(), pairs)
    uncertainty = uncertainty_loss(logits if weights.omega_2 else logits.detach(), foreground)
    total = peer + weights.omega_1 * diversity + weights.omega_2 * uncertainty
    return {
        "total": total,
        "cross_entropy": cross_entropy,
        "peer": peer,
        "diversity": diversity,
        "uncertainty": uncertainty,
    }
