import io
import math

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from tests.builders import random_images, shake, small_resnet
from transfgu_ray.algorithms.encoder import resnet as resnets
from transfgu_ray.algorithms.encoder.resnet import (
    STAGE_CHANNELS,
    Backbone,
    PyramidDecoder,
    dump_resnet,
    load_resnet,
    random_resnet,
)
from transfgu_ray.algorithms.rounds.segmenter import Classifier, MaskTransformer
from transfgu_ray.errors import WeightsError

GRID = (4, 6)


@pytest.fixture(scope="module")
def backbone():
    # Distinct statistics, which those of a batch would replace if they were not frozen.
    resnet, rng = random_resnet(seed=0), torch.Generator().manual_seed(1)
    for module in resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.num_features, generator=rng)
            module.running_var *= 1 + torch.rand(module.num_features, generator=rng)
    return Backbone(resnet.train())


@pytest.fixture(scope="module")
def images():
    return random_images(2, 32, 48)


@pytest.fixture(scope="module")
def stages(backbone, images):
    """Outputs of the stages in torchvision's own forward pass."""
    seen = []
    layers = [getattr(backbone.resnet, f"layer{i}") for i in (1, 2, 3, 4)]
    hooks = [layer.register_forward_hook(lambda module, inputs, output: seen.append(output)) for layer in layers]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        backbone.resnet((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for hook in hooks:
        hook.remove()
    assert [tuple(maps.shape[1:]) for maps in seen] == [(256, 8, 12), (512, 4, 6), (1024, 2, 3), (2048, 1, 2)]
    return seen


def _resized(maps):
    return functional.interpolate(maps, GRID, mode="bilinear", align_corners=False)


def test_read__stages_side_by_side_at_each_patch(backbone, images, stages):
    got = backbone.read(images, GRID)
    assert got.shape == (2, 24, 3840)
    for part, maps in zip(got.split(STAGE_CHANNELS, dim=-1), stages, strict=True):
        torch.testing.assert_close(part, _resized(maps).flatten(2).transpose(1, 2))
    # Stride 8 is the grid itself; of stride 4 a patch takes the mean of its four.
    torch.testing.assert_close(got[0, 7, 256:768], stages[1][0, :, 1, 1])
    torch.testing.assert_close(got[0, 7, :256], stages[0][0, :, 2:4, 2:4].mean((1, 2)))


def test_read__statistics_and_weights_are_frozen(backbone, images):
    before = {name: value.clone() for name, value in backbone.resnet.named_buffers()}
    together = backbone.read(images, GRID)
    torch.testing.assert_close(backbone.read(images[:1], GRID), together[:1], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in backbone.resnet.named_buffers())
    assert not together.requires_grad
    assert not [name for name, weight in backbone.named_parameters() if weight.requires_grad]


class _Echo(torch.nn.Module):
    """A decoder that returns its tokens."""

    def forward(self, tokens, grid_hw):
        return tokens.transpose(1, 2).unflatten(-1, grid_hw), tokens


def test_pyramid_decoder__equals_convolutions_that_are_resized_and_added(backbone, images, stages):
    rng = torch.Generator().manual_seed(2)
    pyramid, want, bias = PyramidDecoder(_Echo(), 24), 0, 0
    with torch.no_grad():
        weights = pyramid.lateral.weight.split(STAGE_CHANNELS, dim=1)
        # The plain order: each stage through a 1x1 convolution with a bias, then up or down to the grid, then added.
        for maps, weight in zip(stages, weights, strict=True):
            own = torch.randn(24, generator=rng)
            want = want + _resized(functional.conv2d(maps, weight[:, :, None, None], own))
            bias = bias + own
        pyramid.lateral.bias.copy_(bias)
        got, _ = pyramid(backbone.read(images, GRID), GRID)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_pyramid_decoder__stages_start_as_convolutions_of_their_own():
    torch.manual_seed(0)
    for weight in PyramidDecoder(_Echo(), 24).lateral.weight.split(STAGE_CHANNELS, dim=1):
        # The bound of torch's own convolutions, uniform.
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    "decoder", [Classifier(5, 24), MaskTransformer(5, 24, num_layers=1, num_heads=3)], ids=["classifier", "segmenter"]
)
def test_pyramid_decoder__pyramid_and_either_decoder_get_gradients(decoder):
    tokens = torch.randn(2, 24, 3840, generator=torch.Generator().manual_seed(3))
    pyramid = PyramidDecoder(decoder, 24)
    logits, classes = pyramid(tokens, GRID)
    assert (logits.shape, classes.shape) == ((2, 5, *GRID), (2, 5, 24))
    functional.cross_entropy(logits, torch.zeros(2, *GRID, dtype=torch.int64)).backward()
    assert [name for name, weight in pyramid.named_parameters() if not weight.grad.any()] == []


def test_random_resnet__fixed_by_the_seed_and_leaves_the_global_state(small):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    one = random_resnet(4)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(one.conv1.weight, random_resnet(4).conv1.weight)
    assert not torch.equal(one.conv1.weight, random_resnet(5).conv1.weight)


@pytest.fixture
def small(monkeypatch):
    """In place of the ResNet-50."""
    monkeypatch.setattr(resnets, "_build", small_resnet)
    return shake(small_resnet())


def _saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _load(data):
    return load_resnet(data, "resnet.pth")


def _equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_load_resnet__own_safetensors(small):
    assert _equal(small, _load(dump_resnet(small)))


def test_load_resnet__dino_layouts(small):
    state, head = small.state_dict(), {"fc.weight": torch.zeros(3, 512)}
    assert _equal(small, _load(_saved(state | head)))
    teacher = {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)}
    student = {f"module.backbone.{name}": value + 1 for name, value in state.items()}
    # The noisier student is ignored.
    assert _equal(small, _load(_saved({"student": student, "teacher": teacher, "epoch": 800})))
    assert _equal(small, _load(_saved({"teacher": {f"module.{name}": value for name, value in teacher.items()}})))


def test_load_resnet__without_the_counters_that_training_reads(small):
    state = {name: value for name, value in small.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert _equal(small, _load(safetensors.torch.save(state)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bn1.running_var": None}, r"1 of its \d+ tensors .* the first bn1\.running_var"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"1 of its \d+ tensors .* the first conv1\.weight"),
    ],
)
def test_load_resnet__refuses_another_network(small, change, words):
    state = {name: value for name, value in (small.state_dict() | change).items() if value is not None}
    with pytest.raises(WeightsError, match=rf"resnet\.pth holds no ResNet-50 in torchvision's layout: {words}"):
        _load(safetensors.torch.save(state))


def test_load_resnet__never_unpickles_objects(small):
    with pytest.raises(WeightsError, match="pickled objects are never loaded"):
        _load(_saved({"teacher": small}))
