import torch

from transfgu_ray.algorithms.labels.bank import add_background, decode_scores, encode_scores, exclude, normalise


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
    return decode_scores(*encode_scores(scores))


def _close_maps(seed=0):
    """171 maps that share most of each patch's height, as response maps do: half of them at its floor."""
    generator = torch.Generator().manual_seed(seed)
    floor = 0.6 * torch.rand(2, 1, 40, 40, generator=generator)
    cam = 0.06 * torch.randn(2, 171, 40, 40, generator=generator).clamp(min=0) ** 2
    return (floor + cam).clamp(max=1)


def test_encode_scores__argmax_exact_where_half_a_patch_ties_in_float16():
    scores = 0.5 + 2e-4 * torch.rand(1, 171, 40, 40, generator=torch.Generator().manual_seed(0))
    assert (scores.half().float().argmax(1) != scores.argmax(1)).float().mean() > 0.3
    codes, _, _ = encode_scores(scores)
    assert torch.equal(_round_trip(scores).argmax(1), scores.argmax(1))
    assert torch.equal(codes.argmax(1), scores.argmax(1))
    # Concepts that are equal stay equal, so that the teacher decides between them.
    assert torch.equal(codes == 63, scores == scores.amax(1, keepdim=True))
    assert (codes == 63).sum() > 40 * 40


def test_encode_scores__by_hand():
    # One patch; range 0.25 to 0.75. Shares 0, 0.5 and 1 give codes 1, 1 + round(62 / 4) = 17 and 63; 0 stays 0.
    scores = torch.tensor([0.5, 0.25, 0.0, 0.75]).view(1, 4, 1, 1)
    codes, low, high = encode_scores(scores)
    assert codes.flatten().tolist() == [17, 1, 0, 63]
    assert (low.item(), high.item()) == (0.25, 0.75)
    want = [0.25 + 0.5 * (16 / 62) ** 0.5, 0.25, 0.0, 0.75]
    torch.testing.assert_close(_round_trip(scores).flatten(), torch.tensor(want))


def test_encode_scores__error_within_a_step_of_the_patch():
    scores = _close_maps()
    span = (scores.amax(1) - scores.amin(1)).unsqueeze(1)
    error = (_round_trip(scores) - scores).abs() / span
    # The largest step of a square root of 62 steps is its first; plus float16 rounding of the range's ends.
    assert error.max() <= 62**-0.5 + 0.02
    top = scores >= scores.amax(1, keepdim=True) - 0.2 * span
    assert error[top].max() <= 1 / 62 + 0.02


def test_encode_scores__constructed_ties():
    step = 2.0**-24
    columns = [
        [0.3, 0.3 + step, 0.3 + 2 * step],  # the last wins by less than float16 resolves
        [0.3 + 2 * step, 0.3 + step, 0.3],  # the first wins
        [0.4, 0.4, 0.4],  # a true tie goes to the first
        [0.0, 1e-9, 0.0],  # vanishes in float16
        [1 - step, 1.0, 0.0],  # at the top of the range
        [0.0, 0.0, 0.0],  # nothing at all
    ]
    scores = torch.tensor(columns).T.reshape(1, 3, 2, 3)
    stored = _round_trip(scores)
    assert torch.equal(stored.argmax(1), scores.argmax(1))
    assert stored.min() >= 0
    assert stored.max() <= 1
    assert torch.equal(stored[..., 1, 2], torch.zeros(1, 3))


def test_encode_scores__excluded_concepts_stay_at_zero():
    scores = exclude(_close_maps(), torch.rand(2, 40, 40) > 0.5, torch.arange(171) % 2 == 0)
    stored = _round_trip(scores)
    assert torch.equal(stored == 0, scores == 0)
    # The floor is that of the remaining concepts: their step is as fine as without exclusion.
    kept = torch.where(scores > 0, scores, torch.inf)
    span = (scores.amax(1) - kept.amin(1)).unsqueeze(1)
    assert ((stored - scores).abs() / span).max() <= 62**-0.5 + 0.02


def test_encode_scores__targets_after_a_trained_teacher_hardly_change():
    # A trained teacher has learned the bank: its logits follow the scores, with some errors.
    scores = _close_maps()
    logits = 3 * (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    teacher = (logits + 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).softmax(1)
    assert ((scores + teacher).argmax(1) != scores.argmax(1)).float().mean() > 0.05
    changed = (_round_trip(scores) + teacher).argmax(1) != (scores + teacher).argmax(1)
    assert changed.float().mean() <= 0.005


def test_decode_scores__one_image_as_in_a_batch():
    codes, low, high = encode_scores(_close_maps())
    assert torch.equal(decode_scores(codes[1], low[1], high[1]), decode_scores(codes, low, high)[1])
