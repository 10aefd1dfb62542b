"""features -> concepts: k-means per group, on one worker or, for a large group, on all workers of the cluster."""

import itertools
from functools import partial
from typing import Any

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transfgu_ray.algorithms.concepts.hierarchical_kmeans import (
    Hierarchy,
    fit_hierarchy,
    fit_sharded_hierarchy,
    num_passes,
)
from transfgu_ray.algorithms.concepts.kmeans import Clustering, KMeans, fit_concepts
from transfgu_ray.algorithms.concepts.sharded_kmeans import FitState, fit_sharded_concepts
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import part_files, read_part
from transfgu_ray.engine.session import READER_CPUS, Resources
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import even_ranges, peak_memory_mb, unwrapped_errors
from transfgu_ray.pipeline.context import StageJob
from transfgu_ray.pipeline.passes import PassFile, ShownPasses, forget_passes
from transfgu_ray.pipeline.shards import actor_shards, read_points
from transfgu_ray.runs.references import table_folder
from transfgu_ray.runs.tables import build_table, concepts_schema, to_parquet, vectors
from transfgu_ray.storage import Folder


def run_stage(job: StageJob) -> dict[str, Any]:
    """Cluster the class tokens of a run; return the content of the manifest."""
    extracted = job.run.require("extract")
    with unwrapped_errors():
        groups, peak_mb = cluster(job, extracted["rows_out"], made_of=extracted.get("files_sha256", ""))
    return {
        "rows_in": sum(group["points_total"] for group in groups.values()),
        "rows_out": sum(group["concepts"] for group in groups.values()),
        "refused": [],
        "groups": groups,
        "peak_memory_mb": peak_mb,
        "weights_sha256": extracted["weights_sha256"],
    }


def concept_groups(config: RunConfig) -> dict[str, int]:
    """Return the number of concepts per kind of crop."""
    total, background = config.num_concepts, config.num_background
    if config.region_mode == "no_prior":
        return {"any": total}
    groups = {"foreground": total - background, "background": background}
    return {kind: count for kind, count in groups.items() if count}


def kmeans_settings(config: RunConfig, use_gpu: bool) -> KMeans:
    """Return the k-means settings of a run."""
    concepts = config.concepts
    return KMeans(
        seed=config.kmeans_seed,
        algorithm=concepts.algorithm,
        num_iterations=concepts.num_iterations,
        num_redos=concepts.num_redos,
        min_crops=concepts.min_crops,
        max_points=concepts.max_points,
        use_gpu=use_gpu,
    )


def hierarchy_settings(config: RunConfig) -> Hierarchy | None:
    """Return the settings of the levels; None for flat k-means."""
    concepts = config.concepts
    return Hierarchy(concepts.num_resamples, concepts.init_points) if concepts.method == "hierarchical" else None


def is_spread(config: RunConfig, num_points: int) -> bool:
    """Return whether so many crops of a group are clustered by all workers, not by one."""
    return config.concepts.algorithm == "faiss" and num_points > config.concepts.init_points


def cluster(job: Job, num_rows: int, made_of: str = "") -> tuple[dict[str, Any], int]:
    """Read the features of a run and write concepts.parquet.

    A group of at most `concepts.init_points` crops is clustered by one worker; the crops of a larger group are spread
    over all workers, unless they are clustered in mini-batches. Where a call was ended in the midst of a large group,
    the next one goes on after the last pass.

    Args:
        job: job of the run.
        num_rows: number of rows of the features.
        made_of: identifies the files of the features.

    Returns:
        The manifest's entry for each group, and the highest peak memory of any worker, MB.

    Raises:
        DataError: a group has too few crops for its concepts, or class tokens that are NaN or infinite.
    """
    shown = ShownPasses(job.progress, concept_groups(job.config))
    with signs_of_life(shown.sign) as sign:
        return _cluster(job, shown, sign, num_rows=num_rows, made_of=made_of)


def _cluster(job: Job, shown: ShownPasses, sign: Sign, *, num_rows: int, made_of: str) -> tuple[dict[str, Any], int]:
    import ray

    config, resources, groups = job.config, job.resources, concept_groups(job.config)
    features = table_folder(job.folder, "features")
    # Most runs are small enough to skip the counting.
    parts = _count_parts(features, resources, sign) if is_spread(config, num_rows) else {}
    totals = {kind: sum(rows for _, rows in parts.get(kind, [])) for kind in groups}
    large = [kind for kind in groups if is_spread(config, totals[kind])]
    small = {kind: count for kind, count in groups.items() if kind not in large}
    shown.expect({kind: _num_passes(config, kind in large) for kind in groups})
    fitted: dict[str, Clustering] = {}
    begun: dict[str, FitState | None] = {}
    peak_mb = 0
    if small:
        # As Any: Ray's types for remote functions do not cover keyword arguments.
        function: Any = _fit_in_memory
        task = ray.remote(function).options(num_cpus=1, num_gpus=resources.gpus_per_worker, max_retries=1)
        use_gpu = resources.device == "cuda"
        fitted, peak_mb = ray.get(
            task.remote(features.uri, config, groups=small, threads=resources.threads, use_gpu=use_gpu, sign=sign)
        )
        for kind in small:
            shown.end(kind)
    for kind in large:
        shown.begin(kind)
        passes = PassFile(job.folder, kind, f"{job.fingerprint} {made_of}")
        begun[kind] = passes.read()
        with actor_shards(features, kind, parts=parts[kind], resources=resources, sign=sign) as points:
            if (hierarchy := hierarchy_settings(config)) is None:
                fit: Any = partial(fit_sharded_concepts, init_points=config.concepts.init_points)
            else:
                # The levels above the lowest are small enough for the driver.
                faiss.omp_set_num_threads(resources.threads)
                fit = partial(fit_sharded_hierarchy, hierarchy=hierarchy)
            fitted[kind] = fit(
                points,
                groups[kind],
                how=kmeans_settings(config, use_gpu=False),
                group=kind,
                on_pass=shown.reach,
                keep=passes.write,
                begun=begun[kind],
            )
            peak_mb = max(peak_mb, points.peak_mb())
        shown.end(kind)
    ordered = {kind: fitted[kind] for kind in groups}
    _write_concepts(job.folder, ordered)
    forget_passes(job.folder)
    return {kind: _describe(group, begun.get(kind)) for kind, group in ordered.items()}, peak_mb


