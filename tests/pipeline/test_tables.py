"""The feature and label tables do not depend on workers, blocks, kills or (except for rounding) batches."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import make_folder
from tests.fixtures import Silent, make_run, transfgu
from transfgu_ray.config.run import build_config
from transfgu_ray.engine.stream import Photo
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.pipeline.labels import BankBuilder
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

TABLES = ("extract", "concepts", "labels")


def table(run_folder: Path, name: str) -> pa.Table:
    return pq.read_table(run_folder / name).replace_schema_metadata()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photographs"), num_images=9)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photographs: Path, local_ray: None) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return make_run(folder, photographs, "runtime.num_workers=1", "runtime.num_blocks=1", stages=TABLES)


@pytest.mark.ray
def test_tables__two_workers_and_many_blocks(undisturbed: Run, photographs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", photographs, "runtime.num_workers=2", "runtime.num_blocks=5", stages=TABLES)
    for name in ("features", "concepts.parquet", "labels"):
        expected = table(Path(undisturbed.folder.path), name)
        assert expected.num_rows > 0
        assert table(tmp_path / "run", name).equals(expected)


@pytest.mark.ray
def test_tables__batch_of_one_against_seven(undisturbed: Run, photographs: Path, tmp_path: Path) -> None:
    one, seven = (bare_tables(undisturbed, photographs, tmp_path / str(size), size) for size in (1, 7))
    assert one["features"].drop_columns("cls_token").equals(seven["features"].drop_columns("cls_token"))
    assert_within_a_step(*(np.stack(t["features"]["cls_token"].to_numpy()) for t in (one, seven)))
    for end in ("low", "high"):
        assert_within_a_step(*(np.frombuffer(b"".join(t["labels"][end].to_pylist()), "<f2") for t in (one, seven)))
    codes = [np.frombuffer(b"".join(t["labels"]["scores"].to_pylist()), np.int8) for t in (one, seven)]
    assert np.abs(codes[0] - codes[1]).max() <= 1


@pytest.mark.ray
def test_tables__workers_without_ray_equal_those_inside_it(undisturbed: Run, photographs: Path, tmp_path: Path) -> None:
    bare = bare_tables(undisturbed, photographs, tmp_path / "bare", None)
    for name in ("features", "labels"):
        assert bare[name].equals(table(Path(undisturbed.folder.path), name))


def bare_tables(run: Run, photographs: Path, folder: Path, batch_size: int | None) -> dict[str, pa.Table]:
    """Return the tables that workers make without Ray, from the run's own encoder and concepts."""
    for name in ("model/encoder.safetensors", "concepts.parquet"):
        Folder(str(folder)).write_bytes(name, run.folder.read_bytes(name))
    config = run.config
    if batch_size is not None:
        changes = [f"extract.batch_size={batch_size}", f"cam.batch_size={batch_size}"]
        config = build_config(config, None, changes)
    common = {"config": config, "run_uri": str(folder), "fingerprint": "", "device": "cpu", "threads": 1}
    workers = (
        FeatureExtractor(table="features", **common),
        BankBuilder(table="labels", root_uri=str(photographs), **common),
    )
    names = sorted(path.name for path in photographs.iterdir())
    for unit, start in enumerate(range(0, len(names), 2)):
        photos = [Photo(name, (photographs / name).read_bytes(), None, None) for name in names[start : start + 2]]
        for worker in workers:
            worker.process(unit, photos)
    return {name: table(folder, name) for name in ("features", "labels")}


def assert_within_a_step(one: np.ndarray, seven: np.ndarray) -> None:
    # Near zero a float16 step is finer than the float32 rounding of the sums behind the value, which are of order 1.
    step = np.maximum(np.spacing(np.maximum(np.abs(one), np.abs(seven))).astype(np.float64), 2.0**-20)
    assert (np.abs(one.astype(np.float64) - seven.astype(np.float64)) <= step).all()


