"""`ray job submit` against a cluster of this machine: success, failure and stop, each told by status and last lines."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import make_folder
from tests.pipeline.conftest import TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a head that listens on loopback alone."""
    port, dashboard = free_port(), free_port()
    local = ("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard))
    limits = ("--num-cpus", "4", "--object-store-memory", "200000000", "--disable-usage-stats")
    with open(tmp_path_factory.mktemp("head") / "log", "wb") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--port", str(port), *local, *limits],
            stdout=log,
            stderr=log,
            env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), 1):
                    break
                assert time.monotonic() < end, "the job server did not start"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(60)


def ray_job(verb: str, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", verb, "--address", address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)


def submit(address: str, run: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = [word for setting in TINY for word in ("--set", setting)]
    job = ["jobs/run.py", str(run), "--preset", "tiny_cpu", "--data", str(data), *settings]
    job += ["--set", "data.region_mode=things_and_stuff"]
    # The entry point is a line for a shell.
    words = [shlex.quote(word) for word in (sys.executable, *job)]
    return ray_job("submit", address, "--working-dir", ".", *options, "--", *words)


def test_job__fails_with_the_sentence_as_its_last_line(address: str, tmp_path: Path) -> None:
    done = submit(address, tmp_path / "run", tmp_path / "nowhere")
    assert done.returncode == 1
    assert f"transfgu: data.root={tmp_path / 'nowhere'} does not exist" in done.stdout + done.stderr
    assert "exit code 2" in done.stdout + done.stderr


def test_job__stopped_leaves_a_run_that_the_same_job_ends(address: str, tmp_path: Path) -> None:
    run, data = tmp_path / "run", make_folder(tmp_path / "data", num_images=24)
    assert submit(address, run, data, "--no-wait", "--submission-id", "first").returncode == 0
    end = time.monotonic() + 200
    while not list(run.glob("features/part-*.parquet")):
        assert time.monotonic() < end, ray_job("logs", address, "first").stdout
        time.sleep(0.1)
    stopped = ray_job("stop", address, "first")
    assert stopped.returncode == 0
    assert "STOPPED" in ray_job("status", address, "first").stdout.upper()
    assert not (run / "report.html").exists()
    done = submit(address, run, data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    assert "succeeded" in done.stdout
    manifest = json.loads((run / "extract.json").read_bytes())
    assert manifest["images"] == 24
    assert not (run / ".claim.json").exists()
