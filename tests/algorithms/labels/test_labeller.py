import numpy as np
import pytest
import torch

from tests.builders import random_images, tiny_encoder
from transfgu_ray.algorithms.concepts.windows import enumerate_windows, window_shares
from transfgu_ray.algorithms.encoder.vit import above_mean
from transfgu_ray.algorithms.labels.cam import GradientResponse
from transfgu_ray.algorithms.labels.labeller import Labeller
from transfgu_ray.algorithms.labels.window_votes import WindowVotes

CENTROIDS = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
IS_BACKGROUND = torch.tensor([False, False, True, False, True])


def _label(images, centroids=CENTROIDS, is_background=None, prior="attention"):
    encoder = tiny_encoder()
    response = GradientResponse(encoder=encoder, centroids=centroids)
    return Labeller(encoder, response, is_background, prior)(images)


def _voting(encoder, is_background):
    response = WindowVotes(
        encoder=encoder, centroids=CENTROIDS, is_background=is_background, window_fracs=(0.5,), crop_size=16
    )
    return Labeller(encoder, response, is_background, "all")


def test_labeller__scores_span_0_to_1_in_each_image():
    scores, foreground = _label(random_images(3, 24, 32))
    assert scores.shape == (3, 5, 3, 4)
    assert foreground.shape == (3, 3, 4)
    assert scores.amin((1, 2, 3)).tolist() == [0.0] * 3
    assert scores.amax((1, 2, 3)).tolist() == [1.0] * 3


def test_labeller__permuting_concepts_permutes_maps():
    images, order = random_images(2, 32, 32), torch.tensor([4, 2, 0, 1, 3])
    plain, _ = _label(images, is_background=IS_BACKGROUND)
    permuted, _ = _label(images, CENTROIDS[order], IS_BACKGROUND[order])
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-5)


def test_labeller__exclusion_follows_the_foreground():
    images = random_images(2, 32, 32)
    free, _ = _label(images)
    scores, foreground = _label(images, is_background=IS_BACKGROUND)
    encoder = tiny_encoder()
    row = encoder.class_row(encoder.prefix(images), (4, 4))
    assert torch.equal(foreground, above_mean(encoder.patch_attention(row, (4, 4))))
    allowed = foreground[:, None] != IS_BACKGROUND[None, :, None, None]
    assert torch.equal(scores[allowed], free[allowed])
    assert (scores[~allowed] == 0).all()


def test_labeller__prior_all_takes_every_patch():
    scores, foreground = _label(random_images(1, 32, 32), is_background=IS_BACKGROUND, prior="all")
    assert foreground.all()
    assert (scores[:, IS_BACKGROUND] == 0).all()


def test_labeller__patch_contrast_is_another_prior():
    images = random_images(2, 32, 32)
    assert not torch.equal(_label(images)[1], _label(images, prior="patch_contrast")[1])


def test_labeller__padding_a_batch_keeps_its_rows():
    images = random_images(2, 32, 32)
    padded = torch.cat([images, random_images(2, 32, 32, seed=9)])
    assert (_label(images)[0] - _label(padded)[0][:2]).abs().max() <= 2.0**-11
    assert torch.equal(_label(images)[1], _label(padded)[1][:2])


def test_labeller__windows_vote_for_the_nearest_concept_of_each_group():
    encoder, image = tiny_encoder(), random_images(1, 32, 32)
    voting = _voting(encoder, IS_BACKGROUND)
    boxes, _ = enumerate_windows(32, 32, (0.5,))
    tokens = encoder.cls_tokens(torch.stack([image[0, :, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes.tolist()]))
    foreground = [i for i, other in enumerate(IS_BACKGROUND.tolist()) if not other]
    wanted = torch.zeros(5, 4, 4)
    for (x0, y0, x1, y1), token in zip(boxes.tolist(), tokens, strict=True):
        nearest = min(foreground, key=lambda k: (token - CENTROIDS[k]).norm().item())
        wanted[nearest, y0 // 8 : y1 // 8, x0 // 8 : x1 // 8] += 1
    wanted /= wanted.sum(0)
    scores, _ = voting(image)
    torch.testing.assert_close(scores[0], wanted / wanted.max())


def test_labeller__windows_of_things_alone_vote_as_without_exclusion():
    encoder, image = tiny_encoder(), random_images(1, 32, 32)
    none = torch.zeros(5, dtype=torch.bool)
    free, things = (_voting(encoder, is_background) for is_background in (None, none))
    assert torch.equal(things(image)[0], free(image)[0])


def test_window_shares__by_hand():
    boxes = np.array([[0, 0, 16, 16], [8, 0, 16, 16], [12, 0, 16, 8]], dtype=np.int32)
    shares = window_shares(boxes, (2, 2), 8)
    assert shares[:, 0, 0].tolist() == [1, 0, 0]
    assert shares[:, 0, 1].tolist() == pytest.approx([0.4, 0.4, 0.2])
    assert shares[:, 1, 1].tolist() == [0.5, 0.5, 0]
