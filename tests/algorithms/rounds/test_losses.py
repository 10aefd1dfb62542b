import math

import pytest
import torch

from transfgu_ray.algorithms.rounds.losses import (
    LossWeights,
    bootstrap_targets,
    diversity_loss,
    foreground_patches,
    peer_loss,
    total_loss,
    uncertainty_loss,
)

# Two patches; probabilities (3/4, 1/4) and (1/4, 3/4).
LOGITS = torch.tensor([[[[math.log(3), 0.0]], [[0.0, math.log(3)]]]])
TARGETS = torch.tensor([[[0, 1]]])
SWAP = torch.tensor([1, 0])
SHUFFLE = torch.tensor([3, 0, 4, 2, 1])


def test_bootstrap_targets__bank_alone_in_round_0():
    scores = torch.tensor([[[[0.2, 0.9]], [[0.3, 0.1]]]])
    assert bootstrap_targets(scores, None).tolist() == [[[1, 0]]]


def test_bootstrap_targets__mean_of_scores_and_teacher():
    # Teacher (3/4, 1/4) and (1/4, 3/4): it overrules a bank that leads by 0.4, not one that leads by 0.6.
    scores = torch.tensor([[[[0.1, 0.8]], [[0.5, 0.2]]]])
    assert bootstrap_targets(scores, LOGITS).tolist() == [[[0, 0]]]


def test_peer_loss__worked_by_hand():
    peer, cross_entropy = peer_loss(LOGITS, TARGETS, shuffle=SWAP, alpha=0.1)
    assert cross_entropy.item() == pytest.approx(-math.log(3 / 4), abs=1e-6)
    assert peer.item() == pytest.approx(-math.log(3 / 4) + 0.1 * math.log(1 / 4), abs=1e-6)


def test_peer_loss__negatives_are_the_labels_of_the_shuffled_maps():
    rng = torch.Generator().manual_seed(0)
    maps, logits = torch.rand(2, 5, 3, 3, generator=rng), torch.randn(2, 5, 3, 3, generator=rng)
    shuffled = torch.empty_like(maps)
    for concept in range(5):
        shuffled[:, SHUFFLE[concept]] = maps[:, concept]
    want = torch.nn.functional.cross_entropy(logits, maps.argmax(1))
    want = want - 0.07 * torch.nn.functional.cross_entropy(logits, shuffled.argmax(1))
    torch.testing.assert_close(peer_loss(logits, maps.argmax(1), shuffle=SHUFFLE, alpha=0.07)[0], want)


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


def test_diversity_loss__upper_triangle_equals_a_loop_over_pairs():
    rng = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(3, 5, 7, generator=rng), dim=-1)
    cosines = [image[i] @ image[j] for image in classes for i in range(5) for j in range(i + 1, 5)]
    want = 1 + sum(cosines) / len(cosines)
    torch.testing.assert_close(diversity_loss(classes, "upper_triangle"), want)
    # Adding each class's cosine of 1 with itself, and both halves, gives the loss over all pairs.
    torch.testing.assert_close(diversity_loss(classes), 1 + (5 + 2 * 10 * (want - 1)) / 25)


def test_foreground_patches__some_concept_above_the_threshold():
    # Two concepts and the background of Eq. 8, which is not one.
    scores = torch.tensor([[[[0.0, 0.2, 0.1]], [[0.3, 0.0, 0.1]], [[0.9, 0.9, 0.9]]]])
    assert foreground_patches(scores, 0.1).tolist() == [[[True, True, False]]]


def test_uncertainty_loss__of_foreground_equals_a_loop_over_patches():
    rng = torch.Generator().manual_seed(1)
    logits, foreground = torch.randn(2, 4, 3, 3, generator=rng), torch.rand(2, 3, 3, generator=rng) > 0.5
    assert 0 < foreground.sum() < foreground.numel()
    terms = []
    for image, y, x in foreground.nonzero().tolist():
        best, second, _ = sorted(logits[image, :3, y, x].softmax(0).tolist(), reverse=True)
        terms.append(1 - best + second)
    assert uncertainty_loss(logits, foreground).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_uncertainty_loss__background_patches_and_channel_get_no_gradient():
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    foreground = torch.zeros(2, 3, 3, dtype=torch.bool)
    foreground[0, 1, 2] = True
    uncertainty_loss(logits, foreground).backward()
    assert logits.grad[0, :3, 1, 2].abs().min() > 0
    logits.grad[0, :3, 1, 2] = 0
    assert not logits.grad.any()


