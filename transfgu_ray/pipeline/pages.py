"""Pages and renamed scores, rebuilt from a run's artifacts alone, in seconds and without Ray."""

import json
import shlex
import time
from typing import Any

from transfgu_ray.engine.stream import peak_memory_mb
from transfgu_ray.errors import ArtifactError
from transfgu_ray.models.model import load_model_config
from transfgu_ray.models.names import Names, load_names
from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.pipeline.scoring import read_counts, read_scored_ids
from transfgu_ray.reports.atlas_page import write_atlas
from transfgu_ray.reports.run_page import write_report
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import NAMES
from transfgu_ray.storage import Folder


def run_stage(job: StageJob) -> dict[str, Any]:
    """Write the pages of a run; return the content of the manifest."""
    content = write_pages(job.run)
    job.progress(sum(map(job.folder.exists, ("report.html", "atlas.html"))))
    return content


# Keys that `Run.write_manifest` adds itself.
_OF_MANIFEST = ("stage", "fingerprint", "names_sha256", "files_sha256", "versions")


def write_pages(run: Run) -> dict[str, Any]:
    """Write report.html and atlas.html; return the content of the manifest."""
    model = load_model_config(Folder(run.folder.uri_of("model")))
    counts = read_counts(run.folder, len(run.config.class_names), len(model.kinds))
    shown = write_report(run, counts.get(STAGE_NAMES[-1]), read_scored_ids(run.folder))
    examples = write_atlas(run) if run.folder.exists("atlas.json") else 0
    return {"rows_in": shown, "rows_out": shown, "refused": [], "examples": examples}


def rebuild_pages(run: Run) -> dict[str, Any]:
    """Write the pages again, and the manifest of the stage; return the manifest.

    Raises:
        ArtifactError: the run was not evaluated, was evaluated with other names, or has damaged results.
    """
    evaluated = run.require("evaluate")
    if evaluated.get("names_sha256") != run.names_sha256("evaluate"):
        raise ArtifactError(
            f"{run.folder.uri} was evaluated with other names of its concepts; run "
            f"`{shlex.join(['transfgu', 'evaluate', run.folder.uri])}` first"
        )
    run.require_whole("evaluate")
    started, inputs = time.perf_counter(), evaluated["input_fingerprint"]
    content = write_pages(run)
    seconds = time.perf_counter() - started
    content |= {
        "seconds": round(seconds, 3),
        "items_per_second": round(content["rows_in"] / seconds, 3),
        "peak_memory_mb": peak_memory_mb(),
        "input_fingerprint": inputs,
    }
    return run.write_manifest("report", run.fingerprint("report", inputs), content)


def rename(run: Run, names: Names) -> None:
    """Name the concepts of a run and rebuild its scores and pages with the names.

    The counted masks are reused, so that nothing is segmented or trained again.

    Args:
        run: run with a finished model.
        names: names that replace all former ones.
    """
    if names.of_concept:
        run.folder.write_bytes(NAMES, names.dump())
    else:
        run.folder.delete(NAMES)
    evaluated = run.manifest("evaluate")
    if evaluated is None:
        return
    before = json.loads(run.folder.read_bytes("metrics.json"))
    counts = read_counts(run.folder, len(run.config.class_names), len(names.kinds))
    metrics = metrics_json(
        run.config,
        before["split"],
        num_images=before["num_images"],
        counts=counts,
        names=names,
        weights_sha256=before["weights_sha256"],
    )
    run.folder.write_json("metrics.json", metrics)
    content = {name: value for name, value in evaluated.items() if name not in _OF_MANIFEST}
    run.write_manifest("evaluate", evaluated["fingerprint"], content)
    if run.manifest("report") is not None:
        rebuild_pages(run)


def read_names(run: Run) -> Names:
    """Read the names of a run's concepts and the kinds of its model's classes.

    Raises:
        ArtifactError: the run has no model yet.
        ConfigError: the names are damaged.
    """
    run.require("train")
    model = Folder(run.folder.uri_of("model"))
    return load_names(model, load_model_config(model).kinds)
