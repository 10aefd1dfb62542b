"""model -> a version in MLflow's model registry."""

import json
from typing import Any

from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.tracking.client import patient
from transfgu_ray.tracking.models import register
from transfgu_ray.tracking.runs import log_epochs


def run_stage(job: StageJob) -> dict[str, Any]:
    """Register the model in MLflow; return the content of the manifest."""
    run, tracked = job.run, job.tracked
    assert tracked is not None
    job.progress.expect(1)
    # An interrupted call may have trained epochs without logging them, or MLflow was away.
    history = json.loads(run.folder.read_bytes("train/history.json"))
    patient(log_epochs)(tracked, history)
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    strips = [name for name, _ in run.folder.files("samples") if name.endswith(".jpg")]
    pages = filter(run.folder.exists, ("report.html", "atlas.html"))
    artifacts = ["config.yaml", "metrics.json", *pages, *strips]
    tags = {"dataset_fingerprint": job.listing.fingerprint, **(job.trial.tags if job.trial else {})}
    if history and "score" in history[-1]:
        tags["score"] = f"{history[-1]['score']:.6f}"
    registered = register(tracked, run, metrics=metrics, artifacts=artifacts, more_tags=tags)
    job.progress(1)
    return {"rows_in": 1, "rows_out": 1, "refused": [], **registered}
