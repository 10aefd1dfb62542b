import numpy as np
import pytest
import torch

from tests.builders import TINY_OVERRIDES, TINY_VIT, random_images, tiny_encoder
from transfgu_ray.algorithms.baselines.patch_kmeans import (
    centroid_maps,
    draw_patches,
    draw_photos,
    fit_centroids,
    patch_colours,
)
from transfgu_ray.algorithms.concepts.kmeans import KMeans
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_untrained, random_vit
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.errors import DataError


def _fit(points, num_clusters):
    return fit_centroids(points, num_clusters, how=KMeans(seed=0, num_iterations=20, num_redos=2), name="raw_colour")


def test_patch_colours__mean_of_each_patch_row_by_row():
    images = random_images(2, 8, 12)
    got = patch_colours(images, 4)
    assert got.shape == (2, 6, 3)
    for b in range(2):
        for patch in range(6):
            y, x = 4 * (patch // 3), 4 * (patch % 3)
            want = images[b, :, y : y + 4, x : x + 4].double().mean((1, 2)) / 255
            torch.testing.assert_close(got[b, patch].double(), want, rtol=1e-5, atol=1e-6)


def test_draw__a_subset_fixed_by_seed_and_photograph():
    assert draw_photos(5, 9, seed=0).tolist() == draw_patches(5, 9, seed=0, photo=3).tolist() == [0, 1, 2, 3, 4]
    for draw in (lambda seed: draw_photos(1000, 20, seed), lambda seed: draw_patches(1000, 20, seed=seed, photo=3)):
        drawn = draw(1)
        assert len(np.unique(drawn)) == 20
        assert (np.diff(drawn) > 0).all()
        assert np.array_equal(drawn, draw(1))
        assert not np.array_equal(drawn, draw(2))
    assert not np.array_equal(draw_patches(1000, 20, seed=1, photo=3), draw_patches(1000, 20, seed=1, photo=4))


def test_load_untrained__same_architecture_with_weights_from_the_seed():
    trained = tiny_encoder()
    data = dump_encoder(trained.vit, TINY_VIT, overrides=TINY_OVERRIDES)
    twin = load_untrained(data, "tiny", seed=3)
    wanted = random_vit(TINY_VIT, TINY_OVERRIDES, seed=3).state_dict()
    assert twin.vit.state_dict().keys() == trained.vit.state_dict().keys()
    assert all(torch.equal(value, wanted[name]) for name, value in twin.vit.state_dict().items())
    assert torch.equal(twin.mean, trained.mean)


def test_fit_centroids__finds_separate_groups():
    rng = np.random.default_rng(0)
    means = np.array([[0, 0], [9, 0], [0, 9]], dtype=np.float32)
    points = np.concatenate([mean + rng.normal(0, 0.1, (20, 2)) for mean in means]).astype(np.float32)
    got = _fit(points, 3)
    assert sorted(np.abs(got - mean).max(1).argmin() for mean in means) == [0, 1, 2]
    assert max(np.abs(got - mean).max(1).min() for mean in means) < 0.1


def test_fit_centroids__fewer_colours_than_clusters_leave_some_empty():
    points = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    assert _fit(points, 4).shape == (4, 3)
    with pytest.raises(DataError, match=r"baseline raw_colour cannot make 31 clusters of 30 patches"):
        _fit(points, 31)


@pytest.mark.parametrize("size_hw", [(3, 4), (12, 20)])
def test_centroid_maps__argmax_is_the_nearest_centroid_of_the_upsampled_features(size_hw):
    rng = torch.Generator().manual_seed(0)
    features, centroids = torch.randn(2, 12, 5, generator=rng), torch.randn(7, 5, generator=rng)
    maps = centroid_maps(features, centroids, (3, 4))
    for b in range(2):
        grid = features[b].T.reshape(1, 5, 3, 4)
        large = torch.nn.functional.interpolate(grid, size_hw, mode="bilinear", align_corners=False)[0]
        distance = torch.cdist(large.flatten(1).T.double(), centroids.double())
        assert torch.equal(upsample_argmax(maps[b], size_hw).flatten(), distance.argmin(1))
