"""The finished model: encoder, backbone and decoder, saved as config.json + safetensors, usable without its run."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from transfgu_ray.algorithms.encoder.checkpoints import load_encoder, not_finite, read_safetensors
from transfgu_ray.algorithms.encoder.resnet import Backbone, PyramidDecoder, load_backbone
from transfgu_ray.algorithms.encoder.tokens import read_tokens, token_dim
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.rounds.segmenter import Classifier, MaskTransformer
from transfgu_ray.algorithms.scores.upsampling import slide, upsample_argmax
from transfgu_ray.errors import ArtifactError, WeightsError
from transfgu_ray.images import Resampling, to_working
from transfgu_ray.storage import Folder

FORMAT = "transfgu-model-1"


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the weights of a model: `config.json` of a model folder.

    Attributes:
        image_size: (height, width) in px that photographs are squashed to.
        kinds: kind of each class, in order of class id; the last is `none` where Eq. 8 makes a background class.
        decoder_layers: transformer layers of the segmenter.
        decoder_heads: attention heads of the segmenter.
        precision: arithmetic of the encoder.
        weights_sha256: hash of the encoder's weights.
        token_window: what the decoder reads; see `read_tokens`.
        decoder: `segmenter` or `classifier`.
        backbone: `prior`, or `resnet50_fpn` where the decoder reads backbone.safetensors instead of the encoder.
        norm_eps: epsilon of the norms in the decoder's blocks.
        qkv_bias: whether the decoder's queries, keys and values have biases.
        resample: how photographs are resized, see `images.Resampling`.
        bands: bands of a photograph that are its red, green and blue, see `images.decode_rgb`. Models of version 0.1 do
            not say any of the last four: the defaults are theirs.
    """

    image_size: tuple[int, int]
    kinds: tuple[str, ...]
    decoder_layers: int
    decoder_heads: int
    precision: str
    weights_sha256: str
    token_window: int | None = None
    decoder: str = "segmenter"
    backbone: str = "prior"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    resample: Resampling = "bicubic"
    bands: tuple[int, int, int] | None = None

    @property
    def background_id(self) -> int | None:
        """Class id of the background of Eq. 8, the last one; None where there is none."""
        return len(self.kinds) - 1 if self.kinds[-1] == "none" else None


