"""A whole run on a small labelled set, and what can be done with it afterwards."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders import TINY_OVERRIDES, TINY_VIT, make_folder, make_hostile_folder, tiny_encoder
from tests.fixtures import Silent, make_run, open_run
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.models.model import load_model
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.logs import kept_log, log_of
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.tracking import runs as tracking
from transfgu_ray.tracking.client import mlflow_at
from transfgu_ray.tracking.models import fetch_model, register

pytestmark = pytest.mark.ray


def test_run__leaves_the_documented_files(finished: Run) -> None:
    folder = Path(finished.folder.path)
    for name in ("config.yaml", "concepts.parquet", "metrics.json", "report.html", "model/config.json"):
        assert (folder / name).is_file(), name
    for stage in STAGES.lasting:
        manifest = json.loads((folder / f"{stage}.json").read_bytes())
        assert {"rows_in", "rows_out", "refused", "seconds", "items_per_second", "peak_memory_mb"} <= set(manifest)
        assert {"fingerprint", "input_fingerprint", "versions"} <= set(manifest)
    assert finished.require("labels")["rows_out"] == 6
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle") or path.name.endswith(".tmp")]


def test_run__metrics_hold_three_stages(finished: Run) -> None:
    metrics = json.loads(finished.folder.read_bytes("metrics.json"))
    assert metrics["dataset"] == "voc"
    assert metrics["split"] == "val"
    assert metrics["num_images"] == 3
    assert list(metrics["stages"]) == ["initial", "trained", "bootstrapped"]
    for scores in metrics["stages"].values():
        assert 0 < scores["pixel_accuracy"] <= 1
        assert 0 < scores["miou"] <= 1
        assert 0 <= scores["foreground_iou"] <= 1
    assert [row["name"] for row in metrics["per_class"]][:2] == ["background", "aeroplane"]


def test_run__baselines_are_scored_beside_the_stages(finished: Run) -> None:
    metrics = json.loads(finished.folder.read_bytes("metrics.json"))
    fitted = ["patch_tokens", "decoder_tokens", "random_vit", "raw_colour"]
    assert list(metrics["baselines"]) == [*fitted, "chance", "majority"]
    for scores in metrics["baselines"].values():
        assert 0 < scores["miou"] < 1
        assert 0 < scores["pixel_accuracy"] < 1
    # 6 photographs of 8 x 8 patches.
    assert finished.require("evaluate")["baselines"] == {"photographs": 6, "patches": 384}
    drawn = pq.read_table(Path(finished.folder.path) / "baselines").to_pandas()
    assert not drawn.duplicated(["image_id", "patch"]).any()
    counted = pq.read_table(Path(finished.folder.path) / "confusions").to_pandas()
    pixels = counted.groupby("method")["pixels"].sum()
    assert set(pixels.index) == {*metrics["stages"], *fitted}
    assert pixels.nunique() == 1
    assert counted["image_id"].nunique() == 3
    # Only colour sets the rectangles apart.
    assert metrics["baselines"]["raw_colour"]["miou"] > metrics["stages"]["bootstrapped"]["miou"]
    page = finished.folder.read_bytes("report.html").decode()
    assert "k-means, colours" in page
    assert "the best baseline" in page


def test_run__again_recomputes_nothing(finished: Run) -> None:
    folder = Path(finished.folder.path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    reporter = Silent()
    run_stages(finished, STAGES.lasting, address=None, reporter=reporter)
    assert reporter.done == {}
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_run__another_configuration_is_refused_until_overwritten(finished: Run, voc: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder.path, tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"evaluate.num_samples: 2 -> 1.*--overwrite"):
        open_run(folder, voc, "evaluate.num_samples=1", dataset="voc")
    # Settings of where a run happens do not change its results.
    open_run(folder, voc, "runtime.num_workers=2", dataset="voc")
    reporter = Silent()
    before = json.loads(finished.folder.read_bytes("metrics.json"))
    run = open_run(folder, voc, "evaluate.num_samples=1", "runtime.num_workers=2", dataset="voc", overwrite=True)
    run_stages(
        run, STAGES.lasting[: STAGES.lasting.index("report") + 1], address=None, reporter=reporter, overwrite=True
    )
    assert list(reporter.done) == ["evaluate", "report"], "nothing before the changed stage is computed again"
    assert [path.name for path in (folder / "samples").glob("strip_0*")] == ["strip_00.jpg"]
    assert json.loads(run.folder.read_bytes("metrics.json")) == before


def test_run__other_photographs_are_refused(finished: Run, voc: Path, tmp_path: Path) -> None:
    data = shutil.copytree(voc, tmp_path / "data")
    moved = open_run(shutil.copytree(finished.folder.path, tmp_path / "run"), data, dataset="voc")
    run_stages(moved, STAGES.lasting, address=None, reporter=Silent())
    (photo, *_) = sorted((data / "JPEGImages").iterdir())
    Image.new("RGB", (80, 80), "red").save(photo)
    with pytest.raises(ArtifactError, match=r"stage extract .* other settings or photographs"):
        run_stages(moved, STAGES.lasting, address=None, reporter=Silent())


def test_run__stage_without_its_predecessor_is_refused(tmp_path: Path, voc: Path) -> None:
    run = open_run(tmp_path / "run", voc, dataset="voc")
    with pytest.raises(ArtifactError, match="no finished stage extract"):
        run_stages(run, ("labels",), address=None, reporter=Silent())


def test_run__hostile_folder(tmp_path: Path, local_ray: None) -> None:
    good, bad = make_hostile_folder(tmp_path / "data")
    run = make_run(tmp_path / "run", tmp_path / "data", stages=("extract", "concepts", "labels"))
    for stage in ("extract", "labels"):
        manifest = run.require(stage)
        assert {refusal["image_id"] for refusal in manifest["refused"]} == bad
        assert manifest["images"] == len(good)
        assert sum(manifest["refused_by_reason"].values()) == len(bad)


def test_run__too_much_refused_stops_after_extract_and_goes_on_once_allowed(tmp_path: Path, local_ray: None) -> None:
    data = make_folder(tmp_path / "data", num_images=2)
    for i in range(3):
        (data / f"bad_{i}.jpg").write_text("no picture")
    (data / "link.jpg").symlink_to(data / "photo_000.jpg")
    reasons = "3 x not an image, 1 x link within the folder"
    with pytest.raises(DataError, match=rf"^4 of 6 photographs were refused, .*=0\.5 allows: {reasons}; repair them"):
        make_run(tmp_path / "run", data, stages=("extract",))
    run = make_run(tmp_path / "run", data, "runtime.max_refused_share=0.7", stages=("extract",))
    manifest = run.require("extract")
    assert manifest["parts_resumed"] == manifest["parts"], "nothing is extracted again"
    assert (manifest["rows_in"], manifest["images"], len(manifest["refused"])) == (6, 2, 4)


def test_run__nothing_readable(tmp_path: Path, local_ray: None) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"none of 1 photographs can be used.*a\.jpg: not an image"):
        make_run(tmp_path / "run", tmp_path / "data", stages=("extract",))
    assert not (tmp_path / "run" / "extract.json").exists()


def test_run__more_concepts_than_foreground_crops(tmp_path: Path, local_ray: None) -> None:
    data = make_folder(tmp_path / "data", num_images=2)
    with pytest.raises(DataError, match=r"^\d+ \w+ concepts were asked of \d+ \w+ crops"):
        # Below the bound known before extraction, above the number of crops that the foreground prior leaves.
        make_run(
            tmp_path / "run",
            data,
            "concepts.num_concepts=89",
            "extract.window_fracs=[0.5, 0.3]",
            stages=("extract", "concepts"),
        )


def test_mlflow__run_metrics_and_registered_model(finished: Run, tmp_path: Path) -> None:
    import mlflow

    registered = finished.require("register")
    client = mlflow.MlflowClient(registered["tracking_uri"], registered["tracking_uri"])
    logged = client.get_run(registered["mlflow_run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["concepts.num_concepts"] == "4"
    metrics = json.loads(finished.folder.read_bytes("metrics.json"))
    for name, scores in (metrics["stages"] | metrics["baselines"]).items():
        assert logged.data.metrics[f"{name}/miou"] == pytest.approx(scores["miou"])
        assert logged.data.metrics[f"{name}/held_out/miou"] == pytest.approx(scores["held_out"]["miou"])
        worst = scores["photo_miou"]["worst_decile"]
        assert logged.data.metrics[f"{name}/photo_miou/worst_decile"] == pytest.approx(worst)
        assert logged.data.metrics.get(f"{name}/num_dead_concepts") == scores.get("num_dead_concepts")
    losses = client.get_metric_history(registered["mlflow_run_id"], "train/loss")
    assert sorted(metric.step for metric in losses) == [0, 1]
    version = client.get_model_version(registered["model_name"], registered["model_version"])
    assert version.run_id == registered["mlflow_run_id"]
    assert {"recipe", "num_concepts", "weights_sha256", "miou", "dataset_fingerprint"} <= set(version.tags)
    artifacts = {item.path for item in client.list_artifacts(registered["mlflow_run_id"])}
    assert {"report.html", "metrics.json", "config.yaml", "samples"} <= artifacts
    # Registering again finds the existing version.
    tracked = tracking.Tracked(registered["tracking_uri"], registered["mlflow_run_id"])
    again = register(tracked, finished, metrics=metrics, artifacts=["metrics.json"], more_tags={})
    assert again["model_version"] == registered["model_version"]

    with mlflow_at(registered["tracking_uri"]):
        loaded = mlflow.pyfunc.load_model(f"models:/{registered['model_name']}/{registered['model_version']}")
    photos = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)
    direct = load_model(Folder(finished.folder.uri_of("model"))).segment([Image.fromarray(photo) for photo in photos])
    np.testing.assert_array_equal(loaded.predict(photos), np.stack(direct))

    fetched = fetch_model(f"models:/{registered['model_name']}/1", registered["tracking_uri"])
    assert load_model(Folder(fetched)).config == load_model(Folder(finished.folder.uri_of("model"))).config


def test_terminal__quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    with terminal.stage("extract", 3, "photographs") as progress:
        progress(3)
    terminal.note("done")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_run_stages__failure_in_a_worker_is_a_short_message_here_and_a_traceback_in_the_log(
    photographs_with_refused: Path, tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        # Class tokens above the largest float16.
        encoder.vit.norm.weight *= 1e7
    weights = tmp_path / "huge.safetensors"
    weights.write_bytes(dump_encoder(encoder.vit, TINY_VIT, overrides=TINY_OVERRIDES))
    run = open_run(tmp_path / "run", photographs_with_refused, f"encoder.weights={weights}")
    with (
        pytest.raises(DataError) as caught,
        kept_log(run.folder, "extract"),
    ):
        run_stages(run, ("extract",), address=None, reporter=Silent())
    assert re.fullmatch(r"the class tokens of \d photographs are NaN or infinite[^\n]*", str(caught.value))
    log = Path(log_of(caught.value) or "").read_text()
    assert "ERROR" in log
    assert "in require_finite" in log, "the traceback is the worker's"
    assert re.search(r"in unit \d, which begins with photo_00\da?\.jpg, on node \S+, pid \d+", log)
    assert "\x1b" not in log
    assert "Traceback" not in "".join(capfd.readouterr())
