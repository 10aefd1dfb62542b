"""What each stage reads, calls and says of itself in its manifest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfgu_ray.datasets.listing import Listing
from transfgu_ray.engine.parts import refusals
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.runs import Tracked


@dataclass(frozen=True)
class Trial:
    """What a sweep wants of a run beside its model.

    Attributes:
        parent: MLflow run of the sweep.
        tags: of the registered model.
        sibling: run of another seed whose bank a second student learns from, so that every epoch can be measured
            without labels; None = nothing is measured.
        on_epoch: takes the history so far whenever there is more of it.
    """

    parent: Tracked
    tags: Mapping[str, str]
    sibling: Run | None
    on_epoch: Callable[[list[dict[str, float]]], None]


@dataclass(frozen=True)
class Context:
    """What every stage gets.

    Attributes:
        run: run folder and configuration.
        root: the dataset.
        listing: photographs of the training split.
        resources: workers and devices.
        fingerprint: of the stage.
        inputs: what the stage is made of beside its settings; part of the fingerprint.
        encoder: safetensors bytes of the encoder; None where extract is not pending.
        backbone: safetensors bytes of the student's own backbone; None where it has none, or train is not pending.
        tracked: the MLflow run; None outside `transfgu run`.
        trial: what a sweep wants of the run; None outside one.
        progress: takes items done.
    """

    run: Run
    root: Folder
    listing: Listing
    resources: Resources
    fingerprint: str
    inputs: str
    encoder: bytes | None
    backbone: bytes | None
    tracked: Any
    trial: Trial | None
    progress: Progress


def table_of_photographs(
    context: Context, table: str, worker: Any, listing: Listing | None = None, **arguments: Any
) -> Any:
    """A table of the training photographs, brought up to date; see `parts.build_table_of_parts`."""
    from transfgu_ray.engine.parts import build_table_of_parts

    config = context.run.config
    return build_table_of_parts(
        context.run.folder,
        table,
        context.fingerprint,
        context.root,
        (listing or context.listing).images,
        config.extract.images_per_part,
        worker,
        {"config": config.model_dump(mode="json"), **arguments},
        context.resources,
        context.progress,
    )


def table_content(context: Context, result: Any) -> dict[str, Any]:
    """Return what the manifest says of a table of the training photographs."""
    stats = result.stats
    return {
        **refusals(stats, context.listing.refused),
        "rows_out": result.num_rows,
        "images": stats.images,
        "dropped": stats.dropped,
        "batches_halved": stats.halvings,
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        "peak_memory_mb": result.peak_mb,
    }
