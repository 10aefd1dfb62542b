import json
import pickle

import pytest
import safetensors.torch
import torch

from tests.builders import TINY_OVERRIDES, TINY_VIT, shake
from transfgu_ray.algorithms.encoder.checkpoints import (
    build_vit,
    dump_encoder,
    hash_weights,
    load_encoder,
    load_untrained,
    load_vit,
    random_vit,
    read_safetensors,
    with_interpolation,
)
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.errors import WeightsError


@pytest.fixture(scope="module")
def vit():
    return shake(random_vit(TINY_VIT, TINY_OVERRIDES, seed=0))


def _saved(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    return (tmp_path / "weights.pth").read_bytes()


def _load(data):
    return load_vit(data, "weights.pth", name=TINY_VIT, overrides=TINY_OVERRIDES)


def _equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def test_random_vit__fixed_by_the_seed_and_leaves_the_global_state():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    first = random_vit(TINY_VIT, TINY_OVERRIDES, seed=4)
    assert torch.equal(torch.rand(3), want)
    assert _equal(first, random_vit(TINY_VIT, TINY_OVERRIDES, seed=4))
    assert not _equal(first, random_vit(TINY_VIT, TINY_OVERRIDES, seed=5))


@pytest.mark.parametrize("key", [None, "state_dict", "model", "teacher", "student"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_load_vit__checkpoint_layouts(vit, tmp_path, key, prefix):
    # DINO's checkpoints hold a projection head besides the backbone.
    state = _prefixed(vit.state_dict(), prefix) | {"module.head.mlp.0.weight": torch.zeros(3, 3)}
    content = state if key is None else {key: state, "epoch": 100}
    assert _equal(vit, _load(_saved(content, tmp_path)))


def test_load_vit__teacher_before_student(vit, tmp_path):
    other = random_vit(TINY_VIT, TINY_OVERRIDES, seed=9)
    content = {"student": other.state_dict(), "teacher": vit.state_dict()}
    assert _equal(vit, _load(_saved(content, tmp_path)))


def test_load_vit__half_precision_becomes_float32(vit, tmp_path):
    half = {name: value.half() for name, value in vit.state_dict().items()}
    loaded = _load(_saved(half, tmp_path)).state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["norm.weight"], half["norm.weight"].float())


def test_load_vit__any_safetensors(vit):
    assert _equal(vit, _load(safetensors.torch.save(vit.state_dict())))


def test_load_vit__own_safetensors_bring_their_architecture(vit):
    data = dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES)
    assert _equal(vit, load_vit(data, "e.safetensors", name="vit_small_patch8_224.dino", overrides={}))


def test_dump_encoder__metadata_says_how_to_rebuild_it(vit):
    state, metadata = read_safetensors(dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES), "e")
    assert metadata["name"] == TINY_VIT
    assert json.loads(metadata["overrides"]) == TINY_OVERRIDES
    assert metadata["weights_sha256"] == hash_weights(vit.state_dict()) == hash_weights(state)


def test_load_encoder__same_tokens_as_the_model_that_was_dumped(vit):
    encoder = load_encoder(dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES), "e", precision="bfloat16")
    assert _equal(vit, encoder.vit)
    assert encoder.precision == "bfloat16"
    assert encoder.mean.flatten().tolist() == [0.5] * 3


def test_hash_weights__order_free_but_not_content_free():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    want = hash_weights({"a": a, "b": b})
    assert hash_weights({"b": b, "a": a}) == want
    changed = [{"a": b, "b": a}, {"a": a, "c": b}, {"a": a, "b": b + 1e-6}, {"a": a.half(), "b": b}]
    changed.append({"a": a, "b": b[0]})
    assert len({want, *map(hash_weights, changed)}) == 6


class _Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_load_vit__refuses_pickled_objects_without_running_them(vit, tmp_path, how):
    content = {"model": vit.state_dict(), "args": _Trap(tmp_path / "sprung")}
    data = _saved(content, tmp_path) if how == "torch" else pickle.dumps(content, protocol=2)
    with pytest.raises(WeightsError, match=r"weights\.pth is not a checkpoint of plain tensors.*state_dict alone"):
        _load(data)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_load_vit__refuses_other_files(data):
    with pytest.raises(WeightsError, match=r"weights\.pth is not a checkpoint"):
        _load(data)


