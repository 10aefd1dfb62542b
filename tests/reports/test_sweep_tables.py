import pytest

from tests.builders import make_sweep, make_trial
from transfgu_ray.reports.sweep_tables import (
    best_trial,
    evidence,
    evidence_lines,
    evidence_table,
    failed_trials,
    ranked,
    short_names,
    sweep_table,
    value_text,
    varying,
)

MIOUS = (0.30, 0.50, 0.20, 0.45, 0.40)
SPACE = {"train.omega_1": [0.0, 1.0], "train.alpha": [[0.03, 0.1], [0.0, 0.0]], "seed": [0]}


def _trials():
    usage = (1.0, 1.0, 0.5, 0.5, 0.9)
    return [
        make_trial(i, {"train.omega_1": float(i % 2)}, (i + 1) / 10, miou, components={"usage": usage[i], "flat": 0.5})
        for i, miou in enumerate(MIOUS)
    ]


def test_evidence__worked_by_hand():
    got = evidence(_trials())
    assert list(got) == ["score", "usage", "flat"]
    # Ranks of mIoU 2, 5, 1, 4, 3 beside 1, 2, 3, 4, 5: the squares of the differences sum to 18.
    assert got["score"] == {"spearman": pytest.approx(1 - 6 * 18 / (5 * 24)), "regret_miou": pytest.approx(0.50 - 0.40)}
    # Mean ranks 4.5, 4.5, 1.5, 1.5, 3; of the two highest the earlier is chosen, with an mIoU of 0.30.
    assert got["usage"] == {"spearman": pytest.approx(10**-0.5), "regret_miou": pytest.approx(0.50 - 0.30)}
    # A constant gives no order, but chooses the first.
    assert got["flat"] == {"spearman": None, "regret_miou": pytest.approx(0.50 - 0.30)}


def test_evidence__of_finished_trials_alone():
    strange = [
        make_trial(8, {}, 9.0, 0.99, status="stopped"),
        make_trial(9, {}, None, None, status="failed", components=None),
        make_trial(7, {}, 0.9, None),
    ]
    assert evidence([*strange, *_trials()])["score"] == evidence(_trials())["score"]


def test_evidence__a_component_that_few_trials_have_is_null():
    trials = _trials()
    for trial, agreement in zip(trials, (0.1, 0.9, None, None, None), strict=True):
        trial["components"]["agreement"] = agreement
    assert evidence(trials)["agreement"] == {"spearman": None, "regret_miou": None}
    # The regret is against the best of all trials, measured or not: here the second is not.
    for trial, agreement in zip(trials, (0.1, None, 0.2, 0.3, 0.4), strict=True):
        trial["components"]["agreement"] = agreement
    # Ranks 1, 2, 3, 4 beside 2, 1, 4, 3.
    got = evidence(trials)["agreement"]
    assert got == {"spearman": pytest.approx(1 - 6 * 4 / 60), "regret_miou": pytest.approx(0.1)}


def test_evidence__constant_miou_has_no_order():
    trials = [make_trial(i, {}, i / 10, 0.5) for i in range(3)]
    assert evidence(trials) == {"score": {"spearman": None, "regret_miou": 0.0}}


def test_evidence__none_without_labels_or_with_two_trials():
    assert evidence([make_trial(i, {}, i / 10, None) for i in range(5)]) is None
    assert evidence(_trials()[:2]) is None
    assert evidence([]) is None


def test_best_trial__of_equals_the_earliest():
    trials = _trials()
    assert best_trial(trials, "score") is trials[4]
    assert best_trial(trials, "miou") is trials[1]
    assert best_trial(trials, "usage") is trials[0]
    assert [trial["id"][:2] for trial in ranked(trials, "usage")] == ["00", "01", "04", "02", "03"]
    assert best_trial([make_trial(0, {}, 0.5, None)], "miou") is None
    assert best_trial([make_trial(0, {}, 0.5, 0.5, status="stopped")], "score") is None


def test_evidence_table__a_row_each_with_its_choice():
    trials = _trials()
    trials[0]["components"]["agreement"] = None
    header, rows = evidence_table(make_sweep(SPACE, trials, evidence=evidence(trials)))
    assert header == ["chosen by", "Spearman's rho", "regret, mIoU points", "its trial", "its mIoU, %"]
    assert rows == [
        ["score", "0.10", "10.00", "04040404", "40.00"],
        ["usage alone", "0.32", "20.00", "00000000", "30.00"],
        ["flat alone", "", "20.00", "00000000", "30.00"],
        ["agreement alone", "", "", "", ""],
    ]