@pytest.mark.ray
def test_tables__readable_without_this_package(undisturbed: Run) -> None:
    folder = Path(undisturbed.folder.path)
    features = table(folder, "features").to_pandas()
    assert not features.duplicated(["image_id", "crop_id"]).any()
    assert set(features["kind"]) == {"foreground", "background"}
    assert features["foreground_frac"].between(0, 1).all()
    boxes = np.stack(features["box_xyxy"])
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    labels = table(folder, "labels").to_pylist()
    assert len({row["image_id"] for row in labels}) == 9
    for row in labels:
        grid_hw = row["grid_h"], row["grid_w"]
        codes = np.frombuffer(row["scores"], np.uint8).reshape(4, *grid_hw)
        low, high = (np.frombuffer(row[end], "<f2").reshape(grid_hw).astype(np.float32) for end in ("low", "high"))
        scores = np.where(codes, low + np.sqrt((np.maximum(codes, 1) - 1) / 62) * (high - low), 0)
        foreground = np.frombuffer(row["foreground"], np.uint8).reshape(grid_hw)
        assert scores.min() >= 0
        assert scores.max() <= 1
        # Exclusion (4.2): concepts 0-1 are foreground, 2-3 background.
        assert (scores[:2, foreground == 0] == 0).all()
        assert (scores[2:, foreground == 1] == 0).all()


@pytest.mark.ray
def test_tables__damaged_and_foreign_parts_are_made_again(undisturbed: Run, photographs: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", photographs, stages=("extract",))
    part = tmp_path / "run" / "features" / "part-000002.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    # A part of the right name that was made with other settings.
    foreign = tmp_path / "run" / "features" / "part-000003.parquet"
    metadata = {"fingerprint": "another", "stats": "{}"}
    foreign.write_bytes(to_parquet(pq.read_table(foreign).slice(0, 1), metadata))
    (tmp_path / "run" / "features" / ".part-000001.parquet.0badcafe.tmp").write_bytes(b"half")
    (tmp_path / "run" / "extract.json").unlink()
    run = make_run(tmp_path / "run", photographs, stages=("extract",))
    assert run.require("extract")["parts_resumed"] == 3
    assert table(tmp_path / "run", "features").equals(table(Path(undisturbed.folder.path), "features"))
    assert not list((tmp_path / "run" / "features").glob(".*"))


@pytest.mark.slow
@pytest.mark.ray
def test_run__killed_in_extract_labels_and_train(undisturbed: Run, photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder.path, folder)
    # The state after a kill between two parts.
    for stage, name in (("extract", "features"), ("labels", "labels")):
        (folder / f"{stage}.json").unlink()
        sorted(folder.glob(f"{name}/part-*.parquet"))[-1].unlink()
    changes = ("--set", "train.round_epochs=[1, 4]", "--set", "runtime.num_blocks=null", "--overwrite")
    process = transfgu("run", str(folder), *changes)
    wait_for(folder, "train/rounds-*/checkpoint_manager_snapshot.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "train.json").exists()
    run = Run.open(str(folder), None)
    run_stages(run, STAGES.lasting, address=None, reporter=Silent())
    for stage, name in (("extract", "features"), ("labels", "labels")):
        assert run.require(stage)["parts_resumed"] == len(list(folder.glob(f"{name}/part-*.parquet"))) - 1 > 0
    for name in ("features", "concepts.parquet", "labels"):
        assert table(folder, name).equals(table(Path(undisturbed.folder.path), name))
    history = json.loads((folder / "train/history.json").read_bytes())
    assert [row["epoch"] for row in history] == list(range(5))
    assert 1 <= run.require("train")["resumed_at_epoch"] < 5, "training was not interrupted, or began anew"
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert metrics["stages"] is None
    assert "Nothing was scored" in (folder / "report.html").read_text()
    assert {"config.yaml", "concepts.parquet", "metrics.json", "report.html", "register.json"} <= {
        path.name for path in folder.iterdir()
    }


def wait_for(folder: Path, pattern: str, process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.05)