def _num_passes(config: RunConfig, is_large: bool) -> int:
    """Return how often k-means goes over all crops of a group at most, if it seeds no concept anew.

    Those of mini-batches cannot be told apart.
    """
    concepts, hierarchy = config.concepts, hierarchy_settings(config)
    if is_large:
        if hierarchy is not None:
            return num_passes(kmeans_settings(config, use_gpu=False), hierarchy.num_resamples)
        # The last one counts the crops.
        return 1 + (concepts.num_iterations if concepts.max_points is None else 0)
    if concepts.algorithm == "mini_batch":
        return 1
    return concepts.num_iterations * concepts.num_redos * (1 if hierarchy is None else 1 + hierarchy.num_resamples)


def _count_parts(features: Folder, resources: Resources, sign: Sign) -> dict[str, list[tuple[str, int]]]:
    """Return the name and number of crops of every part, in order, for each kind of crop."""
    import ray

    names = part_files(features, "features")
    task: Any = ray.remote(_count_kinds).options(num_cpus=READER_CPUS)
    shares = even_ranges(len(names), resources.num_cores)
    runs = ray.get([task.remote(features.uri, names[share.start : share.stop], sign) for share in shares])
    counts = dict(zip(names, itertools.chain.from_iterable(runs), strict=True))
    kinds = set(itertools.chain.from_iterable(counts.values()))
    return {kind: [(name, of_part.get(kind, 0)) for name, of_part in counts.items()] for kind in kinds}


def _count_kinds(run_uri: str, names: list[str], sign: Sign) -> list[dict[str, int]]:
    """Count the crops of each kind in some parts."""
    run_folder, counts = Folder(run_uri), []
    for name in names:
        counted = pc.value_counts(read_part(run_folder, name, ["kind"])["kind"]).to_pylist()
        counts.append({entry["values"]: entry["counts"] for entry in counted})
        sign()
    return counts


def _fit_in_memory(
    run_uri: str, config: RunConfig, *, groups: dict[str, int], threads: int, use_gpu: bool, sign: Sign
) -> tuple[dict[str, Clustering], int]:
    """Cluster groups with all of their crops in memory; return them and the peak memory, MB."""
    faiss.omp_set_num_threads(threads)
    run_folder = Folder(run_uri)
    names = part_files(run_folder, "features")
    fitted, order, hierarchy = {}, list(concept_groups(config)), hierarchy_settings(config)
    fit: Any = fit_concepts if hierarchy is None else partial(fit_hierarchy, hierarchy=hierarchy)
    for kind, count in groups.items():
        points = np.concatenate([_read_signed(run_folder, name, kind, sign) for name in names])
        fitted[kind] = fit(
            points.astype(np.float32),
            count,
            how=kmeans_settings(config, use_gpu),
            group=kind,
            on_pass=partial(_sign_pass, sign, order.index(kind)),
        )
    return fitted, peak_memory_mb()


def _sign_pass(sign: Sign, group: int, number: int, most: int) -> None:
    sign(group=group, number=number, most=most)


def _read_signed(run_folder: Folder, name: str, kind: str, sign: Sign) -> np.ndarray:
    sign()
    return read_points(run_folder, name, kind)


def _write_concepts(run_folder: Folder, fitted: dict[str, Clustering]) -> None:
    centroids = np.concatenate([group.centroids for group in fitted.values()])
    num_crops = np.concatenate([group.num_crops for group in fitted.values()])
    table = build_table(
        {
            "concept_id": np.arange(len(centroids), dtype=np.int32),
            "kind": [kind for kind, group in fitted.items() for _ in group.num_crops],
            "centroid": centroids,
            "num_crops": num_crops,
        },
        concepts_schema(centroids.shape[1]),
    )
    run_folder.write_bytes("concepts.parquet", to_parquet(table, {}))


def _describe(group: Clustering, begun: FitState | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "concepts": len(group.num_crops),
        "points_used": group.points_used,
        "points_total": group.points_total,
        "passes": group.num_passes,
        "resumed_at_pass": None if begun is None else begun.num_passes,
        "reseeded": group.num_reseeded,
        "smallest_concept_crops": int(group.num_crops.min()),
        "used_gpu": group.used_gpu,
    }
    if group.num_below is not None:
        described |= {
            "levels": [
                {
                    "points": level.num_points,
                    "clusters": level.num_clusters,
                    "passes": level.num_passes,
                    "resamples": level.num_resamples,
                }
                for level in group.levels
            ],
            "largest_concept_crops": int(group.num_crops.max()),
            "smallest_concept_crops_by_hierarchy": int(group.num_below.min()),
            "largest_concept_crops_by_hierarchy": int(group.num_below.max()),
        }
    return described


def read_concepts(run_folder: Folder) -> tuple[list[str], np.ndarray]:
    """Read the kind and centroid of every concept, in order of concept_id."""
    table = run_folder.read("concepts.parquet", pq.read_table)
    return table["kind"].to_pylist(), vectors(table["centroid"]).copy()
