import pytest
import torch

from tests.builders import random_images, shake, tiny_encoder
from transfgu_ray.algorithms.encoder.checkpoints import random_vit
from transfgu_ray.algorithms.encoder.vit import ClassRow, Encoder
from transfgu_ray.algorithms.labels.cam import attention_gradients, keep_top_mass, response_maps
from transfgu_ray.bench.published import plain_gradients


def _register_encoder() -> Encoder:
    return Encoder(shake(random_vit("vit_small_patch14_reg4_dinov2", {"depth": 2}, seed=0), scale=0.02))


def _rope_encoder(name: str = "vit_small_patch16_dinov3", **overrides: int) -> Encoder:
    overrides = {"depth": 2, "embed_dim": 48, "num_heads": 3} | overrides
    return Encoder(shake(random_vit(name, overrides, seed=0), scale=0.1))


def _split_bias_swiglu_encoder() -> Encoder:
    return _rope_encoder("vit_small_plus_patch16_dinov3_qkvb")


def _mixed_rope_encoder() -> Encoder:
    return _rope_encoder("vit_small_patch16_rope_mixed_224")


def _shared_keys_encoder() -> Encoder:
    # Four queries per key, normalised queries and keys, three projections.
    grouped = {"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "qk_norm": True, "scale_attn_inner": True}
    return _rope_encoder(num_heads=4, **grouped)


def _dino_encoder() -> Encoder:
    return Encoder(random_vit("vit_small_patch8_224.dino", {}, seed=0))


def _row(encoder: Encoder, images: torch.Tensor) -> ClassRow:
    return encoder.class_row(encoder.prefix(images), encoder.grid_hw(tuple(images.shape[2:])))


@pytest.mark.parametrize(
    ("build", "size", "num_concepts"),
    [
        (tiny_encoder, 40, 1),
        (tiny_encoder, 40, 27),
        (tiny_encoder, 40, 171),
        (_register_encoder, 56, 1),
        (_register_encoder, 56, 27),
        (_register_encoder, 56, 171),
        (_dino_encoder, 64, 27),
        (_rope_encoder, 64, 1),
        (_rope_encoder, 64, 3),
        (_split_bias_swiglu_encoder, 64, 3),
        (_mixed_rope_encoder, 48, 3),
        (_shared_keys_encoder, 48, 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).strip("_"),
)
def test_attention_gradients__equal_k_backward_passes_through_the_network(build, size, num_concepts):
    # Not the default size, and not square.
    encoder = build()
    images = random_images(2, size, size + encoder.patch_size)
    centroids = torch.randn(num_concepts, encoder.embed_dim, generator=torch.Generator().manual_seed(1))
    got = attention_gradients(_row(encoder, images), centroids)
    want = plain_gradients(encoder, images, centroids)
    assert got.shape == want.shape
    # Map by map, so that a small one does not hide behind a large one.
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-5


def test_attention_gradients__more_concepts_than_one_chunk():
    encoder, images = tiny_encoder(), random_images(1, 24, 24)
    row = _row(encoder, images)
    centroids = torch.randn(300, encoder.embed_dim, generator=torch.Generator().manual_seed(1))
    apart = torch.cat([attention_gradients(row, c[None]) for c in centroids], dim=1)
    torch.testing.assert_close(attention_gradients(row, centroids), apart, rtol=1e-4, atol=1e-7)


def _maps(centroids, gradient_scale=1.0, keep_mass=None, zeroed="cam"):
    encoder, images = tiny_encoder(), random_images(2, 32, 24)
    row = _row(encoder, images)
    return response_maps(
        encoder,
        row,
        centroids=centroids,
        grid_hw=(4, 3),
        gradient_scale=gradient_scale,
        keep_mass=keep_mass,
        zeroed=zeroed,
    )


@pytest.fixture
def centroids():
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(2))


def test_response_maps__equal_the_formula(centroids):
    encoder, images = tiny_encoder(), random_images(2, 32, 24)
    gradients = plain_gradients(encoder, images, centroids)[:, :, 1:]
    attention = _row(encoder, images).attention[:, :, 1:].mean(1)
    assert (gradients > 0).any()
    assert (gradients < 0).any()
    for scale in (1.0, 0.125):
        cam = scale * (-gradients).clamp(min=0)
        want = cam + (attention / attention.max(1, keepdim=True).values)[:, None]
        torch.testing.assert_close(_maps(centroids, scale), want.view(2, 6, 4, 3), rtol=1e-5, atol=1e-6)


def test_response_maps__zeroed_whole_where_the_gradient_is_positive(centroids):
    gradients = plain_gradients(tiny_encoder(), random_images(2, 32, 24), centroids)[:, :, 1:].view(2, 6, 4, 3)
    want = _maps(centroids, keep_mass=0.8) * (gradients <= 0)
    got = _maps(centroids, keep_mass=0.8, zeroed="map")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert 0.2 < (got == 0).float().mean() < 0.8


def test_response_maps__permuting_concepts_permutes_maps(centroids):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(_maps(centroids[order]), _maps(centroids)[:, order], rtol=1e-5, atol=1e-7)


def test_response_maps__length_of_a_centroid_is_without_effect(centroids):
    factors = torch.tensor([0.01, 0.5, 1.0, 3.0, 20.0, 1000.0])[:, None]
    torch.testing.assert_close(_maps(centroids * factors), _maps(centroids), rtol=1e-5, atol=1e-7)


def test_response_maps__keep_mass_drops_only_cam(centroids):
    full, kept = _maps(centroids, 100.0), _maps(centroids, 100.0, keep_mass=0.8)
    dropped = kept < full
    assert dropped.any()
    assert torch.equal(kept[~dropped], full[~dropped])
    # Where the CAM was dropped, only the attention is left, which all concepts share.
    shared = full.amin(1, keepdim=True).expand_as(full)
    assert (kept[dropped] <= shared[dropped]).all()


def test_keep_top_mass__equal_to_a_loop():
    # Whole numbers, so that sums are exact and both agree on the bound itself.
    maps = torch.randint(0, 9, (3, 4, 12), generator=torch.Generator().manual_seed(0)).float()
    maps[0, 0] = 0
    got = keep_top_mass(maps, 0.5)
    for image in range(3):
        for concept in range(4):
            left = maps[image, concept].tolist()
            want, mass = [], 0.0
            for value in sorted(left, reverse=True):
                if mass >= 0.5 * sum(left):
                    break
                want.append(value)
                mass += value
            kept = [value for value in got[image, concept].tolist() if value]
            assert sorted(kept, reverse=True) == want
            # Kept values stay in their place.
            assert all(g in (0.0, m) for g, m in zip(got[image, concept].tolist(), left, strict=True))
