"""The inputs of stages beside their settings: photographs, labels and weights, checked before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transfgu_ray.algorithms.concepts.windows import enumerate_windows
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import Listing, list_images
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.weights import (
    ENCODER,
    backbone_file_sha256,
    resolve_backbone,
    resolve_encoder,
    weights_file_sha256,
)
from transfgu_ray.pipeline.published_decoder import check_decoder, decoder_sha256
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES


def list_training(config: RunConfig) -> Listing:
    """Return the photographs of the training split, without labels; see `_cut`.

    Raises:
        DataError: there are no photographs.
    """
    split = config.data.spec.train_split
    return _cut(config, split, list_images(config.data.root, config.data.spec, split=split))


def list_clustered(config: RunConfig) -> Listing | None:
    """Return the photographs whose crops are clustered, with labels where these cut the windows.

    None: they are the training photographs, and no label is needed.

    Raises:
        DataError: there are no photographs, or their labels are missing.
    """
    whole, by_labels = config.concepts.photographs == "all", config.extract.windows == "ground_truth"
    if not whole and not by_labels:
        return None
    return list_images(
        config.data.root,
        config.data.spec,
        split=config.data.spec.train_split,
        granularity=config.concepts.granularity if by_labels else None,
        whole=whole,
    )


def scored_split(config: RunConfig) -> str | None:
    """Return the name of the scored split; None for a dataset without labels."""
    split = config.data.spec.evaluate_split
    return split and (config.evaluate.split or split)


def list_scored(config: RunConfig) -> Listing | None:
    """Return the scored photographs with their labels; None for a dataset without labels. See `_cut`.

    Raises:
        DataError: the split or its labels are missing.
    """
    split = scored_split(config)
    if split is None:
        return None
    granularity = config.concepts.granularity
    return _cut(config, split, list_images(config.data.root, config.data.spec, split=split, granularity=granularity))


def _cut(config: RunConfig, split: str, listing: Listing) -> Listing:
    """Where concepts come from all photographs, cut a selection to those among them, as the released code does."""
    if config.concepts.photographs == "split":
        return listing
    whole = list_images(config.data.root, config.data.spec, split=split, whole=True)
    known = {image.image_id for image in whole.images}
    return replace(listing, images=tuple(image for image in listing.images if image.image_id in known))


@dataclass(frozen=True)
class Weights:
    """The weights that stages start from, as safetensors bytes; None where no stage that has to run reads them.

    Attributes:
        encoder: weights of the encoder.
        backbone: weights of the student's own backbone.
    """

    encoder: bytes | None
    backbone: bytes | None


def resolve_weights(run: Run, to_make: Sequence[str]) -> Weights:
    """Return the weights that the stages to run start from, after checking labels and sizes.

    Raises:
        TransfguError: weights or labels are missing, damaged or do not fit.
    """
    config = run.config
    if "extract" in to_make and config.extract.windows == "ground_truth":
        list_clustered(config)
    if "evaluate" in to_make:
        list_scored(config)
    encoder = resolve_encoder(config) if "extract" in to_make else None
    backbone = resolve_backbone(config) if {"tokens", "train"} & {*to_make} else None
    if "train" in to_make and config.train.decoder_weights is not None:
        check_decoder(config, encoder or run.folder.read_bytes(ENCODER))
    return Weights(encoder, backbone)


def stage_inputs(run: Run, listing: Listing) -> dict[str, str]:
    """Return what identifies the inputs of each stage beside its settings: the photographs and the weights files.

    If a weights file is missing, the hash that the run recorded is used.
    """
    encoder = weights_file_sha256(run.config.encoder) or (run.manifest("extract") or {}).get("weights_file_sha256")
    photographs = listing.fingerprint
    if run.config.concepts.photographs == "all" and (clustered := list_clustered(run.config)) is not None:
        photographs += f" {clustered.fingerprint}"
    inputs = dict.fromkeys(STAGES.names, f"{photographs} {encoder}")
    train, recorded, own = run.config.train, run.manifest("train") or {}, []
    if train.backbone != "prior":
        own.append(backbone_file_sha256(train) or recorded.get("backbone_file_sha256"))
    if train.decoder_weights is not None:
        own.append(decoder_sha256(train.decoder_weights) or recorded.get("imported"))
    for stage in ("tokens", "train", *STAGES.after("train")):
        inputs[stage] = " ".join(map(str, (inputs[stage], *own)))
    return inputs


def check_early(config: RunConfig, listing: Listing) -> None:
    """Refuse settings that cannot succeed, before anything is computed.

    Raises:
        ConfigError: more concepts are wanted than the photographs can give crops for.
    """
    # Windows on the patch grid cannot be counted before the encoder is known.
    if config.extract.windows == "ground_truth" or config.extract.window_layout == "patches":
        return
    windows = len(enumerate_windows(*config.data.image_size, config.extract.window_fracs)[0])
    most = windows * len(listing.images)
    wanted, each = f"concepts.num_concepts={config.num_concepts}", config.concepts.min_crops
    if config.num_concepts * each > most:
        lower = "it"
        if each > 1:
            wanted, lower = f"{wanted} times concepts.min_crops={each}", "one of them"
        raise ConfigError(
            f"{wanted} is more than the {most} crops that {len(listing.images)} photographs give at most; "
            f"lower {lower} or add photographs"
        )
