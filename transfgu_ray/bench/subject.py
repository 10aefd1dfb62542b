"""Inputs of the benchmark: the encoder of the paper with random weights, which are equally fast, and test images."""

import io

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from transfgu_ray.algorithms.concepts.windows import enumerate_windows
from transfgu_ray.algorithms.encoder.checkpoints import random_vit
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.labels.cam import GradientResponse
from transfgu_ray.algorithms.labels.labeller import Labeller
from transfgu_ray.images import cut_crops, to_working

VIT = "vit_small_patch8_224"
# Side in px of a labelled photograph and of a training crop in the paper.
SIDE = 320


def build_encoder(device: str, precision: str = "float32") -> Encoder:
    """Return a ViT-S/8 initialised from seed 0."""
    return Encoder(random_vit(VIT, {}, seed=0), precision=precision).to(device)


def jpeg_photographs(count: int, size: tuple[int, int] = (500, 375)) -> list[bytes]:
    """Return JPEG files of (width, height) px: smooth random colours under noise."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def working_images(count: int) -> UInt8[Tensor, "b 3 y x"]:
    """Return photographs squashed to squares of `SIDE` px."""
    images = [to_working(Image.open(io.BytesIO(data)), (SIDE, SIDE), "bilinear") for data in jpeg_photographs(count)]
    return torch.from_numpy(np.stack(images))


def window_concepts(encoder: Encoder, count: int) -> Float[Tensor, "k d"]:
    """Return concepts near the class tokens of windows."""
    boxes, _ = enumerate_windows(SIDE, SIDE, (0.5, 0.4))
    crops = torch.from_numpy(
        np.concatenate([cut_crops(image.numpy(), boxes, 64, "bilinear") for image in working_images(4)])
    )
    tokens = torch.cat([encoder.cls_tokens(part.to(encoder.device)) for part in torch.split(crops, 32)]).cpu()
    generator = torch.Generator().manual_seed(0)
    picked = tokens[torch.randint(len(tokens), (count,), generator=generator)]
    return (picked + 0.5 * tokens.std(0) * torch.randn(picked.shape, generator=generator)).to(encoder.device)


def build_labeller(encoder: Encoder, concepts: Float[Tensor, "k d"]) -> Labeller:
    """Return a labeller as in the paper: gradient maps, attention as foreground prior, no exclusion."""
    return Labeller(encoder, GradientResponse(encoder=encoder, centroids=concepts), None, "attention")
