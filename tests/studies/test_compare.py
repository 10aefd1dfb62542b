"""Comparison of registered versions: scores equal to those of `transfgu evaluate`, and the files that remain."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import Silent
from transfgu_ray.config.run import build_config
from transfgu_ray.datasets.outputs import MARK
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine import build
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo, UnitResult, UnitWorker
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.studies import compare as comparing
from transfgu_ray.studies.compare import Comparison, compare
from transfgu_ray.tracking import runs as tracking
from transfgu_ray.tracking.client import connect
from transfgu_ray.tracking.models import register
from transfgu_ray.tracking.registry import Registry

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, finished: Run) -> Registry:
    """Two versions: the finished model, and the model of the same run after the first round."""
    uri = finished.require("register")["tracking_uri"]
    config = build_config(finished.config, None, [f"tracking.uri={uri}", "tracking.model_name=compared"])
    metrics = json.loads(finished.folder.read_bytes("metrics.json"))
    for decoder in ("decoder", "decoder_round_0"):
        path = tmp_path_factory.mktemp("registered") / "run"
        shutil.copytree(Path(finished.folder.path) / "model", path / "model")
        source = Path(finished.folder.path) / f"model/{decoder}.safetensors"
        shutil.copy(source, path / "model/decoder.safetensors")
        shutil.copy(Path(finished.folder.path) / "config.yaml", path)
        tracked = tracking.begin(Folder(str(path)), config)
        register(tracked, Run(Folder(str(path)), config), metrics=metrics, artifacts=["config.yaml"], more_tags={})
    return Registry("compared", uri)


@pytest.mark.slow
def test_compare__scores_are_those_of_evaluate(registry: Registry, finished: Run, voc: Path, tmp_path: Path) -> None:
    registry.promote(2)
    out, reporter = Folder(str(tmp_path / "out")), Silent()
    got = compare(
        Comparison(name="compared", numbers=[1], dataset=None, data=str(voc), tracking_uri=registry.uri),
        out,
        address=None,
        reporter=reporter,
        promote=True,
        force=True,
    )
    # 2 versions measure 3 photographs each, then score them.
    assert reporter.done == {"compare": 12}
    metrics = json.loads(finished.folder.read_bytes("metrics.json"))
    bootstrapped, trained = got["versions"]
    assert [row["version"] for row in got["versions"]] == [1, 2]
    assert (got["dataset"], got["split"], got["num_images"], got["refused"]) == ("voc", "val", 3, [])
    for row, stage in ((bootstrapped, "bootstrapped"), (trained, "trained")):
        for name in ("miou", "miou_interval", "pixel_accuracy", "pixel_accuracy_interval", "coverage"):
            assert row[name] == metrics["stages"][stage][name]
        assert 0 <= row["score"] <= len(metrics["per_class"])
        assert set(row["components"]) == {"consistency", "silhouette", "usage"}
        assert row["photos_per_second"] > 0
    assert bootstrapped["per_class"] == metrics["per_class"]
    assert trained["difference"] is None, "it is the champion"
    assert bootstrapped["difference"]["miou"] == bootstrapped["miou"] - trained["miou"]

    assert json.loads(out.read_bytes("comparison.json")) == got
    assert sorted(path.name for path in Path(out.path).iterdir()) == [
        MARK,
        *(f"comparison.{ending}" for ending in ("json", "md", "png")),
    ]
    pixels = np.asarray(Image.open(Path(out.path) / "comparison.png"))
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100
    assert Registry(registry.name, registry.uri).champion == got["best"]
    client, _ = connect(registry.uri)
    experiment = client.get_experiment_by_name(finished.config.tracking.experiment)
    (logged,) = client.search_runs([experiment.experiment_id], "run_name = 'compare compared'")
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["version_1/miou"] == metrics["stages"]["bootstrapped"]["miou"]
    written = {name for name, _ in out.files()} - {MARK}
    assert {item.path for item in client.list_artifacts(logged.info.run_id)} == written


def in_process(
    root: Folder,
    units: dict[int, Sequence[ImageRef]],
    *,
    worker: type[UnitWorker],
    arguments: dict[str, Any],
    resources: Resources,
    progress: Progress,
) -> Iterator[UnitResult]:
    """Do what `stream_units` does, without starting an actor."""
    one = worker(**arguments, device="cpu", threads=1)
    for unit, images in units.items():
        photos = [Photo(image.image_id, root.read_bytes(image.image_id), None, None) for image in images]
        yield UnitResult(unit, one.process(unit, photos), 1)


def test_compare__a_folder_without_labels(
    registry: Registry, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(2)
    for module in (comparing, build):
        monkeypatch.setattr(module, "stream_units", in_process)
    data = shutil.copytree(voc / "JPEGImages", tmp_path / "data")
    (data / "2007_000000.jpg").write_text("no picture")
    out = Folder(str(tmp_path / "out"))
    got = compare(
        Comparison(name="compared", numbers=[], dataset="folder", data=str(data), tracking_uri=registry.uri),
        out,
        address=None,
        reporter=Silent(),
        promote=True,
    )
    assert got["scored"] is False
    for row in got["versions"]:
        assert (row["miou"], row["difference"], row["per_class"]) == (None, None, None)
    best = max(got["versions"], key=lambda row: row["score"])
    assert (got["best"], got["num_images"]) == (best["version"], 0)
    assert got["num_probed"] == 8
    assert got["refused"] == [{"image_id": "2007_000000.jpg", "reason": "not an image"}]
    assert got["promotion"]["moved"] is False, "no difference has an interval"
    assert Registry(registry.name, registry.uri).champion == got["champion"] == got["reference"]
    assert "no labels" in out.read_bytes("comparison.md").decode()
