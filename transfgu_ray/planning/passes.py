"""The images and crops that go through the encoder, counted by their size."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transfgu_ray.config.run import RunConfig
from transfgu_ray.pipeline.baselines import OF_TWO_VIEWS, feature_of
from transfgu_ray.planning.operations import VitShape, vit_operations


@dataclass(frozen=True)
class Passes:
    """Forward passes of images of one size through the encoder.

    Attributes:
        count: number of images.
        image_hw: their (height, width) in px.
        class_only: whether the last block is computed for the class token alone.
    """

    count: int
    image_hw: tuple[int, int]
    class_only: bool


def operations_of(passes: Sequence[Passes], shape: VitShape) -> int:
    """Return the floating-point operations of forward passes; see `vit_operations`."""
    return sum(each.count * vit_operations(shape, each.image_hw, class_only=each.class_only) for each in passes)


def crop_passes(config: RunConfig, count: int) -> Passes:
    """Return the passes of windows whose class token is read."""
    return Passes(count, (config.extract_crop_size, config.extract_crop_size), class_only=True)


def label_passes(config: RunConfig, pieces: dict[str, Any], count: int) -> tuple[Passes, ...]:
    """Return the passes that label photographs."""
    whole = Passes(count, config.cam_image_size, class_only=True)
    if config.cam.response != "windows":
        return (whole,)
    return (whole, crop_passes(config, count * int(pieces["windows"])))


def token_passes(config: RunConfig, shape: VitShape, count: int, *, image_hw: tuple[int, int]) -> tuple[Passes, ...]:
    """Return the passes that read the decoder's input from images; none where it has a backbone of its own."""
    if config.train.backbone != "prior":
        return ()
    if (window := config.train.token_window) is None:
        return (Passes(count, image_hw, class_only=False),)
    windows = math.prod((side - window) // shape.patch_size + 1 for side in image_hw)
    return (Passes(count * windows, (window, window), class_only=False),)


def baseline_passes(config: RunConfig, shape: VitShape, *, num_drawn: int, num_scored: int) -> list[Passes]:
    """Return the passes that read the features of the baselines, and the two views of the heads that learn from them.

    Args:
        config: of the run.
        shape: of the encoder.
        num_drawn: number of training photographs whose patches are clustered.
        num_scored: number of photographs to score.
    """
    features = {feature_of(name) for name in config.evaluate.baselines}
    size, photos = config.data.image_size, num_drawn + num_scored
    whole = photos * len(features - {"raw_colour", "decoder_tokens"})
    if any(name in OF_TWO_VIEWS for name in config.evaluate.baselines):
        whole += 2 * num_drawn
    of_decoder = photos if "decoder_tokens" in features else 0
    return [Passes(whole, size, class_only=False), *token_passes(config, shape, of_decoder, image_hw=size)]


def by_size(passes: Sequence[Passes], shape: VitShape) -> list[dict[str, Any]]:
    """Return the passes added up by size, the smallest first: fields of `Passes`, and the "operations_each" of one."""
    counts: Counter[tuple[tuple[int, int], bool]] = Counter()
    for each in passes:
        counts[each.image_hw, each.class_only] += each.count
    return [
        {
            **asdict(Passes(count, image_hw, class_only)),
            "operations_each": vit_operations(shape, image_hw, class_only=class_only),
        }
        for (image_hw, class_only), count in sorted(counts.items())
        if count
    ]
