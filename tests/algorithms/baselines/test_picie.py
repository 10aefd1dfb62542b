from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.builders import make_two_views, matched_share
from transfgu_ray.algorithms.baselines import picie
from transfgu_ray.algorithms.baselines.patch_kmeans import fit_centroids, linear_maps
from transfgu_ray.algorithms.baselines.picie import cluster_loss, fit_picie
from transfgu_ray.algorithms.concepts.kmeans import KMeans
from transfgu_ray.errors import DataError

LLOYD = KMeans(seed=0, num_iterations=20, num_redos=2)


def test_cluster_loss__by_hand():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Cosines over 0.1: 10, 0, -10 and 6, 8, -6.
    first = np.log(np.exp([0.0, -10, -20]).sum())
    second = np.log(np.exp([0.0, 2, -12]).sum())
    got = cluster_loss(features, torch.tensor([0, 0]), centroids)
    assert got.item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_fit_picie__finds_what_two_views_share(monkeypatch):
    monkeypatch.setattr(picie, "_STEPS_PER_EPOCH", 10)
    tokens, views, truth = make_two_views(num_groups=3, num_each=40)
    head = fit_picie(tokens, views[0], view_2=views[1], num_clusters=3, how=LLOYD, device="cpu")
    maps = linear_maps(torch.from_numpy(tokens)[None], torch.from_numpy(head), (10, 12))
    assert matched_share(maps[0].flatten(1).argmax(0).numpy(), truth) > 0.9
    centroids = fit_centroids(tokens, 3, how=LLOYD, name="patch_tokens")
    nearest = ((tokens[:, None] - centroids) ** 2).sum(2).argmin(1)
    assert matched_share(nearest, truth) < 0.7


def test_fit_picie__fixed_by_the_seed(monkeypatch):
    monkeypatch.setattr(picie, "_EPOCHS", 1)
    tokens, views, _ = make_two_views(num_groups=3, num_each=20)
    heads = [
        fit_picie(tokens, views[0], view_2=views[1], num_clusters=3, how=replace(LLOYD, seed=seed), device="cpu")
        for seed in (0, 0, 1)
    ]
    assert heads[0].shape == (3, 9)
    assert np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])


def test_fit_picie__refuses_fewer_patches_than_clusters():
    few = np.ones((3, 8), dtype=np.float32)
    with pytest.raises(DataError, match=r"baseline picie cannot make 4 clusters of 3 patches"):
        fit_picie(few, few, view_2=few, num_clusters=4, how=LLOYD, device="cpu")
