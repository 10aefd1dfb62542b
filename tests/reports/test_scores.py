from dataclasses import replace

import numpy as np
import pytest

from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.algorithms.scores.intervals import mean_interval, photo_counts, resampled_counts, total_counts
from transfgu_ray.algorithms.scores.metrics import score, score_matched
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.names import Names
from transfgu_ray.reports.ablations import ScoredRun, aggregate
from transfgu_ray.reports.score_tables import score_lines, score_table, trust_table
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json, scores_by_method

# Scenes: 12 classes of things, then 4 of stuff, with one concept per class.
KINDS = ["foreground"] * 12 + ["background"] * 4
HUNGARIAN = "one concept per class (Hungarian), pixels of concepts left over are"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    # tests/algorithms/scores/test_intervals.py tests their values.
    monkeypatch.setattr(intervals, "RESAMPLES", 10)


def _config(*assignments):
    return build_config(RunConfig(), None, ["data.dataset=scenes", "concepts.num_concepts=null", *assignments])


def _confusions(right, wrong=2):
    """Return matrices where each class has `right` pixels of its own concept, and `wrong` of the next."""
    one, next_one = (np.eye(16, k=k, dtype=np.int64) for k in (0, 1))
    return dict.fromkeys(STAGE_NAMES, right * one + wrong * next_one)


def _one_photograph(confusion):
    classes, concepts = confusion.nonzero()
    pixels, shape = confusion[classes, concepts], (1, *confusion.shape)
    return photo_counts(np.zeros_like(classes), classes, concept_id=concepts, pixels=pixels, shape=shape)


def _metrics(confusions, config=None, kinds=KINDS):
    counts = {name: _one_photograph(confusion) for name, confusion in confusions.items()}
    return metrics_json(
        config or _config(), "val", num_images=3, counts=counts, names=Names(tuple(kinds), {}), weights_sha256="f" * 64
    )


def test_metrics_json__scores_of_both_granularities_worked_by_hand():
    got = _metrics(_confusions(right=8))
    assert (got["granularity"], got["num_classes"], got["num_concepts"], got["num_images"]) == ("fine", 16, 16, 3)
    last = got["stages"]["bootstrapped"]
    # The first class has no false positives, the last no false negatives; each other class has 2 of both.
    assert last["miou"] == pytest.approx((2 * 8 / 10 + 14 * 8 / 12) / 16)
    assert last["pixel_accuracy"] == 128 / 158
    # Only the last class of a coarser one is confused with another: 3 classes make 30 pixels, 28 of them correct.
    assert last["super"]["pixel_accuracy"] == (4 * 28 + 18 + 18) / 158
    assert last["super"]["miou"] == pytest.approx((28 / 30 + 3 * 28 / 32 + 18 / 22 + 18 / 20) / 6)
    # The 12th class is the last thing.
    assert last["foreground_iou"] == 118 / 120
    assert last["coverage"] == 1.0
    # There is one photograph to draw.
    assert last["miou_interval"] == [last["miou"]] * 2
    assert last["pixel_accuracy_interval"] == [last["pixel_accuracy"]] * 2


def test_metrics_json__chance_and_the_majority_class_are_always_beside():
    got = _metrics(_confusions(right=8))
    assert list(got["baselines"]) == ["chance", "majority"]
    # 158 pixels: 10 in each class but the last and of each concept but the first, which have 8.
    chance, majority = got["baselines"].values()
    assert chance["pixel_accuracy"] == pytest.approx((15 * 100 + 64) / 158**2)
    assert chance["miou"] == pytest.approx((15 * 100 / (2 * 1580 - 100) + 64 / (2 * 1264 - 64)) / 16)
    assert majority["pixel_accuracy"] == 10 / 158
    assert majority["miou"] == pytest.approx(10 / 158 / 16)
    # Three of a kind: the most frequent class is an animal.
    assert majority["super"]["pixel_accuracy"] == 30 / 158
    for scores in (chance, majority):
        assert scores["coverage"] == 1.0
        assert scores["miou_interval"] == pytest.approx([scores["miou"]] * 2)


