"""The same photographs as files, in tars and in Parquet tables: nothing that a run leaves depends on how they lie."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import contents, make_folder, make_hub_table, make_paired, make_tar
from tests.fixtures import make_run, open_run
from transfgu_ray.datasets.listing import list_images, read_pairs
from transfgu_ray.engine.stream import Photo, split_units
from transfgu_ray.models.weights import ENCODER, resolve_encoder
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.storage import Folder

MODE = "data.region_mode=things_and_stuff"
STAGES = ("extract", "concepts", "labels", "train")


def table(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / name).replace_schema_metadata()


def _tars(folder: Path, photos: dict[str, bytes]) -> None:
    names = [*photos]
    for i, some in enumerate((names[:5], names[5:])):
        make_tar(folder / f"{i}.tar", {name: photos[name] for name in some})


def _tables(folder: Path, photos: dict[str, bytes]) -> None:
    make_hub_table(folder / "data/a.parquet", photos, row_group_size=5)


SHARDS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {"webdataset": _tars, "parquet": _tables}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nine photographs, by the dataset that reads them."""
    root = tmp_path_factory.mktemp("stored")
    make_folder(root / "folder", num_images=9)
    for dataset, store in SHARDS.items():
        store(root / dataset, contents(root / "folder"))
    return {dataset: root / dataset for dataset in ("folder", *SHARDS)}


def test_features__without_ray_are_equal(stored: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for dataset, data in stored.items():
        config = open_run(tmp_path / f"{dataset}-run", data, MODE, dataset=dataset).config
        folder = Folder(str(tmp_path / dataset))
        folder.write_bytes(ENCODER, resolve_encoder(config))
        extractor = FeatureExtractor(config, folder.uri, table="features", fingerprint="", device="cpu", threads=1)
        listing = list_images(str(data), config.data.spec, split=config.data.spec.train_split)
        for unit, images in enumerate(split_units(listing.images, 2)):
            pairs = read_pairs(Folder(str(data)), [image.place for image in images], [None] * len(images))
            photos = [Photo(i.image_id, *pair, i.place) for i, pair in zip(images, pairs, strict=True)]
            extractor.process(unit, photos)
        found[dataset] = table(tmp_path / dataset, "features")
    assert found["folder"].num_rows > 0
    assert all(found[dataset].equals(found["folder"]) for dataset in SHARDS)


@pytest.fixture(scope="module")
def of_files(stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("of_files") / "run"
    make_run(folder, stored["folder"], stages=STAGES)
    return folder


@pytest.mark.ray
@pytest.mark.parametrize("dataset", SHARDS)
def test_run__from_shards_leaves_what_one_from_files_does(
    of_files: Path, stored: dict[str, Path], tmp_path: Path, dataset: str
) -> None:
    folder = tmp_path / "run"
    run = make_run(folder, stored[dataset], MODE, stages=STAGES, dataset=dataset)
    assert run.config.train.features == "live"
    for name in ("features", "concepts.parquet"):
        assert table(folder, name).equals(table(of_files, name))
    bank, expected = table(folder, "labels"), table(of_files, "labels")
    assert bank.drop_columns("path").equals(expected.drop_columns("path"))
    assert all(path.startswith(f"{stored[dataset]}/") for path in bank["path"].to_pylist())
    assert (folder / "model/decoder.safetensors").read_bytes() == (of_files / "model/decoder.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("dataset", SHARDS)
def test_evaluate__labels_in_shards_score_as_those_in_files_do(local_ray: None, tmp_path: Path, dataset: str) -> None:
    lines = make_paired(tmp_path / "paired")
    photos = contents(tmp_path / "paired/images")
    masks = contents(tmp_path / "paired/masks")
    data = tmp_path / dataset
    if dataset == "parquet":
        make_hub_table(data / "a.parquet", photos, [*masks.values()])
    else:
        members = {name: content for pair in zip(photos.items(), _beside(masks), strict=True) for name, content in pair}
        make_tar(data / "a.tar", members)
    (data / "names.txt").write_text("\n".join(lines))
    few = ("evaluate.baselines=[]", "train.round_epochs=[1]")
    scores = {}
    for name in ("paired", dataset):
        run = make_run(tmp_path / f"{name}-run", tmp_path / name, *few, stages=(*STAGES, "evaluate"), dataset=name)
        scores[name] = run.folder.read_json("metrics.json")
    for key in ("stages", "per_class", "num_images", "num_classes"):
        assert scores[dataset][key] == scores["paired"][key]
    assert scores[dataset]["num_images"] == 4


def _beside(masks: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [(f"{name.removesuffix('.png')}.seg.png", content) for name, content in masks.items()]


@pytest.mark.ray
def test_run__unreadable_photographs_in_shards_are_refused_and_counted(local_ray: None, tmp_path: Path) -> None:
    photos = contents(make_folder(tmp_path / "folder", num_images=5))
    rows = photos | {"text.jpg": b"no picture", "gone.jpg": None}
    make_hub_table(tmp_path / "tables/a.parquet", rows, row_group_size=2)
    run = make_run(tmp_path / "run", tmp_path / "tables", MODE, stages=("extract",), dataset="parquet")
    manifest = run.require("extract")
    assert (manifest["rows_in"], manifest["images"]) == (7, 5)
    assert {refusal["image_id"]: refusal["reason"] for refusal in manifest["refused"]} == {
        "text.jpg": "not an image",
        "gone.jpg": "the row has no bytes",
    }
