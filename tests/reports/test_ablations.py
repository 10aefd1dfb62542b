import numpy as np
import pytest

from transfgu_ray.algorithms.scores.intervals import photo_counts
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.models.names import Names
from transfgu_ray.reports.ablations import FULL, TABLES, VARIANTS, ScoredRun, ablation_tables
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json


def _run(seed, right):
    """A run on three photographs, each with 100 pixels of every class, of which `right` are of its concept."""
    config = build_config(get_preset("demo"), None, [f"seed={seed}"])
    one = right * np.eye(16, dtype=np.int64) + (100 - right) * np.roll(np.eye(16, dtype=np.int64), 1, axis=1)
    matrices = np.stack([one] * 3)
    where = photo, classes, concepts = matrices.nonzero()
    counts = photo_counts(photo, classes, concept_id=concepts, pixels=matrices[where], shape=matrices.shape)
    counts, names = dict.fromkeys(STAGE_NAMES, counts), Names(("any",) * 16, {})
    metrics = metrics_json(config, "val", num_images=3, counts=counts, names=names, weights_sha256="")
    return ScoredRun(metrics, config, counts, names)


def test_ablation_tables__mean_deviation_interval_and_what_was_not_run():
    found = {FULL: [_run(0, 60), _run(1, 64)], "ce": [_run(0, 55), _run(1, 55)]}
    lines = ablation_tables(found, ["A note."]).splitlines()
    assert lines[0].startswith(
        "Dataset scenes, split val, recipe demo, K = 16, seeds 0, 1: mean ± sample deviation [95 %"
    )
    assert lines[1] == "A note."
    # Accuracies of 60 and 64 have the deviation sqrt(8); IoU are 60 / 140 and 64 / 136. The photographs are alike, so
    # that only the seeds spread: a quarter of the resamples has one of them twice.
    scores = "45.0 ± 3.0 [42.9, 47.1] | 62.0 ± 2.8 [60.0, 64.0]"
    assert f"| ViT, segmenter | {scores} | 11.93 / 34.32 |" in lines
    assert f"| initial | {scores} | 8.95 |" in lines
    assert "| CE | 37.9 ± 0.0 [37.9, 37.9] | 55.0 ± 0.0 [55.0, 55.0] | 34.24 |" in lines
    assert "| CE, peer | not run | not run | 35.08 |" in lines


def test_ablation_tables__one_seed_has_no_deviation():
    assert "| CE | 37.9 [37.9, 37.9] | 55.0 [55.0, 55.0] | 34.24 |" in ablation_tables({"ce": [_run(0, 55)]})


def test_tables__of_known_variants_and_all_of_them():
    rows = [row for table in TABLES for row in table.rows]
    assert {row.variant for row in rows} == {*VARIANTS}
    assert all(len(row.stages) == len(row.published) for row in rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants__change_the_demo_into_another_recipe(name):
    settings = [*VARIANTS[name].settings]
    if VARIANTS[name].reads_resnet:
        settings.append("train.backbone_weights=random")
    demo = get_preset("demo")
    changed = build_config(demo, None, settings)
    assert (changed == demo) == (name == FULL)
    # All variants share their labels.
    assert changed.model_copy(update={"train": demo.train}) == demo
