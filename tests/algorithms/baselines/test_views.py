from dataclasses import replace

import numpy as np
import torch

from tests.builders import random_images, tiny_encoder
from transfgu_ray.algorithms.baselines import views
from transfgu_ray.algorithms.baselines.views import token_views

UNCOLOURED = replace(views.VIEWS, crop_scale=(1.0, 1.0), flip_prob=1.0, jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0)


def _rngs(count):
    return [np.random.default_rng([7, i]) for i in range(count)]


def test_token_views__flipped_photograph_and_flipped_tokens(monkeypatch):
    monkeypatch.setattr(views, "VIEWS", UNCOLOURED)
    encoder, images = tiny_encoder(), random_images(2, 32, 48)
    first, second = token_views(encoder, images, _rngs(2))
    torch.testing.assert_close(first, encoder.patch_tokens(images.flip(3)))
    plain = encoder.patch_tokens(images).unflatten(1, (4, 6)).flip(2).flatten(1, 2)
    torch.testing.assert_close(second, plain)


def test_token_views__of_a_photograph_do_not_depend_on_the_others():
    encoder, images = tiny_encoder(), random_images(3, 32, 32)
    together = token_views(encoder, images, _rngs(3))
    alone = token_views(encoder, images[2:], _rngs(3)[2:])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[2:], one)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