def test_evidence_lines__what_it_is_about_or_why_there_is_none():
    trials = _trials()
    (line,) = evidence_lines(make_sweep(SPACE, trials, evidence=evidence(trials)))
    assert line == "5 finished trials, split val; the best by labels is 01010101 with 50.00 % mIoU"
    (line,) = evidence_lines(make_sweep(SPACE, trials[:2]))
    assert "finished trials with an mIoU: 2; a rank correlation needs 3" in line
    (line,) = evidence_lines(make_sweep(SPACE, [make_trial(0, {}, 0.5, None)]))
    assert "no finished trial has an mIoU" in line


def test_failed_trials__each_with_its_reason_where_one_is_known():
    trials = [make_trial(0, {}, 0.5, 0.4), *(make_trial(i, {}, None, None, status="failed") for i in (1, 2))]
    trials[1]["error"] = "the loss is nan"
    known, unknown = failed_trials(make_sweep(SPACE, trials))
    assert known == ("01010101", "the loss is nan")
    assert unknown[0] == "02020202"
    assert "no reason is known" in unknown[1]


def test_sweep_table__best_first_and_those_without_a_result_last():
    point = {"train.omega_1": 0.3, "train.alpha": [0.03, 0.1], "seed": 0}
    trials = [
        make_trial(0, point, None, None, status="failed", epochs=0, num_concepts=None, components=None),
        make_trial(1, point, 0.25, 0.5, components={"usage": 0.75}),
        make_trial(2, point | {"train.omega_1": 1.0}, 0.5, 0.4, components={"usage": 1.0}),
        make_trial(3, point, 0.9, None, status="stopped", epochs=3),
    ]
    header, rows = sweep_table(make_sweep(SPACE, trials), wide=True)
    assert header == ["trial", "omega_1", "alpha", "status", "epochs", "K", "score", "usage", "mIoU, %"]
    assert rows == [
        ["02020202", "1", "[0.03, 0.1]", "finished", "14", "16", "0.500", "1.000", "40.00"],
        ["01010101", "0.3", "[0.03, 0.1]", "finished", "14", "16", "0.250", "0.750", "50.00"],
        ["00000000", "0.3", "[0.03, 0.1]", "failed", "0", "", "", "", ""],
        ["03030303", "0.3", "[0.03, 0.1]", "stopped", "3", "16", "0.900", "", ""],
    ]
    narrow = ["trial", "omega_1", "alpha", "status", "epochs", "K", "score", "mIoU, %"]
    assert sweep_table(make_sweep(SPACE, trials))[0] == narrow
    by_labels = sweep_table(make_sweep(SPACE, trials, objective="miou"))[1]
    assert [row[0][:2] for row in by_labels] == ["01", "02", "00", "03"]


def test_sweep_table__columns_without_a_value_are_left_out():
    header, _ = sweep_table(make_sweep(SPACE, [make_trial(0, {"train.omega_1": 0.0}, 0.5, None)]), wide=True)
    assert header == ["trial", "omega_1", "status", "epochs", "K", "score"]


def test_sweep_table__narrow_leaves_out_what_all_trials_share():
    space = {"concepts.num_concepts": [16, 6]}
    trials = [make_trial(i, {"concepts.num_concepts": k}, 0.5, None, num_concepts=k) for i, k in enumerate((16, 6))]
    assert sweep_table(make_sweep(space, trials))[0] == ["trial", "num_concepts", "score"]


def test_varying__more_than_one_value():
    space = SPACE | {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    assert varying(space) == {name: space[name] for name in ("train.omega_1", "train.alpha", "train.learning_rate")}


def test_short_names__whole_where_two_would_be_equal():
    settings = ["train.batch_size", "cam.batch_size", "train.alpha", "seed"]
    assert list(short_names(settings).values()) == ["train.batch_size", "cam.batch_size", "alpha", "seed"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123456, "0.0001235"),
        (1.0, "1"),
        (27, "27"),
        (None, "null"),
        (True, "true"),
        ("super", "super"),
        ([0.03, 0.1], "[0.03, 0.1]"),
    ],
)
def test_value_text__of_each_kind(value, text):
    assert value_text(value) == text