class SegmentationModel(nn.Module):
    """Model from photographs to masks.

    Args:
        encoder: frozen encoder.
        decoder: trained decoder.
        config: everything but the weights.
        backbone: network that the decoder reads; None = the encoder.
    """

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, *, config: ModelConfig, backbone: Backbone | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.backbone = backbone
        self.decoder = decoder.eval().requires_grad_(False)
        self.config = config

    @torch.no_grad()
    def class_maps(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b k h w"]:
        """Return class logits on the patch grid of images that are already at the model's size."""
        return self.decode(self.read_tokens(images), (images.shape[2], images.shape[3]))

    def read_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b hw c"]:
        """Return the tokens that the decoder reads, for images that are already at the model's size."""
        return read_tokens(self.encoder, images, window=self.config.token_window, backbone=self.backbone)

    @torch.no_grad()
    def decode(self, tokens: Float[Tensor, "b hw c"], image_hw: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        """Return class logits from the tokens of images of (height, width) px."""
        maps: Tensor = self.decoder(tokens, self.encoder.grid_hw(image_hw))[0]
        return maps

    def segment(self, photos: list[Image.Image]) -> list[UInt8[np.ndarray, "h w"]]:
        """Return the class id of every pixel, at each photograph's own size."""
        size = self.config.image_size
        maps = self.class_maps(self._to_device([to_working(photo, size, self.config.resample) for photo in photos]))
        return [self.to_mask(each, photo) for each, photo in zip(maps, photos, strict=True)]

    def photo_maps(self, photo: Image.Image, sliding: bool) -> Float[Tensor, "k h w"]:
        """Return the class logits of a photograph, on the patch grid of the model's input.

        Args:
            photo: photograph of any size.
            sliding: slide windows of the model's input size over the photograph at its own size, enlarged where a side
                is shorter than the window; else squash the whole photograph to the input size.
        """
        window, patch = self.config.image_size, self.encoder.patch_size
        if not sliding:
            return self.class_maps(self._to_device([to_working(photo, window, self.config.resample)]))[0]
        sides = (photo.height, photo.width)
        scale = max(1.0, *(least / side for least, side in zip(window, sides, strict=True)))
        height, width = (
            # Rounding errors of a scaled side must not add a patch.
            max(least, math.ceil(side * scale / patch - 1e-6) * patch)
            for least, side in zip(window, sides, strict=True)
        )
        return slide(
            self.class_maps,
            self._to_device([to_working(photo, (height, width), self.config.resample)])[0],
            window_hw=window,
            patch_size=patch,
        )

    def to_mask(self, maps: Float[Tensor, "k h w"], photo: Image.Image) -> UInt8[np.ndarray, "h w"]:
        """Return the class id of every pixel of a photograph, from its class logits."""
        dtype = np.uint8 if len(self.config.kinds) <= 256 else np.uint16
        return upsample_argmax(maps, (photo.height, photo.width)).cpu().numpy().astype(dtype)

    def _to_device(self, images: list[np.ndarray]) -> UInt8[Tensor, "b 3 y x"]:
        return torch.from_numpy(np.stack(images)).to(self.encoder.device)


def build_decoder(config: ModelConfig, embed_dim: int, **training: Any) -> nn.Module:
    """Return the untrained decoder that a configuration describes, for an encoder of width `embed_dim`.

    Args:
        config: of the model.
        embed_dim: width of the encoder.
        training: `dropout` and `class_init` of a segmenter; see `MaskTransformer`.
    """
    width, num_classes = token_dim(embed_dim, config.token_window), len(config.kinds)
    decoder: nn.Module
    if config.decoder == "classifier":
        decoder = Classifier(num_classes, width)
    else:
        layers, heads = config.decoder_layers, config.decoder_heads
        decoder = MaskTransformer(
            num_classes,
            width,
            num_layers=layers,
            num_heads=heads,
            norm_eps=config.norm_eps,
            qkv_bias=config.qkv_bias,
            **training,
        )
    return decoder if config.backbone == "prior" else PyramidDecoder(decoder, width)


def save_decoder(folder: Folder, decoder: dict[str, Tensor], *, config: ModelConfig, name: str = "decoder") -> None:
    """Write a decoder beside the encoder, the configuration last."""
    state = {key: value.detach().cpu().contiguous() for key, value in decoder.items()}
    folder.write_bytes(f"{name}.safetensors", safetensors.torch.save(state))
    text = json.dumps({"format": FORMAT, **asdict(config), "background_id": config.background_id}, indent=1)
    folder.write_bytes("config.json", text.encode())


def load_model(folder: Folder, device: str = "cpu", decoder: str = "decoder") -> SegmentationModel:
    """Return the model in a folder with config.json and the safetensors of encoder, decoder and any backbone.

    Raises:
        ArtifactError: a file is missing or of another format.
        WeightsError: weights are damaged.
    """
    config = load_model_config(folder)
    encoder = load_encoder(
        _read(folder, "encoder.safetensors"),
        folder.uri_of("encoder.safetensors"),
        precision=config.precision,
        device=device,
    )
    backbone = None
    if config.backbone != "prior":
        name = "backbone.safetensors"
        backbone = load_backbone(_read(folder, name), folder.uri_of(name), precision=config.precision, device=device)
    module = build_decoder(config, encoder.embed_dim)
    state, _ = read_safetensors(_read(folder, f"{decoder}.safetensors"), folder.uri_of(f"{decoder}.safetensors"))
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise WeightsError(
            f"{folder.uri_of(decoder)}.safetensors does not fit the config.json beside it; take both from the same run"
        ) from None
    if unusable := not_finite(state):
        raise WeightsError(f"{folder.uri_of(decoder)}.safetensors {unusable}; train it again")
    return SegmentationModel(encoder, module.to(device), config=config, backbone=backbone)


def load_model_config(folder: Folder) -> ModelConfig:
    """Return the configuration in config.json of a model folder.

    Raises:
        ArtifactError: it is missing or of another format.
    """
    try:
        values = json.loads(_read(folder, "config.json"))
        if values.pop("format") != FORMAT:
            raise ValueError
        del values["background_id"]
        values["image_size"], values["kinds"] = tuple(values["image_size"]), tuple(values["kinds"])
        values["bands"] = tuple(values["bands"]) if values.get("bands") else None
        return ModelConfig(**values)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(
            f"{folder.uri}/config.json is not of format {FORMAT}; was this folder made by transfgu?"
        ) from None


def _read(folder: Folder, name: str) -> bytes:
    try:
        return folder.read_bytes(name)
    except OSError:
        raise ArtifactError(
            f"{folder.uri} is no model folder: it has no {name}; give a finished run or its model/"
        ) from None