def test_metrics_json__policy_and_protocol_reach_every_score():
    # 16 classes, 18 concepts: those left over have one pixel in each class.
    left_over = np.concatenate([8 * np.eye(16, dtype=np.int64), np.ones((16, 2), dtype=np.int64)], axis=1)
    kinds, confusions = ["any"] * 18, dict.fromkeys((*STAGE_NAMES, "refined", "raw_colour"), left_over)
    settings = ("data.region_mode=no_prior", "concepts.num_concepts=18")
    want = {
        ("discard", "transfgu"): (1.0, 1.0),
        ("count", "picie"): (0.8, 0.8),
        ("count", "stego"): (0.8 * 16 / 17, 0.8),
    }
    for (unmatched, protocol), (miou, accuracy) in want.items():
        rule = f"evaluate.unmatched={unmatched}", f"evaluate.protocol={protocol}"
        got = _metrics(confusions, _config(*settings, *rule), kinds)
        assert (got["unmatched"], got["protocol"]) == (unmatched, protocol)
        assert score_lines(got)[0].startswith(f"protocol {protocol}; {HUNGARIAN}")
        for scores in (*got["stages"].values(), got["refined"], got["baselines"]["raw_colour"]):
            assert scores["coverage"] == 0.8
            assert (scores["miou"], scores["pixel_accuracy"]) == pytest.approx((miou, accuracy))
            assert scores["miou_interval"] == pytest.approx([miou] * 2)
            assert scores["super"]["pixel_accuracy"] == pytest.approx(accuracy)
        # Of 160 pixels each concept left over has 16 and each other one 8; chance matches the larger ones first.
        assert got["baselines"]["chance"]["coverage"] == pytest.approx((2 * 16 + 14 * 8) / 160)


def _two_photographs(one, other):
    """Return metrics.json of two photographs with the same matrices at every stage and of one baseline."""
    matrices = np.stack([one, other])
    where = photo, classes, concepts = matrices.nonzero()
    counts = photo_counts(photo, classes, concept_id=concepts, pixels=matrices[where], shape=matrices.shape)
    of_methods, names = dict.fromkeys((*STAGE_NAMES, "raw_colour"), counts), Names(tuple(KINDS), {})
    return metrics_json(_config(), "val", num_images=2, counts=of_methods, names=names, weights_sha256="f" * 64)


def test_metrics_json__intervals_keep_the_match_of_the_split():
    # The concepts of two classes are swapped in the second photograph; the first has more pixels.
    one, other = np.zeros((2, 16, 16), dtype=np.int64)
    one[[0, 1], [0, 1]], other[[0, 1], [1, 0]] = 30, 10
    got = _two_photographs(one, other)
    last = got["stages"]["bootstrapped"]
    assert last["pixel_accuracy"] == 0.75
    # A resample of the second photograph alone, with its own match, would be all correct.
    assert last["pixel_accuracy_interval"] == [0.0, 1.0]


def test_metrics_json__held_out_match_and_photographs_worked_by_hand():
    # Concepts 0 and 1 are classes 0 and 1 in one photograph and 1 and 0 in the other; concepts 3 and 5 are on both.
    one, other = np.zeros((2, 16, 16), dtype=np.int64)
    one[[0, 1, 3], [0, 1, 3]], other[[0, 1, 5], [1, 0, 5]] = (30, 30, 6), (10, 10, 4)
    got = _two_photographs(one, other)
    last = got["stages"]["bootstrapped"]
    assert last["pixel_accuracy"] == 70 / 90
    # Each half is one photograph: at most classes 3 and 5 are right, whose concepts the other half does not show.
    assert last["held_out"]["pixel_accuracy"] < 0.2
    # In the second photograph two classes are wrong and one right. The worst tenth is one photograph.
    assert last["photo_miou"] == {"mean": pytest.approx(2 / 3), "worst_decile": 1 / 3, "worst_decile_limit": 1 / 3}
    assert last["dead_concepts"] == [c for c in range(16) if c not in (0, 1, 3, 5)]
    assert last["num_dead_concepts"] == 12
    assert got["baselines"]["raw_colour"]["held_out"] == last["held_out"]
    assert "dead_concepts" not in got["baselines"]["raw_colour"]
    header, rows = trust_table(got)
    assert header == ["method", "mIoU", "held-out mIoU", "mIoU of a photograph", "worst decile", "unused concepts"]
    assert [row[0] for row in rows][2:] == ["bootstrapped", "k-means, colours", "chance", "majority class"]
    assert (rows[2][3:], rows[3][3:]) == (["66.67", "33.33", "12"], ["66.67", "33.33", ""])
    assert score_lines(got)[1] == (
        f"bootstrapped: held-out mIoU {rows[2][2]} (matched on the other photographs), "
        "worst decile of photographs 33.33, 12 of 16 concepts unused"
    )


