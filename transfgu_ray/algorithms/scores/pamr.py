"""Pixel-adaptive mask refinement: class probabilities flow between neighbours of similar colour."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

NUM_ITERATIONS = 10
DILATIONS = (1, 2, 4, 8, 12, 24)
# Colour differences count in units of this many local standard deviations.
_SHARPNESS = 0.1
_AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
_NEIGHBOURS = [(d * dy, d * dx) for d in DILATIONS for dy, dx in _AROUND if (dy, dx) != (0, 0)]


def refined_argmax(maps: Float[Tensor, "k h w"], image: UInt8[Tensor, "3 y x"]) -> Int64[Tensor, "y x"]:
    """Return each pixel's class from logits on the patch grid: softmax, bilinear upsampling, refinement, argmax."""
    probabilities = functional.interpolate(
        maps.float().softmax(0)[None], image.shape[1:], mode="bilinear", align_corners=False
    )[0]
    return refine(probabilities, image.float() / 255).argmax(0)


def refine(masks: Float[Tensor, "k y x"], image: Float[Tensor, "3 y x"]) -> Float[Tensor, "k y x"]:
    """Average masks NUM_ITERATIONS times over the neighbours of each pixel, weighted by similarity of colour.

    Reference: Araslanov and Roth, "Single-stage semantic segmentation from image labels", CVPR 2020 (PAMR),
    with the iterations and dilations of its code. Departures: run at the scored size, not at the decoder's.
    """
    weights = colour_affinities(image)
    for _ in range(NUM_ITERATIONS):
        # One neighbour at a time, since all 48 shifted stacks of K masks would not fit in memory.
        flowed = torch.zeros_like(masks)
        for weight, shifted in zip(weights, _shifted(masks, _NEIGHBOURS), strict=True):
            flowed.addcmul_(shifted, weight)
        masks = flowed
    return masks


def colour_affinities(image: Float[Tensor, "3 y x"]) -> Float[Tensor, "n y x"]:
    """Return the weights of each pixel's neighbours, which sum to 1: softmax of their negated colour distances.

    A distance is divided by the standard deviation of the colour around the pixel, then averaged over the channels.
    """
    around = [(d * dy, d * dx) for d in DILATIONS for dy, dx in _AROUND]
    deviation = torch.stack(list(_shifted(image, around))).std(0)
    scale = 1e-8 + _SHARPNESS * deviation
    distances = [((image - shifted).abs() / scale).mean(0) for shifted in _shifted(image, _NEIGHBOURS)]
    return (-torch.stack(distances)).softmax(0)


def _shifted(maps: Tensor, offsets: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield the maps shifted by each (dy, dx), with border pixels repeated outside."""
    margin = max(DILATIONS)
    height, width = maps.shape[1:]
    padded = functional.pad(maps[None], [margin] * 4, mode="replicate")[0]
    for dy, dx in offsets:
        yield padded[:, margin + dy : margin + dy + height, margin + dx : margin + dx + width]
