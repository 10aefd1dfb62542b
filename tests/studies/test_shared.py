"""Shared stages of a sweep: trials refer to their tables, and stay ordinary run folders."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.storage import flip_byte
from tests.fixtures import Silent
from tests.studies.test_tune import tiny_base
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.engine.prefetch import num_readers
from transfgu_ray.engine.session import Resources
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.references import TABLES, table_folder
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.studies.shared import SHARED, SharedStages
from transfgu_ray.studies.trials import Trials

CACHED = ("train.features=cached", "train.augment={jitter_prob: 0, grey_prob: 0, blur_prob: 0}")
OTHER_BANK = {"cam.keep_mass": 0.5}
DRAWN = "evaluate.num_samples=1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, labelled: Run) -> RunConfig:
    weights = labelled.folder.uri_of("model/encoder.safetensors")
    return build_config(tiny_base(tmp_path_factory.mktemp("shared") / "data", weights), None, CACHED)


@pytest.fixture(scope="module")
def made(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A sweep with two banks of the same features. To be copied, not changed."""
    folder = Folder(str(tmp_path_factory.mktemp("made") / "sweep"))
    trials = Trials(folder, base)
    SharedStages(folder, base).make([trials.config({}), trials.config(OTHER_BANK)], Silent())
    return folder


@pytest.fixture
def trial(made: Folder, base: RunConfig, tmp_path: Path) -> Run:
    """A trial on the bank that was made second, in a copy of the sweep."""
    folder = Folder(str(shutil.copytree(made.path, tmp_path / "sweep")))
    run = Trials(folder, base).begin(OTHER_BANK)
    SharedStages(folder, base).give(run)
    return run


def content(folder: Folder, *names: str) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for each in names for name, _ in folder.files(each, recursive=True)}


def all_shared(trial: Run) -> dict[str, bytes]:
    return content(Folder(str(Path(trial.folder.path).parents[1] / "shared")), "")


@pytest.mark.ray
def test_give__lets_trials_and_banks_refer_to_tables_that_are_there_once(trial: Run) -> None:
    sweep = Path(trial.folder.path).parents[1]
    assert not [table for table in TABLES if trial.folder.exists(table)]
    assert {path.parent.relative_to(sweep).parts[1].partition("-")[0] for path in sweep.rglob("features/*")} == {
        "extract"
    }
    assert len([*sweep.glob("shared/*/labels")]) == 2
    assert len([*sweep.glob("shared/*/tokens")]) == 1
    places = {table: table_folder(trial.folder, table).path for table in TABLES}
    assert len({*places.values()}) == 3
    assert all(Path(place, table).is_dir() for table, place in places.items())
    assert all(trial.damaged_files(stage) == [] for stage in SHARED)


@pytest.mark.long
@pytest.mark.ray
def test_trial__is_an_ordinary_run_and_leaves_what_is_shared_alone(trial: Run, tmp_path: Path) -> None:
    shared, uri = all_shared(trial), trial.folder.uri
    reporter = Silent()
    run_stages(trial, ("train", "evaluate"), address=None, reporter=reporter)
    assert list(reporter.done) == ["train", "evaluate"], "tokens were made again"
    assert not [table for table in TABLES if trial.folder.exists(table)]
    alone = Run.open(str(tmp_path / "alone"), trial.config)
    run_stages(alone, STAGES.lasting[:-2], address=None, reporter=Silent())
    results = ("model", "train/history.json", "concepts.parquet", "atlas.json", "atlas", "metrics.json", "confusions")
    assert content(trial.folder, *results) == content(alone.folder, *results)

    again = Run.open(uri, build_config(trial.config, None, [DRAWN]), overwrite=True)
    reporter = Silent()
    run_stages(again, ("evaluate",), address=None, reporter=reporter, overwrite=True)
    assert list(reporter.done) == ["evaluate"]
    other = Run.open(uri, build_config(trial.config, None, [DRAWN, "cam.keep_mass=0.9"]), overwrite=True)
    run_stages(other, ("labels",), address=None, reporter=Silent(), overwrite=True)
    assert other.folder.exists("labels")
    assert table_folder(other.folder, "labels").uri == uri
    assert not other.folder.exists("features")
    assert all_shared(trial) == shared


@pytest.mark.slow
@pytest.mark.ray
def test_trial__makes_its_own_of_damaged_tables_and_of_tokens_that_are_gone(trial: Run) -> None:
    bank = Path(table_folder(trial.folder, "labels").path) / "labels/part-000001.parquet"
    flip_byte(bank)
    Run(table_folder(trial.folder, "tokens"), trial.config).clear("tokens")
    shared = all_shared(trial)
    with pytest.raises(ArtifactError) as raised:
        run_stages(trial, ("train",), address=None, reporter=Silent())
    assert str(raised.value).startswith(f"{bank}: not what stage labels wrote")
    reporter = Silent()
    run_stages(trial, STAGES.lasting[: STAGES.lasting.index("evaluate")], address=None, reporter=reporter)
    assert list(reporter.done) == ["labels", "tokens", "train"]
    assert json.loads(trial.folder.read_bytes("labels.json"))["same_again"]
    assert [table for table in TABLES if trial.folder.exists(table)] == ["labels"]
    assert all_shared(trial) == shared


@pytest.mark.ray
def test_make__mends_the_shared_features_where_they_lie(made: Folder, base: RunConfig, tmp_path: Path) -> None:
    folder = Folder(str(shutil.copytree(made.path, tmp_path / "sweep")))
    (part,) = Path(folder.path).glob("shared/extract-*/features/part-000001.parquet")
    before = part.read_bytes()
    flip_byte(part)
    SharedStages(folder, base).make([base], Silent())
    assert part.read_bytes() == before
    assert len([*Path(folder.path).glob("shared/*/features")]) == 1


@pytest.mark.parametrize(
    ("cores", "workers", "students", "trainings", "want"),
    [(16, 1, 1, 1, 16), (16, 2, 1, 1, 8), (16, 2, 2, 1, 4), (16, 1, 2, 4, 2), (96, 8, 2, 3, 2), (4, 1, 2, 8, 1)],
)
def test_num_readers__of_all_trainings_share_the_cores(
    cores: int, workers: int, students: int, trainings: int, want: int
) -> None:
    resources = Resources(cores, workers, workers, "cpu", 1, None)
    assert num_readers(resources, students=students, trainings=trainings) == want
