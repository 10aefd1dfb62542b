"""Published decoders: state dicts made here in their layout, against a plain rewrite of the published code."""

import io
import math

import pytest
import torch

from tests.plain_decoder import plain_decode
from transfgu_ray.algorithms.rounds.published import background_last, read_released_decoder
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.errors import WeightsError

D, CLASSES, LAYERS, HEADS, GRID = 24, 5, 2, 3, (3, 4)


def published_state(num_classes=CLASSES, d=D, layers=LAYERS, seed=0):
    """A state dict in the layout of the published files: no biases of queries, keys and values."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"cls_emb": (1, num_classes, d), "proj_patch": (d, d), "proj_classes": (d, d)}
    shapes |= {"proj_dec.weight": (d, d), "proj_dec.bias": (d,)}
    shapes |= {f"decoder_norm.{part}": (d,) for part in ("weight", "bias")}
    shapes |= {f"mask_norm.{part}": (num_classes,) for part in ("weight", "bias")}
    for i in range(layers):
        linear = {"attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * d, d)
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{part}": (d,) for part in ("weight", "bias")}
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _masks(state, tokens, norm_eps=1e-5):
    decoder = MaskTransformer(CLASSES, D, num_layers=LAYERS, num_heads=HEADS, norm_eps=norm_eps).eval()
    decoder.load_state_dict(state)
    with torch.no_grad():
        return decoder(tokens, GRID)[0].flatten(2).transpose(1, 2)


def _tokens():
    return torch.randn(2, math.prod(GRID), D, generator=torch.Generator().manual_seed(1))


def test_read_released_decoder__masks_are_those_of_the_published_code():
    state = published_state()
    # Embeddings so small that the norm's epsilon matters.
    state["cls_emb"] *= 0.01
    found = read_released_decoder(saved(state), "voc_decoder.pt")
    assert found[1:] == (CLASSES, D, LAYERS)
    want, _ = plain_decode(state, _tokens(), HEADS)
    torch.testing.assert_close(_masks(found.state, _tokens()), want, rtol=1e-4, atol=1e-4)
    assert (_masks(found.state, _tokens(), norm_eps=1e-6) - want).abs().max() > 1e-2


def test_read_released_decoder__leaves_the_global_random_state():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    read_released_decoder(saved(published_state()), "d.pt")
    assert torch.equal(torch.rand(1), want)


def test_background_last__rolls_the_masks():
    state = read_released_decoder(saved(published_state()), "d.pt").state
    plain, rolled = _masks(state, _tokens()), _masks(background_last(state), _tokens())
    torch.testing.assert_close(rolled, plain[..., [1, 2, 3, 4, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_emb": None}, "it has no cls_emb of shape"),
        ({"cls_emb": torch.zeros(5, 24)}, "it has no cls_emb of shape"),
        ({"blocks.1.mlp.fc1.weight": None}, r"of 2 layers: it lacks blocks\.1\.mlp\.fc1\.weight \(1 tensors"),
        ({"mask_norm.weight": torch.zeros(6)}, r"it has mask_norm\.weight of shape \(6,\), not \(5,\)"),
        ({"head.weight": torch.zeros(3)}, r"it holds head\.weight, which has no place in it"),
        ({"epoch": 3}, "it is not a plain state dict"),
    ],
)
def test_read_released_decoder__refuses_another_layout(change, message):
    state = published_state() | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(WeightsError, match=rf"d\.pt is not a published decoder.*{message}"):
        read_released_decoder(saved(state), "d.pt")


def test_read_released_decoder__refuses_other_files():
    with pytest.raises(WeightsError, match=r"d\.pt is not a checkpoint of plain tensors"):
        read_released_decoder(b"no decoder", "d.pt")
    with pytest.raises(WeightsError, match="it is not a plain state dict"):
        read_released_decoder(saved([torch.zeros(1)]), "d.pt")
