"""Measures of what a self-supervised encoder has learned, without training anything."""

import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F


def knn_accuracy(
    bank: Float[Tensor, "n d"],
    bank_labels: Integer[Tensor, " n"],
    *,
    queries: Float[Tensor, "m d"],
    query_labels: Integer[Tensor, " m"],
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the top-1 accuracy in [0, 1] of the weighted nearest-neighbour vote (Wu et al. 2018, as in DINO).

    Args:
        bank: class tokens of labelled images; at least one.
        bank_labels: their classes, from 0.
        queries: class tokens of other images.
        query_labels: their classes.
        num_neighbours: voters; the whole bank if it is smaller.
        temperature: votes weigh exp(cosine / temperature).
    """
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    hits = 0
    # In blocks, so that memory does not grow with the number of queries.
    for some, labels in zip(torch.split(queries, 1024), torch.split(query_labels, 1024), strict=True):
        cosines, rows = (some @ bank.T).topk(min(num_neighbours, len(bank)))
        votes = torch.zeros(len(some), num_classes, device=some.device)
        votes.scatter_add_(1, bank_labels[rows].long(), (cosines / temperature).exp())
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(queries)


def rank_me(tokens: Float[Tensor, "n d"]) -> float:
    """Return the effective rank of a set of embeddings, 1 to min(n, d) (RankMe, Garrido et al. 2023, Eq. 1).

    It is the exponential of the entropy of the normalised singular values: 1 if all embeddings lie on one line.
    """
    values = torch.linalg.svdvals(tokens.double())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def mask_iou(found: Bool[Tensor, "b h w"], truth: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Return the intersection over union of each pair of masks, in [0, 1]; 0 if both are empty."""
    both, either = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
    return both / either.clamp(min=1)


def collapse_alarms(
    teacher_entropy: float, usage_entropy: float, *, num_prototypes: int, rank: float | None = None
) -> list[str]:
    """Return warnings that self-distillation has collapsed; empty if there is no sign of it.

    Args:
        teacher_entropy: mean entropy of the teacher's assignments, nats.
        usage_entropy: entropy of their mean, nats.
        num_prototypes: its logarithm is the maximum of both entropies.
        rank: `rank_me` of some tokens, if it was computed.
    """
    most, alarms = math.log(num_prototypes), []
    entropies = f"(entropies: teacher {teacher_entropy:.2f}, usage {usage_entropy:.2f} of at most {most:.2f} nats)"
    if usage_entropy < 0.05 * most:
        alarms.append(f"all images fall into one prototype {entropies}")
    elif teacher_entropy > 0.95 * most:
        alarms.append(f"every image is spread over all prototypes {entropies}")
    elif usage_entropy - teacher_entropy < 0.02 * most:
        alarms.append(f"all images are assigned alike {entropies}")
    if rank is not None and rank < 3:
        alarms.append(f"all images have nearly the same embedding (RankMe {rank:.1f})")
    return alarms
