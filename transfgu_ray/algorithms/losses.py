"""Bootstrapping losses (Eq. 9, 13-16). Letters: b images, k classes, d width, (h, w) patch grid."""

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def bootstrap_targets(
    scores: Float[Tensor, "b k h w"], teacher_logits: Float[Tensor, "b k h w"] | None
) -> Int64[Tensor, "b h w"]:
    """Argmax over classes of the bank's scores (round 0), or of 0.5 * (scores + softmax(teacher)) (Eq. 11, 12)."""
    if teacher_logits is None:
        return scores.argmax(1)
    return (0.5 * (scores + teacher_logits.softmax(1))).argmax(1)


def peer_loss(
    logits: Float[Tensor, "b k h w"],
    targets: Int64[Tensor, "b h w"],
    shuffle: Int64[Tensor, " k"],
    alpha: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CE(P, M) - alpha * CE(P, M') (Eq. 13), and its first term alone.

    Args:
        logits: student output.
        targets: bootstrapped labels M.
        shuffle: one permutation of the K maps; M' are the labels that the shuffled maps give.
        alpha: peer weight, 0.03 to 0.1.
    """
    cross_entropy = functional.cross_entropy(logits, targets)
    return cross_entropy - alpha * functional.cross_entropy(logits, shuffle[targets]), cross_entropy


def uncertainty_loss(logits: Float[Tensor, "b k h w"]) -> Float[Tensor, ""]:
    """1 - mean over positions of the gap between the two largest probabilities (Eq. 14), in [0, 1]."""
    top = logits.softmax(1).topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1]).mean()


def diversity_loss(classes: Float[Tensor, "b k d"]) -> Float[Tensor, ""]:
    """1 + mean over all K x K pairs of the cosine between class embeddings (Eq. 15), in [1, 2].

    Departures: the embeddings have unit length, so C C^T is the cosine that the text names and is not divided by
    sqrt(d).
    """
    return 1 + (classes @ classes.transpose(1, 2)).mean()


def total_loss(
    logits: Float[Tensor, "b k h w"],
    classes: Float[Tensor, "b k d"],
    targets: Int64[Tensor, "b h w"],
    shuffle: Int64[Tensor, " k"],
    alpha: float,
    omega_1: float,
    omega_2: float,
) -> dict[str, Tensor]:
    """Every term and `total` = peer + omega_1 * diversity + omega_2 * uncertainty (Eq. 16), as scalars."""
    peer, cross_entropy = peer_loss(logits, targets, shuffle, alpha)
    diversity, uncertainty = diversity_loss(classes), uncertainty_loss(logits)
    total = peer + omega_1 * diversity + omega_2 * uncertainty
    return {
        "total": total,
        "cross_entropy": cross_entropy,
        "peer": peer,
        "diversity": diversity,
        "uncertainty": uncertainty,
    }
