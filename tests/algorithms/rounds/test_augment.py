from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.builders import random_images
from transfgu_ray.algorithms.rounds.augment import Augmentation, augment, crop_maps, random_crop_box

PLAIN = Augmentation(crop="area", crop_scale=(1.0, 1.0), flip_prob=0.0, jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0)


def _scores(num_concepts=3, h=4, w=4):
    return torch.rand(num_concepts, h, w, generator=torch.Generator().manual_seed(0))


def _augment(how, seed=0, image=None, scores=None, crop_hw=(32, 32), grid_hw=(4, 4), colour_seed=0):
    image = random_images(1, 32, 32)[0] if image is None else image
    scores = _scores() if scores is None else scores
    rng, colour_rng = np.random.default_rng(seed), np.random.default_rng(colour_seed)
    return augment(image, scores, crop_hw=crop_hw, grid_hw=grid_hw, how=how, rng=rng, colour_rng=colour_rng)


def _with(**changes):
    return replace(PLAIN, **changes)


def test_augment__nothing_asked_changes_nothing():
    image, scores = random_images(1, 32, 32)[0], _scores()
    got_image, got_scores = _augment(PLAIN, image=image, scores=scores)
    assert torch.equal(got_image, image)
    torch.testing.assert_close(got_scores, scores)


def test_augment__flip_turns_both():
    image, scores = random_images(1, 32, 32)[0], _scores()
    got_image, got_scores = _augment(_with(flip_prob=1.0), image=image, scores=scores)
    assert torch.equal(got_image, image.flip(-1))
    torch.testing.assert_close(got_scores, scores.flip(-1))


@pytest.mark.parametrize("kind", ["area", "side"])
@pytest.mark.parametrize("seed", range(8))
def test_augment__scores_stay_on_their_pixels(seed, kind):
    # The score maps hold the same ramps as the photograph; after any crop and flip they must still agree.
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    field = torch.stack([x / 128, y / 96, (x + y) / 224])
    scores = torch.nn.functional.avg_pool2d(field[None], 8)[0]
    how = _with(crop=kind, crop_scale=(0.4, 1.0), flip_prob=0.5)
    image = (255 * field).to(torch.uint8)
    crop, cropped = _augment(how, seed, image, scores, crop_hw=(48, 64), grid_hw=(6, 8))
    assert cropped.shape == (3, 6, 8)
    seen = torch.nn.functional.avg_pool2d(crop[None] / 255, 8)[0]
    # RoIAlign clamps at the outermost half patch.
    assert (seen - cropped)[:, 1:-1, 1:-1].abs().max() < 0.01
    assert (seen - cropped).abs().max() < 0.04


def test_augment__colour_leaves_scores_alone():
    image, scores = random_images(1, 32, 32)[0], _scores()
    for name in ("jitter_prob", "grey_prob", "blur_prob"):
        crop, cropped = _augment(_with(**{name: 1.0}), image=image, scores=scores)
        assert crop.dtype == torch.uint8
        assert not torch.equal(crop, image)
        torch.testing.assert_close(cropped, scores)


def test_augment__grey_has_equal_channels_and_blur_is_smooth():
    image = random_images(1, 32, 32)[0]
    grey, _ = _augment(_with(grey_prob=1.0), image=image)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    blurred, _ = _augment(_with(blur_prob=1.0), image=image)
    assert blurred.float().std() < 0.6 * image.float().std()


def test_augment__generator_is_the_only_randomness():
    how = _with(crop_scale=(0.4, 1.0), flip_prob=0.5, jitter_prob=1.0, grey_prob=0.2, blur_prob=0.5)
    torch.manual_seed(1)
    first = _augment(how, seed=4)
    torch.manual_seed(2)
    again = _augment(how, seed=4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], _augment(how, seed=5)[0])


def test_augment__colour_comes_before_the_crop_from_a_generator_of_its_own():
    image = random_images(1, 40, 40)[0]
    how = _with(jitter_prob=1.0, blur_prob=1.0)
    whole, _ = _augment(how, image=image, crop_hw=(40, 40))
    # Other samples of a step have the same colours, and the blur has seen pixels beyond their crops.
    halves = replace(how, crop="side", crop_scale=(0.5, 0.6))
    for seed in range(4):
        top, left, h, w = random_crop_box(40, 40, how=halves, rng=np.random.default_rng(seed))
        assert (h, w) == (20, 20)
        crop, _ = _augment(halves, seed, image, crop_hw=(20, 20))
        assert torch.equal(crop, whole[:, top : top + 20, left : left + 20])
    assert not torch.equal(_augment(how, image=image, crop_hw=(40, 40), colour_seed=1)[0], whole)


def test_augment__resizes_crops_bilinearly_without_antialias():
    image = random_images(1, 40, 60)[0]
    crop, _ = _augment(PLAIN, image=image, crop_hw=(20, 30))
    # At half the size each pixel is the mean of its four, by hand.
    four = image.float().unflatten(1, (20, 2)).unflatten(3, (30, 2)).mean((2, 4))
    assert (crop - four).abs().max() <= 0.5 + 1e-4
    # At a third of it, the middle one of nine: antialiasing would average them all.
    third, _ = _augment(PLAIN, image=image[:, :39], crop_hw=(13, 20))
    assert torch.equal(third, image[:, 1:39:3, 1::3])


def test_random_crop_box__sides_in_tenths_at_the_shape_of_the_photograph():
    how, rng = _with(crop="side", crop_scale=(0.4, 1.0)), np.random.default_rng(0)
    boxes = [random_crop_box(160, 320, how=how, rng=rng) for _ in range(400)]
    # The published code draws 4 to 9 tenths, each as likely.
    counts = {
        share: sum(h == int(np.float32(share) * 160) for *_, h, _ in boxes) for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    }
    assert sum(counts.values()) == 400
    assert min(counts.values()) > 40
    for top, left, h, w in boxes:
        assert w == 2 * h
        assert 0 <= top <= 160 - h
        assert 0 <= left <= 320 - w
    assert max(top / (160 - h) for top, _, h, _ in boxes) > 0.95


def test_random_crop_box__inside_with_area_and_ratio_as_asked():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        top, left, h, w = random_crop_box(100, 140, how=_with(crop_scale=(0.4, 0.9)), rng=rng)
        assert 0 <= top <= 100 - h
        assert 0 <= left <= 140 - w
        assert 0.74 <= w / h <= 1.36
        shares.append(h * w / 14000)
    assert 0.39 <= min(shares) < 0.45
    assert 0.7 < max(shares) <= 0.91


def test_random_crop_box__whole_image_when_none_fits():
    assert random_crop_box(10, 1000, how=PLAIN, rng=np.random.default_rng(0)) == (0, 0, 10, 1000)


def test_crop_maps__by_hand():
    scores = torch.arange(16.0).view(1, 4, 4)
    # The lower right quarter of a 32 px image, patch by patch; then every 2 x 2 patches averaged.
    quarter = crop_maps(scores, (16, 16, 32, 32), image_hw=(32, 32), grid_hw=(2, 2))
    torch.testing.assert_close(quarter, torch.tensor([[[10.0, 11.0], [14.0, 15.0]]]))
    coarse = crop_maps(scores, (0, 0, 32, 32), image_hw=(32, 32), grid_hw=(2, 2))
    torch.testing.assert_close(coarse, torch.tensor([[[2.5, 4.5], [10.5, 12.5]]]))
