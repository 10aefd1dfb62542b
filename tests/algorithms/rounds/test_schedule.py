from dataclasses import replace

import numpy as np
import pytest

from transfgu_ray.algorithms.rounds.schedule import Epoch, sample_order, schedule, steps_per_epoch


def test_schedule__worked_by_hand():
    epochs = schedule((3, 2), (0.02, 0.10))
    assert [(e.index, e.round, e.starts_round) for e in epochs] == [
        (0, 0, False), (1, 0, False), (2, 0, False), (3, 1, True), (4, 1, False),
    ]  # fmt: skip
    assert [e.alpha for e in epochs] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.10])


def test_schedule__one_epoch_keeps_the_first_alpha():
    assert schedule((1,), (0.03, 0.1)) == [Epoch(0, 0, False, 0.03)]


def test_schedule__restart_begins_each_round_anew_and_steps_by_a_hundredth():
    epochs = schedule((2, 4, 1, 2), (0.03, 0.05), "restart")
    assert [e.alpha for e in epochs] == pytest.approx([0.03, 0.04, 0.03, 0.04, 0.05, 0.05, 0.03, 0.03, 0.04])
    # Only alpha differs.
    linear = schedule((2, 4, 1, 2), (0.03, 0.05))
    assert [replace(e, alpha=0.0) for e in epochs] == [replace(e, alpha=0.0) for e in linear]


@pytest.mark.parametrize("how", ["linear", "restart"])
def test_schedule__no_peer_weight_at_all(how):
    assert {e.alpha for e in schedule((2, 3), (0.0, 0.0), how)} == {0.0}


@pytest.mark.parametrize(
    ("num_visits", "batch_size", "world_size", "fill", "drop"),
    [
        (10, 4, 1, (3, 4), (2, 4)),
        (10, 4, 2, (3, 2), (2, 2)),
        (8, 4, 2, (2, 2), (2, 2)),
        (10, 5, 2, (3, 2), (2, 2)),  # the batch is rounded down to whole images per worker
        (5, 256, 1, (1, 5), (1, 5)),  # fewer images than a batch
        (3, 2, 4, (1, 1), (1, 1)),  # more workers than images
        (20 * 1464, 512, 4, (58, 128), (57, 128)),  # the published VOC training
    ],
)
def test_steps_per_epoch__cases(num_visits, batch_size, world_size, fill, drop):
    for last_batch, want in (("fill", fill), ("drop", drop)):
        assert steps_per_epoch(num_visits, batch_size, world_size=world_size, last_batch=last_batch) == want


def test_sample_order__every_image_once_and_the_last_step_filled_from_the_start():
    order = sample_order(seed=3, epoch=1, num_images=10, repeats=1, steps=3, per_worker=2, world_size=2)
    assert order.shape == (2, 3, 2)
    # In the order of training: step, worker, image.
    flat = order.transpose(1, 0, 2).reshape(-1)
    assert sorted(flat[:10]) == list(range(10))
    assert flat[10:].tolist() == flat[:2].tolist()


def test_sample_order__repeats_are_shuffled_together():
    # A list repeated before it is shuffled, as the published code does: a step may hold an image twice.
    order = sample_order(0, 0, num_images=6, repeats=3, steps=3, per_worker=6, world_size=1)[0]
    assert sorted(order.reshape(-1)) == sorted([*range(6)] * 3)
    assert any(len(set(row)) < 6 for row in order.tolist())


def test_sample_order__leaves_out_what_fills_no_step():
    order = sample_order(0, 0, num_images=10, repeats=1, steps=2, per_worker=4, world_size=1)[0]
    assert order.shape == (2, 4)
    assert len(set(order.reshape(-1).tolist())) == 8
    # Another epoch leaves out others.
    assert set(order.reshape(-1)) != set(
        sample_order(0, 1, num_images=10, repeats=1, steps=2, per_worker=4, world_size=1).reshape(-1)
    )


def test_sample_order__depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return sample_order(seed, epoch, num_images=20, repeats=1, steps=5, per_worker=4, world_size=1)

    assert np.array_equal(order(1, 2), order(1, 2))
    assert not np.array_equal(order(1, 2), order(1, 3))
    assert not np.array_equal(order(1, 2), order(2, 2))


def test_sample_order__workers_share_out_the_same_steps():
    # Two workers together see, step by step, what one worker sees.
    one = sample_order(0, 0, num_images=16, repeats=1, steps=4, per_worker=4, world_size=1)[0]
    two = sample_order(0, 0, num_images=16, repeats=1, steps=4, per_worker=2, world_size=2)
    assert np.array_equal(np.concatenate([two[0], two[1]], axis=1), one)
