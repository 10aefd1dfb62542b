"""An S3 server on loopback that answers as late as a real one: moto, which the extra `test` installs."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_COUNT = "/_requests"
_START_S = 60.0


@contextmanager
def slow_store(latency_s: float) -> Iterator[Callable[[], int]]:
    """Run the server with a bucket of that name, let this process find it, and yield what counts its requests.

    Args:
        latency_s: seconds by which each answer is late.

    Raises:
        ImportError: moto is not installed.
    """
    import moto.server  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    changed = dict(zip(names, (url, "bench", "bench", "us-east-1"), strict=True)) | {
        "AWS_EC2_METADATA_DISABLED": "true"
    }
    before = {name: os.environ.get(name) for name in changed}
    command = [sys.executable, "-m", __name__, str(port), str(latency_s)]
    # Its own words, on loopback.
    with subprocess.Popen(command, env=os.environ | changed) as server:  # nosec B603
        try:
            os.environ.update(changed)
            _ask(f"{url}{_COUNT}", "GET", time.monotonic() + _START_S)
            _ask(f"{url}/bucket", "PUT", 0.0)
            yield lambda: int(json.loads(_ask(f"{url}{_COUNT}", "GET", 0.0)))
        finally:
            server.kill()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _ask(url: str, method: str, until: float) -> bytes:
    """Return the answer to a request to loopback, asked again until that time."""
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=_START_S) as found:  # nosec B310
                return bytes(found.read())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _serve(port: int, latency_s: float) -> None:
    import logging

    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store, count = create_backend_app("s3"), 0

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        nonlocal count
        if environ["PATH_INFO"] == _COUNT:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [str(count).encode()]
        count += 1
        time.sleep(latency_s)
        found: Iterable[bytes] = store(environ, start_response)
        return found

    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
