"""The worker of the extract stage without Ray: windows cut by labels."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.builders import make_voc
from tests.fixtures import TINY
from transfgu_ray.algorithms.concepts.windows import region_boxes
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.weights import ENCODER, resolve_encoder
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.pipeline.inputs import list_clustered
from transfgu_ray.runs.run import Run


def extract(folder: Path, data: Path, *settings: str) -> tuple[list[dict], dict]:
    """Return the rows and the footer of a features table with all training photographs in one unit."""
    named = [f"data.root={data}", "data.dataset=voc", "extract.windows=ground_truth", *settings]
    run = Run.open(str(folder), build_config(get_preset("tiny_cpu"), None, [*TINY, *named]))
    run.folder.write_bytes(ENCODER, resolve_encoder(run.config))
    worker = FeatureExtractor(
        run.config, run.folder.uri, table="features", fingerprint="", device="cpu",
        threads=1,
    )  # fmt: skip

    def read(name: str) -> bytes | None:
        return (data / name).read_bytes() if (data / name).exists() else None

    listing = list_clustered(run.config)
    assert listing is not None
    worker.process(0, [Photo(each.image_id, read(each.image_id), read(each.label_id), None) for each in listing.images])
    part = pq.read_table(folder / "features/part-000000.parquet")
    return part.to_pylist(), json.loads(part.schema.metadata[b"stats"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_voc(tmp_path / "voc", num_train=3, size=(64, 64))


def test_extractor__windows_are_the_labelled_things(data: Path, tmp_path: Path) -> None:
    rows, stats = extract(tmp_path / "run", data)
    want, stuff = [], 0
    for i in range(3):
        label = np.asarray(Image.open(data / f"SegmentationClass/2007_{i:06}.png"))
        boxes, class_ids, _ = region_boxes(label)
        want += [(f"JPEGImages/2007_{i:06}.jpg", box) for box in boxes[class_ids > 0].tolist()]
        stuff += int((class_ids == 0).sum())
    # The photographs have the working size of 64 px, so their boxes need no scaling.
    assert [(row["image_id"], row["box_xyxy"]) for row in rows] == want
    assert {(row["kind"], row["foreground_frac"]) for row in rows} == {("foreground", 1.0)}
    x0, y0, x1, y1 = rows[0]["box_xyxy"]
    assert rows[0]["window_frac"] == pytest.approx(((x1 - x0) * (y1 - y0)) ** 0.5 / 64)
    assert stats["dropped"]["labelled region of the background"] == stuff > 0


def test_extractor__another_class_is_another_crop(data: Path, tmp_path: Path) -> None:
    rows, _ = extract(tmp_path / "things", data)
    both, stats = extract(tmp_path / "both", data, "data.region_mode=things_and_stuff")
    assert {row["kind"] for row in both} == {"foreground", "background"}
    assert "labelled region of the background" not in stats["dropped"]
    of_things = [row["cls_token"] for row in both if row["kind"] == "foreground"]
    # The same crops, in other batches.
    assert np.allclose(of_things, [row["cls_token"] for row in rows], atol=2e-2)


def test_extractor__a_photograph_without_its_label_is_refused(data: Path, tmp_path: Path) -> None:
    (data / "SegmentationClass/2007_000001.png").unlink()
    rows, stats = extract(tmp_path / "run", data)
    assert {row["image_id"] for row in rows} == {f"JPEGImages/2007_{i:06}.jpg" for i in (0, 2)}
    assert stats["refused"] == [{"image_id": "JPEGImages/2007_000001.jpg", "reason": "its label cannot be read"}]
    assert stats["images"] == 2


def test_config__labelled_windows_need_labels() -> None:
    with pytest.raises(ConfigError, match=r"extract\.windows=ground_truth needs labels, but dataset folder has none"):
        build_config(get_preset("tiny_cpu"), None, ["extract.windows=ground_truth"])
