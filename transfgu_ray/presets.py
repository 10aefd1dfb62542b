"""Named recipes. A preset is a function that returns a whole configuration; `--config` and `--set` change it."""

from collections.abc import Callable

from transfgu_ray.config import (
    CamConfig,
    ConceptsConfig,
    DataConfig,
    EncoderConfig,
    ExtractConfig,
    RunConfig,
    TrainConfig,
)
from transfgu_ray.errors import ConfigError

# 4 blocks of width 96 on 8 px patches: 0.5 million parameters.
_TINY_VIT = EncoderConfig(
    name="vit_tiny_patch16_224",
    weights="random",
    overrides={"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 8},
)


def paper() -> RunConfig:
    """The paper's text: ViT-S/8 DINO at 640 px, crops at 320 px, batch 256. Sized for GPUs; score: not run."""
    return RunConfig(preset="paper")


def tiny_cpu() -> RunConfig:
    """Proves that every stage works, in minutes on two cores: a randomly initialised tiny ViT at 128 px.

    The masks are not meaningful: a random encoder knows no semantics.
    """
    return RunConfig(
        preset="tiny_cpu",
        data=DataConfig(image_size=(128, 128)),
        encoder=_TINY_VIT,
        extract=ExtractConfig(batch_size=64),
        concepts=ConceptsConfig(num_concepts=8),
        cam=CamConfig(batch_size=8),
        train=TrainConfig(batch_size=16, learning_rate=1e-3, round_epochs=(2, 1, 1)),
    )


def demo() -> RunConfig:
    """The rendered example of `transfgu demo`: 24 scenes, K = 6, as `tiny_cpu` but with fewer windows."""
    base = tiny_cpu()
    return base.model_copy(
        update={
            "preset": "demo",
            "extract": base.extract.model_copy(update={"window_fracs": (0.5, 0.3), "images_per_part": 8}),
            "concepts": ConceptsConfig(num_concepts=6),
            "train": base.train.model_copy(update={"batch_size": 8}),
        }
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"tiny_cpu": tiny_cpu, "demo": demo, "paper": paper}


def get_preset(name: str) -> RunConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()
