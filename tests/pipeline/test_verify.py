"""`transfgu verify`: damage that neither size nor time betrays."""

import os
import shutil
from pathlib import Path

import pytest

from tests.faults.storage import flip_byte
from tests.fixtures import Silent
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.pipeline.verify import verify
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES

pytestmark = pytest.mark.ray


def rot(path: Path) -> None:
    """Flip a bit as a failing disk does: unseen by anyone who asks for size and time."""
    before = path.stat()
    flip_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_verify__finds_what_a_run_overlooks_and_the_run_then_mends_it(finished: Run, tmp_path: Path) -> None:
    run = Run.open(str(shutil.copytree(finished.folder.path, tmp_path / "run")), None)
    recorded = [run.recorded_files(stage) or {} for stage in STAGES.lasting]
    reporter = Silent()
    assert verify(run, address=None, reporter=reporter) == sum(map(len, recorded)) == sum(reporter.done.values())
    # Both are older than the last file of their stage.
    names = {"extract": "features/part-000001.parquet", "labels": "labels/part-000000.parquet"}
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names.values()}
    for name in names.values():
        rot(tmp_path / "run" / name)
    assert [run.damaged_files(stage) for stage in names] == [[], []]
    with pytest.raises(
        ArtifactError, match=r"run: features/part-000001\.parquet and 1 more files: damaged or missing;"
    ):
        verify(run, address=None, reporter=Silent())
    assert [run.damaged_files(stage) for stage in names] == [[name] for name in names.values()]
    reporter = Silent()
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names.values()} == before
    assert list(reporter.done) == list(names)
    assert verify(run, address=None, reporter=Silent()) == sum(map(len, recorded))


def test_verify__a_missing_file_a_damaged_record_and_an_empty_run(
    finished: Run, tmp_path: Path, local_ray: None
) -> None:
    run = Run.open(str(shutil.copytree(finished.folder.path, tmp_path / "run")), None)
    (tmp_path / "run/concepts.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"run: concepts\.parquet: damaged or missing"):
        verify(run, address=None, reporter=Silent())
    flip_byte(tmp_path / "run/train.files.json")
    with pytest.raises(ArtifactError, match=r"run: concepts\.parquet and 1 more files: damaged"):
        verify(run, address=None, reporter=Silent())
    for stage in STAGES.lasting:
        (tmp_path / f"run/{stage}.json").unlink()
    with pytest.raises(ArtifactError, match="has no finished stage; there is nothing to verify"):
        verify(run, address=None, reporter=Silent())
