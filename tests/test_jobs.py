"""`ray job submit` on a cluster of its own: what each way to end looks like from outside."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.builders import make_folder
from tests.faults.bench import finish
from tests.faults.cluster import Cluster, cluster
from tests.fixtures import TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_ROOT = Path(__file__).resolve().parents[1]
_NUM_PHOTOS = 600


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    with cluster(num_nodes=1, cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photographs"), _NUM_PHOTOS)


def submit(one_node: Cluster, job: str, run: Path, photographs: Path) -> subprocess.Popen[str]:
    settings = [part for setting in (*TINY, "extract.images_per_part=1") for part in ("--set", setting)]
    command = ("python", "jobs/extract.py", str(run), "--preset", "tiny_cpu", "--data", str(photographs), *settings)
    return one_node.submit(*command, working_dir=_ROOT, job=job)


def test_jobs__success_failure_and_stop_each_give_their_status(
    one_node: Cluster, photographs: Path, tmp_path: Path
) -> None:
    run, missing = tmp_path / "run", tmp_path / "nowhere"

    printed = finish(submit(one_node, "failing", tmp_path / "none", missing), expected=1)
    assert one_node.status("failing") == "FAILED"
    assert printed.strip().endswith(f"{missing} does not exist; give the folder of photographs with --data"), printed
    assert "exit code 2" in printed
    assert "Traceback" not in printed

    process = submit(one_node, "stopped", run, photographs)
    while process.poll() is None and len(list(run.glob("features/part-*.parquet"))) < 5:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    finish(one_node.stop_job("stopped"))
    finish(process)
    assert one_node.status("stopped") == "STOPPED"
    # `ray job submit` has ended by then; the log has the last line.
    assert "transfgu: stopped; the same command goes on from here" in finish(one_node.job_logs("stopped"))
    assert not (run / "extract.json").exists()

    printed = finish(submit(one_node, "again", run, photographs))
    assert one_node.status("again") == "SUCCEEDED"
    assert "extract: done" in printed
    manifest = json.loads((run / "extract.json").read_text())
    # Three units share a part.
    assert 5 <= manifest["parts_resumed"] < manifest["parts"] == _NUM_PHOTOS / 3
    rows = pq.read_table(run / "features").to_pandas()
    assert rows["image_id"].nunique() == _NUM_PHOTOS
    assert not rows.duplicated(["image_id", "crop_id"]).any()
