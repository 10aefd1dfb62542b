import pytest
import torch

from transfgu_ray.algorithms.inference import upsample_argmax


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
