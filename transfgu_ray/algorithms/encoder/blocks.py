"""Parts of the forward pass of timm's `VisionTransformer` and `Eva` (rotary positions), down to single blocks.

Letters: b images, n tokens (prefix + patches), d embedding, m heads, e = d / m, (h, w) patch grid.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional

# The kinds for which `class_attention` and `layer_scales` can compute the class token's row alone.
MODELS = (VisionTransformer, Eva)
BLOCKS = (Block, EvaBlock)
ATTENTIONS = (Attention, AttentionRope, EvaAttention)


def embed_patches(
    vit: VisionTransformer | Eva, patches: Float[Tensor, "b h w d"], interpolation: str = "timm"
) -> Float[Tensor, "b n d"]:
    """Return the tokens before the first block: prefix and patches with their learned positions.

    Args:
        vit: made with `dynamic_img_size=True`.
        patches: output of its patch embedding.
        interpolation: how positions learned on another grid are resized: "timm", antialiased bicubic; "dino", see
            `dino_positions`. Without learned positions there is no difference.
    """
    if interpolation == "timm" or vit.pos_embed is None:
        # Eva also returns its rotations, which `run_blocks` computes separately.
        placed = vit._pos_embed(patches)[0] if isinstance(vit, Eva) else vit._pos_embed(patches)
        embedded: Tensor = vit.norm_pre(placed)
        return embedded
    grid_hw = (patches.shape[1], patches.shape[2])
    with_prefix = not vit.no_embed_class
    positions = dino_positions(
        vit.pos_embed,
        vit.patch_embed.grid_size,
        grid_hw=grid_hw,
        num_prefix=vit.num_prefix_tokens if with_prefix else 0,
    )
    prefix = [token.expand(len(patches), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    flat = patches.flatten(1, 2)
    tokens = torch.cat([*prefix, flat if with_prefix else flat + positions], dim=1)
    embedded = vit.norm_pre(tokens + positions if with_prefix else tokens)
    return embedded


def dino_positions(
    pos_embed: Float[Tensor, "1 _ d"], native_hw: tuple[int, int], *, grid_hw: tuple[int, int], num_prefix: int
) -> Float[Tensor, "1 _ d"]:
    """Resize learned positions to another patch grid: bicubic by a factor of (side + 0.1) / native side, no antialias.

    The 0.1 matters: the scale factor is also the step between samples.

    Args:
        pos_embed: positions of prefix tokens, then of the patches row by row.
        native_hw: patch grid on which they were learned; on that grid they are returned unchanged.
        grid_hw: wanted patch grid.
        num_prefix: number of positions of prefix tokens.

    Reference: `interpolate_pos_encoding` of DINO (Caron et al., ICCV 2021), kept in TransFGU's released code.
    Departures: none.
    """
    if grid_hw == tuple(native_hw):
        return pos_embed
    scale = tuple((side + 0.1) / native for side, native in zip(grid_hw, native_hw, strict=True))
    patches = torch.unflatten(pos_embed[:, num_prefix:], 1, native_hw).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, scale_factor=scale, mode="bicubic")
    return torch.cat([pos_embed[:, :num_prefix], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def run_blocks(
    vit: VisionTransformer | Eva, tokens: Float[Tensor, "b n d"], *, grid_hw: tuple[int, int], part: slice = slice(None)
) -> Float[Tensor, "b n d"]:
    """Run some of the blocks on tokens of images with a patch grid of (h, w)."""
    for block, rope in list(zip(vit.blocks, rotations(vit, grid_hw), strict=True))[part]:
        tokens = block(tokens) if rope is None else block(tokens, rope=rope)
    return tokens


def rotations(vit: VisionTransformer | Eva, grid_hw: tuple[int, int]) -> list[Tensor | None]:
    """Return the rotary positions of the patches for each block; None where the model has none."""
    rope = getattr(vit, "rope", None)
    if rope is None:
        return [None] * len(vit.blocks)
    of_grid = rope.get_embed(shape=list(grid_hw))
    # Mixed rotations are learned per block.
    return list(of_grid) if vit.rope_mixed else [of_grid] * len(vit.blocks)


def class_attention(
    attn: Attention | AttentionRope | EvaAttention, tokens: Float[Tensor, "b n d"], rope: Tensor | None
) -> tuple[Float[Tensor, "b m n"], Float[Tensor, "b n c"]]:
    """Return the post-softmax attention of the class token, and the values of all tokens, heads side by side.

    Args:
        attn: one of `ATTENTIONS`, without a gate.
        tokens: the block's input after its norm.
        rope: rotary positions of the patches.
    """
    m, e = attn.num_heads, attn.head_dim
    weight, bias = _projections(attn)
    sizes = [m * e, len(weight) - m * e]
    weight_q, weight_kv = torch.split(weight, sizes)
    bias_q, bias_kv = (None, None) if bias is None else torch.split(bias, sizes)
    query = torch.unflatten(functional.linear(tokens[:, 0], weight_q, bias_q), -1, (m, 1, e))
    keys, values = torch.unflatten(functional.linear(tokens, weight_kv, bias_kv), -1, (2, -1, e)).unbind(2)
    query, keys = attn.q_norm(query), attn.k_norm(keys.transpose(1, 2))
    if rope is not None:
        assert not isinstance(attn, Attention)
        # The class token has no place in the image, so its query is not rotated, nor are the keys of the prefix.
        num_prefix = attn.num_prefix_tokens
        prefix, patches = torch.split(keys, [num_prefix, keys.shape[2] - num_prefix], dim=2)
        keys = torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)
    if (shared := m // keys.shape[1]) > 1:
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=2)
    attention = (query * attn.scale @ keys.transpose(-2, -1)).softmax(-1)
    return attention.squeeze(2), values.flatten(2)


def _projections(
    attn: Attention | AttentionRope | EvaAttention,
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, " rows"] | None]:
    """Return weight and bias of queries, keys and values, stacked, however the model stores them."""
    if attn.qkv is None:
        parts = [attn.q_proj, attn.k_proj, attn.v_proj]
        weight = torch.cat([part.weight for part in parts])
        if all(part.bias is None for part in parts):
            return weight, None
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        return weight, torch.cat(biases)
    if isinstance(attn, EvaAttention):
        apart = attn.q_bias is not None
        return attn.qkv.weight, torch.cat([attn.q_bias, attn.get_buffer("k_bias"), attn.v_bias]) if apart else None
    return attn.qkv.weight, attn.qkv.bias


def layer_scales(block: Block | EvaBlock) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the scalings that a block applies to its attention and its MLP before adding them to the tokens."""
    if isinstance(block, EvaBlock):
        return _scale_by(block.gamma_1), _scale_by(block.gamma_2)
    return block.ls1, block.ls2


def _scale_by(gamma: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens if gamma is None else gamma * tokens
