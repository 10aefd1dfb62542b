import io
import re

import numpy as np
import pytest
from PIL import Image

from transfgu_ray.algorithms.scores import intervals
from transfgu_ray.algorithms.scores.intervals import photo_counts
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.models.model import ModelConfig
from transfgu_ray.reports.comparison import (
    best_version,
    class_table,
    comparison_lines,
    comparison_markdown,
    comparison_picture,
    decide,
    overlap_colours,
    scored_rows,
    unscored_row,
    version_table,
)
from transfgu_ray.storage import Folder

CONFIG = build_config(RunConfig(), None, ["data.dataset=scenes", "concepts.num_concepts=null"])


def _counts(taken, num_concepts):
    """Return counts of photographs with 10 pixels per class of two; some of the second are taken for the first."""
    confusions = np.zeros((len(taken), 16, num_concepts), dtype=np.int64)
    for of_photo, wrong in zip(confusions, taken, strict=True):
        of_photo[0, 0], of_photo[1, 1], of_photo[1, 0] = 10, 10 - wrong, wrong
    photo, classes, concepts = confusions.nonzero()
    return photo_counts(
        photo, classes, concept_id=concepts, pixels=confusions[photo, classes, concepts], shape=confusions.shape
    )


def _miou(pixels, wrong):
    """Return the mean IoU of two classes of equal size, some pixels of the second predicted as the first."""
    return (pixels / (pixels + wrong) + (pixels - wrong) / pixels) / 2


def test_scored_rows__paired_difference_worked_by_hand(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    # Of two photographs, a quarter of the draws holds only the first and a quarter only the second.
    got = scored_rows(CONFIG, {3: _counts([0, 8], 16), 7: _counts([0, 6], 18)}, reference=3)
    assert [got[version]["miou"] for version in (3, 7)] == pytest.approx([_miou(20, 8), _miou(20, 6)])
    assert got[3]["miou_interval"] == pytest.approx([_miou(20, 16), 1.0])
    assert got[7]["miou_interval"] == pytest.approx([_miou(20, 12), 1.0])
    assert got[3]["difference"] is None
    assert got[7]["difference"]["miou"] == pytest.approx(_miou(20, 6) - _miou(20, 8))
    # Not [0.51 - 1, 1 - 0.38]: both draw the same photographs.
    assert got[7]["difference"]["interval"] == pytest.approx([0.0, _miou(20, 12) - _miou(20, 16)])
    assert got[7]["pixel_accuracy"] == 34 / 40
    assert [row["iou"] for row in got[7]["per_class"][:3]] == pytest.approx([20 / 26, 14 / 20, None])


def _row(version, miou=None, interval=None, score=0.5, **more):
    scored = {} if miou is None else {"miou": miou, "miou_interval": [miou, miou], "pixel_accuracy": 0.7}
    scored |= {} if interval is None else {"difference": {"miou": 0.02, "interval": interval}}
    plain = {"version": version, "tagged_score": None, "score": score, "photos_per_second": 2.0, "megabytes": 9.0}
    return unscored_row() | plain | {"weights_sha256": "ab"} | scored | more


def _comparison(rows, champion):
    scored = rows[0]["miou"] is not None
    return {
        "champion": champion,
        "reference": champion or rows[0]["version"],
        "best": best_version(rows, champion),
        "scored": scored,
        "dataset": "voc" if scored else "folder",
        "split": "val" if scored else None,
        "protocol": "transfgu",
        "unmatched": "discard",
        "num_images": 3,
        "num_probed": 3,
        "device": "cpu",
        "versions": rows,
    }


@pytest.mark.parametrize(
    ("rows", "champion", "moves", "moves_by_force", "words"),
    [
        ([_row(1, 0.3), _row(2, 0.32)], None, True, True, "version 2 is champion now: the best of those compared"),
        (
            [_row(1, 0.3), _row(2, 0.32, [0.01, 0.03])],
            1,
            True,
            True,
            r"version 1 previous-champion: \+2",
        ),
        (
            [_row(1, 0.3), _row(2, 0.32, [-0.01, 0.05])],
            1,
            False,
            True,
            r"1 stays .*\[-1.0, \+5.0\] is no clear",
        ),
        ([_row(1, 0.3), _row(2, 0.32, [0.0, 0.05])], 1, False, True, "--force makes version 2 champion"),
        ([_row(1, 0.3), _row(2, 0.3, [0.0, 0.0])], 2, False, False, "version 2 stays champion: none of those compared"),
        ([_row(1, score=0.4), _row(2, score=0.6)], 1, False, True, "without labels no difference has an interval"),
        ([_row(1, score=0.4), _row(2, score=0.3)], 1, False, False, "none of those compared is better by label-free"),
        ([_row(1, score=0.4), _row(2, score=0.6)], None, True, True, "version 2 is champion now"),
    ],
)
def test_decide__only_a_clear_difference_moves_the_champion(rows, champion, moves, moves_by_force, words):
    comparison = _comparison(rows, champion)
    plain, forced = decide(comparison, force=False), decide(comparison, force=True)
    assert (plain[0], forced[0]) == (moves, moves_by_force)
    assert re.search(words, plain[1])


def test_tables__without_labels_their_columns_are_left_out():
    comparison = _comparison([_row(1, score=0.4, tagged_score=0.25), _row(2, score=0.6)], 2)
    header, rows = version_table(comparison)
    assert header == ["version", "tagged score", "score", "photos /s", "MB"]
    assert rows == [["1", "0.2500", "0.4000", "2.00", "9.0"], ["2 *", "", "0.6000", "2.00", "9.0"]]
    assert comparison_lines(comparison)[-1] == "dataset folder has no labels; scores that need them are left out"
    assert "\n| 2 * |  | 0.6000 | 2.00 | 9.0 |\n" in comparison_markdown(comparison)


def test_tables__scores_and_classes_of_every_version():
    classes = [[{"name": "cat", "iou": iou, "concepts": []}] for iou in (0.5, None)]
    rows = [
        _row(1, 0.3, [-0.01, 0.05], per_class=classes[0]),
        _row(2, 0.31, weights_sha256="cd", per_class=classes[1]),
    ]
    comparison = _comparison(rows, 2)
    header, cells = version_table(comparison)
    assert header == ["version", "score", "mIoU", "accuracy", "minus 2", "photos /s", "MB"]
    assert cells[0][2:5] == ["30.00 [30.0, 30.0]", "70.00", "+2.00 [-1.0, +5.0]"]
    assert cells[1][4] == ""
    assert class_table(comparison) == (["IoU, %", "1", "2 *"], [["cat", "50.00", ""]])
    assert "different encoders" in comparison_lines(comparison)[-1]


def test_overlap_colours__renumbered_concepts_keep_their_colours():
    colours = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], dtype=np.uint8)
    mask = np.array([[0, 0, 1], [2, 2, 1]])
    renumbered = np.array([3, 0, 2])[mask]
    got = overlap_colours(colours, [mask], other_masks=[renumbered], num_other=4)
    assert got.dtype == np.uint8
    assert np.array_equal(got[renumbered], colours[mask])
    assert got[1].tolist() == [128, 128, 128], "a concept that is left over"