def test_metrics_json__held_out_match_of_photographs_alike_is_that_of_the_split():
    confusion = _confusions(right=8)["trained"]
    last = _two_photographs(confusion, 2 * confusion)["stages"]["trained"]
    assert last["held_out"] == {name: pytest.approx(last[name]) for name in ("miou", "pixel_accuracy")}
    assert last["photo_miou"] == {
        name: pytest.approx(last["miou"]) for name in ("mean", "worst_decile", "worst_decile_limit")
    }
    # A single photograph has no other half.
    assert _metrics(_confusions(right=8))["stages"]["trained"]["held_out"] is None


def test_metrics_json__background_of_eq_8_is_no_dead_concept():
    config = build_config(RunConfig(), None, ["data.dataset=voc", "concepts.num_concepts=null"])
    got = _metrics(dict.fromkeys(STAGE_NAMES, np.eye(21, 21, 1, dtype=np.int64)), config, KINDS[:1] * 20 + ["none"])
    assert got["stages"]["trained"]["dead_concepts"] == [0]
    alone = np.zeros((21, 21), dtype=np.int64)
    alone[3, 7] = 5
    got = _metrics(dict.fromkeys(STAGE_NAMES, alone), config, KINDS[:1] * 20 + ["none"])
    assert got["stages"]["trained"]["num_dead_concepts"] == 19


def test_metrics_json__backbone_is_what_the_student_reads():
    config = _config("train.backbone=resnet50_fpn", "train.backbone_weights=random")
    assert _metrics(_confusions(8), config)["backbone"] == "resnet50_fpn"
    assert _metrics(_confusions(8))["backbone"] == "vit_small_patch8_224.dino"


def test_metrics_json__refined_stands_beside_the_stages():
    plain = _metrics(_confusions(8))
    got = _metrics(_confusions(8) | {"refined": _confusions(9)["initial"]})
    assert plain["refined"] is None
    assert got["refined"]["miou"] > got["stages"]["bootstrapped"]["miou"]
    # It leaves the stages as they are.
    assert got | {"refined": None} == plain
    _, rows = score_table(got)
    assert [row[0] for row in rows][:4] == [*STAGE_NAMES, "bootstrapped + PAMR"]
    assert rows[3][3], "its foreground IoU"


def test_metrics_json__what_has_no_meaning_is_null():
    confusion = np.eye(6, dtype=np.int64)
    coarse = _metrics(dict.fromkeys(STAGE_NAMES, confusion), _config("concepts.granularity=super"), KINDS[8:14])
    assert coarse["stages"]["trained"]["super"] is None
    header = ["scenes val super-categories, %", "mIoU", "accuracy", "foreground IoU", "coverage"]
    assert score_table(coarse)[0] == header
    assert [row["name"] for row in coarse["per_class"]] == ["animal", "vehicle", "furniture", "plant", "ground", "wall"]
    together = _metrics(_confusions(8), kinds=["any"] * 16)
    assert together["stages"]["trained"]["foreground_iou"] is None
    unscored = metrics_json(
        RunConfig(), None, num_images=3, counts={}, names=Names(("any",) * 27, {}), weights_sha256=""
    )
    assert {unscored[name] for name in ("stages", "refined", "baselines", "per_class", "split")} == {None}
    assert scores_by_method(unscored) == {}
    assert (unscored["scored"], unscored["num_images"]) == (False, 0)


