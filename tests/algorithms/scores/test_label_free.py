import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from transfgu_ray.algorithms.scores.label_free import LabelFreeMeasure, agreement, kappa, score, silhouette, usage

ONE = np.array([0, 0, 0, 0, 1, 1, 2, 2])
# The same except for one patch.
CLOSE = np.array([0, 0, 0, 1, 1, 1, 2, 2])


def test_kappa__of_a_worked_example():
    # Seen 7/8; by chance 4/8 * 3/8 + 2/8 * 3/8 + 2/8 * 2/8 = 22/64.
    assert kappa(ONE, CLOSE, 3) == pytest.approx((7 / 8 - 22 / 64) / (1 - 22 / 64))


def test_kappa__of_one_constant_class__is_nothing():
    assert kappa(np.zeros(5, np.int64), np.zeros(5, np.int64), 3) == 0


def test_kappa__of_independent_labels__is_near_0():
    rng = np.random.default_rng(0)
    assert abs(kappa(rng.integers(4, size=20000), rng.integers(4, size=20000), 4)) < 0.02


def test_agreement__does_not_depend_on_the_numbers_of_the_classes():
    renamed = np.array([2, 0, 1])[CLOSE]
    assert kappa(ONE, renamed, 3) < 0.1
    assert agreement(ONE, renamed, 3) == pytest.approx(kappa(ONE, CLOSE, 3))


def test_agreement__counts_class_255_too():
    labels = np.full(4, 255)
    labels[0] = 3
    assert agreement(labels, labels, 300) == pytest.approx(1)


def test_silhouette__against_plain_loops():
    rng = np.random.default_rng(1)
    tokens, labels = rng.normal(size=(40, 5)), rng.integers(3, size=40)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    distances = cdist(unit, np.stack([unit[labels == k].mean(0) for k in range(3)]))
    of_label = []
    for k in range(3):
        values = []
        for row in distances[labels == k]:
            own, nearest = row[k], min(row[j] for j in range(3) if j != k)
            values.append((nearest - own) / max(nearest, own))
        of_label.append(np.mean(values))
    # A label that no token has, so that labels are not mistaken for positions.
    labels[labels == 2] = 7
    found = silhouette(torch.from_numpy(tokens).float(), torch.from_numpy(labels))
    assert found == pytest.approx(np.mean(of_label), abs=1e-5)


def test_silhouette__of_two_points__is_1_and_of_one_label_0():
    tokens = torch.tensor([[1.0, 0], [2, 0], [0, 1]])
    assert silhouette(tokens, torch.tensor([0, 0, 1])) == pytest.approx(1)
    assert silhouette(tokens, torch.tensor([1, 1, 1])) == 0


def test_usage__is_the_number_of_equally_used_classes():
    assert usage(np.array([0, 1, 0, 1]), 4) == pytest.approx(2)
    assert usage(np.array([0, 0, 0, 0]), 4) == pytest.approx(1)
    assert usage(np.array([0, 0, 0, 1]), 4) == pytest.approx(4 / 3**0.75)


def _decode(tokens, grid_hw):
    # Class 1 where the patch is brighter than half.
    maps = tokens.unflatten(1, grid_hw)[..., 0]
    return torch.stack([torch.full_like(maps, 0.5), maps], dim=1)


def _read(images):
    return torch.nn.functional.avg_pool2d(images.float() / 255, 8).mean(1).flatten(1)[..., None]


def test_probe__sees_a_decoder_that_reads_patches_alone_as_consistent():
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    # Left of the middle, so that a view that is not flipped back shows.
    images[:, :, :, 8:24] = 255
    measure = LabelFreeMeasure(images, _read, (8, 8))
    found = measure.components(_decode, 2)
    assert found["consistency"] > 0.85
    assert measure.labels(_decode)[0, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert found["usage"] == pytest.approx(usage(np.array([0, 1, 1, 0, 0, 0, 0, 0]), 2))


def test_probe__sees_a_decoder_that_knows_places_alone_as_inconsistent():
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)

    def decode(tokens, grid_hw):
        logits = torch.zeros(len(tokens), 2, *grid_hw)
        logits[:, 1, :, :4] = 1
        return logits

    assert LabelFreeMeasure(images, _read, (8, 8)).components(decode, 2)["consistency"] < 0.1


def test_score__counts_the_classes_that_are_found_again():
    components = {"agreement": 0.5, "consistency": 0.7, "silhouette": 0.2, "usage": 8.0}
    assert score(components) == pytest.approx(2.8)
    assert score({name: components[name] for name in ("consistency", "usage")}) == pytest.approx(5.6)


def test_score__of_noise_and_of_one_class_is_low():
    noise = {"agreement": -0.01, "consistency": -0.01, "usage": 16.0}
    one_class = {"agreement": 0.0, "consistency": 0.0, "usage": 1.0}
    two_sure_classes = {"agreement": 1.0, "consistency": 1.0, "usage": 2.0}
    assert score(noise) == score(one_class) == 0 < score(two_sure_classes)
