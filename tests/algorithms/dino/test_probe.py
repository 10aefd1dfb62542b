"""Measures of an encoder, by hand and against plain rewrites."""

import math

import pytest
import torch

from transfgu_ray.algorithms.dino.probe import collapse_alarms, knn_accuracy, mask_iou, rank_me


def test_knn_accuracy__by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 1])
    queries = torch.tensor([[3.0, 0.1], [0.1, 1.0], [0.0, 1.0]])
    truth = torch.tensor([0, 1, 0])
    assert knn_accuracy(bank, labels, queries=queries, query_labels=truth, num_neighbours=1) == pytest.approx(2 / 3)


def test_knn_accuracy__near_votes_weigh_more():
    # One neighbour at cosine 1 against two at cosine 0.6: exp(1 / t) against 2 exp(0.6 / t).
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert (
        knn_accuracy(bank, labels, queries=query, query_labels=torch.tensor([0]), num_neighbours=3, temperature=0.07)
        == 1
    )
    assert (
        knn_accuracy(bank, labels, queries=query, query_labels=torch.tensor([1]), num_neighbours=3, temperature=2.0)
        == 1
    )


def test_knn_accuracy__equals_a_loop_over_more_than_a_block():
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 5, generator=rng), torch.randn(1100, 5, generator=rng)
    labels, truth = torch.randint(4, (60,), generator=rng), torch.randint(4, (1100,), generator=rng)
    hits = 0
    for query, label in zip(queries, truth, strict=True):
        cosines = torch.cosine_similarity(query[None], bank)
        votes = [0.0] * 4
        for row in cosines.argsort(descending=True)[:7]:
            votes[int(labels[row])] += math.exp(float(cosines[row]) / 0.1)
        hits += votes.index(max(votes)) == int(label)
    assert (
        knn_accuracy(bank, labels, queries=queries, query_labels=truth, num_neighbours=7, temperature=0.1)
        == hits / 1100
    )


def test_knn_accuracy__bank_smaller_than_the_vote():
    assert (
        knn_accuracy(torch.eye(2), torch.tensor([0, 5]), queries=torch.eye(2), query_labels=torch.tensor([0, 5])) == 1
    )


def test_rank_me__of_known_spectra():
    assert rank_me(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert rank_me(torch.outer(torch.arange(1.0, 9.0), torch.randn(5))) == pytest.approx(1, rel=1e-3)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(want, rel=1e-5)


def test_mask_iou__by_hand():
    found = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 1]]], dtype=torch.bool)
    truth = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 1]]], dtype=torch.bool)
    torch.testing.assert_close(mask_iou(found, truth), torch.tensor([1 / 3, 0.0, 1.0]))


MOST = math.log(512)


@pytest.mark.parametrize(
    ("teacher", "usage", "rank", "words"),
    [
        (0.0, 0.01, None, ["all images fall into one prototype"]),
        (0.99 * MOST, MOST, None, ["every image is spread over all prototypes"]),
        (2.0, 2.01, None, ["all images are assigned alike"]),
        (2.0, 4.0, 1.2, [r"all images have nearly the same embedding (RankMe 1.2)"]),
        (2.0, 2.0, 1.2, ["all images are assigned alike", "all images have nearly the same embedding"]),
        (2.0, 4.0, 30.0, []),
        (3.3, 4.7, None, []),
    ],
)
def test_collapse_alarms__each_kind(teacher: float, usage: float, rank: float | None, words: list[str]):
    alarms = collapse_alarms(teacher, usage, num_prototypes=512, rank=rank)
    assert len(alarms) == len(words)
    assert all(alarm.startswith(word) for alarm, word in zip(alarms, words, strict=True))
