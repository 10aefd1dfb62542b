"""Checkpoints in their authors' layouts, made from small models whose tokens they must reproduce."""

import io
import re

import pytest
import safetensors.torch
import torch

from tests.builders import random_images, shake
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder, load_vit, random_vit
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.errors import WeightsError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
RNG = torch.Generator().manual_seed(3)


def _noise(*shape):
    return torch.randn(shape, generator=RNG)


def _renamed(state, *pairs):
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def _head(prefix):
    return {f"{prefix}head.mlp.0.weight": _noise(5, 48), f"{prefix}head.last_layer.weight_g": _noise(7, 1)}


def _dino(state):
    other = {f"module.backbone.{key}": value + 1 for key, value in state.items()} | _head("module.")
    teacher = {f"backbone.{key}": value for key, value in state.items()} | _head("")
    return {"student": other, "teacher": teacher, "epoch": 100}


def _ibot(state):
    return {"state_dict": state | {"masked_embed": _noise(1, 48)} | _head("")}


def _moco_v3(state):
    mlp = {"0.weight": _noise(9, 48), "1.weight": _noise(9), "1.running_mean": _noise(9), "6.weight": _noise(4, 9)}
    found = {f"module.base_encoder.{key}": value for key, value in state.items()}
    found |= {f"module.momentum_encoder.{key}": value + 1 for key, value in state.items()}
    for part in ("base_encoder.head", "momentum_encoder.head", "predictor"):
        found |= {f"module.{part}.{key}": value for key, value in mlp.items()}
    optimizer = {"state": {0: {"mu": _noise(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 300, "arch": "vit_base", "state_dict": found, "optimizer": optimizer}


def _mae(state):
    decoder = {
        "mask_token": _noise(1, 1, 8),
        "decoder_pos_embed": _noise(1, 197, 8),
        "decoder_embed.weight": _noise(8, 48),
    }
    decoder |= {"decoder_blocks.0.attn.qkv.weight": _noise(24, 8), "decoder_norm.weight": _noise(8)}
    return {"model": state | decoder | {"decoder_pred.bias": _noise(768)}}


def _dinov2(state):
    return state | {"mask_token": _noise(1, 48)}


def _dinov2_registers(state):
    of_class = _noise(1, 1, 48)
    state = _renamed(state, ("reg_token", "register_tokens"))
    positions = torch.cat([of_class, state["pos_embed"]], dim=1)
    return _dinov2(state | {"cls_token": state["cls_token"] - of_class, "pos_embed": positions})


def _dinov2_giant(state):
    return _dinov2_registers(_renamed(state, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")))


def _dinov3(state):
    state = _renamed(state, ("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    state = _renamed(state, ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"))
    if "blocks.0.mlp.w1.weight" in state:
        state = _renamed(state, ("mlp.fc2", "mlp.w3"))
    for i in range(2):
        query, values = (state.pop(f"blocks.{i}.attn.{part}_bias", torch.zeros(48)) for part in "qv")
        # The keys' bias is masked, whatever its value.
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, _noise(48), values])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
    beside = {"rope_embed.periods": _noise(4), "mask_token": _noise(1, 48), "local_cls_norm.weight": _noise(48)}
    return state | beside


def _by_transformers(state, prefix=""):
    """Files as Hugging Face publishes ViTs, of which queries, keys and values are three layers."""
    state = _renamed(
        state,
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("blocks.", "encoder.layer."),
        ("attn.proj", "attention.output.dense"),
    )
    state = {re.sub(r"^norm\.", "layernorm.", key): value for key, value in state.items()}
    for key in [key for key in state if ".attn.qkv." in key]:
        for name, part in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
            state[key.replace("attn.qkv", f"attention.attention.{name}")] = part
    return {f"{prefix}{key}": value for key, value in state.items()}


def _dino_by_transformers(state):
    state = _renamed(
        _by_transformers(state),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )
    return state | {"pooler.dense.weight": _noise(48, 48), "pooler.dense.bias": _noise(48)}


def _classifier_by_transformers(state):
    state = {f"vit.{key}": value for key, value in _dino_by_transformers(state).items() if "pooler" not in key}
    return state | {"classifier.weight": _noise(5, 48)}


def _dinov2_by_transformers(state):
    state = {re.sub(r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1", key): value for key, value in state.items()}
    return _by_transformers(state) | {"embeddings.mask_token": _noise(1, 48)}


def _registers_by_transformers(state):
    state = _dinov2_registers(state)
    del state["mask_token"]
    state = _renamed(state, ("register_tokens", "embeddings.register_tokens"))
    return _dinov2_by_transformers(state)


def _giant_by_transformers(state):
    return _registers_by_transformers(_renamed(state, ("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out")))


BY_TRANSFORMERS = {
    "dino": ("vit_small_patch8_224.dino", _dino_by_transformers),
    "dino_classifier": ("vit_small_patch16_224.dino", _classifier_by_transformers),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", _dinov2_by_transformers),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2.lvd142m", _registers_by_transformers),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2.lvd142m", _giant_by_transformers),
}
LAYOUTS = {
    "dino_p8": ("vit_small_patch8_224.dino", _dino),
    "dino_p16": ("vit_small_patch16_224.dino", _dino),
    "ibot": ("vit_small_patch16_224.dino", _ibot),
    "moco_v3": ("vit_base_patch16_224.dino", _moco_v3),
    "mae": ("vit_base_patch16_224.mae", _mae),
    "mae_encoder": ("vit_base_patch16_224.mae", lambda state: {"model": state}),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", _dinov2),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2.lvd142m", _dinov2_registers),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2.lvd142m", _dinov2_giant),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", _dinov3),
    "dinov3_biases": ("vit_small_patch16_dinov3_qkvb.lvd1689m", _dinov3),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3_qkvb.lvd1689m", _dinov3),
}


def _source(name, **overrides):
    return shake(random_vit(name, SMALL | overrides, seed=0)).eval()


def _saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _load(data, name, **overrides):
    return load_vit(data, "published.pth", name=name, overrides=SMALL | overrides)


def _assert_same_tokens(loaded, source):
    encoder = Encoder(loaded)
    images = random_images(1, 2 * encoder.patch_size, 3 * encoder.patch_size)
    pixels = (images.float() / 255 - encoder.mean) / encoder.std
    with torch.no_grad():
        want = source.forward_features(pixels)
    torch.testing.assert_close(encoder.all_tokens(images), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_vit__original_layouts_give_the_tokens_of_their_model(layout):
    name, publish = LAYOUTS[layout]
    source = _source(name)
    _assert_same_tokens(_load(_saved(publish(source.state_dict())), name), source)


@pytest.mark.parametrize("layout", ["dinov2", "dinov2_registers", "dinov3", "mae"])
def test_load_vit__timms_own_names_and_ours(layout):
    name, _ = LAYOUTS[layout]
    source = _source(name)
    # As on timm's hub, where a classifier may come along.
    state = source.state_dict() | {"head.weight": _noise(10, 48), "head.bias": _noise(10)}
    _assert_same_tokens(_load(safetensors.torch.save(state), name), source)
    ours = dump_encoder(source, name, overrides=SMALL)
    _assert_same_tokens(load_encoder(ours, "ours").vit, source)


def test_load_vit__original_layouts_as_safetensors():
    name, publish = LAYOUTS["dinov2_registers"]
    source = _source(name)
    _assert_same_tokens(_load(safetensors.torch.save(publish(source.state_dict())), name), source)


@pytest.mark.reports
@pytest.mark.parametrize("save", [_saved, lambda state: safetensors.torch.save(state, {"format": "pt"})])
@pytest.mark.parametrize("layout", BY_TRANSFORMERS)
def test_load_vit__files_of_hugging_faces_transformers(layout, save):
    name, publish = BY_TRANSFORMERS[layout]
    source = _source(name)
    published = publish(source.state_dict())
    assert not any(key.startswith("blocks.") or "qkv" in key for key in published)
    _assert_same_tokens(_load(save(published), name), source)


@pytest.mark.reports
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "encoder.layer.1.attention.attention.key.weight",
            r"has blocks\.1\.attn\.qkv\.weight of shape \(96, 48\)",
        ),
        ("embeddings.position_embeddings", "lacks pos_embed"),
    ],
)
def test_load_vit__refuses_such_a_file_without_a_tensor(lost, message):
    name, publish = BY_TRANSFORMERS["dino"]
    published = publish(_source(name).state_dict())
    del published[lost]
    with pytest.raises(WeightsError, match=rf"does not fit encoder\.name={name} .*: it {message}"):
        _load(_saved(published), name)


