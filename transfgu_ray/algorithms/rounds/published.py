"""Decoders published with the paper, `*_decoder.pt`."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from transfgu_ray.algorithms.encoder.checkpoints import misfit, not_finite, read_checkpoint
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.errors import WeightsError


class ReleasedDecoder(NamedTuple):
    """A published decoder.

    Attributes:
        state: for a `MaskTransformer`.
        num_classes: K, plus one where there is a background channel.
        width: of the patch tokens that it reads.
        num_layers: transformer blocks.
    """

    state: dict[str, Tensor]
    num_classes: int
    width: int
    num_layers: int


def read_released_decoder(data: bytes, source: str) -> ReleasedDecoder:
    """Read a decoder from the bytes of a file.

    Args:
        data: the file's content, a bare state dict of a mask transformer.
        source: its name, for messages.

    Raises:
        WeightsError: the file cannot be read or is not such a state dict.

    Reference: `models/mask_transformer/decoder.py` of the released code.
    """
    state = read_checkpoint(data, source)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{source} is not a published decoder: it is not a plain state dict")
    embeddings = state.get("cls_emb")
    if embeddings is None or embeddings.ndim != 3:
        raise WeightsError(f"{source} is not a published decoder: it has no cls_emb of shape (1, classes, width)")
    _, num_classes, width = embeddings.shape
    num_layers = len({key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.", key)})
    state = {key: value.float() for key, value in state.items()}
    with torch.random.fork_rng(devices=[]):
        # Shapes do not depend on the number of heads.
        wanted = MaskTransformer(num_classes, width, num_layers=num_layers, num_heads=1).state_dict()
    if problem := misfit(state, wanted):
        raise WeightsError(f"{source} is not a published decoder of {num_layers} layers: it {problem}")
    if unusable := not_finite(state):
        raise WeightsError(f"{source} {unusable}; take another copy of it")
    return ReleasedDecoder(state, num_classes, width, num_layers)


def background_last(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a published decoder's first class, which is the background if it has one, behind the others."""
    rolled = {name: state[name].roll(-1, -1) for name in ("mask_norm.weight", "mask_norm.bias")}
    return state | rolled | {"cls_emb": state["cls_emb"].roll(-1, 1)}
