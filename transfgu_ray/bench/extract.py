"""Extract: from JPEG bytes to a part of the features table, relative to the bare encoder on ready crops."""

import tempfile
from functools import partial
from statistics import median

import numpy as np
import torch

from transfgu_ray.algorithms.concepts.windows import enumerate_windows
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.bench.subject import SIDE, VIT, build_encoder, jpeg_photographs, working_images
from transfgu_ray.bench.timing import Measurements, Target, ratio, take_turns
from transfgu_ray.config.run import RunConfig
from transfgu_ray.config.sections import DataConfig, ExtractConfig
from transfgu_ray.engine.stream import Photo
from transfgu_ray.images import cut_crops
from transfgu_ray.models.weights import ENCODER
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.storage import Folder

_PHOTOGRAPHS = 4
_ROUNDS = 3
_FRACS = (0.5,)
_BATCH = 12


def measure(device: str) -> Measurements:
    """Measure crops per second relative to the bare encoder at the same batch, without foreground prior."""
    encoder = build_encoder(device)
    boxes, _ = enumerate_windows(SIDE, SIDE, _FRACS)
    crops = np.concatenate(
        [cut_crops(image.numpy(), boxes, SIDE // 2, "bilinear") for image in working_images(_PHOTOGRAPHS)]
    )
    batches = torch.split(torch.from_numpy(crops).to(device), _BATCH)
    photos = [Photo(f"{i}.jpg", data, None, None) for i, data in enumerate(jpeg_photographs(_PHOTOGRAPHS))]
    config = RunConfig(
        data=DataConfig(image_size=(SIDE, SIDE), region_mode="no_prior"),
        extract=ExtractConfig(window_fracs=_FRACS, batch_size=_BATCH),
    )
    with tempfile.TemporaryDirectory() as folder:
        Folder(folder).write_bytes(ENCODER, dump_encoder(random_vit(VIT, {}, seed=0), VIT, overrides={}))
        extractor = FeatureExtractor(
            config,
            folder,
            table="features",
            fingerprint="",
            device=device,
            threads=torch.get_num_threads(),
        )
        seconds = take_turns(
            {
                "bare": lambda: [encoder.all_tokens(batch) for batch in batches],
                "extract": partial(extractor.process, 0, photos),
                "published, one crop at a time": lambda: [
                    encoder.all_tokens(crop[None]) for batch in batches for crop in batch
                ],
            },
            _ROUNDS,
        )
    return Measurements(
        targets=[Target("extract: crops/s / bare encoder's", ">=", 0.90, ratio(seconds, "bare", "extract"))],
        details={
            "encoder": f"{VIT}, crops of {SIDE // 2} px, batch {_BATCH}",
            "crops_per_second": {name: len(crops) / median(values) for name, values in seconds.items()},
        },
    )