def test_load_vit__moco_v3_brings_its_normalisation_and_needs_its_heads():
    # timm's own weights of this name are normalised to 0.5.
    name = "vit_small_patch16_224"
    data = _saved(_moco_v3(_source(name).state_dict()))
    assert load_encoder(
        dump_encoder(_load(data, name), name, overrides=SMALL), "e"
    ).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    wide = _saved(_moco_v3(_source(name, embed_dim=384, depth=1, num_heads=6).state_dict()))
    with pytest.raises(WeightsError, match=r"12 attention heads, not the 6 of .*encoder\.overrides=\{num_heads: 12\}"):
        _load(wide, name, embed_dim=384, depth=1, num_heads=6)
    assert _load(wide, name, embed_dim=384, depth=1, num_heads=12).blocks[0].attn.num_heads == 12


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("moco_v3", {"module.base_encoder.cls_token": None}, r"it lacks cls_token \(1 tensors in all\)"),
        ("mae", {"blocks.2.norm1.weight": _noise(48)}, r"it holds blocks\.2\.norm1\.weight, which has no place in it"),
        ("dinov2", {"register_tokens": _noise(1, 4, 48)}, r"it holds reg_token, which has no place in it"),
        ("dinov2_registers", {"register_tokens": None}, r"it lacks reg_token"),
        ("dinov3", {"blocks.1.attn.qkv.bias": torch.ones(144)}, r"it holds blocks\.1\.attn\.qkv\.bias, which has no"),
        ("dinov3", {"cls_norm.weight": _noise(48)}, r"it holds cls_norm\.weight"),
    ],
)
def test_load_vit__refuses_a_tensor_too_few_or_too_many(layout, change, message):
    name, publish = LAYOUTS[layout]
    content = publish(_source(name).state_dict())
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(WeightsError, match=rf"published\.pth does not fit encoder\.name={name} with .*: {message}"):
        _load(_saved(content), name)
