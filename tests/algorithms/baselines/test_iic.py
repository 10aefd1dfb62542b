import math

import numpy as np
import pytest
import torch

from tests.builders import make_two_views, matched_share
from transfgu_ray.algorithms.baselines import iic
from transfgu_ray.algorithms.baselines.iic import fit_iic, mutual_information
from transfgu_ray.algorithms.baselines.patch_kmeans import fit_centroids, linear_maps
from transfgu_ray.algorithms.concepts.kmeans import KMeans
from transfgu_ray.errors import DataError


def _probabilities(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_mutual_information__by_hand():
    certain = torch.eye(5).repeat(3, 1)
    assert mutual_information(certain, certain).item() == pytest.approx(math.log(5), abs=1e-6)
    # Every pair of classes is as likely as the other 24.
    assert mutual_information(certain.repeat(5, 1), torch.eye(5).repeat_interleave(15, 0)).item() == pytest.approx(
        0, abs=1e-5
    )
    always_one = torch.tensor([[0.0, 1.0]]).expand(7, 2)
    assert mutual_information(always_one, always_one).item() == pytest.approx(0, abs=1e-6)
    # Undecided everywhere, which carries no information.
    assert mutual_information(torch.full((4, 3), 1 / 3), torch.full((4, 3), 1 / 3)).item() == pytest.approx(0, abs=1e-6)


def test_mutual_information__against_a_plain_rewrite():
    first, second = _probabilities(2, 9, 4), _probabilities(2, 9, 4, seed=1)
    for head in range(2):
        joint = sum(torch.outer(p, q) for p, q in zip(first[head].double(), second[head].double(), strict=True)) / 9
        joint = (joint + joint.T) / 2
        want = 0.0
        for c in range(4):
            for d in range(4):
                want += joint[c, d] * math.log(joint[c, d] / (joint[c].sum() * joint[:, d].sum()))
        assert mutual_information(first, second)[head].item() == pytest.approx(float(want), abs=1e-6)
    torch.testing.assert_close(mutual_information(first, second), mutual_information(second, first))


def test_fit_iic__finds_what_two_views_share(monkeypatch):
    monkeypatch.setattr(iic, "_STEPS", 50)
    tokens, views, truth = make_two_views(num_groups=3, num_each=40)
    head = fit_iic(*views, num_clusters=3, seed=0, device="cpu")
    maps = linear_maps(torch.from_numpy(tokens)[None], torch.from_numpy(head), (10, 12))
    assert matched_share(maps[0].flatten(1).argmax(0).numpy(), truth) > 0.9
    # The largest variation of the features differs between the views.
    centroids = fit_centroids(tokens, 3, how=KMeans(seed=0, num_iterations=20, num_redos=2), name="patch_tokens")
    nearest = ((tokens[:, None] - centroids) ** 2).sum(2).argmin(1)
    assert matched_share(nearest, truth) < 0.7


def test_fit_iic__fixed_by_the_seed(monkeypatch):
    monkeypatch.setattr(iic, "_STEPS", 5)
    _, views, _ = make_two_views(num_groups=3, num_each=20)
    heads = [fit_iic(*views, num_clusters=3, seed=seed, device="cpu") for seed in (0, 0, 1)]
    assert heads[0].shape == (3, 9)
    assert np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])


def test_fit_iic__does_not_mind_where_the_features_lie(monkeypatch):
    monkeypatch.setattr(iic, "_STEPS", 5)
    tokens, views, _ = make_two_views(num_groups=3, num_each=20)
    maps = []
    for offset in (0, 4):
        head = fit_iic(*(view + offset for view in views), num_clusters=3, seed=0, device="cpu")
        maps.append(linear_maps(torch.from_numpy(tokens + offset)[None], torch.from_numpy(head), (6, 10)))
    torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-3)


def test_fit_iic__refuses_fewer_patches_than_clusters():
    few = np.zeros((3, 8), dtype=np.float32)
    with pytest.raises(DataError, match=r"baseline iic cannot make 4 clusters of 3 patches"):
        fit_iic(few, few, num_clusters=4, seed=0, device="cpu")
