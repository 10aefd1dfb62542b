import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

from tests.builders import random_images, shake, tiny_encoder
from transfgu_ray.algorithms.encoder import Encoder, above_mean
from transfgu_ray.algorithms.weights import random_vit
from transfgu_ray.errors import WeightsError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _register_encoder() -> Encoder:
    overrides = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    return Encoder(shake(random_vit("vit_small_patch14_reg4_dinov2", overrides, seed=0)), MEAN, STD)


ENCODERS = {"tiny": (tiny_encoder, 8), "registers": (_register_encoder, 14)}


def _timm_tokens(encoder, images):
    pixels = (images.float() / 255 - encoder.mean) / encoder.std
    with torch.no_grad():
        return encoder.vit.forward_features(pixels)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder__tokens_equal_timm(kind):
    build, patch = ENCODERS[kind]
    encoder, images = build(), random_images(2, 5 * patch, 7 * patch)
    tokens = _timm_tokens(encoder, images)
    grid = encoder.grid_hw((5 * patch, 7 * patch))
    assert grid == (5, 7)
    torch.testing.assert_close(encoder.cls_tokens(images), tokens[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(encoder.patch_tokens(images), tokens[:, -35:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_class_row__attention_is_the_row_that_timm_computes(kind):
    build, patch = ENCODERS[kind]
    encoder, images = build(), random_images(2, 4 * patch, 4 * patch)
    row = encoder.class_row(encoder.prefix(images))
    seen = []
    encoder.vit.blocks[-1].attn.fused_attn = False
    hook = encoder.vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    _timm_tokens(encoder, images)
    hook.remove()
    torch.testing.assert_close(row.attention, seen[0][:, :, 0], rtol=0, atol=1e-6)
    # Registers and the class token itself are no patches.
    want = seen[0][:, :, 0, -16:].mean(1).view(2, 4, 4)
    torch.testing.assert_close(encoder.patch_attention(row, (4, 4)), want, rtol=0, atol=1e-6)


def test_cls_tokens__normalisation_is_that_of_the_weights():
    encoder = tiny_encoder()
    # timm publishes this model with mean and deviation 0.5, unlike DINO's.
    assert encoder.mean.flatten().tolist() == [0.5] * 3
    assert encoder.std.flatten().tolist() == [0.5] * 3


def test_cls_tokens__padding_a_batch_keeps_its_rows():
    encoder, images = tiny_encoder(), random_images(3, 32, 32)
    padded = torch.cat([images, torch.zeros(5, 3, 32, 32, dtype=torch.uint8)])
    alone, among = encoder.cls_tokens(images), encoder.cls_tokens(padded)[:3]
    step = torch.finfo(torch.float16).eps * alone.abs().max()
    assert (alone - among).abs().max() <= step
    assert torch.equal(encoder.cls_tokens(padded)[:3], among)


def test_cls_tokens__bfloat16_stays_close_and_returns_float32():
    encoder, images = tiny_encoder(), random_images(2, 32, 32)
    half = Encoder(encoder.vit, (0.5,) * 3, (0.5,) * 3, precision="bfloat16")
    exact, rough = encoder.cls_tokens(images), half.cls_tokens(images)
    assert rough.dtype == half.patch_tokens(images).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.999
    assert not torch.equal(exact, rough)


def test_encoder__is_frozen():
    encoder = tiny_encoder()
    assert not encoder.vit.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_saliency__patch_contrast_is_the_distance_from_the_mean_patch():
    encoder, images = tiny_encoder(), random_images(2, 24, 32)
    tokens = encoder.prefix(images)
    row = encoder.class_row(tokens)
    patches = encoder.patch_tokens(images)
    want = torch.stack([(p - p.mean(0)).pow(2).sum(-1).sqrt() for p in patches]).view(2, 3, 4)
    torch.testing.assert_close(encoder.saliency(tokens, row, (3, 4), "patch_contrast"), want, rtol=1e-4, atol=1e-5)
    attention = encoder.saliency(tokens, row, (3, 4), "attention")
    assert torch.equal(attention, encoder.patch_attention(row, (3, 4)))


def test_above_mean__each_image_against_its_own_mean():
    saliency = torch.tensor([[[0.0, 1.0], [2.0, 5.0]], [[10.0, 10.0], [10.0, 10.0]]])
    assert above_mean(saliency).tolist() == [[[False, False], [False, True]], [[False, False], [False, False]]]


def test_encoder__refuses_a_model_without_a_class_token():
    vit = VisionTransformer(embed_dim=24, depth=1, num_heads=3, class_token=False, global_pool="avg")
    with pytest.raises(WeightsError, match="not a timm vision transformer with a class token"):
        Encoder(vit)


def test_encoder__refuses_another_network():
    with pytest.raises(WeightsError, match=r"gives a ResNet.*vit_small_patch8_224\.dino"):
        Encoder(timm.create_model("resnet10t", num_classes=0))


def test_encoder__refuses_blocks_of_another_kind():
    vit = VisionTransformer(embed_dim=24, depth=1, num_heads=3, block_fn=ParallelThingsBlock)
    with pytest.raises(WeightsError, match=r"ParallelThingsBlock.*gradient is not implemented"):
        Encoder(vit)
