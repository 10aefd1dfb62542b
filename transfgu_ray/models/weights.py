"""Sources of an encoder's weights: timm's hub, this package, a file, or the seed."""

import hashlib
import importlib.resources
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from transfgu_ray.config.run import RunConfig
from transfgu_ray.config.sections import EncoderConfig, TrainConfig
from transfgu_ray.errors import ArtifactError, ConfigError, StorageError, WeightsError
from transfgu_ray.storage import Folder, read_file

if TYPE_CHECKING:
    from transfgu_ray.algorithms.encoder.resnet import Backbone

# Resolved once per run, then used by every worker and by the finished model.
BACKBONE = "model/backbone.safetensors"


def resolve_backbone(config: RunConfig) -> bytes | None:
    """Return the safetensors bytes of a run's backbone; None where the student reads the prior.

    Raises:
        WeightsError: the weights are missing, damaged or do not fit.
    """
    source = config.train.backbone_weights
    if source is None:
        return None
    from transfgu_ray.algorithms.encoder.resnet import dump_resnet, load_resnet, random_resnet

    return dump_resnet(random_resnet(config.seed) if source == "random" else load_resnet(_read(source), source))


def load_run_backbone(run_folder: Folder, config: RunConfig, device: str) -> "Backbone | None":
    """Return the backbone in a run folder, on a device; None where the student reads the prior."""
    if config.train.backbone == "prior":
        return None
    from transfgu_ray.algorithms.encoder.resnet import load_backbone

    return load_backbone(
        run_folder.read_bytes(BACKBONE), run_folder.uri_of(BACKBONE), precision=config.encoder.precision, device=device
    )


def backbone_file_sha256(config: TrainConfig) -> str | None:
    """Return the hash of the file of a backbone's weights; None where there is no file or it is gone."""
    source = config.backbone_weights
    if source is None or source == "random":
        return None
    try:
        return hashlib.sha256(_read(source)).hexdigest()
    except WeightsError:
        return None


def _read(source: str) -> bytes:
    return read_weights_file(source, "train.backbone_weights", "give 'random' or the path of a checkpoint")


if TYPE_CHECKING:
    from transfgu_ray.algorithms.encoder.vit import Encoder

# Trained on rendered images of objects; small enough for the package.
_BUNDLED = "weights/rendered_vit.safetensors"
# Resolved once per run, then used by every worker and by the finished model.
ENCODER = "model/encoder.safetensors"
_PROBE_SECONDS = 5


def resolve_encoder(config: RunConfig) -> bytes:
    """Return the safetensors bytes of a run's encoder.

    Raises:
        WeightsError: the weights are missing, damaged or do not fit.
        ConfigError: a size in the configuration is not a multiple of the encoder's patch.
    """
    from transfgu_ray.algorithms.encoder.checkpoints import load_encoder

    data = read_encoder(config.encoder, config.seed)
    encoder = load_encoder(data, config.encoder.weights)
    _check_sizes(config, encoder.patch_size, encoder.embed_dim)
    return data


def read_encoder(config: EncoderConfig, seed: int) -> bytes:
    """Return the safetensors bytes of the encoder that `weights` and `name` give; the seed draws random weights.

    Raises:
        WeightsError: the weights are missing, damaged or do not fit.
    """
    source = config.weights
    if source == "hub":
        _require_hub(config)
    from transfgu_ray.algorithms.encoder.checkpoints import (
        build_vit,
        dump_encoder,
        is_encoder_file,
        load_vit,
        random_vit,
        with_interpolation,
    )
    from transfgu_ray.algorithms.encoder.vit import Encoder

    name, data = config.name, b""
    overrides: dict[str, int | str] = dict(config.overrides.items())
    if source == "hub":
        vit = build_vit(name, overrides, pretrained=True)
    elif source == "random":
        vit = random_vit(name, overrides, seed)
    else:
        data = _read_weights(source)
        vit = load_vit(data, source, name=name, overrides=overrides)
    # Refuses anything but a plain vision transformer.
    encoder = Encoder(vit)
    # Our own files hold their architecture and are kept as they are.
    data = data if is_encoder_file(data) else dump_encoder(vit, name, overrides=overrides)
    return data if encoder.vit.pos_embed is None else with_interpolation(data, source, config.pos_embed_interpolation)


