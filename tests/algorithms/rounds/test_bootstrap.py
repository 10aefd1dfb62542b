import copy

import numpy as np
import pytest
import torch

from transfgu_ray.algorithms.encoder.resnet import PyramidDecoder
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap, BootstrapSettings
from transfgu_ray.algorithms.rounds.losses import bootstrap_targets
from transfgu_ray.algorithms.rounds.schedule import Epoch, sample_order, schedule
from transfgu_ray.algorithms.rounds.segmenter import Classifier, MaskTransformer

NUM_CLASSES = 4
EPOCHS = schedule((2, 1, 2), (0.03, 0.1))
FIRST = EPOCHS[0]


def _bootstrap(student=None, **changes):
    torch.manual_seed(11)
    student = student or MaskTransformer(NUM_CLASSES, 24, num_layers=1, num_heads=3, dropout=0.1)
    settings = {
        "learning_rate": 5e-3, "weight_decay": 5e-4, "gradient_clamp": 1.0, "omega_1": 1.0, "omega_2": 0.3, "seed": 5,
    }  # fmt: skip
    return Bootstrap(student, BootstrapSettings(**(settings | changes)))


def _batch(num=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4 * 4, 24, generator=rng), torch.rand(num, NUM_CLASSES, 4, 4, generator=rng)


def _train(bootstrap, epochs):
    tokens, scores = _batch(num=6)
    for epoch in epochs:
        bootstrap.begin_epoch(epoch, rank=0)
        for step, rows in enumerate(
            sample_order(0, epoch.index, num_images=6, repeats=1, steps=2, per_worker=3, world_size=1)[0]
        ):
            bootstrap.step(tokens[rows], scores[rows], epoch=epoch, step=step)


def _weights(module):
    return copy.deepcopy(module.state_dict())


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("epoch", [FIRST, Epoch(2, 1, True, 0.05)], ids=["round_0", "round_1"])
def test_step__some_steps_on_one_batch_lower_the_loss(epoch):
    bootstrap = _bootstrap()
    bootstrap.begin_epoch(epoch, rank=0)
    losses = [bootstrap.step(*_batch(), epoch=epoch, step=step)["loss"] for step in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_step__round_0_is_cross_entropy_on_the_bank_and_later_rounds_the_total():
    bootstrap = _bootstrap()
    bootstrap.begin_epoch(FIRST, rank=0)
    terms = bootstrap.step(*_batch(), epoch=FIRST, step=0)
    assert terms["loss"] == terms["cross_entropy"] != terms["total"]
    later = Epoch(1, 1, True, 0.05)
    bootstrap.begin_epoch(later, rank=0)
    terms = bootstrap.step(*_batch(), epoch=later, step=0)
    assert terms["loss"] == terms["total"] != terms["cross_entropy"]


def test_step__round_0_may_train_by_diversity_and_uncertainty_too():
    bootstrap = _bootstrap(round_0="total")
    bootstrap.begin_epoch(FIRST, rank=0)
    terms = bootstrap.step(*_batch(), epoch=FIRST, step=0)
    # Without a teacher there are no negatives: the peer term is cross-entropy, whatever alpha.
    assert terms["peer"] == terms["cross_entropy"]
    want = terms["cross_entropy"] + terms["diversity"] + 0.3 * terms["uncertainty"]
    assert terms["loss"] == terms["total"] == pytest.approx(want, abs=1e-6)


def _step_in_round(number, **changes):
    """Terms of a step and the student after it, in a round without or with a teacher."""
    bootstrap, epoch = _bootstrap(**changes), Epoch(number, number, number > 0, 0.05)
    bootstrap.begin_epoch(epoch, rank=0)
    terms = bootstrap.step(*_batch(), epoch=epoch, step=0)
    return terms, bootstrap.student.state_dict()


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({"diversity": "upper_triangle"}, "diversity"),
        ({"foreground_above": 0.8}, "uncertainty"),
        ({"omega_1": 0.0}, None),
        ({"omega_2": 0.0}, None),
    ],
    ids=["diversity", "uncertainty", "omega_1", "omega_2"],
)
def test_step__a_variant_changes_its_own_term_and_rounds_with_a_teacher_alone(changes, term):
    (usual, trained), (terms, other) = _step_in_round(1), _step_in_round(1, **changes)
    assert {name for name in usual if usual[name] != terms[name]} == {"total", "loss"} | ({term} if term else set())
    assert not _equal(trained, other)
    # Round 0 is cross-entropy alone (Eq. 9).
    assert _equal(_step_in_round(0)[1], _step_in_round(0, **changes)[1])


def test_step__foreground_is_where_a_concept_of_the_bank_scores():
    tokens, scores = _batch()
    # All patches except those of one image, whatever their background score.
    scores = scores.clamp(min=0.2)
    scores[1, :-1] = 0.05
    bootstrap, epoch = _bootstrap(foreground_above=0.1), Epoch(1, 1, True, 0.05)
    bootstrap.begin_epoch(epoch, rank=0)
    bootstrap.student.eval()
    logits = bootstrap.student(tokens, (4, 4))[0][:, :-1]
    top = logits.softmax(1).sort(1).values
    want = 1 - (top[:, -1] - top[:, -2])[[0, 2, 3]].mean()
    assert bootstrap.step(tokens, scores, epoch=epoch, step=0)["uncertainty"] == pytest.approx(want.item(), abs=1e-5)


