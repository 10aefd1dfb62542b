"""Trials of a sweep: run folders named by their settings, and the status of each."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from transfgu_ray.algorithms.scores.label_free import COMPONENTS
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.engine.progress import Progress, SilentReporter
from transfgu_ray.engine.session import READER_CPUS, WORKER_CPUS, ray_session
from transfgu_ray.engine.signs import Sign, ages, board
from transfgu_ray.engine.start import is_started_here
from transfgu_ray.errors import ConfigError, TransfguError, UnfinishedError, foreign_words
from transfgu_ray.pipeline.context import Trial
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.logs import kept_log
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.studies.shared import SharedStages
from transfgu_ray.studies.spaces import assignments
from transfgu_ray.tracking.runs import RECORD

# Names a trial on the board of signs of life; what it trains has a name of its own there.
_SIGN, _TRAINING = "trial ", "training of trial "
# CPUs of a trial's own process, which only waits for others.
DRIVER_CPUS = 0.1
TRIAL_STAGES = STAGES.lasting[STAGES.lasting.index("train") :]
# Trials take a point as text, since Tune would search its lists for values to vary.
POINT = "point"
# What is not run again.
ENDED = ("finished", "stopped")
# Far from the seeds that users choose.
_SIBLING_SEED = 1_000_000


def sibling_of(config: RunConfig) -> RunConfig:
    """Return the same settings with another seed, and so other concepts, another bank and another student."""
    concepts = config.concepts.model_copy(update={"seed": None})
    return config.model_copy(update={"seed": config.seed + _SIBLING_SEED, "concepts": concepts})


def trial_resources(base: RunConfig) -> tuple[RunConfig, int]:
    """Return the configuration with the workers of a single trial, and how many trials run at a time.

    The drivers and workers of all these trials and a reading task of each fit into Ray's CPUs and GPUs at once, since
    trials that wait for each other would never end.

    Raises:
        ConfigError: a local Ray never has room for a single one.
    """
    import ray

    with ray_session(None, base.runtime) as resources:
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray annotates no return
    train_workers = resources.train_workers
    cores = resources.num_cores // resources.threads
    if resources.device == "cuda":
        concurrent = max(1, int(total["GPU"]) // train_workers)
    else:
        need = DRIVER_CPUS + train_workers * WORKER_CPUS + READER_CPUS
        if need > total["CPU"] and is_started_here():
            raise ConfigError(
                f"a trial with runtime.train_workers={train_workers} takes {need:g} CPUs, more than the "
                f"{total['CPU']:g} of this Ray, and it stays so small; ask for fewer, or name a cluster by "
                "--ray-address"
            )
        concurrent = max(1, min(cores // train_workers, int(total["CPU"] / need)))
    # Fixed, so that no trial goes on with CPUs while a node with GPUs is being replaced.
    fixed = {"num_workers": train_workers, "train_workers": train_workers, "device": resources.device}
    runtime = base.runtime.model_copy(update=fixed)
    return base.model_copy(update={"runtime": runtime}), concurrent


class Trials:
    """The trials of a sweep's folder.

    Args:
        folder: of the sweep.
        base: configuration that the trials change.
    """

    def __init__(self, folder: Folder, base: RunConfig) -> None:
        self._folder = folder
        self._base = base
        self._described: dict[str, dict[str, Any]] = {}

    @cached_property
    def _notes(self) -> dict[str, dict[str, Any]]:
        return self._read_notes()

    def _read_notes(self) -> dict[str, dict[str, Any]]:
        """Return the note on each trial by its id, in the order of ids."""
        names = [name for name, _ in self._folder.files("trials") if name.endswith(".json")]
        return {name.removeprefix("trials/").removesuffix(".json"): self._folder.read_json(name) for name in names}

    @property
    def ended(self) -> set[str]:
        """Ids of the trials that finished or were stopped; failed ones are run again."""
        return {name for name, note in self._notes.items() if note["status"] in ENDED}

    def config(self, point: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of a trial."""
        return build_config(self._base, None, assignments(point))

    def id_of(self, point: Mapping[str, Any]) -> str:
        """Return sixteen hex digits that name a trial by its settings."""
        return Run(self._folder, self.config(point)).settings_key("evaluate")

    def folder_of(self, name: str) -> Folder:
        """Return the run folder of a trial."""
        return Folder(self._folder.uri_of(f"trials/{name}"))

    def interrupt(self, words: str) -> None:
        """Note that every trial that still runs failed, after the sweep was stopped.

        Args:
            words: why; the trials that they name are at fault.
        """
        for name, note in self._read_notes().items():
            if note["status"] == "running":
                reason = words if name in words else "the sweep was stopped before it ended"
                self._notes[name] = note | {"status": "failed", "error": reason}
                self._write_note(name, self._notes[name])

    def begin(self, point: Mapping[str, Any]) -> Run:
        """Open the run folder of a trial and note that it runs."""
        name = self.id_of(point)
        run = Run.open(self.folder_of(name).uri, self.config(point))
        self._write_note(name, {"point": dict(point), "status": "running", "error": None})
        return run

    def fail(self, point: Mapping[str, Any], error: str) -> None:
        """Note why a trial failed, unless it has ended already: when Tune stops a trial, its training fails."""
        name = self.id_of(point)
        if self._folder.read_json(_note_name(name))["status"] == "running":
            self._write_note(name, {"point": dict(point), "status": "failed", "error": error})

    def end(self, point: Mapping[str, Any], otherwise: str) -> None:
        """Note the status of an ended trial: finished if its last stage is, else what Tune reports."""
        name = self.id_of(point)
        # The trial has noted its error itself.
        note = self._folder.read_json(_note_name(name)) or {"point": dict(point), "status": "running", "error": None}
        if note["status"] != "failed":
            finished = self.folder_of(name).exists(f"{TRIAL_STAGES[-1]}.json")
            note["status"] = "finished" if finished else otherwise
        self._notes[name] = note
        self._described.pop(name, None)
        self._write_note(name, self._notes[name])

    def _write_note(self, name: str, note: Mapping[str, Any]) -> None:
        self._folder.write_json(_note_name(name), note)

    def describe(self) -> list[dict[str, Any]]:
        """Return the entries of sweep.json for ended trials, in the order of their ids."""
        ended = {name: note for name, note in sorted(self._notes.items()) if note["status"] != "running"}
        for name in ended.keys() - self._described.keys():
            self._described[name] = self._describe(name, ended[name])
        return [self._described[name] for name in ended]

    def _describe(self, name: str, note: Mapping[str, Any]) -> dict[str, Any]:
        folder, config = self.folder_of(name), self.config(note["point"])
        run = Run(folder, config)
        history = folder.read_json("train/history.json") or []
        last = history[-1] if history else {}
        stages = (folder.read_json("metrics.json") or {}).get("stages")
        scored = (stages or {}).get("bootstrapped", {})
        manifests = [manifest for manifest in map(run.manifest, TRIAL_STAGES) if manifest is not None]
        return {
            "id": name,
            "run": folder.uri,
            "point": note["point"],
            "status": note["status"],
            "epochs": len(history),
            "num_concepts": config.num_concepts,
            "score": last.get("score"),
            "components": {each: last[each] for each in COMPONENTS if each in last},
            "miou": scored.get("miou"),
            "pixel_accuracy": scored.get("pixel_accuracy"),
            "seconds": round(sum(manifest["seconds"] for manifest in manifests), 3),
            "model_version": (run.manifest("register") or {}).get("model_version"),
            "mlflow_run_id": (folder.read_json(RECORD) or {}).get("run_id"),
            "error": note["error"] if note["status"] == "failed" else None,
        }

    def for_search(self, objective: str) -> dict[str, list[Any]]:
        """Return arguments of `NewPoints`: `known` points, `taken` ones, and those to suggest `first`."""
        trials = self.describe()
        known = [(trial["point"], trial[objective]) for trial in trials if trial["status"] == "finished"]
        taken = [trial["point"] for trial in trials if trial["status"] == "stopped"]
        first = [note["point"] for name, note in self._notes.items() if name not in self.ended]
        return {"known": known, "taken": taken, "first": first}


