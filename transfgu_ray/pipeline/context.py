"""The input of every stage, and what stages with a table of photographs share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfgu_ray.datasets.listing import Listing
from transfgu_ray.engine.build import TableResult, build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import PartWorker, refusals
from transfgu_ray.runs.run import Run
from transfgu_ray.tracking.runs import Tracked


@dataclass(frozen=True)
class Trial:
    """What a sweep needs of a run beside its model.

    Attributes:
        parent: MLflow run of the sweep.
        tags: tags of the registered model.
        sibling: run with another seed. A second student learns from its bank, so that every epoch can be measured
            without labels; None = nothing is measured.
        concurrent: trials that run at once.
        on_epoch: called with the history so far whenever it has grown.
        sign_key: of the signs of life of its training, which outlives the trial's process.
    """

    parent: Tracked
    tags: Mapping[str, str]
    sibling: Run | None
    concurrent: int
    on_epoch: Callable[[list[dict[str, float]]], None]
    sign_key: str


@dataclass(frozen=True, kw_only=True)
class StageJob(Job):
    """The input of a stage.

    Attributes:
        run: run folder and configuration.
        listing: photographs of the training split.
        inputs: identifies what the stage reads beside its settings; part of the fingerprint.
        encoder: safetensors bytes of the encoder; None unless extract has to run.
        backbone: safetensors bytes of the student's own backbone; None if it has none or no stage reads it.
        tracked: the MLflow run; None outside `transfgu run`.
        trial: what a sweep needs of the run; None outside one.
    """

    run: Run
    listing: Listing
    inputs: str
    encoder: bytes | None = None
    backbone: bytes | None = None
    tracked: Tracked | None = None
    trial: Trial | None = None


def table_of_photographs(
    job: StageJob, table: str, *, worker: type[PartWorker], listing: Listing | None = None, **arguments: Any
) -> TableResult:
    """Bring a table of the training photographs up to date; see `build_table_of_parts`.

    Args:
        job: job of the stage.
        table: the table's folder.
        worker: class that makes the parts.
        listing: photographs to use instead of the job's, e.g. with labels.
        arguments: further keyword arguments of the worker.
    """
    images = (job.listing if listing is None else listing).images
    job.progress.expect(len(images))
    return build_table_of_parts(
        job,
        table,
        images=images,
        images_per_unit=job.config.extract.images_per_part,
        worker=worker,
        arguments=arguments,
    )


def table_content(listing: Listing, result: TableResult) -> dict[str, Any]:
    """Return the manifest's content for a table of the photographs of a listing."""
    stats = result.stats
    return {
        **refusals(stats, listing.refused),
        "rows_out": result.num_rows,
        "images": stats.images,
        "dropped": stats.dropped,
        "batches_halved": stats.halvings,
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        "units_resumed": result.num_units_resumed,
        "peak_memory_mb": result.peak_mb,
    }
