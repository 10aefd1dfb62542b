import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

from tests.builders import random_images, shake, tiny_encoder
from transfgu_ray.algorithms.encoder.blocks import dino_positions
from transfgu_ray.algorithms.encoder.checkpoints import random_vit
from transfgu_ray.algorithms.encoder.vit import Encoder, above_mean
from transfgu_ray.errors import WeightsError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _register_encoder() -> Encoder:
    overrides = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    return Encoder(shake(random_vit("vit_small_patch14_reg4_dinov2", overrides, seed=0)), MEAN, std=STD)


def _rope_encoder(name: str = "vit_small_patch16_dinov3", **overrides: int) -> Encoder:
    overrides = {"depth": 2, "embed_dim": 48, "num_heads": 3} | overrides
    return Encoder(shake(random_vit(name, overrides, seed=0), scale=0.1), MEAN, std=STD)


def _swiglu_encoder() -> Encoder:
    return _rope_encoder("vit_small_plus_patch16_dinov3_qkvb")


def _mixed_rope_encoder() -> Encoder:
    return _rope_encoder("vit_small_patch16_rope_mixed_224")


ENCODERS = {
    "tiny": (tiny_encoder, 8),
    "registers": (_register_encoder, 14),
    "rope": (_rope_encoder, 16),
    "rope_swiglu": (_swiglu_encoder, 16),
    "rope_mixed": (_mixed_rope_encoder, 16),
}


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
    encoder, images = build(), random_images(2, 2 * patch, 8 * patch)
    row = encoder.class_row(encoder.prefix(images), (2, 8))
    seen = []
    encoder.vit.blocks[-1].attn.fused_attn = False
    hook = encoder.vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    _timm_tokens(encoder, images)
    hook.remove()
    torch.testing.assert_close(row.attention, seen[0][:, :, 0], rtol=0, atol=1e-6)
    # Registers and the class token itself are not patches.
    want = seen[0][:, :, 0, -16:].mean(1).view(2, 2, 8)
    torch.testing.assert_close(encoder.patch_attention(row, (2, 8)), want, rtol=0, atol=1e-6)


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
    half = Encoder(encoder.vit, (0.5,) * 3, std=(0.5,) * 3, precision="bfloat16")
    exact, rough = encoder.cls_tokens(images), half.cls_tokens(images)
    assert rough.dtype == half.patch_tokens(images).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.999
    assert not torch.equal(exact, rough)


def test_encoder__is_frozen():
    encoder = tiny_encoder()
    assert not encoder.vit.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


@pytest.mark.parametrize("kind", ["tiny", "rope"])
def test_saliency__patch_contrast_is_the_distance_from_the_mean_patch(kind):
    build, patch = ENCODERS[kind]
    encoder, images = build(), random_images(2, 3 * patch, 4 * patch)
    tokens = encoder.prefix(images)
    row = encoder.class_row(tokens, (3, 4))
    patches = encoder.patch_tokens(images)
    want = torch.stack([(p - p.mean(0)).pow(2).sum(-1).sqrt() for p in patches]).view(2, 3, 4)
    torch.testing.assert_close(
        encoder.saliency(tokens, row, grid_hw=(3, 4), prior="patch_contrast"), want, rtol=1e-4, atol=1e-5
    )
    attention = encoder.saliency(tokens, row, grid_hw=(3, 4), prior="attention")
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


def _plain_dino_positions(pos_embed, native, height, width, num_prefix):
    """DINO's definition: bicubic by a scale factor that is a tenth of a patch too large."""
    patches = pos_embed[:, num_prefix:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    scale = ((height + 0.1) / native, (width + 0.1) / native)
    patches = torch.nn.functional.interpolate(
        patches, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False, antialias=False
    )
    assert patches.shape[2:] == (height, width)
    return torch.cat([pos_embed[:, :num_prefix], patches.permute(0, 2, 3, 1).reshape(1, height * width, -1)], 1)


@pytest.mark.parametrize("grid", [(3, 3), (5, 9), (28, 14), (40, 40), (56, 14)])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_dino_positions__equal_the_definition(grid, num_prefix):
    pos_embed = torch.randn(1, num_prefix + 28 * 28, 6, generator=torch.Generator().manual_seed(0))
    got = dino_positions(pos_embed, (28, 28), grid_hw=grid, num_prefix=num_prefix)
    want = _plain_dino_positions(pos_embed, 28, *grid, num_prefix)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    by_size = resample_abs_pos_embed(pos_embed, list(grid), [28, 28], num_prefix, antialias=False)
    assert not torch.allclose(got, by_size, atol=1e-3), "the tenth moves every sample"


def test_dino_positions__stay_on_their_own_grid():
    pos_embed = torch.randn(1, 1 + 16, 6)
    assert dino_positions(pos_embed, (4, 4), grid_hw=(4, 4), num_prefix=1) is pos_embed
    # The same number of patches in another shape is another grid.
    assert not torch.equal(dino_positions(pos_embed, (4, 4), grid_hw=(2, 8), num_prefix=1), pos_embed)


@pytest.mark.parametrize(
    ("name", "patch"),
    [("vit_tiny_patch16_224", 8), ("vit_small_patch14_reg4_dinov2", 14), ("eva02_tiny_patch14_224", 14)],
)
def test_encoder__interpolates_positions_as_dino(name, patch):
    overrides = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": patch}
    vit = shake(random_vit(name, overrides, seed=0))
    encoder, images = Encoder(vit, pos_embed_interpolation="dino"), random_images(2, 3 * patch, 5 * patch)
    # timm's own model of that size, with these positions.
    small = random_vit(name, overrides | {"img_size": (3 * patch, 5 * patch)}, seed=0).eval()
    native, num_prefix = vit.patch_embed.grid_size[0], 0 if vit.no_embed_class else 1
    positions = _plain_dino_positions(vit.pos_embed, native, 3, 5, num_prefix)
    small.load_state_dict(vit.state_dict() | {"pos_embed": positions})
    want = _timm_tokens(Encoder(small), images)
    torch.testing.assert_close(encoder.cls_tokens(images), want[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(encoder.patch_tokens(images), want[:, -15:], rtol=0, atol=2e-5)
    assert not torch.allclose(Encoder(vit).cls_tokens(images), want[:, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "overrides"), [("vit_small_patch16_dinov3", {}), ("vit_tiny_patch16_224", {"pos_embed": "none"})]
)
def test_encoder__interpolation_has_no_effect_without_positions(name, overrides):
    vit = random_vit(name, {"depth": 1, "embed_dim": 48, "num_heads": 3} | overrides, seed=0)
    images = random_images(1, 48, 64)
    timm, dino = (Encoder(vit, pos_embed_interpolation=how).all_tokens(images) for how in ("timm", "dino"))
    assert torch.equal(timm, dino)
