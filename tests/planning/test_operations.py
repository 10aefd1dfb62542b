"""Floating-point operations by formula, against what torch counts while an encoder runs."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import random_images, tiny_encoder
from transfgu_ray.planning.operations import VitShape, least_seconds, shape_of, vit_operations


@pytest.mark.parametrize("image_hw", [(64, 64), (32, 96)])
@pytest.mark.parametrize("class_only", [False, True])
def test_vit_operations__are_those_that_torch_counts(image_hw: tuple[int, int], class_only: bool) -> None:
    encoder, images = tiny_encoder(), random_images(3, *image_hw)
    # Torch does not count fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (encoder.cls_tokens if class_only else encoder.all_tokens)(images)
    assert counter.get_total_flops() == 3 * vit_operations(shape_of(encoder), image_hw, class_only=class_only)


def test_shape_of__a_plain_vit() -> None:
    assert shape_of(tiny_encoder()) == VitShape(2, 24, mlp_weights=8 * 24**2, patch_size=8, num_prefix_tokens=1)


def test_vit_operations__of_vit_s_8_at_160_px() -> None:
    shape = VitShape(12, 384, mlp_weights=8 * 384**2, patch_size=8, num_prefix_tokens=1)
    # The help of --gpu-tflops and the README name this figure.
    assert vit_operations(shape, (160, 160), class_only=False) == pytest.approx(0.0201e12, rel=0.003)


def test_least_seconds__are_shared_by_the_gpus() -> None:
    assert [least_seconds(4 * 10**15, tflops=50.0, num_gpus=n) for n in (1, 8)] == [80, 10]
