"""MLflow runs of a sweep: one parent, and one child per trial with its status."""

from collections.abc import Mapping, Sequence
from typing import Any

from transfgu_ray.config.run import RunConfig
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import answering, connect, patient, tracking_uri
from transfgu_ray.tracking.runs import PARENT, Tracked, log_files, open_run

# MLflow has no status for a trial that its scheduler stopped.
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def begin_sweep(folder: Folder, config: RunConfig, identity: dict[str, Any]) -> Tracked:
    """Continue the parent run of a sweep, or begin a new one.

    Args:
        folder: of the sweep.
        config: that the trials change; holds the tracking settings.
        identity: what is varied and how, logged as parameters.

    Raises:
        ArtifactError: MLflow failed.
    """
    with answering(tracking_uri(folder, config)):
        return open_run(folder, config, identity=identity, tags={"kind": "sweep"})


@patient
def settle_trials(parent: Tracked, trials: Sequence[Mapping[str, Any]]) -> int:
    """Set the status of each child to that of its trial, and delete unknown children; return how many were deleted.

    A child is unknown if its trial was killed before it noted the id.

    Args:
        parent: of the sweep.
        trials: as in sweep.json.
    """
    client, _ = connect(parent.uri)
    status = {trial["mlflow_run_id"]: _STATUS[trial["status"]] for trial in trials if trial["mlflow_run_id"]}
    experiment_id = client.get_run(parent.run_id).info.experiment_id
    children, page, removed = [], None, 0
    while page != "":
        found = client.search_runs([experiment_id], f"tags.`{PARENT}` = '{parent.run_id}'", page_token=page)
        children += found
        page = found.token or ""
    for child in children:
        run_id = child.info.run_id
        if run_id not in status:
            client.delete_run(run_id)
            removed += 1
        elif child.info.status != status[run_id]:
            client.set_terminated(run_id, status=status[run_id])
    return removed


@patient
def end_sweep(parent: Tracked, folder: Folder, *, sweep: Mapping[str, Any], artifacts: Sequence[str]) -> None:
    """Log the results and files of the sweep and close the parent run.

    Args:
        parent: of the sweep.
        folder: of the sweep.
        sweep: content of sweep.json.
        artifacts: names in the folder.
    """
    client, _ = connect(parent.uri)
    best = sweep["best"] or {}
    numbers = {"spearman": sweep["spearman"], "regret_miou": sweep["regret_miou"]}
    numbers |= {f"best/{name}": best.get(name) for name in ("score", "miou")}
    for name, value in numbers.items():
        if value is not None:
            client.log_metric(parent.run_id, name, value)
    log_files(client, parent.run_id, ((name, folder.read_bytes(name)) for name in artifacts))
    client.set_terminated(parent.run_id, status="FINISHED")
