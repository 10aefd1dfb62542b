"""The augmentation of a batch against one image at a time, torchvision's operations, and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import functional as tv

from tests.builders import random_images
from transfgu_ray.algorithms.dino import multicrop
from transfgu_ray.algorithms.dino.multicrop import MultiCrop, multi_crop, random_boxes

# The crop alone.
PLAIN = MultiCrop(
    global_size=16,
    local_size=8,
    num_local=2,
    global_scale=(1.0, 1.0),
    local_scale=(0.1, 0.3),
    jitter_prob=0.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey_prob=0.0,
    blur_probs=(0.0, 0.0, 0.0),
    solarise_prob=0.0,
)
COLOURFUL = replace(
    PLAIN, global_scale=(0.4, 1.0), jitter_prob=0.8, grey_prob=0.2, blur_probs=(1.0, 0.5, 0.5), solarise_prob=0.5
)


class Fixed(np.random.Generator):
    """Generator with given uniform draws, in order; `random` is below every probability but 0."""

    def __init__(self, *uniform: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._uniform = list(uniform)

    def random(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def uniform(self, low: float, high: float, count: int) -> np.ndarray:
        return np.full(count, self._uniform.pop(0))


def pixels(num: int = 3, side: int = 24, seed: int = 0) -> torch.Tensor:
    return random_images(num, side, side, seed).float() / 255


def test_multi_crop__sizes_and_range():
    views = multi_crop(random_images(3, 40, 40), COLOURFUL, np.random.default_rng(0))
    assert [tuple(view.shape) for view in views] == [(3, 3, 16, 16)] * 2 + [(3, 3, 8, 8)] * 2
    assert all(view.min() >= 0 and view.max() <= 1 for view in views)


def test_multi_crop__is_fixed_by_the_generator():
    images = random_images(4, 40, 40)
    one, same, other = (multi_crop(images, COLOURFUL, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_multi_crop__an_image_does_not_see_its_neighbours():
    images = random_images(4, 40, 40)
    changed = images.clone()
    changed[2] = 255 - changed[2]
    one, other = (multi_crop(batch, COLOURFUL, np.random.default_rng(1)) for batch in (images, changed))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
        assert not torch.equal(a[2], b[2])


def test_multi_crop__box_is_cut_and_resized(monkeypatch):
    # Half of a 64 px image, from (8, 16), to 16 px: each output pixel is the mean of four, exactly.
    monkeypatch.setattr(multicrop, "random_boxes", lambda count, *_, **__: np.tile([8.0, 16.0, 40.0, 48.0], (count, 1)))
    images = random_images(8, 64, 64)
    views = multi_crop(images, replace(PLAIN, num_local=0), np.random.default_rng(3))
    cut = avg_pool2d(images[:, :, 16:48, 8:40].float() / 255, 2)
    turned = [sum(same_but_turned(view, want) for view, want in zip(batch, cut, strict=True)) for batch in views]
    assert all(0 < number < 8 for number in turned), "some are flipped, some are not"


def same_but_turned(view: torch.Tensor, want: torch.Tensor) -> bool:
    """Return whether the view is flipped; flipped back, it must equal the wanted one."""
    turned = not torch.allclose(view, want, atol=1e-6)
    torch.testing.assert_close(view.flip(-1) if turned else view, want, atol=1e-6, rtol=0)
    return turned


def test_random_boxes__lie_inside_and_have_the_asked_area_and_ratio():
    boxes = random_boxes(4000, 50, width=50, scale=(0.1, 0.5), rng=np.random.default_rng(0))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 50
    assert 0.1 <= (width * height / 2500).min() < 0.11
    assert 0.49 < (width * height / 2500).max() <= 0.5
    assert width.max() / 50 < 1
    assert (width / height).min() == pytest.approx(3 / 4, rel=0.01)
    assert (width / height).max() == pytest.approx(4 / 3, rel=0.01)


def test_random_boxes__longer_than_a_side_is_cut_to_it():
    boxes = random_boxes(100, 30, width=60, scale=(1.0, 1.0), rng=np.random.default_rng(0))
    np.testing.assert_array_equal(boxes[:, [1, 3]], np.tile([0, 30], (100, 1)))
    assert (boxes[:, 2] <= 60).all()


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((1.3, 1.0, 1.0, 0.0), lambda image: tv.adjust_brightness(image, 1.3)),
        ((1.0, 0.6, 1.0, 0.0), lambda image: tv.adjust_contrast(image, 0.6)),
        ((1.0, 1.0, 0.3, 0.0), lambda image: tv.adjust_saturation(image, 0.3)),
        ((0.7, 0.8, 1.0, 0.0), lambda image: tv.adjust_contrast(tv.adjust_brightness(image, 0.7), 0.8)),
    ],
    ids=["brightness", "contrast", "saturation", "brightness then contrast"],
)
def test_recolour__equals_torchvision(draws, expected):
    # Between 0.25 and 0.75 nothing is clipped; torchvision clips after every operation.
    view = 0.25 + pixels() / 2
    got = multicrop._recolour(view, replace(PLAIN, jitter_prob=1.0), Fixed(*draws))
    # torchvision's luma weights have four digits, ours three.
    torch.testing.assert_close(got, expected(view), atol=5e-4, rtol=0)


def test_recolour__grey_is_torchvisions():
    view = pixels()
    got = multicrop._recolour(view, replace(PLAIN, grey_prob=1.0), Fixed(1.0, 1.0, 1.0, 0.0))
    torch.testing.assert_close(got, tv.rgb_to_grayscale(view, 3), atol=1e-3, rtol=0)


def test_recolour__hue_keeps_luma_and_comes_round():
    view = 0.4 + pixels() / 5
    how = replace(PLAIN, jitter_prob=1.0, hue=0.5)
    turned, whole = (multicrop._recolour(view, how, Fixed(1.0, 1.0, 1.0, hue)) for hue in (1 / 3, 1.0))
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert (turned - view).abs().max() > 0.05
    torch.testing.assert_close((turned * luma).sum(1), (view * luma).sum(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(whole, view, atol=1e-5, rtol=0)


def test_blur__equals_torchvisions_kernel():
    view = pixels(2, 40)
    # Sigma is in px at 224, so at 40 px it is 40/224 of that; the kernel is cut at two sigmas on each side.
    sigma = 1.9
    got = multicrop._blur(view, np.array([True, False]), Fixed(sigma * 224 / 40))
    reach = int(np.ceil(2 * sigma))
    torch.testing.assert_close(got[0], tv.gaussian_blur(view[0], [2 * reach + 1] * 2, [sigma] * 2), atol=1e-5, rtol=0)
    assert torch.equal(got[1], view[1])


def test_multi_crop__solarises_the_second_view_alone(monkeypatch):
    monkeypatch.setattr(multicrop, "random_boxes", lambda count, *_, **__: np.tile([0.0, 0.0, 32.0, 32.0], (count, 1)))
    images = random_images(3, 32, 32)
    first, second = multi_crop(images, replace(PLAIN, num_local=0, solarise_prob=1.0), np.random.default_rng(0))
    whole = avg_pool2d(images.float() / 255, 2)
    for view, want in zip(first, whole, strict=True):
        same_but_turned(view, want)
    for view, want in zip(second, torch.where(whole >= 0.5, 1 - whole, whole), strict=True):
        same_but_turned(view, want)
