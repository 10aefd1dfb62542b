"""The decoder's input: patch tokens of the whole image, dense tokens of windows, or features of a ResNet."""

from itertools import product

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu_ray.algorithms.encoder.resnet import STAGE_CHANNELS, Backbone
from transfgu_ray.algorithms.encoder.vit import Encoder

# Bounds memory, whatever the image's size.
_WINDOWS_PER_FORWARD = 1024


def token_dim(embed_dim: int, window: int | None, backbone: str = "prior") -> int:
    """Return the width of `read_tokens` for an encoder of width d: d, 2 d for windows, or the ResNet's 3840."""
    if backbone == "resnet50_fpn":
        return sum(STAGE_CHANNELS)
    return embed_dim if window is None else 2 * embed_dim


@torch.no_grad()
def read_tokens(
    encoder: Encoder, images: UInt8[Tensor, "b 3 y x"], *, window: int | None, backbone: Backbone | None = None
) -> Float[Tensor, "b hw c"]:
    """Return the tokens of each patch, float32, row by row: x^patch of Eq. 2, or dense tokens (ours).

    With windows, the encoder reads every square window of that side separately, one patch apart. A patch gets the
    mean, over the windows that contain it, of its own token there and of the window's class token, side by side. The
    patch tokens of a shallow encoder carry little beyond the patch itself and the image's mean; the class token of a
    window says what the window shows.

    Args:
        encoder: frozen.
        images: RGB in 0-255 on the encoder's device, at least as large as a window.
        window: side in px, a multiple of the patch; None = the patch tokens of the whole image.
        backbone: read instead of the encoder, on the encoder's patch grid (Table 4).
    """
    if backbone is not None:
        return backbone.read(images, encoder.grid_hw((images.shape[2], images.shape[3])))
    if window is None:
        return encoder.patch_tokens(images)
    patch, side = encoder.patch_size, window // encoder.patch_size
    height, width = encoder.grid_hw((images.shape[2], images.shape[3]))
    rows, columns = height - side + 1, width - side + 1
    windows = images.unfold(2, window, patch).unfold(3, window, patch).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    tokens = torch.cat([encoder.all_tokens(part) for part in torch.split(windows, _WINDOWS_PER_FORWARD)])
    tokens = torch.unflatten(tokens, 0, (len(images), rows, columns))
    of_class = tokens[..., 0, :]
    of_patches = torch.unflatten(tokens[..., encoder.num_prefix_tokens :, :], 3, (side, side))
    total = tokens.new_zeros(len(images), height, width, token_dim(encoder.embed_dim, window))
    count = tokens.new_zeros(height, width, 1)
    for y, x in product(range(side), repeat=2):
        here = slice(y, y + rows), slice(x, x + columns)
        total[:, *here] += torch.cat([of_patches[:, :, :, y, x], of_class], dim=-1)
        count[here] += 1
    return (total / count).flatten(1, 2)
