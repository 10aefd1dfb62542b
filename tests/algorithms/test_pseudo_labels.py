import numpy as np
import torch

from transfgu_ray.algorithms.pseudo_labels import (
    add_background,
    decode_scores,
    encode_mask,
    encode_scores,
    exclude,
    normalise,
)


def test_normalise__over_the_whole_block_of_each_image():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]], [[[0.0, 10.0]], [[20.0, 40.0]]]])
    want = torch.tensor([[[[0.0, 0.25]], [[0.5, 1.0]]], [[[0.0, 0.25]], [[0.5, 1.0]]]])
    assert torch.equal(normalise(maps), want)


def test_normalise__constant_block_becomes_zero():
    assert torch.equal(normalise(torch.full((1, 2, 3, 3), 7.0)), torch.zeros(1, 2, 3, 3))


def test_exclude__each_side_scores_only_its_own_concepts():
    scores = torch.full((1, 3, 1, 2), 0.5)
    foreground = torch.tensor([[[True, False]]])
    got = exclude(scores, foreground, torch.tensor([False, True, False]))
    assert got[0, :, 0].tolist() == [[0.5, 0.0], [0.0, 0.5], [0.5, 0.0]]


def test_add_background__equation_8_by_hand():
    scores = torch.tensor([[[0.0, 0.04, 0.3]], [[0.0, 0.02, 0.9]]])
    got = add_background(scores, 0.1)
    assert torch.equal(got[:2], scores)
    torch.testing.assert_close(got[2], torch.tensor([[0.1, 0.06, 0.0]]))


def test_add_background__with_and_without_a_batch_axis():
    scores = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    batch = add_background(scores, 0.1)
    assert batch.shape == (2, 5, 3, 3)
    assert torch.equal(batch[1], add_background(scores[1], 0.1))


def _round_trip(scores):
    return decode_scores(encode_scores(scores), scores.shape[1:])


def test_encode_scores__argmax_exact_on_random_maps():
    # 171 maps within a few float16 steps of each other: nearly every patch ties after rounding.
    rng = np.random.default_rng(0)
    scores = (0.5 + 0.002 * rng.random((171, 40, 40))).astype(np.float32)
    plain = scores.astype(np.float16).argmax(0)
    assert (plain != scores.argmax(0)).mean() > 0.3
    stored = _round_trip(scores)
    assert np.array_equal(stored.argmax(0), scores.argmax(0))
    # At most half a step of rounding and one step of raising.
    assert np.abs(stored - scores).max() <= 1.5 * 2.0**-11


def test_encode_scores__constructed_ties():
    step = np.float32(2.0**-24)
    columns = [
        [0.3, 0.3 + step, 0.3 + 2 * step],  # the last wins by less than float16 tells
        [0.3 + 2 * step, 0.3 + step, 0.3],  # the first wins
        [0.4, 0.4, 0.4],  # a true tie goes to the first
        [0.0, 1e-9, 0.0],  # vanishes in float16
        [1 - step, 1.0, 0.0],  # at the top of the range
        [0.0, 0.0, 0.0],  # nothing at all
    ]
    scores = np.array(columns, dtype=np.float32).T.reshape(3, 2, 3).copy()
    assert np.array_equal(_round_trip(scores).argmax(0), scores.argmax(0))


def test_encode_scores__bytes_are_plain_little_endian_float16():
    # The layout that the labels table promises to readers without this package.
    scores = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    data = encode_scores(scores)
    assert len(data) == 2 * scores.size
    np.testing.assert_allclose(np.frombuffer(data, "<f2").reshape(2, 3, 4), scores, atol=2.0**-11)
    assert decode_scores(data, (3, 4)).dtype == np.float32


def test_encode_mask__one_byte_a_patch():
    assert encode_mask(np.array([[True, False], [False, True]])) == b"\x01\x00\x00\x01"
