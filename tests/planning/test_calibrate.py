import time
from pathlib import Path

import pytest

from tests.builders import make_folder
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.errors import DataError
from transfgu_ray.planning.calibrate import seconds_per_item
from transfgu_ray.planning.plan import plan


def test_seconds_per_item__of_one_item() -> None:
    assert seconds_per_item(lambda count: time.sleep(0.02 * count), most=4) == pytest.approx(0.02, rel=0.5)


def test_seconds_per_item__slow_actions_stay_small() -> None:
    counts = []
    seconds_per_item(lambda count: (counts.append(count), time.sleep(0.3 * count)), most=64)
    assert max(counts) == 1


def small_config(root: Path):
    settings = (f"data.root={root}", "concepts.num_concepts=2", "data.image_size=[64, 64]", "runtime.num_workers=1")
    return build_config(get_preset("tiny_cpu"), None, settings)


@pytest.mark.ray
@pytest.mark.slow
def test_plan__counts_photographs_and_windows(tmp_path: Path, local_ray: None) -> None:
    planned = plan(small_config(make_folder(tmp_path / "data", num_images=5)), None)
    stages = {stage["stage"]: stage for stage in planned["stages"]}
    assert list(stages) == ["extract", "concepts", "labels", "train", "evaluate"]
    assert (planned["photographs"], planned["scored"]) == (5, 5)
    # 142 windows per photograph (paper: four sizes), no foreground prior in a plain folder.
    assert stages["extract"]["forwards"] == 5 * 142
    assert stages["labels"]["forwards"] == 5
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert (planned["card"], planned["all"]["gpu_seconds"]) == (None, {})


@pytest.mark.ray
def test_plan__nothing_readable(tmp_path: Path, local_ray: None) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.jpg: not an image"):
        plan(small_config(tmp_path), None)
