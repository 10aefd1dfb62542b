"""The nearest centroids of many points by torch, exact and on any device: what FAISS needs a build of its own for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

# Centroids that are compared at once, so that the distances of a block of points take at most 128 MB.
CHUNK = 4096


class TorchCentroids:
    """Centroids on a device.

    Args:
        centroids: of all clusters.
        device: of torch.
    """

    def __init__(self, centroids: Float32[np.ndarray, "k d"], device: str) -> None:
        self._centroids = torch.from_numpy(np.array(centroids)).to(device)
        self._squares = self._centroids.square().sum(1)

    @torch.inference_mode()
    def nearest(self, points: Float[Tensor, "n d"]) -> tuple[Float32[Tensor, " n"], Int64[Tensor, " n"]]:
        """Return the squared distance to each point's nearest centroid, and its index, the lowest if several are.

        Products are made in float32, whatever the process allows elsewhere. Their last bits depend on the number of
        points, as with FAISS.

        Args:
            points: on the same device.
        """
        points = points.float()
        lowest = torch.full((len(points),), torch.inf, device=points.device)
        assigned = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        with _full_float32():
            for first in range(0, len(self._centroids), CHUNK):
                chunk = slice(first, first + CHUNK)
                # The square of the point is the same for all centroids.
                distance, index = torch.addmm(self._squares[chunk], points, self._centroids[chunk].T, alpha=-2.0).min(1)
                is_nearer = distance < lowest
                lowest = torch.where(is_nearer, distance, lowest)
                assigned = torch.where(is_nearer, first + index, assigned)
        return (lowest + points.square().sum(1)).clamp(min=0.0), assigned


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch TF32 off, which keeps 10 bits of a factor."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9, which refuses to read the older switch where somebody has set the newer one.
    switch = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, switch)
    setattr(matmul, switch, "ieee" if switch == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(matmul, switch, before)
