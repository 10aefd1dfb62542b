"""From response maps to the pseudo-label bank and back (Eq. 8, exclusion, stored form)."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def normalise(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """Min-max over the whole K x h x w block of each image, to [0, 1]; a constant block becomes 0."""
    low = maps.amin((1, 2, 3), keepdim=True)
    span = maps.amax((1, 2, 3), keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


def exclude(
    scores: Float[Tensor, "b k h w"], foreground: Bool[Tensor, "b h w"], is_background: Bool[Tensor, " k"]
) -> Float[Tensor, "b k h w"]:
    """Foreground patches score 0 on background concepts, background patches 0 on foreground concepts (4.2)."""
    keeps = foreground.unsqueeze(1) != is_background.view(1, -1, 1, 1)
    return scores * keeps


def add_background(scores: Float[Tensor, "*b k h w"], threshold: float) -> Float[Tensor, "*b k1 h w"]:
    """Scores with the background channel relu(T_bg - max_k) appended last (Eq. 8)."""
    background = (threshold - scores.amax(-3, keepdim=True)).clamp(min=0)
    return torch.cat([scores, background], dim=-3)


def encode_scores(scores: Float[np.ndarray, "k h w"]) -> bytes:
    """The stored form of one image's scores: little-endian float16, concept by concept, row by row.

    Rounding to float16 can tie two concepts of a patch. Where that would change the patch's winner (the first
    concept of maximal score), the tied others go down by one float16 step (from 0, the winner up), so the argmax of
    every patch is exact and scores stay in [0, 1].
    """
    stored = scores.astype("<f2")
    winners = scores.argmax(0)
    for row, column in zip(*np.nonzero(stored.argmax(0) != winners), strict=True):
        patch, winner = stored[:, row, column], winners[row, column]
        if patch[winner] == 0:
            patch[winner] = np.finfo(np.float16).smallest_subnormal
        else:
            tied = (patch == patch[winner]) & (np.arange(len(patch)) != winner)
            patch[tied] = np.nextafter(patch[winner], np.float16(0))
    return stored.tobytes()


def decode_scores(data: bytes, grid_hw: tuple[int, int]) -> Float[np.ndarray, "k h w"]:
    """Inverse of `encode_scores`, as float32."""
    return np.frombuffer(data, "<f2").reshape(-1, *grid_hw).astype(np.float32)


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> bytes:
    """The stored form of a foreground mask: one byte a patch, 0 or 1, row by row."""
    return mask.astype(np.uint8).tobytes()
