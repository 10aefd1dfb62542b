"""Pseudo-labels of a batch of images, end to end: response maps (Eq. 4-7, or windows), normalisation, exclusion."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from transfgu_ray.algorithms.concepts.windows import enumerate_windows, window_shares
from transfgu_ray.algorithms.encoder.vit import Encoder, above_mean
from transfgu_ray.algorithms.labels.bank import exclude, normalise
from transfgu_ray.algorithms.labels.cam import response_maps

# Bounds memory, however many windows an image has.
_WINDOWS_PER_FORWARD = 64


@dataclass(frozen=True)
class Labeller:
    """A labeller of images; its attributes are the same for every batch.

    Attributes:
        encoder: the semantic prior model.
        centroids: one row per concept, on the encoder's device.
        is_background: which concepts are background; None switches exclusion off.
        foreground_prior: see `Encoder.saliency`; "all" takes every patch as foreground.
        gradient_scale: factor on the gradient.
        keep_mass: share of a CAM's mass to keep; None keeps all.
        windows: sides of the windows whose class tokens vote, as shares of the image's shorter side, and the side in
            px to which each is resized; None uses the maps of the gradient (Eq. 5-7).
    """

    encoder: Encoder
    centroids: Float[Tensor, "k d"]
    is_background: Bool[Tensor, " k"] | None
    foreground_prior: str
    gradient_scale: float
    keep_mass: float | None
    windows: tuple[tuple[float, ...], int] | None = None

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b k h w"], Bool[Tensor, "b h w"]]:
        """Return the scores in [0, 1] of all K concepts and the foreground mask, on the patch grid."""
        grid_hw = self.encoder.grid_hw((images.shape[2], images.shape[3]))
        tokens = self.encoder.prefix(images)
        row = self.encoder.class_row(tokens, grid_hw)
        if self.windows is None:
            maps = response_maps(
                self.encoder,
                row,
                centroids=self.centroids,
                grid_hw=grid_hw,
                gradient_scale=self.gradient_scale,
                keep_mass=self.keep_mass,
            )
        else:
            window_fracs, crop_size = self.windows
            votes = [self._window_votes(i, grid_hw, window_fracs=window_fracs, crop_size=crop_size) for i in images]
            maps = torch.stack(votes)
        scores = normalise(maps)
        if self.foreground_prior == "all":
            foreground = torch.ones_like(scores[:, 0], dtype=torch.bool)
        else:
            foreground = above_mean(self.encoder.saliency(tokens, row, grid_hw=grid_hw, prior=self.foreground_prior))
        if self.is_background is not None:
            scores = exclude(scores, foreground, self.is_background)
        return scores, foreground

    def _window_votes(
        self,
        image: UInt8[Tensor, "3 y x"],
        grid_hw: tuple[int, int],
        *,
        window_fracs: tuple[float, ...],
        crop_size: int,
    ) -> Float[Tensor, "k h w"]:
        """Return, for each patch and concept, the share of the windows over the patch that vote for the concept.

        A window votes for the nearest concept of each group. Departures: ours. It votes in both the foreground and the
        background group, since the foreground mask decides between the groups, patch by patch.
        """
        boxes, _ = enumerate_windows(image.shape[1], image.shape[2], window_fracs)
        crops = torch.stack(
            [
                resize(image[:, y0:y1, x0:x1], [crop_size] * 2, InterpolationMode.BICUBIC, antialias=True)
                for x0, y0, x1, y1 in boxes.tolist()
            ]
        )
        tokens = torch.cat([self.encoder.cls_tokens(part) for part in torch.split(crops, _WINDOWS_PER_FORWARD)])
        distances = torch.cdist(tokens, self.centroids)
        background = torch.zeros_like(self.centroids[:, 0], dtype=torch.bool)
        if self.is_background is not None:
            background = self.is_background
        votes = torch.zeros_like(distances)
        for group in (~background, background):
            # With things alone there are no background concepts, and an empty group has no nearest one.
            if not group.any():
                continue
            chosen = distances.masked_fill(~group, torch.inf).argmin(1, keepdim=True)
            votes.scatter_(1, chosen, 1.0)
        shares = torch.from_numpy(window_shares(boxes, grid_hw, self.encoder.patch_size))
        return torch.einsum("nk,nhw->khw", votes, shares.to(votes.device))
