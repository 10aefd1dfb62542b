"""The schedule of bootstrapping rounds (3.3) and the order of samples, as pure functions of their arguments."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

# Rise of alpha per epoch when each round restarts it (released code).
_ALPHA_STEP = 0.01


@dataclass(frozen=True)
class Epoch:
    """One epoch of the schedule.

    Attributes:
        index: epoch since the start of training, from 0.
        round: bootstrapping round; 0 has no teacher.
        starts_round: whether, before this epoch, the teacher becomes a copy of the student and the student restarts.
        alpha: weight of the peer loss.
    """

    index: int
    round: int
    starts_round: bool
    alpha: float


def schedule(round_epochs: Sequence[int], alpha: tuple[float, float], alpha_schedule: str = "linear") -> list[Epoch]:
    """Return all epochs in order.

    Args:
        round_epochs: epochs of each round.
        alpha: first and last weight of the peer loss.
        alpha_schedule: "linear": from the first to the last epoch (supplement, Training Details); "restart": each
            round begins at alpha[0] and rises by 0.01 per epoch, up to alpha[1] (released code).
    """
    low, high = alpha
    total = sum(round_epochs)
    epochs: list[Epoch] = []
    for number, length in enumerate(round_epochs):
        for i in range(length):
            index = len(epochs)
            share = index / (total - 1) if total > 1 else 0.0
            weight = low + (high - low) * share if alpha_schedule == "linear" else min(low + _ALPHA_STEP * i, high)
            epochs.append(Epoch(index, number, number > 0 and i == 0, weight))
    return epochs


def steps_per_epoch(num_visits: int, batch_size: int, *, world_size: int, last_batch: str) -> tuple[int, int]:
    """Return (steps, images per worker and step) of an epoch, at least one of each.

    The batch is limited to the number of visits and rounded down to whole images per worker.

    Args:
        num_visits: images in an epoch, repeats included.
        batch_size: images per step over all workers.
        world_size: workers.
        last_batch: what becomes of visits that do not fill a step: "drop" = they are left out (released), "fill" = one
            more step, filled from the start of the epoch.
    """
    per_worker = max(1, min(batch_size, num_visits) // world_size)
    whole, rest = divmod(num_visits, per_worker * world_size)
    return max(1, whole + (rest > 0 and last_batch == "fill")), per_worker


def sample_order(
    seed: int, epoch: int, *, num_images: int, repeats: int, steps: int, per_worker: int, world_size: int
) -> Int64[np.ndarray, "world steps batch"]:
    """Return the image indices of every worker and step, from one permutation of all visits.

    Visits that do not fill a step are left out; where steps need more, they begin again. The result depends on the
    arguments alone, so a resumed epoch sees the same images.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images * repeats) % num_images
    return np.resize(order, (steps, world_size, per_worker)).transpose(1, 0, 2).astype(np.int64)
