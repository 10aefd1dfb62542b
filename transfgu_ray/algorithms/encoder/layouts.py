"""Conversion of published state dicts to the tensor names of timm's models.

| prior | layout of the file | `encoder.name`, besides timm's own weights |
|---|---|---|
| DINO, iBOT | bare, or under `teacher`, else `student` or `state_dict` | vit_small_patch8_224.dino, ... |
| MoCo v3 | `state_dict` with `module.base_encoder` | vit_base_patch16_224.dino; ViT-S has 12 heads: `num_heads: 12` |
| MAE | `model`, with or without the decoder | vit_base_patch16_224.mae |
| DINOv2 | bare, `register_tokens` where it has registers | vit_small_patch14_dinov2, vit_small_patch14_reg4_dinov2 |
| DINOv3 | bare, `storage_tokens` | vit_small_patch16_dinov3; `_qkvb` where biases are not 0 |
| DINO, MAE, DINOv2 by Hugging Face | bare, or under the name of the model: `vit.embeddings`, ... | as above |
"""

import re
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from transfgu_ray.errors import WeightsError

# Published along with a backbone but not part of it: heads and predictors of the pretraining, MAE's decoder, mask
# tokens, MoCo's other encoder, constants that timm computes.
_BESIDE = re.compile(
    r"(head|dino_head|ibot_head|predictor|projectors|momentum_encoder|decoder_\w+|local_cls_norm)\..*"
    r"|mask_token|masked_embed|decoder_pos_embed|rope_embed\.periods|.*\.attn\.qkv\.bias_mask"
)
_RENAMED = [
    (re.compile(r"^(register|storage)_tokens$"), "reg_token"),
    # Gated MLPs: DINOv2 stacks two matrices, DINOv3 stores them separately.
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w1\."), ".mlp.fc1_g."),
    (re.compile(r"\.mlp\.w2\."), ".mlp.fc1_x."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
]
_RENAMED_IN_EVA = [(re.compile(r"\.ls([12])\.gamma$"), r".gamma_\1")]
# Names of Hugging Face's transformers (ViT, Dinov2, Dinov2WithRegisters), in its files and in its models, and the
# authors' own.
_OF_TRANSFORMERS = [
    (re.compile(r"^embeddings\.patch_embeddings\.projection\."), "patch_embed.proj."),
    (re.compile(r"^embeddings\.position_embeddings$"), "pos_embed"),
    (re.compile(r"^embeddings\."), ""),
    (re.compile(r"^(encoder\.layer|layers)\."), "blocks."),
    (re.compile(r"\.layernorm_before\."), ".norm1."),
    (re.compile(r"\.layernorm_after\."), ".norm2."),
    (re.compile(r"\.attention\.(output\.dense|o_proj)\."), ".attn.proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
    (re.compile(r"\.mlp\.weights_in\."), ".mlp.w12."),
    (re.compile(r"\.mlp\.weights_out\."), ".mlp.w3."),
    (re.compile(r"\.layer_scale([12])\.lambda1$"), r".ls\1.gamma"),
    (re.compile(r"^layernorm\."), "norm."),
]
_ATTENTION = re.compile(r"\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.")
_BESIDE_TRANSFORMERS = re.compile(r"(pooler|classifier|decoder)\..*")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Heads by width. Tensor shapes do not reveal the number of heads, and timm's ViT-S has 6.
_MOCO_HEADS = {384: 12}


def to_timm(checkpoint: Any, vit: nn.Module, *, source: str, name: str) -> dict[str, Tensor]:
    """Return the backbone's tensors under timm's names, without the known extras of a published file.

    For DINO and iBOT this is the teacher, their published result; for MoCo v3 the base encoder, as in its published
    linear classification.

    Args:
        checkpoint: content of the file.
        vit: the model to fill; a MoCo v3 file also sets its normalisation, for which timm has no model name.
        source: the file's name, for messages.
        name: the model's timm name, for messages.

    Raises:
        WeightsError: there is no state dict, or its number of heads cannot be the model's.
    """
    state = _from_transformers(backbone_state(checkpoint, source))
    if any(key.startswith("base_encoder.") for key in state):
        state = {key: value for key, value in state.items() if not key.startswith("momentum_encoder.")}
        state = {key.removeprefix("base_encoder."): value for key, value in state.items()}
        _expect_moco(vit, source, name)
    state = {key: value for key, value in state.items() if not _BESIDE.fullmatch(key)}
    if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        # timm keeps positions for the patches only: it adds the class token's position to the token.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    renamed = _RENAMED + (_RENAMED_IN_EVA if isinstance(vit, Eva) else [])
    for pattern, new in renamed:
        state = {pattern.sub(new, key): value for key, value in state.items()}
    return _split_biases(state, vit) if isinstance(vit, Eva) else state


def backbone_state(checkpoint: Any, source: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without its wrappers (`teacher`, `state_dict`, ...) and name prefixes.

    Raises:
        WeightsError: it does not hold a state dict.
    """
    return _strip(_unwrap(checkpoint, source))


def _unwrap(checkpoint: Any, source: str) -> dict[str, Any]:
    # The teacher comes first: it is DINO's result, and the student is the noisier of the two.
    for key in ("teacher", "student", "state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{source} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def _strip(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    state = {}
    for key, value in checkpoint.items():
        if isinstance(value, Tensor):
            for prefix in ("module.", "backbone."):
                key = key.removeprefix(prefix)
            state[key] = value
    return state


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by Hugging Face's transformers under their authors' names; of any other, the same.

    Where these hold one matrix for queries, keys and values, transformers holds three.
    """
    token = next((key for key in state if re.fullmatch(r"(\w+\.)?embeddings\.cls_token", key)), None)
    if token is None:
        return state
    prefix, renamed = token.removesuffix("embeddings.cls_token"), {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        # Beside a prefix lies what the backbone was trained with.
        if not key.startswith(prefix) or _BESIDE_TRANSFORMERS.fullmatch(key.removeprefix(prefix)):
            continue
        key = key.removeprefix(prefix)
        for pattern, new in _OF_TRANSFORMERS:
            key = pattern.sub(new, key)
        if part := _ATTENTION.search(key):
            joined.setdefault(_ATTENTION.sub(".attn.qkv.", key), {})[part[1][0]] = value
        else:
            renamed[key] = value
    # One that lacks a part is found to be too small.
    return renamed | {key: torch.cat([parts[each] for each in "qkv" if each in parts]) for key, parts in joined.items()}


def _expect_moco(vit: nn.Module, source: str, name: str) -> None:
    parts: Any = vit  # timm does not declare the types of a model's parts
    heads = _MOCO_HEADS.get(parts.embed_dim)
    found = parts.blocks[0].attn.num_heads
    if heads is not None and found != heads:
        raise WeightsError(
            f"{source} is a MoCo v3 ViT-S, which has {heads} attention heads, not the {found} of encoder.name={name}; "
            f"set encoder.overrides={{num_heads: {heads}}}"
        )
    parts.pretrained_cfg = {**parts.pretrained_cfg, **_IMAGENET}


def _split_biases(state: dict[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    """Split DINOv3's joint bias of queries, keys and values; it masks the keys' part, which timm's models lack."""
    split = {}
    for key, value in state.items():
        block, found, _ = key.partition("attn.qkv.bias")
        if not found or key in vit.state_dict():
            split[key] = value
            continue
        query, _, values = value.chunk(3)
        if f"{block}attn.q_bias" in vit.state_dict():
            split |= {f"{block}attn.q_bias": query, f"{block}attn.v_bias": values}
        elif query.any() or values.any():
            # The model has no place for it, so loading it is refused.
            split[key] = value
    return split
