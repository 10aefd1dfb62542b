"""The ablation grid: one run per variant and seed in a single Ray session; shared stages run once per seed."""

import json
from collections.abc import Sequence
from typing import Any

from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.engine.session import ray_session
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.reports.ablations import FULL, VARIANTS
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.studies.shared import SHARED

# Variants differ only in training.
_STAGES = STAGES.lasting[: STAGES.lasting.index("report")]


def ablate(
    folder: Folder,
    config: RunConfig,
    *,
    variants: Sequence[str],
    seeds: Sequence[int],
    resnet: str,
    address: str | None,
    reporter: Reporter,
) -> dict[str, list[dict[str, Any]]]:
    """Run `FOLDER/seed_N/VARIANT` for every variant and seed; return the metrics.json of each seed by variant.

    Finished runs are kept, so that an interrupted call continues where it stopped.

    Args:
        folder: of all runs.
        config: that the variants change.
        variants: names of `ablations.VARIANTS`.
        seeds: each variant is run once per seed.
        resnet: `train.backbone_weights` of the variants with a ResNet-50.
        address: Ray to use.
        reporter: shows the progress of the stages.

    Raises:
        TransfguError: settings, data, weights or a run folder are unusable.
    """
    metrics: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with ray_session(address, config.runtime):
        for seed in seeds:
            uris = {name: folder.uri_of(f"seed_{seed}/{name}") for name in (FULL, *variants)}
            for name in variants:
                settings = [f"seed={seed}", *VARIANTS[name].settings]
                if VARIANTS[name].reads_resnet:
                    settings.append(f"train.backbone_weights={json.dumps(resnet)}")
                run = Run.open(uris[name], build_config(config, None, settings))
                if name != FULL:
                    _copy_shared(Run.open(uris[FULL], build_config(config, None, [f"seed={seed}"])), run, reporter)
                run_stages(run, _STAGES, address=address, reporter=reporter)
                metrics[name].append(json.loads(run.folder.read_bytes("metrics.json")))
    return metrics


def _copy_shared(source: Run, target: Run, reporter: Reporter) -> None:
    """Copy the shared stages from one run to another, computing them first where they are missing."""
    if target.manifest(SHARED[-1]) is not None:
        return
    run_stages(source, SHARED, address=None, reporter=reporter)
    for stage in SHARED:
        target.copy_stage(source, stage)
