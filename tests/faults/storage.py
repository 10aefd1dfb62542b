"""Failing storage: a small disk, an object store that answers late or with errors, damaged files."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs


def flip_byte(path: Path | str) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    _replace(path, bytes(data))


def truncate(path: Path | str) -> None:
    """Cut a file to its first half."""
    data = Path(path).read_bytes()
    _replace(path, data[: len(data) // 2])


class FailingDisk(pafs.LocalFileSystem):
    """A disk that fails the first times that each file is opened or each path is looked up, and then works.

    Attributes:
        times: how often it fails for each path.
    """

    times = 1

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[tuple[str, str]] = Counter()

    def _fail(self, action: str, path: object) -> None:
        self._calls[action, str(path)] += 1
        if self._calls[action, str(path)] <= self.times:
            raise OSError(errno.EIO, "Input/output error")

    def open_input_file(self, path: str) -> pa.NativeFile:
        self._fail("open", path)
        return super().open_input_file(path)

    def get_file_info(self, paths: Any) -> Any:
        self._fail("look up", getattr(paths, "base_dir", paths))
        return super().get_file_info(paths)


def _replace(path: Path | str, data: bytes) -> None:
    # Runs share files by hard links; only one of them must be damaged.
    Path(path).unlink()
    Path(path).write_bytes(data)


@dataclass(frozen=True)
class SmallDisk:
    """A mounted tmpfs.

    Attributes:
        path: where it is mounted.
    """

    path: Path

    def used_bytes(self) -> int:
        """Return the bytes used by files."""
        stats = os.statvfs(self.path)
        return (stats.f_blocks - stats.f_bfree) * stats.f_frsize

    def remount(self, options: str) -> None:
        """Change mount options, e.g. `size=64m` or `ro`."""
        _run("mount", "-o", f"remount,{options}", str(self.path))


class NotPermitted(Exception):
    """This process lacks a right that the fault needs; the message is the reason to skip."""


@contextlib.contextmanager
def tmpfs(size: str) -> Iterator[SmallDisk]:
    """Mount a separate disk of a given size, e.g. `1m`.

    Raises:
        NotPermitted: mounting needs root on a system that permits it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotPermitted(f"a tmpfs cannot be mounted: {getattr(error, 'stderr', error)}") from None
        try:
            yield SmallDisk(Path(folder))
        finally:
            # Lazily: a process left by a test may still have a file open.
            _run("umount", "-l", folder)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class FaultyStore:
    """An S3 server on loopback.

    Attributes:
        url: of the server.
        env: variables by which pyarrow and child processes find it.
    """

    url: str
    env: dict[str, str]

    def set_faults(self, share: float, seed: int = 0, stall_s: float = 0.0, answer: str = "") -> None:
        """Let a share of the requests fail from now on.

        Args:
            share: of failing requests; 1 = a dead store.
            seed: decides, with the number of a request, whether it fails.
            stall_s: seconds by which a third of the failing answers are delayed.
            answer: HTTP status and S3 code of a failing request, e.g. `403 AccessDenied`; "" = 500 or 503, by the seed.
        """
        _post(self.url, {"share": share, "seed": seed, "stall_s": stall_s, "answer": answer})

    def count_faults(self) -> int:
        """Return the number of failed requests so far."""
        return self._state()["failed"]

    def requests(self) -> list[str]:
        """Return each request so far, as its method and path, e.g. `PUT /bucket/a`."""
        return self._state()["requests"]

    def _state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}{_CONTROL}", timeout=30) as answer:
            return json.load(answer)

    def open(self) -> pafs.S3FileSystem:
        """Return a file system with the buckets of the store."""
        return pafs.S3FileSystem(endpoint_override=self.url, access_key="test", secret_key="test", region="us-east-1")

    def files(self, bucket: str) -> dict[str, bytes]:
        """Return every object of a bucket by its name."""
        fs = self.open()
        found = fs.get_file_info(pafs.FileSelector(bucket, recursive=True))
        names = [info.path for info in found if info.type == pafs.FileType.File]
        return {name.partition("/")[2]: fs.open_input_stream(name).readall() for name in names}

    def count(self, folder: str) -> int:
        """Return the number of objects below a folder, `bucket/...`."""
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        return len(self.open().get_file_info(selector))

    def copy_to(self, bucket: str, folder: str, target: Path) -> None:
        """Copy the objects of a folder of a bucket to a local folder."""
        for name, data in self.files(bucket).items():
            path = target / Path(name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


_CONTROL = "/-/faults"


def _post(url: str, values: dict[str, float | str]) -> None:
    request = urllib.request.Request(f"{url}{_CONTROL}", json.dumps(values).encode(), method="POST")
    urllib.request.urlopen(request, timeout=30).close()


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[FaultyStore]:
    """Run moto's S3 server in a separate process, with an empty bucket and without faults at first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Otherwise it looks for the identity of a cloud machine.
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen([sys.executable, "-m", __name__, str(port)], env=os.environ | env)
    try:
        _wait_for(url, server)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT"), timeout=30).close()
        yield FaultyStore(url, env)
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            _post(url, {"share": 0.0, "seed": 0, "stall_s": 0.0})
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the S3 server did not start") from None
            time.sleep(0.1)


def _serve(port: int) -> None:
    import itertools
    import logging
    import random

    from moto.server import create_backend_app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = create_backend_app("s3")
    faults: dict[str, Any] = {"share": 0.0, "seed": 0, "stall_s": 0.0, "answer": "", "numbers": itertools.count()}
    failed: list[str] = []
    requests: list[str] = []

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _CONTROL:
            if environ["REQUEST_METHOD"] == "POST":
                values = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                faults.update(values, numbers=itertools.count())
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"failed": len(failed), "requests": requests}).encode()]
        requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        rng = random.Random(f"{faults['seed']} {next(faults['numbers'])}")
        if rng.random() >= faults["share"]:
            return store(environ, start_response)
        failed.append(environ["PATH_INFO"])
        if rng.random() < 1 / 3:
            time.sleep(faults["stall_s"])
        status, code = (faults["answer"] or rng.choice(["500 InternalError", "503 SlowDown"])).split()
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>drawn by the seed</Message></Error>".encode()]

    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
