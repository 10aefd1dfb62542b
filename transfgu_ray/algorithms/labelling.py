"""Pseudo-labels of a batch of images, start to end: one encoder forward, then Eq. 4-7, normalisation, exclusion."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.cam import response_maps
from transfgu_ray.algorithms.encoder import Encoder, above_mean
from transfgu_ray.algorithms.pseudo_labels import exclude, normalise


@dataclass(frozen=True)
class Labeller:
    """Fixed parts of labelling.

    Attributes:
        encoder: the semantic prior model.
        centroids: one row a concept, on the encoder's device.
        is_background: which concepts are background; None switches exclusion off.
        foreground_prior: see `Encoder.saliency`; "all" takes every patch as foreground.
        gradient_scale: factor on the gradient.
        keep_mass: share of a CAM's mass that is kept; None keeps all.
    """

    encoder: Encoder
    centroids: Float[Tensor, "k d"]
    is_background: Bool[Tensor, " k"] | None
    foreground_prior: str
    gradient_scale: float
    keep_mass: float | None

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b k h w"], Bool[Tensor, "b h w"]]:
        """Scores in [0, 1] of all K concepts and the foreground mask, on the patch grid."""
        grid_hw = self.encoder.grid_hw((images.shape[2], images.shape[3]))
        tokens = self.encoder.prefix(images)
        row = self.encoder.class_row(tokens)
        scores = normalise(
            response_maps(self.encoder, row, self.centroids, grid_hw, self.gradient_scale, self.keep_mass)
        )
        if self.foreground_prior == "all":
            foreground = torch.ones_like(scores[:, 0], dtype=torch.bool)
        else:
            foreground = above_mean(self.encoder.saliency(tokens, row, grid_hw, self.foreground_prior))
        if self.is_background is not None:
            scores = exclude(scores, foreground, self.is_background)
        return scores, foreground
