"""What trainings share before and beside Ray Train."""

import pytest

from transfgu_ray.pipeline.trainer import drop_torn_record
from transfgu_ray.storage import Folder


@pytest.mark.parametrize(
    ("record", "kept"), [(b'{"checkpoint_results": []}', True), (b'{"checkpoint_res', False), (b"", False)]
)
def test_drop_torn_record__only_a_damaged_one(tmp_path, record: bytes, kept: bool) -> None:
    run = Folder(str(tmp_path))
    run.write_bytes("train/rounds-1/checkpoint_manager_snapshot.json", record)
    run.write_bytes("train/rounds-1/checkpoint_0/state.pt", b"weights")
    drop_torn_record(run, "train/rounds-1")
    assert run.exists("train/rounds-1/checkpoint_0/state.pt") is kept
    drop_torn_record(run, "train/rounds-2")