@pytest.mark.parametrize("scored", [True, False])
def test_comparison_picture__a_row_per_photograph_and_a_column_per_version(tmp_path, scored):
    rng, folders = np.random.default_rng(0), {}
    for version in (1, 2):
        folders[version] = Folder(str(tmp_path / str(version)))
        for number in ("00", "01"):
            buffer = io.BytesIO()
            Image.new("RGB", (30, 20)).save(buffer, "JPEG")
            folders[version].write_bytes(f"samples/{number}/photo.jpg", buffer.getvalue())
            for name in ("bootstrapped", "truth")[: 1 + scored]:
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 2, (20, 30), dtype=np.uint8)).save(buffer, "PNG")
                folders[version].write_bytes(f"samples/{number}/{name}.png", buffer.getvalue())
    classes = [{"name": name, "iou": 0.5, "concepts": [k]} for k, name in enumerate(("cat", "dog"))]
    rows = [_row(v, 0.3, per_class=classes) if scored else _row(v) for v in (1, 2)]
    model = ModelConfig((16, 16), ("any", "any"), 1, 1, "float32", "ab")
    png = comparison_picture(_comparison(rows, None), folders, dict.fromkeys(folders, model))
    width, height = Image.open(io.BytesIO(png)).size
    # Columns of 2.4 inches and rows of 1.8 below the titles, at 130 dots per inch.
    assert (width, height) == (round(130 * 2.4 * (4 if scored else 3)), round(130 * 3.9))