def test_load_vit__refuses_truncated_safetensors(vit):
    data = safetensors.torch.save(vit.state_dict())
    with pytest.raises(WeightsError, match=r"weights\.pth is not a readable safetensors file"):
        _load(data[: len(data) // 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_load_vit__refuses_nan_and_infinity(vit, bad):
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][3, 4] = bad
    with pytest.raises(WeightsError, match=r"values in blocks\.1\.mlp\.fc1\.weight \(1 tensors in all\)"):
        _load(safetensors.torch.save(state))


def test_load_vit__refuses_a_list_of_tensors(tmp_path):
    with pytest.raises(WeightsError, match="holds a list, not a state dict"):
        _load(_saved([torch.zeros(2)], tmp_path))


def test_load_vit__refuses_weights_of_another_model(vit, tmp_path):
    state = vit.state_dict()
    short = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    with pytest.raises(WeightsError, match=r"encoder\.name=vit_tiny.*lacks blocks\.1\.norm1\.weight \(12 tensors"):
        _load(_saved(short, tmp_path))
    wide = state | {"norm.weight": torch.zeros(99)}
    with pytest.raises(WeightsError, match=r"has norm\.weight of shape \(99,\), not \(24,\)"):
        _load(_saved(wide, tmp_path))


@pytest.mark.parametrize("name", ["vit_of_nobody", "vit_small_patch8_224.nobody"])
def test_build_vit__refuses_an_unknown_name(name):
    with pytest.raises(WeightsError, match=rf"encoder\.name={name} is unknown to timm"):
        build_vit(name, {})


def test_build_vit__without_positions_keeps_the_class_token_and_moves_with_the_patches():
    encoder = Encoder(shake(random_vit(TINY_VIT, TINY_OVERRIDES | {"pos_embed": "none"}, 0)))
    patch = encoder.patch_size
    image = torch.randint(0, 256, (1, 3, 2 * patch, 3 * patch), dtype=torch.uint8)
    rolled = image.roll(patch, 3)
    assert encoder.prefix(image).shape[1] == 1 + 6
    torch.testing.assert_close(encoder.cls_tokens(rolled), encoder.cls_tokens(image))
    moved = encoder.patch_tokens(image).unflatten(1, (2, 3)).roll(1, 2).flatten(1, 2)
    torch.testing.assert_close(encoder.patch_tokens(rolled), moved)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (TINY_VIT, {"embed_dim": 25}),
        (TINY_VIT, {"depth": "none"}),
        (TINY_VIT, {"pos_embed": 3}),
        ("resnet10t", {"depth": 2}),
    ],
)
def test_build_vit__refuses_overrides_that_do_not_fit(name, overrides):
    with pytest.raises(WeightsError, match=rf"encoder\.name={name} with overrides .* is not a usable"):
        build_vit(name, overrides)


def test_load_encoder__refuses_safetensors_of_others(vit):
    with pytest.raises(WeightsError, match="not an encoder written by this package"):
        load_encoder(safetensors.torch.save(vit.state_dict()), "e")


def test_dump_encoder__half_precision_and_facts(vit):
    data = dump_encoder(
        vit, TINY_VIT, overrides=TINY_OVERRIDES, dtype=torch.float16, facts={"recipe": "{}", "name": "another"}
    )
    state, metadata = read_safetensors(data, "mine")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert (metadata["recipe"], metadata["name"]) == ("{}", TINY_VIT)
    assert metadata["weights_sha256"] == hash_weights(state)
    loaded = load_encoder(data, "mine").vit.state_dict()
    assert all(torch.equal(value, vit.state_dict()[name].half().float()) for name, value in loaded.items())
    assert len(data) < 0.6 * len(dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES))


def test_with_interpolation__is_kept_beside_the_weights(vit):
    plain = dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES, facts={"recipe": "{}"})
    assert load_encoder(plain, "e").pos_embed_interpolation == "timm"
    assert with_interpolation(plain, "e", "timm") == plain
    data = with_interpolation(plain, "e", "dino")
    for encoder in (load_encoder(data, "e"), load_untrained(data, "e", seed=1)):
        assert encoder.pos_embed_interpolation == "dino"
    (state, facts), (was, before) = read_safetensors(data, "e"), read_safetensors(plain, "e")
    assert facts == before | {"pos_embed_interpolation": "dino"}
    assert hash_weights(state) == hash_weights(was)
    assert load_encoder(with_interpolation(data, "e", "timm"), "e").pos_embed_interpolation == "timm"


def test_dump_encoder__the_same_model_gives_the_same_bytes():
    vit = random_vit(TINY_VIT, TINY_OVERRIDES, 0)
    dumps = {dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES) for _ in range(5)}
    assert len(dumps) == 1
    changed = {with_interpolation(*dumps, "here", "dino") for _ in range(5)}
    assert len(changed) == 1
    state, metadata = read_safetensors(*changed, "here")
    assert metadata["name"] == TINY_VIT
    assert all(torch.equal(state[key], value) for key, value in vit.state_dict().items())
