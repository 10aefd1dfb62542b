import hashlib
import json
import os

import pyarrow as pa
import pytest
import yaml

from tests.faults.storage import flip_byte, truncate
from transfgu_ray.config.presets import tiny_cpu
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs import checksums
from transfgu_ray.runs.index import IndexWriter, describe_part, part_metadata
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder


def _config(*assignments):
    return build_config(tiny_cpu(), None, assignments)


def _fingerprints(*assignments, inputs="photographs"):
    run = Run(Folder("unused"), _config(*assignments))
    return {stage: run.fingerprint(stage, inputs) for stage in STAGES.lasting}


def _changed(*assignments):
    before, after = _fingerprints(), _fingerprints(*assignments)
    return [stage for stage in STAGES.lasting if before[stage] != after[stage]]


def test_run_open__writes_the_configuration_first_and_reads_it_back(tmp_path):
    uri = str(tmp_path / "run")
    Run.open(uri, _config("seed=3"))
    assert os.listdir(uri) == ["config.yaml"]
    assert Run.open(uri, None).config == _config("seed=3")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"] == 3


def test_run_open__refuses_another_configuration_and_says_what_differs(tmp_path):
    uri = str(tmp_path)
    Run.open(uri, _config("seed=5"))
    # Nothing was computed yet, so another configuration may replace it.
    run = Run.open(uri, _config())
    run.folder.write_bytes("features/part-000000.parquet", b"")
    with pytest.raises(ArtifactError, match=r"another configuration \(seed: 0 -> 1; train\.omega_1: 1\.0 -> 2\.0\)"):
        Run.open(uri, _config("seed=1", "train.omega_1=2"))
    assert Run.open(uri, None).config == _config()
    Run.open(uri, _config("seed=1"), overwrite=True)
    assert Run.open(uri, None).config.seed == 1


@pytest.mark.parametrize("change", ["data.root=/elsewhere", "runtime.num_workers=3", "tracking.experiment=other"])
def test_run_open__settings_of_where_it_runs_may_change(tmp_path, change):
    Run.open(str(tmp_path), _config())
    Run.open(str(tmp_path), _config(change))
    # Later stages need the newer value.
    assert Run.open(str(tmp_path), None).config == _config(change)
    assert _changed(change) == []


def test_run_open__refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"is no run folder \(it has no config\.yaml\)"):
        Run.open(str(tmp_path), None)
    (tmp_path / "config.yaml").write_text("train: [")
    with pytest.raises(ArtifactError, match=r"config\.yaml is damaged"):
        Run.open(str(tmp_path), None)
    with pytest.raises(ArtifactError, match="cannot open nosuch://run"):
        Run.open("nosuch://run", _config())
    with pytest.raises(ArtifactError, match="cannot write"):
        Run.open(str(tmp_path / "config.yaml" / "run"), RunConfig())


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("seed=1", "extract"),
        ("data.min_side_px=16", "extract"),
        ("extract.window_fracs=[0.5]", "extract"),
        ("concepts.num_concepts=9", "concepts"),
        ("cam.exclusion=false", "labels"),
        ("train.omega_1=0.5", "train"),
        ("evaluate.batch_size=2", "evaluate"),
    ],
)
def test_run_fingerprint__a_setting_touches_its_stage_and_those_after_it(change, first):
    assert _changed(change) == list(STAGES.lasting[STAGES.lasting.index(first) :])


def test_run_fingerprint__follows_the_input():
    before, after = _fingerprints(), _fingerprints(inputs="other photographs")
    assert all(before[stage] != after[stage] for stage in STAGES.lasting)


def test_run_manifest__is_what_marks_a_stage_as_complete(tmp_path):
    run = Run.open(str(tmp_path), _config())
    assert run.manifest("extract") is None
    with pytest.raises(ArtifactError, match="has no finished stage extract; run `transfgu extract"):
        run.require("extract")
    run.write_manifest("extract", "f" * 64, {"rows": 12})
    manifest = run.require("extract")
    assert manifest == json.loads((tmp_path / "extract.json").read_text())
    assert (manifest["stage"], manifest["fingerprint"], manifest["rows"]) == ("extract", "f" * 64, 12)
    assert {"python", "torch", "timm", "transfgu_ray"} <= manifest["versions"].keys()


