"""A sweep whose scheduler stops a trial: `python -m tests.studies.stopped SWEEP CONFIG` prints what is left of it.

It needs its own Ray: without a dashboard, which the tests' shared one lacks, Ray does not free a stopped training.

So that nothing depends on the speed of the machine, no training reports an epoch before Tune has decided on the one
before, and the trial whose rate teaches it next to nothing begins after another has left a better score at ASHA's first
rung.
"""

import json
import sys
import time
from typing import Any

import ray
import ray.tune
from ray.util.placement_group import placement_group_table

from tests.fixtures import Silent
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine import session
from transfgu_ray.engine.session import ray_session
from transfgu_ray.pipeline import train, train_loop
from transfgu_ray.storage import Folder
from transfgu_ray.studies import tune
from transfgu_ray.studies.trials import POINT, Trials, run_trial

# A student that learns so slowly stays as it began. One that learns much too fast ends no better, but on the way its
# scores are those of chance, and others on another processor.
SLOW = 1e-6
RATES = (SLOW, 1e-4, 1.5e-4, 2e-4)
EPOCHS, RUNGS = (4, 8), (3, 6)
# Epochs on which Tune has decided, in the run folder of a trial.
_DECIDED = "decided.json"
_RATE = "train.learning_rate"


def _decided(folder: Folder) -> int:
    return folder.read_json(_DECIDED) or 0


def paced_trial(values: dict[str, Any], settings: dict[str, Any]) -> None:
    """As `run_trial`, but note each epoch that Tune lets pass, and train with `paced_loop`."""
    trials, point = Trials(Folder(settings["folder"]), settings["base"]), json.loads(values[POINT])
    folders = {rate: trials.folder_of(trials.id_of({_RATE: rate})) for rate in RATES}
    rate, report = point[_RATE], ray.tune.report

    def noted(metrics: dict[str, Any]) -> None:
        # It returns when Tune asks for the next result, and so never in a trial that Tune stops.
        report(metrics)
        folders[rate].write_json(_DECIDED, metrics["epoch"])

    ray.tune.report = noted
    train.train_loop = paced_loop
    while rate == SLOW and max(map(_decided, folders.values())) < RUNGS[0]:
        time.sleep(0.5)
    run_trial(values, settings)


def paced_loop(settings: dict[str, Any]) -> None:
    """As `train_loop`, but wait before reporting an epoch until Tune has decided on the one before."""
    folder, report = Folder(settings["run_uri"]), train_loop.report_state

    def waiting(row: dict[str, Any], *checkpoint: Any) -> None:
        while _decided(folder) < row["epoch"]:
            time.sleep(0.05)
        report(row, *checkpoint)

    train_loop.report_state = waiting
    train_loop.train_loop(settings)


def main(sweep_folder: str, config: str) -> None:
    base = RunConfig.model_validate(json.loads(config))
    plan = tune.SweepPlan({_RATE: RATES}, len(RATES), "optuna", "asha", "score")
    tune.run_trial = paced_trial
    # Two trials run at a time, wherever this runs: one would wait for ever for another.
    session.usable_cores = lambda: 2
    with ray_session(None, base.runtime, dashboard=True):
        sweep = tune.tune(Folder(sweep_folder), base, plan=plan, address=None, reporter=Silent())
        begun = time.monotonic()
        while True:
            left = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
            free = ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
            if time.monotonic() > begun + 120 or (free and not left):
                break
            time.sleep(0.5)
    sys.stderr.write(f"freed after {time.monotonic() - begun:.1f} s\n")
    sys.stdout.write(json.dumps({"left": left, "free": free, "sweep": sweep["trials"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
