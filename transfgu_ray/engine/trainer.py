"""Starting, resuming and watching of trainings under Ray Train."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfgu_ray.background import repeated
from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.engine.session import WORKER_CPUS, Resources
from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.torch import TorchTrainer

PULSE = "train/progress.json"
_STATE = "state.pt"
_PULSE_SECONDS = 2.0
# How often a failed training is restarted from its last checkpoint.
MAX_RESTARTS = 2


def new_trainer(
    loop: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    *,
    storage: Folder,
    name: str,
    resources: Resources,
    max_restarts: int = MAX_RESTARTS,
) -> "TorchTrainer":
    """Return a data-parallel trainer that resumes what `storage` holds under `name`, even if that had finished.

    Args:
        loop: function that each worker runs.
        settings: argument of the function.
        storage: where the checkpoints go.
        name: identifies what is trained, so that nothing else is resumed.
        resources: workers and device.
        max_restarts: how often the workers are restarted after one fails.

    Raises:
        ArtifactError: the storage cannot be written.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from transfgu_ray.engine.process_group import LoopbackTorchConfig

    # Ray Train would report a storage that cannot be written as a dead actor.
    storage.write_bytes(f"{name}/.writable", b"")
    divert_ray_loggers()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    cuda = resources.device == "cuda"

    class Interruptible(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Keep Python's own Ctrl-C: Ray's handler waits for the workers, which may hang, and exits with 0."""

    # As Any: Ray shows type checkers the signature of an older class.
    failure_config: Any = FailureConfig
    return Interruptible(
        loop,
        train_loop_config=settings,
        torch_config=LoopbackTorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.train_workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if cuda else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=failure_config(max_failures=max_restarts, controller_failure_limit=3),
        ),
    )


def drop_torn(run_folder: Folder, name: str) -> None:
    """Delete a training whose record of checkpoints is damaged, so that it starts afresh.

    Ray Train writes that record in place; a kill during the write would make every later start fail.
    """
    record = f"{name}/checkpoint_manager_snapshot.json"
    try:
        run_folder.read_json(record)
    except ValueError:
        run_folder.delete(name)


def read_state(checkpoint: "Checkpoint", device: Any = "cpu") -> dict[str, Any]:
    """Return the state that `report_state` saved."""
    with checkpoint.as_directory() as directory:
        state: dict[str, Any] = torch.load(Path(directory) / _STATE, map_location=device, weights_only=True)
        return state


def report_state(row: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
    """Report progress to Ray Train, as every worker must, with a checkpoint of the state where there is one."""
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        saved = None
        if state is not None:
            torch.save(state, Path(directory) / _STATE)
            saved = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(row, checkpoint=saved)


class Pulse:
    """A file with the progress of a training, written at most every few seconds: to be shown, and as a sign of life."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._written = folder, 0.0

    def __call__(self, **content: float) -> None:
        """Write the content, unless it is too soon; call this after each step."""
        if time.monotonic() - self._written >= _PULSE_SECONDS:
            self._folder.write_json(PULSE, content)
            self._written = time.monotonic()


@contextmanager
def watched_json(run_folder: Folder, name: str, on_change: Callable[[Any], None]) -> Iterator[None]:
    """Call `on_change` with the content of a file that workers write, whenever it changes, until the context ends."""
    seen: bytes | None = None

    def check() -> None:
        nonlocal seen
        content = None
        # The file may not exist yet, and a failing storage is reported by the training itself.
        with suppress(OSError, ArtifactError):
            content = run_folder.read_bytes(name)
        if content is not None and content != seen:
            on_change(json.loads(content))
            seen = content

    with repeated(check, seconds=1.0, name=f"watch {name}", once_more=True):
        yield
