"""Decoders: Segmenter's mask transformer (Strudel et al., ICCV 2021; Eq. 2 of the paper) and Table 4's classifier.

Letters: b images, k classes, d width, (h, w) patch grid.
"""

from functools import partial

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional


class MaskTransformer(nn.Module):
    """Segmenter's decoder: class embeddings attend to patch tokens; masks are their normalised products.

    Args:
        num_classes: K, plus one where there is a background channel.
        d_encoder: width of the encoder's patch tokens and of the decoder.
        num_layers: transformer blocks (released: 2).
        num_heads: attention heads (released: 6); must divide d_encoder.
        dropout: dropout in attention, projections and MLP (released: 0.1).
        norm_eps: epsilon of the blocks' norms (released: 1e-5).
        qkv_bias: whether queries, keys and values have biases (Segmenter; released: no).
        class_init: class embeddings at first: "shared_length" = one random direction in R^(K d) of length 1, so that
            each is 1 / sqrt(K) long on average (released: torch's orthogonal_ on a (1, K, d) tensor); "orthogonal" =
            orthogonal to each other, of length 1.
    """

    def __init__(
        self,
        num_classes: int,
        d_encoder: int,
        *,
        num_layers: int = 2,
        num_heads: int = 6,
        dropout: float = 0.1,
        norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        class_init: str = "shared_length",
    ) -> None:
        super().__init__()
        d = d_encoder
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, d))
        self.proj_dec = nn.Linear(d, d)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.blocks = nn.ModuleList(
            Block(
                d,
                num_heads,
                qkv_bias=qkv_bias,
                proj_drop=dropout,
                attn_drop=dropout,
                norm_layer=norm,  # type: ignore[arg-type]  # timm declares a class but calls any factory
            )
            for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(d)
        self.proj_patch = nn.Parameter(d**-0.5 * torch.randn(d, d))
        self.proj_classes = nn.Parameter(d**-0.5 * torch.randn(d, d))
        self.mask_norm = nn.LayerNorm(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # More than d rows cannot all be orthogonal.
        nn.init.orthogonal_(self.cls_emb if class_init == "shared_length" else self.cls_emb[0])

    def forward(
        self, patch_tokens: Float[Tensor, "b hw d"], grid_hw: tuple[int, int]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k d"]]:
        """Return class logits on the patch grid, and the unit-length class embeddings C of Eq. 2 and 15.

        This is Eq. 2 up to the norm: patch and class embeddings are projected, L2-normalised and multiplied, then
        LayerNorm over classes replaces the division by sqrt(d) (released code).
        """
        num_classes = self.cls_emb.shape[1]
        tokens = torch.cat([self.proj_dec(patch_tokens), self.cls_emb.expand(len(patch_tokens), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.decoder_norm(tokens)
        patches = functional.normalize(tokens[:, :-num_classes] @ self.proj_patch, dim=-1)
        classes = functional.normalize(tokens[:, -num_classes:] @ self.proj_classes, dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return torch.unflatten(masks.transpose(1, 2), -1, grid_hw), classes


class Classifier(nn.Module):
    """A 1x1 convolution from patch tokens to class logits (Table 4).

    Args:
        num_classes: K, plus one where there is a background channel.
        d_encoder: width of the tokens.
    """

    def __init__(self, num_classes: int, d_encoder: int) -> None:
        super().__init__()
        self.head = nn.Linear(d_encoder, num_classes)

    def forward(
        self, patch_tokens: Float[Tensor, "b hw d"], grid_hw: tuple[int, int]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k d"]]:
        """Return class logits on the patch grid, and each class's weights in place of the class embeddings of Eq. 15.

        The paper does not define the diversity loss of a classifier; using its L2-normalised weights, the same for all
        images, is ours.
        """
        classes = functional.normalize(self.head.weight, dim=-1)
        logits = torch.unflatten(self.head(patch_tokens).transpose(1, 2), -1, grid_hw)
        return logits, classes.expand(len(patch_tokens), -1, -1)
