"""The network of DINO: backbone and projection head."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu_ray.algorithms.encoder.blocks import MODELS, embed_patches, run_blocks


class DinoHead(nn.Module):
    """Three layers, an L2 norm and unit-length prototypes (DINO's weight-normalised layer with a fixed norm)."""

    def __init__(self, embed_dim: int, hidden_dim: int, *, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        scale_linear_weights(self.mlp)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim) / math.sqrt(bottleneck_dim))

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n p"]:
        """Return the cosine of each projected token with each prototype, in [-1, 1]."""
        return self.compare(self.project(tokens))

    def project(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Project tokens to unit length in the space of the prototypes."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def compare(self, projected: Float[Tensor, "*n e"]) -> Float[Tensor, "*n p"]:
        """Return the cosine of each projected token with each prototype."""
        return F.linear(projected, F.normalize(self.prototypes, dim=-1))


def scale_linear_weights(module: nn.Module) -> None:
    """Set Xavier-uniform weights and zero biases in every linear layer.

    timm draws weights with a deviation of 0.02, which suits a width of several hundred; in a narrow network they pass
    on so little of the image that all class tokens start alike.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Outputs(NamedTuple):
    """The network's outputs for batches of views.

    Attributes:
        classes: logits of each batch's class tokens.
        patches: logits of the selected patches of the first batch; None if none were selected.
        projected: class tokens of the first batch in the space of the prototypes, of unit length.
    """

    classes: list[Float[Tensor, "_ p"]]
    patches: Float[Tensor, "m p"] | None
    projected: Float[Tensor, "_ e"]


class DinoNetwork(nn.Module):
    """Backbone and head; called once per step, so that data-parallel gradients are averaged once.

    Args:
        vit: timm vision transformer without a head, made with `dynamic_img_size=True`.
        head: projection, shared by class and patch tokens as in iBOT.
        masked: whether the network accepts masks.
        mean: RGB mean of the normalisation, in [0, 1].
        std: RGB deviation of the normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, vit: nn.Module, head: DinoHead, *, masked: bool, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        assert isinstance(vit, MODELS), f"{type(vit).__name__} is not a vision transformer"
        self.vit, self.head = vit, head
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim)) if masked else None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        views: list[Float[Tensor, "_ 3 _ _"]],
        masks: Bool[Tensor, "_ h w"] | None = None,
        select: Bool[Tensor, "_ h w"] | None = None,
    ) -> Outputs:
        """Return class-token logits of every batch of views, and patch logits of the first at the selected places.

        Args:
            views: batches of equal-sized views, RGB in [0, 1].
            masks: patches of the first batch that the mask token replaces.
            select: patches of the first batch whose logits are wanted.
        """
        classes, patches = [], None
        for number, view in enumerate(views):
            tokens = self.tokens(view, masks if number == 0 else None)
            classes.append(tokens[:, 0])
            if number == 0 and select is not None:
                patches = self.head(tokens[:, self.vit.num_prefix_tokens :][select.flatten(1)])
        projected = self.head.project(torch.cat(classes))
        logits = torch.split(self.head.compare(projected), [len(c) for c in classes])
        return Outputs(list(logits), patches, projected[: len(views[0])])

    def tokens(
        self, view: Float[Tensor, "b 3 y x"], mask: Bool[Tensor, "b h w"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the final normalised tokens, prefix first, of RGB images in [0, 1]."""
        vit = self.vit
        embedded = vit.patch_embed((view - self.mean) / self.std)
        if mask is not None:
            assert self.mask_token is not None, "masks need masked=True"
            embedded = torch.where(mask[..., None], self.mask_token.to(embedded.dtype), embedded)
        grid_hw = (embedded.shape[1], embedded.shape[2])
        tokens: Tensor = vit.norm(run_blocks(vit, embed_patches(vit, embedded), grid_hw=grid_hw))
        return tokens