def test_step__updates_equal_a_plain_rewrite():
    # Several steps, since Adam's first hides any factor on the gradient, including the clamp.
    bootstrap = _bootstrap(gradient_clamp=1e-3, weight_decay=0.05)
    plain = copy.deepcopy(bootstrap.student)
    bootstrap.begin_epoch(FIRST, rank=0)
    state = torch.random.get_rng_state()
    for step in range(4):
        bootstrap.step(*_batch(seed=step), epoch=FIRST, step=step)

    torch.random.set_rng_state(state)
    groups = [
        {"params": [weight for weight in plain.parameters() if weight.ndim > 1]},
        {"params": [weight for weight in plain.parameters() if weight.ndim == 1], "weight_decay": 0},
    ]
    plain.train()
    optimiser = torch.optim.Adam(groups, lr=5e-3, weight_decay=0.05)
    for step in range(4):
        tokens, scores = _batch(seed=step)
        logits, _ = plain(tokens, (4, 4))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, scores.argmax(1)).backward()
        for weight in plain.parameters():
            weight.grad.clamp_(-1e-3, 1e-3)
        optimiser.step()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(bootstrap.student.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_step__teacher_decides_the_targets(monkeypatch):
    seen = []

    def spy(scores, teacher_logits):
        seen.append(teacher_logits)
        return bootstrap_targets(scores, teacher_logits)

    monkeypatch.setattr("transfgu_ray.algorithms.rounds.bootstrap.bootstrap_targets", spy)
    bootstrap = _bootstrap()
    _train(bootstrap, EPOCHS[:3])
    assert [logits is None for logits in seen] == [True] * 4 + [False] * 2
    tokens, _ = _batch(num=6)
    rows = sample_order(0, 2, num_images=6, repeats=1, steps=2, per_worker=3, world_size=1)[0, 1]
    want = bootstrap.teacher(tokens[rows], (4, 4))[0]
    assert torch.equal(seen[-1], want)


def test_step__nan_raises_before_the_update():
    bootstrap = _bootstrap()
    bootstrap.begin_epoch(FIRST, rank=0)
    bootstrap.step(*_batch(), epoch=FIRST, step=0)
    before = _weights(bootstrap.student)
    real = bootstrap._parallel
    # Only the output is NaN, so that the weights would become NaN if the update were made.
    bootstrap._parallel = lambda *args: tuple(output * torch.nan for output in real(*args))
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 0, step 7"):
        bootstrap.step(*_batch(), epoch=FIRST, step=7)
    assert _equal(before, bootstrap.student.state_dict())


def test_begin_epoch__round_turn_copies_the_student_and_starts_it_again():
    bootstrap = _bootstrap()
    initial = _weights(bootstrap.student)
    _train(bootstrap, EPOCHS[:2])
    trained = _weights(bootstrap.student)
    assert not _equal(initial, trained)
    assert bootstrap.teacher is None
    bootstrap.begin_epoch(EPOCHS[2], rank=0)
    assert _equal(trained, bootstrap.teacher.state_dict())
    assert _equal(trained, bootstrap.trained)
    assert _equal(initial, bootstrap.student.state_dict())
    assert not bootstrap.teacher.training
    assert bootstrap.student.training
    # As in the published code, Adam goes on with the moments of the previous student.
    assert bootstrap.state_dict()["optimiser"]["state"][0]["step"] == 4


def test_begin_epoch__teacher_is_a_frozen_copy_and_round_0_is_remembered():
    bootstrap = _bootstrap()
    _train(bootstrap, EPOCHS[:2])
    round_0 = _weights(bootstrap.student)
    _train(bootstrap, EPOCHS[2:3])
    # Training the student does not change its teacher.
    assert _equal(round_0, bootstrap.teacher.state_dict())
    round_1 = _weights(bootstrap.student)
    bootstrap.begin_epoch(EPOCHS[3], rank=0)
    assert _equal(round_1, bootstrap.teacher.state_dict())
    assert _equal(round_0, bootstrap.trained)


@pytest.mark.parametrize(("student", "width"), [(Classifier(4, 24), 24), (PyramidDecoder(Classifier(4, 24), 24), 3840)])
def test_step__trains_all_of_another_decoder_and_none_of_its_teacher(student, width):
    bootstrap = _bootstrap(student)
    tokens, scores = torch.randn(4, 16, width, generator=torch.Generator().manual_seed(0)), _batch()[1]
    initial = _weights(bootstrap.student)
    bootstrap.begin_epoch(FIRST, rank=0)
    bootstrap.step(tokens, scores, epoch=FIRST, step=0)
    trained = _weights(bootstrap.student)
    later = Epoch(1, 1, True, 0.05)
    bootstrap.begin_epoch(later, rank=0)
    assert _equal(initial, bootstrap.student.state_dict())
    bootstrap.step(tokens, scores, epoch=later, step=0)
    # The teacher of a pyramid is a copy with its own pyramid.
    assert _equal(trained, bootstrap.teacher.state_dict())
    for weights in (trained, bootstrap.student.state_dict()):
        assert not [name for name in initial if torch.equal(initial[name], weights[name])]


def test_begin_epoch__dropout_differs_between_workers_and_epochs_and_not_between_runs():
    def draw(epoch, rank):
        bootstrap = _bootstrap()
        bootstrap.begin_epoch(epoch, rank)
        return bootstrap.student(_batch()[0], (4, 4))[0]

    assert torch.equal(draw(FIRST, 0), draw(FIRST, 0))
    assert not torch.equal(draw(FIRST, 0), draw(FIRST, 1))
    assert not torch.equal(draw(FIRST, 0), draw(EPOCHS[1], 0))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_load_state_dict__resumed_run_is_bit_equal(stop, tmp_path):
    whole = _bootstrap()
    _train(whole, EPOCHS)

    first = _bootstrap()
    _train(first, EPOCHS[:stop])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = _bootstrap()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    _train(resumed, EPOCHS[stop:])

    for name in ("student", "teacher"):
        assert _equal(getattr(whole, name).state_dict(), getattr(resumed, name).state_dict())
    assert _equal(whole.trained, resumed.trained)
