"""Storage that fails while a run is made, and files that are damaged afterwards."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.storage import flip_byte, truncate
from tests.pipeline.conftest import Silent
from transfgu_ray.artifacts import STAGES, Run
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.run import run_stages

pytestmark = pytest.mark.ray


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that a finished stage sealed, by name."""
    names = [name for stage in STAGES for name in json.loads((folder / f"{stage}.files.json").read_bytes())]
    return {name: (folder / name).read_bytes() for name in names}


def copy_of(run: Run, folder: Path) -> Run:
    return Run.open(str(shutil.copytree(run.folder.path, folder)), None)


DAMAGE = {
    "bit in a part of the bank": ("labels", "labels/part-000001.parquet", flip_byte),
    "half a part of the features": ("extract", "features/part-000002.parquet", truncate),
    "bit in the encoder": ("extract", "model/encoder.safetensors", flip_byte),
    "bit in the concepts": ("concepts", "concepts.parquet", flip_byte),
    "deleted decoder": ("train", "model/decoder.safetensors", Path.unlink),
    "half a history": ("train", "train/history.json", truncate),
    "bit in a sample": ("evaluate", "samples/00/bootstrapped.png", flip_byte),
    "bit in the counts": ("evaluate", "confusions/part-000000.parquet", flip_byte),
}


@pytest.mark.parametrize(("stage", "name", "damage"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage__is_found_said_and_made_again_alone(
    finished: Run, tmp_path: Path, stage: str, name: str, damage: Callable[[Path], None]
) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    before = files_of(folder)
    manifests = {each: (folder / f"{each}.json").read_bytes() for each in STAGES}
    damage(folder / name)
    later = STAGES[STAGES.index(stage) + 1 :]
    with pytest.raises(ArtifactError, match=rf"run/{name}: not what stage {stage} wrote, .*; run `transfgu {stage} "):
        run_stages(run, later[:1], None, Silent())
    run_stages(run, STAGES, None, reporter)
    assert files_of(folder) == before
    assert list(reporter.done) == [stage]
    assert reporter.notes == [f"{stage}: {name}: damaged or deleted since they were written, made again"]
    mended = run.require(stage)
    assert (mended["damaged"], mended["same_again"]) == ([name], True)
    if "parts" in mended and name.endswith(".parquet"):
        assert mended["parts_resumed"] == mended["parts"] - 1
    if stage == "train":
        assert mended["epochs"] == 2
    assert {each: (folder / f"{each}.json").read_bytes() for each in STAGES if each != stage} == {
        each: content for each, content in manifests.items() if each != stage
    }
    quiet = Silent()
    run_stages(run, STAGES, None, quiet)
    assert (quiet.done, quiet.notes) == ({}, [])


def test_damage__where_other_bytes_come_out_the_stages_after_it_are_made_again(finished: Run, tmp_path: Path) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    before = files_of(folder)
    # What another machine's rounding would have given.
    record, manifest = folder / "concepts.files.json", folder / "concepts.json"
    entry = json.loads(record.read_bytes())["concepts.parquet"]
    flip_byte(folder / "concepts.parquet")
    concepts = run.folder.read_bytes("concepts.parquet")
    run.write_manifest("concepts", run.require("concepts")["fingerprint"], {})
    assert json.loads(record.read_bytes())["concepts.parquet"] != entry
    assert json.loads(manifest.read_bytes()).get("damaged") is None
    (folder / "concepts.parquet").write_bytes(concepts[:-1])
    run_stages(run, STAGES, None, reporter)
    assert list(reporter.done) == list(STAGES[1:])
    assert reporter.notes[1] == "concepts: other bytes than before, so the stages after it are made again too"
    after = files_of(folder)
    # The page tells of the mending.
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}


def test_damage__of_a_record_alone_is_undone_and_of_a_file_too_makes_the_stage_again(
    finished: Run, tmp_path: Path
) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    record = (folder / "labels.files.json").read_bytes()
    flip_byte(folder / "labels.files.json")
    run_stages(run, STAGES, None, reporter)
    assert (reporter.done, reporter.notes) == ({}, [])
    assert (folder / "labels.files.json").read_bytes() == record
    (folder / "labels.files.json").unlink()
    flip_byte(folder / "labels/part-000000.parquet")
    run_stages(run, STAGES, None, reporter)
    assert list(reporter.done) == ["labels"]
    assert reporter.notes == [
        "labels: labels.files.json and 3 more files: damaged or deleted since they were written, made again"
    ]
    assert (folder / "labels.files.json").read_bytes() == record
    assert run.require("labels")["parts_resumed"] == 0


def test_damage__a_kill_amid_mending_is_mended_too(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, name = copy_of(finished, tmp_path / "run"), tmp_path / "run", "labels/part-000001.parquet"
    before = files_of(folder)
    for steps in range(2):
        flip_byte(folder / name)
        removed, delete = iter(range(steps)), run.folder.delete

        def die(each: str, removed: Iterator[int] = removed, delete: Callable[[str], None] = delete) -> None:
            if next(removed, None) is None:
                raise KeyboardInterrupt
            delete(each)

        with monkeypatch.context() as patch:
            patch.setattr(run.folder, "delete", die)
            with pytest.raises(KeyboardInterrupt):
                run.discard("labels", [name])
        run_stages(run, STAGES, None, Silent())
        assert files_of(folder) == before


def test_damage__runs_of_older_versions_are_left_alone(finished: Run, tmp_path: Path) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    for stage in STAGES:
        manifest = run.require(stage)
        del manifest["files_sha256"]
        (folder / f"{stage}.json").write_text(json.dumps(manifest))
        (folder / f"{stage}.files.json").unlink()
    run_stages(run, STAGES, None, reporter)
    assert (reporter.done, reporter.notes) == ({}, [])
