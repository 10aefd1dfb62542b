"""A real MLflow server on loopback that can be frozen, killed and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.faults.cluster import free_port

_ENV = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class TrackingServer:
    """An MLflow server with a sqlite store.

    Args:
        folder: of the store and the artifacts.

    Attributes:
        uri: of the server, the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self, seconds: float = 180) -> None:
        """Start the server and wait until it answers."""
        store, artifacts = f"sqlite:///{self._folder}/mlflow.db", str(self._folder / "artifacts")
        where = ("--host", "127.0.0.1", "--port", str(self._port), "--workers", "1")
        command = ("server", "--backend-store-uri", store, "--artifacts-destination", artifacts, *where)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command],
                env=os.environ | _ENV,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the MLflow server did not start: {(self._folder / 'server.log').read_text()}")
            time.sleep(0.2)

    def freeze(self) -> None:
        """Stop all its processes: connections are accepted, but nothing is answered."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on, with all that it was sent meanwhile."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill all its processes: connections are refused."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """Run an MLflow server."""
    server = TrackingServer(folder)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
