import pytest
import torch

from tests.builders import random_images
from transfgu_ray.algorithms.scores.upsampling import slide, upsample_argmax, upsample_probabilities


@pytest.mark.parametrize("size_hw", [(64, 96), (37, 53), (8, 12), (5, 3)])
def test_upsample_argmax__equal_to_upsampling_everything(size_hw):
    maps = torch.randn(11, 8, 12, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(maps[None], size_hw, mode="bilinear", align_corners=False)[0]
    assert torch.equal(upsample_argmax(maps, size_hw), large.argmax(0))


def test_upsample_argmax__tie_goes_to_the_lowest_class():
    maps = torch.zeros(3, 2, 2)
    maps[1:, 0, 0] = 1.0
    assert upsample_argmax(maps, (2, 2)).tolist() == [[1, 0], [0, 0]]


def test_upsample_argmax__half_precision_maps():
    maps = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(upsample_argmax(maps, (9, 9)), upsample_argmax(maps.float(), (9, 9)))


def test_upsample_probabilities__softmax_of_the_upsampled_logits():
    maps = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    large = torch.nn.functional.interpolate(maps[None], (20, 31), mode="bilinear", align_corners=False)[0]
    found = torch.stack(list(upsample_probabilities(maps, (20, 31), [[0], [1, 3], [2], [4]])))
    assert found.dtype == torch.uint8
    shares = large.softmax(0)
    expected = torch.stack([shares[0], shares[1] + shares[3], shares[2], shares[4]])
    assert torch.equal(found, (255 * expected).round().to(torch.uint8))


def _colour_means(windows):
    """Class maps that depend on the patch alone: the mean of each colour over its 4 x 4 px."""
    return torch.nn.functional.avg_pool2d(windows.float(), 4)


@pytest.mark.parametrize("size", [(16, 24), (16, 28), (44, 24), (52, 76)])
def test_slide__covers_every_patch_of_any_size(size):
    image = random_images(1, *size)[0]
    seen = []

    def class_maps(windows):
        assert windows.shape[1:] == (3, 16, 24)
        seen.append(len(windows))
        return _colour_means(windows)

    assert torch.allclose(slide(class_maps, image, window_hw=(16, 24), patch_size=4), _colour_means(image[None])[0])
    assert max(seen) <= 4


def test_slide__a_patch_has_the_mean_of_the_windows_over_it():
    # Three windows, 8 px apart, whose maps are their numbers: 1, 2 and 3.
    numbers = iter((1.0, 2.0, 3.0))
    maps = slide(
        lambda windows: torch.stack([torch.full((1, 4, 4), next(numbers)) for _ in windows]),
        random_images(1, 16, 32)[0],
        window_hw=(16, 16),
        patch_size=4,
    )
    assert maps[0, 0].tolist() == [1, 1, 1.5, 1.5, 2.5, 2.5, 3, 3]
