import numpy as np
import pytest
import torch

from transfgu_ray.algorithms.rounds.augment import Augmentation, augment
from transfgu_ray.algorithms.rounds.token_crops import augment_tokens, decode_tokens, encode_tokens

SCALE = (0.4, 1.0)


def _ramps(num=2, h=4, w=4):
    return torch.arange(num * h * w, dtype=torch.float32).view(num, h, w)


def _how(scale, flip_prob):
    return Augmentation(
        crop="area",
        crop_scale=scale,
        flip_prob=flip_prob,
        jitter_prob=0.0,
        grey_prob=0.0,
        blur_prob=0.0,
    )


def _augment(tokens, scores, seed, image_hw=(64, 64), grid_hw=(4, 4), scale=SCALE, flip_prob=0.0):
    return augment_tokens(
        tokens,
        scores,
        image_hw=image_hw,
        grid_hw=grid_hw,
        how=_how(scale, flip_prob),
        rng=np.random.default_rng(seed),
    )


def test_encode_tokens__come_back_as_maps_within_a_float16_step():
    tokens = np.random.default_rng(0).normal(0, 4, (6, 5)).astype(np.float32)
    data = encode_tokens(tokens)
    assert len(data) == 6 * 5 * 2
    maps = decode_tokens(data, (2, 3))
    assert maps.shape == (5, 2, 3)
    assert maps.dtype == np.float32
    # Patch 4 is the middle one of the second row.
    np.testing.assert_array_equal(maps[:, 1, 1], tokens[4].astype(np.float16))
    np.testing.assert_allclose(maps.reshape(5, 6).T, tokens, rtol=2.0**-11)


def test_augment_tokens__whole_image_is_left_as_it_is():
    # A share of 1 fits as the whole square or not at all, which gives the whole as well.
    tokens, scores = _ramps(3), _ramps(2)
    for seed in range(20):
        got, cropped = _augment(tokens, scores, seed, scale=(1.0, 1.0))
        assert torch.equal(got, tokens.flatten(1).T)
        assert torch.equal(cropped, scores)


def test_augment_tokens__crop_by_hand(monkeypatch):
    monkeypatch.setattr("transfgu_ray.algorithms.rounds.token_crops.random_crop_box", lambda *_, **__: (16, 32, 48, 32))
    tokens = _ramps(2)
    got, cropped = _augment(tokens, _ramps(1), 0, grid_hw=(2, 2))
    # The box is rows 1-3 and columns 2-3, and patch (r, c) holds 4 r + c. RoIAlign averages two samples down each half
    # of the box, at rows 0.875 and 1.625, then 2.375 and 3.125, of which the last is held at the outermost row, 3.
    by_hand = torch.tensor([[7.0, 8.0], [12.75, 13.75]])
    torch.testing.assert_close(cropped[0], by_hand)
    torch.testing.assert_close(got, torch.stack([by_hand.flatten(), by_hand.flatten() + 16], dim=1))


def test_augment_tokens__flip_turns_tokens_and_scores():
    tokens, scores = _ramps(3), _ramps(2)
    got, cropped = _augment(tokens, scores, 0, scale=(1.0, 1.0), flip_prob=1.0)
    assert torch.equal(got, tokens.flip(-1).flatten(1).T)
    assert torch.equal(cropped, scores.flip(-1))


@pytest.mark.parametrize("seed", range(6))
def test_augment_tokens__see_the_region_that_augment_draws(seed):
    scores = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(seed))
    how, rng = _how(SCALE, 0.5), np.random.default_rng(seed)
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    _, want = augment(
        image, scores, crop_hw=(48, 64), grid_hw=(6, 8), how=how, rng=rng, colour_rng=np.random.default_rng(0)
    )
    got, cropped = _augment(scores, scores, seed, (96, 128), (6, 8), flip_prob=0.5)
    assert torch.equal(cropped, want)
    assert torch.equal(got, want.flatten(1).T)
