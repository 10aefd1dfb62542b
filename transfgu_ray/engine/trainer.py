"""Starting, resuming and watching of trainings under Ray Train."""

import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfgu_ray import errors
from transfgu_ray.background import repeated
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.engine.session import WORKER_CPUS, Resources
from transfgu_ray.engine.signs import Failure, Sign, signs_of_life
from transfgu_ray.engine.stream import unwrapped_errors
from transfgu_ray.errors import (
    ArtifactError,
    CredentialsError,
    DataError,
    StorageError,
    TransfguError,
    UnfinishedError,
    foreign_words,
)
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.torch import TorchTrainer

_STATE = "state.pt"
_RECORD = "checkpoint_manager_snapshot.json"
_LOGGER = logging.getLogger("transfgu_ray")
# How often the same failure may come from the same place before it counts as repeatable.
_LIMIT, _NOT_FINITE_LIMIT = 3, 2


def new_trainer(
    loop: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    *,
    storage: Folder,
    name: str,
    resources: Resources,
    runtime: RuntimeConfig,
) -> "TorchTrainer":
    """Return a data-parallel trainer that resumes what `storage` holds under `name`, even if that had finished.

    It waits for workers that cannot start, and replaces those that are lost, without end: whoever calls it watches
    that it comes further.

    Args:
        loop: function that each worker runs.
        settings: argument of the function.
        storage: where the checkpoints go.
        name: identifies what is trained, so that nothing else is resumed.
        resources: workers and device.
        runtime: how long it waits for workers, how often it replaces them, and whether fewer are enough.

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
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(60 * runtime.start_minutes)
    cuda = resources.device == "cuda"

    class Interruptible(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Keep Python's own Ctrl-C: Ray's handler waits for the workers, which may hang, and exits with 0."""

    # As Any: Ray shows type checkers the signatures of older classes.
    failure_config: Any = FailureConfig
    scaling_config: Any = ScalingConfig
    fewest = min(runtime.min_train_workers or resources.train_workers, resources.train_workers)
    return Interruptible(
        loop,
        train_loop_config=settings,
        torch_config=LoopbackTorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=scaling_config(
            num_workers=(fewest, resources.train_workers) if fewest < resources.train_workers else fewest,
            use_gpu=cuda,
            resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if cuda else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=failure_config(max_failures=runtime.max_failures, controller_failure_limit=-1),
        ),
    )


def recover_torn(run_folder: Folder, name: str) -> str | None:
    """Repair a training whose record of checkpoints is damaged; return the checkpoint that it has to go on from.

    Ray Train writes that record in place; a kill during the write would make every later start fail. Without it Ray
    Train knows of no checkpoint, so the loop gets the furthest one that is whole.

    Args:
        run_folder: holds the training.
        name: of the training's folder.

    Returns:
        The path or URI of the checkpoint, for `latest_state`; None if the record is whole or no checkpoint is.
    """
    record = f"{name}/{_RECORD}"
    if not run_folder.exists(record) or _is_whole(run_folder, name):
        return None
    whole = {}
    for file, _ in list(run_folder.files(name, recursive=True)):
        if file.endswith(f"/{_STATE}"):
            content = io.BytesIO(run_folder.read_bytes(file))
            # What torch raises for a torn file is not documented.
            with suppress(Exception):
                state = torch.load(content, map_location="cpu", weights_only=True)
                whole[tuple(state["position"])] = file.removesuffix(f"/{_STATE}")
    run_folder.delete(record)
    return run_folder.uri_of(whole[max(whole)]) if whole else None


def _is_whole(run_folder: Folder, name: str) -> bool:
    """Return whether the record can be read and the checkpoints that it names are there."""
    try:
        record = run_folder.read_json(f"{name}/{_RECORD}")
        named = [entry["checkpoint_dir_name"] for entry in record["checkpoint_results"]]
    except (ValueError, KeyError, TypeError):
        return False
    return all(run_folder.exists(f"{name}/{each}/{_STATE}") for each in named)


