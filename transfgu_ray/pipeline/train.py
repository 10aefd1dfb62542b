"""labels -> model: bootstrapping rounds under Ray Train, all rounds in one fit."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import unwrapped_errors
from transfgu_ray.engine.trainer import PULSE, drop_torn, new_trainer, read_state, watched_json
from transfgu_ray.models.model import ModelConfig, save_decoder
from transfgu_ray.models.weights import BACKBONE, backbone_file_sha256
from transfgu_ray.pipeline.context import Context
from transfgu_ray.pipeline.samples import TOKENS
from transfgu_ray.pipeline.tokens import build_tokens
from transfgu_ray.pipeline.train_loop import HISTORY, STUMBLE, train_loop
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder


@dataclass(frozen=True)
class TrainResult:
    """What training left beside the model.

    Attributes:
        history: losses of every epoch.
        peak_memory_mb: peak resident memory of worker 0, MB.
        resumed_at_epoch: epoch that the last start of the workers began with; 0 if it was the first.
    """

    history: list[dict[str, float]]
    peak_memory_mb: int
    resumed_at_epoch: int


def train(
    run: Folder,
    config: RunConfig,
    model_config: ModelConfig,
    fingerprint: str,
    resources: Resources,
    on_epoch: Callable[[list[dict[str, float]]], None],
    on_pulse: Callable[[dict[str, float]], None],
    max_restarts: int,
    sibling: Run | None = None,
) -> TrainResult:
    """Trains, or continues an interrupted training, and writes the model.

    Args:
        run: the run folder.
        config: its configuration.
        model_config: goes into the model folder.
        fingerprint: of the stage.
        resources: workers and device.
        on_epoch: called in this process with the history of all epochs so far, whenever there is more of it.
        on_pulse: called in this process every few seconds in which steps are done, with the last `epoch` and `step`.
        max_restarts: how often the workers are started again where one fails.
        sibling: run of another seed with a bank of the same photographs. A second student learns from it, and the
            history tells what both of an epoch are worth without labels; the first student is not touched by it.
    """
    # Ray Train continues whatever it finds under a name, finished or not; so the name says what is trained.
    name = f"rounds-{fingerprint[:16]}"
    files = [path for path, _ in run.files("train", recursive=True)]
    ours = {path for path in files if path.startswith(f"train/{name}/")}
    for path in files:
        if path not in ours and not (ours and path in (HISTORY, STUMBLE)):
            run.delete(path)
    drop_torn(run, f"train/{name}")
    settings = {
        "run_uri": run.uri,
        "config": config.model_dump(mode="json"),
        "model": asdict(model_config),
        "threads": resources.threads,
        # Two students read for themselves.
        "num_readers": max(1, resources.num_cores // resources.train_workers // (1 if sibling is None else 2)),
        "sibling": sibling and {"run_uri": sibling.folder.uri, "config": sibling.config.model_dump(mode="json")},
    }
    trainer = new_trainer(train_loop, settings, Folder(run.uri_of("train")), name, resources, max_restarts)
    seen = 0

    def on_change(history: list[dict[str, float]]) -> None:
        # After a failure the history starts again at a checkpoint.
        nonlocal seen
        if len(history) > seen:
            on_epoch(history)
            seen = len(history)

    with unwrapped_errors(), watched_json(run, HISTORY, on_change), watched_json(run, PULSE, on_pulse):
        result = trainer.fit()
    state = read_state(result.checkpoint)
    model = Folder(run.uri_of("model"))
    trained = state["bootstrap"]["trained"]
    # A single round has no teacher: what round 0 learned is the result.
    save_decoder(model, trained or state["bootstrap"]["student"], model_config, "decoder_round_0")
    save_decoder(model, state["bootstrap"]["student"], model_config)
    run.write_bytes(HISTORY, json.dumps(state["history"], indent=1).encode())
    # Large, or of no use to a finished run.
    for name in (TOKENS, PULSE):
        run.delete(name)
    return TrainResult(state["history"], state["peak_memory_mb"], state["resumed_at_epoch"])


def run_stage(context: Context) -> dict[str, Any]:
    """Train the decoder, or import a published one; return what the manifest says of it."""
    from transfgu_ray.algorithms.rounds.schedule import steps_per_epoch
    from transfgu_ray.engine.trainer import MAX_RESTARTS
    from transfgu_ray.pipeline.concepts import read_concepts
    from transfgu_ray.pipeline.train_loop import model_config
    from transfgu_ray.tracking import runs as tracking

    run, config, resources = context.run, context.run.config, context.resources
    weights_sha256 = run.require("extract")["weights_sha256"]
    if config.train.decoder_weights is not None:
        from transfgu_ray.pipeline.published_decoder import import_decoder

        context.progress(1)
        return import_decoder(run.folder, config, weights_sha256)
    kinds, _ = read_concepts(run.folder)
    if context.backbone is not None:
        run.folder.write_bytes(BACKBONE, context.backbone)
    cached, items_an_epoch, peak_mb = {}, 1, 0
    if config.train.features == "cached":
        cached["cached_tokens"], peak_mb = build_tokens(context)
        items_an_epoch = len(context.listing.images)
    reported = 0

    def on_epoch(history: list[dict[str, float]]) -> None:
        nonlocal reported
        context.progress((len(history) - reported) * items_an_epoch)
        reported = len(history)
        if context.tracked is not None:
            tracking.log_epochs(context.tracked, history)
        if context.trial is not None:
            context.trial.on_epoch(history)

    result = train(
        run.folder,
        config,
        model_config(config, kinds, weights_sha256),
        context.fingerprint,
        resources,
        on_epoch,
        lambda pulse: context.progress(0),
        # A trial that is stopped in the middle must not take new workers for those that it loses: whoever should free
        # them has not yet heard of them. Tune starts it again instead.
        MAX_RESTARTS if context.trial is None else 0,
        context.trial and context.trial.sibling,
    )
    images = run.require("labels")["images"]
    visits = images * config.train.epoch_repeats
    steps, per_worker = steps_per_epoch(visits, config.train.batch_size, resources.train_workers)
    return {
        "rows_in": images,
        "rows_out": images,
        "refused": [],
        **cached,
        "peak_memory_mb": max(result.peak_memory_mb, peak_mb),
        "epochs": len(result.history),
        "resumed_at_epoch": result.resumed_at_epoch,
        "steps_per_epoch": steps,
        "images_per_step": per_worker * resources.train_workers,
        "images_repeated_to_fill_an_epoch": steps * per_worker * resources.train_workers - visits,
        "train_workers": resources.train_workers,
        "last_losses": result.history[-1],
        "weights_sha256": weights_sha256,
        "backbone_file_sha256": backbone_file_sha256(config.train),
    }
