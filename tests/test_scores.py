import numpy as np
import pytest

from transfgu_ray.config import RunConfig, build_config
from transfgu_ray.scores import STAGE_NAMES, metrics_json, score_lines, score_table

# Scenes: 12 classes of things, then 4 of stuff; so are the concepts, one a class.
KINDS = ["foreground"] * 12 + ["background"] * 4


def _config(*assignments):
    return build_config(RunConfig(), None, ["data.dataset=scenes", "concepts.num_concepts=null", *assignments])


def _confusions(right, wrong=2):
    """Each class has `right` pixels of its own concept, and `wrong` of the next one's."""
    one, next_one = (np.eye(16, k=k, dtype=np.int64) for k in (0, 1))
    return dict.fromkeys(STAGE_NAMES, right * one + wrong * next_one)


def _metrics(confusions, config=None, kinds=KINDS):
    return metrics_json(config or _config(), "val", 3, confusions, kinds, "f" * 64)


def test_metrics_json__scores_of_both_granularities_worked_by_hand():
    got = _metrics(_confusions(right=8))
    assert (got["granularity"], got["num_classes"], got["num_concepts"], got["num_images"]) == ("fine", 16, 16, 3)
    last = got["stages"]["bootstrapped"]
    # The first class has no false positives, the last none missed; of the others each has 2 of both.
    assert last["miou"] == pytest.approx((2 * 8 / 10 + 14 * 8 / 12) / 16)
    assert last["pixel_accuracy"] == 128 / 158
    # Only the last class of a coarser one is taken for another: 3 classes make 30 pixels, 28 of them right.
    assert last["super"]["pixel_accuracy"] == (4 * 28 + 18 + 18) / 158
    assert last["super"]["miou"] == pytest.approx((28 / 30 + 3 * 28 / 32 + 18 / 22 + 18 / 20) / 6)
    # The 12th class is the last of things.
    assert last["foreground_iou"] == 118 / 120
    assert last["coverage"] == 1.0


def test_metrics_json__what_has_no_meaning_is_null():
    confusion = np.eye(6, dtype=np.int64)
    coarse = _metrics(dict.fromkeys(STAGE_NAMES, confusion), _config("concepts.granularity=super"), KINDS[8:14])
    assert coarse["stages"]["trained"]["super"] is None
    header = ["scenes val super-categories, %", "mIoU", "accuracy", "foreground IoU", "coverage"]
    assert score_table(coarse)[0] == header
    assert [row["name"] for row in coarse["per_class"]] == ["animal", "vehicle", "furniture", "plant", "ground", "wall"]
    together = _metrics(_confusions(8), kinds=["any"] * 16)
    assert together["stages"]["trained"]["foreground_iou"] is None
    unscored = metrics_json(RunConfig(), None, 3, None, ["any"] * 27, "")
    assert {unscored[name] for name in ("stages", "baselines", "per_class", "split")} == {None}
    assert (unscored["scored"], unscored["num_images"]) == (False, 0)


def test_metrics_json__background_of_eq_8_is_no_object():
    # 20 concepts and the `none` channel; half of the cats' pixels are taken for background.
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
    assert set(metrics["baselines"]["raw_colour"]) == {"miou", "pixel_accuracy", "coverage", "super"}
    header, rows = score_table(metrics)
    assert header == ["scenes val, %", "mIoU", "accuracy", "foreground IoU", "super mIoU", "coverage"]
    assert [row[0] for row in rows] == [*STAGE_NAMES, "k-means, colours", "k-means, patch tokens"]
    assert rows[2] == ["bootstrapped", "68.33", "81.01", "98.33", "87.94", "100.00"]
    assert rows[3] == ["k-means, colours", "100.00", "100.00", "", "100.00", "100.00"]
    assert score_lines(metrics) == [
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
    assert score_lines(metrics) == ["objects at IoU >= 0.3: 0 of 2"]
