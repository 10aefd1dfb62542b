"""The frozen vision transformer, split before its last block so that the class token can be differentiated alone.

Letters: b images, n tokens (prefix + patches), d embedding, m heads, e = d / m, (h, w) patch grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from transfgu_ray.algorithms.encoder import blocks
from transfgu_ray.errors import WeightsError


@dataclass(frozen=True)
class ClassRow:
    """The last block's results for the class token alone.

    Attributes:
        attention: post-softmax row of the class token, (b, m, n); sums to 1.
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
        vit: pre-norm `VisionTransformer` or `Eva` made with `dynamic_img_size=True`.
        mean: RGB mean of the normalisation, in [0, 1].
        std: RGB deviation of the normalisation.
        precision: "float32", or "bfloat16" to run all but the last block's class row under autocast.
        pos_embed_interpolation: "timm" or "dino", for learned positions at other sizes; see `blocks.embed_patches`.

    Raises:
        WeightsError: the model has no class token or blocks of another kind.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        *,
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        precision: str = "float32",
        pos_embed_interpolation: str = "timm",
    ) -> None:
        super().__init__()
        if not isinstance(vit, blocks.MODELS) or vit.cls_token is None:
            raise WeightsError(
                f"encoder.name gives a {type(vit).__name__}, which is not a timm vision transformer with a class "
                "token; use one such as vit_small_patch8_224.dino"
            )
        last = vit.blocks[-1]
        attn = getattr(last, "attn", None)
        known = type(last) in blocks.BLOCKS and type(attn) in blocks.ATTENTIONS
        if not known or getattr(attn, "gate", None) is not None:
            raise WeightsError(
                f"the last block of this encoder is a {type(last).__name__} with {type(attn).__name__}, "
                "whose class-token gradient is not implemented; use a plain pre-norm ViT"
            )
        self.vit = vit.eval().requires_grad_(False)
        self.precision = precision
        self.pos_embed_interpolation = pos_embed_interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def embed_dim(self) -> int:
        """Return the width d of a token."""
        return self.vit.embed_dim

    @property
    def patch_size(self) -> int:
        """Return the side of a square patch in px."""
        side: int = self.vit.patch_embed.patch_size[0]
        return side

    @property
    def num_prefix_tokens(self) -> int:
        """Return the number of tokens before the patches: the class token and registers."""
        return self.vit.num_prefix_tokens

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid (h, w) of an image of (height, width) px."""
        return image_hw[0] // self.patch_size, image_hw[1] // self.patch_size

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.mean.device

    def _run(self, images: UInt8[Tensor, "b 3 y x"], part: slice) -> Float[Tensor, "b n d"]:
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        tokens = blocks.embed_patches(self.vit, self.vit.patch_embed(pixels), self.pos_embed_interpolation)
        return blocks.run_blocks(self.vit, tokens, grid_hw=self.grid_hw((images.shape[2], images.shape[3])), part=part)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @torch.no_grad()
    def prefix(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b n d"]:
        """Return the tokens before the last block, float32, of RGB images in 0-255 on the encoder's device."""
        with self._autocast():
            tokens = self._run(images, slice(-1))
        return tokens.float()

    @torch.no_grad()
    def all_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b n d"]:
        """Return the final normalised tokens, float32: the class token, any registers, then the patches row by row."""
        with self._autocast():
            tokens: Tensor = self.vit.norm(self._run(images, slice(None)))
        return tokens.float()

    def patch_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b hw d"]:
        """Return the final normalised patch tokens x^patch (Eq. 4), float32, row by row."""
        return self.all_tokens(images)[:, self.num_prefix_tokens :]

    @torch.no_grad()
    def class_row(self, tokens: Float[Tensor, "b n d"], grid_hw: tuple[int, int]) -> ClassRow:
        """Run the last block for the class token only; the patch tokens' queries and MLP are never computed.

        Args:
            tokens: output of `prefix`.
            grid_hw: their patch grid.
        """
        block = self.vit.blocks[-1]
        assert isinstance(block, blocks.BLOCKS)
        attn = block.attn
        assert isinstance(attn, blocks.ATTENTIONS)
        rope = blocks.rotations(self.vit, grid_hw)[-1]
        attention, values = blocks.class_attention(attn, block.norm1(tokens), rope)
        heads = torch.unflatten(values, -1, (attn.num_heads, -1)).transpose(1, 2)
        context = (attention.unsqueeze(2) @ heads).flatten(1)
        scale_attention, scale_mlp = blocks.layer_scales(block)

        def tail(context: Tensor) -> Tensor:
            token = tokens[:, 0] + scale_attention(attn.proj(attn.norm(context)))
            token = token + scale_mlp(block.mlp(block.norm2(token)))
            normalised: Tensor = self.vit.norm(token)
            return normalised

        return ClassRow(attention, values, context, tail)

    @torch.no_grad()
    def cls_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b d"]:
        """Return the final normalised class tokens x^cls (Eq. 3), float32."""
        row = self.class_row(self.prefix(images), self.grid_hw((images.shape[2], images.shape[3])))
        return row.tail(row.context)

    @torch.no_grad()
    def saliency(
        self, tokens: Float[Tensor, "b n d"], row: ClassRow, *, grid_hw: tuple[int, int], prior: str
    ) -> Float[Tensor, "b h w"]:
        """Return the map whose patches above its mean are foreground.

        Args:
            tokens: output of `prefix`.
            row: their class row.
            grid_hw: their patch grid.
            prior: "attention": A_L^cls (4.2); "patch_contrast" (ours, for small encoders): distance of a patch token
                from its image's mean patch token.
        """
        if prior == "attention":
            return self.patch_attention(row, grid_hw)
        with self._autocast():
            last = blocks.run_blocks(self.vit, tokens, grid_hw=grid_hw, part=slice(-1, None))
            patches: Tensor = self.vit.norm(last)[:, self.num_prefix_tokens :].float()
        return torch.unflatten((patches - patches.mean(1, keepdim=True)).norm(dim=-1), -1, grid_hw)

    def patch_attention(self, row: ClassRow, grid_hw: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Return the head mean of the class token's attention to the patches, A_L^cls of the paper."""
        patches = row.attention[:, :, self.num_prefix_tokens :]
        return torch.unflatten(patches.mean(1), -1, grid_hw)


def above_mean(saliency: Float[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Return where a map is above its own mean (the paper's binarised attention)."""
    return saliency > saliency.mean((1, 2), keepdim=True)