def load_run_encoder(run_folder: Folder, precision: str, device: str) -> "Encoder":
    """Return the encoder in a run folder, on a device."""
    from transfgu_ray.algorithms.encoder.checkpoints import load_encoder

    return load_encoder(run_folder.read_bytes(ENCODER), run_folder.uri_of(ENCODER), precision=precision, device=device)


def weights_file_sha256(config: EncoderConfig) -> str | None:
    """Return the hash of the file of weights, bundled or the user's; None where there is no file or it is gone."""
    if config.weights in ("hub", "random"):
        return None
    try:
        return hashlib.sha256(_read_weights(config.weights)).hexdigest()
    except WeightsError:
        return None


def _read_weights(source: str) -> bytes:
    if source == "bundled":
        return _read_bundled()
    return read_weights_file(source, "encoder.weights", "give 'hub', 'bundled', 'random' or the path of a checkpoint")


def read_weights_file(source: str, setting: str, advice: str) -> bytes:
    """Return the content of the file that a setting gives.

    Args:
        source: path or URI.
        setting: name of the setting, for the message.
        advice: what to do, for the message.

    Raises:
        WeightsError: the file cannot be read.
        StorageError: the storage does not answer.
    """
    try:
        return read_file(source)
    except StorageError:
        raise
    except (OSError, ArtifactError):
        raise WeightsError(f"{setting}={source} cannot be read; {advice}") from None


def _read_bundled() -> bytes:
    file = importlib.resources.files("transfgu_ray").joinpath(_BUNDLED)
    try:
        return file.read_bytes()
    except OSError:
        raise WeightsError(
            f"encoder.weights=bundled, but this installation of transfgu_ray has no {_BUNDLED}; install the package "
            "again, or give 'hub', 'random' or the path of a checkpoint"
        ) from None


def _check_sizes(config: RunConfig, patch: int, embed_dim: int) -> None:
    sizes = {
        "data.image_size": config.data.image_size,
        "extract.crop_size": (config.extract_crop_size,),
        "cam.image_size": config.cam_image_size,
        "train.crop_size": config.train_crop_size,
        "train.inference_size": config.inference_size,
    }
    for name, size in sizes.items():
        if any(side % patch for side in size):
            raise ConfigError(
                f"{name} is {' x '.join(map(str, size))} px, which the encoder's patch of {patch} px does not divide; "
                f"choose multiples of {patch}"
            )
    window = config.train.token_window
    if window is not None and (window % patch or window > min(config.train_crop_size)):
        raise ConfigError(
            f"train.token_window={window} must be a multiple of the encoder's patch of {patch} px and no larger than "
            f"train.crop_size, {' x '.join(map(str, config.train_crop_size))} px"
        )
    if config.train.decoder == "segmenter" and embed_dim % config.train.decoder_heads:
        raise ConfigError(
            f"train.decoder_heads={config.train.decoder_heads} must divide the encoder's width of {embed_dim}"
        )


def _require_hub(config: EncoderConfig) -> None:
    """Refuse at once what timm refuses after a minute of retries: weights neither reachable nor cached."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    if not offline:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS)  # nosec B310  # the user's own address, not read
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            # huggingface_hub reads it when it is first imported, which is below.
            os.environ["HF_HUB_OFFLINE"] = "1"
    import timm
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(config.name, allow_unregistered=False) if timm.is_model(config.name) else None
    if cfg is None:
        raise WeightsError(
            f"encoder.name={config.name} is unknown to timm {timm.__version__}; see timm.list_models('vit_*')"
        )
    repository, files = cfg.hf_hub_id, ("model.safetensors", "pytorch_model.bin")
    cached = [try_to_load_from_cache(repository, file) for file in files] if repository else []
    if not any(isinstance(path, str) for path in cached):
        raise WeightsError(
            f"the weights of {config.name} are neither cached nor reachable at {endpoint}; connect to the network "
            "once, or give a checkpoint file with --weights FILE (encoder.weights)"
        )
