"""Named recipes. A preset is a function that returns a whole configuration; `--config` and `--set` change it."""

from collections.abc import Callable

from transfgu_ray.config import (
    AugmentConfig,
    CamConfig,
    ConceptsConfig,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    RunConfig,
    RuntimeConfig,
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
    """The rendered scenes of `transfgu demo`: one concept a class, the bundled encoder, 96 px, for two cores.

    The foreground is by patch contrast, the labels are by windows and the decoder reads windows too: the class token of
    so small a prior cannot be traced to single patches, and its patches know little but themselves.
    """
    return RunConfig(
        preset="demo",
        data=DataConfig(dataset="scenes", image_size=(96, 96)),
        encoder=EncoderConfig(
            name="vit_tiny_patch16_224",
            weights="bundled",
            # What the bundled file says of itself; 0.4 million parameters.
            overrides={"embed_dim": 128, "depth": 2, "num_heads": 4, "patch_size": 8, "pos_embed": "none"},
        ),
        extract=ExtractConfig(window_fracs=(0.5, 0.4), foreground_prior="patch_contrast", batch_size=64),
        concepts=ConceptsConfig(num_concepts=None),
        cam=CamConfig(response="windows", batch_size=8),
        train=TrainConfig(
            # Whole scenes: at half size an object would be three patches wide.
            crop_size=(96, 96),
            batch_size=16,
            learning_rate=5e-4,
            round_epochs=(6, 8),
            # As large as the local views that the bundled prior has learned from.
            token_window=24,
            # Half the time of an epoch; over three seeds as good as reading every crop.
            features="cached",
            decoder_heads=4,
            augment=AugmentConfig(crop_scale=(0.8, 1.0), jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0),
        ),
        evaluate=EvaluateConfig(baselines=("patch_tokens", "decoder_tokens", "random_vit", "raw_colour")),
        # One core a worker: 2 ranks of one thread are faster than 1 of two.
        runtime=RuntimeConfig(train_workers=2),
    )


# What `transfgu demo` renders for it.
DEMO_SCENES = {"num_train": 480, "num_val": 60, "seed": 0}

PRESETS: dict[str, Callable[[], RunConfig]] = {"tiny_cpu": tiny_cpu, "demo": demo, "paper": paper}


def get_preset(name: str) -> RunConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()