def latest_state(recovered: str | None, rank: int, device: Any = "cpu") -> dict[str, Any] | None:
    """Return the state from which a worker goes on: of Ray Train's last checkpoint, else of a recovered one, else None.

    Args:
        recovered: result of `recover_torn`.
        rank: of the worker; what it alone had reported is under `own`, None if there were fewer workers.
        device: where tensors go.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and recovered is not None:
        folder = Folder(recovered)
        checkpoint = ray.train.Checkpoint(folder.path, folder.fs)
    return None if checkpoint is None else read_state(checkpoint, rank, device)


def read_state(checkpoint: "Checkpoint", rank: int = 0, device: Any = "cpu") -> dict[str, Any]:
    """Return the state that `report_state` saved."""
    with checkpoint.as_directory() as directory:
        state: dict[str, Any] = torch.load(Path(directory) / _STATE, map_location=device, weights_only=True)
        own = Path(directory, _own(rank))
        return state | {"own": torch.load(own, weights_only=True) if own.exists() else None}


def report_state(row: Mapping[str, Any], state: Mapping[str, Any] | None, rank: int = 0, own: Any = None) -> None:
    """Report progress to Ray Train with a checkpoint, as every worker must at the same steps.

    Args:
        row: numbers to report.
        state: of the training, from the first worker: with `position`, which grows; None from the others.
        rank: of the worker.
        own: what this worker alone needs to go on, as tensors and plain Python.
    """
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        if state is not None:
            torch.save(state, Path(directory) / _STATE)
        torch.save(own, Path(directory) / _own(rank))
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _own(rank: int) -> str:
    return f"rank-{rank}.pt"


@contextmanager
def failures_noted(sign: Sign, rank: int, position: Callable[[], tuple[int, ...]]) -> Iterator[None]:
    """Note what ends a worker, so that a start after it knows whether another would only repeat it.

    Ray Train restarts workers whatever ended them. A lost machine, and what the other workers say of it, passes; what
    comes from the data, the settings or the code comes again.

    Args:
        sign: of the training.
        rank: of the worker.
        position: tells how far it is.
    """
    try:
        with unwrapped_errors():
            yield
    except Exception as error:
        sign.fail(rank, _failure(error, position()))
        raise


def _failure(error: Exception, position: tuple[int, ...]) -> Failure:
    kind, words = type(error).__name__, str(error)
    if isinstance(error, TransfguError):
        passes = isinstance(error, StorageError) and not isinstance(error, CredentialsError)
        return Failure(kind, words, (), None if passes else 1)
    # It comes from data or settings, at whichever step.
    if isinstance(error, FloatingPointError):
        return Failure(kind, words, (kind,), _NOT_FINITE_LIMIT)
    # Its words count bytes and name processes.
    own_words = () if isinstance(error, torch.OutOfMemoryError) else (words,)
    return Failure(kind, words, (kind, position, *own_words), _LIMIT)


def run_training(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    *,
    folder: Folder,
    name: str,
    resources: Resources,
    runtime: RuntimeConfig,
    on_sign: Callable[[Mapping[str, float]], None],
    not_finite: str,
    sign_key: str | None = None,
) -> Any:
    """Train below `train/` of a folder, or go on with what is there, and return Ray Train's `Result`.

    Args:
        loop: function that each worker runs; it finds what it needs for `latest_state` and `failures_noted` in its
            settings, under `recovered` and `sign`.
        settings: its other settings.
        folder: that the training belongs to.
        name: see `new_trainer`.
        resources: workers and device.
        runtime: see `new_trainer`.
        on_sign: see `signs_of_life`.
        not_finite: see `fit`.
        sign_key: see `signs_of_life`.

    Raises:
        TransfguError, RuntimeError, UnfinishedError: see `fit`.
    """
    recovered = recover_torn(folder, f"train/{name}")
    with unwrapped_errors(), signs_of_life(on_sign, sign_key) as sign:
        trainer = new_trainer(
            loop,
            settings | {"recovered": recovered, "sign": sign},
            storage=Folder(folder.uri_of("train")),
            name=name,
            resources=resources,
            runtime=runtime,
        )
        return fit(trainer, sign, not_finite)


def fit(trainer: "TorchTrainer", sign: Sign, not_finite: str) -> Any:
    """Train, and raise what ended the training for good, if anything did.

    Args:
        trainer: whose loop notes its failures.
        sign: of the training.
        not_finite: what to do about a loss that is NaN or infinite.

    Returns:
        Ray Train's `Result`.

    Raises:
        TransfguError: data or settings are at fault.
        RuntimeError: the same failure came several times from the same step.
        UnfinishedError: workers were lost more often than allowed.
    """
    from ray.train import TrainingFailedError

    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, FloatingPointError):
                raise DataError(f"{failure}; {not_finite}") from None
        if has_lost_workers(error):
            raise UnfinishedError(
                "the training lost a worker once more than runtime.max_restarts allows: "
                f"{foreign_words(error)}; the same command goes on from its last checkpoint"
            ) from error
        raise
    failure = sign.final_failure()
    if failure is None:
        return result
    if (kind := getattr(errors, failure.kind, None)) is not None:
        raise kind(failure.words)
    if failure.kind == FloatingPointError.__name__:
        raise DataError(f"{failure.words}, and again after a restart from the last checkpoint; {not_finite}")
    raise RuntimeError(f"the training failed {failure.times} times at the same step: {failure.kind}: {failure.words}")


def has_lost_workers(error: Exception) -> bool:
    """Return whether a training ended since processes or machines were lost, not by an exception of its own."""
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    def is_loss(failure: Exception) -> bool:
        # The classes by which Ray Train says that a worker does not answer are private.
        of_ray = isinstance(failure, RayError) or type(failure).__module__.startswith("ray.train.")
        return of_ray and not isinstance(failure, RayTaskError)

    if isinstance(error, WorkerGroupError):
        return any(map(is_loss, error.worker_failures.values()))
    return isinstance(error, ControllerError)


@contextmanager
def watched_json(run_folder: Folder, name: str, on_change: Callable[[Any], None]) -> Iterator[None]:
    """Call `on_change` with the content of a file that workers write, whenever it changes, until the context ends."""
    seen: bytes | None = None
    folder = run_folder.once()

    def check() -> None:
        nonlocal seen
        content = None
        # The file may not exist yet, and a failing storage is reported by the training itself.
        with suppress(OSError, ArtifactError):
            content = folder.read_bytes(name)
        if content is None or content == seen:
            return
        try:
            on_change(json.loads(content))
            seen = content
        # Whatever it is, it must not end the watch: the content comes again.
        except Exception:
            _LOGGER.warning("what %s says could not be passed on; trying again", name, exc_info=True)

    with repeated(check, seconds=1.0, name=f"watch {name}", once_more=True):
        yield
