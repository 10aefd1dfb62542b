"""Which photographs each stage reads."""

from pathlib import Path

import pytest

from tests.builders import make_coco, make_folder, make_voc
from transfgu_ray.config.presets import configure
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.errors import ConfigError
from transfgu_ray.pipeline.inputs import check_early, list_clustered, list_scored, list_training, stage_inputs
from transfgu_ray.runs.run import Run


def ids(listing: Listing | None) -> list[int]:
    assert listing is not None
    return [int(Path(image.image_id).stem) for image in listing.images]


@pytest.fixture
def curated(tmp_path: Path) -> RunConfig:
    """Photographs 0 to 3 and 4 to 6 are annotated; the curated lists name some of them, and 99, which is not."""
    data = make_coco(tmp_path / "coco", num_train=4, num_val=3)
    for split, numbers in (("train", (1, 3, 99)), ("val", (5, 99))):
        (data / f"curated/{split}2017").mkdir(parents=True)
        names = "".join(f"{number:012}\n" for number in numbers)
        (data / f"curated/{split}2017/Coco164kFull_Stuff_Coarse_7.txt").write_text(names)
        for folder, suffix in (("images", "jpg"), ("annotations", "png")):
            first = next((data / f"{folder}/{split}2017").glob(f"*.{suffix}"))
            first.with_name(f"{99:012}.{suffix}").write_bytes(first.read_bytes())
    return configure("released", None, ["data.dataset=coco_stuff27_curated", f"data.root={data}"])


def test_curated__concepts_come_from_all_annotated_photographs(curated: RunConfig) -> None:
    assert curated.concepts.photographs == "all"
    assert ids(list_clustered(curated)) == [0, 1, 2, 3]
    # As the released code, the list is cut to what is annotated.
    assert ids(list_training(curated)) == [1, 3]
    assert ids(list_scored(curated)) == [5]


def test_curated__as_a_split_of_its_own(curated: RunConfig) -> None:
    own = curated.model_copy(update={"concepts": curated.concepts.model_copy(update={"photographs": "split"})})
    assert list_clustered(own) is None
    assert ids(list_training(own)) == [1, 3, 99]
    assert ids(list_scored(own)) == [5, 99]


def test_stage_inputs__name_the_photographs_that_are_clustered_too(curated: RunConfig, tmp_path: Path) -> None:
    run = Run.open(str(tmp_path / "run"), curated)
    before = stage_inputs(run, list_training(curated))
    photo = Path(curated.data.root) / f"images/train2017/{0:012}.jpg"
    photo.write_bytes(photo.read_bytes() + b" ")
    assert ids(list_training(curated)) == [1, 3]
    after = stage_inputs(run, list_training(curated))
    assert all(before[stage] != after[stage] for stage in ("extract", "concepts", "labels"))


def test_list_clustered__needs_labels_only_for_windows_of_the_truth(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "voc")
    config = configure("released", None, ["data.dataset=voc", f"data.root={data}"])
    assert list_clustered(config) is None
    truth = configure("released", None, ["data.dataset=voc", f"data.root={data}", "extract.windows=ground_truth"])
    listing = list_clustered(truth)
    assert listing is not None
    assert all(image.label_id for image in listing.images)


@pytest.mark.reports
def test_check_early__blames_the_settings_that_ask_for_too_many_crops(tmp_path: Path) -> None:
    def refused(*settings: str) -> str:
        named = [f"data.root={make_folder(tmp_path, num_images=1)}", "extract.window_fracs=[1.0]", *settings]
        config = configure("tiny_cpu", None, named)
        with pytest.raises(ConfigError) as error:
            check_early(config, list_training(config))
        return str(error.value)

    assert refused("concepts.num_concepts=3") == (
        "concepts.num_concepts=3 is more than the 1 crops that 1 photographs give at most; lower it or add photographs"
    )
    assert refused("concepts.num_concepts=2", "concepts.min_crops=5", "extract.window_fracs=[0.5]").startswith(
        "concepts.num_concepts=2 times concepts.min_crops=5 is more than the 9 crops"
    )
