"""Losses of DINO, iBOT and DINOv2, one function each."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def class_cross_entropy(targets: Float[Tensor, "2 b p"], logits: Float[Tensor, "v b p"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of every student view against every teacher view but itself, nats.

    Args:
        targets: the teacher's probabilities for the two global views.
        logits: the student's logits over its temperature; views 0 and 1 are the same global views.
    """
    pairs = -torch.einsum("tbp,vbp->tv", targets, logits.log_softmax(-1)) / targets.shape[1]
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[others].mean()


def masked_cross_entropy(
    targets: Float[Tensor, "m p"], logits: Float[Tensor, "m p"], masks: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Return the loss of iBOT: cross-entropy of masked patches, with equal weight per image that has some, nats."""
    counts = masks.flatten(1).sum(1)
    weights = (1 / counts.clamp(min=1).float())[:, None].expand(-1, masks[0].numel())[masks.flatten(1)]
    losses = -(targets * logits.log_softmax(-1)).sum(-1)
    return (losses * weights).sum() / (counts > 0).sum()


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "n p"], num_iterations: int = 3) -> Float[Tensor, "n p"]:
    """Return assignments that use all prototypes equally over the batches of all workers; rows sum to 1.

    Rows and columns are scaled in turn (Sinkhorn-Knopp, as in SwAV, Caron et al. 2020, and DINOv2), in place of
    centring.

    Args:
        logits: the teacher's logits over its temperature.
        num_iterations: rounds of scaling (SwAV: 3).
    """
    highest = logits.max()
    if is_distributed():
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    shares = (logits - highest).exp()
    for _ in range(num_iterations):
        use = shares.sum(0)
        _sum_over_workers(use)
        # A prototype whose share underflows in float32 for every image stays unused.
        shares = shares / use.clamp(min=1e-30)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
    return shares


def koleo(projected: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Return minus the mean log distance to the nearest other row: small if a batch is spread evenly.

    Reference: Sablayrolles et al. (2019), as in DINOv2. Departure: in the space of the prototypes, where a collapse
    to uniform assignments happens, not on the class tokens.

    Args:
        projected: rows of length 1, at least two.
    """
    with torch.no_grad():
        nearest = (projected @ projected.T).fill_diagonal_(-2).argmax(1)
    # For equal rows the gradient of the distance is undefined; its epsilon makes it finite.
    return -F.pairwise_distance(projected, projected[nearest], eps=1e-6).log().mean()


def is_distributed() -> bool:
    """Return whether several workers train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_workers(tensor: Tensor) -> None:
    if is_distributed():
        torch.distributed.all_reduce(tensor)


def entropy(probabilities: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """Return the entropy of each row, nats."""
    nats: Tensor = torch.special.entr(probabilities).sum(-1)
    return nats
