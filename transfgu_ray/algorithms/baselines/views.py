"""Two views of the same places in a photograph, for baselines that learn to ignore what changes between views."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.rounds.augment import Augmentation, augment, recolour, to_bytes

# The settings of TransFGU's released training, but each view has colours of its own.
VIEWS = Augmentation(
    crop="side",
    crop_scale=(0.4, 1.0),
    flip_prob=0.5,
    jitter_prob=0.3,
    grey_prob=0.2,
    blur_prob=0.2,
)


def token_views(
    encoder: Encoder, images: UInt8[Tensor, "b 3 y x"], rngs: Sequence[np.random.Generator]
) -> tuple[Float[Tensor, "b hw d"], Float[Tensor, "b hw d"]]:
    """Return the patch tokens of the same places in two views of each image, row by row, on the CPU.

    Each view is recoloured at random. The first holds the tokens of a random crop, resized to the image's size and
    flipped at random; the second cuts the same crop from the tokens of the whole image (RoIAlign).

    Reference: PiCIE (Cho, Mall, Bala and Hariharan, CVPR 2021, 3.3): features of the transformed image, and transformed
    features of the image. Departures: probabilities and strengths are those of TransFGU's training.

    Args:
        encoder: frozen.
        images: RGB in 0-255, on the CPU.
        rngs: one per image, so that its views do not depend on the other images.
    """
    height, width = images.shape[2:]
    grid_hw = encoder.grid_hw((height, width))
    whole = torch.stack([to_bytes(recolour(i / 255, VIEWS, rng)) for i, rng in zip(images, rngs, strict=True)])
    maps = torch.unflatten(encoder.patch_tokens(whole.to(encoder.device)).cpu().transpose(1, 2), 2, grid_hw)
    pairs = [
        augment(image, tokens, crop_hw=(height, width), grid_hw=grid_hw, how=VIEWS, rng=rng, colour_rng=rng)
        for image, tokens, rng in zip(images, maps, rngs, strict=True)
    ]
    first = encoder.patch_tokens(torch.stack([crop for crop, _ in pairs]).to(encoder.device)).cpu()
    return first, torch.stack([cropped for _, cropped in pairs]).flatten(2).transpose(1, 2)
