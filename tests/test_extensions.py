"""What is added from outside: a stage and a dataset, one object each."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.builders import listed, make_folder
from tests.fixtures import Silent, open_run
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.datasets import DATASETS, DatasetSpec, add_dataset
from transfgu_ray.datasets.check import Check
from transfgu_ray.datasets.listing import Listing, photos_of
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES, Stage
from transfgu_ray.storage import Folder


def count_concepts(job: StageJob) -> dict[str, Any]:
    job.progress.expect(1)
    concepts = job.run.require("concepts")["rows_out"]
    job.folder.write_json("toy/counts.json", {"concepts": concepts})
    job.progress(1)
    return {"rows_in": concepts, "rows_out": 1, "refused": []}


TOY_STAGE = Stage(
    name="toy",
    sections=("evaluate.batch_size",),
    outputs=("toy",),
    unit="tables",
    help="Counts concepts -> toy/.",
    run=count_concepts,
)


@pytest.fixture
def toy_stage() -> Iterator[None]:
    STAGES.add(TOY_STAGE, before="train")
    yield
    STAGES.remove("toy")


@pytest.mark.ray
def test_stage__one_object_is_run_recorded_kept_and_made_again(
    labelled: Run, photographs_with_refused: Path, tmp_path: Path, toy_stage: None
) -> None:
    folder = Path(shutil.copytree(labelled.folder.path, tmp_path / "run"))
    run = Run(Folder(str(folder)), labelled.config)
    reporter = Silent()
    (manifest,) = run_stages(run, ("toy",), address=None, reporter=reporter).values()
    assert reporter.done == {"toy": 1}
    assert (manifest["stage"], manifest["rows_out"]) == ("toy", 1)
    assert json.loads((folder / "toy/counts.json").read_bytes()) == {"concepts": 4}
    # Finished: left alone. Damaged: made again. With another of its settings: refused, or made again where told so.
    run_stages(run, ("toy",), address=None, reporter=(quiet := Silent()))
    assert quiet.done == {}
    (folder / "toy/counts.json").write_text("{}")
    run_stages(run, ("toy",), address=None, reporter=(mending := Silent()))
    assert mending.done == {"toy": 1}
    other = open_run(folder, photographs_with_refused, "evaluate.batch_size=3", overwrite=True)
    with pytest.raises(ArtifactError, match=r"stage toy of .* was made with other settings"):
        run_stages(other, ("toy",), address=None, reporter=Silent())
    run_stages(other, ("toy",), address=None, reporter=Silent(), overwrite=True)
    # The stages before it do not depend on it.
    assert other.require("labels")["fingerprint"] == labelled.require("labels")["fingerprint"]


def test_stage_table__refuses_a_name_twice(toy_stage: None) -> None:
    with pytest.raises(ValueError, match="stage toy is already in the table"):
        STAGES.add(TOY_STAGE, before="train")
    with pytest.raises(KeyError, match="nowhere"):
        STAGES.add(TOY_STAGE.__class__(**vars(TOY_STAGE) | {"name": "toy2"}), before="nowhere")


def _mask_of(path: str) -> str:
    return path.replace("photos", "masks").replace("jpg", "png")


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    return photos_of(root, f"photos/{split}", mask_of=_mask_of), "masks"


TOY_DATASET = DatasetSpec(
    name="toy",
    expects="photos/{train,val}/*.jpg, masks/val/*.png",
    list_split=_list_split,
    region_mode="no_prior",
    train_split="train",
    evaluate_split="val",
    class_names=("sky", "ground"),
    class_kinds=("stuff", "stuff"),
)


@pytest.fixture
def toy_dataset(tmp_path: Path) -> Iterator[Path]:
    add_dataset(TOY_DATASET)
    for split in ("train", "val"):
        make_folder(tmp_path / "photos" / split, num_images=2)
    for photo in (tmp_path / "photos/val").iterdir():
        mask = np.zeros(Image.open(photo).size[::-1], np.uint8)
        mask[: len(mask) // 2] = 1
        (tmp_path / "masks/val").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks/val" / f"{photo.stem}.png")
    yield tmp_path
    del DATASETS["toy"]


def test_dataset__one_object_is_configured_listed_and_checked(toy_dataset: Path) -> None:
    config = build_config(get_preset("tiny_cpu"), None, ["data.dataset=toy", f"data.root={toy_dataset}"])
    assert config.class_names == ("sky", "ground")
    assert config.region_mode == "no_prior"
    images = listed(config.data, "val", "fine").images
    assert [image.label_id for image in images] == ["masks/val/photo_000.png", "masks/val/photo_001.png"]
    result = Check("toy", str(toy_dataset), config.data).run(lambda done: None)
    assert result.refused == []
    assert ("val", "classes", "2 of 2") in [(fact.split, fact.what, fact.found) for fact in result.facts]


def test_add_dataset__refuses_a_name_twice(toy_dataset: Path) -> None:
    with pytest.raises(ValueError, match="dataset toy is known already"):
        add_dataset(TOY_DATASET)