def test_run_manifest__half_written_counts_as_none(tmp_path):
    run = Run.open(str(tmp_path), _config())
    (tmp_path / "labels.json").write_text('{"stage": "lab')
    assert run.manifest("labels") is None


def test_run_clear__removes_the_manifest_first_then_the_outputs(tmp_path, monkeypatch):
    run = Run.open(str(tmp_path), _config())
    run.write_manifest("extract", "f", {})
    run.write_manifest("concepts", "f", {})
    for name in ("features/part-0.parquet", "model/encoder.safetensors", "concepts.parquet"):
        run.folder.write_bytes(name, b"x")
    removed, delete = [], run.folder.delete
    monkeypatch.setattr(run.folder, "delete", lambda name: (removed.append(name), delete(name)))
    run.clear("extract")
    assert removed == ["extract.json", "extract.files.json", *STAGES["extract"].outputs]
    left = [name for name, _ in run.folder.files(recursive=True)]
    assert left == ["concepts.files.json", "concepts.json", "concepts.parquet", "config.yaml"]


def test_run_damaged_files__are_those_missing_or_changed(tmp_path):
    run = Run.open(str(tmp_path), _config())
    parts = [f"features/part-{unit:06d}.parquet" for unit in range(4)]
    for name in parts:
        run.folder.write_bytes(name, name.encode())
    run.write_manifest("extract", "f", {})
    record = json.loads((tmp_path / "extract.files.json").read_bytes())
    assert list(record) == parts
    assert record[parts[0]] == {"bytes": len(parts[0]), "sha256": hashlib.sha256(parts[0].encode()).hexdigest()}
    assert run.damaged_files("extract") == []
    (tmp_path / parts[0]).unlink()
    flip_byte(tmp_path / parts[1])
    truncate(tmp_path / parts[3])
    run.folder.write_bytes("features/notes.txt", b"of no stage")
    assert run.damaged_files("extract") == [parts[0], parts[1], parts[3]]


def test_run_copy_stage__takes_the_seal_along(tmp_path):
    source, target = (Run.open(str(tmp_path / name), _config()) for name in ("source", "target"))
    source.folder.write_bytes("concepts.parquet", b"x")
    source.write_manifest("concepts", "f", {})
    target.copy_stage(source, "concepts")
    assert target.damaged_files("concepts") == []
    flip_byte(tmp_path / "target/concepts.parquet")
    assert target.damaged_files("concepts") == ["concepts.parquet"]
    assert source.damaged_files("concepts") == []


def _finish(run, stage, content):
    """Finish a stage with one file of some content."""
    run.folder.write_bytes(next(name for name in STAGES[stage].outputs if name.endswith(FILES)), content)
    return run.write_manifest(stage, "f", {})


FILES = (".safetensors", ".parquet", ".html")


def test_run_changed_before__is_the_first_stage_that_has_other_files_than_it_was_made_of(tmp_path):
    run = Run.open(str(tmp_path / "run"), _config())
    made = {stage: _finish(run, stage, b"x")["files_sha256"] for stage in ("extract", "concepts")}
    for stage in ("labels", "train", "report", "register"):
        run.write_manifest(stage, "f", {})
    assert run.require("labels")["made_of"] == made
    assert run.changed_before("register") is None
    _finish(run, "report", b"of another version")
    assert run.changed_before("register") is None, "pages only show what others made"
    _finish(run, "concepts", b"y")
    assert [run.changed_before(stage) for stage in ("extract", "concepts", "labels", "train", "evaluate")] == [
        *(None, None, "concepts", "concepts", None)
    ]
    copy = Run.open(str(tmp_path / "copy"), _config())
    for stage in ("extract", "concepts", "labels"):
        copy.copy_stage(run, stage)
    assert copy.changed_before("labels") == "concepts"
    _finish(run, "concepts", b"x")
    assert run.changed_before("train") is None
    _finish(run, "extract", b"y")
    assert run.changed_before("train") == "extract"


def test_run_changed_before__manifests_of_older_versions_are_accepted(tmp_path):
    run = Run.open(str(tmp_path), _config())
    for stage in ("extract", "concepts"):
        _finish(run, stage, b"x")
    manifest = run.require("concepts")
    del manifest["made_of"]
    run.folder.write_json("concepts.json", manifest)
    _finish(run, "extract", b"y")
    assert run.changed_before("concepts") is None