def test_uncertainty_loss__adds_nothing_where_there_is_no_foreground():
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = uncertainty_loss(logits, torch.zeros(2, 3, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def _total_and_gradients(alpha=0.1, omega_1=2.0, omega_2=0.3):
    """Terms of Eq. 16, and the gradients of their total on logits and class embeddings."""
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 3, 3, generator=rng, requires_grad=True)
    classes = torch.nn.functional.normalize(torch.randn(2, 5, 7, generator=rng), dim=-1).requires_grad_()
    targets = torch.randint(5, (2, 3, 3), generator=rng)
    terms = total_loss(
        logits,
        classes,
        targets=targets,
        shuffle=SHUFFLE,
        weights=LossWeights(alpha=alpha, omega_1=omega_1, omega_2=omega_2),
    )
    terms["total"].backward()
    return {name: term.item() for name, term in terms.items()}, logits, classes, targets


@pytest.mark.parametrize("off", ["alpha", "omega_1", "omega_2"])
def test_total_loss__a_weight_of_zero_takes_its_term_out_of_total_and_gradient(off):
    full, _, _, _ = _total_and_gradients()
    terms, logits, classes, targets = _total_and_gradients(**{off: 0.0})
    # Still reported, except for the peer term, whose other half is the cross-entropy.
    kept = [name for name in full if name not in ("total", "peer" if off == "alpha" else "")]
    assert {name: terms[name] for name in kept} == {name: full[name] for name in kept}
    taken = {
        "alpha": full["peer"] - full["cross_entropy"],
        "omega_1": 2.0 * full["diversity"],
        "omega_2": 0.3 * full["uncertainty"],
    }
    assert terms["total"] == pytest.approx(full["total"] - taken[off], abs=1e-6)
    assert terms["peer"] == (terms["cross_entropy"] if off == "alpha" else full["peer"])
    # The rest has the gradient of the other terms, computed separately.
    assert (classes.grad is None) == (off == "omega_1")
    alpha, omega_2 = 0.1 * (off != "alpha"), 0.3 * (off != "omega_2")
    plain = logits.detach().requires_grad_()
    cross_entropy, top = torch.nn.functional.cross_entropy, plain.softmax(1).sort(1).values
    loss = cross_entropy(plain, targets) - alpha * cross_entropy(plain, SHUFFLE[targets])
    loss = loss + omega_2 * (1 - (top[:, -1] - top[:, -2]).mean())
    loss.backward()
    torch.testing.assert_close(logits.grad, plain.grad)


def test_total_loss__cross_entropy_alone_is_all_that_three_zeros_leave():
    terms, logits, classes, targets = _total_and_gradients(0.0, 0.0, 0.0)
    assert terms["total"] == terms["cross_entropy"]
    assert classes.grad is None
    plain = logits.detach().requires_grad_()
    torch.nn.functional.cross_entropy(plain, targets).backward()
    assert torch.equal(logits.grad, plain.grad)
    assert terms["diversity"] > 0 < terms["uncertainty"]


def test_total_loss__terms_of_weight_zero_are_not_in_the_backward_pass():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    classes = torch.nn.functional.normalize(torch.randn(1, 3, 4), dim=-1).requires_grad_()
    targets = torch.zeros(1, 2, 2, dtype=torch.int64)
    terms = total_loss(
        logits,
        classes,
        targets=targets,
        shuffle=torch.tensor([1, 2, 0]),
        weights=LossWeights(alpha=0.0, omega_1=0.0, omega_2=0.0),
    )
    assert [name for name, term in terms.items() if term.requires_grad] == ["total", "cross_entropy", "peer"]
    assert terms["peer"] is terms["cross_entropy"]


def test_total_loss__hands_its_choices_on():
    rng = torch.Generator().manual_seed(4)
    logits, foreground = torch.randn(2, 5, 3, 3, generator=rng), torch.rand(2, 3, 3, generator=rng) > 0.5
    classes = torch.nn.functional.normalize(torch.randn(2, 5, 7, generator=rng), dim=-1)
    targets = torch.randint(5, (2, 3, 3), generator=rng)
    weights, shuffle = LossWeights(alpha=0.1, omega_1=2.0, omega_2=0.3), torch.randperm(5)
    terms = total_loss(
        logits,
        classes,
        targets=targets,
        shuffle=shuffle,
        weights=weights,
        pairs="upper_triangle",
        foreground=foreground,
    )
    assert terms["diversity"] == diversity_loss(classes, "upper_triangle") != diversity_loss(classes)
    assert terms["uncertainty"] == uncertainty_loss(logits, foreground) != uncertainty_loss(logits)
    torch.testing.assert_close(terms["total"], terms["peer"] + 2.0 * terms["diversity"] + 0.3 * terms["uncertainty"])


def test_total_loss__equation_16_by_hand():
    classes = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    terms = total_loss(
        LOGITS, classes, targets=TARGETS, shuffle=SWAP, weights=LossWeights(alpha=0.1, omega_1=2.0, omega_2=0.3)
    )
    peer = -math.log(3 / 4) + 0.1 * math.log(1 / 4)
    want = {"cross_entropy": -math.log(3 / 4), "peer": peer, "diversity": 1.8, "uncertainty": 0.5}
    want["total"] = peer + 2.0 * 1.8 + 0.3 * 0.5
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(want, abs=1e-6)
