import pytest

from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.reports.ablations import FULL, TABLES, VARIANTS, ablation_tables
from transfgu_ray.reports.scores import STAGE_NAMES


def _metrics(seed, miou):
    score = {"miou": miou, "pixel_accuracy": 2 * miou, "coverage": 1.0}
    common = {"dataset": "scenes", "split": "val", "recipe": "demo", "num_concepts": 16, "protocol": "transfgu"}
    rest = {"granularity": "fine", "unmatched": "discard", "refined": None, "baselines": {}, "scored": True}
    rest |= {"num_classes": 16, "num_images": 60, "backbone": "vit", "weights_sha256": "", "refinement": "none"}
    rest |= {"concept_names": None}
    return common | rest | {"seed": seed, "stages": {name: dict(score) for name in STAGE_NAMES}}


def test_ablation_tables__mean_deviation_and_what_was_not_run():
    found = {FULL: [_metrics(0, 0.40), _metrics(1, 0.44)], "ce": [_metrics(0, 0.30), _metrics(1, 0.30)]}
    lines = ablation_tables(found, ["A note."]).splitlines()
    assert lines[0].startswith("Dataset scenes, split val, recipe demo, K = 16, seeds 0, 1: ")
    assert lines[1] == "A note."
    # The deviation of 40 and 44 is sqrt(8).
    assert "| ViT, segmenter | 42.0 ± 2.8 | 84.0 ± 5.7 | 11.93 / 34.32 |" in lines
    assert "| CE | 30.0 ± 0.0 | 60.0 ± 0.0 | 34.24 |" in lines
    assert "| CE, peer | not run | not run | 35.08 |" in lines
    assert "| initial | 42.0 ± 2.8 | 84.0 ± 5.7 | 8.95 |" in lines


def test_ablation_tables__one_seed_has_no_deviation():
    assert "| CE | 30.0 | 60.0 | 34.24 |" in ablation_tables({"ce": [_metrics(0, 0.30)]})


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
