"""Response maps by votes of sliding windows, for small encoders whose class token says little of patches (ours)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from transfgu_ray.algorithms.concepts.windows import enumerate_windows, window_shares
from transfgu_ray.algorithms.encoder.vit import ClassRow, Encoder

# Bounds memory, however many windows an image has.
_WINDOWS_PER_FORWARD = 64


@dataclass(frozen=True, kw_only=True)
class WindowVotes:
    """Maps of the share of the windows over each patch that vote for each concept.

    Attributes:
        encoder: embeds the windows.
        centroids: one row per concept, on the encoder's device.
        is_background: which concepts are background; None where there is one group.
        window_fracs: sides of the windows, as shares of the image's shorter side.
        crop_size: side in px to which a window is resized.
    """

    encoder: Encoder
    centroids: Float[Tensor, "k d"]
    is_background: Bool[Tensor, " k"] | None
    window_fracs: tuple[float, ...]
    crop_size: int

    def __call__(
        self, images: UInt8[Tensor, "b 3 y x"], row: ClassRow, grid_hw: tuple[int, int]
    ) -> Float[Tensor, "b k h w"]:
        """Return the maps of some images; see `labeller.Response`."""
        return torch.stack([self._votes(image, grid_hw) for image in images])

    def _votes(self, image: UInt8[Tensor, "3 y x"], grid_hw: tuple[int, int]) -> Float[Tensor, "k h w"]:
        """Return the maps of one image.

        A window votes for the nearest concept of each group. Departures: ours. It votes in both the foreground and the
        background group, since the foreground mask decides between the groups, patch by patch.
        """
        boxes, _ = enumerate_windows(image.shape[1], image.shape[2], self.window_fracs)
        crops = torch.stack(
            [
                resize(image[:, y0:y1, x0:x1], [self.crop_size] * 2, InterpolationMode.BICUBIC, antialias=True)
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
