"""Training on tokens of whole images instead of the images (ours): stored form and reduced augmentation."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from transfgu_ray.algorithms.rounds.augment import Augmentation, crop_maps, random_crop_box


def encode_tokens(tokens: Float[np.ndarray, "hw c"]) -> bytes:
    """Encode one image's tokens for storage: little-endian float16, patch by patch, row by row."""
    return tokens.astype("<f2").tobytes()


def decode_tokens(data: bytes, grid_hw: tuple[int, int]) -> Float[np.ndarray, "c h w"]:
    """Invert `encode_tokens`; return float32 maps."""
    return np.frombuffer(data, "<f2").reshape(*grid_hw, -1).astype(np.float32).transpose(2, 0, 1)


def augment_tokens(
    tokens: Float[Tensor, "c th tw"],
    scores: Float[Tensor, "k h w"],
    *,
    image_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    how: Augmentation,
    rng: np.random.Generator,
) -> tuple[Float[Tensor, "hw c"], Float[Tensor, "k grid_h grid_w"]]:
    """Cut and flip tokens as `augment`, with the same generator, would cut and flip the image.

    A crop's tokens are resampled from those of the whole image: each still carries context from outside the crop, and a
    flip mirrors their places, not their content.

    Args:
        tokens: of the whole image, as maps.
        scores: score maps of the same image, on any grid.
        image_hw: size in px of the image, in which the box is drawn.
        grid_hw: patch grid of the crop; RoIAlign resamples tokens and scores to it.
        how: of which the crop and the flip are used.
        rng: the only source of randomness.

    Returns:
        Tokens of the crop, row by row, and its scores.
    """
    top, left, height, width = random_crop_box(*image_hw, how=how, rng=rng)
    box = (left, top, left + width, top + height)
    crop, cropped = (
        crop_maps(tokens, box, image_hw=image_hw, grid_hw=grid_hw),
        crop_maps(scores, box, image_hw=image_hw, grid_hw=grid_hw),
    )
    if rng.random() < how.flip_prob:
        crop, cropped = crop.flip(-1), cropped.flip(-1)
    return crop.flatten(1).T, cropped
