"""A sweep: shared stages are run once, then Ray Tune makes one ordinary run folder per point."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transfgu_ray.algorithms.scores.label_free import NUM_MEASURED
from transfgu_ray.config.base import difference, flatten
from transfgu_ray.config.run import NOT_RESULT, RunConfig, build_config
from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.engine.progress import Progress, Reporter
from transfgu_ray.engine.session import ray_session
from transfgu_ray.engine.signs import board
from transfgu_ray.engine.watchdog import unless_stalled
from transfgu_ray.errors import ArtifactError, ConfigError, DataError, StalledError, UnfinishedError
from transfgu_ray.pipeline.inputs import scored_split
from transfgu_ray.reports.sweep_page import write_sweep_report
from transfgu_ray.reports.sweep_tables import best_trial, evidence, failed_trials
from transfgu_ray.storage import Folder
from transfgu_ray.studies.shared import SharedStages
from transfgu_ray.studies.spaces import (
    Range,
    Space,
    assignments,
    grid_points,
    plain_settings,
    plain_space,
    random_points,
)
from transfgu_ray.studies.trials import (
    DRIVER_CPUS,
    ENDED,
    POINT,
    Trials,
    forget_trial,
    run_trial,
    sibling_of,
    trial_ages,
    trial_resources,
)
from transfgu_ray.tracking.client import tracking_uri
from transfgu_ray.tracking.runs import Tracked, ended_on_error
from transfgu_ray.tracking.sweeps import begin_sweep, end_sweep, settle_trials
from transfgu_ray.tracking.waiting import told_of_waits

SWEEP, PAGE = "sweep.json", "sweep.html"
_IDENTITY = "sweep_config.json"
# Settings that the shared stages depend on.
_SHARED_SECTIONS = ("seed", "extract", "concepts", "cam")


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep.

    Attributes:
        space: what varies.
        num_trials: number of points to try; None = all of a grid.
        sampler: `grid`, `random` or `optuna`.
        scheduler: `none`, `asha` or `median`.
        objective: `score`, which needs no labels, or `miou` on the validation photographs.
    """

    space: Space
    num_trials: int | None
    sampler: str
    scheduler: str
    objective: str


@dataclass(frozen=True)
class _Sweep:
    """A sweep: its folder, the configuration its trials change, its plan, its trials and its MLflow run."""

    folder: Folder
    base: RunConfig
    plan: SweepPlan
    trials: Trials
    parent: Tracked


