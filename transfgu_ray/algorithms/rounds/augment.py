"""Joint augmentation of a photograph and its score maps (4.2 Data Augmentation), from explicit generators."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as transforms

# Sides of crops are drawn in tenths of the photograph's (released).
_SIDE_STEPS = 10
# Side of the blur's kernel in px (released).
_BLUR_KERNEL = 3


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Probabilities and ranges; see `AugmentConfig`."""

    crop: str
    crop_scale: tuple[float, float]
    flip_prob: float
    jitter_prob: float
    grey_prob: float
    blur_prob: float


def augment(
    image: UInt8[Tensor, "3 y x"],
    scores: Float[Tensor, "k h w"],
    *,
    crop_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    how: Augmentation,
    rng: np.random.Generator,
    colour_rng: np.random.Generator,
) -> tuple[UInt8[Tensor, "3 crop_y crop_x"], Float[Tensor, "k grid_h grid_w"]]:
    """Recolour an image at random, cut a random crop from it and its scores, resize it, and flip both at random.

    Args:
        image: working image, RGB 0-255.
        scores: score maps of the same image, on any grid.
        crop_hw: size of the crop in px; resized bilinearly without antialias (released).
        grid_hw: patch grid of the crop; RoIAlign resamples the scores to it.
        how: probabilities and ranges.
        rng: of crop and flip.
        colour_rng: of the colours; where photographs share them, its state must be the same for each.
    """
    height, width = image.shape[1], image.shape[2]
    top, left, h, w = random_crop_box(height, width, how=how, rng=rng)
    pixels = recolour(image.float() / 255, how, colour_rng)
    window = pixels[None, :, top : top + h, left : left + w]
    crop = interpolate(window, crop_hw, mode="bilinear", align_corners=False)[0]
    cropped = crop_maps(scores, (left, top, left + w, top + h), image_hw=(height, width), grid_hw=grid_hw)
    if rng.random() < how.flip_prob:
        crop, cropped = crop.flip(-1), cropped.flip(-1)
    return to_bytes(crop), cropped


def to_bytes(pixels: Float[Tensor, "3 y x"]) -> UInt8[Tensor, "3 y x"]:
    """Return RGB 0-1 as RGB 0-255, rounded."""
    return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)


def recolour(image: Float[Tensor, "3 y x"], how: Augmentation, rng: np.random.Generator) -> Float[Tensor, "3 y x"]:
    """Apply colour jitter, greyscale and blur (sigma 1 to 2 px) to RGB 0-1, each at random; no pixel moves."""
    if rng.random() < how.jitter_prob:
        image = _jitter(image, rng)
    if rng.random() < how.grey_prob:
        image = transforms.rgb_to_grayscale(image, num_output_channels=3)
    if rng.random() < how.blur_prob:
        sigma = rng.uniform(1.0, 2.0)
        image = transforms.gaussian_blur(image, kernel_size=[_BLUR_KERNEL] * 2, sigma=[sigma, sigma])
    return image


def random_crop_box(
    height: int, width: int, *, how: Augmentation, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the (top, left, height, width) in px of a crop.

    "side": of the image's shape; its sides are a share of the image's, drawn from `how.crop_scale` in steps of 0.1
    without the upper end (released code). "area": an area share in `how.crop_scale` and a ratio of 3/4 to 4/3 (Szegedy
    et al., 2015, as in torchvision's RandomResizedCrop; after ten misses, the whole image).
    """
    low, high = how.crop_scale
    if how.crop == "side":
        first, end = (round(share * _SIDE_STEPS) for share in (low, high))
        # Where both ends are the same step it is all there is.
        share = rng.integers(first, max(end, first + 1)) / _SIDE_STEPS
        h, w = (int(np.float32(share) * np.float32(side)) for side in (height, width))
        return int((height - h) * rng.random()), int((width - w) * rng.random()), h, w
    for _ in range(10):
        area = height * width * rng.uniform(low, high)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width


def crop_maps(
    maps: Float[Tensor, "k h w"],
    box_xyxy: tuple[int, int, int, int],
    *,
    image_hw: tuple[int, int],
    grid_hw: tuple[int, int],
) -> Float[Tensor, "k grid_h grid_w"]:
    """Cut maps to a box of the image, resampled to a patch grid by RoIAlign (He et al., 2017)."""
    scale_y, scale_x = maps.shape[1] / image_hw[0], maps.shape[2] / image_hw[1]
    x0, y0, x1, y1 = box_xyxy
    box = torch.tensor([[0, x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y]], dtype=maps.dtype)
    cropped: Tensor = roi_align(maps.unsqueeze(0), box, output_size=grid_hw, aligned=True)[0]
    return cropped


def _jitter(image: Float[Tensor, "3 y x"], rng: np.random.Generator) -> Float[Tensor, "3 y x"]:
    # Strengths 0.8, 0.8, 0.8 and 0.2, in random order (released code).
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: transforms.adjust_brightness(x, rng.uniform(0.2, 1.8)),
        lambda x: transforms.adjust_contrast(x, rng.uniform(0.2, 1.8)),
        lambda x: transforms.adjust_saturation(x, rng.uniform(0.2, 1.8)),
        lambda x: transforms.adjust_hue(x, rng.uniform(-0.2, 0.2)),
    ]
    for i in rng.permutation(4):
        image = steps[i](image)
    return image
