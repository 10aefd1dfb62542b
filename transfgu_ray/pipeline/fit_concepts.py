"""features -> concepts: k-means per group, on one worker of the cluster."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transfgu_ray.algorithms.concepts import Clustering, fit_concepts
from transfgu_ray.config import RunConfig
from transfgu_ray.pipeline.parts import read_table
from transfgu_ray.schemas import build_table, concepts_schema, to_parquet
from transfgu_ray.storage import Folder


def concept_groups(config: RunConfig) -> dict[str, int]:
    """Concepts of each kind of crop."""
    total, background = config.num_concepts, config.num_background
    if config.region_mode == "no_prior":
        return {"any": total}
    groups = {"foreground": total - background, "background": background}
    return {kind: count for kind, count in groups.items() if count}


def cluster(run_uri: str, config: RunConfig, threads: int, use_gpu: bool) -> dict[str, Any]:
    """Reads the features, writes concepts.parquet and returns what the manifest says about each group.

    Raises:
        DataError: a group has too few crops for its concepts.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    run = Folder(run_uri)
    features = read_table(run, "features", ["kind", "cls_token"])
    fitted: dict[str, Clustering] = {}
    for kind, count in concept_groups(config).items():
        column = features.filter(pc.field("kind") == kind)["cls_token"].combine_chunks()
        points = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        fitted[kind] = fit_concepts(
            np.ascontiguousarray(points, dtype=np.float32),
            count,
            config.seed,
            config.concepts.num_iterations,
            config.concepts.num_redos,
            config.concepts.min_crops,
            config.concepts.max_points,
            use_gpu,
            kind,
        )
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
    run.write_bytes("concepts.parquet", to_parquet(table, {}))
    return {
        kind: {
            "concepts": len(group.num_crops),
            "points_used": group.points_used,
            "points_total": group.points_total,
            "reseeded": group.num_reseeded,
            "smallest_concept_crops": int(group.num_crops.min()),
            "used_gpu": group.used_gpu,
        }
        for kind, group in fitted.items()
    }


def read_concepts(run: Folder) -> tuple[list[str], np.ndarray]:
    """Kind and centroid of every concept, in order of concept_id."""
    with run.fs.open_input_file(run.join("concepts.parquet")) as file:
        table = pq.read_table(file)
    column = table["centroid"].combine_chunks()
    return table["kind"].to_pylist(), column.flatten().to_numpy().reshape(-1, column.type.list_size).copy()
