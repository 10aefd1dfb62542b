"""The configuration of a pretraining: one strict section per subject, every field with unit, range and source.

"DINO" cites Caron et al. (2021) and its released code, "iBOT" Zhou et al. (2022), "ours" a choice of this project. The
defaults are DINO's for a ViT-S/8 trained for 100 epochs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from transfgu_ray.config.base import Bands, Fraction, Positive, Section
from transfgu_ray.config.sections import Override, RuntimeConfig

Rate = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Scale = Annotated[float, Field(gt=0.0, le=1.0)]


def _pair(description: str, first: float, last: float) -> Any:
    # YAML has lists only, so tuples alone are exempt from strict typing.
    return Field(default=(first, last), strict=False, description=description)


class PretrainDataConfig(Section):
    """The images, and the working copy made of each."""

    root: str = Field("", description="folder of images, folder of Parquet tables, or one Parquet table; path or URI")
    val_root: str | None = Field(
        None,
        description="validation images; null = the val-*.parquet beside the tables, else held out",
    )
    source_size: Positive = Field(
        256,
        description="side in px of a working copy: shorter side resized to it, centre square cut out (DINO: 256)",
    )
    min_side_px: Positive = Field(32, description="images whose shorter side is below this are refused (ours)")
    max_pixels: Positive = Field(120_000_000, description="images with more pixels are refused before decoding (ours)")
    bands: Bands = None
    num_val: Positive = Field(
        1000,
        description="images held out by the seed where there are no validation images, at most a tenth (ours)",
    )


class PretrainEncoderConfig(Section):
    """The vision transformer to train, initialised from the seed."""

    name: str = Field("vit_small_patch8_224", description="timm model with a class token (DINO: ViT-S/8)")
    overrides: dict[
        Literal["embed_dim", "depth", "num_heads", "patch_size", "pos_embed", "img_size", "reg_tokens"], Override
    ] = Field(
        default_factory=dict,
        description="changes to the timm architecture, for small encoders; pos_embed: none = no positions (ours)",
    )


class CropsConfig(Section):
    """Multi-crop augmentation, see `algorithms.multicrop` (DINO, appendix)."""

    global_size: Positive = Field(224, description="side in px of the two global views")
    local_size: Positive = Field(96, description="side in px of a local view")
    num_local: int = Field(8, ge=0, description="local views per image (DINO: 8; 10 in its longest trainings)")
    global_scale: tuple[Scale, Scale] = _pair("range of a global view's share of the area (DINO: 0.4 to 1)", 0.4, 1.0)
    local_scale: tuple[Scale, Scale] = _pair("range of a local view's share of the area (DINO)", 0.05, 0.4)
    jitter_prob: Fraction = Field(0.8, description="probability of colour jitter")
    brightness: Fraction = Field(0.4, description="strength s of the jitter: a factor from 1 - s to 1 + s")
    contrast: Fraction = Field(0.4, description="likewise")
    saturation: Fraction = Field(0.2, description="likewise")
    hue: float = Field(0.1, ge=0.0, le=0.5, description="largest shift of hue, in turns of the colour circle")
    grey_prob: Fraction = Field(0.2, description="probability of conversion to grey")
    blur_probs: tuple[Fraction, Fraction, Fraction] = Field(
        (1.0, 0.1, 0.5),
        strict=False,
        description="probability of blur: first global view, second global view, local views",
    )
    solarise_prob: Fraction = Field(0.2, description="probability of solarisation of the second global view")


class DinoConfig(Section):
    """Self-distillation, see `algorithms.dino`. Pairs are first and last values of a schedule over the training."""

    num_prototypes: Annotated[int, Field(ge=2)] = Field(65536, description="outputs of the head (DINO)")
    head_hidden_dim: Positive = Field(2048, description="width of the two hidden layers of the head (DINO)")
    head_bottleneck_dim: Positive = Field(256, description="width of the bottleneck of the head (DINO)")
    student_temperature: AboveZero = Field(0.1, description="temperature of the student softmax (DINO)")
    teacher_temperature: tuple[AboveZero, AboveZero] = _pair(
        "temperature of the teacher softmax, linear (DINO)", 0.04, 0.07
    )
    teacher_temperature_warmup_frac: Fraction = Field(
        0.3, description="share of the training in which it rises (DINO: 30 of 100 epochs)"
    )
    assignment: Literal["centring", "sinkhorn"] = Field(
        "centring",
        description="what prevents collapse to one prototype (DINO: centring; DINOv2: sinkhorn)",
    )
    center_momentum: Fraction = Field(0.9, description="momentum of the teacher centres (DINO)")
    teacher_momentum: tuple[Fraction, Fraction] = _pair("momentum of the teacher weights, cosine (DINO)", 0.996, 1.0)
    learning_rate: tuple[AboveZero, Rate] = _pair(
        "of AdamW, cosine, not scaled by the batch (DINO: 0.0005 x batch / 256, so 0.002 at 1024, to 1e-6)", 0.002, 1e-6
    )
    warmup_frac: Fraction = Field(
        0.1, description="share of the training in which the rate rises (DINO: 10 of 100 epochs)"
    )
    weight_decay: tuple[Rate, Rate] = _pair("of AdamW, cosine; biases and norms are not decayed (DINO)", 0.04, 0.4)
    clip_norm: AboveZero = Field(3.0, description="norm to which larger gradients are clipped (DINO)")
    freeze_last_layer_frac: Fraction = Field(
        0.01, description="share of the training before the prototypes are updated (DINO: 1 of 100 epochs)"
    )
    koleo_weight: Rate = Field(
        0.0, description="weight of KoLeo, which spreads the embeddings of a batch (DINOv2: 0.1)"
    )
    masked_weight: Rate = Field(0.0, description="weight of iBOT's loss on masked patches; 0 = DINO alone (iBOT: 1)")
    mask_prob: Fraction = Field(0.5, description="share of the global views that are masked (iBOT)")
    mask_ratio: tuple[Fraction, Fraction] = _pair(
        "range of the share of masked patches per masked view (iBOT)", 0.1, 0.5
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="precision of the forward passes")


class ScheduleConfig(Section):
    """Length, batch size, and intervals of checkpoints and probes."""

    epochs: Positive = Field(100, description="passes over the images (DINO: 100 to 800)")
    batch_size: Positive = Field(1024, description="images per step, over all workers (DINO: 1024)")
    checkpoint_steps: Positive | None = Field(
        None, description="steps between checkpoints inside an epoch; null = only at the end of each epoch"
    )
    probe_epochs: Positive = Field(
        1, description="epochs between k-NN and RankMe probes; the last epoch is always probed"
    )


class PretrainConfig(Section):
    """Every setting of a pretraining."""

    preset: str = Field("photos", description="preset that the other values started from")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initial weights, order, augmentation, masks and hold-out")
    data: PretrainDataConfig = Field(default_factory=PretrainDataConfig)
    encoder: PretrainEncoderConfig = Field(default_factory=PretrainEncoderConfig)
    crops: CropsConfig = Field(default_factory=CropsConfig)
    dino: DinoConfig = Field(default_factory=DinoConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="after")
    def _check_together(self) -> PretrainConfig:
        ranges = {
            "crops.global_scale": self.crops.global_scale,
            "crops.local_scale": self.crops.local_scale,
            "dino.mask_ratio": self.dino.mask_ratio,
        }
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low <= high")
        return self
