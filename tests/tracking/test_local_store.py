"""MLflow's own sqlite store: at any legal path, damaged, of another version, or not writable."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cluster import free_port
from tests.faults.storage import tmpfs
from tests.fixtures import Silent
from tests.tracking.test_registry import registered
from tests.tracking.test_runs import config_at
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.models.model import load_model
from transfgu_ray.storage import Folder
from transfgu_ray.studies.compare import Comparison, compare
from transfgu_ray.tracking.client import hasty, tracking_uri
from transfgu_ray.tracking.local_store import check_store, store_file, store_uri
from transfgu_ray.tracking.models import fetch_model
from transfgu_ray.tracking.registry import Registry
from transfgu_ray.tracking.runs import begin
from transfgu_ray.tracking.sweeps import begin_sweep
from transfgu_ray.tracking.waiting import told_of_waits

pytestmark = pytest.mark.reports

# Each is legal in a path and means something in a URI.
ODD = "w#1 100%/q? ü%23/a+b;x&=[y]{z}@:'\"~,"


def test_store_uri__of_any_path_names_that_file_and_no_other(tmp_path: Path) -> None:
    for name in ("plain", "a b", *ODD.split("/"), *ODD):
        file = tmp_path / (name if name not in "./" else "dot") / "mlflow.db"
        assert store_file(store_uri(file)) == file
    plain = tmp_path / "w#1 a" / "mlflow.db"
    assert store_uri(plain) == f"sqlite:///{plain}", "the stores of earlier versions keep their names"
    assert store_file("sqlite:///mlflow.db") == Path.cwd() / "mlflow.db"
    assert [store_file(uri) for uri in ("sqlite://", "sqlite:///:memory:", "http://mlflow:5000")] == [None] * 3


def test_register__at_any_path_everything_lies_beside_the_run_folder(tmp_path: Path) -> None:
    run = registered(tmp_path / ODD / "run")
    beside = tmp_path / ODD
    assert {path.name for path in beside.iterdir()} == {"run", "mlflow.db", "mlartifacts"}
    assert [path.name for path in tmp_path.iterdir()] == [ODD.partition("/")[0]], "nothing is written elsewhere"
    assert list((beside / "mlartifacts").rglob("config.yaml"))
    uri = tracking_uri(run.folder, run.config)
    (version,) = Registry("transfgu", uri).versions([])
    assert load_model(version.model).config == load_model(Folder(run.folder.uri_of("model"))).config
    assert Path(fetch_model("models:/transfgu/1", uri)).is_relative_to(beside / "mlartifacts")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with a run and a model in it."""
    folder = tmp_path_factory.mktemp("store")
    registered(folder / "run")
    return (folder / "mlflow.db").read_bytes()


def with_schema(revision: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with sqlite3.connect(file) as opened:
            opened.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        opened.close()

    return change


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def make_garbage(file: Path) -> None:
    file.write_bytes(b"no database " * 1000)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "is damaged (.*); restore it from a copy, or move it away"),
    "garbage": (make_garbage, r"is damaged \(file is not a database\); restore it"),
    "a folder": (make_folder, "is not a file; move it away, or give another --tracking-uri"),
    "later": (with_schema("ffffffffffff"), "was made by a later MLflow than the 3"),
    "earlier": (with_schema("451aebb31d03"), "was made by an earlier MLflow than the 3.* `mlflow db upgrade sqlite:"),
}
USES: dict[str, Callable[[str, Path], object]] = {
    "run": lambda uri, out: begin(Folder(str(out / "run")), config_at(uri)),
    "tune": lambda uri, out: begin_sweep(Folder(str(out)), config_at(uri), {"objective": "score"}),
    "compare": lambda uri, out: compare(
        Comparison(name="transfgu", numbers=[], dataset=None, data=str(out), tracking_uri=uri),
        Folder(str(out)),
        address=None,
        reporter=Silent(),
    ),
    "predict and serve": lambda uri, out: fetch_model("models:/transfgu/1", uri),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("use", USES)
def test_connect__a_store_that_cannot_be_used_is_refused_at_once_and_kept(
    store: bytes, tmp_path: Path, damage: str, use: str
) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(store)
    change, words = DAMAGES[damage]
    change(file)
    before = file.read_bytes() if file.is_file() else None
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"^the MLflow store {file} {words}") as refused:
        USES[use](store_uri(file), tmp_path / "out")
    assert "\n" not in str(refused.value)
    # MLflow itself tries a store that cannot be opened for two minutes.
    assert time.monotonic() - started < 10
    assert (file.read_bytes() if file.is_file() else None) == before


def test_connect__a_read_only_store_is_refused_where_it_has_to_be_written(store: bytes, tmp_path: Path) -> None:
    with tmpfs("64m") as disk:
        (disk.path / "mlflow.db").write_bytes(store)
        disk.remount("ro")
        uri = store_uri(disk.path / "mlflow.db")
        assert fetch_model("models:/transfgu/1", uri).endswith("artifacts/model")
        for use in ("run", "tune", "compare"):
            with pytest.raises(ConfigError, match=r"mlflow\.db cannot be written \(attempt to write a readonly"):
                USES[use](uri, tmp_path)
        disk.remount("rw")
        check_store(disk.path / "mlflow.db", writes=True)


def test_connect__a_store_that_another_process_has_locked_is_none_of_these(store: bytes, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(store)
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    check_store(tmp_path / "mlflow.db", writes=True)
    other.close()


def test_connect__a_damaged_store_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    file, folder = tmp_path / "mlflow.db", Folder(str(tmp_path / "run"))
    script = (
        "import sys; from tests.tracking.test_runs import begin, config_at, Folder; "
        "print(begin(Folder(sys.argv[1]), config_at(sys.argv[2])).run_id)"
    )
    # In a process of its own, since MLflow keeps a store open.
    command = [sys.executable, "-c", script, folder.uri, store_uri(file)]
    first = subprocess.run(command, check=True, text=True, capture_output=True).stdout.split()[-1]
    file.rename(tmp_path / "damaged")
    assert begin(folder, config_at(store_uri(file))).run_id != first


@pytest.mark.parametrize("use", USES)
def test_told_of_waits__a_server_that_is_gone_is_told_within_ten_seconds(tmp_path: Path, use: str) -> None:
    uri, notes = f"http://127.0.0.1:{free_port()}", []
    started = time.monotonic()
    with hasty(1), told_of_waits(uri, notes.append):
        # MLflow asks for minutes; here the question is repeated.
        while not notes and time.monotonic() - started < 10:
            with pytest.raises(ArtifactError, match=r"^MLflow at http.* failed: "):
                USES[use](uri, tmp_path / "out")
    assert notes == [f"waiting for MLflow at {uri}, at most four minutes: connection refused"]


def test_told_of_waits__of_a_locked_store_and_not_of_one_that_answers(store: bytes, tmp_path: Path) -> None:
    file, notes = tmp_path / "mlflow.db", []
    file.write_bytes(store)
    with told_of_waits(store_uri(file), notes.append):
        time.sleep(5)
    assert notes == []
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    with told_of_waits(store_uri(file), notes.append):
        time.sleep(5)
    other.close()
    assert notes == [f"waiting for the MLflow store {file}, at most two minutes: another process has locked it"]
