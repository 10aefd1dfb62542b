"""A decoder published with the paper, used instead of training: checked against the run and written as its model."""

import hashlib
from typing import Any

from transfgu_ray.algorithms.encoder.checkpoints import load_encoder
from transfgu_ray.algorithms.rounds.published import (
    ReleasedDecoder,
    background_last,
    read_released_decoder,
)
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ConfigError, WeightsError
from transfgu_ray.models.model import save_decoder
from transfgu_ray.models.weights import ENCODER, read_weights_file
from transfgu_ray.pipeline.concepts import read_concepts
from transfgu_ray.pipeline.train_loop import HISTORY, model_config
from transfgu_ray.storage import Folder


def decoder_sha256(source: str) -> str | None:
    """Return the hash of a published decoder's bytes; None if the file is missing."""
    try:
        return hashlib.sha256(_read(source)).hexdigest()
    except WeightsError:
        return None


def check_decoder(config: RunConfig, encoder: bytes) -> ReleasedDecoder:
    """Return the decoder that `train.decoder_weights` names, if it fits the run.

    Args:
        config: the run's configuration.
        encoder: safetensors bytes of the run's encoder.

    Raises:
        WeightsError: the file cannot be read or is no published decoder.
        ConfigError: its classes, width or layers differ from the run's.
    """
    source = config.train.decoder_weights
    assert source is not None
    found = read_released_decoder(_read(source), source)
    background = " and a background" if config.has_background else ""
    num_classes, embed_dim = config.num_concepts + config.has_background, load_encoder(encoder, ENCODER).embed_dim
    for has, wanted, what in (
        (found.num_classes, num_classes, f"classes (concepts.num_concepts{background})"),
        (found.num_layers, config.train.decoder_layers, "layers (train.decoder_layers)"),
        (found.width, embed_dim, "dimensions of a token (encoder.name)"),
    ):
        if has != wanted:
            raise ConfigError(
                f"train.decoder_weights={source} was trained with {has} {what}, but this run has {wanted}; change the "
                "setting to match, or give another decoder"
            )
    return found


def import_decoder(run_folder: Folder, config: RunConfig, weights_sha256: str) -> dict[str, Any]:
    """Write the model with the published decoder as the result of every round; return the content of the manifest.

    Args:
        run_folder: run folder with encoder and concepts.
        config: the run's configuration.
        weights_sha256: hash of the encoder's weights.
    """
    source = config.train.decoder_weights
    assert source is not None
    state = check_decoder(config, run_folder.read_bytes(ENCODER)).state
    if config.has_background:
        state = background_last(state)
    kinds, _ = read_concepts(run_folder)
    described = model_config(config, kinds, weights_sha256)
    for name in ("decoder_round_0", "decoder"):
        save_decoder(Folder(run_folder.uri_of("model")), state, config=described, name=name)
    run_folder.write_bytes(HISTORY, b"[]")
    return {
        "rows_in": 0,
        "rows_out": 0,
        "refused": [],
        "epochs": 0,
        "imported": decoder_sha256(source),
        "weights_sha256": weights_sha256,
    }


def _read(source: str) -> bytes:
    return read_weights_file(source, "train.decoder_weights", "give a published *_decoder.pt, or null to train")
