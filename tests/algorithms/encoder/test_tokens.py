import pytest
import torch
from torchvision.models.resnet import Bottleneck

from tests.builders import random_images, small_resnet, tiny_encoder
from transfgu_ray.algorithms.encoder.resnet import Backbone
from transfgu_ray.algorithms.encoder.tokens import read_tokens, token_dim


def _plain(encoder, images, window):
    """The definition: each patch's windows one at a time."""
    patch = encoder.patch_size
    height, width = encoder.grid_hw((images.shape[2], images.shape[3]))
    found = torch.zeros(len(images), height, width, 2 * encoder.embed_dim)
    for row in range(height):
        for column in range(width):
            seen = []
            for top in range(0, images.shape[2] - window + 1, patch):
                for left in range(0, images.shape[3] - window + 1, patch):
                    y, x = row - top // patch, column - left // patch
                    if 0 <= y < window // patch and 0 <= x < window // patch:
                        crop = images[:, :, top : top + window, left : left + window]
                        own = encoder.patch_tokens(crop)[:, y * (window // patch) + x]
                        seen.append(torch.cat([own, encoder.cls_tokens(crop)], dim=1))
            found[:, row, column] = torch.stack(seen).mean(0)
    return found.flatten(1, 2)


@pytest.mark.parametrize("registers", [0, 2])
def test_read_tokens__windows_equal_the_plain_definition(registers):
    encoder = tiny_encoder(reg_tokens=registers)
    images = random_images(2, 32, 48)
    tokens = read_tokens(encoder, images, window=16)
    assert tokens.shape == (2, 4 * 6, 48)
    assert torch.allclose(tokens, _plain(encoder, images, 16), atol=1e-5)


def test_read_tokens__one_window_over_all_is_patch_and_class_token():
    encoder, images = tiny_encoder(), random_images(3, 32, 32)
    tokens = read_tokens(encoder, images, window=32)
    own, of_class = tokens.split(encoder.embed_dim, dim=-1)
    assert torch.allclose(own, encoder.patch_tokens(images), atol=1e-6)
    assert torch.allclose(of_class, encoder.cls_tokens(images)[:, None].expand_as(of_class), atol=1e-5)


def test_read_tokens__without_windows_are_the_patch_tokens():
    encoder, images = tiny_encoder(), random_images(2, 32, 32)
    assert torch.equal(read_tokens(encoder, images, window=None), encoder.patch_tokens(images))


def test_read_tokens__what_lies_beyond_its_windows_does_not_change_a_patch():
    encoder, images = tiny_encoder(), random_images(1, 48, 48)
    other = images.clone()
    other[:, :, :, 32:] = 0
    one, two = (read_tokens(encoder, each, window=16).unflatten(1, (6, 6)) for each in (images, other))
    # Windows of two patches: the third column is the last whose windows all end at 32 px.
    assert torch.equal(one[:, :, :3], two[:, :, :3])
    assert not torch.allclose(one[:, :, 3], two[:, :, 3])


def test_read_tokens__do_not_depend_on_the_number_of_windows_per_forward(monkeypatch):
    encoder, images = tiny_encoder(), random_images(3, 32, 32)
    together = read_tokens(encoder, images, window=16)
    monkeypatch.setattr("transfgu_ray.algorithms.encoder.tokens._WINDOWS_PER_FORWARD", 5)
    assert torch.allclose(read_tokens(encoder, images, window=16), together, atol=1e-6)


def test_read_tokens__of_a_backbone_are_on_the_patch_grid_of_the_encoder(monkeypatch):
    encoder, images, seen = tiny_encoder(), random_images(2, 32, 48), []
    backbone = Backbone(small_resnet(Bottleneck))
    monkeypatch.setattr(encoder, "all_tokens", seen.append)
    tokens = read_tokens(encoder, images, window=None, backbone=backbone)
    assert torch.equal(tokens, backbone.read(images, (4, 6)))
    assert tokens.shape == (2, 24, token_dim(24, None, "resnet50_fpn"))
    assert seen == [], "the encoder is not run as well"


def test_token_dim__doubles_with_windows():
    assert (token_dim(24, None), token_dim(24, 16)) == (24, 48)