def test_metrics_json__background_of_eq_8_is_no_object():
    # 20 concepts and the `none` channel; half of the cat's pixels are predicted as background.
    confusion = np.zeros((21, 21), dtype=np.int64)
    confusion[8, 7], confusion[8, 20], confusion[0, 20] = 5, 5, 10
    config = build_config(RunConfig(), None, ["data.dataset=voc", "concepts.num_concepts=null"])
    got = _metrics(dict.fromkeys(STAGE_NAMES, confusion), config, ["foreground"] * 20 + ["none"])
    assert got["stages"]["initial"]["foreground_iou"] == 0.5
    assert got["stages"]["initial"]["super"] is None
    rows = {row["name"]: row for row in got["per_class"]}
    assert rows["cat"] == {"name": "cat", "kind": "thing", "iou": 0.5, "concepts": [7]}
    assert rows["background"]["kind"] == "stuff"
    assert rows["dog"]["iou"] is None


def test_score_table__baselines_below_the_stages():
    metrics = _metrics(
        _confusions(8) | {"raw_colour": np.eye(16, dtype=np.int64)[:, ::-1], "patch_tokens": _confusions(2)["initial"]}
    )
    assert set(metrics["baselines"]["raw_colour"]) == {
        "miou", "miou_interval", "pixel_accuracy", "pixel_accuracy_interval", "coverage", "super", "held_out",
        "photo_miou",
    }  # fmt: skip
    header, rows = score_table(metrics)
    assert header == ["scenes val, %", "mIoU", "accuracy", "foreground IoU", "super mIoU", "coverage"]
    assert [row[0] for row in rows] == [
        *STAGE_NAMES, "k-means, colours", "k-means, patch tokens", "chance", "majority class"
    ]  # fmt: skip
    assert rows[2] == ["bootstrapped", "68.33 [68.3, 68.3]", "81.01", "98.33", "87.94", "100.00"]
    assert rows[3] == ["k-means, colours", "100.00 [100.0, 100.0]", "100.00", "", "100.00", "100.00"]
    assert score_lines(metrics) == [
        f"protocol transfgu; {HUNGARIAN} not scored; [ ] 95 % of 1000 resamples of the photographs",
        "bootstrapped: worst decile of photographs 68.33, 0 of 16 concepts unused",
        "bootstrapped is 0.68 x the best baseline (k-means, colours)",
        "objects at IoU >= 0.3: 12 of 12",
    ]


def test_score_table__columns_without_a_value_are_left_out():
    config = build_config(
        RunConfig(), None, ["data.dataset=voc", "data.region_mode=no_prior", "concepts.num_concepts=2"]
    )
    confusion = np.zeros((21, 2), dtype=np.int64)
    confusion[0, 0], confusion[8, 0], confusion[9, 1], confusion[9, 0] = 9, 1, 1, 9
    metrics = _metrics(dict.fromkeys(STAGE_NAMES, confusion), config, ["any"] * 2)
    assert score_table(metrics)[0] == ["voc val, %", "mIoU", "accuracy", "coverage"]
    # The cat has no concept, the chair one pixel of ten.
    # Chance: 190 of the chair's 200 and 9 of the background's 180 twentieths of a pixel.
    assert metrics["baselines"]["chance"]["miou"] == pytest.approx((190 / 390 + 9 / 191) / 3)
    assert score_lines(metrics)[2:] == [
        "bootstrapped is 1.07 x the best baseline (chance)",
        "objects at IoU >= 0.3: 0 of 2",
    ]


def _run(seed, matrices, **changes):
    """Return a run with the same matrices, one a photograph, at every stage."""
    where = photo, classes, concepts = np.nonzero(matrices)
    of_stage = photo_counts(photo, classes, concept_id=concepts, pixels=matrices[where], shape=matrices.shape)
    config, names, counts = _config(f"seed={seed}"), Names(tuple(KINDS), {}), dict.fromkeys(STAGE_NAMES, of_stage)
    metrics = metrics_json(config, "val", num_images=3, counts=counts, names=names, weights_sha256="f" * 64)
    return ScoredRun(metrics | changes, config, counts, names)


def _seeds(*rights):
    """Return runs with `right` of the ten pixels of each class, on the same two photographs."""
    one, next_one = np.eye(16, dtype=np.int64), np.roll(np.eye(16, dtype=np.int64), 1, axis=1)
    return [_run(seed, np.stack([right * one + (10 - right) * next_one] * 2)) for seed, right in enumerate(rights)]


