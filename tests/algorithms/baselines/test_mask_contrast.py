import numpy as np
import pytest
import torch

from tests.builders import random_images, tiny_encoder
from transfgu_ray.algorithms.baselines.mask_contrast import fit_masks, mask_features, mask_maps, read_mask_features
from transfgu_ray.algorithms.concepts.kmeans import KMeans
from transfgu_ray.algorithms.encoder.vit import above_mean
from transfgu_ray.errors import DataError

LLOYD = KMeans(seed=0, num_iterations=10, num_redos=2)
# Two images of three patches: one of the first and two of the second are foreground.
TOKENS = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [0.0, 4.0]], [[1.0, 5.0], [5.0, 1.0], [0.0, 7.0]]])
FOREGROUND = torch.tensor([[True, False, False], [True, True, False]])
HALF = 0.5**0.5
FEATURES = [[[1, 1, 0], [0, 0, 1], [0, 0, 1]], [[1, HALF, HALF], [1, HALF, HALF], [0, 0, 1]]]


def test_mask_features__by_hand():
    torch.testing.assert_close(mask_features(TOKENS, FOREGROUND), torch.tensor(FEATURES))


def test_mask_features__a_mask_without_patches_is_of_no_patch():
    got = mask_features(TOKENS, torch.zeros_like(FOREGROUND))
    assert not got[..., 0].any()
    assert torch.isfinite(got).all()


def test_fit_masks__and_maps_by_hand():
    points, photos = np.array(FEATURES, dtype=np.float32).reshape(6, 3), np.repeat([0, 1], 3)
    centroids, masks = fit_masks(points, photos, num_foreground=2, num_background=1, how=LLOYD)
    assert masks == (2, 2)
    # Each mask counts once, however many patches it has; both backgrounds form one cluster.
    assert sorted(map(tuple, centroids[:2].tolist())) == [(1, pytest.approx(HALF), pytest.approx(HALF)), (1, 1, 0)]
    assert centroids[2].tolist() == [0, 0, 1]
    # A new mask is nearer to the background than to any object, and still becomes an object as a whole.
    new = mask_features(torch.tensor([[[0.0, 1.0], [0.2, 0.9], [1.0, 0.0]]]), torch.tensor([[True, True, False]]))
    maps = mask_maps(new, torch.from_numpy(centroids), (1, 3))
    diagonal = int(np.argmax(centroids[:2, 2]))
    want = torch.zeros(1, 3, 1, 3)
    want[0, diagonal, 0, :2] = 1
    want[0, 2, 0, 2] = 1
    assert torch.equal(maps, want)


def test_fit_masks__one_embedding_per_photograph_however_many_patches_are_drawn():
    rng = np.random.default_rng(0)
    masks = np.insert(rng.normal(size=(12, 4)), 0, np.tile([1, 0], 6), axis=1).astype(np.float32)
    photos = np.repeat(np.arange(6), 2)
    want = fit_masks(masks, photos, num_foreground=3, num_background=2, how=LLOYD)
    often = np.repeat(np.arange(12), rng.integers(1, 9, 12))
    got = fit_masks(masks[often], photos[often], num_foreground=3, num_background=2, how=LLOYD)
    assert want[1] == got[1] == (6, 6)
    assert np.array_equal(want[0], got[0])


@pytest.mark.parametrize(
    ("groups", "message"), [((3, 1), "3 clusters of 2 foreground masks"), ((1, 3), "3 clusters of 2 backgrounds")]
)
def test_fit_masks__refuses_fewer_masks_than_clusters(groups, message):
    points, photos = np.array(FEATURES, dtype=np.float32).reshape(6, 3), np.repeat([0, 1], 3)
    with pytest.raises(DataError, match=f"baseline mask_contrast cannot make {message}"):
        fit_masks(points, photos, num_foreground=groups[0], num_background=groups[1], how=LLOYD)


@pytest.mark.parametrize("prior", ["attention", "patch_contrast"])
def test_read_mask_features__pools_where_the_prior_is_above_its_mean(prior):
    encoder, images = tiny_encoder(), random_images(2, 32, 32)
    tokens = encoder.prefix(images)
    foreground = above_mean(
        encoder.saliency(tokens, encoder.class_row(tokens, (4, 4)), grid_hw=(4, 4), prior=prior)
    ).flatten(1)
    got = read_mask_features(encoder, images, prior)
    assert got.shape == (2, 16, 25)
    assert torch.equal(got[..., 0] == 1, foreground)
    patches = encoder.patch_tokens(images)
    for b in range(2):
        mean = patches[b][~foreground[b]].mean(0)
        want = (mean / mean.norm()).expand(int((~foreground[b]).sum()), -1)
        torch.testing.assert_close(got[b][~foreground[b]][:, 1:], want)
