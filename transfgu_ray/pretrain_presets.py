"""Named recipes of `transfgu pretrain`, like those of a run in `presets`."""

from collections.abc import Callable

from transfgu_ray.errors import ConfigError
from transfgu_ray.pretrain_config import (
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
    """The prior that the package carries: 1.3 million weights, 64 px, from rendered objects; hours on a CPU.

    Hue turns all round, so that classes cannot be told by colour; masked patches as in iBOT.
    """
    return PretrainConfig(
        preset="rendered_prior",
        data=PretrainDataConfig(source_size=96),
        # 6 blocks of width 128 on 8 px patches.
        encoder=PretrainEncoderConfig(
            name="vit_tiny_patch16_224",
            overrides={"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 8, "img_size": 64},
        ),
        crops=CropsConfig(
            global_size=64,
            local_size=32,
            num_local=4,
            local_scale=(0.1, 0.4),
            saturation=0.4,
            hue=0.5,
            blur_probs=(0.5, 0.1, 0.3),
        ),
        dino=DinoConfig(
            num_prototypes=512,
            head_hidden_dim=256,
            head_bottleneck_dim=64,
            teacher_temperature=(0.04, 0.06),
            teacher_temperature_warmup_frac=0.2,
            teacher_momentum=(0.99, 1.0),
            learning_rate=(7e-4, 1e-5),
            weight_decay=(0.04, 0.2),
            freeze_last_layer_frac=0.02,
            masked_weight=1.0,
        ),
        schedule=ScheduleConfig(epochs=40, batch_size=64, probe_epochs=5),
    )


def small_photos() -> PretrainConfig:
    """Photographs at 64 px on a CPU: the net of `rendered_prior`, with colours kept nearly as they are."""
    base = rendered_prior()
    return base.model_copy(
        update={
            "preset": "small_photos",
            "data": base.data.model_copy(update={"source_size": 64}),
            "crops": base.crops.model_copy(update={"hue": 0.1}),
        }
    )


PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "photos": photos,
    "small_photos": small_photos,
    "rendered_prior": rendered_prior,
}


def get_pretrain_preset(name: str) -> PretrainConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRETRAIN_PRESETS:
        raise ConfigError(f"unknown pretraining preset {name!r}; allowed: {', '.join(PRETRAIN_PRESETS)}")
    return PRETRAIN_PRESETS[name]()
