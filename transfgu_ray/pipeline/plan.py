"""What a run will take, before anything starts."""

import time
from typing import Any

from transfgu_ray.backbone import resolve_backbone
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import list_images, open_root
from transfgu_ray.errors import DataError
from transfgu_ray.pipeline.session import ray_session
from transfgu_ray.pipeline.stages import list_scored
from transfgu_ray.planning import Cluster, plan_stages
from transfgu_ray.prior import resolve_encoder


def plan(config: RunConfig, address: str | None) -> dict[str, Any]:
    """Forwards, bytes and seconds of each stage, from a calibration on the machines that would do the work.

    Returns:
        "stages": rows of `planning.StagePlan`; "start_ray": seconds; "photographs"; "scored"; "workers";
        "train_workers"; "device"; "calibration_seconds"; "pieces": what was timed.

    Raises:
        TransfguError: settings, data or weights are unusable.
    """
    from transfgu_ray.algorithms.weights import load_encoder
    from transfgu_ray.pipeline.calibrate import calibrate

    root = open_root(config.data)
    images = list_images(config.data, config.data.benchmark.train_split).images
    scored = list_scored(config)
    num_scored = min(config.evaluate.num_samples, len(images)) if scored is None else len(scored.images)
    encoder, backbone = resolve_encoder(config), resolve_backbone(config)
    start = time.perf_counter()
    with ray_session(address, config.runtime) as resources:
        start_ray = time.perf_counter() - start
        pieces = calibrate(config, encoder, backbone, root, images, resources)
    if "refused" in pieces:
        first = pieces["refused"][0]
        raise DataError(f"none of the photographs tried can be used; the first, {first['image_id']}: {first['reason']}")
    on_gpu = resources.device == "cuda"
    cluster = Cluster(resources.num_workers, resources.train_workers, resources.num_cores, shares_cores=not on_gpu)
    embed_dim = load_encoder(encoder, config.encoder.weights).embed_dim
    return {
        "stages": [vars(stage) for stage in plan_stages(config, pieces, len(images), num_scored, embed_dim, cluster)],
        "start_ray": start_ray,
        "photographs": len(images),
        "scored": num_scored,
        "workers": resources.num_workers,
        "train_workers": resources.train_workers,
        "device": resources.device,
        "calibration_seconds": time.perf_counter() - start,
        "pieces": pieces,
    }
