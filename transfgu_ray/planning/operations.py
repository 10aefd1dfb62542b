"""Floating-point operations of the encoder, from its shape alone: what a run costs on any machine."""

from dataclasses import dataclass

from transfgu_ray.algorithms.encoder.vit import Encoder

_CHANNELS = 3


@dataclass(frozen=True)
class VitShape:
    """The shape of a vision transformer.

    Attributes:
        depth: number of blocks L.
        width: of a token, d.
        mlp_weights: entries M of the matrices of one block's MLP; 8 d^2 in a plain ViT.
        patch_size: side P of a square patch in px.
        num_prefix_tokens: tokens beside the patches: the class token and registers.
    """

    depth: int
    width: int
    mlp_weights: int
    patch_size: int
    num_prefix_tokens: int


def shape_of(encoder: Encoder) -> VitShape:
    """Return the shape of an encoder."""
    mlp = encoder.vit.blocks[-1].get_submodule("mlp")
    return VitShape(
        depth=len(encoder.vit.blocks),
        width=encoder.embed_dim,
        mlp_weights=sum(weight.numel() for weight in mlp.parameters() if weight.ndim > 1),
        patch_size=encoder.patch_size,
        num_prefix_tokens=encoder.num_prefix_tokens,
    )


def vit_operations(shape: VitShape, image_hw: tuple[int, int], *, class_only: bool) -> int:
    """Return the floating-point operations of one forward pass, a multiplication and an addition being two.

    With p = (height // P) (width // P) patches and n = p + prefix tokens,

        embedding of the patches   2 p 3 P^2 d
        a block                    2 n (4 d^2 + M) + 4 n^2 d
        the class token's block    2 n 2 d^2 + 2 (2 d^2 + M) + 4 n d

    that is four projections of each token, the MLP, and attention's two products; the class token's block projects
    keys and values of all tokens, the rest of the class token alone. Norms, softmax, biases and activations are left
    out, as they are by `torch.utils.flop_counter`.

    Args:
        shape: of the encoder.
        image_hw: (height, width) in px.
        class_only: whether the last block is the class token's (`Encoder.cls_tokens`), not a whole one
            (`Encoder.all_tokens`).
    """
    height, width = (side // shape.patch_size for side in image_hw)
    patches, d = height * width, shape.width
    tokens = patches + shape.num_prefix_tokens
    embedding = 2 * patches * _CHANNELS * shape.patch_size**2 * d
    block = 2 * tokens * (4 * d**2 + shape.mlp_weights) + 4 * tokens**2 * d
    class_block = 2 * tokens * 2 * d**2 + 2 * (2 * d**2 + shape.mlp_weights) + 4 * tokens * d
    return embedding + (shape.depth - 1) * block + (class_block if class_only else block)


def least_seconds(operations: int, *, tflops: float, num_gpus: int) -> float:
    """Return the seconds that operations take at least: operations / (speed x GPUs), if nothing else takes time.

    Args:
        operations: floating-point operations.
        tflops: sustained speed of one GPU, 1e12 operations a second, above 0.
        num_gpus: how many share them.
    """
    return operations / (tflops * 1e12 * num_gpus)
