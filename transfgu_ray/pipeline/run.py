"""The runner of stages: finished ones are kept, missing ones are run in order, and each manifest is written last."""

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transfgu_ray.datasets.listing import open_root
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.engine.session import ray_session
from transfgu_ray.engine.stream import peak_memory_mb
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.errors import ArtifactError
from transfgu_ray.pipeline.context import StageJob, Trial
from transfgu_ray.pipeline.inputs import check_early, list_training, resolve_weights, stage_inputs
from transfgu_ray.runs.logs import logged_stage
from transfgu_ray.runs.references import drop_references, table_folder
from transfgu_ray.runs.run import Run, and_more
from transfgu_ray.runs.stages import STAGES, Stage
from transfgu_ray.tracking import runs as tracking
from transfgu_ray.tracking.client import answering, tracking_uri
from transfgu_ray.tracking.runs import Tracked
from transfgu_ray.tracking.waiting import told_of_waits

_LOGGER = logging.getLogger("transfgu_ray")


def run_stages(
    run: Run,
    stages: Sequence[str],
    *,
    address: str | None,
    reporter: Reporter,
    overwrite: bool = False,
    trial: Trial | None = None,
) -> dict[str, dict[str, Any]]:
    """Bring stages up to date and return the manifests of those that last.

    A stage finished with the same settings and input is kept. Its files are compared with their checksums, and
    damaged ones are made again. If their new bytes are others, what was made of the old ones stays, but the call ends
    with an error unless it may overwrite. MLflow records the call if it includes `register`, the last stage of a whole
    run.

    Args:
        run: run folder and configuration.
        stages: consecutive stages, in order; stages that feed one of them are run with it.
        address: address of the Ray cluster; None = start a local one.
        reporter: shows progress.
        overwrite: run stages again that were finished with other settings or made of other files.
        trial: what a sweep needs of the run.

    Raises:
        TransfguError: settings, data, weights or run folder are unusable, or a stage was made of other files.
    """
    config = run.config
    root = open_root(config.data.root)
    listing = list_training(config)
    check_early(config, listing)
    inputs = stage_inputs(run, listing)
    fingerprints = {stage: run.fingerprint(stage, inputs[stage]) for stage in STAGES.names}
    pending = {
        stage
        for stage in stages
        if STAGES[stage].feeds is None
        and not _is_current(run, stage, fingerprint=fingerprints[stage], overwrite=overwrite)
    }
    _require_before(run, stages[0], fingerprints)
    pending |= _clear_outdated(run, stages, pending=pending, overwrite=overwrite)
    pending |= _discard_damaged(run, stages, pending=pending, reporter=reporter)
    to_make = _to_make(run, stages, pending, fingerprints)
    outdated: set[str] = set()
    if to_make:
        # Before Ray starts, so that bad weights or sizes and missing labels are reported at once.
        weights = resolve_weights(run, to_make)
        with (
            _tracked(run, to_make, trial, reporter.note) as tracked,
            ray_session(address, config.runtime, note=reporter.note) as resources,
        ):
            for stage in to_make:
                job = StageJob(
                    folder=run.folder,
                    config=config,
                    root=root,
                    resources=resources,
                    fingerprint=fingerprints[stage],
                    run=run,
                    listing=listing,
                    inputs=inputs[stage],
                    encoder=weights.encoder,
                    backbone=weights.backbone,
                    tracked=tracked,
                    trial=trial,
                )
                with _waits_told(stage, tracked, reporter.note):
                    is_same = _run_stage(STAGES[stage], job, reporter)
                if not is_same:
                    reporter.note(f"{stage}: rebuilt with other content than before")
                if outdated := _clear_outdated(run, stages, pending=pending, overwrite=overwrite):
                    break
        if outdated:
            return run_stages(run, stages, address=address, reporter=reporter, overwrite=overwrite, trial=trial)
    return {stage: run.require(stage) for stage in stages if STAGES[stage].feeds is None}


def _to_make(run: Run, stages: Sequence[str], pending: set[str], fingerprints: Mapping[str, str]) -> list[str]:
    """Return the stages to run, in order: pending ones, their feeders, and named feeders of unfinished stages.

    Feeders that another run has finished for this one are left out.
    """
    wanted = set(pending)
    for stage in STAGES:
        if stage.feeds is None or not stage.is_wanted(run.config):
            continue
        is_fed_later = stage.name in stages and run.manifest(stage.feeds) is None
        if (stage.feeds in pending or is_fed_later) and not _is_shared(run, stage, fingerprints[stage.name]):
            wanted.add(stage.name)
    return [name for name in STAGES.names if name in wanted]


def _is_shared(run: Run, stage: Stage, fingerprint: str) -> bool:
    """Return whether another run holds the table of a stage for this one, with the same settings and input."""
    holder = table_folder(run.folder, stage.outputs[0])
    manifest = None if holder is run.folder else Run(holder, run.config).manifest(stage.name)
    return manifest is not None and manifest["fingerprint"] == fingerprint


