"""Multi-crop augmentation of a whole batch at once (Caron et al. 2020, 2021), from an explicit generator.

torchvision's transforms draw once per call, so a batch would need one call per image and view. Here each image has its
own box, colours and blur, and a view of the batch takes a handful of tensor operations on any device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.ops import roi_align

# ITU-R 601 luma. The other rows complete YIQ: they span the colours at constant luma and give zero for greys.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


@dataclass(frozen=True)
class MultiCrop:
    """Sizes, ranges and probabilities of the views; see `CropsConfig`."""

    global_size: int
    local_size: int
    num_local: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    jitter_prob: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey_prob: float
    blur_probs: tuple[float, float, float]
    solarise_prob: float


def multi_crop(
    images: UInt8[Tensor, "b 3 y x"], how: MultiCrop, rng: np.random.Generator
) -> list[Float[Tensor, "b 3 _ _"]]:
    """Return two global views of every image, then `num_local` local ones; RGB in [0, 1].

    Blur and solarisation differ between the two global views, as in DINO (Caron et al. 2021, appendix).

    Args:
        images: RGB 0-255.
        how: sizes and ranges.
        rng: the only source of randomness.
    """
    pixels = images.float() / 255
    kinds = [
        (how.global_size, how.global_scale, how.blur_probs[0], 0.0),
        (how.global_size, how.global_scale, how.blur_probs[1], how.solarise_prob),
        *[(how.local_size, how.local_scale, how.blur_probs[2], 0.0)] * how.num_local,
    ]
    return [
        _view(pixels, how, size=size, scale=scale, blur_prob=blur, solarise_prob=solarise, rng=rng)
        for size, scale, blur, solarise in kinds
    ]


def _view(
    pixels: Float[Tensor, "b 3 y x"],
    how: MultiCrop,
    *,
    size: int,
    scale: tuple[float, float],
    blur_prob: float,
    solarise_prob: float,
    rng: np.random.Generator,
) -> Float[Tensor, "b 3 size size"]:
    count = len(pixels)
    boxes = torch.from_numpy(random_boxes(count, pixels.shape[2], width=pixels.shape[3], scale=scale, rng=rng)).to(
        pixels
    )
    index = torch.arange(count, device=pixels.device, dtype=pixels.dtype)[:, None]
    view = roi_align(pixels, torch.cat([index, boxes], 1), (size, size), sampling_ratio=2, aligned=True)
    flip = torch.from_numpy(rng.random(count) < 0.5).to(view.device)
    view = torch.where(flip[:, None, None, None], view.flip(-1), view)
    view = _recolour(view, how, rng)
    view = _blur(view, rng.random(count) < blur_prob, rng)
    inverted = torch.from_numpy(rng.random(count) < solarise_prob).to(view.device)[:, None, None, None]
    return torch.where(inverted & (view >= 0.5), 1 - view, view)


def random_boxes(
    count: int, height: int, *, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> Float[np.ndarray, "count 4"]:
    """Draw boxes (x0, y0, x1, y1) in px with an area share in `scale` and an aspect ratio of 3/4 to 4/3.

    All lie inside the image: a box longer than a side of the image is cut to it.
    """
    area = height * width * rng.uniform(*scale, count)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), count))
    box_w, box_h = np.minimum(np.sqrt(area * ratio), width), np.minimum(np.sqrt(area / ratio), height)
    x0, y0 = rng.random(count) * (width - box_w), rng.random(count) * (height - box_h)
    return np.stack([x0, y0, x0 + box_w, y0 + box_h], 1)


def _recolour(view: Float[Tensor, "b 3 y x"], how: MultiCrop, rng: np.random.Generator) -> Float[Tensor, "b 3 y x"]:
    """Change brightness, contrast, saturation and hue in this order, or turn grey: one affine colour map per image."""
    count = len(view)
    active = rng.random(count) < how.jitter_prob

    def factors(strength: float) -> Float[np.ndarray, " b"]:
        return np.where(active, rng.uniform(max(0.0, 1 - strength), 1 + strength, count), 1.0)

    brightness, contrast, saturation = factors(how.brightness), factors(how.contrast), factors(how.saturation)
    saturation = np.where(rng.random(count) < how.grey_prob, 0.0, saturation)
    angle = 2 * np.pi * np.where(active, rng.uniform(-how.hue, how.hue, count), 0.0)
    turn = np.zeros((count, 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * np.sin(angle), saturation * np.sin(angle)
    matrix = np.linalg.inv(_YIQ) @ turn @ _YIQ
    luma = torch.tensor(_LUMA, device=view.device)
    mean = torch.einsum("bcyx,c->b", view, luma) / view[0, 0].numel()
    gain = torch.from_numpy(brightness * contrast).to(view)
    offset = torch.from_numpy(brightness * (1 - contrast)).to(view) * mean
    turned = torch.einsum("bij,bjyx->biyx", torch.from_numpy(matrix).to(view), view)
    # Contrast shrinks towards the mean grey, which the rotation of the hue leaves unchanged.
    return (turned * gain[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1)


def _blur(view: Float[Tensor, "b 3 y x"], chosen: np.ndarray, rng: np.random.Generator) -> Float[Tensor, "b 3 y x"]:
    """Blur the chosen images with a Gaussian; sigma is 0.1 to 2 px at 224 px and in proportion at other sizes."""
    sigma = rng.uniform(0.1, 2.0, len(view)) * view.shape[-1] / 224
    rows = np.flatnonzero(chosen & (sigma > 0.2))
    if not len(rows):
        return view
    reach = int(np.ceil(2 * sigma[rows].max()))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1)[None] / sigma[rows][:, None]) ** 2)
    kernel = torch.from_numpy(taps / taps.sum(1, keepdims=True)).to(view).repeat_interleave(3, 0)[:, None]
    index = torch.from_numpy(rows).to(view.device)
    some = view[index].flatten(0, 1)[None]
    some = torch.nn.functional.pad(some, [reach] * 4, mode="reflect")
    some = torch.nn.functional.conv2d(some, kernel[:, :, None, :], groups=len(kernel))
    some = torch.nn.functional.conv2d(some, kernel[:, :, :, None], groups=len(kernel))
    return view.index_copy(0, index, torch.unflatten(some[0], 0, (-1, 3)))