def test_aggregate__mean_deviation_and_interval_by_hand():
    got = aggregate(_seeds(6, 9, 9))
    assert (got["seeds"], got["dataset"], got["unmatched"]) == ([0, 1, 2], "scenes", "discard")
    assert (list(got["stages"]), list(got["baselines"])) == (list(STAGE_NAMES), ["chance", "majority"])
    assert got["refined"] is None
    accuracy = got["stages"]["trained"]["pixel_accuracy"]
    assert (accuracy["mean"], accuracy["deviation"]) == pytest.approx((0.8, (0.06 / 2) ** 0.5))
    # The photographs are alike: what spreads are the means of three draws of the seeds.
    assert 0.6 <= accuracy["interval"][0] < 0.8 < accuracy["interval"][1] <= 0.9
    assert got["stages"]["trained"]["coverage"] == {"mean": 1.0, "deviation": 0.0}
    assert set(got["baselines"]["chance"]) == {"miou", "pixel_accuracy", "coverage"}


def test_aggregate__interval_is_over_the_same_photographs_of_all_seeds():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (5, 16, 16))
    # Other predictions of the same truth.
    runs = [_run(seed, rng.permuted(pixels, axis=2)) for seed in range(2)]
    resampled = []
    for run in runs:
        counts, found = run.counts["trained"], run.metrics["stages"]["trained"]
        split = score(total_counts(counts).reshape(16, 16))
        assert split.miou == found["miou"]
        mious = [
            score_matched(total.reshape(16, 16), split.class_of_concept, unmatched="discard", protocol="transfgu").miou
            for total in resampled_counts(counts, 0)
        ]
        resampled.append(mious)
    want = mean_interval(np.array(resampled).T, 0)
    assert aggregate(runs)["stages"]["trained"]["miou"]["interval"] == want


def test_aggregate__one_seed_has_no_deviation_and_the_interval_of_its_photographs():
    (run,) = _seeds(6)
    refined = run.counts | {"refined": run.counts["trained"]}
    metrics = run.metrics | {"refined": {"miou": 0.5, "pixel_accuracy": 0.6, "coverage": 1.0}}
    got = aggregate([replace(run, metrics=metrics, counts=refined)])
    initial = run.metrics["stages"]["initial"]
    assert got["stages"]["initial"]["miou"] == {
        "mean": initial["miou"],
        "deviation": None,
        "interval": pytest.approx([initial["miou"]] * 2),
    }
    assert got["refined"]["pixel_accuracy"]["mean"] == 0.6
    assert "refined" not in got["baselines"]


@pytest.mark.parametrize(
    "change", [{"dataset": "voc"}, {"recipe": "demo"}, {"protocol": "stego"}, {"unmatched": "count"}, {"num_images": 4}]
)
def test_aggregate__refuses_runs_that_differ_in_more_than_their_seed(change):
    first, second = _seeds(6, 9)
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=rf"more than their seed \({name}: {first.metrics[name]} and {value}\)"):
        aggregate([first, replace(second, metrics=second.metrics | change)])


def test_aggregate__refuses_what_has_no_mean():
    first, second = _seeds(6, 9)

    def changed(**values):
        return replace(second, metrics=second.metrics | values)

    with pytest.raises(ConfigError, match=r"two of the runs have the same seed \(0, 0\)"):
        aggregate([first, changed(seed=0)])
    with pytest.raises(ConfigError, match=r"methods: .*majority and .*chance"):
        aggregate([first, changed(baselines={"chance": second.metrics["baselines"]["chance"]})])
    for count in (2, 3):
        with pytest.raises(ConfigError, match="different photographs"):
            aggregate([first, _run(1, np.stack([np.eye(16, dtype=np.int64)] * count))])
    unscored = metrics_json(RunConfig(), None, num_images=3, counts={}, names=second.names, weights_sha256="")
    for runs in ([], [replace(first, metrics=unscored, counts={})]):
        with pytest.raises(ConfigError, match="only runs that are scored"):
            aggregate(runs)
