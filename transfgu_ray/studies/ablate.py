"""The ablation grid: one run per variant and seed in a single Ray session; shared stages run once per seed."""

import json
from collections.abc import Sequence

from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.engine.progress import Reporter
from transfgu_ray.engine.session import ray_session
from transfgu_ray.models.model import load_model_config
from transfgu_ray.models.names import load_names
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.pipeline.scoring import read_counts
from transfgu_ray.reports.ablations import FULL, VARIANTS, ScoredRun
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
) -> dict[str, list[ScoredRun]]:
    """Run `FOLDER/seed_N/VARIANT` for every variant and seed; return the runs of the seeds by variant.

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
    runs: dict[str, list[ScoredRun]] = {name: [] for name in variants}
    with ray_session(address, config.runtime, note=reporter.note):
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
                runs[name].append(_scored(run))
    return runs


def _scored(run: Run) -> ScoredRun:
    model = Folder(run.folder.uri_of("model"))
    kinds = load_model_config(model).kinds
    metrics = json.loads(run.folder.read_bytes("metrics.json"))
    counts = read_counts(run.folder, len(run.config.class_names), len(kinds))
    return ScoredRun(metrics, run.config, counts, load_names(model, kinds))


def _copy_shared(source: Run, target: Run, reporter: Reporter) -> None:
    """Copy the shared stages from one run to another, computing them first where they are missing."""
    if target.manifest(SHARED[-1]) is not None:
        return
    run_stages(source, SHARED, address=None, reporter=reporter)
    for stage in SHARED:
        target.copy_stage(source, stage)