def _reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the stage's files that are read from now on."""
    read: list[str] = []
    hash_files = checksums.hash_files

    def noted(folder, names):
        read.extend(names)
        return hash_files(folder, names)

    monkeypatch.setattr(checksums, "hash_files", noted)
    return read


def test_run_damaged_files__only_files_written_since_are_read(tmp_path, monkeypatch):
    run = Run.open(str(tmp_path), _config())
    parts = [f"features/part-{unit:06d}.parquet" for unit in range(4)]
    for number, name in enumerate(parts):
        run.folder.write_bytes(name, name.encode())
        os.utime(tmp_path / name, ns=(number, number))
    run.write_manifest("extract", "f", {})
    manifest, read = run.require("extract"), _reads(run, monkeypatch)
    assert run.damaged_files("extract") == []
    assert read == parts[-1:], "the clock may not have ticked since the last"
    os.utime(tmp_path / parts[1], ns=(10, 10))
    read.clear()
    assert run.damaged_files("extract") == []
    assert read == [parts[1], parts[3]]
    assert {**run.require("extract"), "newest_file_ns": 3} == manifest
    read.clear()
    assert run.damaged_files("extract") == []
    assert read == [parts[1]], "found whole, it is not read for ever"
    run.suspect("extract", [parts[0]])
    read.clear()
    assert run.damaged_files("extract") == []
    assert read == [parts[0], parts[1]]
    read.clear()
    assert run.damaged_files("extract") == []
    assert read == [parts[1]], "whole, so suspected no more"


def test_run_write_manifest__takes_the_checksums_of_parts_from_their_index(tmp_path, monkeypatch):
    run = Run.open(str(tmp_path), _config())
    data = to_parquet(pa.table({"x": [1]}), part_metadata("f", "{}", [1]))
    run.folder.write_bytes("features/part-000000.parquet", data)
    run.folder.write_bytes("model/encoder.safetensors", b"x")
    record = describe_part(0, data, fingerprint="f", rows_apart=False)
    IndexWriter(run.folder, "features", "f").finish({0: record})
    read = _reads(run, monkeypatch)
    run.write_manifest("extract", "f", {})
    assert read == ["features/_index/index.parquet", "model/encoder.safetensors"]
    recorded = run.recorded_files("extract")
    assert recorded["features/part-000000.parquet"]["sha256"] == hashlib.sha256(bytes(data)).hexdigest()
    monkeypatch.undo()
    assert run.damaged_files("extract") == []
    (tmp_path / "extract.files.json").write_text("{}")
    assert run.recorded_files("extract") is None


def test_run_write_manifest__rebuilt_with_other_bytes_deletes_parts_of_the_former_but_nothing_finished(tmp_path):
    run = Run.open(str(tmp_path), _config())
    _finish(run, "extract", b"x")
    run.write_manifest("concepts", "f", {})
    kept = ("concepts.parquet", "train/rounds-0/state.pt", "model/decoder.safetensors")
    parts = ("labels/part-000000.parquet", "confusions/part-000000.parquet")
    for name in (*kept, *parts):
        run.folder.write_bytes(name, b"x")
    run.discard("extract", ["model/encoder.safetensors"])
    assert _finish(run, "extract", b"y")["same_again"] is False
    assert [run.folder.exists(name) for name in kept] == [True] * 3
    assert [run.folder.exists(name) for name in parts] == [False] * 2
    assert run.manifest("concepts") is not None


def test_run_write_manifest__seals_neither_checkpoints_nor_tokens_nor_half_written_files(tmp_path):
    run = Run.open(str(tmp_path), _config())
    names = (
        "train/history.json",
        "model/decoder.safetensors",
        "model/config.json",
        "model/decoder_round_0.safetensors",
    )
    unsealed = ("train/rounds-0/state.pt", "tokens/part-000000.parquet", "model/.config.json.0badcafe.tmp")
    for name in (*names, *unsealed):
        run.folder.write_bytes(name, b"x")
    run.write_manifest("train", "f", {})
    assert set(json.loads((tmp_path / "train.files.json").read_bytes())) == set(names)
