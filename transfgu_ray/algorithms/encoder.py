"""The frozen vision transformer, run up to its last block so that the class token can be differentiated apart.

Letters: b images, n tokens (prefix + patches), d embedding, m heads, e = d / m, (h, w) patch grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from transfgu_ray.errors import WeightsError


@dataclass(frozen=True)
class ClassRow:
    """What the last block computes for the class token alone.

    Attributes:
        attention: post-softmax row of the class token, (b, m, n), sums to 1.
        values: values of all tokens, heads side by side, (b, n, d).
        context: attention-weighted values, before the output projection, (b, d).
        tail: maps a context to the final normalised class token: (b, d) -> (b, d).
    """

    attention: Float[Tensor, "b m n"]
    values: Float[Tensor, "b n d"]
    context: Float[Tensor, "b d"]
    tail: Callable[[Float[Tensor, "b d"]], Float[Tensor, "b d"]]


class Encoder(nn.Module):
    """A timm vision transformer with a class token, frozen.

    Args:
        vit: pre-norm `VisionTransformer` made with `dynamic_img_size=True`.
        mean: RGB mean of the normalisation, in [0, 1].
        std: RGB deviation of the normalisation.
        precision: "float32", or "bfloat16" to run all but the last block's class row under autocast.

    Raises:
        WeightsError: the model has no class token, or blocks of another kind.
    """

    def __init__(
        self,
        vit: nn.Module,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
            raise WeightsError(
                f"encoder.name gives a {type(vit).__name__}, which is not a timm vision transformer with a class "
                "token; use one such as vit_small_patch8_224.dino"
            )
        last = vit.blocks[-1]
        attn = getattr(last, "attn", None)
        if type(last) is not Block or type(attn) is not Attention or attn.gate is not None:
            raise WeightsError(
                f"the last block of this encoder is a {type(last).__name__} with {type(attn).__name__}, "
                "whose class-token gradient is not implemented; use a plain pre-norm ViT"
            )
        self.vit = vit.eval().requires_grad_(False)
        self.precision = precision
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def embed_dim(self) -> int:
        """Width d of a token."""
        return self.vit.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a square patch in px."""
        return self.vit.patch_embed.patch_size[0]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and registers."""
        return self.vit.num_prefix_tokens

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) of an image of (height, width) px."""
        return image_hw[0] // self.patch_size, image_hw[1] // self.patch_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def _embed(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b n d"]:
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @torch.no_grad()
    def prefix(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b n d"]:
        """Tokens before the last block, float32, from RGB images in 0-255 on the encoder's device."""
        with self._autocast():
            tokens = self.vit.blocks[:-1](self._embed(images))
        return tokens.float()

    @torch.no_grad()
    def all_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b n d"]:
        """Final normalised tokens, float32: the class token, any registers, then the patches row by row."""
        with self._autocast():
            tokens = self.vit.norm(self.vit.blocks(self._embed(images)))
        return tokens.float()

    def patch_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b hw d"]:
        """Final normalised patch tokens x^patch (Eq. 4), float32, row by row."""
        return self.all_tokens(images)[:, self.num_prefix_tokens :]

    @torch.no_grad()
    def class_row(self, tokens: Float[Tensor, "b n d"]) -> ClassRow:
        """The last block for the class token only; the patch tokens' queries and MLP are never computed.

        Args:
            tokens: output of `prefix`.
        """
        block = self.vit.blocks[-1]
        attn = block.attn
        b, n, _ = tokens.shape
        m, e = attn.num_heads, attn.head_dim
        normed = block.norm1(tokens)
        weight_q, weight_kv = attn.qkv.weight.split([m * e, 2 * m * e])
        bias_q, bias_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([m * e, 2 * m * e])
        query = nn.functional.linear(normed[:, 0], weight_q, bias_q).view(b, m, 1, e)
        keys, values = nn.functional.linear(normed, weight_kv, bias_kv).view(b, n, 2, m, e).unbind(2)
        scores = attn.q_norm(query) * attn.scale @ attn.k_norm(keys.transpose(1, 2)).transpose(-2, -1)
        attention = scores.softmax(-1)
        context = (attention @ values.transpose(1, 2)).reshape(b, m * e)

        def tail(context: Tensor) -> Tensor:
            token = tokens[:, 0] + block.ls1(attn.proj(attn.norm(context)))
            token = token + block.ls2(block.mlp(block.norm2(token)))
            return self.vit.norm(token)

        return ClassRow(attention.squeeze(2), values.reshape(b, n, m * e), context, tail)

    @torch.no_grad()
    def cls_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b d"]:
        """Final normalised class tokens x^cls (Eq. 3), float32."""
        row = self.class_row(self.prefix(images))
        return row.tail(row.context)

    @torch.no_grad()
    def saliency(
        self, tokens: Float[Tensor, "b n d"], row: ClassRow, grid_hw: tuple[int, int], prior: str
    ) -> Float[Tensor, "b h w"]:
        """The map whose patches above its mean are foreground.

        Args:
            tokens: output of `prefix`.
            row: their class row.
            grid_hw: their patch grid.
            prior: "attention": A_L^cls (4.2); "patch_contrast" (ours, for small priors): distance of a patch token
                from its image's mean patch token.
        """
        if prior == "attention":
            return self.patch_attention(row, grid_hw)
        with self._autocast():
            patches = self.vit.norm(self.vit.blocks[-1](tokens))[:, self.num_prefix_tokens :].float()
        return (patches - patches.mean(1, keepdim=True)).norm(dim=-1).unflatten(-1, grid_hw)

    def patch_attention(self, row: ClassRow, grid_hw: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Head-mean attention of the class token on the patches, A_L^cls of the paper."""
        patches = row.attention[:, :, self.num_prefix_tokens :]
        return patches.mean(1).unflatten(-1, grid_hw)


def above_mean(saliency: Float[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """True where a map is above its own mean (the paper's binarised attention)."""
    return saliency > saliency.mean((1, 2), keepdim=True)
