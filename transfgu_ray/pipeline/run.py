"""The stages in order: what is finished is kept, what is missing is made, and each manifest is written last."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from transfgu_ray.artifacts import STAGES, Run, and_more
from transfgu_ray.backbone import BACKBONE, backbone_file_sha256, resolve_backbone
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import Listing, list_images, open_root
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.pipeline.session import ray_session
from transfgu_ray.pipeline.stages import (
    STAGE_FUNCTIONS,
    Context,
    Trial,
    build_tokens,
    list_labelled,
    list_scored,
    progress_total,
)
from transfgu_ray.pipeline.stream import peak_memory_mb
from transfgu_ray.pipeline.watchdog import unless_stalled
from transfgu_ray.prior import ENCODER, resolve_encoder, weights_file_sha256


class Reporter(Protocol):
    """What the pipeline tells whoever started it."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[..., None]]:
        """Progress of one stage: the context gives a `stream.Progress`."""

    def note(self, text: str) -> None:
        """Says one line."""


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
    root = open_root(config.data)
    listing = list_images(config.data, config.data.benchmark.train_split)
    _check_early(config, listing)
    inputs = _stage_inputs(run, listing)
    fingerprints = {stage: run.fingerprint(stage, inputs[stage]) for stage in STAGES}
    pending = [stage for stage in stages if not _is_current(run, stage, fingerprints[stage], overwrite)]
    _require_before(run, stages[0], fingerprints)
    pending = _discard_damaged(run, stages, pending, reporter)
    if pending:
        # Before anything is started: bad weights and sizes, and missing labels, are told at once.
        weights = _resolve_weights(run, pending)
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


def _resolve_weights(run: Run, pending: Sequence[str]) -> dict[str, Any]:
    """The weights that pending stages start from, as `Context` takes them; labels and sizes are checked beside."""
    config = run.config
    if "extract" in pending:
        list_labelled(config)
    if "evaluate" in pending:
        list_scored(config)
    weights = {
        "encoder": resolve_encoder(config) if "extract" in pending else None,
        "backbone": resolve_backbone(config) if "train" in pending else None,
    }
    if "train" in pending and config.train.decoder_weights is not None:
        from transfgu_ray.pipeline.import_decoder import check_decoder

        check_decoder(config, weights["encoder"] or run.folder.read_bytes(ENCODER))
    return weights


def cache_tokens(run: Run, reporter: Reporter) -> None:
    """Makes the table of cached tokens of a run with a finished bank, for other runs to take over; Ray is running.

    Raises:
        TransfguError: weights, photographs or run folder are unusable.
    """
    root, config = open_root(run.config.data), run.config
    listing = list_images(config.data, config.data.benchmark.train_split)
    inputs = _stage_inputs(run, listing)["train"]
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


def _stage_inputs(run: Run, listing: Listing) -> dict[str, str]:
    """What each stage is made of beside its settings: the photographs, and the weights files that it follows from.

    Where a file is gone, it is what the run recorded.
    """
    encoder = weights_file_sha256(run.config.encoder) or (run.manifest("extract") or {}).get("weights_file_sha256")
    inputs = dict.fromkeys(STAGES, f"{listing.fingerprint} {encoder}")
    train, recorded, own = run.config.train, run.manifest("train") or {}, []
    if train.backbone != "prior":
        own.append(backbone_file_sha256(train) or recorded.get("backbone_file_sha256"))
    if train.decoder_weights is not None:
        from transfgu_ray.pipeline.import_decoder import decoder_sha256

        own.append(decoder_sha256(train.decoder_weights) or recorded.get("imported"))
    for stage in STAGES[STAGES.index("train") :]:
        inputs[stage] = " ".join(map(str, (inputs[stage], *own)))
    return inputs


def _check_early(config: RunConfig, listing: Listing) -> None:
    """Refuses what cannot succeed before anything is computed."""
    from transfgu_ray.algorithms.windows import enumerate_windows

    if config.extract.windows == "ground_truth":
        return
    windows = len(enumerate_windows(*config.data.image_size, config.extract.window_fracs)[0])
    most = windows * len(listing.images)
    if config.num_concepts * config.concepts.min_crops > most:
        raise ConfigError(
            f"concepts.num_concepts={config.num_concepts} is more than the {most} crops that "
            f"{len(listing.images)} photographs give at most; lower it or give more photographs"
        )


@contextlib.contextmanager
def _tracking(run: Run, pending: Sequence[str], trial: Trial | None) -> Iterator[Any]:
    if "register" not in pending:
        yield None
        return
    from transfgu_ray.pipeline import tracking

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
