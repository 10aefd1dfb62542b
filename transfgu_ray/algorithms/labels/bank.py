"""From response maps to the pseudo-label bank and back (Eq. 8, exclusion, stored form)."""

import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor

# Code of the concepts that win a patch. With 64 codes an image takes 100 to 115 kB at K = 171 on 40 x 40 patches, and
# the target changes on fewer than 0.5 % of the patches when a trained teacher is added.
_TOP_CODE = 63
# Smallest positive float16.
_SMALLEST_HALF = 2.0**-24


def normalise(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """Scale the whole K x h x w block of each image to [0, 1] (min-max); a constant block becomes 0."""
    low = maps.amin((1, 2, 3), keepdim=True)
    span = maps.amax((1, 2, 3), keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, 1.0)


def exclude(
    scores: Float[Tensor, "b k h w"], foreground: Bool[Tensor, "b h w"], is_background: Bool[Tensor, " k"]
) -> Float[Tensor, "b k h w"]:
    """Zero the scores of foreground patches on background concepts, and the other way round (4.2)."""
    keeps = foreground.unsqueeze(1) != is_background.view(1, -1, 1, 1)
    return scores * keeps


def add_background(scores: Float[Tensor, "*b k h w"], threshold: float) -> Float[Tensor, "*b k1 h w"]:
    """Append the background channel relu(T_bg - max_k) as the last one (Eq. 8)."""
    background = (threshold - scores.amax(-3, keepdim=True)).clamp(min=0)
    return torch.cat([scores, background], dim=-3)


def training_scores(maps: Float[Tensor, "b k h w"], background_threshold: float | None) -> Float[Tensor, "b _ h w"]:
    """Return the scores that training sees: each crop normalised on its own, and only then its background of Eq. 8.

    Args:
        maps: response maps of crops, on any scale.
        background_threshold: T_bg; None = no background.

    Reference: `things_bootstrap_loss` and `thingstuff_bootstrap_loss` of the released code. Departures: none.
    """
    scores = normalise(maps)
    return scores if background_threshold is None else add_background(scores, background_threshold)


def encode_scores(
    scores: Float[Tensor, "b k h w"],
) -> tuple[UInt8[Tensor, "b k h w"], Float16[Tensor, "b h w"], Float16[Tensor, "b h w"]]:
    """Encode scores in [0, 1] for storage: one code per concept and patch, and each patch's range as float16.

    Code 0 is a score of 0; code c >= 1 is low + sqrt((c - 1) / 62) * (high - low), where low is the patch's lowest
    positive score and high its highest. Only a patch's winners (more than one where scores are equal) have code 63, so
    the argmax, the first of them, is exact. The square root spends the codes on the concepts that can win once the
    teacher is added: most maps lie at a patch's floor, the attention that all concepts share.

    Returns:
        Codes, low, high.
    """
    # ceil gives 0.0 for 0 and 1.0 above it, in a fraction of a comparison's time.
    positive = scores.ceil()
    lowest = torch.sub(scores, positive, alpha=2).add_(2).amin(1)
    low = torch.where(lowest > 1, 0.0, lowest).half()
    winning = scores.amax(1, keepdim=True)
    high = winning.squeeze(1).half()
    # Positive float16 order like their bits. Where rounding leaves no range, the floor goes down by one step.
    bits = torch.where(winning.squeeze(1) > 0, high.view(torch.int16).clamp(min=1), 0).to(torch.int16)
    high = bits.view(torch.float16)
    low = torch.minimum(low.view(torch.int16), (bits - 1).clamp(min=0)).view(torch.float16)
    floor, span = low.float().unsqueeze(1), (high.float() - low.float()).unsqueeze(1)
    shares = (scores - floor).div_(span.clamp(min=_SMALLEST_HALF)).clamp_(0, 1)
    codes = shares.square_().mul_(_TOP_CODE - 1).round_().add_(1).clamp_(max=_TOP_CODE - 1).mul_(positive)
    return codes.to(torch.uint8).masked_fill_(scores == winning, _TOP_CODE), low, high


def decode_scores(
    codes: UInt8[Tensor, "*b k h w"], low: Float16[Tensor, "*b h w"], high: Float16[Tensor, "*b h w"]
) -> Float32[Tensor, "*b k h w"]:
    """Invert `encode_scores`, to within 1/8 of a patch's range at its floor and 1/124 of it at its top."""
    floor, span = low.float().unsqueeze(-3), (high.float() - low.float()).unsqueeze(-3)
    steps = codes.float()
    positive = steps.clamp(max=1)
    return steps.sub_(positive).div_(_TOP_CODE - 1).sqrt_().mul_(span).add_(positive.mul_(floor))
