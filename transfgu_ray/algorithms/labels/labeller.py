"""Pseudo-labels of a batch of images, end to end: response maps, normalisation, exclusion."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.encoder.vit import ClassRow, Encoder, above_mean
from transfgu_ray.algorithms.labels.bank import exclude, normalise


@runtime_checkable
class Response(Protocol):
    """How much each patch responds to each concept."""

    def __call__(
        self, images: UInt8[Tensor, "b 3 y x"], row: ClassRow, grid_hw: tuple[int, int]
    ) -> Float[Tensor, "b k h w"]:
        """Return maps of any scale, larger where a patch is more likely to show the concept.

        Args:
            images: RGB 0-255.
            row: their class row in the encoder's last block.
            grid_hw: their patch grid.
        """


@dataclass(frozen=True)
class Labeller:
    """A labeller of images; its attributes are the same for every batch.

    Attributes:
        encoder: the semantic prior model.
        response: makes the response maps.
        is_background: which concepts are background; None switches exclusion off.
        foreground_prior: see `Encoder.saliency`; "all" takes every patch as foreground.
    """

    encoder: Encoder
    response: Response
    is_background: Bool[Tensor, " k"] | None
    foreground_prior: str

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b k h w"], Bool[Tensor, "b h w"]]:
        """Return the scores in [0, 1] of all K concepts and the foreground mask, on the patch grid."""
        grid_hw = self.encoder.grid_hw((images.shape[2], images.shape[3]))
        tokens = self.encoder.prefix(images)
        row = self.encoder.class_row(tokens, grid_hw)
        scores = normalise(self.response(images, row, grid_hw))
        if self.foreground_prior == "all":
            foreground = torch.ones_like(scores[:, 0], dtype=torch.bool)
        else:
            foreground = above_mean(self.encoder.saliency(tokens, row, grid_hw=grid_hw, prior=self.foreground_prior))
        if self.is_background is not None:
            scores = exclude(scores, foreground, self.is_background)
        return scores, foreground