def run_trial(values: dict[str, Any], settings: dict[str, Any]) -> None:
    """Run the stages of one trial under Tune, reporting the score of each epoch.

    Args:
        values: the point, as text.
        settings: folder and base configuration of the sweep, its MLflow run, its objective and its concurrent trials.
    """
    from ray import tune

    base, folder = settings["base"], Folder(settings["folder"])
    trials, shared = Trials(folder, base), SharedStages(folder, base)
    point, objective = json.loads(values[POINT]), settings["objective"]
    name = trials.id_of(point)
    sign = Sign(_SIGN + name)
    sign.begin()
    run = trials.begin(point)
    # The last epoch is reported after scoring, or a scheduler would stop a trained trial before it is scored.
    epochs, reported = sum(run.config.whole_rounds) - 1, 0

    def on_epoch(history: list[dict[str, float]]) -> None:
        nonlocal reported
        for epoch in history[reported:epochs] if objective == "score" else []:
            tune.report({"score": epoch["score"], "epoch": epoch["epoch"] + 1})
        reported = len(history)

    try:
        shared.give(run)
        sibling = shared.bank(sibling_of(run.config)) if objective == "score" else None
        tags = {"objective": objective, "sweep": folder.uri}
        trial = Trial(settings["parent"], tags, sibling, settings["concurrent"], on_epoch, _TRAINING + name)
        with kept_log(run.folder, "trial"):
            run_stages(run, TRIAL_STAGES, address=None, reporter=_SigningReporter(sign), trial=trial)
    except Exception as error:
        # It lost workers: Tune starts it again, on what is left of the cluster.
        if isinstance(error, UnfinishedError):
            raise
        kind = "" if isinstance(error, TransfguError) else f"{type(error).__name__}: "
        trials.fail(point, f"{kind}{foreign_words(error)}")
        # Not raised: Tune would only repeat it.
        return
    history = json.loads(run.folder.read_bytes("train/history.json"))
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    last = (
        {"score": history[-1]["score"]} if objective == "score" else {"miou": metrics["stages"]["bootstrapped"]["miou"]}
    )
    tune.report(last | {"epoch": len(history)})


class _SigningReporter(SilentReporter):
    """A reporter of a trial: its progress goes to the board of signs of life, where the sweep sees it."""

    def __init__(self, sign: Sign) -> None:
        self._sign, self._begun = sign, 0

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        """Pass on the progress of one stage."""
        self._begun += 1
        yield _Signing(self._sign, self._begun)


class _Signing(Progress):
    """Passes progress on; what a trial does again after a loss is no sign of life."""

    def __init__(self, sign: Sign, stage: int) -> None:
        self._sign, self._stage, self._total = sign, stage, 0

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self._total += done
        self._sign(*((self._stage, self._total) if done else ()))


def trial_ages() -> dict[str, float]:
    """Return the seconds since each running trial, by its name, did something."""
    return {f"trial {name}": age for name, age in ages(_SIGN).items()}


def forget_trial(name: str) -> None:
    """Take an ended trial off the board of signs of life."""
    board().forget.remote([_SIGN + name, _TRAINING + name])


def _note_name(trial: str) -> str:
    return f"trials/{trial}.json"
