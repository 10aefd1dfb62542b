"""Named recipes of `transfgu pretrain`."""

from collections.abc import Callable

from transfgu_ray.errors import ConfigError
from transfgu_ray.pretraining.config import (
    CropsConfig,
    DinoConfig,
    PretrainConfig,
    PretrainDataConfig,
    PretrainEncoderConfig,
    ScheduleConfig,
)


def photos() -> PretrainConfig:
    """DINO's ViT-S/8 at 224 px on the user's own photographs, 100 epochs. Sized for GPUs; score: not run."""
    return PretrainConfig(preset="photos", dino=DinoConfig(precision="bfloat16"))


def rendered_prior() -> PretrainConfig:
    """The prior shipped with the package: 0.4 million weights, 48 px, rendered objects; 44 minutes on one CPU core.

    Colour is mostly dropped, so that shape tells images apart. Sinkhorn assignments and KoLeo are needed: with
    centring alone, so short a training stays collapsed.
    """
    return PretrainConfig(
        preset="rendered_prior",
        data=PretrainDataConfig(source_size=72),
        # 2 blocks of width 128 on 8 px patches. Without position embedding, scenes of any size are encoded alike. Two
        # blocks learn more in an hour than four, and Eq. 5 needs only that the class token attends in the last one.
        encoder=PretrainEncoderConfig(
            name="vit_tiny_patch16_224",
            overrides={
                "embed_dim": 128,
                "depth": 2,
                "num_heads": 4,
                "patch_size": 8,
                "pos_embed": "none",
                "img_size": 48,
            },
        ),
        crops=CropsConfig(
            global_size=48,
            local_size=24,
            num_local=4,
            global_scale=(0.5, 1.0),
            # At the scale of the global views, so that a few patches must reveal which object they are part of.
            local_scale=(0.11, 0.35),
            saturation=0.4,
            hue=0.5,
            grey_prob=0.8,
            blur_probs=(0.2, 0.0, 0.0),
            solarise_prob=0.0,
        ),
        dino=DinoConfig(
            num_prototypes=128,
            head_hidden_dim=256,
            head_bottleneck_dim=64,
            teacher_temperature=(0.04, 0.04),
            teacher_temperature_warmup_frac=0.0,
            assignment="sinkhorn",
            teacher_momentum=(0.99, 1.0),
            learning_rate=(2.5e-3, 1e-5),
            warmup_frac=0.03,
            freeze_last_layer_frac=0.02,
            weight_decay=(0.04, 0.2),
            koleo_weight=0.3,
        ),
        schedule=ScheduleConfig(epochs=10, batch_size=32),
    )


def small_photos() -> PretrainConfig:
    """Photographs of 64 px on a CPU: the network of `rendered_prior` with DINO's colours and scales."""
    base = rendered_prior()
    crops = {
        "global_scale": (0.4, 1.0),
        "local_scale": (0.1, 0.4),
        "hue": 0.1,
        "grey_prob": 0.2,
        "blur_probs": (0.5, 0.1, 0.3),
        "solarise_prob": 0.2,
    }
    return base.model_copy(
        update={
            "preset": "small_photos",
            "data": base.data.model_copy(update={"source_size": 64}),
            "crops": base.crops.model_copy(update=crops),
            # Photographs show many more kinds of objects than the 12 rendered ones.
            "dino": base.dino.model_copy(update={"num_prototypes": 512}),
        }
    )


PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "photos": photos,
    "small_photos": small_photos,
    "rendered_prior": rendered_prior,
}


def get_pretrain_preset(name: str) -> PretrainConfig:
    """Return the configuration of a named recipe.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRETRAIN_PRESETS:
        raise ConfigError(f"unknown pretraining preset {name!r}; allowed: {', '.join(PRETRAIN_PRESETS)}")
    return PRETRAIN_PRESETS[name]()
