"""Faults of services beside the cluster: the tracking server."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.bench import Bench, kill, last_line, num_epochs, num_parts
from tests.faults.cluster import free_port

_AWAY_S = 60
_START_S = 120


@dataclass
class MlflowServer:
    """A tracking server on loopback, with its store in a folder.

    Attributes:
        folder: of store and artifacts.
        port: on loopback.
        process: leader of the group of all its processes.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Value of `--tracking-uri`."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, again after a kill, and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > end:
                raise TimeoutError(f"no MLflow server: {(self.folder / 'server.log').read_text()[-1000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False

    def kill(self) -> None:
        """Kill the server; connections are refused from now on."""
        if self.process is not None:
            kill(self.process)

    def freeze(self) -> None:
        """Stop the server; connections are accepted and not answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server continue."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Run a tracking server."""
    folder.mkdir()
    server = MlflowServer(folder, free_port())
    server.start()
    try:
        yield server
    finally:
        server.kill()


def mlflow_away(bench: Bench, run: Path, stage: str) -> str | None:
    """Take the tracking server away for a minute in begin and train (refused) and in extract and register (silent)."""
    with mlflow_server(run.with_name(f"{run.name}-mlflow")) as server:
        server.kill()
        process = bench.start("run", run, "--tracking-uri", server.uri)
        _wait(process)
        server.start()
        outages: list[tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]] = [
            (lambda: num_parts(run, "extract") > 0, server.freeze, server.thaw),
            (lambda: num_epochs(run) > 0, server.kill, server.start),
            (lambda: (run / "report.json").exists(), server.freeze, server.thaw),
        ]
        for is_hit, off, on in outages:
            if not bench.wait_until(is_hit, process):
                return None
            off()
            _wait(process)
            on()
        said = last_line(bench.end(process))
        _check_tracked(server.uri, run)
    return said


def _wait(process: subprocess.Popen[str]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_AWAY_S)


def _check_tracked(uri: str, run: Path) -> None:
    """Check that every epoch is logged once and one version registered.

    Raises:
        RuntimeError: it is not so.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
    versions = client.search_model_versions(f"run_id='{run_id}'")
    status = client.get_run(run_id).info.status
    if sorted(steps) != list(range(num_epochs(run))) or len(versions) != 1 or status != "FINISHED":
        raise RuntimeError(f"MLflow has epochs {steps}, {len(versions)} versions, status {status}")
