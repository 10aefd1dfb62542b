"""From class maps on the patch grid to a mask of any size."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def upsample_argmax(maps: Float[Tensor, "k h w"], size_hw: tuple[int, int]) -> Int64[Tensor, "y x"]:
    """Class of each pixel: bilinear upsampling, then argmax over K, the lowest class on ties.

    One class is upsampled at a time, so memory is bounded by two maps of the target size whatever K is.
    """
    best = torch.full(size_hw, -torch.inf, device=maps.device)
    winner = torch.zeros(size_hw, dtype=torch.int64, device=maps.device)
    for class_id, small in enumerate(maps.float()):
        large = functional.interpolate(small[None, None], size_hw, mode="bilinear", align_corners=False)[0, 0]
        better = large > best
        best = torch.where(better, large, best)
        winner[better] = class_id
    return winner
