"""A plain rewrite of the published decoder, to hold ours against."""

import math

import torch
from torch.nn import functional


def plain_decode(
    state: dict[str, torch.Tensor], tokens: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (b, patches, classes) and unit class embeddings as the published code computes them.

    Args:
        state: in the layout of the published files.
        tokens: (b, patches, width).
        num_heads: attention heads, which the layout does not say.
    """

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    b, (_, num_classes, width) = len(tokens), state["cls_emb"].shape
    x = torch.cat([linear("proj_dec", tokens), state["cls_emb"].expand(b, -1, -1)], 1)
    for i in range(len({name.split(".")[1] for name in state if name.startswith("blocks.")})):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        query, key, value = qkv.reshape(b, -1, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) / math.sqrt(width // num_heads)).softmax(-1)
        x = x + linear(f"blocks.{i}.attn.proj", (attention @ value).transpose(1, 2).reshape(b, -1, width))
        hidden = functional.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    x = norm("decoder_norm", x)
    patches, classes = x[:, :-num_classes] @ state["proj_patch"], x[:, -num_classes:] @ state["proj_classes"]
    patches, classes = (y / y.norm(dim=-1, keepdim=True) for y in (patches, classes))
    return norm("mask_norm", patches @ classes.transpose(1, 2)), classes
