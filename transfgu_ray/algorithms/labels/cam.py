"""Response maps of all K concepts from one encoder forward (Eq. 4-7).

Only the class token's row of the last block reaches the class token, so the gradient of every concept's loss with
respect to that row is K vector-Jacobian products of a single token through projection, MLP and norm, followed by one
matrix product with the values. Nothing before the last block is differentiated.

Letters: b images, k concepts, d embedding, n tokens, (h, w) patch grid.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.encoder.vit import ClassRow, Encoder

# Concepts differentiated at once; bounds memory at chunk * b * 4d floats.
_CHUNK = 256


def attention_gradients(row: ClassRow, centroids: Float[Tensor, "k d"]) -> Float[Tensor, "b k n"]:
    """Return the head mean of d loss_k / d attention for the class token's row, loss_k = 1 - cos(cls, centroid_k).

    The row is post-softmax. Exact: equal to K autograd passes through the network up to float32 rounding.

    Args:
        row: the last block's class row of b images.
        centroids: concept centroids on the same device, of any length.

    Reference: Eq. 5. Departures: cosine, as the text says, not a product over sqrt(d).
    """
    num_heads = row.attention.shape[1]
    with torch.enable_grad():
        context = row.context.detach().requires_grad_(True)
        cls = row.tail(context)
    length = cls.detach().norm(dim=-1, keepdim=True)
    unit = (cls.detach() / length).unsqueeze(0)
    gradients = []
    for chunk in torch.split(torch.nn.functional.normalize(centroids, dim=-1), _CHUNK):
        target = chunk.unsqueeze(1)
        cosine = (unit * target).sum(-1, keepdim=True)
        # d(1 - cos)/d cls: the part of the centroid orthogonal to the class token, over the token's length.
        at_cls = -(target - cosine * unit) / length
        (at_context,) = torch.autograd.grad(cls, context, at_cls, retain_graph=True, is_grads_batched=True)
        # Per head, d loss / d attention[token] is <d loss / d context, value[token]>; one product of all heads side by
        # side sums over heads.
        gradients.append(torch.einsum("kbd,bnd->bkn", at_context, row.values) / num_heads)
    return torch.cat(gradients, dim=1)


@dataclass(frozen=True, kw_only=True)
class GradientResponse:
    """Response maps by the gradient of each concept's loss (Eq. 4-7).

    Attributes:
        encoder: whose class row is read.
        centroids: one row per concept, on the encoder's device.
        gradient_scale: see `response_maps`.
        keep_mass: see `response_maps`.
        zeroed: see `response_maps`.
    """

    encoder: Encoder
    centroids: Float[Tensor, "k d"]
    gradient_scale: float = 1.0
    keep_mass: float | None = None
    zeroed: str = "cam"

    def __call__(
        self, images: UInt8[Tensor, "b 3 y x"], row: ClassRow, grid_hw: tuple[int, int]
    ) -> Float[Tensor, "b k h w"]:
        """Return the maps of some images; see `labeller.Response`."""
        return response_maps(
            self.encoder,
            row,
            centroids=self.centroids,
            grid_hw=grid_hw,
            gradient_scale=self.gradient_scale,
            keep_mass=self.keep_mass,
            zeroed=self.zeroed,
        )


@torch.no_grad()
def response_maps(
    encoder: Encoder,
    row: ClassRow,
    *,
    centroids: Float[Tensor, "k d"],
    grid_hw: tuple[int, int],
    gradient_scale: float,
    keep_mass: float | None,
    zeroed: str,
) -> Float[Tensor, "b k h w"]:
    """Return the Grad-CAM of each concept plus the attention divided by its per-image maximum (Eq. 7).

    Args:
        encoder: gives the number of prefix tokens.
        row: the last block's class row of b images.
        centroids: concept centroids.
        grid_hw: patch grid of the images.
        gradient_scale: factor on the gradient; 1/8 reproduces the released code's mean over a batch of 8.
        keep_mass: share of a CAM's mass to keep, largest patches first; None keeps all.
        zeroed: what is 0 where the gradient is positive: "cam" = the CAM, "map" = the attention too (`get_grad_mask`
            of the released code).

    Returns:
        Maps >= 0.
    """
    gradients = attention_gradients(row, centroids)[:, :, encoder.vit.num_prefix_tokens :]
    cam = (-gradient_scale * gradients).clamp_(min=0)
    if keep_mass is not None:
        cam = keep_top_mass(cam, keep_mass)
    attention = encoder.patch_attention(row, grid_hw)
    attention = attention / attention.amax((1, 2), keepdim=True)
    maps = torch.unflatten(cam, -1, grid_hw) + attention.unsqueeze(1)
    return maps if zeroed == "cam" else maps * (torch.unflatten(gradients, -1, grid_hw) <= 0)


def keep_top_mass(maps: Float[Tensor, "b k n"], share: float) -> Float[Tensor, "b k n"]:
    """Zero all but each map's largest entries: the fewest whose sum reaches `share` of the map's sum."""
    values, order = maps.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    kept = before < share * values.sum(-1, keepdim=True)
    return torch.zeros_like(maps).scatter(-1, order, values * kept)
