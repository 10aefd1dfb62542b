"""The configuration of a pretraining: one strict section a subject, every field with unit, range and source.

"DINO" cites Caron et al. (2021) and its released code, "iBOT" Zhou et al. (2022), "ours" a choice of this project. The
defaults are DINO's for a ViT-S/8 in 100 epochs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from transfgu_ray.config.base import Fraction, Positive, Section
from transfgu_ray.config.run import Override, RuntimeConfig

Rate = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Scale = Annotated[float, Field(gt=0.0, le=1.0)]


def _pair(description: str, first: float, last: float) -> Any:
    # YAML has lists only, so tuples alone are exempt from strict typing.
    return Field(default=(first, last), strict=False, description=description)


class PretrainDataConfig(Section):
    """Which images, and the working copy that is made of each."""

    root: str = Field("", description="folder of images, folder of Parquet tables, or one such table; path or URI")
    val_root: str | None = Field(
        None, description="images that are never trained on; null = the table's own val-*.parquet, else held out"
    )
    source_size: Positive = Field(
        256, description="side in px of a working copy: shorter side resized to it, centre square cut (DINO: 256)"
    )
    min_side_px: Positive = Field(32, description="images with a shorter side below this are refused (ours)")
    max_pixels: Positive = Field(120_000_000, description="images with more pixels are refused before decoding (ours)")
    num_val: Positive = Field(
        1000, description="images held out by the seed where there are no others, at most a tenth of all (ours)"
    )


class PretrainEncoderConfig(Section):
    """The vision transformer that is trained from the seed."""

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
    num_local: int = Field(8, ge=0, description="local views an image (DINO: 8; its longest trainings 10)")
    global_scale: tuple[Scale, Scale] = _pair("range of a global view's share of the area (DINO: 0.4 to 1)", 0.4, 1.0)
    local_scale: tuple[Scale, Scale] = _pair("range of a local view's share of the area (DINO)", 0.05, 0.4)
    jitter_prob: Fraction = Field(0.8, description="probability of colour jitter")
    brightness: Fraction = Field(0.4, description="strength of the jitter: factor from 1 - s to 1 + s")
    contrast: Fraction = Field(0.4, description="likewise")
    saturation: Fraction = Field(0.2, description="likewise")
    hue: float = Field(0.1, ge=0.0, le=0.5, description="strength of the hue jitter, in turns of the colour circle")
    grey_prob: Fraction = Field(0.2, description="probability of dropping colour")
    blur_probs: tuple[Fraction, Fraction, Fraction] = Field(
        (1.0, 0.1, 0.5), strict=False, description="probability of blur: first and second global view, local views"
    )
    solarise_prob: Fraction = Field(0.2, description="probability of solarisation of the second global view")


class DinoConfig(Section):
    """Self-distillation, see `algorithms.dino`. Pairs are (first, last) of a schedule over the whole training."""

    num_prototypes: Annotated[int, Field(ge=2)] = Field(65536, description="outputs of the head (DINO)")
    head_hidden_dim: Positive = Field(2048, description="width of the head's two hidden layers (DINO)")
    head_bottleneck_dim: Positive = Field(256, description="width of the head's bottleneck (DINO)")
    student_temperature: AboveZero = Field(0.1, description="temperature of the student's softmax (DINO)")
    teacher_temperature: tuple[AboveZero, AboveZero] = _pair("of the teacher's softmax, linear (DINO)", 0.04, 0.07)
    teacher_temperature_warmup_frac: Fraction = Field(
        0.3, description="share of the training it rises (DINO: 30 of 100)"
    )
    assignment: Literal["centring", "sinkhorn"] = Field(
        "centring", description="what keeps the teacher from one prototype (DINO: centring; DINOv2: sinkhorn)"
    )
    center_momentum: Fraction = Field(0.9, description="momentum of the teacher's centres (DINO)")
    teacher_momentum: tuple[Fraction, Fraction] = _pair("momentum of the teacher's weights, cosine (DINO)", 0.996, 1.0)
    learning_rate: tuple[AboveZero, Rate] = _pair(
        "AdamW, cosine, for the batch as it is (DINO: 0.0005 x batch / 256, so 0.002 at 1024, to 1e-6)", 0.002, 1e-6
    )
    warmup_frac: Fraction = Field(0.1, description="share of the training the rate rises (DINO: 10 of 100 epochs)")
    weight_decay: tuple[Rate, Rate] = _pair("cosine; biases and norms are not decayed (DINO)", 0.04, 0.4)
    clip_norm: AboveZero = Field(3.0, description="largest norm of the gradient (DINO)")
    freeze_last_layer_frac: Fraction = Field(
        0.01, description="share of the training in which the prototypes stay as they are (DINO: 1 of 100 epochs)"
    )
    koleo_weight: Rate = Field(0.0, description="weight of the KoLeo term, which spreads a batch (DINOv2: 0.1)")
    masked_weight: Rate = Field(0.0, description="weight of iBOT's loss on masked patches; 0 = DINO alone (iBOT: 1)")
    mask_prob: Fraction = Field(0.5, description="share of the global views that are masked (iBOT)")
    mask_ratio: tuple[Fraction, Fraction] = _pair("range of a masked view's share of masked patches (iBOT)", 0.1, 0.5)
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic of the forwards")


class ScheduleConfig(Section):
    """How long, in what batches, and how often it is saved and looked at."""

    epochs: Positive = Field(100, description="times over the images (DINO: 100 to 800)")
    batch_size: Positive = Field(1024, description="images a step over all workers (DINO: 1024)")
    checkpoint_steps: Positive | None = Field(
        None, description="steps between checkpoints inside an epoch; null = at each epoch's end only"
    )
    probe_epochs: Positive = Field(
        1, description="epochs between two k-NN and RankMe probes; the last is always probed"
    )


class PretrainConfig(Section):
    """Everything that fixes a pretraining."""

    preset: str = Field("photos", description="the recipe the other values started from")
    seed: int = Field(0, ge=0, lt=2**31, description="seeds initial weights, order, augmentation, masks, hold-out")
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
