"""Sweeps over real trials: shared stages, measures, MLflow, and a second call."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
import yaml

from tests.builders import make_paired
from tests.fixtures import TINY, Silent, transfgu
from tests.studies.stopped import EPOCHS, RATES, RUNGS, SLOW
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.config.presets import configure, get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ArtifactError, ConfigError, DataError, UnfinishedError
from transfgu_ray.runs.references import table_folder
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.studies.spaces import Range
from transfgu_ray.studies.trials import Trials, sibling_of
from transfgu_ray.studies.tune import SweepPlan, require_ended, tune
from transfgu_ray.tracking.sweeps import settle_trials

SPACE = {"train.omega_1": (0.0, 1.0), "train.omega_2": (0.3,)}
PLAN = SweepPlan(SPACE, None, "grid", "none", "score")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, labelled: Run) -> RunConfig:
    return tiny_base(tmp_path_factory.mktemp("sweep") / "data", labelled.folder.uri_of("model/encoder.safetensors"))


def tiny_base(data: Path, weights: str) -> RunConfig:
    make_paired(data, num_images=5)
    return configure(
        "tiny_cpu",
        None,
        [f"data.root={data}", "data.dataset=paired", *TINY, f"encoder.weights={weights}", "evaluate.baselines=[]",
         "data.region_mode=no_prior", "runtime.train_workers=1", "concepts.num_concepts=3"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
def test_tune__shares_stages_measures_trials_and_repeats_nothing(base: RunConfig, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "sweep"))
    sweep = tune(folder, base, plan=PLAN, address=None, reporter=Silent())
    assert sweep == json.loads(folder.read_bytes("sweep.json"))
    assert [trial["status"] for trial in sweep["trials"]] == ["finished"] * 2
    assert {trial["point"]["train.omega_1"] for trial in sweep["trials"]} == {0.0, 1.0}
    assert all(
        set(trial["components"]) == {"agreement", "consistency", "silhouette", "usage"} for trial in sweep["trials"]
    )
    # Two trials and their siblings: features once, one bank per seed.
    assert [(entry["stage"], entry["used_by"]) for entry in sweep["shared"]] == [
        ("extract", 4), ("concepts", 2), ("concepts", 2), ("labels", 2), ("labels", 2),
    ]  # fmt: skip
    first = Run.open(sweep["trials"][0]["run"], None)
    assert [first.folder.exists(table) for table in ("features", "labels", "tokens")] == [False] * 3
    assert pq.read_table(Path(table_folder(first.folder, "labels").path) / "labels").num_rows == 5
    best = max(sweep["trials"], key=lambda trial: trial["score"])
    assert sweep["best"]["id"] == best["id"]
    assert folder.exists("sweep.html")
    assert not folder.exists("tune")

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(base.tracking.experiment).experiment_id])
    parent = json.loads(folder.read_bytes("mlflow.json"))["run_id"]
    children = {run.info.run_id for run in runs if run.data.tags.get("mlflow.parentRunId") == parent}
    assert children == {trial["mlflow_run_id"] for trial in sweep["trials"]}
    assert {run.info.run_id for run in runs} == children | {parent}
    assert {run.info.status for run in runs} == {"FINISHED"}
    versions = client.search_model_versions(f"name='{base.tracking.model_name}'")
    assert {int(version.version) for version in versions} == {trial["model_version"] for trial in sweep["trials"]}
    assert all(version.tags["objective"] == "score" for version in versions)

    def made(name: str) -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(Path(folder.path).glob(f"*/*/{name}"))]

    before = made("train.json") + made("labels.json")
    assert tune(folder, base, plan=PLAN, address=None, reporter=Silent())["trials"] == sweep["trials"]
    assert made("train.json") + made("labels.json") == before
    assert len(client.search_runs([runs[0].info.experiment_id])) == 3
    with pytest.raises(ArtifactError, match="holds another sweep"):
        tune(folder, base, plan=SweepPlan(SPACE, 1, "random", "none", "score"), address=None, reporter=Silent())

    # A child that was killed before its folder had noted it, and one whose process died.
    orphan = client.create_run(runs[0].info.experiment_id, tags={"mlflow.parentRunId": parent})
    stopped = [trial | {"status": "stopped"} for trial in sweep["trials"][:1]] + sweep["trials"][1:]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    from transfgu_ray.tracking.runs import Tracked

    assert settle_trials(Tracked(uri, parent), stopped) == 1
    assert client.get_run(orphan.info.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(stopped[0]["mlflow_run_id"]).info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.ray
def test_tune__a_scheduler_that_stops_trials_frees_everything(tmp_path: Path) -> None:
    folder, weights = tmp_path / "sweep", tmp_path / "encoder.safetensors"
    overrides = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    name = get_preset("tiny_cpu").encoder.name
    weights.write_bytes(dump_encoder(random_vit(name, overrides, 0), name, overrides=overrides))
    base = build_config(tiny_base(tmp_path / "data", str(weights)), None, [f"train.round_epochs={[*EPOCHS]}"])
    command = [sys.executable, "-m", "tests.studies.stopped", str(folder), base.model_dump_json()]
    # Only a guard: beside much other work it has taken twelve minutes instead of two and a half.
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left"] == [], done.stderr
    assert found["free"]
    trials = {trial["point"]["train.learning_rate"]: trial for trial in found["sweep"]}
    assert trials.keys() == set(RATES)
    statuses = [trial["status"] for trial in trials.values()]
    # Another call would leave all of them alone.
    assert Trials(Folder(str(folder)), base).ended == {trial["id"] for trial in found["sweep"]}
    assert set(statuses) == {"finished", "stopped"}, trials
    assert all((trial["miou"] is not None) == (trial["status"] == "finished") for trial in trials.values())
    stopped = {rate: trial["epochs"] for rate, trial in trials.items() if trial["status"] == "stopped"}
    assert stopped[SLOW] == RUNGS[0], trials
    assert set(stopped.values()) <= set(RUNGS), trials
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = [client.get_run(trial["mlflow_run_id"]).info.status for trial in trials.values()]
    assert runs == [{"finished": "FINISHED", "stopped": "KILLED"}[status] for status in statuses]


@pytest.mark.slow
@pytest.mark.ray
def test_tune__fails_with_the_reason_where_all_trials_fail(base: RunConfig, tmp_path: Path) -> None:
    config, space = tmp_path / "config.yaml", tmp_path / "space.yaml"
    config.write_text(yaml.safe_dump(base.model_dump(mode="json")))
    # Its first step makes the loss NaN.
    space.write_text("train.learning_rate: [1.0e+30]")
    sweep = tmp_path / "sweep"
    process = transfgu(
        "tune", str(sweep), "--space", str(space), "--sampler", "grid", "--preset", "tiny_cpu", "--config", str(config)
    )
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 2, out
    assert "Traceback" not in out
    words = r"the loss is nan in epoch 0, step 1, on images/deep/1\.jpg, .*; lower train\.learning_rate, or check"
    # Once among the results of the sweep, once as the error of the command.
    for before in (r"trial \w{8} failed:", "all trials of the sweep failed, the first of 1 since"):
        assert re.search(f"{before} {words}", " ".join(out.split())), out
    (trial,) = json.loads((sweep / "sweep.json").read_bytes())["trials"]
    assert trial["status"] == "failed"


FAILED, FINISHED = ({"id": "0" * 16, "status": status, "error": "why"} for status in ("failed", "finished"))


@pytest.mark.parametrize(
    ("trials", "sampler", "error", "words"),
    [
        ([FINISHED] * 2, "grid", None, ""),
        ([FINISHED], "optuna", None, ""),
        ([FINISHED], "random", UnfinishedError, "1 of 2 trials of the sweep ended and 0 failed; the same command"),
        ([FINISHED, FAILED], "optuna", UnfinishedError, "1 of 2 trials of the sweep ended and 1 failed; the same"),
        ([FAILED] * 2, "grid", DataError, "all trials of the sweep failed, the first of 2 since why; the same command"),
    ],
)
def test_require_ended__tells_a_sweep_that_lacks_trials(
    trials: list[dict[str, str]], sampler: str, error: type[Exception] | None, words: str
) -> None:
    sweep = {"trials": trials, "asked": 2, "sampler": sampler}
    with pytest.raises(error, match=rf"^s3://bucket/sweep: {words}") if error else contextlib.nullcontext():
        require_ended("s3://bucket/sweep", sweep)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_trials": 2}, "leave out --num-trials"),
        ({"sampler": "random"}, "needs --num-trials"),
        ({"objective": "miou", "scheduler": "asha"}, "measured once"),
        (
            {"sampler": "optuna", "num_trials": 2, "space": {"concepts.num_concepts": Range(2, 4)}},
            "a bank of its own for each trial",
        ),
    ],
)
def test_tune__refuses(base: RunConfig, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    plan = SweepPlan(**{**vars(PLAN), **changes})
    with pytest.raises(ConfigError, match=words):
        tune(Folder(str(tmp_path / "sweep")), base, plan=plan, address=None, reporter=Silent())
    assert not (tmp_path / "sweep").exists()


def test_tune__without_a_frozen_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.weights=random"):
        tune(
            Folder(str(tmp_path / "sweep")), configure("tiny_cpu", None, []), plan=PLAN, address=None, reporter=Silent()
        )


def test_trials__are_named_by_their_settings_and_remember_how_they_ended(base: RunConfig, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    trials = Trials(folder, base)
    points = [{"train.omega_1": omega} for omega in (0.0, 1.0, 2.0, 3.0)]
    assert len({trials.id_of(point) for point in points}) == 4
    assert trials.id_of({"train.omega_1": 0}) == trials.id_of(points[0])
    for point in points:
        trials.begin(point)
    trials.fail(points[0], "the loss is nan")
    trials.end(points[0], "failed")
    trials.end(points[1], "stopped")
    # The training that is torn from a stopped trial fails, maybe after Tune has reported the stop.
    trials.fail(points[1], "actor died")
    trials.folder_of(trials.id_of(points[2])).write_bytes("register.json", b'{"seconds": 1.0}')
    trials.end(points[2], "stopped")
    again = Trials(folder, base)
    assert again.ended == {trials.id_of(point) for point in points[1:3]}
    assert {trial["id"]: (trial["status"], trial["error"]) for trial in again.describe()} == {
        trials.id_of(points[0]): ("failed", "the loss is nan"),
        trials.id_of(points[1]): ("stopped", None),
        trials.id_of(points[2]): ("finished", None),
    }
    known, taken, first = (again.for_search("score")[name] for name in ("known", "taken", "first"))
    assert ([point for point, _ in known], taken) == ([points[2]], [points[1]])
    assert sorted(first, key=str) == [points[0], points[3]]


def test_sibling_of__differs_in_the_seed_alone(base: RunConfig) -> None:
    sibling = sibling_of(base)
    assert sibling.seed != base.seed
    assert sibling.model_copy(update={"seed": base.seed}) == base
    # Extraction does not depend on the seed.
    keys = [Run(Folder("unused"), config).settings_key("extract") for config in (base, sibling)]
    assert keys[0] == keys[1]
