import pytest
import torch

from tests.builders import random_images, tiny_encoder
from transfgu_ray.algorithms.labels.bank import encode_scores
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap, BootstrapSettings
from transfgu_ray.algorithms.rounds.schedule import Epoch
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.bench.bank import _pack, _unpack
from transfgu_ray.bench.labels import gradient_error
from transfgu_ray.bench.published import plain_step
from transfgu_ray.bench.scale import _differing
from transfgu_ray.bench.table import PARTS, run_parts, table_rows
from transfgu_ray.bench.timing import Target, ratio, take_turns
from transfgu_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target("a", "<=", 1.0, 1.0), True),
        (Target("a", "<=", 1.0, 1.01), False),
        (Target("a", ">=", 50.0, 50.0), True),
        (Target("a", ">=", 50.0, 49.0), False),
        (Target("a", "<=", 1.0, None), None),
    ],
)
def test_target__reached(target, reached):
    assert target.reached is reached
    assert target.as_json()["reached"] is reached


def test_take_turns__one_unmeasured_round_then_in_turn():
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, num_rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio__median_of_ratios_within_a_round():
    # The slow second round slows both, so the ratio is 2, not the 2.5 of the medians.
    assert ratio({"a": [2.0, 20.0, 5.0], "b": [1.0, 10.0, 2.0]}, "a", "b") == 2.0


def test_gradient_error__of_the_tiny_encoder():
    concepts = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    assert 0 < gradient_error(tiny_encoder(), random_images(1, 40, 40), concepts) < 1e-5


def test_plain_step__gives_the_losses_gradient_to_the_student():
    encoder, student = tiny_encoder(), MaskTransformer(4, 24, num_heads=3)
    bootstrap = Bootstrap(
        student,
        BootstrapSettings(learning_rate=1e-3, weight_decay=0.0, gradient_clamp=1.0, omega_1=1.0, omega_2=0.3, seed=0),
    )
    epoch = Epoch(index=1, round=1, starts_round=True, alpha=0.03)
    bootstrap.begin_epoch(epoch, rank=0)
    plain_step(encoder, bootstrap, images=random_images(2, 40, 40), scores=torch.rand(2, 4, 5, 5), epoch=epoch)
    assert all(weight.grad is not None for weight in student.parameters())


def test_unpack__inverts_pack():
    encoded = [part[0] for part in encode_scores(torch.rand(1, 171, 40, 40))]
    assert all(torch.equal(a, b) for a, b in zip(encoded, _unpack(_pack(*encoded)), strict=True))


def test_differing__counts_parts_that_change_between_rounds():
    assert _differing([[b"a", b"b"], [b"a", b"c"], [b"a", b"b"]]) == 1


def test_run_parts__unknown_part():
    with pytest.raises(ConfigError, match="labels, extract"):
        next(run_parts(["speed"], 1, print))


def test_run_parts__one_part(monkeypatch):
    # The real parts take minutes.
    monkeypatch.setitem(
        PARTS, "bank", lambda device: type("F", (), {"targets": [Target("x", "<=", 2, 1.5)], "details": {"s": 1}})
    )
    threads = torch.get_num_threads()
    (found,) = run_parts(["bank"], threads, lambda name: None)
    assert found["targets"] == [{"name": "x", "sense": "<=", "target": 2, "value": 1.5, "reached": True}]
    assert found["details"] == {"bank": {"s": 1}}
    assert table_rows(found["targets"]) == [["x", "<= 2", "1.5", "yes"]]
