"""Masks and probabilities of any size from class maps on the patch grid, and class maps of large images."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

_WINDOWS_PER_BATCH = 4


def upsample_argmax(maps: Float[Tensor, "k h w"], size_hw: tuple[int, int]) -> Int64[Tensor, "y x"]:
    """Return the class of each pixel: bilinear upsampling, then argmax over K, the lowest class on ties.

    One class is upsampled at a time, so memory is bounded by two maps of the target size, whatever K is.
    """
    best = torch.full(size_hw, -torch.inf, device=maps.device)
    winner = torch.zeros(size_hw, dtype=torch.int64, device=maps.device)
    for class_id, small in enumerate(maps.float()):
        large = _upsample(small, size_hw)
        better = large > best
        best = torch.where(better, large, best)
        winner[better] = class_id
    return winner


def upsample_probabilities(
    maps: Float[Tensor, "k h w"], size_hw: tuple[int, int], groups: Iterable[Sequence[int]]
) -> Iterator[UInt8[Tensor, "y x"]]:
    """Yield, for each group of classes, its summed probability in 0-255: softmax over K of bilinearly upsampled logits.

    Two passes over the classes bound memory by a few maps of the target size, whatever K is.
    """
    total = torch.full(size_hw, -torch.inf, device=maps.device)
    for small in maps.float():
        total = torch.logaddexp(total, _upsample(small, size_hw))
    for group in groups:
        share = torch.zeros(size_hw, device=maps.device)
        for class_id in group:
            share = share + (_upsample(maps[class_id].float(), size_hw) - total).exp()
        yield (255 * share).round().to(torch.uint8)


def _upsample(small: Float[Tensor, "h w"], size_hw: tuple[int, int]) -> Float[Tensor, "y x"]:
    return functional.interpolate(small[None, None], size_hw, mode="bilinear", align_corners=False)[0, 0]


def slide(
    class_maps: Callable[[Tensor], Tensor],
    image: UInt8[Tensor, "3 y x"],
    *,
    window_hw: tuple[int, int],
    patch_size: int,
) -> Float[Tensor, "k h w"]:
    """Return class maps of an image of any size: the mean of the windows over each patch, half a side apart.

    Args:
        class_maps: returns logits (b, k, h, w) of windows (b, 3, y, x).
        image: sides are multiples of the patch and no shorter than the window's.
        window_hw: height and width of a window, px.
        patch_size: side of a patch, px.
    """
    height, width = image.shape[1:]
    grid_h, grid_w = (side // patch_size for side in window_hw)
    tops, lefts = _starts(height, window_hw[0], patch_size), _starts(width, window_hw[1], patch_size)
    corners = list(itertools.product(tops, lefts))
    total, count = torch.zeros(0), torch.zeros(height // patch_size, width // patch_size, device=image.device)
    for first in range(0, len(corners), _WINDOWS_PER_BATCH):
        batch = corners[first : first + _WINDOWS_PER_BATCH]
        maps = class_maps(torch.stack([image[:, y : y + window_hw[0], x : x + window_hw[1]] for y, x in batch]))
        if not first:
            total = torch.zeros(maps.shape[1], *count.shape, device=image.device)
        for window, (y, x) in zip(maps, batch, strict=True):
            rows, columns = (
                slice(y // patch_size, y // patch_size + grid_h),
                slice(x // patch_size, x // patch_size + grid_w),
            )
            total[:, rows, columns] += window
            count[rows, columns] += 1
    return total / count


def _starts(length: int, window: int, patch_size: int) -> list[int]:
    """Return starts at whole patches, so that all windows share a patch grid; the last is flush with the edge."""
    step = max(window // 2 // patch_size, 1) * patch_size
    return [*range(0, length - window, step), length - window]
