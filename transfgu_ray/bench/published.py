"""A plain rewrite of the published code's computations, as a reference for speed and results."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap
from transfgu_ray.algorithms.rounds.losses import LossWeights, bootstrap_targets, total_loss
from transfgu_ray.algorithms.rounds.schedule import Epoch


def plain_gradients(
    encoder: Encoder, images: UInt8[Tensor, "b 3 y x"], centroids: Float[Tensor, "k d"]
) -> Float[Tensor, "b k n"]:
    """Return the head-mean of d loss_k / d attention of the class token (Eq. 5) by K backward passes.

    The graph is kept between passes and reaches through the whole network down to the pixels.
    """
    attn: Any = encoder.vit.blocks[-1].attn
    fused, attn.fused_attn = attn.fused_attn, False
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].retain_grad()
        kept.append(inputs[0])

    hook = attn.attn_drop.register_forward_pre_hook(keep)
    try:
        pixels = ((images.float() / 255 - encoder.mean) / encoder.std).requires_grad_(True)
        cls = encoder.vit.forward_features(pixels)[:, 0]
    finally:
        hook.remove()
        attn.fused_attn = fused
    gradients: list[Tensor] = []
    for centroid in centroids:
        kept[0].grad = pixels.grad = None
        loss = 1 - torch.nn.functional.cosine_similarity(cls, centroid[None])
        torch.autograd.backward(loss.sum(), retain_graph=True)
        reached, gradient = pixels.grad, kept[0].grad
        assert reached is not None
        assert gradient is not None
        assert reached.abs().max() > 0, "the graph ended before the pixels"
        gradients.append(gradient[:, :, 0].mean(1))
    return torch.stack(gradients, dim=1)


def plain_step(
    encoder: Encoder,
    bootstrap: Bootstrap,
    *,
    images: UInt8[Tensor, "b 3 y x"],
    scores: Float[Tensor, "b k h w"],
    epoch: Epoch,
) -> None:
    """Compute losses and gradients of a training step in which teacher and student each run the encoder."""
    grid_hw = (scores.shape[2], scores.shape[3])
    assert bootstrap.teacher is not None
    with torch.no_grad():
        guidance = bootstrap.teacher(encoder.patch_tokens(images), grid_hw)[0]
        targets = bootstrap_targets(scores, guidance)
    logits, classes = bootstrap.student(encoder.patch_tokens(images), grid_hw)
    shuffle = torch.randperm(scores.shape[1])
    losses = total_loss(
        logits,
        classes,
        targets=targets,
        shuffle=shuffle,
        weights=LossWeights(alpha=epoch.alpha, omega_1=1.0, omega_2=0.3),
    )
    torch.autograd.backward(losses["total"])
