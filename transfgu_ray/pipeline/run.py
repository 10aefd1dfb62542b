"""The stages in order: what is finished is kept, what is missing is made, and each manifest is written last."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transfgu_ray.datasets.listing import Listing, open_root
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.engine.session import ray_session
from transfgu_ray.engine.stream import peak_memory_mb
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.errors import ArtifactError
from transfgu_ray.models.weights import (
    BACKBONE,
    resolve_backbone,
)
from transfgu_ray.pipeline import concepts as concepts_stage
from transfgu_ray.pipeline import evaluate as evaluate_stage
from transfgu_ray.pipeline import features as features_stage
from transfgu_ray.pipeline import labels as labels_stage
from transfgu_ray.pipeline import pages as pages_stage
from transfgu_ray.pipeline import register as register_stage
from transfgu_ray.pipeline import train as train_stage
from transfgu_ray.pipeline.context import Context, Trial
from transfgu_ray.pipeline.inputs import check_early, list_scored, list_training, resolve_weights, stage_inputs
from transfgu_ray.pipeline.tokens import build_tokens
from transfgu_ray.runs.run import Run, and_more
from transfgu_ray.runs.stages import STAGES


def progress_total(run: Run, stage: str, listing: Listing) -> tuple[int, str]:
    """How many items a stage works through, and what they are."""
    if stage in ("extract", "labels"):
        return len(listing.images), "photographs"
    if stage == "train" and run.config.train.decoder_weights is not None:
        return 1, "decoder"
    if stage == "train":
        epochs = sum(run.config.train.round_epochs)
        if run.config.train.features == "live":
            return epochs, "epochs"
        # Their tokens first, then every epoch.
        return (1 + epochs) * len(listing.images), "photographs"
    if stage == "evaluate":
        scored = list_scored(run.config)
        shown = min(run.config.evaluate.num_samples, len(listing.images))
        if scored is None:
            return shown, "photographs"
        from transfgu_ray.pipeline.baselines import chosen_photos

        return len(scored.images) + len(chosen_photos(run.config, listing.images)), "photographs"
    return 1, "step"


STAGE_FUNCTIONS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "extract": features_stage.run_stage,
    "concepts": concepts_stage.run_stage,
    "labels": labels_stage.run_stage,
    "train": train_stage.run_stage,
    "evaluate": evaluate_stage.run_stage,
    "report": pages_stage.run_stage,
    "register": register_stage.run_stage,
}


def run_stages(
    run: Run,
    stages: Sequence[str],
    address: str | None,
    reporter: Reporter,
    overwrite: bool = False,
    trial: Trial | None = None,
) -> dict[str, dict[str, Any]]:
    """Brings the named stages up to date and returns their manifests.

    A stage finished with the same settings and input is left alone, after its files were held against what it wrote:
    damaged ones are made again. MLflow records the call when it includes `register`, the last stage of a whole run.

    Args:
        run: run folder and configuration.
        stages: neighbours, in order.
        address: Ray to use.
        reporter: progress.
        overwrite: make again what was made with other settings.
        trial: what a sweep wants of the run.

    Raises:
        TransfguError: settings, data, weights or run folder are unusable.
    """
    config = run.config
    root = open_root(config.data.root)
    listing = list_training(config)
    check_early(config, listing)
    inputs = stage_inputs(run, listing)
    fingerprints = {stage: run.fingerprint(stage, inputs[stage]) for stage in STAGES}
    pending = [stage for stage in stages if not _is_current(run, stage, fingerprints[stage], overwrite)]
    _require_before(run, stages[0], fingerprints)
    pending = _discard_damaged(run, stages, pending, reporter)
    if pending:
        # Before anything is started: bad weights and sizes, and missing labels, are told at once.
        weights = resolve_weights(run, pending)
        with _tracking(run, pending, trial) as tracked, ray_session(address, config.runtime) as resources:
            for stage in pending:
                context = Context(
                    run,
                    root,
                    listing,
                    resources,
                    fingerprints[stage],
                    inputs[stage],
                    **weights,
                    tracked=tracked,
                    trial=trial,
                    progress=lambda *_, **__: None,
                )
                same_again = _run_stage(context, stage, reporter)
                if not same_again:
                    reporter.note(f"{stage}: other bytes than before, so the stages after it are made again too")
                    break
        if not same_again:
            return run_stages(run, stages, address, reporter, overwrite, trial)
    return {stage: run.require(stage) for stage in stages}


def _require_before(run: Run, first: str, fingerprints: Mapping[str, str]) -> None:
    """Refuses to go on from stages that were made of something else."""
    for stage in STAGES[: STAGES.index(first)]:
        manifest = run.require(stage)
        if manifest["fingerprint"] != fingerprints[stage] or manifest.get("names_sha256") != run.names_sha256(stage):
            raise ArtifactError(
                f"stage {stage} of {run.folder.uri} was made with other settings, photographs or names; run "
                f"`transfgu {stage} {run.folder.uri} --overwrite` first"
            )


def cache_tokens(run: Run, reporter: Reporter) -> None:
    """Makes the table of cached tokens of a run with a finished bank, for other runs to take over; Ray is running.

    Raises:
        TransfguError: weights, photographs or run folder are unusable.
    """
    root, config = open_root(run.config.data.root), run.config
    listing = list_training(config)
    inputs = stage_inputs(run, listing)["train"]
    backbone = resolve_backbone(config)
    if backbone is not None:
        run.folder.write_bytes(BACKBONE, backbone)
    with (
        ray_session(None, config.runtime) as resources,
        reporter.stage("tokens", len(listing.images), "photographs") as progress,
    ):
        context = Context(
            run,
            root,
            listing,
            resources,
            run.fingerprint("train", inputs),
            inputs,
            encoder=None,
            backbone=None,
            tracked=None,
            trial=None,
            progress=progress,
        )
        build_tokens(context)


def _is_current(run: Run, stage: str, fingerprint: str, overwrite: bool) -> bool:
    manifest = run.manifest(stage)
    if manifest is None:
        return False
    if manifest["fingerprint"] == fingerprint:
        # Other names change what is told of the masks, not the masks: nothing that was segmented is cleared.
        return manifest.get("names_sha256") == run.names_sha256(stage)
    if not overwrite:
        raise ArtifactError(
            f"stage {stage} of {run.folder.uri} was made with other settings or photographs; use another run folder, "
            "or --overwrite to compute it again"
        )
    run.clear(stage)
    return False


def _discard_damaged(run: Run, stages: Sequence[str], pending: Sequence[str], reporter: Reporter) -> list[str]:
    """The pending stages, and with them those of the named ones whose files are no longer what they wrote.

    Raises:
        ArtifactError: a file of a stage before the named ones is damaged.
    """
    wanted = []
    for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
        if stage not in stages:
            run.require_whole(stage)
            continue
        damaged = [] if stage in pending else run.damaged_files(stage)
        if damaged:
            reporter.note(
                f"{stage}: {damaged[0]}{and_more(damaged)}: damaged or deleted since they were written, made again"
            )
            run.discard(stage, damaged)
        if damaged or stage in pending:
            wanted.append(stage)
    return wanted


@contextlib.contextmanager
def _tracking(run: Run, pending: Sequence[str], trial: Trial | None) -> Iterator[Any]:
    if "register" not in pending:
        yield None
        return
    from transfgu_ray.tracking import runs as tracking

    tracked = tracking.begin(run.folder, run.config, trial and trial.parent)
    with tracking.ended_on_error(tracked):
        yield tracked


def _run_stage(context: Context, stage: str, reporter: Reporter) -> bool:
    """Runs a stage and writes its manifest; False where it was mended, but its files are not the same again."""
    started = time.perf_counter()
    total, unit = progress_total(context.run, stage, context.listing)
    minutes = context.run.config.runtime.stall_minutes
    with (
        reporter.stage(stage, total, unit) as show,
        unless_stalled(f"stage {stage}", minutes, show) as progress,
    ):
        content = STAGE_FUNCTIONS[stage](replace(context, progress=progress))
    seconds = time.perf_counter() - started
    manifest = context.run.write_manifest(
        stage,
        context.fingerprint,
        {
            **content,
            "seconds": round(seconds, 3),
            "items_per_second": round(content["rows_in"] / seconds, 3),
            "peak_memory_mb": max(peak_memory_mb(), content.get("peak_memory_mb", 0)),
            "num_workers": context.resources.num_workers,
            "device": context.resources.device,
            "input_fingerprint": context.inputs,
        },
    )
    return manifest.get("same_again", True)