def tune(
    folder: Folder, base: RunConfig, *, plan: SweepPlan, address: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Run every trial that has not ended yet; return the content of sweep.json.

    Args:
        folder: of the sweep.
        base: configuration that the trials change.
        plan: of the sweep.
        address: Ray to use.
        reporter: shows progress.

    Raises:
        TransfguError: settings, data, weights or the folder are unusable.
    """
    _check(base, plan)
    uri = tracking_uri(folder, base)
    base = base.model_copy(update={"tracking": base.tracking.model_copy(update={"uri": uri})})
    identity = _write_identity(folder, base, plan)
    with told_of_waits(uri, reporter.note):
        parent = begin_sweep(folder, base, identity)
    sweep = _Sweep(folder, base, plan, Trials(folder, base), parent)
    with (
        ended_on_error(parent),
        ray_session(address, base.runtime, dashboard=True, note=reporter.note),
    ):
        try:
            _run_missing(sweep, reporter)
        except StalledError as error:
            sweep.trials.interrupt(str(error))
            content = _write(sweep)
            with told_of_waits(parent.uri, reporter.note):
                settle_trials(parent, content["trials"])
            ended = sum(trial["status"] in ENDED for trial in content["trials"])
            raise StalledError(f"{error}; {ended} trials had ended") from None
        content = _write(sweep)
        write_sweep_report(folder, content)
        with told_of_waits(parent.uri, reporter.note):
            settle_trials(parent, content["trials"])
            end_sweep(parent, folder, sweep=content, artifacts=[SWEEP, PAGE])
    return content


def require_ended(uri: str, sweep: Mapping[str, Any]) -> None:
    """Tell a sweep whose trials have ended from one that lacks some.

    Args:
        uri: of the sweep's folder.
        sweep: content of sweep.json.

    Raises:
        DataError: all trials failed, so the settings or the data must be at fault.
        UnfinishedError: some failed, or fewer ended than were asked for.
    """
    failed, asked = failed_trials(sweep), sweep["asked"]
    ended = len(sweep["trials"]) - len(failed)
    if failed and not ended:
        raise DataError(
            f"{uri}: all trials of the sweep failed, the first of {len(failed)} since {failed[0][1]}; the same command "
            "tries them again, other values take another folder"
        )
    # Optuna ends by itself where the space has no more points.
    if failed or (ended < asked and sweep["sampler"] != "optuna"):
        raise UnfinishedError(
            f"{uri}: {ended} of {asked} trials of the sweep ended and {len(failed)} failed; the same command tries the "
            "others again"
        )


def _check(base: RunConfig, plan: SweepPlan) -> None:
    if plan.objective == "score" and base.encoder.weights == "random":
        raise ConfigError(
            "objective score measures all trials with one frozen prior, but encoder.weights=random makes another for "
            "each seed; give --weights, or use --objective miou"
        )
    if plan.objective == "miou" and not base.class_names:
        raise ConfigError(f"objective miou needs labels, but dataset {base.data.dataset} has none; use score")
    if plan.objective == "miou" and plan.scheduler != "none":
        raise ConfigError(
            f"scheduler {plan.scheduler} stops trials by the scores of their epochs, but objective miou is measured "
            "once, at the end; use --objective score or --scheduler none"
        )
    if plan.sampler != "grid" and plan.num_trials is None:
        raise ConfigError(f"sampler {plan.sampler} needs --num-trials; only a grid ends by itself")
    if plan.sampler == "grid" and plan.num_trials is not None:
        raise ConfigError("sampler grid tries every point; leave out --num-trials, or use --sampler random")
    ranges = [key for key in _shared_part(plan.space) if isinstance(plan.space[key], Range)]
    if plan.sampler == "optuna" and ranges:
        raise ConfigError(
            f"{ranges[0]} is a range, for which sampler optuna would make a bank of its own for each trial; give a "
            "list, or use --sampler random"
        )


def _shared_part(space: Space) -> Space:
    return {key: values for key, values in space.items() if key.partition(".")[0] in _SHARED_SECTIONS}


def _write_identity(folder: Folder, base: RunConfig, plan: SweepPlan) -> dict[str, Any]:
    """Write and return what defines the sweep, before anything else.

    Raises:
        ArtifactError: the folder holds another sweep.
    """
    identity = {
        "base": flatten(base.model_dump(mode="json", exclude=NOT_RESULT)),
        "space": plain_space(plan.space),
        "sampler": plan.sampler,
        "scheduler": plan.scheduler,
        "objective": plan.objective,
    }
    data = json.dumps(identity, indent=1).encode()
    if folder.exists(_IDENTITY):
        changes = difference(json.loads(folder.read_bytes(_IDENTITY)), json.loads(data))
        if changes:
            raise ArtifactError(
                f"{folder.uri} holds another sweep ({'; '.join(changes)}); use another folder (for more trials of "
                "the same sweep, raise --num-trials)"
            )
    folder.write_bytes(_IDENTITY, data)
    return identity


def _run_missing(sweep: _Sweep, reporter: Reporter) -> None:
    base, plan, trials = sweep.base, sweep.plan, sweep.trials
    points = _points(plan, base.seed)
    if points is None:
        shared = grid_points(_shared_part(plan.space))
        missing = (plan.num_trials or 0) - len(trials.ended)
    else:
        points = shared = [point for point in points if trials.id_of(point) not in trials.ended]
        missing = len(points)
    if missing <= 0:
        return
    configs = _with_siblings([build_config(base, None, assignments(point)) for point in shared], plan)
    stages = SharedStages(sweep.folder, base)
    stages.make(configs, reporter)
    with (
        reporter.stage("trials", missing, "trials") as show,
        unless_stalled("the sweep", base.runtime.stall_minutes, show, trial_ages) as progress,
    ):
        # Made here, so that it outlives the trials.
        board()
        _tune(sweep, points, num_trials=missing, progress=progress)
    stages.drop_tokens(configs)


def _points(plan: SweepPlan, seed: int) -> list[dict[str, Any]] | None:
    """Return all points of a sweep; None where Optuna chooses them on the way."""
    if plan.sampler == "optuna":
        return None
    return grid_points(plan.space) if plan.sampler == "grid" else random_points(plan.space, plan.num_trials or 0, seed)


def _with_siblings(configs: list[RunConfig], plan: SweepPlan) -> list[RunConfig]:
    """Return the trials and, for objective score, the runs of another seed that it compares them with."""
    return [*configs, *(map(sibling_of, configs) if plan.objective == "score" else ())]


def _tune(sweep: _Sweep, points: list[dict[str, Any]] | None, *, num_trials: int, progress: Progress) -> None:
    """Run Ray Tune over the points, or over what Optuna suggests where they are None."""
    folder, base, plan, trials = sweep.folder, sweep.base, sweep.plan, sweep.trials
    # Tune must not log or print, and Ctrl-C must end the whole sweep.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from ray import tune as ray_tune

    from transfgu_ray.studies.search import Ended, NewPoints, new_scheduler, to_text

    # Into the log: the terminal gets the reason of each failed trial in one sentence.
    divert_ray_loggers()

    def on_end(point: dict[str, Any], otherwise: str) -> None:
        trials.end(point, otherwise)
        forget_trial(trials.id_of(point))
        _write(sweep)
        progress(1)

    resources, concurrent = trial_resources(base)
    settings = {
        "folder": folder.uri,
        "base": resources,
        "parent": sweep.parent,
        "objective": plan.objective,
        "concurrent": concurrent,
    }
    epochs = sum(base.whole_rounds)
    if points is None:
        search = NewPoints(plan.space, base.seed, metric=plan.objective, **trials.for_search(plan.objective))
        space, num_samples = {}, num_trials
    else:
        search, num_samples = None, 1
        space = {POINT: ray_tune.grid_search([to_text(point) for point in points])}
    folder.delete("tune")
    # Its own handler of Ctrl-C would return as if the trials had ended.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(run_trial, settings=settings), {"CPU": DRIVER_CPUS}),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=plan.objective,
            mode="max",
            search_alg=search,
            scheduler=new_scheduler(plan.scheduler, epochs),
            num_samples=num_samples,
            max_concurrent_trials=concurrent,
            # Saves starting a process per trial; a stopped trial's process must end, to free the CPUs of its training.
            reuse_actors=plan.scheduler == "none",
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=folder.path,
            storage_filesystem=folder.fs,
            verbose=0,
            callbacks=[Ended(on_end, progress)],
            # Of trials whose training lost workers; others do not raise what ended them.
            failure_config=ray_tune.FailureConfig(max_failures=base.runtime.max_failures),
        ),
    ).fit()
    # The folders of the trials hold everything that is needed.
    folder.delete("tune")


def _write(sweep: _Sweep) -> dict[str, Any]:
    """Bring sweep.json up to date; return its content."""
    folder, base, plan = sweep.folder, sweep.base, sweep.plan
    found = sweep.trials.describe()
    configs = _with_siblings([sweep.trials.config(trial["point"]) for trial in found], plan)
    proof = evidence(found)
    points = _points(plan, base.seed)
    of_score = (proof or {}).get("score", {})
    content = {
        "name": folder.uri.rstrip("/").rpartition("/")[2],
        "preset": base.preset,
        "dataset": base.data.dataset,
        "split": scored_split(base),
        "objective": plan.objective,
        "sampler": plan.sampler,
        "scheduler": plan.scheduler,
        "seed": base.seed,
        "num_photos_probed": NUM_MEASURED,
        "space": plain_settings(plan.space),
        "asked": plan.num_trials if points is None else len(points),
        "base": flatten(base.model_dump(mode="json")),
        "shared": SharedStages(folder, base).describe(configs),
        "trials": found,
        "spearman": of_score.get("spearman"),
        "regret_miou": of_score.get("regret_miou"),
        "evidence": proof,
        "best": best_trial(found, plan.objective),
    }
    folder.write_json(SWEEP, content)
    return content
