"""Set-up that must come before anything imports the package, and fixtures that every suite shares."""

import os
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


@pytest.fixture
def shared_data() -> Path:
    """Photographs that lie beside the project."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project")
    return folder
