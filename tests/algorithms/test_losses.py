import math

import pytest
import torch

from transfgu_ray.algorithms.losses import (
    bootstrap_targets,
    diversity_loss,
    peer_loss,
    total_loss,
    uncertainty_loss,
)

# Two patches; probabilities (3/4, 1/4) and (1/4, 3/4).
LOGITS = torch.tensor([[[[math.log(3), 0.0]], [[0.0, math.log(3)]]]])
TARGETS = torch.tensor([[[0, 1]]])
SWAP = torch.tensor([1, 0])


def test_bootstrap_targets__bank_alone_in_round_0():
    scores = torch.tensor([[[[0.2, 0.9]], [[0.3, 0.1]]]])
    assert bootstrap_targets(scores, None).tolist() == [[[1, 0]]]


def test_bootstrap_targets__mean_of_scores_and_teacher():
    # Teacher (3/4, 1/4) and (1/4, 3/4): it overrules a bank that leads by 0.4, not one that leads by 0.6.
    scores = torch.tensor([[[[0.1, 0.8]], [[0.5, 0.2]]]])
    assert bootstrap_targets(scores, LOGITS).tolist() == [[[0, 0]]]


def test_peer_loss__worked_by_hand():
    peer, cross_entropy = peer_loss(LOGITS, TARGETS, SWAP, alpha=0.1)
    assert cross_entropy.item() == pytest.approx(-math.log(3 / 4), abs=1e-6)
    assert peer.item() == pytest.approx(-math.log(3 / 4) + 0.1 * math.log(1 / 4), abs=1e-6)


def test_peer_loss__negatives_are_the_labels_of_the_shuffled_maps():
    rng = torch.Generator().manual_seed(0)
    maps, logits = torch.rand(2, 5, 3, 3, generator=rng), torch.randn(2, 5, 3, 3, generator=rng)
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    shuffled = torch.empty_like(maps)
    for concept in range(5):
        shuffled[:, shuffle[concept]] = maps[:, concept]
    want = torch.nn.functional.cross_entropy(logits, maps.argmax(1))
    want = want - 0.07 * torch.nn.functional.cross_entropy(logits, shuffled.argmax(1))
    torch.testing.assert_close(peer_loss(logits, maps.argmax(1), shuffle, 0.07)[0], want)


def test_uncertainty_loss__gap_between_the_two_best():
    # Gaps of 0.7 - 0.2 and 0.4 - 0.4.
    probabilities = torch.tensor([[[[0.7, 0.4]], [[0.1, 0.4]], [[0.2, 0.2]]]])
    assert uncertainty_loss(probabilities.log()).item() == pytest.approx(1 - 0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 1.5),
        ([[1.0, 0.0], [1.0, 0.0]], 2.0),
        ([[1.0, 0.0], [-1.0, 0.0]], 1.0),
        ([[1.0, 0.0], [0.6, 0.8]], 1.8),
    ],
)
def test_diversity_loss__mean_cosine_of_all_pairs(rows, want):
    classes = torch.tensor([rows, rows])
    assert diversity_loss(classes).item() == pytest.approx(want, abs=1e-6)


def test_total_loss__equation_16_by_hand():
    classes = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    terms = total_loss(LOGITS, classes, TARGETS, SWAP, alpha=0.1, omega_1=2.0, omega_2=0.3)
    peer = -math.log(3 / 4) + 0.1 * math.log(1 / 4)
    want = {"cross_entropy": -math.log(3 / 4), "peer": peer, "diversity": 1.8, "uncertainty": 0.5}
    want["total"] = peer + 2.0 * 1.8 + 0.3 * 0.5
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(want, abs=1e-6)
