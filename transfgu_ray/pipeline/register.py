"""model -> a version in MLflow's model registry."""

import json
from typing import Any

from transfgu_ray.pipeline.context import Context


def run_stage(context: Context) -> dict[str, Any]:
    """Register the model in MLflow; return what the manifest says of it."""
    from transfgu_ray.tracking import runs as tracking

    run = context.run
    tracked = context.tracked
    # Epochs that an interrupted call had trained but not logged.
    history = json.loads(run.folder.read_bytes("train/history.json"))
    tracking.log_epochs(tracked, history)
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    strips = [name for name, _ in run.folder.files("samples") if name.endswith(".jpg")]
    pages = filter(run.folder.exists, ("report.html", "atlas.html"))
    artifacts = ["config.yaml", "metrics.json", *pages, *strips]
    tags = {"dataset_fingerprint": context.listing.fingerprint, **(context.trial.tags if context.trial else {})}
    if history and "score" in history[-1]:
        tags["score"] = f"{history[-1]['score']:.6f}"
    registered = tracking.register(tracked, run.folder, run.config, metrics, artifacts, tags)
    context.progress(1)
    return {"rows_in": 1, "rows_out": 1, "refused": [], **registered}
