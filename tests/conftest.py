"""Set-up that must come before anything imports the package, and fixtures that every suite shares."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Enforces every shape in a signature; it only reaches modules that are imported after it.
install_import_hook("transfgu_ray.algorithms", "beartype.beartype")
# Ray and MLflow would otherwise report usage over the network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
torch.set_num_threads(1)
# What a script starts with `&` ignores Ctrl-C, and so would the commands that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads these when it is imported, whichever test is the first to do so. Its socket paths must stay short, which
# pytest's own folders are not; the token stays out of HOME.
_RAY_FOLDER = tempfile.mkdtemp(prefix="r")
_TOKEN = Path(_RAY_FOLDER, "token")
_TOKEN.touch(mode=0o600)
_TOKEN.write_text("a" * 64)
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_TOKEN), RAY_TMPDIR=_RAY_FOLDER)
# On loopback alone, and without what `ray_session` would silence too late.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")
atexit.register(shutil.rmtree, _RAY_FOLDER, ignore_errors=True)


pytest_plugins = ["tests.fixtures"]


@pytest.fixture
def shared_data() -> Path:
    """Photographs that lie beside the project."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project")
    return folder
