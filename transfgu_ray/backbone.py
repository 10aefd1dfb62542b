"""Where the weights of a student's own backbone come from: a file, or the seed. Most students read the prior."""

import hashlib
from typing import TYPE_CHECKING

from transfgu_ray.config import RunConfig, TrainConfig
from transfgu_ray.errors import WeightsError
from transfgu_ray.prior import read_weights_file
from transfgu_ray.storage import Folder

if TYPE_CHECKING:
    from transfgu_ray.algorithms.resnet import Backbone

# Where a run keeps it: resolved once, then used by every worker and by the finished model.
BACKBONE = "model/backbone.safetensors"


def resolve_backbone(config: RunConfig) -> bytes | None:
    """Safetensors bytes of the backbone that a run's configuration names; None where the student reads the prior.

    Raises:
        WeightsError: the weights are missing, damaged or do not fit.
    """
    source = config.train.backbone_weights
    if source is None:
        return None
    from transfgu_ray.algorithms.resnet import dump_resnet, load_resnet, random_resnet

    return dump_resnet(random_resnet(config.seed) if source == "random" else load_resnet(_read(source), source))


def load_run_backbone(run: Folder, config: RunConfig, device: str) -> "Backbone | None":
    """The backbone that a run folder holds, on a device; None where the student reads the prior."""
    if config.train.backbone == "prior":
        return None
    from transfgu_ray.algorithms.resnet import load_backbone

    return load_backbone(run.read_bytes(BACKBONE), run.uri_of(BACKBONE), config.encoder.precision, device)


def backbone_file_sha256(config: TrainConfig) -> str | None:
    """Hash of the weights file's bytes; None where there is no file or it is gone."""
    source = config.backbone_weights
    if source is None or source == "random":
        return None
    try:
        return hashlib.sha256(_read(source)).hexdigest()
    except WeightsError:
        return None


def _read(source: str) -> bytes:
    return read_weights_file(source, "train.backbone_weights", "give 'random' or the path of a checkpoint")