def _require_before(run: Run, first: str, fingerprints: Mapping[str, str]) -> None:
    """Refuse to continue from earlier stages that were run with other settings or input.

    Raises:
        ArtifactError: an earlier stage is unfinished or out of date.
    """
    for stage in STAGES.before(first):
        if STAGES[stage].feeds is not None:
            continue
        manifest = run.require(stage)
        if manifest["fingerprint"] != fingerprints[stage] or manifest.get("names_sha256") != run.names_sha256(stage):
            raise ArtifactError(
                f"stage {stage} of {run.folder.uri} was made with other settings, photographs or names; run "
                f"`{shlex.join(['transfgu', stage, run.folder.uri, '--overwrite'])}` first"
            )


def _is_current(run: Run, stage: str, *, fingerprint: str, overwrite: bool) -> bool:
    manifest = run.manifest(stage)
    if manifest is None:
        return False
    if manifest["fingerprint"] == fingerprint:
        # Other names change the scores, not the masks: keep everything that was segmented.
        return manifest.get("names_sha256") == run.names_sha256(stage)
    if not overwrite:
        raise ArtifactError(
            f"stage {stage} of {run.folder.uri} was made with other settings or photographs; use another run folder, "
            "or --overwrite to compute it again"
        )
    run.clear(stage)
    return False


def _clear_outdated(run: Run, stages: Sequence[str], *, pending: set[str], overwrite: bool) -> set[str]:
    """Delete named stages that were made of other files than the stages before them have now; return their names.

    Raises:
        ArtifactError: there are some, but they may not be overwritten or come before the named stages.
    """
    for stage in (*STAGES.before(stages[-1]), stages[-1]):
        if stage not in STAGES.lasting or stage in pending or (changed := run.changed_before(stage)) is None:
            continue
        if stage not in stages or not overwrite:
            command = ["transfgu", "run" if {*STAGES.lasting} <= {*stages} else stage, run.folder.uri, "--overwrite"]
            raise ArtifactError(
                f"stage {stage} of {run.folder.uri} was made of other files than stage {changed} has since it was made "
                "again; everything is kept and a model can be used as before, but to go on, make stage "
                f"{stage} again with `{shlex.join(command)}`, or restore {changed}.json, "
                f"{changed}.files.json and the files that it lists from a copy"
            )
        for later in STAGES.after(changed):
            # Cached tokens and half a training are of the former files too.
            if later in stages or later not in STAGES.lasting or run.manifest(later) is None:
                run.clear(later)
        return {later for later in STAGES.after(changed) if later in stages and later in STAGES.lasting}
    return set()


def _discard_damaged(run: Run, stages: Sequence[str], *, pending: set[str], reporter: Reporter) -> set[str]:
    """Delete the damaged files of the named stages; return the stages that had any.

    Raises:
        ArtifactError: a file of a stage before the named ones is damaged.
    """
    found = set()
    for stage in (*STAGES.before(stages[-1]), stages[-1]):
        if STAGES[stage].feeds is not None or stage in pending:
            continue
        if stage not in stages:
            run.require_whole(stage)
        elif damaged := run.damaged_files(stage):
            reporter.note(f"{stage}: {damaged[0]}{and_more(damaged)}: damaged or deleted after writing; rebuilding")
            run.discard(stage, damaged)
            found.add(stage)
    return found


@contextlib.contextmanager
def _tracked(
    run: Run, to_make: Sequence[str], trial: Trial | None, note: Callable[[str], None]
) -> Iterator[Tracked | None]:
    if "register" not in to_make:
        yield None
        return
    with told_of_waits(tracking_uri(run.folder, run.config), note):
        tracked = tracking.begin(run.folder, run.config, None if trial is None else trial.parent)
    # The sweep settles its trials: one that Tune stops would call itself failed, at any later time.
    with tracking.ended_on_error(tracked) if trial is None else answering(tracked.uri):
        yield tracked


def _waits_told(
    stage: str, tracked: Tracked | None, note: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Tell of the waits for MLflow in the stage that lasts as long as they do."""
    if tracked is None or stage != "register":
        return contextlib.nullcontext()
    return told_of_waits(tracked.uri, note)


def _run_stage(stage: Stage, job: StageJob, reporter: Reporter) -> bool:
    """Run a stage and write its manifest; return False if rebuilt files differ from those before the damage."""
    started = time.perf_counter()
    # What is made from here on is the run's own.
    drop_references(job.folder, stage.outputs)
    with (
        logged_stage(stage.name),
        reporter.stage(stage.name, None, stage.unit) as show,
        unless_stalled(f"stage {stage.name}", job.config.runtime.stall_minutes, show) as progress,
    ):
        content = stage.function(replace(job, progress=progress))
    seconds = time.perf_counter() - started
    _LOGGER.info("%s: %d rows in, %d out, %.1f s", stage.name, content["rows_in"], content["rows_out"], seconds)
    manifest = job.run.write_manifest(
        stage.name,
        job.fingerprint,
        {
            **content,
            "seconds": round(seconds, 3),
            "items_per_second": round(content["rows_in"] / seconds, 3),
            "peak_memory_mb": max(peak_memory_mb(), content.get("peak_memory_mb", 0)),
            "num_workers": job.resources.num_workers,
            "device": job.resources.device,
            "input_fingerprint": job.inputs,
        },
    )
    for used_up in STAGES.feeders(stage.name):
        job.run.clear(used_up)
    return bool(manifest.get("same_again", True))
