"""Tables of a run that lie in another one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.storage import flip_byte
from transfgu_ray.config.presets import tiny_cpu
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.references import REFERENCES, RunFiles, table_folder
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder

SHARED = {
    "extract": ("features/part-000000.parquet", "features/part-000001.parquet", "model/encoder.safetensors"),
    "labels": ("labels/part-000000.parquet",),
}


@pytest.fixture(params=["local", "memory"])
def sweep(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(str(tmp_path / "sweep") if request.param == "local" else f"memory://{tmp_path.name}/sweep")
    yield folder
    folder.delete("")


def run_in(sweep: Folder, name: str) -> Run:
    return Run.open(sweep.uri_of(name), tiny_cpu())


@pytest.fixture
def shared(sweep: Folder) -> Run:
    run = run_in(sweep, "shared/labels-1")
    for stage, names in SHARED.items():
        for name in names:
            run.folder.write_bytes(name, name.encode())
        run.write_manifest(stage, "f", {})
    return run


@pytest.fixture
def trial(sweep: Folder, shared: Run) -> Run:
    run = run_in(sweep, "trials/1")
    # Its own is replaced.
    run.folder.write_bytes("labels/part-000007.parquet", b"own")
    for stage in SHARED:
        run.refer_stage(shared, stage)
    return run


def names_in(run: Run) -> list[str]:
    return [name for name, _ in run.folder.files(recursive=True) if name != "config.yaml"]


def test_refer_stage__copies_all_but_the_tables(trial: Run, shared: Run) -> None:
    assert names_in(trial) == [
        "extract.files.json", "extract.json", "labels.files.json", "labels.json", "model/encoder.safetensors",
        "shared.json",
    ]  # fmt: skip
    assert trial.folder.read_json(REFERENCES) == {
        "features": "../../shared/labels-1",
        "labels": "../../shared/labels-1",
    }
    assert table_folder(trial.folder, "features").uri == shared.folder.uri
    assert table_folder(trial.folder, "tokens").uri == trial.folder.uri
    assert [name for name, _ in RunFiles(trial.folder).files("labels")] == list(SHARED["labels"])
    assert [trial.damaged_files(stage) for stage in SHARED] == [[], []]


def test_refer_stage__of_a_reference_leads_to_the_tables_themselves(trial: Run, shared: Run, sweep: Folder) -> None:
    other = run_in(sweep, "shared/labels-2")
    other.refer_stage(trial, "extract")
    assert table_folder(other.folder, "features").uri == shared.folder.uri
    assert other.damaged_files("extract") == []


def test_damage__in_a_shared_table_is_reported_where_it_lies_and_not_deleted(trial: Run, shared: Run) -> None:
    before = names_in(shared)
    shared.folder.write_bytes(SHARED["labels"][0], b"x" * len(SHARED["labels"][0]))
    trial.folder.write_bytes(SHARED["extract"][2], b"y")
    assert trial.damaged_files("labels") == list(SHARED["labels"])
    assert trial.damaged_files("extract") == [SHARED["extract"][2]]
    with pytest.raises(ArtifactError) as raised:
        trial.require_whole("labels")
    assert str(raised.value).startswith(shared.folder.uri_of(SHARED["labels"][0]))
    assert f"run `transfgu labels {trial.folder.uri}`" in str(raised.value)
    trial.discard("labels", trial.damaged_files("labels"))
    assert names_in(shared) == before


def test_clear__drops_the_reference_alone(trial: Run, shared: Run) -> None:
    before = {name: shared.folder.read_bytes(name) for name in names_in(shared)}
    trial.clear("labels")
    assert trial.folder.read_json(REFERENCES).keys() == {"features"}
    assert table_folder(trial.folder, "labels").uri == trial.folder.uri
    trial.clear("extract")
    assert names_in(trial) == []
    assert {name: shared.folder.read_bytes(name) for name in names_in(shared)} == before


def test_references__hold_when_the_whole_sweep_is_moved(trial: Run, sweep: Folder, tmp_path: Path) -> None:
    if not sweep.is_local:
        pytest.skip("moved on a disk")
    shutil.move(sweep.path, tmp_path / "elsewhere")
    moved = Run.open(str(tmp_path / "elsewhere/trials/1"), None)
    assert [moved.damaged_files(stage) for stage in SHARED] == [[], []]
    flip_byte(tmp_path / "elsewhere/shared/labels-1" / SHARED["extract"][1])
    assert moved.damaged_files("extract") == [SHARED["extract"][1]]


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"labels": 1}'])
def test_references__damaged_ones_are_refused(trial: Run, content: bytes) -> None:
    trial.folder.write_bytes(REFERENCES, content)
    with pytest.raises(ArtifactError, match=r"trials/1/shared\.json is damaged; delete it"):
        trial.damaged_files("labels")
