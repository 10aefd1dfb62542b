"""labels -> model: bootstrapping rounds under Ray Train, all rounds in one fit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.prefetch import num_readers
from transfgu_ray.engine.trainer import read_state, run_training, watched_json
from transfgu_ray.models.model import ModelConfig, save_decoder
from transfgu_ray.models.weights import BACKBONE, backbone_file_sha256
from transfgu_ray.pipeline.concepts import read_concepts
from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.pipeline.train_loop import HISTORY, epoch_steps, model_config, train_loop
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.tracking import runs as tracking

# Names trainings by the layout of their checkpoints, so that none of another is resumed.
_LAYOUT = "rounds-2"
# Keys kept from the manifest of cached tokens.
_OF_TOKENS = ("bytes", "parts", "parts_resumed", "seconds", "peak_memory_mb")


@dataclass(frozen=True)
class TrainResult:
    """The results of training beside the model.

    Attributes:
        history: losses of every epoch.
        peak_memory_mb: peak resident memory of worker 0, MB.
        resumed_at_epoch: epoch at which the workers last started; 0 if they were never restarted.
        resumed_at_step: step of that epoch.
    """

    history: list[dict[str, float]]
    peak_memory_mb: int
    resumed_at_epoch: int
    resumed_at_step: int


def train(
    job: Job,
    model_config: ModelConfig,
    *,
    on_epoch: Callable[[list[dict[str, float]]], None],
    runtime: RuntimeConfig,
    sibling: Run | None = None,
    sign_key: str | None = None,
    trainings: int = 1,
) -> TrainResult:
    """Train, or resume an interrupted training, and write the model.

    Args:
        job: job of a run with a finished bank. Its progress gets a sign of life every few seconds while new steps are
            done.
        model_config: written to the model folder.
        on_epoch: called in this process with the history of all epochs so far, whenever it has grown.
        runtime: how lost workers are replaced; see `new_trainer`.
        sibling: run with another seed and a bank of the same photographs. A second student learns from it, and the
            history gets label-free scores of every epoch; the first student is not affected.
        sign_key: see `signs_of_life`.
        trainings: number that run at once, this one included.

    Raises:
        DataError: losses are NaN or infinite, and again after a restart from the last checkpoint; or a photograph of
            the bank is gone.
        RuntimeError: the same failure came several times from the same step.
    """
    folder, resources = job.folder, job.resources
    # Ray Train resumes whatever it finds under a name, finished or not; so the name identifies what is trained.
    name = f"{_LAYOUT}-{job.fingerprint[:16]}"
    _discard_other_trainings(folder, name)
    settings = {
        "run_uri": folder.uri,
        "config": job.config,
        "model": model_config,
        "threads": resources.threads,
        "num_readers": num_readers(resources, students=1 if sibling is None else 2, trainings=trainings),
        "sibling": sibling and {"run_uri": sibling.folder.uri, "config": sibling.config},
    }
    seen = 0

    def on_change(history: list[dict[str, float]]) -> None:
        # After a failure the history goes back to the last checkpoint.
        nonlocal seen
        if len(history) > seen:
            on_epoch(history)
            seen = len(history)

    with watched_json(folder, HISTORY, on_change):
        result = run_training(
            train_loop,
            settings,
            folder=folder,
            name=name,
            resources=resources,
            runtime=runtime,
            on_sign=lambda _: job.progress(),
            not_finite="lower train.learning_rate, or check these photographs",
            sign_key=sign_key,
        )
    assert result.checkpoint is not None
    state = read_state(result.checkpoint)
    _write_decoders(Folder(folder.uri_of("model")), state["bootstrap"]["bootstrap"], model_config)
    folder.write_json(HISTORY, state["history"])
    return TrainResult(state["history"], state["peak_memory_mb"], state["resumed_at_epoch"], state["resumed_at_step"])


def _discard_other_trainings(folder: Folder, name: str) -> None:
    """Delete what trainings of other names left; the history too, unless training `name` began."""
    files = [path for path, _ in folder.files("train", recursive=True)]
    ours = {path for path in files if path.startswith(f"train/{name}/")}
    for path in files:
        if path not in ours and not (ours and path == HISTORY):
            folder.delete(path)


def _write_decoders(model: Folder, bootstrap: dict[str, Any], model_config: ModelConfig) -> None:
    """Write the student of round 0 and that of the last round, from the state of a bootstrap."""
    # With a single round there is no teacher: the student of round 0 is the result.
    trained = bootstrap["trained"] or bootstrap["student"]
    save_decoder(model, trained, config=model_config, name="decoder_round_0")
    save_decoder(model, bootstrap["student"], config=model_config)


def run_stage(job: StageJob) -> dict[str, Any]:
    """Train the decoder, or import a published one; return the content of the manifest."""
    run, config, resources = job.run, job.config, job.resources
    weights_sha256 = run.require("extract")["weights_sha256"]
    if config.train.decoder_weights is not None:
        from transfgu_ray.pipeline.published_decoder import import_decoder

        return import_decoder(run.folder, config, weights_sha256)
    rounds = config.whole_rounds
    job.progress.expect(sum(rounds))
    kinds, _ = read_concepts(run.folder)
    if job.backbone is not None:
        run.folder.write_bytes(BACKBONE, job.backbone)
    # The manifest of the tokens is deleted with them once this stage is finished, so this one keeps its entries.
    tokens = run.manifest("tokens")
    cached = {} if tokens is None else {"cached_tokens": {name: tokens[name] for name in _OF_TOKENS}}
    reported = 0

    def on_epoch(history: list[dict[str, float]]) -> None:
        nonlocal reported
        job.progress(len(history) - reported)
        reported = len(history)
        log(history)
        if job.trial is not None:
            job.trial.on_epoch(history)

    with tracking.epochs_logged(job.tracked) as log:
        result = train(
            job,
            model_config(config, kinds, weights_sha256),
            on_epoch=on_epoch,
            # A trial that is being stopped must not replace the workers that it loses: Ray's cleaner would not know of
            # the new ones and would never free them. Tune restarts the whole trial instead.
            runtime=config.runtime if job.trial is None else config.runtime.model_copy(update={"max_restarts": 0}),
            sibling=None if job.trial is None else job.trial.sibling,
            sign_key=None if job.trial is None else job.trial.sign_key,
            trainings=1 if job.trial is None else job.trial.concurrent,
        )
    images = run.require("labels")["images"]
    steps, per_worker = epoch_steps(config, images, resources.train_workers)
    unfilled = steps * per_worker * resources.train_workers - images * config.train.epoch_repeats
    return {
        "rows_in": images,
        "rows_out": images,
        "refused": [],
        **cached,
        "peak_memory_mb": result.peak_memory_mb,
        "epochs": len(result.history),
        # Only whole rounds are trained, so the model is the student of the last epoch; no label is looked at.
        "model_epoch": sum(rounds) - 1,
        "model_round": len(rounds) - 1,
        "resumed_at_epoch": result.resumed_at_epoch,
        "resumed_at_step": result.resumed_at_step,
        "steps_per_epoch": steps,
        "images_per_step": per_worker * resources.train_workers,
        "images_repeated_to_fill_an_epoch": max(0, unfilled),
        "images_left_out_of_an_epoch": max(0, -unfilled),
        "train_workers": resources.train_workers,
        "last_losses": result.history[-1],
        "weights_sha256": weights_sha256,
        "backbone_file_sha256": backbone_file_sha256(config.train),
    }
